"""Compressed blocks: the parameters that map a block to one vector, and where blocks start (section 3.3.1)."""

from typing import NamedTuple

import torch
from torch import Tensor

from nsa.config import NSAConfig


class CompressionParams(NamedTuple):
    """Learned tensors of `compress`, for keys or for values; `None` stands for the `"mean"` kind, which learns nothing.

    Attributes:
        position: `[Hk, l, D]`, intra-block position embedding, added to every block.
        weight: `[Hk, l * D, F]`, first layer over the block's tokens, token-major; `F == D` for the `"linear"` kind.
        weight_out: `[Hk, F, D]`, second layer of the `"mlp"` kind, after a SiLU.
    """

    position: Tensor
    weight: Tensor
    weight_out: Tensor | None = None


class BlockStarts(NamedTuple):
    """Where compressed blocks begin, each `[C]`.

    Attributes:
        tokens: int64, first token of each block in the packed row.
        positions: int64, the same within its own sequence.
        filled: bool, or `None` where every block is: packed sequences leave room at the end.
    """

    tokens: Tensor
    positions: Tensor
    filled: Tensor | None


def count_blocks(cu_seqlens: Tensor, config: NSAConfig) -> Tensor:
    """Number of compressed blocks of each packed sequence, `[N]`, for offsets `[N + 1]`."""
    return ((cu_seqlens.diff() - config.compress_block_size) // config.compress_stride + 1).clamp(min=0)


def block_starts(
    num_keys: int, config: NSAConfig, cu_seqlens: Tensor | None = None, *, device: torch.device | None = None
) -> BlockStarts:
    """First tokens of the `C` compressed blocks of `num_keys` tokens; block `i` of a sequence starts at `i d`.

    Sequence ends waste blocks, so packed sequences have at most as many as one sequence of their total length. `C` is
    always that many, a static shape; blocks that do not exist start at 0 and are not `filled`.
    """
    block = torch.arange(config.num_compressed(num_keys), device=device)
    if cu_seqlens is None:
        return BlockStarts(block * config.compress_stride, block * config.compress_stride, None)
    bounds = cu_seqlens.long()
    counts = count_blocks(bounds, config)
    ends = counts.cumsum(0)
    sequence = torch.searchsorted(ends, block, right=True)
    filled = sequence < ends.shape[0]
    sequence = sequence.clamp(max=ends.shape[0] - 1)
    positions = (block - (ends - counts)[sequence]) * config.compress_stride * filled
    return BlockStarts((bounds[sequence] + positions) * filled, positions, filled)
