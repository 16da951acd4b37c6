"""`dk` and `dv` of the selected branch on Hopper, key-major: `_bwd_dkdv_kernel` of `nsa.kernels.selected_by_block`.

A program has one piece of a block's list of queries and the 64 keys of the block. Rows are pairs (query, head of the
group), 64 an entry, which are `QUERIES = 64 / G` queries of the list. Of an entry it makes, keys as rows,

    s = k q^T,   p = 2^(factor s - lse2),   dv += p dout,   dp = v dout^T,   ds = p (dp - delta),   dk += ds q

where `p` and `ds` are operands from registers. Queries of a list are in order, each once, so that only the first 64 may
be those of the block itself, which do not see all of it: their entries get a mask.

One warp copies and a warp group computes, in two programs a multiprocessor, which hide each other's waits. The `G`
heads of a query lie side by side in memory, so that queries are gathered by TMA: a box is 64 columns of `G` rows. Boxes
of an entry stand one after the other, first those of the first 64 columns. Each is whole periods of the swizzle, which
are 8 rows, so that together they are a matrix `[64, D]`. What stands beyond the end of a list are boxes of a query
beyond the last, which come as 0 and add 0 to every sum.

Barriers. Entry `n` has stage `n % STAGES` of the ring. The producer waits for `free` of the stage with the parity of
the round before `n // STAGES`, which a fresh barrier satisfies, announces the bytes of the boxes at `full` and asks for
them, stores what is kept a row and arrives at `full` once more. The consumers wait for `full` with the parity of the
round and arrive at `free` when they have read the entry. `ready` completes once, with the keys and the values. Programs
without a piece wait for nothing, and those with an empty one for `ready` alone.

What is not finite is not treated here: a program says in `again` whether its results are, as the Triton kernel does,
whose second pass then works once more where they are not.
"""

from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from nsa.kernels.block_index import BlockIndex, find_piece
from nsa.kernels.bwd_preprocess import BackwardRows
from nsa.kernels.hopper.primitives import barrier, describable_heads, describe, load_tile, new_barriers
from nsa.kernels.launches import recordable
from nsa.kernels.primitives import LOG2E

_ROWS = gl.constexpr(64)
"""Rows of an entry."""

_BLOCK = gl.constexpr(64)
"""Keys of a block."""

_COLUMNS = gl.constexpr(64)
"""Columns of a box, the 128 bytes of the swizzle."""

_STAGES = {64: 4, 128: 2}
"""Entries of the ring, by head dim: two programs fit."""

_REGISTERS = 128
"""Registers of a thread when a program begins: half of a multiprocessor's, by eight warps."""

_PRODUCER = gl.constexpr(24)
"""Registers of a thread that copies; those that compute get the rest, 232."""


