"""Somebody's Native Sparse Attention, in plain PyTorch, which knows nothing of this repository.

Heads come before tokens: `q` is `[B, Hq, Tq, D]`, keys and values are `[B, Hk, T, D]`. Queries have positions `t`.
"""

from typing import NamedTuple

import torch

NOTHING = 2**31 - 1
"""In place of a block."""


class Settings(NamedTuple):
    pool: int
    stride: int
    block: int
    count: int
    first: int
    near: int
    window: int


def pooled(x, s):
    return x.unfold(2, s.pool, s.stride).mean(-1) if x.shape[2] >= s.pool else x[:, :, :0]


def attention(q, k, v, visible, scale):
    """Output, probabilities and log-sum-exp; queries that see nothing have an output of 0."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~visible, -torch.inf)
    weights = scores.softmax(-1).masked_fill(~visible, 0.0)
    return weights @ v, weights, scores.logsumexp(-1)


def compressed(q, k, v, t, s, scale=None):
    finished = torch.arange(k.shape[2]) * s.stride + s.pool - 1 <= t[:, None]
    return attention(q, k, v, finished, scale)


def choose(q, k, t, s, scale=None):
    """Blocks `[B, Hk, Tq, count]`, or as many as there are, the most important first."""
    _, weights, _ = compressed(q, k, k, t, s, scale)
    start, block = torch.arange(k.shape[2])[:, None] * s.stride, torch.arange(int(t[-1]) // s.block + 1)
    end = torch.minimum(start + s.pool, (block + 1) * s.block)
    common = (end - torch.maximum(start, block * s.block)).clamp(min=0) / s.stride
    score = (weights @ common.to(q.dtype)).unflatten(1, (k.shape[1], -1)).sum(2)
    own = t[:, None] // s.block
    score = score.masked_fill((block < s.first) | (block > own - s.near), torch.inf).masked_fill(
        block > own, -torch.inf
    )
    best = score.sort(dim=-1, descending=True, stable=True).indices[..., : s.count]
    return best.masked_fill(best > own, NOTHING)


def selected(q, k, v, chosen, t, s, scale=None):
    token = torch.arange(k.shape[2])
    visible = (chosen[..., None] == token // s.block).any(-2) & (token <= t[:, None])
    return attention(q, k, v, visible.repeat_interleave(q.shape[1] // k.shape[1], 1), scale)[0]


def window(q, k, v, t, s, scale=None):
    distance = t[:, None] - torch.arange(k.shape[2])
    return attention(q, k, v, (distance >= 0) & (distance < s.window), scale)[0]


def nsa(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, t, s, chosen=None, scale=None):
    """The gated sum, gates `[B, Hq, Tq, 3]`, and the blocks that were chosen."""
    if chosen is None:
        chosen = choose(q, k_cmp, t, s, scale)
    branches = (
        compressed(q, k_cmp, v_cmp, t, s, scale)[0],
        selected(q, k_slc, v_slc, chosen, t, s, scale),
        window(q, k_win, v_win, t, s, scale),
    )
    return sum(gate[..., None] * branch for gate, branch in zip(gates.unbind(-1), branches, strict=True)), chosen
