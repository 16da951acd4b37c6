"""What PyTorch itself has to offer, in the shape of an implementation, to be timed beside one."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nsa.config import NSAConfig

from ..implementations import Implementation


def dense() -> Implementation:
    """Causal attention to all keys in place of NSA: cuDNN's on a GPU."""
    if torch.cuda.is_available():
        return _dense("cuDNN", SDPBackend.CUDNN_ATTENTION)
    return _dense("math", SDPBackend.MATH)


def flash() -> Implementation:
    """The same by FlashAttention, as PyTorch brings it, on a GPU or on a CPU."""
    return _dense("flash", SDPBackend.FLASH_ATTENTION)


def decoders() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Dense attention of a new token of each sequence, `[B, 1, Hq, D]`, to all keys, `[B, T, Hk, D]`, by names."""
    gpu = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    backends = gpu if torch.cuda.is_available() else {"math": SDPBackend.MATH}
    return {f"dense ({name})": partial(_attend, backend) for name, backend in backends.items()}


def _attend(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """Attention of `q [B, Tq, Hq, D]` to `k` and `v`, `[B, Tk, Hk, D]`."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)


def _dense(name: str, backend: SDPBackend) -> Implementation:
    """It has no use for the keys of other branches, nor for gates and options."""

    def attention(
        q: Tensor, k_cmp: Tensor, v_cmp: Tensor, k: Tensor, v: Tensor, k_win: Tensor, v_win: Tensor, gates: Tensor,
        config: NSAConfig, **options: Any,
    ) -> Tensor:  # fmt: skip
        return _attend(backend, q, k, v, causal=True)

    return Implementation(name=f"dense ({name})", nsa_attention=attention)


def flex() -> Implementation:
    """The window branch by FlexAttention, compiled for each shape."""
    import torch._inductor.config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # By default the ninth shape would run uncompiled, and a pool of processes would be started for each kernel's sake.
    torch._dynamo.config.recompile_limit = 64
    torch._inductor.config.compile_threads = 1
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)

    @cache
    def mask(length: int, window: int, device: torch.device) -> Any:
        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key <= query) & (key > query - window)

        return create_block_mask(visible, None, None, length, length, device=str(device))

    def sliding_window_attention(q: Tensor, k: Tensor, v: Tensor, config: NSAConfig, **options: Any) -> Tensor:
        block_mask = mask(q.shape[1], config.window_size, q.device)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=block_mask, enable_gqa=True).transpose(1, 2)

    return Implementation(name="FlexAttention", sliding_window_attention=sliding_window_attention)


RIVALS = {"dense": dense, "flash": flash, "flex": flex}
