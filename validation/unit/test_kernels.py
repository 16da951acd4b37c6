"""What is about our Triton kernels alone: the ways they can be launched, and what they refuse.

What they share with every implementation is tested in test_stages.py and its neighbours. As there, float64 under the
interpreter shows that the algebra is right, and compiled kernels are held to the policy in their own dtypes.
"""

from importlib import import_module
from pkgutil import walk_packages
from typing import Any

import pytest
import torch
import triton

from nsa import NativeSparseAttention, kernels, rope_table
from nsa.config import NSAConfig
from nsa.kernels import primitives
from nsa.varlen import tensors_of
from validation.cases import BY_ID, DIFFERENTIATED, Case, config, draw, draw_inputs, fitted, whole
from validation.comparison import check_gradients, compare
from validation.implementations import load
from validation.numerics import assert_equal, assert_matches
from validation.stages import STAGES, StageSpec
from validation.subjects import ROUNDED, tried
from validation.unit.ways import SELECTED, WAYS, launched

pytestmark = pytest.mark.usefixtures("on_device")

SMALL = NSAConfig(16, 8, 16, 3, window_size=20)
TRITON = load("triton")

FITTED = {name: fitted(TRITON, case) for name, case in BY_ID.items()}
FEW = [FITTED[name] for name in ("last_queries", "packed_last_queries", "many_blocks", "group_16")]
WIDEST = "float64" if kernels.INTERPRETED else "float32"

CONTIGUOUS = tuple(
    f"{branch}_{kernel}" for branch in ("compressed", "window") for kernel in ("forward", "bwd_dq", "bwd_dkdv")
)

# In test_stages.py all cases go the way that is theirs, in every dtype: interpreted, by block where groups are small.
# The other ways are compiled for one case of each kind in one dtype, and interpreted for the cases that are laid out
# or listed otherwise than the rest: which blocks are selected, and how keys are compressed, is the same to all ways.
LAID_OUT = (
    "small", "batch", "group_3", "group_16", "wide_values", "wide_keys", "last_queries", "many_blocks", "scrambled",
    "packed", "packed_last_queries", "packed_scrambled", "odd_head_dims", "single_token", "nothing_selected",
)  # fmt: skip
each_attempt = pytest.mark.parametrize(
    ("case", "dtype_name", "way"),
    [
        pytest.param(FITTED[case.id], dtype, way, id=f"{case.id}-{dtype}-{name}")
        for case, dtype in tried(TRITON)
        for name, way in WAYS.items()
        if (dtype == "bfloat16" and case.id in ROUNDED and not kernels.INTERPRETED)
        or (
            kernels.INTERPRETED
            and case.id in LAID_OUT
            and (name != "by_block" or case.group >= 8 or FITTED[case.id] in FEW)
        )
    ],
)
each_few = pytest.mark.parametrize("case", FEW, ids=lambda case: case.id)
each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
each_branch = pytest.mark.parametrize(
    "stage", [STAGES[name] for name in ("compressed_attention", "selected_attention", "sliding_window_attention")],
    ids=lambda stage: stage.name,
)  # fmt: skip


def check(stage: StageSpec, case: Case, dtype_name: str) -> None:
    dtype = getattr(torch, dtype_name)
    compare(TRITON, stage, case, draw(case, dtype), dtype, beside_plain=dtype != torch.float64)


# Left to itself attention to selected blocks goes by block, in pieces of eight queries, but for the largest groups.
@each_attempt
def test_selected_attention_either_way(case: Case, dtype_name: str, way: dict[str, Any]) -> None:
    with launched(SELECTED, **way):
        check(STAGES["selected_attention"], case, dtype_name)


@each_few
@each_way
def test_attention_as_a_whole_either_way(case: Case, way: dict[str, Any]) -> None:
    with launched(SELECTED, **way):
        check(STAGES["nsa_attention"], case, WIDEST)


@pytest.mark.parametrize(
    "parameters",
    [
        {"TMA": True},
        {"SPLIT": False},
        {"BLOCK_M": 32, "BLOCK_N": 16},
        {"BLOCK_M": 16, "BLOCK_N": 32},
        {"num_programs": 1},
    ],
    ids=str,
)
def test_launch_parameters_change_nothing_else(parameters: dict[str, Any]) -> None:
    with launched((*CONTIGUOUS, *SELECTED), **parameters), launched(SELECTED, **WAYS["by_query"]):
        check(STAGES["nsa_attention"], FITTED["many_blocks"], WIDEST)


def test_more_slots_than_a_tile_holds() -> None:
    case = Case("slots", whole(70), config((16, 8, 16), 2**21, 20), kv_heads=1, group=1, key_dim=16, value_dim=16)
    tensors = draw_inputs(case, torch.float32)
    lse = TRITON.function("compressed_attention")(tensors["q"], tensors["k_cmp"], tensors["v_cmp"], case.config)[1]
    indices = TRITON.function("select_blocks")(tensors["q"], tensors["k_cmp"], lse, case.config)
    own = torch.arange(70)[:, None] // 16
    assert_equal(indices[0, :, 0, :5], torch.arange(5).where(torch.arange(5) <= own, -1).int(), what="indices")
    assert (indices[..., 5:] == -1).all()


