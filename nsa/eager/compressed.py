"""Compressed branch: every query attends to the compressed blocks that have passed (paper, section 3.3.1)."""

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


def visible_blocks(q: Tensor, k: Tensor, segments: Iterable[Segment], config: NSAConfig) -> KeyRanges:
    """Position map: block `i` is visible from the position of its last token, `i d + l - 1`, on."""
    group = q.shape[2] // k.shape[2]
    for segment in segments:
        first = segment.blocks.start
        score_bytes = 4 * q.shape[0] * q.shape[2] * (segment.blocks.stop - first)
        for tile in tiles(segment, score_bytes, q.device):
            visible = config.num_compressed(tile.last + 1)
            block = torch.arange(visible, device=q.device)
            last_token = block * config.compress_stride + config.compress_block_size - 1
            distance = last_token - tile.positions(q.device)[:, None]
            yield tile, slice(first, first + visible), distance.repeat_interleave(group, 0)


_compressed = branch(
    "compressed_attention", partial(contiguous.forward, visible_blocks), partial(contiguous.backward, visible_blocks)
)


def compressed_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    config: NSAConfig,
    num_keys: int,
    varlen: Varlen | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output `[B, Tq, Hq, Dv]` and lse `[B, Tq, Hq]`; see `nsa.functional.compressed_attention`."""
    return _compressed(q, k_cmp, v_cmp, None, *tensors_of(varlen), num_keys, sizes_of(config), scale)
