"""Layers while they train, beyond the length of training, and in generation; and the mutants that single calls miss."""

import os

import pytest

from validation.system.checks import CHECKS
from validation.system.mutants import MUTANTS, VARIABLE


@pytest.mark.parametrize("name", CHECKS)
def test_holds(name: str) -> None:
    CHECKS[name]()


@pytest.mark.skipif(VARIABLE in os.environ, reason="a mutant is made in the whole run")
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_killed(name: str) -> None:
    mutant = MUTANTS[name]
    with mutant.made(), pytest.raises(AssertionError):
        CHECKS[mutant.killer]()
