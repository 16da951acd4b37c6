"""Kernels keep to their own memory: nothing is written beside a result, and rows may be far apart."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa import kernels
from validation.cases import Case, Tensors, config, draw, draw_cotangent, whole
from validation.implementations import load
from validation.numerics import assert_equal
from validation.stages import EVERY
from validation.unit.ways import SELECTED, WAYS, launched

pytestmark = pytest.mark.usefixtures("on_device")

TRITON = load("triton")
BLOCKS = config((16, 8, 16), 3, 12, num_local_blocks=1, compression="mean")
# With blocks enough to choose the wrong one.
CHOICE = config((16, 8, 16), 2, 12, num_initial_blocks=0, num_local_blocks=1, compression="mean")

each_subject = pytest.mark.parametrize("subject", EVERY)


def results(subject: str, case: Case, tensors: Tensors, dtype: torch.dtype, cotangent: Tensor | None = None) -> Tensors:
    """All that a stage gives, gradients included."""
    return dict(EVERY[subject].results(TRITON, case, tensors, dtype, cotangent=cotangent))


# 1. Writing.

ROOM, UNTOUCHED = 1024, -7
"""Elements before and after every tensor that is made, and what they hold."""


@pytest.fixture
def surroundings(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The elements around every tensor that launchers make while the test runs: before them and after."""
    found: list[Tensor] = []

    def surrounded(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate(*arguments: Any, **options: Any) -> Tensor:
            x = make(*arguments, **options)
            buffer = torch.full((x.numel() + 2 * ROOM,), UNTOUCHED, dtype=x.dtype, device=x.device)
            before, inside, after = buffer.split([ROOM, x.numel(), ROOM])
            found.extend((before, after))
            return inside.copy_(x.flatten()).view(x.shape)

        return allocate

    for owner, name in (
        (torch, "empty"), (torch, "zeros"), (torch, "empty_like"), (torch, "zeros_like"),
        (Tensor, "new_empty"), (Tensor, "new_zeros"), (Tensor, "new_full"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, surrounded(getattr(owner, name)))
    return found


# Neither is a power of two, nor the sum of two: columns are padded in every kernel.
@pytest.mark.parametrize(("group", "dims"), [(2, (24, 72)), (8, (72, 24))], ids=str)
@each_subject
def test_nothing_is_written_beside_a_result(
    subject: str, group: int, dims: tuple[int, int], surroundings: list[Tensor]
) -> None:
    case = Case("bounds", whole(21), BLOCKS, kv_heads=1, group=group, key_dim=dims[0], value_dim=dims[1])
    tensors = draw(case, torch.float32)
    surroundings.clear()
    results(subject, case, tensors, torch.float32)
    assert surroundings, "no tensor was made: this test would show nothing"
    for beside in surroundings:
        assert_equal(beside, torch.full_like(beside, UNTOUCHED), what=f"memory beside a result of {subject}")


# 2. Offsets that need 64 bits.

FAR = 2**30
"""Elements between rows of a batch, or between heads: the third begins at 2**31, or in 32 bits at -2**31."""


@pytest.fixture(scope="module")
def expanse() -> Tensor:
    """Memory for rows that far apart, and as much before it, so that a wrong offset reads something that is wrong.

    Hardly any of it is ever touched, so that on a CPU it hardly comes to be.
    """
    device = "cpu" if kernels.INTERPRETED else "cuda"
    return torch.empty(4 * FAR + 2**20, dtype=torch.float16, device=device)


def spread(tensors: Tensors, expanse: Tensor, dim: int) -> Tensors:
    """The same values, `FAR` apart along a dimension."""
    first, views = 2 * FAR, {}
    for name, x in tensors.items():
        near = x.transpose(0, dim).contiguous()
        far = expanse.as_strided(near.shape, (FAR, *near.stride()[1:]), first).copy_(near)
        views[name] = far.transpose(0, dim)
        first += near[0].numel()
    assert first + 2 * FAR <= len(expanse)
    return views


@each_subject
def test_rows_of_a_batch_may_be_far_apart(subject: str, expanse: Tensor) -> None:
    case = Case("far", whole(40), CHOICE, batch=3, kv_heads=1, key_dim=16, value_dim=16)
    tensors = draw(case, torch.float16)
    near = {name: x for name, x in tensors.items() if x.dtype == torch.float16}
    actual = results(subject, case, {**tensors, **spread(near, expanse, 0)}, torch.float16)
    for name, x in results(subject, case, tensors, torch.float16).items():
        assert_equal(actual[name], x, what=f"{name} of rows far apart")


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("subject", [name for name in EVERY if not name.startswith("compress_")])
def test_heads_of_a_group_may_be_far_apart(subject: str, way: dict[str, Any], expanse: Tensor) -> None:
    case = Case("far", whole(40), CHOICE, kv_heads=1, group=3, key_dim=16, value_dim=16)
    tensors = draw(case, torch.float16)
    near = {"q": tensors["q"], "above": draw_cotangent(case, tensors["q"], torch.float16)}
    far = spread(near, expanse, 2)
    with launched(SELECTED, **way):
        actual, expected = (
            results(subject, case, {**tensors, "q": x["q"]}, torch.float16, x["above"]) for x in (far, near)
        )
    for name, x in expected.items():
        assert_equal(actual[name], x, what=f"{name} of heads far apart")
