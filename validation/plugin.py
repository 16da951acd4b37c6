"""What holds for every layer: a header of facts, a seed of its own for every test, and no success that shows nothing.

In the repository conftest.py loads this plugin; installed, `nsa-validate` does, and whoever names `nsa_validation` on
pytest's command line (see autoload.py). Nothing of it is in other runs.

Options: `--impl`, `--xfails-file`, `--require-gpus`, `--shuffle-seed`, `--out`; see docs/validate-your-own.md. Those of
the performance layer are in perf/plugin.py. Which implementation is tested on what is in subjects.py.
"""

import os
import random
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from _pytest.junitxml import xml_key  # the fixture for this, record_testsuite_property, is lost on parallel workers
from hypothesis import HealthCheck, settings

from . import doctor, reports, seeds

if TYPE_CHECKING:
    from .implementations import Implementation

pytest_plugins = (f"{__package__}.subjects",)

GPUS = doctor.inspect().gpus
if not GPUS:
    # Before anything imports Triton: without a GPU its kernels are tested under its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")


XFAILS = pytest.StashKey[dict[str, str]]()
"""Reasons of expected failures, by test."""

# How many examples property tests try: `--hypothesis-profile=thorough` for many, and for others than the last time.
# Hypothesis looks for the profile when options have been read.
settings.register_profile(
    "repeatable",
    derandomize=True,
    print_blob=True,  # a failure says how to repeat its example
    max_examples=20,
    deadline=None,  # a first call may compile
    # The fixtures of a test are settings that its examples share.
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
settings.register_profile("thorough", settings.get_profile("repeatable"), derandomize=False, max_examples=500)
settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("validation")
    group.addoption(
        "--impl",
        action="append",
        metavar="NAME|package.module:object",
        help="implementation under test, repeatable; other tests are left out (default: eager and triton)",
    )
    group.addoption("--xfails-file", type=Path, help="ids of tests that are to fail, one a line, each with # a reason")
    group.addoption("--require-gpus", type=int, default=0, metavar="N", help="N GPUs must be here: lack of them fails")
    group.addoption("--shuffle-seed", type=int, metavar="N", help="run in an order of N's, on numbers of N's")
    group.addoption("--out", default=reports.OUT, metavar="FOLDER", help="for pictures (default: out in the checkout)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs_gpu(count=1, gib=0): so many GPUs, with so much memory each")
    config.addinivalue_line("markers", "smoke: one of the few of its layer that show that it works at all")
    config.addinivalue_line("markers", "ladder: takes minutes; `make validate` runs it, `make system` does not")
    config.addinivalue_line("markers", "every_dtype: every case in every dtype, beside float64 too")
    config.addinivalue_line(
        "markers", "claim(*aspects): what of a stage a test is about: rules, forward, gradients, ..."
    )
    config.addinivalue_line("markers", "sparing(**names): parameters that are enough where a call takes seconds")
    seeds.variation = config.option.shuffle_seed
    seeds.forced = config.getoption("--hypothesis-seed", None)
    if len(GPUS) < config.option.require_gpus:
        raise pytest.UsageError(f"--require-gpus={config.option.require_gpus}: {len(GPUS)} found")
    config.stash[reports.IMPLEMENTATIONS] = _implementations(config.option.impl)
    config.stash[XFAILS] = _read_xfails(config.option.xfails_file) if config.option.xfails_file else {}
    config.stash[reports.REFUSED] = ""


def _implementations(names: list[str] | None) -> "list[Implementation] | None":
    """Those asked for, or None: the layer that has a use for them knows what to take by default."""
    if not names:
        return None
    from .firstcall import described, place
    from .implementations import load

    try:
        return [load(name) for name in names]
    except Exception as error:  # somebody else's module may raise anything
        raise pytest.UsageError(f"--impl: {described(error)}{place(error)}") from error


def pytest_report_header(config: pytest.Config) -> list[str]:
    chosen = config.option.shuffle_seed
    return [*doctor.facts(), *([] if chosen is None else [f"shuffled: --shuffle-seed={chosen}"])]


# Randomness.


@pytest.hookimpl(trylast=True)  # whoever leaves tests out or sorts them has done so
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.shuffle_seed is not None:
        random.Random(config.option.shuffle_seed).shuffle(items)


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Seeds from the test's own id: the same numbers in any order, alone or in company, never those of another test."""
    import numpy
    import torch

    seed = seeds.seed_of(seeds.name_of(request.node.nodeid))
    random.seed(seed)
    numpy.random.seed(seed)  # noqa: NPY002 (for whoever uses the global generator)
    torch.manual_seed(seed)
    request.node.user_properties.append(("seed", seed))


# Machines.


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tests are many and small: on shared cores threads would spend their time waiting for one another."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _mended_interpreter() -> None:
    """What kernels are tested under where there is no GPU is too slow as it is, and cuts off where a GPU rounds."""
    if "TRITON_INTERPRET" in os.environ:
        from . import interpreter

        interpreter.accelerate()
        interpreter.round_to_nearest()
        interpreter.keep_conditions()


def _need_gpus(config: pytest.Config, count: int = 1, gib: float = 0) -> None:
    import torch

    sizes = [torch.cuda.get_device_properties(i).total_memory / 2**30 for i in range(len(GPUS))]
    found = sum(size >= gib for size in sizes)
    if found >= count:
        return
    reason = f"missing hardware: {count} GPU{'s' * (count > 1)}{f' of {gib} GiB' * (gib > 0)}, {found} found"
    if count <= config.option.require_gpus:
        pytest.fail(f"{reason}, yet --require-gpus={config.option.require_gpus}", pytrace=False)
    pytest.skip(reason)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("needs_gpu"):
        _need_gpus(item.config, *mark.args, **mark.kwargs)


@pytest.fixture(autouse=True)
def _launchers_are_called(request: pytest.FixtureRequest) -> Iterator[None]:
    """Launchers of kernels are called, not repeated, in tests that may replace a part of them."""
    launches = sys.modules.get("nsa.kernels.launches")
    with launches.direct() if launches and "monkeypatch" in request.fixturenames else nullcontext():
        yield


@pytest.fixture
def on_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Makes tensors on the GPU where there is one, unless the implementation under test has no use for it."""
    import torch

    usable = request.getfixturevalue("impl").devices if "impl" in request.fixturenames else {"cpu", "cuda"}
    if "cpu" not in usable:
        _need_gpus(request.config)
    # A CPU is the default anyway. Set as such, it is looked up by every call, which PyTorch's compiler follows too.
    with torch.device("cuda") if torch.cuda.is_available() and "cuda" in usable else nullcontext():
        yield
    give_back_memory()


_KEPT = 2 << 30
"""Bytes of a GPU that a process may keep for its next test."""


def give_back_memory() -> None:
    """Frees what PyTorch keeps of a GPU, if it is much: where tests run in parallel, others need it."""
    import torch

    if torch.cuda.is_available() and torch.cuda.memory_reserved() > _KEPT:
        torch.cuda.empty_cache()


# Expected failures.


def _read_xfails(file: Path) -> dict[str, str]:
    """Reasons by test id."""
    reasons: dict[str, str] = {}
    try:
        lines = file.read_text().splitlines()
    except OSError as error:
        raise pytest.UsageError(f"--xfails-file: {error}") from error
    for number, line in enumerate(lines, 1):
        name, _, reason = (part.strip() for part in line.partition(" #"))
        if not name or name.startswith("#"):
            continue
        if not reason:
            raise pytest.UsageError(f"{file}:{number}: {name} needs a reason, after ' # '")
        if name in reasons:
            raise pytest.UsageError(f"{file}:{number}: {name} is there twice")
        reasons[name] = reason
    return reasons


class _Xfails:
    @pytest.hookimpl(tryfirst=True)  # ids are looked for among all tests, whatever -k leaves of them
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        xfails, reasons = config.stash[XFAILS], {}
        unmatched = set(xfails)
        for item in items:
            names = {item.nodeid, seeds.name_of(item.nodeid)} & xfails.keys()
            unmatched -= names
            for name in names:
                reasons[item.nodeid] = xfails[name]
        if unmatched:
            lost = "\n  ".join(sorted(unmatched))
            message = f"{config.option.xfails_file}: no test of this run has the id\n  {lost}"
            output = getattr(config, "workeroutput", None)
            if output is None:
                raise pytest.UsageError(message)
            # What a parallel worker raises is lost: it has no tests then, and tells the one that has it run.
            output["refused"] = message
            items.clear()
        for item in items:
            if item.nodeid in reasons:
                item.add_marker(pytest.mark.xfail(reason=reasons[item.nodeid], strict=True))


def pytest_sessionstart(session: pytest.Session) -> None:
    if session.config.stash[XFAILS]:
        session.config.pluginmanager.register(_Xfails())


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    stash = node.config.stash
    stash[reports.REFUSED] = getattr(node, "workeroutput", {}).get("refused", stash[reports.REFUSED])


# The account of a run.

NOTHING_RAN = "no test was executed, all were skipped or deselected: this run shows nothing, so it fails"


def _nothing_ran(config: pytest.Config) -> bool:
    reporter = config.pluginmanager.getplugin("terminalreporter")
    if reporter is None or config.option.collectonly:
        return False
    return not any(reporter.stats.get(outcome) for outcome in ("passed", "failed", "error", "xfailed", "xpassed"))


def _skips(config: pytest.Config) -> Counter[str]:
    reporter = config.pluginmanager.getplugin("terminalreporter")
    reports = reporter.stats.get("skipped", []) if reporter else []
    # Hypothesis writes its example below a reason.
    return Counter(report.longrepr[2].removeprefix("Skipped: ").partition("\n")[0] for report in reports)


def _account(config: pytest.Config) -> None:
    """What a JUnit report says of the whole: it has the durations, and every test's seed, by itself."""
    report = config.stash.get(xml_key, None)
    if report is None:
        return
    report.add_global_property("shuffle-seed", config.option.shuffle_seed)
    for reason, count in _skips(config).items():
        report.add_global_property(f"skipped: {reason}", count)


@pytest.hookimpl(tryfirst=True)  # before reports are written
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    with reports.attempt("the account in the JUnit report", partial(reports.note, session.config)):
        _account(session.config)
    if session.config.stash[reports.REFUSED]:
        session.exitstatus = pytest.ExitCode.USAGE_ERROR
    elif exitstatus == pytest.ExitCode.OK and _nothing_ran(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    with reports.attempt("the list of skips", terminalreporter.write_line):
        skips = _skips(config)
        if skips:
            terminalreporter.section("skipped, by reason")
        for reason, count in skips.most_common():
            terminalreporter.write_line(f"{count:6}  {reason}")
    for line in config.stash.get(reports.NOTES, ()):
        terminalreporter.write_line(line, yellow=True)
    if refused := config.stash[reports.REFUSED]:
        terminalreporter.write_line(f"ERROR: {refused}", red=True, bold=True)
    elif exitstatus != pytest.ExitCode.USAGE_ERROR and _nothing_ran(config):
        terminalreporter.write_line(NOTHING_RAN, red=True, bold=True)
