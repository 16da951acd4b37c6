"""Paths that exist for large sizes, forced at small size: parts, shares, pieces, chunks, tiles, several launches.

Each row of the tables says what our code does, in which stages, on which cases, how one sees that it was done, and what
makes it do so. Results depend on the path: queries choose few of many blocks, each tile of queries sees other keys, and
what is shared out leaves a remainder.
"""

from functools import partial
from typing import Any

import pytest
import torch

from nsa import NSAConfig
from validation.cases import Case, config, draw, whole, with_selection
from validation.implementations import load
from validation.memory import WORKSPACES, memory_is_guarded
from validation.numerics import assert_equal
from validation.stages import select_blocks
from validation.unit.forced import DTYPE, Calls, Path, at, force, launched_as
from validation.unit.ways import SELECTED, WAYS

pytestmark = pytest.mark.usefixtures("on_device")


def shaped(id: str, lengths: tuple[tuple[int, int], ...], selected: int = 5, window: int = 50, **rest: Any) -> Case:
    """A case of 16-token blocks, unless given, at every eighth token, and of the narrowest heads."""
    blocks = rest.pop("blocks", (16, 8, 16))
    chosen = {name: rest.pop(name) for name in tuple(rest) if name in NSAConfig.__dataclass_fields__}
    shape = {"key_dim": 16, "value_dim": 16} | rest
    return Case(id, lengths, config(blocks, selected, window, **{"compression": "mean"} | chosen), **shape)


# 1. Importance and selection. Of 21 candidates 5 or 12 are taken. The first of the 6 tiles of 8 queries has 19, and the
# second ends with the first query of a block, which is beyond what a tile one token shorter could reach. Forced blocks
# are taken whatever is made of their importance, so most cases have none.

FREE = {"num_initial_blocks": 0, "num_local_blocks": 0}
WHOLE = (shaped("whole", ((45, 334),), batch=2), shaped("nothing_forced", ((45, 334),), 12, batch=2, **FREE))
PACKED = shaped("packed", ((40, 170), (0, 30), (3, 250), (21, 95)))
FAR = shaped("far", ((5, 1609),), 40, **FREE)
FAR_TILES = shaped("far_tiles", ((21, 1609),), 40, **FREE)
PACKED_FAR = shaped("packed_far", ((3, 1100), (0, 8), (2, 1063)), 40, **FREE)
# The last sequence ends with the last tile that a grid has room for.
FULL_TABLES = (shaped("packed", ((17, 100), (18, 147)), group=3),)
TILE_BYTES = 2 * 2 * 8 * 21 * DTYPE.itemsize
"""Of the importances of one tile of queries of `WHOLE`."""


def full(calls: Calls, offsets: str = "cu_queries", factor: str = "", block: str = "QUERIES") -> bool:
    """Whether the last tile that there is room for exists, of those that `offsets` are cut into."""
    for call in calls:
        *_, begin, end = (int(x) * (getattr(call, factor) if factor else 1) for x in getattr(call, offsets))
        rows, sequences = getattr(call, block), call.num_sequences
        used = begin // rows + sequences - 1 - (-(end - begin) // rows)
        if used != end // rows + sequences:
            return False
    return True


