"""Every layout that is held to train as one process does: a list to read, and to add to.

A layout is a way to lay one training out over processes. All of them train the same models on the same rows from the
same weights, and claim the same: losses and gradient norms of every step and the parameters at the end are those of
one process: in float32 within `numerics.LAYOUT_BOUND`, in bfloat16 as the policy has it (on CPUs, over two processes).
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import pytest
import torch

from nsa.titan.parallelize import schedules
from validation import numerics, runs
from validation.integration import ranks

STEPS = 10
GLOBAL_BATCH_SIZE = 8  # as many as the microbatches that the deepest pipeline asks for
SEQ_LEN = 128

DEEP = ("--model.flavor=debug_parallel",)
"""Six layers, for eight stages with embedding and output, and four heads of keys and values, where two are too few."""

MODELS = {"nsa": "nsa", "hybrid": "dense,nsa", "dense": "dense"}
"""Patterns of `nsa.attention` by the name of the model."""

TRAINING = (
    # Eight blocks a row, of which half are chosen: a selection that matters.
    "--nsa.select_block_size=16",
    "--nsa.num_selected_blocks=4",
    "--nsa.window_size=32",
    f"--training.seq_len={SEQ_LEN}",
    f"--training.global_batch_size={GLOBAL_BATCH_SIZE}",
    f"--training.steps={STEPS}",
    "--training.mixed_precision_param=float32",
    "--lr_scheduler.warmup_steps=2",
    "--metrics.log_freq=1",
    "--validation.no-enable",
    # The parameters at the end.
    f"--checkpoint.interval={STEPS}",
    "--checkpoint.last-save-model-only",
)
"""What all layouts train, and one process beside them."""

BFLOAT16 = ("--training.dtype=bfloat16", "--training.mixed_precision_param=bfloat16")
"""Parameters as well, because mixed precision needs FSDP, which not every layout has."""


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism, whose product is the number of processes.

    Attributes:
        name: letters and degrees, as in the id of its tests.
        description: what lies where.
        replicate, fsdp, tp, pp, cp: degrees, of TorchTitan's options of like names.
        schedule: of the pipeline.
        options: other options of TorchTitan's.
        models: names in `MODELS`.
        size: of the model, options that one process is given as well: the smallest that can be laid out so.
        smoke: whether it is among the few that `make smoke` runs.
    """

    name: str
    description: str
    replicate: int = 1
    fsdp: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    schedule: str | None = None
    options: tuple[str, ...] = ()
    size: tuple[str, ...] = ()
    models: tuple[str, ...] = tuple(MODELS)
    smoke: bool = False

    @property
    def processes(self) -> int:
        return prod((self.replicate, self.fsdp, self.tp, self.pp, self.cp))

    @property
    def marks(self) -> list[pytest.MarkDecorator]:
        """Of a test that needs it: skipped where there are too few processes, or no such schedule."""
        schedule = [has_schedule(self.schedule)] if self.schedule else []
        return [ranks.needs(self.processes), *schedule]

    @property
    def parallelism(self) -> tuple[str, ...]:
        """What it changes of a command line for one process, whatever is trained."""
        degrees = {
            "data_parallel_replicate": self.replicate,
            "data_parallel_shard": self.fsdp,
            "tensor_parallel": self.tp,
            "pipeline_parallel": self.pp,
            "context_parallel": self.cp,
        }
        return (
            *(f"--parallelism.{name}_degree={degree}" for name, degree in degrees.items()),
            *([f"--parallelism.pipeline_parallel_schedule={self.schedule}"] if self.schedule else []),
            *self.options,
        )

    @property
    def arguments(self) -> tuple[str, ...]:
        """What it changes of the command line for `TRAINING` in one process."""
        rows = GLOBAL_BATCH_SIZE // (self.replicate * self.fsdp)
        batch = (f"--{kind}.local_batch_size={rows}" for kind in ("training", "validation"))
        return (*self.parallelism, *batch, *self.size)


def _balancer(name: str) -> tuple[str, ...]:
    return (f"--parallelism.context_parallel_load_balancer={name}",)


COMPILE = ("--compile.enable",)
# Traced and differentiated ahead, but run as it is: generating code for a CPU takes a minute a layout.
TRACE = (*COMPILE, "--compile.backend=aot_eager")

ONE = Layout("one", "one process")

