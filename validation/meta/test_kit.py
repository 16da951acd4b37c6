"""The kit as a stranger has it: a wheel in a fresh environment, in an empty folder, on sixty lines of theirs.

Ten mistakes are made in these lines, one at a time. Every one must fail, name its stage and be explained.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest

from validation.faults.trial import LEFT_OUT

ROOT = Path(__file__).parents[2]
EXAMPLE = (ROOT / "docs" / "examples" / "sixty_lines.py").read_text()
Run = Callable[..., tuple[int, str, dict[str, Any]]]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel in it. What the wheel needs is looked up where this test has it."""
    folder = tmp_path_factory.mktemp("kit")
    source, wheels, made = folder / "source", folder / "wheels", folder / "environment"
    shutil.copytree(ROOT, source, ignore=LEFT_OUT)
    here = ["--no-build-isolation", "--no-index"] if _can_build_here() else []
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", *here, "-w", wheels, source], check=True, capture_output=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", made], check=True)
    [wheel] = wheels.glob("*.whl")
    python = made / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True)
    [packages] = made.glob("lib/python*/site-packages")
    # Only folders named here are looked in: an editable installation of this repository is none.
    (packages / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    return made


def _can_build_here() -> bool:
    """Whether what builds the wheel is installed; otherwise pip gets it."""
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    installed = {package.metadata["Name"].lower().replace("_", "-") for package in distributions()}
    return {re.split(r"[^\w-]", name)[0].lower().replace("_", "-") for name in needed} <= installed


def test_the_wheel_ships_every_package_of_the_implementation() -> None:
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "nsa").rglob("__init__.py")}
    assert found <= set(shipped)


