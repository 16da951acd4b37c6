"""Configurations of the Triton kernels: a table made offline by measurement, and one function to look things up.

Nothing is tuned at run time: a first call that tries configurations is slow, differs between the ranks of a
distributed job and makes results depend on the noise of a measurement. The table is `configs.json` in this folder;
`python -m validation.perf.tune` makes its entries on the GPU it runs on.

Every kernel has a configuration of its own type, with the fields that it or its launcher reads and no others. Fields in
capitals are constants of the kernel. Those that several kernels have:

- `BLOCK_M`, `BLOCK_N`: query rows and keys of a tile;
- `num_warps`, `num_stages`: how the kernel is compiled;
- `TMA`: whether tiles inside the loop come by tensor descriptors rather than by pointers (Hopper and later);
- `SPLIT`: whether tiles that need no mask get a loop of their own. It spares them the masking and costs a second
  pipeline to fill, so it pays where loops are long.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import triton

TABLE = Path(__file__).with_name("configs.json")


@dataclass(frozen=True)
class KernelConfig:
    """Configuration of one kernel.

    Attributes:
        maxnreg: registers of a thread at most, where more programs a multiprocessor pay for fewer registers.
    """

    num_warps: int
    num_stages: int
    maxnreg: int | None = field(default=None, kw_only=True)

    @cached_property
    def compiled(self) -> dict[str, Any]:
        """How the kernel is compiled."""
        limit = {} if self.maxnreg is None else {"maxnreg": self.maxnreg}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **limit}

    @cached_property
    def options(self) -> dict[str, Any]:
        """Constants of the kernel and how it is compiled, without fields that its launcher reads."""
        return {**{name: value for name, value in asdict(self).items() if name.isupper()}, **self.compiled}


@dataclass(frozen=True)
class FlashConfig(KernelConfig):
    """Forward pass and `dq` of the compressed and of the window branch."""

    BLOCK_M: int
    BLOCK_N: int
    TMA: bool
    SPLIT: bool


@dataclass(frozen=True)
class FlashDkdvConfig(FlashConfig):
    """`dk` and `dv` of the compressed and of the window branch.

    Attributes:
        num_programs: least number of programs, about. Where there are fewer key tiles, the queries of a tile are split
            among several programs, whose float32 partial sums are added afterwards. The compressed branch wants many
            more than there are processors, since the first keys of a sequence have all queries to walk over and the
            last hardly any.
    """

    num_programs: int


@dataclass(frozen=True)
class ImportanceConfig(KernelConfig):
    """Importance of the selection blocks.

    Attributes:
        BLOCK_M: columns of a product, (head, query) pairs.
        BLOCK_N: compressed blocks of a tile.
        num_programs: least number of programs, about.
    """

    BLOCK_M: int
    BLOCK_N: int
    num_programs: int


@dataclass(frozen=True)
class QueryMajorConfig(KernelConfig):
    """`dq` of the selected branch by query."""

    BLOCK_N: int
    TMA: bool


@dataclass(frozen=True)
class SelectedForwardConfig(QueryMajorConfig):
    """Forward pass of the selected branch by query; with `key_major` another kernel makes it by block."""

    key_major: bool


@dataclass(frozen=True)
class TileConfig(QueryMajorConfig):
    """Forward pass and `dq` of the selected branch by tiles of `BLOCK_M` rows, which are those of a few queries.

    Attributes:
        most_keys: of sequences that go this way. In longer ones neighbours have fewer blocks in common.
    """

    BLOCK_M: int
    most_keys: int


@dataclass(frozen=True)
class HopperTileConfig(KernelConfig):
    """The same by `nsa.kernels.hopper.selected`.

    Attributes:
        longest: most keys of sequences that go this way.
    """

    longest: int


@dataclass(frozen=True)
class KeyMajorConfig(KernelConfig):
    """Forward pass of the selected branch by block; at most `CHUNK` queries of a block are one program's."""

    BLOCK_M: int
    CHUNK: int


@dataclass(frozen=True)
class SelectedDkdvConfig(KeyMajorConfig):
    """`dk` and `dv` of the selected branch, with `key_major` also `dq`."""

    key_major: bool


