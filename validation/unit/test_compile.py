"""What PyTorch does to a program, done to this one: compilation to one graph, operators under test, recomputation."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from nsa import (
    NativeSparseAttention,
    NSAConfig,
    PackedSequences,
    compress,
    kernels,
    nsa_attention,
    pack_sequences,
    rope_table,
)
from nsa.backends import BackendName
from nsa.config import Compression
from nsa.ops import OPERATORS, sizes_of
from nsa.varlen import tensors_of
from validation.cases import Case, Tensors, config, cumulative, draw, whole
from validation.memory import fresh_memory_is_poisoned
from validation.numerics import assert_equal, assert_matches

pytestmark = pytest.mark.usefixtures("on_device")

DIM, HEADS, HEAD_DIM = 32, 2, 16
PACKED = [(17, 0, 7), (3, 19, 2)]
# Every block there is: rounding that differs cannot lead to another choice.
ALL_BLOCKS = config((16, 8, 16), 3, 12, num_local_blocks=1, compression="mean")
ONE_FREE_BLOCK = config((16, 8, 16), 2, 12, num_initial_blocks=0, num_local_blocks=1)
BACKENDS = ["aot_eager"] if kernels.INTERPRETED else ["aot_eager", "inductor"]

each_packing = pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])


def make_layer(settings: NSAConfig) -> NativeSparseAttention:
    return NativeSparseAttention(DIM, HEADS, 1, HEAD_DIM, settings, backend="triton")


def gradients(
    layer: NativeSparseAttention, function: Callable[..., Tensor], x: Tensor, *rest: Tensor | None
) -> Tensors:
    """Output and gradients of the input and of every parameter, under the same cotangent each time."""
    x = x.detach().requires_grad_()
    out = function(x, *rest)
    leaves = {"x": x, **dict(layer.named_parameters())}
    found = torch.autograd.grad(out, list(leaves.values()), torch.linspace(-1, 1, out.numel()).view_as(out))
    return {"output": out.detach(), **{f"gradient of {name}": g for name, g in zip(leaves, found, strict=True)}}


# 1. Compilation.


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", BACKENDS)
@each_packing
def test_compiles_once_to_the_same_function(packed: bool, backend: str) -> None:
    layer, rope, counter = make_layer(ALL_BLOCKS), rope_table(24, HEAD_DIM), CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for lengths in PACKED:
        inputs = (torch.randn(1, 24, DIM), rope, cumulative(lengths) if packed else None)
        actual, expected = gradients(layer, compiled, *inputs), gradients(layer, layer, *inputs)
        for name, x in expected.items():
            # Compiled, packed sequences have tiles for what lies outside of them, and sums are shared out otherwise.
            if backend == "aot_eager" and x.device.type == "cpu" and not packed:
                assert_equal(actual[name], x, what=f"compiled {name}")
            # A GPU's cuBLAS may take another algorithm for a compiled product, and inductor fuses roundings away.
            assert_matches(actual[name], x.double(), what=f"compiled {name}", reduction=24 * HEADS * HEAD_DIM)
    assert counter.frame_count == 1, f"compiled {counter.frame_count} times for one set of shapes"


# Inductor fuses otherwise where there are fewer tokens than the layer is wide. A CPU's compiler takes seconds for each:
# where kernels are interpreted, each backend meets both packings, and each compression and each length is there.
INDUCTED = list(product(("eager", "triton"), ("mlp", "linear", "mean"), (40, 100), ("whole", "packed")))
if kernels.INTERPRETED:
    INDUCTED = [
        ("eager", "mlp", 40, "packed"),
        ("eager", "linear", 40, "whole"),
        ("triton", "mlp", 100, "packed"),
        ("triton", "mean", 40, "whole"),
    ]


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(("backend", "compression", "tokens", "packing"), INDUCTED)
def test_compiled_gradients_are_those_of_the_layer(
    backend: BackendName, compression: Compression, tokens: int, packing: str
) -> None:
    settings = config((16, 8, 16), 3, 12, num_local_blocks=1, compression=compression)
    layer = NativeSparseAttention(64, 4, 2, HEAD_DIM, settings, backend=backend)
    offsets = cumulative((17, 0, tokens - 17)) if packing == "packed" else None
    inputs = (torch.randn(1, tokens, 64), rope_table(tokens, HEAD_DIM), offsets)
    expected = gradients(layer, layer, *inputs)
    # A CPU's loops without vector instructions: graphs and buffers are the same, and they are compiled sooner.
    compiled = torch.compile(layer, fullgraph=True, options={"cpp.vec_isa_ok": False})
    for name, x in gradients(layer, compiled, *inputs).items():
        assert_matches(x, expected[name].double(), what=f"compiled {name}", reduction=tokens * 4 * HEAD_DIM)


LENGTHS = {
    "whole": ((3, (40,)), (4, (48,)), (5, (72,))),
    "packed": ((1, (17, 23)), (1, (3, 0, 45)), (1, (60, 1, 2, 9))),
    "tables": ((1, (17, 8, 11, 4)), (1, (3, 0, 45)), (1, (60, 1, 2, 9))),
}


# Tracing takes seconds: where kernels are interpreted, these meet each kind and each compression once.
TRACED = list(product(("eager", "triton"), ("mlp", "linear", "mean"), LENGTHS))
if kernels.INTERPRETED:
    TRACED = [
        ("eager", "linear", "packed"),
        ("eager", "mlp", "tables"),
        ("triton", "linear", "whole"),
        ("triton", "mean", "packed"),
        ("triton", "mlp", "tables"),
    ]


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(("backend", "compression", "kind"), TRACED)
def test_another_length_batch_or_packing_compiles_nothing(
    backend: BackendName, compression: Compression, kind: str
) -> None:
    batches = LENGTHS[kind]
    layer = NativeSparseAttention(
        DIM, HEADS, 1, HEAD_DIM, replace(ALL_BLOCKS, compression=compression), backend=backend
    )
    counter = CompileCounterWithBackend("aot_eager")
    # Only the number of graphs counts, for which interpreted kernels need not run.
    device = torch.device("meta" if kernels.INTERPRETED else "cuda")
    with device:
        rope = rope_table(80, HEAD_DIM)
        inputs = []
        for batch, lengths in batches:
            # No batch is as large as another size that is known: PyTorch would take the two for one.
            packing: Tensor | PackedSequences | None = cumulative(lengths) if kind != "whole" else None
            if kind == "tables":
                packing = pack_sequences(cumulative(lengths), layer.config, num_tokens=sum(lengths))
            inputs.append((torch.randn(batch, sum(lengths), DIM), rope, packing))
    compiled = torch.compile(layer.to(device), dynamic=True, fullgraph=True, backend=counter)
    for given in inputs:
        compiled(*given)
    assert counter.frame_count == 1, f"compiled {counter.frame_count} times for {len(batches)} batches"


@pytest.mark.parametrize("compression", ["mlp", "mean"])
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_exported_with_a_length_that_varies(backend: BackendName, compression: Compression) -> None:
    layer = NativeSparseAttention(
        DIM, HEADS, 1, HEAD_DIM, replace(ALL_BLOCKS, compression=compression), backend=backend
    )
    shapes = ({1: torch.export.Dim.DYNAMIC},)  # refused where the length is found to be one number
    program = torch.export.export(layer, (torch.randn(3, 48, DIM),), dynamic_shapes=shapes)
    x = torch.randn(3, 56, DIM)
    assert_matches(program.module()(x), layer(x).double(), what="what was exported", reduction=HEADS * HEAD_DIM)


OFFSETS = {
    "falling": [0, 30, 10, 48],
    "not_from_0": [9, 20, 48],
    "not_to_the_end": [0, 20, 40],
    "past_the_end": [0, 20, 96],
    "below_0": [-500, 20, 48],
    "far_away": [0, 2**31 - 1, -(2**31)],
}


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_offsets_that_nobody_can_check_lead_nowhere(backend: BackendName) -> None:
    """Compiled, what would be refused is made legal: tokens outside of every sequence give 0, and nothing to others."""
    case = Case("unchecked", whole(48), ALL_BLOCKS, kv_heads=1, key_dim=16, value_dim=16)
    names = ("k", "v", "q", "k_slc", "v_slc", "k_win", "v_win", "gates")
    drawn = draw(case, torch.float32)
    tensors = {name: drawn[name].requires_grad_() for name in names}

    def attend(offsets: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Any:
        k_cmp, v_cmp = (compress(x, None, ALL_BLOCKS, cu_seqlens=offsets, backend=backend) for x in (k, v))
        q, k_slc, v_slc, k_win, v_win, gates = rest
        keys = k_cmp, v_cmp, k_slc, v_slc, k_win, v_win
        return nsa_attention(q, *keys, gates, ALL_BLOCKS, cu_seqlens_q=offsets, backend=backend)

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    alone = cache(partial(results_of_one, attend, tensors))
    for kind, offsets in OFFSETS.items():
        given = torch.tensor(offsets, dtype=torch.int32)
        with fresh_memory_is_poisoned():
            out = compiled(given, *tensors.values())
            found = torch.autograd.grad(out, list(tensors.values()), torch.ones_like(out), materialize_grads=True)
        legal = given.clamp(0, 48).cummax(0).values.tolist()
        expected = [sum(x) for x in zip(*(alone(a, b) for a, b in pairwise(legal)), strict=True)]
        for name, actual, wanted in zip(["out", *tensors], (out, *found), expected, strict=True):
            what = f"{name} of offsets that are {kind}"
            assert_matches(actual, wanted.double(), what=what, reduction=48 * HEADS * HEAD_DIM)


def results_of_one(attend: Callable[..., Tensor], tensors: Tensors, start: int, stop: int) -> list[Tensor]:
    """Output and gradients of one sequence by itself, among zeros."""
    leaves = list(tensors.values())
    out = torch.zeros_like(tensors["q"])
    if start == stop:
        return [out, *map(torch.zeros_like, leaves)]
    part = attend(cumulative((stop - start,)), *(x[:, start:stop] for x in leaves))
    out[:, start:stop] = part.detach()
    return [out, *torch.autograd.grad(part, leaves, torch.ones_like(part), allow_unused=True, materialize_grads=True)]


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    ("backend", "compression", "packed"),
    [("eager", "mlp", True), ("triton", "mlp", True), ("triton", "mean", False)],
)
def test_a_default_device_is_no_reason_to_break_a_graph(
    backend: BackendName, compression: Compression, packed: bool
) -> None:
    layer = NativeSparseAttention(
        DIM, HEADS, 1, HEAD_DIM, replace(ALL_BLOCKS, compression=compression), backend=backend
    )
    inputs = (torch.randn(1, 24, DIM), rope_table(24, HEAD_DIM), cumulative(PACKED[0]) if packed else None)
    expected = layer(*inputs)
    with torch.device("meta"):
        actual = torch.compile(layer, fullgraph=True, backend="aot_eager")(*inputs)
    assert_matches(actual, expected.double(), what="output", reduction=HEADS * HEAD_DIM)


# 2. Operators.

CASE = Case("operators", whole(24), ALL_BLOCKS, kv_heads=1, key_dim=16, value_dim=32)


def branch(name: str, namespace: str, x: Tensors) -> tuple:
    k, v = ("k_cmp", "v_cmp") if name == "compressed_attention" else ("k", "v")
    indices = x["indices"] if name == "selected_attention" else None
    return (x["q"], x[k], x[v], indices, *tensors_of(None), CASE.num_keys, sizes_of(ALL_BLOCKS), 0.25)


def branch_backward(name: str, namespace: str, x: Tensors) -> tuple:
    name = name.removesuffix("_backward")
    inputs = branch(name, namespace, x)
    out, lse = getattr(getattr(torch.ops, namespace), name)(*inputs)
    return (torch.randn_like(out), *inputs[:3], out, lse, *inputs[3:])


def select(name: str, namespace: str, x: Tensors) -> tuple:
    lse = (x["lse"],) if namespace == "nsa_triton" else ()
    return (x["q"], x["k_cmp"], *lse, *tensors_of(None), CASE.num_keys, sizes_of(ALL_BLOCKS), 0.25)


def attend(name: str, namespace: str, x: Tensors) -> tuple:
    out_cmp, lse_cmp = torch.ops.nsa_triton.compressed_attention(*branch("compressed_attention", namespace, x))
    names = ("q", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gates")
    return (*(x[n] for n in names), out_cmp, lse_cmp, x["indices"], *tensors_of(None), sizes_of(ALL_BLOCKS), 0.25)


def attend_backward(name: str, namespace: str, x: Tensors) -> tuple:
    *inputs, sizes, scale = attend(name, namespace, x)
    out, *saved = torch.ops.nsa_triton.attend(*inputs, sizes, scale)
    return (torch.randn_like(out), *inputs, *saved, sizes, scale)


def compress_mean(name: str, namespace: str, x: Tensors) -> tuple:
    return (
        x["k"],
        None,
        ALL_BLOCKS.num_compressed(CASE.num_keys),
        ALL_BLOCKS.compress_block_size,
        ALL_BLOCKS.compress_stride,
    )


def compress_mean_backward(name: str, namespace: str, x: Tensors) -> tuple:
    return (x["k_cmp"], None, CASE.num_keys, ALL_BLOCKS.compress_block_size, ALL_BLOCKS.compress_stride)


def compress_learned(name: str, namespace: str, x: Tensors) -> tuple:
    """Keys and values at once, through two layers."""
    sizes = (ALL_BLOCKS.num_compressed(CASE.num_keys), ALL_BLOCKS.compress_block_size, ALL_BLOCKS.compress_stride)
    learned = draw(replace(CASE, value_dim=16, config=replace(ALL_BLOCKS, compression="mlp")), x["k"].dtype)
    kinds = ("", "_position", "_weight", "_weight_out")
    return (*(learned[f"{name}{kind}"] for name in "kv" for kind in kinds), None, *sizes)


def compress_learned_backward(name: str, namespace: str, x: Tensors) -> tuple:
    *tensors, count, length, stride = compress_learned(name, namespace, x)
    out, hidden = torch.ops.nsa_triton.compress(*tensors, count, length, stride)
    return (torch.randn_like(out), *tensors, hidden, length, stride)


def rope(name: str, namespace: str, x: Tensors) -> tuple:
    table = rope_table(CASE.num_keys, CASE.key_dim, device=x["q"].device)
    return (*(x[key] for key in ("q", "k_cmp", "k_slc", "k_win")), table, None, None, ALL_BLOCKS.compress_stride, True)


BRANCHES = ("compressed_attention", "selected_attention", "sliding_window_attention")
INPUTS: dict[str, Callable[[str, str, Tensors], tuple]] = {
    **{f"{space}::{name}": branch for space in ("nsa_eager", "nsa_triton") for name in BRANCHES},
    **{f"{space}::{name}_backward": branch_backward for space in ("nsa_eager", "nsa_triton") for name in BRANCHES},
    "nsa_eager::select_blocks": select,
    "nsa_triton::select_blocks": select,
    "nsa_triton::attend": attend,
    "nsa_triton::attend_backward": attend_backward,
    "nsa_triton::compress_mean": compress_mean,
    "nsa_triton::compress_mean_backward": compress_mean_backward,
    "nsa_triton::compress": compress_learned,
    "nsa_triton::compress_backward": compress_learned_backward,
    "nsa_triton::rope": rope,
    "nsa_triton::rope_backward": rope,
}


def test_every_operator_is_among_those_tested() -> None:
    assert set(OPERATORS) == set(INPUTS)


def inputs_of(qualified: str, dtype: torch.dtype) -> tuple:
    namespace, name = qualified.split("::")
    return INPUTS[qualified](name, namespace, draw(CASE, dtype))


def asking(inputs: tuple) -> tuple:
    """Tensors that want gradients where they can have some."""
    return tree_map_only(Tensor, lambda x: x.requires_grad_(x.is_floating_point()), inputs)


@pytest.mark.parametrize("qualified", INPUTS)
def test_operators_keep_the_rules(qualified: str) -> None:
    inputs = inputs_of(qualified, torch.float32)
    torch.library.opcheck(
        OPERATORS[qualified].registered, inputs if qualified.endswith("_backward") else asking(inputs)
    )


differentiable = pytest.mark.parametrize("qualified", [name for name in INPUTS if f"{name}_backward" in INPUTS])


@differentiable
def test_the_way_around_the_dispatcher_gives_the_same_bits(qualified: str) -> None:
    operator, found = OPERATORS[qualified], []
    assert operator.gradient is not None
    number = operator.gradient.num_outputs
    for way in (operator, operator.registered):
        inputs = asking(inputs_of(qualified, torch.float32))
        outputs = way(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.stack([x.square().sum() for x in outputs[:number]]).sum().backward()
        grads = [x.grad for x in tree_leaves(inputs) if isinstance(x, Tensor)]
        assert [x.requires_grad for x in outputs] == [i < number for i in range(len(outputs))]
        found.append([*outputs, *(x for x in grads if x is not None)])
    around, through = found
    assert len(around) == len(through)
    for i, (x, y) in enumerate(zip(around, through, strict=True)):
        assert_equal(x, y, what=f"output or gradient {i}")


@differentiable
def test_second_derivatives_are_refused(qualified: str) -> None:
    inputs = asking(inputs_of(qualified, torch.float32))
    outputs = OPERATORS[qualified](*inputs)
    out = outputs[0] if isinstance(outputs, tuple) else outputs
    (dx,) = torch.autograd.grad(out.square().sum(), tree_leaves(inputs)[0], create_graph=True)
    with pytest.raises(RuntimeError, match="_backward has no derivatives"):
        torch.autograd.grad(dx.sum(), inputs[0])


@pytest.mark.parametrize("qualified", INPUTS)
def test_operators_promise_what_they_give(qualified: str) -> None:
    """In a narrow dtype, where it matters which results are kept in a wider one."""
    inputs = inputs_of(qualified, torch.bfloat16)
    torch.library.opcheck(OPERATORS[qualified].registered, inputs, test_utils="test_faketensor")


@each_packing
def test_shapes_are_known_without_values(packed: bool) -> None:
    layer, x = make_layer(ALL_BLOCKS), torch.randn(1, 24, DIM)
    with FakeTensorMode(allow_non_fake_inputs=True) as fakes:
        out = layer(fakes.from_tensor(x), None, fakes.from_tensor(cumulative(PACKED[0])) if packed else None)
    assert out.shape == x.shape


# 3. Recomputation in the backward pass.


class Selections(TorchDispatchMode):
    """Keeps the indices of every selection that is computed, the second time in a backward pass too."""

    def __init__(self) -> None:
        super().__init__()
        self.indices: list[Tensor] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.nsa_triton.select_blocks.default:
            self.indices.append(result.detach().clone())
        return result


ATTENTION = {
    getattr(torch.ops.nsa_triton, name).default for name in ("compressed_attention", "select_blocks", "attend")
}
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}


def keeping(kept: set[Any], context: Any, function: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if function in kept else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize(
    ("kept", "packed", "selections"),
    [(None, False, 2), (None, True, 2), (ATTENTION, False, 1), (PRODUCTS, False, 2)],
    ids=["full", "full_packed", "attention_kept", "products_kept"],
)
def test_recomputation_gives_the_same_bits(kept: set[Any] | None, packed: bool, selections: int) -> None:
    layer, rope = make_layer(ONE_FREE_BLOCK), rope_table(40, HEAD_DIM)
    inputs = (torch.randn(1, 40, DIM), rope, cumulative((3, 0, 37)) if packed else None)
    options: dict[str, Any] = (
        {} if kept is None else {"context_fn": partial(create_selective_checkpoint_contexts, partial(keeping, kept))}
    )
    with Selections() as recorded:
        actual = gradients(layer, partial(checkpoint, layer, use_reentrant=False, **options), *inputs)
    for name, x in gradients(layer, layer, *inputs).items():
        assert_equal(actual[name], x, what=name)
    assert len(recorded.indices) == selections, "blocks were selected another number of times than the policy says"
    assert_equal(recorded.indices[-1], recorded.indices[0], what="indices when recomputed")
