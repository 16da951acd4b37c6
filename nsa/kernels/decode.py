"""Attention of a new token of each sequence over the keys and values in a cache (paper, section 3.3).

A step reads little and computes less, so its time is that of reading, if enough programs read at once. A program has
the `G` query heads of a KV head, which share their keys, and a part of these:

1. `_first_kernel`: the compressed blocks and the window, in parts, each with its softmax. Of the compressed
   probabilities it keeps sums over the blocks that start in the same selection block, as they are weighted there;
2. `_select_kernel`: from these sums and the log-sum-exps of all parts, the importance of the selection blocks. Several
   programs share a query, and the last one to end takes the best, as in `nsa.kernels.select`;
3. `_selected_kernel`: the selected blocks, in parts of their own;
4. `_merge_kernel`: the parts of each branch by their log-sum-exps, and the gated sum of the branches.

How long sequences are is read on the device, and grids follow from what there is room for in the cache. So launches are
the same at every step, and a CUDA graph of them goes on from step to step.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.config import NSAConfig
from nsa.kernels.configs import multiprocessors, starts_early
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

_PROGRAMS, _LEAST_PARTS = 2, 3
"""Programs a multiprocessor of each of the kernels that read keys, and parts of a branch at least, as long programs end
at different times."""

_STAGES = 3
"""Tiles of keys in shared memory."""

_SPANS = 16
"""Programs of the second kernel that share a query, at most."""

_FEW = 32
"""Pairs of a query and a KV head up to which kernels start early. Programs that wait take the places of others."""

_SCORED = 64
"""Sums over compressed blocks that a program of the second kernel has at a time."""

# Sizes that change from cache to cache and are no reason to compile again.
_LENGTHS = (
    "num_tokens",
    "capacity",
    "num_splits",
    "num_window",
    "num_blocks",
    "num_shares",
    "num_tiles",
    "span",
    "ring_size",
    "window",
    "num_parts",
    "programs",
)


@triton.jit
def _follow(EARLY: tl.constexpr):
    """Lets the next kernel's programs start, and waits for the end of the kernel before: starting takes its time."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def _find(lengths, num_tokens, programs, HEADS, NUM_QUERIES: tl.constexpr):
    """A program's part of `programs`, KV head, batch row, query, its row `(batch, query, KV head)` and position.

    The last `NUM_QUERIES` tokens of each sequence are the queries. None lies beyond what the cache has room for.
    Neighbouring programs have the heads of one query, whose keys lie side by side, and the parts with the most to read
    go first.
    """
    pairs = tl.num_programs(0) // programs
    part = tl.program_id(0) // pairs
    of_head = tl.program_id(0) % pairs
    head = of_head % HEADS
    row = of_head // HEADS
    batch = row // NUM_QUERIES
    query = row % NUM_QUERIES
    position = tl.minimum(tl.load(lengths + batch), num_tokens).to(tl.int32) - NUM_QUERIES + query
    return part, head.to(tl.int64), batch.to(tl.int64), query, of_head.to(tl.int64), position


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


