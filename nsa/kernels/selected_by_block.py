"""Attention to selected blocks, key-major: the forward, and the gradients of keys and values and of the queries.

A program has one piece of a block's list of queries (`nsa.kernels.block_index`) and `BLOCK_N` keys of the block, a part
of it. It holds the keys and gathers the queries, `BLOCK_M` rows (query, head of the group) a step. This is how dk and
dv are always made: the sum over queries lies within a program,

    p = 2^(s - lse2),    ds = p (dout.v - delta),    dk = scale sum ds q,    dv = sum p dout,

but for a list of several pieces, whose float32 partial sums `_reduce_kernel` adds up in order. On Hopper, where `dq` is
made elsewhere, `nsa.kernels.hopper.selected_dkdv` makes them.

The forward and dq sum over the blocks of a query instead. Each pair (query, slot) leaves a partial result for every
part of its block: for the forward, the softmax over these keys alone and its log-sum-exp, which `_merge_kernel` weights
by 2^(lse2 - max) and adds up; for dq, its summand, rounded to the dtype of the inputs, for `_merge_dq_kernel`. That
moves about `G (Dk + 2 Dv)` elements a pair, less than query-major kernels where `G` is small. Partial results
are `[heads, Tq, N, parts, G]` rows of some heads at a time.

A query has no part in the gradient of a key that it does not see, whatever either holds. Masked weights alone do not
ensure it, as 0 times NaN is NaN: where a result is not finite, the program works once more (CLEAN), leaves rows that
are not finite out of the products, and gives them NaN as their weight where they are seen.
"""

import math
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.kernels.block_index import (
    Packing,
    build_block_index,
    find_block,
    find_piece,
    query_positions,
    sees_block,
)
from nsa.kernels.bwd_preprocess import BackwardRows
from nsa.kernels.configs import KeyMajorConfig, multiprocessors, plan
from nsa.kernels.hopper import available, selected_dkdv
from nsa.kernels.launches import recordable
from nsa.kernels.primitives import (
    LN2,
    add_dot,
    cdiv,
    dot,
    dot_chunks,
    head_runs,
    load_chunks,
    logit_factor,
    next_power_of_2,
    not_finite,
    probability,
    program_of,
    store_chunks,
    without,
    zero_unless_finite,
)

UNROLLED = tl.constexpr(8)
"""Summands of `dq` whose loads are under way at once."""

# Sizes that change from call to call and are no reason to compile again.
_LENGTHS = (
    "num_queries", "num_keys", "num_sequences", "shift", "num_blocks", "pieces_per_head", "partials_per_head",
    "first_head",
)  # fmt: skip


