"""A naive Native Sparse Attention, and what it says it can do: `make unit IMPL=docs.examples.my_nsa:my_nsa`."""

import torch

from validation.implementations import Implementation


def attend(q, k, v, seen, scale):
    """Attention `[B, Tq, Hq, Dv]` where `seen` `[B, Tq, Hk, keys]`, probabilities before it, and the log-sum-exp."""
    k, v, seen = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v, seen))
    scores = torch.einsum("bqhd,bkhd->bqhk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = scores.masked_fill(~seen, torch.finfo(q.dtype).min).softmax(-1) * seen
    lse = scores.masked_fill(~seen, -torch.inf).logsumexp(-1)
    return torch.einsum("bqhk,bkhd->bqhd", weights, v), weights, lse.detach()


def grid(q, keys, tokens):
    """Positions of the queries, the last of the tokens, and numbers of the keys: `[1, Tq, 1, 1]` and `[keys]`."""
    return torch.arange(tokens - q.shape[1], tokens).view(1, -1, 1, 1), torch.arange(keys)


def compress(x, params, config, *, cu_seqlens=None):
    blocks = (
        x.unfold(1, config.compress_block_size, config.compress_stride) if config.num_compressed(x.shape[1]) else None
    )
    return x[:, :0] if blocks is None else blocks.mean(-1)


def compressed(q, k, v, config, num_keys, scale):
    t, i = grid(q, k.shape[1], num_keys or q.shape[1])
    seen = i * config.compress_stride + config.compress_block_size - 1 <= t
    return attend(q, k, v, seen.expand(q.shape[0], -1, k.shape[2], -1), scale)


def compressed_attention(q, k_cmp, v_cmp, config, *, num_keys=None, scale=None):
    out, _, lse = compressed(q, k_cmp, v_cmp, config, num_keys, scale)
    return out, lse


@torch.no_grad()
def select_blocks(q, k_cmp, lse, config, *, num_keys=None, scale=None):
    tokens = num_keys or q.shape[1]
    _, weights, _ = compressed(q, k_cmp, k_cmp, config, num_keys, scale)
    (t, j), size = grid(q, config.num_selectable(tokens), tokens), config.select_block_size
    start = torch.arange(k_cmp.shape[1])[:, None] * config.compress_stride
    end = torch.minimum(start + config.compress_block_size, (j + 1) * size)
    overlap = (end - torch.maximum(start, j * size)).clamp(min=0) / config.compress_stride
    score = (weights @ overlap.to(q.dtype)).unflatten(2, (k_cmp.shape[2], -1)).sum(3)
    own = t // size
    forced = (j < config.num_initial_blocks) | (j > own - config.num_local_blocks)
    score = score.masked_fill(forced, torch.inf).masked_fill(j > own, -torch.inf)
    best = score.sort(dim=-1, descending=True, stable=True).indices[..., : config.num_selected_blocks]
    best = best.masked_fill(best > own, len(j)).sort(-1).values
    best = torch.nn.functional.pad(best, (0, config.num_selected_blocks - best.shape[-1]), value=len(j))
    return best.masked_fill(best == len(j), -1).int()


def selected_attention(q, k, v, indices, config, *, scale=None):
    t, s = grid(q, k.shape[1], k.shape[1])
    chosen = (indices[..., None] == s // config.select_block_size).any(-2)
    return attend(q, k, v, chosen & (s <= t), scale)[0]


def sliding_window_attention(q, k, v, config, *, scale=None):
    t, s = grid(q, k.shape[1], k.shape[1])
    seen = (s <= t) & (s > t - config.window_size)
    return attend(q, k, v, seen.expand(q.shape[0], -1, k.shape[2], -1), scale)[0]


def nsa_attention(
    q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, config, *, indices=None, return_indices=False, scale=None
):
    out, lse = compressed_attention(q, k_cmp, v_cmp, config, num_keys=k_slc.shape[1], scale=scale)
    if indices is None:
        indices = select_blocks(q, k_cmp, lse, config, num_keys=k_slc.shape[1], scale=scale)
    selected = selected_attention(q, k_slc, v_slc, indices, config, scale=scale)
    window = sliding_window_attention(q, k_win, v_win, config, scale=scale)
    out = (torch.stack([out, selected, window], -1) * gates[..., None, :]).sum(-1)
    return (out, indices) if return_indices else out


my_nsa = Implementation(
    name="my_nsa",
    compress=compress,
    compressed_attention=compressed_attention,
    select_blocks=select_blocks,
    selected_attention=selected_attention,
    sliding_window_attention=sliding_window_attention,
    nsa_attention=nsa_attention,
    dtypes=frozenset({torch.float64, torch.float32}),
    packed=False,
    checks_input=False,
    compressions=frozenset({"mean"}),
)
