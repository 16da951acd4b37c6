"""Training with error bars: NSA, a hybrid and the dense twin on the same data, over several seeds.

    python -m validation.system.repeats --tier cpu --out out/repeats     # minutes on two cores
    python -m validation.system.repeats --tier 100m-32k                  # on a GPU

A seed draws the initial weights; all runs see the same rows in the same order. Differences are paired: that of NSA from
dense is taken by seed, and its standard error says how much of it the choice of seeds may be. All models train with one
seed before any does with the next, and every run is saved when it ends. So a call that is cut leaves whole comparisons.
"""

import argparse
import json
import math
import os
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")  # before pyplot: there may be no screen
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from nsa.titan.runs import write_whole
from validation import numerics, reports
from validation.runs import ACTIVE_GIB, LOSS, MEMORY_GIB, VALIDATION_LOSS, Metrics, train

GRAD_NORM = "grad_norm"
FILE = "repeats.json"
TIER = "NSA_VALIDATION_TIER"
"""The environment variable that names the tier of a run of the tests."""


@dataclass(frozen=True)
class Tier:
    """A size at which models are compared.

    Attributes:
        flavor: of the NSA model; the twin is `FLAVOR_dense`.
        options: of the trainer.
        seeds: so many runs of each model.
        gpus: that are needed; 0 is a CPU.
        hybrid: the pattern of its layers.
        sparse: options of the models that have NSA layers.
        limit: seconds that a run may take.
    """

    flavor: str
    options: tuple[str, ...]
    seeds: tuple[int, ...]
    gpus: int = 0
    hybrid: str = "dense,nsa"
    sparse: tuple[str, ...] = ()
    limit: int = 1200

    def missing(self) -> str:
        """Why it cannot be run here, or nothing."""
        found = torch.cuda.device_count()
        return f"needs {self.gpus} GPU, {found} found" if found < self.gpus else ""


VALIDATED = 2**17
"""Tokens of a validation on a GPU, of which there are two: TorchTitan validates after the first step as well."""


def _gpu(flavor: str, length: int, batch: int, steps: int, seeds: int, *more: str) -> Tier:
    options = (
        f"--training.seq_len={length}", f"--training.local_batch_size={batch}", f"--training.steps={steps}",
        # The flavor's file has the warm-up of a long run, which may be all of a short one.
        f"--lr_scheduler.warmup_steps={steps // 4}",
        f"--validation.seq_len={length}", f"--validation.local_batch_size={batch}", f"--validation.freq={steps}",
        f"--validation.steps={VALIDATED // (length * batch)}", "--metrics.log_freq=5", "--checkpoint.no-enable", *more,
    )  # fmt: skip
    return Tier(flavor, options, tuple(range(seeds)), gpus=1, hybrid="dense,nsa,nsa,nsa", limit=300)


TIERS: Mapping[str, Tier] = {
    "cpu": Tier(
        "debug",
        (
            "--training.seq_len=256", "--training.local_batch_size=2", "--training.steps=240",
            "--validation.seq_len=256", "--validation.local_batch_size=8", "--validation.freq=240",
            "--validation.steps=4", "--metrics.log_freq=2", "--checkpoint.no-enable", "--nsa.selection_metrics",
        ),
        (0, 1, 2, 3, 4),
        # The flavor's sizes leave nothing out of so short a sequence.
        sparse=("--nsa.select_block_size=16", "--nsa.num_selected_blocks=6", "--nsa.window_size=32"),
    ),
    "100m-4k": _gpu("100m", 4096, 4, 200, 3),
    "100m-16k": _gpu("100m", 16384, 1, 200, 3),
    "100m-32k": _gpu("100m", 32768, 1, 100, 3),
    # One H200 holds all activations. Starting takes most of the time, hence two seeds.
    "1b-32k": _gpu("1b", 32768, 1, 30, 2, "--activation_checkpoint.mode=none"),
}  # fmt: skip


def models(tier: Tier) -> dict[str, tuple[str, ...]]:
    """Options of each model, by its name."""
    return {
        "NSA": (f"--model.flavor={tier.flavor}", *tier.sparse),
        "hybrid": (f"--model.flavor={tier.flavor}", f"--nsa.attention={tier.hybrid}", *tier.sparse),
        "dense": (f"--model.flavor={tier.flavor}_dense",),
    }


