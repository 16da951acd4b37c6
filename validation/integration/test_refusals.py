"""Layouts that would fail later, or train something else without a word, are refused before training starts."""

import re
from types import SimpleNamespace
from unittest import mock

import pytest
from torchtitan.config import ConfigManager
from torchtitan.protocols.train_spec import get_train_spec

from nsa.parallelize import check_layout
from nsa.train import Trainer, complete
from validation import runs
from validation.integration import ranks
from validation.integration.layouts import LAYOUTS, TRAINING


def check(processes, *options):
    """What a job of so many processes checks; TorchTitan is only told that they are there."""
    config = ConfigManager().parse_args(complete([*TRAINING, *options]))
    with mock.patch("torchtitan.train.dist_utils.init_distributed", return_value=processes):
        parallel_dims = Trainer.init_distributed(SimpleNamespace(job_config=config))
    args = get_train_spec("nsa").model_args[config.model.flavor]
    args.update_from_config(config)
    check_layout(parallel_dims, config, args)


def degree(name, number):
    return f"--parallelism.{name}_parallel_degree={number}"


TP2, CP2, PP2 = (degree(name, 2) for name in ("tensor", "context", "pipeline"))
BALANCED = "--parallelism.context_parallel_load_balancer=headtail"
UNBALANCED = "--parallelism.context_parallel_load_balancer=None"
VALIDATED = ("--validation.enable", "--training.local_batch_size=8")


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("processes", "options", "message"),
    [
        (2, [degree("expert", 2)], "parallelism.expert_parallel_degree must be 1: there are no experts, got 2"),
        (
            2,
            ["--parallelism.data_parallel_replicate_degree=2"],
            "parallelism.data_parallel_shard_degree must be at least 2 beside data_parallel_replicate_degree = 2 "
            "(HSDP), got 1",
        ),
        (
            2,
            [TP2, "--training.seq_len=126"],
            "training.seq_len must be a multiple of 2 * context_parallel_degree * tensor_parallel_degree (4), got 126",
        ),
        (
            2,
            [TP2, "--validation.enable", "--validation.seq_len=126"],
            "validation.seq_len must be a multiple of 2 * context_parallel_degree * tensor_parallel_degree (4)",
        ),
        (
            4,
            [degree("tensor", 4)],
            "parallelism.tensor_parallel_degree must divide the 2 key/value heads of the model, got 4",
        ),
        (
            2,
            [TP2, "--parallelism.enable_async_tensor_parallel"],
            "parallelism.enable_async_tensor_parallel must be false",
        ),
        (
            2,
            [CP2, BALANCED, "--training.seq_len=160"],
            "training.seq_len must be a multiple of nsa.select_block_size in each of 4 chunks (64), got 160",
        ),
        (
            2,
            [CP2, UNBALANCED, "--training.seq_len=144"],
            "training.seq_len must be a multiple of nsa.select_block_size in each of 2 chunks (32), got 144",
        ),
        (
            2,
            [CP2, "--parallelism.context_parallel_load_balancer=ptrr"],
            "parallelism.context_parallel_load_balancer must be \"headtail\" or none, got 'ptrr'",
        ),
        (2, [CP2, "--nsa.attn_mask_type=block_causal"], 'nsa.attn_mask_type must be "causal" under context'),
        (2, [PP2, "--nsa.attn_mask_type=block_causal"], 'nsa.attn_mask_type must be "causal" under pipeline'),
        (
            2,
            [PP2, "--parallelism.pipeline_parallel_schedule=DualPipeV"],
            "parallelism.pipeline_parallel_schedule must be one of",
        ),
        (
            2,
            [PP2, "--parallelism.pipeline_parallel_schedule_csv=schedule.csv"],
            "parallelism.pipeline_parallel_schedule_csv must be empty",
        ),
        (
            4,
            [degree("pipeline", 4), "--parallelism.pipeline_parallel_schedule=Interleaved1F1B"],
            "parallelism.pipeline_parallel_degree must give at most 4 stages",
        ),
        (
            2,
            [PP2, *VALIDATED, "--validation.local_batch_size=8", "--validation.seq_len=64"],
            "validation.seq_len must be training.seq_len (128) under pipeline parallelism, got 64",
        ),
        (
            2,
            [PP2, *VALIDATED, "--validation.local_batch_size=4", "--validation.seq_len=128"],
            "validation.local_batch_size must be training.local_batch_size (8) under pipeline parallelism, got 4",
        ),
    ],
)
def test_a_wrong_layout_is_refused_with_the_number_to_change(processes, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        check(processes, *options)


@pytest.mark.smoke
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_a_right_layout_is_not_refused(layout):
    check(layout.processes, *layout.arguments)


@ranks.needs(2)
@pytest.mark.parametrize("options", [(TP2, "--training.seq_len=126"), (PP2, "--nsa.attn_mask_type=block_causal")])
def test_every_rank_refuses_before_training(options, tmp_path):
    with pytest.raises(ranks.RankFailed, match=r"^rank \d exited with 1, rank \d exited with 1\n") as failure:
        ranks.train((*TRAINING, *options, "--training.local_batch_size=8"), tmp_path, processes=2)
    assert str(failure.value).count("ValueError: ") == 2
    assert not runs.read_metrics(tmp_path).records
