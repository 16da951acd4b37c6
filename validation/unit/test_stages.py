"""Every stage against the float64 oracle: outputs and the gradient of every input, over the case list."""

import pytest
import torch
from torch import Tensor

from validation import oracle
from validation.implementations import Implementation, load
from validation.numerics import assert_equal, assert_matches, assert_selection_matches
from validation.unit.cases import (
    BY_ID,
    CASES,
    STAGES,
    Case,
    Stage,
    compare,
    config,
    draw,
    importance,
    select_blocks,
    whole,
)

pytestmark = pytest.mark.usefixtures("on_device")

# Rounding does not depend on structure the way indexing does: narrow dtypes are tried on one case of each kind.
ROUNDED = [
    BY_ID[name]
    for name in (
        "paper",
        "short_select",
        "group_3",
        "group_16",
        "wide_keys",
        "scrambled_last_queries",
        "linear",
        "mean",
        "window_1",
        "packed_paper",
        "packed_last_queries",
    )
]
NARROW = ["float32", "bfloat16", "float16"]

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
each_rounded = pytest.mark.parametrize("case", ROUNDED, ids=lambda case: case.id)
each_stage = pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES.keys())
each_narrow = pytest.mark.parametrize("dtype_name", NARROW)


@pytest.fixture(scope="module")
def impl() -> Implementation:
    return load("eager")


# 1. Algebra: in float64 nothing but the definition is left.


@each_stage
@each_case
def test_matches_the_oracle_in_float64(impl: Implementation, stage: Stage, case: Case) -> None:
    compare(impl, stage, case, draw(case), torch.float64)


@each_case
def test_selection_in_float64(impl: Implementation, case: Case) -> None:
    tensors = draw(case)
    indices = select_blocks(impl, case, tensors)
    expected = select_blocks(oracle, case, tensors)
    scores = importance(case, tensors)
    assert_selection_matches(indices, expected, scores, case.config, torch.float64, positions=case.positions)


@each_case
def test_end_to_end_in_float64(impl: Implementation, case: Case) -> None:
    tensors = draw(case)
    stage = STAGES["nsa_attention"]
    out = stage.run(impl, case, {**tensors, "indices": None})["out"]
    expected = stage.run(oracle, case, {**tensors, "indices": None})["out"]
    assert_matches(out, expected, what="output with its own selection")


# 2. Precision: narrow inputs, the oracle upcasting the same values.


@each_narrow
@each_stage
@each_rounded
def test_matches_the_oracle_in_narrow_dtypes(impl: Implementation, stage: Stage, case: Case, dtype_name: str) -> None:
    dtype = getattr(torch, dtype_name)
    compare(impl, stage, case, draw(case, dtype), dtype)


@each_narrow
@each_case
def test_selection_in_narrow_dtypes(impl: Implementation, case: Case, dtype_name: str) -> None:
    dtype = getattr(torch, dtype_name)
    tensors = draw(case, dtype)
    indices = select_blocks(impl, case, tensors)
    expected = select_blocks(oracle, case, tensors)
    bound = {"positions": case.positions, "group": case.group, "reduction": case.key_dim}
    assert_selection_matches(indices, expected, importance(case, tensors), case.config, dtype, **bound)


# 3. What comes back: dtypes, and the indices asked for.


@each_stage
@pytest.mark.parametrize("dtype_name", ["float64", *NARROW])
def test_outputs_and_gradients_keep_the_dtype(impl: Implementation, stage: Stage, dtype_name: str) -> None:
    dtype = getattr(torch, dtype_name)
    kept = {name: x.dtype for name, x in stage.results(impl, BY_ID["small"], draw(BY_ID["small"], dtype), dtype)}
    lse = kept.pop("lse", None)
    assert set(kept.values()) == {dtype}
    assert lse in (None, torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("case", [BY_ID["small"], BY_ID["packed_last_queries"]], ids=lambda case: case.id)
def test_returned_indices_are_those_of_the_selection(impl: Implementation, case: Case) -> None:
    tensors = draw(case)
    names = ("q", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gates")
    _, indices = impl.nsa_attention(*(tensors[n] for n in names), case.config, return_indices=True, **case.call)
    assert_equal(indices, select_blocks(impl, case, tensors), what="returned indices")


# 4. Exact ties: equal keys make every whole block equally important, and the lower index must win.


@pytest.mark.parametrize("dtype_name", ["float64", *NARROW])
@pytest.mark.parametrize("blocks", [(2, 2, 2), (4, 4, 4)])
def test_ties_go_to_the_lower_index(impl: Implementation, blocks: tuple[int, int, int], dtype_name: str) -> None:
    case = Case("ties", whole(33), config(blocks, 5, num_local_blocks=1), group=4, scale=0.5)
    tensors = draw(case, getattr(torch, dtype_name))
    # Small integers: products are exact in every dtype and whatever the order of summation, so ties are exact too.
    tensors["q"], key = tensors["q"].round(), tensors["k_cmp"][:, :1].round()
    tensors["k_cmp"] = key.expand_as(tensors["k_cmp"])
    tensors["lse"] = STAGES["compressed_attention"].run(impl, case, tensors)["lse"]
    indices = select_blocks(impl, case, tensors)
    assert_equal(indices, tied_selection(case, indices), what="indices under ties")


def tied_selection(case: Case, like: Tensor) -> Tensor:
    """The first block, the own block, and the lowest others: all blocks before the own one are worth the same."""
    rows = []
    for position in range(case.num_queries):
        own = position // case.config.select_block_size
        row = sorted({own, *range(own)[: case.config.num_selected_blocks - 1]})
        rows.append(row + [-1] * (case.config.num_selected_blocks - len(row)))
    return torch.tensor(rows, dtype=torch.int32)[None, :, None].expand_as(like)
