"""What holds for every input: one claim a test, on cases drawn at random, an implementation against itself.

Sameness is to the bit where the arithmetic is the same, elsewhere as near as the policy asks of results that both are
rounded.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from ... import oracle
from ...cases import BY_ID, Case, Tensors, draw, with_selection
from ...comparison import assert_selected
from ...implementations import Implementation
from ...numerics import assert_equal, assert_matches, assert_selection_matches
from ...stages import EVERY, SELECTION, SHARED, STAGES, StageSpec, importance, select_blocks
from ...strategies import cases, for_all, relations

pytestmark = pytest.mark.usefixtures("on_device")

ATTENTION = [name for name in STAGES if not name.startswith("compress_")]


def _from_tokens(subject: Any, case: Case, x: Mapping[str, Any]) -> Tensors:
    blocks = {name: STAGES[stage].call(subject, case, x)["out"] for name, stage in COMPRESSED.items()}
    return STAGES["nsa_attention"].call(subject, case, {**x, **blocks})


COMPRESSED = {"k_cmp": "compress_keys", "v_cmp": "compress_values"}
TOKENS = ("k_slc", "v_slc", "k_win", "v_win")
WHOLE = replace(SHARED, name="whole", inputs=(*SHARED.inputs, *TOKENS), call=_from_tokens, own_keys=True)
"""Compression, selection and every branch; from keys of their own where an implementation has such."""


def each(*subjects: str) -> Callable[[Any], Any]:
    """A test for each subject; the interpreter is spared those that are made of the others, as one test shows."""
    parametrized = pytest.mark.parametrize("subject", subjects)
    spared = pytest.mark.sparing(subject=[name for name in subjects if name not in ("nsa_attention", WHOLE.name)])
    return lambda test: spared(parametrized(test))


each_attention = each(*ATTENTION)
each_query_subject = each(*ATTENTION, SELECTION.name)
each_subject = each(*EVERY)
each_subject_and_the_whole = each(*EVERY, WHOLE.name)

whole_cases = partial(cases, partial=False)
packed_cases = partial(cases, packed=True)
unpacked_cases = partial(cases, packed=False)


def tensors_of(impl: Implementation, case: Case) -> Tensors:
    return draw(case, impl.widest)


def results(
    impl: Implementation, subject: str, case: Case, tensors: Mapping[str, Any], cotangent: Tensor | None = None
) -> dict[str, Tensor]:
    """All that a subject gives, gradients included where there are any."""
    return dict(_stage(impl, subject).results(impl, case, _given(subject, tensors), cotangent=cotangent))


def outputs(impl: Implementation, subject: str, case: Case, tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a subject gives, without gradients."""
    return _stage(impl, subject).run(impl, case, _given(subject, tensors))


def _stage(impl: Implementation, subject: str) -> StageSpec:
    return EVERY[subject] if subject != WHOLE.name else WHOLE if impl.own_keys else SHARED


def _given(subject: str, tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """The whole makes its selection itself."""
    return {**tensors, "indices": None} if subject == WHOLE.name else tensors


def assert_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], case: Case, what: str) -> None:
    """Equal but for rounding, which both have; a logit is a sum over `Dk`, its gradient one over `Dv`, and a compressed
    block one over all that is in the block."""
    reduction = case.num_queries * case.group + case.num_keys + case.key_dim + case.value_dim
    if actual.keys() & {"gradient of k_position", "gradient of v_position"}:
        reduction += case.config.compress_block_size * max(case.key_dim, case.value_dim)
    for name, x in actual.items():
        if x.is_floating_point():
            wanted = expected[name].double()
            assert_matches(x, wanted, what=f"{name}, {what}", reduction=reduction, logit=case.logit)
        else:
            assert_equal(x, expected[name], what=f"{name}, {what}")


def assert_identical(impl: Implementation, actual: Tensor, expected: Tensor, case: Case, what: str) -> None:
    """Equal to the bit, where an implementation says that the same inputs give the same bits."""
    if impl.deterministic:
        assert_equal(actual, expected, what=what)
    else:
        assert_same({what: actual}, {what: expected}, case, "but for the order of sums")


def kind_of(name: str, subject: str = "") -> str:
    """Along what a tensor of a stage is laid out: `queries`, `keys` or `blocks`, or none of them: `parameter`."""
    name = name.removeprefix("gradient of ")
    if name == "out" and subject.startswith("compress_"):
        return "blocks"
    if name in ("q", "gates", "lse", "indices", "out"):
        return "queries"
    if name.endswith("_cmp"):
        return "blocks"
    return "keys" if name in ("k", "v") or name.endswith(("_slc", "_win")) else "parameter"


