"""The Hopper kernel of the compressed and of the window branch: how it compiles, what it takes, what it computes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from nsa import kernels
from nsa.config import NSAConfig
from nsa.kernels import flash_forward
from nsa.kernels.flash_tiles import PositionMap
from nsa.kernels.hopper import available, portable
from nsa.kernels.hopper import flash_forward as hopper
from nsa.kernels.launches import recorded
from validation.cases import Case, draw, whole
from validation.comparison import compare
from validation.implementations import load
from validation.numerics import assert_equal, assert_matches
from validation.stages import STAGES
from validation.unit.compiled import compile_for_hopper

pytestmark = pytest.mark.usefixtures("on_device")

CONFIG = NSAConfig()
TRITON = load("triton")
BRANCHES = {"compressed_attention": PositionMap.compressed, "sliding_window_attention": PositionMap.sliding}
each_branch = pytest.mark.parametrize("branch", BRANCHES)

LAUNCHES = """
from nsa.kernels.hopper import flash_forward

def look(compiled):
    told = ask(compiled, "cubin", disassembler("cuobjdump"), "-res-usage")
    return {"stack": int(re.search(r"STACK:(\\d+)", told).group(1))}

for group, branch in ((16, PositionMap.sliding), (4, PositionMap.compressed)):
    q = torch.zeros(1, 300, 2 * group, 128, dtype=torch.bfloat16)
    k = torch.zeros(1, 300, 2, 128, dtype=torch.bfloat16)
    flash_forward.forward(branch(NSAConfig(), 300), q, k, k, q.clone(), torch.zeros(1, 300, 2 * group), 300, 0.1)
"""


def test_it_compiles_without_spilling_registers_and_fits() -> None:
    found = compile_for_hopper(LAUNCHES)
    assert len(found) == 2
    for kernel in found:
        assert kernel["stack"] == 0
        assert kernel["shared"] <= 227 * 1024


def drawn(group: int = 4, dim: int = 128, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    k = torch.randn(2, 40, 2, dim, dtype=dtype)
    return torch.randn(2, 40, 2 * group, dim, dtype=dtype), k, torch.randn_like(k)


@pytest.mark.parametrize("group", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_it_takes(group: int, dtype: torch.dtype) -> None:
    assert hopper.applies(*drawn(group, dtype=dtype))


@pytest.mark.parametrize(
    "given",
    [
        {"group": 3},
        {"group": 128},
        {"dim": 64},
        {"dim": 96},
        {"dim": 192},
        {"dtype": torch.float32},
        {"dtype": torch.float64},
    ],
    ids=str,
)
def test_what_it_leaves_to_triton(given: dict[str, Any]) -> None:
    assert not hopper.applies(*drawn(**given))


def test_it_takes_no_values_of_another_width_and_no_rows_that_are_not_aligned() -> None:
    q, k, v = drawn()
    assert not hopper.applies(q, k, torch.cat((v, v), -1))
    for shifted in (torch.cat((x, x[..., :1]), -1)[..., 1:] for x in (q, k, v)):
        assert not hopper.applies(*(shifted if x.shape == shifted.shape else x for x in (q, k, v)))


def attend(branch: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of a branch; as many keys as tokens, of which compressed ones are the first."""
    if branch == "compressed_attention":
        k, v = (x[:, : CONFIG.num_compressed(q.shape[1])] for x in (k, v))
    positions = BRANCHES[branch](CONFIG, q.shape[1])
    return flash_forward.forward(positions, q, k, v, None, q.shape[1], q.shape[-1] ** -0.5)


