"""What Native Sparse Attention promises, one claim a test, by examples; what holds for every input is drawn elsewhere.

No claim refers to the oracle's arithmetic. See `test_properties.py` for those that random cases can show.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from nsa.functional import block_starts

from ... import oracle
from ...cases import BY_ID, Case, config, draw, draw_cotangent, fitted, pooled, require, whole
from ...comparison import compare
from ...implementations import Implementation
from ...numerics import assert_equal, assert_matches
from ...stages import EVERY, SELECTION, STAGES, StageSpec, importance, select_blocks

pytestmark = pytest.mark.usefixtures("on_device")

ATTENTION = {name: stage for name, stage in STAGES.items() if not name.startswith("compress_")}
# Each case has one beside it for implementations that can do little.
SMALL = (BY_ID["small"], BY_ID["pooled"])
SCRAMBLED = (BY_ID["scrambled"], BY_ID["pooled_scrambled"])
PACKED_PAPER = (BY_ID["packed_paper"], BY_ID["pooled_packed"])
BRANCHES = ("compressed_attention", "selected_attention", "sliding_window_attention")

each_stage = pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES.keys())
each_attention = pytest.mark.parametrize("stage", ATTENTION.values(), ids=ATTENTION.keys())
branches = pytest.mark.sparing(stage=BRANCHES)


def assert_same(actual: Tensor, expected: Tensor, case: Case, what: str, dtype: torch.dtype | None = None) -> None:
    """Equal but for the rounding of two results of one implementation, which may add up in two orders."""
    # The longest sum, that of a gradient of keys, has a term a query of each head of the group; outputs have one a key.
    terms = case.num_keys * case.group
    assert_matches(actual, expected.double(), what=what, reduction=terms, dtype=dtype or actual.dtype)


def assert_all_match(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], case: Case, what: str) -> None:
    for name, tensor in actual.items():
        if tensor.is_floating_point():
            assert_same(tensor, expected[name], case, f"{what}: {name}", actual["out"].dtype)
        else:
            assert_equal(tensor, expected[name], what=f"{what}: {name}")


def run(stage: str, impl: Implementation, case: Case, tensors: Mapping[str, Any]) -> Tensor:
    return STAGES[stage].run(impl, case, tensors)["out"]


# 1. Packing.


class OffsetsOfQueries(Case):
    """Its keys are packed like its queries, and nothing says so."""

    @property
    def cu_seqlens(self) -> dict[str, Tensor]:
        return {"cu_seqlens_q": super().cu_seqlens["cu_seqlens_q"]}


@pytest.mark.parametrize("stage", [*ATTENTION.values(), SELECTION], ids=lambda stage: stage.name)
def test_keys_are_packed_like_queries_unless_told(impl: Implementation, stage: StageSpec) -> None:
    case = fitted(impl, BY_ID["packed"], BY_ID["pooled_packed"], stages=stage.functions)
    tensors, alone = draw(case, impl.widest), OffsetsOfQueries(**vars(case))
    expected = stage.run(impl, case, tensors)
    for name, x in stage.run(impl, alone, tensors).items():
        assert_equal(x, expected[name], what=f"{name} without cu_seqlens_k")


EMPTY = (Case("empty", whole(0, 0)), pooled("empty_pooled", whole(0, 0), 4))


@each_stage
def test_nothing_but_empty_sequences(impl: Implementation, stage: StageSpec) -> None:
    case = fitted(impl, *EMPTY, stages=stage.functions)
    assert stage.run(impl, case, draw(case, impl.widest))["out"].numel() == 0


def test_no_selection_for_nothing_but_empty_sequences(impl: Implementation) -> None:
    case = fitted(impl, *EMPTY)
    assert select_blocks(impl, case, draw(case, impl.widest)).numel() == 0


# 2. A query that sees nothing.


def test_before_the_first_block_the_compressed_branch_is_zero(impl: Implementation) -> None:
    case = fitted(impl, *SMALL)
    results = dict(STAGES["compressed_attention"].results(impl, case, draw(case, impl.widest)))
    blind = case.config.compress_block_size - 1
    for name in results.keys() & {"out", "lse", "gradient of q"}:
        rows, nothing = results[name][:, :blind], -math.inf if name == "lse" else 0.0
        assert_equal(rows, torch.full_like(rows, nothing), what=f"{name} of queries before the first block")


def test_without_any_block_nothing_has_a_gradient(impl: Implementation) -> None:
    case = fitted(impl, BY_ID["before_first_block"], pooled("before_first_pooled", whole(3), 4))
    for name, x in STAGES["compressed_attention"].results(impl, case, draw(case, impl.widest)):
        assert_equal(x, torch.full_like(x, -math.inf if name == "lse" else 0.0), what=name)


def test_a_query_without_selected_blocks_is_zero(impl: Implementation) -> None:
    case = fitted(impl, *SMALL)
    require(impl, replace(case, scrambled=True), ("selected_attention",), impl.widest)
    tensors = draw(case, impl.widest)
    indices = tensors["indices"].clone()
    indices[:, 20] = -1
    results = dict(STAGES["selected_attention"].results(impl, case, {**tensors, "indices": indices}))
    for name in results.keys() & {"out", "gradient of q"}:
        row = results[name][:, 20]
        assert_equal(row, torch.zeros_like(row), what=f"{name} of a query without blocks")


def test_keys_nobody_selects_have_no_gradient(impl: Implementation) -> None:
    case = fitted(impl, *SMALL)
    asked = replace(case, scrambled=True, emptied=0.0)
    require(impl, asked, ("selected_attention",), impl.widest, backward=True)
    tensors, size = draw(case, impl.widest), case.config.select_block_size
    # The queries of the block itself have the one before it, which is forced.
    indices = tensors["indices"].masked_fill(tensors["indices"] == 2, -1)
    results = dict(STAGES["selected_attention"].results(impl, case, {**tensors, "indices": indices}))
    for name in ("gradient of k", "gradient of v"):
        block = results[name][:, 2 * size : 3 * size]
        assert_equal(block, torch.zeros_like(block), what=f"{name} in a block nobody selects")


# 3. The limit in which a branch becomes something known.


def test_a_window_of_one_is_the_value_itself(impl: Implementation) -> None:
    case = fitted(impl, BY_ID["window_1"], BY_ID["pooled_forced"])
    tensors = draw(case, impl.widest)
    out = run("sliding_window_attention", impl, case, tensors)
    assert_matches(out, tensors["v"].repeat_interleave(case.group, 2).double(), what="window of one")


# 4. Memory layout.

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "head_major": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "dimension_before_token": lambda x: x.transpose(1, -1).contiguous().transpose(1, -1),
    "every_other_element": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "inside_a_larger_tensor": lambda x: pad(x, (1, 2, 1, 1, 3, 0), value=7)[:, 3:, 1:-1, 1:-2],
}


@each_stage
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.sparing(
    layout=("inside_a_larger_tensor",), stage=("compress_keys", "compressed_attention", "sliding_window_attention")
)
def test_strides_do_not_matter(impl: Implementation, stage: StageSpec, layout: str) -> None:
    case = fitted(impl, *SCRAMBLED, stages=stage.functions)
    tensors = draw(case, impl.widest)
    strided = {name: lay_out(x, layout) for name, x in tensors.items()}
    assert not strided["q"].is_contiguous()
    assert_all_match(stage.run(impl, case, strided), stage.run(impl, case, tensors), case, f"layout {layout}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.sparing(layout=("inside_a_larger_tensor",))
def test_strides_do_not_matter_to_a_selection(impl: Implementation, layout: str) -> None:
    case = fitted(impl, BY_ID["many_blocks"], BY_ID["pooled_many_blocks"], stages=("select_blocks",))
    tensors = draw(case, impl.widest)
    strided = {name: lay_out(x, layout) for name, x in tensors.items()}
    assert_equal(select_blocks(impl, case, strided), select_blocks(impl, case, tensors), what=f"indices, {layout}")


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same values; of parameters and of a log-sum-exp, every other element of something larger."""
    return LAYOUTS[layout if x.dim() == 4 else "every_other_element"](x)