# 1. What is elsewhere changes nothing, and gets no gradient from here: not a bit, since only the values differ.


@dataclass(frozen=True)
class Region:
    """A part of a case: a row of the batch, a KV head, a sequence, or all up to a position."""

    row: int | None = None
    head: int | None = None
    sequence: int | None = None
    position: int | None = None

    def mask(self, case: Case, kind: str, x: Tensor) -> Tensor:
        """True inside the region, of the shape of `x`; whatever has no tokens is everywhere, but for its heads."""
        inside = torch.ones_like(x, dtype=torch.bool)
        if self.head is not None:
            dim = 0 if kind == "parameter" else 2
            inside &= along(torch.arange(x.shape[dim]) * case.kv_heads // x.shape[dim] == self.head, dim, x)
        if kind != "parameter":
            sequence, position = whereabouts(case)[kind]
            if self.row is not None:
                inside &= along(torch.arange(x.shape[0]) == self.row, 0, x)
            if self.sequence is not None:
                inside &= along(sequence == self.sequence, 1, x)
            if self.position is not None:
                inside &= along(position <= self.position, 1, x)
        return inside


def along(values: Tensor, dim: int, x: Tensor) -> Tensor:
    """A vector along one dimension of `x`."""
    return values.view([-1 if i == dim else 1 for i in range(x.dim())])


def whereabouts(case: Case) -> dict[str, tuple[Tensor, Tensor]]:
    """Sequence and position of every query, key and compressed block, whose position is that of its last token."""
    rows: dict[str, list[Tensor]] = {"queries": [], "keys": [], "blocks": []}
    for number, part in enumerate(oracle.sequences(case.config, case.num_queries, case.num_keys, **case.cu_seqlens)):
        block = torch.arange(part.blocks.stop - part.blocks.start)
        positions = {
            "queries": part.positions,
            "keys": torch.arange(part.keys.stop - part.keys.start),
            "blocks": block * case.config.compress_stride + case.config.compress_block_size - 1,
        }
        for kind, x in positions.items():
            rows[kind].append(torch.stack([torch.full_like(x, number), x]))
    # Packed sequences leave room for more blocks, which belong to nobody.
    left = case.config.num_compressed(case.num_keys) - sum(x.shape[1] for x in rows["blocks"])
    rows["blocks"].append(torch.full((2, left), -1))
    return {kind: tuple(torch.cat(parts, 1)) for kind, parts in rows.items()}


def assert_unreached(impl: Implementation, subject: str, case: Case, region: Region) -> None:
    """Fail unless what a stage gives inside a region is the same whatever is outside, which gets no gradients."""

    def inside(name: str, x: Tensor) -> Tensor:
        return region.mask(case, kind_of(name, subject), x)

    mine, others = tensors_of(impl, case), tensors_of(impl, replace(case, id=f"{case.id}, others"))
    mixed = {name: x.where(inside(name, x), others[name]) for name, x in mine.items()}
    cotangent = None
    if subject != SELECTION.name:
        out = outputs(impl, subject, case, mine)["out"]
        cotangent = torch.randn_like(out) * inside("out", out)
    expected = results(impl, subject, case, mine, cotangent)
    for name, x in results(impl, subject, case, mixed, cotangent).items():
        mask = inside(name, x)
        assert_identical(impl, x.where(mask, 0), expected[name].where(mask, 0), case, f"{name} inside {region}")
        if name.startswith("gradient"):
            assert_equal(x.where(~mask, 0), torch.zeros_like(x), what=f"{name} outside {region}")


@each_subject_and_the_whole
@for_all(case=cases, position=lambda impl: st.integers(0, 40))
def test_the_future_changes_nothing(impl: Implementation, subject: str, case: Case, position: int) -> None:
    assert_unreached(impl, subject, case, Region(position=position))


@each_subject_and_the_whole
@for_all({"case": BY_ID["packed_last_queries"], "number": 4}, case=packed_cases, number=lambda impl: st.integers(0, 3))
def test_sequences_do_not_mix(impl: Implementation, subject: str, case: Case, number: int) -> None:
    assert_unreached(impl, subject, case, Region(sequence=number % len(case.lengths)))


@each_subject_and_the_whole
@for_all(case=partial(unpacked_cases, batch=2), row=lambda impl: st.integers(0, 1))
def test_batch_rows_do_not_mix(impl: Implementation, subject: str, case: Case, row: int) -> None:
    assert_unreached(impl, subject, case, Region(row=row))


@each_subject_and_the_whole
@for_all(case=partial(cases, kv_heads=2), head=lambda impl: st.integers(0, 1))
def test_kv_heads_do_not_mix(impl: Implementation, subject: str, case: Case, head: int) -> None:
    assert_unreached(impl, subject, case, Region(head=head))


# 2. Packed sequences are sequences, and queries their last tokens.

PARTS = {
    "compressed_attention": ("queries", "blocks", "blocks"),
    "select_blocks": ("queries", "blocks", "queries"),
    "selected_attention": ("queries", "keys", "keys", "queries"),
    "sliding_window_attention": ("queries", "keys", "keys"),
    "nsa_attention": ("queries", "blocks", "blocks", "keys", "keys", "keys", "keys", "queries"),
}
"""Along what each tensor argument of a stage is cut."""


def separately(impl: Implementation, case: Case) -> Implementation:
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
        parts = [impl.function("compress")(x[:, part.keys], params, config) for part in sequences if part.keys.stop]
        blocks = torch.cat(parts, 1)
        return pad(blocks, (0, 0, 0, 0, 0, config.num_compressed(x.shape[1]) - blocks.shape[1]))

    calls: dict[str, Any] = {"compress": compress, **{name: cut(name) for name in PARTS}}
    return replace(impl, **{name: call for name, call in calls.items() if impl.has(name)})


@each_subject
@for_all({"case": BY_ID["packed"]}, {"case": BY_ID["packed_last_queries"]}, case=packed_cases)
def test_packed_equals_separate(impl: Implementation, subject: str, case: Case) -> None:
    x = tensors_of(impl, case)
    expected = results(separately(impl, case), subject, case, x)
    assert_same(results(impl, subject, case, x), expected, case, "packed against separate")


@each_query_subject
@for_all(case=whole_cases, count=lambda impl: st.integers(1, 40))
def test_last_queries_equal_the_end_of_the_whole(impl: Implementation, subject: str, case: Case, count: int) -> None:
    ended = replace(case, lengths=tuple((min(keys, count), keys) for _, keys in case.lengths))
    remaining = torch.tensor([keys for _, keys in case.lengths])[whereabouts(case)["queries"][0]]
    kept = (whereabouts(case)["queries"][1] >= remaining - count).nonzero().flatten()

    def end(x: Mapping[str, Tensor]) -> Tensors:
        return {name: t.index_select(1, kept) if kind_of(name) == "queries" else t for name, t in x.items()}

    x = tensors_of(impl, case)
    cotangent = torch.randn(*x["q"].shape[:3], case.value_dim, dtype=x["q"].dtype)
    last = results(impl, subject, ended, end(x), cotangent.index_select(1, kept))
    cotangent -= cotangent.index_fill(1, kept, 0)
    assert_same(last, end(results(impl, subject, case, x, cotangent)), ended, f"last {count} queries")


# 3. Indices are a set.


@for_all({"case": BY_ID["scrambled_last_queries"], "place": 3}, case=cases, place=lambda impl: st.integers(0, 5))
def test_order_and_number_of_slots_do_not_matter(impl: Implementation, case: Case, place: int) -> None:
    x = tensors_of(impl, replace(case, scrambled=False))
    own = (case.positions // case.config.select_block_size).int()[:, None, None]
    blocks = torch.tensor(case.config.num_selectable(case.num_keys))
    # Nothing, and blocks beyond the query, which is nothing too.
    empty = torch.full_like(x["indices"][..., :1], -1)
    beyond = [(own + ahead).where(own + ahead < blocks, -1).expand_as(empty) for ahead in (1, 2)]
    slots = torch.cat([x["indices"], *beyond, empty], -1)
    slots = slots.gather(-1, torch.rand(slots.shape).argsort(-1)).roll(place, -1).int()
    expected = results(impl, "selected_attention", case, x)
    shuffled = results(impl, "selected_attention", case, {**x, "indices": slots})
    assert_same(shuffled, expected, case, "of slots in another order")


# 4. Limits in which a branch becomes something known.


def everything(impl: Implementation, case: Case) -> Case:
    """The case with room for all blocks in the selection and for all tokens in the window."""
    blocks = case.config.num_selectable(case.num_keys)
    most = replace(case.config, num_selected_blocks=max(blocks, case.config.num_selected_blocks))
    return replace(case, config=replace(most, window_size=case.num_keys))


@for_all(case=cases)
def test_all_blocks_selected_is_dense_attention(impl: Implementation, case: Case) -> None:
    case = everything(impl, case)
    x = tensors_of(impl, case)
    x["indices"] = select_blocks(impl, case, x)
    expected = results(impl, "sliding_window_attention", case, x)
    assert_same(results(impl, "selected_attention", case, x), expected, case, "all blocks against dense")


@for_all(case=unpacked_cases, more=lambda impl: st.integers(0, 1000))
def test_a_window_over_everything_is_dense_attention(impl: Implementation, case: Case, more: int) -> None:
    case = replace(case, config=replace(case.config, window_size=case.num_keys + more))
    x = tensors_of(impl, case)

    def dense(q: Tensor, k: Tensor, v: Tensor, config: Any, scale: float | None) -> Tensor:
        mask = torch.ones(case.num_queries, case.num_keys, dtype=torch.bool).tril(case.num_keys - case.num_queries)
        q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
        out = scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)
        return out.transpose(1, 2).to(x["q"].dtype)

    expected = results(replace(impl, sliding_window_attention=dense), "sliding_window_attention", case, x)
    assert_same(results(impl, "sliding_window_attention", case, x), expected, case, "window against dense")


@for_all(
    case=partial(
        cases, relation="l = d", partial=False, settings={"compression": "mean", "window": 1000, "selected": 8}
    )
)
def test_keys_constant_in_blocks_lose_nothing_by_compression(impl: Implementation, case: Case) -> None:
    size, (_, position) = case.config.compress_block_size, whereabouts(case)["keys"]
    x = tensors_of(impl, case)
    first = torch.arange(case.num_keys) - position % size
    x["k"] = x["k"][:, first]
    x["k_cmp"], x["v_cmp"] = (outputs(impl, f"compress_{kind}", case, x)["out"] for kind in ("keys", "values"))
    branches = ("compressed_attention", "sliding_window_attention")
    compressed, dense = (outputs(impl, name, case, x)["out"] for name in branches)
    ends = position % size == size - 1
    assert_same({"out": compressed[:, ends]}, {"out": dense[:, ends]}, case, "compressed against dense")


# 5. Values and gates enter linearly, logits up to a constant.


@each_attention
@for_all(case=cases)
def test_output_is_linear_in_the_values(impl: Implementation, subject: str, case: Case) -> None:
    x, y = (tensors_of(impl, replace(case, id=name)) for name in (case.id, f"{case.id}, others"))
    values = ("v", "v_cmp", "v_slc", "v_win")
    # Powers of two, so that the sum alone is rounded.
    summed = {**x, **{name: 2 * x[name] - 0.5 * y[name] for name in values}}
    first, second, both = (
        outputs(impl, subject, case, t)["out"] for t in (x, {**x, **{name: y[name] for name in values}}, summed)
    )
    assert_same({"out": both}, {"out": 2 * first - 0.5 * second}, case, "of a sum of values")


@each_attention
@for_all(case=cases)
def test_equal_values_come_out_as_they_are(impl: Implementation, subject: str, case: Case) -> None:
    x = tensors_of(impl, case)
    x |= {name: torch.ones_like(x[name]) for name in ("v", "v_cmp", "v_slc", "v_win")}
    seen = {name: torch.ones_like(x["lse"]) for name in ATTENTION}
    seen["compressed_attention"] = x["lse"].isfinite().to(x["lse"])
    branches = torch.stack([seen[name] for name in ATTENTION[:3]], -1)
    seen["nsa_attention"] = (x["gates"] * branches).sum(-1)
    expected = seen[subject].unsqueeze(-1).expand(-1, -1, -1, case.value_dim)
    assert_same({"out": outputs(impl, subject, case, x)["out"]}, {"out": expected}, case, "of values of one")


@each_query_subject
@for_all(case=cases)
def test_a_constant_added_to_all_logits_of_a_query_changes_nothing(
    impl: Implementation, subject: str, case: Case
) -> None:
    x = tensors_of(impl, case)
    # A dimension in which all keys agree adds as much to every logit.
    for name in ("k", "k_cmp", "k_slc", "k_win"):
        x[name][..., -1] = 1
    x = with_selection(case, x)
    shifted = {**x, "q": x["q"].clone()}
    shifted["q"][..., -1] += 4 * torch.randn_like(x["q"][..., -1])
    shifted["lse"] = with_selection(case, shifted)["lse"]
    actual = outputs(impl, subject, case, shifted)
    if subject == SELECTION.name:
        scores = importance(case, x)
        assert_selection_matches(actual["indices"], x["indices"], scores, case.config, x["q"].dtype, **case.selection)
    else:
        assert_same({"out": actual["out"]}, outputs(impl, subject, case, x), case, "of shifted logits")


@each_query_subject
@for_all(case=cases, exponent=lambda impl: st.integers(-3, 3 if impl.widest == torch.float64 else 1))
def test_scaling_logits_is_scaling_queries(impl: Implementation, subject: str, case: Case, exponent: int) -> None:
    # A power of two: to the bit, unless probabilities are so small that they lose some.
    factor, scale = 2.0**exponent, case.scale or case.key_dim**-0.5
    x = tensors_of(impl, case)
    scaled = replace(case, scale=scale * factor)
    x["lse"] = with_selection(scaled, x)["lse"]
    expected = results(impl, subject, replace(case, scale=scale), {**x, "q": factor * x["q"]})
    for name, actual in results(impl, subject, scaled, x).items():
        wanted = factor * expected[name] if name == "gradient of q" else expected[name]
        assert_identical(impl, actual, wanted, scaled, f"{name} of logits times {factor}")


def gated(impl: Implementation) -> Implementation:
    """The implementation's branches, weighed and added up in plain PyTorch."""

    def nsa_attention(
        q: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_slc: Tensor, v_slc: Tensor, k_win: Tensor, v_win: Tensor,
        gates: Tensor, config: Any, *, indices: Tensor, **rest: Any,
    ) -> Tensor:  # fmt: skip
        compressed, _ = impl.function("compressed_attention")(q, k_cmp, v_cmp, config, num_keys=k_slc.shape[1], **rest)
        selected = impl.function("selected_attention")(q, k_slc, v_slc, indices, config, **rest)
        window = impl.function("sliding_window_attention")(q, k_win, v_win, config, **rest)
        return (gates.unsqueeze(-2) * torch.stack([compressed, selected, window], -1)).sum(-1)

    return replace(impl, nsa_attention=nsa_attention)


BRANCHES = ("compressed", "selected", "window")


@for_all(case=cases, gates=lambda impl: st.sampled_from(["any", "open", "closed", *BRANCHES]))
def test_output_is_the_gated_sum_of_the_branches(impl: Implementation, case: Case, gates: str) -> None:
    x = tensors_of(impl, case)
    # "any": of either sign, and not only what a sigmoid gives. Otherwise one is 1, or all, or none is.
    chosen = torch.tensor([gates in ("open", branch) for branch in BRANCHES]).expand_as(x["gates"]).to(x["gates"])
    x["gates"] = torch.randn_like(x["gates"]) if gates == "any" else chosen
    actual = results(impl, "nsa_attention", case, x)
    assert_same(actual, results(gated(impl), "nsa_attention", case, x), case, f"gates: {gates}")


# 6. Heads of a group share their keys, values and blocks.


@each_attention
@for_all(case=cases)
def test_groups_share_their_kv_head(impl: Implementation, subject: str, case: Case) -> None:
    single = replace(case, group=1, kv_heads=case.kv_heads * case.group)
    x = tensors_of(impl, case)
    shared = [name for name in x if kind_of(name) in ("keys", "blocks") or name == "indices"]
    repeated = {name: x[name].repeat_interleave(case.group, 2) for name in shared}
    expected = results(impl, subject, single, {**x, **repeated})
    for name in expected:
        if name.removeprefix("gradient of ") in shared:
            expected[name] = expected[name].unflatten(2, (case.kv_heads, case.group)).sum(3)
    assert_same(results(impl, subject, case, x), expected, case, "of heads that share against heads of their own")


# 7. Importance and selection.


def spread(case: Case, x: Mapping[str, Tensor]) -> Tensor:
    """Importance `[B, Tq, Hk, S]` by another road, for one sequence.

    Each compressed block gives its probability over `d` to each of its tokens, each token what it got to its block.
    """
    size, scale = case.config.select_block_size, case.key_dim**-0.5 if case.scale is None else case.scale
    logits = torch.einsum("bthd,bchd->bthc", x["q"].double(), x["k_cmp"].double().repeat_interleave(case.group, 2))
    start = torch.arange(x["k_cmp"].shape[1]) * case.config.compress_stride
    stop = start + case.config.compress_block_size
    hidden = stop > case.positions[:, None, None] + 1
    p = (scale * logits).masked_fill(hidden, -math.inf).softmax(-1).masked_fill(hidden, 0)
    token = torch.arange(case.num_keys)
    member = (token >= start[:, None]) & (token < stop[:, None])
    given = p.unflatten(2, (case.kv_heads, case.group)).sum(3) @ (member.double() / case.config.compress_stride)
    return pad(given, (0, -case.num_keys % size)).unflatten(-1, (-1, size)).sum(-1)


def of_each_relation(impl: Implementation) -> SearchStrategy[Case]:
    return st.sampled_from(relations(impl)).flatmap(lambda relation: unpacked_cases(impl, relation=relation))


@for_all(case=of_each_relation)
def test_importance_is_probability_shared_out_among_tokens(case: Case) -> None:
    x = draw(case)
    assert_matches(importance(case, x), spread(case, x), what="importance")
    # What a query has to give is what its heads' probabilities are, times the tokens of a block over the stride.
    total = case.group * case.config.compress_block_size / case.config.compress_stride
    sees = (case.positions >= case.config.compress_block_size - 1)[:, None].expand(x["indices"].shape[:3])
    assert_matches(importance(case, x).sum(-1), total * sees.double(), what="sum of a query's importance")


@for_all(case=of_each_relation)
def test_the_most_important_blocks_are_selected(impl: Implementation, case: Case) -> None:
    x = tensors_of(impl, case)
    indices = select_blocks(impl, case, x)
    assert_selection_matches(indices, x["indices"], spread(case, x), case.config, x["q"].dtype, **case.selection)


@for_all(case=cases)
def test_a_larger_selection_contains_the_smaller(impl: Implementation, case: Case) -> None:
    larger = replace(case, config=replace(case.config, num_selected_blocks=case.config.num_selected_blocks + 1))
    x = tensors_of(impl, case)
    few, more = (select_blocks(impl, c, x) for c in (case, larger))
    kept = (few[..., None] == more[..., None, :]).any(-1)
    assert_equal(kept, torch.ones_like(kept), what="whether a block stays selected where there is room for more")
    candidates = (case.positions // case.config.select_block_size + 1)[:, None].expand(few.shape[:3])
    count = candidates.clamp(max=larger.config.num_selected_blocks)
    assert_equal((more >= 0).sum(-1), count, what="number of blocks")


@for_all(case=partial(cases, relation="l = d = l'", scale=0.0))
def test_ties_go_to_the_lower_index(impl: Implementation, case: Case) -> None:
    """Keys are of three kinds that every query ranks alike; blocks of one kind are equal to the bit."""
    c, x = case.config, tensors_of(impl, case)
    # Powers of two and small integers: logits are exact in any order of summation, and no probability underflows.
    case = replace(case, scale=2.0 ** -math.ceil(math.log2(8 * case.key_dim)))
    x["q"] = x["q"].abs().round() + 1
    rank = torch.randint(3, x["k_cmp"].shape[1:3])
    x["k_cmp"] = rank[None, :, :, None].expand_as(x["k_cmp"]).to(x["q"])
    x = with_selection(case, x)
    expected = torch.full_like(x["indices"], -1)
    for part in oracle.sequences(c, case.num_queries, case.num_keys, **case.cu_seqlens):
        for query, position in zip(range(part.queries.start, part.queries.stop), part.positions.tolist(), strict=True):
            own = position // c.select_block_size
            for head in range(case.kv_heads):
                ranks = rank[part.blocks, head].tolist()

                def order(block: int, own: int = own, position: int = position, ranks: list[int] = ranks) -> tuple:
                    forced = block < c.num_initial_blocks or block > own - c.num_local_blocks
                    seen = (block + 1) * c.select_block_size <= position + 1
                    return not forced, -ranks[block] - 1 if seen else 0, block

                best = sorted(sorted(range(own + 1), key=order)[: c.num_selected_blocks])
                expected[:, query, head, : len(best)] = torch.tensor(best, dtype=torch.int32)
    assert_selected(case, x, select_blocks(impl, case, x), expected, what="indices under ties")
