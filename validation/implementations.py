"""What the harness needs of an implementation: the stage functions and an honest account of what they can do.

Our own backends go through the same door as everybody else's. A subject is named by its key in `ADAPTERS` or as
`package.module:object`, the object being an `Implementation` or a function that makes one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch

STAGES = (
    "compress",
    "compressed_attention",
    "select_blocks",
    "selected_attention",
    "sliding_window_attention",
    "nsa_attention",
)
"""The stage functions by name; each has the signature of the oracle's function of that name."""


@dataclass(frozen=True)
class Implementation:
    """One subject of the harness. A stage it lacks is None; a capability declared is a capability tested."""

    name: str
    compress: Callable[..., Any] | None = None
    compressed_attention: Callable[..., Any] | None = None
    select_blocks: Callable[..., Any] | None = None
    selected_attention: Callable[..., Any] | None = None
    sliding_window_attention: Callable[..., Any] | None = None
    nsa_attention: Callable[..., Any] | None = None
    combine: Callable[..., Any] | None = None
    """The gated sum, `(branches, gates)`: part of `nsa_attention` and tested with it, but timed by itself."""

    dtypes: frozenset[torch.dtype] = frozenset({torch.float32})
    """Floating dtypes of the inputs."""
    devices: frozenset[str] = frozenset({"cpu", "cuda"})
    """Device types of the inputs."""
    backward: bool = True
    """Whether gradients flow."""
    packed: bool = True
    """Several sequences in one row, by `cu_seqlens_q` and `cu_seqlens_k`."""
    partial_queries: bool = True
    """Fewer queries than keys (`Tq < Tk`)."""
    value_head_dim: bool = True
    """Values of another head dim than keys (`Dv != Dk`)."""
    groups: Callable[[int], bool] = lambda group: group >= 1
    """Whether a number of query heads a KV head (`G`) is supported."""
    head_dims: Callable[[int], bool] = lambda dim: dim >= 1
    """Whether a head dim (`Dk`, `Dv`) is supported."""
    config: Callable[[Any], bool] = lambda config: True
    """Whether an `NSAConfig` is supported."""
    interpreted: bool = False
    """Whether it runs under Triton's interpreter: seconds where a GPU takes microseconds, so it is tried on little."""
    checks_input: bool = True
    """Whether bad input is refused before work starts."""

    def has(self, stage: str) -> bool:
        """Whether the stage of that name (one of `STAGES`) is there."""
        return getattr(self, stage) is not None


def eager() -> Implementation:
    """Our plain PyTorch backend."""
    functional = import_module("nsa.functional")
    return Implementation(
        name="eager",
        dtypes=frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16}),
        **{stage: partial(getattr(functional, stage), backend="eager") for stage in STAGES},
        combine=import_module("nsa.eager").combine,
    )


def triton() -> Implementation:
    """Our Triton backend: compiled on a GPU, elsewhere under Triton's interpreter."""
    functional, kernels = import_module("nsa.functional"), import_module("nsa.kernels")
    dtypes = {torch.float32, torch.bfloat16, torch.float16} | ({torch.float64} if kernels.INTERPRETED else set())
    return Implementation(
        name="triton",
        dtypes=frozenset(dtypes),
        head_dims=lambda dim: 16 <= dim <= 256,
        config=lambda config: kernels.why_not(config) is None,
        interpreted=kernels.INTERPRETED,
        **{stage: partial(getattr(functional, stage), backend="triton") for stage in STAGES},
        combine=kernels.combine,
    )


ADAPTERS: dict[str, Callable[[], Implementation]] = {"eager": eager, "triton": triton}
"""Makers of the subjects that ship with the harness; making one imports what it needs."""


def load(name: str) -> Implementation:
    """The implementation called `name`, or found at `package.module:object`."""
    if name in ADAPTERS:
        return ADAPTERS[name]()
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(f"name must be one of {sorted(ADAPTERS)} or package.module:object, got {name!r}")
    found = getattr(import_module(module), attribute)
    found = found() if callable(found) else found
    if not isinstance(found, Implementation):
        raise TypeError(f"{name} must be an Implementation or make one, got {type(found).__name__}")
    return found
