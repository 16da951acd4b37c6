"""The Triton kernels: compiled where there is a GPU, elsewhere the same code under Triton's interpreter.

Under the interpreter float64 shows that the algebra is right; compiled kernels are held to the policy in the dtypes
they are made for, beside plain PyTorch in the same dtype.
"""

import pytest
import torch

from nsa import NativeSparseAttention, kernels, rope_table
from nsa.config import NSAConfig
from validation import oracle
from validation.implementations import load
from validation.numerics import assert_equal, assert_matches, assert_selection_matches, gradcheck
from validation.unit.cases import (
    KERNEL_CASES,
    STAGES,
    Case,
    compare,
    config,
    draw,
    importance,
    select_blocks,
    whole,
)

pytestmark = pytest.mark.usefixtures("on_device")

SMALL = NSAConfig(16, 8, 16, 3, window_size=20)
DTYPES = ["float64"] if kernels.INTERPRETED else ["float32", "float16", "bfloat16"]
BY_ID = {case.id: case for case in KERNEL_CASES}
# The interpreter takes seconds where a GPU takes microseconds: it gets a few short cases.
INTERPRETED = ["scrambled_last_queries", "packed_mean"]
TRIED = [BY_ID[name] for name in INTERPRETED] if kernels.INTERPRETED else KERNEL_CASES

each_case = pytest.mark.parametrize("case", TRIED, ids=lambda case: case.id)
PARTS = {name: stage for name, stage in STAGES.items() if name != "nsa_attention" or not kernels.INTERPRETED}
each_stage = pytest.mark.parametrize("stage", PARTS.values(), ids=PARTS.keys())
each_dtype = pytest.mark.parametrize("dtype_name", DTYPES)
each_branch = pytest.mark.parametrize(
    "stage", [STAGES[name] for name in ("compressed_attention", "selected_attention", "sliding_window_attention")],
    ids=lambda stage: stage.name,
)  # fmt: skip

TRITON, EAGER = load("triton"), load("eager")


@each_dtype
@each_stage
@each_case
def test_matches_the_oracle(stage, case, dtype_name):
    dtype = getattr(torch, dtype_name)
    compare(TRITON, stage, case, draw(case, dtype), dtype, beside_plain=dtype != torch.float64)


@each_dtype
@each_case
def test_selection(case, dtype_name):
    dtype = getattr(torch, dtype_name)
    tensors = draw(case, dtype)
    indices, expected = select_blocks(TRITON, case, tensors), select_blocks(oracle, case, tensors)
    bound = {"positions": case.positions, "group": case.group, "reduction": case.key_dim}
    assert_selection_matches(indices, expected, importance(case, tensors), case.config, dtype, **bound)


@pytest.mark.parametrize("dims", [(96, 80)] if kernels.INTERPRETED else [(96, 80), (192, 128), (256, 64)], ids=str)
@pytest.mark.parametrize("dtype_name", ["float32"] if kernels.INTERPRETED else ["float32", "bfloat16"])
@each_branch
def test_head_dims_that_are_no_powers_of_two(stage, dims, dtype_name):
    dtype = getattr(torch, dtype_name)
    case = Case("dims", whole(40), config((16, 8, 16), 3, 20), key_dim=dims[0], value_dim=dims[1], group=3, kv_heads=1)
    compare(TRITON, stage, case, draw(case, dtype), dtype, beside_plain=dtype != torch.float64)


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
    assert_equal(select_blocks(TRITON, case, tensors), select_blocks(EAGER, case, tensors), what="indices under ties")


@each_branch
def test_operators_are_well_behaved(stage):
    case = Case("opcheck", whole(40), config((16, 8, 16), 3, 20), key_dim=16, value_dim=32)
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


@pytest.mark.skipif(not kernels.INTERPRETED, reason="float64 kernels exist under the interpreter only")
@each_branch
def test_gradients_are_those_of_finite_differences(stage):
    case = Case("gradcheck", whole(24), config((16, 8, 16), 3, 6), key_dim=16, value_dim=16, kv_heads=1)
    tensors = draw(case)
    leaves = stage.leaves(tensors)

    def function(*values):
        return stage.run(TRITON, case, {**tensors, **dict(zip(leaves, values, strict=True))})["out"]

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
