"""`scaled_dot_product_attention`, of PyTorch itself, under masks: cuDNN's kernels on a GPU, flash attention on a CPU.

What is called are the operators behind it, for their log-sum-exp. What the function looks at before it calls them is
done here: elements of a head have to be neighbours, and there has to be a key. A mask is added to the logits and has a
number for every query and key. A query without keys to see has log-sum-exp 0 on a CPU; ours is `-inf`.

It has no selection and no compression, so that the whole of Native Sparse Attention is not there.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

from ..implementations import Implementation, Sizes
from .flex import Mask, branches

on_cpu: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
cudnn: Any = torch.ops.aten._scaled_dot_product_cudnn_attention


def _attend(q: Tensor, k: Tensor, v: Tensor, sees: Mask, scale: float | None) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    mask = create_mask(sees, batch, heads, queries, k.shape[1], device=q.device.type)
    bias = q.new_zeros(mask.shape).masked_fill(~mask, -torch.inf)
    inputs = [x.contiguous().transpose(1, 2) for x in (q, k, v)]
    if q.is_cpu:
        out, lse = on_cpu(*inputs, attn_mask=bias, scale=scale)
    else:
        out, lse, *_ = cudnn(*inputs, bias, compute_log_sumexp=True, scale=scale)
    lse = lse.detach().reshape(batch, heads, queries).masked_fill(~mask.any(-1), -torch.inf)
    return out.transpose(1, 2), lse.transpose(1, 2)


def head_dims(dim: int) -> bool:
    """multiples of 8 to 128"""
    return dim % 8 == 0 and dim <= 128


def sdpa() -> Implementation:
    """The stages that attention under a mask can express."""
    on_gpu = torch.cuda.is_available()
    narrow = {torch.float16, torch.bfloat16}
    return Implementation(
        name="sdpa",
        **branches(_attend),
        dtypes=frozenset(narrow if on_gpu else narrow | {torch.float32, torch.float64}),
        devices=frozenset({"cuda"} if on_gpu else {"cpu"}),
        deterministic=not on_gpu,
        packed=False,
        value_head_dim=on_gpu,
        checks_input=False,
        hidden_values=False,
        head_dims=head_dims if on_gpu else Sizes(),
    )
