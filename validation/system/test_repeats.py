"""Do NSA, a hybrid and the dense twin learn the same? Paired over seeds; see `repeats.py`."""

import math
import os

import pytest

from validation import reports
from validation.runs import LOSS, VALIDATION_LOSS, Metrics
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
    found = repeats.run(TIERS[name], tmp_path_factory.mktemp("repeats"), processes)
    folder = reports.folder(request.config)
    folder.mkdir(parents=True, exist_ok=True)
    repeats.save(folder, found, reports.command_line("validation.system.repeats", ["--tier", name]))
    return found


@pytest.mark.ladder
@pytest.mark.parametrize("name", ["NSA", "hybrid"])
def test_losses_are_those_of_the_dense_twin(runs: Runs, name: str) -> None:
    found = repeats.paired(runs, name)
    assert found.holds, f"{name} from dense: {found}"


@pytest.mark.ladder
@pytest.mark.parametrize("name", ["NSA", "hybrid", "dense"])
def test_training_is_stable(runs: Runs, name: str) -> None:
    """No loss or norm that is not finite, and no step that is worse than the first."""
    for metrics in runs[name].values():
        losses, norms = list(metrics[LOSS].values()), list(metrics[GRAD_NORM].values())
        assert all(map(math.isfinite, losses + norms))
        assert max(losses[5:]) < losses[0]
