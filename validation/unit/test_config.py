"""The blocks that a configuration forces, against sets written down here; test_errors.py has what it refuses."""

import subprocess
import sys

import pytest
import torch

from nsa import NSAConfig, config

FORCED = [
    # initial, local, own block, the forced ones of 8
    (1, 2, 5, {0, 4, 5}),
    (1, 2, 1, {0, 1}),
    (1, 2, 0, {0}),
    (0, 0, 5, set()),
    (0, 1, 5, {5}),
    (3, 0, 1, {0, 1}),
    (2, 3, 7, {0, 1, 5, 6, 7}),
]


@pytest.mark.parametrize(("initial", "local", "own", "expected"), FORCED)
def test_forced_blocks(initial: int, local: int, own: int, expected: set[int]) -> None:
    sizes = NSAConfig(num_initial_blocks=initial, num_local_blocks=local)
    found = sizes.forced(torch.arange(8), torch.tensor(own))
    assert set(found.nonzero().flatten().tolist()) == expected


def test_forced_blocks_of_many_queries() -> None:
    sizes, block, own = NSAConfig(), torch.arange(8), torch.arange(5)[:, None]
    found = sizes.forced(block, own)
    assert found.dtype == torch.bool
    assert torch.equal(found, torch.stack([sizes.forced(block, of_one) for of_one in own]))


def test_a_configuration_imports_nothing_large() -> None:
    # Read without its package, which imports PyTorch.
    program = "import runpy, sys; runpy.run_path(sys.argv[1]); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program, str(config.__file__)], check=True)
