"""What layouts cost: tokens a second and memory of each GPU, the same training laid out in several ways.

    python -m validation.integration.throughput --out out/throughput

Every run is one that torchrun starts over two GPUs, without which nothing is run; its metrics are kept as
`out/throughput/tp2-32k.jsonl` and so on, and the table of all is printed. Options after `--` are passed on to each.
"""

import argparse
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nsa.titan.metrics import METRICS_FILE
from validation import runs
from validation.integration.layouts import BFLOAT16, BY_NAME, Layout

COMMON = (
    *BFLOAT16,
    "--checkpoint.no-enable",
    "--validation.no-enable",
    "--compile.no-enable",
    "--activation_checkpoint.mode=selective",
    "--training.steps=25",
    "--metrics.log_freq=5",
    "--metrics.save_for_all_ranks",
)


@dataclass(frozen=True)
class Run:
    """A layout, a model and a length; as many sequences a process as the layout needs at least."""

    layout: Layout
    seq_len: int
    flavor: str = "100m"

    @property
    def name(self) -> str:
        return f"{self.layout.name}-{self.seq_len >> 10}k" + ("-dense" if self.flavor.endswith("dense") else "")

    @property
    def arguments(self) -> tuple[str, ...]:
        return (
            *COMMON,
            f"--model.flavor={self.flavor}",
            f"--training.seq_len={self.seq_len}",
            f"--training.local_batch_size={self.layout.pp}",
            *self.layout.parallelism,
        )


RUNS = (
    *(Run(BY_NAME[name], 32 << 10) for name in ("fsdp2", "fsdp2-compile", "tp2", "pp2-1f1b", "cp2-headtail")),
    Run(BY_NAME["cp2-headtail"], 128 << 10),
    Run(BY_NAME["fsdp2"], 32 << 10, "100m_dense"),
    Run(BY_NAME["cp2-headtail"], 128 << 10, "100m_dense"),
)


def table(read: Callable[[str], runs.Metrics]) -> list[str]:
    """Rows of Markdown, one a run."""
    rows = ["| layout | tokens a second and GPU | peak memory of each GPU, active (GiB) |", "|---|---|---|"]
    for run in RUNS:
        metrics = [read(name) for name in names(run)]
        speed = statistics.median(metrics[0].speeds)
        memory = " / ".join(f"{max(of_process[runs.ACTIVE_GIB].values()):.2f}" for of_process in metrics)
        rows.append(f"| {run.name} | {speed:,.0f} | {memory} |")
    return rows


def names(run: Run) -> list[str]:
    """Of the logs kept: of the process that knows the loss, and of the other."""
    return [run.name, f"{run.name}-other"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains every run, one after the other, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the metrics of each run")
    parser.add_argument("options", nargs="*", help="of the trainer, after --")
    parsed = parser.parse_args(arguments)
    needed, found = max(run.layout.processes for run in RUNS), torch.cuda.device_count()
    if found < needed:
        parser.error(f"needs {needed} GPUs, {found} found: on a CPU the first of these runs would take days")
    parsed.out.mkdir(parents=True, exist_ok=True)
    for run in RUNS:
        folder = parsed.out / run.name
        runs.train((*run.arguments, *parsed.options), folder, processes=run.layout.processes)
        logs = (folder / METRICS_FILE, *folder.glob(f"rank_*/{METRICS_FILE}"))
        for name, log in zip(names(run), logs, strict=True):
            shutil.copy(log, parsed.out / f"{name}.jsonl")
        print(run.name, flush=True)
    print(*table(lambda name: runs.read_log(parsed.out / f"{name}.jsonl")), sep="\n")


if __name__ == "__main__":
    main()
