"""What Native Sparse Attention promises, one claim a test, each without reference to the oracle's arithmetic."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from validation import oracle
from validation.implementations import Implementation
from validation.numerics import assert_equal, assert_matches
from validation.unit.cases import (
    BY_ID,
    SHARED,
    STAGES,
    Case,
    Stage,
    config,
    draw,
    fitted,
    importance,
    pooled,
    require,
    select_blocks,
    whole,
)

pytestmark = pytest.mark.usefixtures("on_device")

ATTENTION = {name: stage for name, stage in STAGES.items() if not name.startswith("compress_")}
# Cases of many kinds, each with one beside it for implementations that can do little.
PACKED = ("packed", "packed_paper", "packed_mean", "packed_last_queries", "packed_scrambled", "pooled_packed")
SMALL = (BY_ID["small"], BY_ID["pooled"])
SCRAMBLED = (BY_ID["scrambled"], BY_ID["pooled_scrambled"])
PACKED_PAPER = (BY_ID["packed_paper"], BY_ID["pooled_packed"])
BRANCHES = ("compressed_attention", "selected_attention", "sliding_window_attention")

each_stage = pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES.keys())
each_attention = pytest.mark.parametrize("stage", ATTENTION.values(), ids=ATTENTION.keys())
each_packed = pytest.mark.parametrize("case", [BY_ID[name] for name in PACKED], indirect=True, ids=PACKED)
one_packed = pytest.mark.sparing(case=("packed_last_queries",))
branches = pytest.mark.sparing(stage=BRANCHES)


def assert_same(actual: Tensor, expected: Tensor, case: Case, what: str, dtype: torch.dtype | None = None) -> None:
    """Equal but for the rounding of two results of one implementation, which may add up in two orders."""
    # The longest sum, that of a gradient of keys, has a term a query of each head of the group; outputs have one a key.
    terms = case.num_keys * case.group
    assert_matches(actual, expected.double(), what=what, reduction=terms, dtype=dtype or actual.dtype)


def assert_all_match(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], case: Case, what: str) -> None:
    for name, tensor in actual.items():
        assert_same(tensor, expected[name], case, f"{what}: {name}", actual["out"].dtype)


def run(stage: str, impl: Implementation, case: Case, tensors: Mapping[str, Any]) -> Tensor:
    return STAGES[stage].run(impl, case, tensors)["out"]


# 1. Packed sequences are sequences.

PARTS = {
    "compressed_attention": ("queries", "blocks", "blocks"),
    "select_blocks": ("queries", "blocks", "queries"),
    "selected_attention": ("queries", "keys", "keys", "queries"),
    "sliding_window_attention": ("queries", "keys", "keys"),
    "nsa_attention": ("queries", "blocks", "blocks", "keys", "keys", "keys", "keys", "queries"),
}
"""Along what each tensor argument of a stage is cut."""


def separately(impl: Implementation, case: Case) -> Any:
    """The implementation called on one unpacked sequence at a time, with packed tensors going in and coming out."""
    sequences = oracle.sequences(case.config, case.num_queries, case.num_keys, **case.cu_seqlens)

    def cut(name: str) -> Callable[..., Any]:
        def call(*tensors: Any, indices: Tensor | None = None, num_keys: int | None = None, **rest: Any) -> Any:
            results = []
            for part in sequences:
                if part.queries.stop == part.queries.start:
                    continue
                arguments = [x[:, getattr(part, kind)] for x, kind in zip(tensors[:-1], PARTS[name], strict=True)]
                known = {} if indices is None else {"indices": indices[:, part.queries]}
                known |= {} if num_keys is None else {"num_keys": part.keys.stop - part.keys.start}
                results.append(getattr(impl, name)(*arguments, tensors[-1], scale=rest["scale"], **known))
            if isinstance(results[0], tuple):
                return tuple(torch.cat(parts, 1) for parts in zip(*results, strict=True))
            return torch.cat(results, 1)

        return call

    def compress(x: Tensor, params: Any, config: Any, **_: Any) -> Tensor:
        blocks = torch.cat([impl.compress(x[:, part.keys], params, config) for part in sequences if len_of(part)], 1)
        return pad(blocks, (0, 0, 0, 0, 0, config.num_compressed(x.shape[1]) - blocks.shape[1]))

    def len_of(part: oracle.Sequence) -> bool:
        return part.blocks.stop > part.blocks.start

    return SimpleNamespace(compress=compress, **{name: cut(name) for name in PARTS})


@each_stage
@each_packed
@one_packed
def test_packed_equals_separate(impl: Implementation, stage: Stage, case: Case) -> None:
    tensors = draw(case, impl.widest)
    actual = dict(stage.results(impl, case, tensors))
    expected = dict(stage.results(separately(impl, case), case, tensors))
    assert_all_match(actual, expected, case, "packed against separate")


@each_packed
@one_packed
def test_packed_selection_equals_separate(impl: Implementation, case: Case) -> None:
    tensors = draw(case, impl.widest)
    indices = select_blocks(impl, case, tensors)
    assert_equal(indices, select_blocks(separately(impl, case), case, tensors), what="packed indices against separate")


def test_keys_are_packed_like_queries_unless_told(impl: Implementation) -> None:
    case = fitted(impl, BY_ID["packed"], BY_ID["pooled_packed"])
    tensors = draw(case, impl.widest)
    expected = run("sliding_window_attention", impl, case, tensors)
    alone = {"cu_seqlens_q": case.cu_seqlens["cu_seqlens_q"]}
    out = impl.sliding_window_attention(tensors["q"], tensors["k"], tensors["v"], case.config, **alone)
    assert_equal(out, expected, what="output without cu_seqlens_k")


EMPTY = (Case("empty", whole(0, 0)), pooled("empty_pooled", whole(0, 0), 4))


@each_stage
def test_nothing_but_empty_sequences(impl: Implementation, stage: Stage) -> None:
    case = fitted(impl, *EMPTY, stages=stage.functions)
    assert stage.run(impl, case, draw(case, impl.widest))["out"].numel() == 0


def test_no_selection_for_nothing_but_empty_sequences(impl: Implementation) -> None:
    case = fitted(impl, *EMPTY)
    assert select_blocks(impl, case, draw(case, impl.widest)).numel() == 0


# 2. Queries are the last tokens.


WHOLE = (Case("last_of_whole", whole(41), group=3), pooled("last_of_whole_pooled", whole(41), 5))

each_count = pytest.mark.parametrize("count", [1, 6, 40])
last_six = pytest.mark.sparing(count=(6,))


@each_attention
@each_count
@last_six
def test_last_queries_equal_the_end_of_the_whole(impl: Implementation, stage: Stage, count: int) -> None:
    case = fitted(impl, *WHOLE)
    last, tensors = replace(case, lengths=((count, case.num_keys),)), draw(case, impl.widest)
    ending = {name: x[:, -count:] if name in ("q", "gates", "indices") else x for name, x in tensors.items()}
    actual = stage.run(impl, last, ending)
    expected = {name: x[:, -count:] for name, x in stage.run(impl, case, tensors).items()}
    assert_all_match(actual, expected, case, f"last {count} queries")


@each_count
@last_six
def test_last_queries_select_like_the_end_of_the_whole(impl: Implementation, count: int) -> None:
    case = fitted(impl, *WHOLE)
    last, tensors = replace(case, lengths=((count, case.num_keys),)), draw(case, impl.widest)
    ending = {**tensors, "q": tensors["q"][:, -count:], "lse": tensors["lse"][:, -count:]}
    assert_equal(select_blocks(impl, last, ending), select_blocks(impl, case, tensors)[:, -count:], what="indices")


# 3. A query that sees nothing.


def test_before_the_first_block_the_compressed_branch_is_zero(impl: Implementation) -> None:
    case = fitted(impl, *SMALL)
    results = dict(STAGES["compressed_attention"].results(impl, case, draw(case, impl.widest)))
    blind = case.config.compress_block_size - 1
    for name, nothing in (("out", 0.0), ("lse", -math.inf), ("gradient of q", 0.0)):
        rows = results[name][:, :blind]
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
    for name in ("out", "gradient of q"):
        row = results[name][:, 20]
        assert_equal(row, torch.zeros_like(row), what=f"{name} of a query without blocks")


def test_keys_nobody_selects_have_no_gradient(impl: Implementation) -> None:
    case = fitted(impl, *SMALL)
    require(impl, replace(case, scrambled=True, emptied=0.0), ("selected_attention",), impl.widest)
    tensors, size = draw(case, impl.widest), case.config.select_block_size
    # The queries of the block itself have the one before it, which is forced.
    indices = tensors["indices"].masked_fill(tensors["indices"] == 2, -1)
    results = dict(STAGES["selected_attention"].results(impl, case, {**tensors, "indices": indices}))
    for name in ("gradient of k", "gradient of v"):
        block = results[name][:, 2 * size : 3 * size]
        assert_equal(block, torch.zeros_like(block), what=f"{name} in a block nobody selects")


# 4. Indices are a set.


def test_order_and_place_of_indices_do_not_matter(impl: Implementation) -> None:
    case, stage = fitted(impl, *SCRAMBLED), STAGES["selected_attention"]
    tensors = draw(case, impl.widest)
    expected = dict(stage.results(impl, case, {**tensors, "indices": tensors["indices"].sort(-1).values}))
    assert_all_match(dict(stage.results(impl, case, tensors)), expected, case, "scrambled against sorted")


def test_more_empty_slots_do_not_matter(impl: Implementation) -> None:
    case, stage = fitted(impl, *SMALL), STAGES["selected_attention"]
    require(impl, replace(case, scrambled=True, emptied=0.0), stage.functions, impl.widest)
    tensors = draw(case, impl.widest)
    spaced = torch.stack([torch.full_like(tensors["indices"], -1), tensors["indices"]], -1).flatten(-2)
    expected = dict(stage.results(impl, case, tensors))
    assert_all_match(dict(stage.results(impl, case, {**tensors, "indices": spaced})), expected, case, "-1 between")


def test_blocks_beyond_the_query_are_skipped(impl: Implementation) -> None:
    case, stage = fitted(impl, *SMALL), STAGES["selected_attention"]
    require(impl, replace(case, scrambled=True, emptied=0.0), stage.functions, impl.widest)
    tensors = draw(case, impl.widest)
    future = torch.tensor([4, -1, 0, 2], dtype=torch.int32).expand(*tensors["indices"].shape[:3], 4)
    own = (case.positions // case.config.select_block_size)[:, None, None]
    expected = dict(stage.results(impl, case, {**tensors, "indices": future.masked_fill(future > own, -1)}))
    assert_all_match(dict(stage.results(impl, case, {**tensors, "indices": future})), expected, case, "blocks beyond")


# 5. Limits in which a branch becomes something known.


def test_all_candidates_selected_is_causal_attention(impl: Implementation) -> None:
    everything = Case("everything", whole(25), config(selected=11, window=26), group=3)
    case = fitted(impl, everything, pooled("everything_pooled", whole(25), 8, window=26))
    tensors, stage = draw(case, impl.widest), STAGES["selected_attention"]
    indices = select_blocks(impl, case, tensors)
    every = case.positions // case.config.select_block_size + 1
    assert_equal((indices >= 0).sum(-1)[0, :, 0], every, what="number of blocks")
    expected = dict(STAGES["sliding_window_attention"].results(impl, case, tensors))
    assert_all_match(dict(stage.results(impl, case, {**tensors, "indices": indices})), expected, case, "all blocks")


def test_a_window_over_everything_is_causal_attention(impl: Implementation) -> None:
    case = fitted(impl, BY_ID["window_over_length"], pooled("window_over_pooled", whole(19), 4, window=100))
    tensors = draw(case, impl.widest)
    q, k, v = (tensors[name].transpose(1, 2) for name in ("q", "k", "v"))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    out = run("sliding_window_attention", impl, case, tensors)
    assert_same(out, expected.transpose(1, 2), case, "window over everything")


def test_a_window_of_one_is_the_value_itself(impl: Implementation) -> None:
    case = fitted(impl, BY_ID["window_1"], BY_ID["pooled_forced"])
    tensors = draw(case, impl.widest)
    out = run("sliding_window_attention", impl, case, tensors)
    assert_matches(out, tensors["v"].repeat_interleave(case.group, 2).double(), what="window of one")


@pytest.mark.parametrize("branch", [0, 1, 2])
def test_a_gate_lets_its_branch_through(impl: Implementation, branch: int) -> None:
    case = fitted(impl, *SMALL)
    tensors = draw(case, impl.widest)
    gates = torch.zeros_like(tensors["gates"]).index_fill(-1, torch.tensor(branch), 1.0)
    name, kind = (("compressed_attention", "cmp"), ("selected_attention", "slc"), ("sliding_window_attention", "win"))[
        branch
    ]
    own = {**tensors, "k": tensors[f"k_{kind}"], "v": tensors[f"v_{kind}"]}
    out = run("nsa_attention", impl, case, {**tensors, "gates": gates})
    assert_same(out, run(name, impl, case, own), case, f"output through the gate of {name}")


# 6. Heads.


@each_attention
@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.sparing(group=(3,))
def test_groups_share_their_kv_head(impl: Implementation, stage: Stage, group: int) -> None:
    case = fitted(impl, Case("heads", whole(30), group=group))
    repeated, tensors = replace(case, group=1, kv_heads=2 * group), draw(case, impl.widest)
    own = {name: x.repeat_interleave(group, 2) if name[0] in "kvi" else x for name, x in tensors.items()}
    assert_all_match(stage.run(impl, case, tensors), stage.run(impl, repeated, own), case, f"groups of {group}")


@each_attention
def test_kv_heads_do_not_mix(impl: Implementation, stage: Stage) -> None:
    case = fitted(impl, BY_ID["group_3"], BY_ID["pooled_power_of_two"])
    tensors = draw(case, impl.widest)
    changed = {
        name: x.index_fill(2, torch.tensor(1), 9.0) if name[:2] in ("k_", "v_") or name in "kv" else x
        for name, x in tensors.items()
        if x.dim() == 4
    }
    out, other = (stage.run(impl, case, x)["out"][:, :, : case.group] for x in (tensors, {**tensors, **changed}))
    assert_matches(other, out.double(), what="heads of the first KV head after the second one's keys changed")


@each_stage
def test_batch_rows_do_not_mix(impl: Implementation, stage: Stage) -> None:
    case = fitted(impl, BY_ID["scrambled"], BY_ID["pooled_power_of_two"], stages=stage.functions)
    tensors = draw(case, impl.widest)
    params = ("_position", "_weight", "_weight_out")
    second = {name: x if name.endswith(params) else x[1:] for name, x in tensors.items()}
    expected = {name: x[1:] for name, x in stage.run(impl, case, tensors).items()}
    alone = stage.run(impl, replace(case, batch=1), second)
    assert_all_match(alone, expected, case, "second batch row alone")


# 7. Causality.


POSITIONS: dict[str, Callable[[Case], int]] = {
    "first": lambda case: 0,
    "before_the_end_of_a_block": lambda case: case.config.compress_block_size - 2,
    "end_of_a_block": lambda case: case.config.compress_block_size - 1,
    "end_of_a_selected_block": lambda case: case.config.select_block_size - 1,
    "start_of_a_selected_block": lambda case: case.config.select_block_size,
    "late": lambda case: case.num_keys - 7,
}


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.sparing(position=("end_of_a_block", "late"))
def test_the_future_changes_nothing(impl: Implementation, position: str) -> None:
    case = fitted(impl, *SMALL, stages=SHARED.functions)
    tensors, last = draw(case, impl.widest), POSITIONS[position](case)

    def whole_layer(x: Mapping[str, Any]) -> Tensor:
        return from_tokens(impl, case, {**x, "indices": None})[:, : last + 1]

    later = (torch.arange(case.num_keys) > last).view(-1, 1, 1)
    tokens = ("q", "k", "v", "k_slc", "v_slc", "k_win", "v_win", "gates")
    changed = {**tensors, **{name: tensors[name] + 50.0 * later for name in tokens}}
    assert_matches(whole_layer(changed), whole_layer(tensors).double(), what=f"outputs up to token {last}")


def from_tokens(impl: Implementation, case: Case, x: Mapping[str, Any]) -> Tensor:
    """Compression and attention: of `k_slc` and `k_win` besides `k`, where branches can have keys of their own."""
    if not impl.own_keys:
        return SHARED.run(impl, case, x)["out"]
    blocks = {f"{kind}_cmp": run(f"compress_{word}", impl, case, x) for kind, word in (("k", "keys"), ("v", "values"))}
    return run("nsa_attention", impl, case, {**x, **blocks})


# 8. Memory layout.

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
def test_strides_do_not_matter(impl: Implementation, stage: Stage, layout: str) -> None:
    case = fitted(impl, *SCRAMBLED, stages=stage.functions)
    tensors = draw(case, impl.widest)
    strided = {name: LAYOUTS[layout](x) if x.dim() == 4 else x for name, x in tensors.items()}
    assert not strided["q"].is_contiguous()
    assert_all_match(stage.run(impl, case, strided), stage.run(impl, case, tensors), case, f"layout {layout}")


@each_attention
@branches
def test_expanded_cotangents_are_read_right(impl: Implementation, stage: Stage) -> None:
    case = fitted(impl, *SMALL)
    tensors = draw(case, impl.widest)
    one = torch.ones((), dtype=impl.widest).expand(*tensors["q"].shape[:3], case.value_dim)
    expanded, dense = (dict(stage.results(impl, case, tensors, cotangent=x)) for x in (one, one.contiguous()))
    assert_all_match(expanded, dense, case, "an expanded against a dense cotangent")


# 9. Arithmetic at its edges. Small integers make the scores exact, so that only the softmax is under test.


@each_attention
@pytest.mark.parametrize("dtype_name", ["float32", "float16", "bfloat16"])
@pytest.mark.sparing(dtype_name=("float16",))
def test_large_logits_are_finite_and_right(impl: Implementation, stage: Stage, dtype_name: str) -> None:
    dtype = getattr(torch, dtype_name)
    case = Case("large_logits", whole(41), group=3, scale=64.0)
    case = fitted(impl, case, pooled("large_logits_pooled", whole(41), 5, scale=64.0))
    tensors = draw(case, dtype)
    tensors |= {name: x.round() for name, x in tensors.items() if name == "q" or name.startswith(("k", "v"))}
    out, expected = (stage.run(subject, case, tensors)["out"] for subject in (impl, oracle))
    longest = max(tensors[name].double().norm(dim=-1).max() for name in ("k", "k_cmp", "k_slc", "k_win"))
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


@each_attention
@branches
def test_scale_reaches_every_branch(impl: Implementation, stage: Stage) -> None:
    case = fitted(impl, *SMALL)
    tensors, doubled, halved = draw(case, impl.widest), replace(case, scale=0.5), replace(case, scale=0.25)
    expected = stage.run(impl, halved, {**tensors, "q": 2 * tensors["q"]})
    assert_all_match(stage.run(impl, doubled, tensors), expected, case, "scale against scaled queries")


# 10. Repetition.


@each_stage
@pytest.mark.parametrize("case", [SCRAMBLED, PACKED_PAPER], indirect=True, ids=["whole", "packed"])
@pytest.mark.sparing(case=(PACKED_PAPER,), stage=BRANCHES)
def test_runs_are_bitwise_the_same(impl: Implementation, stage: Stage, case: Case) -> None:
    if not impl.deterministic:
        pytest.skip(f"{impl.name} lacks determinism")
    dtype = torch.float32 if torch.float32 in impl.dtypes else impl.widest
    tensors = draw(case, dtype)
    again = dict(stage.results(impl, case, tensors))
    for name, x in stage.results(impl, case, tensors):
        assert_equal(x, again[name], what=f"second run: {name}")


@each_stage
@branches
def test_inputs_are_left_alone(impl: Implementation, stage: Stage) -> None:
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
