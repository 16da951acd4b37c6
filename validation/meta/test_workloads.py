"""What measurements are made with: the inputs are legal, and costs are what counting one by one gives."""

from dataclasses import replace

import pytest
import torch

from nsa.config import NSAConfig
from validation import costs, oracle
from validation.costs import Roofs
from validation.perf.neighbours import of_workload
from validation.perf.records import SAME_SHAPES
from validation.perf.workloads import WORKLOADS, Workload, alike

SMALL = Workload("small", 6, 2, 16, 32, NSAConfig(16, 8, 16, 4, window_size=20), torch.float32)
LENGTH = 150


def test_inputs_are_those_of_the_stages() -> None:
    x = SMALL.draw(LENGTH, "cpu")
    out, lse = oracle.compressed_attention(x["q"], x["k_cmp"], x["v_cmp"], SMALL.config)
    assert out.shape == x["out_cmp"].shape
    assert torch.equal(lse == -torch.inf, x["lse"] == -torch.inf)
    # The mean of the exponentials of normal logits is exp(1/2), up to chance: what is drawn lies among the true ones.
    true, drawn = lse[:, LENGTH // 2 :], x["lse"][:, LENGTH // 2 :]
    assert true.min() < drawn.min() <= drawn.max() < true.max()


@pytest.mark.parametrize("kept", [0.0, 0.5])
def test_drawn_indices_follow_the_rules_of_selection(kept: float) -> None:
    indices = replace(SMALL, kept=kept).draw(LENGTH, "cpu")["indices"]
    config, own = SMALL.config, torch.arange(LENGTH).view(1, -1, 1) // SMALL.config.select_block_size
    assert indices.shape == (1, LENGTH, SMALL.kv_heads, config.num_selected_blocks)
    assert torch.equal(
        (indices >= 0).sum(-1), (own + 1).clamp(max=config.num_selected_blocks).expand_as(indices[..., 0])
    )
    assert (indices <= own.unsqueeze(-1)).all()
    ascending = indices.where(indices >= 0, LENGTH)
    assert ((ascending.diff() > 0) | (ascending[..., 1:] == LENGTH)).all()
    for forced in (own * 0, own, (own - 1).clamp(min=0)):
        assert (indices == forced.unsqueeze(-1)).any(-1).all()


@pytest.mark.parametrize("kept", [0.25, 0.5])
def test_a_free_block_is_kept_with_the_probability_asked_for(kept: float) -> None:
    """Queries of one block, of which every one has one free block and many others to take in its place."""
    config, length, behind = SMALL.config, 4096, 8
    indices = replace(SMALL, kept=kept).draw(length, "cpu")["indices"][0]
    own = torch.arange(length).view(-1, 1, 1) // config.select_block_size
    free = indices.masked_fill(config.forced(indices, own), -1).amax(-1)
    free = free.unflatten(0, (-1, config.select_block_size))[behind:]
    assert (free > 0).all()
    found = (free[:, 1:] == free[:, :-1]).double()
    deviation = (kept * (1 - kept) / found.numel()) ** 0.5  # of so many independent draws
    assert abs(found.mean().item() - kept) < 4 * deviation


def test_a_token_resembles_the_one_before() -> None:
    """The response to one token of the noise, which the correlation of a half leaves exact."""
    noise, position = torch.zeros(1, 20, 9, 2), torch.arange(20)
    noise[:, 0, 0], noise[:, 3, 8] = 1, 1
    found = alike(noise, 0.5)
    assert torch.equal(found[0, :, 0, 1], 0.5**position)
    assert torch.equal(found[0, 3:, 8, 1], 0.75**0.5 * 0.5 ** position[:-3])
    assert not found[0, :3, 8].any()
    assert not found[0, :, 1:8].any()


def test_half_of_the_free_blocks_are_kept_by_both_ways_of_making_neighbours_alike() -> None:
    found = of_workload(WORKLOADS["WC"], 8192)
    assert {what: round(values["kept"], 1) for what, values in found.items()} == {"indices": 0.5, "selection": 0.5}


def test_a_workload_that_is_like_another_differs_in_values_alone() -> None:
    for name, like in SAME_SHAPES.items():
        assert replace(WORKLOADS[name], name=like, kept=0.0) == WORKLOADS[like]
    assert {name for name, workload in WORKLOADS.items() if workload.kept} == {*SAME_SHAPES}


def test_pairs_are_those_of_the_masks() -> None:
    config, query, key = SMALL.config, torch.arange(LENGTH).view(-1, 1), torch.arange(LENGTH)
    ends = torch.arange(config.num_compressed(LENGTH)) * config.compress_stride + config.compress_block_size - 1
    indices = SMALL.draw(LENGTH, "cpu")["indices"][0, :, 0]
    chosen = (key.view(1, 1, -1) // config.select_block_size == indices.unsqueeze(-1)).any(1)
    case = SMALL.case(LENGTH)
    assert costs.causal_pairs(case) == int((key <= query).sum())
    assert costs.compressed_pairs(case) == int((ends <= query).sum())
    assert costs.selected_pairs(case) == int((chosen & (key <= query)).sum())
    assert costs.window_pairs(case) == int(((key <= query) & (key > query - config.window_size)).sum())


@pytest.mark.parametrize(
    ("stage", "flops"),
    [
        ("compressed_attention", "4.4e+12"),
        ("select_blocks", "2.2e+12"),
        ("selected_attention", "2.1e+12"),  # of its own block a query sees half
        ("sliding_window_attention", "1.1e+12"),
    ],
)
def test_operations_at_64k_are_those_worked_out_by_hand(stage: str, flops: str) -> None:
    assert f"{WORKLOADS['W'].costs(65536)[stage, 'forward'].flops:.1e}" == flops


def test_a_step_of_decoding_reads_what_was_worked_out_by_hand() -> None:
    """4095 blocks, 16 times 64 tokens and 512 of the window, keys and values of 4 heads and 128 dims in 2 bytes."""
    cost, dense = (WORKLOADS["W"].decode_cost(65536, 2, dense=dense) for dense in (False, True))
    of_queries = 2 * 64 * 256 * 2
    assert cost.bytes == 2 * (4095 + 16 * 64 + 512) * 4 * 256 * 2 + of_queries
    assert dense.bytes == 2 * 65536 * 4 * 256 * 2 + of_queries
    assert dense.flops == 2 * 2 * 64 * 65536 * 256


def test_the_floor_is_the_larger_of_the_two_and_adds_up_over_the_stages() -> None:
    roofs, work = Roofs(flops=1.0, bytes=1.0), WORKLOADS["W"]
    found = work.costs(4096)
    attention, combine = found["compressed_attention", "forward"], found["combine", "forward"]
    assert work.floor("compressed_attention", "forward", 4096, roofs) == 1e3 * attention.flops > 1e3 * attention.bytes
    assert work.floor("combine", "forward", 4096, roofs) == 1e3 * combine.bytes > 1e3 * combine.flops
    whole = work.floor("nsa_attention", "backward", 4096, roofs)
    assert whole > work.floor("combine", "backward", 4096, roofs) > 0
    assert found["nsa_attention", "forward"].flops == sum(
        cost.flops
        for (stage, direction), cost in found.items()
        if direction == "forward" and stage not in ("nsa_attention", "dense", "compress")
    )
