"""Finite differences: autograd against nothing but the stage's own values.

In float64 element by element and in random projections; in narrow dtypes, compiled kernels among them, along one
direction for each input. A fault that forward and backward share passes here, which is why every stage is also held to
the oracle.
"""

import pytest
import torch
from torch import Tensor

from validation import oracle
from validation.implementations import Implementation, load
from validation.numerics import assert_slope_matches, difference_step, gradcheck, on_grid
from validation.unit.cases import STAGES, Case, Stage, Tensors, config, draw, select_blocks, upcast, whole
from validation.unit.strategies import supports, widest

pytestmark = pytest.mark.usefixtures("on_device")

SHAPE = {"key_dim": 2, "value_dim": 3, "kv_heads": 1}

# The whole Jacobian, one element at a time, on the smallest case in which every branch has something to leave out.
SMALLEST = Case("gradcheck_whole", whole(6), config((2, 1, 2), 2, 3, num_local_blocks=1), **SHAPE)

# Random projections of it on cases of every structure.
TINY = [
    Case("gradcheck_grouped", whole(11), config(selected=2, window=3, num_local_blocks=1), group=3, **SHAPE),
    Case("gradcheck_heads", whole(10), config(selected=3, window=4), group=1, key_dim=3, value_dim=2, kv_heads=2),
    Case("gradcheck_last_queries", ((3, 17),), config(selected=3), scrambled=True, **SHAPE),
    Case("gradcheck_packed", whole(5, 0, 1, 8), config(selected=2, window=3, num_local_blocks=1), **SHAPE),
    Case("gradcheck_linear", whole(9), config(compression="linear"), **SHAPE),
    Case("gradcheck_mean", whole(9), config(compression="mean"), **SHAPE),
]

ATTENTION = [name for name in STAGES if not name.startswith("compress_")]

each_tiny = pytest.mark.parametrize("case", TINY, ids=lambda case: case.id)
each_stage = pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES.keys())


# Large enough for kernels, of each kind of compression, with blocks and tokens left out.
LARGER = [
    Case("slope", whole(72), config((16, 8, 16), 3, 20), group=3, key_dim=16, value_dim=32),
    Case(
        "slope_packed", whole(33, 0, 1, 40), config((16, 8, 16), 3, 20, compression="linear"), key_dim=32, value_dim=16
    ),
]
# What the interpreter has time for.
SHORT = [Case("slope_short", whole(34), config((16, 8, 16), 3, 20), group=1, kv_heads=1, key_dim=16, value_dim=16)]


@pytest.fixture(scope="module", params=["eager", "triton"])
def impl(request) -> Implementation:
    return load(request.param)


def need(impl: Implementation, case: Case, dtype: torch.dtype = torch.float64) -> None:
    if dtype not in impl.dtypes or not supports(impl, case) or not impl.backward:
        pytest.skip(f"{impl.name} does not differentiate {case.id} in {dtype}")


def check(subject: object, stage: Stage, case: Case, *, fast: bool) -> None:
    tensors = draw(case)
    leaves = stage.leaves(tensors)

    def function(*values: Tensor) -> Tensor:
        return stage.run(subject, case, {**tensors, **dict(zip(leaves, values, strict=True))})["out"]

    gradcheck(function, leaves.values(), fast=fast)


@each_stage
@each_tiny
def test_gradients_are_those_of_finite_differences(impl: Implementation, stage: Stage, case: Case) -> None:
    need(impl, case)
    check(impl, stage, case, fast=True)


@each_stage
def test_every_element_of_the_jacobian(impl: Implementation, stage: Stage) -> None:
    need(impl, SMALLEST)
    check(impl, stage, SMALLEST, fast=False)


@each_stage
def test_gradients_of_the_oracle_are_those_of_finite_differences(stage: Stage) -> None:
    check(oracle, stage, SMALLEST, fast=True)


def check_slopes(impl: Implementation, stage: Stage, case: Case, dtype: torch.dtype) -> None:
    """Holds the gradient of each input to finite differences along the signs of the true one.

    Along these everything counts the same way, so that whatever a gradient lacks is missing in its sum.
    """
    # Sums in which all inputs may move the way that counts: a logit's, a compressed block's.
    longest = case.key_dim if stage.name in ATTENTION else stage.reduction(case)
    x = draw(case)
    steps = {name: difference_step(dtype, x[name].std().item(), longest) for name in stage.leaves(x)}
    x = {name: t.to(dtype) if t.is_floating_point() else t for name, t in x.items()}
    x |= {name: on_grid(x[name], step, dtype) for name, step in steps.items()}
    cotangent = torch.randn_like(stage.run(impl, case, x)["out"])
    actual = dict(stage.results(impl, case, x, dtype, cotangent=cotangent))
    true = dict(stage.results(oracle, case, upcast(x), cotangent=cotangent))
    for name, step in steps.items():
        assert_slope_matches(
            lambda value, name=name: stage.run(impl, case, {**x, name: value})["out"],
            x[name],
            actual[f"gradient of {name}"],
            cotangent,
            direction=true[f"gradient of {name}"].sign(),
            step=step,
            what=f"{stage.name}, case {case.id}, gradient of {name}",
        )


@pytest.mark.parametrize("dtype_name", ["float64", "float32", "bfloat16", "float16"])
@each_stage
def test_gradients_are_slopes_in_every_dtype(impl: Implementation, stage: Stage, dtype_name: str) -> None:
    dtype = getattr(torch, dtype_name)
    if impl.interpreted and (dtype != torch.float64 or stage.name == "nsa_attention"):
        pytest.skip("the interpreter rounds where it likes, and takes long for what is made of all stages")
    for case in SHORT if impl.interpreted else LARGER:
        need(impl, case, dtype)
        check_slopes(impl, stage, case, dtype)


def test_every_input_is_differentiated_by_some_stage() -> None:
    inputs = {name for name, x in draw(LARGER[0]).items() if x.is_floating_point()}
    # The log-sum-exp is an output, handed to the selection, which has no gradients.
    assert {name for stage in STAGES.values() for name in stage.inputs} == inputs - {"lse"}


def requiring_gradients(impl: Implementation) -> Tensors:
    need(impl, SHORT[0], widest(impl))
    return {name: x.requires_grad_(x.is_floating_point()) for name, x in draw(SHORT[0], widest(impl)).items()}


def test_selection_has_no_gradient(impl: Implementation) -> None:
    assert not select_blocks(impl, SHORT[0], requiring_gradients(impl)).requires_grad


def test_log_sum_exp_has_no_gradient(impl: Implementation) -> None:
    results = STAGES["compressed_attention"].run(impl, SHORT[0], requiring_gradients(impl))
    assert results["out"].requires_grad
    assert not results["lse"].requires_grad


@pytest.mark.parametrize("stage", [STAGES[name] for name in ATTENTION], ids=ATTENTION)
def test_second_derivatives_are_refused_rather_than_wrong(impl: Implementation, stage: Stage) -> None:
    tensors = requiring_gradients(impl)
    out = stage.run(impl, SHORT[0], tensors)["out"]
    (gradient,) = torch.autograd.grad(out.square().sum(), [tensors["q"]], create_graph=True)
    with pytest.raises(RuntimeError, match=r"_backward.* no autograd formula was registered"):
        torch.autograd.grad(gradient.sum(), [tensors["q"]])