class OffsetsInAColumn(Case):
    """Its offsets of sequences have other numbers between them."""

    @property
    def cu_seqlens(self) -> dict[str, Tensor]:
        return {name: torch.stack((x, x + 1), 1)[:, 0] for name, x in super().cu_seqlens.items()}


@pytest.mark.parametrize("stage", EVERY.values(), ids=EVERY.keys())
def test_strides_of_offsets_do_not_matter(impl: Implementation, stage: StageSpec) -> None:
    case = fitted(impl, *PACKED_PAPER, stages=stage.functions)
    tensors, strided = draw(case, impl.widest), OffsetsInAColumn(**vars(case))
    expected = dict(stage.results(impl, case, tensors))
    assert_all_match(dict(stage.results(impl, strided, tensors)), expected, case, "offsets in a column")


@each_attention
@branches
def test_expanded_cotangents_are_read_right(impl: Implementation, stage: StageSpec) -> None:
    case = fitted(impl, *SMALL)
    require(impl, case, stage.functions, impl.widest, backward=True)
    tensors = draw(case, impl.widest)
    one = torch.ones((), dtype=impl.widest).expand(*tensors["q"].shape[:3], case.value_dim)
    expanded, dense = (dict(stage.results(impl, case, tensors, cotangent=x)) for x in (one, one.contiguous()))
    assert_all_match(expanded, dense, case, "an expanded against a dense cotangent")