@recordable(do_not_specialize=_LENGTHS)
def _forward_kernel(
    q, k, v, members, offsets, pieces, partial, partial_lse2, query_table, cu_keys, num_sequences, q_strides, k_strides,
    v_strides, num_queries, num_keys, shift, num_blocks, pieces_per_head, first_head, factor, HEADS,
    NUM_SELECTED: tl.constexpr, G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr, DK: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr,
    V1: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr, CHUNK: tl.constexpr,
    NEGATIVE: tl.constexpr,
):  # fmt: skip
    """Partial results of the pairs of one piece and the log-sum-exps of their rows, in base 2."""
    poisoned = 1.0
    for CLEAN in tl.static_range(2):
        if poisoned != 0:
            batch_head, block, piece, _, begin, count = find_piece(
                program_of(poisoned, CLEAN), offsets, pieces, first_head, pieces_per_head, num_queries, num_blocks,
                NUM_SELECTED, CHUNK,
            )  # fmt: skip
            poisoned = 0.0
            if block >= 0:
                part = tl.program_id(1)
                start, position, length = find_block(cu_keys, num_sequences, block, num_keys, BLOCK_SIZE, PACKED)
                head = (batch_head % HEADS).to(tl.int64)
                batch = (batch_head // HEADS).to(tl.int64)
                k_head = k + batch * k_strides[0] + head * k_strides[2]
                v_head = v + batch * v_strides[0] + head * v_strides[2]
                q_head = q + batch * q_strides[0] + head * G * q_strides[2]

                within = part * BLOCK_N + tl.arange(0, BLOCK_N)
                real = within < length
                keys = start + within.to(tl.int64)
                k0, k1 = load_chunks(k_head, keys * k_strides[1], real, DK, K0, K1)
                v0, v1 = load_chunks(v_head, keys * v_strides[1], real, DV, V0, V1)
                if CLEAN:
                    bad = not_finite(v0, v1, V1, ACC)
                    v0, v1 = without(v0, v1, bad, V1)
                first_pair = (batch_head - first_head).to(tl.int64) * num_queries * NUM_SELECTED
                # Queries come in order, each once: all but the first of a list see the whole block.
                rank = piece * CHUNK
                for step in range(0, count * G, BLOCK_M):
                    row = (step + tl.arange(0, BLOCK_M)).to(tl.uint32)
                    inside = row < count * G
                    member = tl.load(members + begin + row // G, mask=inside, other=0).to(tl.uint32)
                    query = (member // NUM_SELECTED).to(tl.int64)
                    of_group = (row % G).to(tl.int64)
                    q0, q1 = load_chunks(q_head, query * q_strides[1] + of_group * q_strides[2], inside, DK, K0, K1)
                    reach = query_positions(query_table, query, shift, inside, PACKED) - position
                    s = dot_chunks(q0, q1, k0, k1, K1, ACC, PRECISION)
                    if NEGATIVE:
                        s = -s
                    visible = within[None, :] <= reach[:, None]
                    if rank + step // G < BLOCK_SIZE:
                        s = tl.where(visible, s, float("-inf"))
                    row_max = tl.max(s, 1) * factor
                    safe_max = tl.where(row_max == float("-inf"), 0.0, row_max)
                    p = tl.exp2(s * factor - safe_max[:, None])
                    row_sum = tl.sum(p, 1)
                    empty = row_sum == 0
                    row_sum = tl.where(empty, 1.0, row_sum)
                    if CLEAN:
                        p = tl.where(visible & bad[None, :], float("nan"), p)
                    p = p.to(v0.dtype)
                    share = (1.0 / row_sum)[:, None]
                    out0 = dot(p, v0, None, ACC, PRECISION) * share
                    out1 = out0
                    if V1 > 0:
                        out1 = dot(p, v1, None, ACC, PRECISION) * share
                    place = ((first_pair + member) * (BLOCK_SIZE // BLOCK_N) + part) * G + of_group
                    lse2 = tl.where(empty, float("-inf"), safe_max + tl.log2(row_sum))
                    tl.store(partial_lse2 + place, lse2, mask=inside)
                    store_chunks(partial, place * DV, inside, out0, out1, DV, V0, V1)
                if not CLEAN:
                    poisoned = zero_unless_finite(v0, v1, V1, ACC)


@triton.jit
def _find_rows(
    query_table, num_queries, shift, first_head, HEADS, G: tl.constexpr, BLOCK_M: tl.constexpr, PACKED: tl.constexpr
):
    """`BLOCK_M` rows (query, head of the group) of one KV head: batch, head, queries, heads of the group, positions,
    and which rows there are."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < num_queries * G
    query = (row // G).to(tl.int64)
    head = first_head + tl.program_id(1)
    position = query_positions(query_table, query, shift, inside, PACKED)
    return (head // HEADS).to(tl.int64), (head % HEADS).to(tl.int64), query, row % G, position, inside


@recordable(do_not_specialize=_LENGTHS)
def _merge_kernel(
    partial, partial_lse2, indices, out, lse, query_table, index_strides, num_queries, shift, first_head, HEADS,
    NUM_SELECTED: tl.constexpr, G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, ACC: tl.constexpr,
    PACKED: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The output and log-sum-exp of each row, from its partial results."""
    batch, head, query, of_group, position, inside = _find_rows(
        query_table, num_queries, shift, first_head, HEADS, G, BLOCK_M, PACKED
    )
    PARTS: tl.constexpr = BLOCK_SIZE // BLOCK_N
    indices += batch * index_strides[0] + head * index_strides[2]
    place = ((tl.program_id(1) * num_queries + query) * NUM_SELECTED * PARTS) * G + of_group
    every = tl.arange(0, STEPS)[None, :]
    blocks = tl.load(
        indices + query[:, None] * index_strides[1] + tl.cast(every // PARTS, tl.int64) * index_strides[3],
        inside[:, None] & (every < NUM_SELECTED * PARTS),
        other=-1,
    )
    # The partial results of a block that the query does not see were never written.
    written = sees_block(blocks, position[:, None], BLOCK_SIZE)
    lse2 = tl.load(partial_lse2 + place[:, None] + every * G, mask=written, other=float("-inf"))
    row_max = tl.max(lse2, 1)
    safe_max = tl.where(row_max == float("-inf"), 0.0, row_max)
    row_sum = tl.sum(tl.exp2(lse2 - safe_max[:, None]), 1)
    empty = row_sum == 0
    base = safe_max + tl.log2(tl.where(empty, 1.0, row_sum))
    out0 = tl.zeros([BLOCK_M, V0], dtype=ACC)
    out1 = tl.zeros([BLOCK_M, V1 if V1 > 0 else 16], dtype=ACC)
    for step in range(0, NUM_SELECTED * PARTS):
        block = tl.load(
            indices + query * index_strides[1] + tl.cast(step // PARTS, tl.int64) * index_strides[3], inside, other=-1
        )
        valid = sees_block(block, position, BLOCK_SIZE)
        weight = tl.exp2(tl.load(partial_lse2 + place + step * G, mask=valid, other=float("-inf")) - base)
        part0, part1 = load_chunks(partial, (place + step * G) * DV, valid, DV, V0, V1)
        out0 += weight[:, None] * part0.to(ACC)
        if V1 > 0:
            out1 += weight[:, None] * part1.to(ACC)
    rows = ((batch * num_queries + query) * HEADS + head) * G + of_group
    tl.store(lse + rows, tl.where(empty, float("-inf"), base * LN2), mask=inside)
    store_chunks(out, rows * DV, inside, out0, out1, DV, V0, V1)


@recordable(do_not_specialize=_LENGTHS)
def _bwd_dkdv_kernel(
    q, k, v, dout, lse2, delta, members, offsets, pieces, partials, dk, dv, partial_dk, partial_dv, partial_dq, again,
    query_table, cu_keys, num_sequences, q_strides, k_strides, v_strides, do_strides, num_queries, num_keys, shift,
    num_blocks, pieces_per_head, partials_per_head, first_head, scale, factor, HEADS, NUM_SELECTED: tl.constexpr,
    G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, DK: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, PACKED: tl.constexpr, CHUNK: tl.constexpr, WITH_DQ: tl.constexpr, WEIGHTED: tl.constexpr,
    CLEAN: tl.constexpr, NEGATIVE: tl.constexpr,
):  # fmt: skip
    """`dk` and `dv` of one part of a block from one piece of its list; tiles are `[BLOCK_N, BLOCK_M]`. WITH_DQ also the
    summands of `dq`, where `_forward_kernel` has its partial results.

    Each program says in `again` whether its results are not finite, and a second launch with CLEAN works where they are
    not. Both passes in one kernel would take registers from the loop of the first.
    """
    again += tl.program_id(0) * (BLOCK_SIZE // BLOCK_N) + tl.program_id(1)
    wanted = True
    if CLEAN:
        wanted = tl.load(again) != 0
    if wanted:
        poisoned = tl.zeros([], ACC)
        batch_head, block, piece, siblings, begin, count = find_piece(
            tl.program_id(0), offsets, pieces, first_head, pieces_per_head, num_queries, num_blocks, NUM_SELECTED, CHUNK
        )
        if block >= 0:
            start, position, length = find_block(cu_keys, num_sequences, block, num_keys, BLOCK_SIZE, PACKED)
            head = (batch_head % HEADS).to(tl.int64)
            batch = (batch_head // HEADS).to(tl.int64)
            k_head = k + batch * k_strides[0] + head * k_strides[2]
            v_head = v + batch * v_strides[0] + head * v_strides[2]
            q_head = q + batch * q_strides[0] + head * G * q_strides[2]
            dout_head = dout + batch * do_strides[0] + head * G * do_strides[2]
            first_row = (batch * num_queries * HEADS + head) * G
            # Found before the loop, which leaves no registers for what it is found by.
            partial_place = batch_head.to(tl.int64) * partials_per_head + piece
            partial_place += tl.load(partials + batch_head.to(tl.int64) * (num_blocks + 1) + block)

            within = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
            real = within < length
            keys = start + within.to(tl.int64)
            k0, k1 = load_chunks(k_head, keys * k_strides[1], real, DK, K0, K1)
            v0, v1 = load_chunks(v_head, keys * v_strides[1], real, DV, V0, V1)
            dk0 = tl.zeros([BLOCK_N, K0], dtype=ACC)
            dk1 = tl.zeros([BLOCK_N, K1 if K1 > 0 else 16], dtype=ACC)
            dv0 = tl.zeros([BLOCK_N, V0], dtype=ACC)
            dv1 = tl.zeros([BLOCK_N, V1 if V1 > 0 else 16], dtype=ACC)
            clean_k0 = k0
            clean_k1 = k1
            if CLEAN and WITH_DQ:
                clean_k0, clean_k1 = without(k0, k1, not_finite(k0, k1, K1, ACC), K1)
            members += begin
            first_pair = (batch_head - first_head).to(tl.int64) * num_queries * NUM_SELECTED
            rank = piece * CHUNK  # as in `_forward_kernel`
            for step in range(0, count * G, BLOCK_M):
                row = (step + tl.arange(0, BLOCK_M)).to(tl.uint32)
                inside = row < count * G
                member = tl.load(members + row // G, mask=inside, other=0).to(tl.uint32)
                query = (member // NUM_SELECTED).to(tl.int64)
                reach = query_positions(query_table, query, shift, inside, PACKED) - position
                of_group = (row % G).to(tl.int64)
                q0, q1 = load_chunks(q_head, query * q_strides[1] + of_group * q_strides[2], inside, DK, K0, K1)
                do0, do1 = load_chunks(dout_head, query * do_strides[1] + of_group * do_strides[2], inside, DV, V0, V1)
                # Rows beyond the list have q and dout of 0, and so no part in either sum.
                of_row = first_row + query * (HEADS * G) + of_group
                row_lse2 = tl.load(lse2 + of_row, mask=inside, other=0.0)
                row_delta = tl.load(delta + of_row, mask=inside, other=0.0)
                s = dot_chunks(k0, k1, q0, q1, K1, ACC, PRECISION)
                if NEGATIVE:
                    s = -s
                if rank + step // G < BLOCK_SIZE:
                    s = tl.where(within[:, None] <= reach[None, :], s, float("-inf"))
                p = probability(s * factor, row_lse2[None, :], ACC, WEIGHTED)
                if CLEAN:
                    visible = (within[:, None] <= reach[None, :]) & inside[None, :]
                    bad = not_finite(do0, do1, V1, ACC)
                    do0, do1 = without(do0, do1, bad, V1)
                    q0, q1 = without(q0, q1, not_finite(q0, q1, K1, ACC), K1)
                    # A query that is not finite spoils the keys that it sees, and no others.
                    p = tl.where(visible, tl.where(bad[None, :], float("nan"), p), 0.0)
                dv0, dv1 = add_dot(p.to(do0.dtype), do0, do1, dv0, dv1, V1, ACC, PRECISION)
                ds = p * (dot_chunks(v0, v1, do0, do1, V1, ACC, PRECISION) - row_delta[None, :])
                if CLEAN:
                    ds = tl.where(visible, ds, 0.0)
                ds = ds.to(q0.dtype)
                dk0, dk1 = add_dot(ds, q0, q1, dk0, dk1, K1, ACC, PRECISION)
                if WITH_DQ:
                    dq0 = dot(tl.trans(ds), clean_k0, None, ACC, PRECISION) * scale
                    dq1 = dq0
                    if K1 > 0:
                        dq1 = dot(tl.trans(ds), clean_k1, None, ACC, PRECISION) * scale
                    place = ((first_pair + member) * (BLOCK_SIZE // BLOCK_N) + tl.program_id(1)) * G + of_group
                    store_chunks(partial_dq, place * DK, inside, dq0, dq1, DK, K0, K1)

            if not CLEAN:
                poisoned = zero_unless_finite(dk0, dk1, K1, ACC) + zero_unless_finite(dv0, dv1, V1, ACC)
                if WITH_DQ:  # a key that no query sees leaves no trace in its own gradients
                    poisoned += zero_unless_finite(k0, k1, K1, ACC)
            dk0 *= scale
            dk1 *= scale
            # One piece is the whole sum; several leave theirs for `_reduce_kernel`, each in a place of its own.
            if siblings == 1:
                rows = (batch * num_keys + keys) * HEADS + head
                store_chunks(dk, rows * DK, real, dk0, dk1, DK, K0, K1)
                store_chunks(dv, rows * DV, real, dv0, dv1, DV, V0, V1)
            else:
                rows = partial_place * BLOCK_SIZE + within
                store_chunks(partial_dk, rows * DK, real, dk0, dk1, DK, K0, K1)
                store_chunks(partial_dv, rows * DV, real, dv0, dv1, DV, V0, V1)
        if not CLEAN:
            tl.store(again, (poisoned != 0).to(again.dtype.element_ty))


@recordable(do_not_specialize=_LENGTHS)
def _merge_dq_kernel(
    partial_dq, indices, dq, query_table, index_strides, num_queries, shift, first_head, HEADS,
    NUM_SELECTED: tl.constexpr, G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr, DK: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, ACC: tl.constexpr,
    PACKED: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """The sum of each row's summands of `dq`, in the order of its slots, added to what is there with ADD."""
    batch, head, query, of_group, position, inside = _find_rows(
        query_table, num_queries, shift, first_head, HEADS, G, BLOCK_M, PACKED
    )
    PARTS: tl.constexpr = BLOCK_SIZE // BLOCK_N
    indices += batch * index_strides[0] + head * index_strides[2]
    place = ((tl.program_id(1) * num_queries + query) * NUM_SELECTED * PARTS) * G + of_group
    dq0 = tl.zeros([BLOCK_M, K0], dtype=ACC)
    dq1 = tl.zeros([BLOCK_M, K1 if K1 > 0 else 16], dtype=ACC)
    for step in tl.range(0, NUM_SELECTED * PARTS, loop_unroll_factor=UNROLLED):
        block = tl.load(
            indices + query * index_strides[1] + tl.cast(step // PARTS, tl.int64) * index_strides[3], inside, other=-1
        )
        valid = sees_block(block, position, BLOCK_SIZE)
        part0, part1 = load_chunks(partial_dq, (place + step * G) * DK, valid, DK, K0, K1)
        dq0 += part0.to(ACC)
        if K1 > 0:
            dq1 += part1.to(ACC)
    rows = ((batch * num_queries + query) * HEADS + head) * G + of_group
    store_chunks(dq, rows * DK, inside, dq0, dq1, DK, K0, K1, ADD)


@recordable(do_not_specialize=_LENGTHS)
def _reduce_kernel(
    partial_dk, partial_dv, pieces, partials, dk, dv, cu_keys, num_sequences, num_keys, num_blocks,
    partials_per_head, HEADS, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, DK: tl.constexpr, K0: tl.constexpr,
    K1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, ACC: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """`dk` and `dv` of the lists that have several pieces: their partial sums added up, first to last."""
    block = tl.program_id(0) % num_blocks
    batch_head = (tl.program_id(0) // num_blocks).to(tl.int64)
    pieces += batch_head * (num_blocks + 1) + block
    count = tl.load(pieces + 1) - tl.load(pieces)
    if count > 1:
        place = batch_head * partials_per_head + tl.load(partials + batch_head * (num_blocks + 1) + block)
        start, _, length = find_block(cu_keys, num_sequences, block, num_keys, BLOCK_SIZE, PACKED)
        within = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        real = within < length
        dk0 = tl.zeros([BLOCK_N, K0], dtype=ACC)
        dk1 = tl.zeros([BLOCK_N, K1 if K1 > 0 else 16], dtype=ACC)
        dv0 = tl.zeros([BLOCK_N, V0], dtype=ACC)
        dv1 = tl.zeros([BLOCK_N, V1 if V1 > 0 else 16], dtype=ACC)
        for piece in range(0, count):
            rows = (place + piece) * BLOCK_SIZE + within
            part0, part1 = load_chunks(partial_dk, rows * DK, real, DK, K0, K1)
            dk0 += part0
            if K1 > 0:
                dk1 += part1
            part0, part1 = load_chunks(partial_dv, rows * DV, real, DV, V0, V1)
            dv0 += part0
            if V1 > 0:
                dv1 += part1
        rows = (batch_head // HEADS * num_keys + start + within) * HEADS + batch_head % HEADS
        store_chunks(dk, rows * DK, real, dk0, dk1, DK, K0, K1)
        store_chunks(dv, rows * DV, real, dv0, dv1, DV, V0, V1)


# Launchers. `constants` are those of `nsa.kernels.selected_attention`.

_ROWS_ELEMENTS = 512
"""Elements of the rows that a program merges, which is one warp: sums of so few do not run out of registers."""


def _merged_rows(width: int) -> dict[str, int]:
    """Rows of `width` columns that a program merges, and its warps."""
    return {"BLOCK_M": max(1, _ROWS_ELEMENTS // next_power_of_2(width)), "num_warps": 1}


def shortened(config: KeyMajorConfig, pairs: int, pieces: int, least: int, device: torch.device) -> KeyMajorConfig:
    """`config`, with a CHUNK for about so many pieces a multiprocessor if that is less, but not below `least`.

    The first block is selected by every query. The last pieces of its list run while all else is done, unless they are
    short beside all that one multiprocessor has to do.
    """
    share = max(1, pairs // (multiprocessors(device) * pieces))
    return _with_chunk(config, min(config.CHUNK, max(least, 1 << round(math.log2(share)))))


@plan
def _with_chunk(config: KeyMajorConfig, chunk: int) -> KeyMajorConfig:
    return replace(config, CHUNK=chunk)


def _without(constants: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in constants.items() if name not in names}


def forward(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, out: Tensor, lse: Tensor, packing: Packing,
    constants: dict[str, Any], config: KeyMajorConfig, scale: float,
) -> None:  # fmt: skip
    """Writes `out` and `lse`."""
    batch, num_queries, heads, num_selected = indices.shape
    num_keys, group, strides = k.shape[1], constants["G"], tuple(x.stride()[:3] for x in (q, k, v))
    shift, parts = num_keys - num_queries, constants["BLOCK_SIZE"] // constants["BLOCK_N"]
    config = shortened(config, indices.numel(), 16, 128, q.device)
    index = build_block_index(indices, shift, packing, constants["BLOCK_SIZE"], config.CHUNK)
    rows = num_queries * num_selected * parts * group
    runs = head_runs(batch * heads, rows * v.shape[3] * q.element_size())
    partial, partial_lse2 = q.new_empty(runs[0][1], rows, v.shape[3]), lse.new_empty(runs[0][1], rows)
    merged = _merged_rows(constants["V0"] + constants["V1"])
    for first, count in runs:
        _forward_kernel[(count * index.pieces_per_head, parts)](
            q, k, v, index.members, index.offsets, index.pieces, partial, partial_lse2, packing.query_table,
            packing.cu_keys, packing.num_sequences, *strides, num_queries, num_keys, shift, packing.num_blocks,
            index.pieces_per_head, first, logit_factor(scale), heads, NEGATIVE=scale < 0, **constants,
            **config.options,
        )  # fmt: skip
        _merge_kernel[(cdiv(num_queries * group, merged["BLOCK_M"]), count)](
            partial, partial_lse2, indices, out, lse, packing.query_table, indices.stride(), num_queries, shift,
            first, heads, STEPS=next_power_of_2(num_selected * parts), **merged,
            **_without(constants, "DK", "K0", "K1", "PRECISION"),
        )  # fmt: skip


def bwd_dkdv(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, indices: Tensor, rows: BackwardRows, dk: Tensor, dv: Tensor,
    dq: Tensor | None, packing: Packing, constants: dict[str, Any], config: KeyMajorConfig, scale: float,
    weighted: bool, add: bool,
) -> None:  # fmt: skip
    """Writes `dk` and `dv`, and, if `dq` is given, writes it or adds to it."""
    batch, num_queries, heads, num_selected = indices.shape
    num_keys, group, strides = k.shape[1], constants["G"], tuple(x.stride()[:3] for x in (q, k, v, dout))
    shift, parts = num_keys - num_queries, constants["BLOCK_SIZE"] // constants["BLOCK_N"]
    # Not much shorter: the memory of partial sums grows with the number of pieces.
    config = shortened(config, indices.numel(), 8, config.CHUNK // 2, q.device)
    index = build_block_index(indices, shift, packing, constants["BLOCK_SIZE"], config.CHUNK)
    partial_dk, partial_dv = (
        rows.delta.new_empty(batch * heads * index.partials_per_head, constants["BLOCK_SIZE"], x.shape[3])
        for x in (k, v)
    )
    summands = 0 if dq is None else num_queries * num_selected * parts * group
    runs = head_runs(batch * heads, summands * k.shape[3] * q.element_size())
    partial_dq = q.new_empty(runs[0][1], summands, k.shape[3])
    merged = _merged_rows(constants["K0"] + constants["K1"])
    again = indices.new_empty(runs[0][1] * index.pieces_per_head * parts, dtype=torch.int8)
    on_hopper = dq is None and available(q.device) and selected_dkdv.applies(constants, q, k, v, dout)
    for first, count in runs:
        if on_hopper:
            selected_dkdv.write_dkdv(
                dout, q, k, v, rows, index, dk, dv, partial_dk, partial_dv, again, first, count, packing.num_blocks,
                num_selected, config.CHUNK, scale, weighted,
            )  # fmt: skip
        for clean in (True,) if on_hopper else (False, True):
            _bwd_dkdv_kernel[(count * index.pieces_per_head, parts)](
                q, k, v, dout, rows.lse2, rows.delta, index.members, index.offsets, index.pieces, index.partials, dk,
                dv, partial_dk, partial_dv, partial_dq, again, packing.query_table, packing.cu_keys,
                packing.num_sequences, *strides, num_queries, num_keys, shift, packing.num_blocks,
                index.pieces_per_head, index.partials_per_head, first, scale, logit_factor(scale), heads,
                WITH_DQ=dq is not None, WEIGHTED=weighted, CLEAN=clean, NEGATIVE=scale < 0, **constants,
                **config.options,
            )  # fmt: skip
        if dq is not None:
            _merge_dq_kernel[(cdiv(num_queries * group, merged["BLOCK_M"]), count)](
                partial_dq, indices, dq, packing.query_table, indices.stride(), num_queries, shift, first, heads,
                ADD=add, **merged, **_without(constants, "DV", "V0", "V1", "PRECISION"),
            )  # fmt: skip
    _reduce_kernel[(batch * heads * packing.num_blocks, parts)](
        partial_dk, partial_dv, index.pieces, index.partials, dk, dv, packing.cu_keys, packing.num_sequences, num_keys,
        packing.num_blocks, index.partials_per_head, heads, **_without(constants, "NUM_SELECTED", "G", "PRECISION"),
        num_warps=8,
    )  # fmt: skip
