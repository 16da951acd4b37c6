"""Puts implementations through the tests: whoever takes the fixture `impl` is run for each of those chosen.

A test of the case list takes `impl`, `case` and `dtype_name`, or `stage` as well, and is given what the implementation
is to be tried on. A test that has cases of its own parametrises `case` indirectly, to have it fitted.
"""

from collections import defaultdict
from collections.abc import Callable, Generator, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from . import reports
from .cases import BY_ID, CASES, Case, fitted, require
from .firstcall import Slip, first_calls
from .implementations import Implementation, load
from .stages import FUNCTIONS, SEEN, SELECTION, SHARED, STAGES, StageSpec

if TYPE_CHECKING:
    from .precision import Point

UNIT = Path(__file__).with_name("unit")
"""The folder of the tests that are about implementations."""

NARROW = ("float32", "bfloat16", "float16")

# Rounding does not depend on structure the way indexing does: beside float64, narrow dtypes are tried on one case of
# each kind.
ROUNDED = (
    "paper", "short_select", "group_3", "group_16", "wide_keys", "scrambled_last_queries", "linear", "mean", "window_1",
    "packed_paper", "packed_last_queries", "shared_keys", "pooled_wide_values",
)  # fmt: skip
# The interpreter rounds where it likes, so that narrow dtypes show little more than that they work.
INTERPRETED = ("last_queries", "packed_last_queries")


def tried(impl: Implementation, *, every_dtype: bool = False) -> list[tuple[Case, str]]:
    """What an implementation is tried on: in float64, where it has that, all cases; else all in every narrow dtype.

    Args:
        every_dtype: narrow dtypes on all cases besides float64.
    """
    cases = list(CASES)
    if impl.interpreted and impl.lacks(fitted(impl, BY_ID["small"])) is None:
        cases = [case for case in cases if not case.id.startswith("pooled")]  # for those who can do no more
    if impl.widest != torch.float64 or (every_dtype and not impl.interpreted):
        rounded = cases
    else:
        rounded = [BY_ID[name] for name in (INTERPRETED if impl.interpreted else ROUNDED)]
    wide = [(case, "float64") for case in cases if impl.widest == torch.float64]
    return wide + [(case, dtype) for case in rounded for dtype in NARROW]


def stages(case: Case) -> Iterable[StageSpec]:
    """The stages a case is for: with shared keys also the whole of them all."""
    return (*STAGES.values(), SHARED) if case.config.shared_kv else STAGES.values()


def chosen(config: pytest.Config) -> list[Implementation]:
    """The implementations asked for, or ours."""
    if config.stash[reports.IMPLEMENTATIONS] is None:
        config.stash[reports.IMPLEMENTATIONS] = [load("eager"), load("triton")]
    return config.stash[reports.IMPLEMENTATIONS] or []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "impl" not in metafunc.fixturenames:
        return
    rows: list[Any] = []
    subjects = chosen(metafunc.config)
    if "dtype_name" not in metafunc.fixturenames or _own_cases(metafunc):
        metafunc.parametrize("impl", subjects, ids=[impl.name for impl in subjects])
        return
    names = [name for name in ("stage", "case", "dtype_name") if name in metafunc.fixturenames]
    every_dtype = metafunc.definition.get_closest_marker("every_dtype") is not None
    for impl in subjects:
        for case, dtype in tried(impl, every_dtype=every_dtype):
            for stage in stages(case) if "stage" in names else (None,):
                given = {"stage": stage, "case": case, "dtype_name": dtype}
                id = "-".join([*([stage.name] if stage else []), case.id, dtype])
                rows.append(pytest.param(impl, *(given[name] for name in names), id=f"{impl.name}-{id}"))
    metafunc.parametrize(("impl", *names), rows, indirect=["case"])


@pytest.fixture
def case(request: pytest.FixtureRequest, impl: Implementation) -> Case:
    """The case asked for, or the first of several that the implementation can do, fitted to it."""
    asked, params = request.param, request.node.callspec.params
    stage, dtype = params.get("stage"), getattr(torch, params.get("dtype_name", ""), impl.widest)
    functions = stage.functions if stage else ()
    found = fitted(impl, *(asked if isinstance(asked, tuple) else (asked,)), stages=functions)
    # Found missing here, it costs nothing; otherwise it would be once the inputs are drawn.
    require(impl, found, functions, dtype, own_keys=bool(stage and stage.own_keys))
    return found


def _own_cases(metafunc: pytest.Metafunc) -> bool:
    """Whether a test says itself on what it is tried."""
    own = {name for mark in metafunc.definition.iter_markers("parametrize") for name in _names(mark.args[0])}
    return bool(own & {"case", "dtype_name"})


def _names(argnames: str | Iterable[str]) -> list[str]:
    return [name.strip() for name in argnames.split(",")] if isinstance(argnames, str) else list(argnames)


