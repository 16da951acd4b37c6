"""Training runs by TorchTitan 0.3's own entry point, and what they logged."""

import subprocess
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from validation import runs

LOSS, GRAD_NORM = runs.LOSS, "grad_norm"
QUIET = ("--validator.no-enable", "--checkpoint.no-enable")


def train(config: str, folder: Path, *arguments: str, processes: int | None = None) -> dict[str, dict[int, float]]:
    """Trains into `folder`, under torchrun where a number of processes is given; returns metrics by name and step.

    Raises:
        RuntimeError: the command failed; with its output.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    command = [sys.executable, *torchrun, "-m", "torchtitan.train", "--module=nsa.titan3", f"--config={config}"]
    command += [f"--dump_folder={folder}", "--metrics.log_freq=1", "--metrics.enable_tensorboard", *arguments]
    done = subprocess.run(
        command,
        # One thread: sums in one order, and no waiting for one another where cores are shared.
        env={**runs.environment(processes), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} exited with {done.returncode}:\n{done.stdout}")
    return read(folder)


def read(folder: Path) -> dict[str, dict[int, float]]:
    """Metrics of all the runs that dumped into a folder, by name and step."""
    found: dict[str, dict[int, float]] = {}
    for file in sorted(folder.rglob("events.out.tfevents.*")):
        events = EventAccumulator(str(file)).Reload()
        for name in events.Tags()["scalars"]:
            found.setdefault(name, {}).update({event.step: event.value for event in events.Scalars(name)})
    return found
