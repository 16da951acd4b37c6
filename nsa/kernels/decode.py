"""Attention of a new token of each sequence over the keys and values in a cache (paper, section 3.3).

A step reads little and computes less, so its time is that of reading, if enough programs read at once. A program has
the `G` query heads of a KV head, which share their keys, and a part of these:

1. `_compressed_kernel`: compressed blocks in `num_splits` parts, each with its softmax; logits are kept in memory;
2. `_importance_kernel`: from the logits and the log-sum-exps of all parts, the importance of the selection blocks;
3. `_choose_kernel`: the best of them, as in `nsa.kernels.select`;
4. `_attend_kernel`: the selected blocks and the window, in parts of their own;
5. `_merge_kernel`: the parts of each branch by their log-sum-exps, and the gated sum of the branches.

How long sequences are is read on the device, and grids follow from what there is room for in the cache. So launches are
the same at every step, and a CUDA graph of them goes on from step to step.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.config import NSAConfig
from nsa.kernels.configs import multiprocessors
from nsa.kernels.launches import recordable
from nsa.kernels.primitives import (
    LOG2E,
    Heads,
    add_dot,
    cdiv,
    dot_chunks,
    find_program,
    load_chunks,
    next_power_of_2,
    online_softmax_update,
    rows_contiguous,
    store_chunks,
)
from nsa.kernels.select import best_candidates
from nsa.ops import accumulation_dtype

_KEYS = 64
"""Keys that a program has at a time, at most."""

_MOST_PARTS = 32
"""Largest number of parts of a branch: those of all branches are merged as one tile."""

_PROGRAMS = 4
"""Programs a multiprocessor of each of the kernels that read keys."""

# Sizes that change from cache to cache and are no reason to compile again.
_LENGTHS = (
    "num_tokens",
    "capacity",
    "num_splits",
    "num_blocks",
    "span",
    "ring_size",
    "window",
    "num_selected",
    "num_parts",
    "programs",
)


@triton.jit
def _find(lengths, num_tokens, programs, HEADS, NUM_QUERIES: tl.constexpr):
    """A program's part of `programs`, KV head, batch row, query, its row `(batch, query, KV head)` and position.

    The last `NUM_QUERIES` tokens of each sequence are the queries. None lies beyond what the cache has room for.
    """
    part, head, row = find_program(tl.program_id(0), programs, HEADS)
    batch = row // NUM_QUERIES
    query = row % NUM_QUERIES
    position = tl.minimum(tl.load(lengths + batch), num_tokens).to(tl.int32) - NUM_QUERIES + query
    return part, head.to(tl.int64), batch.to(tl.int64), query, row.to(tl.int64) * HEADS + head, position


@triton.jit
def _visible_blocks(position, capacity, LENGTH: tl.constexpr, STRIDE: tl.constexpr):
    """Number of compressed blocks that a query sees."""
    return tl.minimum(tl.maximum(position + 1 - LENGTH + STRIDE, 0) // STRIDE, capacity)


@triton.jit
def _load_queries(
    q, strides, batch, query, head, G: tl.constexpr, ROWS: tl.constexpr, DK: tl.constexpr, K0: tl.constexpr,
    K1: tl.constexpr,
):  # fmt: skip
    """The query heads of a KV head, `[ROWS, D]`; 0 beyond `G`."""
    row = tl.arange(0, ROWS)
    q += batch * strides[0] + query * strides[1] + head * G * strides[2]
    return load_chunks(q, row.to(tl.int64) * strides[2], row < G, DK, K0, K1)


@triton.jit
def _store_part(
    partial, partial_lse2, place, acc0, acc1, row_max, row_sum, G: tl.constexpr, ROWS: tl.constexpr, DV: tl.constexpr,
    V0: tl.constexpr, V1: tl.constexpr,
):  # fmt: skip
    """A part's output and log-sum-exp, base 2, of each query head, at `place + row`."""
    row = tl.arange(0, ROWS)
    empty = row_sum == 0
    row_sum = tl.where(empty, 1.0, row_sum)
    lse2 = tl.where(empty, float("-inf"), row_max + tl.log2(row_sum))
    tl.store(partial_lse2 + place + row, lse2, mask=row < G)
    acc0 = acc0 / row_sum[:, None]
    acc1 = acc1 / row_sum[:, None]
    store_chunks(partial, (place + row) * DV, row < G, acc0, acc1, DV, V0, V1)


