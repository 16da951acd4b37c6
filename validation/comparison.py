"""Stages held to the oracle: values, gradients and selections; a mismatch says which mistakes would give what came."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import oracle
from .cases import PARAMETERS, Case, Tensors, draw, require, upcast
from .numerics import Margin, Mismatch, assert_equal, assert_matches, assert_selection_matches, gradcheck
from .stages import SEEN, SHARED, StageSpec, importance, select_blocks


def compare(
    impl: Any,
    stage: StageSpec,
    case: Case,
    tensors: Mapping[str, Any],
    dtype: torch.dtype,
    *,
    beside_plain: bool = False,
    logit: float = 1.0,
) -> None:
    """Hold everything a stage gives to the oracle's value of it, beside plain PyTorch's in the same dtype if asked.

    `logit` is the magnitude of the logits, where inputs make it more than the scale does. A mismatch says which
    mistakes would give what came.
    """
    __tracebackhide__ = True
    expected = dict(stage.results(oracle, case, upcast(tensors), dtype))
    nearest: Tensors = {}
    if beside_plain:
        with oracle.computing_in(dtype):
            nearest = dict(stage.results(oracle, case, tensors, dtype))
    given: Tensors = {}
    for name, actual in stage.results(impl, case, tensors, dtype):
        given[name] = actual
        bound = {**bounds(stage, case, tensors, name, actual, dtype), "baseline": nearest.get(name)}
        bound["logit"] = max(logit, case.logit)
        try:
            margin = assert_matches(actual, expected[name], what=f"{stage.name}, case {case.id}, {name}", **bound)
        except Mismatch as mismatch:
            SEEN.note(stage.name, name, dtype, mismatch.margin or Margin())
            mismatch.notes.append(f"case {case}, {dtype}")
            from .mutants import explain  # they are made of cases

            mismatch.notes += explain(impl, stage, case, tensors, dtype, given, bound)
            raise
        SEEN.note(stage.name, name, dtype, margin)


def bounds(
    stage: StageSpec, case: Case, tensors: Mapping[str, Any], name: str, actual: Tensor, dtype: torch.dtype
) -> dict[str, Any]:
    """Keyword arguments of `assert_matches` for one of a stage's results, without a baseline."""
    queries, blocks = case.num_queries * case.group, case.batch * case.config.num_compressed(case.num_keys)
    # A gradient of keys sums over queries, whatever the stage sums over; one of what made blocks, over these too.
    beyond = stage.name == SHARED.name and name.endswith(PARAMETERS)
    reduction = max(stage.reduction(case), queries * blocks if beyond else queries)
    shifts: float = blocks if name.endswith("_position") else 0
    # All keys of a query have the position in common.
    if stage.name == SHARED.name and name.startswith("gradient of k_"):
        largest = 1.0 if name.endswith("_position") else tensors["k_position"].abs().max().item()
        shifts = queries * largest**2
    # Inputs are exact for the oracle, too: what is kept in a wider dtype is held to that.
    kept = actual.dtype if name == "lse" else dtype
    axes: tuple[str, ...] | None = ("head", "in", "out") if name.endswith(PARAMETERS) else None
    axes = ("batch", "block", "head", "dim") if name.endswith("_cmp") else axes
    return {"reduction": reduction, "shifts": shifts, "logit": case.logit, "dtype": kept, "axes": axes}


def assert_selected(case: Case, tensors: Mapping[str, Any], indices: Tensor, expected: Tensor, *, what: str) -> None:
    """Fail unless indices are exactly these; a mismatch says which mistakes would give what came."""
    __tracebackhide__ = True
    try:
        assert_equal(indices, expected, what=what)
    except Mismatch as mismatch:
        from .mutants import explain_selection

        mismatch.notes += [f"case {case}", *explain_selection(case, tensors, indices)]
        raise


def compare_selection(impl: Any, case: Case, tensors: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Hold a selection to the oracle's importances."""
    __tracebackhide__ = True
    check_selection(case, tensors, select_blocks(impl, case, tensors), dtype)


def check_selection(case: Case, tensors: Mapping[str, Any], indices: Tensor, dtype: torch.dtype) -> None:
    """Hold indices to the oracle's importances; a mismatch says which mistakes would give what came."""
    __tracebackhide__ = True
    expected, scores = select_blocks(oracle, case, tensors), importance(case, tensors)
    try:
        assert_selection_matches(indices, expected, scores, case.config, dtype, **case.selection)
    except Mismatch as mismatch:
        from .mutants import explain_selection

        mismatch.notes.append(f"case {case}, {dtype}")
        mismatch.notes += explain_selection(case, tensors, indices)
        raise


def check_gradients(subject: Any, stage: StageSpec, case: Case, *, fast: bool = True) -> None:
    """Hold a stage's gradients to central differences of its own values."""
    tensors = draw(case)
    require(subject, case, stage.functions, torch.float64, backward=True, own_keys=stage.own_keys)
    leaves = stage.leaves(tensors)

    def function(*values: Tensor) -> Tensor:
        return stage.run(subject, case, {**tensors, **dict(zip(leaves, values, strict=True))})["out"]

    gradcheck(function, list(leaves.values()), fast=fast)
