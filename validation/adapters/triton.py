"""Our Triton backend: compiled on a GPU, elsewhere under Triton's interpreter."""

from functools import partial
from typing import Any

import torch

from nsa import functional, kernels

from ..implementations import STAGES, Implementation, Sizes


def blocks(config: Any) -> bool:
    """powers of two, d from 8, l and l' from 16"""
    return kernels.why_not(config) is None


def triton() -> Implementation:
    """The backend and what it can do."""
    stages: dict[str, Any] = {stage: partial(getattr(functional, stage), backend="triton") for stage in STAGES}
    dtypes = {torch.float32, torch.bfloat16, torch.float16} | ({torch.float64} if kernels.INTERPRETED else set())
    return Implementation(
        name="triton",
        dtypes=frozenset(dtypes),
        **stages,
        invariant=frozenset({"gradients", "batch", "graphs"}),
        combine=kernels.combine,
        head_dims=Sizes(16, 256),
        config=blocks,
        longest=1 << 14,
        tile=16 if kernels.INTERPRETED else 64,
        interpreted=kernels.INTERPRETED,
    )