@recordable(do_not_specialize=_LENGTHS)
def _compressed_kernel(
    q, k, v, lengths, logits, partial, partial_lse2, q_strides, k_strides, v_strides, num_tokens, capacity, num_splits,
    num_parts, scale_log2, HEADS, NUM_QUERIES: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    LENGTH: tl.constexpr, STRIDE: tl.constexpr, DK: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
    DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One part of the compressed branch; its logits, in base 2, to `logits [B, Tq, Hk, G, capacity]`."""
    split, head, batch, query, of_head, position = _find(lengths, num_tokens, num_splits, HEADS, NUM_QUERIES)
    count = _visible_blocks(position, capacity, LENGTH, STRIDE)
    # Parts are equal in what there is, not in what there is room for.
    span = tl.cdiv(tl.cdiv(count, num_splits), KEYS) * KEYS
    begin = split * span
    end = tl.minimum(begin + span, count)
    q0, q1 = _load_queries(q, q_strides, batch, query, head, G, ROWS, DK, K0, K1)
    k += batch * k_strides[0] + head * k_strides[2]
    v += batch * v_strides[0] + head * v_strides[2]
    row = tl.arange(0, ROWS)
    logits += of_head * G * capacity
    row_max = tl.full([ROWS], float("-inf"), dtype=ACC)
    row_sum = tl.zeros([ROWS], dtype=ACC)
    acc0 = tl.zeros([ROWS, V0], dtype=ACC)
    acc1 = tl.zeros([ROWS, V1 if V1 > 0 else 16], dtype=ACC)
    for start in range(begin, end, KEYS):
        block = start + tl.arange(0, KEYS)
        exists = block < end
        k0, k1 = load_chunks(k, block.to(tl.int64) * k_strides[1], exists, DK, K0, K1)
        v0, v1 = load_chunks(v, block.to(tl.int64) * v_strides[1], exists, DV, V0, V1)
        s = dot_chunks(q0, q1, k0, k1, K1, ACC, PRECISION) * scale_log2
        tl.store(
            logits + row.to(tl.int64)[:, None] * capacity + block[None, :], s, mask=(row < G)[:, None] & exists[None, :]
        )
        s = tl.where(exists[None, :], s, float("-inf"))
        p, rescale, row_max = online_softmax_update(s, row_max, 1.0, True)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        acc0 = acc0 * rescale[:, None]
        if V1 > 0:
            acc1 = acc1 * rescale[:, None]
        acc0, acc1 = add_dot(p.to(v0.dtype), v0, v1, acc0, acc1, V1, ACC, PRECISION)
    place = of_head * num_parts + split
    _store_part(partial, partial_lse2, place * G, acc0, acc1, row_max, row_sum, G, ROWS, DV, V0, V1)


@triton.jit
def _load_lse2(partial_lse2, place, num_parts, rows, G: tl.constexpr, PARTS: tl.constexpr, ACC: tl.constexpr):
    """Log-sum-exps, base 2, of parts `[PARTS, ROWS]`, and the largest of each row or 0; `-inf` where there is none."""
    part = tl.arange(0, PARTS)
    exists = (part < num_parts)[:, None] & (rows < G)[None, :]
    lse2 = tl.load(partial_lse2 + place + part[:, None] * G + rows[None, :], mask=exists, other=float("-inf")).to(ACC)
    largest = tl.max(lse2, 0)
    return lse2, tl.where(largest == float("-inf"), 0.0, largest)


@recordable(do_not_specialize=_LENGTHS)
def _importance_kernel(
    logits, partial_lse2, lengths, scores, num_tokens, capacity, num_splits, num_parts, num_blocks, span, programs,
    HEADS, NUM_QUERIES: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr, BLOCKS: tl.constexpr,
    RATIO: tl.constexpr, LENGTH: tl.constexpr, STRIDE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Importances of `span` selection blocks, `BLOCKS` at a time, to `scores [B, Tq, Hk, num_blocks]`."""
    SIZE: tl.constexpr = RATIO * STRIDE
    part, _, _, _, of_head, position = _find(lengths, num_tokens, programs, HEADS, NUM_QUERIES)
    count = _visible_blocks(position, capacity, LENGTH, STRIDE)
    begin = part * span
    end = tl.minimum(begin + span, tl.maximum(position + SIZE, 0) // SIZE)
    row = tl.arange(0, ROWS)
    lse2, largest = _load_lse2(partial_lse2, of_head * num_parts * G, num_splits, row, G, SPLITS, ACC)
    total = tl.sum(tl.exp2(lse2 - largest[None, :]), 0)
    lse2 = tl.where(total > 0, largest + tl.log2(tl.where(total > 0, total, 1.0)), float("inf"))
    logits += of_head * G * capacity + row.to(tl.int64)[:, None] * capacity

    share = tl.arange(0, RATIO) * STRIDE
    own_weight = (tl.minimum(LENGTH, SIZE - share) // STRIDE).to(ACC)
    next_weight = LENGTH // STRIDE - own_weight
    for start in range(begin, end, BLOCKS):
        importance = tl.zeros([BLOCKS], dtype=ACC)
        # Compressed blocks that start in the selection block, then those that reach into it from the one before.
        for back in tl.static_range(2 if LENGTH > STRIDE else 1):
            block = (start - back) * RATIO + tl.arange(0, BLOCKS * RATIO)
            seen = (block >= 0) & (block < count)
            s = tl.load(logits + block[None, :], mask=(row < G)[:, None] & seen[None, :], other=float("-inf"))
            p = tl.sum(tl.exp2(s - lse2[:, None]), 0)
            p = tl.reshape(p, [BLOCKS, RATIO])
            importance += tl.sum(p * (next_weight if back else own_weight)[None, :], 1)
        chosen = start + tl.arange(0, BLOCKS)
        tl.store(scores + of_head * num_blocks + chosen, importance, mask=chosen < end)


@recordable(do_not_specialize=_LENGTHS)
def _choose_kernel(
    scores, lengths, indices, num_tokens, num_blocks, HEADS, NUM_QUERIES: tl.constexpr, WANTED: tl.constexpr,
    INITIAL: tl.constexpr, LOCAL: tl.constexpr, SIZE: tl.constexpr, CANDIDATES: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """The best `WANTED` blocks of a query, ascending, then -1."""
    _, _, _, _, of_head, position = _find(lengths, num_tokens, 1, HEADS, NUM_QUERIES)
    own = tl.zeros([1, 1], tl.int32) + tl.maximum(position + SIZE, 0) // SIZE - 1
    block = tl.arange(0, CANDIDATES)[None, :]
    score = tl.load(scores + of_head * num_blocks + block, mask=block <= own, other=0.0)
    chosen, place = best_candidates(score, block, own, WANTED, INITIAL, LOCAL, 1, BITS)
    slot = tl.arange(0, CANDIDATES)[None, :]
    taken = tl.sum(chosen.to(tl.int32), 1)[:, None]
    indices += of_head * WANTED
    tl.store(indices + slot, tl.full([1, CANDIDATES], -1, tl.int32), mask=(slot >= taken) & (slot < WANTED))
    tl.store(indices + place, block, mask=chosen)


@recordable(do_not_specialize=_LENGTHS)
def _attend_kernel(
    q, k_slc, v_slc, k_win, v_win, lengths, indices, partial, partial_lse2, q_strides, k_slc_strides, v_slc_strides,
    k_win_strides, v_win_strides, num_tokens, ring_size, window, num_splits, num_selected, num_parts, scale_log2,
    HEADS, NUM_QUERIES: tl.constexpr, WANTED: tl.constexpr, SIZE: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, DK: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr,
    V1: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One part of the selected branch, or of the window branch, whose keys are in a ring."""
    part, head, batch, query, of_head, position = _find(lengths, num_tokens, num_parts - num_splits, HEADS, NUM_QUERIES)
    PIECES: tl.constexpr = SIZE // KEYS
    within = tl.arange(0, KEYS)
    in_window = part >= num_selected
    if in_window:
        steps = tl.cdiv(tl.minimum(window, position + 1), KEYS)
        span = tl.cdiv(steps, num_parts - num_splits - num_selected)
        begin = (part - num_selected) * span
        k = k_win + batch * k_win_strides[0] + head * k_win_strides[2]
        v = v_win + batch * v_win_strides[0] + head * v_win_strides[2]
        k_token = tl.cast(k_win_strides[1], tl.int64)
        v_token = tl.cast(v_win_strides[1], tl.int64)
    else:
        steps = WANTED * PIECES
        span = tl.cdiv(steps, num_selected)
        begin = part * span
        k = k_slc + batch * k_slc_strides[0] + head * k_slc_strides[2]
        v = v_slc + batch * v_slc_strides[0] + head * v_slc_strides[2]
        k_token = tl.cast(k_slc_strides[1], tl.int64)
        v_token = tl.cast(v_slc_strides[1], tl.int64)
    end = tl.minimum(begin + span, steps)
    indices += of_head * WANTED
    q0, q1 = _load_queries(q, q_strides, batch, query, head, G, ROWS, DK, K0, K1)
    row_max = tl.full([ROWS], float("-inf"), dtype=ACC)
    row_sum = tl.zeros([ROWS], dtype=ACC)
    acc0 = tl.zeros([ROWS, V0], dtype=ACC)
    acc1 = tl.zeros([ROWS, V1 if V1 > 0 else 16], dtype=ACC)
    for step in range(begin, end):
        block = tl.load(indices + step // PIECES, mask=part < num_selected, other=0)
        back = step * KEYS + within
        token = tl.where(in_window, position - back, block * SIZE + step % PIECES * KEYS + within)
        seen = tl.where(in_window, (back < window) & (token >= 0), (block >= 0) & (token <= position))
        slot = tl.where(in_window, tl.maximum(token, 0) % ring_size, token).to(tl.int64)
        k0, k1 = load_chunks(k, slot * k_token, seen, DK, K0, K1)
        v0, v1 = load_chunks(v, slot * v_token, seen, DV, V0, V1)
        s = dot_chunks(q0, q1, k0, k1, K1, ACC, PRECISION) * scale_log2
        s = tl.where(seen[None, :], s, float("-inf"))
        p, rescale, row_max = online_softmax_update(s, row_max, 1.0, True)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        acc0 = acc0 * rescale[:, None]
        if V1 > 0:
            acc1 = acc1 * rescale[:, None]
        acc0, acc1 = add_dot(p.to(v0.dtype), v0, v1, acc0, acc1, V1, ACC, PRECISION)
    place = of_head * num_parts + num_splits + part
    _store_part(partial, partial_lse2, place * G, acc0, acc1, row_max, row_sum, G, ROWS, DV, V0, V1)


@recordable(do_not_specialize=_LENGTHS)
def _merge_kernel(
    partial, partial_lse2, gates, out, gate_strides, num_splits, num_selected, num_parts, HEADS,
    NUM_QUERIES: tl.constexpr, G: tl.constexpr, PARTS: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """The gated sum of the branches of one query head; parts come compressed, selected, window."""
    query_head = tl.program_id(0) % (HEADS * G)
    row = (tl.program_id(0) // (HEADS * G)).to(tl.int64)
    part = tl.arange(0, PARTS)
    column = tl.arange(0, WIDTH)
    place = ((row * HEADS + query_head // G) * num_parts + part) * G + query_head % G
    exists = part < num_parts
    lse2 = tl.load(partial_lse2 + place, mask=exists, other=float("-inf")).to(ACC)
    inside = exists[:, None] & (column < DV)[None, :]
    outs = tl.load(partial + place[:, None] * DV + column[None, :], mask=inside, other=0.0).to(ACC)
    gates += row // NUM_QUERIES * gate_strides[0] + row % NUM_QUERIES * gate_strides[1] + query_head * gate_strides[2]
    branch = (part >= num_splits).to(tl.int32) + (part >= num_splits + num_selected).to(tl.int32)
    weight = tl.zeros([PARTS], dtype=ACC)
    for c in tl.static_range(3):
        of_branch = tl.where(branch == c, lse2, float("-inf"))
        largest = tl.max(of_branch, 0)
        share = tl.exp2(of_branch - tl.where(largest == float("-inf"), 0.0, largest))
        total = tl.sum(share, 0)
        weight += share * (tl.load(gates + c * gate_strides[3]).to(ACC) / tl.where(total == 0, 1.0, total))
    out += (row * HEADS * G + query_head) * DV
    tl.store(out + column, tl.sum(weight[:, None] * outs, 0).to(out.dtype.element_ty), mask=column < DV)


class _Parts(NamedTuple):
    """How many programs share a query head: parts of the compressed, of the selected and of the window branch."""

    compressed: int
    selected: int
    window: int


def decode_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    lengths: Tensor,
    gates: Tensor,
    config: NSAConfig,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output `[B, Tq, Hq, Dv]` and the indices used; see `nsa.decode.decode_attention`."""
    heads, (batch, num_queries, query_heads, _) = Heads.of(q, k_slc, v_slc), q.shape
    acc = accumulation_dtype(q.dtype)
    q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win = map(rows_contiguous, (q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win))
    kv_heads, group, rows = k_slc.shape[2], heads.group, batch * num_queries
    wanted, size, window = config.num_selected_blocks, config.select_block_size, config.window_size
    num_tokens, capacity = k_slc.shape[1], k_cmp.shape[1]
    num_blocks = cdiv(num_tokens, size)
    indices = q.new_empty(batch, num_queries, kv_heads, wanted, dtype=torch.int32)
    out = q.new_empty(batch, num_queries, query_heads, v_slc.shape[3])
    if not rows:
        return out, indices
    # Wide rows come fewer at a time: three steps of keys and values lie in shared memory.
    row_bytes = (q.shape[3] + v_slc.shape[3]) * q.element_size()
    keys = min(size, max(16, _KEYS * 512 // next_power_of_2(max(512, row_bytes))))
    # Parts are as many as fill the device, and no more: each writes a result and starts with an empty pipeline.
    wave = cdiv(_PROGRAMS * multiprocessors(q.device), rows * kv_heads)
    parts = _Parts(
        compressed=max(1, min(wave, cdiv(capacity, keys), _MOST_PARTS)),
        selected=min(wave, wanted * (size // keys), _MOST_PARTS),
        window=min(cdiv(wave, 2), cdiv(window, keys), _MOST_PARTS),
    )
    num_parts = sum(parts)
    logits = q.new_empty(rows * query_heads * capacity, dtype=acc)
    partial = q.new_empty(rows * query_heads * num_parts, v_slc.shape[3], dtype=acc)
    partial_lse2 = q.new_empty(rows * query_heads * num_parts, dtype=acc)
    scores = q.new_empty(rows * kv_heads * num_blocks, dtype=acc)

    of_group: dict[str, Any] = {"NUM_QUERIES": num_queries, "G": group, "ROWS": max(16, next_power_of_2(group))}
    constants = {**heads.constants(), **of_group, "KEYS": keys}
    of_blocks = {"LENGTH": config.compress_block_size, "STRIDE": config.compress_stride}
    strides = q.stride()[:3]
    with torch.cuda.device_of(q):
        _compressed_kernel[(parts.compressed * kv_heads * rows, 1, 1)](
            q, k_cmp, v_cmp, lengths, logits, partial, partial_lse2, strides, k_cmp.stride()[:3], v_cmp.stride()[:3],
            num_tokens, capacity, parts.compressed, num_parts, scale * LOG2E.value, kv_heads, **constants,
            **of_blocks, num_stages=3,
        )  # fmt: skip
        if wanted:
            ratio, bits = size // config.compress_stride, 8 * acc.itemsize
            blocks, candidates = max(1, 256 // ratio), max(16, next_power_of_2(max(num_blocks, wanted)))
            spans = min(wave, cdiv(num_blocks, blocks))
            _importance_kernel[(spans * kv_heads * rows, 1, 1)](
                logits, partial_lse2, lengths, scores, num_tokens, capacity, parts.compressed, num_parts, num_blocks,
                cdiv(cdiv(num_blocks, spans), blocks) * blocks, spans, kv_heads, **of_group, **of_blocks,
                SPLITS=next_power_of_2(parts.compressed), BLOCKS=blocks, RATIO=ratio, ACC=constants["ACC"],
            )  # fmt: skip
            _choose_kernel[(kv_heads * rows, 1, 1)](
                scores, lengths, indices, num_tokens, num_blocks, kv_heads, NUM_QUERIES=num_queries, WANTED=wanted,
                INITIAL=config.num_initial_blocks, LOCAL=config.num_local_blocks, SIZE=size, CANDIDATES=candidates,
                BITS=tl.int64 if bits == 64 else tl.int32,
                num_warps=min(16, max(1, candidates // 1024)),
            )  # fmt: skip
        if parts.selected + parts.window:
            _attend_kernel[((parts.selected + parts.window) * kv_heads * rows, 1, 1)](
                q, k_slc, v_slc, k_win, v_win, lengths, indices, partial, partial_lse2, strides, k_slc.stride()[:3],
                v_slc.stride()[:3], k_win.stride()[:3], v_win.stride()[:3], num_tokens, max(1, k_win.shape[1]), window,
                parts.compressed, parts.selected, num_parts, scale * LOG2E.value, kv_heads, **constants,
                WANTED=wanted, SIZE=size, num_stages=3,
            )  # fmt: skip
        merged = {"PARTS": next_power_of_2(num_parts), "WIDTH": next_power_of_2(v_slc.shape[3])}
        _merge_kernel[(query_heads * rows, 1, 1)](
            partial, partial_lse2, gates, out, gates.stride(), parts.compressed, parts.selected, num_parts, kv_heads,
            NUM_QUERIES=num_queries, G=group, DV=v_slc.shape[3], ACC=constants["ACC"], **merged,
            num_warps=min(8, max(1, merged["PARTS"] * merged["WIDTH"] // 1024)),
        )  # fmt: skip
    return out, indices
