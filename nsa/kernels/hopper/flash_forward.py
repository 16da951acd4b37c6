"""Forward pass of the compressed and of the window branch on Hopper: `nsa.kernels.flash_forward` in Gluon.

The mathematics is that file's: the online softmax over the keys that a map of positions shows to a row. What differs is
who does it. A program has a warp group that copies (TMA) and two warp groups that compute, each 64 rows of the
same tile, and as many programs as the GPU has processors take one tile after another.

A consumer keeps two products in flight. While the matrix unit multiplies the probabilities of tile `i - 1` with its
values and the queries with the keys of tile `i`, the consumer waits for the latter alone, and its exponentials of tile
`i` take place beside the former. The tiles of keys that need a mask come first, then those that need none: one loop
each. A tile of rows that sees no key takes one tile of keys all the same, of which the mask leaves nothing: every tile
of rows has at least one, and the barriers know no exception.

Barriers. Loads of keys are numbered through all tiles of a program: load `g` goes to slot `g % STAGES` of the ring of
keys and is the slot's use number `g // STAGES`; values have a ring alike. `k_full` of a slot completes when a load has
arrived, `k_empty` when all consumers have read it. A barrier's phases are told apart by their parity, so who waits for
the use `u` of a slot to arrive waits for parity `u % 2`, and the producer, before it fills a slot for use `u`, waits
for use `u - 1` to be read: for parity `(u - 1) % 2`, which on a new barrier counts as complete. The queries of a
consumer have one place, whose uses are the tiles of rows. All waits end, since the producer fills in the order in which
consumers read and each consumer reads all that is filled.

What is not finite is not treated here. A row whose sums are not finite gets NaN for its log-sum-exp, and the launcher
has the Triton kernel compute such rows again.
"""

from typing import NamedTuple

import triton.language as tl
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

from nsa.kernels.configs import multiprocessors
from nsa.kernels.flash_tiles import LENGTHS, PositionMap, count_visible, row_tile
from nsa.kernels.hopper.primitives import (
    count_turns,
    describable_heads,
    describe,
    load_tile,
    store_tile,
    turn_place,
)
from nsa.kernels.launches import recordable
from nsa.kernels.primitives import LN2, cdiv, online_softmax_update

_ROWS = tl.constexpr(64)
"""Rows of a consumer: those of one instruction of the matrix unit."""

_CONSUMERS = tl.constexpr(2)
"""Warp groups of a program that compute."""


