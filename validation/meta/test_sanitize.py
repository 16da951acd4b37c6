"""The sanitizer's verdict: nothing passes that was not seen to pass."""

import re
import sys

import pytest

from validation import sanitize

CLEAN = {
    "memcheck": "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n",
    "racecheck": "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n",
}


@pytest.mark.parametrize("tool", sanitize.TOOLS)
def test_a_clean_report_passes(tool: str) -> None:
    assert sanitize.problem(tool, 0, CLEAN[tool]) is None


@pytest.mark.parametrize(
    ("tool", "status", "report", "message"),
    [
        ("memcheck", 99, "========= ERROR SUMMARY: 12 errors\n", "memcheck found 12 errors"),
        ("memcheck", 99, "========= ERROR SUMMARY: 1 error\n", "memcheck found 1 errors"),
        ("memcheck", 1, CLEAN["memcheck"], r"memcheck found 0 errors \(exit status 1\)"),
        ("racecheck", 0, "RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)", "racecheck found 1 errors"),
        ("racecheck", 0, "========= Error: Device not supported\n", "racecheck came to no end"),
    ],
)
def test_anything_else_does_not(tool: str, status: int, report: str, message: str) -> None:
    found = sanitize.problem(tool, status, report)
    assert found is not None
    assert re.match(message, found), found


def test_without_the_tool_it_fails_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sanitize, "find_sanitizer", lambda: None)
    monkeypatch.setattr(sys, "argv", ["sanitize"])
    assert sanitize.main() == 1
    assert "compute-sanitizer is missing" in capsys.readouterr().err
