"""Layouts of more processes than there are here: built, and stepped where that can be, over fake process groups.

The collectives of such a group move nothing, so that losses mean nothing, but what does not fit together still fails.
A pipeline's stages ask one another for shapes before the first step, which nobody answers: those are built only.
"""

import itertools
import os
import statistics
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from validation.integration import ranks

LARGE = (
    "--model.flavor=1b",
    "--nsa.num_selected_blocks=3",  # as many as such short rows have
    "--validation.no-enable",
    "--checkpoint.no-enable",
    "--metrics.log_freq=1",
    "--comm.mode=fake_backend",
    "--training.mixed_precision_param=bfloat16",
    "--activation_checkpoint.mode=none",
    "--compile.no-enable",
)
SECONDS = 30  # of a processor that nobody else uses
# Calls of an empty function that such a one makes in a second: one whose core others share takes up to twice as long
# for the same work, for tens of seconds, and its clock does not tell.
CALLS = 33_000_000


def rehearse(arguments: Sequence[str], processes: int) -> None:
    os.environ["NGPU"] = str(processes)
    torch.set_num_threads(1)  # those that wait for others take time, too
    paces: list[float] = []
    threading.Thread(target=sample, args=(paces,), daemon=True).start()
    begin = time.process_time()
    ranks.train_here(arguments)
    seconds, pace = time.process_time() - begin, min(1, statistics.mean(paces))
    print(f"{seconds:.1f} s of a processor at {pace:.0%} of its speed: {seconds * pace:.1f} s of {SECONDS}")
    assert seconds * pace < SECONDS


def sample(paces: list[float]) -> NoReturn:
    """Appends the processor's present speed twice a second, as a part of what it is alone."""
    calls, function = 300_000, lambda: None
    while True:
        begin = time.thread_time()
        for _ in itertools.repeat(None, calls):
            function()
        paces.append(calls / (time.thread_time() - begin) / CALLS)
        time.sleep(0.5)


@pytest.mark.parametrize(
    ("processes", "degrees"),
    [
        (64, "data_parallel_shard=64"),
        (64, "data_parallel_replicate=8 data_parallel_shard=8"),
        (64, "data_parallel_shard=16 tensor_parallel=4"),
        (64, "data_parallel_shard=16 context_parallel=4"),
        (64, "data_parallel_shard=4 tensor_parallel=4 context_parallel=4"),
        (64, "data_parallel_shard=4 tensor_parallel=4 pipeline_parallel=4"),
        (1024, "data_parallel_shard=1024"),
        (1024, "data_parallel_shard=256 tensor_parallel=4"),
        (1024, "data_parallel_replicate=8 data_parallel_shard=8 tensor_parallel=4 context_parallel=4"),
        (1024, "data_parallel_shard=64 tensor_parallel=4 pipeline_parallel=4"),
    ],
    ids=lambda value: str(value).replace("_parallel", "").replace(" ", ",").replace("data_", ""),
)
def test_a_large_layout_is_rehearsed(processes: int, degrees: str, tmp_path: Path) -> None:
    steps, rows = (0, 4) if "pipeline" in degrees else (1, 1)
    seq_len = 64 * (8 if "context" in degrees else 1)  # a block a chunk, two chunks a process
    parallelism = (f"--parallelism.{degree.replace('=', '_degree=')}" for degree in degrees.split())
    sizes = {"steps": steps, "seq_len": seq_len, "local_batch_size": rows}
    training = (f"--training.{name}={size}" for name, size in sizes.items())
    arguments = (*LARGE, *parallelism, *training, f"--job.dump_folder={tmp_path}")
    with ranks.Job(rehearse, (arguments, processes), tmp_path, 1) as job:
        job.wait()
    assert "Training completed" in job.logs[0].read_text()
    assert len(ranks.runs.read_metrics(tmp_path)[ranks.runs.LOSS]) == steps
