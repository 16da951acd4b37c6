"""What is timed and how: the plan of every machine, company on a CPU, peak memory."""

import ctypes
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from validation.implementations import Implementation, load
from validation.perf import benchmarks, timing
from validation.perf.records import SAME_SHAPES
from validation.stages import TIMED

ROOT = Path(__file__).parents[2]

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the clock and the memory are the GPU's")


def test_peak_memory_is_what_is_held_at_once() -> None:
    def call() -> torch.Tensor:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        first = torch.empty(2**20, device=device)  # 4 MiB
        second = first + 1
        del first
        return second.sum()

    assert timing.peak_memory(call) == pytest.approx(2 * 2**22, rel=1e-3)


@on_cpu
def test_every_round_on_a_cpu_has_company_and_none_is_of_the_warm_up() -> None:
    calls: list[str] = []
    ready = timing.Rounds(lambda: calls.append("timed"), warmup=2, beside=lambda: calls.append("beside"))
    assert calls == ["timed", "timed"]
    ready.time()
    ready.time()
    assert calls[2:] == ["beside", "timed"] * 2
    assert len(ready.company) == 2


@on_cpu
def test_rounds_until_the_clock_is_steady_do_not_count() -> None:
    calls: list[str] = []
    ready = timing.Rounds(lambda: calls.append("timed"), warmup=0, beside=lambda: None)
    ready.settle(0.0)
    assert calls == ["timed"]
    ready.settle(0.01)
    assert len(calls) > 2
    assert not ready.company


@on_cpu
def test_time_on_a_cpu_is_what_its_caller_waits() -> None:
    assert timing.measure(lambda: time.sleep(0.03), rounds=1, warmup=0).median >= 30
    assert timing.describe_machine()["clock"] == "wall time (perf_counter)"


def test_what_is_in_turn_comes_again() -> None:
    call = benchmarks.in_turn([lambda: 1, lambda: 2])
    assert [call() for _ in range(4)] == [1, 2, 1, 2]


def test_the_plan_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage both ways on every workload, beside dense attention wherever the whole op is; nothing is run."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(benchmarks, "find_spec", lambda name: None)
    found = benchmarks.collect("triton")
    ids = [b.id for b in found]
    assert len(set(ids)) == len(ids)
    there = {(b.workload, b.length, b.stage, b.direction, b.subject) for b in found}
    for workload in ("W", "W4", "W192"):
        for stage, value in TIMED.items():
            for direction in ("forward", "backward") if value.differentiable else ("forward",):
                for length in (8192, 32768) if workload == "W192" else (8192, 32768, 131072):
                    assert (workload, length, stage, direction, "triton") in there
                if stage == "nsa_attention":
                    for length in benchmarks.GPU.dense[workload]:
                        assert (workload, length, stage, direction, "dense (cuDNN)") in there
        assert (workload, 32768, "sliding_window_attention", "backward", "FlexAttention") in there
    assert ("W", 32768, "nsa_attention", "forward", "dense (flash)") in there
    # Where neighbouring queries are alike: what depends on it, and dense attention lent by a workload of equal shapes.
    alike = {(b.stage, b.length) for b in found if b.workload == "WC"}
    assert {stage for stage, _ in alike} == {"selected_attention", "nsa_attention"}
    assert {n for stage, n in alike if stage == "selected_attention"} == {8192, 16384, 32768, 65536}
    assert {n for stage, n in alike if stage == "nsa_attention"} == {4096, 8192, 16384, 32768, 65536, 131072}
    assert {("W", n, "nsa_attention", "backward", "dense (cuDNN)") for _, n in alike} <= there
    for flavor, length in (("100m", 65536), ("1b", 32768)):
        assert (flavor, length, "training", "step", "triton") in there
        assert (flavor, length, "training", "step", "dense (twin)") in there
    # What each of the five costs, alone: where compression and the whole op are timed with the paper's sizes too.
    for choice in ("l=64", "d=32", "l'=128", "n=8", "w=256"):
        for stage in ("compress", "nsa_attention"):
            assert (f"W,{choice}", 32768, stage, "backward", "triton") in there
            assert ("W", 32768, stage, "backward", "triton") in there
    assert {b.role for b in found if b.subject == "triton"} == {"ours"}


def test_a_peer_is_timed_in_what_it_can_do_and_says_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*args: object) -> None: ...

    dtypes = frozenset({torch.float32, torch.bfloat16})  # of the plans for a CPU and for a GPU
    peer = replace(
        Implementation("other", backward=False, dtypes=dtypes), selected_attention=nothing, nsa_attention=nothing
    )
    choosy = replace(peer, name="choosy", config=lambda config: False)
    subjects = {"other": peer, "choosy": choosy}
    monkeypatch.setattr(benchmarks, "load", lambda name: subjects.get(name) or load(name))
    # Others may be installed, and are found by themselves.
    found = [b for b in benchmarks.collect("eager", list(subjects)) if b.subject in subjects]
    assert {(b.role, b.subject, b.stage, b.direction) for b in found} == {
        ("peer", "other", "selected_attention", "forward"),
        ("peer", "other", "nsa_attention", "forward"),
    }


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[benchmarks.Benchmark]:
    """What a GPU would run."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(benchmarks, "find_spec", lambda name: None)
    return benchmarks.collect("triton")


def compiled(b: benchmarks.Benchmark) -> tuple[str, str, str]:
    """What of a benchmark the kernels depend on, but for lengths."""
    return SAME_SHAPES.get(b.workload, b.workload), b.stage, b.direction


def test_every_kernel_of_a_plan_is_compiled_beforehand(planned: list[benchmarks.Benchmark]) -> None:
    kinds = {compiled(b) for b in planned if b.role == "ours" and b.stage != "layer"}
    jobs = benchmarks.jobs(planned)
    assert {compiled(b) for job in jobs for b in job if b.role == "ours"} == kinds
    whole = [(*compiled(b), b.subject, b.length) for job in jobs for b in job if b.stage == "nsa_attention"]
    assert len(whole) == len({*whole})
    lengths = {stage: {b.length for job in jobs for b in job if b.stage == stage} for _, stage, _ in kinds}
    # Whose kernel is another one for every length.
    assert lengths.pop("select_blocks") == {b.length for b in planned if b.stage == "select_blocks"}
    del lengths["training"]
    assert max(map(max, lengths.values())) == 32768


def test_no_kernel_is_compiled_beforehand_that_nobody_wants(planned: list[benchmarks.Benchmark]) -> None:
    wanted = ["W-64k-sliding_window_attention-backward-triton", "W-8k-sliding_window_attention-forward-FlexAttention"]
    assert set(wanted) < {b.id for b in planned}
    kinds = {(b.workload, b.stage, b.subject) for job in benchmarks.jobs(planned, wanted) for b in job}
    assert kinds == {("W", "sliding_window_attention", subject) for subject in ("triton", "FlexAttention")}


FAULTS = """
import resource, torch
from validation.perf.timing import keep_memory

keep_memory()

def call():
    x = torch.ones(2**21)
    return (2 * x + 1).sum()

for calls in range(2):  # the first time the heap grows to what it takes
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        call()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 2**23 // resource.getpagesize()
"""Of one tensor of those."""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has no mallopt")
def test_memory_that_is_kept_costs_no_more_faults() -> None:
    command = [sys.executable, "-c", FAULTS]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert int(printed) < 20 * PAGES  # one tensor a call, of the three that it makes
