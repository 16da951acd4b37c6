"""The runner of the other tests: what it makes of ranks that fail, and that it leaves nothing behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch.distributed

from validation.integration import ranks

pytestmark = ranks.needs(2)


def meet() -> None:
    torch.distributed.init_process_group("gloo")
    heard = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(heard, f"rank {torch.distributed.get_rank()} of {len(heard)}")
    print(f"I am {os.environ['RANK']}, {' and '.join(heard)} are here")
    torch.distributed.destroy_process_group()


def wait_for_ever() -> NoReturn:
    print("waiting")
    while True:
        time.sleep(0.1)


def fail_in_rank_1(how: str, folder: Path) -> None:
    print(f"rank {os.environ['RANK']} was here")
    if os.environ["RANK"] != "1":
        wait_for_ever()
    until(lambda: "waiting" in (folder / "rank-0.log").read_text())
    if how == "raise":
        raise ZeroDivisionError("the culprit")
    os.kill(os.getpid(), signal.SIGKILL)


def leave_a_child(folder: Path) -> NoReturn:
    child = subprocess.Popen(["sleep", "600"])
    (folder / f"child-{os.environ['RANK']}").write_text(str(child.pid))
    wait_for_ever()


def is_alive(pid: int | None) -> bool:
    """Whether it runs: who is dead but not collected does not."""
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.05)


def test_ranks_meet_and_what_they_print_is_kept_apart(tmp_path: Path) -> None:
    with ranks.Job(meet, (), tmp_path, 2) as job:
        job.wait()
    for rank, log in enumerate(job.logs):
        assert f"I am {rank}, rank 0 of 2 and rank 1 of 2 are here" in log.read_text()
        assert f"I am {1 - rank}" not in log.read_text()


def test_jobs_at_the_same_time_do_not_meet(tmp_path: Path) -> None:
    with ranks.Job(meet, (), tmp_path / "one", 2) as one, ranks.Job(meet, (), tmp_path / "other", 2) as other:
        one.wait()
        other.wait()


@pytest.mark.parametrize(
    ("how", "fate", "status"), [("raise", "exited with 1", 1), ("kill", "was killed by SIGKILL", -signal.SIGKILL)]
)
def test_the_first_rank_that_fails_is_shown_first(tmp_path: Path, how: str, fate: str, status: int) -> None:
    with (
        pytest.raises(ranks.RankFailed, match=rf"^rank 1 {fate}, rank 0 was stopped after") as failure,
        ranks.Job(fail_in_rank_1, (how, tmp_path), tmp_path, 2) as job,
    ):
        job.wait(grace=0.1)
    assert failure.value.exits == {1: status}
    message = str(failure.value)
    assert message.index(f"--- rank 1 {fate}") < message.index("rank 1 was here") < message.index("--- rank 0")
    assert message.index("--- rank 0") < message.index("rank 0 was here")
    assert ("ZeroDivisionError: the culprit" in message) == (how == "raise")


def test_a_rank_that_hangs_is_stopped_and_says_where(tmp_path: Path) -> None:
    with ranks.Job(wait_for_ever, (), tmp_path, 2) as job:
        until(lambda: all("waiting" in log.read_text() for log in job.logs))
        with pytest.raises(ranks.RankFailed, match=r"^rank 0 was stopped after \d+ s, rank 1") as failure:
            job.wait(limit=0.1)
    assert str(failure.value).count("in wait_for_ever") == 2


def test_what_ranks_started_ends_with_them(tmp_path: Path) -> None:
    files = [tmp_path / f"child-{rank}" for rank in range(2)]
    with ranks.Job(leave_a_child, (tmp_path,), tmp_path, 2) as job:
        until(lambda: all(file.exists() and file.read_text() for file in files))
        pids = [int(file.read_text()) for file in files] + [rank.pid for rank in job.ranks]
        assert all(map(is_alive, pids))
    until(lambda: not any(map(is_alive, pids)))


def test_ranks_do_not_outlive_whoever_started_them(tmp_path: Path) -> None:
    starter = (
        "import pathlib, sys, time\n"
        "from validation.integration import ranks, test_ranks\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "job = ranks.Job(test_ranks.leave_a_child, (folder,), folder, 2)\n"
        "print(*[rank.pid for rank in job.ranks], flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", starter, tmp_path], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            pids = [int(pid) for pid in process.stdout.readline().split()]
            until(lambda: all((tmp_path / f"child-{rank}").exists() for rank in range(2)))
            assert len(pids) == 2
            assert all(map(is_alive, pids))
        finally:
            process.kill()
    until(lambda: not any(map(is_alive, pids)))
