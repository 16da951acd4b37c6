"""What one process makes of a training, for all the layouts that are compared with it."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from validation.integration.layouts import ONE, train


@pytest.fixture(scope="session")
def one_process(tmp_path_factory) -> Callable[..., Path]:
    """The folder into which one process has trained with these options, once a session."""

    @cache
    def trained(*options: str) -> Path:
        folder = tmp_path_factory.mktemp("one")
        train(ONE, folder, *options)
        return folder

    return trained
