"""Selected attention, query-major, by tiles of a few neighbouring queries: the forward and the gradient of the queries.

Neighbouring queries select many of the same blocks. A program has `QUERIES` of them and one KV head, which is
`QUERIES * G` rows, and walks once over all blocks that any of them selected. A block is read once for the tile, and
products have enough rows for the matrix units; the price is the products of rows whose query did not select the block,
which have no weight. It pays where `G` is large, as then few queries make a tile.

`_schedule_kernel` lists the blocks of each tile: for a block, the token that it starts at and a bit for each query.
The arithmetic is that of `nsa.kernels.selected_by_query`.

A query has no part in what it does not see, whatever that holds. Weights of 0 do not ensure it, as 0 times NaN is NaN:
where a result is not finite, the program works once more (CLEAN), leaves rows that are not finite out of the products,
and gives NaN as their weight where they are seen.
"""

from itertools import chain
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from nsa.kernels.block_index import Packing, query_positions, sees_block
from nsa.kernels.configs import TileConfig
from nsa.kernels.launches import recordable
from nsa.kernels.primitives import (
    LN2,
    LOG2E,
    add_dot,
    cdiv,
    describable,
    descriptors,
    dot_chunks,
    find_program,
    load_chunks,
    logit_factor,
    next_power_of_2,
    not_finite,
    program_of,
    store_chunks,
    without,
    zero_unless_finite,
)
from nsa.kernels.selected_by_query import fetch_keys

_MOST_QUERIES = 4
"""A tile has this many queries at most."""

# Sizes that change from call to call and are no reason to compile again.
_LENGTHS = ("num_queries", "num_keys", "shift", "num_tiles")


@triton.jit
def _either(start, queries, later_start, later_queries):
    return later_start, tl.where(start == later_start, queries | later_queries, later_queries)


