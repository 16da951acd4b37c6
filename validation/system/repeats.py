"""Training with error bars: NSA, a hybrid and the dense twin on the same data, over several seeds.

    python -m validation.system.repeats --tier cpu --out out/repeats     # minutes on two cores
    python -m validation.system.repeats --tier 100m-32k                  # on a GPU

A seed draws the initial weights and orders the data, the same for all three models. So differences are paired: that of
NSA from dense is taken by seed, and its standard error says how much of it the choice of seeds may be.
"""

import argparse
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from validation.runs import ACTIVE_GIB, LOSS, MEMORY_GIB, TOKENS_PER_SECOND, VALIDATION_LOSS, Metrics, train

GRAD_NORM = "grad_norm"
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
    """

    flavor: str
    options: tuple[str, ...]
    seeds: tuple[int, ...]
    gpus: int = 0
    hybrid: str = "dense,nsa"
    sparse: tuple[str, ...] = ()

    def missing(self) -> str:
        """Why it cannot be run here, or nothing."""
        found = torch.cuda.device_count()
        return f"needs {self.gpus} GPU, {found} found" if found < self.gpus else ""


def _gpu(flavor: str, length: int, batch: int, steps: int, seeds: int) -> Tier:
    options = (
        f"--training.seq_len={length}", f"--training.local_batch_size={batch}", f"--training.steps={steps}",
        f"--validation.seq_len={length}", f"--validation.freq={steps}", "--validation.steps=8",
        "--metrics.log_freq=10", "--checkpoint.no-enable",
    )  # fmt: skip
    return Tier(flavor, options, tuple(range(seeds)), gpus=1, hybrid="dense,nsa,nsa,nsa")


TIERS: Mapping[str, Tier] = {
    "cpu": Tier(
        "debug",
        (
            "--training.seq_len=256", "--training.local_batch_size=2", "--training.steps=80",
            "--validation.seq_len=256", "--validation.local_batch_size=8", "--validation.freq=80",
            "--validation.steps=4", "--metrics.log_freq=2", "--checkpoint.no-enable", "--nsa.selection_metrics",
        ),
        (0, 1, 2),
        # The flavor's sizes leave nothing out of so short a sequence.
        sparse=("--nsa.select_block_size=16", "--nsa.num_selected_blocks=6", "--nsa.window_size=32"),
    ),
    "100m-4k": _gpu("100m", 4096, 4, 200, 3),
    "100m-16k": _gpu("100m", 16384, 1, 200, 3),
    "100m-32k": _gpu("100m", 32768, 1, 100, 3),
    "1b-32k": _gpu("1b", 32768, 1, 40, 3),
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


def run(tier: Tier, folder: Path, processes: int, say: Callable[[str], object] = print) -> Runs:
    """Trains every model with every seed, so many at a time."""
    jobs = list(product(models(tier).items(), tier.seeds))

    def one(job: tuple[tuple[str, tuple[str, ...]], int]) -> Metrics:
        (name, options), seed = job
        metrics = train((*tier.options, *options, f"--debug.seed={seed}"), folder / f"{name}-{seed}", timeout=1200)
        say(f"{name:8} seed {seed}  validation loss {final(metrics):.3f}")
        return metrics

    with ThreadPoolExecutor(processes) as pool:
        done = list(pool.map(one, jobs))
    runs: Runs = {}
    for ((name, _), seed), metrics in zip(jobs, done, strict=True):
        runs.setdefault(name, {})[seed] = metrics
    return runs


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
        return self.difference <= max(self.error, (numerics.SEEDS_LOSS_RATIO - 1) * self.dense)

    def __str__(self) -> str:
        return f"{self.difference:+.4f} ± {self.error:.4f} nats ({self.difference / self.dense:+.2%})"


def paired(runs: Runs, name: str, of: Callable[[Metrics], float] = final) -> Paired:
    """How far a model is from dense, by seed."""
    differences = [of(runs[name][seed]) - of(runs["dense"][seed]) for seed in runs["dense"]]
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
        speed = statistics.median(x for metrics in every for x in list(metrics[TOKENS_PER_SECOND].values())[1:])
        memory = max(x for metrics in every for x in (metrics[ACTIVE_GIB] or metrics[MEMORY_GIB]).values())
        loss = f"{statistics.mean(losses):.3f} ± {statistics.stdev(losses) if len(losses) > 1 else math.nan:.3f}"
        apart = "" if name == "dense" else str(paired(runs, name))
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


def health(runs: Runs) -> Figure:
    """Selection and gates of NSA against step, a panel a metric: the mean over seeds."""
    logged = [metrics for metrics in runs["NSA"].values() if any("selection/forced" in r for r in metrics.records)]
    names = sorted({name for m in logged for r in m.records for name in r if name.startswith(("selection/", "gates/"))})
    columns = 5
    lines = max(1, -(-len(names) // columns))
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


def save(folder: Path, runs: Runs, command: str) -> None:
    """Saves runs, with the command that made them and the versions, and their picture."""
    records = {name: {seed: metrics.records for seed, metrics in by_seed.items()} for name, by_seed in runs.items()}
    saved = {"command": command, "torch": torch.__version__, "runs": records}
    write_whole(folder / "repeats.json", json.dumps(saved) + "\n")
    reports.save_pictures(folder, {"repeats": partial(curves, runs), "selection": partial(health, runs)})


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains a tier; 3 where this machine cannot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tier", choices=TIERS, default="cpu")
    parser.add_argument("--out", type=Path, default=Path("out/repeats"), help="folder of runs, results and the picture")
    parser.add_argument("--jobs", type=int, default=None, help="runs at a time (default: one a core, or one on a GPU)")
    given = parser.parse_args(arguments)
    tier = TIERS[given.tier]
    if reason := tier.missing():
        print(f"{given.tier} was not run here: it {reason}", file=sys.stderr)
        return 3
    runs = run(tier, given.out, given.jobs or (1 if tier.gpus else os.cpu_count() or 1))
    save(given.out, runs, reports.command_line("validation.system.repeats", arguments))
    print("\n".join(table(runs)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
