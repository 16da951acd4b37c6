"""What holds for every layer: a header of facts, a seed of its own for every test, no success without a test run."""

import os
import random
from zlib import crc32

import pytest

from validation import doctor

if not doctor.inspect().gpus:
    # Before anything imports Triton: without a GPU its kernels are tested under its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_report_header():
    return doctor.facts()


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Tests are many and small: on shared cores threads would spend their time waiting for one another."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _fast_interpreter():
    """What kernels are tested under where there is no GPU is too slow as it is."""
    if "TRITON_INTERPRET" in os.environ:
        from validation import interpreter

        interpreter.accelerate()


@pytest.fixture
def on_device():
    """Makes tensors on the GPU where there is one."""
    import torch

    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        yield


@pytest.fixture(autouse=True)
def _seed(request):
    """Seeds from the test's own id: the same numbers in any order, alone or in company, never those of another test."""
    import numpy
    import torch

    seed = crc32(request.node.nodeid.encode())
    random.seed(seed)
    numpy.random.seed(seed)  # noqa: NPY002 (for whoever uses the global generator)
    torch.manual_seed(seed)


NOTHING_RAN = "no test was executed, all were skipped or deselected: this run shows nothing, so it fails"


def _nothing_ran(config) -> bool:
    reporter = config.pluginmanager.getplugin("terminalreporter")
    if reporter is None or config.option.collectonly:
        return False
    return not any(reporter.stats.get(outcome) for outcome in ("passed", "failed", "error", "xfailed", "xpassed"))


def pytest_sessionfinish(session, exitstatus):
    if exitstatus == pytest.ExitCode.OK and _nothing_ran(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    if _nothing_ran(config):
        terminalreporter.write_line(NOTHING_RAN, red=True, bold=True)
