"""Attention of a new token of each sequence over the keys and values in a cache (paper, section 3.3).

A step reads little and computes less, so its time is that of reading, if enough programs read at once. A program has
the `G` query heads of a KV head, which share their keys, and a part of these:

1. `_compressed_kernel`: the compressed blocks, in parts, each with its softmax. For the selection it keeps sums of the
   probabilities over the blocks that start in the same selection block, as they are weighted there;
2. `_token_kernel`: the window and the selected blocks, in parts of their own. Those of the window read while the first
   kernel ends. Each part of the selected branch chooses the blocks itself, as in `nsa.kernels.select`, from the sums
   and the log-sum-exps of all parts: it is little to read, and nobody waits for another program. All write the same.
   Of long contexts it is too much, and `_select_kernel` does it once, before;
3. `_merge_kernel`: the parts of each branch by their log-sum-exps, and the gated sum of the branches.

On GPUs where a kernel can start before the one before has ended, every program waits for that end before it reads what
that kernel wrote, and before it lets programs of the next kernel start. So whoever has not waited yet may read whatever
is older than the kernel before.

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
    start_next,
    store_chunks,
    wait_for_previous,
)
from nsa.kernels.select import best_candidates
from nsa.ops import accumulation_dtype

_KEYS = 64
"""Keys that a program has at a time, at most."""

_MOST_PARTS = 32
"""Largest number of parts of a branch: those of all branches are merged as one tile."""

_PROGRAMS, _LEAST_PARTS = 3, 3
"""Programs a multiprocessor of each of the kernels that read keys, and parts of a branch at least, as long programs end
at different times."""

_STAGES = 3
"""Tiles of keys in shared memory."""

_FEW = 32
"""Pairs of a query and a KV head up to which programs of the last kernel start at once; of more, after what is read."""

_SUMS = 4096
"""Sums over compressed blocks that a program has at a time when it chooses; of more, the next are read meanwhile."""

_MOST_CANDIDATES = 512
"""Selection blocks among which every part of the selected branch chooses for itself."""

# Sizes that change from cache to cache and are no reason to compile again.
_LENGTHS = ("num_tokens", "capacity", "num_splits", "num_window", "num_tiles", "ring_size", "window", "num_parts")


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
    partial, partial_lse2, of_head, part, num_parts, acc0, acc1, row_max, row_sum, G: tl.constexpr,
    ROWS: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
):  # fmt: skip
    """A part's output of each query head to `partial [B, Tq, Hk, num_parts, G, Dv]`, and its log-sum-exp, base 2, to
    `partial_lse2 [B, Tq, Hk, G, num_parts]`."""
    row = tl.arange(0, ROWS)
    empty = row_sum == 0
    row_sum = tl.where(empty, 1.0, row_sum)
    lse2 = tl.where(empty, float("-inf"), row_max + tl.log2(row_sum))
    tl.store(partial_lse2 + (of_head * G + row) * num_parts + part, lse2, mask=row < G)
    acc0 = acc0 / row_sum[:, None]
    acc1 = acc1 / row_sum[:, None]
    place = (of_head * num_parts + part) * G + row
    store_chunks(partial, place * DV, row < G, acc0, acc1, DV, V0, V1)


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
def _compressed_kernel(
    q, k, v, lengths, shares, maxima, partial, partial_lse2, q_strides, k_strides, v_strides, num_tokens, capacity,
    num_splits, num_parts, num_tiles, scale_log2, HEADS, NUM_QUERIES: tl.constexpr, G: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, RATIO: tl.constexpr, SHARE: tl.constexpr, LENGTH: tl.constexpr,
    STRIDE: tl.constexpr, WANTED: tl.constexpr, DK: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
    DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One part of the compressed branch.

    For the selection, it stores the sum of the weights of each `SHARE` compressed blocks, times the strides in common
    with the selection block that they start in and with the next one, to `shares [B, Tq, Hk, num_tiles, 2, KEYS //
    SHARE, G]`, and the maxima that the weights of a tile are relative to, to `maxima [B, Tq, Hk, num_tiles, G]`.
    """
    start_next(EARLY)
    SIZE: tl.constexpr = RATIO * STRIDE
    SHARES: tl.constexpr = KEYS // SHARE
    part, head, batch, query, of_head, position = _find(lengths, num_tokens, num_splits, HEADS, NUM_QUERIES)
    q0, q1 = _load_queries(q, q_strides, batch, query, head, G, ROWS, DK, K0, K1)
    count = _visible_blocks(position, capacity, LENGTH, STRIDE)
    # Parts are equal in what there is, not in what there is room for.
    span = tl.cdiv(tl.cdiv(count, num_splits), KEYS) * KEYS
    begin = part * span
    end = tl.minimum(begin + span, count)
    k += batch * k_strides[0] + head * k_strides[2]
    v += batch * v_strides[0] + head * v_strides[2]
    row = tl.arange(0, ROWS)
    share = tl.arange(0, SHARES)[None, :]
    row_max = tl.full([ROWS], float("-inf"), dtype=ACC)
    row_sum = tl.zeros([ROWS], dtype=ACC)
    acc0 = tl.zeros([ROWS, V0], dtype=ACC)
    acc1 = tl.zeros([ROWS, V1 if V1 > 0 else 16], dtype=ACC)
    for start in range(begin, end, KEYS):
        key = start + tl.arange(0, KEYS)
        seen = key < end
        k0, k1 = load_chunks(k, key.to(tl.int64) * k_strides[1], seen, DK, K0, K1)
        v0, v1 = load_chunks(v, key.to(tl.int64) * v_strides[1], seen, DV, V0, V1)
        p, row_max, row_sum, acc0, acc1 = _attend(
            q0, q1, k0, k1, v0, v1, seen, row_max, row_sum, acc0, acc1, scale_log2, K1, V1, ACC, PRECISION
        )
        if WANTED > 0:
            tile = of_head * num_tiles + start // KEYS
            first_token = key % RATIO * STRIDE
            own_weight = tl.minimum(LENGTH, SIZE - first_token) // STRIDE
            inside = (row < G)[:, None] & (start + share * SHARE < end)
            place = shares + tile * (2 * SHARES * G) + share * G + row[:, None]
            own = tl.sum(tl.reshape(p * own_weight.to(ACC)[None, :], [ROWS, SHARES, SHARE]), 2)
            tl.store(place, own, mask=inside)
            if LENGTH > STRIDE:
                next_weight = (LENGTH // STRIDE - own_weight).to(ACC)
                into_next = tl.sum(tl.reshape(p * next_weight[None, :], [ROWS, SHARES, SHARE]), 2)
                tl.store(place + SHARES * G, into_next, mask=inside)
            tl.store(maxima + tile * G + row, row_max, mask=row < G)
    _store_part(partial, partial_lse2, of_head, part, num_parts, acc0, acc1, row_max, row_sum, G, ROWS, DV, V0, V1)


@triton.jit
def _choose(
    shares, maxima, partial_lse2, scores, indices, of_head, position, capacity, num_splits, num_parts, num_tiles,
    G: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr, TILES: tl.constexpr, KEYS: tl.constexpr,
    RATIO: tl.constexpr, SHARE: tl.constexpr, LENGTH: tl.constexpr, STRIDE: tl.constexpr, ACC: tl.constexpr,
    WANTED: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr, CANDIDATES: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Stores the best `WANTED` blocks of a query, ascending, then -1, to `indices [B, Tq, Hk, WANTED]`.

    `scores [B, Tq, Hk, 2, num_tiles * KEYS // SHARE]` is for the sums over query heads. Other programs may do the same
    at the same time: they write the same.
    """
    SIZE: tl.constexpr = RATIO * STRIDE
    SHARES: tl.constexpr = KEYS // SHARE
    PIECES: tl.constexpr = RATIO // SHARE
    BEYOND: tl.constexpr = LENGTH > STRIDE
    count = _visible_blocks(position, capacity, LENGTH, STRIDE)
    num_shares = num_tiles * SHARES
    row = tl.arange(0, ROWS)
    part = tl.arange(0, SPLITS)
    exists = (row < G)[:, None] & (part < num_splits)[None, :]
    lse2 = partial_lse2 + (of_head * G + row[:, None]) * num_parts + part[None, :]
    lse2 = tl.load(lse2, mask=exists, other=float("-inf")).to(ACC)
    largest = tl.max(lse2, 1)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(tl.exp2(lse2 - largest[:, None]), 1)
    lse2 = tl.where(total > 0, largest + tl.log2(tl.where(total > 0, total, 1.0)), float("inf"))
    shares += of_head * num_tiles * (2 * SHARES * G)
    maxima += of_head * num_tiles * G
    scores += of_head * 2 * num_shares
    share = tl.arange(0, SHARES)
    member = row[None, None, :]
    for first in tl.range(0, tl.cdiv(count, KEYS), TILES, num_stages=1 if TILES * KEYS >= CANDIDATES * RATIO else 3):
        tile = first + tl.arange(0, TILES)
        within = tile[:, None] * SHARES + share[None, :]
        seen = within * SHARE < count
        inside = seen[:, :, None] & (member < G)
        of_tile = (tile * KEYS < count)[:, None, None] & (member < G)
        row_max = tl.load(maxima + tile[:, None, None] * G + member, mask=of_tile, other=float("-inf"))
        factor = tl.exp2(row_max - lse2[None, None, :])
        place = shares + tile[:, None, None] * (2 * SHARES * G) + share[None, :, None] * G + member
        own = tl.load(place, mask=inside, other=0.0)
        if BEYOND:
            into_next = tl.load(place + SHARES * G, mask=inside, other=0.0)
            tl.store(scores + num_shares + within, tl.sum(into_next * factor, 2), mask=seen)
        tl.store(scores + within, tl.sum(own * factor, 2), mask=seen)

    tl.debug_barrier()  # all threads have stored
    block = tl.arange(0, CANDIDATES)[None, :]
    score = tl.zeros([1, CANDIDATES], dtype=ACC)
    for piece in range(PIECES):
        at = block * PIECES + piece
        score += tl.load(scores + at, mask=at * SHARE < count, other=0.0)
        if BEYOND:  # compressed blocks that reach into this selection block from the one before
            at -= PIECES
            score += tl.load(scores + num_shares + at, mask=(at >= 0) & (at * SHARE < count), other=0.0)
    own_block = tl.zeros([1, 1], tl.int32) + tl.maximum(position + SIZE, 0) // SIZE - 1
    chosen, place = best_candidates(score, block, own_block, WANTED, INITIAL, LOCAL, 1, BITS)
    indices += of_head * WANTED
    empty = (block > own_block) & (block < WANTED)  # fewer candidates than are wanted are all chosen
    tl.store(indices + block, tl.full([1, CANDIDATES], -1, tl.int32), mask=empty)
    tl.store(indices + place, block, mask=chosen)
    tl.debug_barrier()


@recordable(do_not_specialize=_LENGTHS)
def _select_kernel(
    shares, maxima, partial_lse2, lengths, scores, indices, num_tokens, capacity, num_splits, num_parts, num_tiles,
    HEADS, NUM_QUERIES: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr, TILES: tl.constexpr,
    KEYS: tl.constexpr, RATIO: tl.constexpr, SHARE: tl.constexpr, LENGTH: tl.constexpr, STRIDE: tl.constexpr,
    ACC: tl.constexpr, WANTED: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr, CANDIDATES: tl.constexpr,
    BITS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The selected blocks of a query, for a context too long for `_token_kernel` to choose in."""
    wait_for_previous(EARLY)
    start_next(EARLY)
    _, _, _, _, of_head, position = _find(lengths, num_tokens, 1, HEADS, NUM_QUERIES)
    _choose(
        shares, maxima, partial_lse2, scores, indices, of_head, position, capacity, num_splits, num_parts, num_tiles,
        G, ROWS, SPLITS, TILES, KEYS, RATIO, SHARE, LENGTH, STRIDE, ACC, WANTED, INITIAL, LOCAL, CANDIDATES, BITS,
    )  # fmt: skip


@recordable(do_not_specialize=_LENGTHS)
def _token_kernel(
    q, k, v, k_win, v_win, lengths, shares, maxima, scores, indices, partial, partial_lse2, q_strides, k_strides,
    v_strides, k_win_strides, v_win_strides, num_tokens, capacity, ring_size, window, num_splits, num_window,
    num_parts, num_tiles, scale_log2, HEADS, NUM_QUERIES: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr,
    SPLITS: tl.constexpr, TILES: tl.constexpr, KEYS: tl.constexpr, RATIO: tl.constexpr, SHARE: tl.constexpr,
    LENGTH: tl.constexpr, STRIDE: tl.constexpr, WANTED: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr,
    CANDIDATES: tl.constexpr, BITS: tl.constexpr, DK: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
    DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    CHOOSES: tl.constexpr, SOON: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One part of the window, whose keys are in a ring, or of the selected branch, which with CHOOSES it chooses.

    With SOON programs of the next kernel start while the selected branch reads.
    """
    SIZE: tl.constexpr = RATIO * STRIDE
    PIECES: tl.constexpr = SIZE // KEYS
    part, head, batch, query, of_head, position = _find(lengths, num_tokens, num_parts - num_splits, HEADS, NUM_QUERIES)
    q0, q1 = _load_queries(q, q_strides, batch, query, head, G, ROWS, DK, K0, K1)
    in_window = part < num_window
    if in_window:
        oldest = tl.maximum(position + 1 - window, 0)
        oldest_slot = oldest % ring_size
        room = ring_size
        count = tl.cdiv(position + 1 - oldest, KEYS)
        span = tl.cdiv(count, num_window)
        begin = part * span
        k = k_win + batch * k_win_strides[0] + head * k_win_strides[2]
        v = v_win + batch * v_win_strides[0] + head * v_win_strides[2]
        k_row = tl.cast(k_win_strides[1], tl.int64)
        v_row = tl.cast(v_win_strides[1], tl.int64)
    else:
        wait_for_previous(EARLY)
        if SOON:
            start_next(EARLY)
        if CHOOSES:
            _choose(
                shares, maxima, partial_lse2, scores, indices, of_head, position, capacity, num_splits, num_parts,
                num_tiles, G, ROWS, SPLITS, TILES, KEYS, RATIO, SHARE, LENGTH, STRIDE, ACC, WANTED, INITIAL, LOCAL,
                CANDIDATES, BITS,
            )  # fmt: skip
        oldest = 0
        oldest_slot = 0
        room = num_tokens
        count = WANTED * PIECES
        span = tl.cdiv(count, num_parts - num_splits - num_window)
        begin = (part - num_window) * span
        k += batch * k_strides[0] + head * k_strides[2]
        v += batch * v_strides[0] + head * v_strides[2]
        k_row = tl.cast(k_strides[1], tl.int64)
        v_row = tl.cast(v_strides[1], tl.int64)
    within = tl.arange(0, KEYS)
    row_max = tl.full([ROWS], float("-inf"), dtype=ACC)
    row_sum = tl.zeros([ROWS], dtype=ACC)
    acc0 = tl.zeros([ROWS, V0], dtype=ACC)
    acc1 = tl.zeros([ROWS, V1 if V1 > 0 else 16], dtype=ACC)
    for step in range(begin, tl.minimum(begin + span, count)):
        first = oldest + step * KEYS
        slot = oldest_slot + step * KEYS
        if WANTED > 0:
            # Masked rather than in a branch: a pipelined loop takes the other branch for steps beyond the last.
            block = tl.load(indices + of_head * WANTED + step // PIECES, mask=part >= num_window, other=0)
            token = tl.where(block < 0, position + 1, block * SIZE + step % PIECES * KEYS)
            first = tl.where(in_window, first, token)
            slot = tl.where(in_window, slot, token)
        seen = first + within <= position
        slot += within
        slot = tl.where(slot < room, slot, slot - room)
        k0, k1 = load_chunks(k, slot.to(tl.int64) * k_row, seen, DK, K0, K1)
        v0, v1 = load_chunks(v, slot.to(tl.int64) * v_row, seen, DV, V0, V1)
        _, row_max, row_sum, acc0, acc1 = _attend(
            q0, q1, k0, k1, v0, v1, seen, row_max, row_sum, acc0, acc1, scale_log2, K1, V1, ACC, PRECISION
        )
    wait_for_previous(EARLY)
    start_next(EARLY)
    part += num_splits
    _store_part(partial, partial_lse2, of_head, part, num_parts, acc0, acc1, row_max, row_sum, G, ROWS, DV, V0, V1)


@recordable(do_not_specialize=_LENGTHS)
def _merge_kernel(
    partial, partial_lse2, gates, out, gate_strides, num_splits, num_window, num_parts, HEADS,
    NUM_QUERIES: tl.constexpr, G: tl.constexpr, PARTS: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr,
    ACC: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The gated sum of the branches of one query head; parts come compressed, window, selected."""
    member, head, row = find_program(tl.program_id(0), G, HEADS)
    of_head = row.to(tl.int64) * HEADS + head
    part = tl.arange(0, PARTS)
    column = tl.arange(0, WIDTH)
    branch = tl.where(part < num_splits, 0, tl.where(part < num_splits + num_window, 2, 1))
    gates += row // NUM_QUERIES * gate_strides[0] + row % NUM_QUERIES * gate_strides[1]
    gates += (head * G + member) * gate_strides[2]
    weight = tl.load(gates + branch * gate_strides[3]).to(ACC)
    wait_for_previous(EARLY)
    exists = part < num_parts
    lse2 = partial_lse2 + (of_head * G + member) * num_parts + part
    lse2 = tl.load(lse2, mask=exists, other=float("-inf")).to(ACC)
    place = (of_head * num_parts + part) * G + member
    inside = exists[:, None] & (column < DV)[None, :]
    outs = tl.load(partial + place[:, None] * DV + column[None, :], mask=inside, other=0.0).to(ACC)
    for c in tl.static_range(3):
        of_branch = tl.where(branch == c, lse2, float("-inf"))
        largest = tl.max(of_branch, 0)
        share = tl.exp2(of_branch - tl.where(largest == float("-inf"), 0.0, largest))
        total = tl.sum(share, 0)
        weight *= tl.where(branch == c, share / tl.where(total == 0, 1.0, total), 1.0)
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
    tiles = _Parts(cdiv(capacity, keys), cdiv(window, keys), wanted * (size // keys))
    parts = _Parts.of(wave, tiles)
    num_parts, num_tiles = sum(parts), tiles.compressed
    ratio = size // config.compress_stride
    share = min(ratio, keys)
    num_shares = num_tiles * (keys // share)
    shares = q.new_empty(rows * query_heads * 2 * num_shares, dtype=acc)
    maxima = q.new_empty(rows * query_heads * num_tiles, dtype=acc)
    partial = q.new_empty(rows * query_heads * num_parts, v_slc.shape[3], dtype=acc)
    partial_lse2 = q.new_empty(rows * query_heads * num_parts, dtype=acc)
    scores = q.new_empty(rows * kv_heads * 2 * num_shares, dtype=acc)

    # The first launch begins when all before have ended, those that follow before the one before has.
    order: dict[str, Any] = {"EARLY": starts_early(q.device)}
    follow = {**order, "launch_pdl": True} if order["EARLY"] else order
    of_group: dict[str, Any] = {"NUM_QUERIES": num_queries, "G": group, "ROWS": max(16, next_power_of_2(group))}
    of_blocks = {"KEYS": keys, "RATIO": ratio, "SHARE": share, "WANTED": wanted}
    of_blocks |= {"LENGTH": config.compress_block_size, "STRIDE": config.compress_stride}
    constants = {**heads.constants(), **of_group, **of_blocks}
    candidates = max(16, next_power_of_2(max(num_blocks, wanted)))
    chooses = bool(wanted) and candidates <= _MOST_CANDIDATES
    tiles_at_once = max(1, _SUMS * share // (keys * of_group["ROWS"]))
    choosing = {"SPLITS": next_power_of_2(parts.compressed), "TILES": min(next_power_of_2(num_tiles), tiles_at_once)}
    choosing |= {"INITIAL": config.num_initial_blocks, "LOCAL": config.num_local_blocks, "CANDIDATES": candidates}
    choosing["BITS"] = tl.int64 if acc == torch.float64 else tl.int32
    stores = (q, k_slc, v_slc, k_win, v_win)
    with torch.cuda.device_of(q):
        if parts.compressed:
            _compressed_kernel[(parts.compressed * kv_heads * rows, 1, 1)](
                q, k_cmp, v_cmp, lengths, shares, maxima, partial, partial_lse2, q.stride()[:3], k_cmp.stride()[:3],
                v_cmp.stride()[:3], num_tokens, capacity, parts.compressed, num_parts, num_tiles,
                scale * LOG2E.value, kv_heads, **constants, **order, num_stages=_STAGES,
            )  # fmt: skip
            order = follow
        if wanted and not chooses:
            _select_kernel[(kv_heads * rows, 1, 1)](
                shares, maxima, partial_lse2, lengths, scores, indices, num_tokens, capacity, parts.compressed,
                num_parts, num_tiles, kv_heads, **of_group, **of_blocks, **choosing, ACC=constants["ACC"], **order,
                num_warps=16,
            )  # fmt: skip
            order = follow
        if parts.window + parts.selected:
            _token_kernel[((parts.window + parts.selected) * kv_heads * rows, 1, 1)](
                *stores, lengths, shares, maxima, scores, indices, partial, partial_lse2,
                *[x.stride()[:3] for x in stores], num_tokens, capacity, max(1, k_win.shape[1]), window,
                parts.compressed, parts.window, num_parts, num_tiles, scale * LOG2E.value, kv_heads, **constants,
                **choosing, CHOOSES=chooses, SOON=rows * kv_heads <= _FEW, **order, num_stages=_STAGES,
            )  # fmt: skip
            order = follow
        merged = {"PARTS": next_power_of_2(num_parts), "WIDTH": next_power_of_2(v_slc.shape[3])}
        _merge_kernel[(query_heads * rows, 1, 1)](
            partial, partial_lse2, gates, out, gates.stride(), parts.compressed, parts.window, num_parts, kv_heads,
            NUM_QUERIES=num_queries, G=group, DV=v_slc.shape[3], ACC=constants["ACC"], **merged, **order,
            num_warps=min(8, max(1, merged["PARTS"] * merged["WIDTH"] // 1024)),
        )  # fmt: skip
    return out, indices