@each_stage
def test_the_default_dtype_does_not_matter(impl: Implementation, stage: StageSpec) -> None:
    case = fitted(impl, *SMALL, stages=stage.functions)
    tensors = draw(case, impl.widest)
    expected = dict(stage.results(impl, case, tensors))
    torch.set_default_dtype(torch.float16)
    try:
        results = dict(stage.results(impl, case, tensors))
    finally:
        torch.set_default_dtype(torch.float32)
    for name, x in results.items():
        assert_equal(x, expected[name], what=f"{name} where floats are float16 unless told")


def test_gates_may_be_narrower_than_what_they_weigh(impl: Implementation) -> None:
    case = fitted(impl, *SMALL, stages=STAGES["nsa_attention"].functions)
    tensors = draw(case, impl.widest)
    gates = tensors["gates"].half()
    narrow, wide = (run("nsa_attention", impl, case, {**tensors, "gates": x}) for x in (gates, gates.to(impl.widest)))
    assert_equal(narrow, wide, what="output under gates in float16")


def test_room_for_blocks_that_packed_sequences_lack_is_zero(impl: Implementation) -> None:
    case = fitted(impl, *PACKED_PAPER, stages=("compress",))
    tensors = draw(case, impl.widest)
    tensors["v"][:, 0] = torch.nan  # which nothing may reach that holds no token of the first sequence
    out = run("compress_values", impl, case, tensors)
    filled = block_starts(case.num_keys, case.config, case.cu_seqlens["cu_seqlens_k"]).filled
    assert filled is not None
    assert not filled.all(), "no room is left: this test would show nothing"
    beyond = out[:, ~filled]
    assert_equal(beyond, torch.zeros_like(beyond), what="room beyond the blocks")


@each_stage
def test_gradients_do_not_depend_on_which_are_asked_for(impl: Implementation, stage: StageSpec) -> None:
    case = fitted(impl, *SMALL, stages=stage.functions)
    require(impl, case, stage.functions, impl.widest, backward=True)
    tensors = draw(case, impl.widest)
    together = dict(stage.results(impl, case, tensors))
    for name in stage.leaves(tensors):
        leaf = tensors[name].detach().requires_grad_()
        out = stage.run(impl, case, {**tensors, name: leaf})["out"]
        (alone,) = torch.autograd.grad(out, leaf, draw_cotangent(case, out, impl.widest))
        assert_same(alone, together[f"gradient of {name}"], case, f"gradient of {name} alone")


@each_attention
@pytest.mark.parametrize("scale", [0.0, -0.7])
@pytest.mark.sparing(scale=(-0.7,))
def test_logits_may_be_scaled_by_any_number(impl: Implementation, stage: StageSpec, scale: float) -> None:
    case = replace(fitted(impl, *SMALL, stages=stage.functions), scale=scale)
    compare(impl, stage, case, draw(case, impl.widest), impl.widest)


