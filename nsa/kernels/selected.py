"""Selected attention: query `t` attends to the tokens `s <= t` of the blocks chosen for it (paper, section 3.3.2).

Forward, for one query and one KV head, over the chosen blocks `j` and their tokens `s <= t`:

    S = scale q k_s,    lse = log sum exp(S),    out = sum_s exp(S - lse) v_s

Backward, with `P = exp(S - lse)`, `dP = dout v_s` and `delta = sum(out * dout)`:

    dS = P (dP - delta),    dq = scale sum_s dS k_s,    dk_s = scale sum dS q,    dv_s = sum P dout

There are two ways to bring queries and blocks together; which is faster depends on `G`, the query heads of a KV head.

- By query: a program has one query and one KV head, `G` rows, and fetches its blocks one after the other. What is moved
  is `l' (Dk + Dv)` elements for each pair of query and block, whatever `G`.
- By block (`SCATTER`): a program has one block and fetches the queries that chose it, as many rows as fill the matrix
  units. Each pair leaves a partial result, softmax over that block alone, for a second kernel to put together: about
  `G (Dk + 2 Dv)` elements a pair, less where `G` is small. Partial results are held for some KV heads at a time.

`dk` and `dv` are always made by block, `dq` either way.

The queries that chose a block are the inverse of the indices. Sorting the pairs (block, query) by block, stably, gives
the queries of each block as one ascending list, without atomics, so that sums have a fixed order. Lists differ in
length by orders of magnitude, for the first block is everybody's. They are cut into pieces of `CHUNK` queries; a block
of one piece is written at once, the float32 sums of the others are added in order by one more kernel.
"""

from itertools import chain
from typing import Any, NamedTuple, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.config import NSAConfig
from nsa.kernels.primitives import (
    LN2,
    LOG2E,
    accumulator,
    describable,
    descriptors,
    dot,
    dot_precision,
    fetch,
    load_rows,
    not_finite,
    probability,
    rows_contiguous,
    store_rows,
    weigh,
    without,
    zero_unless_finite,
)
from nsa.kernels.tuning import Launch, chunks, launch
from nsa.ops import accumulation_dtype, branch_operator, sizes_of
from nsa.varlen import Varlen, tensors_of

PARTIAL_BYTES = 1 << 30
"""Partial results held at a time where work goes by block, if one KV head does not need more."""

_LARGEST_GRID = 65535  # along any side but the first

# Sizes that change from call to call and are no reason to compile again.
_LENGTHS = ("num_queries", "num_keys", "shift", "rows", "pairs", "lists", "blocks", "first_list", "first_head")


# Tiles. Head dimensions come in one or two chunks; where there is one, the second is something of no meaning.


