"""Compressed and window branch: attention of each query to one contiguous run of keys.

Both are one algorithm. Key `j` of a sequence stands at position `e(j) = j STRIDE + LAST`, and a query at position `t`
sees it iff `0 <= t - e(j)`, in the window branch also `t - e(j) < w`:

- compressed (paper, section 3.3.1): key `j` is a block that ends at token `j d + l - 1`: `STRIDE = d`, `LAST = l - 1`;
- window (section 3.3.3): key `j` is token `j`: `STRIDE = 1`, `LAST = 0`.

Hence a query sees the keys from `max(0, t - w + 1)` (or 0) to `n(t) = max(0, t - LAST + STRIDE) // STRIDE`, exclusive.

Forward, with logits in base 2, `x = scale log2(e) q.k`, so that exponentials are the hardware's: a tile of query rows
walks over its keys, keeping for every row the maximum `m`, the sum `z = sum 2^(x - m)` and `acc = sum 2^(x - m) v`;
then `out = acc / z` and `lse = ln 2 (m + log2 z)`. A row that sees nothing has `z = 0`: output 0, `lse = -inf`.

Backward, with `p = 2^(x - lse / ln 2)`, `delta = dout.out` and `ds = p (dout.v - delta)`:

    dq = scale sum_j ds k,    dk = scale sum_t ds q,    dv = sum_t p dout.

One kernel walks over the keys of a tile of queries for `dq`, and makes `delta`; another walks over the queries of a
tile of keys for `dk` and `dv`, all query heads of the KV head among them, so that no sum crosses programs and results
are the same bits every time. The latter works on transposed matrices, keys as rows: `p` and `ds` then are operands that
a matrix unit takes from registers. Where key tiles are too few to fill the device (long sequences have few compressed
keys), the queries of a tile are shared out among several programs, which write partial sums to be added afterwards.
Rows that see nothing get `lse = +inf` there, which makes `p = 0` without a special case.

What a query does not see has no part in its results, whatever it holds: a masked weight of 0 is not enough, for 0
times NaN is NaN. Kernels look at their sums once, at the end. Where one is not finite they do the same again with care
(CLEAN): they take rows that are not finite out of products with masks, and count them as NaN for those who see them.

In the forward and the `dq` kernel a row is a (token, head) pair, token-major: the `G` query heads of a KV head stand
together, whatever `G`. A tile then spans few tokens and its rows see nearly the same keys. Everywhere, tiles that need
no mask are taken first, by a loop of their own.
"""

from functools import partial
from typing import Any, NamedTuple, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.config import NSAConfig
from nsa.kernels.common import (
    LN2,
    LOG2E,
    accumulator,
    block_offsets,
    describable,
    descriptors,
    dot,
    dot_precision,
    fetch,
    find_program,
    find_tile,
    load_rows,
    not_finite,
    probability,
    rows_contiguous,
    store_rows,
    tile_table,
    weigh,
    without,
    zero_unless_finite,
)
from nsa.kernels.tuning import chunks, launch
from nsa.ops import accumulation_dtype, branch_operator, sizes_of

_FEW = tl.constexpr(16)
"""Rows of a tile that is gone through with care, at a time."""

# Lengths and what follows from them change with every batch; kernels compiled for a length divisible by 16 would gain
# nothing by it.
_LENGTHS = ["num_queries", "num_tokens", "num_keys", "window", "num_tiles", "shares", "lse_stride"]


@triton.jit
def _num_seen(position, STRIDE: tl.constexpr, LAST: tl.constexpr):
    """How many keys, from the first, a query at `position` has behind it."""
    return tl.maximum(position - LAST + STRIDE, 0) // STRIDE


