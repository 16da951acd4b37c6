"""The accelerated interpreter against Triton's own: run as a module, this file asks the one and then the other.

And its rounding against PyTorch's, and conditions as they are on a GPU.
"""

import os
import subprocess
import sys

import numpy
import pytest
import torch
import triton
import triton.language as tl
from packaging.version import Version

from nsa import kernels
from validation import interpreter
from validation.cases import Case, config, draw
from validation.implementations import load
from validation.numerics import assert_equal
from validation.stages import STAGES, select_blocks


def everything() -> dict[str, torch.Tensor]:
    """What every stage gives, and its gradients, on a case that takes Triton's own interpreter a few seconds."""
    impl, blocks = load("triton"), config((16, 8, 16), 2, 7, num_local_blocks=1)
    case = Case("few", ((3, 20),), blocks, kv_heads=1, key_dim=16, value_dim=16)
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        tensors = draw(case, dtype)
        results[f"selection, {dtype}"] = select_blocks(impl, case, tensors)
        for stage in STAGES.values():
            results |= {f"{stage.name}, {name}, {dtype}": x for name, x in stage.results(impl, case, tensors, dtype)}
    return results


def test_this_version_of_triton_is_accelerated() -> None:
    assert interpreter.accelerate() == kernels.INTERPRETED


@pytest.mark.skipif(
    Version(triton.__version__) < Version("3.7") and Version(numpy.__version__) >= Version("2.4"),
    reason="Triton 3.6's own interpreter does not run with NumPy 2.4",
)
def test_results_are_bit_for_bit_those_of_triton() -> None:
    command = [sys.executable, "-m", "validation.meta.test_interpreter"]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@triton.jit
def _copy_kernel(x, out, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    places = tl.arange(0, COUNT)
    tl.store(out + places, tl.load(x + places).to(tl.bfloat16))


def test_a_bfloat16_is_the_nearest_one(on_device: None) -> None:
    ties = [1 + 1 / 256, 1 + 3 / 256, -1 - 1 / 256, -1 - 3 / 256]
    extremes = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4e38, -3.4e38]
    x = torch.cat((torch.tensor(ties + extremes), torch.randn(1013)))
    out = torch.empty(1024, dtype=torch.bfloat16)
    _copy_kernel[(1,)](x, out, COUNT=1024)
    assert_equal(out, x.bfloat16(), what="float32 as bfloat16")


@triton.jit
def _first_kernel(x, out, count, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    places = tl.arange(0, COUNT)
    kept = (places < 3) & (count > 0)
    tl.store(out + places, tl.load(x + places, mask=kept, other=0.0), mask=kept)


@pytest.mark.parametrize("count", [0, 1])
def test_a_condition_on_a_scalar_is_part_of_a_mask(on_device: None, count: int) -> None:
    out = torch.zeros(8)
    _first_kernel[(1,)](torch.arange(1.0, 9), out, count, COUNT=8)
    assert out.tolist() == [*([1.0, 2.0, 3.0] if count else [0.0] * 3), *[0.0] * 5]


@triton.jit
def _products_kernel(x, y, out, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    places = tl.arange(0, COUNT)
    a, b = tl.load(x + places), tl.load(y + places)
    tl.store(out + places, a * a)
    tl.store(out + COUNT + places, a * b)
    tl.store(out + 2 * COUNT + places, a * 2)
    tl.store(out + 3 * COUNT + places, a * 3)


def test_operands_of_the_same_types_are_told_apart(on_device: None) -> None:
    """A tensor twice is not two tensors, and one number is not another."""
    x, y = torch.arange(1.0, 9), torch.arange(3.0, 11)
    for a, b in ((x, y), (y, x)):
        out = torch.empty(4, 8)
        _products_kernel[(1,)](a, b, out, COUNT=8)
        assert_equal(out, torch.stack([a * a, a * b, 2 * a, 3 * a]), what="products")


if __name__ == "__main__":
    interpreter.keep_conditions()
    own = everything()
    assert interpreter.accelerate()
    accelerated = everything()
    assert own.keys() == accelerated.keys()
    different = [name for name, x in own.items() if not torch.equal(x, accelerated[name])]
    assert not different, different
