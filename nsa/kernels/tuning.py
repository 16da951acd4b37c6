"""Launch parameters of the Triton kernels: a table made offline by measurement, and one function to look things up.

Nothing is tuned at run time: a first call that tries configurations is slow, differs between the ranks of a
distributed job and makes results depend on the noise of a measurement. The table is `launches.json` in this folder;
`python -m validation.perf.tune` makes its entries on the GPU it runs on.

A set of parameters says how a kernel is cut up (`BLOCK_M` query rows, `BLOCK_N` keys), how it is compiled (`num_warps`,
`num_stages`) and, for kernels that have them, its switches:

- `TMA`: whether tiles inside the loop come by tensor descriptors rather than by pointers (Hopper and later);
- `SPLIT`: whether tiles that need no mask get a loop of their own. It spares them the masking and costs a second
  pipeline to fill, so it pays where loops are long;
- `programs`: how many programs a key kernel should have, about; where there are fewer key tiles, the queries of a tile
  are shared out among several programs, whose float32 partial sums are added afterwards. Those of the compressed branch
  want many more than there are processors, since the first keys of a sequence have all queries to walk over and the
  last hardly any;
- `KEY_MAJOR`: whether `nsa.kernels.selected_attention` makes the output, or `dq`, key-major rather than query-major;
- `CHUNK`: queries of a piece, into which the list of queries of each block is cut.
"""

import json
import math
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

Launch = dict[str, Any]

TABLE = Path(__file__).with_name("launches.json")


class Entry(NamedTuple):
    """One measured choice. Head dimensions are padded ones; `bytes` are those of an element."""

    kernel: str
    architecture: str
    bytes: int
    key_dim: int
    value_dim: int
    group: int
    launch: Launch


def read_table(file: Path = TABLE) -> list[Entry]:
    """The entries of a table."""
    return [Entry(**entry) for entry in json.loads(file.read_text())]


def write_table(entries: Sequence[Entry], file: Path = TABLE) -> None:
    """Writes a table, an entry a line, in the order of what it is for; a later entry takes an earlier one's place."""
    merged = {entry[:-1]: entry for entry in entries}
    lines = [json.dumps(merged[key]._asdict()) for key in sorted(merged)]
    file.write_text("[\n" + ",\n".join(lines) + "\n]\n")


KERNELS = frozenset(
    {
        *(f"{branch}_{part}" for branch in ("window", "compressed") for part in ("forward", "queries", "keys")),
        "importance",
        *(f"selected_{part}" for part in ("forward", "forward_key_major", "bwd_dq", "bwd_dkdv")),
    }
)
"""The kernels whose launch is looked up here, by the names that their launchers use."""

PARAMETERS = frozenset(
    {"BLOCK_M", "BLOCK_N", "num_warps", "num_stages", "TMA", "SPLIT", "programs", "KEY_MAJOR", "CHUNK"}
)
"""The parameters that a launch can have."""

NARROWEST = 32
"""Columns of the narrowest tile."""

_OVERRIDES: dict[str, Launch] = {}


@cache
def chunks(dim: int) -> tuple[int, int]:
    """A head dimension as one or two powers of two; the second is 0 where one serves as well.

    Kernels work on powers of two. 192 columns padded to 256 would waste a quarter of the matrix units, the registers
    and the shared memory; as 128 + 64 they waste nothing.
    """
    # Narrower tiles save little, and float32 products over 16 columns read shared memory out of bounds (Triton 3.6).
    whole = max(NARROWEST, triton.next_power_of_2(dim))
    first = whole // 2
    second = max(NARROWEST, triton.next_power_of_2(max(dim - first, 1)))
    return (first, second) if first >= 64 and first + second < whole else (whole, 0)


def padded(dim: int) -> int:
    """The columns a head dimension occupies in a kernel: a power of two, or the sum of two where that is less."""
    return sum(chunks(dim))


def launch(
    name: str, dtype: torch.dtype, dk: int, dv: int, group: int = 1, device: torch.device | None = None
) -> Launch:
    """Parameters for kernel `name`; what nobody has measured gets blocks that fit anywhere.

    Of the entries measured for kernel, architecture, element size and head dims, that of the nearest group is taken:
    nearest by ratio, of two equally near the smaller.

    Args:
        name: the kernel, as its launcher calls it.
        dtype: of the inputs.
        dk, dv: head dimensions of keys and values.
        group: query heads a KV head.
        device: of the inputs; the current one unless given.

    Raises:
        ValueError: `name` is not in `KERNELS`.
    """
    if name not in KERNELS:  # on the way of every call
        _check("name", {name}, KERNELS)
    if triton.knobs.runtime.interpret:
        found = _INTERPRETED
    else:
        index = device.index if device is not None and device.index is not None else torch.cuda.current_device()
        found = _choose(name, architecture(index), dtype, padded(dk), padded(dv), group)
    return {**found, **_OVERRIDES.get(name, {})}


@cache
def _choose(name: str, architecture: str, dtype: torch.dtype, key_dim: int, value_dim: int, group: int) -> Launch:
    key = (name, architecture, dtype.itemsize, key_dim, value_dim)
    measured = {entry.group: entry.launch for entry in _table() if entry[:5] == key}
    if not measured:
        return _fitting(name, max(key_dim, value_dim) * dtype.itemsize, dtype)
    return measured[min(measured, key=lambda other: (abs(math.log2(other / group)), other))]


@cache
def _table() -> list[Entry]:
    return read_table()


@contextmanager
def override(name: str, **parameters: Any) -> Iterator[None]:
    """Replaces parameters of kernel `name` inside the context, in every thread: for sweeps and tests.

    Raises:
        ValueError: `name` is not in `KERNELS`, or a parameter not in `PARAMETERS`: it would replace nothing.
    """
    _check("name", {name}, KERNELS)
    _check("parameters", parameters.keys(), PARAMETERS)
    before = _OVERRIDES.get(name)
    _OVERRIDES[name] = {**(before or {}), **parameters}
    try:
        yield
    finally:
        if before is None:
            del _OVERRIDES[name]
        else:
            _OVERRIDES[name] = before


def _check(argument: str, given: Set[str], known: Set[str]) -> None:
    unknown = sorted(given - known)
    if unknown:
        raise ValueError(f"{argument} must be of {sorted(known)}, got {', '.join(unknown)}")


@cache
def architecture(device: int) -> str:
    """Of a CUDA device, such as `sm90`."""
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
    if name.endswith(("_keys", "_bwd_dkdv")):  # it keeps its keys and streams its queries; its sums take twice the room
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
