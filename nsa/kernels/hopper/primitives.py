"""Primitives of the kernels for Hopper: descriptors, barriers of a ring, rows stored.

Gluon is experimental, and releases of Triton rename parts of it: what several names stand for has one here.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nsa.kernels.primitives import describable

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # Triton 3.7, 3.6
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # 3.9, 3.6
store_tile = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global  # 3.9, 3.6


GROUPS = (1, 2, 4, 8, 16, 32, 64)
"""Query heads of a KV head, for which a tile of 64 rows has whole queries."""


def describable_heads(q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> bool:
    """Whether tiles can be described of these tensors `[B, T, H, D]`, whose keys and values have the same width."""
    return (
        q.dtype in (torch.bfloat16, torch.float16)
        and k.shape[3] == v.shape[3]
        and q.shape[2] // k.shape[2] in GROUPS
        and describable(q, k, v, *others)
    )


@lru_cache(maxsize=256)
def _layout(box: tuple[int, ...], dtype: torch.dtype) -> Any:
    return gl.NVMMASharedLayout.get_default_for(list(box), getattr(gl, str(dtype).removeprefix("torch.")))


def describe(x: Tensor, *box: int) -> TensorDescriptor:
    """Descriptor of a tensor in boxes of this shape."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(box), _layout(box, x.dtype))


@gluon.jit
def new_barriers(STAGES: gl.constexpr, CONSUMERS: gl.constexpr, ARRIVALS: gl.constexpr = 1):
    """Barriers of what is kept, of arrivals in the ring, so many an entry, and of its releases."""
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=ARRIVALS)
        mbarrier.init(free.index(stage), count=CONSUMERS)
    fence_async_shared()
    return ready, full, free


@gluon.jit
def store_rows(out, offsets, inside, x, D: gl.constexpr, ADD: gl.constexpr = False):
    """Stores rows `x [64, D]` at `out + offsets`, added to what is there with ADD, rounded to its dtype."""
    B: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    rows: gl.constexpr = gl.SliceLayout(1, B)
    pointers = out + gl.convert_layout(offsets, rows)[:, None] + gl.arange(0, D, layout=gl.SliceLayout(0, B))[None, :]
    mask = gl.convert_layout(inside, rows)[:, None]
    x = gl.convert_layout(x, B)
    if ADD:
        x += gl.load(pointers, mask=mask, other=0.0).to(gl.float32)
    gl.store(pointers, x.to(out.dtype.element_ty), mask=mask)


@gluon.jit
def count_turns(total):
    """Number of `total` places that this program takes, one a turn."""
    programs = gl.num_programs(0)
    return total // programs + (turn_place(total // programs) < total).to(gl.int32)


@gluon.jit
def turn_place(turn):
    """The place that this program takes in a turn. Where places get lighter from first to last, so do turns, and
    programs within a turn: every other turn goes backwards."""
    programs = gl.num_programs(0)
    return turn * programs + gl.where(turn % 2 == 0, gl.program_id(0), programs - 1 - gl.program_id(0))
