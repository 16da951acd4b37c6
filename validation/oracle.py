"""Native Sparse Attention by definition, in float64 and with dense masks: what every implementation is judged by.

Written from the paper (arXiv 2502.11089, section 3) and the project's semantics alone; it imports nothing from `nsa`.
Every rule is stated once, for one sequence, and packed input is cut into its sequences first. Inputs of any floating
dtype are promoted to float64, so their quantisation is never mistaken for an implementation's error. Everything but
the selection is differentiable by autograd.

Shapes: `B` batch, `T` tokens (`Tq`, `Tk` where they differ), `C` compressed blocks, `S` selection blocks, `Hq`, `Hk`
heads, `G = Hq / Hk`, `D` head dim (`Dk`, `Dv` where they differ), `N` selected blocks, `F` hidden width.
`config` is any object with the attributes of `nsa.NSAConfig`; `params` any with `.position`, `.weight`, `.weight_out`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import accumulate, pairwise
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, silu

_working: ContextVar[torch.dtype] = ContextVar("working dtype", default=torch.float64)


@contextmanager
def computing_in(dtype: torch.dtype) -> Iterator[None]:
    """The same definitions in a narrow dtype, every operation rounded to it: what plain PyTorch makes of them."""
    token = _working.set(dtype)
    try:
        yield
    finally:
        _working.reset(token)


def _work(x: Tensor) -> Tensor:
    return x.to(_working.get())


class Sequence(NamedTuple):
    """Where one packed sequence stands among all queries, all keys and all compressed blocks."""

    queries: slice
    keys: slice
    blocks: slice

    @property
    def positions(self) -> Tensor:
        """Positions `[Tq]` of the queries in their own sequence: they are its last tokens."""
        num_queries, num_keys = (part.stop - part.start for part in (self.queries, self.keys))
        return torch.arange(num_keys - num_queries, num_keys)


def num_compressed(num_keys: int, config: Any) -> int:
    """Compressed blocks `C` of a sequence of `num_keys` tokens (section 3.3.1, equation 7)."""
    return max(0, (num_keys - config.compress_block_size) // config.compress_stride + 1)


def sequences(
    config: Any, num_queries: int, num_keys: int, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None
) -> list[Sequence]:
    """The sequences of a batch: one unless packed; keys are packed like the queries unless told otherwise."""
    if cu_seqlens_q is None:
        return [Sequence(slice(0, num_queries), slice(0, num_keys), slice(0, num_compressed(num_keys, config)))]
    cu_queries = cu_seqlens_q.tolist()
    cu_keys = cu_queries if cu_seqlens_k is None else cu_seqlens_k.tolist()
    counts = [num_compressed(stop - start, config) for start, stop in pairwise(cu_keys)]
    cu_blocks = list(accumulate(counts, initial=0))
    slices = [[slice(*pair) for pair in pairwise(bounds)] for bounds in (cu_queries, cu_keys, cu_blocks)]
    return list(map(Sequence, *slices))


def query_positions(
    num_queries: int, num_keys: int, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None
) -> Tensor:
    """Position `[Tq]` of every query in its own sequence."""
    no_blocks = SimpleNamespace(compress_block_size=1, compress_stride=1)
    parts = sequences(no_blocks, num_queries, num_keys, cu_seqlens_q, cu_seqlens_k)
    return torch.cat([sequence.positions for sequence in parts])


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Softmax attention over the keys a mask allows; a query that sees none gets 0 and `-inf`.

    Args:
        q: `[B, Tq, Hq, Dk]`. k: `[B, Tk, Hk, Dk]`. v: `[B, Tk, Hk, Dv]`.
        mask: true where visible, broadcastable to `[B, Tq, Hk, Tk]`.

    Returns:
        Output `[B, Tq, Hq, Dv]` and natural log-sum-exp `[B, Tq, Hq]`.
    """
    p, lse = probabilities(q, k, mask, scale)
    return torch.einsum("bthgs,bshd->bthgd", p, _work(v)).flatten(2, 3), lse.flatten(2, 3)


