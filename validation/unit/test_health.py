"""Selection health and the divergence watch, on selections and losses made by hand."""

import math
from typing import Any

import pytest
import torch

from nsa import NSAConfig
from nsa.titan.health import SelectionHealth, selection_metrics
from nsa.titan.load import untrained_model
from nsa.titan.metrics import Diverged, DivergenceWatch
from nsa.titan.model import ModelArgs, Transformer
from validation.perf.neighbours import likeness, of_model

CONFIG = NSAConfig(2, 2, 2, 3, 1, 1, 4)
"""Blocks of 2 tokens: the first, the own one, and one that is free."""


def selection(free: list[int]) -> torch.Tensor:
    """Indices `[1, 16, 1, 3]` of 16 tokens in 8 blocks; the free block of each query, -1 where it has none."""
    rows = []
    for token, block in enumerate(free):
        chosen = sorted({0, token // 2, *([block] if block >= 0 else [])})
        rows.append(chosen + [-1] * (3 - len(chosen)))
    return torch.tensor(rows, dtype=torch.int32)[None, :, None]


STEADY = selection([-1] * 4 + [1] * 12)
"""From the third block on every query takes the second one."""


def test_forced_blocks_are_counted_apart() -> None:
    # 4 tokens have only forced blocks, 12 have two of three.
    assert selection_metrics(STEADY, CONFIG)["forced"] == pytest.approx((4 + 12 * 2 / 3) / 16)


def test_a_query_that_takes_another_block_than_its_neighbour_is_a_change() -> None:
    # A new own block for every second token, of 2 blocks and then of 3. Token 4's free one was its neighbour's own.
    assert selection_metrics(STEADY, CONFIG)["neighbour_change"] == pytest.approx((1 / 2 + 6 / 3) / 15)


def test_the_union_of_neighbours_has_each_block_once() -> None:
    # Of 4 neighbours from token 0: blocks 0, 1; from 4, 8 and 12: 0, 1 and the two own ones.
    found = selection_metrics(STEADY, CONFIG)
    assert found["union_4"] == pytest.approx((2 + 4 + 4 + 4) / 4)
    assert found["union_8"] == pytest.approx((4 + 6) / 2)


def test_last_tokens_of_a_sequence_are_told_by_the_position_of_the_first() -> None:
    # From token 8 on every query has the first block, its own one and the free one of three.
    found = selection_metrics(STEADY[:, 8:], CONFIG, first=8, neighbours=(2, 8))
    assert found["forced"] == pytest.approx(2 / 3)
    assert found["union_2"] == 3
    assert found["union_8"] == 6


def test_what_the_next_query_keeps_is_a_share_of_the_free_blocks() -> None:
    steady, alternating = (selection([-1] * 4 + free) for free in ([1] * 124, [1, 2] * 62))
    found = [likeness(indices[:, 64:], CONFIG, 128) for indices in (steady, alternating)]
    assert [each["kept"] for each in found] == [1, 0]
    # Two neighbours share their own block, 64 have 32 of them.
    assert [(each["2"], each["64"]) for each in found] == [(3, 34), (4, 35)]


def test_a_models_selection_is_a_mean_over_its_layers() -> None:
    """Without weights all blocks are worth the same: every query takes the first ones."""
    model, _ = untrained_model("debug", device="cpu", room_for=lambda _: 1024)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    found = of_model(model, torch.zeros(1, 1024, dtype=torch.long))
    assert found["kept"] == 1


def test_entropy_and_blocks_never_chosen() -> None:
    # Blocks 1 to 6 can be chosen freely, and all choose one of them.
    found = selection_metrics(STEADY, CONFIG)
    assert found["entropy"] == 0
    assert found["never"] == pytest.approx(5 / 6)
    two = selection_metrics(selection([-1] * 4 + [1, 1] + [1, 2] * 5), CONFIG)
    shares = (7 / 12, 5 / 12)
    assert two["entropy"] == pytest.approx(-sum(x * math.log(x) for x in shares) / math.log(6))
    assert two["never"] == pytest.approx(4 / 6)


def test_change_from_step_to_step() -> None:
    assert "step_change" not in selection_metrics(STEADY, CONFIG)
    assert selection_metrics(STEADY, CONFIG, STEADY)["step_change"] == 0
    # Of the 10 queries from token 6 on that have another choice than block 1, all take block 2 instead.
    other = selection([-1] * 4 + [1, 1] + [2] * 10)
    assert selection_metrics(other, CONFIG, STEADY)["step_change"] == pytest.approx(10 / 3 / 16)


def test_a_model_is_looked_at_on_the_first_row() -> None:
    sizes: dict[str, Any] = {
        "dim": 32,
        "n_layers": 2,
        "n_heads": 2,
        "vocab_size": 16,
        "max_seq_len": 32,
        "initial_gates": ".2,.5,.9",
    }
    model = Transformer(ModelArgs(**sizes, nsa=CONFIG, backend="eager"))
    model.init_weights()
    health = SelectionHealth(model)
    assert health() == {}
    health.observe(torch.randint(16, (2, 32)))
    first = health()
    health.observe(torch.randint(16, (2, 32)))  # another row is not looked at
    second = health()
    assert second.pop("selection/step_change") == 0
    assert second == first
    for branch, gate in zip(("compressed", "selected", "window"), (0.2, 0.5, 0.9), strict=True):
        assert first[f"gates/{branch}"] == pytest.approx(gate, abs=0.05)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run(loss: float) -> None:
    watch = DivergenceWatch()
    watch(1, 2.0, 1.0)
    with pytest.raises(Diverged, match=f"the loss of step 2 is {loss}, its gradient norm 3.0"):
        watch(2, loss, 3.0)


def test_a_loss_far_above_the_usual_ends_the_run_on_request() -> None:
    watch, careless = DivergenceWatch(2.0), DivergenceWatch()
    for step in range(10):
        for each in (watch, careless):
            each(step, 3.0 - step / 10, 1.0)
    careless(10, 100.0, 1.0)
    watch(10, 5.0, 1.0)
    with pytest.raises(Diverged, match=r"the loss of step 11 is 6, more than nsa.max_loss_ratio \(2\) times the usual"):
        watch(11, 6.0, 1.0)


def test_a_first_steps_losses_are_not_usual() -> None:
    watch = DivergenceWatch(1.5)
    for step, loss in enumerate([1.0, 9.0, 1.0]):
        watch(step, loss, 1.0)
