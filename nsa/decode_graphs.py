"""Decoding as CUDA graphs: at one token a sequence and step, starting kernels takes longer than they take to run."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nsa.cache import DenseCache, KVCache
from nsa.decode import window_of
from nsa.module import NativeSparseAttention

_WARM_UP = 2
"""Steps that run as usual first, while kernels are compiled and libraries get their workspaces."""


class DecodeGraphs:
    """Steps of a model, one token of every sequence each, captured and replayed where that is possible.

    There is a graph for each state of autocast. What replays give is what calls give, to the bit. Where a step cannot
    be captured, a warning says why, and calls go on.

    Args:
        model: called as `model(tokens, cache=cache, at=at)` for logits `[B, V]`, as `nsa.generate.generate` calls it.
        cache: by layer, filled; it goes on being used.
    """

    def __init__(self, model: nn.Module, cache: Mapping[str, Any]):
        self._model, self._cache = model, cache
        self._calls: dict[tuple[Any, ...], int] = {}
        self._graphs: dict[tuple[Any, ...], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._captures = can_capture(model, cache)
        batch, device = next(iter(cache.values())).batch, next(model.parameters()).device
        with torch.inference_mode(False):  # what is made in that mode cannot be written to outside of it
            self._tokens = torch.zeros(batch, 1, dtype=torch.int64, device=device)
            self._at = torch.zeros(batch, dtype=torch.int64, device=device)

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits `[B, V]` after one more token of each sequence, int64 `[B]`; the next call may write over them.

        Raises:
            ValueError: a cache without room.
        """
        self._tokens.copy_(tokens.unsqueeze(1))
        if not self._captures:
            return self._run()
        caches: list[KVCache | DenseCache] = list(self._cache.values())
        kind = _autocast(self._at.device.type)
        if kind not in self._graphs:
            self._calls[kind] = self._calls.get(kind, 0) + 1
            if self._calls[kind] <= _WARM_UP or not self._capture(kind):
                return self._run()
        else:
            for one in caches:
                one.check_room(one.batch, 1)
            for one in caches:
                one.count_step()
        graph, logits = self._graphs[kind]
        graph.replay()
        return logits

    def _run(self) -> Tensor:
        return self._model(self._tokens, cache=self._cache, at=self._at)

    def _capture(self, kind: tuple[Any, ...]) -> bool:
        """Captures a step, which counts it on the host and does nothing on the device; whether that could be done."""
        device, graph = self._at.device, torch.cuda.CUDAGraph()
        counted = [one.counted() for one in self._cache.values()]
        for one in self._cache.values():
            one.lengths_on_device()  # as far as the host has changed them
        torch.cuda.synchronize(device)
        try:
            # Other threads may take memory meanwhile.
            options: dict[str, Any] = {"stream": torch.cuda.Stream(device), "capture_error_mode": "thread_local"}
            with _without_cached_casts(), torch.cuda.device(device), torch.cuda.graph(graph, **options):
                logits = self._run()
        except RuntimeError as error:
            for one, before in zip(self._cache.values(), counted, strict=True):
                one.count_again(before)
            warnings.warn(f"steps are not captured as CUDA graphs: {error}", stacklevel=3)
            self._captures = False
            return False
        self._graphs[kind] = graph, logits
        return True


def _autocast(device: str) -> tuple[bool, torch.dtype]:
    """Whether autocast is on for a device, and its dtype: a graph repeats the casts of its capture."""
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


@contextmanager
def _without_cached_casts() -> Iterator[None]:
    """Has autocast cast weights anew: what it keeps is gone when its block ends, and a graph would still read it."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


def can_capture(model: nn.Module, cache: Mapping[str, Any]) -> bool:
    """Whether a model's steps are the same launches whatever the lengths: on a GPU, attention by kernels."""
    if any(layer.backend == "eager" for layer in model.modules() if isinstance(layer, NativeSparseAttention)):
        return False
    caches = list(cache.values())
    if not all(isinstance(one, KVCache | DenseCache) and one.keys.device.type == "cuda" for one in caches):
        return False
    from nsa import kernels

    sizes = [one.config if isinstance(one, KVCache) else window_of(one.capacity) for one in caches]
    return all(kernels.why_not(config, one.keys) is None for config, one in zip(sizes, caches, strict=True))
