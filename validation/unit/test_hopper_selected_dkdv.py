"""The Hopper kernel of `dk` and `dv` of the selected branch: how it compiles, what it takes, what it computes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa.kernels import configs
from nsa.kernels.configs import forget
from nsa.kernels.hopper import available, portable, selected_dkdv
from validation.cases import Case, draw, whole
from validation.comparison import compare
from validation.implementations import load
from validation.numerics import assert_equal, assert_matches
from validation.stages import STAGES
from validation.unit.compiled import compile_for_hopper
from validation.unit.hopper_cases import CASES, CONFIG, SEVERAL_BLOCKS, shaped

pytestmark = pytest.mark.usefixtures("on_device")

TRITON = load("triton")

LAUNCHES = """
from nsa.kernels.block_index import BlockIndex
from nsa.kernels.bwd_preprocess import BackwardRows
from nsa.kernels.hopper import selected_dkdv

def look(compiled):
    told = ask(compiled, "ptx", get_ptxas(90).path, "-v", "--gpu-name=sm_90a", "-o", "/dev/null")
    code = ask(compiled, "cubin", disassembler("nvdisasm"), "-c")
    products = [found.start() for found in re.finditer("HGMMA", code)]
    # One half is that of the loop with a mask, the other that of the loop without.
    half = len(products) // 2
    loops = code[products[0]:products[half - 1]], code[products[half]:products[-1]]
    return {
        "serialized": "serialized" in told,
        "registers": int(re.search(r"Used (\\d+) registers", told).group(1)),
        "spilled": [loop.count("STL") for loop in loops],
        "products": len(products),
    }

for dim, group in ((128, 16), (64, 8)):
    q = torch.zeros(1, 300, 2 * group, dim, dtype=torch.bfloat16)
    k = torch.zeros(1, 300, 2, dim, dtype=torch.bfloat16)
    rows = BackwardRows(*2 * [torch.zeros(1, 300, 2 * group)])
    table, partial = torch.zeros(64, dtype=torch.int32), torch.zeros(20, 64, dim)
    selected_dkdv.write_dkdv(
        q, q, k, k, rows, BlockIndex(*4 * [table], 9, 8), k, k, partial, partial, table.char(), 0, 2, 5, 16, 1024, 0.1,
        True,
    )
"""


def test_it_compiles_to_overlapping_products_without_spills_and_two_programs_fit() -> None:
    found = compile_for_hopper(LAUNCHES)
    # Four products an entry, made of some instructions each, in two loops.
    assert [kernel["products"] for kernel in found] == [48, 32]
    for kernel in found:
        assert not kernel["serialized"], kernel
        assert kernel["spilled"] == [0, 0], kernel
        # Eight warps.
        assert 2 * kernel["registers"] * 8 * 32 <= 1 << 16, kernel
        assert 2 * (kernel["shared"] + 1024) <= 228 * 1024, kernel


def applies(
    group: int = 16,
    dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    *,
    value_dim: int | None = None,
    block_size: int = 64,
    keys: int = 64,
    packed: bool = False,
) -> bool:
    q, k = torch.empty(2, 40, 2 * group, dim, dtype=dtype), torch.empty(2, 40, 2, dim, dtype=dtype)
    v = torch.empty(2, 40, 2, value_dim or dim, dtype=dtype)
    dout = torch.empty(2, 40, 2 * group, value_dim or dim, dtype=dtype)
    constants = {"G": group, "BLOCK_SIZE": block_size, "BLOCK_N": keys, "PACKED": packed}
    return selected_dkdv.applies(constants, q, k, v, dout)


@pytest.mark.parametrize("group", [8, 16, 32])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_it_takes(group: int, dim: int, dtype: torch.dtype) -> None:
    assert applies(group, dim, dtype)


@pytest.mark.parametrize(
    "given",
    [
        {"group": 4}, {"group": 12}, {"group": 64}, {"dim": 96}, {"dim": 192}, {"value_dim": 64},
        {"dtype": torch.float32}, {"block_size": 32}, {"keys": 32}, {"packed": True},
    ],
    ids=str,
)  # fmt: skip
def test_what_it_leaves_to_triton(given: dict[str, Any]) -> None:
    assert not applies(**given)


def watched(monkeypatch: pytest.MonkeyPatch, note: Callable[[Tensor], Any]) -> list[Any]:
    """Grows with every launch of the kernel by what `note` makes of `again`; skips where there is no GPU for it."""
    if not available(torch.empty(0).device):
        pytest.skip("needs a Hopper GPU")
    calls: list[Any] = []
    launch = selected_dkdv.write_dkdv

    def noted(*given: Any) -> None:
        launch(*given)
        calls.append(note(given[10]))

    monkeypatch.setattr(selected_dkdv, "write_dkdv", noted)
    forget()
    return calls


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Has an entry for every launch of the kernel."""
    return watched(monkeypatch, lambda again: None)