Runs = dict[str, dict[int, Metrics]]
"""What each model logged, by its name and the seed."""


def _print(line: str) -> None:
    print(line, flush=True)  # at once, or a call that is cut would say nothing


def run(
    tier: Tier,
    folder: Path,
    processes: int,
    keep: Callable[[Runs], object],
    say: Callable[[str], object] = _print,
) -> tuple[Runs, list[str]]:
    """Trains every model with every seed, so many at a time, and says how each run ended.

    Args:
        tier: what is trained.
        folder: gets a folder for each run.
        processes: runs at a time.
        keep: takes all the runs that have ended well, after each of them.
        say: takes lines.

    Returns:
        The runs that ended well, and what those that failed said.
    """
    options, runs = models(tier), Runs()
    failures: list[str] = []

    def one(name: str, seed: int) -> Metrics:
        arguments = (*tier.options, *options[name], f"--debug.seed={seed}")
        return train(arguments, folder / f"{name}-{seed}", at_once=processes, timeout=tier.limit)

    with ThreadPoolExecutor(processes) as pool:
        jobs = {pool.submit(one, name, seed): (name, seed) for seed, name in product(tier.seeds, options)}
        for job in as_completed(jobs):
            name, seed = jobs[job]
            try:
                metrics = job.result()
                say(f"{name:8} seed {seed}  validation loss {final(metrics):.3f}")
            except RuntimeError as error:
                failures.append(f"{name} seed {seed}: {error}")
                say(failures[-1])
                continue
            found = {**runs, name: {**runs.get(name, {}), seed: metrics}}
            runs = {name: dict(sorted(found[name].items())) for name in options if name in found}
            keep(runs)
    return runs, failures


def final(metrics: Metrics) -> float:
    """The last validation loss, in nats a token."""
    return list(metrics[VALIDATION_LOSS].values())[-1]


class Paired(NamedTuple):
    """A difference from dense that was measured seed by seed: its mean, its standard error, and dense's mean."""

    difference: float
    error: float
    dense: float

    @property
    def holds(self) -> bool:
        """Whether it is within one standard error, or within 1%, of dense."""
        # The error of a single seed is NaN.
        return self.difference <= (numerics.SEEDS_LOSS_RATIO - 1) * self.dense or self.difference <= self.error

    def __str__(self) -> str:
        return f"{self.difference:+.4f} ± {self.error:.4f} nats ({self.difference / self.dense:+.2%})"


def shared(runs: Runs, name: str) -> list[tuple[int, Metrics]]:
    """Runs of a model, with their seeds, beside which there is one of dense."""
    return [(seed, metrics) for seed, metrics in runs[name].items() if seed in runs.get("dense", {})]


def paired(runs: Runs, name: str, of: Callable[[Metrics], float] = final) -> Paired:
    """How far a model is from dense, by the seeds that both were trained with."""
    differences = [of(metrics) - of(runs["dense"][seed]) for seed, metrics in shared(runs, name)]
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return Paired(statistics.mean(differences), error, statistics.mean(map(of, runs["dense"].values())))


def table(runs: Runs) -> list[str]:
    """Rows of Markdown: mean and standard deviation over the seeds, and what NSA and the hybrid are from dense."""
    rows = [
        "| model | validation loss | perplexity | gradient norm, median | tokens/s | peak memory (GiB) | from dense |",
        "|---" * 7 + "|",
    ]
    for name, by_seed in runs.items():
        losses = [final(metrics) for metrics in by_seed.values()]
        every = list(by_seed.values())
        norm = statistics.median(x for metrics in every for x in metrics[GRAD_NORM].values())
        speed = statistics.median(x for metrics in every for x in metrics.speeds)
        memory = max(x for metrics in every for x in (metrics[ACTIVE_GIB] or metrics[MEMORY_GIB]).values())
        loss = f"{statistics.mean(losses):.3f} ± {statistics.stdev(losses) if len(losses) > 1 else math.nan:.3f}"
        apart = str(paired(runs, name)) if name != "dense" and shared(runs, name) else ""
        perplexity = f"{math.exp(statistics.mean(losses)):.2f}"
        rows.append(f"| {name} | {loss} | {perplexity} | {norm:.2f} | {speed:,.0f} | {memory:.2f} | {apart} |")
    return rows


