"""Compression: blocks of keys or values, each mapped to one vector (paper, section 3.3.1, equation 7)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa.blocks import BlockStarts, CompressionParams
from nsa.config import NSAConfig
from nsa.ops import accumulation_dtype


def compress(
    xs: Sequence[Tensor],
    params: Sequence[CompressionParams | None],
    config: NSAConfig,
    blocks: BlockStarts | None,
) -> tuple[Tensor, ...]:
    """Compressed blocks `[B, C, Hk, D]` of each `x [B, T, Hk, D]`; see `nsa.functional.compress`."""
    assert blocks is not None
    return tuple(_compress(x, learned, config, blocks) for x, learned in zip(xs, params, strict=True))


def _compress(x: Tensor, params: CompressionParams | None, config: NSAConfig, blocks: BlockStarts) -> Tensor:
    within = torch.arange(config.compress_block_size, device=x.device)
    tokens = x[:, blocks.tokens.unsqueeze(-1) + within].transpose(2, 3)  # [B, C, Hk, l, D]
    if blocks.filled is not None:
        # A block that does not exist starts at token 0, whose values must not reach the gradients of the weights.
        tokens = tokens.masked_fill(~blocks.filled.view(-1, 1, 1, 1), 0)
    if params is None:
        out = tokens.to(accumulation_dtype(x.dtype)).mean(3).to(x.dtype)
    else:
        rows = (tokens + params.position.to(x.dtype)).flatten(3)
        out = torch.einsum("bchi,hif->bchf", rows, params.weight.to(x.dtype))
        if params.weight_out is not None:
            out = torch.einsum("bchf,hfd->bchd", F.silu(out), params.weight_out.to(x.dtype))
    return out if blocks.filled is None else out.masked_fill(~blocks.filled.view(-1, 1, 1), 0)
