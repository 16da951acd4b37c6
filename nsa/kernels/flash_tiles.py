"""Which keys a query sees in the compressed and in the window branch, and the tiles that this makes.

Both branches attend to one contiguous run of keys, so both are flash attention with a map of positions. Key `j` of a
sequence stands at position `e(j) = j STRIDE + LAST`, and a query at position `t` sees it iff `0 <= t - e(j)`, in the
window branch also `t - e(j) < w`:

- compressed (paper, section 3.3.1): key `j` is a block that ends at token `j d + l - 1`: `STRIDE = d`, `LAST = l - 1`;
- window (section 3.3.3): key `j` is token `j`: `STRIDE = 1`, `LAST = 0`.

Hence a query sees the keys from `max(0, t - w + 1)` (or 0) up to, not including, `max(0, t - LAST + STRIDE) // STRIDE`.

A tile that needs no mask lies inside what every row of it sees. Such tiles are consecutive; with SPLIT they are taken
by a loop of their own, which spares them the masking.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.config import NSAConfig
from nsa.kernels.configs import plan
from nsa.kernels.primitives import Heads, find_program, find_tile
from nsa.varlen import Varlen

# Lengths and what follows from them change with every batch; kernels compiled for a length divisible by 16 would gain
# nothing by it.
LENGTHS = [
    "num_queries", "num_tokens", "num_keys", "num_sequences", "window", "num_tiles", "num_splits", "lse_stride",
]  # fmt: skip


@triton.jit
def count_visible(position, STRIDE: tl.constexpr, LAST: tl.constexpr):
    """Number of keys, from the first, that a query at `position` has behind it."""
    return tl.maximum(position - LAST + STRIDE, 0) // STRIDE


@triton.jit
def split_range(first, full_first, full_stop, stop, BLOCK: tl.constexpr, SPLIT: tl.constexpr):
    """Number of tiles in `[first, stop)`, and the run `[a, b)` of tiles inside `[full_first, full_stop)`."""
    count = tl.cdiv(tl.maximum(stop - first, 0), BLOCK)
    if SPLIT:
        a = tl.minimum(tl.cdiv(tl.maximum(full_first - first, 0), BLOCK), count)
        b = tl.maximum(a, tl.minimum(tl.maximum(full_stop - first, 0) // BLOCK, count))
    else:
        a = count
        b = count
    return count, a, b


@triton.jit
def key_range(
    first_position, last_position, num_keys, window,
    STRIDE: tl.constexpr, LAST: tl.constexpr, WINDOWED: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """First and stop of the keys that queries at these positions see, then their tiles as `split_range` has them."""
    stop = tl.minimum(count_visible(last_position, STRIDE, LAST), num_keys)
    full_stop = tl.minimum(count_visible(first_position, STRIDE, LAST), num_keys)
    if WINDOWED:
        first = tl.maximum(first_position - window + 1, 0)
        full_first = tl.maximum(last_position - window + 1, 0)
    else:
        first = stop * 0
        full_first = first
    count, a, b = split_range(first, full_first, full_stop, stop, BLOCK, SPLIT)
    return first, stop, count, a, b


@triton.jit
def nth_tile(i, a, b, MASKED: tl.constexpr):
    """Number of the `i`-th tile of those without masks, `[a, b)`, or of all others."""
    if MASKED:
        return i + tl.where(i < a, 0, b - a)
    else:
        return a + i


@triton.jit
def row_tile(
    program, num_tiles, HEADS, cu_queries, cu_tokens, cu_keys, num_sequences, num_queries, num_tokens, num_keys, window,
    STRIDE: tl.constexpr, LAST: tl.constexpr, WINDOWED: tl.constexpr, G: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The KV head, the batch row and the first of the `BLOCK_M` query rows of a program; start and number of the
    queries of its sequence, and the position of the first of them; the start of its keys, and what `key_range` says."""
    tile, head, batch = find_program(program, num_tiles, HEADS)
    # The last tiles see the most keys and are taken first: what is left for the end of a launch is light.
    first, query_start, num_queries, num_tokens, key_start, num_keys = find_tile(
        cu_queries, cu_queries, cu_tokens, cu_keys, num_sequences, num_queries, num_tokens, num_keys,
        num_tiles - 1 - tile, G, BLOCK_M, PACKED,
    )  # fmt: skip
    shift = num_tokens - num_queries
    key_first, key_stop, count, a, b = key_range(
        first // G + shift, (tl.minimum(first + BLOCK_M, num_queries * G) - 1) // G + shift, num_keys, window, STRIDE,
        LAST, WINDOWED, BLOCK_N, SPLIT,
    )  # fmt: skip
    return head, batch, first, query_start, num_queries, shift, key_start, key_first, key_stop, count, a, b


class PositionMap(NamedTuple):
    """Which keys a query sees, in the words of this file's docstring.

    Attributes:
        name: `"compressed"` or `"window"`, as the table of launches has it.
        window: `w`, 0 where no query sees anything, or `None` where a query sees all keys behind it.
    """

    name: str
    stride: int
    last: int
    window: int | None

    @staticmethod
    def compressed(config: NSAConfig, num_keys: int) -> "PositionMap":
        return PositionMap("compressed", config.compress_stride, config.compress_block_size - 1, None)

    @staticmethod
    def sliding(config: NSAConfig, num_keys: int) -> "PositionMap":
        # A longer window sees no more, and might overflow when positions are added to it.
        return PositionMap("window", 1, 0, min(config.window_size, num_keys))

    def offsets(self, varlen: Varlen | None) -> tuple[Tensor | None, Tensor | None, Tensor | None, int]:
        """Offsets of packed sequences among queries, tokens and keys, and how many sequences there are."""
        if varlen is None:
            return None, None, None, 0
        keys = varlen.cu_blocks if self.window is None else varlen.cu_seqlens_k
        return varlen.cu_seqlens_q, varlen.cu_seqlens_k, keys, keys.shape[0] - 1


@plan
def flash_plan(
    positions: PositionMap, kernel: str, heads: Heads, device: torch.device, packed: bool, describable: bool
) -> tuple[Any, dict[str, Any]]:
    """Configuration of a kernel of one branch, and all that the kernel is compiled with.

    Args:
        kernel: the part of its name after that of the branch.
        describable: whether tensor descriptors can stand for what the kernel reads tile by tile.
    """
    found = heads.config(f"{positions.name}_{kernel}", device)
    # A descriptor knows no sequences: its padding would be the next one's rows, which may be anything, NaN included.
    config = replace(found, TMA=found.TMA and describable and not packed)
    constants = {
        "STRIDE": positions.stride,
        "LAST": positions.last,
        "WINDOWED": positions.window is not None,
        "PACKED": packed,
    }
    return config, {**heads.constants(), **constants, **config.options}
