"""Branches of attention as PyTorch operators: schema, fake kernel and gradient, the same for every backend.

All branches share one signature, so that one function registers them all, and each ignores what it does not need. An
operator's schema knows no NSAConfig: its integers travel in the order of the dataclass.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from nsa.config import NSAConfig


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sizes_of(config: NSAConfig) -> list[int]:
    """The integers of a configuration, as an operator takes them."""
    return [getattr(config, field.name) for field in fields(config) if field.type is int]


def config_of(sizes: Sequence[int]) -> NSAConfig:
    """The configuration with those integers; what else it holds concerns no operator."""
    return NSAConfig(*sizes)  # type: ignore[arg-type]


def forward_operators() -> set[torch._ops.OpOverload]:
    """All operators of the backends imported so far but those that are gradients: what is costly to compute again."""
    names = (re.fullmatch(r"(nsa\w*)::(\w+)", name) for name in torch._C._dispatch_get_all_op_names())
    ours = (match.groups() for match in names if match and not match[2].endswith("_backward"))
    return {getattr(getattr(torch.ops, namespace), name).default for namespace, name in ours}


def register(
    namespace: str, name: str, forward: Callable[..., Any], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """Registers a branch as the operator `namespace::name` and its gradient as another; returns the former.

    The operator is called as `(q, k, v, indices, cu_seqlens_q, cu_seqlens_k, num_keys, sizes, scale)`.

    Args:
        forward: `(q, k, v, indices, cu_seqlens_q, cu_seqlens_k, num_keys, config, scale)` to output `[B, Tq, Hq, Dv]`
            and log-sum-exp `[B, Tq, Hq]`.
        backward: `(dout, q, k, v, out, lse, ...)` and the rest as above, to `dq`, `dk` and `dv`, all contiguous.
    """

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        indices: Tensor | None,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
        num_keys: int,
        sizes: Sequence[int],
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        return forward(q, k, v, indices, cu_seqlens_q, cu_seqlens_k, num_keys, config_of(sizes), scale)

    def run_backward(
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        indices: Tensor | None,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
        num_keys: int,
        sizes: Sequence[int],
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rest = (indices, cu_seqlens_q, cu_seqlens_k, num_keys, config_of(sizes), scale)
        return backward(dout, q, k, v, out, lse, *rest)

    def fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        lse = q.new_empty(q.shape[:-1], dtype=accumulation_dtype(q.dtype))
        return q.new_empty(*q.shape[:-1], v.shape[-1]), lse

    def fake_backward(dout: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        return tuple(x.new_empty(x.shape) for x in inputs[:3])

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:3], *output, *inputs[3:6])
        ctx.rest = inputs[6:]
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if dout is None:
            return (None,) * 9
        return (*op_backward(dout, *ctx.saved_tensors, *ctx.rest), *[None] * 6)

    op = torch.library.custom_op(f"{namespace}::{name}", run, mutates_args=())
    op_backward = torch.library.custom_op(f"{namespace}::{name}_backward", run_backward, mutates_args=())
    op.register_fake(fake)
    op_backward.register_fake(fake_backward)
    op.register_autograd(differentiate, setup_context=setup_context)
    return op
