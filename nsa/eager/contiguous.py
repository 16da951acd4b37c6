"""Attention where all queries of a tile look at one range of keys under a mask: the compressed and the window branch.

The two differ in their position map alone, a function `key_ranges(q, k, segments, config)` that yields the tiles.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from nsa.config import NSAConfig
from nsa.eager.flash import attend, attend_backward, may_be_nonfinite
from nsa.eager.layout import grouped, head_major, token_major, ungrouped
from nsa.eager.tiles import Segment, Tile

KeyRanges = Iterator[tuple[Tile, slice, Tensor]]
"""Tiles of `c` queries, the range of `L` keys each looks at, and the distances of those, `[c G, L]`."""


def forward(
    key_ranges: Callable[..., KeyRanges],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: None,
    segments: Iterable[Segment],
    config: NSAConfig,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output `[B, Tq, Hq, Dv]` and lse `[B, Tq, Hq]` of `q [B, Tq, Hq, Dk]` over `k`, `v` `[B, L, Hk, D]`."""
    queries, keys, values = grouped(q, k.shape[2]), head_major(k), head_major(v)
    out = queries.new_zeros(*queries.shape[:-1], v.shape[-1])
    lse = queries.new_full(queries.shape[:-1], -torch.inf)
    nonfinite = may_be_nonfinite(q, k, v)
    for tile, span, distance in key_ranges(q, k, segments, config):
        rows = tile.queries
        tile_out, tile_lse = attend(
            queries[:, :, rows].flatten(2, 3), keys[:, :, span], values[:, :, span], distance, scale, nonfinite
        )
        out[:, :, rows] = tile_out.view_as(out[:, :, rows])
        lse[:, :, rows] = tile_lse.view_as(lse[:, :, rows])
    return ungrouped(out, q.dtype), ungrouped(lse, lse.dtype)


def backward(
    key_ranges: Callable[..., KeyRanges],
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    indices: None,
    segments: Iterable[Segment],
    config: NSAConfig,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward` for `dout [B, Tq, Hq, Dv]`, in the shapes of `q`, `k` and `v`."""
    per_query = [grouped(x, k.shape[2]) for x in (dout, q, out, lse)]
    keys, values = head_major(k), head_major(v)
    dq, dk, dv = torch.zeros_like(per_query[1]), torch.zeros_like(keys), torch.zeros_like(values)
    nonfinite = may_be_nonfinite(dout, q, k, v, out)
    for tile, span, distance in key_ranges(q, k, segments, config):
        rows = tile.queries
        tile_dout, queries, tile_out, tile_lse = (x[:, :, rows].flatten(2, 3) for x in per_query)
        tile_dq, tile_dk, tile_dv = attend_backward(
            tile_dout, queries, keys[:, :, span], values[:, :, span], tile_out, tile_lse, distance, scale, nonfinite
        )
        dq[:, :, rows] = tile_dq.view_as(dq[:, :, rows])
        dk[:, :, span] += tile_dk
        dv[:, :, span] += tile_dv
    return ungrouped(dq, q.dtype), token_major(dk, k.dtype), token_major(dv, v.dtype)
