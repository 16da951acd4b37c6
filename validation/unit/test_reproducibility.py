"""The same inputs give the same bits: whatever ran before, and whatever the memory around them holds.

Memory that was never written and memory beyond the inputs are filled with NaN. What differs was computed from it.
"""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa import kernels
from nsa.config import NSAConfig
from nsa.kernels import launches
from nsa.kernels.launches import Recording, direct
from validation.cases import Case, Tensors, config, draw, whole
from validation.implementations import load
from validation.memory import fresh_memory_is_poisoned
from validation.numerics import assert_equal
from validation.stages import EVERY

pytestmark = pytest.mark.usefixtures("on_device")

TRITON = load("triton")
if kernels.INTERPRETED:
    DTYPE, SMALL = torch.float64, config((16, 8, 16), 3, 12, compression="mean")
    SIZES: dict[str, Any] = {"kv_heads": 1, "key_dim": 16, "value_dim": 16}
    LONG = SHORT = [Case("packed", whole(23, 0, 18), SMALL, **SIZES)]
else:
    DTYPE, PAPER = torch.bfloat16, NSAConfig(compression="mean")
    SIZES = {"kv_heads": 4, "group": 16, "key_dim": 128, "value_dim": 128}
    GROUP_4 = {**SIZES, "kv_heads": 8, "group": 4}
    LONG = [
        Case("whole", whole(4096), PAPER, **SIZES),
        Case("packed", whole(1500, 0, 31, 2565), PAPER, **SIZES),
        Case("group_4", whole(4096), PAPER, **GROUP_4),
        Case("mlp", whole(4096), NSAConfig(), **SIZES),
    ]
    # No length is a multiple of anything: every tile at an end reaches beyond it.
    SHORT = [
        Case("short", whole(1003), PAPER, **SIZES),
        Case("packed_short", whole(517, 0, 31, 455), PAPER, **SIZES),
        Case("group_4_short", whole(1003), PAPER, **GROUP_4),
    ]

SUBJECTS = [name for name in EVERY if not (kernels.INTERPRETED and name == "nsa_attention")]

each_subject = pytest.mark.parametrize("subject", SUBJECTS)
each_long = pytest.mark.parametrize("case", LONG, ids=lambda case: case.id)
each_short = pytest.mark.parametrize("case", SHORT, ids=lambda case: case.id)


def results(subject: str, case: Case, tensors: Tensors, cotangent: Tensor | None = None) -> Tensors:
    """All that a stage gives, gradients included."""
    return dict(EVERY[subject].results(TRITON, case, tensors, DTYPE, cotangent=cotangent))


def assert_same(actual: Tensors, expected: Tensors, what: str) -> None:
    for name, x in expected.items():
        assert_equal(actual[name], x, what=f"{name} {what}")


# 1. Repeated.


@each_subject
@each_long
def test_repeated_runs_give_the_same_bits(subject: str, case: Case) -> None:
    tensors = draw(case, DTYPE)
    first = results(subject, case, tensors)
    for _ in range(1 if kernels.INTERPRETED else 3):
        assert_same(results(subject, case, tensors), first, "of a repeated run")


@pytest.mark.needs_gpu  # interpreted launchers are never repeated
@each_subject
@each_short
def test_a_repeated_launcher_gives_what_a_called_one_gives(
    subject: str, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    repeated, again = list[Recording](), Recording.__call__

    def counted(recording: Recording, addresses: list[int]) -> Any:
        repeated.append(recording)
        return again(recording, addresses)

    with direct():
        expected = []
        for factor in (1.0, 0.5, 2.0):
            tensors = {name: factor * x if x.is_floating_point() else x for name, x in draw(case, DTYPE).items()}
            expected.append((tensors, results(subject, case, tensors)))
    monkeypatch.setattr(Recording, "__call__", counted)
    monkeypatch.setattr(launches, "_directly", 0)
    for tensors, results_of_calls in expected:
        assert_same(results(subject, case, tensors), results_of_calls, "of a repeated launcher")
    assert repeated, "no launcher was repeated"


# 2. Memory that was never written.


@each_subject
@each_short
def test_no_result_comes_of_memory_never_written(subject: str, case: Case) -> None:
    tensors = draw(case, DTYPE)
    expected = results(subject, case, tensors)
    with fresh_memory_is_poisoned():
        actual = results(subject, case, tensors)
    assert_same(actual, expected, "in poisoned memory")


def poison_free_memory(like: Iterable[Tensor]) -> None:
    """Sets every byte the allocator has free, room for such tensors included, to 255: NaN in any floating dtype."""
    torch.cuda.synchronize()
    blocks = [block for segment in torch.cuda.memory_snapshot() for block in segment["blocks"]]
    sizes = sorted((block["size"] for block in blocks if block["state"] == "inactive"), reverse=True)
    sizes += [x.numel() * x.element_size() for x in like]
    taken = [torch.full((size,), 255, dtype=torch.uint8) for size in sizes]
    del taken


@pytest.mark.needs_gpu  # poisons the memory of CUDA's caching allocator
@each_subject
@each_short
def test_no_result_comes_of_what_was_freed_before(subject: str, case: Case) -> None:
    tensors = draw(case, DTYPE)
    expected = results(subject, case, tensors)
    poison_free_memory(expected.values())
    assert torch.empty_like(tensors["q"]).isnan().any(), "memory is not poisoned: this test would show nothing"
    assert_same(results(subject, case, tensors), expected, "in memory freed by others")


# 3. Memory beyond the inputs.


def inside(x: Tensor, fill: float, room: int) -> Tensor:
    """The same values as a view of a larger tensor, with `room` on both sides of every dimension but the first."""
    sizes = [x.shape[0] + 1, *(size + 2 * room for size in x.shape[1:])]
    storage = torch.full(sizes, fill, dtype=x.dtype)
    view = storage[(slice(0, x.shape[0]), *(slice(room, room + size) for size in x.shape[1:]))]
    return view.copy_(x)


# Rooms of 16 bytes let tensor descriptors serve, any other size takes loads by pointers.
@pytest.mark.parametrize("room", [8, 3])
@each_subject
@each_short
def test_nothing_beyond_a_view_is_read_into_a_result(subject: str, case: Case, room: int) -> None:
    tensors = draw(case, DTYPE)
    tensors["out"] = torch.randn(*tensors["q"].shape[:3], case.value_dim, dtype=DTYPE)
    heads_and_tokens = [name for name, x in tensors.items() if x.dim() == 4 and x.is_floating_point()]

    def surrounded(fill: float) -> Tensors:
        views = {name: inside(tensors[name], fill, room) for name in heads_and_tokens}
        cotangent = None if subject.startswith("compress_") else views.pop("out")
        return results(subject, case, {**tensors, **views}, cotangent)

    # The same strides and so the same kernels, to the bit.
    assert_same(surrounded(float("nan")), surrounded(0.0), f"of views of NaN, {room} elements away")
