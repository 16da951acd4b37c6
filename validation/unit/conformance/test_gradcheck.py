"""Finite differences: autograd against nothing but the stage's own values.

In float64 element by element and in random projections; in every dtype, of compiled kernels too, along one direction
for each input. A fault that forward and backward share passes here: every stage is also held to the oracle.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from ... import oracle
from ...cases import BY_ID, DIFFERENTIATED, Case, Tensors, config, draw, fitted, pooled, require, upcast, whole
from ...comparison import check_gradients
from ...implementations import Implementation, load
from ...numerics import assert_matches, assert_slope_matches, difference_step, gradcheck, on_grid
from ...stages import SHARED, STAGES, StageSpec, select_blocks

pytestmark = [pytest.mark.usefixtures("on_device"), pytest.mark.claim("gradients")]

SMALL = (BY_ID["small"], BY_ID["pooled"])
ATTENTION = [name for name in STAGES if not name.startswith("compress_")]
SHAPE: dict[str, Any] = {"key_dim": 2, "value_dim": 3, "kv_heads": 1}

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

# Long enough for what compiled kernels take at a time, with blocks and tokens left out; one that the interpreter has
# time for, one of the least common denominator.
BLOCKS = (16, 8, 16)
SLOPES = [
    Case("slope", whole(72), config(BLOCKS, 3, 20), group=3, key_dim=16, value_dim=32),
    Case("slope_packed", whole(33, 0, 1, 40), config(BLOCKS, 3, 20, compression="linear"), key_dim=32, value_dim=16),
    Case(
        "slope_short",
        whole(34),
        config(BLOCKS, 2, 20, num_initial_blocks=0, num_local_blocks=1),
        group=1,
        kv_heads=1,
        key_dim=16,
        value_dim=16,
    ),
    pooled("slope_pooled", whole(34), 4),
]

each_case = pytest.mark.parametrize("case", [*TINY, *DIFFERENTIATED], indirect=True, ids=lambda case: case.id)
each_slope = pytest.mark.parametrize("case", SLOPES, indirect=True, ids=lambda case: case.id)
each_stage = pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES.keys())


@each_stage
@each_case
@pytest.mark.sparing(case=[case.id for case in DIFFERENTIATED])
def test_gradients_are_those_of_finite_differences(impl: Implementation, stage: StageSpec, case: Case) -> None:
    check_gradients(impl, stage, case)


@each_stage
@pytest.mark.sparing
def test_every_element_of_the_jacobian(impl: Implementation, stage: StageSpec) -> None:
    check_gradients(impl, stage, SMALLEST, fast=False)


@each_stage
def test_gradients_of_the_oracle_are_those_of_finite_differences(stage: StageSpec) -> None:
    check_gradients(oracle, stage, SMALLEST)


def _output(impl: Implementation, stage: StageSpec, case: Case, x: Tensors, name: str, value: Tensor) -> Tensor:
    """The output with another value of one input."""
    return stage.run(impl, case, {**x, name: value})["out"]


@pytest.mark.parametrize("dtype_name", ["float64", "float32", "bfloat16", "float16"])
@each_slope
@each_stage
@pytest.mark.sparing(dtype_name=("float64",), case=("slope_short",), stage=[n for n in STAGES if n != "nsa_attention"])
def test_gradients_are_slopes_in_every_dtype(
    impl: Implementation, stage: StageSpec, case: Case, dtype_name: str
) -> None:
    """Along the signs of the true gradient: there everything counts the same way, and what is missing is missed."""
    dtype, x = getattr(torch, dtype_name), draw(case)
    # Sums in which all inputs may move the way that counts: a logit's, a compressed block's.
    longest = case.key_dim if stage.name in ATTENTION else stage.reduction(case)
    steps = {name: difference_step(dtype, x[name].std().item(), longest) for name in stage.leaves(x)}
    x = {name: t.to(dtype) if t.is_floating_point() else t for name, t in x.items()}
    x |= {name: on_grid(x[name], step, dtype) for name, step in steps.items()}
    require(impl, case, stage.functions, dtype, backward=True)
    cotangent = torch.randn_like(stage.run(impl, case, x)["out"])
    actual = dict(stage.results(impl, case, x, cotangent=cotangent))
    true = dict(stage.results(oracle, case, upcast(x), cotangent=cotangent))
    for name, step in steps.items():
        assert_slope_matches(
            partial(_output, impl, stage, case, x, name),
            x[name],
            actual[f"gradient of {name}"],
            cotangent,
            direction=true[f"gradient of {name}"].sign(),
            step=step,
            what=f"{stage.name}, case {case.id}, gradient of {name}",
        )


def test_every_input_is_differentiated_by_some_stage() -> None:
    inputs = {name for name, x in draw(SLOPES[0]).items() if x.is_floating_point()}
    # The log-sum-exp is an output, handed to the selection, which has no gradients.
    assert {name for stage in STAGES.values() for name in stage.inputs} == inputs - {"lse"}


def test_selection_has_no_gradient(impl: Implementation) -> None:
    case = fitted(impl, *SMALL)
    tensors = {name: x.requires_grad_(x.is_floating_point()) for name, x in draw(case, impl.widest).items()}
    assert not select_blocks(impl, case, tensors).requires_grad


def test_nothing_flows_back_through_the_selection(impl: Implementation) -> None:
    case = fitted(impl, SLOPES[2], SLOPES[3], stages=SHARED.functions)
    require(impl, case, SHARED.functions, impl.widest, backward=True)
    x = draw(case, impl.widest)
    x["k_cmp"] = STAGES["compress_keys"].run(impl, case, x)["out"]
    x["lse"] = STAGES["compressed_attention"].run(impl, case, x)["lse"]
    x["indices"] = select_blocks(impl, case, x)
    fixed = dict(SHARED.results(impl, case, x))
    for name, chosen in SHARED.results(impl, case, {**x, "indices": None}):
        terms = case.num_queries * case.group + case.num_keys
        assert_matches(chosen, fixed[name].double(), what=f"{name} of blocks chosen on the way", reduction=terms)


def test_log_sum_exp_has_no_gradient(impl: Implementation) -> None:
    case = fitted(impl, *SMALL)
    tensors = {name: x.requires_grad_(x.is_floating_point()) for name, x in draw(case, impl.widest).items()}
    results = STAGES["compressed_attention"].run(impl, case, tensors)
    assert results["out"].requires_grad == impl.backward
    assert not results["lse"].requires_grad


# Second derivatives.

REFUSAL = "|".join(
    (
        "has no derivatives",
        "no autograd formula",
        "double backward",
        "does not require grad",
        r"^derivative for \S+ is not implemented",
    )
)


def gradient_of_q(impl: Implementation, stage: StageSpec, case: Case, tensors: Tensors) -> Callable[[Tensor], Tensor]:
    def gradient(q: Tensor) -> Tensor:
        out = stage.run(impl, case, {**tensors, "q": q})["out"]
        return torch.autograd.grad(out.square().sum(), [q], create_graph=True)[0]

    return gradient


@pytest.mark.parametrize("stage", [STAGES[name] for name in ATTENTION], ids=ATTENTION)
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_our_second_derivatives_are_refused(backend: str, stage: StageSpec) -> None:
    impl = load(backend)
    case = fitted(impl, BY_ID["small"])
    tensors = draw(case, impl.widest)
    q = tensors["q"].requires_grad_()
    first = gradient_of_q(impl, stage, case, tensors)(q)
    with pytest.raises(RuntimeError, match=rf"nsa_{backend}::\w+_backward has no derivatives"):
        torch.autograd.grad(first.sum(), [q])


@pytest.mark.parametrize("stage", [STAGES[name] for name in ATTENTION], ids=ATTENTION)
def test_second_derivatives_are_not_wrong(impl: Implementation, stage: StageSpec) -> None:
    """Ours are refused, see above. Somebody else's may be there, as those of plain PyTorch are: then they are right."""
    if not impl.second_derivatives:
        pytest.skip(f"{impl.name} lacks second derivatives")
    case = fitted(impl, *SMALL)
    require(impl, case, stage.functions, impl.widest, backward=True, own_keys=stage.own_keys)
    tensors = draw(case, impl.widest)
    q, gradient = tensors["q"].requires_grad_(), gradient_of_q(impl, stage, case, tensors)
    try:
        torch.autograd.grad(gradient(q).sum(), [q])
    except RuntimeError as error:
        if not re.search(REFUSAL, str(error)):
            raise
    else:
        gradcheck(gradient, [q.double()], fast=True)
