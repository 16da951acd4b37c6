"""Attention to selected blocks, query-major: the forward and the gradient of the queries.

A program has one query and one KV head, which is `G` rows, and walks over the blocks of the query, `BLOCK_N` keys a
step. For each pair of query and block `l' (Dk + Dv)` elements are read, whatever `G`. With logits in base 2,
`s = scale log2(e) q.k`, a step updates for each row the maximum, the sum and the output (online softmax):

    row_max' = max(row_max, max s),    p = 2^(s - row_max'),    r = 2^(row_max - row_max')
    row_sum' = r row_sum + sum p,      acc' = r acc + p v

At the end `out = acc / row_sum` and `lse = ln 2 (row_max + log2 row_sum)`. The backward needs no maxima, as `lse` is
known: with `p = 2^(s - lse / ln 2)` and `delta = dout.out`,

    dq = scale sum p (dout.v - delta) k.

Keys that a query does not see are loaded as 0 by pointers, but as they are by tensor descriptors. Where a result is
not finite, the program works once more with pointers (CLEAN), for a weight of 0 times NaN is NaN.
"""

from itertools import chain
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from nsa.kernels.block_index import Packing, sees_block
from nsa.kernels.configs import QueryMajorConfig
from nsa.kernels.launches import recordable
from nsa.kernels.primitives import (
    LN2,
    LOG2E,
    add_dot,
    describable,
    descriptors,
    dot_chunks,
    fetch,
    load_chunks,
    next_power_of_2,
    online_softmax_update,
    program_of,
    store_chunks,
    zero_unless_finite,
)

# Sizes that change from call to call and are no reason to compile again.
_LENGTHS = ("num_queries", "shift")


@triton.jit
def _find_query(program, query_table, num_queries, shift, HEADS, PACKED: tl.constexpr):
    """A program's batch, KV head and query, the query's position and the first key of its sequence.

    Neighbouring programs have neighbouring queries of one head, whose blocks are often the same and in the cache.
    """
    query = program % num_queries
    head = program // num_queries % HEADS
    batch = program // num_queries // HEADS
    if PACKED:
        position = tl.load(query_table + 3 * query)
        first_key = tl.load(query_table + 3 * query + 1)
    else:
        position = query + shift
        first_key = query * 0
    return batch, head, query, position, first_key


