"""Jobs of several processes that start in a moment: every rank is a fork of one process that has imported the trainer.

A rank is a process of its own, with the environment torchrun would give it, a session of its own and a file for what
it prints. The store at which ranks meet is the parent's, on a port that the system chose and that is bound before any
rank starts, so that no two jobs can collide. Whatever happens to a rank, none outlives the job.

CUDA does not survive a fork, and finding out whether there is a GPU may be enough to start it: with GPUs ranks are
spawned, each importing what it needs, and without them the GPUs of the machine, too few for the job, are hidden.
"""

import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any, Self

import pytest
import torch
from torch.distributed import TCPStore

from validation import runs

NGPU = int(os.environ.get("NGPU", "4"))
"""Processes of the largest job: as many GPUs where there are so many, otherwise processes on the CPU."""

ON_GPUS = 0 < NGPU <= torch.cuda.device_count()

TIME_LIMIT = 180.0  # seconds of a job: ten times what the slowest takes on two cores
# Seconds in which the others notice that a rank is gone: NCCL's watchdog collects what it knows before it aborts.
GRACE = 90.0 if ON_GPUS else 30.0
LINES, LONGEST = 30, 400  # shown of each rank: a list of modules in one line is of no help

_context: SpawnContext | ForkServerContext
if ON_GPUS:
    _context = multiprocessing.get_context("spawn")
else:
    _context = multiprocessing.get_context("forkserver")
    _context.set_forkserver_preload(["nsa.train"])


on_gpus = pytest.mark.needs_gpu(count=NGPU)
"""Skips a test where the processes of jobs are not on GPUs."""


def needs(processes: int) -> pytest.MarkDecorator:
    """Skips a test where so many are more than `NGPU`."""
    return pytest.mark.skipif(processes > NGPU, reason=f"needs {processes} processes: NGPU is {NGPU}")


class RankFailed(RuntimeError):
    """A rank raised, was killed or hung; the message ends with the last lines of every rank, the first to fail first.

    Attributes:
        exits: exit status of the ranks that ended by themselves, in the order in which they did; -9 is a kill.
    """

    def __init__(self, message: str, exits: dict[int, int]) -> None:
        super().__init__(message)
        self.exits = exits


class Job:
    """`target(*arguments)` in every rank, from the moment it is made; a context manager that leaves no process behind.

    Args:
        target: a function that a new process can import.
        folder: gets `rank-0.log` and so on.
        processes: number of ranks.
    """

    def __init__(self, target: Callable[..., object], arguments: Sequence[Any], folder: Path, processes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"rank-{rank}.log" for rank in range(processes)]
        self._store = TCPStore("localhost", 0, processes, is_master=True, wait_for_workers=False)
        self._begin = time.monotonic()
        self.ranks: list[BaseProcess] = []
        with _environment():
            for rank, log in enumerate(self.logs):
                log.write_text("")  # not what an earlier job said there
                of_rank = (rank, processes, self._store.port, log, target, arguments)
                self.ranks.append(_context.Process(target=_run, args=of_rank))
                self.ranks[-1].start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._signal(signal.SIGKILL)

    def wait(self, limit: float = TIME_LIMIT, grace: float = GRACE) -> None:
        """Waits until all ranks are done.

        Raises:
            RankFailed: a rank failed, and the others ended by themselves or were stopped `grace` seconds later; or
                `limit` seconds are over since the start.
        """
        exits: dict[int, int] = {}
        end = self._begin + limit
        while len(exits) < len(self.ranks) and (left := end - time.monotonic()) > 0:
            sentinels = {self.ranks[rank].sentinel: rank for rank in range(len(self.ranks)) if rank not in exits}
            failed_before = any(exits.values())
            # Of several that are gone, whoever fell silent first was the first to go: the others had a loss to report.
            gone = [sentinels[sentinel] for sentinel in wait(list(sentinels), left)]  # type: ignore[index]
            for rank in sorted(gone, key=lambda rank: self.logs[rank].stat().st_mtime_ns):
                self.ranks[rank].join()
                exits[rank] = self.ranks[rank].exitcode or 0
            if any(exits.values()) and not failed_before:
                end = min(end, time.monotonic() + grace)
        hung = [rank for rank in range(len(self.ranks)) if rank not in exits]
        if hung:
            self._signal(signal.SIGABRT)  # on which Python says where it is
            wait([self.ranks[rank].sentinel for rank in hung], 5)
        if hung or any(exits.values()):
            raise RankFailed(self._account(exits, hung), exits)

    def _account(self, exits: dict[int, int], hung: Sequence[int]) -> str:
        fates = {rank: _fate(status) for rank, status in exits.items() if status}
        fates |= dict.fromkeys(hung, f"was stopped after {time.monotonic() - self._begin:.0f} s")
        fates |= {rank: "ended well" for rank in exits if rank not in fates}
        logs = (f"--- rank {rank} {fate}:\n{_tail(self.logs[rank])}" for rank, fate in fates.items())
        return "\n".join([", ".join(f"rank {rank} {fate}" for rank, fate in fates.items()), *logs])

    def _signal(self, number: signal.Signals) -> None:
        """Signals every rank and what it started; a rank that has not come to make its own group yet, alone."""
        for rank in self.ranks:
            assert rank.pid is not None
            for kill in (os.killpg, os.kill):
                try:
                    kill(rank.pid, number)
                    break
                except ProcessLookupError:
                    continue
        if number == signal.SIGKILL:
            for rank in self.ranks:
                rank.join()


def train(arguments: Sequence[str], folder: Path, *, processes: int, limit: float = TIME_LIMIT) -> None:
    """Trains into `folder` over so many processes.

    Raises:
        RankFailed: as `Job.wait`.
    """
    with start(arguments, folder, processes=processes) as job:
        job.wait(limit)


def start(arguments: Sequence[str], folder: Path, *, processes: int) -> Job:
    """The training job that `train` waits for."""
    return Job(train_here, [(*arguments, f"--job.dump_folder={folder}")], folder, processes)


def train_here(arguments: Sequence[str]) -> None:
    """Trains as a rank does, and is over when the rank is done."""
    import torchtitan.train

    import nsa.train

    # Rank 0 would wait two seconds for the others to be done with its store, but the store is the parent's.
    torchtitan.train.time = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    nsa.train.main(arguments)


def _run(
    rank: int, processes: int, port: int, log: Path, target: Callable[..., object], arguments: Sequence[Any]
) -> None:
    """A rank, from its first moment to its last."""
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(descriptor, stream.fileno())
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    faulthandler.enable()
    threading.Thread(target=_die_with_parent, daemon=True).start()
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(processes),
        LOCAL_WORLD_SIZE=str(processes),
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
        # As torchrun does: the store is there already.
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0",
    )
    target(*arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    # As forks end anyway: a thread of PyTorch's that outlives the interpreter of a spawned rank aborts it.
    os._exit(0)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.killpg(0, signal.SIGKILL)


@contextmanager
def _environment() -> Iterator[None]:
    """The environment of a run, for processes that start meanwhile, the one that forks all others among them."""
    # With large pages: a rank that gathers the parameters of a large model spends a third of its time on small ones.
    before, wanted = dict(os.environ), {**runs.environment(NGPU), "THP_MEM_ALLOC_ENABLE": "1"}
    os.environ.clear()
    os.environ.update(wanted)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _fate(status: int) -> str:
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with {status}"


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-LINES:]
    return "\n".join(line[:LONGEST] for line in lines)