@recordable(do_not_specialize=_LENGTHS)
def _schedule_kernel(
    indices, schedule, counts, query_table, index_strides, num_queries, shift, num_tiles, HEADS,
    NUM_SELECTED: tl.constexpr, QUERIES: tl.constexpr, PAIRS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """The blocks of one tile, each once, in the order of their tokens, and how many there are. An entry has a bit for
    each query in its lowest bits; the others are a token."""
    NONE: tl.constexpr = 2**31 - 1
    tile, head, batch = find_program(tl.program_id(0), num_tiles, HEADS)
    pair = tl.arange(0, PAIRS)
    of_tile = pair // NUM_SELECTED
    query = tile * QUERIES + of_tile
    inside = (of_tile < QUERIES) & (query < num_queries)
    indices += batch.to(tl.int64) * index_strides[0] + head.to(tl.int64) * index_strides[2]
    offsets = query.to(tl.int64) * index_strides[1] + (pair % NUM_SELECTED).to(tl.int64) * index_strides[3]
    block = tl.load(indices + offsets, mask=inside, other=-1)
    valid = inside & sees_block(block, query_positions(query_table, query, shift, inside, PACKED), BLOCK_SIZE)
    start = tl.where(valid, block, 0) * BLOCK_SIZE
    if PACKED:
        start += tl.load(query_table + 3 * query.to(tl.int64) + 1, mask=inside, other=0)
    key = tl.sort(tl.where(valid, (start << QUERIES) + of_tile, NONE))
    valid = key != NONE
    start = key >> QUERIES
    _, queries = tl.associative_scan((start, 1 << (key & (2**QUERIES - 1))), 0, _either, reverse=True)
    first = valid & ((pair == 0) | (tl.gather(start, tl.maximum(pair - 1, 0), 0) != start))
    schedule += tl.program_id(0).to(tl.int64) * (QUERIES * NUM_SELECTED)
    place = tl.cumsum(first.to(tl.int32), 0) - 1
    tl.store(schedule + place, (start << QUERIES) | queries, mask=first)
    tl.store(counts + tl.program_id(0), tl.sum(first.to(tl.int32), 0))


@triton.jit
def _find_rows(
    tile, head, batch, query_table, num_queries, shift, HEADS, QUERIES: tl.constexpr, G: tl.constexpr,
    BLOCK_M: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Rows of a tile: which query of it, query, head of the group, number among all rows, last token that each sees,
    the least of these, and which rows there are."""
    row = tl.arange(0, BLOCK_M)
    of_tile = row // G
    query = tile * QUERIES + of_tile
    inside = (of_tile < QUERIES) & (query < num_queries)
    query = query.to(tl.int64)
    limit = query_positions(query_table, query, shift, inside, PACKED)
    if PACKED:
        limit += tl.load(query_table + 3 * query + 1, mask=inside, other=0)
    place = ((batch.to(tl.int64) * num_queries + query) * HEADS + head) * G + row % G
    return of_tile, query, (row % G).to(tl.int64), place, limit, tl.min(tl.where(inside, limit, 2**31 - 1), 0), inside


@triton.jit
def _hide(s, token, limit, least, chosen, BLOCK_N: tl.constexpr, CLEAN: tl.constexpr):
    """Logits `[M, BLOCK_N]` of the keys from `token` on with `-inf` beyond the last token that a row sees, and which
    keys are visible. Rows that did not choose the block are hidden with CLEAN alone: otherwise they get a base at which
    all weights are 0."""
    visible = (token + tl.arange(0, BLOCK_N))[None, :] <= limit[:, None]
    if CLEAN:
        visible = visible & chosen[:, None]
        s = tl.where(visible, s, float("-inf"))
    elif token + BLOCK_N - 1 > least:
        s = tl.where(visible, s, float("-inf"))
    return s, visible


@recordable(do_not_specialize=_LENGTHS)
def _forward_kernel(
    q, k, v, k_tiles0, k_tiles1, v_tiles0, v_tiles1, schedule, counts, out, lse, query_table, q_strides, k_strides,
    v_strides, num_queries, num_keys, shift, num_tiles, factor, HEADS, NUM_SELECTED: tl.constexpr,
    QUERIES: tl.constexpr, G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
    DK: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr, TMA: tl.constexpr, NEGATIVE: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = BLOCK_SIZE // BLOCK_N
    poisoned = 1.0
    for CLEAN in tl.static_range(2):
        if poisoned != 0:
            program = program_of(poisoned, CLEAN)
            tile, head, batch = find_program(program, num_tiles, HEADS)
            of_tile, query, of_group, place, limit, least, inside = _find_rows(
                tile, head, batch, query_table, num_queries, shift, HEADS, QUERIES, G, BLOCK_M, PACKED
            )
            batch64, head64 = batch.to(tl.int64), head.to(tl.int64)
            q_head = q + batch64 * q_strides[0] + head64 * G * q_strides[2]
            k_head = k + batch64 * k_strides[0] + head64 * k_strides[2]
            v_head = v + batch64 * v_strides[0] + head64 * v_strides[2]
            q0, q1 = load_chunks(q_head, query * q_strides[1] + of_group * q_strides[2], inside, DK, K0, K1)
            entries = schedule + program.to(tl.int64) * (QUERIES * NUM_SELECTED)
            count = tl.load(counts + program)

            row_max = tl.full([BLOCK_M], float("-inf"), dtype=ACC)
            row_sum = tl.zeros([BLOCK_M], dtype=ACC)
            out0 = tl.zeros([BLOCK_M, V0], dtype=ACC)
            out1 = tl.zeros([BLOCK_M, V1 if V1 > 0 else 16], dtype=ACC)
            entry = tl.load(entries, mask=count > 0, other=0)
            for step in range(0, count * PARTS):
                token = (entry >> QUERIES) + step % PARTS * BLOCK_N
                chosen = ((entry >> of_tile) & 1) != 0
                # Loaded a step ahead, so that the next block's address is known when it is needed.
                entry = tl.load(entries + tl.minimum((step + 1) // PARTS, count - 1))
                real = token + tl.arange(0, BLOCK_N) < num_keys
                k0, k1 = fetch_keys(
                    k_tiles0, k_tiles1, k_head, batch, head, token, k_strides[1], real, DK, K0, K1, BLOCK_N,
                    TMA and not CLEAN,
                )  # fmt: skip
                v0, v1 = fetch_keys(
                    v_tiles0, v_tiles1, v_head, batch, head, token, v_strides[1], real, DV, V0, V1, BLOCK_N,
                    TMA and not CLEAN,
                )  # fmt: skip
                s = dot_chunks(q0, q1, k0, k1, K1, ACC, PRECISION)
                if NEGATIVE:
                    s = -s
                s, visible = _hide(s, token, limit, least, chosen, BLOCK_N, CLEAN)
                new_max = tl.where(chosen, tl.maximum(row_max, tl.max(s, 1) * factor), row_max)
                # Rows that see none of these keys have a base at which all weights are 0.
                base = tl.where(chosen & (new_max > float("-inf")), new_max, float("inf"))
                rescale = tl.exp2(row_max - tl.where(new_max > float("-inf"), new_max, 0.0))
                p = tl.exp2(s * factor - base[:, None])
                row_max = new_max
                row_sum = row_sum * rescale + tl.sum(p, 1)
                if CLEAN:
                    bad = not_finite(v0, v1, V1, ACC)
                    v0, v1 = without(v0, v1, bad, V1)
                    p = tl.where(visible & bad[None, :], float("nan"), p)
                out0 *= rescale[:, None]
                if V1 > 0:
                    out1 *= rescale[:, None]
                out0, out1 = add_dot(p.to(v0.dtype), v0, v1, out0, out1, V1, ACC, PRECISION)

            empty = row_sum == 0
            row_sum = tl.where(empty, 1.0, row_sum)
            row_lse = (row_max + tl.log2(row_sum)) * LN2
            tl.store(lse + place, tl.where(empty, float("-inf"), row_lse), mask=inside)
            share = (1.0 / row_sum)[:, None]
            out0 *= share
            out1 *= share
            store_chunks(out, place * DV, inside, out0, out1, DV, V0, V1)
            if not CLEAN:
                poisoned = zero_unless_finite(out0, out1, V1, ACC)


@recordable(do_not_specialize=_LENGTHS)
def _bwd_dq_kernel(
    q, k, v, k_tiles0, k_tiles1, v_tiles0, v_tiles1, dout, lse, delta, gate, schedule, counts, dq, query_table,
    q_strides, k_strides, v_strides, do_strides, num_queries, num_keys, shift, num_tiles, scale, factor, HEADS,
    NUM_SELECTED: tl.constexpr, QUERIES: tl.constexpr, G: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, DK: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
    DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr, TMA: tl.constexpr, ADD: tl.constexpr, NEGATIVE: tl.constexpr,
):  # fmt: skip
    """`dq` times the gate, added to what is there with ADD."""
    PARTS: tl.constexpr = BLOCK_SIZE // BLOCK_N
    poisoned = 1.0
    for CLEAN in tl.static_range(2):
        if poisoned != 0:
            program = program_of(poisoned, CLEAN)
            tile, head, batch = find_program(program, num_tiles, HEADS)
            of_tile, query, of_group, place, limit, least, inside = _find_rows(
                tile, head, batch, query_table, num_queries, shift, HEADS, QUERIES, G, BLOCK_M, PACKED
            )
            batch64, head64 = batch.to(tl.int64), head.to(tl.int64)
            q_head = q + batch64 * q_strides[0] + head64 * G * q_strides[2]
            k_head = k + batch64 * k_strides[0] + head64 * k_strides[2]
            v_head = v + batch64 * v_strides[0] + head64 * v_strides[2]
            dout_head = dout + batch64 * do_strides[0] + head64 * G * do_strides[2]
            q0, q1 = load_chunks(q_head, query * q_strides[1] + of_group * q_strides[2], inside, DK, K0, K1)
            do0, do1 = load_chunks(dout_head, query * do_strides[1] + of_group * do_strides[2], inside, DV, V0, V1)
            row_delta = tl.load(delta + place, mask=inside, other=0.0)
            row_lse2 = tl.load(lse + place, mask=inside, other=0.0) * LOG2E
            entries = schedule + program.to(tl.int64) * (QUERIES * NUM_SELECTED)
            count = tl.load(counts + program)

            dq0 = tl.zeros([BLOCK_M, K0], dtype=ACC)
            dq1 = tl.zeros([BLOCK_M, K1 if K1 > 0 else 16], dtype=ACC)
            entry = tl.load(entries, mask=count > 0, other=0)
            for step in range(0, count * PARTS):
                token = (entry >> QUERIES) + step % PARTS * BLOCK_N
                chosen = ((entry >> of_tile) & 1) != 0
                entry = tl.load(entries + tl.minimum((step + 1) // PARTS, count - 1))
                real = token + tl.arange(0, BLOCK_N) < num_keys
                k0, k1 = fetch_keys(
                    k_tiles0, k_tiles1, k_head, batch, head, token, k_strides[1], real, DK, K0, K1, BLOCK_N,
                    TMA and not CLEAN,
                )  # fmt: skip
                v0, v1 = fetch_keys(
                    v_tiles0, v_tiles1, v_head, batch, head, token, v_strides[1], real, DV, V0, V1, BLOCK_N,
                    TMA and not CLEAN,
                )  # fmt: skip
                s = dot_chunks(q0, q1, k0, k1, K1, ACC, PRECISION)
                if NEGATIVE:
                    s = -s
                dp = dot_chunks(do0, do1, v0, v1, V1, ACC, PRECISION)
                s, visible = _hide(s, token, limit, least, chosen, BLOCK_N, CLEAN)
                base = tl.where(chosen, row_lse2, float("inf"))
                ds = tl.exp2(s * factor - base[:, None]) * (dp - row_delta[:, None])
                if CLEAN:
                    ds = tl.where(visible, ds, 0.0)
                    k0, k1 = without(k0, k1, not_finite(k0, k1, K1, ACC), K1)
                dq0, dq1 = add_dot(ds.to(k0.dtype), k0, k1, dq0, dq1, K1, ACC, PRECISION)
            stored = inside
            if not CLEAN:
                poisoned = zero_unless_finite(dq0, dq1, K1, ACC)
                stored = tl.where(inside, poisoned, 1.0) == 0  # what is added cannot be taken back
            times = tl.full([BLOCK_M], 1.0, ACC) * scale
            if gate is not None:
                times *= tl.load(gate + 3 * place, mask=inside, other=0.0).to(ACC)
            store_chunks(dq, place * DK, stored, dq0 * times[:, None], dq1 * times[:, None], DK, K0, K1, ADD)


# Launchers. `constants` are those of `nsa.kernels.selected_attention`.


def _queries_of(config: TileConfig, group: int) -> int:
    """Queries of a tile."""
    return min(_MOST_QUERIES, config.BLOCK_M // group)


def applies(config: TileConfig, group: int, num_keys: int) -> bool:
    """Whether a tile has several queries and the sequences are not too long for tiles."""
    queries = _queries_of(config, group)
    return queries > 1 and num_keys <= min(config.most_keys, most_keys(queries))


def most_keys(queries: int) -> int:
    """The largest number of keys, of all sequences together: an entry has no more bits for a token."""
    return 1 << 31 - queries


def schedule_tiles(
    indices: Tensor, shift: int, packing: Packing, constants: dict[str, Any], queries: int
) -> tuple[Tensor, Tensor, int]:
    """The schedules of all tiles, the number of their entries, and the number of tiles of a head."""
    batch, num_queries, heads, num_selected = indices.shape
    tiles = cdiv(num_queries, queries)
    schedule = indices.new_empty(batch * heads * tiles, queries * num_selected)
    counts = indices.new_empty(batch * heads * tiles)
    _schedule_kernel[(batch * heads * tiles,)](
        indices, schedule, counts, packing.query_table, indices.stride(), num_queries, shift, tiles, heads,
        NUM_SELECTED=num_selected, QUERIES=queries, PAIRS=next_power_of_2(queries * num_selected),
        BLOCK_SIZE=constants["BLOCK_SIZE"], PACKED=constants["PACKED"], num_warps=1,
    )  # fmt: skip
    return schedule, counts, tiles


def _options(constants: dict[str, Any], config: TileConfig, k: Tensor, v: Tensor) -> dict[str, Any]:
    """What both kernels are compiled for."""
    return {
        **constants,
        **config.options,
        "QUERIES": _queries_of(config, constants["G"]),
        "BLOCK_N": min(constants["BLOCK_SIZE"], config.BLOCK_N),
        "TMA": config.TMA and describable(k, v),
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
    config: TileConfig,
    scale: float,
) -> None:
    """Writes `out` and `lse`."""
    (batch, num_queries, heads, _), num_keys = indices.shape, k.shape[1]
    strides, options = (x.stride()[:3] for x in (q, k, v)), _options(constants, config, k, v)
    schedule, counts, tiles = schedule_tiles(indices, num_keys - num_queries, packing, constants, options["QUERIES"])
    described = (descriptors(x, options["BLOCK_N"], options["TMA"]) for x in (k, v))
    _forward_kernel[(tiles * heads * batch,)](
        q, k, v, *chain(*described), schedule, counts, out, lse, packing.query_table, *strides, num_queries, num_keys,
        num_keys - num_queries, tiles, logit_factor(scale), heads, NEGATIVE=scale < 0, **options,
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
    config: TileConfig,
    scale: float,
    add: bool,
) -> None:
    """Writes `dq`, or adds to it."""
    (batch, num_queries, heads, _), num_keys = indices.shape, k.shape[1]
    strides, options = (x.stride()[:3] for x in (q, k, v, dout)), _options(constants, config, k, v)
    schedule, counts, tiles = schedule_tiles(indices, num_keys - num_queries, packing, constants, options["QUERIES"])
    described = (descriptors(x, options["BLOCK_N"], options["TMA"]) for x in (k, v))
    _bwd_dq_kernel[(tiles * heads * batch,)](
        q, k, v, *chain(*described), dout, lse, delta, gate, schedule, counts, dq, packing.query_table, *strides,
        num_queries, num_keys, num_keys - num_queries, tiles, scale, logit_factor(scale), heads, ADD=add,
        NEGATIVE=scale < 0, **options,
    )  # fmt: skip
