"""Files of a run are whole or absent, its folder is its own, and a checkpoint is of one job."""

import errno
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nsa.titan import runs

JOB = {"model.dim": 128, "optimizer.lr": 3e-3, "nsa.compression": "mlp", "model.converters": ()}


def save(folder: Path, *steps: int, whole: bool = True) -> None:
    """Makes what a save leaves, or what one that was killed does."""
    for step in steps:
        checkpoint = folder / f"step-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "__0_0.distcp").write_text("weights")
        if whole:
            (checkpoint / ".metadata").touch()


# Files


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    file = tmp_path / "file.txt"
    runs.write_whole(file, "first")
    with runs.replacing(file) as temporary:
        temporary.write_text("second")
        assert temporary.suffix == ".txt"
        assert file.read_text() == "first"
    assert file.read_text() == "second"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_a_file_whose_writing_fails_stays_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "file.txt"
    runs.write_whole(file, "first")

    def fail() -> None:
        with runs.replacing(file) as temporary:
            temporary.write_text("sec")
            raise OSError(errno.ENOSPC, "no space left")

    with pytest.raises(OSError, match="no space left"):
        fail()
    assert file.read_text() == "first"
    assert os.listdir(tmp_path) == ["file.txt"]


@pytest.mark.parametrize(
    "torn", [b'{"step": 3, "lo', b'{"step": 3, "lo\n', b"\0\0\0\0", b"\xff\xfe\n", b"7\n", b"\n"], ids=repr
)
def test_records_are_read_around_a_torn_line(tmp_path: Path, torn: bytes) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n{"step": 2}\n' + torn)
    assert runs.read_records(file) == [{"step": 1}, {"step": 2}]


def test_there_are_no_records_where_there_is_no_file(tmp_path: Path) -> None:
    assert runs.read_records(tmp_path / "metrics.jsonl") == []


