"""Selected attention by tiles of neighbouring queries on Hopper: the forward and the gradient of the queries.

The way and the arithmetic are those of `nsa.kernels.selected_by_tile`. They are written in Gluon, where the program
itself says what is loaded when, and waits for it. A program has 64 rows, which are `QUERIES = 64 / G` neighbouring
queries of one KV head, and walks once over all blocks of 64 keys that any of them selected, as `schedule_tiles` lists
them. With logits in base 2, `s = scale log2(e) q.k`, a step of the forward updates, for each row whose query selected
the block,

    row_max' = max(row_max, max s),    p = 2^(s - row_max'),    r = 2^(row_max - row_max')
    row_sum' = r row_sum + sum p,      acc' = r acc + p v

and a step of the backward, with `p = 2^(s - lse / ln 2)`, adds `p (dout.v - delta) k` to `dq / scale`. Other rows have
infinity in place of `row_max'` and of `lse`, so that their `p` is 0.

A program is one group of four warps, which asks for its own loads: several programs on a multiprocessor hide each
other's waits. There is room for the keys and for the values of one block, each with a barrier, `k_full` and `v_full`.
Load `i` of either is started when all warps are through with load `i - 1`, so that no warp is more than one phase of
the barrier behind, and who waits for load `i` waits for the phase of parity `i % 2`. Every load that is started is
waited for; a tile without blocks starts none.

Rows beyond the last query or key come as 0 and are never written, and tiles do not reach into another batch row.
A query has no part in what it does not see, whatever that holds: where a result is not finite, the program walks once
more (CLEAN), leaves rows that are not finite out of the products, and gives NaN as their weight where they are seen.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nsa.kernels.block_index import Packing
from nsa.kernels.configs import HopperTileConfig
from nsa.kernels.hopper.primitives import barrier, describable_heads, describe, load_tile, store_tile
from nsa.kernels.launches import recordable
from nsa.kernels.primitives import LN2, LOG2E, Heads, find_program, logit_factor
from nsa.kernels.selected_by_tile import most_keys, schedule_tiles

_ROWS = gl.constexpr(64)
"""Rows of a tile, which is what a warpgroup multiplies."""

_BLOCK = gl.constexpr(64)
"""Keys of a block."""

_LOGITS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
_ROW = gl.constexpr(gl.SliceLayout(1, _LOGITS.value))
_COLUMN = gl.constexpr(gl.SliceLayout(0, _LOGITS.value))
"""Layouts of logits `[64, 64]`, of what there is one of a row, and of what there is one of a column."""

_LOWEST = gl.constexpr(-3.4028234663852886e38)
"""Where maxima begin: the lowest of all numbers, because the difference of two infinities is NaN."""

# Sizes that change from call to call and are no reason to compile again.
_LENGTHS = ("num_queries", "shift", "num_tiles")


@gluon.jit
def _new_barriers():
    """Three barriers that each wait for one load. They have allocations of their own, because the compiler separates
    accesses to the same one."""
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    mbarrier.init(k_full, count=1)
    mbarrier.init(v_full, count=1)
    fence_async_shared()
    barrier()
    return q_full, k_full, v_full


@gluon.jit
def _ask(tiles, buffer, full, batch, token, head, wanted):
    """Starts to load the tile at these coordinates, if it is wanted, when all warps are through with the last one."""
    mbarrier.expect(full, tiles.block_type.nbytes, pred=wanted)
    barrier()
    load_tile(tiles, [batch, token, head, 0], full, buffer, pred=wanted)


@gluon.jit
def _again(program, poisoned):
    """The same number, as `poisoned` is 0 or NaN. The compiler does not know that, and so finds what is needed after a
    walk anew, instead of keeping it in registers throughout."""
    return program + (poisoned > 0).to(gl.int32)


@gluon.jit
def _find_rows(
    program, num_queries, num_tiles, HEADS, QUERIES: gl.constexpr, G: gl.constexpr, LAYOUT: gl.constexpr
):  # fmt: skip
    """Rows of a tile: number among all rows, and which there are."""
    tile, head, batch = find_program(program, num_tiles, HEADS)
    row = gl.arange(0, _ROWS, layout=LAYOUT)
    query = tile * QUERIES + row // G
    place = ((batch.to(gl.int64) * num_queries + query) * HEADS + head) * G + row % G
    return place, query < num_queries


@gluon.jit
def _hide(s, token, least, of_tile, chosen, NEGATIVE: gl.constexpr, CLEAN: gl.constexpr):
    """Logits of the keys from `token` on with `-inf` beyond the last key that a row sees, and which keys are visible.
    Rows that did not choose the block are hidden with CLEAN alone: otherwise all their weights are 0."""
    column = gl.arange(0, _BLOCK, layout=_COLUMN)
    visible = (token + column)[None, :] <= (least + of_tile)[:, None]
    if NEGATIVE:
        s = -s
    if CLEAN:
        visible = visible & chosen[:, None]
        s = gl.where(visible, s, float("-inf"))
    elif token + _BLOCK - 1 > least:
        s = gl.where(visible, s, float("-inf"))
    return s, visible


@gluon.jit
def _clean(rows):
    """Sets rows `[64, D]` of shared memory that hold an infinity or a NaN to 0, and tells which of `[64]` they were."""
    D: gl.constexpr = rows.shape[1]
    SPLIT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    x = rows.load(SPLIT)
    bad = gl.max((~(gl.abs(x.to(gl.float32)) < float("inf"))).to(gl.int32), 1)
    rows.store(gl.where((bad > 0)[:, None], 0.0, x).to(x.dtype))
    fence_async_shared()
    barrier()
    return gl.convert_layout(bad, _COLUMN) > 0


@gluon.jit
def _zero_unless_finite(x):
    """0, or NaN where `x` holds an infinity or a NaN."""
    return gl.sum(gl.sum(x * 0.0, 1), 0)


@gluon.jit
def _walk_forward(
    program, q_rows, k_tiles, v_tiles, k_buffer, v_buffer, q_full, k_full, v_full, schedule, counts, shift, num_tiles,
    factor, HEADS, NUM_SELECTED: gl.constexpr, QUERIES: gl.constexpr, G: gl.constexpr, NEGATIVE: gl.constexpr,
    CLEAN: gl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of the rows."""
    D: gl.constexpr = q_rows.shape[1]
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SUMS, k_width=2)
    k_rows = k_buffer.reshape([_BLOCK, D])
    v_rows = v_buffer.reshape([_BLOCK, D])
    of_tile = gl.arange(0, _ROWS, layout=_ROW) // G
    nothing = gl.zeros([_ROWS, _BLOCK], gl.float32, layout=_LOGITS)
    row_max = gl.full([_ROWS], _LOWEST, gl.float32, layout=_ROW)
    row_sum = gl.zeros([_ROWS], gl.float32, layout=_ROW)
    acc = gl.zeros([_ROWS, D], gl.float32, layout=SUMS)

    tile, head, batch = find_program(program, num_tiles, HEADS)
    least = tile * QUERIES + shift
    count = gl.load(counts + program)
    loaded = count if CLEAN else 0
    entries = schedule + program.to(gl.int64) * (QUERIES * NUM_SELECTED)
    entry = gl.load(entries, mask=count > 0, other=0)
    _ask(k_tiles, k_buffer, k_full, batch, entry >> QUERIES, head, count > 0)
    _ask(v_tiles, v_buffer, v_full, batch, entry >> QUERIES, head, count > 0)
    mbarrier.wait(q_full, 0)
    for step in range(count):
        token = entry >> QUERIES
        chosen = ((entry >> of_tile) & 1) != 0
        # Loaded a step ahead, so that the next block's address is known when it is needed.
        entry = gl.load(entries + gl.minimum(step + 1, count - 1))
        phase = (loaded + step) & 1
        more = step + 1 < count

        mbarrier.wait(k_full, phase)
        s = warpgroup_mma(q_rows, k_rows.permute((1, 0)), nothing, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,))
        _ask(k_tiles, k_buffer, k_full, batch, entry >> QUERIES, head, more)

        s, visible = _hide(s, token, least, of_tile, chosen, NEGATIVE, CLEAN)
        new_max = gl.where(chosen, gl.maximum(row_max, gl.max(s, 1) * factor), row_max)
        base = gl.where(chosen, new_max, float("inf"))
        rescale = gl.exp2(row_max - new_max)
        p = gl.exp2(s * factor - base[:, None])
        row_max = new_max
        row_sum = row_sum * rescale + gl.sum(p, 1)
        acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, SUMS))[:, None]
        if CLEAN:
            mbarrier.wait(v_full, phase)
            bad = _clean(v_rows)
            p = gl.where(visible & bad[None, :], float("nan"), p)
        weights = gl.convert_layout(p.to(v_tiles.dtype), WEIGHTS)
        if not CLEAN:
            mbarrier.wait(v_full, phase)
        acc = warpgroup_mma(weights, v_rows, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        _ask(v_tiles, v_buffer, v_full, batch, entry >> QUERIES, head, more)
    empty = row_sum == 0
    row_sum = gl.where(empty, 1.0, row_sum)
    row_lse = gl.where(empty, float("-inf"), (row_max + gl.log2(row_sum)) * LN2)
    return acc * gl.convert_layout(1.0 / row_sum, gl.SliceLayout(1, SUMS))[:, None], row_lse


@recordable(gluon=True, do_not_specialize=_LENGTHS)
def _forward_kernel(
    q_tiles, k_tiles, v_tiles, out_tiles, lse, schedule, counts, num_queries, shift, num_tiles, factor, HEADS,
    NUM_SELECTED: gl.constexpr, QUERIES: gl.constexpr, G: gl.constexpr, NEGATIVE: gl.constexpr,
):  # fmt: skip
    D: gl.constexpr = q_tiles.block_type.shape[3]
    q_buffer = gl.allocate_shared_memory(q_tiles.dtype, [1, QUERIES, G, D], q_tiles.layout)
    k_buffer = gl.allocate_shared_memory(k_tiles.dtype, [1, _BLOCK, 1, D], k_tiles.layout)
    v_buffer = gl.allocate_shared_memory(v_tiles.dtype, [1, _BLOCK, 1, D], v_tiles.layout)
    q_full, k_full, v_full = _new_barriers()

    program = gl.program_id(0)
    tile, head, batch = find_program(program, num_tiles, HEADS)
    _ask(q_tiles, q_buffer, q_full, batch, tile * QUERIES, head * G, True)
    q_rows = q_buffer.reshape([_ROWS, D])
    out, row_lse = _walk_forward(
        program, q_rows, k_tiles, v_tiles, k_buffer, v_buffer, q_full, k_full, v_full, schedule, counts, shift,
        num_tiles, factor, HEADS, NUM_SELECTED, QUERIES, G, NEGATIVE, False,
    )  # fmt: skip
    poisoned = _zero_unless_finite(out)
    program = _again(program, poisoned)
    if poisoned != 0:
        out, row_lse = _walk_forward(
            program, q_rows, k_tiles, v_tiles, k_buffer, v_buffer, q_full, k_full, v_full, schedule, counts, shift,
            num_tiles, factor, HEADS, NUM_SELECTED, QUERIES, G, NEGATIVE, True,
        )  # fmt: skip

    place, inside = _find_rows(program, num_queries, num_tiles, HEADS, QUERIES, G, _ROW)
    gl.store(lse + place, row_lse, mask=inside)
    q_rows.store(out.to(q_tiles.dtype))
    fence_async_shared()
    tile, head, batch = find_program(program, num_tiles, HEADS)
    store_tile(out_tiles, [batch, tile * QUERIES, head * G, 0], q_buffer)
    tma.store_wait(0)


@gluon.jit
def _walk_dq(
    program, q_rows, do_rows, k_tiles, v_tiles, k_buffer, v_buffer, q_full, k_full, v_full, lse, delta, schedule,
    counts, num_queries, shift, num_tiles, factor, HEADS, NUM_SELECTED: gl.constexpr, QUERIES: gl.constexpr,
    G: gl.constexpr, NEGATIVE: gl.constexpr, CLEAN: gl.constexpr,
):  # fmt: skip
    """`dq` over the scale."""
    D: gl.constexpr = q_rows.shape[1]
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SUMS, k_width=2)
    k_rows = k_buffer.reshape([_BLOCK, D])
    v_rows = v_buffer.reshape([_BLOCK, D])
    of_tile = gl.arange(0, _ROWS, layout=_ROW) // G
    nothing = gl.zeros([_ROWS, _BLOCK], gl.float32, layout=_LOGITS)
    dq = gl.zeros([_ROWS, D], gl.float32, layout=SUMS)
    place, inside = _find_rows(program, num_queries, num_tiles, HEADS, QUERIES, G, _ROW)
    row_lse2 = gl.load(lse + place, mask=inside, other=0.0) * LOG2E
    row_delta = gl.load(delta + place, mask=inside, other=0.0)

    tile, head, batch = find_program(program, num_tiles, HEADS)
    least = tile * QUERIES + shift
    count = gl.load(counts + program)
    loaded = count if CLEAN else 0
    entries = schedule + program.to(gl.int64) * (QUERIES * NUM_SELECTED)
    entry = gl.load(entries, mask=count > 0, other=0)
    _ask(v_tiles, v_buffer, v_full, batch, entry >> QUERIES, head, count > 0)
    _ask(k_tiles, k_buffer, k_full, batch, entry >> QUERIES, head, count > 0)
    mbarrier.wait(q_full, 0)
    for step in range(count):
        token = entry >> QUERIES
        chosen = ((entry >> of_tile) & 1) != 0
        # Loaded a step ahead, so that the next block's address is known when it is needed.
        entry = gl.load(entries + gl.minimum(step + 1, count - 1))
        phase = (loaded + step) & 1
        more = step + 1 < count

        # Values are needed once a step and keys twice, so values are there first.
        mbarrier.wait(v_full, phase)
        dp = warpgroup_mma(do_rows, v_rows.permute((1, 0)), nothing, use_acc=False, is_async=True)
        mbarrier.wait(k_full, phase)
        s = warpgroup_mma(q_rows, k_rows.permute((1, 0)), nothing, use_acc=False, is_async=True)
        dp = warpgroup_mma_wait(1, deps=(dp,))
        _ask(v_tiles, v_buffer, v_full, batch, entry >> QUERIES, head, more)
        s = warpgroup_mma_wait(0, deps=(s,))

        s, visible = _hide(s, token, least, of_tile, chosen, NEGATIVE, CLEAN)
        base = gl.where(chosen, row_lse2, float("inf"))
        ds = gl.exp2(s * factor - base[:, None]) * (dp - row_delta[:, None])
        if CLEAN:
            ds = gl.where(visible, ds, 0.0)
            barrier()
            _clean(k_rows)
        dq = warpgroup_mma(gl.convert_layout(ds.to(k_tiles.dtype), WEIGHTS), k_rows, dq, is_async=True)
        dq = warpgroup_mma_wait(0, deps=(dq,))
        _ask(k_tiles, k_buffer, k_full, batch, entry >> QUERIES, head, more)
    return dq


