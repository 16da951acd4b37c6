"""Entry point: `python -m nsa.train` and `torchrun ... -m nsa.train` run TorchTitan's Trainer, on GPUs or on a CPU.

Options are TorchTitan's. Without `--job.config_file` the flavor's file in `nsa/configs` is used where there is one, and
the command line has the last word. `python -m torchtitan.train` does the same with any of those files: it imports this
module as `experimental.custom_import`.
"""

import io
import json
import os
import re
import signal
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from itertools import dropwhile, pairwise, takewhile
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, NoReturn

import nsa.titan.release  # says which extra is missing

# isort: split
import torch
import torch.distributed as dist
import torchtitan.train
from torch import Tensor
from torchtitan.config import ConfigManager, JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.tools.logging import logger

import nsa.titan.train_spec  # noqa: F401  (registers the spec)
from nsa.titan.checkpoints import Checkpoints, lock_folder, require_lock
from nsa.titan.flavors import config_file
from nsa.titan.graphs import StepGraph, mode_of, step_graph, why_not
from nsa.titan.health import SelectionHealth
from nsa.titan.job_checks import building_trainer, check_job, check_table
from nsa.titan.model import ModelArgs
from nsa.titan.refusals import JobError

# What torchrun sets. A lone process is its own world; port 0 lets the system choose one.
_LONE_PROCESS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}


# Trainers look the manager up by this name: ours in TorchTitan's module, TorchTitan's own in the main one, as which
# that module runs a second time.
for _module in (torchtitan.train, sys.modules["__main__"]):
    if hasattr(_module, "CheckpointManager"):
        setattr(_module, "CheckpointManager", Checkpoints)  # noqa: B010 (a type checker knows no such name)


