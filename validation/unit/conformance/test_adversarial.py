"""Inputs that random numbers never are: where softmax, its rescaling and the selection go wrong first.

Every stage of attention, forward and backward, held to the oracle beside plain PyTorch in the same dtype, finiteness
first. On a GPU in shapes whose selected branch our kernels take by query and by block, and in narrow dtypes too.
Elsewhere a small case in the widest dtype proves the algebra, and these tests themselves.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nsa.config import NSAConfig

from ... import oracle
from ...cases import Case, Tensors, config, draw_inputs, pooled, upcast, whole, with_selection
from ...comparison import compare
from ...implementations import Implementation
from ...numerics import assert_equal, assert_matches, assert_selection_matches
from ...stages import STAGES, StageSpec, importance, select_blocks

pytestmark = pytest.mark.usefixtures("on_device")

SMALL = config((16, 8, 16), 3, 12, num_local_blocks=1)
SHAPE: dict[str, Any] = {"kv_heads": 1, "key_dim": 16, "value_dim": 16}
DIMS: dict[str, Any] = {"key_dim": 128, "value_dim": 128}
POOLED = pooled("pooled", whole(52), 4)
if torch.cuda.is_available():
    TRIED = [
        (Case("by_query", whole(1300), NSAConfig(), kv_heads=1, group=64, **DIMS), POOLED),
        (Case("by_tile", whole(1300), NSAConfig(), kv_heads=1, group=16, **DIMS), POOLED),
        (Case("by_block", whole(1200), NSAConfig(), group=4, **DIMS), POOLED),
    ]
    DTYPES: tuple[str, ...] = ("widest", "float16", "bfloat16")
else:
    TRIED = [
        (Case("by_query", whole(44), SMALL, group=8, **SHAPE), POOLED),
        (Case("by_tile", whole(40), SMALL, group=8, **SHAPE), POOLED),
        (Case("small", whole(52), SMALL, **SHAPE), POOLED),
    ]
    DTYPES = ("widest",)

ATTENTION = [stage for stage in STAGES.values() if not stage.name.startswith("compress_")]
# Interpreted, the whole takes longest.
PARTS = [stage.name for stage in ATTENTION if stage.name != "nsa_attention"]
KEYS, VALUES = ("k", "k_cmp", "k_slc", "k_win"), ("v", "v_cmp", "v_slc", "v_win")


@pytest.fixture
def dtype(impl: Implementation, dtype_name: str) -> torch.dtype:
    """The dtype of that name, or the one that leaves least to rounding."""
    return impl.widest if dtype_name == "widest" else getattr(torch, dtype_name)


# What is done to unit normal inputs, in place.

Adversity = Callable[[Tensors], None]


def logits_a_hundredfold(x: Tensors) -> None:
    for name in ("q", *KEYS):
        x[name] *= 10


def queries_of_all_sizes(x: Tensors) -> None:
    """Whatever one row's logits are, those of the rows beside it are far above or below."""
    x["q"][:, 1::3] *= 400
    x["q"][:, :, 1::2] /= 400


def identical_keys(x: Tensors) -> None:
    for name in KEYS:
        x[name][:] = x[name][:, :1].clone()


def zero_queries(x: Tensors) -> None:
    x["q"].zero_()


def equal_values(x: Tensors) -> None:
    for name in VALUES:
        x[name][:] = x[name][:, :1].clone()


def large_values(x: Tensors) -> None:
    """As large as leaves their gradients, sums over queries, room in float16."""
    for name in VALUES:
        x[name].sign_().mul_(torch.finfo(x[name].dtype).max / 1024)


def spotlight(x: Tensors, where: float, logit: float) -> None:
    """All queries alike in one direction, in which one key has a logit that high and no other key has any."""
    x["q"][..., 0] = x["q"].shape[-1] ** 0.5
    for name in KEYS:
        x[name][..., 0] = 0
        x[name][:, int(where * x[name].shape[1]), :, 0] = logit


def one_hot(x: Tensors) -> None:
    """One key has all but `exp(-40)` of the probability, in the dtype all of it."""
    spotlight(x, 0.5, 40)


def underflow(x: Tensors) -> None:
    """The first key has all of it: that of the others, and the importance of all but the first block, is 0."""
    spotlight(x, 0, 1000)