SELECTION = (
    Path(
        "full_grids", ("select_blocks",), FULL_TABLES, {"kernels.select._importance_kernel": full}, {},
        at(["importance"]),
    ),
    Path(
        "one_tile_of_queries_at_a_time", ("select_blocks",),
        (*WHOLE, PACKED, shaped("overlapping", ((30, 250),), blocks=(32, 8, 32))),
        {"kernels.select._importance_kernel": lambda calls: {call.first_tile for call in calls} >= {0, 1, 2, 3}},
        {"kernels.select.WORKSPACE_BYTES": 1}, at(["importance"]),
    ),
    Path(
        "four_tiles_of_queries_at_a_time", ("select_blocks",), WHOLE,
        {"kernels.select._best_kernel": lambda calls: [call.num_tiles for call in calls] == [4, 2]},
        {"kernels.select.WORKSPACE_BYTES": 4 * TILE_BYTES}, at(["importance"]),
    ),
    Path(
        "blocks_shared_out", ("select_blocks",), (FAR, PACKED_FAR),
        {"kernels.select._importance_kernel": lambda calls: all(call.width > 2 * call.span for call in calls)},
        {}, at(["importance"], num_programs=1000),
    ),
    Path(
        "blocks_shared_out_for_one_tile_at_a_time", ("select_blocks",), (FAR_TILES,),
        {"kernels.select._importance_kernel": lambda calls: len(calls) == 3 and calls[-1].width > 2 * calls[-1].span},
        {"kernels.select.WORKSPACE_BYTES": 1}, at(["importance"], num_programs=1000),
    ),
    Path(
        "more_candidates_than_fit_beside_a_tile_of_queries", ("select_blocks",),
        (shaped("far", ((37, 1100),), 30, group=1, **FREE), PACKED_FAR),
        {"kernels.select._best_kernel": lambda calls: all(call.QUERIES > call.ROWS for call in calls)},
        {}, at(["importance"]),
    ),
    Path(
        "keys_in_two_chunks", ("select_blocks",), (shaped("80", ((12, 200),), key_dim=80, **FREE),),
        {"kernels.select._importance_kernel": lambda calls: calls[0].K1 > 0}, {}, at(["importance"]),
    ),
)  # fmt: skip


# 2. Compressed and window branch. 40 compressed blocks make three tiles of keys, and a window is longer than three.
# With 3 heads a group, tiles of rows begin within a token. The last query to see some tile of keys is the first of a
# tile of queries: 16 a tile, it is query 32, at position 320, whose window of 50 begins with the last key of a tile.

CONTIGUOUS = ("compressed_attention", "sliding_window_attention")
KERNELS = tuple(
    f"{branch}_{kernel}" for branch in ("compressed", "window") for kernel in ("forward", "bwd_dq", "bwd_dkdv")
)
FLASH_KERNELS = (
    "flash_forward._forward_kernel", "flash_backward._bwd_dq_kernel", "flash_backward._bwd_dkdv_kernel",
)  # fmt: skip
TILED = (
    shaped("whole", ((40, 328),), batch=2, group=3),
    shaped("packed", ((50, 200), (0, 40), (33, 150), (1, 1)), group=3),
)
WIDE = tuple(
    shaped(f"{key_dim}_and_{value_dim}", ((9, 120),), 3, key_dim=key_dim, value_dim=value_dim)
    for key_dim, value_dim in ((80, 16), (16, 72), (96, 80))
)


MANY = (shaped("many", tuple((i % 4, i % 4 + 9 * (i % 3)) for i in range(70))),)
"""More sequences than a program looks at in one go; some have no queries, some no keys."""


def in_chunks(calls: Calls) -> bool:
    """Whether heads wider than a chunk come in two."""
    return all((call.K1 > 0, call.V1 > 0) == (call.DK > 64, call.DV > 64) for call in calls)


def splits(count: int, id: str, constants: dict[str, Any], **parameters: Any) -> Path:
    """The queries of a tile of keys split among `count` programs."""
    seen = {"kernels.flash_backward._bwd_dkdv_kernel": lambda calls: calls[0].num_splits == count}
    return Path(id, CONTIGUOUS, TILED, seen, constants, at(KERNELS, **parameters))


def tiles(id: str, rows: int, keys: int) -> Path:
    """Tiles of so many rows and keys."""
    seen = {"kernels.flash_backward._bwd_dq_kernel": lambda calls: (rows, keys) == (calls[0].BLOCK_M, calls[0].BLOCK_N)}
    return Path(id, CONTIGUOUS, TILED, seen, {}, at(KERNELS, BLOCK_M=rows, BLOCK_N=keys))


