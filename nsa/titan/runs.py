"""What a training run keeps in its folder: files that are whole or absent, a lock, and the job behind its checkpoints.

A run may be killed at any moment and its disk may be full. A file is therefore written beside its place and renamed
into it, a log is appended to in whole lines, and a checkpoint counts once its metadata, which is written last, is
there. Everything here is for the one process of a run that writes, and needs neither PyTorch nor TorchTitan.

Words: a *job* is everything that decides what is trained, as a flat mapping from names to values; names are options of
the command line wherever there is one. A *step* is a training step after which a checkpoint was saved.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import socket
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from nsa.titan.refusals import JobError

logger = logging.getLogger(__name__)

JOB_FILE = "job.json"
"""Beside the checkpoints: the job that each of them is of."""
LOCK_FILE = ".lock"
"""In the folder of a run: locked for as long as the process lives that writes there."""

_STEP = re.compile(r"step-(\d+)")
# The last file of a checkpoint, in PyTorch's format and in Hugging Face's.
_LAST_FILES = (".metadata", "model.safetensors.index.json")

Job = Mapping[str, Any]
Changes = Mapping[str, tuple[Any, Any]]
"""Old and new value by field."""


class Refused(JobError):
    """A run that would not do what was asked for; the message says what to do instead."""


class NothingLeft(Refused):
    """A run whose steps are all trained already. It has a status of its own, for scripts that reuse finished runs."""

    status = 3


class InUse(Refused):
    """A run whose folder another one has locked."""


# Files


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path to write to, which takes the place of `path` at the end, whole and at once, unless something fails.

    The temporary name keeps the suffix, by which some writers choose a format.
    """
    temporary = path.with_name(f".new-{path.name}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Makes a renaming last; some file systems cannot, and the renaming itself has succeeded."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """Writes a text file that is never seen, nor left, half written."""
    with replacing(path) as temporary:
        temporary.write_text(text)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The JSON objects in a file of one a line, without the lines that are not whole; none where there is no file."""
    records = []
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for line in lines:
        with suppress(ValueError):  # a kill or a full disk cut it off
            record = json.loads(line)
            if isinstance(record, dict):
                records.append(record)
    return records


class RecordLog:
    """A file of JSON objects, one a line, each with its `"step"`, that a resumed run goes on with.

    The first record of a run drops those of its own step and of later ones: these steps are trained again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._continued = False

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds a record.

        Raises:
            OSError: it could not be written; the file then holds what it held before.
        """
        if not self._continued:
            self._continue_before(record["step"])
            self._continued = True
        line = json.dumps(record).encode() + b"\n"
        with self.path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                written = file.write(line)
                if written != len(line):  # a disk that fills up takes a part
                    raise OSError(f"{written} of {len(line)} bytes were written")
            except OSError:
                file.truncate(end)
                raise

    def _continue_before(self, step: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [record for record in read_records(self.path) if record.get("step", step) < step]
        text = "".join(f"{json.dumps(record)}\n" for record in kept)
        if text or self.path.exists():
            write_whole(self.path, text)


# The lock


def require_writable(folder: Path) -> None:
    """Makes the folder of a run.

    Raises:
        Refused: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise Refused(
            f"job.dump_folder must be a folder that can be written to, got {str(folder)!r}: {error.strerror}"
        ) from error


def lock(folder: Path) -> IO[str]:
    """Locks the folder of a run until the file that is returned is closed or the process ends, however it ends.

    Raises:
        InUse: another process has locked it.
        Refused: the file of the lock cannot be written.
    """
    try:
        file = (folder / LOCK_FILE).open("a+")
    except OSError as error:
        raise Refused(f"{str(folder / LOCK_FILE)!r} cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise InUse(
            f"job.dump_folder {str(folder)!r} is in use by another run{f' ({holder})' if holder else ''}: "
            "wait until it has ended, or name another folder"
        ) from None
    except OSError as error:  # a file system without locks
        logger.warning(f"{str(folder)!r} cannot be locked ({error.strerror}): see to it that no other run uses it")
    with suppress(OSError):  # a full disk has no room for it
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    return file


# Checkpoints


def is_whole(checkpoint: Path) -> bool:
    """Whether a save came to its end."""
    return any((checkpoint / name).is_file() for name in _LAST_FILES)


def checkpoints(folder: Path) -> dict[int, Path]:
    """What saves have left in the folder of checkpoints, whole or not, by step and in their order."""
    entries = folder.iterdir() if folder.is_dir() else ()
    found = {int(match[1]): entry for entry in entries if (match := _STEP.fullmatch(entry.name))}
    return dict(sorted(found.items()))


def saved_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints that can be loaded, in their order."""
    return [step for step, checkpoint in checkpoints(folder).items() if is_whole(checkpoint)]


def stale_checkpoints(folder: Path, keep: int) -> list[Path]:
    """What may be removed where the last `keep` whole checkpoints are kept: everything older, whole or not."""
    oldest_kept = saved_steps(folder)[-keep:][:1]
    return [checkpoint for step, checkpoint in checkpoints(folder).items() if oldest_kept and step < oldest_kept[0]]


def step_to_load(folder: Path, wanted: int, *, rewinds: bool) -> int | None:
    """The step to resume from, or None where nothing is saved.

    Args:
        folder: of the checkpoints.
        wanted: `checkpoint.load_step`, a step or -1 for the last one.
        rewinds: whether the run is going to save steps that follow the one it loads.

    Raises:
        Refused: no such step is saved; or later ones are, which the run would mix with its own.
    """
    steps = saved_steps(folder)
    if wanted == -1:
        return steps[-1] if steps else None
    if wanted not in steps:
        there = (
            f"one of the steps saved in {str(folder)!r}, {steps}" if steps else f"-1: {str(folder)!r} has no checkpoint"
        )
        raise Refused(f"checkpoint.load_step must be {there}, got {wanted}")
    if rewinds and wanted != steps[-1]:
        later = [step for step in steps if step > wanted]
        raise Refused(
            f"checkpoint.load_step={wanted} goes back behind {later} in {str(folder)!r}, which this run's checkpoints "
            f"would mix with: move those away, or go on in another folder with --job.dump_folder DIR "
            f"--checkpoint.initial_load_path {folder / f'step-{wanted}'} --checkpoint.no_initial_load_model_only"
        )
    return wanted


# Jobs


@cache
def code_version() -> str:
    """Version of the package with a hash of its sources, which says more than a version that seldom changes."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package).as_posix()}\0".encode() + file.read_bytes() + b"\0")
    try:
        version = metadata.version("nsa")
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        version = "not installed"
    return f"{version}, sources {digest.hexdigest()[:12]}"


