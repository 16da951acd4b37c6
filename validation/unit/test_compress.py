"""Keys and values compressed together: the same as each by itself, in half of the launches."""

import re
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from nsa import (
    CompressionParams,
    NativeSparseAttention,
    NSAConfig,
    compress,
    compress_keys_and_values,
    pack_sequences,
    rope_table,
)
from nsa.backends import BackendName
from nsa.blocks import BlockFunction
from validation.cases import Case, config, draw, draw_cotangent, whole
from validation.memory import fresh_memory_is_poisoned
from validation.numerics import assert_equal, assert_matches
from validation.unit.forced import Watched

pytestmark = pytest.mark.usefixtures("on_device")

KINDS = ("", "_position", "_weight", "_weight_out")
each_backend = pytest.mark.parametrize("backend", ["eager", "triton"])


def params(x: dict[str, Tensor], name: str) -> CompressionParams | None:
    position, weight, weight_out = (f"{name}{kind}" for kind in KINDS[1:])
    return CompressionParams(x[position], x[weight], x.get(weight_out)) if position in x else None


def together(x: dict[str, Tensor], case: Case, settings: NSAConfig, backend: BackendName) -> tuple[Tensor, ...]:
    cu_seqlens = case.cu_seqlens.get("cu_seqlens_k")
    both = params(x, "k"), params(x, "v")
    return compress_keys_and_values(x["k"], x["v"], *both, settings, cu_seqlens=cu_seqlens, backend=backend)


def apart(x: dict[str, Tensor], case: Case, settings: NSAConfig, backend: BackendName) -> tuple[Tensor, ...]:
    cu_seqlens = case.cu_seqlens.get("cu_seqlens_k")
    return tuple(compress(x[n], params(x, n), settings, cu_seqlens=cu_seqlens, backend=backend) for n in "kv")


def results(
    function: Callable[..., tuple[Tensor, ...]], x: dict[str, Tensor], case: Case, backend: BackendName
) -> Iterator[tuple[str, Tensor]]:
    leaves = {name: x[name].detach().requires_grad_() for n in "kv" for kind in KINDS if (name := f"{n}{kind}") in x}
    outs = function({**x, **leaves}, case, case.config, backend)
    yield from zip(("k_cmp", "v_cmp"), outs, strict=True)
    cotangents = [draw_cotangent(case, out, out.dtype) for out in outs]
    found = torch.autograd.grad(outs, list(leaves.values()), cotangents)
    yield from ((f"gradient of {name}", grad) for name, grad in zip(leaves, found, strict=True))


@each_backend
@pytest.mark.parametrize("compression", ["mlp", "linear", "mean"])
@pytest.mark.parametrize("lengths", [whole(70), whole(20, 7, 0, 43)], ids=["whole", "packed"])
@pytest.mark.parametrize("value_dim", [16, 24])
def test_a_pair_is_two_of_one(
    backend: BackendName, compression: str, lengths: tuple[tuple[int, int], ...], value_dim: int
) -> None:
    settings = config((16, 8, 16), 3, 12, compression=compression)
    case = Case(
        "pair", lengths, settings, kv_heads=2, key_dim=16, value_dim=value_dim, batch=2 if len(lengths) == 1 else 1
    )
    x = draw(case, torch.float32)
    # Keys are part of a larger tensor, values are not: the two have strides of their own.
    x["k"] = torch.stack((x["k"], x["k"]), 3)[..., 1, :]
    with fresh_memory_is_poisoned():
        expected = dict(results(apart, x, case, backend))
        for name, actual in results(together, x, case, backend):
            # Rounding may differ: PyTorch computes the ends of a tensor otherwise than what lies before them.
            assert_matches(actual, expected[name].double(), what=name, reduction=16 * 24)


@each_backend
@pytest.mark.parametrize("compression", ["mlp", "linear", "mean"])
@pytest.mark.parametrize("function", [together, apart])
def test_results_can_be_changed_in_place(
    function: Callable[..., tuple[Tensor, ...]], compression: str, backend: BackendName
) -> None:
    """Each is a tensor of its own: a change of one reaches neither the other nor the gradients."""
    settings = config((16, 8, 16), 3, 12, compression=compression)
    case = Case("in place", whole(40), settings, kv_heads=2, key_dim=16, value_dim=16)
    x = draw(case, torch.float32)
    expected = dict(results(function, x, case, backend))

    def doubled(*inputs: Any) -> tuple[Tensor, ...]:
        k_cmp, v_cmp = function(*inputs)
        return k_cmp.mul_(2), v_cmp

    for name, found in results(doubled, x, case, backend):
        of_keys = name.endswith("k_cmp") or name.startswith("gradient of k")
        assert_equal(found, expected[name] * (2 if of_keys else 1), what=name)


