"""Do NSA, a hybrid and the dense twin learn the same? Paired over seeds; see `repeats.py`."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from validation import reports
from validation import runs as training
from validation.runs import ACTIVE_GIB, LOSS, TOKENS_PER_SECOND, VALIDATION_LOSS, Metrics
from validation.system import repeats
from validation.system.repeats import GRAD_NORM, TIER, TIERS, Runs


def invented(losses: dict[str, list[float]]) -> Runs:
    """Runs with these validation losses, by model."""
    return {
        name: {seed: Metrics(({"step": 1, VALIDATION_LOSS: loss},)) for seed, loss in enumerate(each)}
        for name, each in losses.items()
    }


@pytest.mark.parametrize(
    ("losses", "holds"),
    [
        ([2.0, 3.0, 4.0], True),
        ([2.01, 3.01, 4.01], True),  # within 1%
        ([2.1, 3.1, 4.1], False),  # though seeds differ by ten times as much: differences are paired
        ([2.5, 3.0, 3.8], True),  # within a standard error
        ([1.0, 2.0, 3.0], True),
    ],
)
def test_a_difference_is_paired_by_seed(losses: list[float], holds: bool) -> None:
    assert repeats.paired(invented({"NSA": losses, "dense": [2.0, 3.0, 4.0]}), "NSA").holds == holds


def test_one_seed_has_no_error_and_may_hold() -> None:
    found = repeats.paired(invented({"NSA": [2.01], "dense": [2.0]}), "NSA")
    assert math.isnan(found.error)
    assert found.holds


RECORDS = [{"step": step, LOSS: 2.0, GRAD_NORM: 1.0, TOKENS_PER_SECOND: 9.0, ACTIVE_GIB: 1.0} for step in (1, 2)]
TRAINED = Metrics((*RECORDS, {"step": 2, VALIDATION_LOSS: 2.0}))


@pytest.fixture
def three_seeds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A tier of three seeds, whose second run of dense and third of NSA fail; the runs, in their order."""
    begun: list[str] = []

    def train(arguments: Any, folder: Path, at_once: int, timeout: float) -> Metrics:
        begun.append(folder.name)
        if folder.name == "dense-1":
            raise RuntimeError("a command exited with 1: out of memory")
        if folder.name == "NSA-2":
            raise RuntimeError(f"a command took more than {timeout} seconds")
        return TRAINED

    monkeypatch.setattr(repeats, "train", train)
    monkeypatch.setattr(repeats, "TIERS", {"cpu": replace(TIERS["cpu"], seeds=(0, 1, 2))})
    return begun


def test_all_models_train_with_a_seed_before_the_next_and_every_run_is_kept(
    three_seeds: list[str], tmp_path: Path
) -> None:
    kept: list[dict[str, list[int]]] = []
    tier = repeats.TIERS["cpu"]
    found, failures = repeats.run(
        tier, tmp_path, 1, lambda runs: kept.append({name: list(by_seed) for name, by_seed in runs.items()})
    )
    assert three_seeds == [f"{name}-{seed}" for seed in range(3) for name in ("NSA", "hybrid", "dense")]
    assert kept[-1] == {"NSA": [0, 1], "hybrid": [0, 1, 2], "dense": [0, 2]}
    assert len(kept) == 7
    assert list(found) == ["NSA", "hybrid", "dense"]
    assert sorted(failure.partition(":")[0] for failure in failures) == ["NSA seed 2", "dense seed 1"]


def test_a_run_that_fails_is_reported_and_the_others_are_saved(
    three_seeds: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / repeats.FILE).write_text("of an earlier call")
    assert repeats.main([f"--out={tmp_path}", "--jobs=1"]) == 1
    said = capsys.readouterr()
    assert "dense seed 1: a command exited with 1: out of memory" in said.out
    assert said.err == "2 of 9 runs failed\n"
    saved = repeats.read(tmp_path / repeats.FILE)
    assert "\n".join(repeats.table(saved)) in said.out
    assert [seed for seed, _ in repeats.shared(saved, "NSA")] == [0]


def test_runs_without_dense_have_a_table_too() -> None:
    assert repeats.table({"NSA": {0: TRAINED}})[-1].endswith("| 1.00 |  |")


def test_nothing_is_drawn_of_a_selection_that_was_not_logged(tmp_path: Path) -> None:
    repeats.save(tmp_path, {"NSA": {0: TRAINED}}, "")
    assert {file.name for file in tmp_path.iterdir()} == {repeats.FILE, "repeats.png"}


def test_a_run_that_takes_too_long_says_what_it_printed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = "import time; print('begun', flush=True); time.sleep(600)"
    monkeypatch.setattr(training, "command", lambda *_, **__: [sys.executable, "-c", program])
    with pytest.raises(RuntimeError, match=r"took more than 5 seconds:\nbegun"):
        training.train([], tmp_path, timeout=5)


def test_torchtitan_is_imported_by_the_training() -> None:
    program = "import sys, validation.system.repeats, validation.ladder.__main__; sys.exit('torchtitan' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("name", TIERS)
def test_every_run_of_a_tier_is_a_legal_job_with_enough_to_validate_on(name: str, tmp_path: Path) -> None:
    from nsa.titan.data import ByteTokenizer
    from nsa.titan.train_spec import build_validation_dataloader
    from nsa.train import parse

    tier = TIERS[name]
    for options in repeats.models(tier).values():
        job = parse([*tier.options, *options, "--debug.seed=1", f"--job.dump_folder={tmp_path}"])
        steps, validation = job.training.steps, job.validation
        assert job.lr_scheduler.warmup_steps <= steps / 2
        assert steps % job.metrics.log_freq == steps % validation.freq == 0
        assert steps // job.metrics.log_freq > 3, "speeds are medians"
        loader = build_validation_dataloader(1, 0, ByteTokenizer(), job)
        assert loader.num_rows >= validation.steps * validation.local_batch_size


def test_a_tier_that_cannot_run_here_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(repeats.torch.cuda, "device_count", lambda: 0)
    assert repeats.main(["--tier=1b-32k"]) == 3
    assert capsys.readouterr().err == "1b-32k was not run here: it needs 1 GPU, 0 found\n"


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    name = os.environ.get(TIER, "cpu")
    processes = 1 if TIERS[name].gpus else os.cpu_count() or 1
    folder = reports.folder(request.config)
    folder.mkdir(parents=True, exist_ok=True)
    command = reports.command_line("validation.system.repeats", ["--tier", name])
    keep = partial(repeats.write, folder, command=command)
    found, failures = repeats.run(TIERS[name], tmp_path_factory.mktemp("repeats"), processes, keep)
    if found:
        repeats.save(folder, found, command)
    assert not failures, "\n".join(failures)
    return found


@pytest.mark.ladder
@pytest.mark.parametrize("name", ["NSA", "hybrid"])
def test_losses_are_those_of_the_dense_twin(runs: Runs, name: str) -> None:
    found = repeats.paired(runs, name)
    assert found.holds, f"{name} from dense: {found}"


@pytest.mark.ladder
@pytest.mark.parametrize("name", ["NSA", "hybrid", "dense"])
def test_training_is_stable(runs: Runs, name: str) -> None:
    """No loss or norm that is not finite, and after an eighth of the steps none that is worse than the first."""
    for metrics in runs[name].values():
        losses = metrics[LOSS]
        assert all(map(math.isfinite, [*losses.values(), *metrics[GRAD_NORM].values()]))
        first, last = min(losses), max(losses)
        assert max(loss for step, loss in losses.items() if step >= last / 8) < losses[first]
