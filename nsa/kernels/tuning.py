"""Launch parameters of the Triton kernels: a table made offline by measurement, and one function to look things up.

Nothing is tuned at run time: a first call that tries configurations is slow, differs between the ranks of a
distributed job and makes results depend on the noise of a measurement.

A set of parameters says how a kernel is cut up (`BLOCK_M` query rows, `BLOCK_N` keys), how it is compiled (`num_warps`,
`num_stages`) and, for kernels that have them, its switches:

- `TMA`: whether tiles inside the loop come by tensor descriptors rather than by pointers (Hopper and later);
- `SPLIT`: whether tiles that need no mask get a loop of their own. It spares them the masking and costs a second
  pipeline to fill, so it pays where loops are long;
- `programs`: how many programs a key kernel should have, about; where there are fewer key tiles, the queries of a tile
  are shared out among several programs, whose float32 partial sums are added afterwards.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import triton

Launch = dict[str, Any]


def _choice(rows: int, keys: int, warps: int, stages: int, programs: int = 132, **switches: Any) -> Launch:
    return {
        "BLOCK_M": rows,
        "BLOCK_N": keys,
        "num_warps": warps,
        "num_stages": stages,
        "programs": programs,
        **{"TMA": True, "SPLIT": True, **switches},
    }


# By kernel, architecture, bytes of an element, and padded `Dk` and `Dv`. The key kernels of the compressed branch want
# many more programs than there are processors, since the first keys of a sequence have all queries to walk over and the
# last hardly any.
_TABLE: dict[tuple[str, str, int, int, int], Launch] = {
    ("compressed_forward", "sm90", 2, 128, 128): _choice(128, 64, 4, 2),
    ("compressed_queries", "sm90", 2, 128, 128): _choice(64, 64, 4, 2, SPLIT=False),
    ("compressed_keys", "sm90", 2, 128, 128): _choice(32, 64, 4, 3, programs=1056),
    ("window_forward", "sm90", 2, 128, 128): _choice(128, 64, 4, 2, SPLIT=False),
    ("window_queries", "sm90", 2, 128, 128): _choice(64, 64, 4, 2, SPLIT=False),
    ("window_keys", "sm90", 2, 128, 128): _choice(32, 64, 4, 3),
    ("selected_forward", "sm90", 2, 128, 128): _choice(64, 32, 1, 3),
    ("selected_queries", "sm90", 2, 128, 128): _choice(64, 64, 2, 3),
    ("selected_keys", "sm90", 2, 128, 128): _choice(64, 64, 4, 2, CHUNK=1024),
}

_OVERRIDES: dict[str, Launch] = {}


def chunks(dim: int) -> tuple[int, int]:
    """A head dimension as one or two powers of two; the second is 0 where one serves as well.

    Kernels work on powers of two. 192 columns padded to 256 would waste a quarter of the matrix units, the registers
    and the shared memory; as 128 + 64 they waste nothing.
    """
    # Narrower tiles cost as much, and compiled float32 products of 16 columns were seen to be wrong (Triton 3.6).
    whole = max(32, triton.next_power_of_2(dim))
    first = whole // 2
    second = max(16, triton.next_power_of_2(max(dim - first, 1)))
    return (first, second) if first >= 64 and first + second < whole else (whole, 0)


def padded(dim: int) -> int:
    """The columns a head dimension occupies in a kernel: a power of two, or the sum of two where that is less."""
    return sum(chunks(dim))


def launch(name: str, dtype: torch.dtype, dk: int, dv: int, group: int = 1) -> Launch:
    """Parameters for kernel `name` on the current device; what nobody has measured gets blocks that fit anywhere.

    Args:
        name: the kernel, as its launcher calls it.
        dtype: of the inputs.
        dk, dv: head dimensions of keys and values.
        group: query heads a KV head.
    """
    del group  # rows are (token, head) pairs, so that no choice measured so far depends on it
    if triton.knobs.runtime.interpret:
        found = _INTERPRETED
    else:
        key = (name, _architecture(torch.cuda.current_device()), dtype.itemsize, padded(dk), padded(dv))
        found = _TABLE.get(key) or _fitting(name, max(padded(dk), padded(dv)) * dtype.itemsize, dtype)
    return {**found, **_OVERRIDES.get(name, {})}


@contextmanager
def override(name: str, **parameters: Any) -> Iterator[None]:
    """Replaces parameters of kernel `name` inside the context, in every thread: for sweeps and tests."""
    before = _OVERRIDES.get(name)
    _OVERRIDES[name] = {**(before or {}), **parameters}
    try:
        yield
    finally:
        if before is None:
            del _OVERRIDES[name]
        else:
            _OVERRIDES[name] = before


@cache
def _architecture(device: int) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


# Small blocks make small tests reach tile boundaries, and the interpreter's time is by operation, not by element.
_INTERPRETED: Launch = {
    "BLOCK_M": 16,
    "BLOCK_N": 16,
    "num_warps": 1,
    "num_stages": 1,
    "TMA": False,
    "SPLIT": True,
    "programs": 8,
}


def _fitting(name: str, row_bytes: int, dtype: torch.dtype) -> Launch:
    """Blocks that need no more than the 99 KiB of shared memory which every GPU since Ampere has.

    A float32 product is made of three of narrower numbers, whose operands take the place of two rows each.
    """
    row_bytes *= 2 if dtype == torch.float32 else 1
    if row_bytes <= 256:
        long, short, warps, stages = 64, 64, 4, 2
    elif row_bytes <= 512:
        long, short, warps, stages = 64, 32, 4 if dtype == torch.float32 else 8, 1
    elif row_bytes <= 1024:
        long, short, warps, stages = 32, 32, 8, 1
    else:
        long, short, warps, stages = 16, 16, 4, 1
    rows, keys = long, short
    if name.endswith("_keys"):  # it keeps its keys and streams its queries; its sums take twice the room
        rows, keys = min(short, 32), long if row_bytes <= 256 else short
    return {
        "BLOCK_M": rows,
        "BLOCK_N": keys,
        "num_warps": warps,
        "num_stages": stages,
        "TMA": False,
        "SPLIT": True,
        "programs": 512,
    }
