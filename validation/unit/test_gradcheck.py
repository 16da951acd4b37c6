"""Finite differences in float64: autograd against nothing but the stage's own values.

A fault that forward and backward share passes here, which is why every stage is also held to the oracle.
"""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from validation import oracle
from validation.implementations import Implementation
from validation.numerics import gradcheck
from validation.unit.cases import BY_ID, STAGES, Case, Stage, config, draw, fitted, require, select_blocks, whole

pytestmark = pytest.mark.usefixtures("on_device")

SMALL = (BY_ID["small"], BY_ID["pooled"])
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

# The same where blocks are (16, 8, 16) at least: one of each compression, of queries of all keys and of the last.
LARGER = [
    Case(f"gradcheck_{name}", lengths, config((16, 8, 16), 2, window, num_local_blocks=1, compression=kind), **shape)
    for name, lengths, window, kind, shape in (
        ("large", whole(40), 6, "mlp", {"kv_heads": 1, "key_dim": 16, "value_dim": 16}),
        ("large_few", ((5, 40),), 9, "linear", {"kv_heads": 1, "group": 3, "key_dim": 16, "value_dim": 20}),
        ("large_packed", whole(1, 17, 0, 9), 5, "mean", {"kv_heads": 1, "group": 1, "key_dim": 20, "value_dim": 16}),
    )
]

each_case = pytest.mark.parametrize("case", [*TINY, *LARGER], indirect=True, ids=lambda case: case.id)
each_stage = pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES.keys())


def check(subject: object, stage: Stage, case: Case, *, fast: bool) -> None:
    tensors = draw(case)
    leaves = stage.leaves(tensors)

    def function(*values: Tensor) -> Tensor:
        return stage.run(subject, case, {**tensors, **dict(zip(leaves, values, strict=True))})["out"]

    gradcheck(function, leaves.values(), fast=fast)


@each_stage
@each_case
@pytest.mark.sparing(case=[case.id for case in LARGER])
def test_gradients_are_those_of_finite_differences(impl: Implementation, stage: Stage, case: Case) -> None:
    check(impl, stage, case, fast=True)


@each_stage
@pytest.mark.sparing
def test_every_element_of_the_jacobian(impl: Implementation, stage: Stage) -> None:
    check(impl, stage, SMALLEST, fast=False)


@each_stage
def test_gradients_of_the_oracle_are_those_of_finite_differences(stage: Stage) -> None:
    check(oracle, stage, SMALLEST, fast=True)


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


def test_second_derivatives_are_refused_rather_than_wrong(impl: Implementation) -> None:
    stage, case = STAGES["sliding_window_attention"], fitted(impl, *SMALL)
    require(impl, case, stage.functions, impl.widest, backward=True)
    tensors = draw(case, impl.widest)

    def gradient(q: Tensor) -> Tensor:
        out = stage.run(impl, case, {**tensors, "q": q})["out"]
        return torch.autograd.grad(out.square().sum(), [q], create_graph=True)[0]

    q, refusal = tensors["q"].requires_grad_(), r"no autograd formula|double backward|does not require grad"
    if not _refused(lambda: torch.autograd.grad(gradient(q).sum(), [q]), refusal):
        gradcheck(gradient, [q.double()], fast=True)


def _refused(call: Callable[[], Any], words: str) -> bool:
    try:
        call()
    except RuntimeError as error:
        if re.search(words, str(error)):
            return True
        raise
    return False