TWO_SPLITS = {"kernels.flash_backward._MOST_SPLITS": 2}
ATTENTION = (
    splits(1, "queries_in_one_split", {}, num_programs=1),
    splits(2, "queries_in_two_splits", TWO_SPLITS, num_programs=1000),
    splits(2, "queries_in_two_splits_all_masked", TWO_SPLITS, num_programs=1000, SPLIT=False),
    splits(3, "queries_in_three_splits", {"kernels.flash_backward._MOST_SPLITS": 3}, num_programs=1000),
    Path(
        "full_grids", CONTIGUOUS, FULL_TABLES,
        {
            "kernels.flash_forward._forward_kernel": partial(full, factor="G", block="BLOCK_M"),
            "kernels.flash_backward._bwd_dq_kernel": partial(full, factor="G", block="BLOCK_M"),
            "kernels.flash_backward._bwd_dkdv_kernel": partial(full, offsets="cu_keys", block="BLOCK_N"),
        },
        {}, at(KERNELS),
    ),
    Path(
        "many_sequences", CONTIGUOUS, MANY,
        {"kernels.flash_forward._forward_kernel": lambda calls: calls[0].num_sequences > 32}, {}, at(KERNELS),
    ),
    tiles("tall_tiles", 32, 16),
    tiles("broad_tiles", 16, 32),
    Path(
        "heads_in_two_chunks", CONTIGUOUS, WIDE,
        {f"kernels.{kernel}": in_chunks for kernel in FLASH_KERNELS},
        {}, at(KERNELS),
    ),
)  # fmt: skip


# 3. Selected branch. Lists of queries differ in length: the first block is everybody's.

BY_BLOCK, BY_QUERY = WAYS["by_block"], WAYS["by_query"]
HEADS = (
    shaped("whole", ((11, 120),), batch=2, kv_heads=3, scrambled=True),
    shaped("packed", ((6, 90), (0, 30), (5, 61)), kv_heads=3),
)
HEAD_BYTES = 11 * 5 * 2 * 16 * DTYPE.itemsize
"""Of the partial results of a head of `HEADS`."""
LISTS = (
    shaped("whole", ((17, 120),), batch=2, group=3, scrambled=True),
    shaped("packed", ((15, 90), (0, 30), (6, 61)), group=3),
)
LARGE_BLOCKS = (
    shaped("whole", ((13, 350),), 3, blocks=(16, 8, 128), group=3, scrambled=True),
    shaped("packed", ((9, 150), (0, 30), (12, 270)), 3, blocks=(16, 8, 128), group=3, scrambled=True),
)
BLOCK_KERNELS = ("_forward_kernel", "_merge_kernel", "_bwd_dkdv_kernel", "_merge_dq_kernel")
DKDV, REDUCE = "kernels.selected_by_block._bwd_dkdv_kernel", "kernels.selected_by_block._reduce_kernel"


def several_pieces(calls: Calls) -> bool:
    """Whether there are lists of several pieces and lists of one."""
    counts = calls[0].pieces.diff()
    return bool((counts > 1).any() and (counts == 1).any())


def by_heads(id: str, count: int, constants: dict[str, Any], **parameters: Any) -> Path:
    """Partial results of `count` heads at a time."""

    def in_turns(calls: Calls) -> bool:
        """Whether the second turn begins where the first one ended. Second passes (CLEAN) are no turns."""
        return [call for call in calls if not getattr(call, "CLEAN", False)][1].first_head == count

    seen = {f"kernels.selected_by_block.{kernel}": in_turns for kernel in BLOCK_KERNELS}
    cases = [case for case in HEADS if count < case.batch * case.kv_heads]
    return Path(id, ("selected_attention",), tuple(cases), seen, constants, at(SELECTED, **{**BY_BLOCK, **parameters}))


