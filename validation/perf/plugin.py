"""pytest's side of the performance layer: which run another one is compared with, and no success that shows nothing.

`--benchmark-compare` without a value compares with the baseline of this machine that the repository has; where there is
no GPU and no baseline, with the last saved run of this machine that was good. Runs of another machine are refused.

pytest-benchmark by itself passes where everything was skipped, where names have changed, where benchmarks are disabled
or run in parallel, where there is nothing to compare with, and where the option has swallowed the path of the tests.
Here each of these fails, and says so.
"""

import json
from collections.abc import Callable, Generator
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from .. import reports
from . import gates, records

ROOFS = pytest.StashKey[Any]()
"""What the machine reached in this session."""
FAILURES = pytest.StashKey[list[dict[str, Any]]]()
"""What peers and rivals could not do."""
GATES = pytest.StashKey["Gatekeeper"]()
FOLDER = Path(__file__).parent
LEAVE_OUT = f"--ignore={FOLDER.relative_to(FOLDER.parents[1])} leaves them out"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("validation")
    group.addoption(
        "--peer", action="append", metavar="NAME|package.module:object", help="perf: time this implementation as well"
    )
    group.addoption("--perf-baseline", action="store_true", help="perf: make this run the baseline of this machine")


@cache
def machine() -> dict[str, Any]:
    from .timing import describe_machine

    return describe_machine()


@pytest.hookimpl(tryfirst=True)  # pytest-benchmark's own loads what it is told to compare with
def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("benchmark_compare", None) is None:
        return  # without pytest-benchmark
    if config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput") and _asked_for(config):
        raise pytest.UsageError(f"benchmarks in parallel (xdist) would measure nothing: {LEAVE_OUT}")
    keeper = config.stash[GATES] = Gatekeeper(config)
    config.pluginmanager.register(keeper, "perf-gates")
    if keeper.asked:
        keeper.resolve()


@pytest.hookimpl(trylast=True)  # the run has been saved then, and nothing said of it yet
def pytest_sessionfinish(session: pytest.Session) -> None:
    if GATES in session.config.stash:
        session.config.stash[GATES].finish(session)


def _asked_for(config: pytest.Config) -> bool:
    """Whether benchmarks would be among what is collected."""
    places = [Path(argument.partition("::")[0]).resolve() for argument in config.args]
    ignored = {Path(path).resolve() for path in config.getoption("ignore") or ()}
    return any(FOLDER in (p, *p.parents) or p in FOLDER.parents for p in places) and FOLDER not in ignored


def _is_benchmark(item: pytest.Item) -> bool:
    return "benchmark" in getattr(item, "fixturenames", ())


