"""The oracle against numbers worked out by hand from the paper: nothing else here checks the oracle."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa.config import NSAConfig
from validation import oracle
from validation.cases import BY_ID, config, cumulative, draw
from validation.numerics import assert_equal, assert_matches

LOG2 = math.log(2.0)
LOG3 = math.log(3.0)


def column(*values: float) -> Tensor:
    """`[1, len(values), 1, 1]`: one batch, one head, one dimension."""
    return torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1)


def chosen(indices: Tensor) -> list[list[int]]:
    """The blocks of every query of the first head."""
    return indices[0, :, 0].tolist()


# 1. Compression.


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (31, 0), (32, 1), (47, 1), (48, 2), (1024, 63)])
def test_number_of_compressed_blocks(tokens: int, blocks: int) -> None:
    assert oracle.num_compressed(tokens, NSAConfig()) == blocks


def test_mean_compression_averages_overlapping_blocks() -> None:
    blocks = oracle.compress(column(1, 3, 5, 7, 9, 11, 100), None, config(compression="mean"))
    assert_matches(blocks, column(4, 8), what="block means")


def test_linear_compression_is_token_major_after_the_position_is_added() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64).view(1, 2, 1, 2)
    params = SimpleNamespace(
        position=torch.tensor([[[10.0, 20.0], [30.0, 40.0]]]),
        weight=torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 100.0], [1000.0, 0.0]]]),
        weight_out=None,
    )
    block = oracle.compress(x, params, config((2, 2, 2), compression="linear"))
    # flattened: 11, 22, 33, 44
    assert_matches(block.flatten(), torch.tensor([44011.0, 3322.0]).double(), what="block")


def test_mlp_compression_is_two_layers_around_silu() -> None:
    params = SimpleNamespace(
        position=torch.tensor([[[1.0], [0.0]]]),
        weight=torch.tensor([[[1.0], [-1.0]]]),
        weight_out=torch.tensor([[[3.0]]]),
    )
    block = oracle.compress(column(LOG3, 1.0), params, config((2, 2, 2)))
    # hidden = log 3 + 1 - 1, and sigmoid(log 3) = 3 / 4
    assert_matches(block, column(3 * LOG3 * 0.75), what="block")


def test_packed_compression_puts_blocks_side_by_side_and_zeros_last() -> None:
    x = column(1, 3, 5, 7, 100, 2, 4, 6, 8)
    blocks = oracle.compress(x, None, config(compression="mean"), cu_seqlens=cumulative((4, 1, 0, 4)))
    assert_matches(blocks, column(4, 5, 0), what="packed blocks")


# 2. Compressed branch.


def test_a_block_is_seen_from_its_last_token_on() -> None:
    out, lse = oracle.compressed_attention(column(*[0] * 7), column(5, 5), column(2, 4), config())
    assert_matches(out, column(0, 0, 0, 2, 2, 3, 3), what="output")
    assert_matches(lse, column(*[-math.inf] * 3, 0, 0, LOG2, LOG2)[..., 0], what="lse")


def test_attention_weights_worked_out_by_hand() -> None:
    # scores log 3 and 0, so weights 3/4 and 1/4
    out, lse = oracle.compressed_attention(
        column(LOG3), column(1, 0), column(8, 16), config((1, 1, 1), window=1), num_keys=2
    )
    assert_matches(out, column(10), what="output")
    assert_matches(lse, column(math.log(4))[..., 0], what="lse")


def test_scale_defaults_to_the_root_of_the_key_dim() -> None:
    q = torch.full((1, 1, 1, 4), LOG3, dtype=torch.float64)
    k = torch.tensor([[0.5] * 4, [0.0] * 4], dtype=torch.float64).view(1, 2, 1, 4)
    # q . k = 2 log 3, halved
    out, _ = oracle.compressed_attention(q, k, column(8, 16), config((1, 1, 1)), num_keys=2)
    assert_matches(out, column(10), what="output")


def test_query_heads_stand_in_groups() -> None:
    v = torch.tensor([3.0, 5.0], dtype=torch.float64).view(1, 1, 2, 1)
    out, _ = oracle.compressed_attention(torch.zeros(1, 1, 4, 1), torch.zeros(1, 1, 2, 1), v, config((1, 1, 1)))
    assert out.flatten().tolist() == [3, 3, 5, 5]


# 3. Importance.


def test_overlap_weights_of_the_paper() -> None:
    weights = oracle.overlap(63, 16, NSAConfig()) / 16
    assert weights[:, 5].nonzero().flatten().tolist() == [19, 20, 21, 22, 23]
    assert weights[19:24, 5].tolist() == [1, 2, 2, 2, 1]
    assert weights[:5, 0].tolist() == [2, 2, 2, 1, 0], "the first block has no block before it"


@pytest.mark.parametrize(
    ("blocks", "weights"),
    [((16, 16, 16), [1]), ((32, 16, 32), [1, 2, 1]), ((4, 2, 8), [1, 2, 2, 2, 1]), ((3, 1, 4), [1, 2, 3, 3, 2, 1])],
)
def test_overlap_weights(blocks: tuple[int, int, int], weights: list[int]) -> None:
    shared = oracle.overlap(40, 8, config(blocks)) / blocks[1]
    assert shared[:, 2][shared[:, 2] > 0].tolist() == weights


def test_importance_sums_probability_times_overlap_over_the_group() -> None:
    q = column(LOG3, 0).transpose(1, 2)  # two query heads: weights 3/4, 1/4 and 1/2, 1/2
    scores = oracle.importance(q, column(1, 0), config(), num_keys=9)
    # blocks 0..3 and 2..5 lie within selection block 0 with weight 2; nothing reaches block 1
    assert_matches(scores.flatten(), torch.tensor([4.0, 0.0]).double(), what="importance")


def test_a_straddling_block_counts_for_both_neighbours() -> None:
    scores = oracle.importance(column(0), column(0, 0, 0, 0), config(), num_keys=10)
    assert_matches(scores.flatten(), torch.tensor([7 / 4, 1 / 4]).double(), what="importance")


# 4. Selection. Blocks (2, 2, 2) make importance the plain probability of a block.

SIMPLE: dict[str, Any] = {"blocks": (2, 2, 2), "window": 2}


def test_forced_blocks_are_taken_whatever_their_importance() -> None:
    c = config(selected=3, num_initial_blocks=1, num_local_blocks=2, **SIMPLE)
    assert chosen(oracle.select_blocks(column(1), column(0, 9, 9, 0, 0), None, c, num_keys=10)) == [[0, 3, 4]]


def test_free_slots_go_to_the_most_important_in_ascending_order() -> None:
    c = config(selected=4, num_initial_blocks=1, num_local_blocks=1, **SIMPLE)
    assert chosen(oracle.select_blocks(column(1), column(0, 7, 1, 9, 8, 0), None, c, num_keys=12)) == [[0, 3, 4, 5]]


def test_ties_go_to_the_lower_index() -> None:
    c = config(selected=3, num_initial_blocks=0, num_local_blocks=0, **SIMPLE)
    assert chosen(oracle.select_blocks(column(1), column(1, 5, 1, 1, 1), None, c, num_keys=10)) == [[0, 1, 2]]


def test_candidates_end_with_the_querys_own_block() -> None:
    c = config(selected=3, num_initial_blocks=0, num_local_blocks=0, **SIMPLE)
    indices = oracle.select_blocks(column(*[1] * 6), column(1, 2, 3), None, c)
    # block i is visible from token 2i + 1 on; ties of weight 0 go to the lower index
    assert chosen(indices) == [[0, -1, -1], [0, -1, -1], [0, 1, -1], [0, 1, -1], [0, 1, 2], [0, 1, 2]]


def test_underflowing_importance_does_not_lose_a_candidate() -> None:
    c = config(selected=3, num_initial_blocks=0, num_local_blocks=0, **SIMPLE)
    indices = oracle.select_blocks(column(1), column(0, 5000, 0), None, c, num_keys=6)
    assert chosen(indices) == [[0, 1, 2]]


def test_local_blocks_reach_no_further_than_the_first_block() -> None:
    c = config(selected=5, num_initial_blocks=2, num_local_blocks=3, **SIMPLE)
    assert chosen(oracle.select_blocks(column(1), column(0, 0), None, c, num_keys=4)) == [[0, 1, -1, -1, -1]]


def test_selection_is_int32_and_without_gradient() -> None:
    indices = oracle.select_blocks(column(1).requires_grad_(), column(0, 0), None, config(**SIMPLE), num_keys=4)
    assert indices.dtype == torch.int32
    assert not indices.requires_grad


# 5 and 6. Selected and window branches. Equal scores make the output the mean of what is seen.


def test_selected_branch_sees_its_blocks_up_to_the_query() -> None:
    values = column(1, 2, 4, 8, 16, 32)
    indices = torch.tensor([2, -1, 0], dtype=torch.int32).view(1, 1, 1, 3)
    out = oracle.selected_attention(column(0), values[:, :5], values[:, :5], indices, config(**SIMPLE))
    assert_matches(out, column((1 + 2 + 16) / 3), what="own block cut at the query")


def test_selected_branch_without_blocks_gives_zero() -> None:
    indices = torch.full((1, 1, 1, 2), -1, dtype=torch.int32)
    out = oracle.selected_attention(column(1), column(1, 2), column(1, 2), indices, config(**SIMPLE))
    assert_equal(out, column(0), what="output of a query with no block")


def test_window_is_exactly_w_tokens() -> None:
    values = column(1, 10, 100, 1000, 10000)
    out = oracle.sliding_window_attention(column(*[0] * 5), values, values, config(window=3))
    assert_matches(out, column(1, 5.5, 37, 370, 3700), what="means of the last three")


def test_queries_are_the_last_tokens() -> None:
    values = column(1, 10, 100, 1000, 10000)
    out = oracle.sliding_window_attention(column(0, 0), values, values, config(window=2))
    assert_matches(out, column(550, 5500), what="means of the last two")


def test_packed_window_stays_in_its_sequence() -> None:
    values = column(1, 3, 10, 20)
    cu_seqlens = cumulative((2, 0, 2))
    out = oracle.sliding_window_attention(column(*[0] * 4), values, values, config(window=4), cu_seqlens_q=cu_seqlens)
    assert_matches(out, column(1, 2, 10, 15), what="means within the sequence")


# 7. Output.


def test_gates_weigh_compressed_selected_and_window_in_that_order() -> None:
    c = config((1, 1, 1), selected=1, window=1, num_initial_blocks=1, num_local_blocks=0)
    gates = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64).view(1, 1, 1, 3)
    one = column(0, 0)
    out, indices = oracle.nsa_attention(
        column(0), one, column(2, 4), one, column(5, 6), one, column(7, 8), gates, c, return_indices=True
    )
    # compressed: mean of 2 and 4; selected: block 0; window: the last token
    assert_matches(out, column(3 + 50 + 800), what="gated sum")
    assert chosen(indices) == [[0]]


# 9. RoPE.


def test_rope_turns_interleaved_pairs() -> None:
    angles = torch.tensor([[0.0, 0.0], [math.pi / 2, math.pi]], dtype=torch.float64)
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)
    x = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64).expand(1, 2, 1, 4)
    expected = torch.tensor([[1.0, 2.0, 3.0, 4.0], [-2.0, 1.0, -3.0, -4.0]], dtype=torch.float64)
    assert_matches(oracle.rotate(x, table, torch.arange(2))[0, :, 0], expected, what="rotated")


# The module: the wiring of projections, tested with weights that each let one thing through.


@pytest.mark.parametrize(("branch", "expected"), [(0, 3.5), (1, 3.5), (2, 5.5)])
def test_module_reads_its_projections_in_branch_order(branch: int, expected: float) -> None:
    c = config((2, 2, 2), selected=3, window=2, num_initial_blocks=1, num_local_blocks=1, compression="mean")
    weights = {
        "wq.weight": torch.zeros(2, 1),
        "wk.weight": torch.zeros(6, 1),
        "wv.weight": torch.zeros(3, 2, 1).index_fill(0, torch.tensor(branch), 1.0).view(6, 1),
        "wg.weight": torch.zeros(3, 1),
        "wg.bias": torch.full((3,), 100.0),
        "wo.weight": torch.tensor([[1.0, 0.0]]),
    }
    x = torch.arange(1.0, 7.0).view(1, 6, 1)
    out = oracle.native_sparse_attention(x, weights, c, num_heads=1, num_kv_heads=1, head_dim=2)
    assert_matches(out[0, -1], torch.tensor([expected]).double(), what="last output")


def test_oracle_promotes_every_float_dtype() -> None:
    tensors = draw(BY_ID["small"], torch.float16)
    q, k_cmp, v_cmp = (tensors[name] for name in ("q", "k_cmp", "v_cmp"))
    out, lse = oracle.compressed_attention(q, k_cmp, v_cmp, BY_ID["small"].config)
    assert out.dtype == lse.dtype == torch.float64
