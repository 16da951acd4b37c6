"""Makes entries of the table of kernel configurations, by measuring candidates on this machine's GPU.

    python -m validation.perf.tune --dims 128x128 --groups 4,16 --seconds 540

Candidates are compiled by many processes first and then timed one after the other: the whole operation, since that is
what anybody waits for, at every length. Taken is the one with the least sum of times, each in units of the best time at
its length. A candidate whose results differ from those of the parameters in use is no candidate. Kernels of one
operation come one after the other, each beside the choice made for the one before. What the time allowed leaves undone
keeps its place in the table; each entry is written when it is found.

The compressed and the window branch have (token, head) pairs for rows, and are tuned for the largest group alone.
"""

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch

from nsa import kernels
from nsa.config import NSAConfig
from nsa.kernels import configs
from nsa.kernels.configs import Entry
from nsa.kernels.hopper import portable

from ..adapters.triton import triton
from ..stages import TIMED
from . import stages
from .precompile import OPTION, precompile, take_jobs
from .timing import describe_machine, measure
from .workloads import Workload

Launch = dict[str, Any]
"""Fields of a configuration that a candidate changes."""

PRUNE = 1.3
"""At the shortest length, whatever takes so many times as long as the best is dropped."""

TOLERANCE = 0.02
"""Relative error, or share of differing integers, between the results of candidates in 16 bits: they round differently,
and where two blocks are equally important that decides."""


def _each(**values: list[Any]) -> list[Launch]:
    """Every combination."""
    return [dict(zip(values, combination, strict=True)) for combination in product(*values.values())]


def _tiles(*tiles: tuple[int, int, int], **values: list[Any]) -> list[Launch]:
    """Every combination of tiles `(BLOCK_M, BLOCK_N, num_warps)` with the rest."""
    names = ("BLOCK_M", "BLOCK_N", "num_warps")
    return [{**dict(zip(names, tile, strict=True)), **rest} for tile in tiles for rest in _each(**values)]


def _forward(group: int) -> list[Launch]:
    tiles = [(64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 64, 8), (128, 128, 8), (256, 64, 8)]
    pointers = _tiles((128, 64, 8), (64, 64, 4), num_stages=[2, 3], SPLIT=[True], TMA=[False])
    return _tiles(*tiles, num_stages=[2, 3], SPLIT=[True, False], TMA=[True]) + pointers


def _bwd_dq(group: int) -> list[Launch]:
    tiles = [(64, 32, 4), (64, 64, 4), (64, 64, 8), (128, 32, 8), (128, 64, 8)]
    pointers = _tiles((64, 64, 4), num_stages=[2, 3], SPLIT=[True], TMA=[False])
    return _tiles(*tiles, num_stages=[2, 3], SPLIT=[True, False], TMA=[True]) + pointers


def _bwd_dkdv(programs: list[int]) -> Callable[[int], list[Launch]]:
    tiles = [(32, 64, 4), (64, 64, 4), (64, 64, 8), (32, 128, 8), (64, 128, 8)]
    return lambda group: _tiles(*tiles, num_stages=[2, 3], SPLIT=[True, False], TMA=[True], num_programs=programs)


def _importance(group: int) -> list[Launch]:
    return _each(BLOCK_M=[64, 128], BLOCK_N=[64, 128], num_warps=[4, 8], num_stages=[2, 3])


# Where few heads share what is fetched, query-major kernels are hopeless, and where many do, key-major ones are.


def _selected_forward_key_major(group: int) -> list[Launch]:
    if group > 8:
        return []
    return [{"CHUNK": 2048}, *_each(BLOCK_M=[64, 128], num_warps=[4, 8], num_stages=[1, 2, 3], CHUNK=[1024])]


def _selected_forward(group: int) -> list[Launch]:
    query_major = _each(key_major=[False], TMA=[True], BLOCK_N=[32, 64], num_warps=[1, 2, 4], num_stages=[2, 3, 4])
    return (query_major if group >= 4 else []) + ([{"key_major": True}] if group <= 8 else [])


