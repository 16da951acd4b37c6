"""The Triton kernels: compiled where there is a GPU, elsewhere the same code under Triton's interpreter.

Under the interpreter float64 shows that the algebra is right; compiled kernels are held to the policy in the dtypes
they are made for, beside plain PyTorch in the same dtype.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch

from nsa import NativeSparseAttention, kernels, rope_table
from nsa.config import NSAConfig
from nsa.kernels import select, selected, tuning
from validation import oracle
from validation.implementations import load
from validation.numerics import assert_equal, assert_matches, assert_selection_matches, gradcheck
from validation.unit.cases import STAGES, Case, Stage, compare, config, draw, importance, kernel_cases, whole
from validation.unit.cases import select_blocks as run_selection

pytestmark = pytest.mark.usefixtures("on_device")

SMALL = NSAConfig(16, 8, 16, 3, window_size=20)

# Tiles are 16 long under the interpreter and mostly 64 compiled: cases are to have several.
CASES = kernel_cases(2 if kernels.INTERPRETED else 4)
BY_ID = {case.id: case for case in CASES}
FEW = [BY_ID[name] for name in ("last_queries", "packed_last_queries", "many_blocks")]
NARROW = ["float32", "float16", "bfloat16"]
# The interpreter rounds where it likes, so that narrow dtypes show little more than that they work.
TRIED = [(case, dtype) for case in (FEW[:2] if kernels.INTERPRETED else CASES) for dtype in NARROW]
if kernels.INTERPRETED:
    TRIED += [(case, "float64") for case in CASES]
WIDEST = "float64" if kernels.INTERPRETED else "float32"

# Selected attention goes by query or by block. Whatever is the faster, both must be right, and so must the sums over a
# block's queries where these come in several pieces, as in long sequences.
SELECTED = ("selected_forward", "selected_scatter", "selected_queries", "selected_keys")
CONTIGUOUS = tuple(
    f"{branch}_{kernel}" for branch in ("compressed", "window") for kernel in ("forward", "queries", "keys")
)
WAYS = {"by_query": {"SCATTER": False, "CHUNK": 8, "BLOCK_N": 32}, "by_block": {"SCATTER": True, "CHUNK": 8}}
PARTS = {
    "compress_keys": ("compress_keys", {}),
    "compress_values": ("compress_values", {}),
    "compressed_attention": ("compressed_attention", {}),
    "selected_attention_by_query": ("selected_attention", WAYS["by_query"]),
    "selected_attention_by_block": ("selected_attention", WAYS["by_block"]),
    "sliding_window_attention": ("sliding_window_attention", {}),
    "nsa_attention": ("nsa_attention", {"CHUNK": 8}),
}

each_case = pytest.mark.parametrize(
    ("case", "dtype_name"), [pytest.param(case, dtype, id=f"{case.id}-{dtype}") for case, dtype in TRIED]
)
each_few = pytest.mark.parametrize("case", FEW, ids=lambda case: case.id)
each_part = pytest.mark.parametrize(
    ("stage", "way"), [(STAGES[name], way) for name, way in PARTS.values()], ids=PARTS.keys()
)
each_branch = pytest.mark.parametrize(
    "stage", [STAGES[name] for name in ("compressed_attention", "selected_attention", "sliding_window_attention")],
    ids=lambda stage: stage.name,
)  # fmt: skip

TRITON, EAGER = load("triton"), load("eager")


@contextmanager
def launched(names: tuple[str, ...], **parameters: Any) -> Iterator[None]:
    """The kernels of those names are launched with these parameters."""
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(tuning.override(name, **parameters))
        yield


def check(stage: Stage, case: Case, dtype_name: str) -> None:
    dtype = getattr(torch, dtype_name)
    compare(TRITON, stage, case, draw(case, dtype), dtype, beside_plain=dtype != torch.float64)


@each_part
@each_case
def test_matches_the_oracle(stage, way, case, dtype_name):
    with launched(SELECTED, **way):
        check(stage, case, dtype_name)


@each_case
def test_selection(case, dtype_name):
    check_selection(case, dtype_name)


def check_selection(case: Case, dtype_name: str) -> None:
    dtype = getattr(torch, dtype_name)
    tensors = draw(case, dtype)
    indices, expected = run_selection(TRITON, case, tensors), run_selection(oracle, case, tensors)
    bound = {"positions": case.positions, "group": case.group, "reduction": case.key_dim}
    assert_selection_matches(indices, expected, importance(case, tensors), case.config, dtype, **bound)


@each_few
def test_attention_as_a_whole_by_query(case):
    with launched(SELECTED, **WAYS["by_query"]):
        check(STAGES["nsa_attention"], case, WIDEST)


@pytest.mark.parametrize(
    "parameters",
    [{"TMA": True}, {"SPLIT": False}, {"BLOCK_M": 32, "BLOCK_N": 16}, {"BLOCK_M": 16, "BLOCK_N": 32}, {"programs": 1}],
    ids=str,
)
def test_launch_parameters_change_nothing_else(parameters):
    with launched((*CONTIGUOUS, *SELECTED), **parameters), launched(SELECTED, **WAYS["by_query"]):
        check(STAGES["nsa_attention"], BY_ID["many_blocks"], WIDEST)


def test_partial_results_of_one_head_at_a_time(monkeypatch):
    monkeypatch.setattr(selected, "PARTIAL_BYTES", 1)
    with launched(SELECTED, **WAYS["by_block"]):
        check(STAGES["selected_attention"], BY_ID["scrambled_last_queries"], WIDEST)


def test_importance_of_one_tile_of_queries_at_a_time(monkeypatch):
    monkeypatch.setattr(select, "WORKSPACE_BYTES", 1)
    check_selection(BY_ID["packed"], WIDEST)
    check_selection(BY_ID["batch"], WIDEST)


@pytest.mark.parametrize("dims", [(96, 80)] if kernels.INTERPRETED else [(96, 80), (192, 128), (256, 64)], ids=str)
@pytest.mark.parametrize("dtype_name", ["float32"] if kernels.INTERPRETED else ["float32", "bfloat16"])
@each_branch
def test_head_dims_that_are_no_powers_of_two(stage, dims, dtype_name):
    case = Case("dims", whole(40), config((16, 8, 16), 3, 20), key_dim=dims[0], value_dim=dims[1], group=3, kv_heads=1)
    check(stage, case, dtype_name)


@each_branch
def test_backward_is_bitwise_reproducible(stage):
    case = BY_ID["packed_mean"]
    tensors = draw(case, torch.float32)
    first, second = (dict(stage.results(TRITON, case, tensors, torch.float32)) for _ in range(2))
    for name, x in first.items():
        assert_equal(second[name], x, what=name)


@pytest.mark.parametrize("blocks", [(16, 16, 16)], ids=str)
def test_ties_go_to_the_lower_index(blocks):
    case = Case("ties", whole(100), config(blocks, 3, num_local_blocks=1), group=4, scale=0.5, key_dim=16)
    tensors = draw(case, torch.float32)
    # Small integers: products are exact in every dtype and whatever the order of summation, so ties are exact too.
    tensors["q"], key = tensors["q"].round(), tensors["k_cmp"][:, :1].round()
    tensors["k_cmp"] = key.expand_as(tensors["k_cmp"])
    tensors["lse"] = STAGES["compressed_attention"].run(EAGER, case, tensors)["lse"]
    assert_equal(run_selection(TRITON, case, tensors), run_selection(EAGER, case, tensors), what="indices under ties")


@each_branch
def test_operators_are_well_behaved(stage):
    case = Case("opcheck", whole(20), config((16, 8, 16), 3, 9), key_dim=16, value_dim=32, kv_heads=1)
    x = draw(case, torch.float32)
    k, v = ("k_cmp", "v_cmp") if stage.name == "compressed_attention" else ("k", "v")
    indices = x["indices"] if stage.name == "selected_attention" else None
    tensors = [x[name].requires_grad_() for name in ("q", k, v)]
    sizes = [16, 8, 16, 3, 1, 2, 20]
    operator = getattr(torch.ops.nsa_triton, stage.name)
    torch.library.opcheck(operator.default, (*tensors, indices, None, None, case.num_keys, sizes, 0.25))


@pytest.mark.parametrize("dtype_name", ["bfloat16"] if kernels.INTERPRETED else ["float32", "bfloat16"])
def test_the_layer_is_the_same_on_both_backends(dtype_name):
    layers = [NativeSparseAttention(32, 4, 2, 16, SMALL, backend=backend) for backend in ("eager", "triton")]
    layers[1].load_state_dict(layers[0].state_dict())
    x, rope, longest_sum = torch.randn(1, 60, 32), rope_table(60, 16), 60 * 4 * 16
    results = []
    for layer in layers:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=dtype_name == "bfloat16"):
            out = layer(x, rope)
        results.append([out, *torch.autograd.grad(out.float().sum(), list(layer.parameters()))])
    for name, eager, triton in zip(["output", *dict(layers[0].named_parameters())], *results, strict=True):
        dtype = getattr(torch, dtype_name)
        assert_matches(triton, eager.double(), what=name, reduction=longest_sum, dtype=dtype)


def differentiated(name, lengths, selected, window, compression, **shape):
    blocks = {"num_local_blocks": 1, "compression": compression}
    return Case(f"gradcheck_{name}", lengths, config((16, 8, 16), selected, window, **blocks), kv_heads=1, **shape)


# One of each compression, between them packed and not, with queries of all keys and of the last.
DIFFERENTIATED = [
    differentiated("whole", whole(40), 2, 6, "mlp", key_dim=16, value_dim=16),
    differentiated("last_queries", ((5, 40),), 2, 9, "linear", group=3, key_dim=16, value_dim=20),
    differentiated("packed", whole(1, 17, 0, 9), 2, 5, "mean", group=1, key_dim=20, value_dim=16),
]


@pytest.mark.skipif(not kernels.INTERPRETED, reason="float64 kernels exist under the interpreter only")
@each_part
@pytest.mark.parametrize("case", DIFFERENTIATED, ids=lambda case: case.id)
def test_gradients_are_those_of_finite_differences(stage, way, case):
    tensors = draw(case)
    leaves = stage.leaves(tensors)

    def function(*values):
        return stage.run(TRITON, case, {**tensors, **dict(zip(leaves, values, strict=True))})["out"]

    with launched(SELECTED, **way):
        gradcheck(function, leaves.values(), fast=True)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((8, 8, 16), r"compress_block_size = 8 \(only powers of two from 16\)"),
        ((16, 4, 16), r"compress_stride = 4 \(only powers of two from 8\)"),
        ((24, 24, 48), r"compress_block_size = 24"),
    ],
)
def test_unsupported_sizes_are_refused(sizes, message):
    q, k = torch.randn(1, 64, 2, 16), torch.randn(1, 64, 2, 16)
    with pytest.raises(ValueError, match=message):
        TRITON.sliding_window_attention(q, k, k, NSAConfig(*sizes))


def test_unsupported_head_dims_are_refused():
    q = torch.randn(1, 64, 2, 8)
    with pytest.raises(ValueError, match=r"a head dim of 8 \(only 16 to 256\)"):
        TRITON.sliding_window_attention(q, q, q, NSAConfig())


def test_a_cpu_without_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    q = torch.randn(1, 64, 2, 16, device="cpu")
    with pytest.raises(ValueError, match=r'backend must be "auto" or "eager" .* got "triton" and tensors on cpu'):
        TRITON.sliding_window_attention(q, q, q, NSAConfig())
