"""Our plain PyTorch backend."""

from functools import partial

import torch

import nsa.eager
from nsa import functional

from ..implementations import STAGES, Implementation


def eager() -> Implementation:
    """The backend and what it can do."""
    return Implementation(
        name="eager",
        dtypes=frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16}),
        **{stage: partial(getattr(functional, stage), backend="eager") for stage in STAGES},
        invariant=frozenset({"gradients"}),
        combine=nsa.eager.combine,
        plain=True,
    )
