"""Layouts: tensors of this package are head-major and in the accumulation dtype, those of callers are token-major.

Queries are `[B, Hk, T, G, D]`, with the `G` query heads of a KV head side by side, keys and values `[B, Hk, T, D]`.
"""

import torch
from torch import Tensor

from nsa.ops import accumulation_dtype


def grouped(x: Tensor, num_kv_heads: int) -> Tensor:
    """`[B, T, Hq, ...]` as `[B, Hk, T, G, ...]` in the accumulation dtype."""
    return x.unflatten(2, (num_kv_heads, -1)).transpose(1, 2).to(accumulation_dtype(x.dtype))


def ungrouped(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`[B, Hk, T, G, ...]` as contiguous `[B, T, Hq, ...]` in `dtype`."""
    return token_major(x, dtype).flatten(2, 3)


def head_major(x: Tensor) -> Tensor:
    """`[B, T, Hk, D]` as contiguous `[B, Hk, T, D]` in the accumulation dtype."""
    return x.transpose(1, 2).to(accumulation_dtype(x.dtype)).contiguous()


def token_major(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`[B, Hk, T, ...]` as contiguous `[B, T, Hk, ...]` in `dtype`."""
    return x.transpose(1, 2).to(dtype).contiguous()
