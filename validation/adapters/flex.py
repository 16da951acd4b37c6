"""FlexAttention, of PyTorch itself: branches as masks over all keys, which its compiled kernels skip by blocks.

It has no selection and no compression, so that the whole of Native Sparse Attention is not there. On a CPU it has no
backward pass and is not compiled: what runs is its definition. Without keys to see it gives 0 and `-inf`, as ours do.
"""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from ..implementations import Implementation, Sizes
from ..oracle import query_positions

Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Whether `(batch, head, query, key)` sees."""
Attend = Callable[[Tensor, Tensor, Tensor, Mask, float | None], tuple[Tensor, Tensor]]
"""Attention of `q`, `k` and `v` under a mask, with a scale: `[B, Tq, Hq, Dv]` and log-sum-exp `[B, Tq, Hq]`."""


def branches(attend: Attend) -> dict[str, Any]:
    """Stages made of attention under a mask, which is not called where there are no keys."""

    def under(q: Tensor, k: Tensor, v: Tensor, sees: Mask, scale: float | None) -> tuple[Tensor, Tensor]:
        if k.shape[1]:
            return attend(q, k, v, sees, scale)
        k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
        logits = torch.einsum("bthd,bshd->bths", q, k)  # none, and gradients are those of a sum of nothing
        lse = q.new_full(q.shape[:3], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
        return torch.einsum("bths,bshd->bthd", logits, v), lse

    def compressed_attention(
        q: Tensor,
        k_cmp: Tensor,
        v_cmp: Tensor,
        config: Any,
        *,
        num_keys: int | None = None,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        positions = query_positions(q.shape[1], num_keys or q.shape[1]).to(q.device)
        stride, last = config.compress_stride, config.compress_block_size - 1

        def sees(batch: Tensor, head: Tensor, query: Tensor, block: Tensor) -> Tensor:
            return block * stride + last <= positions[query]

        return under(q, k_cmp, v_cmp, sees, scale)

    def selected_attention(
        q: Tensor, k: Tensor, v: Tensor, indices: Tensor, config: Any, *, scale: float | None = None
    ) -> Tensor:
        positions = query_positions(q.shape[1], k.shape[1]).to(q.device)
        size, group = config.select_block_size, q.shape[2] // k.shape[2]
        blocks = torch.arange(-(-k.shape[1] // size), device=q.device)
        chosen = (indices[..., None] == blocks).any(-2)  # [B, Tq, Hk, S]

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return chosen[batch, query, head // group, key // size] & (key <= positions[query])

        return under(q, k, v, sees, scale)[0]

    def sliding_window_attention(q: Tensor, k: Tensor, v: Tensor, config: Any, *, scale: float | None = None) -> Tensor:
        positions = query_positions(q.shape[1], k.shape[1]).to(q.device)

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            distance = positions[query] - key
            return (distance >= 0) & (distance < config.window_size)

        return under(q, k, v, sees, scale)[0]

    return {stage.__name__: stage for stage in (compressed_attention, selected_attention, sliding_window_attention)}


@cache
def _attention(compiled: bool) -> Any:
    return torch.compile(flex_attention, dynamic=False) if compiled else flex_attention


def _attend(q: Tensor, k: Tensor, v: Tensor, sees: Mask, scale: float | None) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    attend = _attention(q.is_cuda)
    mask = create_block_mask(sees, batch, heads, queries, k.shape[1], device=q.device.type)
    # On a CPU it refuses inputs that want gradients.
    inputs = (x.transpose(1, 2) if q.is_cuda else x.transpose(1, 2).detach() for x in (q, k, v))
    # Called as it is, it would trace itself all the same.
    stance = torch.compiler.set_stance("default" if q.is_cuda else "force_eager")
    with stance, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        out, more = attend(*inputs, block_mask=mask, scale=scale, enable_gqa=True, return_aux=AuxRequest(lse=True))
    return out.transpose(1, 2), more.lse.transpose(1, 2)


def flex() -> Implementation:
    """The stages that FlexAttention can express."""
    compiled = torch.cuda.is_available()
    return Implementation(
        name="flex",
        **branches(_attend),
        dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16} | (set() if compiled else {torch.float64})),
        backward=compiled,
        deterministic=not compiled,
        packed=False,
        checks_input=False,
        hidden_values=False,
        head_dims=Sizes(16, powers_of_two=True) if compiled else Sizes(),
    )
