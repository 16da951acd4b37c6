"""Every stage timed, forward and backward, beside dense attention and whoever else is named, all in the same run.

    python -m validation.perf.stages --out FILE --workloads W,W4 --lengths 8192,32768 --peer package.module:object

A peer is an `Implementation` (see `validation.implementations`) or a function that makes one; the stages it has are
timed. A stage that fails is reported and recorded with its error, and the rest goes on. The file that is written holds
what `validation.perf.report` makes its tables from.
"""

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..cases import Case
from ..implementations import Implementation, load
from ..stages import TIMED, WHOLE, StageSpec
from .precompile import OPTION, precompile, take_jobs
from .rivals import RIVALS
from .timing import (
    describe_machine,
    device_ops,
    host_times,
    keep_memory,
    measure,
    measure_roofs,
    peak_memory,
)
from .workloads import WORKLOADS, Inputs, Workload

PRECOMPILE_SECONDS = 240
"""For the kernels of one run; what is not ready by then is compiled when it is needed."""


def _outputs(stage: StageSpec, subject: Implementation, case: Case, x: Inputs) -> tuple[Tensor, ...]:
    taken = {name: x[name] for name in (*stage.inputs, *stage.given) if name in x}
    found = stage.call(subject, case, taken)
    return tuple(y for name, y in found.items() if name != "lse")  # nothing is differentiated by it


def _leaves(stage: StageSpec, x: Inputs) -> list[Tensor]:
    return [x[name].requires_grad_() for name in stage.inputs if name in x]


