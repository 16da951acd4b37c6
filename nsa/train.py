"""Entry point: `python -m nsa.train` and `torchrun ... -m nsa.train` run TorchTitan's Trainer, on GPUs or on a CPU.

Options are TorchTitan's. Without `--job.config_file` the flavor's file in `nsa/configs` is used where there is one, and
the command line has the last word. `python -m torchtitan.train` does the same with any of those files: it imports this
module as `experimental.custom_import`.
"""

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import torch
import torchtitan.components.metrics
import torchtitan.distributed.parallel_dims
import torchtitan.distributed.utils
import torchtitan.tools.utils
import torchtitan.train
from torchtitan.config import ConfigManager
from torchtitan.distributed.utils import dist_max
from torchtitan.tools.logging import logger

import nsa.train_spec  # noqa: F401  (registers the spec)

CONFIGS = Path(__file__).parent / "configs"

# What torchrun sets. A lone process is its own world; port 0 lets the system choose one.
_LONE_PROCESS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}


class Trainer(torchtitan.train.Trainer):
    """TorchTitan's Trainer, which on SIGINT or SIGTERM ends the step, saves a full checkpoint and stops.

    Of several processes one alone may have got the signal; then it is the next step that is logged. A second signal
    stops at once. Without `checkpoint.enable` there is nothing to save and the first one does.
    """

    _interrupted = False

    def train(self) -> None:
        with _signals(self._interrupt) if self.job_config.checkpoint.enable else _signals(None):
            super().train()

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True
        logger.info(f"{signal.Signals(number).name}: stopping at the end of a step; once more stops at once")

    def should_continue_training(self) -> bool:
        if self._all_interrupted():
            if self.step and not self.checkpointer._should_save(self.step):
                self.checkpointer.last_save_model_only = False
                self.checkpointer.save(self.step, last_step=True)
            logger.info(f"Interrupted after step {self.step}; the same command resumes from there")
            return False
        return super().should_continue_training()

    def _all_interrupted(self) -> bool:
        """Whether any rank was; all must agree, and where metrics are logged they wait for one another anyway."""
        if self.parallel_dims.world_size == 1:
            return self._interrupted
        if not self.step or not self.metrics_processor.should_log(self.step):
            return False
        return bool(dist_max(torch.tensor(float(self._interrupted), device=self.device), self.parallel_dims.world_mesh))


@contextmanager
def _signals(handler: Any) -> Iterator[None]:
    """Handles SIGINT and SIGTERM by `handler` meanwhile, unless it is None."""
    numbers = (signal.SIGINT, signal.SIGTERM) if handler else ()
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def prepare_cpu() -> None:
    """Lets TorchTitan run without an accelerator, where it would assume CUDA.

    Four of its modules bind the device's name and module, and `torch.cpu` lacks what they ask of the latter: a name,
    and statistics of memory, for which the peak resident size of the process stands.
    """
    device = SimpleNamespace(
        **{name: getattr(torch.cpu, name) for name in ("set_device", "synchronize")},
        current_device=lambda: 0,
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
            raise ValueError("training.enable_cpu_offload must be false without an accelerator, got True")
        return init_distributed(comm, **kwargs)

    torchtitan.distributed.utils.init_distributed = init_on_cpu
    # Without this it would ask lspci, and then take the CPU for an A100. No peak is known: utilisation shows as 0.
    torchtitan.tools.utils.get_peak_flops = lambda device_name: float("inf")


def _total_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _peak_resident_size() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if not torch.accelerator.is_available():
    prepare_cpu()


def complete(arguments: Sequence[str]) -> list[str]:
    """The command line with what a job of ours needs and the user did not say."""
    given = dict(_options(arguments))
    added = []
    if "job.config_file" not in given:
        flavor = given.get("model.flavor", "debug")
        file = CONFIGS / f"{flavor.split('_')[0]}.toml"
        if file.exists():
            added.append(f"--job.config_file={file}")
            if "job.dump_folder" not in given:  # another flavor could not go on from this one's checkpoints
                added.append(f"--job.dump_folder=./outputs/{flavor}")
    if "job.custom_config_module" not in given:
        added.append("--job.custom_config_module=nsa.train_spec")
    return [*added, *arguments]


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Pairs of option and value, dashes in names as underscores."""
    for option, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if option.startswith("--"):
            name, _, value = option[2:].partition("=")
            yield name.replace("-", "_"), value or following


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains as the command line says."""
    for name, value in _LONE_PROCESS.items():
        os.environ.setdefault(name, value)
    # TorchTitan reads sys.argv once, when its configuration is imported.
    ConfigManager.parse_args.__defaults__ = (complete(sys.argv[1:] if arguments is None else arguments),)
    torchtitan.train.main(Trainer)


if __name__ == "__main__":
    main()
