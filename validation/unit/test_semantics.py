"""What Native Sparse Attention promises, one claim a test, each without reference to the oracle's arithmetic."""

import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from validation import oracle
from validation.implementations import Implementation, load
from validation.numerics import assert_equal, assert_matches
from validation.unit.cases import BY_ID, STAGES, Case, Stage, config, draw, importance, select_blocks, whole

pytestmark = pytest.mark.usefixtures("on_device")

ATTENTION = {name: stage for name, stage in STAGES.items() if not name.startswith("compress_")}
PACKED = [BY_ID[name] for name in ("packed", "packed_paper", "packed_mean", "packed_last_queries", "packed_scrambled")]

each_stage = pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES.keys())
each_attention = pytest.mark.parametrize("stage", ATTENTION.values(), ids=ATTENTION.keys())
each_packed = pytest.mark.parametrize("case", PACKED, ids=lambda case: case.id)


@pytest.fixture(scope="module")
def impl() -> Implementation:
    return load("eager")


def assert_all_match(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    for name, tensor in actual.items():
        assert_matches(tensor, expected[name], what=f"{what}: {name}")


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
def test_packed_equals_separate(impl: Implementation, stage: Stage, case: Case) -> None:
    expected = dict(stage.results(separately(impl, case), case, draw(case)))
    assert_all_match(dict(stage.results(impl, case, draw(case))), expected, "packed against separate")


@each_packed
def test_packed_selection_equals_separate(impl: Implementation, case: Case) -> None:
    expected = select_blocks(separately(impl, case), case, draw(case))
    assert_equal(select_blocks(impl, case, draw(case)), expected, what="packed indices against separate")


def test_keys_are_packed_like_queries_unless_told(impl: Implementation) -> None:
    case, tensors = BY_ID["packed"], draw(BY_ID["packed"])
    alone = {"cu_seqlens_q": case.cu_seqlens["cu_seqlens_q"]}
    out = impl.sliding_window_attention(tensors["q"], tensors["k"], tensors["v"], case.config, **alone)
    assert_equal(out, run("sliding_window_attention", impl, case, tensors), what="output without cu_seqlens_k")


def test_nothing_but_empty_sequences(impl: Implementation) -> None:
    case = Case("empty", whole(0, 0))
    for name, stage in STAGES.items():
        assert run(name, impl, case, draw(case)).numel() == 0, stage.name
    assert select_blocks(impl, case, draw(case)).numel() == 0


# 2. Queries are the last tokens.


@each_attention
@pytest.mark.parametrize("count", [1, 6, 40])
def test_last_queries_equal_the_end_of_the_whole(impl: Implementation, stage: Stage, count: int) -> None:
    case = Case("last_of_whole", whole(41), group=3)
    last = Case("last_of_whole", ((count, 41),), group=3)
    tensors = draw(case)
    ending = {name: x[:, -count:] if name in ("q", "gates", "indices") else x for name, x in tensors.items()}
    expected = {name: x[:, -count:] for name, x in stage.run(impl, case, tensors).items()}
    assert_all_match(stage.run(impl, last, ending), expected, f"last {count} queries")


@pytest.mark.parametrize("count", [1, 6, 40])
def test_last_queries_select_like_the_end_of_the_whole(impl: Implementation, count: int) -> None:
    case = Case("last_of_whole", whole(41), group=3)
    last = Case("last_of_whole", ((count, 41),), group=3)
    tensors = draw(case)
    ending = {**tensors, "q": tensors["q"][:, -count:], "lse": tensors["lse"][:, -count:]}
    assert_equal(select_blocks(impl, last, ending), select_blocks(impl, case, tensors)[:, -count:], what="indices")


# 3. A query that sees nothing.


def test_before_the_first_block_the_compressed_branch_is_zero(impl: Implementation) -> None:
    case = BY_ID["small"]
    results = dict(STAGES["compressed_attention"].results(impl, case, draw(case)))
    blind = case.config.compress_block_size - 1
    for name, nothing in (("out", 0.0), ("lse", -math.inf), ("gradient of q", 0.0)):
        rows = results[name][:, :blind]
        assert_equal(rows, torch.full_like(rows, nothing), what=f"{name} of queries before the first block")


def test_without_any_block_nothing_has_a_gradient(impl: Implementation) -> None:
    case = BY_ID["before_first_block"]
    for name, x in STAGES["compressed_attention"].results(impl, case, draw(case)):
        assert_equal(x, torch.full_like(x, -math.inf if name == "lse" else 0.0), what=name)


def test_a_query_without_selected_blocks_is_zero(impl: Implementation) -> None:
    case, tensors = BY_ID["small"], draw(BY_ID["small"])
    indices = tensors["indices"].clone()
    indices[:, 20] = -1
    results = dict(STAGES["selected_attention"].results(impl, case, {**tensors, "indices": indices}))
    for name in ("out", "gradient of q"):
        row = results[name][:, 20]
        assert_equal(row, torch.zeros_like(row), what=f"{name} of a query without blocks")


def test_keys_nobody_selects_have_no_gradient(impl: Implementation) -> None:
    case, tensors = BY_ID["small"], draw(BY_ID["small"])
    indices = tensors["indices"].masked_fill(tensors["indices"] == 2, -1)
    results = dict(STAGES["selected_attention"].results(impl, case, {**tensors, "indices": indices}))
    for name in ("gradient of k", "gradient of v"):
        block = results[name][:, 16:24]
        assert_equal(block, torch.zeros_like(block), what=f"{name} in a block nobody selects")


# 4. Indices are a set.


def test_order_and_place_of_indices_do_not_matter(impl: Implementation) -> None:
    case, tensors = BY_ID["scrambled"], draw(BY_ID["scrambled"])
    stage = STAGES["selected_attention"]
    expected = dict(stage.results(impl, case, {**tensors, "indices": tensors["indices"].sort(-1).values}))
    assert_all_match(dict(stage.results(impl, case, tensors)), expected, "scrambled against sorted")


def test_more_empty_slots_do_not_matter(impl: Implementation) -> None:
    case, tensors = BY_ID["small"], draw(BY_ID["small"])
    spaced = torch.stack([torch.full_like(tensors["indices"], -1), tensors["indices"]], -1).flatten(-2)
    stage = STAGES["selected_attention"]
    expected = dict(stage.results(impl, case, tensors))
    assert_all_match(dict(stage.results(impl, case, {**tensors, "indices": spaced})), expected, "with -1 between")


def test_blocks_beyond_the_query_are_skipped(impl: Implementation) -> None:
    case, tensors = BY_ID["small"], draw(BY_ID["small"])
    future = torch.tensor([4, -1, 0, 2], dtype=torch.int32).expand_as(tensors["indices"])
    own = (case.positions // case.config.select_block_size)[:, None, None]
    stage = STAGES["selected_attention"]
    expected = dict(stage.results(impl, case, {**tensors, "indices": future.masked_fill(future > own, -1)}))
    assert_all_match(dict(stage.results(impl, case, {**tensors, "indices": future})), expected, "with blocks beyond")


# 5. Limits in which a branch becomes something known.


def test_all_candidates_selected_is_causal_attention(impl: Implementation) -> None:
    case = Case("everything", whole(25), config(selected=11, window=25), group=3)
    tensors = draw(case)
    indices = select_blocks(impl, case, tensors)
    assert_equal((indices >= 0).sum(-1)[0, :, 0], case.positions // 8 + 1, what="number of blocks")
    expected = dict(STAGES["sliding_window_attention"].results(impl, case, tensors))
    stage = STAGES["selected_attention"]
    assert_all_match(dict(stage.results(impl, case, {**tensors, "indices": indices})), expected, "all blocks")


def test_a_window_over_everything_is_causal_attention(impl: Implementation) -> None:
    case, tensors = BY_ID["window_over_length"], draw(BY_ID["window_over_length"])
    q, k, v = (tensors[name].transpose(1, 2) for name in ("q", "k", "v"))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    out = run("sliding_window_attention", impl, case, tensors)
    assert_matches(out, expected.transpose(1, 2), what="window over everything")


def test_a_window_of_one_is_the_value_itself(impl: Implementation) -> None:
    case, tensors = BY_ID["window_1"], draw(BY_ID["window_1"])
    out = run("sliding_window_attention", impl, case, tensors)
    assert_matches(out, tensors["v"].repeat_interleave(case.group, 2), what="window of one")


@pytest.mark.parametrize("branch", [0, 1, 2])
def test_a_gate_lets_its_branch_through(impl: Implementation, branch: int) -> None:
    case, tensors = BY_ID["small"], draw(BY_ID["small"])
    gates = torch.zeros_like(tensors["gates"]).index_fill(-1, torch.tensor(branch), 1.0)
    name, kind = (("compressed_attention", "cmp"), ("selected_attention", "slc"), ("sliding_window_attention", "win"))[
        branch
    ]
    own = {**tensors, "k": tensors[f"k_{kind}"], "v": tensors[f"v_{kind}"]}
    out = run("nsa_attention", impl, case, {**tensors, "gates": gates})
    assert_matches(out, run(name, impl, case, own), what=f"output through the gate of {name}")


# 6. Heads.


@each_attention
@pytest.mark.parametrize("group", [1, 3, 4])
def test_groups_share_their_kv_head(impl: Implementation, stage: Stage, group: int) -> None:
    case, repeated = Case("heads", whole(30), group=group), Case("heads", whole(30), group=1, kv_heads=2 * group)
    tensors = draw(case)
    own = {name: x.repeat_interleave(group, 2) if name[0] in "kvi" else x for name, x in tensors.items()}
    assert_all_match(stage.run(impl, case, tensors), stage.run(impl, repeated, own), f"groups of {group}")


@each_attention
def test_kv_heads_do_not_mix(impl: Implementation, stage: Stage) -> None:
    case, tensors = BY_ID["group_3"], draw(BY_ID["group_3"])
    changed = {
        name: x.index_fill(2, torch.tensor(1), 9.0) if name[:2] in ("k_", "v_") or name in "kv" else x
        for name, x in tensors.items()
        if x.dim() == 4
    }
    out, other = (stage.run(impl, case, x)["out"][:, :, :3] for x in (tensors, {**tensors, **changed}))
    assert_matches(other, out, what="heads of the first KV head after the second one's keys changed")


@each_stage
def test_batch_rows_do_not_mix(impl: Implementation, stage: Stage) -> None:
    case, tensors = BY_ID["scrambled"], draw(BY_ID["scrambled"])
    params = ("_position", "_weight", "_weight_out")
    second = {name: x if name.endswith(params) else x[1:] for name, x in tensors.items()}
    expected = {name: x[1:] for name, x in stage.run(impl, case, tensors).items()}
    assert_all_match(stage.run(impl, case, second), expected, "second batch row alone")


# 7. Causality.


@pytest.mark.parametrize("position", [0, 2, 3, 7, 8, 30])
def test_the_future_changes_nothing(impl: Implementation, position: int) -> None:
    case, tensors = BY_ID["small"], draw(BY_ID["small"])

    def whole_layer(x: Mapping[str, Any]) -> Tensor:
        blocks = {
            f"{kind}_cmp": run(f"compress_{word}", impl, case, x) for kind, word in (("k", "keys"), ("v", "values"))
        }
        return run("nsa_attention", impl, case, {**x, **blocks, "indices": None})[:, : position + 1]

    later = (torch.arange(case.num_keys) > position).view(-1, 1, 1)
    tokens = ("q", "k", "v", "k_slc", "v_slc", "k_win", "v_win", "gates")
    changed = {**tensors, **{name: tensors[name] + 50.0 * later for name in tokens}}
    assert_matches(whole_layer(changed), whole_layer(tensors), what=f"outputs up to token {position}")


# 8. Memory layout.

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "head_major": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "dimension_before_token": lambda x: x.transpose(1, -1).contiguous().transpose(1, -1),
    "every_other_element": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "inside_a_larger_tensor": lambda x: pad(x, (1, 2, 1, 1, 3, 0), value=7)[:, 3:, 1:-1, 1:-2],
}


@each_stage
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter(impl: Implementation, stage: Stage, layout: str) -> None:
    case, tensors = BY_ID["scrambled"], draw(BY_ID["scrambled"])
    strided = {name: LAYOUTS[layout](x) if x.dim() == 4 else x for name, x in tensors.items()}
    assert not strided["q"].is_contiguous()
    assert_all_match(stage.run(impl, case, strided), stage.run(impl, case, tensors), f"layout {layout}")


@each_attention
def test_expanded_cotangents_are_read_right(impl: Implementation, stage: Stage) -> None:
    case, tensors = BY_ID["small"], draw(BY_ID["small"])
    gradients = []
    for reduce in (lambda out: out.sum(), lambda out: (out * torch.ones_like(out)).sum()):
        leaves = stage.leaves(tensors)
        reduce(stage.run(impl, case, {**tensors, **leaves})["out"]).backward()
        gradients.append({f"gradient of {name}": leaf.grad for name, leaf in leaves.items()})
    assert_all_match(*gradients, "sum() against a dense cotangent")


# 9. Arithmetic at its edges. Small integers make the scores exact, so that only the softmax is under test.


@each_attention
@pytest.mark.parametrize("dtype_name", ["float32", "float16", "bfloat16"])
def test_large_logits_are_finite_and_right(impl: Implementation, stage: Stage, dtype_name: str) -> None:
    dtype = getattr(torch, dtype_name)
    case = Case("large_logits", whole(41), group=3, scale=64.0)
    tensors = draw(case, dtype)
    tensors |= {name: x.round() for name, x in tensors.items() if name == "q" or name.startswith(("k", "v"))}
    out, expected = (stage.run(subject, case, tensors)["out"] for subject in (impl, oracle))
    longest = max(tensors[name].double().norm(dim=-1).max() for name in ("k", "k_cmp", "k_slc", "k_win"))
    largest = case.scale * float(tensors["q"].double().norm(dim=-1).max() * longest)
    assert_matches(out, expected, what="output", reduction=case.num_keys, logit=largest)


@pytest.mark.parametrize("dtype_name", ["float32", "float16", "bfloat16"])
def test_underflowing_importance_loses_no_candidate(impl: Implementation, dtype_name: str) -> None:
    case = Case("underflow", whole(41), config(selected=6), scale=1.0)
    tensors = draw(case, getattr(torch, dtype_name))
    # Where blocks 0 or 7 are seen they have all of the probability, from every head.
    tensors["q"] = torch.ones_like(tensors["q"])
    tensors["k_cmp"] = torch.zeros_like(tensors["k_cmp"]).index_fill(1, torch.tensor([0, 7]), 50.0)
    assert importance(case, tensors)[:, -1, :, 3].max() < torch.finfo(torch.float32).tiny
    tensors["lse"] = STAGES["compressed_attention"].run(impl, case, tensors)["lse"]
    indices = select_blocks(impl, case, tensors)
    every = torch.arange(6).where(torch.arange(6) <= case.positions[:, None] // 8, -1)[None, :, None]
    assert_equal(indices, every.expand_as(indices).int(), what="indices")


@each_attention
def test_scale_reaches_every_branch(impl: Implementation, stage: Stage) -> None:
    tensors = draw(BY_ID["small"])
    doubled, halved = Case("scaled", whole(37), scale=0.5), Case("scaled", whole(37), scale=0.25)
    expected = stage.run(impl, halved, {**tensors, "q": 2 * tensors["q"]})
    assert_all_match(stage.run(impl, doubled, tensors), expected, "scale against scaled queries")


# 10. Repetition.


@each_stage
@pytest.mark.parametrize("case", [BY_ID["scrambled"], BY_ID["packed_paper"]], ids=lambda case: case.id)
def test_runs_are_bitwise_the_same(impl: Implementation, stage: Stage, case: Case) -> None:
    tensors = draw(case, torch.float32)
    again = dict(stage.results(impl, case, tensors, torch.float32))
    for name, x in stage.results(impl, case, tensors, torch.float32):
        assert_equal(x, again[name], what=f"second run: {name}")


def test_inputs_are_left_alone(impl: Implementation) -> None:
    case, tensors = BY_ID["scrambled"], draw(BY_ID["scrambled"])
    before = {name: x.clone() for name, x in tensors.items()}
    for stage in STAGES.values():
        list(stage.results(impl, case, tensors))
    select_blocks(impl, case, tensors)
    for name, x in tensors.items():
        assert_equal(x, before[name], what=f"input {name}")
