"""The gates of the performance layer: what is worse fails by its name, and no run passes by showing nothing.

Runs of small benchmarks whose figures are given, not measured, show what pytest says and how it ends.
"""

import gc
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from validation.perf import gates, parts, plugin, records
from validation.perf.records import Record

ROOT = Path(__file__).parents[2]
MACHINE = {
    "name": "cpu-test", "device": "a CPU", "driver": None, "torch": "2", "triton": "3", "clock": records.WALL,
    "command": ["pytest"],
}  # fmt: skip
BOUNDS = gates.Bounds(time=1.10, memory=1.02)


def record(name: str = "test_a", ms: float = 1.0, memory: int = 1000, role: str = "ours", **more: Any) -> Record:
    return {"fullname": name, "median": ms, "memory": memory, "role": role, **more}


# 1. Judgement.


@pytest.mark.parametrize(
    ("ms", "memory", "what"),
    [(1.09, 1000, None), (1.15, 1000, "time"), (1.0, 1019, None), (1.0, 1030, "memory"), (0.5, 500, None)],
)
def test_a_figure_that_is_worse_by_more_than_is_allowed_is_named(ms: float, memory: int, what: str | None) -> None:
    found = list(gates.regressions([record(ms=ms, memory=memory)], [record()], BOUNDS))
    assert [line.split()[:2] for line in found] == ([["test_a:", what]] if what else [])


@pytest.mark.parametrize(("grown", "found"), [(2**21, 0), (2**21 + 1, 1)])
def test_what_the_allocator_may_add_is_no_growth(grown: int, found: int) -> None:
    then, bounds = 10 * 2**20, replace(BOUNDS, mib=2.0)
    assert len(list(gates.regressions([record(memory=then + grown)], [record(memory=then)], bounds))) == found


def test_where_the_clock_is_noisy_time_is_that_over_dense_attention() -> None:
    slow_machine = record(ms=5.0, relative=0.20)
    assert not list(gates.regressions([slow_machine], [record(ms=1.0, relative=0.19)], BOUNDS))
    assert list(gates.regressions([record(ms=1.0, relative=0.25)], [record(ms=1.0, relative=0.19)], BOUNDS))


NOTHING = float("nan"), float("inf"), 0.0, -1.0


@pytest.mark.parametrize("ms", NOTHING)
def test_what_is_no_figure_is_never_good(ms: float) -> None:
    for now, then in ((ms, 1.0), (1.0, ms)):
        assert list(gates.regressions([record(ms=now)], [record(ms=then)], BOUNDS))
        assert list(gates.regressions([record(relative=now)], [record(relative=then)], BOUNDS))


def test_memory_that_was_nothing_or_is_not_measured_any_more_is_named() -> None:
    assert not list(gates.regressions([record(memory=0)], [record(memory=0)], BOUNDS))
    assert list(gates.regressions([record(memory=10**12)], [record(memory=0)], BOUNDS))
    assert list(gates.regressions([{**record(), "memory": None}], [record()], BOUNDS))


def test_figures_of_two_kinds_are_not_compared() -> None:
    for now, then in (
        (record(role="rival"), record()),
        (record(relative=1.0), record()),
        (record(), record(relative=1.0)),
    ):
        [problem] = gates.regressions([now], [then], BOUNDS)
        assert "not of the kind" in problem


def test_others_may_get_slower() -> None:
    assert not list(gates.regressions([record(ms=9, role="rival")], [record(role="rival")], BOUNDS))


def test_what_only_one_of_two_runs_has_is_named() -> None:
    run, baseline = [record("same"), record("new")], [record("same"), record("old"), record("shy")]
    lines = list(gates.differences(run, baseline, {"shy": "no room"}, partial=False))
    assert [line.split(":")[0] for line in lines] == ["old", "shy", "new"]
    assert "skipped: no room" in lines[1]
    assert [line.split(":")[0] for line in gates.differences(run, baseline, {}, partial=True)] == ["new"]


def test_a_peer_may_be_there_or_not() -> None:
    assert not list(gates.differences([record()], [record(), record("theirs", role="peer")], {}, partial=False))


