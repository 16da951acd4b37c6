"""Links, commands and output in the README and in docs/: they lead somewhere, name what is there, are what is printed.

Output that depends on counts or rounding has `...` in their place. What takes long is run in a cheap form.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
FENCED = re.compile(r"(?ms)^```(\w*)\n(.*?)^```")
VALIDATE = (ROOT / "docs" / "validate-your-own.md").read_text()
STAGES, SEMANTICS = (f"validation/unit/conformance/test_{name}.py" for name in ("stages", "semantics"))

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


# 1. Commands.


def commands(page: Path) -> list[str]:
    """Lines of shell in a page, continued lines joined, and what stands in backquotes."""
    text = page.read_text()
    lines = [
        line for kind, code in FENCED.findall(text) if kind == "sh" for line in code.replace("\\\n", " ").splitlines()
    ]
    prompts = re.findall(r"(?m)^\$ (.*)$", text)
    return lines + prompts + re.findall(r"`([^`\n]+)`", FENCED.sub("", text))


@each_page
def test_commands_name_targets_modules_and_files_that_are_there(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"(?m)^([a-z-]+):", makefile))
    variables = set(re.findall(r"(?m)^([A-Z_]+) \?=", makefile))
    for command in commands(page):
        for call in re.findall(r"(?:^|&& |; )make ([^#&;|]*)", command):
            words = re.sub(r"\"[^\"]*\"", "", call).split()
            assert {word for word in words if "=" not in word} <= targets, command
            assert {word.partition("=")[0] for word in words if "=" in word} <= variables, command
        for module in re.findall(r"python -m ([\w.]+)|-m ((?:nsa|validation)[\w.]*)", command):
            assert importlib.util.find_spec("".join(module)), command
        for path in re.findall(r"(?:^|[ =])((?:nsa|validation|docs)/[\w./-]+\.\w+)", command):
            assert (ROOT / path).exists() or path == "docs/performance.md", command


@each_page
def test_tests_that_are_named_are_there(page: Path) -> None:
    for file, name in re.findall(r"(test_\w+\.py)::(test_\w+)", page.read_text()):
        [found] = (ROOT / "validation").rglob(file)
        named = re.search(rf"def {name}\(", found.read_text())
        assert named or f"{file}::{name}" in INVENTED, f"{file}::{name}"


INVENTED = {"test_semantics.py::test_a_window_of_one_is_the_value"}
"""Ids that a page shows for what is said of them: that they are not there."""


# 2. Links.


def anchors(page: Path) -> set[str]:
    """Anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"(?m)^#+ (.*)$", FENCED.sub("", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", page.read_text())):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


# 3. Output.


def block(beginning: str) -> str:
    """The one fenced block of the page that has a line with this beginning."""
    [found] = [code for _, code in FENCED.findall(VALIDATE) if re.search(rf"(?m)^{re.escape(beginning)}", code)]
    return found


def assert_printed(quoted: str, output: str) -> None:
    """Fails unless the lines of a block are in the output, in any order, `...` standing for anything."""
    for line in filter(None, quoted.splitlines()):
        pattern = ".*".join(map(re.escape, line.strip().split("...")))
        assert re.search(rf"(?m)(^|\s){pattern}$", output), f"{line!r} is not in\n{output}"


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A folder with the page's `mine.py`."""
    (tmp_path / "mine.py").write_text(block("import torch"))
    return tmp_path


def run(folder: Path, *arguments: str) -> tuple[int, str]:
    """The exit status and the output of the tests on the implementation in a folder, or on another that is named."""
    path = os.pathsep.join(filter(None, (str(folder), str(ROOT), os.environ.get("PYTHONPATH"))))
    # pytest cuts the lines of its summary to the terminal's width, except in CI. The pages show them cut.
    as_on_a_terminal = {"CI": "", "BUILD_NUMBER": "", "COLUMNS": "80"}
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", **as_on_a_terminal}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_a_wrong_window_fails_as_the_page_says(mine: Path) -> None:
    chosen = ("--tb=line", "-k", "window_of_one or strides")
    status, output = run(mine, "--impl=mine:mine", SEMANTICS, *chosen)
    assert status == 1, output
    assert "-k 'window_of_one or strides'" in VALIDATE
    assert_printed(block("E   validation.numerics.Mismatch: window of one"), output)
    assert_printed(block("mine: failed"), output)


def test_a_right_window_passes_and_lists_what_was_skipped(mine: Path) -> None:
    module = mine / "mine.py"
    text = module.read_text()
    assert text.count("config.window_size + 1") == 1
    module.write_text(text.replace("config.window_size + 1", "config.window_size"))
    chosen = "test_matches and (small or packed_paper or paper) and not gradients"
    status, output = run(mine, "--impl=mine:mine", STAGES, "-k", chosen)
    assert status == 0, output
    assert_printed("mine: passed (... passed, ... skipped)", output)
    assert_printed(block("mine lacks the stage compress"), output)


def test_the_python_of_the_readme_runs() -> None:
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
        exec(code, names)
    assert names["y"].shape == (1, 1, 512)
    assert names["cache"].lengths == (2049,)


def test_the_example_prints_the_table_of_the_page(tmp_path: Path) -> None:
    chosen = "test_matches and small and (sliding or compress_keys)"
    status, output = run(tmp_path, "--impl=docs.examples.my_nsa:my_nsa", STAGES, "-k", chosen)
    assert status == 0, output
    quoted = block("$ make unit VENV= PYTHON=python IMPL=docs.examples.my_nsa:my_nsa").partition("\n")[2]
    assert_printed(quoted, output)
    # Nor is there a row that the page lacks.
    rows = [line.split("  ")[0] for line in quoted.splitlines()]
    between = output.partition("= capabilities =")[2].partition("= verdicts =")[0].splitlines()[1:-1]
    assert [line.split("  ")[0] for line in between] == rows[1 : 1 + len(between)]


def test_expected_failures_are_as_the_page_says(mine: Path) -> None:
    file = mine / "known.txt"
    file.write_text(block("# the window is one token too long"))
    chosen = (SEMANTICS, "--impl=mine:mine", "-k", "window_of_one", f"--xfails-file={file}")
    status, output = run(mine, *chosen)
    assert status == 0, output
    verdict = re.search(r"the verdict on the window above is `(.*)`", VALIDATE)
    assert verdict
    assert_printed(verdict[1], output)
    file.write_text(file.read_text().replace("_itself[mine]", "[mine]"))
    status, output = run(mine, *chosen)
    assert status == pytest.ExitCode.USAGE_ERROR
    assert_printed(block("ERROR: known.txt").replace("known.txt", str(file)), output)


# 4. Messages and programs.


def test_messages_of_the_page_on_trouble_are_said_somewhere() -> None:
    sources = "\n".join(f.read_text() for folder in ("nsa", "validation") for f in (ROOT / folder).rglob("*.py"))
    sources = re.sub(r'"\s*\n\s*f?"', "", sources)  # messages in several pieces
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"(?m)^\| `([^`]*)`", page)
    assert len(messages) > 5
    for message in messages:
        for part in filter(None, map(str.strip, re.split(r"\.\.\.|needs 1 GPU, 0 found|: it", message))):
            assert part in sources, f"{message}: {part!r} is said nowhere"


def test_the_loop_of_the_example_learns() -> None:
    from docs.examples import plain_loop

    losses = plain_loop.train()
    assert losses[-1] < losses[0] / 2
