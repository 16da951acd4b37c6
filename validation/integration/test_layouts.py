"""The same training, however it is laid out over processes: losses, gradient norms, parameters."""

import itertools
from pathlib import Path

import pytest

from validation import numerics, runs
from validation.integration import ranks
from validation.integration.layouts import (
    BFLOAT16,
    BY_NAME,
    LAYOUTS,
    MODELS,
    ONE,
    TRAINING,
    Layout,
    OneProcess,
    assert_same,
    train,
)

EAGER = ("--nsa.backend=eager",)


def marks(layout: Layout, model: str) -> list[pytest.MarkDecorator]:
    return [*layout.marks, *([pytest.mark.smoke] if layout.smoke and model == "nsa" else [])]


@pytest.mark.parametrize(
    ("layout", "model"),
    [
        pytest.param(layout, model, id=f"{layout.name}-{model}", marks=marks(layout, model))
        for layout, model in itertools.product(LAYOUTS, MODELS)
        if model in layout.models
    ],
)
def test_trains_as_one_process(layout: Layout, model: str, one_process: OneProcess, tmp_path: Path) -> None:
    options = (*layout.size, f"--nsa.attention={MODELS[model]}")
    train(layout, tmp_path, *options)
    assert_same(tmp_path, one_process(*options))


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(ONE, id=ONE.name, marks=ranks.on_gpus),  # elsewhere there is one backend to train with
        *(
            pytest.param(layout, id=layout.name, marks=layout.marks)
            for layout in LAYOUTS
            if ranks.ON_GPUS or layout.processes == 2  # on two cores, more would take minutes and round no differently
        ),
    ],
)
def test_trains_in_bfloat16_as_well_as_plain_pytorch(layout: Layout, one_process: OneProcess, tmp_path: Path) -> None:
    """The kernels, where there is a GPU, over several processes, beside the eager backend in one."""
    train(layout, tmp_path, *BFLOAT16)
    exact, plain = (one_process(*layout.size, *EAGER, *options) for options in ((), BFLOAT16))
    numerics.assert_same_training(
        runs.read_metrics(tmp_path),
        runs.read_metrics(exact),
        (runs.LOSS, "grad_norm"),
        baseline=runs.read_metrics(plain),
    )


@ranks.needs(2)
@pytest.mark.parametrize(
    ("module", "options"),
    [("nsa.train", ()), ("torchtitan.train", ("--job.config_file=nsa/configs/debug.toml",))],
    ids=["ours", "torchtitan"],
)
def test_torchrun_trains_as_one_process(
    module: str, options: tuple[str, ...], one_process: OneProcess, tmp_path: Path
) -> None:
    layout = BY_NAME["fsdp2"]
    arguments = (*options, *TRAINING, *layout.arguments)
    runs.train(arguments, tmp_path, module=module, processes=layout.processes)
    assert_same(tmp_path, one_process())


@ranks.needs(2)
def test_every_rank_logs_where_it_is_asked_to(tmp_path: Path) -> None:
    train(BY_NAME["fsdp2"], tmp_path, "--training.steps=2", "--metrics.save_for_all_ranks")
    first, second = (runs.read_metrics(folder) for folder in (tmp_path, tmp_path / "rank_1"))
    assert sorted(second[runs.LOSS]) == [1, 2]
    assert second[runs.LOSS] == first[runs.LOSS]
