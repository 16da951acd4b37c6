"""How long a call takes: on the GPU, on the host that starts it, and how much memory it needs meanwhile.

What is measured is the device's time for a call that finds nothing of its inputs in the cache, as a layer of a network
finds them. Three things would otherwise be measured with it:

- compilation, the allocator's first growth and the clock of a GPU that has just been idle: calls before time counts;
- data left in the second-level cache by the call before: a buffer larger than it is written between rounds;
- the host: where a call is several launches, each of which takes the host 10 or 20 microseconds, short kernels wait for
  the next launch. A sleep queued on the device before the clock starts lets the host get ahead by a whole call. A
  training step is like that: the host runs ahead of the device. Where it does not, `host_times` count. A call
  that waits for the device itself, say to read a size, cannot be got ahead of, and is measured with its waiting.

On a CPU nothing runs ahead, and the clock is wall time (`time.perf_counter`): a call that sleeps or waits takes as long
as its caller waits. So does a call whose core another process has meanwhile, which is no property of the code. A call
of dense attention is therefore timed before every round, as `company`, and gates compare what they have in common:
shortest round over shortest call of company. Others on the machine only ever lengthen a round. Memory of the system is
asked for once: `keep_memory`.
"""

import ctypes
import gc
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .. import doctor
from ..costs import Roofs
from .records import EVENTS, WALL, slug

_CYCLES_PER_MS = 2_000_000
"""Of a device's clock, rather too many: a sleep that is too long costs time, one too short its purpose."""


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of `mallopt`: free memory at the top that is given back, allocations outside the heap at a time."""


_LONGEST_LEAD = 200
"""Of the host, in ms: by then the queue is full of what it started, and it waits."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds: the median of all rounds and their quartiles, mean and standard deviation."""

    median: float
    lower: float
    upper: float
    rounds: int
    mean: float
    deviation: float


def summarise(times: list[float]) -> Timing:
    """Median and quartiles of at least one time."""
    quartiles = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    mean, deviation = statistics.fmean(times), statistics.stdev(times) if len(times) > 1 else 0.0
    return Timing(quartiles[1], quartiles[0], quartiles[2], len(times), mean, deviation)


class Instant:
    """A moment in the queue of the device; the difference of two, in seconds, waits for the later one."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    def __sub__(self, earlier: "Instant") -> float:
        self._event.synchronize()
        return 1e-3 * earlier._event.elapsed_time(self._event)


def now() -> Any:
    """The time of the clock that counts: of two of them only the difference means anything, in seconds."""
    return Instant() if torch.cuda.is_available() else time.perf_counter()


class Rounds:
    """A call made ready to be timed, and to be made ready again before every round.

    Args:
        function: the call.
        warmup: calls that nobody times.
        beside: a call that is timed before every round on a machine without a GPU, whose caches and frequency depend
            on its company: `company` holds its times, in ms, in the order of the rounds.
    """

    def __init__(self, function: Callable[[], Any], warmup: int = 2, beside: Callable[[], Any] | None = None) -> None:
        self.function, self.company = function, list[float]()
        for _ in range(warmup):
            function()
        self._beside = None if torch.cuda.is_available() else beside
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            # Of several, because how long the GPU rests in every round tells on its clock.
            host = statistics.median(_host_ms(function) for _ in range(3))
            self._lead = int(min(1 + 2 * host, _LONGEST_LEAD) * _CYCLES_PER_MS)
            properties = torch.cuda.get_device_properties(torch.cuda.current_device())
            self._cache = torch.empty(2 * properties.L2_cache_size, dtype=torch.uint8, device="cuda")
            torch.cuda.synchronize()

    def prepare(self) -> None:
        """Empties the cache and gives the host its head start."""
        if torch.cuda.is_available():
            self._cache.zero_()
            torch.cuda._sleep(self._lead)
        elif self._beside:
            start = now()
            self._beside()
            self.company.append(1e3 * (now() - start))

    def settle(self, seconds: float) -> float:
        """Rounds that do not count, one at least: a GPU at heavy work lowers its clock until its power is allowed.

        Returns:
            The time of the last, in ms.
        """
        end = time.monotonic() + seconds
        last = self.time()
        while time.monotonic() < end:
            last = self.time()
        self.company.clear()
        return last

    def time(self) -> float:
        """One round, in ms. Rounds do not pile up: what a call allocates is free again for the next one."""
        self.prepare()
        start = now()
        self.function()
        return 1e3 * (now() - start)


def measure(function: Callable[[], Any], *, rounds: int = 10, warmup: int = 2) -> Timing:
    """Time on the device for one call, with a cold cache and the host ahead; on a machine without a GPU the host's."""
    ready = Rounds(function, warmup)
    return summarise([ready.time() for _ in range(rounds)])


