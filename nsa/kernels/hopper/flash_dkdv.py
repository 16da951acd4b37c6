"""`dk` and `dv` of the compressed and of the window branch on Hopper: see `nsa.kernels.hopper.flash_backward`.

A program has 128 keys of a KV head, 64 a consumer. The ring's entries are tiles of 64 queries of one head with their
`dout` and what is kept a row; the heads of a tile follow one another. Of an entry a consumer makes, keys as rows,

    s = k q^T,   p = 2^(s - lse2),   dv += p dout,   dp = v dout^T,   ds = p (dp - delta),   dk += ds q

where `p` and `ds` are operands from registers. Of the tiles that see any of its keys those at both ends get a mask.
"""

from typing import NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from nsa.kernels.bwd_preprocess import BackwardRows
from nsa.kernels.configs import multiprocessors
from nsa.kernels.flash_tiles import PositionMap
from nsa.kernels.hopper.flash_backward import TILE, constants
from nsa.kernels.hopper.primitives import describe, load_tile, new_barriers, store_rows
from nsa.kernels.launches import recordable
from nsa.kernels.primitives import LOG2E, cdiv

BLOCK = gl.constexpr(64)
"""Queries of an entry."""

OWN = gl.constexpr(TILE)
"""Keys of a consumer."""

KEYS = gl.constexpr(2 * TILE)
"""Keys of a program."""

ALIGNED = gl.constexpr(4)
"""Copies of `lse2` and `delta` start at multiples of this many queries, 16 bytes: any other start is an error of the
GPU, an illegal instruction."""


@gluon.jit
def _count_query_tiles(start, last, shift, num_queries, window, WINDOWED: gl.constexpr):
    """Tiles of queries from `start` to the end of those that see a key up to `last`."""
    stop = num_queries
    if WINDOWED:
        stop = gl.minimum(stop, last + window - shift)
    return (gl.maximum(stop - start, 0) + BLOCK - 1) // BLOCK


@gluon.jit
def _dkdv_place(sizes, STRIDE: gl.constexpr, LAST: gl.constexpr, WINDOWED: gl.constexpr):
    """A program's split, batch row, KV head and first key; the first of its queries, and how many tiles they make."""
    _, num_queries, num_keys, shift, window, num_tiles, HEADS, num_splits = sizes
    program = gl.program_id(0)
    split = program % num_splits
    program = program // num_splits
    first = program % num_tiles * KEYS
    program = program // num_tiles
    query = gl.maximum(first * STRIDE + LAST - shift, 0) // ALIGNED * ALIGNED
    last = gl.minimum(first + KEYS, num_keys) - 1
    count = _count_query_tiles(query, last, shift, num_queries, window, WINDOWED)
    begin = count * split // num_splits
    end = count * (split + 1) // num_splits
    return split, program // HEADS, program % HEADS, first, query + begin * BLOCK, end - begin