LAYOUTS = (
    Layout("fsdp2", "parameters sharded over two", fsdp=2),
    Layout("fsdp4", "parameters sharded over four", fsdp=4),
    Layout("hsdp2x2", "two copies, each sharded over two", replicate=2, fsdp=2),
    Layout("tp2", "heads and hidden units split over two, rows of the norms as well", tp=2),
    Layout("tp2-compile", "split layers, traced", tp=2, options=TRACE),
    Layout("tp4", "one key and value head in each of four", tp=4, size=DEEP),
    Layout("pp2-1f1b", "two stages, one forward and one backward in turn", pp=2, schedule="1F1B"),
    Layout("pp2-gpipe", "two stages, all forward, then all backward", pp=2, schedule="GPipe", models=("nsa",)),
    Layout("pp2-interleaved", "four stages on two, in turn", pp=2, schedule="Interleaved1F1B"),
    Layout(
        "pp2-izb",
        "backward in halves, the weights' where it fits",
        pp=2,
        schedule="InterleavedZeroBubble",
    ),
    Layout("pp2-zbv", "four stages on two, there and back", pp=2, schedule="ZBVZeroBubble"),
    Layout("pp4-1f1b", "four stages", pp=4, schedule="1F1B"),
    Layout("pp4-interleaved", "eight stages on four", pp=4, schedule="Interleaved1F1B", size=DEEP),
    Layout("pp4-izb", "eight stages, backward in halves", pp=4, schedule="InterleavedZeroBubble", size=DEEP),
    Layout("pp4-zbv", "eight stages, there and back", pp=4, schedule="ZBVZeroBubble", size=DEEP),
    Layout("cp2", "rows in two chunks", cp=2, options=_balancer("None")),
    Layout("cp2-headtail", "an early and a late chunk each", cp=2, options=_balancer("headtail"), smoke=True),
    Layout("cp4", "rows in four chunks", cp=4, options=_balancer("None")),
    Layout("cp4-headtail", "rows in eight chunks, two each", cp=4, options=_balancer("headtail")),
    Layout("fsdp2-tp2", "shards of split layers", fsdp=2, tp=2, smoke=True),
    Layout("fsdp2-tp2-compile", "shards of split layers, traced", fsdp=2, tp=2, options=TRACE),
    Layout("fsdp2-compile", "every block compiled", fsdp=2, options=COMPILE, models=("nsa",)),
    Layout("fsdp2-cp2", "rows and chunks of rows", fsdp=2, cp=2),
    Layout("cp2-compile", "chunks, traced", cp=2, options=(*_balancer("headtail"), *TRACE), models=("nsa",)),
    Layout("tp2-cp2", "heads of chunks", tp=2, cp=2),
    Layout("pp2-fsdp2", "two stages, each sharded", pp=2, fsdp=2, schedule="1F1B"),
    Layout("pp2-tp2", "two stages of split layers", pp=2, tp=2, schedule="1F1B"),
    Layout("pp2-izb-tp2", "half backward passes", pp=2, tp=2, schedule="InterleavedZeroBubble", models=("nsa",)),
    Layout("pp2-zbv-fsdp2", "there and back, sharded", pp=2, fsdp=2, schedule="ZBVZeroBubble", models=("nsa",)),
    Layout("pp2-cp2", "two stages of chunks", pp=2, cp=2, schedule="1F1B"),
)


BY_NAME = {layout.name: layout for layout in (ONE, *LAYOUTS)}


def has_schedule(name: str) -> pytest.MarkDecorator:
    """Skips a test of a pipeline schedule that this PyTorch has on a GPU alone."""
    missing = name not in schedules(ranks.ON_GPUS)
    return pytest.mark.skipif(missing, reason=f"PyTorch {torch.__version__} has no {name} over gloo")


def train(layout: Layout, folder: Path, *options: str) -> None:
    """Trains `TRAINING` with these options into `folder`.

    Raises:
        ranks.RankFailed: as `ranks.Job.wait`.
    """
    ranks.train((*TRAINING, *layout.arguments, *options), folder, processes=layout.processes)


def assert_same(folder: Path, expected: Path, names: tuple[str, ...] = (runs.LOSS, "grad_norm")) -> None:
    """Fails unless a float32 run is the one in `expected`: the metrics of every step, the parameters at the end."""
    numerics.assert_same_training(runs.read_metrics(folder), runs.read_metrics(expected), names)
    numerics.assert_same_parameters(runs.read_parameters(folder, STEPS), runs.read_parameters(expected, STEPS))


OneProcess = Callable[..., Path]
"""The fixture `one_process`: trains with options in one process, and returns the folder."""