def test_a_rival_may_do_now_what_it_could_not_when_the_baseline_was_made() -> None:
    flex: dict[str, Any] = {
        "workload": "W",
        "length": 8192,
        "stage": "window",
        "direction": "backward",
        "subject": "FlexAttention",
    }
    run = [record(), record("flex", role="rival", **flex)]
    assert not list(gates.differences(run, [record()], {}, partial=False, failures=[flex]))
    others = [{**flex, "direction": "forward"}]
    assert [line[:4] for line in gates.differences(run, [record()], {}, partial=False, failures=others)] == ["flex"]
    run = [record(), record("new", **flex)]  # ours is nothing that could not be done
    assert [line[:3] for line in gates.differences(run, [record()], {}, partial=False, failures=[flex])] == ["new"]


def test_runs_without_anything_in_common_are_not_compared() -> None:
    assert "nothing was compared" in next(gates.differences([record("a")], [record("b")], {}, partial=True))


def test_two_runs_are_as_far_apart_as_their_worst_figure() -> None:
    a, b = [record("x", 1.0), record("y", 2.0)], [record("x", 1.01), record("y", 1.9)]
    assert gates.disagreements(a, b)[0] == (pytest.approx(2.0 / 1.9 - 1), "y")


def test_saved_runs_of_stages_are_compared_too() -> None:
    run = records.read(ROOT / "docs" / "runs" / "stages_h200.json")["results"]
    found = gates.disagreements(run, [{**record, "median": 1.04 * record["median"]} for record in run])
    assert len(found) == len(run)
    assert found[0][0] == pytest.approx(0.04)


def test_within_a_run_ours_is_compared_with_dense_and_the_best_peer() -> None:
    where: dict[str, Any] = {"workload": "W", "length": 1024, "stage": "nsa_attention", "direction": "forward"}
    run = [
        record("ours", 2.0, subject="ours", **where),
        record("dense", 3.0, role="rival", subject="dense (cuDNN)", **where),
        record("good", 4.0, role="peer", subject="good", **where),
        record("bad", 9.0, role="peer", subject="bad", **where),
    ]
    assert records.compare_within(run) == {"ours": {"over_dense": 1.5, "over_best_peer": 2.0}}


def placed(workload: str, subject: str, direction: str, ms: float, length: int = 8192) -> Record:
    role = "ours" if subject == "ours" else "rival"
    where = {"workload": workload, "length": length, "stage": "nsa_attention", "direction": direction}
    return record(f"{workload}-{subject}-{direction}-{length}", ms, 100, role, subject=subject, **where)


def both_passes(workload: str, subject: str, ms: float, length: int = 8192) -> list[Record]:
    return [placed(workload, subject, direction, ms, length) for direction in ("forward", "backward")]


DENSE_OF_W = both_passes("W", "dense (cuDNN)", 3.0)
ALIKE = both_passes("WC", "ours", 2.0)


def test_a_workload_of_other_values_is_compared_with_dense_attention_on_the_first() -> None:
    lent = records.lend([*DENSE_OF_W, *ALIKE])
    assert [(r["workload"], r["subject"], r["median"]) for r in lent[len(DENSE_OF_W + ALIKE) :]] == [
        ("WC", "dense (cuDNN)", 3.0)
    ] * 2
    assert records.compare_within(lent) == {r["fullname"]: {"over_dense": 1.5} for r in ALIKE}
    promise = gates.Promise("times as fast as dense", "WC", 8192, promise=1.4)
    assert gates.measured(lent, promise) == 1.5
    assert [problem for _, problem in gates.promised(lent, [promise], partial=False)] == [None]
    assert records.lend([record()]) == [record()]


@pytest.mark.parametrize(
    "others",
    [
        [*DENSE_OF_W, *both_passes("WC", "ours", 2.0, 4096)],  # ours at another length
        [*both_passes("W", "dense (cuDNN)", 3.0, 4096), *ALIKE],
        [*both_passes("W4", "dense (cuDNN)", 3.0), *ALIKE],  # other shapes
        [*both_passes("W", "FlexAttention", 3.0), *ALIKE],
        [*DENSE_OF_W, *both_passes("WC", "dense (cuDNN)", 4.0), *ALIKE],  # its own is there
    ],
)
def test_dense_attention_is_lent_to_nobody_else(others: list[Record]) -> None:
    assert records.lend(others) == others


