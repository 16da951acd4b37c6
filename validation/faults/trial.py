"""One run of tests on a copy of the repository, with a fault or without: what it showed.

A fault is killed by a test that fails: by a comparison, or because something was raised in it. Tests that cannot be
collected or set up, a package that cannot be imported and a process that dies show nothing, and neither does a kill
by an error that any misspelt fault would give.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from validation.faults.catalogue import Fault

ROOT = Path(__file__).parents[2]
UNIT = "validation/unit/"
# Of no use to tests, some of it large; what git and tools keep begins with a dot.
LEFT_OUT = shutil.ignore_patterns(".*", "out", "outputs", "build", "dist", "__pycache__", "*.egg-info")
MISSPELT = re.compile(r"\b(NameError|UnboundLocalError|SyntaxError|ImportError|ModuleNotFoundError|CompilationError)\b")


@dataclass(frozen=True)
class Outcome:
    """What a run showed: the test that failed first, if any did, or why it shows nothing."""

    killer: str = ""
    message: str = ""
    problem: str = ""
    passed: int = 0
    seconds: float = 0.0


def run(arguments: Sequence[str], fault: Fault | None = None) -> Outcome:
    """Runs pytest with these arguments on a copy of the repository, with the fault if there is one."""
    start = time.perf_counter()
    with TemporaryDirectory(prefix="nsa-fault-") as folder:
        copy, report = Path(folder, "copy"), Path(folder, "report.json")
        shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
        module = "nsa"
        if fault is not None:
            try:
                fault.apply(copy)
            except ValueError as error:
                return Outcome(problem=str(error))
            module = ".".join(["nsa", *Path(fault.file).with_suffix("").parts])
        command = [sys.executable, "-m", "validation.faults.witness", str(report), module, *arguments]
        # From within the copy it is the copy's packages that are found, by processes that tests start too.
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - start
        if not report.exists():
            return Outcome(problem=f"died with status {done.returncode}: {_end(done.stderr)}", seconds=seconds)
        seen = json.loads(report.read_text())
    problem, message = seen["problem"], _first_line(seen["message"])
    if not problem and MISSPELT.search(seen["message"]):
        problem = f"{seen['failed']} failed as it would for any misspelt fault: {message}"
    return Outcome(seen["failed"], message, problem, seen["passed"], seconds)


def attempt(fault: Fault) -> Outcome:
    """Tries to kill a fault: by the tests that should, then, if they let it live, by the whole layer."""
    first = run(["-x", *related(fault)], fault)
    if first.killer or first.problem:
        return first
    second = run(["-x", folder(fault)], fault)
    return Outcome(second.killer, second.message, second.problem, second.passed, first.seconds + second.seconds)


def related(fault: Fault) -> list[str]:
    """Ids of the tests tried first, from the root of the repository."""
    return [folder(fault) + test for test in fault.tests]


def folder(fault: Fault) -> str:
    """The folder of the layer whose tests should kill the fault, from the root of the repository."""
    return f"validation/{fault.layer}/"


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]


def _end(text: str) -> str:
    return text.strip()[-500:]
