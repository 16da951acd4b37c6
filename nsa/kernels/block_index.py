"""The block index: the queries that selected each block, as compressed sparse rows (CSR), made on the device.

The indices `[B, Tq, Hk, N]` hold the blocks of each query. Key-major kernels need the inverse: for each batch row, KV
head (together "head" below) and block `j` the list of the pairs (query `t`, slot `n`) whose index is `j`, if `t` sees
block `j`. A pair is stored as the number `t N + n`, and a list is ascending, so that sums over it have a fixed order.
Indices may stand in any order, and those that name no block that the query sees, such as -1, are in no list. If a
query lists a block twice, only one of the two slots is in the list.

Four kernels make the index, for some heads after others if the words of all would take too much memory:

1. mark: word `[c, j]` of a head has bit `t % 32` set if query `t` of tile `c = t // 32` selected block `j`. Bits are
   set by atomic OR of integers, whose result does not depend on an order;
2. scan: the bits of each block's words are counted and summed up along the tiles, which gives the place in its list at
   which each tile begins, and the length of the list;
3. offsets: running totals of the lengths give the place of each list;
4. place: a pair goes to the place of its list, plus that of its tile, plus the number of lower bits set in its word.

Lists differ in length by orders of magnitude, for every query selects the first block. They are cut into pieces of
`CHUNK` pairs, one program each. How many there are is known on the device only, so grids have as many programs as there
could be pieces, and programs without a piece have nothing to do.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from nsa.kernels.launches import recordable
from nsa.kernels.primitives import cdiv, find_sequence, head_runs
from nsa.varlen import Varlen

_TILE = tl.constexpr(32)
"""Queries of a word of bits."""

_PAIRS = 512
"""Pairs that a program handles at a time."""

_SCAN_SHAPE = (128, 32)
"""Tiles of queries and blocks that a program of the scan handles at a time."""

_LISTS = 1024
"""Lists whose running totals are made at a time."""

# Sizes that change from call to call and are no reason to compile again.
_LENGTHS = ("num_queries", "shift", "num_tiles", "num_blocks", "first_head")


# Where queries and blocks lie; for packed sequences by what `Packing` describes.


@triton.jit
def sees_block(block, position, BLOCK_SIZE: tl.constexpr):
    """Whether a query at `position` sees any key of a block; a query before the first key has a negative position."""
    # Compared before it is multiplied: whatever the indices hold, no address comes of it.
    return (block >= 0) & (block < (position + BLOCK_SIZE) // BLOCK_SIZE)


@triton.jit
def query_positions(query_table, query, shift, inside, PACKED: tl.constexpr):
    """Positions of queries in their sequences."""
    if PACKED:
        return tl.load(query_table + 3 * query, mask=inside, other=0)
    else:
        return (query + shift).to(tl.int32)


@triton.jit
def find_block(cu_keys, num_sequences, block, num_keys, BLOCK_SIZE: tl.constexpr, PACKED: tl.constexpr):
    """First key of a block, that key's position in its sequence, and how many keys there are from it on; none or fewer
    if the number stands for no block."""
    position = block * BLOCK_SIZE
    start = position
    if PACKED:
        sequence, block = find_sequence(cu_keys, num_sequences, block, 1, BLOCK_SIZE)
        position = block * BLOCK_SIZE
        start = tl.load(cu_keys + sequence) + position
        num_keys = tl.load(cu_keys + sequence + 1)
    return start, position, num_keys - start


@triton.jit
def find_piece(
    program, offsets, pieces, first_head, pieces_per_head, num_queries, num_blocks, NUM_SELECTED: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """The piece of a program: its head, its block (-1 if there are fewer pieces), its number in the list and how many
    the list has, its first pair among `members` and its number of pairs."""
    head = first_head + program // pieces_per_head
    piece = program % pieces_per_head
    offsets += head.to(tl.int64) * (num_blocks + 1)
    pieces += head.to(tl.int64) * (num_blocks + 1)
    exists = piece < tl.load(pieces + num_blocks)
    low = 0
    high = tl.where(exists, num_blocks - 1, 0)
    while low < high:
        middle = (low + high) // 2
        after = tl.load(pieces + middle + 1) <= piece
        low = tl.where(after, middle + 1, low)
        high = tl.where(after, high, middle)
    first_piece = tl.load(pieces + low)
    begin = tl.load(offsets + low) + (piece - first_piece) * CHUNK
    count = tl.minimum(tl.load(offsets + low + 1) - begin, CHUNK)
    begin = head.to(tl.int64) * num_queries * NUM_SELECTED + begin
    siblings = tl.load(pieces + low + 1) - first_piece
    return head, tl.where(exists, low, -1), piece - first_piece, siblings, begin, count


# The kernels that make the index. `words` and `starts` are `[heads of a run, tiles, S]`.


@triton.jit
def _find_tile(num_tiles, first_head):
    """The head and the tile of this program, and the program's number in 64 bits, by which their words are found."""
    program = tl.program_id(0)
    return first_head + program // num_tiles, program % num_tiles, program.to(tl.int64)


