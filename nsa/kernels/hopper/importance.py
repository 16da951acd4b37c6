"""Importance of selection blocks on Hopper: the first kernel of `nsa.kernels.select` in Gluon.

With compressed blocks that are two strides long and selection blocks of four strides, the sum in that file's docstring
is, of the probabilities `p` summed over the query heads of a KV head,

    importance[j] = 2 (p[4 j] + p[4 j + 1] + p[4 j + 2]) + p[4 j + 3] + p[4 j - 1]
                  = 2 near[j] + (far[j] + far[j - 1]),    far[j] = p[4 j + 3].

One product is 64 queries of one head times the keys of 32 selection blocks. A program goes through the heads and adds
up `near` and `far`, then takes the next 32 blocks. What must be summed lies within a thread: four strided copies bring
the keys in the order `(i % 4, i / 4)`, so the columns `j`, `32 + j`, `64 + j` and `96 + j` of a product are the four
keys of a block, which the matrix unit's layout gives to one thread. Shifting `far` by one block, between neighbouring
threads, is left to the end of a tile, when the heads are summed. Every sum has one order, whatever the tile and however
many programs share a row, so equal inputs give equal bits.

A program has a warp group that copies (TMA) and two that compute, each with 64 queries of its own, and as many programs
as the GPU has processors take one walk after another: a tile of queries and a run of tiles of keys. A walk that does
not begin at the first tile of keys goes over the one before it as well, for its last `far`. Of heads
of 64 columns a consumer starts the products of two at a time, so that the matrix unit multiplies for the second while
it exponentiates the first.
Rows of keys beyond the last come as 0, and none is visible. Keys at the edge are hidden after the exponential: what a
query does not see may have any logit. A visible probability that is no number makes the importance none, which for who
chooses is above all numbers.

Barriers. Loads of queries and of keys are numbered through all walks; load `g` goes to slot `g % n` of its ring of `n`
and is that slot's use number `g // n`. `full` of a slot completes when a load has arrived, `empty` when all consumers
have read it. Who waits for use `u` to arrive waits for parity `u % 2`, and the producer, before it fills a slot for use
`u`, for parity `(u - 1) % 2`, which on a new barrier counts as complete. All waits end: consumers read in the order in
which the producer fills, each reads all of it, and an empty walk loads nothing and waits for nothing. With KEPT there
is a slot for every head, whose queries stay for a whole walk: the producer fills them at its first tile, consumers
release them at its last, and a wait for what has long arrived ends at once. Two heads at a time want two slots.
"""

from typing import NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from nsa.config import NSAConfig
from nsa.kernels.configs import multiprocessors
from nsa.kernels.flash_tiles import count_visible
from nsa.kernels.hopper.primitives import count_turns, describable_heads, describe, load_tile, turn_place
from nsa.kernels.launches import recordable
from nsa.kernels.primitives import LOG2E, cdiv

_ROWS = gl.constexpr(64)
"""Queries of a consumer: the rows of one instruction of the matrix unit."""

_BLOCKS = gl.constexpr(32)
"""Selection blocks of a tile of keys."""

_RATIO = gl.constexpr(4)
"""Compressed blocks that start in a selection block."""

_KEYS = gl.constexpr(_BLOCKS.value * _RATIO.value)

_WIDTH = gl.constexpr(64)
"""Columns of a copy: as many as fit into the 128 bytes within which copies permute."""

_LOGITS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _KEYS.value, 16]))
_SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _BLOCKS.value, 16]))
"""Layouts of logits `[64, 128]` and of importances `[64, 32]`, which are every fourth part of it."""

# Sizes that change from call to call and are no reason to compile again.
_LENGTHS = (
    "total", "num_queries", "num_tokens", "num_keys", "first_tile", "num_tiles", "num_parts", "span", "width",
)  # fmt: skip