def subject(item: pytest.Item) -> Implementation | None:
    """The implementation a test is about."""
    found = parameters(item).get("impl")
    return found if isinstance(found, Implementation) else None


def parameters(item: pytest.Item) -> dict[str, Any]:
    """What a test was parametrised with."""
    callspec = getattr(item, "callspec", None)
    return callspec.params if callspec else {}


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Generator[None]:
    """Leaves out what is not about the implementations asked for, and what takes one under the interpreter too long."""
    kept: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    for item in items:
        elsewhere = UNIT not in item.path.parents
        impl = None if elsewhere else subject(item)
        if impl is not None:
            item.user_properties.append(("implementation", impl.name))
        wanted = impl is not None or elsewhere or not config.option.impl
        (kept if wanted and not (impl and impl.interpreted and _long(item)) else left_out).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept
    yield
    # Those that take turns begin at once, shuffled or not: the GPU's memory is free then, and begun last they would
    # still take turns when all others are done.
    items.sort(key=lambda item: "memory_given_back" not in getattr(item, "fixturenames", ()))
    if config.option.shuffle_seed is None:  # rules by name come before what they explain
        items.sort(key=lambda item: item.path.name != "test_rules.py")


def _long(item: pytest.Item) -> bool:
    """Whether the mark `sparing` on a test says that others of its parameters are enough; bare, that none is needed."""
    mark = item.get_closest_marker("sparing")
    if mark is None:
        return False
    params = {name: getattr(value, "id", getattr(value, "name", value)) for name, value in parameters(item).items()}
    return not mark.kwargs or any(params[name] not in enough for name, enough in mark.kwargs.items())


# First calls, and the order.


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """Ends a run on an implementation that cannot even be called: hundreds of tests would say so, each at length."""
    config = session.config
    alone = config.option.collectonly or hasattr(config, "workerinput")
    if not config.option.impl or alone or not _about_implementations(config):
        return
    torch.set_num_threads(1)
    for impl in chosen(config):
        slips = first_calls(impl)
        if slips:
            config.stash[SLIPS] = slips
            lines = [f"{impl.name} cannot be called as it is declared; nothing was tested", *map(str, slips)]
            pytest.exit("\n  ".join(lines), returncode=pytest.ExitCode.TESTS_FAILED)


def _about_implementations(config: pytest.Config) -> bool:
    places = [Path(argument.partition("::")[0]).resolve() for argument in config.args]
    return any(UNIT in (place, *place.parents) or place in UNIT.parents for place in places)


SLIPS = pytest.StashKey[list[Slip]]()
"""What went wrong in first calls."""


# What a test showed of an implementation, for the account of the run.


def pytest_runtest_setup() -> None:
    SEEN.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    report = yield
    impl = subject(item) if UNIT in item.path.parents else None
    if impl is not None and (report.when == "call" or not report.passed):
        report.claim = claim(item, impl, call.excinfo.value if call.excinfo else None)
    return report


def claim(item: pytest.Item, impl: Implementation, error: BaseException | None) -> dict[str, Any]:
    """What a test was about and, where it failed, what with, as plain data."""
    params = parameters(item)
    asked = params.get("stage", params.get("subject"))
    stage = SEEN.stages[-1] if error is not None and SEEN.stages else getattr(asked, "name", asked)
    if stage not in FUNCTIONS:
        stage = SEEN.stages[-1] if SEEN.stages else SELECTION.name if "select" in item.name else "any"
    mark = item.get_closest_marker("claim")
    aspects = list(mark.args) if mark else ["selection" if stage == SELECTION.name else "properties"]
    case, dtype = SEEN.case, params.get("dtype_name", "")
    found: dict[str, Any] = {
        "implementation": impl.name,
        "layer": "precision" if item.path.name == "test_precision.py" else "unit",
        "stage": stage,
        "aspects": aspects,
        "case": case.id if case else None,
        "traits": traits(case, dtype) if case else [],
        "size": case.num_keys * case.batch * case.kv_heads * case.group * case.key_dim if case else 0,
        "dtype": dtype,
        "seed": dict(item.user_properties).get("seed"),
        "margins": [[*key, margin.error, margin.bound] for key, margin in SEEN.margins.items()],
    }
    if error is not None and not isinstance(error, pytest.skip.Exception):
        text = str(error) or type(error).__name__
        if not isinstance(error, AssertionError):
            text = f"{type(error).__name__}: {text}"
        if "gradient of" in text.partition("\n")[0] and "gradients" in aspects:
            found["aspects"] = ["gradients"]
        elif "forward" in aspects:
            found["aspects"] = ["forward"]
        lines = text.splitlines()
        found["explanations"] = [line for line in lines if "agrees with the oracle" in line]
        found["message"] = "\n".join(line for line in lines if "agrees with the oracle" not in line)
        found["where"] = getattr(error, "where", [])
    return found


