"""How long a call takes: on the GPU, on the host that starts it, and how much memory it needs meanwhile.

What is measured is the device's time for a call that finds nothing of its inputs in the cache, as a layer of a network
finds them. Three things would otherwise be measured with it:

- compilation and the allocator's first growth: calls before the clock runs;
- data left in the second-level cache by the call before: a buffer larger than it is written between rounds;
- the host: where a call is several launches, each of which takes the host 10 or 20 microseconds, short kernels wait for
  the next launch. A sleep queued on the device before the clock starts lets the host get ahead by a whole call. A
  training step is like that: the host runs ahead of the device. Where it does not, `host_time` is what counts. A call
  that waits for the device itself, say to read a size, cannot be got ahead of, and is measured with its waiting.

On a CPU there is one clock and nothing runs ahead of it.
"""

import gc
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch

from validation import doctor
from validation.perf.workloads import Roofs

_CYCLES_PER_MS = 2_000_000
"""Of a device's clock, rather too many: a sleep that is too long costs time, one too short its purpose."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds: the median of all rounds and their quartiles."""

    median: float
    lower: float
    upper: float
    rounds: int


def summarise(times: list[float]) -> Timing:
    """Median and quartiles of at least one time."""
    quartiles = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return Timing(quartiles[1], quartiles[0], quartiles[2], len(times))


def measure(function: Callable[[], Any], *, rounds: int = 10, warmup: int = 2) -> Timing:
    """Time on the device for one call, with a cold cache and the host ahead; on a machine without a GPU the host's."""
    for _ in range(warmup):
        function()
    if not torch.cuda.is_available():
        return summarise([_host_ms(function) for _ in range(rounds)])
    torch.cuda.synchronize()
    lead = int((1 + 2 * _host_ms(function)) * _CYCLES_PER_MS)
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    cache = torch.empty(2 * properties.L2_cache_size, dtype=torch.uint8, device="cuda")
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for start, end in marks:
        cache.zero_()
        torch.cuda._sleep(lead)
        start.record()
        function()
        end.record()
        # Rounds do not pile up: what a call allocates is free again for the next one, as after a step.
        end.synchronize()
    return summarise([start.elapsed_time(end) for start, end in marks])


def host_time(function: Callable[[], Any], *, rounds: int = 20, warmup: int = 2) -> Timing:
    """The host's time for one call, while the device is busy with something else and nothing waits for it."""
    for _ in range(warmup):
        function()
    times = []
    for _ in range(rounds):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda._sleep(20 * _CYCLES_PER_MS)
        times.append(_host_ms(function))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return summarise(times)


def _host_ms(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


def peak_memory(function: Callable[[], Any]) -> int | None:
    """Bytes a call holds at its peak, beyond what was held before it; None where there is no GPU to ask."""
    if not torch.cuda.is_available():
        return None
    function()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure_roofs() -> Roofs:
    """What this machine's matrix units and memory reach: a large product of bfloat16 noise, a large copy.

    On a CPU the product is one of float32, and both are small: they keep the form, and are no measure of anything.
    """
    gpu = torch.cuda.is_available()
    device, dtype, size, count = (
        ("cuda", torch.bfloat16, 8192, 1 << 32) if gpu else ("cpu", torch.float32, 256, 1 << 22)
    )
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = measure(lambda: a @ b).median
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = measure(lambda: target.copy_(source)).median
    return Roofs(flops=2e3 * size**3 / product, bytes=2e3 * count / copy)


def describe_machine() -> dict[str, Any]:
    """Where and when a measurement was made, and by which command."""
    machine = doctor.inspect()
    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [*_entry(), *sys.argv[1:]],
        "device": machine.gpus[0] if machine.gpus else f"CPU {platform.machine()}, {machine.cores} cores",
        "driver": machine.driver,
        **{name: machine.packages[name].version for name in ("python", "torch", "triton")},
    }
    names = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit", "temperature.gpu")
    if machine.gpus and (program := shutil.which("nvidia-smi")):
        command = [program, f"--query-gpu={','.join(names)}", "--format=csv,noheader", "-i", "0"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        found["clocks"] = dict(zip(names, answer.split(", "), strict=False))
    return found


def _entry() -> list[str]:
    """How the program was started, without the folders it was started from."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return ["python", "-m", spec.name] if spec else ["python", sys.argv[0]]