# 5. Arithmetic at its edges. Small integers make the scores exact, so that only the softmax is under test.


@each_attention
@pytest.mark.parametrize("dtype_name", ["float32", "float16", "bfloat16"])
@pytest.mark.sparing(dtype_name=("float16",))
def test_large_logits_are_finite_and_right(impl: Implementation, stage: StageSpec, dtype_name: str) -> None:
    dtype = getattr(torch, dtype_name)
    case = Case("large_logits", whole(41), group=3, scale=64.0)
    case = fitted(impl, case, pooled("large_logits_pooled", whole(41), 5, scale=64.0))
    tensors = draw(case, dtype)
    tensors |= {name: x.round() for name, x in tensors.items() if name == "q" or name.startswith(("k", "v"))}
    out, expected = (stage.run(subject, case, tensors)["out"] for subject in (impl, oracle))
    longest = max(tensors[name].double().norm(dim=-1).max() for name in ("k", "k_cmp", "k_slc", "k_win"))
    assert case.scale is not None
    largest = case.scale * float(tensors["q"].double().norm(dim=-1).max() * longest)
    assert_matches(out, expected, what="output", reduction=case.num_keys, logit=largest)


@pytest.mark.parametrize("dtype_name", ["float32", "float16", "bfloat16"])
def test_underflowing_importance_loses_no_candidate(impl: Implementation, dtype_name: str) -> None:
    case = Case("underflow", whole(41), config(selected=6), scale=1.0)
    case = fitted(impl, case, pooled("underflow_pooled", whole(21), 6, scale=1.0))
    tensors = draw(case, getattr(torch, dtype_name))
    # Where these two blocks are seen they have all of the probability, from every head.
    tensors["q"] = torch.ones_like(tensors["q"])
    seen = torch.tensor([0, tensors["k_cmp"].shape[1] // 2])
    tensors["k_cmp"] = torch.zeros_like(tensors["k_cmp"]).index_fill(1, seen, 50.0)
    assert importance(case, tensors)[:, -1, :, 3].max() < torch.finfo(torch.float32).tiny
    tensors["lse"] = STAGES["compressed_attention"].run(impl, case, tensors)["lse"]
    indices = select_blocks(impl, case, tensors)
    own = (case.positions // case.config.select_block_size)[:, None]
    every = torch.arange(6).where(torch.arange(6) <= own, -1)[None, :, None]
    assert_equal(indices, every.expand_as(indices).int(), what="indices")


# 6. Repetition.


@each_stage
@pytest.mark.parametrize("case", [SCRAMBLED, PACKED_PAPER], indirect=True, ids=["whole", "packed"])
@pytest.mark.sparing(case=(PACKED_PAPER,), stage=BRANCHES)
def test_runs_are_bitwise_the_same(impl: Implementation, stage: StageSpec, case: Case) -> None:
    if not impl.deterministic:
        pytest.skip(f"{impl.name} lacks determinism")
    dtype = torch.float32 if torch.float32 in impl.dtypes else impl.widest
    tensors = draw(case, dtype)
    again = dict(stage.results(impl, case, tensors))
    for name, x in stage.results(impl, case, tensors):
        assert_equal(x, again[name], what=f"second run: {name}")


@each_stage
@branches
def test_inputs_are_left_alone(impl: Implementation, stage: StageSpec) -> None:
    case = fitted(impl, *SCRAMBLED, *SMALL, stages=stage.functions)
    tensors = draw(case, impl.widest)
    before = {name: x.clone() for name, x in tensors.items()}
    list(stage.results(impl, case, tensors))
    for name, x in tensors.items():
        assert_equal(x, before[name], what=f"input {name}")


def test_inputs_of_the_selection_are_left_alone(impl: Implementation) -> None:
    case = fitted(impl, *SCRAMBLED, *SMALL)
    tensors = draw(case, impl.widest)
    before = {name: x.clone() for name, x in tensors.items()}
    select_blocks(impl, case, tensors)
    for name, x in tensors.items():
        assert_equal(x, before[name], what=f"input {name}")
