"""Runs in users' hands: started twice, in a home that cannot be written to, on a full disk, stopped at any moment.

Whatever happens, what a run says of its saved state is true, it never does nothing without a word, and the next run
goes on from the last save that was announced.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from validation import runs
from validation.integration import ranks

README = ("--model.name=nsa", "--model.flavor=debug")
TINY = (
    "--training.seq_len=64",
    "--training.local_batch_size=1",
    "--training.steps=6",
    "--metrics.log_freq=1",
    "--lr_scheduler.warmup_steps=2",
    "--checkpoint.interval=3",
    "--validation.seq_len=64",
    "--validation.local_batch_size=1",
    "--validation.freq=2",
    "--validation.steps=5",
)


NO_HOME = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "TRITON_HOME"), "/dev/null/home")
"""A home that cannot be written to, not even by root."""


def train_as_user(directory: Path, arguments: Sequence[str]) -> None:
    """Trains in a directory of the user's, whose home and caches cannot be written to."""
    os.chdir(directory)
    os.environ |= NO_HOME
    ranks.train_here(arguments)


def train_until(arguments: Sequence[str], moment: str, calls: int, signals: list[signal.Signals]) -> None:
    """Trains, and sends its own process signals when a method has been called so often."""
    import torchtitan.train
    from torch.distributed.checkpoint import FileSystemWriter

    from nsa.titan.checkpoints import Checkpoints
    from nsa.titan.train_spec import Validator

    owner, method = {
        "loading": (Checkpoints, "load"),
        "a step": (torchtitan.train.Trainer, "forward_backward_step"),
        "a save": (FileSystemWriter, "write_data"),
        "validation": (Validator, "post_dataloading_process"),
    }[moment]
    called = getattr(owner, method)

    def stopped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls -= 1
        if not calls:
            for number in signals:
                os.kill(os.getpid(), number)
        return called(*args, **kwargs)

    with mock.patch.object(owner, method, stopped):
        ranks.train_here(arguments)


def ended(target: Callable[..., object], *arguments: Any, folder: Path) -> tuple[int, str]:
    """Exit status of a training process and what it said, the last line that is about the run at the end."""
    with ranks.Job(target, arguments, folder / "log", 1) as job:
        try:
            job.wait()
            status = 0
        except ranks.RankFailed as failure:
            status = failure.exits[0]
    return status, job.logs[0].read_text(errors="replace")


def files(folder: Path) -> dict[Path, bytes]:
    """What is in a folder, byte for byte, but for the lock, which each run takes."""
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != ".lock"}


def saved(folder: Path) -> list[int]:
    """Steps of the checkpoints in the folder of a run, by the file that PyTorch writes last."""
    return sorted(int(file.parent.name.removeprefix("step-")) for file in folder.glob("checkpoint/*/.metadata"))


def test_the_readme_s_command_twice_with_another_flavor_in_between(tmp_path: Path) -> None:
    def run(*options: str) -> tuple[int, str]:
        return ended(train_as_user, tmp_path, (*README, *TINY, *options), folder=tmp_path)

    outputs = tmp_path / "outputs"
    status, said = run()
    assert status == 0, said
    first = files(outputs / "debug")
    status, said = run("--model.flavor=debug_dense")
    assert status == 0, said
    assert saved(outputs / "debug") == saved(outputs / "debug_dense") == [3, 6]

    status, said = run()
    assert status == 3, said
    assert re.search(r"nothing is left to train: '.*step-6' is step 6, .*--training\.steps", said)
    assert "completed" not in said

    status, said = run("--nsa.window_size=32", "--optimizer.lr=1e-2")
    assert status == 1, said
    assert "optimizer.lr is 0.01, and was 0.003" in said
    assert "nsa.window_size is 32, and was 128" in said
    assert files(outputs / "debug") == first, "a run that trained nothing changed the folder"

    status, said = run("--training.steps=7", "--nsa.window_size=32", "--nsa.allow_changes=nsa.window_size")
    assert status == 0, said
    assert "Training starts at step 7" in said
    assert "--lr_scheduler.total_steps 6 keeps it" in said


