"""What defines one Native Sparse Attention: block sizes, block counts and the two structural choices.

Everything here is checked when the object is made, so no kernel and no module ever meets an illegal combination.
Notation follows the paper (arXiv 2502.11089, section 3): `l`, `d`, `l'`, `n`, `w`.
"""

import operator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from torch import Tensor

Compression = Literal["mlp", "linear", "mean"]
"""How a block of keys or values becomes one vector (paper, section 3.3.1)."""

LARGEST = 2**31 - 1
"""The largest size or count: kernels hold them in 32 bits."""


def integer(name: str, value: Any, least: int) -> int:
    """`value` as an int.

    Raises:
        TypeError: `value` is not an integer; a bool is none.
        ValueError: `value` is below `least` or above `LARGEST`.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, got {value!r} ({type(value).__name__})")
    number = operator.index(value)
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    if number > LARGEST:
        raise ValueError(f"{name} must be at most {LARGEST}, got {number}")
    return number


@dataclass(frozen=True)
class NSAConfig:
    """Block sizes and counts of Native Sparse Attention, in tokens; the defaults are the paper's.

    Attributes:
        compress_block_size: `l`, tokens under one compressed key; a multiple of `d`, at most `l'`.
        compress_stride: `d`, tokens from the start of one compressed block to the next; divides `l` and `l'`.
        select_block_size: `l'`, tokens in one selectable block; a multiple of `d`, at least `l`.
        num_selected_blocks: `n`, blocks each query attends to, the forced ones included and at least as many as they
            are; 0 switches the selected branch off, whose output is 0 then.
        num_initial_blocks: forced blocks at the start of the sequence; at least 0.
        num_local_blocks: forced blocks that end with the query's own; at least 0.
        window_size: `w`, tokens a query sees in the window branch, itself included; 0 switches that branch off.
        compression: how a block becomes one key or value, `"mlp"` (two layers, as in the paper), `"linear"` (one layer)
            or `"mean"` (nothing learned).
        shared_kv: one key and value projection for all three branches instead of one each (paper, section 3.3.3).

    Raises:
        TypeError: a size or count that is not an integer, or a flag that is not a bool.
        ValueError: a size or count out of range, sizes that do not divide one another, an unknown compression.
    """

    compress_block_size: int = 32
    compress_stride: int = 16
    select_block_size: int = 64
    num_selected_blocks: int = 16
    num_initial_blocks: int = 1
    num_local_blocks: int = 2
    window_size: int = 512
    compression: Compression = "mlp"
    shared_kv: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.type is int:
                least = 0 if field.name.startswith("num_") or field.name == "window_size" else 1
                object.__setattr__(self, field.name, integer(field.name, getattr(self, field.name), least))
        if not isinstance(self.shared_kv, bool):
            raise TypeError(f"shared_kv must be a bool, got {self.shared_kv!r} ({type(self.shared_kv).__name__})")
        if self.compression not in get_args(Compression):
            raise ValueError(f"compression must be one of {get_args(Compression)}, got {self.compression!r}")
        for name in ("compress_block_size", "select_block_size"):
            if getattr(self, name) % self.compress_stride:
                raise ValueError(
                    f"{name} must be a multiple of compress_stride ({self.compress_stride}), got {getattr(self, name)}"
                )
        if self.compress_block_size > self.select_block_size:
            raise ValueError(
                f"compress_block_size must be at most select_block_size ({self.select_block_size}), "
                f"got {self.compress_block_size}"
            )
        forced = self.num_initial_blocks + self.num_local_blocks
        if 0 < self.num_selected_blocks < forced:
            raise ValueError(
                f"num_selected_blocks must be at least num_initial_blocks + num_local_blocks ({forced}), "
                f"got {self.num_selected_blocks}"
            )

    def num_compressed(self, num_keys: int) -> int:
        """Number of compressed blocks `C` behind `num_keys` tokens: `max(0, (T - l) // d + 1)`."""
        return max(0, (num_keys - self.compress_block_size) // self.compress_stride + 1)

    def num_selectable(self, num_keys: int) -> int:
        """Number of selection blocks `S` that `num_keys` tokens fill, the last one perhaps in part."""
        return -(-num_keys // self.select_block_size)

    def forced(self, block: "Tensor", own: "Tensor") -> "Tensor":
        """The blocks that a query takes whatever their importance (paper, section 3.3.2).

        These are the first `num_initial_blocks` and the last `num_local_blocks` of its candidates, which are the blocks
        up to its own one, `t // l'` for the query at position `t`. They count towards `num_selected_blocks`; where that
        is 0 no block is taken, and so none of these.

        Args:
            block: integers of any shape, numbers of selection blocks; `[S]` for instance.
            own: integers that broadcast with `block`, the number of the block that each query stands in; `[T, 1]` for
                instance.

        Returns:
            bool, of the shape that both broadcast to, `[T, S]` for instance; false beyond the query's own block.
        """
        initial, local = block < self.num_initial_blocks, block > own - self.num_local_blocks
        return (initial | local) & (block <= own)
