"""Bad input is refused before any work, by an error that names the argument, what was expected and what came.

What every implementation that says it checks its input must refuse is in conformance/test_input.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa import functional
from nsa.config import NSAConfig
from nsa.functional import CompressionParams
from validation.cases import Case, config, cumulative, draw, whole

T = 12
GOOD = Case("errors", whole(T), config(selected=3), group=2)
TENSORS = draw(GOOD, torch.float32)
PARAMS = CompressionParams(*(TENSORS[f"k_{name}"] for name in ("position", "weight", "weight_out")))
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "compress": ("x", "params"),
    "compressed_attention": ("q", "k_cmp", "v_cmp"),
    "select_blocks": ("q", "k_cmp", "lse"),
    "selected_attention": ("q", "k", "v", "indices"),
    "sliding_window_attention": ("q", "k", "v"),
    "nsa_attention": ("q", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gates"),
}
VALUES: dict[str, Any] = {**TENSORS, "x": TENSORS["k"], "params": PARAMS}
ATTENTION = [stage for stage in ARGUMENTS if stage != "compress"]

each_stage = pytest.mark.parametrize("stage", ARGUMENTS)
each_attention = pytest.mark.parametrize("stage", ATTENTION)


def plainly(function: Callable[[], Any]) -> Any:
    return function()


def compiled(function: Callable[[], Any]) -> Any:
    torch._dynamo.reset()
    return torch.compile(function, backend="eager")()


def compiled_whole(function: Callable[[], Any]) -> Any:
    torch._dynamo.reset()
    return torch.compile(function, backend="eager", fullgraph=True)()


def differentiated(function: Callable[[], Any]) -> Any:
    return torch.func.grad(lambda x: x * function().sum())(torch.ones(()))


def of_every_sample(function: Callable[[], Any]) -> Any:
    return torch.func.vmap(torch.func.grad(lambda x: x * function().sum()))(torch.ones(2))


def on_another_default_device(function: Callable[[], Any]) -> Any:
    with torch.device("meta"):
        return function()


TRANSFORMATIONS = (plainly, compiled_whole, differentiated, of_every_sample, on_another_default_device)
"""What PyTorch does to a program; what is refused is refused under each, for the same reason.