def test_a_folder_of_ones_own_is_validated_on(tmp_path: Path) -> None:
    for number in range(60):
        (tmp_path / f"{number}.txt").write_text(f"{number} " * 100)
    options = (*TINY, "--training.steps=1", "--checkpoint.no-enable", f"--job.dump_folder={tmp_path / 'run'}")
    status, said = ended(ranks.train_here, (*options, f"--training.dataset_path={tmp_path}"), folder=tmp_path)
    assert status == 0, said
    own = runs.read_metrics(tmp_path / "run")[runs.VALIDATION_LOSS]
    explicit = f"--validation.dataset_path={tmp_path}"
    status, said = ended(ranks.train_here, (*options, f"--training.dataset_path={tmp_path}", explicit), folder=tmp_path)
    assert status == 0, said
    assert runs.read_metrics(tmp_path / "run")[runs.VALIDATION_LOSS] == own


@pytest.mark.parametrize(
    ("moment", "calls", "signals", "status", "last", "expected"),
    [
        pytest.param(
            "loading", 1, [signal.SIGTERM], 143, r"SIGTERM: stopped at once, before training", [], id="loading"
        ),
        pytest.param("a step", 2, [signal.SIGINT], 130, r"SIGINT: stopped after step 2; it is saved", [2], id="step"),
        pytest.param("validation", 7, [signal.SIGINT], 130, r"stopped after step 2; it is saved", [2], id="validation"),
        pytest.param("a save", 1, [signal.SIGTERM], 143, r"stopped after step 3; it is saved", [3], id="save"),
        pytest.param("a save", 2, [signal.SIGTERM], 0, r"Training completed", [3, 6], id="last save"),
        pytest.param("a step", 2, [signal.SIGTERM] * 2, -15, r"a second signal stops at once", [], id="step, twice"),
        pytest.param("a save", 2, [signal.SIGINT] * 2, -2, r"a second signal stops at once", [3], id="save, twice"),
    ],
)
def test_a_signal_at_any_moment_keeps_its_promise(
    tmp_path: Path, moment: str, calls: int, signals: list[signal.Signals], status: int, last: str, expected: list[int]
) -> None:
    arguments = (*TINY, f"--job.dump_folder={tmp_path}")
    got, said = ended(train_until, arguments, moment, calls, signals, folder=tmp_path)
    assert got == status, said
    lines = [line for line in said.splitlines() if re.search("signal|stopped|saved|completed", line, re.IGNORECASE)]
    assert re.search(last, lines[-1]), said
    assert ("completed" in said) == (status == 0), said
    assert saved(tmp_path) == expected
    if status == 0:
        return
    status, said = ended(ranks.train_here, arguments, folder=tmp_path)
    assert status == 0, said
    assert f"Training starts at step {max(expected, default=0) + 1}" in said
    assert sorted(runs.read_metrics(tmp_path)[runs.LOSS]) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("option", ["checkpoint.no-enable", "checkpoint.load_only"])
def test_a_signal_where_nothing_is_saved_promises_nothing(tmp_path: Path, option: str) -> None:
    arguments = (*TINY, f"--job.dump_folder={tmp_path}", f"--{option}")
    status, said = ended(train_until, arguments, "a step", 2, [signal.SIGTERM], folder=tmp_path)
    assert status == 143, said
    assert re.search(r"SIGTERM: stopped at once, in step 2; nothing was saved: checkpoint\.\w+", said)
    assert "resumes" not in said
    assert saved(tmp_path) == []


# Eight MiB hold one checkpoint of this model, not two.
SMALL = (*README, *TINY, "--nsa.compression=mean", "--nsa.shared_kv=True", "--checkpoint.interval=2")
MOUNT = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
COMMANDS = """
mount -t tmpfs -o size=8m tmpfs {disk} && cd {disk} || exit 99
{run} --training.steps=4; echo "status $?"
find . -name 'step-*'
{run} --training.steps=3; echo "status $?"
cp -r . {kept}
"""


def can_mount() -> bool:
    """Whether this user can mount a small disk of its own."""
    if shutil.which("unshare") is None or shutil.which("mount") is None:
        return False
    return subprocess.run([*MOUNT, "mount -t tmpfs tmpfs /mnt"], capture_output=True, check=False).returncode == 0


