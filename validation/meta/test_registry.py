"""One declaration makes a stage: a toy stage is added to a copy of the harness, and every layer has it.

In the copy only the files of `ADDED` are changed. What has a list of stages of its own does not have the toy stage, and
a test here fails.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from validation.faults.trial import LEFT_OUT

ROOT = Path(__file__).parents[2]
TOY = "dense_attention"

ORACLE = """def dense_attention(q, k, v, config, *, cu_seqlens_q=None, cu_seqlens_k=None, scale=None):
    parts = []
    for sequence in sequences(config, q.shape[1], k.shape[1], cu_seqlens_q, cu_seqlens_k):
        keys, values = k[:, sequence.keys], v[:, sequence.keys]
        mask = (sequence.positions[:, None] >= torch.arange(keys.shape[1]))[:, None]
        parts.append(attend(q[:, sequence.queries], keys, values, mask, scale)[0])
    return torch.cat(parts, dim=1)


"""
SPEC = """    StageSpec(
        "dense_attention",
        functions=("dense_attention",),
        inputs=("q", "k", "v"),
        call=lambda subject, case, x: {
            "out": subject.dense_attention(x["q"], x["k"], x["v"], case.config, **case.call)
        },
        reduction=lambda case: case.num_keys + case.key_dim,
        cost=costs.attention("slc", costs.causal_pairs),
        title="toy attention",
        colour="#123456",
    ),
"""
ADDED = {
    "validation/oracle.py": [("def nsa_attention(", f"{ORACLE}def nsa_attention(")],
    "validation/implementations.py": [
        ('    "nsa_attention",\n)', f'    "nsa_attention",\n    "{TOY}",\n)'),
        ("    combine: Callable", f"    {TOY}: Callable[..., Any] | None = None\n    combine: Callable"),
    ],
    "validation/stages.py": [('    StageSpec(\n        "combine"', f'{SPEC}    StageSpec(\n        "combine"')],
}
"""Changes by file, each of a text that is there once."""
MOST_FILES = 8

THEIRS = """

def dense_attention(q, k, v, config, *, scale=None):
    return attend(q, k, v, positions(q.shape[1], k.shape[1]) >= torch.arange(k.shape[1]), scale)[0]


mine = __import__("dataclasses").replace(mine, dense_attention=dense_attention)
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with the toy stage, and somebody's implementation that has it."""
    folder = tmp_path_factory.mktemp("toy")
    for name in ("nsa", "validation"):
        shutil.copytree(ROOT / name, folder / name, ignore=LEFT_OUT)
    for name, changes in ADDED.items():
        text = (folder / name).read_text()
        for old, new in changes:
            assert text.count(old) == 1, f"{name} has {old!r} {text.count(old)} times"
            text = text.replace(old, new)
        (folder / name).write_text(text)
    example = (ROOT / "docs" / "examples" / "sixty_lines.py").read_text()
    (folder / "theirs.py").write_text(example + THEIRS)
    (folder / "wrong.py").write_text(example + THEIRS.replace(">=", ">"))
    return folder


def run(copy: Path, *arguments: str) -> tuple[int, str]:
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(copy)}
    variables.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=copy, env=variables, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def validated(copy: Path, subject: str) -> dict[str, Any]:
    """The verdict of the comparison with the oracle alone, of float64: what the toy stage has of it."""
    file = copy / "verdict.json"
    _, output = run(copy, "validation", subject, f"--json={file}", "-k", f"test_matches and {TOY} and float64")
    assert file.exists(), output
    return json.loads(file.read_text())


def test_a_stage_takes_the_few_files_that_the_guide_names() -> None:
    [row] = [line for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines() if line.startswith("| a stage |")]
    named = re.findall(r"`((?:nsa|validation)/[^`]*)`", row.split("|")[2])
    assert {name for name in named if name.startswith("validation/")} == set(ADDED)
    assert len(named) <= MOST_FILES


def test_conformance_has_it(copy: Path) -> None:
    verdict = validated(copy, "theirs:mine")
    assert verdict["verdict"] == "passed"
    assert verdict["stages"].keys() == {TOY}
    assert verdict["stages"][TOY]["aspects"]["gradients"]["passed"] > 10
    assert {error["tensor"] for error in verdict["errors"]} >= {"out", "gradient of v"}


def test_a_mistake_in_it_is_told_by_name(copy: Path) -> None:
    verdict = validated(copy, "wrong:mine")
    assert verdict["verdict"] == "failed"
    assert verdict["stages"][TOY]["aspects"]["forward"]["failed"] > 10


def test_it_is_timed_reported_and_drawn(copy: Path) -> None:
    file = copy / "stages.json"
    options = (f"--out={file}", "--impl=theirs:mine", f"--stages={TOY}", "--lengths=256", "--rounds=1")
    status, output = run(copy, "validation.perf.stages", *options)
    assert status == 0, output
    found = {(r["stage"], r["direction"], r["subject"]) for r in json.loads(file.read_text())["results"]}
    assert {(TOY, "forward", "mine"), (TOY, "backward", "mine")} <= found
    script = "from validation.perf import plots, report; print(plots.COLOURS, report.TITLES, plots.TITLES_OF_HISTORY)"
    (copy / "shown.py").write_text(script)
    _, output = run(copy, "shown")
    assert "#123456" in output
    assert "toy attention" in output
    assert output.count(TOY) == 3, output
