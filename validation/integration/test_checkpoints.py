"""Checkpoints: saved in one layout and resumed in another, in the background, and after the worst moments to die."""

import os
import shutil
import signal
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from nsa.titan.parallelize import stages_again
from nsa.titan.runs import lock
from validation import runs
from validation.integration import ranks
from validation.integration.layouts import BY_NAME, STEPS, TRAINING, Layout, OneProcess, assert_same, train

# Each is saved in, and each is what another is resumed in.
ROUND = ("one", "fsdp4", "tp2", "pp2-1f1b", "fsdp2-tp2", "cp2-headtail", "hsdp2x2", "pp2-zbv", "one")

HALF = STEPS // 2
FULL = ("--checkpoint.no-last-save-model-only",)  # a checkpoint to go on from, even after the last step

# The other notices, says so, and ends by itself: it raises or, where NCCL's watchdog notices, aborts.
ENDED = r"(exited with|was killed by SIGABRT)"
LOST_PEER = r"closed by peer|reset by peer|timed out|timeout"


def complete(folder: Path) -> list[int]:
    """Steps of the checkpoints that can be loaded: their metadata is written last, and at once."""
    return sorted(int(file.parent.name.removeprefix("step-")) for file in folder.glob("checkpoint/*/.metadata"))


HalfWay = Callable[[Layout], Path]


@pytest.fixture(scope="module")
def half_way(tmp_path_factory: pytest.TempPathFactory) -> HalfWay:
    """The folder of a run that a layout has brought half way, once."""

    @cache
    def trained(layout: Layout) -> Path:
        folder = tmp_path_factory.mktemp(layout.name)
        train(layout, folder, *FULL, f"--training.steps={HALF}", f"--lr_scheduler.total_steps={STEPS}")
        return folder

    return trained


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(
            before,
            after,
            id=f"{before.name}-{after.name}",
            marks=[*before.marks, *after.marks, *([pytest.mark.smoke] if before.name == "fsdp4" else [])],
        )
        for before, after in pairwise(BY_NAME[name] for name in ROUND)
    ],
)
def test_a_checkpoint_of_one_layout_goes_on_in_another(
    before: Layout, after: Layout, half_way: HalfWay, one_process: OneProcess, tmp_path: Path
) -> None:
    shutil.copytree(half_way(before), tmp_path, dirs_exist_ok=True)
    train(after, tmp_path)
    assert f"Training starts at step {HALF + 1}" in (tmp_path / "rank-0.log").read_text()
    assert_same(tmp_path, one_process())


@ranks.needs(2)
@pytest.mark.parametrize(
    "mode",
    [
        "async",
        pytest.param(
            "async_with_pinned_mem",
            marks=[ranks.on_gpus, pytest.mark.skipif(not stages_again(), reason="PyTorch stages one checkpoint only")],
        ),
    ],
)
def test_saving_in_the_background_saves_the_same(mode: str, one_process: OneProcess, tmp_path: Path) -> None:
    # All are kept: which are left when older ones are removed in the background is chance.
    options = (f"--checkpoint.async_mode={mode}", "--checkpoint.interval=3", "--checkpoint.keep_latest_k=0")
    train(BY_NAME["fsdp2"], tmp_path, *options)
    assert complete(tmp_path) == [3, 6, 9, STEPS]
    for step in (9, STEPS):
        shutil.rmtree(tmp_path / "checkpoint" / f"step-{step}")
    train(BY_NAME["fsdp2"], tmp_path, *options)
    assert "Training starts at step 7" in (tmp_path / "rank-0.log").read_text()
    assert_same(tmp_path, one_process())


