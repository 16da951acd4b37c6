"""`fla-core`, the package of flash-linear-attention: mean-pooled blocks, all three sizes equal, groups from 16.

What is translated here is form, never arithmetic:

- It has `ceil(T / l)` blocks a sequence, the last one perhaps unfinished and never seen; ours are those that are full.
- A query that sees no block has log-sum-exp 0 there; ours is `-inf`. Its log-sum-exp takes no gradient, silently.
- Its selection comes by importance and in powers of two of slots, of which the first `n` are the best; ours ascends.
- It takes selected indices in powers of two of slots: the rest is filled with -1.
- The initial block and the last two are forced and cannot be changed; nor can keys be given a branch.
- It has no function for the window alone: `parallel_nsa` calls flash-attn's. Where that is not installed, PyTorch's
  attention under a mask stands in for it, with flash-attn's signature.

Read in version 0.6.0, which constraints.txt pins and the extra `peers` installs.
"""

import warnings
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from ..implementations import Implementation, Sizes, needing
from ..oracle import query_positions

with needing("fla", "fla-core"), warnings.catch_warnings():
    # That there is no GPU, or no flash-attn.
    warnings.simplefilter("ignore")
    from fla.ops.nsa import parallel
    from fla.ops.nsa.compression import parallel_nsa_compression
    from fla.ops.utils.pooling import mean_pooling

INTERPRETED = bool(triton.knobs.runtime.interpret)


def supports(config: Any) -> bool:
    """l = d = l', powers of two from 16, at least 2 n; 1 initial and 2 local"""
    size = config.select_block_size
    equal = config.compress_block_size == config.compress_stride == size
    forced = (config.num_initial_blocks, config.num_local_blocks) == (1, 2)
    return equal and forced and Sizes(16, powers_of_two=True)(size) and size >= 2 * _slots(config.num_selected_blocks)


def compress(x: Tensor, params: None, config: Any, *, cu_seqlens: Tensor | None = None) -> Tensor:
    pooled = mean_pooling(x, config.select_block_size, _long(cu_seqlens))
    ours, theirs, _ = _blocks(x.shape[1], config, cu_seqlens, x.device)
    out = x.new_zeros(x.shape[0], config.num_compressed(x.shape[1]), *x.shape[2:])
    return out.index_copy(1, ours, pooled[:, theirs])


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
    offsets = _offsets(cu_seqlens_q, cu_seqlens_k)
    k, v = (_theirs(x, tokens, config, cu_seqlens_k) for x in (k_cmp, v_cmp))
    out, lse = parallel_nsa_compression(q, k, v, tokens, config.select_block_size, scale, offsets)
    positions = query_positions(q.shape[1], tokens, cu_seqlens_q, cu_seqlens_k)
    blind = (positions + 1 < config.select_block_size).to(q.device)
    return out, lse.detach().masked_fill(blind[:, None], -torch.inf)


def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    config: Any,
    *,
    num_keys: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    tokens, count = num_keys or q.shape[1], config.num_selected_blocks
    indices = parallel.parallel_nsa_topk(
        q=q,
        k=_theirs(k_cmp, tokens, config, cu_seqlens_k),
        TK=tokens,
        lse=lse.masked_fill(lse.isinf(), 0.0),
        block_counts=count,
        block_size=config.select_block_size,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        cu_seqlens=_offsets(cu_seqlens_q, cu_seqlens_k),
    )
    return _ascending(indices[..., :count])


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
    return parallel.parallel_nsa(
        q,
        k,
        v,
        block_indices=_padded(indices),
        block_counts=_slots(indices.shape[-1]),
        block_size=config.select_block_size,
        scale=scale,
        cu_seqlens=_offsets(cu_seqlens_q, cu_seqlens_k),
    )


