"""The Hopper kernel of the importance of blocks: how it compiles, what it takes, what is selected by it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from nsa import kernels
from nsa.config import NSAConfig
from nsa.kernels import select
from nsa.kernels.hopper import available, portable
from nsa.kernels.hopper import importance as hopper
from nsa.kernels.launches import recorded
from validation.cases import Case, draw, whole
from validation.comparison import compare_selection
from validation.implementations import load
from validation.numerics import assert_equal
from validation.unit.compiled import compile_for_hopper
from validation.unit.hopper_cases import CONFIG, shaped

pytestmark = pytest.mark.usefixtures("on_device")

TRITON = load("triton")

LAUNCHES = """
from nsa.kernels.hopper import importance

def look(compiled):
    code = ask(compiled, "cubin", disassembler("nvdisasm"), "-c")
    products = [found.start() for found in re.finditer("HGMMA", code)]
    half = len(products) // 2
    # The products of either consumer, in loops over tiles of keys and over heads; what is spilled outside is of a walk.
    loops = code[products[0]:products[half - 1]], code[products[half]:products[-1]]
    return {
        "spilled": sum(loop.count("STL") for loop in loops),
        "waits": code.count("WARPGROUP.DEPBAR"),
        "exponentials": code.count("MUFU.EX2"),
    }

importance.multiprocessors = lambda device: 132
for dim, group in ((128, 16), (64, 4)):
    q, k = (torch.zeros(1, n, h, dim, dtype=torch.bfloat16) for n, h in ((300, 2 * group), (17, 2)))
    lse, scores = torch.zeros(1, 300, 2 * group), torch.zeros(1, 2, 384, 5)
    importance.importance(q, k, lse, scores, NSAConfig(), 300, 0, 0.1)
"""


def test_it_compiles_without_spills_in_its_loops_and_fits() -> None:
    found = compile_for_hopper(LAUNCHES)
    for kernel, products in zip(found, (1, 2), strict=True):
        assert kernel["spilled"] == 0
        assert kernel["shared"] <= 227 * 1024
        # For either consumer, with and without a mask: products waited for as a whole, 64 logits a thread.
        assert kernel["waits"] == 4 * products
        assert kernel["exponentials"] == 4 * products * 64


def applies(
    group: int = 16,
    dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    *,
    blocks: int = 17,
    shifted: bool = False,
    **sizes: Any,
) -> bool:
    q, k = torch.empty(2, 300, 2 * group, dim, dtype=dtype), torch.empty(2, blocks, 2, dim + shifted, dtype=dtype)
    return hopper.applies(q, k[..., int(shifted) :], NSAConfig(**sizes))


@pytest.mark.parametrize("group", [4, 8, 16, 32, 64])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_it_takes(group: int, dim: int, dtype: torch.dtype) -> None:
    assert applies(group, dim, dtype)


def test_it_takes_blocks_of_other_lengths_in_the_same_proportion() -> None:
    assert applies(compress_block_size=16, compress_stride=8, select_block_size=32)


@pytest.mark.parametrize(
    "given",
    [
        {"group": 2},
        {"group": 12},
        {"group": 128},
        {"dim": 32},
        {"dim": 96},
        {"dim": 192},
        {"dtype": torch.float32},
        {"blocks": 3},
        {"shifted": True},
        {"compress_block_size": 16},
        {"select_block_size": 32},
        {"select_block_size": 128},
    ],
    ids=str,
)
def test_what_it_leaves_to_triton(given: dict[str, Any]) -> None:
    assert not applies(**given)


def by_torch(
    q: Tensor, k: Tensor, lse: Tensor, scores: Tensor, config: NSAConfig, num_tokens: int, first_tile: int, scale: float
) -> None:
    """Importances as `hopper.importance` writes them: of some tiles of queries, up to the block of each query."""
    (_, num_queries, query_heads, _), (num_keys, heads) = q.shape, k.shape[1:3]
    for row in range(scores.shape[2]):
        query = first_tile * hopper.QUERIES + row
        if query >= num_queries:
            continue
        position = query + num_tokens - num_queries
        ends = torch.arange(num_keys) * config.compress_stride + config.compress_block_size - 1
        keys = k.repeat_interleave(query_heads // heads, 2)
        p = torch.exp(torch.einsum("bhd,bkhd->bhk", q[:, query], keys) * scale - lse[:, query, :, None])
        p = torch.where(ends <= position, p, 0.0).unflatten(1, (heads, -1)).sum(2)
        p = torch.nn.functional.pad(p, (1, 4 * scores.shape[3]))
        for block in range(position // config.select_block_size + 1):
            weights = torch.tensor([1.0, 2.0, 2.0, 2.0, 1.0], dtype=p.dtype)
            scores[:, :, row, block] = p[..., 4 * block : 4 * block + 5] @ weights


@pytest.mark.skipif(not kernels.INTERPRETED, reason="in float64, as the interpreter takes it")
@pytest.mark.parametrize("tiles_at_a_time", [1, 2])
def test_blocks_are_chosen_by_what_it_writes(tiles_at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = NSAConfig(num_selected_blocks=4)
    case = shaped("last_queries", ((300, 500),), 4, 16, batch=2, config=config)
    x = draw(case)
    monkeypatch.setattr(select, "available", lambda device: True)
    monkeypatch.setattr(hopper, "applies", lambda *given: True)
    launched: list[int] = []

    def counted(*given: Any) -> None:
        launched.append(given[6])
        by_torch(*given)

    monkeypatch.setattr(hopper, "importance", counted)
    monkeypatch.setattr(select, "WORKSPACE_BYTES", tiles_at_a_time * 2 * 2 * hopper.QUERIES * 8 * 8)
    compare_selection(TRITON, case, x, torch.float64)
    assert launched == list(range(0, 3, tiles_at_a_time))


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows by one with every launch of the kernel; skips where there is no GPU for it."""
    if not available(torch.empty(0).device):
        pytest.skip("needs a Hopper GPU")
    calls: list[Any] = []
    launch = hopper.importance

    def counted(*given: Any) -> None:
        calls.append(given[0])
        launch(*given)

    monkeypatch.setattr(hopper, "importance", counted)
    return calls


