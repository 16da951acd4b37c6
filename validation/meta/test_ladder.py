"""The ladder: its verdict, its report, and that each mistake of the system layer makes it fail there."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from validation.ladder import __main__ as ladder
from validation.ladder.page import PICTURES
from validation.ladder.page import page as page_of
from validation.runs import LOSS, VALIDATION_LOSS, Metrics
from validation.system import repeats, tasks
from validation.system.mutants import MUTANTS, VARIABLE

ROOT = Path(__file__).parents[2]


def climb(folder: Path, *arguments: str, **variables: str) -> tuple[int, str, dict]:
    """A run of the ladder as a user starts it: its status, its output and its verdict."""
    command = [sys.executable, "-m", "validation.ladder", f"--out={folder}", *arguments]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **variables}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    file = folder / "verdict.json"
    return done.returncode, done.stdout + done.stderr, json.loads(file.read_text()) if file.exists() else {}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_fails_the_ladder_in_the_system_layer(tmp_path: Path, name: str) -> None:
    killer = f"test_holds and {MUTANTS[name].killer}"
    status, output, verdict = climb(tmp_path, "--layers=system", "-k", killer, **{VARIABLE: name})
    assert status == 1, output
    assert verdict["failed"] == ["system"]
    assert output.rstrip().endswith("eager: failed in system")


def test_a_ladder_that_holds_passes(tmp_path: Path) -> None:
    status, output, verdict = climb(tmp_path, "--layers=system", "-k", "test_holds and not all_learn")
    assert status == 0, output
    assert verdict["verdict"] == "passed"
    assert verdict["layers"]["system"]["counts"] == {"passed": 4}
    assert "## eager: passed" in (tmp_path / "summary.md").read_text()
    assert [suite.get("name") for suite in ElementTree.parse(tmp_path / "junit.xml").getroot()] == ["system"]


def test_a_verdict_is_saved_after_each_layer_and_unfinished_before_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[str] = []
    done: subprocess.CompletedProcess[str] = subprocess.CompletedProcess([], 0)

    def layer(*_: object, **__: object) -> subprocess.CompletedProcess[str]:
        saved.extend(json.loads(file.read_text())["verdict"] for file in tmp_path.glob("verdict.json"))
        return done

    rung = replace(ladder.RUNGS["perf"], read=lambda folder: [{"id": "a", "outcome": "passed", "seconds": 0.0}])
    monkeypatch.setattr(ladder, "RUNGS", {"unit": rung, "perf": rung})
    monkeypatch.setattr(ladder.subprocess, "run", layer)
    verdict = ladder.run(["unit", "perf"], ladder.OURS, tmp_path, "cpu", None)
    assert saved == ["unfinished"]
    assert verdict["verdict"] == json.loads((tmp_path / "verdict.json").read_text())["verdict"] == "passed"


def test_layers_that_are_about_ours_alone_are_refused_for_another(tmp_path: Path) -> None:
    status, output, verdict = climb(tmp_path, "--layers=integration", "--impl=validation.oracle")
    assert status == 2, output
    assert "--layers must have one of unit, system, perf beside --impl" in output
    assert not verdict


def test_a_ladder_that_tests_nothing_fails(tmp_path: Path) -> None:
    status, output, verdict = climb(tmp_path, "--layers=system", "-k", "no_such_test")
    assert status == 1, output
    assert verdict["layers"]["system"]["verdict"] == "not tested"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--layers=units"], "--layers must be of unit, integration, system, perf, got units"),
        (["--impl=nobody"], "--impl: name must be one of"),
        (["--tier=1b-32k"], "--tier 1b-32k cannot be run here: it needs 1 GPU, 0 found"),
    ],
)
def test_a_wrong_command_is_refused_before_work(tmp_path: Path, arguments: list[str], says: str) -> None:
    status, output, verdict = climb(tmp_path, *arguments)
    assert status == 2, output
    assert says in output
    assert not verdict


# The page.


@pytest.fixture
def page(tmp_path: Path) -> str:
    """A page with everything on it, one layer of which fails."""
    setting = tasks.Setting(length=48, batch=2, steps=2, scored=2)
    tasks.save(tmp_path, [tasks.train("recall", name, setting=setting) for name in ("NSA", "dense")], "")
    record = {
        "step": 1, LOSS: 2.0, VALIDATION_LOSS: 2.0, repeats.GRAD_NORM: 1.0, "selection/forced": 0.5,
        "throughput(tps)": 1.0, "memory/max_active(GiB)": 1.0,
    }  # fmt: skip
    metrics = Metrics((record, {**record, "step": 2}))
    repeats.save(tmp_path, {name: {0: metrics, 1: metrics} for name in ("NSA", "hybrid", "dense")}, "")
    names = ("workload", "length", "stage", "direction", "subject")
    perf = {**dict.fromkeys(names, "a"), "median": 1.0, "memory": 2**30}
    (tmp_path / "perf.json").write_text(json.dumps({"results": [perf]}))
    unit = {"stages": {"compress_keys": {"aspects": {}}}, "errors": [], "implementation": {"capabilities": {"a": "b"}}}
    (tmp_path / "unit.json").write_text(json.dumps(unit))
    claims = [
        {"id": "one.py::test_a", "outcome": "passed", "seconds": 1.0},
        {"id": "one.py::test_<b>", "outcome": "failed", "seconds": 1.0, "message": "x < y " * 100},
        {"id": "checks.py::test_mutant_is_killed[rope]", "outcome": "passed", "seconds": 1.0},
    ]
    layer = {
        "verdict": "failed", "asks": "?", "counts": {"passed": 2, "failed": 1}, "seconds": 1.0,
        "command": "python -m pytest", "claims": claims,
    }  # fmt: skip
    verdict = {
        "verdict": "failed", "failed": ["system"], "implementation": "mine", "tier": "cpu", "versions": {"torch": "2"},
        "layers": {"system": layer}, "not_run": {"1b-32k": "needs 1 GPU, 0 found"},
    }  # fmt: skip
    return page_of(verdict, tmp_path)


def test_the_page_has_every_part_and_needs_no_other_file(page: str) -> None:
    for part in ("Mutants", "Precision", "Long-sequence tasks", "Speed and memory", "Versions", "Commands", "Not run"):
        assert f"<h2>{part}" in page, part
    assert page.index("class=wide") < page.index("<h2>"), "the verdict by layer comes first"
    assert page.count("<img") == len(PICTURES)
    assert "test_&lt;b&gt;" in page
    for address in re.findall(r'(?:src|href)=["\']?([^"\'> ]+)', page):
        assert address.startswith("data:"), address
    assert "<script" not in page
    figures = page.count("<table") - page.count("Not run") - 4  # layers, mutants, versions and models are no figures
    assert page.count("class=source") + page.count("<figcaption") >= figures


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MEASURE = """<!doctype html><meta charset=utf-8><body><script>
const found = [];
onerror = (message) => found.push(message);
function done(frame, width) {
  const page = frame.contentDocument, root = page.documentElement;
  if (root.scrollWidth > root.clientWidth) found.push(`overflow at ${width}: ${root.scrollWidth}`);
  for (const image of page.images) if (!image.naturalWidth) found.push(`no picture: ${image.alt}`);
  const style = frame.contentWindow.getComputedStyle(page.body);
  found.push(`shown ${width} ${style.color} on ${style.backgroundColor}`);
  const text = document.createElement('pre');
  text.textContent = 'FOUND ' + JSON.stringify(found);
  document.body.append(text);
}
</script>FRAMES"""


needs_browser = pytest.mark.skipif(BROWSER is None, reason="no browser: chromium or google-chrome")


def seen(page: str, folder: Path, dark: bool = False) -> list[str]:
    """What a browser finds wrong with a page at the width of a desktop and of a phone, and the colours it shows."""
    assert BROWSER is not None
    (folder / "report.html").write_text(page)
    frames = "".join(
        f'<iframe src="report.html" style="width:{width}px;height:800px" onload="done(this, {width})"></iframe>'
        for width in (1280, 390)
    )
    (folder / "measure.html").write_text(MEASURE.replace("FRAMES", frames))
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += ["--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=5000"]
    command += ["--force-dark-mode"] * dark + ["--dump-dom", (folder / "measure.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    found = re.findall(r"FOUND (\[.*?\])<", done.stdout)
    assert found, done.stderr
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return sorted([*json.loads(found[-1].replace("&gt;", ">")), *console])


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_all_of_it(page: str, tmp_path: Path, dark: bool) -> None:
    """Without errors, overflow or missing pictures, in light and dark."""
    colours = "rgb(221, 221, 221) on rgb(22, 22, 22)" if dark else "rgb(34, 34, 34) on rgb(255, 255, 255)"
    assert seen(page, tmp_path, dark) == sorted(f"shown {width} {colours}" for width in (1280, 390))


@needs_browser
def test_the_browser_notices_what_is_wrong(page: str, tmp_path: Path) -> None:
    broken = '<div style="width:3000px">x</div><img alt=gone src="nowhere.png"><script>throw Error("a slip")</script>'
    found = "\n".join(seen(page.replace("</body>", f"{broken}</body>"), tmp_path))
    for part in ("overflow at 1280", "overflow at 390", "no picture: gone", "a slip"):
        assert part in found