class Trainer(torchtitan.train.Trainer):
    """TorchTitan's Trainer, which has its folder to itself, and on SIGINT or SIGTERM saves what it has trained.

    The first signal ends the step in progress, the same one in all processes, saves a full checkpoint and ends the
    process with status 128 + the number of the signal. Validation is broken off, a save is finished. A second signal
    stops at once, and so does the first one before training begins or where nothing would be saved.
    """

    _interrupted = 0  # the number of the signal
    _steps_left: bool | None = None  # None before the first step
    _control: dist.ProcessGroup | None = None
    _graph: StepGraph | None = None
    _health: SelectionHealth | None = None

    def __init__(self, job_config: JobConfig):
        with building_trainer():
            super().__init__(job_config)
        if job_config.validation.enable:
            self.validator.stopped = self._all_interrupted
        wanted = mode_of(job_config) != "off"
        if wanted and isinstance(self.model_args, ModelArgs) and torch.cuda.is_available():
            reason = why_not(job_config, self.model_args, self.parallel_dims.world_size)
            if reason is None:
                self._graph = step_graph(self, super().forward_backward_step)
            logger.info("The training step is " + ("a CUDA graph" if reason is None else f"no CUDA graph: {reason}"))
        if getattr(getattr(job_config, "nsa", None), "selection_metrics", False) and isinstance(
            self.model_args, ModelArgs
        ):
            dims = self.parallel_dims
            if dims.cp > 1 or dims.pp > 1 or self.model_args.attn_mask_type != "causal":
                logger.warning("No selection metrics: they need whole causal sequences and whole models in a process")
            else:
                self._health = SelectionHealth(self.model_parts[0], self.maybe_enable_amp)
                self.metrics_processor.health = self._health

    def init_distributed(self) -> ParallelDims:
        lock_folder(self.job_config)
        parallel_dims = super().init_distributed()
        require_lock(self.job_config)
        if parallel_dims.world_size > 1 and self.job_config.comm.mode == "default":
            # Through it processes agree on when to stop, without waiting for their GPUs.
            self._control = dist.new_group(backend="gloo")
        return parallel_dims

    def forward_backward_step(
        self, *, input_dict: dict[str, Tensor], labels: Tensor, global_valid_tokens: Tensor
    ) -> Tensor:
        if self._health is not None:
            self._health.observe(input_dict["input"])
        batch = {"labels": labels, "global_valid_tokens": global_valid_tokens}
        if self._graph is None:
            return super().forward_backward_step(input_dict=input_dict, **batch)
        return self._graph({**input_dict, **batch})

    def train(self) -> None:
        with _signals(self._interrupt, signal.SIGINT, signal.SIGTERM):
            try:
                super().train()
            except (SystemExit, JobError):  # interrupted, or diverged
                self.close()
                raise

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        name, checkpoint = signal.Signals(number).name, self.job_config.checkpoint
        if self._steps_left is None:
            _stop(number, "before training began")
        if self._steps_left and not checkpoint.enable:
            _stop(number, f"in step {self.step}; nothing was saved: checkpoint.enable is false")
        if self._steps_left and checkpoint.load_only:
            _stop(number, f"in step {self.step}; nothing was saved: checkpoint.load_only")
        self._interrupted = number
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        promise = (
            f"step {self.step} is ended and saved" if self._steps_left else "all steps are trained, the run is ending"
        )
        logger.info(f"{name}: {promise}; a second signal stops at once")

    def should_continue_training(self) -> bool:
        self._interrupted = self._all_interrupted()
        steps_left = super().should_continue_training()
        if not (steps_left and self._interrupted):
            self._steps_left = steps_left
            return steps_left
        message = f"{signal.Signals(self._interrupted).name}: stopped after step {self.step}; {self._save()}"
        if "TORCHELASTIC_RUN_ID" in os.environ:
            message += " (torchrun, which stops as well, ends with a traceback of its own)"
        logger.info(message)
        if self._steps_left:  # TorchTitan would go on to say that training is completed
            raise SystemExit(128 + self._interrupted)
        return False

    def _save(self) -> str:
        """Saves all that a run goes on with, and says how to go on."""
        checkpointer, checkpoint = self.checkpointer, self.job_config.checkpoint
        checkpointer.last_save_model_only = checkpointer.last_save_in_hf = False
        checkpointer.save(self.step, last_step=True)
        if not checkpointer._should_save(self.step, last_step=True):
            return "nothing was saved"
        unlike = [f"checkpoint.{name}" for name in _ONCE if getattr(checkpoint, name, None) not in (None, -1, [])]
        if unlike:
            return f"it is saved, and the command without {' and '.join(unlike)} resumes from there"
        return "it is saved, and the same command resumes from there"

    def _all_interrupted(self) -> int:
        """The signal that any of the processes got, or 0; all get the same answer, and all must ask."""
        if self._control is None:
            return self._interrupted
        number = torch.tensor(self._interrupted)
        dist.all_reduce(number, dist.ReduceOp.MAX, self._control)
        return int(number)


# Options of `checkpoint` that say what to begin with. A run that was interrupted goes on from what it saved.
_ONCE = ("load_step", "exclude_from_loading")


def _stop(number: int, when: str) -> NoReturn:
    logger.info(f"{signal.Signals(number).name}: stopped at once, {when}")
    raise SystemExit(128 + number)