@triton.jit
def _load_pairs(
    indices, query_table, index_strides, head, tile, first, num_queries, shift, num_blocks, HEADS,
    NUM_SELECTED: tl.constexpr, BLOCK_SIZE: tl.constexpr, PACKED: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Pairs `first` to `first + PAIRS` of a tile of queries: query, slot, block and whether the query sees it."""
    pair = first + tl.arange(0, PAIRS)
    query = tile * _TILE + pair // NUM_SELECTED
    slot = pair % NUM_SELECTED
    inside = (pair < _TILE * NUM_SELECTED) & (query < num_queries)
    indices += (head // HEADS).to(tl.int64) * index_strides[0] + (head % HEADS).to(tl.int64) * index_strides[2]
    offsets = query.to(tl.int64) * index_strides[1] + slot.to(tl.int64) * index_strides[3]
    block = tl.load(indices + offsets, mask=inside, other=-1)
    valid = sees_block(block, query_positions(query_table, query, shift, inside, PACKED), BLOCK_SIZE)
    block = tl.where(valid, block, 0)
    if PACKED:
        block += tl.load(query_table + 3 * query + 2, mask=inside, other=0)
        # Whatever the bounds of sequences hold, nothing is written beside the words.
        valid = valid & (block < num_blocks)
    return query, slot, block, valid


@triton.jit
def _count_bits(x):
    """The bits set in 32-bit integers."""
    x = x.to(tl.uint32, bitcast=True)
    x -= (x >> 1) & 0x55555555
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@recordable(do_not_specialize=_LENGTHS)
def _mark_kernel(
    indices, words, query_table, index_strides, num_queries, shift, num_tiles, num_blocks, first_head, HEADS,
    NUM_SELECTED: tl.constexpr, BLOCK_SIZE: tl.constexpr, PACKED: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    head, tile, program = _find_tile(num_tiles, first_head)
    for first in range(0, _TILE * NUM_SELECTED, PAIRS):
        query, _, block, valid = _load_pairs(
            indices, query_table, index_strides, head, tile, first, num_queries, shift, num_blocks, HEADS, NUM_SELECTED,
            BLOCK_SIZE, PACKED, PAIRS,
        )  # fmt: skip
        bit = tl.full([PAIRS], 1, tl.int32) << (query % _TILE)
        tl.atomic_or(words + program * num_blocks + block, bit, mask=valid, sem="relaxed")


@recordable(do_not_specialize=_LENGTHS)
def _scan_kernel(words, starts, lengths, num_tiles, num_blocks, first_head, TILES: tl.constexpr, BLOCKS: tl.constexpr):
    programs_per_head = tl.cdiv(num_blocks, BLOCKS)
    head = (tl.program_id(0) // programs_per_head).to(tl.int64)
    block = tl.program_id(0) % programs_per_head * BLOCKS + tl.arange(0, BLOCKS)
    length = tl.zeros([BLOCKS], tl.int32)
    for first in range(0, num_tiles, TILES):
        tile = first + tl.arange(0, TILES)
        word = (head * num_tiles + tile)[:, None] * num_blocks + block[None, :]
        inside = (tile < num_tiles)[:, None] & (block < num_blocks)[None, :]
        count = _count_bits(tl.load(words + word, mask=inside, other=0))
        tl.store(starts + word, length[None, :] + tl.cumsum(count, 0) - count, mask=inside)
        length += tl.sum(count, 0)
    tl.store(lengths + (first_head + head) * num_blocks + block, length, mask=block < num_blocks)


@recordable(do_not_specialize=_LENGTHS)
def _offsets_kernel(
    lengths, offsets, pieces, partials, num_blocks, first_head, CHUNK: tl.constexpr, LISTS: tl.constexpr
):
    head = (first_head + tl.program_id(0)).to(tl.int64)
    lengths += head * num_blocks
    offsets += head * (num_blocks + 1)
    pieces += head * (num_blocks + 1)
    partials += head * (num_blocks + 1)
    num_pairs = 0
    num_pieces = 0
    num_partials = 0
    for first in range(0, num_blocks, LISTS):
        block = first + tl.arange(0, LISTS)
        inside = block < num_blocks
        length = tl.load(lengths + block, mask=inside, other=0)
        # A block that nobody selected has a piece too, whose program writes its gradients of 0.
        count = tl.where(inside, tl.maximum(tl.cdiv(length, CHUNK), 1), 0)
        partial = tl.where(count > 1, count, 0)
        tl.store(offsets + block, num_pairs + tl.cumsum(length, 0) - length, mask=inside)
        tl.store(pieces + block, num_pieces + tl.cumsum(count, 0) - count, mask=inside)
        tl.store(partials + block, num_partials + tl.cumsum(partial, 0) - partial, mask=inside)
        num_pairs += tl.sum(length, 0)
        num_pieces += tl.sum(count, 0)
        num_partials += tl.sum(partial, 0)
    tl.store(offsets + num_blocks, num_pairs)
    tl.store(pieces + num_blocks, num_pieces)
    tl.store(partials + num_blocks, num_partials)


@recordable(do_not_specialize=_LENGTHS)
def _place_kernel(
    indices, words, starts, offsets, members, query_table, index_strides, num_queries, shift, num_tiles, num_blocks,
    first_head, HEADS, NUM_SELECTED: tl.constexpr, BLOCK_SIZE: tl.constexpr, PACKED: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    head, tile, program = _find_tile(num_tiles, first_head)
    offsets += head.to(tl.int64) * (num_blocks + 1)
    members += head.to(tl.int64) * num_queries * NUM_SELECTED
    words += program * num_blocks
    starts += program * num_blocks
    for first in range(0, _TILE * NUM_SELECTED, PAIRS):
        query, slot, block, valid = _load_pairs(
            indices, query_table, index_strides, head, tile, first, num_queries, shift, num_blocks, HEADS, NUM_SELECTED,
            BLOCK_SIZE, PACKED, PAIRS,
        )  # fmt: skip
        lower = (tl.full([PAIRS], 1, tl.int32) << (query % _TILE)) - 1
        place = tl.load(offsets + block, mask=valid, other=0) + tl.load(starts + block, mask=valid, other=0)
        place += _count_bits(tl.load(words + block, mask=valid, other=0) & lower)
        tl.store(members + place, query * NUM_SELECTED + slot, mask=valid)


# Launchers.


class Packing(NamedTuple):
    """Where queries and blocks lie; `None` and 0 if nothing is packed, but for the number of blocks.

    Attributes:
        query_table: int32 `[Tq, 3]`, as `Varlen.queries`.
        cu_keys: int32 `[N + 1]`, offsets of the sequences' keys.
        num_sequences: `N`.
        num_blocks: `S`, as many blocks as there could be.
    """

    query_table: Tensor | None
    cu_keys: Tensor | None
    num_sequences: int
    num_blocks: int

    @staticmethod
    def of(varlen: Varlen | None, num_keys: int, block_size: int) -> "Packing":
        """Reads it from the tables of packed sequences."""
        if varlen is None:
            return Packing(None, None, 0, cdiv(num_keys, block_size))
        num_sequences = varlen.cu_seqlens_k.shape[0] - 1
        return Packing(varlen.queries, varlen.cu_seqlens_k, num_sequences, num_keys // block_size + num_sequences)


class BlockIndex(NamedTuple):
    """The block index of `B Hk` heads; the tables hold running totals, from 0 to the total.

    Attributes:
        members: int32 `[B Hk, Tq N]`, `t N + n` of the pairs of one list after the other; what is beyond the last list
            was never written.
        offsets: int32 `[B Hk, S + 1]`, of the lengths of lists.
        pieces: int32 `[B Hk, S + 1]`, of the pieces that lists are cut into, at least one each.
        partials: int32 `[B Hk, S + 1]`, of the pieces of those lists that have several.
        pieces_per_head: as many pieces as there could be.
        partials_per_head: likewise.
    """

    members: Tensor
    offsets: Tensor
    pieces: Tensor
    partials: Tensor
    pieces_per_head: int
    partials_per_head: int


def build_block_index(indices: Tensor, shift: int, packing: Packing, block_size: int, chunk: int) -> BlockIndex:
    """The block index of `indices [B, Tq, Hk, N]`.

    Args:
        shift: position of the first query, if nothing is packed.
        chunk: pairs of a piece.
    """
    batch, num_queries, kv_heads, num_selected = indices.shape
    heads, num_blocks, num_tiles = batch * kv_heads, packing.num_blocks, cdiv(num_queries, _TILE.value)
    members = indices.new_empty(heads, num_queries * num_selected)
    lengths = indices.new_empty(heads, num_blocks)
    # Each by itself: kernels are compiled anew for addresses at whole 16 bytes and for others.
    offsets, pieces, partials = (indices.new_empty(heads, num_blocks + 1) for _ in range(3))
    runs = head_runs(heads, 8 * num_tiles * num_blocks)
    starts = indices.new_empty(runs[0][1], num_tiles, num_blocks)
    for first, count in runs:
        words = indices.new_zeros(count, num_tiles, num_blocks)
        sizes = (num_queries, shift, num_tiles, num_blocks, first, kv_heads)
        constants = {
            "NUM_SELECTED": num_selected,
            "BLOCK_SIZE": block_size,
            "PACKED": packing.query_table is not None,
            "PAIRS": _PAIRS,
        }
        scan_tiles, scan_blocks = _SCAN_SHAPE
        _mark_kernel[(count * num_tiles,)](indices, words, packing.query_table, indices.stride(), *sizes, **constants)
        _scan_kernel[(count * cdiv(num_blocks, scan_blocks),)](
            words, starts, lengths, num_tiles, num_blocks, first, TILES=scan_tiles, BLOCKS=scan_blocks
        )
        _offsets_kernel[(count,)](lengths, offsets, pieces, partials, num_blocks, first, CHUNK=chunk, LISTS=_LISTS)
        _place_kernel[(count * num_tiles,)](
            indices, words, starts, offsets, members, packing.query_table, indices.stride(), *sizes, **constants
        )
    whole = num_queries * num_selected // chunk
    # All pieces of a list but the last are whole: with several pieces, at least half of them.
    return BlockIndex(members, offsets, pieces, partials, num_blocks + whole, whole + min(whole, num_blocks))
