"""Training runs as a user starts them: a command of their own, their output and their metrics."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from nsa.titan.runs import read_records

LOSS = "loss_metrics/global_avg_loss"
VALIDATION_LOSS = "validation_metrics/loss"
TOKENS_PER_SECOND = "throughput(tps)"
MEMORY_GIB = "memory/max_reserved(GiB)"
ACTIVE_GIB = "memory/max_active(GiB)"


@dataclass(frozen=True)
class Metrics:
    """What a run wrote down, under TorchTitan's names of metrics."""

    records: tuple[Mapping[str, Any], ...]

    def __getitem__(self, name: str) -> dict[int, float]:
        """One metric by step."""
        return {record["step"]: record[name] for record in self.records if name in record}

    @property
    def speeds(self) -> list[float]:
        """Tokens a second, of all that was logged but the first, in which kernels are compiled."""
        return list(self[TOKENS_PER_SECOND].values())[1:]


def read_metrics(folder: Path) -> Metrics:
    """Metrics of the run that dumped into `folder`; none if it did not get that far."""
    return read_log(folder / "metrics.jsonl")


def read_log(file: Path) -> Metrics:
    """Metrics in what a run logged, a record a line; a line that a kill has cut off is left out."""
    return Metrics(tuple(read_records(file)))


def read_parameters(folder: Path, step: int) -> dict[str, Tensor]:
    """All parameters in a checkpoint of the run that dumped into `folder`, whole in any layout."""
    with tempfile.TemporaryDirectory() as scratch:  # others may read the same run at the same time
        file = Path(scratch) / "whole.pt"
        dcp_to_torch_save(folder / "checkpoint" / f"step-{step}", file)
        content = torch.load(file)
    # Optimizer, data and schedule, where the checkpoint has them, are dictionaries beside the parameters.
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def command(
    arguments: Sequence[str], folder: Path, *, module: str = "nsa.train", processes: int | None = None
) -> list[str]:
    """The command that trains into `folder`, under torchrun where a number of processes is given."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    return [sys.executable, *torchrun, "-m", module, *arguments, f"--job.dump_folder={folder}"]


def train(
    arguments: Sequence[str],
    folder: Path,
    *,
    module: str = "nsa.train",
    processes: int | None = None,
    at_once: int = 1,
    timeout: float = 300,
) -> Metrics:
    """Trains into `folder` and returns the metrics; so many of its like run at once.

    Raises:
        RuntimeError: the command failed, or took more than `timeout` seconds; with its output.
    """
    words = command(arguments, folder, module=module, processes=processes)
    env = environment(processes, at_once)
    try:
        done = subprocess.run(
            words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired as error:
        said = (error.output or b"").decode(errors="replace")  # bytes, though text was asked for
        raise RuntimeError(f"{' '.join(words)} took more than {timeout} seconds:\n{said}") from error
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} exited with {done.returncode}:\n{done.stdout}")
    return read_metrics(folder)


def environment(processes: int | None = None, at_once: int = 1) -> dict[str, str]:
    """The environment of a run of so many processes, which see a GPU for each or none.

    Those of all runs at once, also of other pytest workers, share the cores: threads that wait for a core keep others
    waiting. On two cores, nine runs, two at once, took 860 s with two threads each and 68 s with one.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    threads = max(1, (os.cpu_count() or 1) // ((processes or 1) * at_once * workers))
    # What conftest.py sets for kernels under test is not what a user's environment has.
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if torch.cuda.device_count() < (processes or 0) else {}
    return {"OMP_NUM_THREADS": str(threads), **inherited, **hidden, "PYTHONUNBUFFERED": "1"}
