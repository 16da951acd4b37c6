"""Tokens have no influence on queries that do not attend to them, nor those queries on them, whatever they hold.

Padding of real batches is garbage. A key, a value, a query or a gradient that is infinite or no number may spoil what
depends on it. Everything else must be what it is when all is finite, up to rounding: kernels may add up in another
order when they take care. Who depends on whom is read off the oracle, with rows of an identity matrix for values.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nsa import kernels
from nsa.config import NSAConfig

from ... import oracle
from ...cases import BY_ID, Case, Tensors, config, draw, draw_cotangent, require, upcast, whole
from ...implementations import Implementation
from ...numerics import assert_equal, assert_matches
from ...stages import STAGES, StageSpec, select_blocks

pytestmark = [
    pytest.mark.usefixtures("on_device"),
    # NumPy, which Triton's interpreter computes with, warns of what is tried here.
    pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning"),
]

NAMES = ["compressed_attention", "selected_attention", "sliding_window_attention", "nsa_attention"]
CASES = [BY_ID["small"], BY_ID["group_16"], BY_ID["packed_last_queries"]]
if not kernels.INTERPRETED:
    # The shapes that configurations were measured for: tensor descriptors, and loops of their own without masks.
    CASES += [
        Case("by_query", whole(1100), NSAConfig(), kv_heads=1, group=64, key_dim=128, value_dim=128),
        Case("by_tile", whole(1100), NSAConfig(), kv_heads=1, group=16, key_dim=128, value_dim=128),
        Case("by_block", whole(1100), NSAConfig(), group=4, key_dim=128, value_dim=128),
    ]

# Interpreted kernels show nothing more in a narrow dtype, and take long.
NARROW = [False] if kernels.INTERPRETED else [False, True]

each_case = pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES], indirect=True)
each_stage = pytest.mark.parametrize("stage", [STAGES[name] for name in NAMES], ids=NAMES)
each_value = pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["nan", "inf"])


@pytest.fixture(autouse=True)
def _declared(impl: Implementation) -> None:
    if not impl.hidden_values:
        pytest.skip(f"{impl.name} lacks NaN in hidden tokens")


def attended(stage: StageSpec, case: Case, tensors: Tensors, values: str) -> Tensor:
    """Which keys `[B, Tq, Hk, T]` the queries of a KV head attend to in the branch with these `values`."""
    length, heads = tensors[values].shape[1:3]
    width = case.num_keys
    inputs = upcast(tensors)
    for name in stage.inputs:
        if name.startswith("v"):
            inputs[name] = torch.zeros(*inputs[name].shape[:3], width, dtype=torch.float64)
    inputs[values] += torch.eye(length, width, dtype=torch.float64)[:, None]
    out = stage.run(oracle, replace(case, value_dim=width), inputs)["out"]
    return (out[..., :length] != 0).unflatten(2, (heads, -1)).any(3)


def check(
    stage: StageSpec,
    case: Case,
    tensors: Tensors,
    expected: Tensors,
    actual: Tensors,
    queries: Tensor,
    *,
    spoiled: bool,
) -> None:
    """Hold everything but what depends on these `queries [B, Tq, Hk]` to what it is with finite inputs, `tensors`."""
    per_head = queries.repeat_interleave(case.group, 2)
    for name, x in expected.items():
        source = name.removeprefix("gradient of ")
        if source[0] in "kv":
            values = source.replace("k", "v", 1)
            hit = (attended(stage, case, tensors, values) & queries.unsqueeze(-1)).any(1).mT
        else:
            hit = per_head
        what = f"{name} of {stage.name} where nothing that is not finite reaches"
        reduction = max(stage.reduction(case), case.num_queries * case.group)
        dtype = x.dtype if name == "lse" else tensors["q"].dtype
        assert_matches(actual[name][~hit], x[~hit].double(), what=what, reduction=reduction, dtype=dtype)
    if spoiled:
        assert not actual["out"][per_head].isfinite().all(-1).any(), "an output does not show what its query attends to"


@each_value
@each_stage
@each_case
@pytest.mark.sparing(stage=NAMES[:3])
@pytest.mark.parametrize("narrow", NARROW, ids=lambda narrow: "bfloat16" if narrow else "widest")
def test_keys_and_values(impl: Implementation, case: Case, stage: StageSpec, value: float, narrow: bool) -> None:
    dtype = torch.bfloat16 if narrow else impl.widest
    tensors = draw(case, dtype)
    expected = dict(stage.results(impl, case, tensors))
    for keys in (name for name in stage.inputs if name.startswith("k")):
        values = keys.replace("k", "v", 1)
        # One value and a later key, late enough to leave queries that attend to neither.
        places = [(tensors[keys].shape[1] * 3) // 5, (tensors[keys].shape[1] * 4) // 5]
        changed = {**tensors, keys: tensors[keys].clone(), values: tensors[values].clone()}
        changed[values][:, places[0]] = value
        changed[keys][:, places[1]] = value
        queries = attended(stage, case, tensors, values)[..., places].any(-1)
        assert not queries.all(), "every query attends to what is changed: this case shows nothing"
        actual = dict(stage.results(impl, case, changed))
        # An infinite key may as well have no weight at all.
        check(stage, case, tensors, expected, actual, queries, spoiled=value != value)


@each_stage
@each_case
@pytest.mark.parametrize("what", ["query", "gradient"])
def test_queries_and_gradients(impl: Implementation, case: Case, stage: StageSpec, what: str) -> None:
    require(impl, case, stage.functions, impl.widest, backward=what == "gradient")
    tensors = draw(case, impl.widest)
    expected = dict(stage.results(impl, case, tensors))
    place = case.num_queries // 3
    changed, cotangent = {**tensors, "q": tensors["q"].clone()}, draw_cotangent(case, expected["out"], impl.widest)
    (changed["q"] if what == "query" else cotangent)[:, place] = torch.nan
    actual = dict(stage.results(impl, case, changed, cotangent=cotangent))
    queries = torch.zeros(case.batch, case.num_queries, case.kv_heads, dtype=torch.bool)
    queries[:, place] = True
    check(stage, case, tensors, expected, actual, queries, spoiled=False)


@each_case
def test_selection(impl: Implementation, case: Case) -> None:
    tensors = draw(case, impl.widest)
    place = (tensors["k_cmp"].shape[1] * 3) // 5
    changed = {**tensors, "k_cmp": tensors["k_cmp"].clone()}
    changed["k_cmp"][:, place] = torch.nan
    stage = STAGES["compressed_attention"]
    changed["lse"] = stage.run(impl, case, changed)["lse"]
    queries = attended(stage, case, tensors, "v_cmp")[..., place]
    clean = {**tensors, "lse": stage.run(impl, case, tensors)["lse"]}
    assert_equal(
        select_blocks(impl, case, changed)[~queries],
        select_blocks(impl, case, clean)[~queries],
        what="indices of queries that do not attend to the block",
    )


SHORT_FIRST = Case("short_first", whole(2, 17, 5), config(compression="mean"), group=3)


@pytest.mark.parametrize("case", [SHORT_FIRST, BY_ID["packed"]], ids=["mean", "mlp"], indirect=True)
def test_blocks_that_do_not_exist(impl: Implementation, case: Case) -> None:
    """Packed sequences leave room for blocks; what fills it must not reach parameters."""
    tensors = draw(case, impl.widest)
    # No block covers the tokens of the sequences that are shorter than one.
    short = [keys < case.config.compress_block_size for _, keys in case.lengths]
    uncovered = torch.cat([torch.full((keys,), flag) for flag, (_, keys) in zip(short, case.lengths, strict=True)])
    assert uncovered[0], "the first token must belong to no block"
    changed = {**tensors, "k": tensors["k"].masked_fill(uncovered.view(1, -1, 1, 1), torch.nan)}
    stage = STAGES["compress_keys"]
    expected = dict(stage.results(impl, case, tensors))
    for name, x in stage.results(impl, case, changed):
        assert_equal(x, expected[name], what=f"{name} of compression with tokens that no block covers")
