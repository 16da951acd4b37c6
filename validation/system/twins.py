"""`make train`: the debug model and its dense twin on the same text, their losses side by side.

Both train through `python -m nsa.train` as anybody would start them, at the same time and on half of the cores each:
models this small gain little from a second thread. Data and tokenizer are those of `definitions.py`. What an earlier
call left unfinished is resumed, and what it has finished is reused.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot: there may be no screen
from matplotlib import pyplot as plt

from nsa.titan.runs import NothingLeft, replacing, write_whole
from validation import reports
from validation.runs import (
    LOSS,
    MEMORY_GIB,
    TOKENS_PER_SECOND,
    VALIDATION_LOSS,
    Metrics,
    command,
    environment,
    read_metrics,
)
from validation.system.definitions import VOCABULARY, prepare

TWINS = {"NSA": "debug", "dense": "debug_dense"}
UNIFORM_LOSS = math.log(VOCABULARY)  # guessing
FINISHED = (0, NothingLeft.status)  # trained now, or by an earlier call with the same options
LAST_STEPS = 10  # logged losses averaged at the end: one batch alone says little
OPTIONS = (
    "--training.seq_len=512", "--training.local_batch_size=2", "--training.steps=800",
    "--lr_scheduler.warmup_steps=50", "--checkpoint.interval=200",
    "--validation.seq_len=512", "--validation.local_batch_size=4", "--validation.freq=200",
)  # fmt: skip
"""Of both runs: many small steps, which such models learn more from than from few large ones."""


def options_of(folder: Path) -> list[str]:
    """The options of a run, whose data and tokenizer lie in `folder`, where they are made if need be."""
    corpus, tokenizer = prepare(folder)
    return [f"--training.dataset_path={corpus}", f"--model.hf_assets_path={tokenizer}", *OPTIONS]


def summarise(runs: dict[str, Metrics]) -> dict[str, Any]:
    """Final losses (nats a token), median tokens/s and peak memory (GiB) of each run; NSA's losses over dense."""
    summary: dict[str, Any] = {}
    for name, metrics in runs.items():
        losses, speeds = metrics[LOSS], sorted(metrics[TOKENS_PER_SECOND].values())
        last = list(losses.values())[-LAST_STEPS:]
        summary[name] = {
            "steps": max(losses),
            "training_loss": sum(last) / len(last),
            "validation_loss": next(reversed(metrics[VALIDATION_LOSS].values()), math.nan),
            "tokens_per_second": speeds[len(speeds) // 2],
            "memory_gib": max(metrics[MEMORY_GIB].values()),
        }
    for loss in ("training_loss", "validation_loss"):
        summary[f"{loss}_ratio"] = summary["NSA"][loss] / summary["dense"][loss]
    return summary


def plot(runs: dict[str, Metrics], file: Path) -> None:
    """Loss against step, training as lines and validation as points."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for (name, metrics), color, marker in zip(runs.items(), ("#0072b2", "#d55e00"), ("o", "s"), strict=True):
        losses, validation = metrics[LOSS], metrics[VALIDATION_LOSS]
        axes.plot(list(losses), list(losses.values()), color=color, label=f"{name}, training")
        axes.plot(
            list(validation), list(validation.values()), marker, color=color, mec="black", label=f"{name}, validation"
        )
    axes.axhline(UNIFORM_LOSS, color="0.5", linestyle=":", label="guessing")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="NSA and its dense twin on Python source text")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(file) as temporary:
        figure.savefig(temporary, dpi=150)
    plt.close(figure)


def report(summary: dict[str, Any]) -> str:
    """The summary as a table that fits a screen."""
    rows = [
        ("steps", "steps", "{:.0f}"),
        ("training loss, end", "training_loss", "{:.3f}"),
        ("validation loss", "validation_loss", "{:.3f}"),
        ("tokens/s", "tokens_per_second", "{:,.0f}"),
        ("peak memory (GiB)", "memory_gib", "{:.2f}"),
    ]
    lines = [f"{'':20}" + "".join(f"{name:>12}" for name in TWINS)]
    lines += [
        f"{title:20}" + "".join(f"{form.format(summary[n][key]):>12}" for n in TWINS) for title, key, form in rows
    ]
    lines += [
        f"NSA / dense: training {summary['training_loss_ratio']:.3f}, validation {summary['validation_loss_ratio']:.3f}"
    ]
    return "\n".join(lines)


def train_both(commands: dict[str, list[str]]) -> int:
    """Runs the commands at once, each line of their output behind the name.

    Returns:
        The first status of a run that is not finished, or 0.
    """
    runs = {
        name: subprocess.Popen(
            arguments, env=environment(len(commands)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for name, arguments in commands.items()
    }

    def follow(name: str, run: subprocess.Popen[str]) -> None:
        assert run.stdout is not None
        for line in run.stdout:
            print(f"{name:>5} | {line}", end="", flush=True)

    readers = [threading.Thread(target=follow, args=run) for run in runs.items()]
    for reader in readers:
        reader.start()
    try:
        for run in runs.values():
            run.wait()
    except KeyboardInterrupt:  # the runs got the signal too and are saving their checkpoints
        for run in runs.values():
            run.wait()
        return 130
    finally:
        for reader in readers:
            reader.join()
    return next((run.returncode for run in runs.values() if run.returncode not in FINISHED), 0)


def main() -> int:
    """Trains both, resuming unless told otherwise, and writes `loss.png` and `metrics.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fresh", action="store_true", help="start anew instead of resuming")
    parser.add_argument("--folder", type=Path, default=Path("out/train"), help="where everything goes")
    arguments, options = parser.parse_known_args()  # what is not known here is an option of the trainer
    folder: Path = arguments.folder
    if arguments.fresh:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--folder {folder} cannot be made ({error.strerror}): name another, as in make train OUT=FOLDER")
    common = [*options_of(folder), *options]
    status = train_both({name: command([f"--model.flavor={f}", *common], folder / f) for name, f in TWINS.items()})
    if status:
        print(f"\nStopped. `make train` goes on from the checkpoints in {folder}.")
        return status
    runs = {name: read_metrics(folder / flavor) for name, flavor in TWINS.items()}
    picture, figures = folder / "loss.png", folder / "metrics.json"
    with reports.attempt(f"the picture {picture}", print):
        plot(runs, picture)
        print(f"\ncurves in {picture}")
    with reports.attempt(f"the summary {figures}", print):
        summary = summarise(runs)
        records = {name: metrics.records for name, metrics in runs.items()}
        write_whole(figures, json.dumps({"summary": summary, "records": records}, indent=1) + "\n")
        print(f"figures in {figures}\n\n{report(summary)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