@gluon.jit
def _load_rows(
    members, lse2, delta, first, count, first_row, num_queries, NUM_SELECTED: gl.constexpr, G: gl.constexpr,
    ROW_STRIDE,
):  # fmt: skip
    """Queries of the rows of an entry, which begins at pair `first`, and what is kept a row of them."""
    row = gl.arange(0, _ROWS, layout=gl.BlockedLayout([2], [32], [1], [0]))
    pair = first + row // G
    inside = pair < count
    member = gl.load(members + pair, mask=inside, other=0).to(gl.uint32)
    query = (member // NUM_SELECTED).to(gl.int32)
    place = first_row + query.to(gl.int64) * ROW_STRIDE + row % G
    return (
        gl.where(inside, query, num_queries),
        gl.load(lse2 + place, mask=inside, other=0.0),
        gl.load(delta + place, mask=inside, other=0.0),
    )


@gluon.jit
def _producer(
    tiles, rows, members, ring, kept, barriers, piece, sizes, NUM_SELECTED: gl.constexpr, G: gl.constexpr,
    D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    q, dout, k, v = tiles
    lse2, delta = rows
    q_ring, dout_ring, queries, lse2s, deltas = ring
    keys, values = kept
    ready, full, free = barriers
    batch, head, block, _, _, begin, count = piece
    num_queries, _, HEADS = sizes
    QUERIES: gl.constexpr = _ROWS // G
    PARTS: gl.constexpr = D // _COLUMNS
    if block >= 0:
        mbarrier.expect(ready, k.block_type.nbytes + v.block_type.nbytes)
        load_tile(k, [batch, block * _BLOCK, head, 0], ready, keys)
        load_tile(v, [batch, block * _BLOCK, head, 0], ready, values)
        members += begin
        first_row = (batch.to(gl.int64) * num_queries * HEADS + head) * G
        query, row_lse2, row_delta = _load_rows(
            members, lse2, delta, 0, count, first_row, num_queries, NUM_SELECTED, G, HEADS * G
        )
        for n in range(0, (count + QUERIES - 1) // QUERIES):
            stage = n % STAGES
            arrived = full.index(stage)
            # Loaded an entry ahead, so that nothing is waited for when a stage is free.
            next_query, next_lse2, next_delta = _load_rows(
                members, lse2, delta, (n + 1) * QUERIES, count, first_row, num_queries, NUM_SELECTED, G, HEADS * G
            )
            mbarrier.wait(free.index(stage), (n // STAGES & 1) ^ 1)
            mbarrier.expect(arrived, (q.block_type.nbytes + dout.block_type.nbytes) * (PARTS * QUERIES))
            for I in gl.static_range(QUERIES):
                pair = n * QUERIES + I
                member = gl.load(members + pair, mask=pair < count, other=0).to(gl.uint32)
                token = gl.where(pair < count, (member // NUM_SELECTED).to(gl.int32), num_queries)
                for PART in gl.static_range(PARTS):
                    box = (stage * PARTS + PART) * QUERIES + I
                    load_tile(q, [batch, token, head * G, PART * _COLUMNS], arrived, q_ring.index(box))
                    load_tile(dout, [batch, token, head * G, PART * _COLUMNS], arrived, dout_ring.index(box))
            queries.index(stage).store(query)
            lse2s.index(stage).store(row_lse2)
            deltas.index(stage).store(row_delta)
            barrier()
            mbarrier.arrive(arrived, count=1)
            query = next_query
            row_lse2 = next_lse2
            row_delta = next_delta


@gluon.jit
def _store(out, first, apart, inside, x, D: gl.constexpr):
    """Stores `x [64, D]` as rows `first`, `first + apart` and so on of `out`, rounded to its dtype."""
    L: gl.constexpr = x.type.layout
    row = gl.arange(0, _BLOCK, layout=gl.SliceLayout(1, L))
    pointers = out + ((first + row * apart) * D)[:, None] + gl.arange(0, D, layout=gl.SliceLayout(0, L))[None, :]
    gl.store(pointers, x.to(out.dtype.element_ty), mask=inside[:, None])


@gluon.jit
def _consumer(
    results, again, ring, kept, barriers, piece, sizes, partial_place, shift, scale, factor, G: gl.constexpr,
    D: gl.constexpr, STAGES: gl.constexpr, CHUNK: gl.constexpr, WEIGHTED: gl.constexpr,
):  # fmt: skip
    dk, dv, partial_dk, partial_dv = results
    q_ring, dout_ring, queries, lse2s, deltas = ring
    ready, full, free = barriers
    batch, head, block, number, siblings, _, count = piece
    _, num_keys, HEADS = sizes
    QUERIES: gl.constexpr = _ROWS // G
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _ROWS, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    MATRIX: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    if block >= 0:
        key = kept[0].reshape([_BLOCK, D])
        value = kept[1].reshape([_BLOCK, D])
        q_entries = q_ring._reinterpret(q_ring.dtype, [STAGES, _ROWS, D], MATRIX)
        dout_entries = dout_ring._reinterpret(dout_ring.dtype, [STAGES, _ROWS, D], MATRIX)
        position = block * _BLOCK - shift + gl.arange(0, _BLOCK, layout=gl.SliceLayout(1, S))
        nothing = gl.zeros([_BLOCK, _ROWS], gl.float32, layout=S)
        sum_k = gl.zeros([_BLOCK, D], gl.float32, layout=O)
        sum_v = gl.zeros([_BLOCK, D], gl.float32, layout=O)
        stop = (count + QUERIES - 1) // QUERIES
        masked = gl.minimum((gl.maximum(_BLOCK - number * CHUNK, 0) + QUERIES - 1) // QUERIES, stop)
        bounds = (0, masked, stop)
        mbarrier.wait(ready, 0)
        for RUN in gl.static_range(2):
            for n in range(bounds[RUN], bounds[RUN + 1]):
                stage = n % STAGES
                mbarrier.wait(full.index(stage), n // STAGES & 1)
                q = q_entries.index(stage)
                do = dout_entries.index(stage)
                s = warpgroup_mma(key, q.permute((1, 0)), nothing, use_acc=False, is_async=True)
                dp = warpgroup_mma(value, do.permute((1, 0)), nothing, use_acc=False, is_async=True)
                lse2 = lse2s.index(stage).load(gl.SliceLayout(0, S))[None, :]
                x = warpgroup_mma_wait(1, deps=(s,)) * factor - lse2
                if RUN == 0:
                    query = queries.index(stage).load(gl.SliceLayout(0, S))
                    x = gl.where(position[:, None] <= query[None, :], x, float("-inf"))
                p = gl.exp2(x)
                if WEIGHTED:
                    sign = lse2.to(gl.int32, bitcast=True) << 31
                    p = (p.to(gl.int32, bitcast=True) ^ sign).to(gl.float32, bitcast=True)
                sum_v = warpgroup_mma(gl.convert_layout(p.to(do.dtype), A), do, sum_v, is_async=True)
                delta = deltas.index(stage).load(gl.SliceLayout(0, S))[None, :]
                ds = p * (warpgroup_mma_wait(1, deps=(dp,)) - delta)
                sum_k = warpgroup_mma(gl.convert_layout(ds.to(q.dtype), A), q, sum_k, is_async=True)
                sum_v = warpgroup_mma_wait(1, deps=(sum_v,))
                sum_k = warpgroup_mma_wait(0, deps=(sum_k,))
                mbarrier.arrive(free.index(stage), count=1)

        poisoned = gl.sum(gl.sum(sum_k * 0.0 + sum_v * 0.0, 1), 0)
        gl.store(again, (poisoned != 0).to(gl.int8))
        row = gl.arange(0, _BLOCK, layout=gl.SliceLayout(1, O))
        real = block * _BLOCK + row < num_keys
        # One piece is the whole sum; several leave theirs for `_reduce_kernel`, each in a place of its own.
        if siblings == 1:
            first = (batch.to(gl.int64) * num_keys + block * _BLOCK) * HEADS + head
            _store(dk, first, HEADS, real, sum_k * scale, D)
            _store(dv, first, HEADS, real, sum_v, D)
        else:
            _store(partial_dk, partial_place * _BLOCK, 1, real, sum_k * scale, D)
            _store(partial_dv, partial_place * _BLOCK, 1, real, sum_v, D)
    else:
        gl.store(again, gl.to_tensor(0).to(gl.int8))


@recordable(gluon=True, do_not_specialize=[
    "num_queries", "num_keys", "shift", "num_blocks", "pieces_per_head", "partials_per_head", "first_head", "HEADS"
])  # fmt: skip
def _bwd_dkdv_kernel(
    q, dout, k, v, lse2, delta, members, offsets, pieces, partials, dk, dv, partial_dk, partial_dv, again, num_queries,
    num_keys, shift, num_blocks, pieces_per_head, partials_per_head, first_head, HEADS, scale, factor,
    NUM_SELECTED: gl.constexpr, G: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, CHUNK: gl.constexpr,
    WEIGHTED: gl.constexpr,
):  # fmt: skip
    """`dk` and `dv` of a block from one piece of its list."""
    BOXES: gl.constexpr = STAGES * (D // _COLUMNS) * (_ROWS // G)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ring = (
        gl.allocate_shared_memory(q.dtype, [BOXES, 1, 1, G, _COLUMNS], q.layout),
        gl.allocate_shared_memory(q.dtype, [BOXES, 1, 1, G, _COLUMNS], dout.layout),
        gl.allocate_shared_memory(gl.int32, [STAGES, _ROWS], FLAT),
        gl.allocate_shared_memory(gl.float32, [STAGES, _ROWS], FLAT),
        gl.allocate_shared_memory(gl.float32, [STAGES, _ROWS], FLAT),
    )
    kept = (
        gl.allocate_shared_memory(q.dtype, [1, _BLOCK, 1, D], k.layout),
        gl.allocate_shared_memory(q.dtype, [1, _BLOCK, 1, D], v.layout),
    )
    barriers = new_barriers(STAGES, 1, 2)
    program = gl.program_id(0)
    batch_head, block, number, siblings, begin, count = find_piece(
        program, offsets, pieces, first_head, pieces_per_head, num_queries, num_blocks, NUM_SELECTED, CHUNK
    )
    partial_place = batch_head.to(gl.int64) * partials_per_head + number
    partial_place += gl.load(partials + batch_head.to(gl.int64) * (num_blocks + 1) + gl.maximum(block, 0))
    piece = (batch_head // HEADS, batch_head % HEADS, block, number, siblings, begin, count)
    sizes = (num_queries, num_keys, HEADS)
    gl.warp_specialize([
        (_consumer, (
            (dk, dv, partial_dk, partial_dv), again + program, ring, kept, barriers, piece, sizes, partial_place,
            shift, scale, factor, G, D, STAGES, CHUNK, WEIGHTED,
        )),
        (_producer, (
            (q, dout, k, v), (lse2, delta), members, ring, kept, barriers, piece, sizes, NUM_SELECTED, G, D, STAGES,
        )),
    ], [1], [_PRODUCER])  # fmt: skip


# Launcher.


def applies(constants: dict[str, Any], q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> bool:
    """Whether there is a kernel for these tensors; `constants` are those of `nsa.kernels.selected_attention`."""
    return (
        constants["BLOCK_SIZE"] == constants["BLOCK_N"] == _BLOCK.value
        and not constants["PACKED"]
        and constants["G"] in (8, 16, 32)
        and q.shape[3] in _STAGES
        and describable_heads(q, k, v, dout)
    )


def write_dkdv(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, rows: BackwardRows, index: BlockIndex, dk: Tensor, dv: Tensor,
    partial_dk: Tensor, partial_dv: Tensor, again: Tensor, first: int, count: int, num_blocks: int, num_selected: int,
    chunk: int, scale: float, weighted: bool,
) -> None:  # fmt: skip
    """Writes `dk` and `dv` of the blocks of `count` heads from the `first` on, partial sums of those whose lists have
    several pieces, and which programs' results are not finite."""
    (_, num_queries, query_heads, dim), (_, num_keys, heads, _) = q.shape, k.shape
    group = query_heads // heads
    _bwd_dkdv_kernel[(count * index.pieces_per_head,)](
        *(describe(x, 1, 1, group, _COLUMNS.value) for x in (q, dout)),
        *(describe(x, 1, _BLOCK.value, 1, dim) for x in (k, v)), rows.lse2, rows.delta, index.members, index.offsets,
        index.pieces, index.partials, dk, dv, partial_dk, partial_dv, again, num_queries, num_keys,
        num_keys - num_queries, num_blocks, index.pieces_per_head, index.partials_per_head, first, heads, scale,
        scale * LOG2E.value, NUM_SELECTED=num_selected, G=group, D=dim, STAGES=_STAGES[dim], CHUNK=chunk,
        WEIGHTED=weighted, num_warps=4, maxnreg=_REGISTERS,
    )  # fmt: skip
