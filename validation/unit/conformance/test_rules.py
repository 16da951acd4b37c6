"""The rules of Native Sparse Attention by name, one a test: they come first, and say in words what is wrong.

Values are rows of an identity matrix, so that an output is the weights of the tokens behind it: what a query sees is
read off, and no arithmetic but the softmax takes part.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ... import oracle
from ...cases import BY_ID, Case, config, draw, fitted, pooled, require, whole, with_selection
from ...implementations import Implementation
from ...numerics import assert_equal, assert_matches
from ...stages import STAGES, select_blocks

pytestmark = [pytest.mark.usefixtures("on_device"), pytest.mark.claim("rules")]

PLAIN = Case("rules", whole(29), config(selected=4, window=5), group=2, key_dim=4)
CASES = (PLAIN, pooled("rules_pooled", whole(29), 5))
WINDOW, SELECTED, COMPRESSED = "sliding_window_attention", "selected_attention", "compressed_attention"


def seen(impl: Implementation, stage: str, case: Case) -> tuple[Tensor, Tensor, Case]:
    """Which keys or blocks each query sees, `[B, Tq, Hq, number]`, by an implementation and by the oracle."""
    tensors = draw(case, impl.widest)
    values = "v_cmp" if stage == COMPRESSED else "v"
    width, count = case.value_dim, tensors[values].shape[1]
    weights: list[list[Tensor]] = [[], []]
    # As many values at a time as a row has room for.
    for first in range(0, max(count, 1), width):
        identity = torch.zeros(count, width)
        rows = torch.arange(first, min(count, first + width))
        identity[rows, rows - first] = 1
        x = {**tensors, values: identity[None, :, None].expand_as(tensors[values]).to(impl.widest).contiguous()}
        for found, subject in zip(weights, (impl, oracle), strict=True):
            found.append(STAGES[stage].run(subject, case, x)["out"][..., : len(rows)])
    got, expected = (torch.cat(found, -1) != 0 for found in weights)
    return got, expected, case


def assert_seen(got: Tensor, expected: Tensor, rule: str, unit: str) -> None:
    """Fail unless every query sees what it must, and say which the first that does not sees instead."""
    __tracebackhide__ = True
    wrong = (got != expected.to(got.device)).any(-1)
    if wrong.any():
        b, t, h = (int(i) for i in wrong.nonzero()[0])
        have, want = (x[b, t, h].nonzero().flatten().tolist() for x in (got, expected))
        raise AssertionError(
            f"{rule}: query {t} (batch {b}, head {h}) sees {unit} {have}, must see {want}; "
            f"{int(wrong.sum())} of {wrong.numel()} queries and heads are wrong"
        )


def test_the_window_is_the_last_w_tokens_with_the_own_one(impl: Implementation) -> None:
    got, expected, case = seen(impl, WINDOW, fitted(impl, *CASES, stages=(WINDOW,)))
    assert_seen(got, expected, f"the window is exactly w = {case.config.window_size} tokens, t - w < s <= t", "tokens")


def test_block_i_is_first_seen_at_t_equal_to_i_d_plus_l_minus_1(impl: Implementation) -> None:
    got, expected, case = seen(impl, COMPRESSED, fitted(impl, *CASES, stages=(COMPRESSED,)))
    sizes = f"l = {case.config.compress_block_size}, d = {case.config.compress_stride}"
    assert_seen(got, expected, f"block i is first seen at t = i d + l - 1 ({sizes})", "blocks")


def test_selected_blocks_are_seen_up_to_the_own_token(impl: Implementation) -> None:
    got, expected, case = seen(impl, SELECTED, fitted(impl, *CASES, stages=(SELECTED,)))
    rule = f"a query sees the tokens s <= t of its selected blocks (l' = {case.config.select_block_size})"
    assert_seen(got, expected, rule, "tokens")


@pytest.mark.parametrize("stage", [WINDOW, SELECTED, COMPRESSED])
def test_queries_are_the_last_tokens_of_the_keys(impl: Implementation, stage: str) -> None:
    last = [replace(case, id=f"{case.id}_last", lengths=((5, 29),)) for case in CASES]
    case = fitted(impl, *last, stages=(stage,))
    require(impl, case, (stage,), impl.widest)
    got, expected, _ = seen(impl, stage, case)
    assert_seen(got, expected, "Tq queries are the last Tq of the Tk tokens", "tokens or blocks")


@pytest.mark.parametrize("stage", [WINDOW, SELECTED, COMPRESSED])
def test_sequences_of_a_pack_do_not_see_one_another(impl: Implementation, stage: str) -> None:
    case = fitted(
        impl, replace(PLAIN, lengths=whole(13, 16)), pooled("rules_packed", whole(13, 16), 4), stages=(stage,)
    )
    require(impl, case, (stage,), impl.widest)
    got, expected, _ = seen(impl, stage, case)
    assert_seen(got, expected, "no query sees anything of another sequence", "tokens or blocks")


@pytest.mark.parametrize("stage", [WINDOW, SELECTED, COMPRESSED])
def test_query_head_h_reads_kv_head_h_over_g(impl: Implementation, stage: str) -> None:
    case = fitted(impl, PLAIN, pooled("rules_heads", whole(29), 5, kv_heads=2), stages=(stage,))
    tensors = draw(case, impl.widest)
    values = "v_cmp" if stage == COMPRESSED else "v"
    number = torch.arange(case.kv_heads, dtype=impl.widest)[None, None, :, None]
    out = STAGES[stage].run(impl, case, {**tensors, values: number.expand_as(tensors[values]).contiguous()})["out"]
    # Where it sees anything at all, a mean of equal numbers is the number: the last query does.
    heads = out[0, -1, :, 0].round().int().tolist()
    assert heads == [h // case.group for h in range(len(heads))], (
        f"query head h reads KV head h // G (G = {case.group}): the heads read are {heads}"
    )


@pytest.mark.parametrize("stage", [WINDOW, SELECTED, COMPRESSED])
def test_the_scale_given_is_the_scale(impl: Implementation, stage: str) -> None:
    case = replace(fitted(impl, *CASES, stages=(stage,)), scale=0.25)
    tensors = draw(case, impl.widest)
    doubled = replace(case, scale=0.5)
    out, same = (
        STAGES[stage].run(impl, c, {**tensors, "q": q})["out"]
        for c, q in ((case, 2 * tensors["q"]), (doubled, tensors["q"]))
    )
    assert_matches(out, same.double(), what="twice the queries against twice the scale", reduction=case.num_keys)
    halved = STAGES[stage].run(impl, case, tensors)["out"]
    assert not torch.equal(halved, same), "the output does not depend on the scale that is given"


def test_gates_are_those_of_compressed_selected_window(impl: Implementation) -> None:
    case = fitted(impl, BY_ID["small"], BY_ID["pooled"], stages=STAGES["nsa_attention"].functions)
    tensors = draw(case, impl.widest)
    for i, branch in enumerate(("compressed", "selected", "window")):
        gates = torch.zeros_like(tensors["gates"])
        gates[..., i] = 1
        outs = [
            STAGES["nsa_attention"].run(subject, case, {**tensors, "gates": gates})["out"] for subject in (impl, oracle)
        ]
        assert_matches(outs[0], outs[1].double(), what=f"output where gate {i} alone is 1, the {branch} branch")


def test_forced_blocks_are_selected(impl: Implementation) -> None:
    case = fitted(impl, BY_ID["many_blocks"], BY_ID["pooled_many_blocks"], stages=("select_blocks",))
    indices = select_blocks(impl, case, draw(case, impl.widest))
    own = case.positions // case.config.select_block_size
    for t, last in enumerate(own.tolist()):
        initial, local = case.config.num_initial_blocks, case.config.num_local_blocks
        forced = {j for j in range(last + 1) if j < initial or j > last - local}
        for row in indices[:, t].flatten(0, 1).tolist():
            assert forced <= set(row), (
                f"the first {initial} and the last {local} blocks are always selected: query {t} needs "
                f"{sorted(forced)}, has {row}"
            )


def test_a_block_is_worth_the_tokens_it_shares_with_compressed_blocks(impl: Implementation) -> None:
    """One compressed block has all of the probability: the blocks that it overlaps are the ones taken, and no other."""
    case = Case("rules_overlap", ((1, 61),), config((4, 2, 8), 3, num_initial_blocks=0, num_local_blocks=1), kv_heads=1)
    case = fitted(impl, case, pooled("rules_overlap_pooled", ((1, 61),), 4), stages=("select_blocks",))
    tensors, c = draw(case, impl.widest), case.config
    tensors["q"] = torch.ones_like(tensors["q"])
    for block in range(1, tensors["k_cmp"].shape[1] - 1):
        keys = torch.zeros_like(tensors["k_cmp"])
        keys[:, block] = 50.0
        x = with_selection(case, {**tensors, "k_cmp": keys})
        shares = oracle.overlap(keys.shape[1], c.num_selectable(case.num_keys), c)[block]
        most = int(shares.argmax())
        for row in select_blocks(impl, case, x)[0, 0].tolist():
            assert most in row, (
                f"importance is the overlap with compressed blocks: block {block}, which begins at token "
                f"{block * c.compress_stride}, has {c.compress_block_size} tokens, most of them in selection block "
                f"{most}; selected are {row}"
            )


def test_a_query_that_sees_no_block_has_no_output(impl: Implementation) -> None:
    case = fitted(impl, *CASES, stages=(COMPRESSED,))
    results = STAGES[COMPRESSED].run(impl, case, draw(case, impl.widest))
    blind = results["out"][:, : case.config.compress_block_size - 1]
    assert_equal(blind, torch.zeros_like(blind), what="output of queries before the first block is complete")
    lse = results["lse"][:, : case.config.compress_block_size - 1]
    assert_equal(
        lse, torch.full_like(lse, -torch.inf), what="log-sum-exp of queries before the first block is complete"
    )
