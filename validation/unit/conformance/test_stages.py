"""Every stage of every implementation against the float64 oracle: outputs and all gradients, over the case list."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ... import oracle
from ...cases import BY_ID, Case, Tensors, config, draw, fitted, pooled, require, upcast, whole
from ...comparison import assert_selected, check_selection, compare, compare_selection
from ...implementations import Implementation
from ...numerics import assert_equal, assert_matches
from ...stages import SHARED, STAGES, StageSpec, select_blocks

pytestmark = pytest.mark.usefixtures("on_device")

each_stage = pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES.keys())


# 1. Values. In float64 nothing but the definition is left; narrow inputs are the same for the oracle, which upcasts.


@pytest.mark.claim("forward", "gradients")
def test_matches_the_oracle(impl: Implementation, stage: StageSpec, case: Case, dtype_name: str) -> None:
    dtype = getattr(torch, dtype_name)
    beside_plain = dtype != torch.float64 and not impl.plain
    compare(impl, stage, case, draw(case, dtype), dtype, beside_plain=beside_plain)


@pytest.mark.parametrize("name", ["compressed_attention", "selected_attention", "sliding_window_attention"])
def test_a_scale_of_0_weighs_all_visible_keys_alike(impl: Implementation, name: str) -> None:
    case = fitted(impl, replace(BY_ID["small"], scale=0.0), replace(BY_ID["pooled"], scale=0.0), stages=(name,))
    compare(impl, STAGES[name], case, draw(case, impl.widest), impl.widest)


# 2. The selection.


@pytest.mark.every_dtype
@pytest.mark.claim("selection")
def test_selection(impl: Implementation, case: Case, dtype_name: str) -> None:
    dtype = getattr(torch, dtype_name)
    compare_selection(impl, case, draw(case, dtype), dtype)


@pytest.mark.claim("forward")
@pytest.mark.sparing(case=("last_queries", "packed_last_queries", "pooled_last_queries"))
def test_the_whole_with_its_own_selection(impl: Implementation, case: Case, dtype_name: str) -> None:
    dtype, stage = getattr(torch, dtype_name), SHARED if case.config.shared_kv else STAGES["nsa_attention"]
    tensors = draw(case, dtype)
    made: Tensors = {}

    def nsa_attention(q: Tensor, k_cmp: Tensor, *rest: Any, indices: Tensor, **options: Any) -> Tensor:
        out, made["indices"] = impl.function("nsa_attention")(q, k_cmp, *rest, **options, return_indices=True)
        made["k_cmp"] = k_cmp.detach()
        return out

    watched = replace(impl, nsa_attention=nsa_attention if impl.has("nsa_attention") else None)
    out = stage.run(watched, case, tensors)["out"]
    check_selection(case, {**tensors, "k_cmp": made["k_cmp"]}, made["indices"], dtype)
    # Rounding may swap blocks of nearly equal importance, and what follows is then judged on the same blocks; in
    # float64 none are that near, so that the oracle makes its own choice.
    tensors["indices"] = made["indices"]
    own = {"indices": None} if dtype == torch.float64 else {}
    expected = stage.run(oracle, case, {**upcast(tensors), **own})["out"]
    baseline = None
    if dtype != torch.float64 and not impl.plain:
        with oracle.computing_in(dtype):
            baseline = stage.run(oracle, case, tensors)["out"]
    assert_matches(out, expected, what="output", baseline=baseline, reduction=stage.reduction(case), dtype=dtype)


# 3. What comes back: dtypes, and the indices asked for.


each_dtype = pytest.mark.parametrize("dtype_name", ["float64", "float32", "bfloat16", "float16"])


@each_stage
@each_dtype
@pytest.mark.sparing(dtype_name=("float64", "bfloat16"), stage=("compress_values", "sliding_window_attention"))
def test_outputs_and_gradients_keep_the_dtype(impl: Implementation, stage: StageSpec, dtype_name: str) -> None:
    dtype = getattr(torch, dtype_name)
    case = fitted(impl, BY_ID["small"], BY_ID["pooled"], stages=stage.functions)
    kept = {name: x.dtype for name, x in stage.results(impl, case, draw(case, dtype))}
    lse = kept.pop("lse", None)
    assert set(kept.values()) == {dtype}
    assert lse in (None, torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize(
    "case", [(BY_ID["small"], BY_ID["pooled"]), BY_ID["packed_last_queries"]], indirect=True, ids=["whole", "packed"]
)
def test_returned_indices_are_those_of_the_selection(impl: Implementation, case: Case) -> None:
    tensors = draw(case, impl.widest)
    # In narrow dtypes a log-sum-exp of other rounding, the oracle's, might lead to other blocks.
    tensors["lse"] = STAGES["compressed_attention"].run(impl, case, tensors)["lse"]
    expected = select_blocks(impl, case, tensors)
    require(impl, case, ("nsa_attention",), impl.widest, own_keys=True)
    names = ("q", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gates")
    attend = impl.function("nsa_attention")
    _, indices = attend(*(tensors[n] for n in names), case.config, return_indices=True, **case.call)
    assert_equal(indices, expected, what="returned indices")
    given = tensors["indices"]
    _, indices = attend(*(tensors[n] for n in names), case.config, indices=given, return_indices=True, **case.call)
    assert_equal(indices, given, what="returned indices where they were given")


# 4. Exact ties: equal keys make every whole block equally important, and the lower index must win.


@pytest.mark.claim("selection")
@each_dtype
@pytest.mark.parametrize("blocks", [(2, 2, 2), (4, 4, 4)])
@pytest.mark.sparing(dtype_name=("float64", "float32", "bfloat16"), blocks=((4, 4, 4),))
def test_ties_go_to_the_lower_index(impl: Implementation, blocks: tuple[int, int, int], dtype_name: str) -> None:
    case = Case("ties", whole(33), config(blocks, 5, num_local_blocks=1), group=4, scale=0.5)
    case = fitted(impl, case, pooled("ties_pooled", whole(33), 5, scale=0.5))
    tensors = draw(case, getattr(torch, dtype_name))
    # Small integers: products are exact in every dtype and whatever the order of summation, so ties are exact too.
    tensors["q"], key = tensors["q"].round(), tensors["k_cmp"][:, :1].round()
    tensors["k_cmp"] = key.expand_as(tensors["k_cmp"])
    tensors["lse"] = STAGES["compressed_attention"].run(impl, case, tensors)["lse"]
    indices = select_blocks(impl, case, tensors)
    assert_selected(case, tensors, indices, tied_selection(case, indices), what="indices under ties")


def tied_selection(case: Case, like: Tensor) -> Tensor:
    """The forced blocks and the lowest others: all blocks before the own one are worth the same."""
    count, initial, local = (getattr(case.config, f"num_{kind}_blocks") for kind in ("selected", "initial", "local"))
    rows = []
    for position in range(case.num_queries):
        own = position // case.config.select_block_size
        forced = {j for j in range(own + 1) if j < initial or j > own - local}
        free = [j for j in range(own + 1) if j not in forced]
        row = sorted([*forced, *free[: count - len(forced)]])
        rows.append(row + [-1] * (count - len(row)))
    return torch.tensor(rows, dtype=torch.int32)[None, :, None].expand_as(like)
