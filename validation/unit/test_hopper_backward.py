"""The Hopper kernels of the backward pass of the compressed and of the window branch: how they compile, what they take,
what they compute."""

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa import kernels
from nsa.config import NSAConfig
from nsa.kernels import flash_backward, flash_forward
from nsa.kernels.bwd_preprocess import BackwardRows, preprocess
from nsa.kernels.configs import forget
from nsa.kernels.flash_tiles import PositionMap
from nsa.kernels.hopper import available, flash_dkdv, flash_dq, portable
from nsa.kernels.hopper import flash_backward as hopper
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
GRADIENTS = ("dq", "dk", "dv")

LAUNCHES = """
from nsa.kernels.bwd_preprocess import BackwardRows
from nsa.kernels.hopper import flash_dkdv, flash_dq

def look(compiled):
    told = ask(compiled, "ptx", get_ptxas(90).path, "-v", "--gpu-name=sm_90a", "-o", "/dev/null")
    return {
        "name": compiled.metadata.name,
        "serialized": "serialized" in told,
        "spilled": int(re.search(r"(\\d+) bytes spill loads", told).group(1)),
    }

for dim, group, branch in ((128, 16, PositionMap.sliding), (64, 4, PositionMap.compressed)):
    q = torch.zeros(1, 300, 2 * group, dim, dtype=torch.bfloat16)
    k = torch.zeros(1, 300, 2, dim, dtype=torch.bfloat16)
    lse = torch.zeros(1, 300, 2 * group)
    rows = BackwardRows(*2 * [torch.zeros(1, 2 * group, 304)[..., :300].mT])
    given = (branch(NSAConfig(), 300), q, q, k, k)
    flash_dkdv.write_dkdv(*given, rows, lse, k[None].clone(), k[None].clone(), 300, 0.1)
    flash_dq.write_dq(*given, lse, rows, lse, q.clone(), True, 300, 0.1)
"""


def test_they_compile_to_overlapping_products_and_fit() -> None:
    found = compile_for_hopper(LAUNCHES)
    assert len(found) == 4
    for kernel in found:
        assert not kernel["serialized"], kernel
        # A few numbers that a program needs at its beginning and end.
        assert kernel["spilled"] <= 160, kernel
        assert kernel["shared"] <= 227 * 1024, kernel


