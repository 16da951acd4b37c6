"""Training by TorchTitan 0.3: as by 0.2.2, the same in every layout, and after a break.

`losses.json` has the first losses by 0.2.2, by `validation.titan3.reference`; validation/integration/test_titan3.py
compares them with what 0.2.2 gives today.
"""

import math
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import pytest

from validation import numerics
from validation.titan3 import reference
from validation.titan3.training import GRAD_NORM, LOSS, QUIET, train

CONFIGS = {"debug": "nsa_debug", "debug_dense": "nsa_debug_dense"}
STEPS = 10
SMALL = (*QUIET, "--training.seq_len=128", "--training.global_batch_size=4", f"--lr_scheduler.total_steps={STEPS}")

LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "fsdp2": (2, ("--training.local_batch_size=2",)),
    "tp2": (2, ("--training.local_batch_size=4", "--parallelism.tensor_parallel_degree=2")),
    "pp2": (
        2,
        (
            "--training.local_batch_size=4",
            "--parallelism.pipeline_parallel_degree=2",
            "--parallelism.pipeline_parallel_schedule=1F1B",
            "--training.disable_cuda_graphs",
        ),
    ),
    "cp2": (2, ("--training.local_batch_size=4", "--parallelism.context_parallel_degree=2")),
    "cp2-contiguous": (
        2,
        (
            "--training.local_batch_size=4",
            "--parallelism.context_parallel_degree=2",
            "--parallelism.context_parallel_load_balancer=None",
        ),
    ),
    "hsdp2x2": (
        4,
        (
            "--training.local_batch_size=1",
            "--parallelism.data_parallel_replicate_degree=2",
            "--parallelism.data_parallel_shard_degree=2",
        ),
    ),
    "fsdp2-tp2": (4, ("--training.local_batch_size=2", "--parallelism.tensor_parallel_degree=2")),
}
"""Processes and options by the name of a layout."""

Metrics = Mapping[str, Mapping[int, float]]

each_config = pytest.mark.parametrize("flavor", CONFIGS)


@pytest.fixture(scope="session")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Metrics]:
    """What one process logs of the training that layouts are compared by."""

    @cache
    def trained(flavor: str) -> Metrics:
        options = (*SMALL, "--training.local_batch_size=4", f"--training.steps={STEPS}")
        return train(CONFIGS[flavor], tmp_path_factory.mktemp(flavor), *options)

    return trained


def assert_close(found: Metrics, expected: Metrics) -> None:
    for name in (LOSS, GRAD_NORM):
        assert found[name].keys() == expected[name].keys()
        for step, value in expected[name].items():
            difference = abs(found[name][step] - value)
            assert difference <= numerics.LAYOUT_BOUND, f"{name} of step {step} is off by {difference:.1e}"


@each_config
def test_trains_as_the_release_before(flavor: str, tmp_path: Path) -> None:
    reference.write_corpus(tmp_path / "corpus")
    found = train(
        CONFIGS[flavor],
        tmp_path,
        *QUIET,
        f"--dataloader.dataset_path={tmp_path / 'corpus'}",
        f"--training.seq_len={reference.SEQ_LEN}",
        f"--training.steps={reference.TOTAL_STEPS}",
        "--training.mixed_precision_param=float32",
    )[LOSS]
    assert sorted(found) == list(range(1, reference.TOTAL_STEPS + 1))
    assert all(map(math.isfinite, found.values()))
    assert found[reference.TOTAL_STEPS] < numerics.LEARNING_RATIO * found[1]
    for step, expected in enumerate(reference.saved(flavor), 1):
        assert abs(found[step] - expected) <= numerics.LAYOUT_BOUND, f"step {step}: {found[step]}, expected {expected}"


@pytest.mark.parametrize(
    ("layout", "flavor"),
    [*((layout, "debug") for layout in LAYOUTS), *((f"{kind}2", "debug_dense") for kind in ("fsdp", "tp", "pp", "cp"))],
)
def test_trains_as_one_process(layout: str, flavor: str, one_process: Callable[[str], Metrics], tmp_path: Path) -> None:
    processes, options = LAYOUTS[layout]
    found = train(CONFIGS[flavor], tmp_path, *SMALL, f"--training.steps={STEPS}", *options, processes=processes)
    assert_close(found, one_process(flavor))


@each_config
def test_goes_on_after_a_break(flavor: str, one_process: Callable[[str], Metrics], tmp_path: Path) -> None:
    options = (
        "--training.local_batch_size=4",
        "--checkpoint.enable",
        f"--checkpoint.interval={STEPS // 2}",
        "--checkpoint.no-last-save-model-only",
    )
    train(CONFIGS[flavor], tmp_path, *SMALL, *options, f"--training.steps={STEPS // 2}")
    found = train(CONFIGS[flavor], tmp_path, *SMALL, *options, f"--training.steps={STEPS}")
    expected = one_process(flavor)
    for name in (LOSS, GRAD_NORM):
        assert found[name] == expected[name]


def test_goes_on_in_another_layout(one_process: Callable[[str], Metrics], tmp_path: Path) -> None:
    kept = ("--checkpoint.enable", f"--checkpoint.interval={STEPS // 2}", "--checkpoint.no-last-save-model-only")
    train("nsa_debug", tmp_path, *SMALL, "--training.local_batch_size=4", *kept, f"--training.steps={STEPS // 2}")
    processes, options = LAYOUTS["fsdp2"]
    found = train("nsa_debug", tmp_path, *SMALL, *options, *kept, f"--training.steps={STEPS}", processes=processes)
    assert_close(found, one_process("debug"))


@pytest.mark.parametrize("started_from", CONFIGS)
def test_begins_with_weights_that_were_exported(started_from: str, tmp_path: Path) -> None:
    """An NSA model begins with the weights of an NSA model, or of a dense one, far from the loss of drawn weights."""
    learning = (*QUIET, "--training.seq_len=128", "--lr_scheduler.warmup_steps=2")
    saved = ("--checkpoint.enable", "--checkpoint.last-save-model-only", "--checkpoint.last-save-in-hf")
    trained = train(CONFIGS[started_from], tmp_path / "a", *learning, *saved, "--training.steps=20")[LOSS]
    [exported] = (tmp_path / "a" / "checkpoint").glob("step-20")
    loaded = ("--checkpoint.enable", "--checkpoint.initial_load_in_hf", f"--checkpoint.initial_load_path={exported}")
    found = train("nsa_debug", tmp_path / "b", *learning, *loaded, "--training.steps=1")[LOSS]
    assert found[1] < numerics.LEARNING_RATIO * trained[1]
