"""`dq` of the compressed and of the window branch on Hopper: see `nsa.kernels.hopper.flash_backward`.

A program has 64 rows a consumer, (token, head) pairs of a KV head. The ring's entries are tiles of 64 keys and values,
of which a consumer makes

    s = q k^T,   p = 2^(s - lse2),   dp = dout v^T,   ds = p (dp - delta),   dq += ds k.
"""

from typing import NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from nsa.kernels.bwd_preprocess import BackwardRows
from nsa.kernels.flash_tiles import PositionMap
from nsa.kernels.hopper.flash_backward import TILE, constants
from nsa.kernels.hopper.primitives import describe, load_tile, new_barriers, store_rows
from nsa.kernels.launches import recordable
from nsa.kernels.primitives import LOG2E, cdiv

BLOCK = gl.constexpr(64)
"""Keys of an entry."""

OWN = gl.constexpr(TILE)
"""Rows of a consumer."""


@gluon.jit
def _dq_place(
    sizes, STRIDE: gl.constexpr, LAST: gl.constexpr, WINDOWED: gl.constexpr, G: gl.constexpr, ROWS: gl.constexpr
):
    """A program's tile of `ROWS` rows, its batch row and KV head; the first of its keys, how many tiles they make, and
    which of these, `[a, b)`, all rows see. The last tiles see the most keys and are taken first."""
    num_queries, num_keys, shift, window, num_tiles, HEADS, _, _ = sizes
    program = gl.program_id(0)
    tile = num_tiles - 1 - program % num_tiles
    program = program // num_tiles
    first_position = tile * (ROWS // G) + shift
    last_position = gl.minimum((tile + 1) * ROWS, num_queries * G) // G - 1 + shift
    stop = gl.minimum(gl.maximum(last_position - LAST + STRIDE, 0) // STRIDE, num_keys)
    full_stop = gl.minimum(gl.maximum(first_position - LAST + STRIDE, 0) // STRIDE, num_keys)
    first = stop * 0
    full_first = first
    if WINDOWED:
        first = gl.maximum(first_position - window + 1, 0)
        full_first = gl.maximum(last_position - window + 1, 0)
    count = (gl.maximum(stop - first, 0) + BLOCK - 1) // BLOCK
    a = gl.minimum((gl.maximum(full_first - first, 0) + BLOCK - 1) // BLOCK, count)
    b = gl.maximum(gl.minimum(gl.maximum(full_stop - first, 0) // BLOCK, count), a)
    return tile, program // HEADS, program % HEADS, first, count, a, b


@gluon.jit
def _dq_producer(
    tiles, ring, kept, barriers, sizes, STRIDE: gl.constexpr, LAST: gl.constexpr, WINDOWED: gl.constexpr,
    G: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
):  # fmt: skip
    q, dout, k, v = tiles
    keys, values = ring
    queries, douts = kept
    ready, full, free = barriers
    ROWS: gl.constexpr = CONSUMERS * OWN
    tile, batch, head, first, count, _, _ = _dq_place(sizes, STRIDE, LAST, WINDOWED, G, ROWS)
    mbarrier.expect(ready, CONSUMERS * (q.block_type.nbytes + dout.block_type.nbytes))
    for H in gl.static_range(CONSUMERS):
        token = tile * (ROWS // G) + H * (OWN // G)
        load_tile(q, [batch, token, head * G, 0], ready, queries.index(H))
        load_tile(dout, [batch, token, head * G, 0], ready, douts.index(H))
    for n in range(0, count):
        stage = n % STAGES
        arrived = full.index(stage)
        mbarrier.wait(free.index(stage), (n // STAGES & 1) ^ 1)
        mbarrier.expect(arrived, k.block_type.nbytes + v.block_type.nbytes)
        load_tile(k, [batch, head, first + n * BLOCK, 0], arrived, keys.index(stage))
        load_tile(v, [batch, head, first + n * BLOCK, 0], arrived, values.index(stage))


@gluon.jit
def _dq_consumer(
    rows_of, ring, kept, barriers, sizes, scale, scale_log2, H: gl.constexpr, STRIDE: gl.constexpr,
    LAST: gl.constexpr, WINDOWED: gl.constexpr, G: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr, WEIGHTED: gl.constexpr, ADD: gl.constexpr,
):  # fmt: skip
    gate, lse, delta, dq, flags = rows_of
    keys, values = ring
    queries, douts = kept
    ready, full, free = barriers
    num_queries, _, shift, window, num_tiles, HEADS, delta_of_batch, delta_of_head = sizes
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    tile, batch, head, first, count, a, b = _dq_place(sizes, STRIDE, LAST, WINDOWED, G, CONSUMERS * OWN)
    # Tiles that all rows see are taken in pairs; one that is left over joins those with a mask.
    bounds = (0, a, a + (b - a) // 2 * 2, count)

    row = gl.arange(0, OWN, layout=gl.SliceLayout(1, S))
    token = (tile * CONSUMERS + H) * (OWN // G) + row // G
    inside = token < num_queries
    query_head = head * G + row % G
    of_row = (batch * num_queries + token).to(gl.int64) * (HEADS * G) + query_head
    lse2 = gl.load(lse + of_row, mask=inside, other=0.0) * LOG2E
    lse2 = gl.where(lse2 == float("-inf"), float("inf"), lse2)
    delta += batch.to(gl.int64) * delta_of_batch
    row_delta = gl.load(delta + query_head.to(gl.int64) * delta_of_head + token, mask=inside, other=0.0)
    column_end = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, S)) * STRIDE
    q = queries.index(H).reshape([OWN, D])
    do = douts.index(H).reshape([OWN, D])
    nothing = gl.zeros([OWN, BLOCK], gl.float32, layout=S)
    total = gl.zeros([OWN, D], gl.float32, layout=O)
    mbarrier.wait(ready, 0)
    for RUN in gl.static_range(3):
        for first_of_pair in range(bounds[RUN], bounds[RUN + 1], 2 if RUN == 1 else 1):
            n = first_of_pair
            mbarrier.wait(full.index(n % STAGES), n // STAGES & 1)
            k = keys.index(n % STAGES).reshape([BLOCK, D])
            v = values.index(n % STAGES).reshape([BLOCK, D])
            s = warpgroup_mma(q, k.permute((1, 0)), nothing, use_acc=False, is_async=True)
            dp = warpgroup_mma(do, v.permute((1, 0)), nothing, use_acc=False, is_async=True)
            for I in gl.static_range(2 if RUN == 1 else 1):
                logits = s
                if RUN == 1 and I == 0:
                    n += 1
                    mbarrier.wait(full.index(n % STAGES), n // STAGES & 1)
                    next_k = keys.index(n % STAGES).reshape([BLOCK, D])
                    s = warpgroup_mma(q, next_k.permute((1, 0)), nothing, use_acc=False, is_async=True)
                x = warpgroup_mma_wait(1 + (RUN == 1), deps=(logits,)) * scale_log2 - lse2[:, None]
                if RUN != 1:
                    seen = token + shift - ((first + n * BLOCK) * STRIDE + LAST)
                    visible = column_end[None, :] <= seen[:, None]
                    if WINDOWED:
                        visible = visible & (column_end[None, :] > (seen - window)[:, None])
                    x = gl.where(visible, x, float("-inf"))
                p = gl.exp2(x)
                ds = p * (warpgroup_mma_wait((RUN == 1) * (1 - I), deps=(dp,)) - row_delta[:, None])
                total = warpgroup_mma(gl.convert_layout(ds.to(keys.dtype), A), k, total, is_async=True)
                if RUN == 1 and I == 0:
                    k = next_k
                    v = values.index(n % STAGES).reshape([BLOCK, D])
                    dp = warpgroup_mma(do, v.permute((1, 0)), nothing, use_acc=False, is_async=True)
            total = warpgroup_mma_wait(0, deps=(total,))
            for I in gl.static_range(2 if RUN == 1 else 1):
                mbarrier.arrive(free.index((first_of_pair + I) % STAGES), count=1)

    factor = gl.full([OWN], scale, gl.float32, layout=gl.SliceLayout(1, S))
    if WEIGHTED:
        factor *= gl.load(gate + 3 * of_row, mask=inside, other=0.0).to(gl.float32)
    poisoned = gl.sum(gl.sum(total * 0.0, 1), 0)
    # What is added cannot be taken back. Rows beyond the queries are 0.
    stored = inside & (poisoned == 0)
    store_rows(dq, of_row * D, stored, total * gl.convert_layout(factor, gl.SliceLayout(1, O))[:, None], D, ADD)
    # As the portable kernel numbers its programs, with tiles of 64 rows.
    program = gl.program_id(0) // num_tiles * num_tiles + num_tiles - 1 - tile
    gl.store(flags + (program * CONSUMERS + CONSUMERS - 1 - H), poisoned)


@recordable(gluon=True, do_not_specialize=[
    "num_queries", "num_keys", "shift", "window", "num_tiles", "HEADS", "delta_of_batch", "delta_of_head"
])  # fmt: skip
def _bwd_dq_kernel(
    q, dout, k, v, gate, lse, delta, dq, flags, num_queries, num_keys, shift, window, num_tiles, HEADS, delta_of_batch,
    delta_of_head, scale, scale_log2,
    STRIDE: gl.constexpr, LAST: gl.constexpr, WINDOWED: gl.constexpr, G: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, CONSUMERS: gl.constexpr, WEIGHTED: gl.constexpr, ADD: gl.constexpr,
):  # fmt: skip
    """`dq` of 64 rows a consumer, added to what is there with ADD."""
    ring = (
        gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, BLOCK, D], k.layout),
        gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, BLOCK, D], v.layout),
    )
    kept = (
        gl.allocate_shared_memory(q.dtype, [CONSUMERS, 1, OWN // G, G, D], q.layout),
        gl.allocate_shared_memory(q.dtype, [CONSUMERS, 1, OWN // G, G, D], dout.layout),
    )
    barriers = new_barriers(STAGES, CONSUMERS)
    tiles = (q, dout, k, v)
    rows_of = (gate, lse, delta, dq, flags)
    sizes = (num_queries, num_keys, shift, window, num_tiles, HEADS, delta_of_batch, delta_of_head)
    if CONSUMERS == 1:
        gl.warp_specialize([
            (_dq_consumer, (
                rows_of, ring, kept, barriers, sizes, scale, scale_log2, 0, STRIDE, LAST, WINDOWED, G, D, STAGES,
                CONSUMERS, WEIGHTED, ADD,
            )),
            (_dq_producer, (tiles, ring, kept, barriers, sizes, STRIDE, LAST, WINDOWED, G, STAGES, CONSUMERS)),
        ], [4], [24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_dq_consumer, (
                rows_of, ring, kept, barriers, sizes, scale, scale_log2, 0, STRIDE, LAST, WINDOWED, G, D, STAGES,
                CONSUMERS, WEIGHTED, ADD,
            )),
            (_dq_consumer, (
                rows_of, ring, kept, barriers, sizes, scale, scale_log2, 1, STRIDE, LAST, WINDOWED, G, D, STAGES,
                CONSUMERS, WEIGHTED, ADD,
            )),
            (_dq_producer, (tiles, ring, kept, barriers, sizes, STRIDE, LAST, WINDOWED, G, STAGES, CONSUMERS)),
        ], [4, 4], [240, 24])  # fmt: skip


class DqShape(NamedTuple):
    """How the kernel of `dq` is compiled.

    Attributes:
        STAGES: entries of the ring.
        CONSUMERS: one makes programs of which a multiprocessor has room for two, two make one that has it for itself.
    """

    STAGES: int
    CONSUMERS: int


DQ = {64: DqShape(4, 1), 128: DqShape(4, 2)}
"""By head dim."""


def write_dq(
    positions: PositionMap, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, rows: BackwardRows,
    gate: Tensor | None, dq: Tensor, add: bool, num_tokens: int, scale: float,
) -> Tensor:  # fmt: skip
    """Writes `dq`, contiguous, or adds to it; arguments as `nsa.kernels.flash_backward.backward` has them. Returns
    `flags [B, Hk, tiles of 64 rows]`, last tile first."""
    (batch, num_queries, query_heads, dim), (_, num_keys, heads, _) = q.shape, k.shape
    shape, group, delta = DQ[dim], query_heads // heads, rows.delta
    num_tiles = cdiv(num_queries * group, TILE * shape.CONSUMERS)
    flags = delta.new_empty(batch, heads, num_tiles * shape.CONSUMERS)
    # Without a limit a program gets all registers of a multiprocessor.
    limit = {"maxnreg": 128} if shape.CONSUMERS == 1 else {}
    _bwd_dq_kernel[(num_tiles * heads * batch, 1, 1)](
        *(describe(x, 1, TILE // group, group, dim) for x in (q, dout)),
        *(describe(x.transpose(1, 2), 1, 1, BLOCK.value, dim) for x in (k, v)), lse if gate is None else gate, lse,
        delta, dq, flags, num_queries, num_keys, num_tokens - num_queries, positions.window or 0, num_tiles, heads,
        delta.stride(0), delta.stride(2), scale, scale * LOG2E.value, **constants(positions, group, dim, gate),
        STAGES=shape.STAGES, CONSUMERS=shape.CONSUMERS, ADD=add, num_warps=4, **limit,
    )  # fmt: skip
    return flags
