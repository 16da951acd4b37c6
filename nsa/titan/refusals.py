"""The error of a job that cannot be done as it was asked for, and the words every such error has."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class JobError(ValueError):
    """A mistake in the options of a job: the message names the option, what it must be and what it is.

    `python -m nsa.train` prints it as one line and exits with its status; any other error is a fault of the program and
    has its traceback.

    Attributes:
        status: exit status of the process.
    """

    status = 1


def require(condition: bool, option: str, must: str, got: Any) -> None:
    """Raises `JobError` unless `condition` holds: "`option` must `must`, got `got`"."""
    if not condition:
        raise JobError(f"{option} must {must}, got {got!r}")


@contextmanager
def naming(prefix: str) -> Iterator[None]:
    """Turns a `ValueError` or `TypeError` about an argument into a `JobError` about the option it comes from."""
    try:
        yield
    except JobError:
        raise
    except (TypeError, ValueError) as error:
        raise JobError(f"{prefix}{error}") from error