@dataclass(frozen=True)
class HostTimes:
    """Milliseconds that the host takes to start a call while the device is busy and nothing waits for it.

    Attributes:
        sustained: a call among many, one right after the other, as in a training step, in the thread that calls:
            autograd's own, which a step wakes once for all of its layers, takes 0.2 to 0.5 ms to wake.
        cold: a single call after the host has waited for the device, whose instructions and data have gone from the
            caches of its core meanwhile. It is several times `sustained`.
    """

    sustained: float
    cold: float


def host_times(function: Callable[[], Any], *, calls: int = 20, rounds: int = 5, warmup: int = 2) -> HostTimes:
    """Medians over rounds, of `calls` calls behind one sleep of the device and of one call behind another."""
    for _ in range(warmup):
        function()
    cold, sustained = [], []
    for _ in range(rounds):
        _keep_device_busy(20)
        cold.append(_host_ms(function))
        # Longer than the calls take, and no longer than a queue lasts.
        _keep_device_busy(min(1 + 2 * calls * statistics.median(cold), _LONGEST_LEAD))
        with torch.autograd.set_multithreading_enabled(False):
            sustained.append(_host_ms(lambda: _repeat(function, calls)) / calls)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return HostTimes(statistics.median(sustained), statistics.median(cold))


def _repeat(function: Callable[[], Any], calls: int) -> None:
    for _ in range(calls):
        function()


def _keep_device_busy(ms: float) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda._sleep(int(ms * _CYCLES_PER_MS))


def device_ops(function: Callable[[], Any]) -> int:
    """Kernels, copies and fills that a call starts on the GPU."""
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        function()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())


def _host_ms(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


def keep_memory() -> None:
    """Has this process keep what memory the system once gave it, where the C library can be told to.

    Otherwise large tensors go back to the system at every release, or do not, depending on what was released before,
    and the next ones cost a fault a page: seen to double the time of a call.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def peak_memory(function: Callable[[], Any]) -> int:
    """Bytes a call holds at its peak, beyond what was held before it."""
    function()
    gc.collect()
    if not torch.cuda.is_available():
        return _peak_on_the_host(function)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _peak_on_the_host(function: Callable[[], Any]) -> int:
    """What PyTorch allocates and gives back on the host, which only its profiler counts."""
    # Without `acc_events` some releases of PyTorch warn that events end with a cycle, of which there is one.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        function()
    found = profiler.profiler.kineto_results.events()
    events = sorted((event.start_ns(), event.nbytes()) for event in found if event.name() == "[memory]")
    return max(accumulate((size for _, size in events), initial=0))


def measure_roofs() -> Roofs:
    """What this machine's matrix units and memory reach: a large product of bfloat16 noise, a large copy.

    On a CPU the product is one of float32, and both are small: they keep the form, and are no measure of anything.
    """
    gpu = torch.cuda.is_available()
    device, dtype, size, count = (
        ("cuda", torch.bfloat16, 8192, 1 << 32) if gpu else ("cpu", torch.float32, 256, 1 << 22)
    )
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    warmup = 200 if gpu else 2  # about half a second: until the clock is what such work leaves it
    product = measure(lambda: a @ b, warmup=warmup).median
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = measure(lambda: target.copy_(source), warmup=warmup).median
    return Roofs(flops=2e3 * size**3 / product, bytes=2e3 * count / copy)


def machine_name() -> str:
    """A name that machines share if and only if their times can be compared: of the GPU, else of the processor."""
    if torch.cuda.is_available():
        return slug(torch.cuda.get_device_name())
    return slug(f"cpu {_processor()} {doctor.inspect().cores} cores")


def _processor() -> str:
    """The processor's model, where the system tells."""
    cpus = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)$", cpus.read_text(), re.MULTILINE) if cpus.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def describe_machine() -> dict[str, Any]:
    """Where and when a measurement was made, and by which command."""
    machine = doctor.inspect()
    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [*_entry(), *sys.argv[1:]],
        "name": machine_name(),
        "device": machine.gpus[0] if machine.gpus else f"{_processor()}, {machine.cores} cores",
        "driver": machine.driver,
        "clock": EVENTS if torch.cuda.is_available() else WALL,
        **{name: machine.packages[name].version for name in ("python", "torch", "triton")},
    }
    return {**found, **clocks()}


def clocks() -> dict[str, Any]:
    """What the GPU runs at now; nothing where there is none."""
    names = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit", "temperature.gpu")
    if torch.cuda.is_available() and (program := shutil.which("nvidia-smi")):
        command = [program, f"--query-gpu={','.join(names)}", "--format=csv,noheader", "-i", "0"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        return {"clocks": dict(zip(names, answer.split(", "), strict=False))}
    return {}


def _entry() -> list[str]:
    """How the program was started, without the folders it was started from."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return ["python", "-m", spec.name.removesuffix(".__main__")] if spec else ["python", sys.argv[0]]
