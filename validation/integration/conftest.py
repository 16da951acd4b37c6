"""What one process makes of a training, for all the layouts that are compared with it."""

import hashlib
import shutil
from functools import cache
from pathlib import Path

import pytest
from filelock import FileLock

from validation.integration.layouts import ONE, OneProcess, train


@pytest.fixture(scope="session")
def one_process(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> OneProcess:
    """The folder into which one process has trained with these options, once for all that test at the same time."""
    folders = tmp_path_factory.getbasetemp() if worker_id == "master" else tmp_path_factory.getbasetemp().parent

    @cache
    def trained(*options: str) -> Path:
        folder = folders / f"one-{hashlib.sha256(repr(options).encode()).hexdigest()[:16]}"
        with FileLock(f"{folder}.lock"):
            if not (done := folder / "done").exists():
                shutil.rmtree(folder, ignore_errors=True)  # what a training left that failed would be taken up
                train(ONE, folder, *options)
                done.touch()
        return folder

    return trained