def test_a_full_disk_costs_no_more_than_the_saves_that_fail(tmp_path: Path) -> None:
    if not can_mount():
        pytest.skip("this user cannot mount a disk of 8 MiB")
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    run = f"{shlex.quote(sys.executable)} -m nsa.train {shlex.join(SMALL)}"
    script = COMMANDS.format(disk=shlex.quote(str(disk)), kept=shlex.quote(str(kept)), run=run)
    environment = {**runs.environment(), "PYTHONPATH": str(Path(__file__).parents[2]), **NO_HOME}
    said = subprocess.run(
        [*MOUNT, script], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
    ).stdout
    first, second = said.split("status 1\n", 1)
    assert re.search(
        r"step 4 could not be saved \(.*; \d\.\d MiB were free then\): the run ends .*step-2 is the last one", first
    ), said
    assert second.startswith("./outputs/debug/checkpoint/step-2\n["), said
    assert "Training starts at step 3" in second, said
    assert re.search(r"step 3 could not be saved", second), said
    assert saved(kept / "outputs" / "debug") == [2]
    assert sorted(runs.read_metrics(kept / "outputs" / "debug")[runs.LOSS]) == [1, 2, 3]


def test_initial_weights_that_are_there_are_not_saved_over(tmp_path: Path) -> None:
    arguments = (*TINY, f"--job.dump_folder={tmp_path}", "--checkpoint.create_seed_checkpoint")
    status, said = ended(ranks.train_here, arguments, folder=tmp_path)
    assert status == 0, said
    status, said = ended(ranks.train_here, (*arguments, "--debug.seed=1"), folder=tmp_path)
    assert status == 1, said
    assert re.search("step-0' is there already", said)


def train_with_little_room(arguments: Sequence[str]) -> None:
    """Trains where files cannot grow beyond 1 MiB."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
    ranks.train_here(arguments)


def test_a_save_that_fails_does_not_end_training(tmp_path: Path) -> None:
    arguments = (*TINY, f"--job.dump_folder={tmp_path}", "--metrics.enable_tensorboard")
    status, said = ended(train_with_little_room, arguments, folder=tmp_path)
    assert status == 1, said
    assert re.search(r"step 3 could not be saved \(.*\): training goes on, and no other one is there", said)
    assert re.search(r"step 6 could not be saved \(.*\): the run ends without it", said)
    assert "completed" not in said
    assert sorted(runs.read_metrics(tmp_path)[runs.LOSS]) == [1, 2, 3, 4, 5, 6]
    assert not list(tmp_path.glob("checkpoint/step-*")), "what a save that failed has left takes room"
    status, said = ended(ranks.train_here, arguments, folder=tmp_path)
    assert status == 0, said


def test_loggers_that_fail_do_not_end_training(tmp_path: Path) -> None:
    (tmp_path / "tb").touch()  # where folders of TensorBoard's would be
    (tmp_path / "metrics.jsonl").mkdir()
    arguments = (*TINY, f"--job.dump_folder={tmp_path}", "--metrics.enable_tensorboard")
    status, said = ended(ranks.train_here, arguments, folder=tmp_path)
    assert status == 0, said
    assert said.count("training goes on without them") == 1
    assert said.count("JsonLines lost metrics") == 1


def test_initial_weights_are_loaded_beside_a_first_save_that_was_killed(tmp_path: Path) -> None:
    def run(name: str, *options: str) -> tuple[int, str, dict[int, float]]:
        status, said = ended(
            ranks.train_here, (*TINY, *options, f"--job.dump_folder={tmp_path / name}"), folder=tmp_path
        )
        return status, said, runs.read_metrics(tmp_path / name)[runs.LOSS]

    status, said, fresh = run("first", "--training.steps=2")
    assert status == 0, said
    initial = f"--checkpoint.initial_load_path={tmp_path / 'first' / 'checkpoint' / 'step-2'}"
    (tmp_path / "second" / "checkpoint" / "step-1").mkdir(parents=True)
    status, said, loaded = run("second", "--training.steps=2", initial)
    assert status == 0, said
    assert loaded[1] < fresh[2] < fresh[1]
    for options, message in (
        (["--checkpoint.load_step=99"], r"load_step must be one of the steps saved in .*, \[2\], got 99"),
        (["--checkpoint.load_step=1"], r"load_step must be one of the steps saved in .*, \[2\], got 1"),
        (["--training.steps=3", initial, "--model.flavor=debug_dense"], "of another job"),
    ):
        status, said, _ = run("second", *options)
        assert status == 1, said
        assert re.search(message, said)
    status, said, _ = run("third", "--checkpoint.initial_load_path=nowhere")
    assert status == 1, said
    assert "checkpoint.initial_load_path must be the folder of a checkpoint, got 'nowhere'" in said