@triton.jit
def _num_steps(
    indices, position, stride, NUM_SELECTED: tl.constexpr, SLOTS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Steps to the end of the last block that the query sees; `SLOTS` is `NUM_SELECTED` as a power of two."""
    slot = tl.arange(0, SLOTS)
    block = tl.load(indices + slot.to(tl.int64) * stride, mask=slot < NUM_SELECTED, other=-1)
    return tl.max(tl.where(sees_block(block, position, BLOCK_SIZE), slot + 1, 0), 0) * (BLOCK_SIZE // BLOCK_N)


@triton.jit
def _find_keys(block, step, position, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Position of the first key of one step, and which of its keys `[BLOCK_N]` the query sees, if it sees the block."""
    valid = sees_block(block, position, BLOCK_SIZE)
    first = tl.where(valid, block, 0) * BLOCK_SIZE + step % (BLOCK_SIZE // BLOCK_N) * BLOCK_N
    return first, valid & (first + tl.arange(0, BLOCK_N) <= position)


@triton.jit
def fetch_keys(
    tiles0, tiles1, base, batch, head, row, stride, seen,
    DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Rows `row` to `row + BLOCK_N` of the keys or values of one head, in two chunks."""
    offsets = tl.arange(0, BLOCK_N).to(tl.int64) * stride
    return fetch(tiles0, tiles1, base, offsets, seen, batch, head, row, stride, DIM, D0, D1, BLOCK_N, True, TMA)


@recordable(do_not_specialize=_LENGTHS)
def _forward_kernel(
    q, k, v, k_tiles0, k_tiles1, v_tiles0, v_tiles1, indices, out, lse, query_table, q_strides, k_strides, v_strides,
    index_strides, num_queries, shift, scale, HEADS, NUM_SELECTED: tl.constexpr, SLOTS: tl.constexpr, G: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, DK: tl.constexpr, K0: tl.constexpr,
    K1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, PACKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    poisoned = 1.0
    for CLEAN in tl.static_range(2 if TMA else 1):
        if poisoned != 0:
            program = program_of(poisoned, CLEAN)
            batch, head, query, position, first_key = _find_query(
                program, query_table, num_queries, shift, HEADS, PACKED
            )
            batch64, head64, query64 = batch.to(tl.int64), head.to(tl.int64), query.to(tl.int64)
            q_head = q + batch64 * q_strides[0] + query64 * q_strides[1] + head64 * G * q_strides[2]
            k_head = k + batch64 * k_strides[0] + head64 * k_strides[2]
            v_head = v + batch64 * v_strides[0] + head64 * v_strides[2]
            indices_head = indices + batch64 * index_strides[0] + query64 * index_strides[1] + head64 * index_strides[2]
            steps = _num_steps(indices_head, position, index_strides[3], NUM_SELECTED, SLOTS, BLOCK_SIZE, BLOCK_N)
            row = tl.arange(0, BLOCK_M)
            inside = row < G
            q0, q1 = load_chunks(q_head, row.to(tl.int64) * q_strides[2], inside, DK, K0, K1)

            row_max = tl.full([BLOCK_M], float("-inf"), dtype=ACC)
            # Summed over keys after the loop: a sum across threads at every step costs more than the registers.
            p_sum = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
            out0 = tl.zeros([BLOCK_M, V0], dtype=ACC)
            out1 = tl.zeros([BLOCK_M, V1 if V1 > 0 else 16], dtype=ACC)
            block = tl.load(indices_head)
            for step in range(0, steps):
                first, seen = _find_keys(block, step, position, BLOCK_SIZE, BLOCK_N)
                # Loaded a step ahead, so that the next block's address is known when it is needed.
                slot = tl.minimum(step + 1, steps - 1) // (BLOCK_SIZE // BLOCK_N)
                block = tl.load(indices_head + slot.to(tl.int64) * index_strides[3])
                key = first_key + first
                k0, k1 = fetch_keys(
                    k_tiles0, k_tiles1, k_head, batch, head, key, k_strides[1], seen, DK, K0, K1, BLOCK_N,
                    TMA and not CLEAN,
                )  # fmt: skip
                # Loaded before the products of keys, as a warp has nothing else to do while it waits for them.
                v0, v1 = fetch_keys(
                    v_tiles0, v_tiles1, v_head, batch, head, key, v_strides[1], seen, DV, V0, V1, BLOCK_N,
                    TMA and not CLEAN,
                )  # fmt: skip
                s = dot_chunks(q0, q1, k0, k1, K1, ACC, PRECISION)
                s = tl.where(seen[None, :], s * (scale * LOG2E), float("-inf"))
                p, rescale, row_max = online_softmax_update(s, row_max, 1.0, True)
                p_sum = p_sum * rescale[:, None] + p
                out0 *= rescale[:, None]
                if V1 > 0:
                    out1 *= rescale[:, None]
                out0, out1 = add_dot(p.to(v0.dtype), v0, v1, out0, out1, V1, ACC, PRECISION)

            row_sum = tl.sum(p_sum, 1)
            empty = row_sum == 0
            row_sum = tl.where(empty, 1.0, row_sum)
            rows = ((batch64 * num_queries + query) * HEADS + head) * G + row
            tl.store(lse + rows, tl.where(empty, float("-inf"), (row_max + tl.log2(row_sum)) * LN2), mask=inside)
            store_chunks(out, rows * DV, inside, out0 / row_sum[:, None], out1 / row_sum[:, None], DV, V0, V1)
            if TMA and not CLEAN:
                poisoned = zero_unless_finite(out0, out1, V1, ACC)


@recordable(do_not_specialize=_LENGTHS)
def _bwd_dq_kernel(
    q, k, v, k_tiles0, k_tiles1, v_tiles0, v_tiles1, dout, lse, delta, gate, indices, dq, query_table, q_strides,
    k_strides, v_strides, do_strides, index_strides, num_queries, shift, scale, HEADS, NUM_SELECTED: tl.constexpr,
    SLOTS: tl.constexpr, G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
    DK: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr, TMA: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """`dq` times the gate, added to what is there with ADD."""
    poisoned = 1.0
    for CLEAN in tl.static_range(2 if TMA else 1):
        if poisoned != 0:
            program = program_of(poisoned, CLEAN)
            batch, head, query, position, first_key = _find_query(
                program, query_table, num_queries, shift, HEADS, PACKED
            )
            batch64, head64, query64 = batch.to(tl.int64), head.to(tl.int64), query.to(tl.int64)
            q_head = q + batch64 * q_strides[0] + query64 * q_strides[1] + head64 * G * q_strides[2]
            k_head = k + batch64 * k_strides[0] + head64 * k_strides[2]
            v_head = v + batch64 * v_strides[0] + head64 * v_strides[2]
            dout_head = dout + batch64 * do_strides[0] + query64 * do_strides[1] + head64 * G * do_strides[2]
            indices_head = indices + batch64 * index_strides[0] + query64 * index_strides[1] + head64 * index_strides[2]
            steps = _num_steps(indices_head, position, index_strides[3], NUM_SELECTED, SLOTS, BLOCK_SIZE, BLOCK_N)
            row = tl.arange(0, BLOCK_M)
            inside = row < G
            rows = ((batch64 * num_queries + query) * HEADS + head) * G + row
            q0, q1 = load_chunks(q_head, row.to(tl.int64) * q_strides[2], inside, DK, K0, K1)
            do0, do1 = load_chunks(dout_head, row.to(tl.int64) * do_strides[2], inside, DV, V0, V1)
            row_delta = tl.load(delta + rows, mask=inside, other=0.0)
            row_lse2 = tl.load(lse + rows, mask=inside, other=0.0) * LOG2E
            row_lse2 = tl.where(row_lse2 == float("-inf"), 0.0, row_lse2)

            dq0 = tl.zeros([BLOCK_M, K0], dtype=ACC)
            dq1 = tl.zeros([BLOCK_M, K1 if K1 > 0 else 16], dtype=ACC)
            block = tl.load(indices_head)
            for step in range(0, steps):
                first, seen = _find_keys(block, step, position, BLOCK_SIZE, BLOCK_N)
                slot = tl.minimum(step + 1, steps - 1) // (BLOCK_SIZE // BLOCK_N)
                block = tl.load(indices_head + slot.to(tl.int64) * index_strides[3])
                key = first_key + first
                k0, k1 = fetch_keys(
                    k_tiles0, k_tiles1, k_head, batch, head, key, k_strides[1], seen, DK, K0, K1, BLOCK_N,
                    TMA and not CLEAN,
                )  # fmt: skip
                v0, v1 = fetch_keys(
                    v_tiles0, v_tiles1, v_head, batch, head, key, v_strides[1], seen, DV, V0, V1, BLOCK_N,
                    TMA and not CLEAN,
                )  # fmt: skip
                s = dot_chunks(q0, q1, k0, k1, K1, ACC, PRECISION)
                dp = dot_chunks(do0, do1, v0, v1, V1, ACC, PRECISION)
                s = tl.where(seen[None, :], s * (scale * LOG2E), float("-inf"))
                ds = (tl.exp2(s - row_lse2[:, None]) * (dp - row_delta[:, None])).to(k0.dtype)
                dq0, dq1 = add_dot(ds, k0, k1, dq0, dq1, K1, ACC, PRECISION)
            stored = inside
            if TMA and not CLEAN:
                poisoned = zero_unless_finite(dq0, dq1, K1, ACC)
                stored = tl.where(inside, poisoned, 1.0) == 0  # what is added cannot be taken back
            factor = tl.full([BLOCK_M], 1.0, ACC) * scale
            if gate is not None:
                factor *= tl.load(gate + 3 * rows, mask=inside, other=0.0).to(ACC)
            store_chunks(dq, rows * DK, stored, dq0 * factor[:, None], dq1 * factor[:, None], DK, K0, K1, ADD)


# Launchers. `constants` are those of `nsa.kernels.selected_attention`.


def _options(
    constants: dict[str, Any], config: QueryMajorConfig, packing: Packing, k: Tensor, v: Tensor
) -> dict[str, Any]:
    """What both kernels are compiled for."""
    return {
        **constants,
        **config.options,
        "BLOCK_M": max(16, next_power_of_2(constants["G"])),  # rows of a product, which has at least 16
        "SLOTS": next_power_of_2(constants["NUM_SELECTED"]),
        "BLOCK_N": min(constants["BLOCK_SIZE"], config.BLOCK_N),
        # A descriptor knows no sequences: what it reads beyond one's end may be anything, NaN included.
        "TMA": config.TMA and packing.query_table is None and describable(k, v),
    }


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    out: Tensor,
    lse: Tensor,
    packing: Packing,
    constants: dict[str, Any],
    config: QueryMajorConfig,
    scale: float,
) -> None:
    """Writes `out` and `lse`."""
    batch, num_queries, heads, _ = indices.shape
    strides, options = (x.stride()[:3] for x in (q, k, v)), _options(constants, config, packing, k, v)
    tiles = (descriptors(x, options["BLOCK_N"], options["TMA"]) for x in (k, v))
    _forward_kernel[(num_queries * heads * batch,)](
        q, k, v, *chain(*tiles), indices, out, lse, packing.query_table, *strides, indices.stride(), num_queries,
        k.shape[1] - num_queries, scale, heads, **options,
    )  # fmt: skip


def bwd_dq(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    lse: Tensor,
    delta: Tensor,
    gate: Tensor | None,
    dq: Tensor,
    packing: Packing,
    constants: dict[str, Any],
    config: QueryMajorConfig,
    scale: float,
    add: bool,
) -> None:
    """Writes `dq`, or adds to it."""
    batch, num_queries, heads, _ = indices.shape
    strides, options = (x.stride()[:3] for x in (q, k, v, dout)), _options(constants, config, packing, k, v)
    tiles = (descriptors(x, options["BLOCK_N"], options["TMA"]) for x in (k, v))
    _bwd_dq_kernel[(num_queries * heads * batch,)](
        q, k, v, *chain(*tiles), dout, lse, delta, gate, indices, dq, packing.query_table, *strides, indices.stride(),
        num_queries, k.shape[1] - num_queries, scale, heads, ADD=add, **options,
    )  # fmt: skip