def _selected_bwd_dq(group: int) -> list[Launch]:
    if group < 4:
        return []
    return _each(TMA=[True], BLOCK_N=[32, 64], num_warps=[1, 2, 4], num_stages=[2, 3])


def _selected_tiles(group: int) -> list[Launch]:
    if group < 8:
        return []
    return _each(
        TMA=[True], BLOCK_M=[64], BLOCK_N=[32, 64], num_warps=[4], num_stages=[1, 2, 3], maxnreg=[None, 168],
        most_keys=[1 << 14],
    )  # fmt: skip


def _selected_on_hopper(group: int) -> list[Launch]:
    return _each(num_warps=[4], num_stages=[2], maxnreg=[96, 128, 168], longest=[1 << 20])


def _selected_bwd_dkdv(group: int) -> list[Launch]:
    shapes = {"num_warps": [4, 8], "num_stages": [1, 2, 3]}
    query_major = _each(key_major=[False], BLOCK_M=[32, 64, 128], CHUNK=[1024], **shapes)
    key_major = _each(key_major=[True], BLOCK_M=[32, 64, 128], CHUNK=[2048], **shapes)
    return (query_major if group >= 4 else []) + (key_major if group <= 8 else [])


@dataclass(frozen=True)
class Kernel:
    """One kernel of the table: the operation that launches it, what to try, and what holds of others meanwhile."""

    stage: str
    direction: str
    candidates: Callable[[int], list[Launch]]
    meanwhile: dict[str, Launch] = field(default_factory=dict)
    any_group: bool = False


KERNELS = {
    "compressed_forward": Kernel("compressed_attention", "forward", _forward, any_group=True),
    "compressed_bwd_dq": Kernel("compressed_attention", "backward", _bwd_dq, any_group=True),
    "compressed_bwd_dkdv": Kernel("compressed_attention", "backward", _bwd_dkdv([1056]), any_group=True),
    "window_forward": Kernel("sliding_window_attention", "forward", _forward, any_group=True),
    "window_bwd_dq": Kernel("sliding_window_attention", "backward", _bwd_dq, any_group=True),
    "window_bwd_dkdv": Kernel("sliding_window_attention", "backward", _bwd_dkdv([132]), any_group=True),
    "importance": Kernel("select_blocks", "forward", _importance),
    "selected_forward_key_major": Kernel(
        "selected_attention",
        "forward",
        _selected_forward_key_major,
        meanwhile={"selected_forward": {"key_major": True}},
    ),
    "selected_forward": Kernel(
        "selected_attention",
        "forward",
        _selected_forward,
        meanwhile={"selected_forward_tiles": {"most_keys": 0}},
    ),
    "selected_forward_tiles": Kernel(
        "selected_attention",
        "forward",
        _selected_tiles,
        meanwhile={"selected_forward": {"key_major": False}},
    ),
    "selected_forward_hopper": Kernel("selected_attention", "forward", _selected_on_hopper),
    # Where gradients are made by block, those of queries are too, and this kernel is not launched.
    "selected_bwd_dq": Kernel(
        "selected_attention",
        "backward",
        _selected_bwd_dq,
        meanwhile={
            "selected_bwd_dkdv": {"key_major": False},
            "selected_bwd_dq_tiles": {"most_keys": 0},
        },
    ),
    "selected_bwd_dq_tiles": Kernel(
        "selected_attention",
        "backward",
        _selected_tiles,
        meanwhile={"selected_bwd_dkdv": {"key_major": False}},
    ),
    "selected_bwd_dq_hopper": Kernel("selected_attention", "backward", _selected_on_hopper),
    "selected_bwd_dkdv": Kernel("selected_attention", "backward", _selected_bwd_dkdv),
}


