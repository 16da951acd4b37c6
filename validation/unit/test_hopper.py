"""Which kernels run on a Hopper GPU: the switches between Gluon's and Triton's."""

import subprocess
import sys

import pytest
import torch

from nsa.kernels import hopper

HOPPER = torch.device("cuda", 0)


def test_triton_s_kernels_run_inside_the_context_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "_runs", lambda device: True)
    monkeypatch.setattr(hopper, "_portably", 0)
    assert hopper.available(HOPPER)
    with hopper.portable():
        with hopper.portable():
            assert not hopper.available(HOPPER)
        assert not hopper.available(HOPPER)
    assert hopper.available(HOPPER)


def test_a_cpu_has_none_of_them() -> None:
    assert not hopper.available(torch.device("cpu"))


@pytest.mark.parametrize(
    ("value", "expected"), [("auto", "0"), ("portable", "1"), ("fast", 'NSA_KERNELS must be "auto" or "portable", got')]
)
def test_the_environment_chooses(value: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSA_KERNELS", value)
    command = [sys.executable, "-c", "from nsa.kernels import hopper; print(hopper._portably)"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert expected in run.stdout + run.stderr
    assert (run.returncode == 0) == (value != "fast")
