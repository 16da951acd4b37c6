"""A run in which one of the mutants is made: `mutants.py` says which there are."""

import os
from collections.abc import Iterator

import pytest

from validation.system.mutants import MUTANTS, VARIABLE


@pytest.fixture(autouse=True)
def _mutant() -> Iterator[None]:
    name = os.environ.get(VARIABLE)
    if not name:
        yield
        return
    with MUTANTS[name].made():
        yield
