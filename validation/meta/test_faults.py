"""The catalogue of seeded faults: it fits the source, leaves no public bug out, and its trials tell kills from noise.

Whether tests kill every fault takes minutes, and is asked by `make faults`.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from validation.faults import trial
from validation.faults.catalogue import FAULTS, PUBLIC_BUGS, Fault
from validation.faults.trial import ROOT, UNIT

PAGE = ROOT / "docs" / "faults.md"
TESTS = {
    str(path.relative_to(ROOT)): set(re.findall(r"^def (test_\w+)", path.read_text(), re.M))
    for path in (ROOT / "validation").rglob("test_*.py")
}

WITHOUT_FAULTS = {"backends.py", "train.py"}
"""Names and signatures that a type checker sees, and an entry point, which is no part of the attention."""

# 1. The catalogue.


def test_every_fault_applies_exactly_once() -> None:
    texts = {fault.file: (ROOT / "nsa" / fault.file).read_text() for fault in FAULTS}
    unfit = [fault.name for fault in FAULTS if texts[fault.file].count(fault.old) != 1]
    assert not unfit, f"no longer fit nsa/: {unfit}"
    for fault in FAULTS:
        assert fault.new != fault.old, fault.name
        compile(texts[fault.file].replace(fault.old, fault.new), f"{fault.file} with {fault.name}", "exec")


def test_the_tests_tried_first_exist() -> None:
    assert all(fault.tests for fault in FAULTS)
    ids = sorted({test for fault in FAULTS for test in trial.related(fault)})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *ids]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, [line for line in done.stderr.splitlines() if "not found" in line]


def test_names_are_unique_and_the_faults_are_many() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 40


def test_every_public_bug_is_among_them() -> None:
    assert {fault.models for fault in FAULTS} - {None} == set(PUBLIC_BUGS)


def test_every_part_of_the_attention_has_faults() -> None:
    package = ROOT / "nsa"
    files = {path for folder in (".", "eager", "kernels") for path in (package / folder).glob("*.py")}
    parts = {str(path.relative_to(package)) for path in files if path.name != "__init__.py"}
    around = {f"titan/{name}.py" for name in ("context", "data", "initial", "runs")}
    missing = (parts | around) - WITHOUT_FAULTS - {fault.file for fault in FAULTS}
    assert not missing, f"no fault is in {', '.join(sorted(missing))}"


# 2. The page that says which test killed which.


def rows() -> Iterator[list[str]]:
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
        if len(cells) == 5 and "`" in cells[2]:
            yield cells


def test_the_page_is_of_this_catalogue() -> None:
    stated = [[name, what, where.strip("`"), bug] for name, what, where, bug, _ in rows()]
    assert stated == [[fault.name, fault.what, fault.file, str(fault.models or "")] for fault in FAULTS]


def test_the_killers_on_the_page_exist() -> None:
    for *_, killer in rows():
        test = killer.strip("`")
        assert_exists(test if test.startswith("validation/") else UNIT + test)


def assert_exists(test: str) -> None:
    file, _, function = test.partition("::")
    assert function.partition("[")[0] in TESTS.get(file, ()), f"there is no test {test}"


# 3. Trials.

QUICK = "test_errors.py::test_scale_of_another_type"
REFUSAL = 'raise TypeError(f"scale must be a float or None'
FAULT = Fault("scale-of-any-type", "takes any scale", "checks.py", REFUSAL, "return 1.0  # ", (QUICK,))


@pytest.fixture(autouse=True)
def _without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried here needs none, and to start one takes seconds."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def test_a_run_without_a_fault_kills_nothing() -> None:
    outcome = trial.run(trial.related(FAULT))
    assert outcome.passed > 1
    assert not outcome.killer
    assert not outcome.problem


def test_a_test_that_fails_kills_the_fault() -> None:
    before = (ROOT / "nsa" / FAULT.file).read_text()
    outcome = trial.attempt(FAULT)
    assert outcome.killer.startswith(UNIT + QUICK)
    assert not outcome.problem
    assert (ROOT / "nsa" / FAULT.file).read_text() == before, "the fault was made in the package itself"


UNIMPORTABLE = {"old": "import torch\n", "new": "import torhc\n"}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"new": 'raise TypError(f"'}, "misspelt"),
        # What every test needs is imported before any is collected.
        (UNIMPORTABLE, "pytest ended with status"),
        ({**UNIMPORTABLE, "file": "titan/data.py", "tests": ("test_data.py",)}, "could not be collected"),
    ],
    ids=["misspelt", "not_importable", "not_importable_by_its_test"],
)
def test_what_every_test_would_notice_is_no_kill(changes: dict[str, Any], problem: str) -> None:
    assert problem in trial.attempt(replace(FAULT, **changes)).problem


def test_a_fault_that_does_not_apply_is_an_error() -> None:
    problem = trial.attempt(replace(FAULT, old="no such text")).problem
    assert problem == "its text must stand in nsa/checks.py once, not 0 times"
