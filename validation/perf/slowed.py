"""Ours with a fault of speed: the forward pass of the window takes longer than it should, and gives what it should.

For `--impl validation.perf.slowed:by_15_percent`: the gates must notice, and name the figure.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..implementations import Implementation, load
from .timing import measure

CYCLES = 10_000_000


def slowed(by: float) -> Implementation:
    """Ours, under its own name, with a window that takes `1 + by` times as long."""
    ours = load("triton" if torch.cuda.is_available() else "eager")
    window = ours.sliding_window_attention
    assert window is not None
    lost: dict[Any, float] = {}

    def slow(q: torch.Tensor, *rest: Any, **options: Any) -> Any:
        if q.shape not in lost:
            with torch.no_grad():
                lost[q.shape] = by * measure(lambda: window(q, *rest, **options)).median
        found = window(q, *rest, **options)
        wait(lost[q.shape])
        return found

    return replace(ours, sliding_window_attention=slow)


def _waiter() -> Callable[[float], None]:
    """A function that takes so many ms by the clock of the machine: on a GPU its own, elsewhere wall time."""
    if torch.cuda.is_available():
        a_cycle = measure(lambda: torch.cuda._sleep(CYCLES)).median / CYCLES
        return lambda ms: torch.cuda._sleep(int(ms / a_cycle))

    return lambda ms: time.sleep(1e-3 * ms)


def wait(ms: float) -> None:
    global _wait
    _wait = _wait or _waiter()
    _wait(ms)


_wait: Callable[[float], None] | None = None


def by_15_percent() -> Implementation:
    return slowed(0.15)