def differences(old: Job, new: Job) -> dict[str, tuple[Any, Any]]:
    """Old and new value of every field that is not the same; a field that is missing counts as None."""
    old, new = (json.loads(json.dumps(job)) for job in (old, new))  # as they come back from a file
    pairs = {name: (old.get(name), new.get(name)) for name in (*old, *(name for name in new if name not in old))}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def read_jobs(folder: Path) -> list[dict[str, Any]]:
    """The jobs behind the checkpoints of a folder, oldest first, as `record_job` makes them.

    Each is `{"after_step": s, "job": {...}, "with": {...}}`: the job that trained the steps that follow step `s`. Empty
    where there is no file, or one that somebody has spoilt.
    """
    try:
        jobs = json.loads((folder / JOB_FILE).read_bytes())["jobs"]
        return [entry for entry in jobs if isinstance(entry["after_step"], int) and isinstance(entry["job"], dict)]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning(f"{str(folder / JOB_FILE)!r} cannot be read ({error!r}) and is not heeded")
        return []


def entry_of(folder: Path, step: int) -> Mapping[str, Any] | None:
    """The record of the job that trained step `step`, or None if there is none."""
    return next((entry for entry in reversed(read_jobs(folder)) if entry["after_step"] < step), None)


def job_of(folder: Path, step: int) -> Job | None:
    """The job that trained step `step`, or None where that was not recorded."""
    entry = entry_of(folder, step)
    return None if entry is None else entry["job"]


def record_job(folder: Path, job: Job, after_step: int, environment: Mapping[str, Any]) -> None:
    """Records the job that trains the steps that follow `after_step`; what was recorded of these steps goes.

    Args:
        folder: of the checkpoints.
        job: what is trained.
        after_step: the step that was resumed from, 0 for a run from the beginning.
        environment: versions of other packages and where the tokenizer lies, which are not compared.
    """
    entries = [entry for entry in read_jobs(folder) if entry["after_step"] < after_step]
    if not entries or differences(entries[-1]["job"], job):
        entries.append({"after_step": after_step, "job": job, "with": environment})
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / JOB_FILE, json.dumps({"jobs": entries}, indent=1) + "\n")


def require_same_job(checkpoint: Path, changes: Changes, allowed: Collection[str], misfits: Collection[str]) -> None:
    """Refuses to go on from a checkpoint of another job.

    Args:
        checkpoint: its folder.
        changes: the `differences` between the job that trained it and this one.
        allowed: fields that may differ, `nsa.allow_changes`.
        misfits: what of the model is not in the checkpoint, or has another shape there: nothing makes up for it.

    Raises:
        Refused: naming every field that differs and is not allowed to, old and new, and what to do.
    """
    refused = {name: pair for name, pair in changes.items() if name not in allowed}
    if not refused and not misfits:
        return
    lines = [f"{str(checkpoint)!r} is of another job, from which this one cannot go on:"]
    lines += [f"  {name} is {new!r}, and was {old!r}" for name, (old, new) in (refused or changes).items()]
    lines += [f"  {misfit}" for misfit in misfits]
    another = "start another run with --job.dump_folder DIR"
    if misfits:
        lines.append(f"The model does not fit the checkpoint: undo these changes, or {another}.")
    else:
        names = ",".join(changes)
        lines.append(f"Undo these changes, {another}, or go on all the same with --nsa.allow_changes {names}")
    raise Refused("\n".join(lines))


def require_steps_left(checkpoint: Path, step: int, steps: int) -> None:
    """Refuses a run that would train nothing.

    Raises:
        NothingLeft: `step`, which is saved, is the last of `steps` or beyond.
    """
    if step >= steps:
        raise NothingLeft(
            f"nothing is left to train: {str(checkpoint)!r} is step {step}, and training.steps is {steps}. Train on "
            f"with a larger --training.steps, or start another run with --job.dump_folder DIR"
        )