@dataclass(frozen=True)
class Subject:
    """What one entry is for."""

    name: str
    workload: Workload

    @property
    def kernel(self) -> Kernel:
        return KERNELS[self.name]

    def candidates(self) -> list[Launch]:
        """Those in use now, and what to try."""
        return [{}, *self.kernel.candidates(self.workload.group)]

    @contextmanager
    def using(self, candidate: Launch) -> Iterator[None]:
        """Launches the kernel with these parameters inside the context."""
        with ExitStack() as stack:
            if not self.name.endswith("_hopper"):  # those would run in its place
                stack.enter_context(portable())
            for name, launch in {**self.kernel.meanwhile, self.name: candidate}.items():
                stack.enter_context(configs.override(name, **launch))
            yield

    def entry(self, candidate: Launch) -> Entry:
        """The entry of the table that a candidate, an override of what is in use, would be."""
        work = self.workload
        # Selection looks at keys alone.
        value_dim = work.key_dim if self.kernel.stage == "select_blocks" else work.value_dim
        on_gpu = torch.cuda.is_available()
        architecture = configs.architecture(torch.cuda.current_device()) if on_gpu else "cpu"
        with configs.override(self.name, **candidate):
            found = configs.kernel_config(self.name, work.dtype, work.key_dim, value_dim, work.group)
        dims = (configs.padded(work.key_dim), configs.padded(value_dim))
        return Entry(self.name, architecture, work.dtype.itemsize, *dims, work.group, found)

    def call(self, length: int) -> Callable[[], tuple[torch.Tensor, ...]]:
        """The operation that launches the kernel; its inputs stay until another operation's are drawn."""
        operation = (self.workload, self.kernel.stage, self.kernel.direction)
        if any(key[:3] != operation for key in _OPERATIONS):
            _OPERATIONS.clear()  # gigabytes, and as many copies of this program as compile
            torch.cuda.empty_cache()
        if (*operation, length) not in _OPERATIONS:
            x = self.workload.draw(length, "cuda" if torch.cuda.is_available() else "cpu")
            make = stages.forward if self.kernel.direction == "forward" else stages.backward
            case = self.workload.case(length)
            _OPERATIONS[*operation, length] = make(TIMED[self.kernel.stage], triton(), case, x)
        return _OPERATIONS[*operation, length]


_OPERATIONS: dict[tuple[Any, ...], Callable[[], tuple[torch.Tensor, ...]]] = {}


def subjects(options: argparse.Namespace) -> Iterator[Subject]:
    """What is to be tuned, kernels of one operation together."""
    groups = sorted(map(int, options.groups.split(",")), reverse=True)
    for dims in options.dims.split(","):
        key_dim, value_dim = map(int, dims.split("x"))
        for group in groups:
            heads = options.kv_heads or (4 if group >= 16 else 8)
            work = Workload(f"{dims} x {group}", group * heads, heads, key_dim, value_dim, options.config)
            for name in options.kernels.split(","):
                if group == groups[0] or not KERNELS[name].any_group:
                    yield Subject(name, work)


def _launch_once(job: tuple[Subject, Launch], lengths: list[int]) -> None:
    subject, candidate = job
    with subject.using(candidate):
        for length in lengths:  # some kernels are compiled for a length
            subject.call(length)()


