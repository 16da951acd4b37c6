"""Fresh memory that is NaN, and memory with sentinels around it.

A kernel that reads what nobody wrote then gives NaN, and one that writes where it may not changes a sentinel.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

Maker = tuple[Any, str]
"""An owner and the name of its function that makes tensors without values."""

WORKSPACES: tuple[Maker, ...] = ((Tensor, "new_empty"),)
"""How our kernels get memory to work in."""

EMPTY: tuple[Maker, ...] = ((torch, "empty"), (torch, "empty_like"), *WORKSPACES)
"""How anybody gets memory without values."""


@contextmanager
def fresh_memory_is_poisoned(*, warn_only: bool = False) -> Iterator[None]:
    """PyTorch fills what `empty` and its kin return, floats with NaN and integers with their largest value.

    Args:
        warn_only: filling is a part of PyTorch's deterministic mode: whether operations that have no such form warn
            instead of raising.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        assert torch.empty(3).isnan().all(), "memory is not poisoned: this test would show nothing"
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextmanager
def memory_is_guarded(monkeypatch: pytest.MonkeyPatch, makers: Sequence[Maker]) -> Iterator[None]:
    """What `makers` return lies within memory of NaN, or the largest integer, which must be there afterwards."""
    made: list[tuple[Tensor, int]] = []

    def within(empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def make(*arguments: Any, **options: Any) -> Tensor:
            x = empty(*arguments, **options)
            if not x.is_contiguous() or x.requires_grad or type(x) is not Tensor:
                return x
            room = x.numel() + 1024
            whole = torch.full((x.numel() + 2 * room,), _sentinel(x.dtype), dtype=x.dtype, device=x.device)
            made.append((whole, room))
            return whole[room : room + x.numel()].view(x.shape)

        return make

    with monkeypatch.context() as patch:
        for owner, name in makers:
            patch.setattr(owner, name, within(getattr(owner, name)))
        yield
    for whole, room in made:
        beside = torch.cat((whole[:room], whole[-room:]))
        kept = beside.isnan() if beside.is_floating_point() else beside == _sentinel(beside.dtype)
        assert kept.all(), f"{int((~kept).sum())} elements were written beside a tensor of {len(whole) - 2 * room}"


def _sentinel(dtype: torch.dtype) -> float | int:
    """What memory beside a tensor holds."""
    if dtype.is_floating_point:
        return torch.nan
    return 1 if dtype == torch.bool else torch.iinfo(dtype).max