ADVERSITIES = [
    logits_a_hundredfold,
    queries_of_all_sizes,
    identical_keys,
    zero_queries,
    equal_values,
    large_values,
    one_hot,
    underflow,
]

each_adversity = pytest.mark.parametrize("adversity", ADVERSITIES, ids=lambda function: function.__name__)
each_stage = pytest.mark.parametrize("stage", ATTENTION, ids=lambda stage: stage.name)
each_case = pytest.mark.parametrize("case", TRIED, ids=lambda cases: cases[0].id, indirect=True)
each_dtype = pytest.mark.parametrize("dtype_name", DTYPES)
parts = pytest.mark.sparing(stage=PARTS)


def adverse(case: Case, dtype: torch.dtype, adversity: Adversity) -> Tensors:
    tensors = draw_inputs(case, dtype)
    adversity(tensors)
    return with_selection(case, tensors)


def largest_logit(tensors: Tensors) -> float:
    """Of the compressed branch, and near enough of the others, whose keys had the same done to them."""
    return tensors["lse"].abs().masked_fill(tensors["lse"].isinf(), 0).max().item()


@each_dtype
@each_adversity
@each_stage
@each_case
@parts
def test_matches_the_oracle(
    impl: Implementation, stage: StageSpec, case: Case, adversity: Adversity, dtype: torch.dtype
) -> None:
    if impl.plain and dtype != impl.widest:
        pytest.skip(f"{impl.name} lacks a claim for narrow dtypes, in which others are compared with what it does")
    tensors = adverse(case, dtype, adversity)
    narrow = dtype != torch.float64 and not impl.plain
    compare(impl, stage, case, tensors, dtype, beside_plain=narrow, logit=largest_logit(tensors))


@each_dtype
@each_adversity
@each_case
def test_selection(impl: Implementation, case: Case, adversity: Adversity, dtype: torch.dtype) -> None:
    tensors = adverse(case, dtype, adversity)
    bound = {**case.selection, "logit": largest_logit(tensors)}
    indices, scores = select_blocks(impl, case, tensors), importance(case, tensors)
    assert_selection_matches(indices, tensors["indices"], scores, case.config, dtype, **bound)


@each_dtype
@each_case
def test_slots_are_filled_from_the_lower_end_where_importance_underflows(
    impl: Implementation, case: Case, dtype: torch.dtype
) -> None:
    tensors = adverse(case, dtype, underflow)
    # Not even float64 tells the free candidates apart, so the rule for ties decides every slot.
    assert_equal(select_blocks(impl, case, tensors), tensors["indices"], what="indices under underflow")


@each_dtype
@each_stage
@each_case
@parts
def test_large_logits_cost_outputs_no_precision(
    impl: Implementation, stage: StageSpec, case: Case, dtype: torch.dtype
) -> None:
    tensors = adverse(case, dtype, logits_a_hundredfold)
    expected = stage.run(oracle, case, upcast(tensors))
    bound: dict[str, Any] = {"reduction": stage.reduction(case), "logit": largest_logit(tensors), "dtype": dtype}
    for name, actual in stage.run(impl, case, tensors).items():
        # Plain PyTorch rounds logits to the dtype, and is no guide where they are hundreds.
        assert_matches(actual, expected[name], what=f"{name} of {stage.name}", **bound)


@each_dtype
@each_stage
@each_case
@parts
def test_the_largest_values_pass(impl: Implementation, stage: StageSpec, case: Case, dtype: torch.dtype) -> None:
    tensors = draw_inputs(case, dtype)
    # Three gated branches add up to less than four times a value. Before a branch is divided by the sum of its
    # exponentials, each of them at most 1, the accumulator holds up to so many times a value.
    wide = dtype if dtype == torch.float64 else torch.float32
    accumulator = torch.finfo(wide).max / case.num_keys
    largest = min(torch.finfo(dtype).max, accumulator) / 4
    for name in VALUES:
        tensors[name].sign_().mul_(largest)
    tensors = with_selection(case, tensors)
    with oracle.computing_in(dtype):
        nearest = stage.run(oracle, case, tensors)["out"]
    actual, expected = (
        stage.run(subject, case, x)["out"] for subject, x in ((impl, tensors), (oracle, upcast(tensors)))
    )
    baseline = nearest if dtype != torch.float64 else None
    assert_matches(actual, expected, what=f"output of {stage.name}", baseline=baseline, reduction=stage.reduction(case))