@gluon.jit
def _find_walk(turn, sizes, QUERIES: gl.constexpr, SIZE: gl.constexpr):
    """The walk that this program takes in a turn: its KV head, batch row, tile of queries and their first; the position
    of query 0; the first tile of keys, the first that is this walk's to store, and the end of both."""
    total, HEADS, num_queries, num_tokens, _, first_tile, num_tiles, num_parts, span, _ = sizes
    # The last queries see the most keys, so walks get lighter from place to place.
    place = turn_place(turn)
    of_tile = total // num_tiles
    tile = num_tiles - 1 - place // of_tile
    part = place % num_parts
    head = place % of_tile // num_parts % HEADS
    batch = place % of_tile // num_parts // HEADS
    first = (first_tile + tile) * QUERIES
    shift = num_tokens - num_queries
    last = gl.minimum(first + QUERIES, num_queries) - 1 + shift
    own = part * span
    stop = gl.minimum(own + span, last // SIZE // _BLOCKS + 1)
    start = gl.where(own < stop, gl.maximum(own - 1, 0), stop)
    return head, batch, tile, first, shift, start, own, stop


@gluon.jit
def _produce(
    q_tiles, k_tiles, places, barriers, sizes, SIZE: gl.constexpr, G: gl.constexpr, D: gl.constexpr,
    CONSUMERS: gl.constexpr, SLOTS: gl.constexpr, KEPT: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copies the keys and queries of this program's walks to shared memory."""
    q_ring, k_ring = places
    q_full, q_empty, k_full, k_empty = barriers
    CHUNKS: gl.constexpr = D // _WIDTH
    q_load = 0
    k_load = 0
    for turn in range(count_turns(sizes[0])):
        head, batch, _, first, _, start, _, stop = _find_walk(turn, sizes, _ROWS * CONSUMERS, SIZE)
        for tile in range(start, stop):
            slot = k_load % STAGES
            mbarrier.wait(k_empty.index(slot), (k_load // STAGES & 1) ^ 1)
            mbarrier.expect(k_full.index(slot), _RATIO * CHUNKS * k_tiles[0].block_type.nbytes)
            for c in gl.static_range(CHUNKS):
                for phase in gl.static_range(_RATIO):
                    load_tile(
                        k_tiles[phase], [batch, tile * _BLOCKS, head, c * _WIDTH], k_full.index(slot),
                        k_ring.index(slot * CHUNKS + c).slice(phase * _BLOCKS, _BLOCKS, 1),
                    )  # fmt: skip
            k_load += 1
            for member in range(0, G if not KEPT or tile == start else 0):
                slot = q_load % SLOTS
                mbarrier.wait(q_empty.index(slot), (q_load // SLOTS & 1) ^ 1)
                mbarrier.expect(q_full.index(slot), CONSUMERS * CHUNKS * q_tiles.block_type.nbytes)
                for c in gl.static_range(CONSUMERS * CHUNKS):
                    load_tile(
                        q_tiles, [batch, first + c // CHUNKS * _ROWS, head * G + member, c % CHUNKS * _WIDTH],
                        q_full.index(slot), q_ring.index(slot * CONSUMERS * CHUNKS + c),
                    )  # fmt: skip
                q_load += 1


@gluon.jit
def _by_key(p):
    """Probabilities `[64, 4 * 32]` of the four keys of each block, `[64, 32]` each."""
    p = p.reshape([_ROWS, 2, 2, _BLOCKS]).permute((0, 3, 1, 2))
    even, odd = gl.split(p)
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    return (
        gl.convert_layout(first, _SUMS), gl.convert_layout(second, _SUMS), gl.convert_layout(third, _SUMS),
        gl.convert_layout(fourth, _SUMS),
    )  # fmt: skip


@gluon.jit
def _shift(x, before):
    """Columns `[64, 32]` one further right, of which the first is the last one of the tile before; and what the next
    tile has to know of this one."""
    pairs = x.reshape([_ROWS, _BLOCKS // 2, 2])
    even, odd = gl.split(pairs)
    pair = gl.arange(0, _BLOCKS // 2, layout=gl.SliceLayout(0, odd.type.layout))[None, :]
    turned = gl.gather(odd, (pair + gl.zeros_like(odd).to(gl.int32) + _BLOCKS // 2 - 1) % (_BLOCKS // 2), 1)
    shifted = gl.join(gl.where(pair == 0, before, turned), even).reshape([_ROWS, _BLOCKS])
    return gl.convert_layout(shifted, _SUMS), turned


@gluon.jit
def _multiply(
    places, q_full, load, k_slot, CHUNKS: gl.constexpr, CONSUMERS: gl.constexpr, SLOTS: gl.constexpr,
    CONSUMER: gl.constexpr,
):  # fmt: skip
    """Starts the product of this consumer's queries of a head and the keys of a tile: `CHUNKS` things to wait for."""
    q_ring, k_ring = places
    slot = load % SLOTS
    mbarrier.wait(q_full.index(slot), load // SLOTS & 1)
    s = gl.zeros([_ROWS, _KEYS], gl.float32, layout=_LOGITS)
    for c in gl.static_range(CHUNKS):
        q = q_ring.index((slot * CONSUMERS + CONSUMER) * CHUNKS + c).reshape([_ROWS, _WIDTH])
        k = k_ring.index(k_slot * CHUNKS + c).reshape([_KEYS, _WIDTH])
        s = warpgroup_mma(q, k.permute((1, 0)), s, use_acc=c > 0, is_async=True)
    return s


@gluon.jit
def _add(s, near, far, log_sum, factor, keys, num_visible, MASKED: gl.constexpr):
    """`near` and `far` with a head's probabilities added."""
    # A query that sees nothing has probabilities of 0.
    base = gl.where(log_sum == float("-inf"), float("-inf"), log_sum * -LOG2E)
    p = gl.exp2(gl.fma(s, gl.full_like(s, factor), base[:, None] + gl.zeros_like(s)))
    if MASKED:
        p = gl.where(keys[None, :] < num_visible[:, None], p, 0.0)
    first, second, third, fourth = _by_key(p)
    return near + (first + second + third), far + fourth


@gluon.jit
def _consume(
    lse, scores, places, barriers, sizes, factor, SIZE: gl.constexpr, LAST: gl.constexpr, G: gl.constexpr,
    D: gl.constexpr, CONSUMERS: gl.constexpr, SLOTS: gl.constexpr, KEPT: gl.constexpr, STAGES: gl.constexpr,
    PRODUCTS: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """Importances for this consumer's queries of this program's walks."""
    q_full, q_empty, k_full, k_empty = barriers
    _, HEADS, num_queries, _, num_keys, _, num_tiles, _, _, width = sizes
    CHUNKS: gl.constexpr = D // _WIDTH
    OF_ROW: gl.constexpr = gl.SliceLayout(1, _LOGITS)
    OF_SUM: gl.constexpr = gl.SliceLayout(1, _SUMS)
    STRIDE: gl.constexpr = SIZE // _RATIO
    row = gl.arange(0, _ROWS, layout=OF_ROW)
    column = gl.arange(0, _KEYS, layout=gl.SliceLayout(0, _LOGITS))
    block = gl.arange(0, _BLOCKS, layout=gl.SliceLayout(0, _SUMS))
    none = gl.zeros([_ROWS, _BLOCKS], gl.float32, layout=_SUMS)
    key = column % _BLOCKS * _RATIO + column // _BLOCKS
    q_load = 0
    k_load = 0
    for turn in range(count_turns(sizes[0])):
        head, batch, number, first, shift, start, own, stop = _find_walk(turn, sizes, _ROWS * CONSUMERS, SIZE)
        local = number * (_ROWS * CONSUMERS) + CONSUMER * _ROWS
        query = first + CONSUMER * _ROWS + row
        position = query + shift
        num_visible = gl.minimum(count_visible(position, STRIDE, LAST), num_keys)
        live = query < num_queries
        of_row = lse + ((batch.to(gl.int64) * num_queries + query) * HEADS + head) * G
        of_score = scores + ((batch.to(gl.int64) * HEADS + head) * num_tiles * (_ROWS * CONSUMERS) + local) * width
        of_score = of_score + gl.convert_layout(row, OF_SUM) * width
        written = gl.convert_layout(live, OF_SUM)
        # Tiles of which every row sees all: the first query sees least.
        full = count_visible(first + CONSUMER * _ROWS + shift, STRIDE, LAST) // _KEYS
        full = gl.maximum(gl.minimum(gl.minimum(full, num_keys // _KEYS), stop), start)
        log_sum = gl.load(of_row, mask=live, other=float("inf"))
        before = _shift(none, 0.0)[1]
        for MASKED in gl.static_range(2):
            for tile in range(full if MASKED else start, stop if MASKED else full):
                k_slot = k_load % STAGES
                mbarrier.wait(k_full.index(k_slot), k_load // STAGES & 1)
                near = none
                far = none
                for member in range(0, G, PRODUCTS):
                    load = q_load + member
                    s = _multiply(places, q_full, load, k_slot, CHUNKS, CONSUMERS, SLOTS, CONSUMER)
                    if PRODUCTS == 2:
                        next_s = _multiply(places, q_full, load + 1, k_slot, CHUNKS, CONSUMERS, SLOTS, CONSUMER)
                    next_log_sum = gl.load(of_row + (member + 1) % G, mask=live, other=float("inf"))
                    s = warpgroup_mma_wait((PRODUCTS - 1) * CHUNKS, deps=(s,))
                    if not KEPT or tile == stop - 1:
                        mbarrier.arrive(q_empty.index(load % SLOTS), count=1)
                    near, far = _add(s, near, far, log_sum, factor, tile * _KEYS + key, num_visible, MASKED)
                    log_sum = next_log_sum
                    if PRODUCTS == 2:
                        next_log_sum = gl.load(of_row + (member + 2) % G, mask=live, other=float("inf"))
                        next_s = warpgroup_mma_wait(0, deps=(next_s,))
                        if not KEPT or tile == stop - 1:
                            mbarrier.arrive(q_empty.index((load + 1) % SLOTS), count=1)
                        near, far = _add(next_s, near, far, log_sum, factor, tile * _KEYS + key, num_visible, MASKED)
                        log_sum = next_log_sum
                mbarrier.arrive(k_empty.index(k_slot), count=1)
                k_load += 1
                if not KEPT:
                    q_load += G
                far_before, before = _shift(far, before)
                importance = 2.0 * near + (far + far_before)
                chosen = tile * _BLOCKS + block
                gl.store(
                    of_score[:, None] + chosen[None, :], importance,
                    mask=written[:, None] & ((chosen < width) & (tile >= own))[None, :],
                )  # fmt: skip
        if KEPT:
            q_load += gl.where(start < stop, G, 0)


@recordable(gluon=True, do_not_specialize=_LENGTHS)
def _importance_kernel(
    q_tiles, k_tiles_0, k_tiles_1, k_tiles_2, k_tiles_3, lse, scores, total, HEADS, num_queries, num_tokens, num_keys,
    first_tile, num_tiles, num_parts, span, width, factor, SIZE: gl.constexpr, LAST: gl.constexpr, G: gl.constexpr,
    D: gl.constexpr, CONSUMERS: gl.constexpr, SLOTS: gl.constexpr, KEPT: gl.constexpr, STAGES: gl.constexpr,
    PRODUCTS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_tiles.dtype
    CHUNKS: gl.constexpr = D // _WIDTH
    q_ring = gl.allocate_shared_memory(dtype, [SLOTS * CONSUMERS * CHUNKS, 1, _ROWS, 1, _WIDTH], q_tiles.layout)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES * CHUNKS, 1, _KEYS, 1, _WIDTH], k_tiles_0.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(q_full.index(slot), count=1)
        mbarrier.init(q_empty.index(slot), count=CONSUMERS)
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_full.index(slot), count=1)
        mbarrier.init(k_empty.index(slot), count=CONSUMERS)
    places = (q_ring, k_ring)
    barriers = (q_full, q_empty, k_full, k_empty)
    k_tiles = (k_tiles_0, k_tiles_1, k_tiles_2, k_tiles_3)
    sizes = (total, HEADS, num_queries, num_tokens, num_keys, first_tile, num_tiles, num_parts, span, width)
    # A thread of a consumer gets REGISTERS registers, and one of the producer gets what is left.
    gl.warp_specialize(
        [
            (_consume, (
                lse, scores, places, barriers, sizes, factor, SIZE, LAST, G, D, CONSUMERS, SLOTS, KEPT, STAGES,
                PRODUCTS, 0,
            )),
            (_consume, (
                lse, scores, places, barriers, sizes, factor, SIZE, LAST, G, D, CONSUMERS, SLOTS, KEPT, STAGES,
                PRODUCTS, 1,
            )),
            (_produce, (
                q_tiles, k_tiles, places, barriers, sizes, SIZE, G, D, CONSUMERS, SLOTS, KEPT, STAGES,
            )),
        ],
        [4, 4], [REGISTERS, 504 - 2 * REGISTERS],
    )  # fmt: skip


class Shape(NamedTuple):
    """How the kernel is compiled.

    Attributes:
        SLOTS: heads whose queries have room.
        KEPT: whether these are all heads.
        STAGES: tiles of keys that have room.
        PRODUCTS: that a consumer has in flight at most, 1 or 2.
        REGISTERS: of a thread that computes.
    """

    SLOTS: int
    KEPT: bool
    STAGES: int = 2
    PRODUCTS: int = 2
    REGISTERS: int = 240


CONSUMERS = 2
QUERIES = _ROWS.value * CONSUMERS
"""Queries of a tile."""

LEAST_GROUP = 4
"""Query heads of a KV head: what is done once for all heads takes the time of a product or so."""


def shape_of(dim: int, group: int) -> Shape:
    """Queries stay where 128 KiB hold those of all heads."""
    most = (128 << 10) // (2 * QUERIES * dim)
    kept = group <= most
    # Wide heads keep the matrix units busy with one product at a time.
    products, registers = (1, 232) if dim == 128 else (2, 240)
    return Shape(group if kept else 4, kept, PRODUCTS=products, REGISTERS=registers)


def applies(q: Tensor, k: Tensor, config: NSAConfig) -> bool:
    """Whether the kernel takes these tensors, of one sequence a batch row."""
    stride = config.compress_stride
    return (
        q.shape[3] in (64, 128)
        and (config.compress_block_size, config.select_block_size) == (2 * stride, _RATIO.value * stride)
        and q.shape[2] // k.shape[2] >= LEAST_GROUP
        and k.shape[1] >= _RATIO.value
        and describable_heads(q, k, k)
    )


def importance(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    scores: Tensor,
    config: NSAConfig,
    num_tokens: int,
    first_tile: int,
    scale: float,
) -> None:
    """Writes `scores [B, Hk, queries, blocks]` of the tiles of queries from `first_tile` on."""
    batch, num_queries, query_heads, dim = q.shape
    num_keys, heads = k.shape[1:3]
    group = query_heads // heads
    num_tiles, width = scores.shape[2] // QUERIES, scores.shape[3]
    walks, tiles, programs = num_tiles * heads * batch, cdiv(width, _BLOCKS.value), multiprocessors(q.device)
    # Where walks are few, they are cut into parts of at least four tiles of keys.
    span = cdiv(tiles, max(1, min(programs // walks, tiles // 4)))
    parts = cdiv(tiles, span)
    phases = (k[:, phase :: _RATIO.value] for phase in range(_RATIO.value))
    _importance_kernel[(min(walks * parts, programs), 1, 1)](
        describe(q, 1, _ROWS.value, 1, _WIDTH.value), *(describe(x, 1, _BLOCKS.value, 1, _WIDTH.value) for x in phases),
        lse, scores, walks * parts, heads, num_queries, num_tokens, num_keys, first_tile, num_tiles, parts, span, width,
        scale * LOG2E.value,
        SIZE=config.select_block_size, LAST=config.compress_block_size - 1, G=group, D=dim, CONSUMERS=CONSUMERS,
        **shape_of(dim, group)._asdict(), num_warps=4,
    )  # fmt: skip
