"""TorchTitan without an accelerator."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torchtitan.components.metrics
import torchtitan.distributed.parallel_dims
import torchtitan.distributed.utils
import torchtitan.tools.utils

from nsa.titan.refusals import JobError


def prepare_cpu() -> None:
    """Lets TorchTitan run without an accelerator, where it would assume CUDA.

    Four of its modules bind the device's name and module, and `torch.cpu` lacks what they ask of the latter: a name,
    and statistics of memory, for which the peak resident size of the process stands.
    """
    device = SimpleNamespace(
        **{name: getattr(torch.cpu, name) for name in ("set_device", "synchronize")},
        current_device=lambda: 0,
        device_count=lambda: 1,
        get_device_name=lambda device=None: "CPU",
        get_device_properties=lambda device=None: SimpleNamespace(total_memory=_total_memory()),
        memory_stats=lambda device=None: dict.fromkeys(
            ("active_bytes.all.peak", "reserved_bytes.all.peak"), _peak_resident_size()
        ),
        reset_peak_memory_stats=lambda: None,
        empty_cache=lambda: None,
    )
    for module in (
        torchtitan.tools.utils,
        torchtitan.distributed.parallel_dims,
        torchtitan.distributed.utils,
        torchtitan.components.metrics,
    ):
        module.device_type = "cpu"
        module.device_module = device
    init_distributed = torchtitan.distributed.utils.init_distributed

    def init_on_cpu(comm: Any, enable_cpu_backend: bool = False, **kwargs: Any) -> int:
        if enable_cpu_backend:
            raise JobError("training.enable_cpu_offload must be false without an accelerator, got True")
        return init_distributed(comm, **kwargs)

    torchtitan.distributed.utils.init_distributed = init_on_cpu
    # Without this it would ask lspci, and then take the CPU for an A100. No peak is known: utilisation shows as 0.
    torchtitan.tools.utils.get_peak_flops = lambda device_name: float("inf")


def _total_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _peak_resident_size() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        # `getrusage` counts what the process had that started this one.
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
