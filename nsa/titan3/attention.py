"""Attention modules of TorchTitan's kind: NSA, and its dense twin.

Both have the parameters that `nsa.titan` has, by the same names. They do context parallelism themselves, because
TorchTitan's works only with two kernels of its own. A token attends to all tokens before it: documents are not kept
apart.

Legend: `B` batch, `t` tokens of this process, `H` heads, `D` head dim.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchtitan.models.common.attention import BaseAttention
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.rope import RoPE
from torchtitan.protocols.module import Module

from nsa.backends import BackendName
from nsa.config import NSAConfig
from nsa.module import Compressor, NativeSparseAttention
from nsa.titan.context import ContextParallel, attend_over, dense_attention_over


class HeadCompressor(Compressor, Module):
    """The learned map from blocks to vectors, shared out by KV head under tensor parallelism."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        num_kv_heads: int
        head_dim: int
        nsa: NSAConfig

    def __init__(self, config: Config):
        Compressor.__init__(self, config.num_kv_heads, config.head_dim, config.nsa)


class NSAAttention(NativeSparseAttention, BaseAttention):
    """`NativeSparseAttention` made of TorchTitan's modules, which know how they are shared out.

    Attributes:
        context: how sequences are shared out, under context parallelism.
    """

    context: ContextParallel | None = None

    @dataclass(kw_only=True, slots=True)
    class Config(BaseAttention.Config):
        dim: int
        n_kv_heads: int
        nsa: NSAConfig
        backend: BackendName
        wq: Linear.Config
        wk: Linear.Config
        wv: Linear.Config
        wg: Linear.Config
        wo: Linear.Config
        compressor: HeadCompressor.Config
        rope: RoPE.Config

    def __init__(self, config: Config):
        sizes = (config.dim, config.n_heads, config.n_kv_heads)
        NativeSparseAttention.__init__(self, *sizes, config=config.nsa, backend=config.backend)
        for name in ("wq", "wk", "wv", "wg", "wo"):
            setattr(self, name, getattr(config, name).build())
        self.compress_k, self.compress_v = config.compressor.build(), config.compressor.build()
        self.rope = config.rope.build()

    def forward(self, x: Tensor, attention_masks: Any = None, positions: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Attention of `x [B, t, dim]`. Masks and positions are ignored: both follow from the layout."""
        rope = torch.view_as_real(self.rope.cache)
        if self.context is None:
            return self.wo(self.attend(x, rope[: x.shape[1]])[0])
        return self.wo(attend_over(self, self.context, x, rope, self.context.positions(x)))


class DenseAttention(BaseAttention):
    """Dense causal attention by PyTorch's kernel.

    Attributes:
        context: how sequences are shared out, under context parallelism.
    """

    context: ContextParallel | None = None

    @dataclass(kw_only=True, slots=True)
    class Config(BaseAttention.Config):
        dim: int
        n_kv_heads: int
        wq: Linear.Config
        wk: Linear.Config
        wv: Linear.Config
        wo: Linear.Config
        rope: RoPE.Config

    def __init__(self, config: Config):
        super().__init__()
        self.head_dim = config.dim // config.n_heads
        for name in ("wq", "wk", "wv", "wo"):
            setattr(self, name, getattr(config, name).build())
        self.rope = config.rope.build()

    def forward(self, x: Tensor, attention_masks: Any = None, positions: Tensor | None = None) -> Tensor:
        """Attention of `x [B, t, dim]`. Masks and positions are ignored: both follow from the layout."""
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.wq, self.wk, self.wv))
        if self.context is None:
            q, k = self.rope(q, k)
            q, k, v = (y.transpose(1, 2) for y in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
        else:
            q, k = self.rope(q, k, self.context.positions(x).expand(x.shape[0], -1))
            out = dense_attention_over(self.context, q, k, v)
        return self.wo(out.flatten(2))
