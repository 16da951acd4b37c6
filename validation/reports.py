"""Reports at the end of a run: accounts, tables and pictures.

One that cannot be made says why, and changes no result.
"""

import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .implementations import Implementation

OUT = "out"
"""The folder for what runs draw, in the checkout unless `--out` names another."""

IMPLEMENTATIONS: "pytest.StashKey[list[Implementation] | None]" = pytest.StashKey()
"""Those asked for; None until it is known which are by default."""

REFUSED = pytest.StashKey[str]()
"""Why a run was refused, by one of its parallel workers too; empty where it was not."""

NOTES = pytest.StashKey[list[str]]()
"""Lines about the reports of a pytest run, shown at its end."""


@contextmanager
def attempt(report: str, say: Callable[[str], object]) -> Iterator[None]:
    """A context that makes a report: an exception in it ends the report, is said in a line, and goes no further.

    Args:
        report: what is made, as the subject of a sentence: `"the picture of rounding errors"`.
        say: takes the line.
    """
    try:
        yield
    except Exception as error:
        say(f"{report} could not be made: {type(error).__name__}: {' '.join(str(error).split())}")


def command_line(module: str, arguments: Sequence[str] | None = None) -> str:
    """The command that a run of a module is saved with, as a shell takes it.

    Args:
        module: what follows `python -m`.
        arguments: of the command; those of this process unless given.
    """
    return f"python -m {shlex.join([module, *(sys.argv[1:] if arguments is None else arguments)])}"


def save_pictures(folder: Path, pictures: Mapping[str, Callable[[], "Figure"]]) -> None:
    """Draws pictures into files `NAME.png`; one that cannot be drawn is said in a line."""
    from matplotlib import pyplot as plt

    for name, draw in pictures.items():
        with attempt(f"the picture {name}", print):
            figure = draw()
            figure.savefig(folder / f"{name}.png", dpi=100)
            plt.close(figure)


def note(config: pytest.Config, line: str) -> None:
    """Keeps a line for the end of the run."""
    config.stash.setdefault(NOTES, []).append(line)


def folder(config: pytest.Config) -> Path:
    """The folder for what this pytest run draws."""
    return config.rootpath / config.getoption("out")  # an absolute path stays as it is
