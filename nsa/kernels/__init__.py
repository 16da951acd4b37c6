"""The Triton backend: the functions `nsa.functional` dispatches to, one file a stage.

Nothing is launched or compiled by importing it, so it can be imported where there is no GPU.
"""

import torch
import triton
from torch import Tensor

from nsa.config import NSAConfig
from nsa.kernels import cache
from nsa.kernels.attention import combine, nsa_attention
from nsa.kernels.compress import compress
from nsa.kernels.decode import decode_attention
from nsa.kernels.flash_attention import compressed_attention, sliding_window_attention
from nsa.kernels.rope import apply_rope
from nsa.kernels.select import select_blocks
from nsa.kernels.selected_attention import selected_attention
from nsa.kernels.step import take_in

cache.use_writable()

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether kernels run under Triton's interpreter (TRITON_INTERPRET=1 when Triton was imported), on a CPU too."""


def why_not(config: NSAConfig, *tensors: Tensor) -> str | None:
    """What of these arguments the kernels do not support, or None; the last dimension of tensors is a head's."""
    if not INTERPRETED and any(x.device.type != "cuda" for x in tensors):
        return f"tensors on {tensors[0].device} (without TRITON_INTERPRET=1 kernels need a GPU)"
    if not INTERPRETED and any(x.dtype == torch.float64 for x in tensors):
        return "float64 (only under TRITON_INTERPRET=1)"
    for name, least in (("compress_block_size", 16), ("compress_stride", 8), ("select_block_size", 16)):
        size = getattr(config, name)
        if size < least or size & (size - 1):
            return f"{name} = {size} (only powers of two from {least})"
    for x in tensors:
        if not 16 <= x.shape[-1] <= 256:
            return f"a head dim of {x.shape[-1]} (only 16 to 256)"
    return None


__all__ = [
    "INTERPRETED",
    "apply_rope",
    "combine",
    "compress",
    "compressed_attention",
    "decode_attention",
    "nsa_attention",
    "select_blocks",
    "selected_attention",
    "sliding_window_attention",
    "take_in",
    "why_not",
]
