"""Runs tests in this process and writes down how that ended: `python -m validation.faults.witness REPORT MODULE ...`.

It is run from within a copy of the repository. The package that was under test must be the copy's, and `MODULE`, the
one that was changed, must be importable: what cannot be imported has not been tested.
"""

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest


class Witness:
    """Sees the first test that fails, and whatever keeps tests from being run at all."""

    def __init__(self) -> None:
        self.passed = 0
        self.failed, self.message, self.problem = "", "", ""

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.problem = self.problem or f"{report.nodeid} could not be collected: {report.longreprtext}"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.passed += report.when == "call" and report.passed
        if not report.failed or self.failed:
            return
        crash = getattr(report.longrepr, "reprcrash", None)
        message = crash.message if crash else report.longreprtext
        if report.when == "call":
            self.failed, self.message = report.nodeid, message
        else:
            self.problem = self.problem or f"{report.when} of {report.nodeid}: {message}"


def main(report: str, module: str, *arguments: str) -> None:
    witness = Witness()
    status = pytest.main(["-p", "no:cacheprovider", "-q", *arguments], plugins=[witness])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        witness.problem = witness.problem or f"pytest ended with status {status!r}"
    if not witness.problem:
        found = Path(import_module(module).__file__ or "")
        if not found.is_relative_to(Path.cwd()):
            witness.problem = f"what was tested is not the copy in {Path.cwd()} but {found}"
    Path(report).write_text(json.dumps(vars(witness)))


if __name__ == "__main__":
    main(*sys.argv[1:])
