"""Kernels for Hopper alone, in Gluon: faster twins of some of Triton's, which name producers, rings and barriers.

A Triton kernel stays beside each of these. It is the reference, and it runs wherever the other does not apply: on other
GPUs, for other dtypes and head dims, for packed sequences, inside `portable`, and with NSA_KERNELS=portable in the
environment.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
import triton

from nsa.kernels.configs import forget

OPTION = "NSA_KERNELS"
"""The variable of the environment that chooses: `auto`, or `portable` for Triton's kernels everywhere."""


def _chosen() -> str:
    chosen = os.environ.get(OPTION, "auto")
    if chosen not in ("auto", "portable"):
        raise ValueError(f'{OPTION} must be "auto" or "portable", got {chosen!r}')
    return chosen


_portably = int(_chosen() == "portable")


@contextmanager
def portable() -> Iterator[None]:
    """Launchers choose the Triton kernels inside the context, in every thread: for tests and comparisons."""
    global _portably
    _portably += 1
    forget()
    try:
        yield
    finally:
        _portably -= 1
        forget()


def available(device: torch.device) -> bool:
    """Whether the kernels of this package may run on a device: a Hopper GPU, outside `portable`."""
    return not _portably and _runs(device)


@cache
def _runs(device: torch.device) -> bool:
    compiled = device.type == "cuda" and not triton.knobs.runtime.interpret
    return compiled and torch.cuda.get_device_capability(device) == (9, 0)
