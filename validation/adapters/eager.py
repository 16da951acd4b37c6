"""Our plain PyTorch backend."""

from functools import partial
from typing import Any

import torch

import nsa.eager
from nsa import functional

from ..implementations import STAGES, Implementation


def eager() -> Implementation:
    """The backend and what it can do."""
    stages: dict[str, Any] = {stage: partial(getattr(functional, stage), backend="eager") for stage in STAGES}
    return Implementation(
        name="eager",
        dtypes=frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16}),
        **stages,
        invariant=frozenset({"gradients"}),
        combine=nsa.eager.combine,
        longest=1 << 12,
        plain=True,
    )
