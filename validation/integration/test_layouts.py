"""The same training, however it is laid out over processes."""

import os

import pytest

from validation import numerics
from validation.runs import LOSS, train

OPTIONS = (
    "--training.seq_len=256",
    "--training.global_batch_size=4",
    "--training.steps=4",
    "--metrics.log_freq=1",
    "--lr_scheduler.warmup_steps=2",
    "--validation.no-enable",
    "--checkpoint.no-enable",
    "--training.mixed_precision_param=float32",
)
PROCESSES = int(os.environ.get("NGPU", "4"))


@pytest.fixture(scope="module", params=["nsa", "dense,nsa"])
def single(request, tmp_path_factory):
    """Options of a model and what one process makes of it."""
    options = (*OPTIONS, f"--nsa.attention={request.param}")
    return options, train((*options, "--training.local_batch_size=4"), tmp_path_factory.mktemp("single"))


def test_fsdp_trains_as_one_process(single, tmp_path):
    options, expected = single
    local = f"--training.local_batch_size={4 // PROCESSES}"
    numerics.assert_same_training(
        train((*options, local), tmp_path, processes=PROCESSES), expected, (LOSS, "grad_norm")
    )


def test_hsdp_trains_as_one_process(single, tmp_path):
    options, expected = single
    mesh = ("--parallelism.data_parallel_replicate_degree=2", f"--training.local_batch_size={4 // PROCESSES}")
    numerics.assert_same_training(
        train((*options, *mesh), tmp_path, processes=PROCESSES), expected, (LOSS, "grad_norm")
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--parallelism.tensor_parallel_degree=2", "--training.seq_len=254"),
            "training.seq_len must be a multiple of",
        ),
        (("--parallelism.tensor_parallel_degree=2",), "parallelism.tensor_parallel_degree must be 1"),
        (("--parallelism.context_parallel_degree=2",), "parallelism.context_parallel_degree must be 1"),
        (("--parallelism.pipeline_parallel_degree=2",), "does not support pipelining"),
        (
            ("--parallelism.data_parallel_replicate_degree=2",),
            "parallelism.data_parallel_shard_degree must be at least 2",
        ),
    ],
)
def test_unsupported_layouts_are_refused(tmp_path, options, message):
    with pytest.raises(RuntimeError, match="exited with 1") as failure:
        train((*OPTIONS, *options, "--training.local_batch_size=1"), tmp_path, processes=2)
    assert message in str(failure.value)