@pytest.fixture
def flags(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Has the flags of every launch of the kernel, which is then called each time instead of being recorded."""
    return watched(monkeypatch, Tensor.clone)


@pytest.mark.needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stage", ["selected_attention", "nsa_attention"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_it_is_as_near_to_the_oracle_as_plain_torch(
    case: Case, stage: str, dtype: torch.dtype, flags: list[Tensor]
) -> None:
    compare(TRITON, STAGES[stage], case, draw(case, dtype), dtype, beside_plain=True)
    assert flags
    assert not any(again.any() for again in flags)


@pytest.mark.needs_gpu
@pytest.mark.parametrize("chunk", [32, 80, 256])
@pytest.mark.parametrize("case", SEVERAL_BLOCKS, ids=lambda case: case.id)
def test_pieces_of_a_list_add_up(case: Case, chunk: int, taken: list[Any]) -> None:
    with configs.override("selected_bwd_dkdv", CHUNK=chunk):
        compare(TRITON, STAGES["selected_attention"], case, draw(case, torch.bfloat16), torch.bfloat16)
    assert taken


def inputs(tokens: int, group: int = 16, dim: int = 128) -> dict[str, Tensor]:
    """Queries, keys, values and indices of two batch rows, and a gradient of the output."""
    x = draw(shaped("drawn", whole(tokens), group, dim, kv_heads=2, batch=2), torch.bfloat16)
    return {**{name: x[name] for name in ("q", "k", "v", "indices")}, "dout": torch.randn_like(x["q"])}


def gradients(x: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of keys and values."""
    k, v = (x[name].detach().requires_grad_() for name in ("k", "v"))
    out = TRITON.function("selected_attention")(x["q"], k, v, x["indices"], CONFIG)
    return dict(zip(("dk", "dv"), torch.autograd.grad(out, (k, v), x["dout"]), strict=True))


@pytest.mark.needs_gpu
@pytest.mark.parametrize("what", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["q", "k", "v", "dout"])
def test_what_is_not_finite_reaches_what_sees_it(place: str, what: float, flags: list[Tensor]) -> None:
    x = inputs(1500)
    x[place] = x[place].clone()
    x[place][1, 700, 1] = what
    found = gradients(x)
    assert any(again.any() for again in flags)
    with portable():
        expected = gradients(x)
    for name, actual in found.items():
        assert expected[name][0].isfinite().all()
        assert_matches(actual, expected[name].double(), what=name, reduction=1500 * 16, dtype=torch.bfloat16)


@pytest.mark.needs_gpu
@pytest.mark.parametrize(("group", "dim"), [(16, 128), (8, 64)])
def test_a_repeated_launch_gives_the_same_bits(group: int, dim: int, taken: list[Any]) -> None:
    x = inputs(3001, group, dim)
    first = gradients(x)
    assert taken
    for _ in range(4):
        for name, actual in gradients(x).items():
            assert_equal(actual, first[name], what=name)
