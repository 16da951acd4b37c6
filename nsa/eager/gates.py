"""Gated sum of the three branches (paper, equation 5)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nsa.ops import accumulation_dtype


def combine(branches: Sequence[Tensor], gates: Tensor) -> Tensor:
    """The sum of the branch outputs `[B, Tq, Hq, Dv]` under gates `[B, Tq, Hq, 3]`, `[B, Tq, Hq, Dv]`."""
    dtype = accumulation_dtype(torch.promote_types(branches[0].dtype, gates.dtype))
    # Slices instead of `unbind`: Inductor would write the gates' gradient over views that it has still to read
    # (docs/pytorch-compiled-gradients.md).
    compressed, selected, window = (
        out.to(dtype) * gates[..., branch : branch + 1].to(dtype) for branch, out in enumerate(branches)
    )
    return (compressed + selected + window).to(branches[0].dtype)
