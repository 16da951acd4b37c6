"""Attention of new tokens over the keys and values that a cache holds."""

from typing import Any

import torch
from torch import Tensor

from nsa.backends import BackendName
from nsa.cache import CachedKeys, StepKeys
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
    """`nsa_attention` (section 3.2) of the last tokens of sequences whose keys are in a cache, without derivatives.

    Args:
        q: `[B, Tq, Hq, Dk]`, the last `Tq` of `keys.num_keys` tokens.
        keys: what `KVCache.append` returned.
        gates: `[B, Tq, Hq, 3]` in the order compressed, selected, window.
        config: block sizes and counts.
        scale: of the logits; `Dk ** -0.5` unless given.
        backend: `"auto"`, `"eager"` or `"triton"`.

    Returns:
        `[B, Tq, Hq, Dv]` and the indices used, int32 `[B, Tq, Hk, N]`.

    Raises:
        TypeError: keys of another kind, tensors of several dtypes.
        ValueError: tensors of other shapes or devices, keys that lack tokens, an unknown backend or one that does not
            support the tensors.
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


def decode_attention(
    q: Tensor,
    keys: StepKeys,
    gates: Tensor,
    config: NSAConfig,
    *,
    scale: float | None = None,
    backend: BackendName = "auto",
) -> tuple[Tensor, Tensor]:
    """`nsa_attention` (section 3.2) of the last `Tq` tokens of sequences whose lengths are on the device.

    With the Triton backend neither shapes nor launches depend on the lengths, and nothing waits for the device: steps
    can be captured in a CUDA graph. Nothing is differentiated.

    Args:
        q: `[B, Tq, Hq, Dk]`, the last `Tq` tokens of each sequence, few: kernels read all keys once for each.
        keys: what `KVCache.step` returned. The host does not look at `keys.lengths`: one beyond the room there is for
            tokens is taken for that room.
        gates: `[B, Tq, Hq, 3]` in the order compressed, selected, window.
        config: block sizes and counts.
        scale: of the logits; `Dk ** -0.5` unless given.
        backend: `"auto"`, `"eager"` or `"triton"`.

    Returns:
        `[B, Tq, Hq, Dv]` and the indices used, int32 `[B, Tq, Hk, N]`.

    Raises:
        TypeError: keys of another kind, tensors of several dtypes.
        ValueError: tensors of other shapes or devices, a ring that is shorter than what the queries see, an unknown
            backend or one that does not support the tensors.
    """
    if not isinstance(keys, StepKeys):
        raise TypeError(f"keys must be StepKeys, from KVCache.step, got {type(keys).__name__}")
    check_tensor("q", q, "[B, Tq, Hq, Dk]")
    batch, heads = q.shape[0], keys.k_slc.shape[2]
    if q.shape[2] % heads:
        raise ValueError(f"q must have a multiple of the {heads} key/value heads, got {q.shape[2]}")
    check_tensor("gates", gates, "[B, Tq, Hq, 3]", like=q, shape=(*q.shape[:3], 3), dtype=None)
    check_tensor("lengths", keys.lengths, "[B]", like=q, shape=(batch,), dtype=torch.int64)
    tokens = {"cmp": config.num_compressed(keys.k_slc.shape[1]), "slc": keys.k_slc.shape[1], "win": keys.k_win.shape[1]}
    for kind, width in (("k", q.shape[3]), ("v", keys.v_slc.shape[3])):
        for branch, length in tokens.items():
            name, shape = f"{kind}_{branch}", (batch, length, heads, width)
            check_tensor(name, getattr(keys, name), "[B, T, Hk, D]", like=q, shape=shape)
    seen = min(tokens["slc"], q.shape[1] + config.window_size - 1) if config.window_size else 0
    if tokens["win"] < seen:
        raise ValueError(f"k_win must have room for the last {seen} tokens, got {tokens['win']}")
    scale = q.shape[3] ** -0.5 if scale is None else scale
    with torch.no_grad():
        return load_backend(backend, config, q, keys.v_slc).decode_attention(q, *keys, gates, config, scale)


_ENDLESS = 1 << 30
"""Size of blocks that no sequence completes: kernels are compiled for sizes of blocks, so once for all capacities."""


def dense_decode_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, *, scale: float | None = None, backend: BackendName = "auto"
) -> Tensor:
    """Dense attention of the last `Tq` tokens of sequences whose lengths are on the device.

    It is `decode_attention` with a window as wide as the room and no other branches.

    Args:
        q: `[B, Tq, Hq, Dk]`, the last `Tq` tokens of each sequence, few.
        k: `[B, T, Hk, Dk]`, with room for `T` tokens of each sequence, as `DenseCache.step` returns them.
        v: `[B, T, Hk, Dv]`.
        lengths: int64 `[B]`, tokens so far; what lies beyond them is not seen.
        scale, backend: as `decode_attention` takes them.

    Returns:
        `[B, Tq, Hq, Dv]`.

    Raises:
        TypeError, ValueError: as `decode_attention` does.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x, "[B, T, H, D]")
    gates = q.new_zeros(3)
    gates[2:].fill_(1)
    keys = StepKeys(k[:, :0], v[:, :0], k, v, k, v, lengths)
    return decode_attention(
        q, keys, gates.expand(*q.shape[:3], 3), window_of(k.shape[1]), scale=scale, backend=backend
    )[0]


def window_of(capacity: int) -> NSAConfig:
    """The configuration of a window over all of `capacity` tokens, without other branches."""
    blocks = dict.fromkeys(("compress_block_size", "compress_stride", "select_block_size"), _ENDLESS)
    none = dict.fromkeys(("num_selected_blocks", "num_initial_blocks", "num_local_blocks"), 0)
    sizes: dict[str, Any] = {**blocks, **none, "window_size": capacity, "compression": "mean"}
    return NSAConfig(**sizes)