def same(results: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> bool:
    """Whether two candidates computed the same thing."""

    def error(x: torch.Tensor, y: torch.Tensor) -> float:
        if not x.is_floating_point():
            return float((x != y).float().mean())
        return float((x.float() - y.float()).norm() / y.float().norm())

    # Written so that it fails for what is not a number.
    return all(error(x, y) <= TOLERANCE for x, y in zip(results, expected, strict=True))


def sweep(subject: Subject, candidates: list[Launch], lengths: list[int], rounds: int, deadline: float) -> list[Any]:
    """Records of the candidates that work, best first: `launch`, `ms` by length and `score`."""
    records: list[dict[str, Any]] = []
    tried: list[dict[str, Any]]
    expected: tuple[torch.Tensor, ...] | None = None
    for length in lengths:
        best = min((record["ms"][lengths[0]] for record in records), default=0.0)
        tried = (
            [{"launch": candidate, "ms": {}} for candidate in candidates]
            if length == lengths[0]
            else [record for record in records if record["ms"][lengths[0]] <= PRUNE * best]
        )
        records = []
        call = subject.call(length)
        for record in tried:
            if time.monotonic() > deadline:
                break
            with subject.using(record["launch"]):
                try:
                    if length == lengths[0]:
                        results = call()
                        expected = results if expected is None else expected
                        if not same(results, expected):
                            print(f"  WRONG {record['launch']}", flush=True)
                            continue
                        del results
                    record["ms"][length] = measure(call, rounds=rounds).median
                    records.append(record)
                except Exception as failure:  # too much shared memory, most often
                    print(f"  {type(failure).__name__} {record['launch']}", flush=True)
        expected = None
    least = {length: min((record["ms"][length] for record in records), default=1.0) for length in lengths}
    for record in records:
        record["score"] = sum(record["ms"][length] / least[length] for length in lengths)
    return sorted(records, key=lambda record: record["score"])


def main() -> int:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", default=",".join(KERNELS), help="default: all")
    parser.add_argument("--dims", default="128x128,64x64,192x128", help="head dims of keys and values")
    parser.add_argument("--groups", default="16,4", help="query heads a KV head")
    parser.add_argument("--kv-heads", type=int, help="default: 4, for small groups 8")
    parser.add_argument("--lengths", default="8192,32768", help="in tokens")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each candidate and length")
    parser.add_argument("--seconds", type=float, default=540, help="time allowed, for everything")
    parser.add_argument("--processes", type=int, default=(os.cpu_count() or 2) - 1 if on_gpu else 1, help="compiling")
    parser.add_argument("--table", type=Path, help="the file to merge entries into; default: the package's own")
    parser.add_argument("--report", type=Path, help="a JSON file for all the times")
    parser.add_argument(OPTION, dest="jobs", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.config = NSAConfig()
    if not on_gpu and not (kernels.INTERPRETED and options.table):
        parser.error("no GPU: only under TRITON_INTERPRET=1, for a --table of its own")
    lengths = sorted(map(int, options.lengths.split(",")))
    todo = list(subjects(options))
    jobs = [(subject, candidate) for subject in todo for candidate in subject.candidates()]
    if options.jobs:
        take_jobs(jobs, options.jobs, lambda job: _launch_once(job, lengths))
        return 0

    start = time.monotonic()
    outcomes: dict[int, str | None] = dict.fromkeys(range(len(jobs)))
    if options.processes > 1:
        command = [sys.executable, "-m", f"{__package__}.tune", *sys.argv[1:]]
        outcomes = precompile(command, options.processes, 0.6 * options.seconds)
        works = sum(error is None for error in outcomes.values())
        print(f"{len(jobs)} jobs: {works} work, {len(outcomes) - works} do not, {len(jobs) - len(outcomes)} not done")
        print(f"compiled in {time.monotonic() - start:.0f} s", flush=True)

    table = options.table or configs.TABLE
    entries = configs.read_table(table if table.exists() else configs.TABLE)
    report: dict[str, Any] = {"machine": describe_machine(), "lengths": lengths, "sweeps": []}
    with ExitStack() as chosen:
        before = None
        for subject in todo:
            if before is not None and subject.workload != before:
                chosen.close()
            before = subject.workload
            ready = [c for number, (s, c) in enumerate(jobs) if s == subject and outcomes.get(number, "") is None]
            gc.collect()
            records = sweep(subject, ready, lengths, options.rounds, start + options.seconds)
            print(f"{subject.workload.name} {subject.name}: {len(ready)} ready, {len(records)} timed", flush=True)
            if not records:
                continue
            for record in records[:3]:
                print(f"  {record['score']:.3f} {record['ms']} {record['launch']}", flush=True)
            best = records[0]["launch"]
            entries.append(subject.entry(best))
            chosen.enter_context(configs.override(subject.name, **best))
            configs.write_table(entries, table)
            report["sweeps"].append({"workload": subject.workload.name, "kernel": subject.name, "records": records})
            if options.report:
                options.report.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
