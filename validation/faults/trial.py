"""One run of tests on a copy of the repository, with a fault or without: what it showed.

A fault is killed by a test that fails: by a comparison, or because something was raised in it. Tests that cannot be
collected or set up, a package that cannot be imported and a process that dies show nothing, and neither does a kill
by an error that any misspelt fault would give.
"""

import json
import multiprocessing
import os
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

from validation import plugin
from validation.faults.catalogue import Fault

ROOT = Path(__file__).parents[2]
UNIT = "validation/unit/"
# Of no use to tests, some of it large; what git and tools keep begins with a dot.
LEFT_OUT = shutil.ignore_patterns(".*", "out", "outputs", "build", "dist", "*.egg-info")
PRELOADED = ["pytest", "torch._dynamo", "triton.language"]
"""Modules that every run imports and that no fault changes: one process imports them, and each run is a fork of it."""
MISSPELT = re.compile(
    r"(?<!DID NOT RAISE )"  # a test that expects one of these
    r"\b(NameError|UnboundLocalError|SyntaxError|ImportError|ModuleNotFoundError|CompilationError)\b"
)


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
        output = Path(folder, "output")
        argv = ["witness", str(report), module, *arguments]
        witness = _WITNESS.format(root=str(ROOT), copy=str(copy), output=str(output), argv=argv)
        process = _processes().Process(target=exec, args=(witness, {"__name__": "__main__"}))
        process.start()
        process.join()
        seconds = time.perf_counter() - start
        if not report.exists():
            end = output.read_text().strip()[-500:] if output.exists() else "it did not begin"
            return Outcome(problem=f"died with status {process.exitcode}: {end}", seconds=seconds)
        seen = json.loads(report.read_text())
    problem, message = seen["problem"], _first_line(seen["message"])
    if not problem and MISSPELT.search(seen["message"]):
        problem = f"{seen['failed']} failed as it would for any misspelt fault: {message}"
    return Outcome(seen["failed"], message, problem, seen["passed"], seconds)


_WITNESS = """
import os, runpy, sys
output = os.open({output!r}, os.O_CREAT | os.O_WRONLY)
os.dup2(output, 1), os.dup2(output, 2)
# From within the copy it is the copy's packages that are found, by processes that tests start too. The repository goes:
# pytest reads what an installation left there of itself, and warns that it comes too late to rewrite `validation`.
os.chdir({copy!r})
sys.path[:] = [{copy!r}, *(path for path in sys.path if path not in ("", {root!r}))]
for name in [name for name in sys.modules if name.partition(".")[0] in ("nsa", "validation")]:
    del sys.modules[name]
sys.dont_write_bytecode = True
os.environ |= {{"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}}
sys.argv = {argv!r}
runpy.run_module("validation.faults.witness", run_name="__main__")
"""


@cache
def _processes() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    interpreted = {} if plugin.GPUS else {"TRITON_INTERPRET": "1"}  # Triton is imported here for the first time
    with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1", **interpreted}):
        forkserver.ensure_running()
    return context


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
