"""Rotary position embedding as a stage: against its definition in complex numbers, and what it refuses."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from nsa import NativeSparseAttention, NSAConfig, apply_rope, eager, rope_table
from nsa.backends import BackendName
from nsa.kernels import rope as kernel
from validation import oracle
from validation.cases import cumulative
from validation.memory import fresh_memory_is_poisoned
from validation.numerics import assert_equal, assert_matches
from validation.unit.forced import Watched

pytestmark = pytest.mark.usefixtures("on_device")

CONFIG = NSAConfig(compress_block_size=16, compress_stride=8, select_block_size=16, num_selected_blocks=4)
NAMES = ("q", "k_cmp", "k_slc", "k_win")
TOKENS, LENGTHS = 45, (18, 0, 5, 22)
each_backend = pytest.mark.parametrize("backend", ["eager", "triton"])


def draw(dim: int, dtype: torch.dtype, batch: int = 1, tokens: int = TOKENS) -> dict[str, Tensor]:
    """What a layer rotates, in the strides of its projections: keys are slices of those of three branches."""
    keys = torch.randn(batch, tokens, 2, 3, dim, dtype=dtype)
    blocks = torch.randn(batch, 2, CONFIG.num_compressed(tokens), dim, dtype=dtype)
    q = torch.randn(batch, tokens, 3, 2, dim, dtype=dtype)[..., 0, :]
    return {"q": q, "k_cmp": blocks.transpose(1, 2), "k_slc": keys[..., 1, :], "k_win": keys[..., 2, :]}


def in_order(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k_cmp, k_slc, k_win = (tensors[name] for name in NAMES)
    return q, k_cmp, k_slc, k_win


def expected_positions(kind: str) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Arguments that say where tokens are, and the positions of tokens and of blocks."""
    blocks = CONFIG.compress_stride * torch.arange(CONFIG.num_compressed(TOKENS))
    if kind == "whole":
        return {}, torch.arange(TOKENS), blocks
    if kind in ("part", "blocks_of_part"):
        positions = torch.cat((torch.arange(30, 60), torch.arange(7, 22)))
        if kind == "part":
            return {"positions": positions}, positions, blocks
        blocks = positions[blocks]
        return {"positions": positions, "block_positions": blocks}, positions, blocks
    offsets = cumulative(LENGTHS)
    starts = [CONFIG.compress_stride * i for length in LENGTHS for i in range(CONFIG.num_compressed(length))]
    unused = [0] * (CONFIG.num_compressed(TOKENS) - len(starts))
    return {"cu_seqlens": offsets}, oracle.query_positions(TOKENS, TOKENS, offsets), torch.tensor(starts + unused)


