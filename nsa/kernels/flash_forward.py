"""Forward pass of the compressed and of the window branch: flash attention under a map of positions.

With logits in base 2, `s = scale log2(e) q.k`, so that exponentials are the hardware's, a tile of query rows walks over
its keys and keeps for every row the maximum `row_max`, the sum `row_sum = sum 2^(s - row_max)` and `acc = sum
2^(s - row_max) v`; then `out = acc / row_sum` and `lse = ln 2 (row_max + log2 row_sum)`. A row that sees nothing has
`row_sum = 0`: output 0, `lse = -inf`.

A row is a (token, head) pair, token-major: the `G` query heads of a KV head stand together, whatever `G`. A tile then
spans few tokens and its rows see nearly the same keys.

What a query does not see has no part in its results, whatever it holds: a masked weight of 0 is not enough, for 0
times NaN is NaN. The kernel looks at its sums once, at the end. Where one is not finite it computes the tile again with
CLEAN: values that are not finite are taken out of the product, and count as NaN for the rows that see them.

On Hopper `nsa.kernels.hopper.flash_forward` does this where it can. Rows whose sums are not finite are left to a kernel
of this file, which does nothing but look for them if there are none.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.kernels.flash_tiles import (
    LENGTHS,
    PositionMap,
    count_visible,
    flash_plan,
    nth_tile,
    row_tile,
)
from nsa.kernels.hopper import available
from nsa.kernels.hopper import flash_forward as hopper
from nsa.kernels.launches import recordable
from nsa.kernels.primitives import (
    LN2,
    LOG2E,
    Heads,
    add_dot,
    cdiv,
    count_tiles,
    describable,
    descriptors,
    dot_chunks,
    fetch,
    find_program,
    load_chunks,
    not_finite,
    online_softmax_update,
    program_of,
    rows_contiguous,
    store_chunks,
    without,
    zero_unless_finite,
)
from nsa.ops import accumulation_dtype
from nsa.varlen import Varlen

_CLEAN_ROWS = tl.constexpr(16)
"""Rows that are computed again at a time: whatever has the shape of the first pass would take registers all along."""

_RUN = tl.constexpr(1024)
"""Rows of a program that looks for what the Hopper kernel leaves to be computed again."""


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
    num_visible = count_visible(position, STRIDE, LAST)
    first_visible = position - window + 1
    q0, q1 = load_chunks(q, token * q_strides[1] + query_head * q_strides[2], inside, DK, K0, K1)
    k_offsets = tl.arange(0, BLOCK_N).to(tl.int64) * k_strides[1]
    v_offsets = tl.arange(0, BLOCK_N).to(tl.int64) * v_strides[1]
    acc0 = tl.zeros([ROWS, V0], ACC)
    acc1 = tl.zeros([ROWS, V1 if V1 else 16], ACC)
    row_max = tl.full([ROWS], float("-inf"), ACC)
    row_sum = tl.zeros([ROWS], ACC)
    for MASKED in tl.static_range(0 if SPLIT and not CLEAN else 1, 2):
        for i in range(0, count if CLEAN else count - (b - a) if MASKED else b - a):
            start = key_first + (i if CLEAN else nth_tile(i, a, b, MASKED)) * BLOCK_N
            keys = start + tl.arange(0, BLOCK_N)
            exists = keys < key_stop
            row = key_start + start
            k0, k1 = fetch(
                k_tiles0, k_tiles1, k, k_offsets, exists, batch, head, row, k_strides[1], DK, K0, K1, BLOCK_N,
                MASKED, TMA and not CLEAN,
            )  # fmt: skip
            s = dot_chunks(q0, q1, k0, k1, K1, ACC, PRECISION)
            if MASKED:
                visible = keys[None, :] < num_visible[:, None]
                if WINDOWED:
                    visible = visible & (keys[None, :] >= first_visible[:, None])
                # Scaled before it is masked: a scale of 0 must not meet an infinity.
                s = tl.where(visible, s * scale_log2, float("-inf"))
            p, rescale, row_max = online_softmax_update(s, row_max, scale_log2, MASKED)
            row_sum = row_sum * rescale + tl.sum(p, 1)
            v0, v1 = fetch(
                v_tiles0, v_tiles1, v, v_offsets, exists, batch, head, row, v_strides[1], DV, V0, V1, BLOCK_N,
                MASKED, TMA and not CLEAN,
            )  # fmt: skip
            if CLEAN:
                bad = not_finite(v0, v1, V1, ACC)
                v0, v1 = without(v0, v1, bad, V1)
                p = tl.where(visible & bad[None, :], float("nan"), p)
            acc0 *= rescale[:, None]
            if V1:
                acc1 *= rescale[:, None]
            acc0, acc1 = add_dot(p.to(v0.dtype), v0, v1, acc0, acc1, V1, ACC, PRECISION)

    empty = row_sum == 0
    row_sum = tl.where(empty, 1.0, row_sum)
    out_offsets = token * out_strides[1] + query_head * out_strides[2]
    store_chunks(out, out_offsets, inside, acc0 / row_sum[:, None], acc1 / row_sum[:, None], DV, V0, V1)
    of_row = token * (HEADS * G) + query_head
    tl.store(lse + of_row, tl.where(empty, float("-inf"), (row_max + tl.log2(row_sum)) * LN2), mask=inside)
    return zero_unless_finite(acc0, acc1, V1, ACC)


@recordable(do_not_specialize=LENGTHS)
def _forward_kernel(
    q, k, v, k_tiles0, k_tiles1, v_tiles0, v_tiles1, out, lse, q_strides, k_strides, v_strides, out_strides,
    lse_stride, cu_queries, cu_tokens, cu_keys, num_sequences, num_queries, num_tokens, num_keys, window, num_tiles,
    HEADS, scale_log2, STRIDE: tl.constexpr, LAST: tl.constexpr, WINDOWED: tl.constexpr, G: tl.constexpr,
    DK: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    PACKED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TMA: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    poisoned = 1.0
    for CLEAN in tl.static_range(2):
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
            out_head = out + batch64 * out_strides[0]
            lse_head = lse + batch64 * lse_stride
            if CLEAN:
                for offset in range(0, BLOCK_M, _CLEAN_ROWS):
                    _attend(
                        first + offset, q_head, k_head, v_head, None, None, None, None, out_head, lse_head, q_strides,
                        k_strides, v_strides, out_strides, batch, head, query_start, num_queries, shift, key_first,
                        key_start, key_stop, count, a, b, window, HEADS, scale_log2, STRIDE, LAST, WINDOWED, G, DK, K0,
                        K1, DV, V0, V1, ACC, PRECISION, _CLEAN_ROWS, BLOCK_N, False, False, True,
                    )  # fmt: skip
            else:
                poisoned = _attend(
                    first, q_head, k_head, v_head, k_tiles0, k_tiles1, v_tiles0, v_tiles1, out_head, lse_head,
                    q_strides, k_strides, v_strides, out_strides, batch, head, query_start, num_queries, shift,
                    key_first, key_start, key_stop, count, a, b, window, HEADS, scale_log2, STRIDE, LAST, WINDOWED, G,
                    DK, K0, K1, DV, V0, V1, ACC, PRECISION, BLOCK_M, BLOCK_N, TMA, SPLIT, False,
                )  # fmt: skip


@recordable(do_not_specialize=[*LENGTHS, "num_runs"])
def _clean_kernel(
    q, k, v, out, lse, q_strides, k_strides, v_strides, out_strides, lse_stride, num_queries, num_tokens, num_keys,
    window, num_tiles, num_runs, HEADS, scale_log2, STRIDE: tl.constexpr, LAST: tl.constexpr, WINDOWED: tl.constexpr,
    G: tl.constexpr, DK: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr,
    V1: tl.constexpr, PACKED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, TMA: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Computes a run of rows again, with CLEAN, if the log-sum-exp of one is NaN."""
    run, head, batch = find_program(tl.program_id(0), num_runs, HEADS)
    lse_head = lse + tl.cast(batch, tl.int64) * lse_stride
    rows = run * _RUN + tl.arange(0, _RUN)
    of_row = (rows // G).to(tl.int64) * (HEADS * G) + head * G + rows % G
    row_lse = tl.load(lse_head + of_row, mask=rows < num_queries * G, other=0.0)
    if tl.sum((row_lse != row_lse).to(tl.int32), 0) > 0:
        batch64 = tl.cast(batch, tl.int64)
        head64 = tl.cast(head, tl.int64)
        tiles_before = (batch * HEADS + head) * num_tiles
        first_tile = run * (_RUN // _CLEAN_ROWS)
        for tile in range(first_tile, tl.minimum(first_tile + _RUN // _CLEAN_ROWS, num_tiles)):
            _, _, first, query_start, _, shift, key_start, key_first, key_stop, count, a, b = row_tile(
                tiles_before + num_tiles - 1 - tile, num_tiles, HEADS, None, None, None, 0, num_queries, num_tokens,
                num_keys, window, STRIDE, LAST, WINDOWED, G, False, _CLEAN_ROWS, BLOCK_N, False,
            )  # fmt: skip
            _attend(
                first, q + batch64 * q_strides[0], k + batch64 * k_strides[0] + head64 * k_strides[2],
                v + batch64 * v_strides[0] + head64 * v_strides[2], None, None, None, None,
                out + batch64 * out_strides[0], lse_head, q_strides, k_strides, v_strides, out_strides, batch, head,
                query_start, num_queries, shift, key_first, key_start, key_stop, count, a, b, window, HEADS,
                scale_log2, STRIDE, LAST, WINDOWED, G, DK, K0, K1, DV, V0, V1, ACC, PRECISION, _CLEAN_ROWS, BLOCK_N,
                False, False, True,
            )  # fmt: skip


def forward(
    positions: PositionMap, q: Tensor, k: Tensor, v: Tensor, varlen: Varlen | None, num_tokens: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Output `[B, Tq, Hq, Dv]` and log-sum-exp `[B, Tq, Hq]` of one branch.

    Args:
        q: `[B, Tq, Hq, Dk]`.
        k: `[B, T, Hk, Dk]`, tokens or compressed blocks, as `positions` says.
        v: `[B, T, Hk, Dv]`.
        num_tokens: `Tk`, tokens behind the keys.
    """
    batch, num_queries, query_heads, _ = q.shape
    num_keys, heads = k.shape[1:3]
    out = q.new_empty(batch, num_queries, query_heads, v.shape[3])
    lse = q.new_empty(batch, num_queries, query_heads, dtype=accumulation_dtype(q.dtype))
    if not lse.numel() or positions.window == 0:
        return out.zero_(), lse.fill_(-math.inf)
    if scale < 0:  # the kernel takes its maxima before it scales
        q, scale = -q, -scale
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    config, constants = flash_plan(
        positions, "forward", Heads.of(q, k, v), q.device, varlen is not None, describable(k, v)
    )
    strides = (q.stride()[:3], k.stride()[:3], v.stride()[:3], out.stride()[:3], lse.stride(0))
    lengths = (num_queries, num_tokens, num_keys, positions.window or 0)
    scale_log2 = scale * LOG2E.value
    if available(q.device) and varlen is None and hopper.applies(q, k, v):
        rows = num_queries * query_heads // heads
        tiles, runs = cdiv(rows, _CLEAN_ROWS.value), cdiv(rows, _RUN.value)
        with torch.cuda.device_of(q):
            hopper.forward(positions, q, k, v, out, lse, num_tokens, scale_log2)
            _clean_kernel[(runs * heads * batch, 1, 1)](
                q, k, v, out, lse, *strides, *lengths, tiles, runs, heads, scale_log2, **constants
            )
        return out, lse
    offsets = positions.offsets(varlen)
    tiles = count_tiles(num_queries, query_heads // heads, config.BLOCK_M, offsets)
    with torch.cuda.device_of(q):
        _forward_kernel[(tiles * heads * batch, 1, 1)](
            q, k, v, *descriptors(k, config.BLOCK_N, config.TMA), *descriptors(v, config.BLOCK_N, config.TMA), out,
            lse, *strides, *offsets, *lengths, tiles, heads, scale_log2, **constants,
        )  # fmt: skip
    return out, lse