@pytest.fixture
def run(environment: Path, tmp_path: Path) -> Run:
    """Runs `nsa-validate` in an empty folder with these lines in `theirs.py`: status, output and verdict."""

    def run(lines: str, *arguments: str, subject: str = "theirs:mine") -> tuple[int, str, dict[str, Any]]:
        (tmp_path / "theirs.py").write_text(lines)
        command = [str(environment / "bin" / "nsa-validate"), subject, "--json=verdict.json", *arguments]
        inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTEST_ADDOPTS")}
        variables = {**inherited, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
        file = tmp_path / "verdict.json"
        return done.returncode, done.stdout + done.stderr, json.loads(file.read_text()) if file.exists() else {}

    return run


def test_the_sixty_lines_are_sixty() -> None:
    code = [line for line in EXAMPLE.splitlines() if line.strip() and not line.strip().startswith('"""')]
    assert len(code) <= 60


def test_sixty_lines_of_somebody_else_pass(run: Run, tmp_path: Path) -> None:
    status, output, verdict = run(EXAMPLE, f"--report={tmp_path / 'page.html'}")
    assert status == 0, output
    assert output.rstrip().splitlines()[-1].startswith("mine: passed (")
    assert "Warning" not in output
    assert verdict["verdict"] == "passed"
    assert {"compress_keys", "select_blocks", "nsa_attention"} <= verdict["stages"].keys()
    assert max(error["ratio"] for error in verdict["errors"]) <= 1
    assert "mine: passed" in (tmp_path / "page.html").read_text()
    written = {path.name for path in tmp_path.iterdir()} - {"__pycache__", ".hypothesis", "out"}
    assert written == {"theirs.py", "verdict.json", "page.html"}


@dataclass(frozen=True)
class Bug:
    """A change of the sixty lines, the stage that is then wrong, and a part of what must be said of it."""

    old: str
    new: str
    stage: str
    says: str


BUGS = {
    "window": Bug("back < config.window_size", "back <= config.window_size", "sliding_window_attention", "w + 1"),
    "strict": Bug("last <= positions", "last < positions", "compressed_attention", "t = i d + l, one token late"),
    "future": Bug(
        "visible = member & (token <= positions(q.shape[1], k.shape[1]))",
        "visible = member.expand(-1, -1, q.shape[1], -1)",
        "selected_attention",
        "no causal mask",
    ),
    "importance": Bug(
        "worth = weights @", "worth = torch.nn.functional.pad(weights, (1, -1)) @", "select_blocks", "one before"
    ),
    "ties": Bug(
        "worth.masked_fill(block > own, -1).sort(dim=-1, descending=True, stable=True).indices",
        "len(block) - 1 - worth.masked_fill(block > own, -1).flip(-1)"
        ".sort(dim=-1, descending=True, stable=True).indices",
        "select_blocks",
        "the higher index",
    ),
    "scale": Bug(
        "sliding_window_attention(q, kw, vw, config, scale=scale)",
        "sliding_window_attention(q, kw, vw, config)",
        "nsa_attention",
        "the scale given does not reach the window branch",
    ),
    "gates": Bug(
        "zip(gates.unbind(-1),", "zip(gates.flip(-1).unbind(-1),", "nsa_attention", "gates are in the order window"
    ),
    "heads": Bug(
        "x.repeat_interleave(group, 2)", "x.repeat(1, 1, group, 1)", "sliding_window_attention", "KV head h % Hk"
    ),
    "delta": Bug(
        "scores.softmax(-1)",
        "(scores - scores.detach().logsumexp(-1, keepdim=True)).exp()",
        "sliding_window_attention",
        "delta is left out",
    ),
    "empty_slots": Bug(
        "(indices.transpose(1, 2)[..., None] ==",
        "(indices.clamp(min=0).transpose(1, 2)[..., None] ==",
        "selected_attention",
        "read as block 0",
    ),
}

# A part of the claims, for time: what fails of them fails of all.
PART = "rules or ties or (float64 and (matches or test_selection) and (wide or many or mean or scrambled or pooled))"


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_fails_and_is_explained(run: Run, name: str) -> None:
    bug = BUGS[name]
    assert EXAMPLE.count(bug.old) == 1
    status, output, verdict = run(EXAMPLE.replace(bug.old, bug.new), "-k", PART)
    assert status == 1, output
    assert verdict["verdict"] == "failed"
    failing = [stage for stage, row in verdict["stages"].items() if "explanations" in row]
    assert bug.stage in failing, output
    assert f"{bug.stage} fails" in output
    said = [found["text"] for found in verdict["stages"][bug.stage]["explanations"]]
    assert any(bug.says in text for text in said), output


def test_a_slip_in_the_adapter_is_said_once(run: Run) -> None:
    status, output, verdict = run(
        EXAMPLE.replace("def attend(q, k, v, visible, scale):", "def attend(q, k, v, visible):")
    )
    assert status == 1
    [slip] = verdict["first_calls"]
    assert {"compressed_attention", "sliding_window_attention"} <= set(slip["stages"])
    assert "takes 4 positional arguments but 5 were given" in slip["message"]
    assert len(output.splitlines()) < 60


def test_expected_failures_are_read(run: Run, tmp_path: Path) -> None:
    bug = BUGS["window"]
    (tmp_path / "known").write_text(
        "test_rules.py::test_the_window_is_the_last_w_tokens_with_the_own_one[mine] # w + 1\n"
    )
    options = ("-k", "test_the_window_is", "--xfails=known")
    status, output, verdict = run(EXAMPLE.replace(bug.old, bug.new), *options)
    assert verdict["counts"] == {"xfailed": 1}, output
    status, output, verdict = run(EXAMPLE, *options)
    assert status == 1
    assert verdict["counts"] == {"xpassed": 1}, output


def test_pytest_beside_it_is_left_alone(environment: Path, tmp_path: Path) -> None:
    (tmp_path / "test_own.py").write_text(
        "def test_own(pytestconfig):\n    assert not hasattr(pytestconfig.option, 'impl')\n"
    )
    command = [str(environment / "bin" / "python"), "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "machine:" not in done.stdout
    refused = subprocess.run([*command, "--impl=eager"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "unrecognized arguments: --impl=eager" in refused.stderr


def test_pytest_that_names_the_harness_has_its_options(environment: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs.py").write_text(EXAMPLE)
    command = [
        str(environment / "bin" / "python"),
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--impl=theirs:mine",
    ]
    command += ["--import-mode=importlib", "--pyargs", "nsa_validation.unit.conformance.test_rules"]
    variables = {**os.environ, "PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mine: passed (" in done.stdout
