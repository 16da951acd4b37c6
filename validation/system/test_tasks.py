"""Does NSA find in a long sequence what dense attention finds? Tasks, models and scores are in `tasks.py`."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from validation import numerics, reports
from validation.implementations import load
from validation.system import tasks, watch
from validation.system.tasks import SUBJECT, TASKS, VARIANTS, Setting

Score = Callable[[str, str], float]
TINY = Setting(length=48, batch=2, steps=2, scored=2)


# 1. The tasks themselves.


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("depth", [None, 0.0, 0.95])
def test_answers_stand_where_the_rows_say(task: str, depth: float | None) -> None:
    rows = TASKS[task](torch.Generator().manual_seed(1), 8, 96, depth=depth)
    asked = rows.answers != tasks.UNASKED
    row, _ = asked.nonzero(as_tuple=True)
    source = rows.sources[asked]
    assert torch.equal(rows.tokens[row, source], rows.answers[asked])
    # What is asked for stands just before its answer, and is in the haystack, not among the questions.
    assert torch.equal(rows.tokens[row, source - 1], rows.tokens[asked])
    assert (source < asked.long().argmax(1)[row]).all()
    if depth is not None:
        assert abs(source.double().mean() / 96 - depth) < 0.5


def test_a_window_does_not_reach_most_answers() -> None:
    setting = Setting()
    for task, draw in TASKS.items():
        rows = draw(torch.Generator().manual_seed(1), 64, setting.length)
        asked = rows.answers != tasks.UNASKED
        distance = (torch.arange(setting.length) - rows.sources)[asked]
        assert (distance < setting.config.window_size).double().mean() < 0.1, task


@pytest.mark.parametrize("kind", ["random", "oracle"])
def test_blocks_that_are_given_are_legal(kind: str) -> None:
    setting = Setting()
    rows = TASKS["recall"](torch.Generator().manual_seed(1), 4, setting.length)
    blocks = tasks.blocks_of(rows, setting, kind, torch.Generator().manual_seed(2))
    assert blocks is not None
    given = blocks[:, :, 0]
    own = torch.arange(setting.length) // setting.config.select_block_size
    assert (given <= own[:, None]).all()
    assert (given == own[:, None]).any(-1).all(), "the own block is forced"
    assert (given == 0).any(-1).all(), "the initial block is forced"
    real = given.where(given >= 0, torch.arange(-given.shape[-1], 0))
    assert (real.sort(-1).values.diff(dim=-1) > 0).all(), "no block twice"
    answers = rows.sources // setting.config.select_block_size
    there = (given == answers[..., None]).any(-1)[rows.answers != tasks.UNASKED]
    assert there.all() == (kind == "oracle")


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_model_trains(variant: str) -> None:
    result = tasks.train("recall", variant, setting=TINY)
    assert len(result.losses) == TINY.steps
    assert sorted(result.scores) == [48, 96, 192]
    assert tasks.train("recall", variant, setting=TINY).losses == result.losses, "the same seed, the same run"


def test_an_implementation_computes_the_layers() -> None:
    own = tasks.train("recall", "NSA", setting=TINY)
    theirs = tasks.train("recall", "NSA", setting=TINY, subject="eager")
    for mine, other in zip(own.losses, theirs.losses, strict=True):
        assert abs(mine - other) <= numerics.LAYOUT_BOUND * mine


def test_an_implementation_that_cannot_is_told_why() -> None:
    assert tasks.why_not(load("eager"), TINY) is None
    assert tasks.why_not(load("docs.examples.sixty_lines:mine"), TINY) == "mlp compression"


def test_ablations_are_trained_on_what_they_cannot_solve() -> None:
    assert ("dictionary", "no selected") in tasks.pairs_of(list(TASKS), list(VARIANTS))
    assert tasks.pairs_of(["copy"], ["no selected"]) == [("copy", "no selected")]
    assert tasks.pairs_of(["dictionary"], ["hybrid"]) == [], "one layer is no hybrid"


def test_results_are_saved_with_their_pictures(tmp_path: Path) -> None:
    results = [tasks.train("copy", name, setting=TINY) for name in ("NSA", "dense")]
    tasks.save(tmp_path, results, "a command")
    assert tasks.read(tmp_path / "tasks.json") == results
    assert [row.split("|")[2].strip() for row in tasks.table(results)[2:]] == ["dense", "NSA"]
    assert {file.name for file in tmp_path.glob("*.png")} == {"tasks-curves.png", "tasks-heat.png"}


def test_blocks_and_gates_are_looked_at_while_a_model_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    watch.main(["--variants", "NSA", "oracle's blocks", "--steps", "2", "--every", "1", "--out", str(tmp_path)])
    own, given = (watch.read(tmp_path / "watch.json")[i : i + 2] for i in (0, 2))
    assert [moment.step for moment in own + given] == [1, 2, 1, 2]
    assert all(moment.selected == 1 for moment in given), "the blocks of the answers are given"
    for moment in own:
        assert moment.read is not None
        assert moment.guessed is not None
        parts = moment.selected * moment.read + (1 - moment.selected) * moment.guessed
        assert 0 < moment.selected < 1
        assert abs(parts - moment.answered) <= numerics.FLOAT64_BOUND
    assert capsys.readouterr().out.strip() == "\n".join(watch.table(own + given))


# 2. What models learn.


@pytest.fixture(scope="module")
def scores(request: pytest.FixtureRequest) -> Score:
    """Scores at the trained length of every model, trained: a function of task and model."""
    subject = os.environ.get(SUBJECT)
    lacks = {task: subject and tasks.why_not(load(subject), tasks.usual(task)) for task in TASKS}
    pairs = tasks.pairs_of([task for task in TASKS if not lacks[task]], list(VARIANTS))
    results = tasks.train_all(tasks.jobs_of(pairs, [0], subject), os.cpu_count() or 1)
    if results:
        tasks.save(reports.folder(request.config), results, reports.command_line("validation.system.tasks", []))
    found = {(result.task, result.variant): result.scores[Setting.length] for result in results}

    def score(task: str, variant: str) -> float:
        if lacks[task]:
            pytest.skip(f"{subject} lacks {lacks[task]}")
        return found[task, variant]

    return score


BEHIND = pytest.mark.xfail(strict=True, reason="what teaches the selection ends too early: docs/results.md")
"""What is known not to hold; the report shows it, and it fails the run as soon as it holds."""


@pytest.mark.ladder
@pytest.mark.parametrize(
    ("variant", "task"),
    [
        pytest.param(variant, task, marks=BEHIND if variant == "NSA" and task in ("copy", "dictionary") else ())
        for task, variant in tasks.pairs_of(list(TASKS), ["NSA", "hybrid"])
    ],
)
def test_what_dense_attention_finds_is_found(scores: Score, variant: str, task: str) -> None:
    dense, found = scores(task, "dense"), scores(task, variant)
    assert dense >= numerics.SOLVED, f"dense attention does not solve {task} ({dense:.3f}): nothing to compare with"
    assert found >= numerics.RECALL_RATIO * dense, f"{task}: {variant} {found:.3f}, dense {dense:.3f}"


@pytest.mark.ladder
@pytest.mark.parametrize(
    ("variant", "task"), [(name, task) for name, variant in VARIANTS.items() for task in variant.fails]
)
def test_what_is_out_of_reach_is_not_found(scores: Score, variant: str, task: str) -> None:
    """A model that finds it nevertheless was told the answer: then the task shows nothing."""
    found = scores(task, variant)
    assert found < numerics.RECALL_RATIO * scores(task, "dense"), f"{variant}: {found:.3f}"
    assert found < numerics.SOLVED


@pytest.mark.ladder
@pytest.mark.parametrize(
    ("variant", "task"), [(name, task) for name, variant in VARIANTS.items() for task in variant.solves]
)
def test_what_is_missed_is_found_with_another_selection(scores: Score, variant: str, task: str) -> None:
    """Where these models solve a task and NSA does not, the selection is what is wrong there."""
    found = scores(task, variant)
    assert found >= numerics.RECALL_RATIO * scores(task, "dense"), f"{variant}: {found:.3f}"
