"""Verdicts: what is counted and said of claims, what a comparison of two says, and what the page shows."""

import json
from pathlib import Path
from typing import Any

import pytest

from validation import verdict
from validation.__main__ import main
from validation.page import page, snippet
from validation.verdict import SCHEMA, VERSION


def claim(id: str, outcome: str = "passed", **rest: Any) -> dict[str, Any]:
    common = {"stage": "selected_attention", "aspects": ["forward"], "traits": ["G > 1"], "size": 1, "case": "small"}
    return {"id": id, "outcome": outcome, "seconds": 0.1, "dtype": "float64", "margins": [], **common, **rest}


def made(*claims: dict[str, Any], word: str = "failed", name: str = "theirs") -> dict[str, Any]:
    """A verdict of these claims."""
    return {
        "schema": SCHEMA, "version": VERSION, "verdict": word, "layers": ["unit"], "counts": {}, "versions": {},
        "implementation": {"name": name, "subject": "a:b", "capabilities": {"packed": "no"}}, "problems": [],
        "first_calls": [], "stages": verdict.stages(list(claims)), "errors": verdict.worst(list(claims)), "skips": {},
        "claims": list(claims), "variation": None,
    }  # fmt: skip


GOOD, SMALL = claim("test_a.py::test_a[theirs-x]"), {"size": 1}
SAID = "agrees with the oracle if the window is w + 1"
BAD = claim(
    "test_stages.py::test_matches_the_oracle[theirs-y]", "failed", traits=["G > 1", "l != d"],
    message="error 2.5 of <q>", explanations=[SAID], where=[[0.5, 3.0]],
)  # fmt: skip


def test_stages_have_counts_the_first_failure_and_what_failures_have_in_common() -> None:
    larger = {**BAD, "id": "test_b.py::test_b[theirs-z]", "size": 9}
    [row] = verdict.stages([GOOD, larger, BAD]).values()
    assert row["aspects"]["forward"] == {"passed": 1, "failed": 2, "first": BAD["id"], "common": "only where l != d"}
    assert row["explanations"] == [{"text": SAID, "cases": 2, "of": 2}]


def test_the_whole_is_downstream_of_its_parts() -> None:
    found = verdict.stages([BAD, {**BAD, "stage": "nsa_attention"}])
    assert found["nsa_attention"]["downstream_of"] == ["selected_attention"]


def test_equal_messages_are_folded_and_the_verdict_is_last() -> None:
    same = [
        {**BAD, "id": f"test_b.py::test_b[theirs-{i}]", "message": f"error {i}.5 of q", "size": i + 1} for i in range(9)
    ]
    lines = list(verdict.text(made(GOOD, *same)))
    assert sum("of q" in line for line in lines) == 1
    assert any(line.startswith("  9 times, the smallest: test_b.py::test_b[theirs-0]") for line in lines)
    assert lines[-1].startswith("theirs: failed")


def test_the_worst_error_of_each_tensor_is_kept() -> None:
    one, two = ({**GOOD, "margins": [["s", "out", "float64", error, 2.0]]} for error in (0.5, 1.0))
    assert [(e["error"], e["ratio"]) for e in verdict.worst([one, two])] == [(1.0, 0.5)]


@pytest.mark.parametrize(
    ("before", "after", "line", "worse"),
    [
        (made(GOOD), made({**GOOD, "outcome": "failed"}), "1 claim fails now: test_a.py::test_a[IMPL-x]", True),
        (made({**GOOD, "outcome": "failed"}), made(GOOD, word="passed"), "1 claim holds now: test_a.py", False),
        (made(GOOD), made({**GOOD, "outcome": "skipped"}), "1 claim is not tested any more", True),
        (made(GOOD), made({**GOOD, "id": "test_a.py::test_a[ours-x]"}, name="ours"), "not worse", False),
    ],
)
def test_comparisons(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], before: dict, after: dict, line: str, worse: bool
) -> None:
    files = [tmp_path / name for name in ("before.json", "after.json")]
    for file, content in zip(files, (before, after), strict=True):
        file.write_text(json.dumps(content))
    assert main(["compare", *map(str, files)]) == worse
    assert line in capsys.readouterr().out


@pytest.mark.parametrize(
    ("layers", "message"),
    [("unit,speed", "must be of unit, precision, perf"), ("perf", "perf needs unit or precision")],
)
def test_layers_that_cannot_be_run_are_refused(layers: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["eager", f"--layers={layers}"])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--json", "--report"])
def test_a_file_that_could_not_be_written_is_refused_before_the_run(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["eager", f"{option}={tmp_path / 'none' / 'file'}"])
    assert f"{option}: must be a file in a folder that exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [({"schema": "other"}, "holds no verdict"), ({"schema": SCHEMA, "version": 99}, "version 99")],
)
def test_other_files_are_refused(tmp_path: Path, content: dict, message: str) -> None:
    file = tmp_path / "other.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        verdict.read(file)


def test_the_page_shows_the_case_as_a_program_and_where_the_error_lies() -> None:
    text = page(made(GOOD, BAD))
    assert "theirs: failed" in text
    assert "error 2.5 of &lt;q&gt;" in text
    assert text.count("<rect") == 2
    assert len(snippet(made(), BAD).splitlines()) == 5
    compile(snippet(made(), BAD), "snippet", "exec")


def test_dashboards_get_what_they_read() -> None:
    """github-action-benchmark reads `fullname` and of `stats` these; it shows what is larger as better."""
    record = {
        "workload": "W", "length": 256, "stage": "compress", "direction": "forward", "subject": "mine",
        "median": 2.0, "lower": 1.0, "upper": 3.0, "mean": 4.0, "deviation": 0.5, "rounds": 3,
    }  # fmt: skip
    [found] = verdict.benchmarks({"versions": {"torch": "2"}, "performance": [record]})["benchmarks"]
    assert found["fullname"] == "W-256-compress-forward-mine"
    wanted = {"ops": 500.0, "mean": 0.004, "stddev": 0.0005, "rounds": 3}
    assert {name: found["stats"][name] for name in wanted} == wanted