@each_branch
@pytest.mark.parametrize("shift", range(6))
def test_copies_of_what_is_kept_a_row_start_at_multiples_of_16_bytes(
    shift: int, branch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_queries, num_tokens, num_splits = 2000, 2000 + shift, 3
    positions = BRANCHES[branch](CONFIG, num_tokens)
    num_keys = num_tokens if positions.window else CONFIG.num_compressed(num_tokens)
    num_tiles = -(-num_keys // flash_dkdv.KEYS.value)
    sizes = (1, num_queries, num_keys, shift, positions.window, num_tiles, 1, num_splits)
    for name in ("BLOCK", "KEYS", "ALIGNED"):
        monkeypatch.setattr(flash_dkdv, name, getattr(flash_dkdv, name).value)
    monkeypatch.setattr(flash_dkdv, "_count_query_tiles", flash_dkdv._count_query_tiles.fn)
    programs = iter(range(num_tiles * num_splits))
    language = SimpleNamespace(maximum=max, minimum=min, program_id=lambda axis: next(programs))
    monkeypatch.setattr(flash_dkdv, "gl", language)
    for _ in range(num_tiles * num_splits):
        place = flash_dkdv._dkdv_place.fn(sizes, positions.stride, positions.last, positions.window is not None)
        query = place[4]
        assert query * torch.float32.itemsize % 16 == 0, place


def drawn(
    branch: str = "sliding_window_attention",
    group: int = 4,
    dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    head_major: bool = True,
    num_keys: int = 1000,
) -> tuple[Any, ...]:
    k = torch.randn(2, num_keys, 2, dim, dtype=dtype)
    q = torch.randn(2, 40, 2 * group, dim, dtype=dtype)
    rows = torch.zeros(2, 48, 2 * group)[:, :40]
    if head_major:
        rows = torch.zeros(2, 2 * group, 48)[..., :40].transpose(1, 2)
    positions = BRANCHES[branch](CONFIG, num_keys)
    return positions, torch.randn_like(q), q, k, torch.randn_like(k), BackwardRows(rows, rows), None


@pytest.mark.parametrize("group", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("dim", [64, 128])
@each_branch
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_they_take(group: int, dim: int, branch: str, dtype: torch.dtype) -> None:
    assert hopper.applies(*drawn(branch, group, dim, dtype))


@pytest.mark.parametrize(
    "given",
    [
        {"group": 3},
        {"group": 128},
        {"dim": 96},
        {"dim": 192},
        {"dtype": torch.float32},
        {"head_major": False},
        {"branch": "compressed_attention", "num_keys": 400},
    ],
    ids=str,
)
def test_what_they_leave_to_triton(given: dict[str, Any]) -> None:
    assert not hopper.applies(*drawn(**given))


def gradients(
    branch: str, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, gate: Tensor | None = None, dq: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`dq`, `dk` and `dv` of a branch; as many keys as tokens, of which compressed ones are the first."""
    if branch == "compressed_attention":
        k, v = (x[:, : CONFIG.num_compressed(q.shape[1])] for x in (k, v))
    positions, scale = BRANCHES[branch](CONFIG, q.shape[1]), q.shape[-1] ** -0.5
    with portable():
        out, lse = flash_forward.forward(positions, q, k, v, None, q.shape[1], scale)
    gates = None if gate is None else [gate]
    dgates = None if gate is None else [torch.empty_like(torch.stack(3 * [gate], -1))[..., 0]]
    (rows,) = preprocess(dout, [out], [lse], gates, dgates, head_major=[True])
    return flash_backward.backward(
        positions, dout, q, k, v, lse, rows, None, q.shape[1], scale, gate=gate, dq=None if dq is None else dq.clone()
    )


@each_branch
def test_tiles_that_they_flag_are_computed_again(branch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = torch.float64 if kernels.INTERPRETED else torch.bfloat16
    q, dout = (torch.randn(2, 300, 8, 32, dtype=dtype) for _ in range(2))
    k, v = (torch.randn(2, 300, 2, 32, dtype=dtype) for _ in range(2))
    gate, dq = torch.randn(2, 300, 8, 3, dtype=dtype)[..., 1], torch.randn_like(q)
    with portable():
        expected = gradients(branch, q, k, v, dout, gate, dq)
    keys = expected[1].shape[1]

    def mark_keys(
        positions: Any, dout: Any, q: Any, k: Any, v: Any, rows: Any, gate: Any, dk: Tensor, dv: Tensor, *_: Any
    ) -> Tensor:
        """Leaves zeros, and one flag of the first 64 keys of a KV head."""
        dk.zero_(), dv.zero_()
        flags = dk.new_zeros(2, 2, -(-keys // 128) * 2, dk.shape[0])
        flags[1, 0, 0, -1] = float("nan")
        return flags

    def mark_rows(*given: Any) -> Tensor:
        """Leaves what is there, and a flag of the last 64 rows, of the last 1,200."""
        flags = torch.zeros(2, 2, 20, dtype=dtype)
        flags[1, 0, 1] = float("nan")
        return flags

    monkeypatch.setattr(flash_backward, "available", lambda device: True)
    monkeypatch.setattr(hopper, "applies", lambda *tensors: True)
    monkeypatch.setattr(flash_dkdv, "write_dkdv", mark_keys)
    monkeypatch.setattr(flash_dkdv, "programs_per_key_tile", lambda *given: 3)
    monkeypatch.setattr(flash_dq, "write_dq", mark_rows)
    again = [torch.zeros(2, 300, 8, dtype=torch.bool), *(torch.zeros(2, keys, 2, dtype=torch.bool) for _ in range(2))]
    again[0][1, 288:, :4] = True
    again[1][1, :64, 0] = again[2][1, :64, 0] = True
    before = (dq, torch.zeros_like(expected[1]), torch.zeros_like(expected[2]))
    found = gradients(branch, q, k, v, dout, gate, dq)
    for name, actual, other, left, these in zip(GRADIENTS, found, expected, before, again, strict=True):
        assert_equal(actual[~these], left[~these], what=f"{name}, not flagged")
        assert_matches(actual[these], other[these].double(), what=name, reduction=300, dtype=dtype)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows with every launch of a kernel; skips where there is no GPU for it."""
    if not available(torch.empty(0).device):
        pytest.skip("needs a Hopper GPU")
    calls: list[Any] = []

    def counting(launch: Any) -> Any:
        def counted(*given: Any) -> Tensor:
            calls.append(launch.__name__)
            return launch(*given)

        return counted

    monkeypatch.setattr(hopper, "LEAST_KEYS", dict.fromkeys(product((64, 128), (True, False)), 0))
    forget()
    monkeypatch.setattr(flash_dkdv, "write_dkdv", counting(flash_dkdv.write_dkdv))
    monkeypatch.setattr(flash_dq, "write_dq", counting(flash_dq.write_dq))
    return calls


CASES = [
    Case("one_tile", whole(47), kv_heads=1, group=16, key_dim=128, value_dim=128, config=CONFIG),
    Case("tiles", whole(1100), kv_heads=2, group=16, key_dim=128, value_dim=128, config=CONFIG),
    Case("batch", whole(701), batch=3, kv_heads=2, group=4, key_dim=64, value_dim=64, config=CONFIG),
    Case("group_1", whole(901), kv_heads=3, group=1, key_dim=64, value_dim=64, config=CONFIG),
    Case("group_64", whole(90), kv_heads=1, group=64, key_dim=64, value_dim=64, config=CONFIG),
    Case("last_queries", ((130, 2333),), kv_heads=2, group=8, key_dim=128, value_dim=128, config=CONFIG),
    Case("narrow_window", whole(300), kv_heads=1, group=2, key_dim=64, value_dim=64, config=NSAConfig(window_size=5)),
    Case("one_block", whole(40), kv_heads=1, group=4, key_dim=128, value_dim=128, config=CONFIG),
    Case("negative_scale", whole(200), kv_heads=1, group=4, key_dim=128, value_dim=128, config=CONFIG, scale=-0.2),
]


@pytest.mark.needs_gpu
@each_branch
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_they_are_as_near_to_the_oracle_as_plain_torch(
    case: Case, dtype: torch.dtype, branch: str, taken: list[Any]
) -> None:
    compare(TRITON, STAGES[branch], case, draw(case, dtype), dtype, beside_plain=True)
    assert set(taken) == {"write_dkdv", "write_dq"}


@pytest.mark.needs_gpu
@each_branch
@pytest.mark.parametrize("dim", [64, 128])
def test_gates_weight_the_gradients_and_dq_is_added_to(dim: int, branch: str, taken: list[Any]) -> None:
    q, dout, dq = (torch.randn(2, 1500, 8, dim, dtype=torch.bfloat16) for _ in range(3))
    k, v = (torch.randn(2, 1500, 2, dim, dtype=torch.bfloat16) for _ in range(2))
    gate = torch.randn(2, 1500, 8, 3, dtype=torch.bfloat16)[..., 2]
    found = gradients(branch, q, k, v, dout, gate, dq)
    assert len(taken) == 2
    with portable():
        expected = gradients(branch, q, k, v, dout, gate, dq)
    for name, actual, other in zip(GRADIENTS, found, expected, strict=True):
        assert_matches(actual, other.double(), what=name, reduction=1500, dtype=torch.bfloat16)


@pytest.mark.needs_gpu
@each_branch
@pytest.mark.parametrize("what", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["query", "key", "value", "dout"])
def test_what_is_not_finite_reaches_what_sees_it(place: str, what: float, branch: str, taken: list[Any]) -> None:
    q, dout = (torch.randn(2, 1500, 8, 128, dtype=torch.bfloat16) for _ in range(2))
    k, v = (torch.randn(2, 1500, 2, 128, dtype=torch.bfloat16) for _ in range(2))
    {"query": q, "key": k, "value": v, "dout": dout}[place][1, 40, 1] = what
    found = gradients(branch, q, k, v, dout)
    assert taken
    with portable():
        expected = gradients(branch, q, k, v, dout)
    for name, actual, other in zip(GRADIENTS, found, expected, strict=True):
        assert other[0].isfinite().all()
        assert_matches(actual, other.double(), what=name, reduction=1500, dtype=torch.bfloat16)


@pytest.mark.needs_gpu
@each_branch
def test_a_repeated_launch_gives_the_same_bits(branch: str, taken: list[Any]) -> None:
    q, dout = (torch.randn(2, 3001, 8, 64, dtype=torch.bfloat16) for _ in range(2))
    k, v = (torch.randn(2, 3001, 2, 64, dtype=torch.bfloat16) for _ in range(2))
    launcher = recorded(lambda *given: gradients(branch, *given))
    first = gradients(branch, q, k, v, dout)
    for _ in range(4):
        for name, expected, actual in zip(GRADIENTS, first, launcher(q, k, v, dout), strict=True):
            assert_equal(actual, expected, what=name)
    assert taken
