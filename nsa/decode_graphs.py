"""Decoding as CUDA graphs: at one token a sequence and step, starting kernels takes longer than they take to run."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nsa.cache import KVCache
from nsa.module import NativeSparseAttention

_WARM_UP = 2
"""Steps of each kind that run as usual first, while kernels are compiled and libraries get their workspaces."""


class DecodeGraphs:
    """Steps of a model, one token of every sequence each, captured and replayed where that is possible.

    Some steps complete compressed blocks and others do not (`KVCache.step`), so there is a graph for each kind. What
    replays give is what calls give, to the bit. Where a step cannot be captured, a warning says why, and calls go on.

    Args:
        model: called as `model(tokens, cache=cache, at=at)` for logits `[B, V]`, as `nsa.generate.generate` calls it.
        cache: by layer, filled; it goes on being used.
    """

    def __init__(self, model: nn.Module, cache: Mapping[str, Any]):
        self._model, self._cache = model, cache
        self._calls: dict[tuple[bool, ...], int] = {}
        self._graphs: dict[tuple[bool, ...], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._captures = can_capture(model, cache)
        batch, device = next(iter(cache.values())).batch, next(model.parameters()).device
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
        caches: list[KVCache] = list(self._cache.values())
        kind = tuple(one.completes_block() for one in caches)
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

    def _capture(self, kind: tuple[bool, ...]) -> bool:
        """Captures a step, which counts it on the host and does nothing on the device; whether that could be done."""
        device, graph = self._at.device, torch.cuda.CUDAGraph()
        counted = [one.counted() for one in self._cache.values()]
        for one in self._cache.values():
            one.lengths_on_device()  # as far as the host has changed them
        torch.cuda.synchronize(device)
        try:
            # Other threads may take memory meanwhile.
            options: dict[str, Any] = {"stream": torch.cuda.Stream(device), "capture_error_mode": "thread_local"}
            with torch.cuda.device(device), torch.cuda.graph(graph, **options):
                logits = self._run()
        except RuntimeError as error:
            for one, before in zip(self._cache.values(), counted, strict=True):
                one.count_again(before)
            warnings.warn(f"steps are not captured as CUDA graphs: {error}", stacklevel=3)
            self._captures = False
            return False
        self._graphs[kind] = graph, logits
        return True


def can_capture(model: nn.Module, cache: Mapping[str, Any]) -> bool:
    """Whether a model's steps are the same launches whatever the lengths: NSA layers alone, on a GPU, by kernels."""
    layers = [layer for layer in model.modules() if isinstance(layer, NativeSparseAttention)]
    if not layers or not all(isinstance(one, KVCache) for one in cache.values()):
        return False
    if any(layer.wq.weight.device.type != "cuda" or layer.backend == "eager" for layer in layers):
        return False
    from nsa import kernels

    return all(kernels.why_not(layer.config, layer.wq.weight.new_empty(layer.head_dim)) is None for layer in layers)
