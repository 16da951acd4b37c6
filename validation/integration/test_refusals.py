"""Layouts that would fail later, or train something else, are refused by the option to change; those around are not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.train_spec import get_train_spec

from nsa.titan import parallelize
from nsa.titan.parallelize import FLOAT8, check_layout, stages_again
from nsa.titan.train_spec import JobConfig, NSAOptions
from validation import runs
from validation.integration import ranks, throughput
from validation.integration.layouts import TRAINING, has_schedule

pytestmark = pytest.mark.smoke

HALVES = [["tok_embeddings", "layers.0", "layers.1"], [*(f"layers.{i}" for i in range(2, 6)), "norm", "output"]]
"""Modules of `debug_parallel` on two stages."""


def check(
    *,
    flavor: str = "debug_parallel",
    nsa: dict[str, Any] | None = None,
    degrees: dict[str, int] | None = None,
    **sections: dict[str, Any],
) -> None:
    """`check_layout` of a job with these degrees and options by section."""
    config = JobConfig(nsa=NSAOptions(**(nsa or {})))
    config.training.seq_len, config.validation.seq_len = 1024, 1024
    for section, options in sections.items():
        for name, value in options.items():
            setattr(config.quantize.linear.float8 if section == "float8" else getattr(config, section), name, value)
    args = get_train_spec("nsa").model_args[flavor]
    args.update_from_config(config)
    one = dict.fromkeys(("dp_replicate", "dp_shard", "cp", "tp", "pp", "ep", "etp"), 1)
    degrees = {**one, **(degrees or {})}
    size = degrees["dp_replicate"] * degrees["dp_shard"] * degrees["cp"] * degrees["tp"] * degrees["pp"]
    check_layout(ParallelDims(**degrees, world_size=size), config, args)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"degrees": {"dp_replicate": 2}},
            r"parallelism.data_parallel_shard_degree must be at least 2 beside .* \(HSDP\), got 1",
        ),
        (
            {"optimizer": {"early_step_in_backward": True}},
            "optimizer.early_step_in_backward must be false: .*, got True",
        ),
        ({"parallelism": {"expert_parallel_degree": 2}}, "parallelism.expert_parallel_degree must be 1.*, got 2"),
        (
            {"degrees": {"tp": 2}, "training": {"seq_len": 1022}},
            r"training.seq_len must be a multiple of 2 \* context_parallel_degree \* tensor_parallel_degree \(4\)",
        ),
        (
            {"degrees": {"tp": 2}, "validation": {"enable": True, "seq_len": 1022}},
            r"validation.seq_len must be a multiple of 2 \* .* \(4\), got 1022",
        ),
        (
            {"degrees": {"tp": 8}},
            "parallelism.tensor_parallel_degree must divide the 4 key/value heads of the model, got 8",
        ),
        (
            {"degrees": {"tp": 2}, "parallelism": {"enable_async_tensor_parallel": True}},
            "parallelism.enable_async_tensor_parallel must be false .*, got True",
        ),
        (
            {"degrees": {"tp": 2}, "model": {"converters": [FLOAT8]}},
            "quantize.linear.float8.recipe_name must be one of .*rowwise.* under tensor parallelism, got None",
        ),
        (
            {"degrees": {"cp": 2}, "parallelism": {"context_parallel_load_balancer": "ptrr"}},
            "parallelism.context_parallel_load_balancer must be \"headtail\" or none, got 'ptrr'",
        ),
        (
            {"degrees": {"cp": 2}, "nsa": {"attn_mask_type": "block_causal"}},
            'nsa.attn_mask_type must be "causal" under context parallelism',
        ),
        (
            {"degrees": {"cp": 2}, "flavor": "100m_hybrid", "compile": {"enable": True}},
            'compile.components must be without "model" under context parallelism with dense layers, got',
        ),
        (
            {"degrees": {"cp": 2}, "training": {"seq_len": 192}},
            r"training.seq_len must be a multiple of nsa.select_block_size in each of 4 chunks \(128\), got 192",
        ),
        (
            {
                "degrees": {"cp": 2},
                "training": {"seq_len": 96},
                "parallelism": {"context_parallel_load_balancer": None},
            },
            r"training.seq_len must be a multiple of nsa.select_block_size in each of 2 chunks \(64\), got 96",
        ),
        (
            {"degrees": {"pp": 2}, "parallelism": {"pipeline_parallel_schedule_csv": "schedule.csv"}},
            "parallelism.pipeline_parallel_schedule_csv must be empty, got 'schedule.csv'",
        ),
        (
            {"degrees": {"pp": 2}, "parallelism": {"pipeline_parallel_schedule": "DualPipeV"}},
            "parallelism.pipeline_parallel_schedule must be one of .*, got 'DualPipeV'",
        ),
        (
            {
                "degrees": {"pp": 2},
                "parallelism": {"pipeline_parallel_schedule": "InterleavedZeroBubble"},
                "compile": {"enable": True},
            },
            "compile.enable must be false under InterleavedZeroBubble, got",
        ),
        (
            {
                "degrees": {"pp": 2},
                "parallelism": {"pipeline_parallel_schedule": "InterleavedZeroBubble"},
                "activation_checkpoint": {"mode": "selective", "selective_ac_option": "op"},
            },
            "activation_checkpoint.selective_ac_option must be a number under InterleavedZeroBubble, got 'op'",
        ),
        (
            {"degrees": {"tp": 2}, "training": {"enable_cpu_offload": True}},
            "training.enable_cpu_offload must be false without FSDP, whose it is, got True",
        ),
        (
            {"degrees": {"pp": 2}, "nsa": {"attn_mask_type": "block_causal"}},
            'nsa.attn_mask_type must be "causal" under pipeline parallelism',
        ),
        (
            {"degrees": {"pp": 4}, "flavor": "debug", "parallelism": {"pipeline_parallel_schedule": "Interleaved1F1B"}},
            "parallelism.pipeline_parallel_degree must give at most 4 stages .* Interleaved1F1B has 8, got 4",
        ),
        pytest.param(
            {
                "degrees": {"pp": 2},
                "parallelism": {"pipeline_parallel_schedule": "ZBVZeroBubble"},
                "validation": {"enable": True},
            },
            "validation.enable must be false under ZBVZeroBubble",
            marks=has_schedule("ZBVZeroBubble"),
        ),
        (
            {
                "degrees": {"pp": 4},
                "parallelism": {"pipeline_parallel_schedule": "1F1B"},
                "training": {"local_batch_size": 3},
            },
            "training.local_batch_size must give a microbatch to each of 4 stages, got 3",
        ),
        (
            {
                "degrees": {"pp": 2},
                "parallelism": {"pipeline_parallel_schedule": "Interleaved1F1B"},
                "training": {"local_batch_size": 7},
            },
            "training.local_batch_size must give each of 3 rounds over 2 processes as many microbatches, got 7",
        ),
        (
            {"degrees": {"pp": 2}, "parallelism": {"pipeline_parallel_microbatch_size": 3}},
            r"training.local_batch_size must be a multiple of .*pipeline_parallel_microbatch_size \(3\), got 8",
        ),
        (
            {"degrees": {"pp": 2}, "parallelism": {"pipeline_parallel_layers_per_stage": 2}},
            "parallelism.pipeline_parallel_layers_per_stage must give 1 stages to each of 2 .*not 4 to all, got 2",
        ),
        (
            {"degrees": {"pp": 2}, "parallelism": {"pipeline_parallel_first_stage_less_layers": 9}},
            "parallelism.pipeline_parallel_.*_stage_less_layers do not fit: input_weight .9. exceeds",
        ),
        (
            {"degrees": {"pp": 2}, "parallelism": {"module_fqns_per_model_part": [["tok_embeddings"], ["output"]]}},
            "parallelism.module_fqns_per_model_part must have each of .*'layers.5', 'norm', 'output'. once, got",
        ),
        (
            {"degrees": {"pp": 2}, "validation": {"enable": True, "seq_len": 2048}},
            r"validation.seq_len must be training.seq_len \(1024\) under pipeline parallelism, got 2048",
        ),
        (
            {"degrees": {"pp": 2}, "validation": {"enable": True, "local_batch_size": 4}},
            r"validation.local_batch_size must be training.local_batch_size \(8\) under pipeline parallelism, got 4",
        ),
    ],
)
def test_a_wrong_layout_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"training": {"seq_len": 1021}},
        {"degrees": {"dp_replicate": 2, "dp_shard": 2}},
        {"degrees": {"dp_replicate": 2, "cp": 2}},
        {"degrees": {"tp": 4}, "nsa": {"attn_mask_type": "block_causal"}},
        {"degrees": {"cp": 2}, "training": {"seq_len": 128}},
        {"degrees": {"cp": 2}, "training": {"enable_cpu_offload": True}},
        {
            "degrees": {"pp": 2},
            "parallelism": {"pipeline_parallel_schedule": "InterleavedZeroBubble"},
            "activation_checkpoint": {"mode": "selective", "selective_ac_option": "2"},
        },
        {"degrees": {"cp": 2}, "flavor": "debug_parallel_dense", "training": {"seq_len": 4}},
        {"degrees": {"tp": 2}, "model": {"converters": [FLOAT8]}, "float8": {"recipe_name": "rowwise"}},
        {"degrees": {"pp": 2}, "parallelism": {"pipeline_parallel_layers_per_stage": 4}},
        {"degrees": {"pp": 2}, "parallelism": {"module_fqns_per_model_part": HALVES}},
        pytest.param(
            {"degrees": {"pp": 4}, "parallelism": {"pipeline_parallel_schedule": "ZBVZeroBubble"}},
            marks=has_schedule("ZBVZeroBubble"),
        ),
        {"degrees": {"pp": 4, "dp_shard": 8, "tp": 2, "cp": 2}, "validation": {"enable": True, "local_batch_size": 8}},
    ],
)
def test_a_right_one_is_not(arguments: dict[str, Any]) -> None:
    check(**arguments)


def test_staging_is_refused_where_pytorch_can_stage_one_checkpoint_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert stages_again() or torch.__version__ < "2.13"
    monkeypatch.setattr(parallelize, "stages_again", lambda: False)
    with pytest.raises(ValueError, match=r'checkpoint.async_mode must be "async" .*, got .async_with_pinned_mem.'):
        check(checkpoint={"enable": True, "async_mode": "async_with_pinned_mem"})
    check(checkpoint={"enable": True, "async_mode": "async"})
    check(checkpoint={"enable": False, "async_mode": "async_with_pinned_mem"})


@ranks.needs(2)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("--parallelism.tensor_parallel_degree=2", "--training.seq_len=126"), id="tensor"),
        pytest.param(("--parallelism.pipeline_parallel_degree=2", "--nsa.attn_mask_type=block_causal"), id="pipeline"),
    ],
)
def test_every_rank_refuses_before_training(options: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(ranks.RankFailed, match=r"^rank \d exited with 1, rank \d exited with 1\n") as failure:
        ranks.train((*TRAINING, *options, "--training.local_batch_size=8"), tmp_path, processes=2)
    for rank in range(2):
        log = (tmp_path / f"rank-{rank}.log").read_text()
        assert log.startswith("error: ")
        assert len(log.splitlines()) == 1, f"more than a line of rank {rank}: {log}"
    assert "Traceback" not in str(failure.value)
    assert not runs.read_metrics(tmp_path).records


@pytest.mark.parametrize("gpus", [0, 1])
def test_throughput_is_not_measured_without_gpus(
    gpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(runs, "train", lambda *args, **kwargs: pytest.fail("a run was started"))
    with pytest.raises(SystemExit) as ended:
        throughput.main(["--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert f"error: needs 2 GPUs, {gpus} found" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