@each_branch
def test_operators_are_well_behaved(stage: StageSpec) -> None:
    case = Case("opcheck", whole(20), config((16, 8, 16), 3, 9), key_dim=16, value_dim=32, kv_heads=1)
    x = draw(case, torch.float32)
    k, v = ("k_cmp", "v_cmp") if stage.name == "compressed_attention" else ("k", "v")
    indices = x["indices"] if stage.name == "selected_attention" else None
    tensors = [x[name].requires_grad_() for name in ("q", k, v)]
    sizes = [16, 8, 16, 3, 1, 2, 20]
    operator = getattr(torch.ops.nsa_triton, stage.name)
    torch.library.opcheck(operator.default, (*tensors, indices, *tensors_of(None), case.num_keys, sizes, 0.25))


@pytest.mark.parametrize("dtype_name", ["bfloat16"] if kernels.INTERPRETED else ["float32", "bfloat16"])
def test_the_layer_is_the_same_on_both_backends(dtype_name: str) -> None:
    layers = [NativeSparseAttention(32, 4, 2, 16, SMALL, backend=backend) for backend in ("eager", "triton")]
    layers[1].load_state_dict(layers[0].state_dict())
    x, rope, longest_sum = torch.randn(1, 60, 32), rope_table(60, 16), 60 * 4 * 16
    results = []
    for layer in layers:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=dtype_name == "bfloat16"):
            out = layer(x, rope)
        results.append([out, *torch.autograd.grad(out.float().sum(), list(layer.parameters()))])
    for name, expected, actual in zip(["output", *dict(layers[0].named_parameters())], *results, strict=True):
        dtype = getattr(torch, dtype_name)
        assert_matches(actual, expected.double(), what=name, reduction=longest_sum, dtype=dtype)


@pytest.mark.skipif(not kernels.INTERPRETED, reason="float64 kernels exist under the interpreter only")
@each_way
@pytest.mark.parametrize("case", DIFFERENTIATED, ids=lambda case: case.id)
def test_gradients_either_way_are_those_of_finite_differences(way: dict[str, Any], case: Case) -> None:
    with launched(SELECTED, **way):
        check_gradients(TRITON, STAGES["selected_attention"], case)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((8, 8, 16), r"compress_block_size = 8 \(only powers of two from 16\)"),
        ((16, 4, 16), r"compress_stride = 4 \(only powers of two from 8\)"),
        ((24, 24, 48), r"compress_block_size = 24"),
    ],
)
def test_unsupported_sizes_are_refused(sizes: tuple[int, int, int], message: str) -> None:
    q, k = torch.randn(1, 64, 2, 16), torch.randn(1, 64, 2, 16)
    with pytest.raises(ValueError, match=message):
        TRITON.function("sliding_window_attention")(q, k, k, NSAConfig(*sizes))


def test_unsupported_head_dims_are_refused() -> None:
    q = torch.randn(1, 64, 2, 8)
    with pytest.raises(ValueError, match=r"a head dim of 8 \(only 16 to 256\)"):
        TRITON.function("sliding_window_attention")(q, q, q, NSAConfig())


def test_a_cpu_without_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    q = torch.randn(1, 64, 2, 16, device="cpu")
    with pytest.raises(ValueError, match=r'backend must be "auto" or "eager" .* got "triton" and tensors on cpu'):
        TRITON.function("sliding_window_attention")(q, q, q, NSAConfig())


def test_launches_by_block_fit_a_grid() -> None:
    runs = primitives.head_runs(200_000, 1)
    assert max(number for _, number in runs) < 1 << 16
    assert sum(number for _, number in runs) == 200_000


@pytest.mark.needs_gpu
@pytest.mark.parametrize("group", [4, 16])
def test_another_length_is_no_reason_to_compile(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither that it is no multiple of 16 nor how many blocks it has."""
    compiled: list[str] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda *, fn, **_: compiled.append(fn.name))
    for found in walk_packages(kernels.__path__, "nsa.kernels."):
        for kernel in vars(import_module(found.name)).values():
            if isinstance(kernel, triton.JITFunction):
                kernel.device_caches.clear()  # what other tests have compiled

    def kernels_of(tokens: int) -> list[str]:
        case = Case("lengths", whole(tokens), NSAConfig(), kv_heads=4, group=group, key_dim=128, value_dim=128)
        x = {**draw_inputs(case, torch.bfloat16), "indices": None}
        dict(STAGES["nsa_attention"].results(TRITON, case, x))
        found = compiled.copy()
        compiled.clear()
        return found

    assert kernels_of(1104), "nothing was compiled: this test would show nothing"
    assert kernels_of(1101) == kernels_of(1999) == []


@pytest.mark.parametrize("name", ["eager", "triton"])
def test_an_index_that_names_no_block_is_skipped(name: str) -> None:
    """Some mark an empty slot by the number of blocks or of tokens, and may do so in several slots."""
    impl = load(name)
    case = fitted(impl, BY_ID["scrambled"])
    tensors = draw(case, impl.widest)
    assert int((tensors["indices"] == -1).sum(-1).max()) > 1
    marks = torch.tensor([-2, 10**6, 2**31 - 1, -(2**31)], dtype=torch.int32)
    empty = tensors["indices"] == -1
    marked = tensors["indices"].masked_scatter(empty, marks.repeat(int(empty.sum()) // 4 + 1))
    stage = STAGES["selected_attention"]
    expected = dict(stage.results(impl, case, tensors))
    for result, x in stage.results(impl, case, {**tensors, "indices": marked}):
        assert_equal(x, expected[result], what=f"{result} with {marks.tolist()} in empty slots")