@contextmanager
def _signals(handler: Callable[[int, FrameType | None], None], *numbers: signal.Signals) -> Iterator[None]:
    """Handles signals by `handler` meanwhile; processes that are forked meanwhile leave them to this one."""
    owner = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:
            handler(number, frame)
        elif number != signal.SIGINT:  # which a terminal sends to all
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def complete(arguments: Sequence[str]) -> list[str]:
    """The command line with what a job of ours needs and neither it nor its TOML file says.

    Raises:
        JobError: the file cannot be read.
    """
    given = dict(_options(arguments))
    added = []
    if "job.config_file" in given:
        job = _read(given["job.config_file"]).get("job", {})
        given |= {f"job.{name}": value for name, value in job.items() if value} if isinstance(job, dict) else {}
    else:
        flavor = given.get("model.flavor", "debug")
        file = config_file(flavor)
        if file.exists():
            added.append(f"--job.config_file={file}")
            if "job.dump_folder" not in given:  # another flavor could not go on from this one's checkpoints
                added.append(f"--job.dump_folder=./outputs/{flavor}")
    if "job.custom_config_module" not in given:
        added.append("--job.custom_config_module=nsa.titan.train_spec")
    return [*added, *arguments]


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Pairs of option and value, dashes in names as underscores."""
    for option, following in pairwise([*arguments, ""]):
        if option.startswith("--"):
            name, _, value = option[2:].partition("=")
            yield name.replace("-", "_"), value or following


def _read(file: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(file).read_text())
    except (OSError, ValueError) as error:
        raise JobError(f"job.config_file must be a TOML file, got {file!r}: {error}") from error


class _Manager(ConfigManager):
    """TorchTitan's, which also looks at names and types in the TOML file."""

    def _dict_to_dataclass(self, cls: Any, data: dict[str, Any]) -> Any:
        # Called for sections too, whose names and types are right by then.
        if issubclass(cls, JobConfig):
            check_table(cls, data)
        return super()._dict_to_dataclass(cls, data)

    def _maybe_add_custom_config(self, args: list[str], toml_values: dict[str, Any] | None) -> Any:
        try:
            return super()._maybe_add_custom_config(args, toml_values)
        except (AttributeError, ImportError) as error:
            raise JobError(f"job.custom_config_module must be a module that has a JobConfig: {error}") from error


def parse(arguments: Sequence[str]) -> JobConfig:
    """The job of a command line and its TOML file.

    Raises:
        JobError: something of either is wrong.
        SystemExit: help was asked for.
    """
    printed = io.StringIO()
    try:
        with redirect_stderr(printed):
            return _Manager().parse_args(complete(arguments))
    except SystemExit as exit:
        if not exit.code:
            raise
        raise JobError(_first_words(printed.getvalue())) from exit
    except JobError:
        raise
    except AssertionError as error:  # TorchTitan's only one here calls an option "validation steps"
        raise JobError(str(error).replace("validation steps", "validation.steps")) from error
    except Exception as error:  # nothing has been done yet but to read what the user wrote
        raise JobError(str(error)) from error


def _first_words(box: str) -> str:
    """What is wrong, from a framed message of the parser, and the options that an unknown one is similar to."""
    lines = [line.strip("│| ") for line in box.splitlines()[1:]]
    text = dropwhile(lambda line: not line.strip("─-"), lines)
    wrong = " ".join(takewhile(lambda line: line.strip("─-"), text))
    similar = [line.split()[0] for line in lines if re.match(r"--\w", line)]
    return f"{wrong}; similar: {', '.join(similar)}" if similar and "Unrecognized" in wrong else wrong


def refuse(error: JobError) -> NoReturn:
    """Ends the process with one line, which is printed once for all processes of a job that torchrun started."""
    line, report = f"error: {' '.join(str(error).split())}", os.environ.get("TORCHELASTIC_ERROR_FILE")
    if report:
        # What torchrun prints of the first process that failed, which may have stopped the first one in rank.
        details = {"py_callstack": line, "timestamp": str(int(time.time()))}
        Path(report).write_text(json.dumps({"message": {"message": line, "extraInfo": details}}))
    if not report or os.environ["RANK"] == "0":
        print(line, file=sys.stderr)
    sys.exit(error.status)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains as the command line says; a job that cannot be ends with one line on stderr.

    Raises:
        SystemExit: with 1 where it is refused or the last checkpoint could not be saved, 3 where nothing is left to
            train, and 128 + the number of the signal that stopped it.
    """
    for name, value in _LONE_PROCESS.items():
        os.environ.setdefault(name, value)
    try:
        job_config = parse(sys.argv[1:] if arguments is None else arguments)
        check_job(job_config)
        torchtitan.train.ConfigManager = lambda: SimpleNamespace(parse_args=lambda: job_config)
        with _signals(lambda number, frame: _stop(number, "before training began"), signal.SIGINT):
            torchtitan.train.main(Trainer)
    except JobError as error:
        refuse(error)


if __name__ == "__main__":
    main()