def in_pieces(way: str, length: int, *cases: Case) -> Path:
    """Lists of queries in pieces of `length`."""
    seen = {REDUCE: several_pieces}
    launch = at(SELECTED, **{**WAYS[way], "CHUNK": length})
    return Path(f"lists_in_pieces_of_{length}_{way}", ("selected_attention",), cases, seen, {}, launch)


def in_parts(way: str, kernels: tuple[str, ...]) -> Path:
    """Blocks a part at a time."""
    names = (*(f"kernels.selected_{way}.{kernel}" for kernel in kernels), DKDV, REDUCE)
    seen = {name: lambda calls: all(call.BLOCK_N < call.BLOCK_SIZE for call in calls) for name in names}
    return Path(f"blocks_in_parts_{way}", ("selected_attention",), LARGE_BLOCKS, seen, {}, at(SELECTED, **WAYS[way]))


def wide_heads(way: str) -> Path:
    """Heads in two chunks."""
    seen = {DKDV: in_chunks, REDUCE: in_chunks}
    launch = at(SELECTED, **{**WAYS[way], "CHUNK": 3})
    return Path(f"heads_in_two_chunks_{way}", ("selected_attention",), WIDE, seen, {}, launch)


ONE_HEAD = {"kernels.primitives.WORKSPACE_BYTES": 1}
SELECTED_BLOCKS = (
    by_heads("one_head_at_a_time", 1, ONE_HEAD),
    by_heads("one_head_at_a_time_in_pieces", 1, ONE_HEAD, CHUNK=3),
    by_heads("two_heads_at_a_time", 2, {"kernels.primitives.WORKSPACE_BYTES": 2 * HEAD_BYTES}),
    by_heads("four_heads_at_a_time", 4, {"kernels.primitives.WORKSPACE_BYTES": 4 * HEAD_BYTES}),
    by_heads("as_many_heads_as_a_grid_takes", 2, {"kernels.primitives._LARGEST_GRID": 2}),
    *(in_pieces(way, 3, *LISTS) for way in WAYS),
    in_pieces("by_block", 8, *LISTS),
    # More lists than there are places for partial sums of pieces.
    in_pieces("by_query", 32, shaped("many_lists", ((40, 320),), kv_heads=3)),
    Path(
        "full_grids", ("selected_attention",), FULL_TABLES,
        {DKDV: partial(full, offsets="cu_keys", block="BLOCK_SIZE")}, {}, at(SELECTED, **BY_BLOCK),
    ),
    in_parts("by_block", BLOCK_KERNELS),
    in_parts("by_query", ("_forward_kernel", "_bwd_dq_kernel")),
    *map(wide_heads, WAYS),
)  # fmt: skip


# 4. The whole, whose branches add to one gradient of queries, under gates.

TOGETHER = (
    Path(
        "everything_in_parts", ("nsa_attention",),
        (shaped("whole", ((17, 180),), batch=2), shaped("packed", ((19, 120), (0, 30), (7, 90)))),
        {
            "kernels.flash_backward._bwd_dkdv_kernel": lambda calls: all(
                call.num_splits > 1 and call.WEIGHTED for call in calls
            ),
            DKDV: lambda calls: len(calls) > 1 and calls[0].WEIGHTED,
            "kernels.selected_by_block._merge_dq_kernel": lambda calls: len(calls) > 1 and calls[0].ADD,
            REDUCE: several_pieces,
        },
        ONE_HEAD, {**at(KERNELS, num_programs=1000), **at(SELECTED, **{**BY_BLOCK, "CHUNK": 3})},
    ),
)  # fmt: skip


# 5. Compression.