@triton.jit
def _load_chunks(base, offsets, seen, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Rows `[M, D0]` and `[M, D1]` at `base + offsets [M]`, 0 where not `seen [M]`."""
    first = load_rows(base, offsets, seen, 0, D0, D, True)
    second = first
    if D1 > 0:
        second = load_rows(base, offsets, seen, D0, D1, D, True)
    return first, second


@triton.jit
def _store_chunks(
    base, offsets, seen, x0, x1, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ADD: tl.constexpr = False
):
    store_rows(base, offsets, seen, x0, 0, D0, D, ADD)
    if D1 > 0:
        store_rows(base, offsets, seen, x1, D0, D1, D, ADD)


@triton.jit
def _inner(x0, x1, y0, y1, D1: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """`x y^T` of rows in two chunks."""
    product = dot(x0, tl.trans(y0), None, ACC, PRECISION)
    if D1 > 0:
        product = dot(x1, tl.trans(y1), product, ACC, PRECISION)
    return product


@triton.jit
def _sees(block, position, BLOCK: tl.constexpr):
    """Whether a query at `position` sees a block; none where the position is negative, as before the first key."""
    # Compared before it is multiplied: whatever the indices hold, no address comes of it.
    return (block >= 0) & (block < (position + BLOCK) // BLOCK)


# By query.


@triton.jit
def _find_query(located, num_queries, shift, HEADS, PACKED: tl.constexpr):
    """This program's batch, KV head and query, the query's position and the first key of its sequence.

    Neighbouring programs have neighbouring queries of one head: what they read of its keys stays in the cache.
    """
    program = tl.program_id(0)
    query = program % num_queries
    head = program // num_queries % HEADS
    batch = program // num_queries // HEADS
    if PACKED:
        position = tl.load(located + 3 * query)
        first_key = tl.load(located + 3 * query + 1)
    else:
        position = query + shift
        first_key = query * 0
    return batch, head, query, position, first_key


@triton.jit
def _num_steps(
    indices, position, stride, SLOTS: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr
):
    """Steps, of `KEYS` keys each, to the last slot that holds a block the query sees."""
    slot = tl.arange(0, SPAN)
    block = tl.load(indices + slot * stride, mask=slot < SLOTS, other=-1)
    return tl.max(tl.where(_sees(block, position, BLOCK), slot + 1, 0), 0) * (BLOCK // KEYS)


@triton.jit
def _find_keys(block, step, position, BLOCK: tl.constexpr, KEYS: tl.constexpr):
    """Position of the first key of one step, and which of its keys `[KEYS]` the query sees; none if the block is not
    valid."""
    valid = _sees(block, position, BLOCK)
    first = tl.where(valid, block, 0) * BLOCK + step % (BLOCK // KEYS) * KEYS
    return first, valid & (first + tl.arange(0, KEYS) <= position)


@triton.jit
def _fetch_chunks(
    tiles0, tiles1, base, batch, head, row, stride, seen,
    DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, KEYS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Rows `row` to `row + KEYS` of one head, in two chunks."""
    offsets = tl.arange(0, KEYS).to(tl.int64) * stride
    return fetch(tiles0, tiles1, base, offsets, seen, batch, head, row, stride, DIM, D0, D1, KEYS, True, TMA)


@triton.jit(do_not_specialize=_LENGTHS)
def _forward_kernel(
    q, k, v, k_tiles0, k_tiles1, v_tiles0, v_tiles1, indices, out, lse, located, q_strides, k_strides, v_strides,
    index_strides, num_queries, shift, scale, HEADS, SLOTS: tl.constexpr, SPAN: tl.constexpr, G: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, DK: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
    DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    batch, head, query, position, first_key = _find_query(located, num_queries, shift, HEADS, PACKED)
    batch64, head64, query64 = batch.to(tl.int64), head.to(tl.int64), query.to(tl.int64)
    q += batch64 * q_strides[0] + query64 * q_strides[1] + head64 * G * q_strides[2]
    k += batch64 * k_strides[0] + head64 * k_strides[2]
    v += batch64 * v_strides[0] + head64 * v_strides[2]
    indices += batch64 * index_strides[0] + query64 * index_strides[1] + head64 * index_strides[2]
    steps = _num_steps(indices, position, index_strides[3], SLOTS, SPAN, BLOCK, KEYS)

    spoiled = 1.0
    for CLEAN in tl.static_range(2 if TMA else 1):
        if spoiled != 0:
            row = tl.arange(0, ROWS)
            live = row < G
            q0, q1 = _load_chunks(q, row.to(tl.int64) * q_strides[2], live, DK, K0, K1)

            peak = tl.full([ROWS], float("-inf"), dtype=ACC)
            # Summed up over keys after the loop: a sum across threads at every step costs more than the room for it.
            total = tl.zeros([ROWS, KEYS], dtype=ACC)
            out0 = tl.zeros([ROWS, V0], dtype=ACC)
            out1 = tl.zeros([ROWS, V1 if V1 > 0 else 16], dtype=ACC)
            block = tl.load(indices)
            for step in range(0, steps):
                first, seen = _find_keys(block, step, position, BLOCK, KEYS)
                # A step ahead, so that what the block's address depends on has arrived when it is needed.
                block = tl.load(indices + tl.minimum(step + 1, steps - 1) // (BLOCK // KEYS) * index_strides[3])
                key = first_key + first
                k0, k1 = _fetch_chunks(
                    k_tiles0, k_tiles1, k, batch, head, key, k_strides[1], seen, DK, K0, K1, KEYS, TMA and not CLEAN
                )
                # Before the products of keys: a warp has nothing else to do meanwhile than fill registers with values.
                v0, v1 = _fetch_chunks(
                    v_tiles0, v_tiles1, v, batch, head, key, v_strides[1], seen, DV, V0, V1, KEYS, TMA and not CLEAN
                )
                s = _inner(q0, q1, k0, k1, K1, ACC, PRECISION)
                s = tl.where(seen[None, :], s * (scale * LOG2E), float("-inf"))
                highest = tl.maximum(peak, tl.max(s, 1))
                # Each row by its own maximum; what is subtracted must be finite while a row has seen nothing.
                base = tl.where(highest == float("-inf"), 0.0, highest)
                p = tl.exp2(s - base[:, None])
                rescale = tl.exp2(peak - base)[:, None]
                total = total * rescale + p
                peak = highest
                out0 = dot(p.to(v0.dtype), v0, out0 * rescale, ACC, PRECISION)
                if V1 > 0:
                    out1 = dot(p.to(v1.dtype), v1, out1 * rescale, ACC, PRECISION)

            z = tl.sum(total, 1)
            blind = z == 0
            z = tl.where(blind, 1.0, z)
            rows = ((batch64 * num_queries + query) * HEADS + head) * G + row
            tl.store(lse + rows, tl.where(blind, float("-inf"), (peak + tl.log2(z)) * LN2), mask=live)
            _store_chunks(out, rows * DV, live, out0 / z[:, None], out1 / z[:, None], DV, V0, V1)
            if TMA and not CLEAN:
                # Pointers leave out the keys that the query does not see, descriptors do not.
                spoiled = zero_unless_finite(out0, out1, V1, ACC)


@triton.jit(do_not_specialize=_LENGTHS)
def _queries_kernel(
    q, k, v, k_tiles0, k_tiles1, v_tiles0, v_tiles1, dout, lse, delta, gate, indices, dq, located, q_strides,
    k_strides, v_strides, do_strides, index_strides, num_queries, shift, scale, HEADS, SLOTS: tl.constexpr,
    SPAN: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    DK: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr, TMA: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """`dq` by query, added to what is there with ADD."""
    batch, head, query, position, first_key = _find_query(located, num_queries, shift, HEADS, PACKED)
    batch64, head64, query64 = batch.to(tl.int64), head.to(tl.int64), query.to(tl.int64)
    q += batch64 * q_strides[0] + query64 * q_strides[1] + head64 * G * q_strides[2]
    k += batch64 * k_strides[0] + head64 * k_strides[2]
    v += batch64 * v_strides[0] + head64 * v_strides[2]
    dout += batch64 * do_strides[0] + query64 * do_strides[1] + head64 * G * do_strides[2]
    indices += batch64 * index_strides[0] + query64 * index_strides[1] + head64 * index_strides[2]
    steps = _num_steps(indices, position, index_strides[3], SLOTS, SPAN, BLOCK, KEYS)

    spoiled = 1.0
    for CLEAN in tl.static_range(2 if TMA else 1):
        if spoiled != 0:
            row = tl.arange(0, ROWS)
            live = row < G
            rows = ((batch64 * num_queries + query) * HEADS + head) * G + row
            q0, q1 = _load_chunks(q, row.to(tl.int64) * q_strides[2], live, DK, K0, K1)
            do0, do1 = _load_chunks(dout, row.to(tl.int64) * do_strides[2], live, DV, V0, V1)
            correction = tl.load(delta + rows, mask=live, other=0.0)
            log_sum = tl.load(lse + rows, mask=live, other=0.0) * LOG2E
            log_sum = tl.where(log_sum == float("-inf"), 0.0, log_sum)

            dq0 = tl.zeros([ROWS, K0], dtype=ACC)
            dq1 = tl.zeros([ROWS, K1 if K1 > 0 else 16], dtype=ACC)
            block = tl.load(indices)
            for step in range(0, steps):
                first, seen = _find_keys(block, step, position, BLOCK, KEYS)
                block = tl.load(indices + tl.minimum(step + 1, steps - 1) // (BLOCK // KEYS) * index_strides[3])
                key = first_key + first
                k0, k1 = _fetch_chunks(
                    k_tiles0, k_tiles1, k, batch, head, key, k_strides[1], seen, DK, K0, K1, KEYS, TMA and not CLEAN
                )
                v0, v1 = _fetch_chunks(
                    v_tiles0, v_tiles1, v, batch, head, key, v_strides[1], seen, DV, V0, V1, KEYS, TMA and not CLEAN
                )
                s = _inner(q0, q1, k0, k1, K1, ACC, PRECISION)
                dp = _inner(do0, do1, v0, v1, V1, ACC, PRECISION)
                s = tl.where(seen[None, :], s * (scale * LOG2E), float("-inf"))
                ds = (tl.exp2(s - log_sum[:, None]) * (dp - correction[:, None])).to(k0.dtype)
                dq0 = dot(ds, k0, dq0, ACC, PRECISION)
                if K1 > 0:
                    dq1 = dot(ds, k1, dq1, ACC, PRECISION)
            stored = live
            if TMA and not CLEAN:
                spoiled = zero_unless_finite(dq0, dq1, K1, ACC)
                stored = tl.where(live, spoiled, 1.0) == 0  # what is added cannot be taken back
            factor = tl.full([ROWS], 1.0, ACC) * scale
            if gate is not None:
                factor *= tl.load(gate + 3 * rows, mask=live, other=0.0).to(ACC)
            _store_chunks(dq, rows * DK, stored, dq0 * factor[:, None], dq1 * factor[:, None], DK, K0, K1, ADD)


@triton.jit(do_not_specialize=_LENGTHS)
def _delta_kernel(
    out, dout, lse, gate, delta, lse2, dgate, do_strides, num_queries, rows, QUERY_HEADS,
    DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`delta`, which is the gate's gradient, and the log-sum-exp in base 2, weighted by the gate."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    token = row // QUERY_HEADS
    offsets = token // num_queries * do_strides[0] + token % num_queries * do_strides[1]
    o0, o1 = _load_chunks(out, row * DV, live, DV, V0, V1)
    do0, do1 = _load_chunks(dout, offsets + row % QUERY_HEADS * do_strides[2], live, DV, V0, V1)
    total = tl.sum(o0.to(ACC) * do0.to(ACC), 1)
    if V1 > 0:
        total += tl.sum(o1.to(ACC) * do1.to(ACC), 1)
    tl.store(delta + row, total, mask=live)
    log_sum = tl.load(lse + row, mask=live, other=0.0) * LOG2E
    if gate is not None:
        log_sum = weigh(log_sum, tl.load(gate + 3 * row, mask=live, other=0.0).to(ACC), ACC)
        tl.store(dgate + 3 * row, total.to(dgate.dtype.element_ty), mask=live)
    tl.store(lse2 + row, log_sum, mask=live)


# The inverted index: for every batch, KV head and block (a "list") the pairs (query, slot) that chose it, ascending.


@triton.jit
def _locate(located, query, shift, seen, PACKED: tl.constexpr):
    """Positions of queries in their sequences."""
    if PACKED:
        return tl.load(located + 3 * query, mask=seen, other=0)
    else:
        return (query + shift).to(tl.int32)


@triton.jit(do_not_specialize=_LENGTHS)
def _lists_kernel(
    indices, lists_of, located, index_strides, num_queries, shift, pairs, lists, blocks, HEADS,
    SLOTS: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The list each pair belongs to; `lists`, beyond all of them, where the slot holds nothing to see."""
    pair = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    inside = pair < pairs
    row = pair // SLOTS
    query = row // HEADS % num_queries
    batch = row // HEADS // num_queries
    offsets = batch * index_strides[0] + query * index_strides[1] + row % HEADS * index_strides[2]
    block = tl.load(indices + offsets + pair % SLOTS * index_strides[3], mask=inside, other=-1)
    valid = _sees(block, _locate(located, query, shift, inside, PACKED), BLOCK)
    mine = ((batch * HEADS + row % HEADS) * blocks).to(tl.int32) + tl.where(valid, block, 0)
    if PACKED:
        mine += tl.load(located + 3 * query + 2, mask=inside, other=0)
    tl.store(lists_of + pair, tl.where(valid, mine, lists).to(lists_of.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_LENGTHS)
def _members_kernel(order, members, num_queries, pairs, HEADS, SLOTS: tl.constexpr, WIDTH: tl.constexpr):
    """Pairs by number in the indices `[B, Tq, Hk, N]` to `query * N + slot`."""
    place = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    inside = place < pairs
    pair = tl.load(order + place, mask=inside, other=0)
    query = pair // SLOTS // HEADS % num_queries
    tl.store(members + place, (query * SLOTS + pair % SLOTS).to(tl.int32), mask=inside)


@triton.jit
def _find_piece(offsets, pieces, first_list, lists, CHUNK: tl.constexpr):
    """The piece this program has, of those of `lists` lists: its list (-1 if there are fewer pieces), its number in the
    list and how many that has, its first pair and its number of pairs. `pieces` are running totals."""
    item = tl.program_id(0) + tl.load(pieces + first_list - 1, mask=first_list > 0, other=0)
    exists = item < tl.load(pieces + first_list + lists - 1)
    low = first_list
    high = first_list + lists - 1
    while low < high:
        middle = (low + high) // 2
        after = tl.load(pieces + middle) <= item
        low = tl.where(after, middle + 1, low)
        high = tl.where(after, high, middle)
    before = tl.load(pieces + low - 1, mask=low > 0, other=0)
    begin = tl.load(offsets + low) + (item - before) * CHUNK
    count = tl.minimum(tl.load(offsets + low + 1) - begin, CHUNK)
    return tl.where(exists, low, -1), item - before, tl.load(pieces + low) - before, begin, count


@triton.jit
def _find_block(spans, block, num_keys, BLOCK: tl.constexpr, PACKED: tl.constexpr):
    """First key of a block, that key's position in its sequence, and how many keys the block has."""
    if PACKED:
        start = tl.load(spans + 3 * block)
        position = tl.load(spans + 3 * block + 1)
        length = tl.load(spans + 3 * block + 2)
    else:
        start = block * BLOCK
        position = start
        length = num_keys - start
    return start, position, length


# By block.


@triton.jit(do_not_specialize=_LENGTHS)
def _scatter_kernel(
    q, k, v, members, offsets, pieces, partial, partial_lse, located, spans, q_strides, k_strides, v_strides,
    num_queries, num_keys, shift, lists, blocks, first_list, first_head, scale, HEADS, SLOTS: tl.constexpr,
    G: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, DK: tl.constexpr, K0: tl.constexpr,
    K1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, PACKED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Attention to `KEYS` keys alone of the queries of one piece: `[heads, Tq, N * l' / KEYS, G]` rows and their
    log-sum-exp, base 2."""
    owner, _, _, begin, count = _find_piece(offsets, pieces, first_list, lists, CHUNK)
    if owner >= 0:
        part = tl.program_id(1)
        start, position, length = _find_block(spans, owner % blocks, num_keys, BLOCK, PACKED)
        head = (owner // blocks % HEADS).to(tl.int64)
        batch = (owner // blocks // HEADS).to(tl.int64)
        k += batch * k_strides[0] + head * k_strides[2]
        v += batch * v_strides[0] + head * v_strides[2]
        q += batch * q_strides[0] + head * G * q_strides[2]

        spoiled = 1.0
        for CLEAN in tl.static_range(2):
            if spoiled != 0:
                within = part * KEYS + tl.arange(0, KEYS)
                real = within < length
                keys = start + within.to(tl.int64)
                k0, k1 = _load_chunks(k, keys * k_strides[1], real, DK, K0, K1)
                v0, v1 = _load_chunks(v, keys * v_strides[1], real, DV, V0, V1)
                if CLEAN:
                    bad = not_finite(v0, v1, V1, ACC)
                    v0, v1 = without(v0, v1, bad, V1)
                for step in range(0, count * G, ROWS):
                    row = step + tl.arange(0, ROWS)
                    live = row < count * G
                    member = tl.load(members + begin + row // G, mask=live, other=0)
                    query = (member // SLOTS).to(tl.int64)
                    of_group = (row % G).to(tl.int64)
                    q0, q1 = _load_chunks(q, query * q_strides[1] + of_group * q_strides[2], live, DK, K0, K1)
                    reach = _locate(located, query, shift, live, PACKED) - position
                    s = _inner(q0, q1, k0, k1, K1, ACC, PRECISION) * (scale * LOG2E)
                    visible = within[None, :] <= reach[:, None]
                    s = tl.where(visible, s, float("-inf"))
                    peak = tl.max(s, 1)
                    base = tl.where(peak == float("-inf"), 0.0, peak)
                    p = tl.exp2(s - base[:, None])
                    total = tl.sum(p, 1)
                    blind = total == 0
                    total = tl.where(blind, 1.0, total)
                    if CLEAN:
                        p = tl.where(visible & bad[None, :], float("nan"), p)
                    p = p.to(v0.dtype)
                    out0 = dot(p, v0, None, ACC, PRECISION) / total[:, None]
                    out1 = out0
                    if V1 > 0:
                        out1 = dot(p, v1, None, ACC, PRECISION) / total[:, None]
                    place = ((owner // blocks - first_head) * num_queries + query) * SLOTS + member % SLOTS
                    place = (place * (BLOCK // KEYS) + part) * G + row % G
                    tl.store(partial_lse + place, tl.where(blind, float("-inf"), base + tl.log2(total)), mask=live)
                    _store_chunks(partial, place * DV, live, out0, out1, DV, V0, V1)
                if not CLEAN:
                    spoiled = zero_unless_finite(v0, v1, V1, ACC)


@triton.jit
def _find_rows(
    located, num_queries, shift, first_head, HEADS, G: tl.constexpr, ROWS: tl.constexpr, PACKED: tl.constexpr
):
    """`ROWS` rows (query, head of the group) of one KV head: batch, head, queries, heads of the group, positions,
    and which rows there are."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < num_queries * G
    query = (row // G).to(tl.int64)
    head = first_head + tl.program_id(1)
    position = _locate(located, query, shift, live, PACKED)
    return (head // HEADS).to(tl.int64), (head % HEADS).to(tl.int64), query, row % G, position, live


@triton.jit(do_not_specialize=_LENGTHS)
def _gather_kernel(
    partial, partial_lse, indices, out, lse, located, index_strides, num_queries, shift, first_head, HEADS,
    SLOTS: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, ACC: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Partial results of a query, weighted by what their blocks hold of its softmax."""
    batch, head, query, member, position, live = _find_rows(
        located, num_queries, shift, first_head, HEADS, G, ROWS, PACKED
    )
    indices += batch * index_strides[0] + head * index_strides[2]
    place = ((tl.program_id(1) * num_queries + query) * SLOTS * (BLOCK // KEYS)) * G + member
    peak = tl.full([ROWS], float("-inf"), dtype=ACC)
    total = tl.zeros([ROWS], dtype=ACC)
    out0 = tl.zeros([ROWS, V0], dtype=ACC)
    out1 = tl.zeros([ROWS, V1 if V1 > 0 else 16], dtype=ACC)
    for step in range(0, SLOTS * (BLOCK // KEYS)):
        block = tl.load(
            indices + query * index_strides[1] + step // (BLOCK // KEYS) * index_strides[3], mask=live, other=-1
        )
        # A slot with nothing to see was never written.
        valid = _sees(block, position, BLOCK)
        log_sum = tl.load(partial_lse + place + step * G, mask=valid, other=float("-inf"))
        highest = tl.maximum(peak, log_sum)
        base = tl.where(highest == float("-inf"), 0.0, highest)
        rescale = tl.exp2(peak - base)
        weight = tl.exp2(log_sum - base)
        peak = highest
        total = total * rescale + weight
        part0, part1 = _load_chunks(partial, (place + step * G) * DV, valid, DV, V0, V1)
        out0 = out0 * rescale[:, None] + weight[:, None] * part0.to(ACC)
        if V1 > 0:
            out1 = out1 * rescale[:, None] + weight[:, None] * part1.to(ACC)
    blind = total == 0
    total = tl.where(blind, 1.0, total)
    rows = ((batch * num_queries + query) * HEADS + head) * G + member
    tl.store(lse + rows, tl.where(blind, float("-inf"), (peak + tl.log2(total)) * LN2), mask=live)
    _store_chunks(out, rows * DV, live, out0 / total[:, None], out1 / total[:, None], DV, V0, V1)


@triton.jit(do_not_specialize=_LENGTHS)
def _keys_kernel(
    q, k, v, dout, lse2, delta, members, offsets, pieces, shared, dk, dv, partial_dk, partial_dv, partial_dq,
    located, spans, q_strides, k_strides, v_strides, do_strides, num_queries, num_keys, shift, lists, blocks,
    first_list, first_head, scale, HEADS, SLOTS: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    KEYS: tl.constexpr, DK: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr,
    V1: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr, CHUNK: tl.constexpr,
    SCATTER: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """`dk` and `dv` of `KEYS` keys of a block from one piece of its list; tiles are `[KEYS, ROWS]`. With SCATTER also
    each pair's part of `dq`, laid out as `_scatter_kernel` does. `shared` counts the pieces with partial sums."""
    owner, piece, siblings, begin, count = _find_piece(offsets, pieces, first_list, lists, CHUNK)
    if owner >= 0:
        start, position, length = _find_block(spans, owner % blocks, num_keys, BLOCK, PACKED)
        head = (owner // blocks % HEADS).to(tl.int64)
        batch = (owner // blocks // HEADS).to(tl.int64)
        k += batch * k_strides[0] + head * k_strides[2]
        v += batch * v_strides[0] + head * v_strides[2]
        q += batch * q_strides[0] + head * G * q_strides[2]
        dout += batch * do_strides[0] + head * G * do_strides[2]
        first_row = (batch * num_queries * HEADS + head) * G

        spoiled = 1.0
        for CLEAN in tl.static_range(2):
            if spoiled != 0:
                within = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
                real = within < length
                keys = start + within.to(tl.int64)
                k0, k1 = _load_chunks(k, keys * k_strides[1], real, DK, K0, K1)
                v0, v1 = _load_chunks(v, keys * v_strides[1], real, DV, V0, V1)
                dk0 = tl.zeros([KEYS, K0], dtype=ACC)
                dk1 = tl.zeros([KEYS, K1 if K1 > 0 else 16], dtype=ACC)
                dv0 = tl.zeros([KEYS, V0], dtype=ACC)
                dv1 = tl.zeros([KEYS, V1 if V1 > 0 else 16], dtype=ACC)
                clean_k0 = k0
                clean_k1 = k1
                if CLEAN and SCATTER:
                    clean_k0, clean_k1 = without(k0, k1, not_finite(k0, k1, K1, ACC), K1)
                for step in range(0, count * G, ROWS):
                    row = step + tl.arange(0, ROWS)
                    live = row < count * G
                    member = tl.load(members + begin + row // G, mask=live, other=0)
                    query = (member // SLOTS).to(tl.int64)
                    reach = _locate(located, query, shift, live, PACKED) - position
                    of_group = (row % G).to(tl.int64)
                    q0, q1 = _load_chunks(q, query * q_strides[1] + of_group * q_strides[2], live, DK, K0, K1)
                    do0, do1 = _load_chunks(dout, query * do_strides[1] + of_group * do_strides[2], live, DV, V0, V1)
                    # Rows beyond the list have q and dout of 0, and so no part in either sum.
                    of_row = first_row + query * (HEADS * G) + of_group
                    log_sum = tl.load(lse2 + of_row, mask=live, other=0.0)
                    correction = tl.load(delta + of_row, mask=live, other=0.0)
                    s = _inner(k0, k1, q0, q1, K1, ACC, PRECISION) * (scale * LOG2E)
                    s = tl.where(within[:, None] <= reach[None, :], s, float("-inf"))
                    p = probability(s, log_sum[None, :], ACC, WEIGHTED)
                    if CLEAN:
                        visible = (within[:, None] <= reach[None, :]) & live[None, :]
                        bad = not_finite(do0, do1, V1, ACC)
                        do0, do1 = without(do0, do1, bad, V1)
                        q0, q1 = without(q0, q1, not_finite(q0, q1, K1, ACC), K1)
                        # A query that is not finite spoils the keys that it sees, and no others.
                        p = tl.where(visible, tl.where(bad[None, :], float("nan"), p), 0.0)
                    dv0 = dot(p.to(do0.dtype), do0, dv0, ACC, PRECISION)
                    if V1 > 0:
                        dv1 = dot(p.to(do1.dtype), do1, dv1, ACC, PRECISION)
                    ds = p * (_inner(v0, v1, do0, do1, V1, ACC, PRECISION) - correction[None, :])
                    if CLEAN:
                        ds = tl.where(visible, ds, 0.0)
                    ds = ds.to(q0.dtype)
                    dk0 = dot(ds, q0, dk0, ACC, PRECISION)
                    if K1 > 0:
                        dk1 = dot(ds, q1, dk1, ACC, PRECISION)
                    if SCATTER:
                        dq0 = dot(tl.trans(ds), clean_k0, None, ACC, PRECISION) * scale
                        dq1 = dq0
                        if K1 > 0:
                            dq1 = dot(tl.trans(ds), clean_k1, None, ACC, PRECISION) * scale
                        place = ((owner // blocks - first_head) * num_queries + query) * SLOTS + member % SLOTS
                        place = (place * (BLOCK // KEYS) + tl.program_id(1)) * G + row % G
                        _store_chunks(partial_dq, place * DK, live, dq0, dq1, DK, K0, K1)

                if not CLEAN:
                    spoiled = zero_unless_finite(dk0, dk1, K1, ACC) + zero_unless_finite(dv0, dv1, V1, ACC)
                    if SCATTER:  # a key that no query sees leaves no trace in its own gradients
                        spoiled += zero_unless_finite(k0, k1, K1, ACC)
                dk0 *= scale
                dk1 *= scale
                # One piece is the whole sum; several leave theirs for `_reduce_kernel`, each in a place of its own.
                if siblings == 1:
                    rows = (batch * num_keys + keys) * HEADS + head
                    _store_chunks(dk, rows * DK, real, dk0, dk1, DK, K0, K1)
                    _store_chunks(dv, rows * DV, real, dv0, dv1, DV, V0, V1)
                else:
                    rows = (tl.load(shared + owner) - siblings + piece).to(tl.int64) * BLOCK + within
                    _store_chunks(partial_dk, rows * DK, real, dk0, dk1, DK, K0, K1)
                    _store_chunks(partial_dv, rows * DV, real, dv0, dv1, DV, V0, V1)


@triton.jit(do_not_specialize=_LENGTHS)
def _gather_dq_kernel(
    partial_dq, indices, dq, located, index_strides, num_queries, shift, first_head, HEADS, SLOTS: tl.constexpr,
    G: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, DK: tl.constexpr, K0: tl.constexpr,
    K1: tl.constexpr, ACC: tl.constexpr, PACKED: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """The sum of each query's parts of `dq`, in the order of its slots, added to what is there with ADD."""
    batch, head, query, member, position, live = _find_rows(
        located, num_queries, shift, first_head, HEADS, G, ROWS, PACKED
    )
    indices += batch * index_strides[0] + head * index_strides[2]
    place = ((tl.program_id(1) * num_queries + query) * SLOTS * (BLOCK // KEYS)) * G + member
    dq0 = tl.zeros([ROWS, K0], dtype=ACC)
    dq1 = tl.zeros([ROWS, K1 if K1 > 0 else 16], dtype=ACC)
    for step in range(0, SLOTS * (BLOCK // KEYS)):
        block = tl.load(
            indices + query * index_strides[1] + step // (BLOCK // KEYS) * index_strides[3], mask=live, other=-1
        )
        valid = _sees(block, position, BLOCK)
        part0, part1 = _load_chunks(partial_dq, (place + step * G) * DK, valid, DK, K0, K1)
        dq0 += part0.to(ACC)
        if K1 > 0:
            dq1 += part1.to(ACC)
    rows = ((batch * num_queries + query) * HEADS + head) * G + member
    _store_chunks(dq, rows * DK, live, dq0, dq1, DK, K0, K1, ADD)


@triton.jit(do_not_specialize=_LENGTHS)
def _reduce_kernel(
    partial_dk, partial_dv, pieces, shared, dk, dv, spans, num_keys, blocks, HEADS, BLOCK: tl.constexpr,
    KEYS: tl.constexpr, DK: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr,
    V1: tl.constexpr, ACC: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Adds up the partial sums of the lists that have several pieces, first to last."""
    owner = tl.program_id(0)
    count = tl.load(pieces + owner) - tl.load(pieces + owner - 1, mask=owner > 0, other=0)
    if count > 1:
        place = tl.load(shared + owner) - count
        start, _, length = _find_block(spans, owner % blocks, num_keys, BLOCK, PACKED)
        within = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
        real = within < length
        dk0 = tl.zeros([KEYS, K0], dtype=ACC)
        dk1 = tl.zeros([KEYS, K1 if K1 > 0 else 16], dtype=ACC)
        dv0 = tl.zeros([KEYS, V0], dtype=ACC)
        dv1 = tl.zeros([KEYS, V1 if V1 > 0 else 16], dtype=ACC)
        for piece in range(0, count):
            rows = (place + piece).to(tl.int64) * BLOCK + within
            part0, part1 = _load_chunks(partial_dk, rows * DK, real, DK, K0, K1)
            dk0 += part0
            if K1 > 0:
                dk1 += part1
            part0, part1 = _load_chunks(partial_dv, rows * DV, real, DV, V0, V1)
            dv0 += part0
            if V1 > 0:
                dv1 += part1
        batch = (owner // blocks // HEADS).to(tl.int64)
        rows = (batch * num_keys + start + within) * HEADS + owner // blocks % HEADS
        _store_chunks(dk, rows * DK, real, dk0, dk1, DK, K0, K1)
        _store_chunks(dv, rows * DV, real, dv0, dv1, DV, V0, V1)


# Launchers.


class _Packing(NamedTuple):
    """Where packed queries and blocks stand, found without waiting for the device; both `None` if nothing is packed.

    Attributes:
        located: int32 `[Tq, 3]`, position of each query, first key and first block of its sequence.
        spans: int32 `[S, 3]`, first key of each block, that key's position and how many keys the block has.
        blocks: `S`, on the host: as many blocks as there could be.
    """

    located: Tensor | None
    spans: Tensor | None
    blocks: int


def _packing(num_queries: int, num_keys: int, cu_queries: Tensor | None, cu_keys: Tensor | None, size: int) -> _Packing:
    if cu_queries is None or cu_keys is None:
        return _Packing(None, None, triton.cdiv(num_keys, size))
    lengths = cu_keys.diff()
    ends = ((lengths + (size - 1)) // size).cumsum(0)
    first_blocks = torch.nn.functional.pad(ends, (1, 0))
    count = num_keys // size + len(lengths)

    query = torch.arange(num_queries, device=cu_queries.device)
    sequence = torch.searchsorted(cu_queries[1:], query, right=True).clamp_(max=len(lengths) - 1)
    position = query - cu_queries[sequence + 1] + lengths[sequence]
    located = torch.stack((position, cu_keys[sequence], first_blocks[sequence]), 1)

    block = torch.arange(count, device=cu_keys.device)
    sequence = torch.searchsorted(ends, block, right=True).clamp_(max=len(lengths) - 1)
    position = (block - first_blocks[sequence]) * size
    spans = torch.stack((cu_keys[sequence] + position, position, lengths[sequence] - position), 1)
    return _Packing(located.int(), spans.int(), count)


class _Index(NamedTuple):
    """The inverted index, on the device but for the grid.

    Attributes:
        members: int32, `query * N + slot` of the pairs of one list after the other, each ascending.
        offsets: int32 `[L + 1]`, where lists begin and end among them.
        pieces: int32 `[L]`, running total of the pieces that lists are cut into; no list has none.
    """

    members: Tensor
    offsets: Tensor
    pieces: Tensor


def _invert(indices: Tensor, shift: int, packing: _Packing, size: int, chunk: int) -> _Index:
    batch, num_queries, heads, slots = indices.shape
    lists, pairs, width = batch * heads * packing.blocks, indices.numel(), 512
    # A sort's time is by the bit; the last number is that of pairs which belong to no list.
    lists_of = indices.new_empty(pairs, dtype=torch.int16 if lists < 2**15 - 1 else torch.int32)
    members = indices.new_empty(pairs)
    grid = (triton.cdiv(pairs, width),)
    _lists_kernel[grid](
        indices, lists_of, packing.located, indices.stride(), num_queries, shift, pairs, lists, packing.blocks, heads,
        SLOTS=slots, BLOCK=size, PACKED=packing.located is not None, WIDTH=width,
    )  # fmt: skip
    lists_of, order = lists_of.sort(stable=True)
    _members_kernel[grid](order, members, num_queries, pairs, heads, SLOTS=slots, WIDTH=width)
    bounds = torch.arange(lists + 1, device=indices.device, dtype=lists_of.dtype)
    offsets = torch.searchsorted(lists_of, bounds, out_int32=True)
    pieces = ((offsets.diff() + (chunk - 1)) // chunk).clamp_(min=1).cumsum(0, dtype=torch.int32)
    return _Index(members, offsets, pieces)


def _constants(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, size: int, packing: _Packing) -> dict[str, Any]:
    """What all kernels of the arithmetic are compiled for."""
    (k0, k1), (v0, v1) = chunks(k.shape[3]), chunks(v.shape[3])
    # Wide float32 rows come fewer at a time: split in two for its products, one takes twice the shared memory.
    row_bytes = max(k0 + k1, v0 + v1) * q.dtype.itemsize * (2 if q.dtype == torch.float32 else 1)
    return {
        "SLOTS": indices.shape[3],
        "G": q.shape[2] // k.shape[2],
        "BLOCK": size,
        "KEYS": min(size, 64 if row_bytes <= 1024 else 32),
        "DK": k.shape[3],
        "K0": k0,
        "K1": k1,
        "DV": v.shape[3],
        "V0": v0,
        "V1": v1,
        "ACC": accumulator(q.dtype),
        "PRECISION": dot_precision(q.dtype),
        "PACKED": packing.located is not None,
    }


def _without(constants: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in constants.items() if name not in names}


def _parameters(name: str, q: Tensor, k: Tensor, v: Tensor) -> Launch:
    group = q.shape[2] // k.shape[2]
    found = launch(name, q.dtype, k.shape[3], v.shape[3], group, q.device)
    chunk = 2 if triton.knobs.runtime.interpret else 2048
    return {"SCATTER": group < 8, "CHUNK": chunk, **found}


def _compiled(parameters: Launch) -> Launch:
    return {name: parameters[name] for name in ("num_warps", "num_stages")}


def _by_query(constants: dict[str, Any], parameters: Launch, packing: _Packing, k: Tensor, v: Tensor) -> dict[str, Any]:
    """What the kernels that go by query are compiled for."""
    return {
        **constants,
        "ROWS": max(16, triton.next_power_of_2(constants["G"])),  # of a product, which has at least 16
        "SPAN": triton.next_power_of_2(constants["SLOTS"]),
        "KEYS": min(constants["BLOCK"], parameters["BLOCK_N"]),
        # A descriptor knows no sequences: what it reads beyond one's end may be anything, NaN included.
        "TMA": parameters["TMA"] and packing.located is None and describable(k, v),
        **_compiled(parameters),
    }


def _shares(heads: int, bytes_a_head: int) -> list[tuple[int, int]]:
    """Runs of heads whose partial results fit the space for them: first and number, none more than the first run's."""
    step = min(_LARGEST_GRID, max(1, PARTIAL_BYTES // max(1, bytes_a_head)))
    return [(first, min(step, heads - first)) for first in range(0, heads, step)]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    varlen: Varlen | None,
    num_keys: int,
    config: NSAConfig,
    scale: float,
) -> tuple[Tensor, Tensor]:
    (batch, num_queries, _, _), heads, size = q.shape, k.shape[2], config.select_block_size
    out = q.new_empty(*q.shape[:3], v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype))
    if not indices.numel():
        return out.zero_(), lse.fill_(-torch.inf)
    q, k, v = map(rows_contiguous, (q, k, v))
    strides, shift = tuple(x.stride()[:3] for x in (q, k, v)), num_keys - num_queries
    cu = (None, None) if varlen is None else (varlen.cu_seqlens_q, varlen.cu_seqlens_k)
    packing = _packing(num_queries, num_keys, cu[0], cu[1], size)
    constants = _constants(q, k, v, indices, size, packing)
    parameters = _parameters("selected_forward", q, k, v)
    with torch.cuda.device_of(q):
        if parameters["SCATTER"]:
            parameters = _parameters("selected_scatter", q, k, v)
            _forward_by_block(q, k, v, indices, out, lse, packing, constants, parameters, scale)
        else:
            options = _by_query(constants, parameters, packing, k, v)
            tiles = (descriptors(x, options["KEYS"], options["TMA"]) for x in (k, v))
            _forward_kernel[(num_queries * heads * batch,)](
                q, k, v, *chain(*tiles), indices, out, lse, packing.located, *strides, indices.stride(), num_queries,
                shift, scale, heads, **options,
            )  # fmt: skip
    return out, lse


def _forward_by_block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    out: Tensor,
    lse: Tensor,
    packing: _Packing,
    constants: dict[str, Any],
    parameters: Launch,
    scale: float,
) -> None:
    batch, num_queries, heads, slots = indices.shape
    num_keys, size, group, shift = k.shape[1], constants["BLOCK"], constants["G"], k.shape[1] - num_queries
    parts, chunk, strides = size // constants["KEYS"], parameters["CHUNK"], tuple(x.stride()[:3] for x in (q, k, v))
    index = _invert(indices, shift, packing, size, chunk)
    rows = num_queries * slots * parts * group
    shares = _shares(batch * heads, rows * v.shape[3] * q.element_size())
    partial, partial_lse = q.new_empty(shares[0][1], rows, v.shape[3]), lse.new_empty(shares[0][1], rows)
    for first, count in shares:
        lists = count * packing.blocks
        _scatter_kernel[(lists + count * num_queries * slots // chunk, parts)](
            q, k, v, *index[:3], partial, partial_lse, packing.located, packing.spans, *strides, num_queries, num_keys,
            shift, lists, packing.blocks, first * packing.blocks, first, scale, heads, ROWS=parameters["BLOCK_M"],
            CHUNK=chunk, **constants, **_compiled(parameters),
        )  # fmt: skip
        tile = 16 if triton.knobs.runtime.interpret else 32
        _gather_kernel[(triton.cdiv(num_queries * group, tile), count)](
            partial, partial_lse, indices, out, lse, packing.located, indices.stride(), num_queries, shift, first,
            heads, ROWS=tile, **_without(constants, "DK", "K0", "K1", "PRECISION"),
        )  # fmt: skip


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    indices: Tensor,
    varlen: Varlen | None,
    num_keys: int,
    config: NSAConfig,
    scale: float,
    *,
    gate: Tensor | None = None,
    dgate: Tensor | None = None,
    dq: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `branch_operator` has it.

    Args:
        gate: `[B, Tq, Hq]`, every third element of memory: what `dout` is to be multiplied by.
        dgate: the same for `gate`'s gradient, written.
        dq: contiguous, added to.
    """
    add = dq is not None
    if not indices.numel():
        return q.new_zeros(q.shape) if dq is None else dq, k.new_zeros(k.shape), v.new_zeros(v.shape)
    dq, dk, dv = q.new_empty(q.shape) if dq is None else dq, k.new_empty(k.shape), v.new_empty(v.shape)
    q, k, v, dout, out = (*map(rows_contiguous, (q, k, v, dout)), out.contiguous())
    (batch, num_queries, query_heads, _), heads, size = q.shape, k.shape[2], config.select_block_size
    strides, shift, group = tuple(x.stride()[:3] for x in (q, k, v, dout)), num_keys - num_queries, query_heads // heads
    cu = (None, None) if varlen is None else (varlen.cu_seqlens_q, varlen.cu_seqlens_k)
    packing = _packing(num_queries, num_keys, cu[0], cu[1], size)
    constants, slots = _constants(q, k, v, indices, size, packing), indices.shape[3]
    delta, lse2 = torch.empty_like(lse), torch.empty_like(lse)
    by_query, by_block = _parameters("selected_queries", q, k, v), _parameters("selected_keys", q, k, v)
    scatter, chunk, tile = by_block["SCATTER"], by_block["CHUNK"], 32

    with torch.cuda.device_of(q):
        _delta_kernel[(triton.cdiv(lse.numel(), tile),)](
            out, dout, lse, gate, delta, lse2, dgate, dout.stride()[:3], num_queries, lse.numel(), query_heads,
            DV=constants["DV"], V0=constants["V0"], V1=constants["V1"], ACC=constants["ACC"], ROWS=tile,
        )  # fmt: skip
        if not scatter:
            options = _by_query(constants, by_query, packing, k, v)
            tiles = (descriptors(x, options["KEYS"], options["TMA"]) for x in (k, v))
            _queries_kernel[(num_queries * heads * batch,)](
                q, k, v, *chain(*tiles), dout, lse, delta, gate, indices, dq, packing.located, *strides,
                indices.stride(), num_queries, shift, scale, heads, ADD=add, **options,
            )  # fmt: skip

        index = _invert(indices, shift, packing, size, chunk)
        counts = index.pieces.diff(prepend=index.pieces.new_zeros(1))
        shared = (counts * (counts > 1)).cumsum(0, dtype=torch.int32)
        # Where a list has several pieces, all but the last are whole: so many there can be.
        places, parts = 2 * (indices.numel() // chunk), size // constants["KEYS"]
        partial_dk, partial_dv = (lse.new_empty(places, size, x.shape[3]) for x in (k, v))
        rows = num_queries * slots * parts * group if scatter else 0
        shares = _shares(batch * heads, rows * k.shape[3] * q.element_size())
        partial_dq = q.new_empty(shares[0][1], rows, k.shape[3])
        for first, count in shares:
            lists = count * packing.blocks
            _keys_kernel[(lists + count * num_queries * slots // chunk, parts)](
                q, k, v, dout, lse2, delta, *index[:3], shared, dk, dv, partial_dk, partial_dv, partial_dq,
                packing.located, packing.spans, *strides, num_queries, num_keys, shift, lists, packing.blocks,
                first * packing.blocks, first, scale, heads, ROWS=by_block["BLOCK_M"], CHUNK=chunk,
                SCATTER=scatter, WEIGHTED=gate is not None, **constants,
                **_compiled(by_block),
            )  # fmt: skip
            if scatter:
                _gather_dq_kernel[(triton.cdiv(num_queries * group, tile), count)](
                    partial_dq, indices, dq, packing.located, indices.stride(), num_queries, shift, first, heads,
                    ROWS=tile, ADD=add, **_without(constants, "DV", "V0", "V1", "PRECISION"),
                )  # fmt: skip
        _reduce_kernel[(batch * heads * packing.blocks, parts)](
            partial_dk, partial_dv, index.pieces, shared, dk, dv, packing.spans, num_keys, packing.blocks, heads,
            **_without(constants, "SLOTS", "G", "PRECISION"), num_warps=8,
        )  # fmt: skip
    return dq, dk, dv


_selected = branch_operator("nsa_triton", "selected_attention", forward, backward)


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    config: NSAConfig,
    varlen: Varlen | None,
    scale: float,
) -> Tensor:
    """Output `[B, Tq, Hq, Dv]`; see `nsa.functional.selected_attention`."""
    rest = (*tensors_of(varlen), k.shape[1], sizes_of(config), scale)
    return cast(tuple[Tensor, Tensor], _selected(q, k, v, indices, *rest))[0]