KERNELS: dict[str, type[KernelConfig]] = {
    "compressed_forward": FlashConfig,
    "compressed_bwd_dq": FlashConfig,
    "compressed_bwd_dkdv": FlashDkdvConfig,
    "window_forward": FlashConfig,
    "window_bwd_dq": FlashConfig,
    "window_bwd_dkdv": FlashDkdvConfig,
    "importance": ImportanceConfig,
    "selected_forward": SelectedForwardConfig,
    "selected_forward_key_major": KeyMajorConfig,
    "selected_forward_tiles": TileConfig,
    "selected_forward_hopper": HopperTileConfig,
    "selected_bwd_dq": QueryMajorConfig,
    "selected_bwd_dq_tiles": TileConfig,
    "selected_bwd_dq_hopper": HopperTileConfig,
    "selected_bwd_dkdv": SelectedDkdvConfig,
}
"""The kernels whose configuration is looked up here, by the names that their launchers use."""


class Entry(NamedTuple):
    """One measured choice. Head dimensions are padded ones; `bytes` are those of an element."""

    kernel: str
    architecture: str
    bytes: int
    key_dim: int
    value_dim: int
    group: int
    config: KernelConfig


def read_table(file: Path = TABLE) -> list[Entry]:
    """The entries of a table.

    Raises:
        ValueError: an unknown kernel, or a configuration that lacks a field or has one that no kernel reads.
    """
    rows = json.loads(file.read_text())
    return [Entry(**{**row, "config": make_config(row["kernel"], **row["config"])}) for row in rows]


def write_table(entries: Sequence[Entry], file: Path = TABLE) -> None:
    """Writes a table, an entry a line, in the order of what it is for; a later entry takes an earlier one's place."""
    merged = {entry[:-1]: entry for entry in entries}
    lines = [json.dumps({**merged[key]._asdict(), "config": _set(merged[key].config)}) for key in sorted(merged)]
    file.write_text("[\n" + ",\n".join(lines) + "\n]\n")


def _set(config: KernelConfig) -> dict[str, Any]:
    return {name: value for name, value in asdict(config).items() if value is not None}


def make_config(kernel: str, **values: Any) -> KernelConfig:
    """The configuration of a kernel with these fields.

    Raises:
        ValueError: an unknown kernel, a field that is missing or that the kernel has not got.
    """
    _check_fields(kernel, values)
    missing = sorted({x.name for x in fields(KERNELS[kernel]) if x.default is MISSING} - values.keys())
    if missing:
        raise ValueError(f"a configuration of {kernel} needs {', '.join(missing)}")
    return KERNELS[kernel](**values)


NARROWEST = 32
"""Columns of the narrowest tile."""

_OVERRIDES: dict[str, dict[str, Any]] = {}
_FORGET: list[Callable[[], None]] = []

Function = TypeVar("Function", bound=Callable[..., Any])


def plan(function: Function) -> Function:
    """Keeps what `function` derives from hashable arguments and from configurations, until one is overridden."""
    cached = lru_cache(maxsize=1024)(function)
    forget_with(cached.cache_clear)
    return cached  # type: ignore[return-value]


def forget_with(forget: Callable[[], None]) -> None:
    """Has `forget` called whenever configurations change from which something that is kept was derived."""
    _FORGET.append(forget)


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


def kernel_config(
    kernel: str, dtype: torch.dtype, dk: int, dv: int, group: int = 1, device: torch.device | None = None
) -> Any:
    """Configuration of a kernel, of its type in `KERNELS`; what nobody has measured gets blocks that fit anywhere.

    Of the entries measured for kernel, architecture, element size and head dims, that of the nearest group is taken:
    nearest by ratio, of two equally near the smaller.

    Args:
        kernel: its name in `KERNELS`.
        dtype: of the inputs.
        dk, dv: head dimensions of keys and values.
        group: query heads a KV head.
        device: of the inputs; the current one unless given.

    Raises:
        ValueError: `kernel` is not in `KERNELS`.
    """
    _check_fields(kernel, {})
    if triton.knobs.runtime.interpret:
        found = _interpreted(kernel, group)
    else:
        found = _choose(kernel, architecture(_index(device)), dtype, padded(dk), padded(dv), group)
    return replace(found, **_OVERRIDES[kernel]) if kernel in _OVERRIDES else found