COMPRESS = ("compress_keys", "compress_values")
OVERLAPPING: dict[str, Any] = {"blocks": (32, 8, 32)}
COMPRESSION = (
    Path(
        "several_programs", COMPRESS, (shaped("whole", whole(300), batch=2), shaped("packed", whole(150, 5, 0, 160))),
        {
            "kernels.compress._mean_kernel": lambda calls: calls[0].count > 2 * calls[0].ROWS,
            "kernels.compress._tokens_kernel": lambda calls: calls[0].num_tokens > 2 * calls[0].ROWS,
        },
    ),
    Path(
        "tokens_of_four_blocks", COMPRESS,
        (shaped("whole", whole(100), **OVERLAPPING), shaped("packed", whole(50, 31, 70), **OVERLAPPING)),
        {"kernels.compress._tokens_kernel": lambda calls: calls[0].LENGTH == 4 * calls[0].STRIDE},
    ),
    Path(
        "rows_in_four_parts", COMPRESS,
        (
            shaped("linear", whole(100), compression="linear", batch=2, **OVERLAPPING),
            shaped("mlp", whole(50, 31, 70), compression="mlp", **OVERLAPPING),
        ),
        {"kernels.compress._rows_kernel": lambda calls: calls[0].LENGTH == 4 * calls[0].TOKENS},
        {"kernels.compress._ELEMENTS": 8 * 16},
    ),
)  # fmt: skip


# 6. Tiles of queries of the eager backend, of which small cases fit into one.


def at_a_time(rows: int) -> Path:
    """So many queries in a tile."""
    seen = {"eager.tiles.Tile": lambda calls: sum(call.last - call.first == rows - 1 for call in calls) > 3}
    constants = {"eager.tiles._num_queries": lambda bytes_per_query, device: rows}
    cases = (
        shaped("whole", ((21, 150),), batch=2, scrambled=True),
        shaped("packed", ((19, 90), (0, 30), (6, 61)), **FREE),
    )
    stages = ("compressed_attention", "select_blocks", "selected_attention", "sliding_window_attention")
    return Path(f"tiles_of_{rows}", stages, cases, seen, constants, backend="eager")


EAGER = (at_a_time(1), at_a_time(4))


PATHS = [
    pytest.param(path, stage, case, id=f"{path.id}-{stage}-{case.id}")
    for path in (*SELECTION, *ATTENTION, *SELECTED_BLOCKS, *TOGETHER, *COMPRESSION, *EAGER)
    for stage in path.stages
    for case in path.cases
]


@pytest.mark.parametrize(("path", "stage", "case"), PATHS)
def test_matches_the_oracle(path: Path, stage: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    force(path, stage, case, draw(case, DTYPE), monkeypatch)


@pytest.mark.parametrize("place", [-1, 12])
def test_what_is_written_beside_a_workspace_is_noticed(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def write() -> None:
        with memory_is_guarded(monkeypatch, WORKSPACES):
            x = torch.zeros(1).new_empty(3, 4)
            x.as_strided((1,), (1,), x.storage_offset() + place).zero_()

    with pytest.raises(AssertionError, match="1 elements were written beside a tensor of 12"):
        write()


SHARED_OUT = [(path, case) for path in SELECTION if path.id.startswith("blocks_shared_out") for case in path.cases]


@pytest.mark.parametrize(("path", "case"), SHARED_OUT, ids=[f"{path.id}-{case.id}" for path, case in SHARED_OUT])
def test_ties_across_parts_go_to_the_lower_index(path: Path, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the middle of the first part on all blocks are worth the same, and there are more than are taken."""
    tensors = draw(case, DTYPE)
    # Small integers: products are exact whatever the order of summation, and so are ties.
    tensors["q"], tensors["k_cmp"] = torch.ones_like(tensors["q"]), torch.ones_like(tensors["k_cmp"])
    tensors["k_cmp"][:, :37] = 0
    tensors = with_selection(case, tensors)
    force(path, "select_blocks", case, tensors, monkeypatch)
    with launched_as(path):
        assert_equal(select_blocks(load("triton"), case, tensors), tensors["indices"], what="indices under ties")