@recordable(gluon=True, do_not_specialize=_LENGTHS)
def _bwd_dq_kernel(
    q_tiles, k_tiles, v_tiles, do_tiles, dq_tiles, lse, delta, gate, schedule, counts, num_queries, shift, num_tiles,
    scale, factor, HEADS, NUM_SELECTED: gl.constexpr, QUERIES: gl.constexpr, G: gl.constexpr, ADD: gl.constexpr,
    NEGATIVE: gl.constexpr,
):  # fmt: skip
    """`dq` times the gate, added to what is there with ADD."""
    D: gl.constexpr = q_tiles.block_type.shape[3]
    q_buffer = gl.allocate_shared_memory(q_tiles.dtype, [1, QUERIES, G, D], q_tiles.layout)
    do_buffer = gl.allocate_shared_memory(do_tiles.dtype, [1, QUERIES, G, D], do_tiles.layout)
    k_buffer = gl.allocate_shared_memory(k_tiles.dtype, [1, _BLOCK, 1, D], k_tiles.layout)
    v_buffer = gl.allocate_shared_memory(v_tiles.dtype, [1, _BLOCK, 1, D], v_tiles.layout)
    q_full, k_full, v_full = _new_barriers()

    program = gl.program_id(0)
    tile, head, batch = find_program(program, num_tiles, HEADS)
    mbarrier.expect(q_full, q_tiles.block_type.nbytes + do_tiles.block_type.nbytes)
    load_tile(q_tiles, [batch, tile * QUERIES, head * G, 0], q_full, q_buffer)
    load_tile(do_tiles, [batch, tile * QUERIES, head * G, 0], q_full, do_buffer)
    q_rows = q_buffer.reshape([_ROWS, D])
    do_rows = do_buffer.reshape([_ROWS, D])
    dq = _walk_dq(
        program, q_rows, do_rows, k_tiles, v_tiles, k_buffer, v_buffer, q_full, k_full, v_full, lse, delta, schedule,
        counts, num_queries, shift, num_tiles, factor, HEADS, NUM_SELECTED, QUERIES, G, NEGATIVE, False,
    )  # fmt: skip
    poisoned = _zero_unless_finite(dq)
    program = _again(program, poisoned)
    if poisoned != 0:
        dq = _walk_dq(
            program, q_rows, do_rows, k_tiles, v_tiles, k_buffer, v_buffer, q_full, k_full, v_full, lse, delta,
            schedule, counts, num_queries, shift, num_tiles, factor, HEADS, NUM_SELECTED, QUERIES, G, NEGATIVE, True,
        )  # fmt: skip

    tile, head, batch = find_program(program, num_tiles, HEADS)
    ROWS: gl.constexpr = gl.SliceLayout(1, dq.type.layout)
    times = gl.full([_ROWS], 1.0, gl.float32, layout=ROWS) * scale
    if gate is not None:
        place, inside = _find_rows(program, num_queries, num_tiles, HEADS, QUERIES, G, ROWS)
        times *= gl.load(gate + 3 * place, mask=inside, other=0.0).to(gl.float32)
    dq = dq * times[:, None]
    if ADD:
        # The queries are needed no more: what is there takes their place.
        _ask(dq_tiles, q_buffer, q_full, batch, tile * QUERIES, head * G, True)
        mbarrier.wait(q_full, 1)
        dq += q_rows.load(dq.type.layout).to(gl.float32)
    q_rows.store(dq.to(q_tiles.dtype))
    fence_async_shared()
    store_tile(dq_tiles, [batch, tile * QUERIES, head * G, 0], q_buffer)
    tma.store_wait(0)


