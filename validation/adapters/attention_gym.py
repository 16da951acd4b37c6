"""`attn_gym`, PyTorch's attention-gym: its `gather_attn`, attention to keys that a list names and to a window.

What is translated here is form, never arithmetic:

- Its keys are its values, one tensor. Ours stand in it side by side, queries have zeros beside the values, and of the
  output the part beside the keys is left out.
- A list of keys is the same for all heads, so that it is called once a KV head, with the query heads of its group.
- It lists keys, not blocks, and leaves it to the caller to list none that comes after the query.
- Its window has as many queries as keys. Where there are fewer, they take their places among zeros.
- Offsets of packed queries and keys come together or not at all, those of compressed blocks in place of the keys'.

It has no selection by importance and no compression of blocks that overlap, so that the whole of Native Sparse
Attention is not there. On a CPU its reference runs, on a GPU the kernels that it chooses itself.

Read in version 0.0.17, which constraints.txt pins and the extra `peers` installs.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..implementations import Implementation, Sizes, needing
from ..oracle import query_positions, sequences

with needing("attn_gym", "attn_gym"):
    from attn_gym.sparse import AuxRequest, Impl, gather_attn

Offsets = tuple[Tensor | None, Tensor | None]


def compressed_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    config: Any,
    *,
    num_keys: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    tokens = num_keys or q.shape[1]
    packing = (cu_seqlens_q, cu_seqlens_k)
    blocks = torch.arange(k_cmp.shape[1])
    last_tokens = blocks * config.compress_stride + config.compress_block_size - 1
    seen = last_tokens <= query_positions(q.shape[1], tokens, *packing)[:, None]
    listed = blocks.where(seen, -1).to(q.device).expand(q.shape[0], k_cmp.shape[2], -1, -1)
    offsets: Offsets = (None, None)
    if cu_seqlens_q is not None:
        ends = [sequence.blocks.stop for sequence in sequences(config, q.shape[1], tokens, *packing)]
        offsets = (cu_seqlens_q.contiguous(), cu_seqlens_q.new_tensor([0, *ends]))
    return _attend(q, k_cmp, v_cmp, scale, offsets, listed)


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    config: Any,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    positions = query_positions(q.shape[1], k.shape[1], cu_seqlens_q, cu_seqlens_k).to(q.device)
    size = config.select_block_size
    tokens = indices.transpose(1, 2)[..., None] * size + torch.arange(size, device=q.device)  # [B, Hk, Tq, N, l']
    listed = tokens.where(tokens <= positions[:, None, None], -1).flatten(-2)
    return _attend(q, k, v, scale, _both(cu_seqlens_q, cu_seqlens_k), listed)[0]


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: Any,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    parts = sequences(config, q.shape[1], k.shape[1], cu_seqlens_q, cu_seqlens_k)
    places = torch.cat([part.keys.start + part.positions for part in parts]).to(q.device)
    full = q.new_zeros(q.shape[0], k.shape[1], *q.shape[2:]).index_copy(1, places, q)
    _, keys = _both(cu_seqlens_q, cu_seqlens_k)
    return _attend(full, k, v, scale, (keys, keys), window=config.window_size)[0][:, places]


def attention_gym() -> Implementation:
    """The stages that the package can express, and what its documentation says of them."""
    fused = torch.cuda.is_available()
    return Implementation(
        name="attention_gym",
        compressed_attention=compressed_attention,
        selected_attention=selected_attention,
        sliding_window_attention=sliding_window_attention,
        dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16} | (set() if fused else {torch.float64})),
        devices=frozenset({"cuda"} if fused else {"cpu"}),
        deterministic=not fused,  # gradients of keys are atomic additions
        checks_input=False,
        hidden_values=False,
        head_dims=Sizes(1, 256),  # of keys and values together 512
    )


def _both(queries: Tensor | None, keys: Tensor | None) -> Offsets:
    """Offsets of queries and keys without strides."""
    if queries is None:
        return None, None
    return queries.contiguous(), (queries if keys is None else keys).contiguous()


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    offsets: Offsets,
    listed: Tensor | None = None,
    window: int = 0,
) -> tuple[Tensor, Tensor]:
    """`[B, Tq, Hq, Dv]` and log-sum-exp `[B, Tq, Hq]`, of the keys `listed` `[B, Hk, Tq, K]` or of the window."""
    batch, queries, heads, width = q.shape
    if not queries:  # it takes no queries without elements
        lse = q.new_empty(batch, 0, heads, dtype=torch.promote_types(q.dtype, torch.float32))
        return q.new_empty(batch, 0, heads, v.shape[-1]), lse
    pairs = torch.cat((k, v), -1).transpose(1, 2)
    results = []
    for head, query in enumerate(pad(q, (0, v.shape[-1])).transpose(1, 2).chunk(k.shape[2], 1)):
        pair = pairs[:, head : head + 1]
        if listed is None:
            local, pool, named = pair, pair[:, :, :0], torch.empty(batch, queries, 0, dtype=torch.int32)
        else:
            local, pool, named = pair.new_zeros(batch, 1, queries, pair.shape[-1]), pair, listed[:, head]
        out, more = gather_attn(
            query,
            local,
            pool,
            named.to(q.device),
            sliding_window_size=window,
            cu_seqlens=offsets[0],
            cu_seqlens_k=torch.zeros_like(offsets[1]) if listed is None and offsets[1] is not None else offsets[1],
            impl=Impl.FUSED if q.is_cuda else Impl.REFERENCE,
            scale=width**-0.5 if scale is None else scale,
            return_aux=AuxRequest(lse=True),
        )
        results.append((out[..., width:], more.lse.detach()))
    outs, lses = (torch.cat(parts, 1).transpose(1, 2) for parts in zip(*results, strict=True))
    return outs, lses