TRAITS: dict[str, Callable[[Case], bool]] = {
    "l != d": lambda case: case.config.compress_block_size != case.config.compress_stride,
    "l != l'": lambda case: case.config.compress_block_size != case.config.select_block_size,
    "packed sequences": lambda case: case.packed,
    "Tq < Tk": lambda case: case.num_queries < case.num_keys,
    "G > 1": lambda case: case.group > 1,
    "G is no power of two": lambda case: bool(case.group & (case.group - 1)),
    "Hk > 1": lambda case: case.kv_heads > 1,
    "B > 1": lambda case: case.batch > 1,
    "Dk != Dv": lambda case: case.key_dim != case.value_dim,
    "a head dim is no power of two": lambda case: any(d & (d - 1) for d in (case.key_dim, case.value_dim)),
    "a scale is given": lambda case: case.scale is not None,
    "indices are in any order": lambda case: case.scrambled,
    "more tokens than the window": lambda case: case.num_keys > case.config.window_size,
    "more blocks than are selected": lambda case: (
        case.config.num_selectable(case.num_keys) > case.config.num_selected_blocks
    ),
    "keys that make a compressed block": lambda case: case.num_keys >= case.config.compress_block_size,
}
"""What cases may have in common, by name."""


def traits(case: Case, dtype: str) -> list[str]:
    narrow = [f"dtype {dtype}"] if dtype else []
    return narrow + [name for name, has in TRAITS.items() if has(case)]


# What tests measured of rounding, drawn when all are over.

POINTS = pytest.StashKey[list["Point"]]()


@pytest.fixture(scope="session")
def points(pytestconfig: pytest.Config) -> list["Point"]:
    """The list that gets what tests measure of rounding: at the end of the run it is drawn."""
    return pytestconfig.stash.setdefault(POINTS, [])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    found = getattr(node, "workeroutput", {}).get("points", ())
    if found:
        from .precision import Point

        node.config.stash.setdefault(POINTS, []).extend(Point(**point) for point in found)


def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    found = config.stash.get(POINTS, [])
    if hasattr(config, "workeroutput"):
        config.workeroutput["points"] = [asdict(point) for point in found]
    elif found:
        picture = reports.folder(config) / "unit" / "precision.png"
        with reports.attempt(f"the picture {picture}", partial(reports.note, config)):
            from .precision import plot

            plot(found, picture)


# The account of a run: what was declared, and what came of it.


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    with reports.attempt("the table of capabilities and verdicts", terminalreporter.write_line):
        _summarise(terminalreporter, config)


def _summarise(terminalreporter: Any, config: pytest.Config) -> None:
    found: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    names = [impl.name for impl in chosen(config)]
    for outcome in ("passed", "failed", "error", "skipped", "xfailed", "xpassed"):
        for report in terminalreporter.stats.get(outcome, []):
            found[_owner(report, names)][outcome].append(report)
    if found.keys() <= {""}:
        return
    subjects = [impl for impl in chosen(config) if impl.name in found]
    terminalreporter.section("capabilities")
    for line in table(subjects):
        terminalreporter.write_line(line)
    terminalreporter.section("verdicts")
    for impl in subjects:
        good = not any(found[impl.name][outcome] for outcome in ("failed", "error", "xpassed"))
        terminalreporter.write_line(verdict(impl, found[impl.name]), green=good, red=not good)


def _owner(report: Any, names: list[str]) -> str:
    """The implementation that a report is about; of a process that crashed there is but the id of its test."""
    properties = dict(getattr(report, "user_properties", ()))
    if properties:
        return properties.get("implementation", "")
    parameters = f"-{report.nodeid.partition('[')[2].rstrip(']')}-"
    return next((name for name in names if f"-{name}-" in parameters), "")


def table(subjects: list[Implementation]) -> list[str]:
    """Lines of implementation x capability."""
    columns = [["", *subjects[0].capabilities()]]
    columns += [[impl.name, *impl.capabilities().values()] for impl in subjects]
    widths = [max(map(len, column)) for column in columns]
    rows = zip(*columns, strict=True)
    return ["  ".join(x.ljust(width) for x, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def verdict(impl: Implementation, found: dict[str, list[Any]]) -> str:
    """What came of an implementation's tests, in one word, and counts; why some were skipped is listed after it."""
    failures = sum(len(found[outcome]) for outcome in ("failed", "error", "xpassed"))
    word = f"failed {failures}" if failures else "passed" if found["passed"] or found["xfailed"] else "not tested"
    counts = {outcome: len(found[outcome]) for outcome in ("passed", "xfailed", "skipped") if found[outcome]}
    return f"{impl.name}: {word} ({', '.join(f'{count} {outcome}' for outcome, count in counts.items())})"