@gluon.jit
def _skip(full, free, start, stop, STAGES: gl.constexpr):
    """Releases entries of the ring that a consumer does not use."""
    for n in range(start, stop):
        mbarrier.wait(full.index(n % STAGES), n // STAGES & 1)
        mbarrier.arrive(free.index(n % STAGES), count=1)


@gluon.jit
def _dkdv_producer(
    tiles, ring, kept, barriers, sizes, STRIDE: gl.constexpr, LAST: gl.constexpr, WINDOWED: gl.constexpr,
    G: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    q, dout, lse2, delta, k, v = tiles
    queries, douts, lse2s, deltas = ring
    keys, values = kept
    ready, full, free = barriers
    _, batch, head, first, query, count = _dkdv_place(sizes, STRIDE, LAST, WINDOWED)
    mbarrier.expect(ready, k.block_type.nbytes + v.block_type.nbytes)
    load_tile(k, [batch, head, first, 0], ready, keys)
    load_tile(v, [batch, head, first, 0], ready, values)
    for n in range(0, count * G):
        stage = n % STAGES
        row = query + n // G * BLOCK
        query_head = head * G + n % G
        of_row = batch * sizes[6] * G + query_head
        arrived = full.index(stage)
        mbarrier.wait(free.index(stage), (n // STAGES & 1) ^ 1)
        mbarrier.expect(
            arrived,
            q.block_type.nbytes + dout.block_type.nbytes + lse2.block_type.nbytes + delta.block_type.nbytes,
        )
        load_tile(q, [batch, query_head, row, 0], arrived, queries.index(stage))
        load_tile(lse2, [of_row, row], arrived, lse2s.index(stage))
        load_tile(dout, [batch, query_head, row, 0], arrived, douts.index(stage))
        load_tile(delta, [of_row, row], arrived, deltas.index(stage))


@gluon.jit
def _dkdv_consumer(
    results, ring, kept, barriers, sizes, scale, scale_log2, H: gl.constexpr, STRIDE: gl.constexpr, LAST: gl.constexpr,
    WINDOWED: gl.constexpr, G: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, PAIR: gl.constexpr,
    WEIGHTED: gl.constexpr,
):  # fmt: skip
    dk, dv, flags = results
    queries, douts, lse2s, deltas = ring
    keys, values = kept
    ready, full, free = barriers
    num_batches, num_queries, num_keys, shift, window, _, HEADS, num_splits = sizes
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    split, batch, head, first, query, count = _dkdv_place(sizes, STRIDE, LAST, WINDOWED)
    first += H * OWN
    last = gl.minimum(first + OWN, num_keys) - 1
    # Tiles that see none of this consumer's keys, then some, all, and some of them.
    t3 = gl.minimum(_count_query_tiles(query, last, shift, num_queries, window, WINDOWED), count)
    t0 = gl.minimum(gl.maximum(first * STRIDE + LAST - shift - query, 0) // BLOCK, t3)
    t1 = (gl.maximum(last * STRIDE + LAST - shift - query, 0) + BLOCK - 1) // BLOCK
    t1 = gl.minimum(gl.maximum(t1, t0), t3)
    t2 = t3
    if WINDOWED:
        t2 = gl.minimum(gl.maximum(gl.maximum(first + window - shift - query, 0) // BLOCK, t1), t3)
    bounds = (t0 * G, t1 * G, t2 * G, t3 * G)

    key = keys.reshape([KEYS, D]).slice(H * OWN, OWN)
    value = values.reshape([KEYS, D]).slice(H * OWN, OWN)
    key_end = (first + gl.arange(0, OWN, layout=gl.SliceLayout(1, S))) * STRIDE + LAST
    column = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, S))
    nothing = gl.zeros([OWN, BLOCK], gl.float32, layout=S)
    sum_k = gl.zeros([OWN, D], gl.float32, layout=O)
    sum_v = gl.zeros([OWN, D], gl.float32, layout=O)
    mbarrier.wait(ready, 0)
    _skip(full, free, 0, bounds[0], STAGES)
    for RUN in gl.static_range(3):
        for first_of_pair in range(bounds[RUN], bounds[RUN + 1], PAIR):
            n = first_of_pair
            mbarrier.wait(full.index(n % STAGES), n // STAGES & 1)
            q = queries.index(n % STAGES).reshape([BLOCK, D])
            do = douts.index(n % STAGES).reshape([BLOCK, D])
            s = warpgroup_mma(key, q.permute((1, 0)), nothing, use_acc=False, is_async=True)
            dp = warpgroup_mma(value, do.permute((1, 0)), nothing, use_acc=False, is_async=True)
            for I in gl.static_range(PAIR):
                stage = n % STAGES
                logits = s
                if I + 1 < PAIR:
                    n += 1
                    mbarrier.wait(full.index(n % STAGES), n // STAGES & 1)
                    next_q = queries.index(n % STAGES).reshape([BLOCK, D])
                    s = warpgroup_mma(key, next_q.permute((1, 0)), nothing, use_acc=False, is_async=True)
                lse2 = lse2s.index(stage).load(S)
                x = warpgroup_mma_wait(1 + 2 * (I > 0) + (I + 1 < PAIR), deps=(logits,)) * scale_log2 - lse2
                if RUN != 1:
                    seen = key_end - (query + first_of_pair // G * BLOCK + shift)
                    visible = column[None, :] >= seen[:, None]
                    if WINDOWED:
                        visible = visible & (column[None, :] < (seen + window)[:, None])
                    x = gl.where(visible, x, float("-inf"))
                p = gl.exp2(x)
                if WEIGHTED:
                    sign = lse2.to(gl.int32, bitcast=True) << 31
                    p = (p.to(gl.int32, bitcast=True) ^ sign).to(gl.float32, bitcast=True)
                sum_v = warpgroup_mma(gl.convert_layout(p.to(douts.dtype), A), do, sum_v, is_async=True)
                delta = deltas.index(stage).load(S)
                ds = p * (warpgroup_mma_wait(1 + (I + 1 < PAIR), deps=(dp,)) - delta)
                sum_k = warpgroup_mma(gl.convert_layout(ds.to(queries.dtype), A), q, sum_k, is_async=True)
                if I + 1 < PAIR:
                    q = next_q
                    do = douts.index(n % STAGES).reshape([BLOCK, D])
                    dp = warpgroup_mma(value, do.permute((1, 0)), nothing, use_acc=False, is_async=True)
            sum_v = warpgroup_mma_wait(1, deps=(sum_v,))
            sum_k = warpgroup_mma_wait(0, deps=(sum_k,))
            for I in gl.static_range(PAIR):
                mbarrier.arrive(free.index((first_of_pair + I) % STAGES), count=1)
    _skip(full, free, bounds[3], count * G, STAGES)

    rows = first + gl.arange(0, OWN, layout=gl.SliceLayout(1, O))
    offsets = (((split * num_batches + batch).to(gl.int64) * num_keys + rows) * HEADS + head) * D
    store_rows(dk, offsets, rows < num_keys, sum_k * scale, D)
    store_rows(dv, offsets, rows < num_keys, sum_v, D)
    poisoned = gl.sum(gl.sum(sum_k * 0.0 + sum_v * 0.0, 1), 0)
    # As the portable kernel numbers its programs, with tiles of 64 keys.
    gl.store(flags + (gl.program_id(0) // num_splits * 2 + H) * num_splits + split, poisoned)


@recordable(gluon=True, do_not_specialize=[
    "num_batches", "num_queries", "num_keys", "shift", "window", "num_tiles", "HEADS", "num_splits"
])  # fmt: skip
def _bwd_dkdv_kernel(
    q, dout, lse2, delta, k, v, dk, dv, flags, num_batches, num_queries, num_keys, shift, window, num_tiles, HEADS,
    num_splits, scale, scale_log2,
    STRIDE: gl.constexpr, LAST: gl.constexpr, WINDOWED: gl.constexpr, G: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, PAIR: gl.constexpr, WEIGHTED: gl.constexpr,
):  # fmt: skip
    """One split of `dk` and `dv` of 128 keys."""
    ring = (
        gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, BLOCK, D], q.layout),
        gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, BLOCK, D], dout.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK], lse2.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK], delta.layout),
    )
    kept = (
        gl.allocate_shared_memory(q.dtype, [1, 1, KEYS, D], k.layout),
        gl.allocate_shared_memory(q.dtype, [1, 1, KEYS, D], v.layout),
    )
    barriers = new_barriers(STAGES, 2)
    tiles = (q, dout, lse2, delta, k, v)
    sizes = (num_batches, num_queries, num_keys, shift, window, num_tiles, HEADS, num_splits)
    results = (dk, dv, flags)
    gl.warp_specialize([
        (_dkdv_consumer, (
            results, ring, kept, barriers, sizes, scale, scale_log2, 0, STRIDE, LAST, WINDOWED, G, D, STAGES, PAIR,
            WEIGHTED,
        )),
        (_dkdv_consumer, (
            results, ring, kept, barriers, sizes, scale, scale_log2, 1, STRIDE, LAST, WINDOWED, G, D, STAGES, PAIR,
            WEIGHTED,
        )),
        (_dkdv_producer, (tiles, ring, kept, barriers, sizes, STRIDE, LAST, WINDOWED, G, STAGES)),
    ], [4, 4], [240, 24])  # fmt: skip


class DkdvShape(NamedTuple):
    """How the kernel of `dk` and `dv` is compiled.

    Attributes:
        STAGES: entries of the ring.
        PAIR: entries that a consumer takes at a time, which are two heads of a tile of queries.
    """

    STAGES: int
    PAIR: int


DKDV = {64: DkdvShape(4, 2), 128: DkdvShape(3, 1)}
"""By head dim."""


def programs_per_key_tile(positions: PositionMap, k: Tensor) -> int:
    """Among how many programs the queries of a tile of keys should be split, to keep the device busy; may be 0."""
    tiles = cdiv(k.shape[1], KEYS.value) * k.shape[2] * k.shape[0]
    # The first compressed blocks have all queries to walk over, and the last hardly any: more programs balance that.
    return (1 if positions.window is not None else 4) * multiprocessors(k.device) // tiles


def write_dkdv(
    positions: PositionMap, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, rows: BackwardRows, gate: Tensor | None,
    dk: Tensor, dv: Tensor, num_tokens: int, scale: float,
) -> Tensor:  # fmt: skip
    """Writes the partial sums `dk` and `dv`, `[splits, B, T, Hk, D]` and contiguous; arguments as
    `nsa.kernels.flash_backward.backward` has them. Returns `flags [B, Hk, tiles of 64 keys, splits]`."""
    (batch, num_queries, query_heads, dim), (_, num_keys, heads, _) = q.shape, k.shape
    shape, num_tiles, num_splits = DKDV[dim], cdiv(num_keys, KEYS.value), dk.shape[0]
    group = query_heads // heads
    flags = rows.delta.new_empty(batch, heads, KEYS.value // TILE * num_tiles, num_splits)
    delta, lse2 = (
        describe(x.as_strided((batch * query_heads, num_queries), (x.stride(2), 1)), 1, BLOCK.value) for x in rows
    )
    _bwd_dkdv_kernel[(num_tiles * num_splits * heads * batch, 1, 1)](
        *(describe(x.transpose(1, 2), 1, 1, BLOCK.value, dim) for x in (q, dout)), lse2, delta,
        *(describe(x.transpose(1, 2), 1, 1, KEYS.value, dim) for x in (k, v)), dk, dv, flags, batch, num_queries,
        num_keys, num_tokens - num_queries, positions.window or 0, num_tiles, heads, num_splits, scale,
        scale * LOG2E.value, **constants(positions, group, dim, gate), STAGES=shape.STAGES,
        PAIR=shape.PAIR if group > 1 else 1, num_warps=4,
    )  # fmt: skip
    return flags