def test_a_log_replaces_the_steps_that_are_trained_again(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "metrics.jsonl"
    first = runs.RecordLog(file)
    for step in (1, 2, 3):
        first.append({"step": step, "run": 1})
    with file.open("a") as stream:
        stream.write('{"step": 4, "ru')  # the kill
    second = runs.RecordLog(file)
    for step in (3, 3, 4):
        second.append({"step": step, "run": 2})
    assert [(record["step"], record["run"]) for record in runs.read_records(file)] == [
        (1, 1),
        (2, 1),
        (3, 2),
        (3, 2),
        (4, 2),
    ]
    assert file.read_text().endswith("}\n")


def _in_a_process(target: Callable[..., None], *arguments: Any) -> int | None:
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    process.join(60)
    return process.exitcode


def _log_with_little_room(file: Path) -> None:
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python does by itself at its start
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
    log = runs.RecordLog(file)
    failures = 0
    for step in range(100):
        try:
            log.append({"step": step, "text": "x" * 30})
        except OSError:
            failures += 1
    assert 0 < failures < 100


def test_a_log_holds_whole_lines_when_room_runs_out(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert _in_a_process(_log_with_little_room, file) == 0
    records = [json.loads(line) for line in file.read_text().splitlines()]  # none is torn
    assert [record["step"] for record in records] == list(range(len(records)))
    assert records


# The lock


def _lock_and(folder: Path, locked: Any, end: Any) -> None:
    kept = runs.lock(folder)
    locked.set()
    end.wait(60)
    del kept


def test_a_folder_is_one_run_s_until_it_ends(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    locked, end = context.Event(), context.Event()
    other = context.Process(target=_lock_and, args=(tmp_path, locked, end))
    other.start()
    try:
        assert locked.wait(60)
        with pytest.raises(runs.InUse, match=rf"job\.dump_folder '{tmp_path}' is in use .*process {other.pid} on"):
            runs.lock(tmp_path)
    finally:
        os.kill(other.pid or 0, signal.SIGKILL)  # the lock goes with the process
        other.join()
    runs.lock(tmp_path).close()


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    for folder in (tmp_path, tmp_path / "new"):
        with pytest.raises(
            runs.Refused, match=r"job\.dump_folder must be a folder that can be written to, got .*denied"
        ):
            runs.require_writable(folder)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(runs.Refused, match=r"job\.dump_folder must be a folder that can be written to, got .*file'"):
        runs.require_writable(tmp_path / "file")


# Checkpoints


def test_saves_that_did_not_end_are_no_checkpoints(tmp_path: Path) -> None:
    save(tmp_path, 10, 2)
    save(tmp_path, 4, 12, whole=False)
    save(tmp_path, 6, whole=False)
    (tmp_path / "step-6" / "model.safetensors.index.json").touch()  # Hugging Face's last file
    (tmp_path / "backup-step-20").mkdir()
    (tmp_path / "backup-step-20" / ".metadata").touch()
    assert list(runs.checkpoints(tmp_path)) == [2, 4, 6, 10, 12]
    assert runs.saved_steps(tmp_path) == [2, 6, 10]
    assert runs.saved_steps(tmp_path / "nowhere") == []


def test_only_whole_checkpoints_count_as_the_latest(tmp_path: Path) -> None:
    save(tmp_path, 2, 4, 8)
    save(tmp_path, 3, 6, 10, whole=False)
    # The last two that can be loaded are 4 and 8; 10 may be in the making.
    assert [checkpoint.name for checkpoint in runs.stale_checkpoints(tmp_path, 2)] == ["step-2", "step-3"]
    assert runs.stale_checkpoints(tmp_path, 3) == []
    assert runs.stale_checkpoints(tmp_path / "nowhere", 2) == []


def test_the_last_whole_checkpoint_is_loaded(tmp_path: Path) -> None:
    assert runs.step_to_load(tmp_path, -1, rewinds=True) is None
    save(tmp_path, 4, 8)
    save(tmp_path, 10, whole=False)
    assert runs.step_to_load(tmp_path, -1, rewinds=True) == 8
    assert runs.step_to_load(tmp_path, 8, rewinds=True) == 8
    assert runs.step_to_load(tmp_path, 4, rewinds=False) == 4


def test_a_step_that_is_not_saved_is_refused(tmp_path: Path) -> None:
    with pytest.raises(runs.Refused, match=r"checkpoint\.load_step must be -1: .* has no checkpoint, got 99"):
        runs.step_to_load(tmp_path, 99, rewinds=False)
    save(tmp_path, 4, 8)
    save(tmp_path, 10, whole=False)
    for step in (99, 10):
        with pytest.raises(runs.Refused, match=rf"must be one of the steps saved in '.*', \[4, 8\], got {step}"):
            runs.step_to_load(tmp_path, step, rewinds=False)


def test_a_run_does_not_mix_with_later_steps_of_another(tmp_path: Path) -> None:
    save(tmp_path, 4, 6, 8)
    with pytest.raises(runs.Refused, match=r"load_step=4 goes back behind \[6, 8\] .*initial_load_path .*/step-4 "):
        runs.step_to_load(tmp_path, 4, rewinds=True)


# Jobs


def test_differences_are_named_with_both_values() -> None:
    new = {**JOB, "optimizer.lr": 1e-2, "debug.seed": 7}
    del new["model.dim"]
    assert runs.differences(JOB, new) == {
        "model.dim": (128, None),
        "optimizer.lr": (3e-3, 1e-2),
        "debug.seed": (None, 7),
    }
    assert runs.differences(json.loads(json.dumps(JOB)), JOB) == {}  # as it comes back from a file


def test_a_job_is_that_of_the_steps_after_it_began(tmp_path: Path) -> None:
    other = {**JOB, "optimizer.lr": 1e-2}
    runs.record_job(tmp_path, JOB, 0, {})
    runs.record_job(tmp_path, JOB, 10, {})  # resumed as it was
    runs.record_job(tmp_path, other, 20, {"torch": "2.13"})
    assert [entry["after_step"] for entry in runs.read_jobs(tmp_path)] == [0, 20]
    for step, job in ((1, JOB), (20, JOB), (21, other), (99, other)):
        assert runs.differences(runs.job_of(tmp_path, step) or {}, job) == {}
    assert runs.job_of(tmp_path, 0) is None


def test_a_job_that_saved_nothing_is_forgotten(tmp_path: Path) -> None:
    other = {**JOB, "optimizer.lr": 1e-2}
    runs.record_job(tmp_path, JOB, 0, {})
    runs.record_job(tmp_path, other, 20, {})
    runs.record_job(tmp_path, JOB, 20, {})  # from the same checkpoint, as it was made
    assert [entry["after_step"] for entry in runs.read_jobs(tmp_path)] == [0]
    runs.record_job(tmp_path, other, 0, {})  # from the beginning
    assert runs.differences(runs.job_of(tmp_path, 5) or {}, other) == {}


@pytest.mark.parametrize("text", ["", '{"jobs": [{"aft', "[]", '{"jobs": 7}', '{"jobs": [7]}'])
def test_a_spoilt_job_file_is_said_and_not_heeded(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    assert runs.read_jobs(tmp_path) == []
    assert not caplog.records  # a folder without one is an ordinary folder
    (tmp_path / runs.JOB_FILE).write_text(text)
    assert runs.job_of(tmp_path, 5) is None
    assert "cannot be read" in caplog.text
    runs.record_job(tmp_path, JOB, 5, {})
    assert runs.job_of(tmp_path, 6) is not None


def test_another_job_is_refused_by_every_field_old_and_new(tmp_path: Path) -> None:
    changes = {"optimizer.lr": (3e-3, 1e-2), "nsa.compression": ("mlp", "mean")}
    with pytest.raises(runs.Refused) as refusal:
        runs.require_same_job(tmp_path, changes, ["optimizer.lr"], [])
    assert "nsa.compression is 'mean', and was 'mlp'" in str(refusal.value)
    assert "optimizer.lr is" not in str(refusal.value)
    assert "--nsa.allow_changes optimizer.lr,nsa.compression" in str(refusal.value)
    runs.require_same_job(tmp_path, changes, ["optimizer.lr", "nsa.compression", "debug.seed"], [])
    runs.require_same_job(tmp_path, {}, [], [])


def test_a_model_that_does_not_fit_is_refused_whatever_is_allowed(tmp_path: Path) -> None:
    changes = {"model.dim": (128, 256)}
    with pytest.raises(runs.Refused) as refusal:
        runs.require_same_job(tmp_path, changes, ["model.dim"], ["norm.weight is [256], and [128] in the checkpoint"])
    assert "model.dim is 256, and was 128" in str(refusal.value)
    assert "norm.weight is [256]" in str(refusal.value)
    assert "allow_changes" not in str(refusal.value)


def test_a_finished_run_has_nothing_left_to_train(tmp_path: Path) -> None:
    runs.require_steps_left(tmp_path, 5, 6)
    for step in (6, 7):
        with pytest.raises(runs.NothingLeft, match=rf"is step {step}, and training\.steps is 6") as refusal:
            runs.require_steps_left(tmp_path, step, 6)
        assert refusal.value.status not in (0, runs.Refused.status)


def test_the_code_has_a_version_of_its_own() -> None:
    assert runs.code_version() == runs.code_version()
    assert "sources" in runs.code_version()
