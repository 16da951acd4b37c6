"""Where every random number of the tests comes from: a name, and the variation a run may ask for."""

from zlib import crc32

variation: int | None = None
"""What `--shuffle-seed` said: other numbers for every name, the same each time."""


forced: str | None = None
"""What `--hypothesis-seed` said: the seed of every property test."""


def seed_of(name: str) -> int:
    """A seed of the name's own: the same in any order, alone or in company."""
    return crc32((name if variation is None else f"{variation} {name}").encode())


def name_of(nodeid: str) -> str:
    """A test's id without folders: the same in the repository and where the harness is installed."""
    path, colons, rest = nodeid.partition("::")
    return f"{path.rpartition('/')[2]}{colons}{rest}"
