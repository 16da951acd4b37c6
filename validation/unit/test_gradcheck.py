"""Finite differences in float64: autograd against nothing but the stage's own values.

A fault that forward and backward share passes here, which is why every stage is also held to the oracle.
"""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from validation import oracle
from validation.implementations import Implementation, load
from validation.numerics import gradcheck
from validation.unit.cases import (
    BY_ID,
    DIFFERENTIATED,
    STAGES,
    Case,
    Stage,
    Tensors,
    check_gradients,
    config,
    draw,
    fitted,
    require,
    select_blocks,
    whole,
)

pytestmark = pytest.mark.usefixtures("on_device")

SMALL = (BY_ID["small"], BY_ID["pooled"])
ATTENTION = [name for name in STAGES if not name.startswith("compress_")]
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

each_case = pytest.mark.parametrize("case", [*TINY, *DIFFERENTIATED], indirect=True, ids=lambda case: case.id)
each_stage = pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES.keys())


@each_stage
@each_case
@pytest.mark.sparing(case=[case.id for case in DIFFERENTIATED])
def test_gradients_are_those_of_finite_differences(impl: Implementation, stage: Stage, case: Case) -> None:
    check_gradients(impl, stage, case)


@each_stage
@pytest.mark.sparing
def test_every_element_of_the_jacobian(impl: Implementation, stage: Stage) -> None:
    check_gradients(impl, stage, SMALLEST, fast=False)


@each_stage
def test_gradients_of_the_oracle_are_those_of_finite_differences(stage: Stage) -> None:
    check_gradients(oracle, stage, SMALLEST)


def test_selection_has_no_gradient(impl: Implementation) -> None:
    case = fitted(impl, *SMALL)
    tensors = {name: x.requires_grad_(x.is_floating_point()) for name, x in draw(case, impl.widest).items()}
    assert not select_blocks(impl, case, tensors).requires_grad


def test_log_sum_exp_has_no_gradient(impl: Implementation) -> None:
    case = fitted(impl, *SMALL)
    tensors = {name: x.requires_grad_(x.is_floating_point()) for name, x in draw(case, impl.widest).items()}
    results = STAGES["compressed_attention"].run(impl, case, tensors)
    assert results["out"].requires_grad == impl.backward
    assert not results["lse"].requires_grad


# Second derivatives.

REFUSAL = r"no autograd formula|double backward|does not require grad"


def gradient_of_q(impl: Implementation, stage: Stage, case: Case, tensors: Tensors) -> Callable[[Tensor], Tensor]:
    def gradient(q: Tensor) -> Tensor:
        out = stage.run(impl, case, {**tensors, "q": q})["out"]
        return torch.autograd.grad(out.square().sum(), [q], create_graph=True)[0]

    return gradient


@pytest.mark.parametrize("stage", [STAGES[name] for name in ATTENTION], ids=ATTENTION)
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_our_second_derivatives_are_refused(backend: str, stage: Stage) -> None:
    impl = load(backend)
    case = fitted(impl, BY_ID["small"])
    tensors = draw(case, impl.widest)
    q = tensors["q"].requires_grad_()
    first = gradient_of_q(impl, stage, case, tensors)(q)
    with pytest.raises(RuntimeError, match=rf"nsa_{backend}\.\w+_backward.* no autograd formula was registered"):
        torch.autograd.grad(first.sum(), [q])


@pytest.mark.parametrize("stage", [STAGES[name] for name in ATTENTION], ids=ATTENTION)
def test_second_derivatives_are_not_wrong(impl: Implementation, stage: Stage) -> None:
    """Ours are refused, see above. Somebody else's may be there, as those of plain PyTorch are: then they are right."""
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
