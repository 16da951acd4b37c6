"""What TorchTitan 0.3 is compared with, in an environment of its own, is what this release trains."""

from pathlib import Path

import pytest

from validation import numerics
from validation.titan3 import reference


@pytest.mark.parametrize("flavor", reference.FLAVORS)
def test_losses_that_another_release_is_held_to_are_those_of_today(flavor: str, tmp_path: Path) -> None:
    found = reference.losses(flavor, tmp_path)
    assert len(found) == len(reference.saved(flavor)) == reference.STEPS
    for step, (now, then) in enumerate(zip(found, reference.saved(flavor), strict=True), 1):
        assert abs(now - then) <= numerics.LAYOUT_BOUND, f"step {step}: {now}, saved {then}"