@cache
def _choose(
    kernel: str, architecture: str, dtype: torch.dtype, key_dim: int, value_dim: int, group: int
) -> KernelConfig:
    key = (kernel, architecture, dtype.itemsize, key_dim, value_dim)
    measured = {entry.group: entry.config for entry in _table() if entry[:5] == key}
    if not measured:
        return _fitting(kernel, max(key_dim, value_dim) * dtype.itemsize, dtype, group)
    return measured[min(measured, key=lambda other: (abs(math.log2(other / group)), other))]


@cache
def _table() -> list[Entry]:
    return read_table()


@contextmanager
def override(kernel: str, **values: Any) -> Iterator[None]:
    """Replaces fields of a kernel's configuration inside the context, in every thread: for sweeps and tests.

    Raises:
        ValueError: an unknown kernel, or a field that its configuration has not got.
    """
    _check_fields(kernel, values)
    before = _OVERRIDES.get(kernel)
    _OVERRIDES[kernel] = {**(before or {}), **values}
    forget()
    try:
        yield
    finally:
        if before is None:
            del _OVERRIDES[kernel]
        else:
            _OVERRIDES[kernel] = before
        forget()


def forget() -> None:
    """Forgets whatever was derived from configurations that are about to change."""
    for each in _FORGET:
        each()


def _check_fields(kernel: str, values: dict[str, Any]) -> None:
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {sorted(KERNELS)}, got {kernel!r}")
    if values:
        known = {x.name for x in fields(KERNELS[kernel])}
        unknown = sorted(values.keys() - known)
        if unknown:
            raise ValueError(f"{kernel} has {', '.join(sorted(known))}, not {', '.join(unknown)}")


def _index(device: torch.device | None) -> int:
    return device.index if device is not None and device.index is not None else torch.cuda.current_device()


def starts_early(device: torch.device) -> bool:
    """Whether a kernel can be started before the one before has ended (programmatic dependent launch)."""
    return not triton.knobs.runtime.interpret and int(architecture(_index(device)).removeprefix("sm")) >= 90


@cache
def architecture(device: int) -> str:
    """Architecture of a CUDA device, such as `sm90`."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 1 where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _made(kernel: str, **values: Any) -> KernelConfig:
    """The configuration that takes what it has fields for."""
    return KERNELS[kernel](**{x.name: values[x.name] for x in fields(KERNELS[kernel]) if x.name in values})


@cache
def _interpreted(kernel: str, group: int) -> KernelConfig:
    """Small blocks: they make small tests reach tile boundaries, and the interpreter's time is by operation."""
    return _made(
        kernel, BLOCK_M=16, BLOCK_N=16, num_warps=1, num_stages=1, TMA=False, SPLIT=True, num_programs=8,
        key_major=group < 8, CHUNK=8, most_keys=40, longest=40,
    )  # fmt: skip


def _fitting(kernel: str, row_bytes: int, dtype: torch.dtype, group: int) -> KernelConfig:
    """Blocks that need no more than the 99 KiB of shared memory which every GPU since Ampere has.

    A float32 product is made of three of narrower numbers, whose operands take the place of two rows each.
    """
    row_bytes *= 2 if dtype == torch.float32 else 1
    if row_bytes <= 256:
        long, short, warps, stages = 64, 64, 4, 2
    elif row_bytes <= 512:
        long, short, warps, stages = 64, 32, 4 if dtype == torch.float32 else 8, 1
    elif row_bytes <= 1024:
        long, short, warps, stages = 32, 16, 4, 1
    else:
        long, short, warps, stages = 16, 16, 4, 1
    rows, keys = long, short
    if kernel.endswith("_bwd_dkdv"):  # it keeps its keys and streams its queries; its sums take twice the room
        rows, keys = min(short, 32), long if row_bytes <= 256 else short
    return _made(
        kernel, BLOCK_M=rows, BLOCK_N=keys, num_warps=warps, num_stages=stages, TMA=False, SPLIT=True,
        num_programs=512, key_major=group < 8 and row_bytes <= 1024, CHUNK=2048, most_keys=0, longest=0,
    )  # fmt: skip