@pytest.mark.parametrize("value_dim", [16, 24], ids=["same_shapes", "others"])
def test_a_pair_takes_one_launch(value_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("nsa.kernels.compress")
    watched = {name: Watched(getattr(module, name)) for name in ("_rows_kernel", "_tokens_kernel")}
    for name, kernel in watched.items():
        monkeypatch.setattr(module, name, kernel)
    case = Case("pair", whole(40), config((16, 8, 16), 3, 12), kv_heads=2, key_dim=16, value_dim=value_dim)
    for _ in results(together, draw(case, torch.float32), case, "triton"):
        pass
    times = 1 if value_dim == 16 else 2
    # The backward makes the rows again.
    assert [len(kernel.calls) for kernel in watched.values()] == [2 * times, times]


REFUSED = {
    "tokens": (lambda v: v[:, 1:], ValueError, "v must have shape [B, T, Hk, D] = (1, 40, 2, 16), got (1, 39, 2, 16)"),
    "dtype": (lambda v: v.half(), TypeError, "v must have dtype torch.float32, got torch.float16"),
    "device": (lambda v: v.to("meta"), ValueError, "v must be on"),
}


@pytest.mark.parametrize(("change", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_values_unlike_the_keys_are_refused(
    change: Callable[[Tensor], Tensor], error: type[Exception], message: str
) -> None:
    k = torch.randn(1, 40, 2, 16)
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        compress_keys_and_values(k, change(k), None, None, config(compression="mean"))


@each_backend
def test_tables_for_fewer_queries_serve_their_keys(backend: BackendName) -> None:
    settings = config((16, 8, 16), 3, 12, compression="mean")
    offsets = torch.tensor([0, 25, 60], dtype=torch.int32)
    queries = torch.tensor([0, 4, 10], dtype=torch.int32)
    packed = pack_sequences(queries, settings, num_tokens=10, cu_seqlens_k=offsets, num_keys=60)
    x = torch.randn(1, 60, 2, 16)
    expected = compress(x, None, settings, cu_seqlens=offsets, backend=backend)
    assert_equal(compress(x, None, settings, cu_seqlens=packed, backend=backend), expected, what="blocks")


def test_second_derivatives_are_refused_whatever_the_first_depend_on() -> None:
    """The gradient of a sum is one of ones, which has no graph of its own."""
    case = Case("second", whole(40), config((16, 8, 16), 3, 12), kv_heads=2, key_dim=16, value_dim=16)
    x = draw(case, torch.float32)
    learned = [x[f"k{kind}"].requires_grad_() for kind in KINDS[1:]]
    out = compress(x["k"].requires_grad_(), CompressionParams(*learned), case.config, backend="triton")
    (dk,) = torch.autograd.grad(out.sum(), x["k"], create_graph=True)
    with pytest.raises(RuntimeError, match="_backward has no derivatives"):
        torch.autograd.grad(dk.sum(), learned[1])


# Importing what torch.func needs warns in PyTorch itself.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@each_backend
def test_derivatives_by_parameters_are_refused_like_those_by_keys(backend: BackendName) -> None:
    case = Case("forward", whole(40), config((16, 8, 16), 3, 12), kv_heads=2, key_dim=16, value_dim=16)
    x = draw(case, torch.float32)
    position, *rest = (x[f"k{kind}"] for kind in KINDS[1:])

    def blocks(position: Tensor) -> Tensor:
        return compress(x["k"], CompressionParams(position, *rest), case.config, backend=backend)

    with pytest.raises(ValueError, match=r"params\.position must have no tangent"), forward_ad.dual_level():
        blocks(forward_ad.make_dual(position, torch.ones_like(position)))
    with pytest.raises(ValueError, match=r"params\.position must be differentiated by torch\.autograd"):
        torch.func.grad(lambda p: blocks(p).sum())(position)


# Compression by any function of blocks.


def as_mlp(given: CompressionParams) -> BlockFunction:
    """Makes the function of blocks `[B, C, Hk, l, D]` that the `"mlp"` kind computes."""

    def phi(blocks: Tensor) -> Tensor:
        rows = (blocks + given.position).flatten(3)
        assert given.weight_out is not None
        hidden = torch.einsum("bchi,hif->bchf", rows, given.weight)
        return torch.einsum("bchf,hfd->bchd", torch.nn.functional.silu(hidden), given.weight_out)

    return phi


@pytest.mark.parametrize("lengths", [whole(70), whole(20, 7, 0, 43)], ids=["whole", "packed"])
def test_a_function_of_blocks_gives_what_the_kind_it_computes_does(lengths: tuple[tuple[int, int], ...]) -> None:
    settings = config((16, 8, 16), 3, 12, compression="mlp")
    case = Case("function", lengths, settings, key_dim=16, value_dim=16)
    x = draw(case, torch.float64)
    cu_seqlens = case.cu_seqlens.get("cu_seqlens_k")
    leaves = [x[f"k{kind}"].detach().requires_grad_() for kind in KINDS]
    found = []
    for kind in (CompressionParams(*leaves[1:]), as_mlp(CompressionParams(*leaves[1:]))):
        out = compress(leaves[0], kind, settings, cu_seqlens=cu_seqlens, backend="eager")
        found.append([out, *torch.autograd.grad(out, leaves, draw_cotangent(case, out, out.dtype))])
    for name, expected, actual in zip(("blocks", *KINDS), *found, strict=True):
        assert_matches(actual, expected, what=name or "gradient of k", reduction=16 * 16)


@each_backend
def test_a_function_stands_beside_parameters(backend: BackendName) -> None:
    settings = config((16, 8, 16), 3, 12, compression="mlp")
    case = Case("beside", whole(40), settings, key_dim=16, value_dim=16)
    x = draw(case, torch.float32)
    k_cmp, v_cmp = compress_keys_and_values(
        x["k"], x["v"], lambda blocks: blocks.amax(3), params(x, "v"), settings, backend=backend
    )
    expected = torch.stack([x["k"][:, start : start + 16].amax(1) for start in range(0, 32, 8)], 1)
    assert_equal(k_cmp, expected, what="keys")
    assert_equal(v_cmp, compress(x["v"], params(x, "v"), settings, backend=backend), what="values")


def test_a_function_to_another_shape_is_refused() -> None:
    message = r"^params must be a function to shape \[B, C, Hk, D\] = \(1, 4, 2, D\), got one to \(1, 4, 2\)$"
    with pytest.raises(ValueError, match=message):
        compress(torch.randn(1, 40, 2, 16), lambda blocks: blocks.sum((3, 4)), config((16, 8, 16), 3, 12))


def test_blocks_that_do_not_exist_leave_the_gradients_of_a_function_alone() -> None:
    """The function may have no derivative at 0."""
    weight = torch.ones(16, requires_grad=True)

    def normalised(blocks: Tensor) -> Tensor:
        out = blocks.mean(3) * weight
        return out / out.norm(dim=-1, keepdim=True)

    offsets = torch.tensor([0, 20, 41, 60], dtype=torch.int32)
    out = compress(torch.randn(1, 60, 2, 16), normalised, config((16, 8, 16), 3, 12), cu_seqlens=offsets)
    assert torch.isfinite(out).all()
    (gradient,) = torch.autograd.grad(out, weight, torch.randn_like(out))
    assert torch.isfinite(gradient).all()


def test_an_unknown_backend_is_refused_beside_a_function_too() -> None:
    with pytest.raises(ValueError, match=r"^backend must be one of"):
        compress(torch.randn(1, 40, 2, 16), lambda x: x.amax(3), config((16, 8, 16), 3, 12), backend="bogus")  # type: ignore[arg-type]


@pytest.mark.parametrize("phi", [(torch.sum,), (torch.sum, None)])
def test_what_is_no_pair_of_functions_is_refused(phi: tuple) -> None:
    with pytest.raises(TypeError, match=r"^phi must be two functions, for keys and for values, got"):
        NativeSparseAttention(32, 4, 2, 16, config((16, 8, 16), 6, 12), phi=phi)


class Weighted(torch.nn.Module):
    """A learned mean over the tokens of a block."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(-1, 1, length))

    def forward(self, blocks: Tensor) -> Tensor:
        return torch.einsum("bchld,l->bchd", blocks, self.weight.softmax(0))


def test_a_layer_takes_functions_of_blocks() -> None:
    """Its parameters are the layer's and keep their values, and pieces over a cache give what the whole does."""
    settings = config((16, 8, 16), 6, 12)
    layer = NativeSparseAttention(32, 4, 2, 16, settings, backend="eager", phi=(Weighted(16), Weighted(16))).double()
    assert isinstance(layer.compress_k, Weighted)
    assert_equal(layer.compress_k.weight.detach(), Weighted(16).weight.detach().double(), what="weight")
    x, rope = torch.randn(1, 90, 32, dtype=torch.float64), rope_table(90, 16)
    out = layer(x, rope)
    out.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
    cache = layer.make_cache(1, 90)
    pieces = torch.cat([layer(piece, rope, cache=cache) for piece in x.split((50, 1, 1, 38), 1)], 1)
    assert_matches(pieces, out.detach(), what="output over a cache", reduction=90)
