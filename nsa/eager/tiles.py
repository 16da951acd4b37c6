"""Tiles of queries: every sequence is cut into runs of queries whose intermediates have a good size."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nsa.config import NSAConfig
from nsa.varlen import Varlen


class Segment(NamedTuple):
    """One sequence of a packed row, or the only one of a row that is not packed.

    Attributes:
        queries: slice of the `Tq` queries of the row.
        keys: slice of the `Tk` keys of the row.
        blocks: slice of the `C` compressed blocks of the row.
        first_position: position of its first query, since queries are the last tokens of their sequence.
    """

    queries: slice
    keys: slice
    blocks: slice
    first_position: int


class Tile(NamedTuple):
    """A run of `M` queries of one segment.

    Attributes:
        queries: slice of the `Tq` queries of the row.
        first: position of the first query in its sequence.
        last: position of the last query in its sequence.
    """

    queries: slice
    first: int
    last: int

    def positions(self, device: torch.device) -> Tensor:
        """Positions of the queries in their sequence, `[M]`."""
        return torch.arange(self.first, self.last + 1, device=device)


def segments(num_queries: int, num_keys: int, varlen: Varlen | None, config: NSAConfig) -> Iterator[Segment]:
    """The sequences that have queries, from their offsets or, without them, from the lengths of the row."""
    if varlen is None:
        bounds_q, bounds_k = [0, num_queries], [0, num_keys]
    else:
        bounds_q, bounds_k = varlen.cu_seqlens_q.tolist(), varlen.cu_seqlens_k.tolist()
    first_block = 0
    for q0, q1, k0, k1 in zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:], strict=False):
        last_block = first_block + config.num_compressed(k1 - k0)
        q0 = max(q0, q1 - (k1 - k0))  # Queries before the first key see nothing.
        if q1 > q0:
            yield Segment(slice(q0, q1), slice(k0, k1), slice(first_block, last_block), (k1 - k0) - (q1 - q0))
        first_block = last_block


def tiles(
    segment: Segment, bytes_per_query: int, device: torch.device, max_queries: int | None = None
) -> Iterator[Tile]:
    """The queries of a segment in tiles, for intermediates of `bytes_per_query`, of at most `max_queries`."""
    size = _num_queries(bytes_per_query, device)
    size = size if max_queries is None else min(size, max_queries)
    offset = segment.first_position - segment.queries.start
    for start in range(segment.queries.start, segment.queries.stop, size):
        stop = min(start + size, segment.queries.stop)
        yield Tile(slice(start, stop), start + offset, stop + offset - 1)


def _num_queries(bytes_per_query: int, device: torch.device) -> int:
    """The queries of a tile whose largest intermediate fits a CPU's cache, or keeps an accelerator busy."""
    tile_bytes, fewest = (2 << 20, 4) if device.type == "cpu" else (512 << 20, 1)
    return max(fewest, tile_bytes // max(1, bytes_per_query))
