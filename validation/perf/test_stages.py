"""How long each stage takes on the eager backend, forward alone and with backward, on any machine.

Eager is the yardstick everything else is compared with and what runs where there is no GPU, so it must not get slower
unnoticed either. One group a stage and direction: the rows of a group differ in length only, and show how it scales.
"""

import pytest
import torch

from validation.implementations import load
from validation.perf.stages import STAGES
from validation.perf.workloads import WORKLOADS

WORKLOAD = WORKLOADS["tiny"]
LENGTHS = (256, 1024)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """A pool of threads measures what else the machine is doing: tenfold differences on a busy one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    ("name", "backward"),
    [
        pytest.param(name, backward, id=f"{name}-{'forward_backward' if backward else 'forward'}")
        for name, stage in STAGES.items()
        for backward in ((False, True) if stage.wrt else (False,))
    ],
)
def test_stage(benchmark, name, backward, length):
    stage, x = STAGES[name], WORKLOAD.draw(length, "cpu")
    run = (stage.step if backward else stage.forward)(load("eager"), x, WORKLOAD.config)

    benchmark.group = f"{name}, {'forward and backward' if backward else 'forward'}"
    benchmark.extra_info.update(tokens=length, threads=1, backend="eager", dtype="float32")
    result = benchmark.pedantic(run, rounds=5, warmup_rounds=1)

    # Speed is worth nothing where the numbers are not.
    for tensor in result:
        assert tensor.isfinite().all()