@triton.jit
def _tiles_of(first, full_first, full_stop, stop, BLOCK: tl.constexpr, SPLIT: tl.constexpr):
    """The range `[first, stop)` in tiles: how many, and `[a, b)`, those that lie inside `[full_first, full_stop)`."""
    count = tl.cdiv(tl.maximum(stop - first, 0), BLOCK)
    if SPLIT:
        a = tl.minimum(tl.cdiv(tl.maximum(full_first - first, 0), BLOCK), count)
        b = tl.maximum(a, tl.minimum(tl.maximum(full_stop - first, 0) // BLOCK, count))
    else:
        a = count
        b = count
    return count, a, b


@triton.jit
def _keys_of(
    first_position, last_position, num_keys, window,
    STRIDE: tl.constexpr, LAST: tl.constexpr, WINDOWED: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The keys that queries at these positions see: first, stop, and the tiles of that range as `_tiles_of` has it."""
    stop = tl.minimum(_num_seen(last_position, STRIDE, LAST), num_keys)
    full_stop = tl.minimum(_num_seen(first_position, STRIDE, LAST), num_keys)
    if WINDOWED:
        first = tl.maximum(first_position - window + 1, 0)
        full_first = tl.maximum(last_position - window + 1, 0)
    else:
        first = stop * 0
        full_first = first
    count, a, b = _tiles_of(first, full_first, full_stop, stop, BLOCK, SPLIT)
    return first, stop, count, a, b


@triton.jit
def _part(i, a, b, MASKED: tl.constexpr):
    """The tile that is number `i` of those without masks, `[a, b)`, or of the others."""
    if MASKED:
        return i + tl.where(i < a, 0, b - a)
    else:
        return a + i


@triton.jit
def _logits(a0, a1, b0, b1, K1: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """`a b^T` where both have their columns in one or two chunks."""
    product = dot(a0, tl.trans(b0), None, ACC, PRECISION)
    if K1:
        product = dot(a1, tl.trans(b1), product, ACC, PRECISION)
    return product


@triton.jit
def _attend(
    first, q, k, v, k_tiles0, k_tiles1, v_tiles0, v_tiles1, out, lse, q_strides, k_strides, v_strides, out_strides,
    batch, head, query_start, num_queries, shift, key_first, key_start, key_stop, count, a, b, window, HEADS,
    scale_log2, STRIDE: tl.constexpr, LAST: tl.constexpr, WINDOWED: tl.constexpr, G: tl.constexpr, DK: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr, SPLIT: tl.constexpr,
    CLEAN: tl.constexpr,
):  # fmt: skip
    """Attention of `ROWS` rows from `first` on to `count` tiles of keys; returns 0 if all of their sums are finite."""
    rows = first + tl.arange(0, ROWS)
    inside = rows < num_queries * G
    position = rows // G + shift
    token = (query_start + rows // G).to(tl.int64)
    query_head = (head * G + rows % G).to(tl.int64)
    num_seen = _num_seen(position, STRIDE, LAST)
    first_seen = position - window + 1
    q_offsets = token * q_strides[1] + query_head * q_strides[2]
    q0 = load_rows(q, q_offsets, inside, 0, K0, DK, True)
    q1 = q0
    if K1:
        q1 = load_rows(q, q_offsets, inside, K0, K1, DK, True)
    k_offsets = tl.arange(0, BLOCK_N).to(tl.int64) * k_strides[1]
    v_offsets = tl.arange(0, BLOCK_N).to(tl.int64) * v_strides[1]
    acc0 = tl.zeros([ROWS, V0], ACC)
    acc1 = tl.zeros([ROWS, V1 if V1 else 16], ACC)
    m = tl.full([ROWS], float("-inf"), ACC)
    z = tl.zeros([ROWS], ACC)
    for MASKED in tl.static_range(0 if SPLIT and not CLEAN else 1, 2):
        for i in range(0, count if CLEAN else count - (b - a) if MASKED else b - a):
            start = key_first + (i if CLEAN else _part(i, a, b, MASKED)) * BLOCK_N
            keys = start + tl.arange(0, BLOCK_N)
            held = keys < key_stop
            row = key_start + start
            k0, k1 = fetch(
                k_tiles0, k_tiles1, k, k_offsets, held, batch, head, row, k_strides[1], DK, K0, K1, BLOCK_N,
                MASKED, TMA and not CLEAN,
            )  # fmt: skip
            x = _logits(q0, q1, k0, k1, K1, ACC, PRECISION)
            if MASKED:
                visible = keys[None, :] < num_seen[:, None]
                if WINDOWED:
                    visible = visible & (keys[None, :] >= first_seen[:, None])
                # Scaled before it is masked: a scale of 0 must not meet an infinity.
                x = tl.where(visible, x * scale_log2, float("-inf"))
                peak = tl.maximum(m, tl.max(x, 1))
                # A row may have seen nothing yet; -inf less -inf is no number.
                anchor = tl.where(peak == float("-inf"), 0.0, peak)
                p = tl.exp2(x - anchor[:, None])
            else:
                peak = tl.maximum(m, tl.max(x, 1) * scale_log2)
                anchor = peak
                p = tl.exp2(x * scale_log2 - anchor[:, None])
            rescale = tl.exp2(m - anchor)
            m = peak
            z = z * rescale + tl.sum(p, 1)
            v0, v1 = fetch(
                v_tiles0, v_tiles1, v, v_offsets, held, batch, head, row, v_strides[1], DV, V0, V1, BLOCK_N,
                MASKED, TMA and not CLEAN,
            )  # fmt: skip
            if CLEAN:
                bad = not_finite(v0, v1, V1, ACC)
                v0, v1 = without(v0, v1, bad, V1)
                p = tl.where(visible & bad[None, :], float("nan"), p)
            p = p.to(v0.dtype)
            acc0 = dot(p, v0, acc0 * rescale[:, None], ACC, PRECISION)
            if V1:
                acc1 = dot(p, v1, acc1 * rescale[:, None], ACC, PRECISION)

    blind = z == 0
    z = tl.where(blind, 1.0, z)
    out_offsets = token * out_strides[1] + query_head * out_strides[2]
    store_rows(out, out_offsets, inside, acc0 / z[:, None], 0, V0, DV)
    if V1:
        store_rows(out, out_offsets, inside, acc1 / z[:, None], V0, V1, DV)
    of_row = token * (HEADS * G) + query_head
    tl.store(lse + of_row, tl.where(blind, float("-inf"), (m + tl.log2(z)) * LN2), mask=inside)
    return zero_unless_finite(acc0, acc1, V1, ACC)


@triton.jit(do_not_specialize=_LENGTHS)
def _forward_kernel(
    q, k, v, k_tiles0, k_tiles1, v_tiles0, v_tiles1, out, lse, q_strides, k_strides, v_strides, out_strides,
    lse_stride, tiles, cu_queries, cu_tokens, cu_keys, num_queries, num_tokens, num_keys, window, num_tiles, HEADS,
    scale_log2, STRIDE: tl.constexpr, LAST: tl.constexpr, WINDOWED: tl.constexpr, G: tl.constexpr, DK: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, PACKED: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    tile, head, batch = find_program(num_tiles, HEADS)
    # The last tiles see the most keys and are taken first: what is left for the end of a launch is light.
    first, query_start, num_queries, num_tokens, key_start, num_keys = find_tile(
        tiles, cu_queries, cu_tokens, cu_keys, num_queries, num_tokens, num_keys, num_tiles - 1 - tile, BLOCK_M, PACKED
    )
    shift = num_tokens - num_queries
    batch64 = tl.cast(batch, tl.int64)
    head64 = tl.cast(head, tl.int64)
    q += batch64 * q_strides[0]
    k += batch64 * k_strides[0] + head64 * k_strides[2]
    v += batch64 * v_strides[0] + head64 * v_strides[2]
    out += batch64 * out_strides[0]
    lse += batch64 * lse_stride
    key_first, key_stop, count, a, b = _keys_of(
        first // G + shift, (tl.minimum(first + BLOCK_M, num_queries * G) - 1) // G + shift, num_keys, window, STRIDE,
        LAST, WINDOWED, BLOCK_N, SPLIT,
    )  # fmt: skip
    spoiled = _attend(
        first, q, k, v, k_tiles0, k_tiles1, v_tiles0, v_tiles1, out, lse, q_strides, k_strides, v_strides, out_strides,
        batch, head, query_start, num_queries, shift, key_first, key_start, key_stop, count, a, b, window, HEADS,
        scale_log2, STRIDE, LAST, WINDOWED, G, DK, K0, K1, DV, V0, V1, ACC, PRECISION, BLOCK_M, BLOCK_N, TMA, SPLIT,
        False,
    )  # fmt: skip
    if spoiled != 0:
        # With care, a few rows at a time: whatever has the same shape as before would take registers all along.
        for few in range(0, BLOCK_M, _FEW):
            _attend(
                first + few, q, k, v, None, None, None, None, out, lse, q_strides, k_strides, v_strides, out_strides,
                batch, head, query_start, num_queries, shift, key_first, key_start, key_stop, count, a, b, window,
                HEADS, scale_log2, STRIDE, LAST, WINDOWED, G, DK, K0, K1, DV, V0, V1, ACC, PRECISION, _FEW, BLOCK_N,
                False, False, True,
            )  # fmt: skip


@triton.jit(do_not_specialize=_LENGTHS)
def _queries_kernel(
    q, k, v, k_tiles0, k_tiles1, v_tiles0, v_tiles1, out, dout, gate, lse, lse2_out, delta_out, dgate, dq,
    q_strides, k_strides, v_strides, out_strides, dout_strides, lse_stride, row_strides, dq_strides, tiles,
    cu_queries, cu_tokens, cu_keys, num_queries, num_tokens, num_keys, window, num_tiles, HEADS, scale, scale_log2,
    STRIDE: tl.constexpr, LAST: tl.constexpr, WINDOWED: tl.constexpr, G: tl.constexpr, DK: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, PACKED: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr,
    SPLIT: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """`dq`, added to what is there with ADD, the gate's gradient, which is `delta`, and for the other kernel `delta`
    and the log-sum-exp in base 2, weighted by the gate, both head-major."""
    tile, head, batch = find_program(num_tiles, HEADS)
    first, query_start, num_queries, num_tokens, key_start, num_keys = find_tile(
        tiles, cu_queries, cu_tokens, cu_keys, num_queries, num_tokens, num_keys, num_tiles - 1 - tile, BLOCK_M, PACKED
    )
    shift = num_tokens - num_queries
    batch64 = tl.cast(batch, tl.int64)
    head64 = tl.cast(head, tl.int64)
    q += batch64 * q_strides[0]
    k += batch64 * k_strides[0] + head64 * k_strides[2]
    v += batch64 * v_strides[0] + head64 * v_strides[2]
    out += batch64 * out_strides[0]
    dout += batch64 * dout_strides[0]
    dq += batch64 * dq_strides[0]
    key_first, key_stop, count, a, b = _keys_of(
        first // G + shift, (tl.minimum(first + BLOCK_M, num_queries * G) - 1) // G + shift, num_keys, window, STRIDE,
        LAST, WINDOWED, BLOCK_N, SPLIT,
    )  # fmt: skip

    spoiled = 1.0
    for CLEAN in tl.static_range(2):
        if spoiled != 0:
            rows = first + tl.arange(0, BLOCK_M)
            inside = rows < num_queries * G
            position = rows // G + shift
            token = (query_start + rows // G).to(tl.int64)
            query_head = (head * G + rows % G).to(tl.int64)
            num_seen = _num_seen(position, STRIDE, LAST)
            first_seen = position - window + 1
            q_offsets = token * q_strides[1] + query_head * q_strides[2]
            q0 = load_rows(q, q_offsets, inside, 0, K0, DK, True)
            q1 = q0
            if K1:
                q1 = load_rows(q, q_offsets, inside, K0, K1, DK, True)
            out_offsets = token * out_strides[1] + query_head * out_strides[2]
            dout_offsets = token * dout_strides[1] + query_head * dout_strides[2]
            do0 = load_rows(dout, dout_offsets, inside, 0, V0, DV, True)
            delta = tl.sum(do0.to(ACC) * load_rows(out, out_offsets, inside, 0, V0, DV, True).to(ACC), 1)
            do1 = do0
            if V1:
                do1 = load_rows(dout, dout_offsets, inside, V0, V1, DV, True)
                delta += tl.sum(do1.to(ACC) * load_rows(out, out_offsets, inside, V0, V1, DV, True).to(ACC), 1)
            of_row = batch64 * lse_stride + token * (HEADS * G) + query_head
            lse2 = tl.load(lse + of_row, mask=inside, other=0.0) * LOG2E
            lse2 = tl.where(lse2 == float("-inf"), float("inf"), lse2)
            row_offsets = batch64 * row_strides[0] + query_head * row_strides[1] + token
            tl.store(delta_out + row_offsets, delta, mask=inside)
            if gate is not None:
                weight = tl.load(gate + 3 * of_row, mask=inside, other=0.0).to(ACC)
                tl.store(lse2_out + row_offsets, weigh(lse2, weight, ACC), mask=inside)
                tl.store(dgate + 3 * of_row, delta.to(dgate.dtype.element_ty), mask=inside)
            else:
                weight = tl.full([BLOCK_M], 1.0, ACC)
                tl.store(lse2_out + row_offsets, lse2, mask=inside)

            k_offsets = tl.arange(0, BLOCK_N).to(tl.int64) * k_strides[1]
            v_offsets = tl.arange(0, BLOCK_N).to(tl.int64) * v_strides[1]
            dq0 = tl.zeros([BLOCK_M, K0], ACC)
            dq1 = tl.zeros([BLOCK_M, K1 if K1 else 16], ACC)
            for MASKED in tl.static_range(0 if SPLIT else 1, 2):
                for i in range(0, count - (b - a) if MASKED else b - a):
                    start = key_first + _part(i, a, b, MASKED) * BLOCK_N
                    keys = start + tl.arange(0, BLOCK_N)
                    held = keys < key_stop
                    row = key_start + start
                    k0, k1 = fetch(
                        k_tiles0, k_tiles1, k, k_offsets, held, batch, head, row, k_strides[1], DK, K0, K1, BLOCK_N,
                        MASKED, TMA,
                    )  # fmt: skip
                    v0, v1 = fetch(
                        v_tiles0, v_tiles1, v, v_offsets, held, batch, head, row, v_strides[1], DV, V0, V1, BLOCK_N,
                        MASKED, TMA,
                    )  # fmt: skip
                    x = _logits(q0, q1, k0, k1, K1, ACC, PRECISION) * scale_log2
                    if MASKED:
                        visible = keys[None, :] < num_seen[:, None]
                        if WINDOWED:
                            visible = visible & (keys[None, :] >= first_seen[:, None])
                        x = tl.where(visible, x, float("-inf"))
                    p = tl.exp2(x - lse2[:, None])
                    ds = p * (_logits(do0, do1, v0, v1, V1, ACC, PRECISION) - delta[:, None])
                    if CLEAN and MASKED:
                        ds = tl.where(visible, ds, 0.0)
                        k0, k1 = without(k0, k1, not_finite(k0, k1, K1, ACC), K1)
                    ds = ds.to(k0.dtype)
                    dq0 = dot(ds, k0, dq0, ACC, PRECISION)
                    if K1:
                        dq1 = dot(ds, k1, dq1, ACC, PRECISION)

            stored = inside
            if not CLEAN:
                spoiled = zero_unless_finite(dq0, dq1, K1, ACC)
                stored = tl.where(inside, spoiled, 1.0) == 0  # what is added cannot be taken back
            factor = scale * weight
            dq_offsets = token * dq_strides[1] + query_head * dq_strides[2]
            store_rows(dq, dq_offsets, stored, dq0 * factor[:, None], 0, K0, DK, ADD)
            if K1:
                store_rows(dq, dq_offsets, stored, dq1 * factor[:, None], K0, K1, DK, ADD)


@triton.jit(do_not_specialize=_LENGTHS)
def _keys_kernel(
    q, k, v, q_tiles0, q_tiles1, do_tiles0, do_tiles1, dout, lse2, delta, dk, dv, q_strides, k_strides,
    v_strides, dout_strides, row_strides, dk_strides, dv_strides, tiles, cu_queries, cu_tokens, cu_keys, num_queries,
    num_tokens, num_keys, window, num_tiles, HEADS, shares, scale, scale_log2,
    STRIDE: tl.constexpr, LAST: tl.constexpr, WINDOWED: tl.constexpr, G: tl.constexpr, DK: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, PACKED: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr,
    SPLIT: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """One share of `dk` and `dv` of a tile of keys. `dk_strides` begin with that of the share."""
    tile, head, batch = find_program(num_tiles * shares, HEADS)
    share = tile % shares
    first, query_start, num_queries, num_tokens, key_start, num_keys = find_tile(
        tiles, cu_queries, cu_tokens, cu_keys, num_queries, num_tokens, num_keys, tile // shares, BLOCK_N, PACKED
    )
    shift = num_tokens - num_queries
    share64 = tl.cast(share, tl.int64)
    batch64 = tl.cast(batch, tl.int64)
    head64 = tl.cast(head, tl.int64)
    q += batch64 * q_strides[0]
    k += batch64 * k_strides[0] + head64 * k_strides[2]
    v += batch64 * v_strides[0] + head64 * v_strides[2]
    dout += batch64 * dout_strides[0]
    lse2 += batch64 * row_strides[0]
    delta += batch64 * row_strides[0]
    dk += share64 * dk_strides[0] + batch64 * dk_strides[1] + head64 * dk_strides[3]
    dv += share64 * dv_strides[0] + batch64 * dv_strides[1] + head64 * dv_strides[3]

    # The queries that see any key of the tile, and those that see all, counted from the first of the sequence.
    last = tl.minimum(first + BLOCK_N, num_keys) - 1
    # A start at a multiple of 16 lets what is kept a row be read 16 bytes at a time.
    query_first = tl.maximum(first * STRIDE + LAST - shift, 0) // 16 * 16
    full_first = tl.maximum(last * STRIDE + LAST - shift, 0)
    query_stop = num_queries
    full_stop = num_queries
    if WINDOWED:
        query_stop = tl.minimum(num_queries, last + window - shift)
        full_stop = tl.minimum(num_queries, first + window - shift)
    count, a, b = _tiles_of(query_first, full_first, full_stop, query_stop, BLOCK_M, SPLIT)
    # This share's tiles are [x, y), and of those [a, b) need no mask.
    x = count * share // shares
    y = count * (share + 1) // shares
    a = tl.minimum(tl.maximum(a, x), y)
    b = tl.minimum(tl.maximum(b, x), y)

    spoiled = 1.0
    for CLEAN in tl.static_range(2):
        if spoiled != 0:
            keys = first + tl.arange(0, BLOCK_N)
            held = keys < num_keys
            key = (key_start + keys).to(tl.int64)
            k0 = load_rows(k, key * k_strides[1], held, 0, K0, DK, True)
            k1 = k0
            if K1:
                k1 = load_rows(k, key * k_strides[1], held, K0, K1, DK, True)
            v0 = load_rows(v, key * v_strides[1], held, 0, V0, DV, True)
            v1 = v0
            if V1:
                v1 = load_rows(v, key * v_strides[1], held, V0, V1, DV, True)
            q_offsets = tl.arange(0, BLOCK_M).to(tl.int64) * q_strides[1]
            do_offsets = tl.arange(0, BLOCK_M).to(tl.int64) * dout_strides[1]
            dk0 = tl.zeros([BLOCK_N, K0], ACC)
            dk1 = tl.zeros([BLOCK_N, K1 if K1 else 16], ACC)
            dv0 = tl.zeros([BLOCK_N, V0], ACC)
            dv1 = tl.zeros([BLOCK_N, V1 if V1 else 16], ACC)
            for MASKED in tl.static_range(0 if SPLIT else 1, 2):
                # Heads are the inner part of one long loop, whose pipeline is filled once.
                for i in range(0, (y - x - (b - a) if MASKED else b - a) * G):
                    start = query_first + (x + _part(i // G, a - x, b - x, MASKED)) * BLOCK_M
                    queries = start + tl.arange(0, BLOCK_M)
                    inside = queries < num_queries
                    row = query_start + start
                    query_head = head * G + i % G
                    query_head64 = tl.cast(query_head, tl.int64)
                    q0, q1 = fetch(
                        q_tiles0, q_tiles1, q + query_head64 * q_strides[2], q_offsets, inside, batch, query_head, row,
                        q_strides[1], DK, K0, K1, BLOCK_M, MASKED, TMA,
                    )  # fmt: skip
                    do0, do1 = fetch(
                        do_tiles0, do_tiles1, dout + query_head64 * dout_strides[2], do_offsets, inside, batch,
                        query_head, row, dout_strides[1], DV, V0, V1, BLOCK_M, MASKED, TMA,
                    )  # fmt: skip
                    of_row = query_head64 * row_strides[1] + row + tl.arange(0, BLOCK_M)
                    if MASKED:
                        row_lse2 = tl.load(lse2 + of_row, mask=inside, other=float("inf"))
                        row_delta = tl.load(delta + of_row, mask=inside, other=0.0)
                    else:
                        row_lse2 = tl.load(lse2 + of_row)
                        row_delta = tl.load(delta + of_row)
                    s = _logits(k0, k1, q0, q1, K1, ACC, PRECISION) * scale_log2
                    if MASKED:
                        position = queries + shift
                        visible = keys[:, None] < _num_seen(position, STRIDE, LAST)[None, :]
                        if WINDOWED:
                            visible = visible & (keys[:, None] > (position - window)[None, :])
                        s = tl.where(visible, s, float("-inf"))
                    p = probability(s, row_lse2[None, :], ACC, WEIGHTED)
                    if CLEAN and MASKED:
                        visible = visible & inside[None, :]
                        bad = not_finite(do0, do1, V1, ACC)
                        do0, do1 = without(do0, do1, bad, V1)
                        q0, q1 = without(q0, q1, not_finite(q0, q1, K1, ACC), K1)
                        # A query that is not finite spoils the keys that it sees, and no others.
                        p = tl.where(visible, tl.where(bad[None, :], float("nan"), p), 0.0)
                    p_low = p.to(do0.dtype)
                    dv0 = dot(p_low, do0, dv0, ACC, PRECISION)
                    if V1:
                        dv1 = dot(p_low, do1, dv1, ACC, PRECISION)
                    ds = p * (_logits(v0, v1, do0, do1, V1, ACC, PRECISION) - row_delta[None, :])
                    if CLEAN and MASKED:
                        ds = tl.where(visible, ds, 0.0)
                    ds = ds.to(q0.dtype)
                    dk0 = dot(ds, q0, dk0, ACC, PRECISION)
                    if K1:
                        dk1 = dot(ds, q1, dk1, ACC, PRECISION)

            store_rows(dk, key * dk_strides[2], held, dk0 * scale, 0, K0, DK)
            if K1:
                store_rows(dk, key * dk_strides[2], held, dk1 * scale, K0, K1, DK)
            store_rows(dv, key * dv_strides[2], held, dv0, 0, V0, DV)
            if V1:
                store_rows(dv, key * dv_strides[2], held, dv1, V0, V1, DV)
            if not CLEAN:
                spoiled = zero_unless_finite(dk0, dk1, K1, ACC) + zero_unless_finite(dv0, dv1, V1, ACC)


# Launchers.

_MOST_SHARES = 32
"""Programs among which the queries of one key tile are shared out, at most: each writes a tile of partial sums."""


class _Branch(NamedTuple):
    """Which keys a query sees, as the module docstring says it."""

    name: str
    stride: int
    last: int
    window: int | None

    @staticmethod
    def compressed(config: NSAConfig, num_keys: int) -> "_Branch":
        return _Branch("compressed", config.compress_stride, config.compress_block_size - 1, None)

    @staticmethod
    def sliding(config: NSAConfig, num_keys: int) -> "_Branch":
        # A longer window sees no more, and might overflow when positions are added to it.
        return _Branch("window", 1, 0, max(1, min(config.window_size, num_keys)))


class _Packing(NamedTuple):
    """Offsets of the sequences among queries, tokens and keys, which are tokens or compressed blocks."""

    queries: Tensor
    tokens: Tensor
    keys: Tensor

    @staticmethod
    def of(
        branch: _Branch, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, config: NSAConfig
    ) -> "_Packing | None":
        if cu_seqlens_q is None or cu_seqlens_k is None:
            return None
        keys = cu_seqlens_k if branch.window is not None else block_offsets(cu_seqlens_k, config)
        return _Packing(cu_seqlens_q, cu_seqlens_k, keys)


def _rows_tiles(packing: _Packing | None, length: int, group: int, block: int) -> tuple[int, Tensor | None]:
    """Number and table of the tiles of `(token, head)` rows."""
    if packing is None:
        return triton.cdiv(length * group, block), None
    table = tile_table(packing.queries, block, length * group, group)
    return len(table), table


def _key_tiles(packing: _Packing | None, length: int, block: int) -> tuple[int, Tensor | None]:
    if packing is None:
        return triton.cdiv(length, block), None
    table = tile_table(packing.keys, block, length)
    return len(table), table


def _constants(q: Tensor, k: Tensor, v: Tensor, branch: _Branch, packing: _Packing | None) -> dict[str, Any]:
    """What all kernels are compiled for."""
    (k0, k1), (v0, v1) = chunks(k.shape[3]), chunks(v.shape[3])
    return {
        "STRIDE": branch.stride,
        "LAST": branch.last,
        "WINDOWED": branch.window is not None,
        "G": q.shape[2] // k.shape[2],
        "DK": k.shape[3],
        "K0": k0,
        "K1": k1,
        "DV": v.shape[3],
        "V0": v0,
        "V1": v1,
        "PACKED": packing is not None,
        "ACC": accumulator(q.dtype),
        "PRECISION": dot_precision(q.dtype),
    }


def _parameters(branch: _Branch, kernel: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[dict[str, Any], int]:
    """Launch parameters as the kernel takes them, and what is for its launcher: the least number of programs."""
    group = q.shape[2] // k.shape[2]
    found = launch(f"{branch.name}_{kernel}", q.dtype, k.shape[3], v.shape[3], group, q.device)
    return {name: value for name, value in found.items() if name != "programs"}, found["programs"]


def _forward(
    make_branch: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    num_tokens: int,
    config: NSAConfig,
    scale: float,
) -> tuple[Tensor, Tensor]:
    batch, num_queries, query_heads, _ = q.shape
    num_keys, heads = k.shape[1:3]
    out = q.new_empty(batch, num_queries, query_heads, v.shape[3])
    lse = q.new_empty(batch, num_queries, query_heads, dtype=accumulation_dtype(q.dtype))
    if not lse.numel():
        return out, lse
    if scale < 0:  # the kernel takes its maxima before it scales
        q, scale = -q, -scale
    q, k, v = map(rows_contiguous, (q, k, v))
    branch = make_branch(config, num_tokens)
    packing = _Packing.of(branch, cu_seqlens_q, cu_seqlens_k, config)
    options, _ = _parameters(branch, "forward", q, k, v)
    # A descriptor knows no sequences: its padding would be the next one's keys, which may be anything, NaN included.
    options["TMA"] = options["TMA"] and packing is None and describable(k, v)
    tiles, table = _rows_tiles(packing, num_queries, query_heads // heads, options["BLOCK_M"])
    with torch.cuda.device_of(q):
        _forward_kernel[(tiles * heads * batch, 1, 1)](
            q, k, v, *descriptors(k, options["BLOCK_N"], options["TMA"]),
            *descriptors(v, options["BLOCK_N"], options["TMA"]), out, lse, *(x.stride()[:3] for x in (q, k, v, out)),
            lse.stride(0), table, *(packing or (None, None, None)), num_queries, num_tokens, num_keys,
            branch.window or 0, tiles, heads, scale * LOG2E.value, **_constants(q, k, v, branch, packing), **options,
        )  # fmt: skip
    return out, lse


def _backward(
    make_branch: Any,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    indices: None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    num_tokens: int,
    config: NSAConfig,
    scale: float,
    *,
    gate: Tensor | None = None,
    dgate: Tensor | None = None,
    dq: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `branch_operator` has it; `gate` and `dq` as `nsa.kernels.selected_attention.gradients` has them, and `dgate`
    likewise for the gradient of `gate`, written."""
    batch, num_queries, query_heads, _ = q.shape
    num_keys, heads = k.shape[1:3]
    if not lse.numel() or not k.numel():
        return q.new_zeros(q.shape) if dq is None else dq, k.new_zeros(k.shape), v.new_zeros(v.shape)
    add = dq is not None
    dq = q.new_empty(q.shape) if dq is None else dq
    dout, q, k, v, out = map(rows_contiguous, (dout, q, k, v, out))
    branch = make_branch(config, num_tokens)
    packing = _Packing.of(branch, cu_seqlens_q, cu_seqlens_k, config)
    constants = _constants(q, k, v, branch, packing)
    lengths = (*(packing or (None, None, None)), num_queries, num_tokens, num_keys, branch.window or 0)
    lse = lse.contiguous()
    # Rows begin at whole 64 bytes, however long: kernels are compiled for strides that do and others that do not.
    lse2, delta = lse.new_empty(2, batch, query_heads, triton.cdiv(num_queries, 16) * 16)

    with torch.cuda.device_of(q):
        options, _ = _parameters(branch, "queries", q, k, v)
        options["TMA"] = options["TMA"] and packing is None and describable(k, v)
        tiles, table = _rows_tiles(packing, num_queries, query_heads // heads, options["BLOCK_M"])
        _queries_kernel[(tiles * heads * batch, 1, 1)](
            q, k, v, *descriptors(k, options["BLOCK_N"], options["TMA"]),
            *descriptors(v, options["BLOCK_N"], options["TMA"]), out, dout, gate, lse, lse2, delta, dgate, dq,
            *(x.stride()[:3] for x in (q, k, v, out, dout)), lse.stride(0), delta.stride()[:2], dq.stride()[:3],
            table, *lengths, tiles, heads, scale, scale * LOG2E.value, ADD=add, **constants, **options,
        )  # fmt: skip

        options, programs = _parameters(branch, "keys", q, k, v)
        options["TMA"] = options["TMA"] and packing is None and describable(q, dout)
        tiles, table = _key_tiles(packing, num_keys, options["BLOCK_N"])
        longest = num_queries if branch.window is None else min(num_queries, branch.window + options["BLOCK_N"])
        most = min(_MOST_SHARES, triton.cdiv(longest, options["BLOCK_M"]))
        shares = max(1, min(programs // (tiles * heads * batch), most))
        dtype = k.dtype if shares == 1 else delta.dtype
        # Packed sequences have fewer compressed blocks than there is room for: no tile writes the rest.
        make = torch.empty if packing is None or branch.window is not None else torch.zeros
        dk, dv = (make(shares, *x.shape, dtype=dtype, device=x.device) for x in (k, v))
        _keys_kernel[(tiles * shares * heads * batch, 1, 1)](
            q, k, v, *descriptors(q, options["BLOCK_M"], options["TMA"]),
            *descriptors(dout, options["BLOCK_M"], options["TMA"]), dout, lse2, delta, dk, dv,
            *(x.stride()[:3] for x in (q, k, v, dout)), delta.stride()[:2], dk.stride()[:4], dv.stride()[:4], table,
            *lengths, tiles, heads, shares, scale, scale * LOG2E.value, WEIGHTED=gate is not None, **constants,
            **options,
        )  # fmt: skip
    dk, dv = (x[0] if shares == 1 else x.sum(0).to(k.dtype) for x in (dk, dv))
    return dq, dk, dv


compressed_forward, compressed_backward = partial(_forward, _Branch.compressed), partial(_backward, _Branch.compressed)
window_forward, window_backward = partial(_forward, _Branch.sliding), partial(_backward, _Branch.sliding)
_compressed = branch_operator("nsa_triton", "compressed_attention", compressed_forward, compressed_backward)
_window = branch_operator("nsa_triton", "sliding_window_attention", window_forward, window_backward)


# The backend's side of nsa.functional, which has checked every argument.


def compressed_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    config: NSAConfig,
    num_keys: int,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output `[B, Tq, Hq, Dv]` and log-sum-exp `[B, Tq, Hq]`; see `nsa.functional.compressed_attention`."""
    rest = (cu_seqlens_q, cu_seqlens_k, num_keys, sizes_of(config), scale)
    return cast(tuple[Tensor, Tensor], _compressed(q, k_cmp, v_cmp, None, *rest))


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: NSAConfig,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
) -> Tensor:
    """Output `[B, Tq, Hq, Dv]`; see `nsa.functional.sliding_window_attention`."""
    return cast(Tensor, _window(q, k, v, None, cu_seqlens_q, cu_seqlens_k, k.shape[1], sizes_of(config), scale)[0])