def results(outputs: Any, leaves: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Outputs and gradients, under the same cotangents each time."""
    yield from zip(NAMES, outputs, strict=True)
    cotangents = [torch.linspace(-1, 1, x.numel()).view_as(x).to(x.dtype) for x in outputs]
    grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    yield from ((f"gradient of {name}", grad) for name, grad in zip(NAMES, grads, strict=True))


def check(actual: Any, tensors: dict[str, Tensor], rope: Tensor, at: tuple[Tensor, Tensor]) -> None:
    """Hold outputs and gradients to those of the definition, in float64."""
    exact = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    rotated = [oracle.rotate(x, rope, at[name == "k_cmp"]) for name, x in exact.items()]
    for (name, x), (_, y) in zip(results(actual, tensors), results(rotated, exact), strict=True):
        assert_matches(x, y, what=name)


@each_backend
@pytest.mark.parametrize("kind", ["whole", "part", "blocks_of_part", "packed"])
@pytest.mark.parametrize("dim", [16, 24])
def test_pairs_of_two_halves_are_neighbours_elsewhere(backend: BackendName, kind: str, dim: int) -> None:
    """Rotating the halves is rotating neighbours in another order of the dimensions, to the bit, gradients too."""
    order = torch.arange(dim).view(2, dim // 2).T.flatten()  # of halves, so that pairs are neighbours
    given = expected_positions(kind)[0]
    halves = {name: x.detach().requires_grad_() for name, x in draw(dim, torch.float32).items()}
    neighbours = {name: x.detach()[..., order].requires_grad_() for name, x in halves.items()}
    outs = []
    for tensors, interleaved in ((halves, False), (neighbours, True)):
        rotated = apply_rope(
            *in_order(tensors), rope_table(64, dim), CONFIG, **given, interleaved=interleaved, backend=backend
        )
        cotangents = [torch.linspace(-1, 1, x.numel()).view_as(x) for x in rotated]
        cotangents = cotangents if not interleaved else [x[..., order] for x in cotangents]
        outs.append([*rotated, *torch.autograd.grad(rotated, list(tensors.values()), cotangents)])
    for x, y in zip(*outs, strict=True):
        # Compiled, one of the two products of a sum is not rounded, and which one depends on the order of the pairs.
        assert_matches(x[..., order], y.double(), what="rotated, and gradients", reduction=2, dtype=torch.float32)


@each_backend
def test_pairs_of_two_halves_are_those_of_transformers(backend: BackendName) -> None:
    """`x cos + rotate_half(x) sin`, cosines and sines repeated, as models of `transformers` have it."""
    tensors, angles = draw(16, torch.float32), torch.outer(torch.arange(64.0), 500.0 ** -(torch.arange(0, 16, 2) / 16))
    cos, sin = (torch.cat((x, x), -1)[:TOKENS, None] for x in (angles.cos(), angles.sin()))
    table = torch.stack((angles.cos(), angles.sin()), -1)
    found = apply_rope(*in_order(tensors), table, CONFIG, interleaved=False, backend=backend)[0]
    first, second = tensors["q"].chunk(2, -1)
    expected = tensors["q"] * cos + torch.cat((-second, first), -1) * sin
    assert_matches(found, expected.double(), what="q")


@each_backend
@pytest.mark.parametrize("kind", ["whole", "part", "blocks_of_part", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [16, 24])
def test_matches_its_definition(
    backend: BackendName, kind: str, dtype: torch.dtype, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "_ELEMENTS", 512)  # several tiles of each tensor, the last of them not full
    tensors = {name: x.requires_grad_() for name, x in draw(dim, dtype, 1 if kind == "packed" else 2).items()}
    given, *at = expected_positions(kind)
    rope = rope_table(60, dim)
    with fresh_memory_is_poisoned():
        actual = apply_rope(*in_order(tensors), rope, CONFIG, **given, backend=backend)
        check(actual, tensors, rope, (at[0], at[1]))
    assert all(x.is_contiguous() for x in actual)


@pytest.mark.parametrize("dim", [2, 6, 14, 30])
def test_the_kernel_takes_any_even_head_dim(dim: int) -> None:
    tensors = {name: x.requires_grad_() for name, x in draw(dim, torch.float32, 2).items()}
    _, *at = expected_positions("whole")
    rope = rope_table(TOKENS, dim)
    check(kernel.apply_rope(*in_order(tensors), rope, CONFIG, None, None, True), tensors, rope, (at[0], at[1]))


@each_backend
def test_angles_of_a_wider_dtype_are_not_rounded(backend: BackendName) -> None:
    """One rounding is all that is between the result and the definition in float64."""
    tensors = draw(16, torch.float32)
    rope = rope_table(TOKENS, 16).double() * (1 + 2**-30)
    _, *at = expected_positions("whole")
    for name, x in zip(NAMES, apply_rope(*in_order(tensors), rope, CONFIG, backend=backend), strict=True):
        exact = oracle.rotate(tensors[name].double(), rope, at[name == "k_cmp"])
        assert_equal(x, exact.float(), what=name)


@each_backend
@pytest.mark.parametrize("tokens", [0, 7])
def test_no_blocks_or_no_tokens(backend: BackendName, tokens: int) -> None:
    tensors = draw(16, torch.float32, 2, tokens)
    outs = apply_rope(*in_order(tensors), rope_table(8, 16), CONFIG, backend=backend)
    assert [x.shape for x in outs] == [x.shape for x in tensors.values()]


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize(
    "strides",
    [lambda x: torch.stack((x, x + 1), 1)[:, 0], lambda x: x[:1].expand(TOKENS)],
    ids=["every_other", "expanded"],
)
def test_positions_may_have_any_strides(backend: BackendName, strides: Any) -> None:
    tensors, rope = draw(16, torch.float32), rope_table(80, 16)
    positions = strides(torch.arange(TOKENS) + 5)
    assert not positions.is_contiguous()
    found, expected = (
        apply_rope(*in_order(tensors), rope, CONFIG, positions=given, backend=backend)
        for given in (positions, positions.contiguous())
    )
    for name, x, y in zip(tensors, found, expected, strict=True):
        assert_equal(x, y, what=name)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_a_table_for_the_longest_document_is_enough_where_nobody_can_look(
    backend: BackendName, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As while a CUDA graph is captured."""
    tensors, rope, offsets = draw(16, torch.float32), rope_table(22, 16), cumulative((22, 3, 20))
    options: dict[str, Any] = {"cu_seqlens": offsets, "backend": backend}
    expected = apply_rope(*in_order(tensors), rope, CONFIG, **options)
    monkeypatch.setattr("nsa.checks._has_values", lambda x: False)
    for name, x, y in zip(tensors, apply_rope(*in_order(tensors), rope, CONFIG, **options), expected, strict=True):
        assert_equal(x[:, :1], y[:, :1], what=name)


def test_a_layer_rotates_in_one_launch_each_way(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(kernel._rope_kernel)
    monkeypatch.setattr(kernel, "_rope_kernel", watched)
    layer = NativeSparseAttention(32, 2, 1, 16, CONFIG, backend="triton")
    out = layer(torch.randn(1, 40, 32), rope_table(40, 16))
    assert [call.INVERSE for call in watched.calls] == [False]
    out.sum().backward()
    assert [call.INVERSE for call in watched.calls] == [False, True]


@pytest.mark.parametrize("implementation", [eager, kernel], ids=["eager", "triton"])
def test_positions_without_angles_show(implementation: Any) -> None:
    """Where nobody can look at positions, nothing outside of the table is read."""
    tensors = draw(16, torch.float32)
    positions = torch.arange(TOKENS) - 1
    outs = implementation.apply_rope(*in_order(tensors), rope_table(40, 16), CONFIG, positions, None, True)
    outside = (positions < 0) | (positions >= 40)
    for name, x in zip(NAMES, outs, strict=True):
        wanted = outside if name != "k_cmp" else torch.zeros(x.shape[1], dtype=torch.bool)
        assert_equal(x.isnan().all(-1).all(-1)[0], wanted, what=f"rows of {name} that are NaN")
        assert_equal(x.isnan().any(-1).any(-1)[0], wanted, what=f"rows of {name} that hold a NaN")


@each_backend
def test_another_length_compiles_nothing(backend: BackendName) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(apply_rope, dynamic=True, fullgraph=True, backend=counter)
    rope = rope_table(80, 16)
    for tokens in (40, 48, 75):
        tensors = in_order(draw(16, torch.float32, 3, tokens))
        outs = compiled(*tensors, rope, CONFIG, backend=backend)
        for name, x, y in zip(NAMES, outs, apply_rope(*tensors, rope, CONFIG, backend=backend), strict=True):
            assert_equal(x, y, what=f"compiled {name}")
    assert counter.frame_count == 1


REFUSED = {
    "odd_head_dim": ({"dim": 7}, ValueError, "q must have an even head dim to be rotated in pairs, got 7"),
    "dtype_of_keys": ({"k_win": lambda x: x.half()}, TypeError, "k_win must have dtype torch.float32, got"),
    "tokens_of_keys": (
        {"k_win": lambda x: x[:, 1:]},
        ValueError,
        "k_win must have shape [B, T, Hk, D] = (1, 45, 2, 8)",
    ),
    "heads_of_blocks": (
        {"k_cmp": lambda x: x[:, :, 1:]},
        ValueError,
        "k_cmp must have shape [B, C, Hk, D] = (1, 4, 2,",
    ),
    "flat_table": (
        {"rope": lambda x: x.flatten(1)},
        ValueError,
        "rope must have 3 dimensions [L, D / 2, 2], got shape",
    ),
    "table_of_others": (
        {"rope": lambda x: x[:, 1:]},
        ValueError,
        "rope must have shape [L, D / 2, 2] = (L, 4, 2), got",
    ),
    "short_table": (
        {"rope": lambda x: x[:44]},
        ValueError,
        "rope must have a row for each of the 45 positions, got 44",
    ),
    "short_for_blocks": (
        {"rope": lambda x: x[:24], "positions": lambda x: x % 8},
        ValueError,
        "rope must have a row for each of the 25 positions, got 24",
    ),
    "short_for_packed": (
        {"rope": lambda x: x[:21], "cu_seqlens": LENGTHS},
        ValueError,
        "rope must have a row for each of the 22 positions, got 21",
    ),
    "far_positions": (
        {"positions": lambda x: x + 16},
        ValueError,
        "rope must have a row for each of the 61 positions, got 60",
    ),
    "negative_positions": ({"positions": lambda x: x - 3}, ValueError, "positions must be at least 0, got -3"),
    "positions_of_others": (
        {"positions": lambda x: x[1:]},
        ValueError,
        "positions must have shape [T] = (45,), got (44,)",
    ),
    "floating_positions": ({"positions": lambda x: x.float()}, TypeError, "positions must have dtype torch.int32 or"),
    "positions_of_packed": (
        {"positions": lambda x: x, "cu_seqlens": LENGTHS},
        ValueError,
        "positions must be None where cu_seqlens says what they are, got a tensor",
    ),
    "far_blocks": (
        {"block_positions": lambda x: x + 40},
        ValueError,
        "rope must have a row for each of the 65 positions, got 60",
    ),
    "positions_of_other_blocks": (
        {"block_positions": lambda x: x[1:]},
        ValueError,
        "block_positions must have shape [C] = (4,), got (3,)",
    ),
    "positions_of_packed_blocks": (
        {"block_positions": lambda x: x, "cu_seqlens": LENGTHS},
        ValueError,
        "block_positions must be None where cu_seqlens says what they are, got a tensor",
    ),
    "blocks_of_packed": (
        {"k_cmp": lambda x: x[:, 1:], "cu_seqlens": LENGTHS},
        ValueError,
        "k_cmp must have shape [B, C, Hk, D] = (1, 4, 2, 8), got (1, 3, 2, 8)",
    ),
}


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_by_name(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    changes = dict(changes)
    dim = changes.pop("dim", 8)
    with torch.device("cpu"):  # elsewhere, to look at positions would mean to wait for them
        inputs: dict[str, Any] = {**draw(dim, torch.float32), "rope": rope_table(60, dim + dim % 2), "config": CONFIG}
        inputs |= {"positions": torch.arange(TOKENS), "block_positions": 8 * torch.arange(4)}
        if lengths := changes.pop("cu_seqlens", None):
            inputs["cu_seqlens"] = cumulative(lengths)
    inputs |= {name: change(inputs[name]) for name, change in changes.items()}
    inputs = {name: x for name, x in inputs.items() if "positions" not in name or name in changes}
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        apply_rope(**inputs)
