"""Backward pass of the compressed and of the window branch on Hopper: `nsa.kernels.flash_backward` in Gluon.

The kernels are in `flash_dkdv` and `flash_dq`. In each a program has a warp group that copies (TMA) and one or two that
compute, each 64 keys or rows; the former streams entries of a ring to the latter.

Barriers. Entry `n` of a ring has stage `n % STAGES`. The producer waits for `free` of the stage with the parity of the
round before `n // STAGES`, which a fresh barrier satisfies, then announces bytes at `full` and copies. Consumers wait
for `full` with the parity of the round, and each arrives once at `free` when its products have read the entry. So
`full` counts the producer's arrival and its bytes, `free` the consumers. `ready` completes once, when what a program
keeps is there. Every consumer waits for and releases every entry, in order, whether or not it uses it: no wait is left
open, and a program without entries waits for `ready` alone.

No product is under way from one turn of a loop to the next: the assembler would then overlap none. Where two entries
are taken in a turn, the first product of the second is under way during the elementwise work of the first.

A descriptor pads with 0 what lies outside of a tensor: such queries and keys add 0 to every sum. What is not finite is
not treated here. A tile of 64 keys or rows whose result is not finite gets NaN in `flags`, others get 0, and the
launcher has the Triton kernel compute flagged tiles again.
"""

from typing import Any

from torch import Tensor

from nsa.kernels.bwd_preprocess import BackwardRows
from nsa.kernels.flash_tiles import PositionMap
from nsa.kernels.hopper.primitives import describable_heads
from nsa.varlen import Varlen

TILE = 64
"""Keys, or rows, of a warp group."""


LEAST_KEYS = {(128, True): 0, (128, False): 500, (64, True): 0, (64, False): 1000}
"""Keys from which on the kernels are faster than Triton's, by head dim and whether there is a window."""


def applies(
    positions: PositionMap, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, rows: BackwardRows, varlen: Varlen | None
) -> bool:
    """Whether the kernels take these tensors, and are faster."""
    least = LEAST_KEYS.get((q.shape[3], positions.window is not None))
    of_batch, of_token, of_head = rows.delta.stride()
    return (
        varlen is None
        and least is not None
        and k.shape[1] >= least
        and describable_heads(q, k, v, dout)
        and of_token == 1
        and of_head % 4 == 0
        and of_batch == of_head * q.shape[2]
    )


def constants(positions: PositionMap, group: int, dim: int, gate: Tensor | None) -> dict[str, Any]:
    """Constants that both kernels have."""
    return {
        "STRIDE": positions.stride,
        "LAST": positions.last,
        "WINDOWED": positions.window is not None,
        "G": group,
        "D": dim,
        "WEIGHTED": gate is not None,
    }