@triton.jit
def _attend(
    q0, q1, k0, k1, v0, v1, seen, row_max, row_sum, acc0, acc1, scale_log2, K1: tl.constexpr, V1: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Takes a tile of keys in: its weights `[ROWS, KEYS]`, relative to the new maxima, and the new state."""
    s = dot_chunks(q0, q1, k0, k1, K1, ACC, PRECISION) * scale_log2
    s = tl.where(seen[None, :], s, float("-inf"))
    p, rescale, row_max = online_softmax_update(s, row_max, 1.0, True)
    row_sum = row_sum * rescale + tl.sum(p, 1)
    acc0 = acc0 * rescale[:, None]
    if V1 > 0:
        acc1 = acc1 * rescale[:, None]
    acc0, acc1 = add_dot(p.to(v0.dtype), v0, v1, acc0, acc1, V1, ACC, PRECISION)
    return p, row_max, row_sum, acc0, acc1


@recordable(do_not_specialize=_LENGTHS)
def _first_kernel(
    q, k_cmp, v_cmp, k_win, v_win, lengths, shares, maxima, arrived, partial, partial_lse2, q_strides, k_cmp_strides,
    v_cmp_strides, k_win_strides, v_win_strides, num_tokens, capacity, ring_size, window, num_splits, num_window,
    num_parts, num_shares, num_tiles, scale_log2, HEADS, NUM_QUERIES: tl.constexpr, G: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, RATIO: tl.constexpr, SHARE: tl.constexpr, LENGTH: tl.constexpr,
    STRIDE: tl.constexpr, WANTED: tl.constexpr, DK: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
    DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One part of the compressed branch, or of the window branch, whose keys are in a ring.

    For the selection, it stores the sum of the weights of each `SHARE` compressed blocks, times the strides in common
    with the selection block that they start in and with the next one, to `shares [B, Tq, Hk, G, 2, num_shares]`, and
    the maxima that the weights of a tile are relative to, to `maxima [B, Tq, Hk, num_tiles, G]`. It sets `arrived
    [B, Tq, Hk]` to 0.
    """
    _follow(EARLY)
    SIZE: tl.constexpr = RATIO * STRIDE
    part, head, batch, query, of_head, position = _find(
        lengths, num_tokens, num_splits + num_window, HEADS, NUM_QUERIES
    )
    in_window = part >= num_splits
    if in_window:
        end = tl.minimum(window, position + 1)
        span = tl.cdiv(tl.cdiv(end, KEYS), num_window) * KEYS
        begin = (part - num_splits) * span
        k = k_win + batch * k_win_strides[0] + head * k_win_strides[2]
        v = v_win + batch * v_win_strides[0] + head * v_win_strides[2]
        k_row = tl.cast(k_win_strides[1], tl.int64)
        v_row = tl.cast(v_win_strides[1], tl.int64)
    else:
        end = _visible_blocks(position, capacity, LENGTH, STRIDE)
        # Parts are equal in what there is, not in what there is room for.
        span = tl.cdiv(tl.cdiv(end, num_splits), KEYS) * KEYS
        begin = part * span
        k = k_cmp + batch * k_cmp_strides[0] + head * k_cmp_strides[2]
        v = v_cmp + batch * v_cmp_strides[0] + head * v_cmp_strides[2]
        k_row = tl.cast(k_cmp_strides[1], tl.int64)
        v_row = tl.cast(v_cmp_strides[1], tl.int64)
    end = tl.minimum(begin + span, end)
    tl.store(arrived + of_head, 0, mask=part == 0)
    q0, q1 = _load_queries(q, q_strides, batch, query, head, G, ROWS, DK, K0, K1)
    row = tl.arange(0, ROWS)
    within = tl.arange(0, KEYS)
    share = tl.arange(0, KEYS // SHARE)
    shares += (of_head * G + row)[:, None] * 2 * num_shares
    maxima += of_head * num_tiles * G
    row_max = tl.full([ROWS], float("-inf"), dtype=ACC)
    row_sum = tl.zeros([ROWS], dtype=ACC)
    acc0 = tl.zeros([ROWS, V0], dtype=ACC)
    acc1 = tl.zeros([ROWS, V1 if V1 > 0 else 16], dtype=ACC)
    for start in range(begin, end, KEYS):
        key = start + within
        seen = key < end
        slot = tl.where(in_window, tl.maximum(position - key, 0) % ring_size, key).to(tl.int64)
        k0, k1 = load_chunks(k, slot * k_row, seen, DK, K0, K1)
        v0, v1 = load_chunks(v, slot * v_row, seen, DV, V0, V1)
        p, row_max, row_sum, acc0, acc1 = _attend(
            q0, q1, k0, k1, v0, v1, seen, row_max, row_sum, acc0, acc1, scale_log2, K1, V1, ACC, PRECISION
        )
        if WANTED > 0:
            first_token = key % RATIO * STRIDE
            own_weight = tl.minimum(LENGTH, SIZE - first_token) // STRIDE
            inside = (row < G)[:, None] & ((start + share * SHARE < end) & (part < num_splits))[None, :]
            place = start // SHARE + share[None, :]
            own = tl.sum(tl.reshape(p * own_weight.to(ACC)[None, :], [ROWS, KEYS // SHARE, SHARE]), 2)
            tl.store(shares + place, own, mask=inside)
            if LENGTH > STRIDE:
                next_weight = (LENGTH // STRIDE - own_weight).to(ACC)
                into_next = tl.sum(tl.reshape(p * next_weight[None, :], [ROWS, KEYS // SHARE, SHARE]), 2)
                tl.store(shares + num_shares + place, into_next, mask=inside)
            tl.store(maxima + start // KEYS * G + row, row_max, mask=(row < G) & (part < num_splits))
    place = of_head * num_parts + part
    _store_part(partial, partial_lse2, place * G, acc0, acc1, row_max, row_sum, G, ROWS, DV, V0, V1)


@triton.jit
def _load_lse2(partial_lse2, place, num_parts, rows, G: tl.constexpr, PARTS: tl.constexpr, ACC: tl.constexpr):
    """Log-sum-exps, base 2, of parts `[PARTS, ROWS]`; `-inf` where there is none."""
    part = tl.arange(0, PARTS)
    exists = (part < num_parts)[:, None] & (rows < G)[None, :]
    return tl.load(partial_lse2 + place + part[:, None] * G + rows[None, :], mask=exists, other=float("-inf")).to(ACC)


@recordable(do_not_specialize=_LENGTHS)
def _select_kernel(
    shares, maxima, arrived, partial_lse2, lengths, scores, indices, num_tokens, capacity, num_splits, num_parts,
    num_blocks, num_shares, num_tiles, span, programs, HEADS, NUM_QUERIES: tl.constexpr, G: tl.constexpr,
    ROWS: tl.constexpr, SPLITS: tl.constexpr, BLOCKS: tl.constexpr, KEYS: tl.constexpr, RATIO: tl.constexpr,
    SHARE: tl.constexpr, LENGTH: tl.constexpr, STRIDE: tl.constexpr, ACC: tl.constexpr, WANTED: tl.constexpr,
    INITIAL: tl.constexpr, LOCAL: tl.constexpr, CANDIDATES: tl.constexpr, BITS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Importances of `span` selection blocks, `BLOCKS` at a time, to `scores [B, Tq, Hk, num_blocks]`; the last program
    of a query stores its best `WANTED` blocks, ascending, then -1."""
    _follow(EARLY)
    SIZE: tl.constexpr = RATIO * STRIDE
    PIECES: tl.constexpr = RATIO // SHARE
    part, _, _, _, of_head, position = _find(lengths, num_tokens, programs, HEADS, NUM_QUERIES)
    count = _visible_blocks(position, capacity, LENGTH, STRIDE)
    own = tl.maximum(position + SIZE, 0) // SIZE - 1
    begin = part * span
    end = tl.minimum(begin + span, own + 1)
    row = tl.arange(0, ROWS)
    lse2 = _load_lse2(partial_lse2, of_head * num_parts * G, num_splits, row, G, SPLITS, ACC)
    largest = tl.max(lse2, 0)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(tl.exp2(lse2 - largest[None, :]), 0)
    lse2 = tl.where(total > 0, largest + tl.log2(tl.where(total > 0, total, 1.0)), float("inf"))
    shares += (of_head * G + row)[:, None] * 2 * num_shares
    maxima += of_head * num_tiles * G + row[:, None]
    scores += of_head * num_blocks
    for start in range(begin, end, BLOCKS):
        importance = tl.zeros([BLOCKS], dtype=ACC)
        # Compressed blocks that start in the selection block, then those that reach into it from the one before.
        for back in tl.static_range(2 if LENGTH > STRIDE else 1):
            share = (start - back) * PIECES + tl.arange(0, BLOCKS * PIECES)
            exists = (row < G)[:, None] & ((share >= 0) & (share * SHARE < count))[None, :]
            weight = tl.load(shares + back * num_shares + share[None, :], mask=exists, other=0.0)
            row_max = tl.load(maxima + (share * SHARE // KEYS)[None, :] * G, mask=exists, other=float("-inf"))
            weight = tl.sum(weight * tl.exp2(row_max - lse2[:, None]), 0)
            importance += tl.sum(tl.reshape(weight, [BLOCKS, PIECES]), 1)
        block = start + tl.arange(0, BLOCKS)
        tl.store(scores + block, importance, mask=block < end)

    tl.debug_barrier()  # the counter says that all threads have stored
    if tl.atomic_add(arrived + of_head, 1, sem="acq_rel") == programs - 1:
        last = tl.zeros([1, 1], tl.int32) + own
        block = tl.arange(0, CANDIDATES)[None, :]
        score = tl.load(scores + block, mask=block <= last, other=0.0)
        chosen, place = best_candidates(score, block, last, WANTED, INITIAL, LOCAL, 1, BITS)
        taken = tl.sum(chosen.to(tl.int32), 1)[:, None]
        indices += of_head * WANTED
        tl.store(indices + block, tl.full([1, CANDIDATES], -1, tl.int32), mask=(block >= taken) & (block < WANTED))
        tl.store(indices + place, block, mask=chosen)


@recordable(do_not_specialize=_LENGTHS)
def _selected_kernel(
    q, k, v, lengths, indices, partial, partial_lse2, q_strides, k_strides, v_strides, num_tokens, programs, num_parts,
    scale_log2, HEADS, NUM_QUERIES: tl.constexpr, WANTED: tl.constexpr, SIZE: tl.constexpr, G: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DK: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, DV: tl.constexpr,
    V0: tl.constexpr, V1: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One part of the selected branch, whose parts are the last `programs`."""
    _follow(EARLY)
    part, head, batch, query, of_head, position = _find(lengths, num_tokens, programs, HEADS, NUM_QUERIES)
    PIECES: tl.constexpr = SIZE // KEYS
    span = tl.cdiv(WANTED * PIECES, programs)
    begin = part * span
    end = tl.minimum(begin + span, WANTED * PIECES)
    k += batch * k_strides[0] + head * k_strides[2]
    v += batch * v_strides[0] + head * v_strides[2]
    indices += of_head * WANTED
    q0, q1 = _load_queries(q, q_strides, batch, query, head, G, ROWS, DK, K0, K1)
    row_max = tl.full([ROWS], float("-inf"), dtype=ACC)
    row_sum = tl.zeros([ROWS], dtype=ACC)
    acc0 = tl.zeros([ROWS, V0], dtype=ACC)
    acc1 = tl.zeros([ROWS, V1 if V1 > 0 else 16], dtype=ACC)
    for step in range(begin, end):
        block = tl.load(indices + step // PIECES)
        token = block * SIZE + step % PIECES * KEYS + tl.arange(0, KEYS)
        seen = (block >= 0) & (token <= position)
        k0, k1 = load_chunks(k, token.to(tl.int64) * k_strides[1], seen, DK, K0, K1)
        v0, v1 = load_chunks(v, token.to(tl.int64) * v_strides[1], seen, DV, V0, V1)
        _, row_max, row_sum, acc0, acc1 = _attend(
            q0, q1, k0, k1, v0, v1, seen, row_max, row_sum, acc0, acc1, scale_log2, K1, V1, ACC, PRECISION
        )
    place = of_head * num_parts + num_parts - programs + part
    _store_part(partial, partial_lse2, place * G, acc0, acc1, row_max, row_sum, G, ROWS, DV, V0, V1)


@recordable(do_not_specialize=_LENGTHS)
def _merge_kernel(
    partial, partial_lse2, gates, out, gate_strides, num_splits, num_window, num_parts, HEADS,
    NUM_QUERIES: tl.constexpr, G: tl.constexpr, PARTS: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr,
    ACC: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The gated sum of the branches of one query head; parts come compressed, window, selected."""
    _follow(EARLY)
    member, head, row = find_program(tl.program_id(0), G, HEADS)
    of_head = row.to(tl.int64) * HEADS + head
    part = tl.arange(0, PARTS)
    column = tl.arange(0, WIDTH)
    exists = part < num_parts
    place = (of_head * num_parts + part) * G + member
    lse2 = tl.load(partial_lse2 + place, mask=exists, other=float("-inf")).to(ACC)
    inside = exists[:, None] & (column < DV)[None, :]
    outs = tl.load(partial + place[:, None] * DV + column[None, :], mask=inside, other=0.0).to(ACC)
    gates += row // NUM_QUERIES * gate_strides[0] + row % NUM_QUERIES * gate_strides[1]
    gates += (head * G + member) * gate_strides[2]
    branch = tl.where(part < num_splits, 0, tl.where(part < num_splits + num_window, 2, 1))
    weight = tl.zeros([PARTS], dtype=ACC)
    for c in tl.static_range(3):
        of_branch = tl.where(branch == c, lse2, float("-inf"))
        largest = tl.max(of_branch, 0)
        share = tl.exp2(of_branch - tl.where(largest == float("-inf"), 0.0, largest))
        total = tl.sum(share, 0)
        weight += share * (tl.load(gates + c * gate_strides[3]).to(ACC) / tl.where(total == 0, 1.0, total))
    out += (of_head * G + member) * DV
    tl.store(out + column, tl.sum(weight[:, None] * outs, 0).to(out.dtype.element_ty), mask=column < DV)


class _Parts(NamedTuple):
    """How many programs share a query head: parts of the compressed, of the window and of the selected branch."""

    compressed: int
    window: int
    selected: int

    @staticmethod
    def of(wave: int, tiles: "_Parts") -> "_Parts":
        """At most `wave` parts, half as many of the window, that share `tiles` of keys out evenly."""
        most = _Parts(wave, cdiv(wave, 2), wave)
        return _Parts._make(
            cdiv(count, cdiv(count, min(limit, _MOST_PARTS))) if count else 0
            for count, limit in zip(tiles, most, strict=True)
        )


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
    wave = max(_LEAST_PARTS, _PROGRAMS * multiprocessors(q.device) // (rows * kv_heads))
    tiles = _Parts(max(1, cdiv(capacity, keys)), cdiv(window, keys), wanted * (size // keys))
    parts = _Parts.of(wave, tiles)
    num_parts = sum(parts)
    ratio = size // config.compress_stride
    share = min(ratio, keys)
    num_shares = cdiv(capacity, share)
    shares = q.new_empty(rows * query_heads * 2 * num_shares, dtype=acc)
    maxima = q.new_empty(rows * query_heads * tiles.compressed, dtype=acc)
    arrived = q.new_empty(rows * kv_heads, dtype=torch.int32)
    partial = q.new_empty(rows * query_heads * num_parts, v_slc.shape[3], dtype=acc)
    partial_lse2 = q.new_empty(rows * query_heads * num_parts, dtype=acc)
    scores = q.new_empty(rows * kv_heads * num_blocks, dtype=acc)

    of_query: dict[str, Any] = {"NUM_QUERIES": num_queries, "G": group, "EARLY": False}
    if rows * kv_heads <= _FEW and starts_early(q.device):
        of_query |= {"EARLY": True, "launch_pdl": True}
    of_group = {**of_query, "ROWS": max(16, next_power_of_2(group))}
    of_blocks = {"KEYS": keys, "RATIO": ratio, "SHARE": share}
    of_blocks |= {"LENGTH": config.compress_block_size, "STRIDE": config.compress_stride}
    constants = {**heads.constants(), **of_group}
    strides = [x.stride()[:3] for x in (q, k_cmp, v_cmp, k_win, v_win)]
    with torch.cuda.device_of(q):
        _first_kernel[((parts.compressed + parts.window) * kv_heads * rows, 1, 1)](
            q, k_cmp, v_cmp, k_win, v_win, lengths, shares, maxima, arrived, partial, partial_lse2, *strides,
            num_tokens, capacity, max(1, k_win.shape[1]), window, parts.compressed, parts.window, num_parts,
            num_shares, tiles.compressed, scale * LOG2E.value, kv_heads, **constants, **of_blocks, WANTED=wanted,
            num_stages=_STAGES,
        )  # fmt: skip
        if wanted:
            bits, candidates = 8 * acc.itemsize, max(16, next_power_of_2(max(num_blocks, wanted)))
            blocks = max(1, _SCORED * share // ratio)
            spans = min(_SPANS, cdiv(num_blocks, blocks))
            _select_kernel[(spans * kv_heads * rows, 1, 1)](
                shares, maxima, arrived, partial_lse2, lengths, scores, indices, num_tokens, capacity,
                parts.compressed, num_parts, num_blocks, num_shares, tiles.compressed,
                cdiv(cdiv(num_blocks, spans), blocks) * blocks, spans, kv_heads, **of_group, **of_blocks,
                SPLITS=next_power_of_2(parts.compressed), BLOCKS=blocks, ACC=constants["ACC"], WANTED=wanted,
                INITIAL=config.num_initial_blocks, LOCAL=config.num_local_blocks, CANDIDATES=candidates,
                BITS=tl.int64 if bits == 64 else tl.int32, num_warps=min(16, max(1, candidates // 1024)),
            )  # fmt: skip
            _selected_kernel[(parts.selected * kv_heads * rows, 1, 1)](
                q, k_slc, v_slc, lengths, indices, partial, partial_lse2, q.stride()[:3], k_slc.stride()[:3],
                v_slc.stride()[:3], num_tokens, parts.selected, num_parts, scale * LOG2E.value, kv_heads, **constants,
                WANTED=wanted, SIZE=size, KEYS=keys, num_stages=_STAGES,
            )  # fmt: skip
        merged = {"PARTS": next_power_of_2(num_parts), "WIDTH": next_power_of_2(v_slc.shape[3])}
        _merge_kernel[(query_heads * rows, 1, 1)](
            partial, partial_lse2, gates, out, gates.stride(), parts.compressed, parts.window, num_parts, kv_heads,
            **of_query, DV=v_slc.shape[3], ACC=constants["ACC"], **merged,
            num_warps=min(8, max(1, merged["PARTS"] * merged["WIDTH"] // 1024)),
        )  # fmt: skip
    return out, indices
