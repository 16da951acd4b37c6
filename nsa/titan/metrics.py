"""Metrics of a TorchTitan job: TorchTitan's own, and what a person or a plot wants of a run beside them.

A metric is worth less than a step of training: no logger, TorchTitan's included, can end a run.
"""

import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torchtitan import config as titan
from torchtitan.components.metrics import BaseLogger, LoggerContainer, MetricsProcessor, _get_metrics_rank
from torchtitan.distributed import ParallelDims
from torchtitan.tools.logging import logger

from nsa.titan.checkpoints import lock_folder, require_lock
from nsa.titan.refusals import JobError
from nsa.titan.runs import RecordLog

METRICS_FILE = "metrics.jsonl"
"""In `job.dump_folder`: a JSON object a line, `step` and the metrics TorchTitan logs under their own names."""


class _Harmless(BaseLogger):
    """Passes metrics on to a logger, and warns once where that fails, on a full disk say."""

    def __init__(self, wrapped: BaseLogger):
        self.wrapped = wrapped
        self._warned = False

    def log(self, metrics: dict[str, Any], step: int) -> None:
        try:
            self.wrapped.log(metrics, step)
        except Exception as error:
            self._warn(error)

    def close(self) -> None:
        try:
            self.wrapped.close()
        except Exception as error:
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            name = type(self.wrapped).__name__.strip("_")
            logger.warning(f"{name} lost metrics and may lose more, training goes on: {error!r}")


class _JsonLines(BaseLogger):
    """Appends metrics to a file; after a resume the steps that are trained again replace those written before."""

    def __init__(self, path: Path):
        self._records = RecordLog(path)

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self._records.append({"step": step, **metrics})


class _Progress(BaseLogger):
    """Says how far the run is and how long it will go on."""

    def __init__(self, steps: int):
        self.steps = steps
        self._first: tuple[int, float] | None = None

    def log(self, metrics: dict[str, Any], step: int) -> None:
        if "loss_metrics/global_avg_loss" not in metrics:
            return
        now = time.perf_counter()
        if self._first is None:
            self._first = step, now
            return
        first_step, since = self._first
        seconds = round((self.steps - step) * (now - since) / (step - first_step))
        logger.info(f"{step} of {self.steps} steps done, {seconds // 60}:{seconds % 60:02} left")


class Diverged(JobError):
    """Training has diverged: nothing that comes after would be of use."""

    status = 4


class DivergenceWatch:
    """Raises where a loss is not finite, or far above those before it.

    Args:
        max_ratio: of a loss to the median of the last `SEEN` before it; 0 is any.
    """

    SEEN = 10

    def __init__(self, max_ratio: float = 0.0):
        self.max_ratio = max_ratio
        self._losses: deque[float] = deque(maxlen=self.SEEN)

    def __call__(self, step: int, loss: float, grad_norm: float) -> None:
        """Looks at a step that was logged.

        Raises:
            Diverged: with the step, what is wrong with it, and what may help.
        """
        remedy = "Go on from a checkpoint before it, with a lower optimizer.lr or training.max_norm"
        if not math.isfinite(loss):
            raise Diverged(
                f"training diverged: the loss of step {step} is {loss}, its gradient norm {grad_norm}. {remedy}"
            )
        usual = statistics.median(self._losses) if len(self._losses) == self.SEEN else math.inf
        if self.max_ratio and loss > self.max_ratio * usual:
            raise Diverged(
                f"training diverged: the loss of step {step} is {loss:.4g}, more than nsa.max_loss_ratio "
                f"({self.max_ratio:g}) times the usual {usual:.4g}. {remedy}"
            )
        self._losses.append(loss)


class _Processor(MetricsProcessor):
    """TorchTitan's metrics processor, with the validation loss of a token under context parallelism too.

    Attributes:
        health: gives more metrics of a step that is logged, in every process; the trainer sets it.
        watch: looks at every loss that is logged.
    """

    health: Callable[[], dict[str, float]] = staticmethod(dict)
    watch: Callable[[int, float, float], None] = staticmethod(lambda step, loss, grad_norm: None)

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        metrics = {**(extra_metrics or {}), **self.health()}
        super().log(step, global_avg_loss, global_max_loss, grad_norm, metrics)
        self.watch(step, global_avg_loss, grad_norm)

    def log_validation(self, loss: float, step: int, extra_metrics: dict[str, Any] | None = None) -> None:
        # The validator divides by the tokens of one part of each row, and adds up the losses of all of them.
        super().log_validation(loss / self.parallel_dims.cp, step, extra_metrics)


def build_metrics_processor(
    job_config: titan.JobConfig, parallel_dims: ParallelDims, model_args: Any = None, tag: str | None = None
) -> MetricsProcessor:
    """TorchTitan's metrics processor, which also writes `METRICS_FILE` and tells the time left.

    With `metrics.save_for_all_ranks` every other process `r` writes one into the folder `rank_r` in there.

    Raises:
        SystemExit: another run uses the folder.
    """
    lock_folder(job_config)  # where the trainer is not ours, which did so before
    require_lock(job_config)
    try:
        processor = _Processor(job_config, parallel_dims, tag)
    except OSError as error:
        logger.warning(f"TensorBoard and W&B are left out, training goes on without them: {error!r}")
        silent = replace(job_config.metrics, enable_tensorboard=False, enable_wandb=False)
        processor = _Processor(replace(job_config, metrics=silent), parallel_dims, tag)
    processor.watch = DivergenceWatch(getattr(getattr(job_config, "nsa", None), "max_loss_ratio", 0.0))
    folder = Path(job_config.job.dump_folder)
    parts = list(getattr(processor.logger, "_loggers", []))  # TorchTitan's, each of which may fail alone
    if (rank := torch.distributed.get_rank()) == _get_metrics_rank(parallel_dims, job_config):
        parts += [_JsonLines(folder / METRICS_FILE), _Progress(job_config.training.steps)]
    elif job_config.metrics.save_for_all_ranks:
        parts += [_JsonLines(folder / f"rank_{rank}" / METRICS_FILE)]
    processor.logger = LoggerContainer()
    for part in parts:
        processor.logger.add_logger(_Harmless(part))
    return processor
