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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from itertools import dropwhile, takewhile
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, NoReturn

import torch
import torchtitan.train
from torchtitan import config as titan
from torchtitan.config import ConfigManager
from torchtitan.distributed.utils import dist_max
from torchtitan.tools.logging import logger

import nsa.train_spec  # noqa: F401  (registers the spec)
from nsa.job_checks import check_job, check_table
from nsa.refusals import JobError

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


def _read(file: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(file).read_text())
    except (OSError, ValueError) as error:
        raise JobError(f"job.config_file must be a TOML file, got {file!r}: {error}") from error


class _Manager(ConfigManager):
    """TorchTitan's, which also looks at names and types in the TOML file."""

    def _dict_to_dataclass(self, cls: Any, data: dict[str, Any]) -> Any:
        # Called for sections too, whose names and types are right by then.
        if issubclass(cls, titan.JobConfig):
            check_table(cls, data)
        return super()._dict_to_dataclass(cls, data)

    def _maybe_add_custom_config(self, args: list[str], toml_values: dict[str, Any] | None) -> Any:
        try:
            return super()._maybe_add_custom_config(args, toml_values)
        except (AttributeError, ImportError) as error:
            raise JobError(f"job.custom_config_module must be a module that has a JobConfig: {error}") from error


def parse(arguments: Sequence[str]) -> titan.JobConfig:
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
    sys.exit(1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains as the command line says; one that cannot be ends with one line on stderr and status 1."""
    for name, value in _LONE_PROCESS.items():
        os.environ.setdefault(name, value)
    try:
        job_config = parse(sys.argv[1:] if arguments is None else arguments)
        check_job(job_config)
        torchtitan.train.ConfigManager = lambda: SimpleNamespace(parse_args=lambda: job_config)
        torchtitan.train.main(Trainer)
    except JobError as error:
        refuse(error)


if __name__ == "__main__":
    main()
