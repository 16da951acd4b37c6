"""Kernels that may run at the same time, inside a CUDA graph.

The branches of attention do not wait for one another. Kernels of one fill the multiprocessors that the last programs of
another's leave idle, and one that waits for memory shares them with one that computes. On streams of their own, the
kernels of a graph are free to do so. Outside of a graph, the events between streams would cost the host more time.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch


@lru_cache(maxsize=64)
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class SideStream:
    """A stream beside the current one while a graph is captured, and the current one else.

    Work inside `with side.fork():` waits for all work before it, and what comes after the context does not wait for it
    before `join`. Memory that was taken outside and is used inside must live until then: `keep` does that.
    """

    def __init__(self, device: torch.device) -> None:
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        self._stream = _side_stream(device) if capturing else None
        self._kept: list[Any] = []

    def fork(self) -> AbstractContextManager[Any]:
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        return torch.cuda.stream(self._stream)

    def keep(self, *tensors: Any) -> None:
        """Holds `tensors` until `join`, if there is another stream that may use them."""
        if self._stream is not None:
            self._kept += tensors

    def join(self) -> None:
        """The current stream waits for the side stream."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
            self._kept.clear()