@gluon.jit
def _find_tile(
    turn, sizes, STRIDE: gl.constexpr, LAST: gl.constexpr, WINDOWED: gl.constexpr, G: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """The tile of rows that this program takes in a turn: its KV head, batch row and first row; the position of the
    first query; the first key, the number of tiles of keys, and which of them, `[a, b)`, need no mask."""
    num_tiles, HEADS, num_queries, num_tokens, num_keys, window = sizes
    head, batch, first, _, _, shift, _, key_first, _, count, a, b = row_tile(
        turn_place(turn), num_tiles, HEADS, None, None, None, 0, num_queries, num_tokens, num_keys, window,
        STRIDE, LAST, WINDOWED, G, False, BLOCK_M, BLOCK_N, True,
    )  # fmt: skip
    return head, batch, first, shift, key_first, count, a, b


@gluon.jit
def _find_keys(i, key_first, masked, a, b, BLOCK_N: gl.constexpr):
    """The first key of the `i`-th tile: the `masked` ones stand on both sides of `[a, b)` and come before it."""
    tile = gl.where(i < masked, i + gl.where(i < a, 0, b - a), a + i - masked)
    return key_first + tile * BLOCK_N


@gluon.jit
def _mask(s, keys, num_visible, first_visible, WINDOWED: gl.constexpr):
    """Scaled logits, and `-inf` where a row does not see a key."""
    visible = keys[None, :] < num_visible[:, None]
    if WINDOWED:
        visible = visible & (keys[None, :] >= first_visible[:, None])
    return gl.where(visible, s, float("-inf"))


@gluon.jit
def _produce(
    q_tiles, k_tiles, v_tiles, places, barriers, total, sizes, STRIDE: gl.constexpr, LAST: gl.constexpr,
    WINDOWED: gl.constexpr, G: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copies the queries, keys and values of this program's tiles to shared memory."""
    q_place, k_ring, v_ring = places
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    load = 0
    for turn in range(count_turns(total)):
        head, batch, first, _, key_first, count, a, b = _find_tile(
            turn, sizes, STRIDE, LAST, WINDOWED, G, _ROWS * _CONSUMERS, BLOCK_N
        )
        masked = count - (b - a)
        for i in range(gl.maximum(count, 1)):
            row = _find_keys(i, key_first, masked, a, b, BLOCK_N)
            slot = load % STAGES
            read = (load // STAGES & 1) ^ 1
            mbarrier.wait(k_empty.index(slot), read)
            mbarrier.expect(k_full.index(slot), k_tiles.block_type.nbytes)
            load_tile(k_tiles, [batch, head, row, 0], k_full.index(slot), k_ring.index(slot))
            if i == 0:
                # After the first keys, for which there may be room before the last tile's queries are read.
                for c in gl.static_range(_CONSUMERS):
                    mbarrier.wait(q_empty.index(c), (turn & 1) ^ 1)
                    mbarrier.expect(q_full.index(c), q_tiles.block_type.nbytes)
                    token = (first + c * _ROWS) // G
                    load_tile(q_tiles, [batch, token, head * G, 0], q_full.index(c), q_place.index(c))
            mbarrier.wait(v_empty.index(slot), read)
            mbarrier.expect(v_full.index(slot), v_tiles.block_type.nbytes)
            load_tile(v_tiles, [batch, head, row, 0], v_full.index(slot), v_ring.index(slot))
            load += 1


@gluon.jit
def _consume(
    out_tiles, lse, out_place, places, barriers, total, sizes, scale_log2, STRIDE: gl.constexpr, LAST: gl.constexpr,
    WINDOWED: gl.constexpr, G: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    CONSUMER: gl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of this consumer's rows of this program's tiles."""
    q_place, k_ring, v_ring = places
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    HEADS = sizes[1]
    num_queries = sizes[2]
    window = sizes[5]
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    OF_ROW: gl.constexpr = gl.SliceLayout(1, LOGITS)
    OF_SUM: gl.constexpr = gl.SliceLayout(1, SUMS)
    dtype: gl.constexpr = k_ring.dtype
    q = q_place.index(CONSUMER).reshape([_ROWS, D])
    row = gl.arange(0, _ROWS, layout=OF_ROW)
    column = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LOGITS))
    nothing = gl.zeros([_ROWS, BLOCK_N], gl.float32, layout=LOGITS)
    load = 0
    for turn in range(count_turns(total)):
        head, batch, first, shift, key_first, count, a, b = _find_tile(
            turn, sizes, STRIDE, LAST, WINDOWED, G, _ROWS * _CONSUMERS, BLOCK_N
        )
        masked = count - (b - a)
        count = gl.maximum(count, 1)
        first += CONSUMER * _ROWS
        rows = first + row
        position = rows // G + shift
        num_visible = count_visible(position, STRIDE, LAST)
        first_visible = position - window + 1
        row_max = gl.full([_ROWS], float("-inf"), gl.float32, layout=OF_ROW)
        acc = gl.zeros([_ROWS, D], gl.float32, layout=SUMS)

        # The first tile of keys, masked whether it needs it or not.
        slot = load % STAGES
        mbarrier.wait(q_full.index(CONSUMER), turn & 1)
        mbarrier.wait(k_full.index(slot), load // STAGES & 1)
        s = warpgroup_mma(
            q, k_ring.index(slot).reshape([BLOCK_N, D]).permute((1, 0)), nothing, use_acc=False, is_async=True
        )
        s = warpgroup_mma_wait(0, deps=(s,))
        mbarrier.arrive(k_empty.index(slot), count=1)
        keys = _find_keys(0, key_first, masked, a, b, BLOCK_N) + column
        s = _mask(s * scale_log2, keys, num_visible, first_visible, WINDOWED)
        p, rescale, row_max = online_softmax_update(s, row_max, scale_log2, True)
        row_sum = gl.sum(p, 1)
        weights = gl.convert_layout(p.to(dtype), WEIGHTS)

        for FULL in gl.static_range(2):
            for i in range(gl.maximum(masked, 1) if FULL else 1, count if FULL else masked):
                before = (load + i - 1) % STAGES
                slot = (load + i) % STAGES
                mbarrier.wait(k_full.index(slot), (load + i) // STAGES & 1)
                s = warpgroup_mma(
                    q, k_ring.index(slot).reshape([BLOCK_N, D]).permute((1, 0)), nothing, use_acc=False, is_async=True
                )
                mbarrier.wait(v_full.index(before), (load + i - 1) // STAGES & 1)
                acc = warpgroup_mma(weights, v_ring.index(before).reshape([BLOCK_N, D]), acc, is_async=True)
                s = warpgroup_mma_wait(1, deps=(s,))
                mbarrier.arrive(k_empty.index(slot), count=1)
                if not FULL:
                    keys = _find_keys(i, key_first, masked, a, b, BLOCK_N) + column
                    s = _mask(s * scale_log2, keys, num_visible, first_visible, WINDOWED)
                p, rescale, row_max = online_softmax_update(s, row_max, scale_log2, not FULL)
                row_sum = row_sum * rescale + gl.sum(p, 1)
                acc = warpgroup_mma_wait(0, deps=(acc,))
                mbarrier.arrive(v_empty.index(before), count=1)
                acc *= gl.convert_layout(rescale, OF_SUM)[:, None]
                weights = gl.convert_layout(p.to(dtype), WEIGHTS)

        mbarrier.arrive(q_empty.index(CONSUMER), count=1)
        load += count
        before = (load - 1) % STAGES
        mbarrier.wait(v_full.index(before), (load - 1) // STAGES & 1)
        acc = warpgroup_mma(weights, v_ring.index(before).reshape([BLOCK_N, D]), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        # The copy of the last tile's output has read its place before anyone passes this barrier.
        tma.store_wait(0)
        mbarrier.arrive(v_empty.index(before), count=1)

        empty = row_sum == 0
        row_sum = gl.where(empty, 1.0, row_sum)
        row_lse = gl.where(empty, float("-inf"), (row_max + gl.log2(row_sum)) * LN2)
        poisoned = gl.convert_layout(gl.sum(acc * 0.0, 1), OF_ROW)  # 0, or NaN where a sum is not finite
        of_row = (batch.to(gl.int64) * num_queries + rows // G) * (HEADS * G) + head * G + rows % G
        gl.store(lse + of_row, row_lse + poisoned, mask=rows < num_queries * G)
        acc *= gl.convert_layout(1.0 / row_sum, OF_SUM)[:, None]
        out_place.index(CONSUMER).reshape([_ROWS, D]).store(acc.to(dtype))
        fence_async_shared()
        store_tile(out_tiles, [batch, first // G, head * G, 0], out_place.index(CONSUMER))
    tma.store_wait(0)


@recordable(gluon=True, do_not_specialize=[*LENGTHS, "total"])
def _forward_kernel(
    q_tiles, k_tiles, v_tiles, out_tiles, lse, total, num_tiles, HEADS, num_queries, num_tokens, num_keys, window,
    scale_log2, STRIDE: gl.constexpr, LAST: gl.constexpr, WINDOWED: gl.constexpr, G: gl.constexpr, D: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = k_tiles.dtype
    q_place = gl.allocate_shared_memory(dtype, [_CONSUMERS, 1, _ROWS // G, G, D], q_tiles.layout)
    out_place = gl.allocate_shared_memory(dtype, [_CONSUMERS, 1, _ROWS // G, G, D], out_tiles.layout)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, D], k_tiles.layout)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, D], v_tiles.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [_CONSUMERS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [_CONSUMERS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for c in gl.static_range(_CONSUMERS):
        mbarrier.init(q_full.index(c), count=1)
        mbarrier.init(q_empty.index(c), count=1)
    for s in gl.static_range(STAGES):
        mbarrier.init(k_full.index(s), count=1)
        mbarrier.init(k_empty.index(s), count=_CONSUMERS)
        mbarrier.init(v_full.index(s), count=1)
        mbarrier.init(v_empty.index(s), count=_CONSUMERS)
    places = (q_place, k_ring, v_ring)
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    sizes = (num_tiles, HEADS, num_queries, num_tokens, num_keys, window)
    # A thread of a consumer gets REGISTERS registers, and one of the producer gets what is left.
    gl.warp_specialize(
        [
            (_consume, (
                out_tiles, lse, out_place, places, barriers, total, sizes, scale_log2, STRIDE, LAST, WINDOWED, G, D,
                BLOCK_N, STAGES, 0,
            )),
            (_consume, (
                out_tiles, lse, out_place, places, barriers, total, sizes, scale_log2, STRIDE, LAST, WINDOWED, G, D,
                BLOCK_N, STAGES, 1,
            )),
            (_produce, (
                q_tiles, k_tiles, v_tiles, places, barriers, total, sizes, STRIDE, LAST, WINDOWED, G, BLOCK_N, STAGES,
            )),
        ],
        [4, 4], [REGISTERS, 504 - 2 * REGISTERS],
    )  # fmt: skip


class Shape(NamedTuple):
    """How the kernel is compiled.

    Attributes:
        REGISTERS: of a thread that computes.
    """

    BLOCK_N: int
    STAGES: int
    REGISTERS: int


SHAPES = {
    (128, False): Shape(128, 2, 232),
    (128, True): Shape(64, 4, 232),
}
"""By head dim and whether there is a window, where it was measured to be faster than Triton's kernel."""


def applies(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernel takes these tensors, of one sequence a batch row."""
    return (q.shape[3], True) in SHAPES and describable_heads(q, k, v)


def forward(
    positions: PositionMap,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    num_tokens: int,
    scale_log2: float,
) -> None:
    """Writes output and log-sum-exp of one branch, arguments as `nsa.kernels.flash_forward.forward` has them; `lse` is
    NaN where a row has to be computed again."""
    batch, num_queries, query_heads, dim = q.shape
    num_keys, heads = k.shape[1:3]
    group, windowed = query_heads // heads, positions.window is not None
    shape = SHAPES[dim, windowed]
    num_tiles = cdiv(num_queries * group, _ROWS.value * _CONSUMERS.value)
    total = num_tiles * heads * batch
    rows, keys = (1, _ROWS.value // group, group, dim), (1, 1, shape.BLOCK_N, dim)
    _forward_kernel[(min(total, multiprocessors(q.device)), 1, 1)](
        describe(q, *rows), describe(k.transpose(1, 2), *keys), describe(v.transpose(1, 2), *keys),
        describe(out, *rows),
        lse, total, num_tiles, heads, num_queries, num_tokens, num_keys, positions.window or 0, scale_log2,
        STRIDE=positions.stride, LAST=positions.last, WINDOWED=windowed, G=group, D=dim,
        **shape._asdict(), num_warps=4,
    )  # fmt: skip
