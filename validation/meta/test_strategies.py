"""Property tests of `for_all` are Hypothesis's own to its tools: seeds, statistics, and examples that are repeated."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., tuple[str, list[int]]]
ROOT = Path(__file__).parents[2]
TEST = """from hypothesis import reproduce_failure, seed
from hypothesis import strategies as st
from validation.strategies import for_all

@for_all(number=lambda impl: st.integers(0, 10**9))
def test_of_numbers(number: int) -> None:
    print("drew", number)
    assert number < MOST
"""
ANY, SMALL = TEST.replace("MOST", "10**9 + 1"), TEST.replace("MOST", "1000")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs a file of tests: what pytest says, and the numbers that were drawn."""

    def run(lines: str, *arguments: str) -> tuple[str, list[int]]:
        (tmp_path / "test_drawn.py").write_text(lines)
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "validation.plugin",
            "-p",
            "no:cacheprovider",
            "-n",
            "0",
            "-rA",
        ]
        command += ["-c", os.devnull, f"--rootdir={tmp_path}", str(tmp_path), *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        return done.stdout, [int(number) for number in re.findall(r"^drew (\d+)$", done.stdout, re.MULTILINE)]

    return run


def test_a_seed_chooses_the_numbers_and_statistics_are_shown(run: Run) -> None:
    output, first = run(ANY, "--hypothesis-seed=1", "--hypothesis-show-statistics")
    assert "during generate phase" in output
    assert len(first) > 10
    assert run(ANY, "--hypothesis-seed=1")[1] == first != run(ANY, "--hypothesis-seed=2")[1]


def test_a_failure_says_how_to_repeat_it_and_that_repeats_it(run: Run) -> None:
    output, _ = run(SMALL)
    [asked] = set(re.findall(r"@reproduce_failure\([^)]*\)", output))  # the summary may repeat it
    output, drawn = run(SMALL.replace("@for_all", f"{asked}\n@for_all"))
    assert set(drawn) == {1000}
    assert "1 failed" in output