# Launchers, with the arguments of those of `nsa.kernels.selected_by_tile`.


def _queries_of(group: int) -> int:
    """Queries of a tile."""
    return int(_ROWS.value) // group


def applies(
    config: HopperTileConfig, heads: Heads, constants: dict[str, Any], num_keys: int, tensors: Sequence[Tensor]
) -> bool:
    """Whether there are kernels for these heads, blocks and tensors, `q`, `k` and `v` first, and the sequences are not
    too long for tiles."""
    return (
        num_keys <= config.longest
        and heads.dk in (64, 128)
        and heads.group in (4, 8, 16, 32)
        and constants["BLOCK_SIZE"] == _BLOCK.value
        and not constants["PACKED"]
        and num_keys <= most_keys(_queries_of(heads.group))
        and describable_heads(*tensors)
    )


def _tiles(x: Tensor, tokens: int, heads: int) -> TensorDescriptor:
    """Describes `[B, T, H, D]` in tiles of some tokens and heads."""
    return describe(x, 1, tokens, heads, x.shape[3])


def _options(constants: dict[str, Any], config: HopperTileConfig, scale: float) -> dict[str, Any]:
    """What both kernels are compiled for."""
    group = constants["G"]
    return {
        "NUM_SELECTED": constants["NUM_SELECTED"],
        "QUERIES": _queries_of(group),
        "G": group,
        "NEGATIVE": scale < 0,
        **config.options,
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
    config: HopperTileConfig,
    scale: float,
) -> None:
    """Writes `out` and `lse`."""
    (batch, num_queries, heads, _), num_keys = indices.shape, k.shape[1]
    group, queries = constants["G"], _queries_of(constants["G"])
    schedule, counts, tiles = schedule_tiles(indices, num_keys - num_queries, packing, constants, queries)
    _forward_kernel[(tiles * heads * batch,)](
        _tiles(q, queries, group), _tiles(k, _BLOCK.value, 1), _tiles(v, _BLOCK.value, 1), _tiles(out, queries, group),
        lse, schedule, counts, num_queries, num_keys - num_queries, tiles, logit_factor(scale), heads,
        **_options(constants, config, scale),
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
    config: HopperTileConfig,
    scale: float,
    add: bool,
) -> None:
    """Writes `dq`, or adds to it."""
    (batch, num_queries, heads, _), num_keys = indices.shape, k.shape[1]
    group, queries = constants["G"], _queries_of(constants["G"])
    schedule, counts, tiles = schedule_tiles(indices, num_keys - num_queries, packing, constants, queries)
    _bwd_dq_kernel[(tiles * heads * batch,)](
        _tiles(q, queries, group), _tiles(k, _BLOCK.value, 1), _tiles(v, _BLOCK.value, 1),
        _tiles(dout, queries, group), _tiles(dq, queries, group), lse, delta, gate, schedule, counts, num_queries,
        num_keys - num_queries, tiles, scale, logit_factor(scale), heads, ADD=add,
        **_options(constants, config, scale),
    )  # fmt: skip
