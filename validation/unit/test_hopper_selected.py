"""The Hopper kernels of the selected branch: how they compile, what they take, what they compute."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa.kernels import configs
from nsa.kernels.configs import HopperTileConfig
from nsa.kernels.hopper import available, portable, selected
from nsa.kernels.primitives import Heads
from validation.cases import Case, draw, whole
from validation.comparison import compare
from validation.implementations import load
from validation.numerics import assert_equal, assert_matches
from validation.stages import STAGES
from validation.unit.compiled import compile_for_hopper
from validation.unit.hopper_cases import CASES, CONFIG, GROUP_4, shaped

pytestmark = pytest.mark.usefixtures("on_device")

TRITON = load("triton")
KERNELS = ("selected_forward_hopper", "selected_bwd_dq_hopper")

LAUNCHES = """
from nsa.kernels.block_index import Packing
from nsa.kernels.configs import HopperTileConfig
from nsa.kernels.hopper import selected

def look(compiled):
    code = ask(compiled, "cubin", disassembler("nvdisasm"), "-c")
    products = [found.start() for found in re.finditer("HGMMA", code)]
    # The products of the first walk over the blocks are the first half.
    walk = code[products[0]:products[len(products) // 2 - 1]]
    return {"spilled": walk.count("STL"), "products": len(products)}

for dim, group in ((128, 16), (64, 4)):
    q = torch.zeros(1, 300, 2 * group, dim, dtype=torch.bfloat16)
    k = torch.zeros(1, 300, 2, dim, dtype=torch.bfloat16)
    lse, indices = torch.zeros(1, 300, 2 * group), torch.zeros(1, 300, 2, 16, dtype=torch.int32)
    packing, constants = Packing(None, None, 0, 5), {"G": group, "NUM_SELECTED": 16, "BLOCK_SIZE": 64, "PACKED": False}
    config = HopperTileConfig(num_warps=4, num_stages=2, maxnreg=128, longest=300)
    selected.forward(q, k, k, indices, q, lse, packing, constants, config, 0.1)
    config = HopperTileConfig(num_warps=4, num_stages=2, maxnreg=168, longest=300)
    gates = torch.zeros(1, 300, 2 * group, 3, dtype=torch.bfloat16)[..., 1]
    selected.bwd_dq(q, q, k, k, indices, lse, lse, gates, q, packing, constants, config, 0.1, True)
"""


def test_they_compile_without_spills_in_their_loops_and_several_fit() -> None:
    found = compile_for_hopper(LAUNCHES)
    # Forward (two products a walk, made of some instructions each) and dq (three), of head dim 128, then of 64.
    assert [kernel["products"] for kernel in found] == [24, 40, 16, 24]
    for kernel, programs in zip(found, (4, 3, 4, 3), strict=True):
        assert kernel["spilled"] == 0
        assert programs * (kernel["shared"] + 1024) <= 228 * 1024


def applies(
    group: int = 16,
    dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    *,
    block_size: int = 64,
    packed: bool = False,
    num_keys: int = 40,
    longest: int = 40,
) -> bool:
    q, k = torch.empty(2, 40, 2 * group, dim, dtype=dtype), torch.empty(2, 40, 2, dim, dtype=dtype)
    constants = {"G": group, "BLOCK_SIZE": block_size, "PACKED": packed}
    config = HopperTileConfig(num_warps=4, num_stages=2, longest=longest)
    return selected.applies(config, Heads.of(q, k, k), constants, num_keys, (q, k, k))


@pytest.mark.parametrize("group", [4, 8, 16, 32])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_they_take(group: int, dim: int, dtype: torch.dtype) -> None:
    assert applies(group, dim, dtype)


@pytest.mark.parametrize(
    "given",
    [
        {"group": 2}, {"group": 12}, {"group": 64}, {"dim": 96}, {"dim": 192}, {"dtype": torch.float32},
        {"block_size": 32}, {"packed": True}, {"num_keys": 41},
    ],
    ids=str,
)  # fmt: skip
def test_what_they_leave_to_triton(given: dict[str, Any]) -> None:
    assert not applies(**given)


@pytest.mark.parametrize(("group", "most"), [(4, 1 << 15), (8, 1 << 23), (16, 1 << 27), (32, 1 << 29)])
def test_no_more_keys_than_an_entry_of_a_schedule_has_room_for(group: int, most: int) -> None:
    assert applies(group, num_keys=most, longest=1 << 30)
    assert not applies(group, num_keys=most + 1, longest=1 << 30)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names the launchers that are called, for all lengths; skips where there is no GPU for their kernels."""
    if not available(torch.empty(0).device):
        pytest.skip("needs a Hopper GPU")
    calls: list[str] = []

    def counted(name: str) -> None:
        launcher = getattr(selected, name)

        def call(*given: Any) -> None:
            calls.append(name)
            launcher(*given)

        monkeypatch.setattr(selected, name, call)

    counted("forward")
    counted("bwd_dq")
    with ExitStack() as stack:
        for name in KERNELS:
            stack.enter_context(configs.override(name, longest=1 << 20))
        yield calls


@pytest.mark.needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stage", ["selected_attention", "nsa_attention"])
@pytest.mark.parametrize("case", [*CASES, *GROUP_4], ids=lambda case: case.id)
def test_they_are_as_near_to_the_oracle_as_plain_torch(
    case: Case, stage: str, dtype: torch.dtype, taken: list[str]
) -> None:
    compare(TRITON, STAGES[stage], case, draw(case, dtype), dtype, beside_plain=True)
    assert {"forward", "bwd_dq"} <= set(taken)


def inputs(tokens: int) -> dict[str, Tensor]:
    """Queries, keys, values and indices of two batch rows, with requests for gradients."""
    x = draw(shaped("drawn", whole(tokens), 16, 128, kv_heads=2, batch=2), torch.bfloat16)
    return {name: x[name] for name in ("q", "k", "v", "indices")}


def results(x: dict[str, Tensor]) -> dict[str, Tensor]:
    """Output, log-sum-exp and the gradient of the queries."""
    q = x["q"].detach().requires_grad_()
    out, lse = TRITON.function("selected_attention")(q, x["k"], x["v"], x["indices"], CONFIG, return_lse=True)
    (dq,) = torch.autograd.grad(out, q, torch.ones_like(out))
    return {"output": out.detach(), "lse": lse.detach(), "dq": dq}


@pytest.mark.needs_gpu
@pytest.mark.parametrize("what", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["k", "v"])
def test_what_is_not_finite_reaches_the_rows_that_see_it(place: str, what: float, taken: list[str]) -> None:
    x = inputs(1500)
    x[place] = x[place].clone()
    x[place][1, 700, 1] = what
    found = results(x)
    assert {"forward", "bwd_dq"} <= set(taken)
    with portable():
        expected = results(x)
    assert expected["output"].isnan().any()
    assert expected["output"][0].isfinite().all()
    for name, actual in found.items():
        assert_matches(actual, expected[name].double(), what=name, reduction=1024, dtype=torch.bfloat16)


@pytest.mark.needs_gpu
def test_a_repeated_launch_gives_the_same_bits(taken: list[str]) -> None:
    x = inputs(3001)
    first = results(x)
    assert {"forward", "bwd_dq"} <= set(taken)
    for _ in range(4):
        for name, actual in results(x).items():
            assert_equal(actual, first[name], what=name)