def curves(runs: Runs) -> Figure:
    """Training loss and gradient norm against step: the mean over seeds, and a band from the least to the most."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for metric, title, axis in zip((LOSS, GRAD_NORM), ("loss (nats a token)", "gradient norm"), axes, strict=True):
        for name, by_seed in runs.items():
            steps = list(next(iter(by_seed.values()))[metric])
            values = torch.tensor([[metrics[metric][step] for step in steps] for metrics in by_seed.values()])
            [line] = axis.plot(steps, values.mean(0), label=name)
            axis.fill_between(steps, values.amin(0), values.amax(0), color=line.get_color(), alpha=0.2)
        axis.set(xlabel="step", ylabel=title)
        axis.grid(alpha=0.3)
        axis.legend()
    return figure


def watched(runs: Runs) -> list[Metrics]:
    """Runs of NSA that logged how healthy the selection is."""
    return [metrics for metrics in runs.get("NSA", {}).values() if metrics["selection/forced"]]


def health(runs: Runs) -> Figure:
    """Selection and gates of NSA against step, a panel a metric: the mean over seeds."""
    logged = watched(runs)
    names = sorted({name for m in logged for r in m.records for name in r if name.startswith(("selection/", "gates/"))})
    columns = 5
    lines = -(-len(names) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(11, 1.9 * lines), layout="constrained", squeeze=False)
    for name, axis in zip(names, axes.flat, strict=False):
        steps = list(logged[0][name])
        axis.plot(steps, torch.tensor([[metrics[name][step] for step in steps] for metrics in logged]).mean(0))
        axis.set_title(name, fontsize=8)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    figure.supxlabel("step")
    return figure


def read(file: Path) -> Runs:
    """Runs from where they were saved."""
    saved: dict[str, Any] = json.loads(file.read_text())["runs"]
    return {name: {int(seed): Metrics(tuple(r)) for seed, r in by_seed.items()} for name, by_seed in saved.items()}


def write(folder: Path, runs: Runs, command: str) -> None:
    """Saves runs, with the command that made them and the versions: what pages show, six digits of each figure."""
    records = {
        name: {seed: [_shortened(record) for record in metrics.records] for seed, metrics in by_seed.items()}
        for name, by_seed in runs.items()
    }
    saved = {"command": command, "torch": torch.__version__, "runs": records}
    write_whole(folder / FILE, json.dumps(saved) + "\n")


_SHOWN = re.compile(r"step|.*loss|grad_norm|throughput|memory/max_active\(GiB|selection/|gates/")


def _shortened(record: Mapping[str, Any]) -> dict[str, Any]:
    shown = {name: x for name, x in record.items() if _SHOWN.match(name)}
    return {name: float(f"{x:.6g}") if isinstance(x, float) else x for name, x in shown.items()}


def save(folder: Path, runs: Runs, command: str) -> None:
    """Saves runs as `write` does, and their pictures."""
    write(folder, runs, command)
    pictures = {"repeats": partial(curves, runs)}
    reports.save_pictures(folder, pictures | ({"selection": partial(health, runs)} if watched(runs) else {}))


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains a tier; 1 where a run failed, 3 where this machine cannot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tier", choices=TIERS, default="cpu")
    parser.add_argument("--out", type=Path, default=Path("out/repeats"), help="folder of runs, results and the picture")
    parser.add_argument("--jobs", type=int, default=None, help="runs at a time (default: one a core, or one on a GPU)")
    given = parser.parse_args(arguments)
    tier = TIERS[given.tier]
    if reason := tier.missing():
        print(f"{given.tier} was not run here: it {reason}", file=sys.stderr)
        return 3
    command, processes = reports.command_line("validation.system.repeats", arguments), os.cpu_count() or 1
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / FILE).unlink(missing_ok=True)  # what an earlier call found is not this one's
    keep = partial(write, given.out, command=command)
    runs, failures = run(tier, given.out, given.jobs or (1 if tier.gpus else processes), keep)
    if runs:
        save(given.out, runs, command)
        print("\n".join(table(runs)))
    if failures:
        print(f"{len(failures)} of {len(models(tier)) * len(tier.seeds)} runs failed", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
