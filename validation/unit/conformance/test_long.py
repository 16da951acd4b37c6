"""The longest sequence that an implementation says it has room for, and offsets that need 64 bits.

`longest` is declared, 16k tokens or more where there is room. Large batches take a GPU with room for more than 2**31
elements, and an implementation that has room for a sequence of 8k tokens.
"""

from dataclasses import replace

import pytest

from ...cases import Case, config, fitted, pooled, require, whole
from ...implementations import Implementation
from ...numerics import assert_equal
from ...sampled import assert_sampled_match, assert_selection_sampled, draw_long, sample
from ...stages import STAGES, StageSpec

pytestmark = pytest.mark.usefixtures("on_device")

ATTENTION = [stage for name, stage in STAGES.items() if not name.startswith("compress_")]
each_stage = pytest.mark.parametrize("stage", ATTENTION, ids=lambda stage: stage.name)
SAMPLES = 24
"""Queries at which a sequence is compared."""
ROW = 8192
"""Tokens of a row of a large batch."""


def longest(impl: Implementation, stages: tuple[str, ...]) -> Case:
    """A case of one sequence of `longest` tokens."""
    least = pooled("pooled_long", whole(38), 6)
    long = fitted(impl, Case("long", whole(37), config(selected=6), kv_heads=1, group=1), least, stages=stages)
    long = replace(long, lengths=whole(impl.longest))
    require(impl, long, stages, impl.widest)
    return long


@pytest.mark.sparing
@pytest.mark.claim("forward", "gradients")
@each_stage
def test_a_long_sequence_matches_the_oracle(impl: Implementation, stage: StageSpec) -> None:
    case = longest(impl, ("compressed_attention", "select_blocks", *stage.functions))
    require(impl, case, stage.functions, impl.widest, own_keys=stage.own_keys)
    assert_sampled_match(impl, stage, case, impl.widest, sample(case, SAMPLES))


@pytest.mark.sparing
@pytest.mark.claim("selection")
def test_the_selection_of_a_long_sequence_is_the_oracle_s(impl: Implementation) -> None:
    case = longest(impl, ("compressed_attention", "select_blocks"))
    assert_selection_sampled(impl, case, impl.widest, sample(case, SAMPLES))


@pytest.mark.needs_gpu(1, gib=120)
@each_stage
def test_the_last_row_beyond_32_bits_is_what_it_is_as_the_first(impl: Implementation, stage: StageSpec) -> None:
    """Rows change places rather than be run alone: how a sum is shared out may depend on the number of rows."""
    stages = ("compressed_attention", "select_blocks", *stage.functions)
    case = replace(longest(impl, stages), lengths=whole(ROW))
    if impl.longest < ROW or not impl.deterministic:
        pytest.skip(f"{impl.name} lacks room for batches of {ROW} tokens, or the same bits again")
    require(impl, case, stage.functions, impl.widest, own_keys=stage.own_keys)
    dtype, heads = min(impl.dtypes, key=lambda dtype: dtype.itemsize), max(64, case.kv_heads)
    case = replace(case, kv_heads=heads, batch=-(-(2**31) // (ROW * heads * case.group * case.key_dim)) + 1)
    require(impl, case, stages, dtype)
    tensors = draw_long(impl, case, dtype)
    last = {name: x[-1].clone() for name, x in stage.run(impl, case, tensors).items()}
    # One at a time, for there is not room for all of them twice.
    tensors = {name: x.flip(0) if len(x := tensors.pop(name)) == case.batch else x for name in list(tensors)}
    for name, x in stage.run(impl, case, tensors).items():
        assert_equal(x[0], last[name], what=f"{name} of the row that was last")