A graph that may break takes five times as long to compile as one that must be whole, and both trace the same checks: it
is tried on a few calls of each stage.
"""
BY_VALUE = (plainly, differentiated, on_another_default_device)
"""Those under which values can be looked at."""


def call(stage: str, **changes: Any) -> Any:
    """A good call of a stage but for `changes`; a function among them is applied to the good value."""
    values = {name: VALUES[name] for name in ARGUMENTS[stage]} | {"config": GOOD.config, "backend": "eager"}
    for name, change in changes.items():
        applies = callable(change) and not isinstance(change, type)
        values[name] = change(values[name]) if applies else change
    return getattr(functional, stage)(**values)


def refused_under(
    transformations: Sequence[Callable[..., Any]], error: type[Exception], stage: str, *words: str, **changes: Any
) -> None:
    """Fail unless the call raises exactly `error` with every one of `words` in its message, however it is transformed.

    A graph that must be whole has an error of its own, which quotes ours.
    """
    for transformation in transformations:
        expected = torch._dynamo.exc.Unsupported if transformation is compiled_whole else error
        with pytest.raises(expected) as caught:
            transformation(lambda: call(stage, **changes))
        assert caught.type is expected, transformation.__name__
        message = str(caught.value)
        missing = [word for word in (*words, error.__name__ * (expected is not error)) if word not in message]
        assert not missing, f"{transformation.__name__}: the message lacks {missing}: {message}"


refused = partial(refused_under, TRANSFORMATIONS)
refused_by_value = partial(refused_under, BY_VALUE)
"""A refusal for what tensors hold, which a compiler does not see."""


@each_stage
def test_the_good_call_is_good(stage: str) -> None:
    call(stage)


@each_stage
def test_a_graph_that_may_break_refuses_too(stage: str) -> None:
    name = ARGUMENTS[stage][0]
    refused_under([compiled], ValueError, stage, name, "dimensions", "got", **{name: lambda x: x[0]})
    refused_under([compiled], TypeError, stage, "config", "NSAConfig", "dict", config={})


# 1. Each tensor of each stage: rank, dtype, device, type.

EVERY_TENSOR = [(stage, name) for stage, names in ARGUMENTS.items() for name in names if name != "params"]
each_tensor = pytest.mark.parametrize(("stage", "name"), EVERY_TENSOR)


@each_tensor
def test_wrong_rank(stage: str, name: str) -> None:
    rank = VALUES[name].dim()
    refused(ValueError, stage, name, str(rank), "got", **{name: lambda x: x[0]})


@each_tensor
def test_wrong_dtype(stage: str, name: str) -> None:
    refused(TypeError, stage, name, "must", "torch.int64", **{name: lambda x: x.long()})


@each_tensor
def test_not_a_tensor(stage: str, name: str) -> None:
    refused(TypeError, stage, name, "tensor", "list", **{name: [0.5]})


@pytest.mark.parametrize(("stage", "name"), [pair for pair in EVERY_TENSOR if pair[1] not in ("q", "x")])
def test_wrong_device(stage: str, name: str) -> None:
    refused(ValueError, stage, name, "cpu", "meta", **{name: lambda x: x.to("meta")})


@pytest.mark.parametrize(("stage", "name"), [pair for pair in EVERY_TENSOR if pair[1] not in ("q", "x")])
def test_wrong_batch(stage: str, name: str) -> None:
    refused(ValueError, stage, name, "1", "2", **{name: lambda x: x.expand(2, *x.shape[1:])})


@pytest.mark.parametrize(("stage", "name"), [pair for pair in EVERY_TENSOR if pair[1][:2] in ("k", "v", "k_", "v_")])
def test_mixed_dtypes(stage: str, name: str) -> None:
    refused(TypeError, stage, name, "torch.float32", "torch.float16", **{name: lambda x: x.half()})


# 2. Shapes that do not fit one another.

SHAPES: list[tuple[str, str, Callable[[Tensor], Tensor], tuple[str, ...]]] = [
    ("compressed_attention", "k_cmp", lambda x: x[..., :-1], ("8", "7")),
    ("compressed_attention", "v_cmp", lambda x: x[:, :-1], ("5", "4")),
    ("compressed_attention", "v_cmp", lambda x: x[:, :, :1], ("2", "1")),
    ("select_blocks", "k_cmp", lambda x: x[..., :-1], ("8", "7")),
    ("select_blocks", "lse", lambda x: x[:, :-1], ("12", "11")),
    ("select_blocks", "lse", lambda x: x[..., :-1], ("4", "3")),
    ("selected_attention", "k", lambda x: x[..., :-1], ("8", "7")),
    ("selected_attention", "v", lambda x: x[:, :-1], ("12", "11")),
    ("selected_attention", "indices", lambda x: x[:, :-1], ("12", "11")),
    ("selected_attention", "indices", lambda x: x[:, :, :1], ("2", "1")),
    ("sliding_window_attention", "k", lambda x: x[..., :-1], ("8", "7")),
    ("sliding_window_attention", "v", lambda x: x[:, :, :1], ("2", "1")),
    ("nsa_attention", "v_slc", lambda x: x[:, :-1], ("12", "11")),
    ("nsa_attention", "v_win", lambda x: x[..., :-1], ("8", "7")),
    ("nsa_attention", "v_cmp", lambda x: x[..., :-1], ("8", "7")),
    ("nsa_attention", "gates", lambda x: x[..., :-1], ("3", "2")),
    ("nsa_attention", "gates", lambda x: x[:, :, :-1], ("4", "3")),
]


@pytest.mark.parametrize(
    ("stage", "name", "change", "words"), SHAPES, ids=[f"{stage}-{name}-{words[0]}" for stage, name, _, words in SHAPES]
)
def test_shapes_that_do_not_fit(
    stage: str, name: str, change: Callable[[Tensor], Tensor], words: tuple[str, ...]
) -> None:
    refused(ValueError, stage, name, *words, **{name: change})


@pytest.mark.parametrize("stage", ["compressed_attention", "select_blocks", "nsa_attention"])
def test_blocks_that_the_keys_do_not_give(stage: str) -> None:
    fewer = {name: lambda x: x[:, :-1] for name in ARGUMENTS[stage] if name.endswith("_cmp")}
    refused(ValueError, stage, "k_cmp", "num_keys", "5", "4", **fewer)


def test_window_and_selected_keys_of_different_length() -> None:
    shorter = {name: lambda x: x[:, :-1] for name in ("k_win", "v_win")}
    refused(ValueError, "nsa_attention", "k_win", "12", "11", **shorter)


@each_attention
def test_heads_that_do_not_divide(stage: str) -> None:
    changes = {"q": lambda x: x[:, :, :3]} | ({"lse": lambda x: x[..., :3]} if stage == "select_blocks" else {})
    refused(ValueError, stage, "q", "2", "3", **changes)


@pytest.mark.parametrize("stage", ["selected_attention", "sliding_window_attention", "nsa_attention"])
def test_more_queries_than_keys(stage: str) -> None:
    shorter = {
        name: lambda x: x[:, :8] for name in ARGUMENTS[stage] if name in ("k", "v") or name[2:] in ("slc", "win")
    }
    if stage == "nsa_attention":
        shorter |= {name: lambda x: x[:, :3] for name in ("k_cmp", "v_cmp")}
    refused(ValueError, stage, "q", "8", "12", **shorter)


@pytest.mark.parametrize("stage", ["compressed_attention", "select_blocks"])
def test_more_queries_than_num_keys(stage: str) -> None:
    blocks = {name: lambda x: x[:, :3] for name in ARGUMENTS[stage] if name.endswith("_cmp")}
    refused(ValueError, stage, "q", "8", "12", num_keys=8, **blocks)


# 3. Packing.

BAD_OFFSETS = {
    "falling": ([0, 7, 5, T], ValueError, "[0, 7, 5, 12]"),
    "not_from_0": ([1, 5, T], ValueError, "[1, 5, 12]"),
    "not_to_the_end": ([0, 5, T - 1], ValueError, "[0, 5, 11]"),
    "past_the_end": ([0, 5, T + 1], ValueError, "[0, 5, 13]"),
    "empty": ([], ValueError, "entry"),
}


def offsets_name(stage: str) -> str:
    return "cu_seqlens" if stage == "compress" else "cu_seqlens_q"


@each_stage
@pytest.mark.parametrize("kind", BAD_OFFSETS)
def test_bad_offsets(stage: str, kind: str) -> None:
    values, error, word = BAD_OFFSETS[kind]
    name = offsets_name(stage)
    check = refused if kind == "empty" else refused_by_value
    check(error, stage, name, word, **{name: torch.tensor(values, dtype=torch.int32)})


@each_stage
def test_offsets_of_the_wrong_dtype(stage: str) -> None:
    name = offsets_name(stage)
    refused(TypeError, stage, name, "torch.int32", "torch.int64", f"pass {name}.int()", **{name: torch.tensor([0, T])})


@each_stage
def test_offsets_of_the_wrong_rank(stage: str) -> None:
    name = offsets_name(stage)
    refused(ValueError, stage, name, "(1, 2)", **{name: cumulative((T,))[None]})


@each_stage
def test_packing_takes_a_batch_of_one(stage: str) -> None:
    name = offsets_name(stage)
    batched = {key: lambda x: x.expand(2, *x.shape[1:]) for key in ARGUMENTS[stage] if key != "params"}
    refused(ValueError, stage, name, "batch", "2", **batched, **{name: cumulative((T,))})


@each_attention
def test_bad_offsets_of_the_keys(stage: str) -> None:
    bad = {"cu_seqlens_q": cumulative((5, 7)), "cu_seqlens_k": cumulative((5, 6))}
    refused_by_value(ValueError, stage, "cu_seqlens_k", "12", "[0, 5, 11]", **bad)


@each_attention
def test_offsets_of_different_length(stage: str) -> None:
    bad = {"cu_seqlens_q": cumulative((5, 7)), "cu_seqlens_k": cumulative((5, 6, 1))}
    refused(ValueError, stage, "cu_seqlens_k", "3", "4", **bad)


@each_attention
def test_a_sequence_with_more_queries_than_keys(stage: str) -> None:
    bad = {"cu_seqlens_q": cumulative((5, 7)), "cu_seqlens_k": cumulative((7, 5))}
    refused_by_value(ValueError, stage, "cu_seqlens_k", "[5, 7]", "[7, 5]", **bad)


@each_attention
def test_offsets_of_the_keys_alone(stage: str) -> None:
    refused(ValueError, stage, "cu_seqlens_q", "None", cu_seqlens_k=cumulative((5, 7)))


# 4. Indices.


@pytest.mark.parametrize("stage", ["selected_attention", "nsa_attention"])
def test_a_block_listed_twice(stage: str) -> None:
    indices = torch.tensor([1, -1, 1], dtype=torch.int32).expand(1, T, 2, 3)
    refused_by_value(ValueError, stage, "indices", "once", "got 1 twice", indices=indices)


def test_minus_one_may_be_listed_twice() -> None:
    call("selected_attention", indices=torch.tensor([-1, -1, 1], dtype=torch.int32).expand(1, T, 2, 3))


# 5. Compression parameters.


def test_parameters_where_nothing_is_learned() -> None:
    refused(ValueError, "compress", "params", "None", config=config(compression="mean"))


def test_no_parameters_where_something_is_learned() -> None:
    refused(TypeError, "compress", "params", "CompressionParams", "NoneType", params=None)


def test_two_layers_where_one_is_meant() -> None:
    refused(ValueError, "compress", "params.weight_out", "linear", config=config(compression="linear"))


@pytest.mark.parametrize(
    ("field", "got"), [("position", "(2, 3, 8)"), ("weight", "(2, 31, 5)"), ("weight_out", "(2, 4, 8)")]
)
def test_parameters_of_the_wrong_shape(field: str, got: str) -> None:
    bad = PARAMS._replace(**{field: getattr(PARAMS, field)[:, :-1]})
    refused(ValueError, "compress", f"params.{field}", got, params=bad)


# 6. Everything else.


@each_stage
def test_unknown_backend(stage: str) -> None:
    refused(ValueError, stage, "backend", "'eager'", "'cuda'", backend="cuda")


@each_stage
def test_triton_is_never_replaced_silently(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nsa.kernels.INTERPRETED", False)
    refused(ValueError, stage, "backend", "tensors on cpu", backend="triton")


@each_stage
def test_config_of_another_type(stage: str) -> None:
    refused(TypeError, stage, "config", "NSAConfig", "dict", config={})


@each_attention
@pytest.mark.parametrize("scale", ["1", True])
def test_scale_of_another_type(stage: str, scale: Any) -> None:
    refused(TypeError, stage, "scale", "float", type(scale).__name__, scale=scale)


@each_attention
@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_scale_that_is_no_number(stage: str, scale: float) -> None:
    refused(ValueError, stage, "scale", "finite", str(scale), scale=scale)


@each_attention
def test_no_heads(stage: str) -> None:
    refused(ValueError, stage, "q", "multiple of the heads", "0", q=lambda x: x[:, :, :0])


# Importing what torch.func.jvp and a first compilation need warns in PyTorch itself.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("transformation", [plainly, compiled], ids=["plain", "compiled"])
@each_stage
def test_forward_mode_derivatives_are_refused(stage: str, transformation: Callable[..., Any]) -> None:
    def derivative(name: str) -> Any:
        return torch.func.jvp(lambda x: call(stage, **{name: lambda _: x}), (VALUES[name],), (VALUES[name],))

    names = [name for name in ARGUMENTS[stage] if name not in ("params", "indices")]
    for name in names[:1] if transformation is compiled else names:  # Compiling takes a second a name.
        with pytest.raises(ValueError, match=f"{name} must have no tangent"):
            transformation(partial(derivative, name))


@pytest.mark.parametrize("transformation", [plainly, compiled, compiled_whole], ids=["plain", "compiled", "whole"])
@each_stage
def test_derivatives_of_functorch_are_refused(stage: str, transformation: Callable[..., Any]) -> None:
    name = ARGUMENTS[stage][0]

    def loss(x: Tensor) -> Tensor:
        out = call(stage, **{name: lambda _: x})
        return (out[0] if isinstance(out, tuple) else out).sum().float()

    samples = torch.stack([VALUES[name]] * 2)
    refusal = pytest.raises(
        (ValueError, torch._dynamo.exc.Unsupported), match=f"{name} must be differentiated by torch.au"
    )
    with refusal:
        transformation(lambda: torch.func.grad(loss)(VALUES[name]))
    if transformation is plainly:  # compiling takes a second
        with refusal:
            torch.func.vmap(torch.func.grad(loss))(samples)


@pytest.mark.parametrize("stage", ["compressed_attention", "select_blocks"])
def test_num_keys_of_another_type(stage: str) -> None:
    refused(TypeError, stage, "num_keys", "int", "float", num_keys=12.0)


# 7. The configuration refuses itself.

INTEGERS = [field.name for field in fields(NSAConfig) if field.type is int]
BAD_CONFIGS: list[tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = [
    ({"compress_stride": 12}, ValueError, ("compress_block_size", "multiple", "12", "32")),
    ({"select_block_size": 72}, ValueError, ("select_block_size", "multiple", "16", "72")),
    ({"compress_block_size": 128}, ValueError, ("compress_block_size", "64", "128")),
    ({"num_selected_blocks": 2}, ValueError, ("num_selected_blocks", "3", "2")),
    ({"window_size": -1}, ValueError, ("window_size", "0", "-1")),
    ({"num_selected_blocks": -1}, ValueError, ("num_selected_blocks", "0", "-1")),
    ({"num_local_blocks": -1}, ValueError, ("num_local_blocks", "0", "-1")),
    ({"compress_stride": 0}, ValueError, ("compress_stride", "1", "0")),
    ({"window_size": 5.0}, TypeError, ("window_size", "int", "5.0")),
    ({"window_size": True}, TypeError, ("window_size", "int", "True")),
    ({"shared_kv": 1}, TypeError, ("shared_kv", "bool", "1")),
    ({"compression": "max"}, ValueError, ("compression", "mlp", "'max'")),
    ({"compression": ["mlp"]}, ValueError, ("compression", "linear", "['mlp']")),
    ({"window_size": "8"}, TypeError, ("window_size", "int", "'8'", "str")),
    *(({name: 2**70}, ValueError, (name, "at most 2147483647", str(2**70))) for name in INTEGERS),
    *(({name: 2**31}, ValueError, (name, "at most 2147483647", str(2**31))) for name in INTEGERS),
    *(({name: None}, TypeError, (name, "int", "NoneType")) for name in INTEGERS),
]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    BAD_CONFIGS,
    ids=["-".join(map(str, *changes.items())) for changes, *_ in BAD_CONFIGS],
)
def test_illegal_configurations(changes: dict[str, Any], error: type[Exception], words: tuple[str, ...]) -> None:
    with pytest.raises(error) as caught:
        NSAConfig(**changes)
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"the message lacks {missing}: {caught.value}"