@each_branch
def test_runs_of_rows_that_it_marks_are_computed_again(branch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = torch.float64 if kernels.INTERPRETED else torch.bfloat16
    q, k, v = (torch.randn(2, 300, heads, 32, dtype=dtype) for heads in (8, 2, 2))
    v[1, 2, 1] = float("nan")
    with portable():
        expected = attend(branch, q, k, v)

    def mark(positions: Any, q: Any, k: Any, v: Any, out: Tensor, lse: Tensor, *rest: Any) -> None:
        """Leaves zeros, and NaN in one of the last rows of a KV head: of 1,200 rows those from 1,024 on."""
        out.zero_()
        lse.zero_()[1, 290, 5] = float("nan")

    monkeypatch.setattr(flash_forward, "available", lambda device: True)
    monkeypatch.setattr(hopper, "applies", lambda *tensors: True)
    monkeypatch.setattr(hopper, "forward", mark)
    again = torch.zeros(2, 300, 8, dtype=torch.bool)
    again[1, 256:, 4:] = True
    for name, actual, other in zip(("output", "lse"), attend(branch, q, k, v), expected, strict=True):
        assert not actual[~again].any()
        assert_matches(actual[again], other[again].double(), what=name, reduction=300, dtype=dtype)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows by one with every launch of the kernel; skips where there is no GPU for it."""
    if not available(torch.empty(0).device):
        pytest.skip("needs a Hopper GPU")
    calls: list[Any] = []
    launch = hopper.forward

    def counted(*given: Any) -> None:
        calls.append(given[0])
        launch(*given)

    monkeypatch.setattr(hopper, "forward", counted)
    return calls


CASES = [
    Case("one_tile", whole(47), kv_heads=1, group=16, key_dim=128, value_dim=128, config=CONFIG),
    Case("tiles", whole(1100), kv_heads=2, group=16, key_dim=128, value_dim=128, config=CONFIG),
    Case("batch", whole(701), batch=3, kv_heads=2, group=4, key_dim=128, value_dim=128, config=CONFIG),
    Case("group_1", whole(901), kv_heads=3, group=1, key_dim=128, value_dim=128, config=CONFIG),
    Case("group_64", whole(90), kv_heads=1, group=64, key_dim=128, value_dim=128, config=CONFIG),
    Case("last_queries", ((130, 2333),), kv_heads=2, group=8, key_dim=128, value_dim=128, config=CONFIG),
    Case("narrow_window", whole(300), kv_heads=1, group=2, key_dim=128, value_dim=128, config=NSAConfig(window_size=5)),
    Case("no_key", whole(40), kv_heads=1, group=4, key_dim=128, value_dim=128, config=CONFIG),
    Case("negative_scale", whole(200), kv_heads=1, group=4, key_dim=128, value_dim=128, config=CONFIG, scale=-0.2),
]


@pytest.mark.needs_gpu
@each_branch
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_it_is_as_near_to_the_oracle_as_plain_torch(
    case: Case, dtype: torch.dtype, branch: str, taken: list[Any]
) -> None:
    compare(TRITON, STAGES[branch], case, draw(case, dtype), dtype, beside_plain=True)
    assert taken


@pytest.mark.needs_gpu
@each_branch
@pytest.mark.parametrize("what", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["key", "value"])
def test_what_is_not_finite_reaches_the_rows_that_see_it(
    place: str, what: float, branch: str, taken: list[Any]
) -> None:
    q, k, v = (torch.randn(2, 1500, heads, 128, dtype=torch.bfloat16) for heads in (8, 2, 2))
    (k if place == "key" else v)[1, 40, 1] = what
    out, lse = attend(branch, q, k, v)
    assert taken
    with portable():
        expected = attend(branch, q, k, v)
    assert expected[0].isnan().any()
    assert expected[0][0].isfinite().all()
    for name, actual, other in zip(("output", "lse"), (out, lse), expected, strict=True):
        assert_matches(actual, other.double(), what=name, reduction=1500, dtype=torch.bfloat16)


@pytest.mark.needs_gpu
@each_branch
def test_a_repeated_launch_gives_the_same_bits(branch: str) -> None:
    if not available(torch.empty(0).device):
        pytest.skip("needs a Hopper GPU")
    q, k, v = (torch.randn(2, 3001, heads, 128, dtype=torch.bfloat16) for heads in (8, 2, 2))
    launcher = recorded(lambda *given: attend(branch, *given))
    first = attend(branch, q, k, v)
    for _ in range(4):
        for name, expected, actual in zip(("output", "lse"), first, launcher(q, k, v), strict=True):
            assert_equal(actual, expected, what=name)
