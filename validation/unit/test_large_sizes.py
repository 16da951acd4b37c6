"""Paths that exist for large sizes, forced at small size: parts, shares, pieces, chunks, tiles, several launches.

Each row of the tables says how our code is made to take a path, on which cases, and how one sees that it was taken.
Results depend on the path: queries choose few of many blocks, each tile of queries sees other keys, and what is shared
out leaves a remainder.
"""

from typing import Any

import pytest
import torch

from nsa.kernels import selected
from validation.implementations import load
from validation.numerics import assert_equal
from validation.unit.cases import Case, config, draw, select_blocks, whole, with_selection
from validation.unit.forced import DTYPE, SMALL_TILES, Calls, Path, Watched, each, forced
from validation.unit.ways import SELECTED, WAYS, launched

pytestmark = pytest.mark.usefixtures("on_device")

BYTES = DTYPE.itemsize


def shaped(id: str, lengths: tuple[tuple[int, int], ...], selected: int = 5, window: int = 50, **rest: Any) -> Case:
    """A case of 16-token blocks, unless given, at every eighth token, and of the narrowest heads."""
    blocks, kind = rest.pop("blocks", (16, 8, 16)), rest.pop("compression", "mean")
    shape = {"key_dim": 16, "value_dim": 16} | rest
    return Case(id, lengths, config(blocks, selected, window, compression=kind), **shape)


# 21 candidates of which 5 are taken. The first of the 6 tiles of 8 queries has 19, and the second ends with the first
# query of a block, which is beyond what a tile one token shorter could reach.
WHOLE = shaped("whole", ((45, 334),), batch=2)
PACKED = shaped("packed", ((40, 170), (0, 30), (3, 250), (21, 95)))
BOTH = (WHOLE, PACKED)


# 1. Importance and selection.

TILE_BYTES = 2 * 2 * 8 * 21 * BYTES
"""Of the importances of one tile of queries of `WHOLE`; of two tiles of `PACKED`, whose blocks are counted through."""
FAR = (shaped("far", ((5, 1609),), 40), shaped("packed_far", ((3, 1100), (0, 8), (2, 1063)), 40))
TALL = shaped("tall", ((37, 1100),), 30, group=1)

SELECTION = (
    Path(
        "one_tile_of_queries_at_a_time",
        ("select_blocks",),
        (*BOTH, shaped("reaching", ((30, 250),), blocks=(32, 8, 32))),
        {"kernels.select._importance_kernel": lambda calls: {call.first_tile for call in calls} >= {0, 1, 2, 3}},
        {"kernels.select.WORKSPACE_BYTES": 1},
        ("importance",),
    ),
    Path(
        "some_tiles_of_queries_at_a_time",
        ("select_blocks",),
        (WHOLE,),
        {"kernels.select._best_kernel": lambda calls: [call.num_tiles for call in calls] == [4, 2]},
        {"kernels.select.WORKSPACE_BYTES": 4 * TILE_BYTES},
        ("importance",),
    ),
    Path(
        "blocks_shared_out",
        ("select_blocks",),
        FAR,
        {"kernels.select._importance_kernel": lambda calls: all(call.width > 2 * call.span for call in calls)},
        {},
        ("importance",),
        {"programs": 1000},
    ),
    Path(
        "blocks_shared_out_one_tile_of_queries_at_a_time",
        ("select_blocks",),
        (shaped("whole_far", ((21, 1609),), 40),),
        {"kernels.select._importance_kernel": lambda calls: len(calls) == 3 and calls[-1].width > 2 * calls[-1].span},
        {"kernels.select.WORKSPACE_BYTES": 1},
        ("importance",),
        {"programs": 1000},
    ),
    Path(
        "more_candidates_than_fit_beside_all_queries_of_a_tile",
        ("select_blocks",),
        (TALL, FAR[1]),
        {"kernels.select._best_kernel": lambda calls: all(call.QUERIES > call.ROWS for call in calls)},
        {},
        ("importance",),
    ),
    Path(
        "keys_in_two_chunks",
        ("select_blocks",),
        (shaped("wide", ((12, 200),), key_dim=80),),
        {"kernels.select._importance_kernel": lambda calls: calls[0].K1 > 0},
        {},
        ("importance",),
    ),
)


