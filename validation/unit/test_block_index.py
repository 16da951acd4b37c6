"""The block index alone, held to a plain definition: which pairs of query and slot are in the list of each block."""

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from nsa.config import NSAConfig
from nsa.kernels import block_index, primitives
from nsa.kernels.block_index import BlockIndex, Packing, build_block_index
from nsa.varlen import Varlen
from validation.numerics import assert_equal
from validation.strategies import for_all

pytestmark = pytest.mark.usefixtures("on_device")

SIZE = 16
NO_BLOCKS = (-1, -2, -(2**31), 2**31 - 1)
"""Indices that name no block, whatever the number of blocks is."""


@dataclass(frozen=True)
class Selection:
    """Indices of random queries: any blocks in any order, at most once a query, beyond it too, and none at all.

    Attributes:
        lengths: queries and keys of each sequence; several are packed.
        chunk: pairs of a piece.
    """

    lengths: tuple[tuple[int, int], ...]
    num_selected: int
    batch: int = 1
    heads: int = 1
    chunk: int = 8
    seed: int = 0

    @property
    def queries(self) -> int:
        return sum(queries for queries, _ in self.lengths)

    @property
    def keys(self) -> int:
        return sum(keys for _, keys in self.lengths)

    def indices(self) -> Tensor:
        """`[B, Tq, Hk, N]`."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.batch, self.queries, self.heads)
        candidates = max(self.keys // SIZE + 3, self.num_selected)
        order = torch.rand(*shape, candidates, generator=generator, device="cpu").argsort(-1)
        indices = order[..., : self.num_selected].int()
        nothing = torch.randint(4 * len(NO_BLOCKS), indices.shape, generator=generator, device="cpu")
        for i, value in enumerate(NO_BLOCKS):
            indices[nothing == i] = value
        return indices

    def lists(self, indices: Tensor) -> list[list[list[int]]]:
        """`t N + n` of the pairs of each head and block."""
        packed = len(self.lengths) > 1
        num_blocks = self.keys // SIZE + len(self.lengths) if packed else -(-self.keys // SIZE)
        lists: list[list[list[int]]] = [[[] for _ in range(num_blocks)] for _ in range(self.batch * self.heads)]
        query, first_key = 0, 0
        for sequence, (queries, keys) in enumerate(self.lengths):
            first_block = first_key // SIZE + sequence if packed else 0
            for position in range(keys - queries, keys):
                for b in range(self.batch):
                    for h in range(self.heads):
                        for slot, block in enumerate(indices[b, query, h].tolist()):
                            if block >= 0 and block * SIZE <= position:
                                lists[b * self.heads + h][first_block + block].append(query * self.num_selected + slot)
                query += 1
            first_key += keys
        return lists

    def index(self, indices: Tensor) -> BlockIndex:
        """What is under test."""
        device, varlen = torch.empty(0).device, None
        if len(self.lengths) > 1:
            queries, keys = (torch.tensor([0, *x]).cumsum(0).int() for x in zip(*self.lengths, strict=True))
            varlen = Varlen.of(queries, keys, self.queries, NSAConfig(SIZE, SIZE, SIZE))
        packing = Packing.of(varlen, self.keys, SIZE)
        return build_block_index(indices.to(device), self.keys - self.queries, packing, SIZE, self.chunk)


def lists_of(index: BlockIndex) -> list[list[list[int]]]:
    """The lists of an index."""
    return [
        [members[begin:end].tolist() for begin, end in pairwise(offsets)]
        for members, offsets in zip(index.members, index.offsets.tolist(), strict=True)
    ]


def lengths() -> SearchStrategy[tuple[tuple[int, int], ...]]:
    """Of one sequence, or of several, some of them empty or without queries."""
    sequence = st.tuples(st.integers(0, 50), st.integers(0, 60)).map(lambda pair: (pair[0], sum(pair)))
    whole = st.tuples(st.integers(1, 100), st.integers(0, 200)).map(lambda pair: ((pair[0], sum(pair)),))
    packed = (
        st.lists(sequence, min_size=2, max_size=4).map(tuple).filter(lambda found: any(queries for queries, _ in found))
    )
    return whole | packed


def selections(_: object) -> SearchStrategy[Selection]:
    return st.builds(
        Selection, lengths(), num_selected=st.integers(1, 20), heads=st.integers(1, 3), chunk=st.integers(1, 9),
        seed=st.integers(0, 99),
    )  # fmt: skip


LONG = Selection(((100, 230),), 5, batch=2, heads=3, chunk=7)
PACKED = Selection(((40, 170), (0, 30), (3, 250), (0, 0), (61, 95)), 5, heads=3, chunk=7)
each_selection = pytest.mark.parametrize("selection", [LONG, PACKED], ids=["whole", "packed"])


@for_all(selection=selections)
def test_a_list_has_the_pairs_of_its_block_ascending(selection: Selection) -> None:
    indices = selection.indices()
    assert lists_of(selection.index(indices)) == selection.lists(indices)


@for_all(selection=selections)
def test_pieces_cover_every_list_and_there_is_at_least_one(selection: Selection) -> None:
    index = selection.index(selection.indices())
    lengths = index.offsets.diff()
    assert (index.pieces[:, 0] == 0).all()
    assert_equal(index.pieces.diff(), (-(-lengths // selection.chunk)).clamp(min=1).int(), what="pieces")


@for_all(selection=selections)
def test_partial_sums_are_of_lists_of_several_pieces(selection: Selection) -> None:
    index = selection.index(selection.indices())
    counts = index.pieces.diff()
    assert (index.partials[:, 0] == 0).all()
    assert_equal(index.partials.diff(), counts.where(counts > 1, 0), what="partials")


@for_all(selection=selections)
def test_there_is_room_for_all_pieces_and_partial_sums(selection: Selection) -> None:
    index = selection.index(selection.indices())
    assert int(index.pieces.max()) <= index.pieces_per_head
    assert int(index.partials.max()) <= index.partials_per_head


@each_selection
def test_indices_of_any_strides_give_the_same_index(selection: Selection) -> None:
    indices = selection.indices()
    scattered = indices.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    assert scattered.stride() != indices.stride()
    assert lists_of(selection.index(scattered)) == selection.lists(indices)


@each_selection
def test_steps_of_the_kernels_change_nothing(selection: Selection, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long sequences take them: several tiles of queries, of blocks, of lists and of pairs, with a remainder."""
    indices = selection.indices()
    expected = selection.index(indices)
    monkeypatch.setattr(block_index, "_SCAN_SHAPE", (2, 4))
    monkeypatch.setattr(block_index, "_LISTS", 4)
    monkeypatch.setattr(block_index, "_PAIRS", 64)
    actual = selection.index(indices)
    assert lists_of(actual) == selection.lists(indices)
    for name in ("offsets", "pieces", "partials"):
        assert_equal(getattr(actual, name), getattr(expected, name), what=name)