class Gatekeeper:
    """Follows a run and judges it at the end."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.asked = config.getoption("benchmark_compare") or None
        self.baseline: Path | None = None
        self.notes: list[str] = []
        self.problems: list[str] = []
        self.planned: list[str] = []
        self.collected: list[str] = []
        self.passed: set[str] = set()
        self.failed: set[str] = set()
        self.skipped: dict[str, str] = {}
        self.content: dict[str, Any] | None = None
        self.deselected = False
        chosen = any(getattr(config.option, name, None) for name in ("keyword", "markexpr", "deselect", "lf"))
        if config.getoption("perf_baseline") and (chosen or self.partial):
            raise pytest.UsageError(
                "--perf-baseline needs a whole run: leave out -k, -m, --deselect and single tests, or make a baseline "
                "of several runs (python -m validation.perf.parts)"
            )
        if config.getoption("perf_baseline"):
            config.option.benchmark_autosave = config.option.benchmark_autosave or "baseline"

    @property
    def partial(self) -> bool:
        """Whether the user left out some of the benchmarks. Nothing else excuses one that is missing."""
        return self.deselected or any("::" in argument for argument in self.config.args)

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        if _is_benchmark(item):
            self.planned.append(item.nodeid)

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        self.deselected = self.deselected or bool(items)

    # What to compare with.

    def resolve(self) -> None:
        """Puts a file in the place of what was asked for.

        Raises:
            pytest.UsageError: there is no such run, or the option's value cannot be meant as one.
        """
        asked, option = self.asked, self.config.option
        if not isinstance(asked, str):
            self.baseline = self._default()
        elif Path(asked).is_file() and Path(asked).suffix == ".json":
            self.baseline = Path(asked)
        elif Path(asked).exists() or "::" in asked or asked.endswith(".py"):
            raise pytest.UsageError(
                f"--benchmark-compare took {asked!r} for the run to compare with: put the option last, "
                "or write --benchmark-compare=FILE"
            )
        else:
            found = list(self._storage().glob(f"*/{asked.rstrip('*')}*.json"))
            if len(found) != 1:
                raise pytest.UsageError(
                    f"--benchmark-compare={asked}: no such file, and {len(found)} runs of that number are saved in "
                    f"{self._storage()}"
                )
            self.baseline = found[0]
        option.benchmark_compare = str(self.baseline) if self.baseline else []

    def _storage(self) -> Path:
        return Path(self.config.getoption("benchmark_storage").removeprefix("file://"))

    def _default(self) -> Path | None:
        name = machine()["name"]
        committed = records.BASELINES / f"{name}.json"
        if committed.exists():
            return committed
        if not name.startswith("cpu-"):
            raise pytest.UsageError(f"no baseline of {name} in {records.BASELINES}: make perf-baseline makes one")
        saved = [
            (file, run)
            for file, run in records.saved(self._storage(), name)
            if records.clock(run) == machine()["clock"]
        ]
        good = [file for file, run in saved if not run["problems"] and not run["partial"]]
        if not good:
            option = self.config.option
            option.benchmark_autosave = option.benchmark_autosave or "first"
            self.notes.append(f"nothing to compare with: this is the first run of {name} that is saved")
        return good[-1] if good else None

    @pytest.hookimpl(optionalhook=True)
    def pytest_benchmark_generate_machine_info(self, config: pytest.Config) -> dict[str, Any]:
        """What must be the same for a comparison; what changes from run to run is written beside it."""
        return {key: machine()[key] for key in ("name", "device")}

    @pytest.hookimpl(optionalhook=True)
    def pytest_benchmark_compare_machine_info(
        self, config: pytest.Config, machine_info: dict[str, Any], compared_benchmark: dict[str, Any]
    ) -> None:
        other = compared_benchmark["machine_info"].get("name")
        if other != machine_info["name"]:
            raise pytest.UsageError(
                f"{self.baseline} is of another machine: {other or 'unknown'}, this one is {machine_info['name']}"
            )
        clock = records.clock(compared_benchmark)
        if clock != machine()["clock"]:
            raise pytest.UsageError(
                f"{self.baseline} was timed by {clock}, this run is by {machine()['clock']}: the two cannot be compared"
            )
        for key, now in machine().items():
            then = compared_benchmark.get("measured", {}).get(key)
            if key in ("driver", "torch", "triton") and now != then:
                self.notes.append(f"{key} {now}, in the baseline {then}")

    # What happens.

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        self.collected = [item.nodeid for item in items if _is_benchmark(item)]
        session: Any = getattr(config, "_benchmarksession", None)
        if self.collected and session.disabled:
            why = "--benchmark-disable" if config.getoption("benchmark_disable") else "tests run in parallel (xdist)"
            raise pytest.UsageError(f"{len(self.collected)} benchmarks would measure nothing: {why}. {LEAVE_OUT}")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self.passed.add(report.nodeid)
        elif report.failed:
            self.failed.add(report.nodeid)
        elif report.skipped and isinstance(report.longrepr, tuple):
            self.skipped[report.nodeid] = report.longrepr[2].removeprefix("Skipped: ")

    # The verdict.

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Generator[None, Any, Any]:
        parallel = session.config.pluginmanager.hasplugin("dsession")
        if (self.collected or self.asked) and not parallel and not session.config.option.collectonly:
            self._judge()
        benchmarks = getattr(session.config, "_benchmarksession", None)
        if benchmarks:
            benchmarks.storage.save = self._saved(benchmarks.storage.save)
        return (yield)  # pytest-benchmark saves the run, what is wrong with it included

    def finish(self, session: pytest.Session) -> None:
        """Ends a run that has been saved: its exit status, and the baseline that was asked for."""
        if self.config.getoption("perf_baseline") and self.content and not self.problems and not session.exitstatus:
            file = records.BASELINES / f"{machine()['name']}.json"
            with reports.attempt(f"the baseline {file}", self.problems.append):
                records.write(self.content, file)
                self.notes.append(f"new baseline: {file}")
        if self.problems and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def _saved(self, save: Callable[..., None]) -> Callable[..., None]:
        """pytest-benchmark's function that saves a run, which fails no run where there is no place to write to."""

        def attempt(*arguments: Any) -> None:
            with reports.attempt("a saved copy of this run", self.notes.append):
                save(*arguments)

        return attempt

    def _judge(self) -> None:
        found = [b for b in self.config._benchmarksession.benchmarks if not b.has_error]  # type: ignore[attr-defined]
        run = records.figures(b.as_dict(include_data=False) for b in found)
        table, name = gates.read_table(), machine()["name"]
        lent = records.lend(run)
        within = records.compare_within(lent)
        for benchmark in found:
            benchmark.extra_info.update(within.get(benchmark.fullname, {}))
        measured = {record["fullname"] for record in run}
        if not run:
            reasons = sorted(set(self.skipped.values())) or ["none was collected"]
            self.problems.append(f"no benchmark was measured: {'; '.join(reasons)}")
            session = self.config._benchmarksession  # type: ignore[attr-defined]
            session.save = session.autosave = session.json = None  # it would warn that there is nothing to save
        self.problems += [
            f"{test}: passed without measuring anything"
            for test in self.collected
            if test in self.passed and test not in measured
        ]
        self.problems += [f"{test}: failed" for test in self.collected if test in self.failed]
        never = [test for test in self.collected if test not in {*self.passed, *self.failed, *self.skipped}]
        if never:
            self.problems.append(f"{len(never)} benchmarks never ran, {never[0]} the first of them: interrupted?")
        if self.baseline:
            content, bounds = json.loads(self.baseline.read_text()), table.bounds_of(name)
            before = records.figures(content["benchmarks"])
            different = list(gates.differences(run, before, self.skipped, self.partial, content.get("failures", ())))
            worse = list(gates.regressions(run, before, bounds))
            common = {r["fullname"] for r in before} & {r["fullname"] for r in run if r["role"] == "ours"}
            self.problems += different + worse
            self.notes.append(
                f"{len(common)} benchmarks of {len(before)} in {self.baseline} compared: time, by "
                f"{machine()['clock']}, may grow by {bounds.time - 1:.0%}, memory by {bounds.memory - 1:.0%}"
            )
        if run:
            promises = list(gates.promised(lent, table.promises_of(name), self.partial))
            self.problems += [problem for _, problem in promises if problem]
            if promises:
                self.notes.append(f"{len(promises)} promises of {gates.TABLE.name} looked at")

    @pytest.hookimpl(optionalhook=True)
    def pytest_benchmark_update_json(self, config: pytest.Config, output_json: dict[str, Any]) -> None:
        """What a saved run holds beside times; single rounds and the options of the fixture are nobody's interest."""
        from .timing import clocks

        output_json["measured"] = dict(machine())
        with reports.attempt("the list of the GPU's clocks", self.notes.append):
            output_json["measured"] |= clocks()  # of a GPU that has just been at work
        output_json["roofs"] = asdict(config.stash[ROOFS]) if ROOFS in config.stash else None
        output_json["failures"] = config.stash.get(FAILURES, [])
        output_json["problems"] = self.problems
        output_json["partial"] = self.partial
        if self.partial:  # for `validation.perf.parts`
            output_json |= {"planned": self.planned, "skipped": self.skipped}
        for benchmark in output_json["benchmarks"]:
            for name in ("options", "param", "params", "name"):
                benchmark.pop(name, None)
            benchmark["stats"].pop("data", None)
        self.content = output_json

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if not (self.notes or self.problems):
            return
        terminalreporter.section("performance gates")
        for note in self.notes:
            terminalreporter.write_line(note)
        for problem in self.problems:
            terminalreporter.write_line(f"FAILED {problem}", red=True)
