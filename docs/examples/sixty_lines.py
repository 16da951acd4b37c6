"""Native Sparse Attention in sixty lines of plain PyTorch: `nsa-validate sixty_lines:mine` validates it."""

import torch
from nsa_validation.implementations import Implementation


def attend(q, k, v, visible, scale):
    """Softmax attention to what is visible `[B, H, Tq, Tk]`; the output of a query that sees nothing is 0."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, 2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~visible, -torch.inf)
    weights = scores.softmax(-1).masked_fill(~visible, 0)
    return torch.einsum("bhts,bshd->bthd", weights, v), weights, scores.logsumexp(-1).transpose(1, 2)


def positions(queries, keys):
    return torch.arange(keys - queries, keys)[:, None]


def compress(x, params, config, *, cu_seqlens=None):
    length, stride = config.compress_block_size, config.compress_stride
    return x.unfold(1, length, stride).mean(-1) if x.shape[1] >= length else x[:, :0]


def compressed(q, k, v, config, num_keys, scale):
    last = torch.arange(k.shape[1]) * config.compress_stride + config.compress_block_size - 1
    return attend(q, k, v, last <= positions(q.shape[1], num_keys or q.shape[1]), scale)


def compressed_attention(q, k, v, config, *, num_keys=None, scale=None):
    out, _, lse = compressed(q, k, v, config, num_keys, scale)
    return out, lse.detach()


def select_blocks(q, k, lse, config, *, num_keys=None, scale=None):
    num_keys, size, n = num_keys or q.shape[1], config.select_block_size, config.num_selected_blocks
    weights = compressed(q, k, k, config, num_keys, scale)[1].unflatten(1, (k.shape[2], -1)).sum(2)
    start, block = torch.arange(k.shape[1])[:, None] * config.compress_stride, torch.arange(-(-num_keys // size) + n)
    overlap = (start + config.compress_block_size).minimum((block + 1) * size) - start.maximum(block * size)
    own = positions(q.shape[1], num_keys) // size
    worth = weights @ (overlap.clamp(min=0) / config.compress_stride).to(weights)
    worth = worth.masked_fill((block < config.num_initial_blocks) | (block > own - config.num_local_blocks), torch.inf)
    best = worth.masked_fill(block > own, -1).sort(dim=-1, descending=True, stable=True).indices[..., :n]
    best = best.masked_fill(best > own, len(block)).sort(-1).values
    return best.masked_fill(best == len(block), -1).transpose(1, 2).int()


def selected_attention(q, k, v, indices, config, *, scale=None):
    token = torch.arange(k.shape[1])
    member = (indices.transpose(1, 2)[..., None] == token // config.select_block_size).any(-2)
    visible = member & (token <= positions(q.shape[1], k.shape[1]))
    return attend(q, k, v, visible.repeat_interleave(q.shape[2] // k.shape[2], 1), scale)[0]


def sliding_window_attention(q, k, v, config, *, scale=None):
    back = positions(q.shape[1], k.shape[1]) - torch.arange(k.shape[1])
    return attend(q, k, v, (back >= 0) & (back < config.window_size), scale)[0]


def nsa_attention(q, kc, vc, ks, vs, kw, vw, gates, config, *, indices=None, return_indices=False, scale=None):
    out, lse = compressed_attention(q, kc, vc, config, num_keys=ks.shape[1], scale=scale)
    if indices is None:
        indices = select_blocks(q, kc, lse, config, num_keys=ks.shape[1], scale=scale)
    branches = (
        out,
        selected_attention(q, ks, vs, indices, config, scale=scale),
        sliding_window_attention(q, kw, vw, config, scale=scale),
    )
    out = sum(gate[..., None] * branch for gate, branch in zip(gates.unbind(-1), branches, strict=True))
    return (out, indices) if return_indices else out


mine = Implementation(
    "mine", compress, compressed_attention, select_blocks, selected_attention, sliding_window_attention, nsa_attention,
    dtypes=frozenset({torch.float64, torch.float32}), packed=False, checks_input=False, hidden_values=False,
    compressions=frozenset({"mean"}),
)  # fmt: skip