@each_selection
@pytest.mark.parametrize("heads", [1, 2])
def test_heads_some_at_a_time_change_nothing(selection: Selection, heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    indices = selection.indices()
    monkeypatch.setattr(primitives, "_LARGEST_GRID", heads)
    assert lists_of(selection.index(indices)) == selection.lists(indices)


def test_a_block_listed_twice_by_a_query_is_in_the_list_once() -> None:
    """That is the caller's error; all that is read as an address is what was written."""
    selection = Selection(((40, 40),), 4, chunk=3)
    indices = torch.zeros(1, 40, 1, 4, dtype=torch.int32)
    [[pairs, *others]] = lists_of(selection.index(indices))
    assert [pair // 4 for pair in pairs] == list(range(40))
    assert others == [[], []]


def test_many_blocks_are_found() -> None:
    """More than 16 bits can number; all queries are in the last."""
    blocks = 2**16 + 6
    selection = Selection(((3, blocks * SIZE),), 2, heads=2)
    wanted = torch.tensor([[0, blocks - 1], [blocks - 1, -1], [3, 0]], dtype=torch.int32)
    index = selection.index(wanted[None, :, None].expand(1, 3, 2, 2))
    for members, offsets in zip(index.members, index.offsets, strict=True):
        found = {
            block: members[offsets[block] : offsets[block + 1]].tolist()
            for block in offsets.diff().nonzero().flatten().tolist()
        }
        assert found == {0: [0, 5], 3: [4], blocks - 1: [1, 2]}  # twice the query, and the slot
