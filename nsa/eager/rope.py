"""Rotary position embedding in plain PyTorch (RoFormer, arXiv 2104.09864)."""

import math

import torch
from torch import Tensor

from nsa.config import NSAConfig
from nsa.ops import accumulation_dtype


def rotate(x: Tensor, angles: Tensor, interleaved: bool = True) -> Tensor:
    """Rotates the pairs of `x [B, T, H, D]` by rows of a RoPE table, `[T, D / 2, 2]`, one a token.

    A pair is two neighbours where they are `interleaved`, else an element of the first half and one of the second.
    """
    dtype, pairs = accumulation_dtype(torch.promote_types(x.dtype, angles.dtype)), x.shape[-1] // 2
    split, of_pair = ((pairs, 2), -1) if interleaved else ((2, pairs), -2)
    a, b = x.to(dtype).reshape(*x.shape[:-1], *split).unbind(of_pair)
    cos, sin = angles.to(dtype).unsqueeze(1).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), of_pair).flatten(-2).to(x.dtype)


def apply_rope(
    q: Tensor,
    k_cmp: Tensor,
    k_slc: Tensor,
    k_win: Tensor,
    rope: Tensor,
    config: NSAConfig,
    positions: Tensor | None,
    block_positions: Tensor | None,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four, rotated; see `nsa.functional.apply_rope`."""
    if positions is None:
        positions = torch.arange(q.shape[1], device=q.device)
    if block_positions is None:
        block_positions = torch.arange(k_cmp.shape[1], device=q.device) * config.compress_stride
    angles, block_angles = _rows(rope, positions), _rows(rope, block_positions)
    q, k_slc, k_win = (rotate(x, angles, interleaved) for x in (q, k_slc, k_win))
    return q, rotate(k_cmp, block_angles, interleaved), k_slc, k_win


def _rows(rope: Tensor, positions: Tensor) -> Tensor:
    """Rows of the table, NaN where there is none: on a GPU nobody has looked at the positions."""
    known = (positions >= 0) & (positions < rope.shape[0])
    return rope[positions * known].where(known[:, None, None], math.nan)
