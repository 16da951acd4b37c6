"""Backward pass of the compressed and of the window branch: flash attention under a map of positions.

With `p = 2^(s - lse / ln 2)`, `delta = dout.out` and `ds = p (dout.v - delta)`:

    dq = scale sum_j ds k,    dk = scale sum_t ds q,    dv = sum_t p dout.

One kernel walks over the keys of a tile of queries for `dq`; another walks over the queries of a tile of keys for `dk`
and `dv`, all query heads of the KV head among them, so that no sum crosses programs and results are the same bits every
time. The latter works on transposed matrices, keys as rows: `p` and `ds` then are operands that a matrix unit takes
from registers. Where key tiles are too few to fill the device (long sequences have few compressed keys), the queries of
a tile are split among several programs, which write partial sums to be added afterwards. Rows that see nothing get
`lse = +inf`, which makes `p = 0` without a special case.

What is not finite is treated as in the forward pass: a tile whose sums are not finite is computed again with CLEAN. On
Hopper other kernels go first where they apply, and these compute again what was flagged as not finite.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.kernels.bwd_preprocess import BackwardRows
from nsa.kernels.flash_tiles import (
    LENGTHS,
    PositionMap,
    count_visible,
    flash_plan,
    nth_tile,
    row_tile,
    split_range,
)
from nsa.kernels.hopper import available, flash_dkdv, flash_dq
from nsa.kernels.hopper import flash_backward as hopper
from nsa.kernels.launches import recordable
from nsa.kernels.primitives import (
    LOG2E,
    Heads,
    accumulator,
    add_dot,
    cdiv,
    count_tiles,
    describable,
    descriptors,
    dot_chunks,
    fetch,
    find_program,
    find_tile,
    load_chunks,
    not_finite,
    probability,
    program_of,
    rows_contiguous,
    store_chunks,
    without,
    zero_unless_finite,
)
from nsa.varlen import Varlen

_MOST_SPLITS = 32
"""Programs among which the queries of one key tile are split, at most: each writes a tile of partial sums."""

_MOST_FLAGS = tl.constexpr(_MOST_SPLITS)
"""Flags of a tile, of which each split has one."""

_SUM_BLOCK = 1024
"""Elements of a program that adds partial sums up."""


@triton.jit
def _flagged(flags, parts):
    """NaN where one of the `parts` of this program's tile has NaN for a flag, else 0."""
    part = tl.arange(0, _MOST_FLAGS)
    return tl.sum(tl.load(flags + tl.program_id(0) // parts * parts + part, mask=part < parts, other=0.0), 0)


@recordable(do_not_specialize=LENGTHS)
def _bwd_dq_kernel(
    q, k, v, k_tiles0, k_tiles1, v_tiles0, v_tiles1, dout, gate, lse, delta, dq, flags, q_strides, k_strides, v_strides,
    dout_strides, lse_stride, row_strides, dq_strides, cu_queries, cu_tokens, cu_keys, num_sequences, num_queries,
    num_tokens, num_keys, window, num_tiles, HEADS, scale, scale_log2,
    STRIDE: tl.constexpr, LAST: tl.constexpr, WINDOWED: tl.constexpr, G: tl.constexpr, DK: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, PACKED: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr,
    SPLIT: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """`dq` of a tile of rows, added to what is there with ADD; with `flags`, of the tiles that have one."""
    poisoned = 1.0
    if flags is not None:
        poisoned = _flagged(flags, 1)
    for CLEAN in tl.static_range(0 if flags is None else 1, 2):
        if poisoned != 0:
            head, batch, first, query_start, num_queries, shift, key_start, key_first, key_stop, count, a, b = row_tile(
                program_of(poisoned, CLEAN), num_tiles, HEADS, cu_queries, cu_tokens, cu_keys, num_sequences,
                num_queries, num_tokens, num_keys, window, STRIDE, LAST, WINDOWED, G, PACKED, BLOCK_M, BLOCK_N, SPLIT,
            )  # fmt: skip
            batch64 = tl.cast(batch, tl.int64)
            head64 = tl.cast(head, tl.int64)
            q_head = q + batch64 * q_strides[0]
            k_head = k + batch64 * k_strides[0] + head64 * k_strides[2]
            v_head = v + batch64 * v_strides[0] + head64 * v_strides[2]
            dout_head = dout + batch64 * dout_strides[0]
            dq_head = dq + batch64 * dq_strides[0]

            rows = first + tl.arange(0, BLOCK_M)
            inside = rows < num_queries * G
            position = rows // G + shift
            token = (query_start + rows // G).to(tl.int64)
            query_head = (head * G + rows % G).to(tl.int64)
            num_visible = count_visible(position, STRIDE, LAST)
            first_visible = position - window + 1
            q0, q1 = load_chunks(q_head, token * q_strides[1] + query_head * q_strides[2], inside, DK, K0, K1)
            dout_offsets = token * dout_strides[1] + query_head * dout_strides[2]
            do0, do1 = load_chunks(dout_head, dout_offsets, inside, DV, V0, V1)
            of_row = batch64 * lse_stride + token * (HEADS * G) + query_head
            lse2 = tl.load(lse + of_row, mask=inside, other=0.0) * LOG2E
            lse2 = tl.where(lse2 == float("-inf"), float("inf"), lse2)
            row_delta = tl.load(
                delta + batch64 * row_strides[0] + query_head * row_strides[1] + token, mask=inside, other=0.0
            )
            weight = tl.full([BLOCK_M], 1.0, ACC)
            if gate is not None:
                weight = tl.load(gate + 3 * of_row, mask=inside, other=0.0).to(ACC)

            k_offsets = tl.arange(0, BLOCK_N).to(tl.int64) * k_strides[1]
            v_offsets = tl.arange(0, BLOCK_N).to(tl.int64) * v_strides[1]
            dq0 = tl.zeros([BLOCK_M, K0], ACC)
            dq1 = tl.zeros([BLOCK_M, K1 if K1 else 16], ACC)
            for MASKED in tl.static_range(0 if SPLIT else 1, 2):
                for i in range(0, count - (b - a) if MASKED else b - a):
                    start = key_first + nth_tile(i, a, b, MASKED) * BLOCK_N
                    keys = start + tl.arange(0, BLOCK_N)
                    exists = keys < key_stop
                    row = key_start + start
                    k0, k1 = fetch(
                        k_tiles0, k_tiles1, k_head, k_offsets, exists, batch, head, row, k_strides[1], DK, K0, K1,
                        BLOCK_N, MASKED, TMA,
                    )  # fmt: skip
                    v0, v1 = fetch(
                        v_tiles0, v_tiles1, v_head, v_offsets, exists, batch, head, row, v_strides[1], DV, V0, V1,
                        BLOCK_N, MASKED, TMA,
                    )  # fmt: skip
                    s = dot_chunks(q0, q1, k0, k1, K1, ACC, PRECISION) * scale_log2
                    if MASKED:
                        visible = keys[None, :] < num_visible[:, None]
                        if WINDOWED:
                            visible = visible & (keys[None, :] >= first_visible[:, None])
                        s = tl.where(visible, s, float("-inf"))
                    p = tl.exp2(s - lse2[:, None])
                    ds = p * (dot_chunks(do0, do1, v0, v1, V1, ACC, PRECISION) - row_delta[:, None])
                    if CLEAN and MASKED:
                        ds = tl.where(visible, ds, 0.0)
                        k0, k1 = without(k0, k1, not_finite(k0, k1, K1, ACC), K1)
                    dq0, dq1 = add_dot(ds.to(k0.dtype), k0, k1, dq0, dq1, K1, ACC, PRECISION)

            stored = inside
            if not CLEAN:
                poisoned = zero_unless_finite(dq0, dq1, K1, ACC)
                stored = tl.where(inside, poisoned, 1.0) == 0  # what is added cannot be taken back
            factor = (scale * weight)[:, None]
            dq_offsets = token * dq_strides[1] + query_head * dq_strides[2]
            store_chunks(dq_head, dq_offsets, stored, dq0 * factor, dq1 * factor, DK, K0, K1, ADD)


@recordable(do_not_specialize=LENGTHS)
def _bwd_dkdv_kernel(
    q, k, v, q_tiles0, q_tiles1, do_tiles0, do_tiles1, dout, lse2, delta, dk, dv, flags, q_strides, k_strides,
    v_strides, dout_strides, row_strides, dk_strides, dv_strides, cu_queries, cu_tokens, cu_keys, num_sequences,
    num_queries, num_tokens, num_keys, window, num_tiles, HEADS, num_splits, scale, scale_log2,
    STRIDE: tl.constexpr, LAST: tl.constexpr, WINDOWED: tl.constexpr, G: tl.constexpr, DK: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, PACKED: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr,
    SPLIT: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """One split of `dk` and `dv` of a tile of keys; with `flags`, of the tiles that have one. `dk_strides` begin with
    that of the split."""
    poisoned = 1.0
    if flags is not None:
        poisoned = _flagged(flags, num_splits)
    for CLEAN in tl.static_range(0 if flags is None else 1, 2):
        if poisoned != 0:
            tile, head, batch = find_program(program_of(poisoned, CLEAN), num_tiles * num_splits, HEADS)
            split = tile % num_splits
            first, query_start, num_queries, num_tokens, key_start, num_keys = find_tile(
                cu_keys, cu_queries, cu_tokens, cu_keys, num_sequences, num_queries, num_tokens, num_keys,
                tile // num_splits, 1, BLOCK_N, PACKED,
            )  # fmt: skip
            shift = num_tokens - num_queries
            split64 = tl.cast(split, tl.int64)
            batch64 = tl.cast(batch, tl.int64)
            head64 = tl.cast(head, tl.int64)
            q_head = q + batch64 * q_strides[0]
            k_head = k + batch64 * k_strides[0] + head64 * k_strides[2]
            v_head = v + batch64 * v_strides[0] + head64 * v_strides[2]
            dout_head = dout + batch64 * dout_strides[0]
            lse2_head = lse2 + batch64 * row_strides[0]
            delta_head = delta + batch64 * row_strides[0]
            dk_head = dk + split64 * dk_strides[0] + batch64 * dk_strides[1] + head64 * dk_strides[3]
            dv_head = dv + split64 * dv_strides[0] + batch64 * dv_strides[1] + head64 * dv_strides[3]

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
            count, a, b = split_range(query_first, full_first, full_stop, query_stop, BLOCK_M, SPLIT)
            # This split's tiles are [begin, end), and of those [a, b) need no mask.
            begin = count * split // num_splits
            end = count * (split + 1) // num_splits
            a = tl.minimum(tl.maximum(a, begin), end)
            b = tl.minimum(tl.maximum(b, begin), end)

            keys = first + tl.arange(0, BLOCK_N)
            exists = keys < num_keys
            key = (key_start + keys).to(tl.int64)
            k0, k1 = load_chunks(k_head, key * k_strides[1], exists, DK, K0, K1)
            v0, v1 = load_chunks(v_head, key * v_strides[1], exists, DV, V0, V1)
            q_offsets = tl.arange(0, BLOCK_M).to(tl.int64) * q_strides[1]
            do_offsets = tl.arange(0, BLOCK_M).to(tl.int64) * dout_strides[1]
            dk0 = tl.zeros([BLOCK_N, K0], ACC)
            dk1 = tl.zeros([BLOCK_N, K1 if K1 else 16], ACC)
            dv0 = tl.zeros([BLOCK_N, V0], ACC)
            dv1 = tl.zeros([BLOCK_N, V1 if V1 else 16], ACC)
            for MASKED in tl.static_range(0 if SPLIT else 1, 2):
                # Heads are the inner part of one long loop, whose pipeline is filled once.
                for i in range(0, (end - begin - (b - a) if MASKED else b - a) * G):
                    start = query_first + (begin + nth_tile(i // G, a - begin, b - begin, MASKED)) * BLOCK_M
                    queries = start + tl.arange(0, BLOCK_M)
                    inside = queries < num_queries
                    row = query_start + start
                    query_head = head * G + i % G
                    query_head64 = tl.cast(query_head, tl.int64)
                    q0, q1 = fetch(
                        q_tiles0, q_tiles1, q_head + query_head64 * q_strides[2], q_offsets, inside, batch, query_head,
                        row, q_strides[1], DK, K0, K1, BLOCK_M, MASKED, TMA,
                    )  # fmt: skip
                    do0, do1 = fetch(
                        do_tiles0, do_tiles1, dout_head + query_head64 * dout_strides[2], do_offsets, inside, batch,
                        query_head, row, dout_strides[1], DV, V0, V1, BLOCK_M, MASKED, TMA,
                    )  # fmt: skip
                    of_row = query_head64 * row_strides[1] + row + tl.arange(0, BLOCK_M)
                    if MASKED:
                        row_lse2 = tl.load(lse2_head + of_row, mask=inside, other=float("inf"))
                        row_delta = tl.load(delta_head + of_row, mask=inside, other=0.0)
                    else:
                        row_lse2 = tl.load(lse2_head + of_row)
                        row_delta = tl.load(delta_head + of_row)
                    s = dot_chunks(k0, k1, q0, q1, K1, ACC, PRECISION) * scale_log2
                    if MASKED:
                        position = queries + shift
                        visible = keys[:, None] < count_visible(position, STRIDE, LAST)[None, :]
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
                    dv0, dv1 = add_dot(p.to(do0.dtype), do0, do1, dv0, dv1, V1, ACC, PRECISION)
                    ds = p * (dot_chunks(v0, v1, do0, do1, V1, ACC, PRECISION) - row_delta[None, :])
                    if CLEAN and MASKED:
                        ds = tl.where(visible, ds, 0.0)
                    dk0, dk1 = add_dot(ds.to(q0.dtype), q0, q1, dk0, dk1, K1, ACC, PRECISION)

            store_chunks(dk_head, key * dk_strides[2], exists, dk0 * scale, dk1 * scale, DK, K0, K1)
            store_chunks(dv_head, key * dv_strides[2], exists, dv0, dv1, DV, V0, V1)
            if not CLEAN:
                poisoned = zero_unless_finite(dk0, dk1, K1, ACC) + zero_unless_finite(dv0, dv1, V1, ACC)


@recordable(do_not_specialize=["dk_size", "dv_size", "num_splits"])
def _sum_splits_kernel(
    dk_parts, dv_parts, dk, dv, dk_size, dv_size, num_splits, ACC: tl.constexpr, BLOCK: tl.constexpr
):
    """`dk` and `dv` from their partial sums, `num_splits` after one another, first to last."""
    block = tl.program_id(0).to(tl.int64)
    first_of_dv = tl.cdiv(dk_size, BLOCK)
    parts = dk_parts
    out = dk
    size = dk_size
    if block >= first_of_dv:
        block -= first_of_dv
        parts = dv_parts
        out = dv
        size = dv_size
    element = block * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], ACC)
    for split in range(0, num_splits):
        total += tl.load(parts + split * tl.cast(size, tl.int64) + element, mask=element < size, other=0.0)
    tl.store(out + element, total.to(out.dtype.element_ty), mask=element < size)


def _sum_splits(dk_parts: Tensor, dv_parts: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Sums over the first dimension of `[splits, B, T, Hk, Dk]` and `[splits, B, T, Hk, Dv]`."""
    dk, dv = (x.new_empty(x.shape[1:], dtype=dtype) for x in (dk_parts, dv_parts))
    programs = cdiv(dk.numel(), _SUM_BLOCK) + cdiv(dv.numel(), _SUM_BLOCK)
    _sum_splits_kernel[(programs, 1, 1)](
        dk_parts, dv_parts, dk, dv, dk.numel(), dv.numel(), dk_parts.shape[0], ACC=accumulator(dtype),
        BLOCK=_SUM_BLOCK,
    )  # fmt: skip
    return dk, dv


def backward(
    positions: PositionMap,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    rows: BackwardRows,
    varlen: Varlen | None,
    num_tokens: int,
    scale: float,
    *,
    gate: Tensor | None = None,
    dq: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients `dq`, `dk` and `dv` of one branch, contiguous; arguments as `flash_forward.forward` has them.

    Args:
        lse: `[B, Tq, Hq]`, as the forward pass gave it.
        rows: head-major, weighted if there is a gate.
        gate: `[B, Tq, Hq]`, every third element of contiguous memory: what `dout` is to be multiplied by.
        dq: contiguous, added to.
    """
    batch, num_queries, query_heads, _ = q.shape
    num_keys, heads = k.shape[1:3]
    if not lse.numel() or not k.numel() or positions.window == 0:
        return q.new_zeros(q.shape) if dq is None else dq, k.new_zeros(k.shape), v.new_zeros(v.shape)
    add = dq is not None
    dq = q.new_empty(q.shape) if dq is None else dq
    dout, q, k, v = map(rows_contiguous, (dout, q, k, v))
    offsets = positions.offsets(varlen)
    lengths = (*offsets, num_queries, num_tokens, num_keys, positions.window or 0)
    shapes = (Heads.of(q, k, v), q.device, varlen is not None)
    lse, (delta, lse2) = lse.contiguous(), rows
    row_strides = (delta.stride(0), delta.stride(2))
    on_hopper = available(q.device) and hopper.applies(positions, dout, q, k, v, rows, varlen)

    with torch.cuda.device_of(q):
        config, constants = flash_plan(positions, "bwd_dq", *shapes, describable(k, v))
        tiles, flags = count_tiles(num_queries, query_heads // heads, config.BLOCK_M, offsets), None
        if on_hopper:
            flags = flash_dq.write_dq(positions, dout, q, k, v, lse, rows, gate, dq, add, num_tokens, scale)
            tiles, constants = flags.shape[2], {**constants, "BLOCK_M": hopper.TILE}
        _bwd_dq_kernel[(tiles * heads * batch, 1, 1)](
            q, k, v, *descriptors(k, config.BLOCK_N, config.TMA),
            *descriptors(v, config.BLOCK_N, config.TMA), dout, gate, lse, delta, dq, flags,
            *(x.stride()[:3] for x in (q, k, v, dout)), lse.stride(0), row_strides, dq.stride()[:3],
            *lengths, tiles, heads, scale, scale * LOG2E.value, ADD=add, **constants,
        )  # fmt: skip

        config, constants = flash_plan(positions, "bwd_dkdv", *shapes, describable(q, dout))
        tiles, flags = count_tiles(num_keys, 1, config.BLOCK_N, offsets), None
        longest = num_queries if positions.window is None else min(num_queries, positions.window + config.BLOCK_N)
        most = min(_MOST_SPLITS, cdiv(longest, config.BLOCK_M))
        programs = config.num_programs // (tiles * heads * batch)
        if on_hopper:
            programs = flash_dkdv.programs_per_key_tile(positions, k)
        num_splits = max(1, min(programs, most))
        dtype = k.dtype if num_splits == 1 else delta.dtype
        # Packed sequences have fewer compressed blocks than there is room for: no tile writes the rest.
        make = torch.empty if varlen is None or positions.window is not None else torch.zeros
        dk, dv = (make(num_splits, *x.shape, dtype=dtype, device=x.device) for x in (k, v))
        if on_hopper:
            flags = flash_dkdv.write_dkdv(positions, dout, q, k, v, rows, gate, dk, dv, num_tokens, scale)
            tiles, constants = flags.shape[2], {**constants, "BLOCK_N": hopper.TILE}
        _bwd_dkdv_kernel[(tiles * num_splits * heads * batch, 1, 1)](
            q, k, v, *descriptors(q, config.BLOCK_M, config.TMA),
            *descriptors(dout, config.BLOCK_M, config.TMA), dout, lse2, delta, dk, dv, flags,
            *(x.stride()[:3] for x in (q, k, v, dout)), row_strides, dk.stride()[:4], dv.stride()[:4],
            *lengths, tiles, heads, num_splits, scale, scale * LOG2E.value, WEIGHTED=gate is not None, **constants,
        )  # fmt: skip
        dk, dv = (dk[0], dv[0]) if num_splits == 1 else _sum_splits(dk, dv, k.dtype)
    return dq, dk, dv
