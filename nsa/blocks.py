"""Compressed blocks: the parameters that map a block to one vector, and where blocks start (section 3.3.1)."""

from collections.abc import Callable
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


BlockFunction = Callable[[Tensor], Tensor]
"""Any map of blocks to vectors, `[B, C, Hk, l, D] -> [B, C, Hk, D]`, phi of equation 7."""


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


def compress_by(function: BlockFunction, x: Tensor, starts: BlockStarts, config: NSAConfig) -> Tensor:
    """Vectors `[B, C, Hk, D]` of the blocks of `x [B, T, Hk, D]`; 0 for those that are not filled.

    Raises:
        ValueError: the function returns another shape.
    """
    tokens = starts.tokens[:, None] + torch.arange(config.compress_block_size, device=x.device)
    blocks = x[:, tokens].transpose(2, 3)
    if starts.filled is not None:
        # Not 0, of which a function may have no derivative.
        blocks = torch.where(starts.filled[:, None, None, None], blocks, 1)
    out = function(blocks)
    if out.shape[:-1] != blocks.shape[:3]:
        expected = f"[B, C, Hk, D] = ({', '.join(map(str, blocks.shape[:3]))}, D)"
        raise ValueError(f"params must be a function to shape {expected}, got one to {tuple(out.shape)}")
    return out if starts.filled is None else torch.where(starts.filled[:, None, None], out, 0)


def check_vectors(new: tuple[Tensor, Tensor], stores: tuple[Tensor, Tensor], sizes: tuple[int, int]) -> None:
    """Refuses compressed keys and values that do not have their `sizes`, rows and blocks, or the heads of the stores.

    Raises:
        ValueError: another shape.
    """
    for name, x, store in zip(("k_cmp", "v_cmp"), new, stores, strict=True):
        expected = (*sizes, *store.shape[2:])
        if x.shape != expected:
            raise ValueError(f"{name} must have shape [b, c, Hk, D] = {expected}, got {tuple(x.shape)}")