def train_until(
    arguments: Sequence[str], victim: int, owner: str, method: str, calls: int, number: signal.Signals
) -> None:
    """Trains, and sends the rank `victim` a signal when it has called a method so often."""
    import torchtitan.train
    from torch.distributed.checkpoint import FileSystemWriter

    of = {"Trainer": torchtitan.train.Trainer, "FileSystemWriter": FileSystemWriter}[owner]
    called = getattr(of, method)

    def stopped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        result = called(*args, **kwargs)
        calls -= 1
        if not calls:
            os.kill(os.getpid(), number)
        return result

    with mock.patch.object(of, method, stopped) if int(os.environ["RANK"]) == victim else mock.MagicMock():
        ranks.train_here(arguments)


def interrupted(folder: Path, *stop: int | str, options: tuple[str, ...] = ()) -> ranks.Job:
    """The job of a training that comes to its end too early."""
    layout = BY_NAME["fsdp2"]
    arguments = (*TRAINING, *layout.arguments, *RESUMABLE, *options, f"--job.dump_folder={folder}")
    return ranks.Job(train_until, (arguments, *stop), folder, layout.processes)


RESUMABLE = ("--checkpoint.interval=3", "--comm.train_timeout_seconds=10")


@ranks.needs(2)
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(
    ("moment", "mode"),
    [
        pytest.param(("Trainer", "forward_backward_step", 5), "disabled", id="in a step"),
        pytest.param(("FileSystemWriter", "write_data", 2), "disabled", id="while saving"),
        pytest.param(("FileSystemWriter", "write_data", 2), "async", id="while saving in the background"),
    ],
)
def test_training_goes_on_after_a_rank_was_killed(
    victim: int, moment: tuple[str, str, int], mode: str, one_process: OneProcess, tmp_path: Path
) -> None:
    options = (f"--checkpoint.async_mode={mode}",)
    with (
        pytest.raises(
            ranks.RankFailed, match=rf"^rank {victim} was killed by SIGKILL, rank {1 - victim} {ENDED}"
        ) as failure,
        interrupted(tmp_path, victim, *moment, signal.SIGKILL, options=options) as job,
    ):
        job.wait()
    assert failure.match(LOST_PEER)
    assert complete(tmp_path) == [3]
    train(BY_NAME["fsdp2"], tmp_path, *RESUMABLE, *options)
    assert "Training starts at step 4" in (tmp_path / "rank-0.log").read_text()
    assert_same(tmp_path, one_process())


@ranks.needs(2)
def test_all_ranks_end_where_another_run_uses_their_folder(tmp_path: Path) -> None:
    with lock(tmp_path), pytest.raises(ranks.RankFailed, match="is in use by another run") as failure:
        train(BY_NAME["fsdp2"], tmp_path)
    assert failure.value.exits == {0: 1, 1: 1}
    assert not complete(tmp_path)


@ranks.needs(2)
def test_all_ranks_end_where_the_checkpoint_is_of_another_job(half_way: HalfWay, tmp_path: Path) -> None:
    shutil.copytree(half_way(BY_NAME["fsdp2"]), tmp_path, dirs_exist_ok=True)
    with pytest.raises(ranks.RankFailed, match=r"optimizer\.lr is 0\.01, and was 0\.003") as failure:
        train(BY_NAME["fsdp2"], tmp_path, "--optimizer.lr=1e-2")
    assert failure.value.exits == {0: 1, 1: 1}


@ranks.needs(2)
def test_a_signal_to_one_rank_stops_all_after_the_step(one_process: OneProcess, tmp_path: Path) -> None:
    with (
        pytest.raises(ranks.RankFailed) as failure,
        interrupted(tmp_path, 1, "Trainer", "forward_backward_step", 4, signal.SIGTERM) as job,
    ):
        job.wait()
    assert failure.value.exits == dict.fromkeys((0, 1), 128 + signal.SIGTERM)
    assert failure.match("stopped after step 4; it is saved")
    assert complete(tmp_path) == [3, 4]
    assert list(runs.read_metrics(tmp_path)[runs.LOSS]) == [1, 2, 3, 4]
    train(BY_NAME["fsdp2"], tmp_path)
    assert_same(tmp_path, one_process())