def test_what_is_lent_is_compared_with_another_run_once() -> None:
    run = records.lend([*DENSE_OF_W, *ALIKE])
    assert len(gates.disagreements(run, run)) == len(DENSE_OF_W + ALIKE)


# 2. Promises.


def whole(ours: float, dense: float, memory: int = 90) -> list[Record]:
    where: dict[str, Any] = {"workload": "W", "length": 8192, "stage": "nsa_attention"}
    rows = [("ours", "ours", ours, memory), ("rival", "dense (cuDNN)", dense, 100)]
    return [
        record(f"{role}-{direction}", ms / 2, memory, role, subject=subject, direction=direction, **where)
        for role, subject, ms, memory in rows
        for direction in ("forward", "backward")
    ]


@pytest.mark.parametrize(
    ("kind", "run", "broken"),
    [
        ("times as fast as dense", whole(1.0, 1.5), False),
        ("times as fast as dense", whole(1.0, 1.1), True),
        ("times as fast as dense", whole(0.0, 1.1), True),
        ("times the memory of dense", whole(1.0, 1.0, 110), False),
        ("times the memory of dense", whole(1.0, 1.0, 130), True),
    ],
)
def test_a_promise_is_kept_or_named(kind: str, run: list[Record], broken: bool) -> None:
    promise = gates.Promise(kind, "W", 8192, promise=1.2)
    [(_, problem)] = gates.promised(run, [promise], partial=False)
    assert bool(problem) == broken
    assert not broken or (problem or "").startswith(f"W at 8k: {kind}: ")


def launched(host: float, ops: int) -> list[Record]:
    where: dict[str, Any] = {"workload": "W", "length": 8192, "stage": "nsa_attention", "subject": "ours"}
    figures: dict[str, Any] = {"host_sustained": host, "host_cold": 9.0, "device_ops": ops}
    return [record(direction, direction=direction, **where, **figures) for direction in ("forward", "backward")]


def beside(stage: str, direction: str, ours: float, *dense: float) -> list[Record]:
    where: dict[str, Any] = {"workload": "W", "length": 8192, "stage": stage, "direction": direction}
    names = zip(("dense (cuDNN)", "dense (flash)"), dense, strict=False)
    others = [record(name, ms, role="rival", subject=name, **where) for name, ms in names]
    return [record("ours", ours, subject="ours", **where), *others]


def two_passes(stage: str, ours: float, *dense: float) -> list[Record]:
    return [*beside(stage, "forward", ours, *dense), *beside(stage, "backward", ours, *dense)]


@pytest.mark.parametrize(
    ("kind", "run", "found"),
    [
        ("ms of the host, backward", launched(0.5, 15), 0.5),
        ("device operations, forward", launched(0.5, 15), 15),
        ("times as fast as dense, decoding 16", beside("decode", "batch 16", 1.0, 5.0, 3.0), 3.0),
        ("times as fast as dense, decoding 16", beside("decode", "batch 16", 1.0, 5.0), None),
        ("times as fast as dense, decoding 16", beside("decode", "batch 1", 1.0, 5.0, 3.0), None),
        ("times as fast as the dense twin, training", beside("training", "step", 2.0, 3.0), 1.5),
        ("times as fast as the dense twin, training", beside("training", "step", 2.0), None),
        ("times one sequence", two_passes("nsa_attention", 3.0, 2.0), 1.5),
        ("times one sequence, layer", two_passes("layer", 3.0, 2.0), 1.5),
        ("times one sequence, layer", beside("layer", "forward", 3.0, 2.0), None),
        ("times as fast as the dense twin, steps of 16", beside("generation", "batch 16", 2.0, 3.0), 1.5),
        ("times as fast as the dense twin, steps of 1", beside("generation", "batch 16", 2.0, 3.0), None),
        (
            "times as fast as the dense twin, prompts of 1",
            [{**r, "prefill": 4 * r["median"] ** 2} for r in beside("generation", "batch 1", 2.0, 3.0)],
            2.25,
        ),
        ("times as fast as dense", beside("decode", "batch 1", 1.0, 5.0), None),
    ],
)
def test_a_promise_is_about_one_figure(kind: str, run: list[Record], found: float | None) -> None:
    assert gates.measured(run, gates.Promise(kind, "W", 8192, promise=1.0)) == found


