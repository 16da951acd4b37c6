"""The picture of what tests measured of rounding, drawn of errors that are right and wrong."""

import math
from itertools import cycle
from pathlib import Path

import pytest

from validation.precision import AXES, NARROW, SHOWN, Point, plot

WRONG = (0.0, math.nan, math.inf)
"""Errors of implementations that are wrong, and of one that rounds like the oracle."""


@pytest.mark.parametrize("errors", [(2e-3,), *((error,) for error in WRONG), (*WRONG, 2e-3), ()], ids=str)
def test_the_picture_is_drawn_of_any_errors(tmp_path: Path, errors: tuple[float, ...]) -> None:
    found = [
        Point("eager", axis, value, name, dtype, error=error, plain=error, bound=1e-2)
        for axis, values in AXES.items()
        for value in values.values
        for name in SHOWN
        for dtype, error in zip(NARROW, cycle(errors), strict=False)
    ]
    plot(found, tmp_path / "precision.png")
    assert (tmp_path / "precision.png").stat().st_size > 0