FEW = NSAConfig(num_selected_blocks=6)
CASES = [
    shaped("one_query", ((1, 80),), 4, 64, config=FEW),
    shaped("one_query_far_on", ((1, 20000),), 16, 128, config=FEW),
    shaped("four_blocks", whole(80), 4, 128, config=FEW),
    shaped("one_tile", whole(127), 16, 128, kv_heads=1, config=FEW),
    shaped("tiles", whole(2049), 16, 128, config=FEW),
    shaped("tiles_of_keys", whole(4127), 4, 64, config=FEW),
    shaped("batch", whole(901), 8, 64, batch=3, config=FEW),
    shaped("group_4_wide", whole(1500), 4, 128, kv_heads=1, config=FEW),
    shaped("group_8_wide", whole(1003), 8, 128, config=FEW),
    shaped("group_32", whole(805), 32, 64, kv_heads=1, config=FEW),
    shaped("last_queries", ((130, 9000),), 16, 64, kv_heads=1, config=FEW),
    shaped("nothing_forced", whole(1100), 8, 64, config=NSAConfig(num_initial_blocks=0, num_local_blocks=0)),
    shaped("half_as_long", whole(1100), 4, 64, config=NSAConfig(16, 8, 32, num_selected_blocks=6)),
    shaped("negative_scale", whole(700), 4, 64, config=FEW, scale=-0.2),
]


@pytest.mark.needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_what_is_selected_is_as_good_as_the_oracle_s_choice(case: Case, dtype: torch.dtype, taken: list[Any]) -> None:
    compare_selection(TRITON, case, draw(case, dtype), dtype)
    assert taken


@pytest.mark.needs_gpu
def test_less_than_a_block_of_tokens_is_left_to_triton(taken: list[Any]) -> None:
    for tokens in (1, 31, 32, 79):
        case = shaped("short", whole(tokens), 4, 64)
        compare_selection(TRITON, case, draw(case, torch.bfloat16), torch.bfloat16)
    assert not taken


def inputs(tokens: int, group: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, compressed keys and log-sum-exps of two batch rows with two KV heads."""
    q, k = (
        torch.randn(2, length, heads, dim, dtype=torch.bfloat16)
        for length, heads in ((tokens, 2 * group), (CONFIG.num_compressed(tokens), 2))
    )
    return q, k, 6 + torch.rand(q.shape[:3])


def written(num_keys: int, q: Tensor, k: Tensor, lse: Tensor) -> Tensor:
    """All importances that the kernel writes, 0 elsewhere."""
    tiles = -(-q.shape[1] // hopper.QUERIES)
    scores = torch.zeros(q.shape[0], k.shape[2], tiles * hopper.QUERIES, CONFIG.num_selectable(num_keys))
    hopper.importance(q, k, lse, scores, CONFIG, num_keys, 0, q.shape[3] ** -0.5)
    return scores[:, :, : q.shape[1]]


@pytest.mark.needs_gpu
@pytest.mark.parametrize(("group", "dim"), [(16, 128), (4, 64)])
def test_importances_have_the_same_bits_in_a_batch_alone_and_in_a_chunk(group: int, dim: int, taken: list[Any]) -> None:
    tokens = 17001
    q, k, lse = inputs(tokens, group, dim)
    together = written(tokens, q, k, lse)
    assert_equal(written(tokens, q, k, lse), together, what="importances, launched again")
    assert_equal(written(tokens, q[1:], k[1:], lse[1:]), together[1:], what="importances, alone")
    # So few queries that their keys are cut into parts; and they begin within a tile of all queries.
    chunk = written(tokens, q[1:, -131:], k[1:], lse[1:, -131:])
    assert_equal(chunk, together[1:, :, -131:], what="importances of the last queries")


@pytest.mark.needs_gpu
def test_a_repeated_launch_selects_the_same(taken: list[Any]) -> None:
    def selected(q: Tensor, k: Tensor, lse: Tensor) -> Tensor:
        return TRITON.function("select_blocks")(q, k, lse, FEW, num_keys=3001)

    x, launcher = inputs(3001, 16, 128), recorded(selected)
    first = selected(*x)
    assert taken
    for _ in range(4):
        assert_equal(launcher(*x), first, what="indices")


@pytest.mark.needs_gpu
@pytest.mark.parametrize("what", [float("nan"), float("inf")])
def test_a_key_that_is_not_finite_matters_to_those_who_see_it_alone(what: float, taken: list[Any]) -> None:
    q, k, lse = inputs(1500, 8, 64)
    expected = written(1500, q, k, lse)
    k[1, 70, 1] = what
    found = written(1500, q, k, lse)
    sees = 70 * CONFIG.compress_stride + CONFIG.compress_block_size - 1
    assert_equal(found[1, 1, :sees], expected[1, 1, :sees], what="importances for queries before the block's end")
    assert_equal(found[:, 0], expected[:, 0], what="importances of the other head")
    assert_equal(found[0], expected[0], what="importances of the other batch row")
    assert not found[1, 1, sees:].isfinite().all()


@pytest.mark.needs_gpu
def test_triton_s_kernel_runs_inside_the_context(taken: list[Any]) -> None:
    case = shaped("whole", whole(300), 4, 64)
    with portable():
        compare_selection(TRITON, case, draw(case, torch.bfloat16), torch.bfloat16)
    assert not taken
