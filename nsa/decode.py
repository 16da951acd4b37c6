"""Attention of new tokens over the keys and values that a cache holds."""

from typing import Any

import torch
from torch import Tensor

from nsa.backends import BackendName
from nsa.cache import CachedKeys
from nsa.checks import check_tensor
from nsa.config import NSAConfig
from nsa.functional import (
    compressed_attention,
    load_backend,
    select_blocks,
    selected_attention,
    sliding_window_attention,
)


def cached_attention(
    q: Tensor,
    keys: CachedKeys,
    gates: Tensor,
    config: NSAConfig,
    *,
    scale: float | None = None,
    backend: BackendName = "auto",
) -> tuple[Tensor, Tensor]:
    """`nsa_attention` of the last tokens of sequences whose keys are in a cache; nothing is differentiated.

    Args:
        q: `[B, Tq, Hq, Dk]`, the last `Tq` of `keys.num_keys` tokens.
        keys: what `KVCache.append` returned.
        gates: `[B, Tq, Hq, 3]` in the order compressed, selected, window.

    Returns:
        `[B, Tq, Hq, Dv]` and the indices used, int32 `[B, Tq, Hk, N]`.
    """
    if not isinstance(keys, CachedKeys):
        raise TypeError(f"keys must be CachedKeys, from KVCache.append, got {type(keys).__name__}")
    check_tensor("q", q, "[B, Tq, Hq, Dk]")
    check_tensor("gates", gates, "[B, Tq, Hq, 3]", like=q, shape=(*q.shape[:3], 3), dtype=None)
    if keys.k_slc.shape[1] != keys.num_keys:
        raise ValueError(f"k_slc must have the {keys.num_keys} tokens of num_keys, got {keys.k_slc.shape[1]}")
    seen = min(keys.num_keys, q.shape[1] + max(config.window_size - 1, 0))
    if keys.k_win.shape[1] < seen:
        raise ValueError(f"k_win must have at least the last {seen} tokens, got {keys.k_win.shape[1]}")
    options: dict[str, Any] = {"scale": scale, "backend": backend}
    with torch.no_grad():
        of_blocks = {"num_keys": keys.num_keys, **options}
        compressed, lse = compressed_attention(q, keys.k_cmp, keys.v_cmp, config, **of_blocks)
        indices = select_blocks(q, keys.k_cmp, lse, config, **of_blocks)
        branches: list[Any] = [
            compressed,
            selected_attention(q, keys.k_slc, keys.v_slc, indices, config, **options),
            sliding_window_attention(q, keys.k_win, keys.v_win, config, **options),
        ]
        return load_backend(backend, config, q, keys.v_slc).combine(branches, gates), indices