def forward(stage: StageSpec, subject: Implementation, case: Case, x: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    """The stage as a function of nothing, without what a backward pass would need."""
    return torch.no_grad()(partial(_outputs, stage, subject, case, x))


def backward(stage: StageSpec, subject: Implementation, case: Case, x: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    """Its backward pass alone, any number of times, for a gradient as a layer above would hand it down."""
    leaves = _leaves(stage, x)
    outputs = _outputs(stage, subject, case, x)
    upstream = _noise_like(outputs)
    # A rival may have no use for some of the inputs.
    return lambda: torch.autograd.grad(outputs, leaves, upstream, retain_graph=True, allow_unused=True)


def step(stage: StageSpec, subject: Implementation, case: Case, x: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward pass, as one training step has them; the same gradient from above every time."""
    leaves = _leaves(stage, x)
    upstream: list[Tensor] = []

    def run() -> tuple[Tensor, ...]:
        outputs = _outputs(stage, subject, case, x)
        if not upstream:
            upstream.extend(_noise_like(outputs))
        return torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)

    return run


def _noise_like(outputs: Sequence[Tensor]) -> list[Tensor]:
    return [torch.randn(y.shape, dtype=y.dtype, device=y.device) for y in outputs]


def find(name: str) -> Implementation:
    """An implementation by name or as `package.module:object`; a rival by its key."""
    return RIVALS[name]() if name in RIVALS else load(name)


def host_figures(call: Callable[[], Any]) -> dict[str, float]:
    """What starting a call costs: the host's time for it, and how many operations it is on a GPU."""
    times = host_times(call)
    ops = {"device_ops": device_ops(call)} if torch.cuda.is_available() else {}
    return {"host_sustained": times.sustained, "host_cold": times.cold, **ops}


def measure_stage(
    subject: Implementation, name: str, x: Inputs, workload: Workload, length: int, rounds: int
) -> Iterator[dict[str, Any]]:
    """Records of one stage of one subject: its forward pass alone, its backward pass alone.

    Times are in ms. `memory`, in bytes, is the peak of the forward pass alone, and of both as a training step has them.
    `host_sustained` and `host_cold` are what the host takes to start a whole op, `device_ops` what it starts on a GPU.
    """
    stage, case = TIMED[name], workload.case(length)

    def record(direction: str, call: Callable[[], Any], memory: int) -> dict[str, Any]:
        host = host_figures(call) if stage is WHOLE else {}
        return {"direction": direction, **asdict(measure(call, rounds=rounds)), "memory": memory, **host}

    call = forward(stage, subject, case, x)
    yield record("forward", call, peak_memory(call))
    if stage.differentiable:
        memory = peak_memory(step(stage, subject, case, x))
        yield record("backward", backward(stage, subject, case, x), memory)


def _draw(workload: Workload, length: int) -> Inputs:
    return workload.draw(length, "cuda" if torch.cuda.is_available() else "cpu")


def _launch_once(job: tuple[Implementation, str, Workload], lengths: Sequence[int]) -> None:
    subject, stage, workload = job
    for length in lengths:
        x, case = _draw(workload, length), workload.case(length)
        forward(TIMED[stage], subject, case, x)()
        if TIMED[stage].differentiable:
            backward(TIMED[stage], subject, case, x)()


def main() -> int:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument("--impl", default="triton" if on_gpu else "eager", help="the implementation that it is about")
    parser.add_argument("--peer", action="append", default=[], help="another one, NAME or package.module:object")
    parser.add_argument("--workloads", default="W,W4,W192" if on_gpu else "tiny", help=f"of {', '.join(WORKLOADS)}")
    parser.add_argument("--lengths", help="in tokens")
    parser.add_argument("--stages", default=",".join(TIMED), help="default: all")
    parser.add_argument("--rounds", type=int, help="timed calls of each; default: 10")
    parser.add_argument("--quick", action="store_true", help="one length and 3 rounds, unless told otherwise")
    parser.add_argument(
        "--processes", type=int, default=min(10, os.cpu_count() or 1) if on_gpu else 1, help="compiling"
    )
    parser.add_argument(OPTION, dest="jobs", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)  # on a CPU a pool of threads measures what else the machine is doing
    if not on_gpu:
        keep_memory()

    default = ("8192" if options.quick else "4096,8192,16384,32768,65536") if on_gpu else "256,1024"
    lengths = sorted(map(int, (options.lengths or default).split(",")))
    workloads, stages = ([WORKLOADS[n] for n in options.workloads.split(",")], options.stages.split(","))
    rounds = options.rounds or (3 if options.quick else 10)
    # Whoever cannot be imported ends it here. FlexAttention is for GPUs.
    subjects = [find(name) for name in (options.impl, "dense", *(["flex"] if on_gpu else []), *options.peer)]

    jobs = [(s, stage, w) for stage in stages for w in workloads for s in subjects if getattr(s, stage)]
    if options.jobs:
        take_jobs(jobs, options.jobs, partial(_launch_once, lengths=lengths))
        return 0
    if not options.out:
        parser.error("--out is needed")
    if options.processes > 1:
        start = time.monotonic()
        command = [sys.executable, "-m", f"{__package__}.stages", *sys.argv[1:]]
        outcomes = precompile(command, options.processes, PRECOMPILE_SECONDS)
        print(f"precompiled {len(outcomes)} of {len(jobs)} in {time.monotonic() - start:.0f} s", flush=True)

    roofs = measure_roofs()
    report: dict[str, Any] = {
        "machine": describe_machine(),
        "roofs": asdict(roofs),
        "subject": subjects[0].name,
        "results": [],
        "failures": [],
    }
    for workload in workloads:
        for length in lengths:
            for rival in subjects:
                x = _draw(workload, length)
                for stage in (name for name in stages if getattr(rival, name)):
                    key = {"workload": workload.name, "length": length, "stage": stage, "subject": rival.name}
                    try:
                        for record in measure_stage(rival, stage, x, workload, length, rounds):
                            report["results"].append({**key, **record})
                            floor = workload.floor(stage, record["direction"], length, roofs)
                            print(_line(report["results"][-1], floor), flush=True)
                    except Exception as failure:  # also of the compiler or the driver
                        message = f"{type(failure).__name__}: {failure}"
                        report["failures"].append({**key, "error": message})
                        print(f"FAILED {' '.join(map(str, key.values()))}: {message[:300]}", flush=True)
                    gc.collect()
                del x
                if on_gpu:
                    torch.cuda.empty_cache()
                options.out.write_text(json.dumps(report, indent=1) + "\n")
    failed = [failure for failure in report["failures"] if failure["subject"] == subjects[0].name]
    print(f"{len(report['results'])} results, {len(report['failures'])} failures, {options.out}")
    return 1 if failed else 0


def _line(record: dict[str, Any], floor: float) -> str:
    """One result on one line of a screen."""
    return (
        f"{record['workload']:>5} {record['length']:>6} {record['stage']:<25}{record['direction']:<9}"
        f"{record['subject']:<16}{record['median']:>9.3f} ms  floor {floor:8.3f}"
        f" {record['memory'] / 2**30:7.2f} GiB"
    )


if __name__ == "__main__":
    sys.exit(main())