def probabilities(q: Tensor, k: Tensor, mask: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Softmax over the visible keys `[B, Tq, Hk, G, Tk]` and its log-sum-exp `[B, Tq, Hk, G]`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    grouped = _work(q).unflatten(2, (k.shape[2], q.shape[2] // k.shape[2]))  # query head h belongs to KV head h // G
    scores = scale * torch.einsum("bthgd,bshd->bthgs", grouped, _work(k))
    mask = mask.to(q.device).unsqueeze(-2).expand_as(scores)
    scores = scores.masked_fill(~mask, float("-inf"))
    blind = ~mask.any(-1, keepdim=True)
    # A row of -inf would make softmax, and its gradient, NaN: such rows are made flat and then zeroed by the mask.
    p = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(~mask, 0.0)
    return p, scores.detach().logsumexp(-1)


def compress(x: Tensor, params: Any, config: Any, *, cu_seqlens: Tensor | None = None) -> Tensor:
    """Keys or values `[B, T, Hk, D]` to block vectors `[B, C, Hk, D]` (section 3.3.1, equation 7).

    Packed blocks stand consecutively, a sequence after another; `C` counts as if all `T` tokens were one sequence and
    the rows left over at the end are zero.
    """
    parts = [
        _compress_one(_work(x[:, sequence.keys]), params, config)
        for sequence in sequences(config, x.shape[1], x.shape[1], cu_seqlens)
    ]
    blocks = torch.cat(parts, dim=1)
    return pad(blocks, (0, 0, 0, 0, 0, num_compressed(x.shape[1], config) - blocks.shape[1]))


def _compress_one(x: Tensor, params: Any, config: Any) -> Tensor:
    starts = config.compress_stride * torch.arange(num_compressed(x.shape[1], config))
    tokens = starts[:, None] + torch.arange(config.compress_block_size)  # [C, l]
    blocks = x[:, tokens].transpose(2, 3)  # [B, C, Hk, l, D]
    if config.compression == "mean":
        return blocks.mean(-2)
    hidden = torch.einsum("bchi,hij->bchj", (blocks + _work(params.position)).flatten(-2), _work(params.weight))
    if config.compression == "linear":
        return hidden
    return torch.einsum("bchf,hfd->bchd", silu(hidden), _work(params.weight_out))


def _block_mask(positions: Tensor, config: Any, count: int) -> Tensor:
    """Compressed blocks each query sees `[Tq, 1, C]`: those that end at or before it."""
    last_tokens = torch.arange(count) * config.compress_stride + config.compress_block_size - 1
    return (last_tokens <= positions[:, None])[:, None]


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
    """Attention to compressed blocks (section 3.3.1).

    Args:
        q: `[B, Tq, Hq, Dk]`. k_cmp: `[B, C, Hk, Dk]`. v_cmp: `[B, C, Hk, Dv]`.
        num_keys: uncompressed keys `Tk` behind the blocks; `Tq` by default.

    Returns:
        Output `[B, Tq, Hq, Dv]` and log-sum-exp `[B, Tq, Hq]`, which carries no gradient.
    """
    num_keys = q.shape[1] if num_keys is None else num_keys
    parts = []
    for sequence in sequences(config, q.shape[1], num_keys, cu_seqlens_q, cu_seqlens_k):
        keys, values = k_cmp[:, sequence.blocks], v_cmp[:, sequence.blocks]
        mask = _block_mask(sequence.positions, config, keys.shape[1])
        parts.append(attend(q[:, sequence.queries], keys, values, mask, scale))
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, dim=1), torch.cat(lses, dim=1)


def importance(
    q: Tensor,
    k_cmp: Tensor,
    config: Any,
    *,
    num_keys: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Importance of every selection block to every query and KV head (section 3.3.2, equations 8 to 10).

    Args:
        q: `[B, Tq, Hq, Dk]`. k_cmp: `[B, C, Hk, Dk]`.

    Returns:
        `[B, Tq, Hk, S]`, `S` the selection blocks of all `Tk` keys taken as one sequence; blocks are counted within
        the query's own sequence.
    """
    num_keys = q.shape[1] if num_keys is None else num_keys
    parts = []
    for sequence in sequences(config, q.shape[1], num_keys, cu_seqlens_q, cu_seqlens_k):
        keys = k_cmp[:, sequence.blocks]
        mask = _block_mask(sequence.positions, config, keys.shape[1])
        p, _ = probabilities(q[:, sequence.queries].detach(), keys.detach(), mask, scale)
        weights = overlap(keys.shape[1], _num_selectable(num_keys, config), config) / config.compress_stride
        parts.append(torch.einsum("bthgc,cs->bths", p, weights.to(q.device)))
    return torch.cat(parts, dim=1)


def _num_selectable(num_keys: int, config: Any) -> int:
    return -(-num_keys // config.select_block_size)


def overlap(num_blocks: int, num_selectable: int, config: Any) -> Tensor:
    """Tokens that compressed block `i` and selection block `j` have in common, `[C, S]`."""
    start = torch.arange(num_blocks)[:, None] * config.compress_stride
    select_start = torch.arange(num_selectable) * config.select_block_size
    stop = torch.minimum(start + config.compress_block_size, select_start + config.select_block_size)
    return _work((stop - torch.maximum(start, select_start)).clamp(min=0))


def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor | None,
    config: Any,
    *,
    num_keys: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The blocks every query attends to: forced ones first, then by importance (section 3.3.2, equations 11, 12).

    Args:
        q: `[B, Tq, Hq, Dk]`. k_cmp: `[B, C, Hk, Dk]`.
        lse: of the compressed branch; the oracle normalises afresh and does not read it.

    Returns:
        int32 `[B, Tq, Hk, N]`, ascending and ended with -1, counted within the query's own sequence.
    """
    num_keys = q.shape[1] if num_keys is None else num_keys
    scores = importance(
        q, k_cmp, config, num_keys=num_keys, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, scale=scale
    )
    own = query_positions(q.shape[1], num_keys, cu_seqlens_q, cu_seqlens_k)[:, None, None] // config.select_block_size
    block = torch.arange(scores.shape[-1])
    candidate = block <= own  # [Tq, 1, S]
    forced = candidate & ((block < config.num_initial_blocks) | (block > own - config.num_local_blocks))
    # Importance is at most finite and never negative, so these two values put every block in its class.
    ranked = scores.masked_fill(forced, float("inf")).masked_fill(~candidate, float("-inf"))
    order = _order(ranked)
    order = order.masked_fill(~candidate.expand_as(order).gather(-1, order), scores.shape[-1])
    order = pad(order, (0, config.num_selected_blocks), value=scores.shape[-1])[..., : config.num_selected_blocks]
    order = order.sort(dim=-1).values
    return order.masked_fill(order == scores.shape[-1], -1).int().to(q.device)


def _order(ranked: Tensor) -> Tensor:
    """Blocks by rank, the best first; ties go to the lower index."""
    return ranked.argsort(dim=-1, descending=True, stable=True)


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
    """Attention to the tokens at or before the query in its selected blocks (section 3.3.2).

    Args:
        q: `[B, Tq, Hq, Dk]`. k: `[B, Tk, Hk, Dk]`. v: `[B, Tk, Hk, Dv]`.
        indices: `[B, Tq, Hk, N]`, any order; -1 and blocks beyond the query stand for nothing.

    Returns:
        `[B, Tq, Hq, Dv]`.
    """
    parts = []
    for sequence in sequences(config, q.shape[1], k.shape[1], cu_seqlens_q, cu_seqlens_k):
        keys, values, chosen = k[:, sequence.keys], v[:, sequence.keys], indices[:, sequence.queries]
        token = torch.arange(keys.shape[1])
        member = (chosen[..., None] == token // config.select_block_size).any(-2)  # [B, Tq, Hk, Tk]
        mask = member & (token <= sequence.positions[:, None])[:, None]
        parts.append(attend(q[:, sequence.queries], keys, values, mask, scale)[0])
    return torch.cat(parts, dim=1)


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
    """Attention to the last `w` tokens, the query's own included (section 3.3.3).

    Args:
        q: `[B, Tq, Hq, Dk]`. k: `[B, Tk, Hk, Dk]`. v: `[B, Tk, Hk, Dv]`.

    Returns:
        `[B, Tq, Hq, Dv]`.
    """
    parts = []
    for sequence in sequences(config, q.shape[1], k.shape[1], cu_seqlens_q, cu_seqlens_k):
        keys, values = k[:, sequence.keys], v[:, sequence.keys]
        distance = sequence.positions[:, None] - torch.arange(keys.shape[1])
        mask = ((distance >= 0) & (distance < config.window_size))[:, None]
        parts.append(attend(q[:, sequence.queries], keys, values, mask, scale)[0])
    return torch.cat(parts, dim=1)


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
    """The gated sum of the three branches (section 3.2, equation 5).

    Args:
        q: `[B, Tq, Hq, Dk]`. k_cmp, v_cmp: `[B, C, Hk, Dk or Dv]`. k_slc, v_slc, k_win, v_win: `[B, Tk, Hk, Dk or Dv]`.
        gates: `[B, Tq, Hq, 3]` in the order compressed, selected, window.
        indices: int32 `[B, Tq, Hk, N]` in place of the selection.

    Returns:
        `[B, Tq, Hq, Dv]`, and the indices used if `return_indices`.
    """
    packing: dict[str, Any] = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "scale": scale}
    num_keys = k_slc.shape[1]
    compressed, lse = compressed_attention(q, k_cmp, v_cmp, config, num_keys=num_keys, **packing)
    if indices is None:
        indices = select_blocks(q, k_cmp, lse, config, num_keys=num_keys, **packing)
    selected = selected_attention(q, k_slc, v_slc, indices, config, **packing)
    window = sliding_window_attention(q, k_win, v_win, config, **packing)
    out = (_work(gates).unsqueeze(-2) * torch.stack([compressed, selected, window], dim=-1)).sum(-1)
    return (out, indices) if return_indices else out


def rotate(x: Tensor, rope: Tensor | None, positions: Tensor) -> Tensor:
    """Rotate the pairs `(x[2i], x[2i+1])` of `[B, T, H, D]` as complex numbers by row `positions[t]` of the table.

    `rope` is `[L, D/2, 2]`, cosine and sine; None leaves `x` as it is.
    """
    if rope is None:
        return x
    turn = torch.view_as_complex(rope.double().contiguous())[positions][:, None]  # [T, 1, D/2]
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)


def native_sparse_attention(
    x: Tensor,
    weights: Mapping[str, Tensor],
    config: Any,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rope: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    gate_activation: str = "sigmoid",
) -> Tensor:
    """The whole layer (section 3): projections, RoPE, compression, gates, the three branches, output projection.

    Args:
        x: `[B, T, dim]`.
        weights: tensors named as in the module's `state_dict`.
        rope: cosines and sines `[L, D/2, 2]`.
        gate_activation: `"sigmoid"` or `"softmax"`.

    Returns:
        `[B, T, dim]`.
    """
    x, weights = _work(x), {name: _work(weight) for name, weight in weights.items()}
    branches = 1 if config.shared_kv else 3
    q, k, v = (x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0) for name in ("wq", "wk", "wv"))
    q = q.unflatten(-1, (num_heads, head_dim))
    k, v = (y.unflatten(-1, (num_kv_heads, branches, head_dim)) for y in (k, v))
    (k_cmp, k_slc, k_win), (v_cmp, v_slc, v_win) = (
        y.expand(-1, -1, -1, 3, -1).unbind(-2) if config.shared_kv else y.unbind(-2) for y in (k, v)
    )
    gates = _gates(x, weights, gate_activation).expand(-1, -1, num_heads, -1)

    k_cmp, v_cmp = (
        compress(y, _compression_params(weights, name, num_kv_heads), config, cu_seqlens=cu_seqlens)
        for y, name in ((k_cmp, "compress_k"), (v_cmp, "compress_v"))
    )
    tokens = x.shape[1]
    positions = query_positions(tokens, tokens, cu_seqlens)
    starts = torch.zeros(k_cmp.shape[1], dtype=torch.long)
    for sequence in sequences(config, tokens, tokens, cu_seqlens):
        starts[sequence.blocks] = config.compress_stride * torch.arange(sequence.blocks.stop - sequence.blocks.start)
    q, k_slc, k_win = (rotate(y, rope, positions) for y in (q, k_slc, k_win))
    k_cmp = rotate(k_cmp, rope, starts)

    out = nsa_attention(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, config, cu_seqlens_q=cu_seqlens)
    assert isinstance(out, Tensor)
    return out.flatten(-2) @ weights["wo.weight"].T


def _gates(x: Tensor, weights: Mapping[str, Tensor], activation: str) -> Tensor:
    """`[B, T, Hq, 3]`, or `[B, T, 1, 3]`; by an MLP where there are two layers of weights."""
    last = "wg"
    if "wg.0.weight" in weights:
        hidden = x @ weights["wg.0.weight"].T + weights["wg.0.bias"]
        x, last = hidden / (1 + (-hidden).exp()), "wg.2"
    logits = (x @ weights[f"{last}.weight"].T + weights[f"{last}.bias"]).unflatten(-1, (-1, 3))
    powers = logits.exp()
    return powers / (powers.sum(-1, keepdim=True) if activation == "softmax" else 1 + powers)


def _compression_params(weights: Mapping[str, Tensor], name: str, num_kv_heads: int) -> SimpleNamespace:
    by_head = {field: weights.get(f"{name}.{field}") for field in ("position", "weight", "weight_out")}
    return SimpleNamespace(
        **{field: None if rows is None else rows.unflatten(0, (num_kv_heads, -1)) for field, rows in by_head.items()}
    )