@each(SELECTION)
def test_selection(path: Path, stage: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    forced(path, stage, case, draw(case, DTYPE), monkeypatch)


@each(tuple(path for path in SELECTION if "shared_out" in path.id))
def test_ties_across_parts_go_to_the_lower_index(
    path: Path, stage: str, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the middle of the first part on all blocks are worth the same, and there are twice as many as are taken."""
    tensors = draw(case, DTYPE)
    # Small integers: products are exact whatever the order of summation, and so are ties.
    key = torch.ones(case.key_dim, dtype=DTYPE)
    tensors["q"] = torch.ones_like(tensors["q"])
    tensors["k_cmp"] = key.expand_as(tensors["k_cmp"]).clone()
    tensors["k_cmp"][:, :37] = 0
    tensors = with_selection(case, tensors)
    forced(path, stage, case, tensors, monkeypatch)
    with launched(path.kernels, **{**SMALL_TILES, **path.launch}):
        indices = select_blocks(load("triton"), case, tensors)
    assert_equal(indices, tensors["indices"], what="indices under ties")


# 2. Compressed and window branch. 40 compressed blocks make three tiles of keys; the window is longer than three.

CONTIGUOUS = ("compressed_attention", "sliding_window_attention")
KERNELS = tuple(
    f"{branch}_{kernel}" for branch in ("compressed", "window") for kernel in ("forward", "queries", "keys")
)
# Key tiles that one query sees and those that all see; group 3, so that tiles of rows begin within a token.
SHARED_OUT = (
    shaped("whole", ((40, 334),), batch=2, group=3),
    shaped("packed", ((50, 200), (0, 40), (33, 150), (1, 1)), group=3),
)
WIDE = tuple(
    shaped(f"{key_dim}_and_{value_dim}", ((9, 120),), 3, key_dim=key_dim, value_dim=value_dim)
    for key_dim, value_dim in ((80, 16), (16, 72), (96, 80))
)


def in_chunks(calls: Calls) -> bool:
    """Whether what is wider than a chunk comes in two."""
    return all((call.K1 > 0, call.V1 > 0) == (call.DK > 64, call.DV > 64) for call in calls)


ATTENTION = (
    Path(
        "queries_of_a_key_tile_shared_out",
        CONTIGUOUS,
        SHARED_OUT,
        {"kernels.contiguous._keys_kernel": lambda calls: calls[0].shares >= 3},
        {},
        KERNELS,
        {"programs": 1000},
    ),
    Path(
        "queries_of_a_key_tile_shared_out_unequally",
        CONTIGUOUS,
        SHARED_OUT,
        {"kernels.contiguous._keys_kernel": lambda calls: calls[0].shares == 2},
        {"kernels.contiguous._MOST_SHARES": 2},
        KERNELS,
        {"programs": 1000},
    ),
    Path(
        "queries_of_a_key_tile_shared_out_without_split",
        CONTIGUOUS,
        SHARED_OUT,
        {"kernels.contiguous._keys_kernel": lambda calls: calls[0].shares >= 3 and not calls[0].SPLIT},
        {},
        KERNELS,
        {"programs": 1000, "SPLIT": False},
    ),
    Path(
        "queries_of_a_key_tile_by_one_program",
        CONTIGUOUS,
        SHARED_OUT,
        {"kernels.contiguous._keys_kernel": lambda calls: calls[0].shares == 1},
        {},
        KERNELS,
        {"programs": 1},
    ),
    Path(
        "tall_tiles",
        CONTIGUOUS,
        SHARED_OUT,
        {"kernels.contiguous._queries_kernel": lambda calls: (calls[0].BLOCK_M, calls[0].BLOCK_N) == (32, 16)},
        {},
        KERNELS,
        {"BLOCK_M": 32},
    ),
    Path(
        "wide_tiles",
        CONTIGUOUS,
        SHARED_OUT,
        {"kernels.contiguous._queries_kernel": lambda calls: (calls[0].BLOCK_M, calls[0].BLOCK_N) == (16, 32)},
        {},
        KERNELS,
        {"BLOCK_N": 32},
    ),
    Path(
        "head_dims_in_two_chunks",
        CONTIGUOUS,
        WIDE,
        {
            "kernels.contiguous._forward_kernel": in_chunks,
            "kernels.contiguous._queries_kernel": in_chunks,
            "kernels.contiguous._keys_kernel": in_chunks,
        },
        {},
        KERNELS,
    ),
)


@each(ATTENTION)
def test_compressed_and_window_branch(path: Path, stage: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    forced(path, stage, case, draw(case, DTYPE), monkeypatch)


# 3. Selected branch. Lists of queries differ in length: the first block is everybody's.

HEADS = (
    shaped("whole", ((11, 120),), batch=2, kv_heads=3, scrambled=True),
    shaped("packed", ((6, 90), (0, 30), (5, 61)), kv_heads=3),
)
HEAD_BYTES = 11 * 5 * 2 * 16 * BYTES
"""Of the partial results of a head of `HEADS`."""
LISTS = (
    shaped("whole", ((21, 120),), batch=2, group=3, scrambled=True),
    shaped("packed", ((19, 90), (0, 30), (6, 61)), group=3),
)
LARGE_BLOCKS = (
    shaped("whole", ((13, 350),), 3, blocks=(16, 8, 128), group=3, scrambled=True),
    shaped("packed", ((9, 150), (0, 30), (12, 270)), 3, blocks=(16, 8, 128), group=3, scrambled=True),
)
BY_BLOCK, BY_QUERY = WAYS["by_block"], WAYS["by_query"]
SELECTED_STAGE = ("selected_attention",)


def several_pieces(calls: Calls) -> bool:
    """Whether there are lists of several pieces and lists of one."""
    counts = calls[0].pieces.diff(prepend=calls[0].pieces.new_zeros(1))
    return bool((counts > 1).any() and (counts == 1).any())


SELECTED_PATHS = (
    *(
        Path(
            f"partial_results_of_{some}_at_a_time",
            SELECTED_STAGE,
            HEADS,
            {
                f"kernels.selected.{kernel}": lambda calls, first=first: calls[1].first_head == first
                for kernel in kernels_
            },
            constants,
            SELECTED,
            BY_BLOCK,
        )
        for some, first, constants in (
            ("one_head", 1, {"kernels.selected.PARTIAL_BYTES": 1}),
            ("two_heads", 2, {"kernels.selected.PARTIAL_BYTES": 2 * HEAD_BYTES}),
            ("as_many_heads_as_a_grid_takes", 2, {"kernels.selected._LARGEST_GRID": 2}),
        )
        for kernels_ in (("_scatter_kernel", "_gather_kernel", "_keys_kernel", "_gather_dq_kernel"),)
    ),
    Path(
        "partial_results_of_four_of_six_heads_at_a_time",
        SELECTED_STAGE,
        HEADS[:1],
        {"kernels.selected._keys_kernel": lambda calls: [call.first_head for call in calls] == [0, 4]},
        {"kernels.selected.PARTIAL_BYTES": 4 * HEAD_BYTES},
        SELECTED,
        BY_BLOCK,
    ),
    *(
        Path(
            f"lists_in_pieces_of_{chunk}_{name}",
            SELECTED_STAGE,
            LISTS,
            {"kernels.selected._reduce_kernel": several_pieces},
            {},
            SELECTED,
            {**way, "CHUNK": chunk},
        )
        for name, way in WAYS.items()
        for chunk in (3, 8)
    ),
    Path(
        "partial_results_of_one_head_at_a_time_in_pieces",
        SELECTED_STAGE,
        HEADS,
        {
            "kernels.selected._reduce_kernel": several_pieces,
            "kernels.selected._keys_kernel": lambda calls: [call.first_head for call in calls[:3]] == [0, 1, 2],
        },
        {"kernels.selected.PARTIAL_BYTES": 1},
        SELECTED,
        {**BY_BLOCK, "CHUNK": 3},
    ),
    Path(
        "blocks_in_parts_by_block",
        SELECTED_STAGE,
        LARGE_BLOCKS,
        {
            f"kernels.selected.{kernel}": lambda calls: calls[0].KEYS < calls[0].BLOCK
            for kernel in ("_scatter_kernel", "_gather_kernel", "_keys_kernel", "_gather_dq_kernel", "_reduce_kernel")
        },
        {},
        SELECTED,
        BY_BLOCK,
    ),
    Path(
        "blocks_in_parts_by_query",
        SELECTED_STAGE,
        LARGE_BLOCKS,
        {
            f"kernels.selected.{kernel}": lambda calls: calls[0].KEYS < calls[0].BLOCK
            for kernel in ("_forward_kernel", "_queries_kernel", "_keys_kernel", "_reduce_kernel")
        },
        {},
        SELECTED,
        BY_QUERY,
    ),
    *(
        Path(
            f"head_dims_in_two_chunks_{name}",
            SELECTED_STAGE,
            WIDE,
            {"kernels.selected._keys_kernel": in_chunks, "kernels.selected._reduce_kernel": in_chunks},
            {},
            SELECTED,
            {**way, "CHUNK": 3},
        )
        for name, way in WAYS.items()
    ),
)


@each(SELECTED_PATHS)
def test_selected_branch(path: Path, stage: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    forced(path, stage, case, draw(case, DTYPE), monkeypatch)


@pytest.mark.parametrize(
    ("lists", "dtype"), [(2**15 - 2, torch.int16), (2**15, torch.int32), (2**16 + 6, torch.int32)], ids=str
)
def test_lists_are_numbered_in_numbers_that_hold_them(lists, dtype, monkeypatch):
    """The first and the last list of every head, and slots that hold nothing, whatever the number of lists."""
    heads, blocks, size = 2, lists // 2, 16
    wanted = torch.tensor([[0, blocks - 1], [blocks - 1, -1], [3, 0]], dtype=torch.int32)
    indices = wanted[None, :, None].expand(1, 3, heads, 2).contiguous()
    watched = Watched(selected._lists_kernel)
    monkeypatch.setattr(selected, "_lists_kernel", watched)
    packing = selected._Packing(None, None, blocks)
    # All queries are beyond the last block.
    members, offsets, _ = selected._invert(indices, blocks * size, packing, size, 8)
    assert watched.calls[0].lists_of.dtype == dtype
    found = {
        number: members[offsets[number] : offsets[number + 1]].tolist()
        for number in offsets.diff().nonzero().flatten().tolist()
    }
    # A member is 2 query + slot.
    of_head = {0: [0, 5], 3: [4], blocks - 1: [1, 2]}
    assert found == {head * blocks + block: pairs for head in range(heads) for block, pairs in of_head.items()}


# 4. The whole: branches that add to one gradient of queries, under gates.

WHOLE_PATHS = (
    Path(
        "everything_in_parts",
        ("nsa_attention",),
        (shaped("whole", ((23, 200),), batch=2), shaped("packed", ((20, 120), (0, 30), (7, 90)))),
        {
            "kernels.contiguous._keys_kernel": lambda calls: all(call.shares > 1 and call.WEIGHTED for call in calls),
            "kernels.selected._keys_kernel": lambda calls: len(calls) > 1 and calls[0].WEIGHTED,
            "kernels.selected._gather_dq_kernel": lambda calls: len(calls) > 1 and calls[0].ADD,
            "kernels.selected._reduce_kernel": several_pieces,
        },
        {"kernels.selected.PARTIAL_BYTES": 1},
        SELECTED,
        {**BY_BLOCK, "CHUNK": 3},
    ),
)


@each(WHOLE_PATHS)
def test_the_whole(path: Path, stage: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    with launched(KERNELS, **SMALL_TILES, programs=1000):
        forced(path, stage, case, draw(case, DTYPE), monkeypatch)


# 5. Compression.

COMPRESS = ("compress_keys", "compress_values")
COMPRESSION = (
    Path(
        "several_programs_of_blocks",
        COMPRESS,
        (shaped("whole", whole(300), batch=2), shaped("packed", whole(150, 5, 0, 160))),
        {
            "kernels.compress._mean_kernel": lambda calls: calls[0].count > 2 * calls[0].ROWS,
            "kernels.compress._mean_backward_kernel": lambda calls: calls[0].num_tokens > 2 * calls[0].ROWS,
        },
    ),
    Path(
        "blocks_of_four_pieces",
        COMPRESS,
        tuple(shaped(kind, whole(100), blocks=(32, 8, 32), compression=kind, batch=2) for kind in ("linear", "mlp")),
        {"kernels.compress._first_layer": lambda calls: calls[0].count > 4},
    ),
    Path(
        "tokens_of_four_blocks",
        COMPRESS,
        (shaped("whole", whole(100), blocks=(32, 8, 32)), shaped("packed", whole(50, 31, 70), blocks=(32, 8, 32))),
        {"kernels.compress._mean_backward_kernel": lambda calls: calls[0].LENGTH == 4 * calls[0].STRIDE},
    ),
)


@each(COMPRESSION)
def test_compression(path: Path, stage: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    forced(path, stage, case, draw(case, DTYPE), monkeypatch)


# 6. Tiles of queries of the eager backend, which small cases fit into one of.

EAGER = tuple(
    Path(
        f"{rows}_queries_at_a_time",
        ("compressed_attention", "select_blocks", "selected_attention", "sliding_window_attention"),
        (
            shaped("whole", ((21, 150),), batch=2, scrambled=True),
            shaped("packed", ((19, 90), (0, 30), (6, 61))),
        ),
        {"eager._Tile": lambda calls, rows=rows: sum(call.last - call.first == rows - 1 for call in calls) > 3},
        {"eager._rows": lambda bytes_per_query, device, rows=rows: rows},
        backend="eager",
    )
    for rows in (1, 4)
)


@each(EAGER)
def test_eager_tiles(path: Path, stage: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    forced(path, stage, case, draw(case, DTYPE), monkeypatch)
