"""Window branch: every query attends to the last `w` keys, its own included (paper, section 3.3.3)."""

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor

from nsa.config import NSAConfig
from nsa.eager import contiguous
from nsa.eager.contiguous import KeyRanges
from nsa.eager.operators import branch
from nsa.eager.tiles import Segment, tiles
from nsa.ops import sizes_of
from nsa.varlen import Varlen, tensors_of


def visible_keys(q: Tensor, k: Tensor, segments: Iterable[Segment], config: NSAConfig) -> KeyRanges:
    """Position map: the query at position `t` sees the `w` keys `t - w < s <= t`."""
    group = q.shape[2] // k.shape[2]
    if config.window_size == 0:
        return
    for segment in segments:
        window = min(config.window_size, segment.keys.stop - segment.keys.start)
        # A tile as long as the window masks half of its products; a shorter one would read keys more often.
        longest = max(window, 64)
        score_bytes = 4 * q.shape[0] * q.shape[2] * (longest + window)
        for tile in tiles(segment, score_bytes, q.device, max_queries=longest):
            start = max(0, tile.first - window + 1)
            keys = slice(segment.keys.start + start, segment.keys.start + tile.last + 1)
            ahead = torch.arange(start, tile.last + 1, device=q.device) - tile.positions(q.device)[:, None]
            behind = 1 - window - ahead
            yield tile, keys, torch.maximum(ahead, behind).repeat_interleave(group, 0)


_window = branch(
    "sliding_window_attention", partial(contiguous.forward, visible_keys), partial(contiguous.backward, visible_keys)
)


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: NSAConfig,
    varlen: Varlen | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output `[B, Tq, Hq, Dv]` and lse `[B, Tq, Hq]`; see `nsa.functional.sliding_window_attention`."""
    return _window(q, k, v, None, *tensors_of(varlen), k.shape[1], sizes_of(config), scale)