def test_a_promise_without_its_figures_is_broken_unless_others_were_asked_for() -> None:
    promise = gates.Promise("times as fast as dense", "W", 8192, promise=1.2)
    [(_, problem)] = gates.promised([record()], [promise], partial=False)
    assert "lacks the figures" in (problem or "")
    assert not list(gates.promised([record()], [promise], partial=True))


def test_promises_are_kept_and_not_hollow() -> None:
    """What was measured keeps them, by less than what would hide a loss of a tenth."""
    run, table = records.read(records.BASELINES / "nvidia-h200.json"), gates.read_table()
    promises = table.promises_of("nvidia-h200")
    assert len(promises) >= 12
    for promise in promises:
        found = gates.measured(run["results"], promise)
        assert found is not None, promise.name
        assert not promise.broken(found), promise.name
        slack = found / promise.promise if gates.KINDS[promise.kind] else promise.promise / found
        assert slack <= 1.1, f"{promise.name}: {found:.3f} keeps {promise.promise} too easily"


def test_targets_are_those_of_the_design() -> None:
    targets = {
        (p.workload, p.length // 1024): p.target
        for p in gates.read_table().promises_of("nvidia-h200")
        if p.target and p.kind == "times as fast as dense"
    }
    assert targets == {("W", 4): 1.0, ("W", 8): 1.5, ("W", 16): 2.5, ("W", 32): 4.0, ("W", 64): 6.0, ("W4", 32): 2.5}


def test_an_unknown_kind_of_promise_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "promises.toml"
    file.write_text('[bounds]\n[gpu."as nice as dense"]\n"W 8k" = { promise = 1.0 }\n')
    with pytest.raises(ValueError, match="as nice as dense"):
        gates.read_table(file)


# 3. What pytest says, and how it ends.

BENCHMARK = """
import pytest

{mark}
def test_{name}(benchmark):
    benchmark.extra_info.update(relative={relative}, memory={memory})
    benchmark.pedantic(int, rounds=2)
"""


@pytest.fixture
def tidy() -> Iterator[None]:
    """A run that is refused leaves files open, which are not to be found in another test."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs that tests make are not parallel where these tests are."""
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def perf(tidy: None, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs benchmarks of given figures on a machine of a given name, which has baselines of its own."""
    monkeypatch.setattr(records, "BASELINES", pytester.path / "baselines")

    def run(*arguments: str, files: dict[str, dict[str, Any]] | None = None, machine: str = "cpu-test") -> Any:
        monkeypatch.setattr(plugin, "machine", lambda: {**MACHINE, "name": machine})
        given = {"a": {}, "b": {}} if files is None else files
        defaults = {"relative": 1.0, "memory": 1000, "mark": ""}
        text = "".join(BENCHMARK.format(name=name, **{**defaults, **figures}) for name, figures in given.items())
        pytester.makepyfile(test_bench=text)
        return pytester.runpytest_inprocess("-p", "validation.perf.plugin", *arguments)

    return run


COMPARE = ("--benchmark-autosave", "--benchmark-compare")


def failed(result: Any, *lines: str) -> None:
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines([f"FAILED*{line}*" for line in lines])


def test_a_first_run_says_so_and_the_second_is_compared_with_it(perf: Any) -> None:
    first = perf("--benchmark-compare")
    assert first.ret == 0
    first.stdout.fnmatch_lines(["nothing to compare with: this is the first run of cpu-test that is saved"])
    first.stdout.no_fnmatch_line("*compared:*")
    second = perf(*COMPARE)
    assert second.ret == 0
    second.stdout.fnmatch_lines(["2 benchmarks of 2 in *_first.json compared: *"])


def test_a_slower_benchmark_fails_by_its_name_and_is_no_standard_for_the_next(perf: Any) -> None:
    perf(*COMPARE)
    for _ in range(2):
        failed(perf(*COMPARE, files={"a": {"relative": 9.0}, "b": {}}), "test_bench.py::test_a: time 9 against 1")


def test_a_benchmark_of_more_memory_fails_by_its_name(perf: Any) -> None:
    perf(*COMPARE)
    failed(perf(*COMPARE, files={"a": {}, "b": {"memory": 1100}}), "test_bench.py::test_b: memory 1100 against 1000")


def test_a_renamed_benchmark_fails(perf: Any) -> None:
    perf(*COMPARE)
    lines = ("test_bench.py::test_b: in the baseline, not in this run", "test_bench.py::test_c: in this run, not in")
    failed(perf(*COMPARE, files={"a": {}, "c": {}}), *lines)


def test_a_removed_benchmark_fails(perf: Any) -> None:
    perf(*COMPARE)
    failed(perf(*COMPARE, files={"a": {}}), "test_bench.py::test_b: in the baseline, not in this run")


def test_a_skipped_benchmark_fails_with_the_reason(perf: Any) -> None:
    perf(*COMPARE)
    skipped = perf(*COMPARE, files={"a": {}, "b": {"mark": "@pytest.mark.skip(reason='tired')"}})
    failed(skipped, "test_bench.py::test_b: in the baseline, not in this run (skipped: tired)")


def test_skipping_all_fails(perf: Any) -> None:
    mark = {"mark": "@pytest.mark.skip(reason='tired')"}
    failed(perf(files={"a": mark, "b": mark}), "no benchmark was measured: tired")


def test_a_run_that_was_stopped_fails_and_is_no_standard_for_the_next(perf: Any) -> None:
    stopped = perf("--benchmark-autosave", "-x", files={"a": {"memory": "nonsense"}, "b": {}})
    failed(stopped, "test_bench.py::test_a: failed", "1 benchmarks never ran, test_bench.py::test_b the first of them")
    perf(*COMPARE).stdout.fnmatch_lines(["nothing to compare with: *"])


def test_those_chosen_by_hand_are_all_that_is_expected(perf: Any) -> None:
    perf(*COMPARE)
    chosen = perf("-k", "test_a", "--benchmark-compare")
    assert chosen.ret == 0
    chosen.stdout.fnmatch_lines(["1 benchmarks of 2 in *"])


def test_a_benchmark_that_measures_nothing_fails(perf: Any, pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_other="def test_idle(benchmark): pass")
    failed(perf("-W", "ignore"), "test_other.py::test_idle: passed without measuring anything")


def refused(result: Any, *lines: str) -> None:
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*{line}*" for line in lines])


def test_disabled_benchmarks_fail(perf: Any) -> None:
    refused(perf("--benchmark-disable"), "2 benchmarks would measure nothing: --benchmark-disable")


def test_benchmarks_in_parallel_are_refused(
    perf: Any, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin, "FOLDER", pytester.path)
    refused(perf("--dist=load"), "benchmarks in parallel (xdist) would measure nothing")


def test_a_swallowed_path_is_refused(perf: Any, pytester: pytest.Pytester) -> None:
    pytester.mkdir("validation")
    refused(
        perf("--benchmark-compare", "validation"), "took 'validation' for the run to compare with: put the option last"
    )


def test_a_run_that_is_not_there_is_refused(perf: Any) -> None:
    refused(perf("--benchmark-compare=0042"), "--benchmark-compare=0042: no such file, and 0 runs of that number")


def test_a_gpu_without_a_baseline_is_refused(perf: Any) -> None:
    refused(perf("--benchmark-compare", machine="nvidia-h100"), "no baseline of nvidia-h100 in *make perf-baseline")


def test_a_baseline_is_found_by_the_machine_and_refused_on_another(perf: Any, pytester: pytest.Pytester) -> None:
    made = perf("--perf-baseline", machine="nvidia-h100")
    assert made.ret == 0
    file = pytester.path / "baselines" / "nvidia-h100.json"
    assert len(json.loads(file.read_text())["benchmarks"]) == 2
    found = perf("--benchmark-compare", machine="nvidia-h100")
    assert found.ret == 0
    found.stdout.fnmatch_lines([f"2 benchmarks of 2 in {file} compared: *"])
    refused(
        perf(f"--benchmark-compare={file}", machine="nvidia-a100"), "is of another machine: nvidia-h100, this one is"
    )


def test_a_run_that_fails_or_is_partial_is_no_baseline(perf: Any, pytester: pytest.Pytester) -> None:
    skipped = {"mark": "@pytest.mark.skip(reason='tired')"}
    failed(perf("--perf-baseline", files={"a": skipped}), "no benchmark was measured")
    refused(perf("--perf-baseline", "-k", "a"), "--perf-baseline needs a whole run")
    assert not (pytester.path / "baselines").exists()


@pytest.fixture
def part(perf: Any, pytester: pytest.Pytester) -> Any:
    """What a run of the benchmarks that an expression chooses saves."""

    def make(chosen: str) -> dict[str, Any]:
        file = pytester.path / "part.json"
        assert perf("-k", chosen, f"--benchmark-json={file}").ret == 0
        content: dict[str, Any] = json.loads(file.read_text())
        return content

    return make


def test_runs_that_together_have_everything_are_a_baseline(part: Any, perf: Any, pytester: pytest.Pytester) -> None:
    run = parts.merge([part("not test_a"), part("test_a")])
    assert [b["fullname"] for b in run["benchmarks"]] == ["test_bench.py::test_a", "test_bench.py::test_b"]
    assert not run["partial"]
    assert len(run["measured"]["commands"]) == 2
    file = pytester.path / "baselines" / f"{MACHINE['name']}.json"
    records.write(run, file)
    perf("--benchmark-compare").stdout.fnmatch_lines([f"2 benchmarks of 2 in {file} compared: *"])


def test_parts_that_do_not_belong_together_are_no_baseline(part: Any) -> None:
    a, b = part("test_a"), part("not test_a")
    with pytest.raises(ValueError, match=r"1 benchmarks are in none of the parts, test_bench.py::test_b the first"):
        parts.merge([a])
    assert len(parts.merge([{**a, "skipped": {"test_bench.py::test_b": "tired"}}])["benchmarks"]) == 1
    for_pages = parts.merge([{**a, "problems": ["slow"]}], whole=False)
    assert (len(for_pages["benchmarks"]), for_pages["partial"]) == (1, True)
    for different, message in (
        ({"measured": {**b["measured"], "torch": "3"}}, "part 2 is of torch 3, the first of 2"),
        ({"commit_info": {"id": "0123"}}, "part 2 is of commit 0123"),
        ({"problems": ["test_b: failed"]}, "part 2: test_b: failed"),
        ({"planned": ["test_bench.py::test_b"]}, "part 2 was not chosen from the same benchmarks"),
    ):
        with pytest.raises(ValueError, match=message):
            parts.merge([a, {**b, **different}])


def test_runs_by_another_clock_are_not_compared(perf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(MACHINE, "clock", "processor time")
        perf("--benchmark-autosave")
    perf("--benchmark-compare").stdout.fnmatch_lines(["nothing to compare with: *"])
    refused(perf("--benchmark-compare=0001"), "was timed by processor time, this run is by wall time")


def test_a_run_that_cannot_be_saved_is_judged_all_the_same(perf: Any, pytester: pytest.Pytester) -> None:
    perf(*COMPARE)
    storage = pytester.path / ".benchmarks"
    saved = next(storage.glob("*/0001_*.json")).rename(pytester.path / "before.json")
    shutil.rmtree(storage)
    storage.touch()  # where a folder is needed
    unsaved = ("--benchmark-autosave", f"--benchmark-compare={saved}")
    good = perf(*unsaved)
    assert good.ret == 0
    good.stdout.fnmatch_lines(["2 benchmarks of 2 in *", "a saved copy of this run could not be made: *"])
    failed(perf(*unsaved, files={"a": {"relative": 9.0}, "b": {}}), "test_bench.py::test_a: time 9 against 1")


def test_a_baseline_that_cannot_be_written_is_an_error(perf: Any, pytester: pytest.Pytester) -> None:
    (pytester.path / "baselines").touch()  # where a folder is needed
    failed(perf("--perf-baseline"), "the baseline * could not be made: ")


# 4. A kernel that is slower: a real benchmark, by a clock that goes by what is called and not by how fast it is here.

CLOCK = """
from dataclasses import replace

from validation.adapters import eager, triton
from validation.perf import slowed, timing

elapsed = 0.0


def wait(ms):
    global elapsed
    elapsed += ms


def now():
    wait(1)
    return 1e-3 * elapsed


def made(make):
    def ticking():
        ours = make()
        window = ours.sliding_window_attention

        def call(*arguments, **options):
            wait(99)
            return window(*arguments, **options)

        return replace(ours, sliding_window_attention=call)

    return ticking


timing.now, slowed.wait = now, wait
machine = {**timing.describe_machine(), "name": "quiet"}
timing.describe_machine = lambda: machine
eager.eager, triton.triton = made(eager.eager), made(triton.triton)
"""


def run_benchmarks(folder: Path, name: str, *arguments: str) -> tuple[int, str]:
    """The exit status and the output of the benchmarks of that name, run where modules of a folder can be imported."""
    command = [sys.executable, "-m", "pytest", "validation/perf", "--benchmark-only", "-p", "no:cacheprovider"]
    command += ["-k", f"{name} and not Flex", f"--benchmark-storage=file://{folder}"]
    path = os.pathsep.join(filter(None, (str(folder), str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}  # these clocks need no GPU
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


def run_by_the_clock(folder: Path, *arguments: str) -> tuple[int, str]:
    (folder / "clock.py").write_text(CLOCK)
    return run_benchmarks(folder, "tiny-1k-sliding_window_attention-forward", "-p", "clock", *arguments)


def test_a_kernel_slower_by_15_percent_is_noticed_and_named(tmp_path: Path) -> None:
    before = tmp_path / "before.json"
    status, output = run_by_the_clock(tmp_path, f"--benchmark-json={before}")
    assert status == 0, output
    [measured] = json.loads(before.read_text())["benchmarks"]
    assert measured["stats"]["median"] == pytest.approx(0.1)
    known = {"flops", "bytes", "tflops", "tbps", "floor", "of_roof", "memory", "role", "workload", "length", "stage"}
    assert known <= measured["extra_info"].keys()
    assert {"median", "q1", "q3"} <= measured["stats"].keys()
    status, output = run_by_the_clock(tmp_path, f"--benchmark-compare={before}")
    assert status == 0, output
    slowed = "--impl=validation.perf.slowed:by_15_percent"
    status, output = run_by_the_clock(tmp_path, slowed, f"--benchmark-compare={before}")
    assert status == 1, output
    [line] = [line for line in output.splitlines() if line.startswith("FAILED")]
    assert "sliding_window_attention-forward" in line
    assert "+15.0%, allowed +10%" in line


# 5. The real clock.

ASLEEP = """
import time
from dataclasses import replace

from validation.implementations import load


def made():
    ours = load("eager")

    def slow(*arguments, **options):
        time.sleep(0.03)
        return ours.sliding_window_attention(*arguments, **options)

    return replace(ours, sliding_window_attention=slow)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the clock is the GPU's")
def test_a_stage_that_sleeps_is_noticed_and_the_clock_named(tmp_path: Path) -> None:
    (tmp_path / "asleep.py").write_text(ASLEEP)
    before, name = tmp_path / "before.json", "tiny-256-sliding_window_attention-forward"
    status, output = run_benchmarks(tmp_path, name, f"--benchmark-json={before}")
    assert status == 0, output
    status, output = run_benchmarks(tmp_path, name, "--impl=asleep:made", f"--benchmark-compare={before}")
    assert status == 1, output
    [line] = [line for line in output.splitlines() if line.startswith("FAILED")]
    assert f"{name}-eager]: time " in line
    assert "compared: time, by wall time (perf_counter), may grow by 100%" in output