def nsa_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    config: Any,
    *,
    indices: Tensor | None = None,
    return_indices: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The whole from `k_slc` and `v_slc`, which those of the other branches are to be, or to be made of."""
    packing: dict[str, Any] = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "scale": scale}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`block_indices` is provided")
        out = parallel.parallel_nsa(
            q,
            k_slc,
            v_slc,
            *gates.unbind(-1),
            block_indices=None if indices is None else _padded(indices),
            block_counts=config.num_selected_blocks if indices is None else _slots(indices.shape[-1]),
            block_size=config.select_block_size,
            window_size=config.window_size,
            scale=scale,
            cu_seqlens=_offsets(cu_seqlens_q, cu_seqlens_k),
        )
    if not return_indices:
        return out
    if indices is None:
        _, lse = compressed_attention(q, k_cmp, v_cmp, config, num_keys=k_slc.shape[1], **packing)
        indices = select_blocks(q, k_cmp, lse, config, num_keys=k_slc.shape[1], **packing)
    return out, indices


def fla() -> Implementation:
    """The package's stages, and what its documentation and its code say they can do."""
    if parallel.flash_attn_func is None:
        parallel.flash_attn_func, parallel.flash_attn_varlen_func = _window, _packed_window
    return Implementation(
        name="fla",
        compress=compress,
        compressed_attention=compressed_attention,
        select_blocks=select_blocks,
        selected_attention=selected_attention,
        nsa_attention=nsa_attention,
        dtypes=frozenset({torch.float16, torch.bfloat16}),  # those of flash-attn; float32 products would be TF32
        devices=frozenset({"cpu", "cuda"} if INTERPRETED else {"cuda"}),
        deterministic=False,  # the order of a block's queries is that of atomic additions
        partial_queries_backward=False,
        own_keys=False,
        empty_queries=False,  # NaN: a division of nothing by nothing
        branches_off=False,
        checks_input=False,
        hidden_values=False,
        compressions=frozenset({"mean"}),
        head_dims=Sizes(16, 256),
        groups=Sizes(16, powers_of_two=True),
        config=supports,
        interpreted=INTERPRETED,
    )


# Offsets, blocks and indices in its form.


def _slots(count: int) -> int:
    return triton.next_power_of_2(count)


def _padded(indices: Tensor) -> Tensor:
    return pad(indices, (0, _slots(indices.shape[-1]) - indices.shape[-1]), value=-1)


def _ascending(indices: Tensor) -> Tensor:
    last = torch.iinfo(indices.dtype).max
    ordered = indices.masked_fill(indices < 0, last).sort(-1).values
    return ordered.masked_fill(ordered == last, -1)


def _long(offsets: Tensor | None) -> Tensor | None:
    return None if offsets is None else offsets.long()


def _offsets(queries: Tensor | None, keys: Tensor | None) -> Any:
    """One tensor where queries and keys have the same offsets: with two there is no backward pass."""
    if queries is None or keys is None or torch.equal(queries, keys):
        return _long(queries)
    return queries.long(), keys.long()


def _blocks(tokens: int, config: Any, cu_seqlens: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Where the full blocks of all sequences are among ours and among theirs, and how many theirs are in all."""
    size = config.select_block_size
    lengths = torch.tensor([tokens]) if cu_seqlens is None else cu_seqlens.diff().cpu()
    counts = -(-lengths // size)
    starts = counts.cumsum(0) - counts
    theirs = [start + torch.arange(int(length) // size) for start, length in zip(starts, lengths, strict=True)]
    found = torch.cat(theirs).to(device)
    return torch.arange(len(found), device=device), found, int(counts.sum())


def _theirs(x: Tensor, tokens: int, config: Any, cu_seqlens: Tensor | None) -> Tensor:
    """Our compressed keys or values `[B, C, Hk, D]` with room for blocks that are not full."""
    ours, theirs, room = _blocks(tokens, config, cu_seqlens, x.device)
    return x.new_zeros(x.shape[0], room, *x.shape[2:]).index_copy(1, theirs, x[:, ours])


# flash-attn's window, where flash-attn is missing.


def _window(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, *, causal: bool, window_size: tuple[int, int]
) -> Tensor:
    distance = torch.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None] - torch.arange(k.shape[1])
    mask = (distance >= 0) & (distance <= window_size[0])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=softmax_scale, enable_gqa=True).transpose(1, 2)


def _packed_window(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **options: Any
) -> Tensor:
    options = {name: x for name, x in options.items() if not name.startswith("max_seqlen")}
    queries, keys = (offsets.diff().tolist() for offsets in (cu_seqlens_q, cu_seqlens_k))
    parts = zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
    return torch.cat([_window(*(x[None] for x in part), **options)[0] for part in parts])
