"""How long everything takes and how much memory: `make perf`. What is timed, and beside whom, is in `benchmarks.py`.

Compiling, warming up and drawing inputs are outside the clock, which is the device's on a GPU and the wall's elsewhere;
every round finds the cache empty (see `timing.py`). Which figures may not get worse, and by how much, is in
`promises.toml`.
"""

import gc
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from ..costs import Roofs
from ..stages import WHOLE
from . import benchmarks, timing
from .generation import GENERATION, STEPS, WARM_UP, Generation, generations, summary
from .plugin import FAILURES, ROOFS
from .precompile import precompile
from .rivals import dense
from .stages import forward, host_figures
from .workloads import WORKLOADS

COMPILING = 150  # seconds at most, for all of it
# About how many seconds of rounds, and how many rounds: a CPU has other things to do in between. Before them, seconds
# until a GPU's clock is steady.
SPAN, LEAST, MOST, SETTLING = (0.3, 5, 20, 0.1) if torch.cuda.is_available() else (0.3, 5, 30, 0.0)
LONG = 12  # ms: what takes so long does not wait for its host, which takes less than one
FOUND = pytest.StashKey[dict[str, benchmarks.Benchmark]]()
K = 1024


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.option
    impl = (option.impl or [None])[0]
    found = {b.id: b for b in benchmarks.collect(impl, option.peer or ())}
    metafunc.config.stash[FOUND] = found
    if "generated" in metafunc.fixturenames:
        ours = impl or benchmarks.default()
        cases = generations(ours) if ours in ("eager", "triton") else []
        metafunc.parametrize("generated", cases, ids=[case.id for case in cases])
    else:
        metafunc.parametrize("name", found)


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> None:
    """All that this run needs compiled has been: while the GPU would wait, by as many processes as there are cores."""
    if not torch.cuda.is_available():
        return
    option = request.config.option
    command = [sys.executable, "-m", f"{__package__}.benchmarks"]
    command += [f"--impl={name}" for name in (option.impl or ())[:1]] + [f"--peer={name}" for name in option.peer or ()]
    wanted = [
        item.callspec.params["name"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.originalname == "test_speed"
    ]
    command += [f"--only={name}" for name in wanted]
    if len(wanted) > 20:  # a few kernels are compiled sooner than the processes are up
        outcomes = precompile(command, min(14, os.cpu_count() or 1), COMPILING)
        reporter = request.config.pluginmanager.getplugin("terminalreporter")
        for line in (f"compiled ahead: {len(outcomes)} jobs", *filter(None, outcomes.values())):
            reporter.write_line(line)
    gc.freeze()  # what is there now stays: memory is asked for often, and garbage collected before


@pytest.fixture(scope="module")
def roofs(compiled: None, request: pytest.FixtureRequest) -> Roofs:
    found: Roofs = timing.measure_roofs()
    request.config.stash[ROOFS] = found
    return found


@pytest.fixture(scope="module")
def company() -> Callable[[], Any] | None:
    """Dense attention, timed before every round where there is no GPU, to tell slow code from a slow machine."""
    workload = WORKLOADS["tiny"]
    if torch.cuda.is_available():
        return None
    timing.keep_memory()
    return forward(WHOLE, dense(), workload.case(512), workload.draw(512, "cpu"))


@pytest.mark.benchmark(timer=timing.now)
def test_speed(
    benchmark: Any,
    name: str,
    compiled: None,
    roofs: Roofs,
    company: Callable[[], Any] | None,
    request: pytest.FixtureRequest,
) -> None:
    case = request.config.stash[FOUND][name]
    try:
        calls = case.make()
        memory = timing.peak_memory(calls.peak)
        ready = timing.Rounds(calls.timed, warmup=0 if torch.cuda.is_available() else 1, beside=company)
        once = ready.settle(SETTLING)
    except Exception as failure:
        if case.role == "ours":
            raise
        error = f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}"
        what = {name: getattr(case, name) for name in ("workload", "length", "stage", "direction", "subject")}
        request.config.stash.setdefault(FAILURES, []).append({**what, "error": error})
        pytest.skip(f"{case.subject} cannot: {error}")
    ahead = torch.cuda.is_available() and case.stage == WHOLE.name and once < LONG
    host = host_figures(calls.timed) if ahead else {}

    rounds = min(MOST, max(LEAST, int(1e3 * SPAN / once)))
    benchmark.group = case.group
    result = benchmark.pedantic(calls.timed, setup=ready.prepare, rounds=rounds)

    times = [1e3 * seconds for seconds in benchmark.stats.stats.data]
    ms = statistics.median(times)
    benchmark.extra_info.update(
        workload=case.workload, length=case.length, stage=case.stage, direction=case.direction,
        subject=case.subject, role=case.role, memory=memory,
    )  # fmt: skip
    benchmark.extra_info.update(host)
    if ready.company:
        benchmark.extra_info["relative"] = min(times) / min(ready.company)
    if case.cost is not None and case.floor is not None:
        floor = case.floor(roofs)
        benchmark.extra_info.update(
            flops=case.cost.flops, bytes=case.cost.bytes, tflops=case.cost.flops / ms / 1e9,
            tbps=case.cost.bytes / ms / 1e9, floor=floor, of_roof=floor / ms,
        )  # fmt: skip
    if case.role == "ours":  # speed is worth nothing where the numbers are not
        assert all(x.isfinite().all() for x in (result if isinstance(result, tuple) else (result,)))


@pytest.mark.benchmark(timer=time.perf_counter)
def test_generation(benchmark: Any, generated: Generation, company: Callable[[], Any] | None) -> None:
    """A round is a step; prompts are taken in once, or three times where there is only one."""
    case = generated
    case.prefill(min(case.length, 2 * K))  # compiles
    prefills = [case.prefill(case.length) for _ in range(2 if case.batch == 1 else 0)]
    steps, last = case.start(case.length, 1 + WARM_UP + STEPS)
    step = partial(next, steps)
    for _ in range(WARM_UP):
        step()
    ready = timing.Rounds(step, warmup=0, beside=company) if company else None
    benchmark.group = f"{case.workload} {benchmarks.size(case.length)} {GENERATION} {case.direction}"
    benchmark.pedantic(step, setup=ready and ready.prepare, rounds=STEPS)
    times = [1e3 * seconds for seconds in benchmark.stats.stats.data]
    benchmark.extra_info.update(
        workload=case.workload, length=case.length, stage=GENERATION, direction=case.direction, subject=case.subject,
        role=case.role, **summary(case.batch, [*prefills, last], times),
    )  # fmt: skip
    if ready:
        benchmark.extra_info["relative"] = min(times) / min(ready.company)
