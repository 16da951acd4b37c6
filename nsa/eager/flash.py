"""Softmax attention of one tile, `M` query rows over `L` keys, forward and backward: the arithmetic of every branch.

    p = softmax(scale q k^T),      out = p v,                lse = logsumexp(scale q k^T)
    delta = rowsum(dout out),      ds = p (dout v^T - delta)
    dq = scale ds k,               dk = scale ds^T q,        dv = p^T dout

A mask is given as a distance, `[..., M, L]`: a row sees the keys at distance 0 or less, and the others are masked.

Where everything is finite, the distance is added to the scores as a large negative number, because a boolean mask takes
several times as long on a CPU. An infinity or a NaN in a masked key would survive that (0 times NaN is NaN). With
`nonfinite=True` masks are therefore boolean, and rows that are not finite are taken out of the products; whoever sees
such a row gets NaN.
"""

import torch
from torch import Tensor

_MASKED = -1e30
"""Score of a masked key: far below any other, and finite, so that a row that sees nothing does not become NaN."""


def may_be_nonfinite(*tensors: Tensor) -> bool:
    """Whether any element may be an infinity or a NaN; true on a GPU, which is not waited for."""
    return tensors[0].device.type != "cpu" or not all(bool(x.isfinite().all()) for x in tensors)


def zero_rows(x: Tensor, rows: Tensor) -> Tensor:
    """`x [..., M, D]` with 0 in the rows where `rows [..., M]` is true."""
    return x.masked_fill(rows.unsqueeze(-1), 0)


def _nonfinite_rows(x: Tensor) -> Tensor:
    """The rows of `x [..., M, D]` that hold an infinity or a NaN, as a mask `[..., M]`."""
    return ~x.isfinite().all(-1)


def probabilities(q: Tensor, k: Tensor, distance: Tensor, scale: float, nonfinite: bool) -> tuple[Tensor, Tensor]:
    """Softmax over the visible keys, `[..., M, L]`, and its lse, `[..., M]`.

    The lse of a row that sees nothing is `-inf`; its probabilities mean nothing.
    """
    scores = (q * scale) @ k.mT
    if not scores.shape[-1]:
        return scores, scores.new_full(scores.shape[:-1], -torch.inf)
    if nonfinite:
        scores.masked_fill_(distance > 0, _MASKED)
    else:
        scores.add_(distance.clamp(0, 1).to(q.dtype) * _MASKED)
    row_max = scores.amax(-1)
    p = scores.softmax(-1)
    # The largest probability is exp(row_max - lse).
    lse = (row_max - p.amax(-1).log_()).masked_fill_(row_max < _MASKED / 2, -torch.inf)
    return (p.masked_fill_(distance > 0, 0) if nonfinite else p), lse


def attend(q: Tensor, k: Tensor, v: Tensor, distance: Tensor, scale: float, nonfinite: bool) -> tuple[Tensor, Tensor]:
    """Attention of `q [..., M, Dk]` over `k [..., L, Dk]` and `v [..., L, Dv]`.

    Returns:
        Output `[..., M, Dv]` and lse `[..., M]`; 0 and `-inf` for a row that sees nothing.
    """
    p, lse = probabilities(q, k, distance, scale, nonfinite)
    if not nonfinite:
        return zero_rows(p @ v, lse == -torch.inf), lse
    bad = _nonfinite_rows(v)
    out = p @ zero_rows(v, bad)
    return out.masked_fill_(((distance <= 0) & bad.unsqueeze(-2)).any(-1, keepdim=True), torch.nan), lse


def attend_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    distance: Tensor,
    scale: float,
    nonfinite: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend`: `dq [..., M, Dk]`, `dk [..., L, Dk]` and `dv [..., L, Dv]`."""
    p, _ = probabilities(q, k, distance, scale, nonfinite)
    dout = zero_rows(dout, lse == -torch.inf)
    delta = (out * dout).sum(-1, keepdim=True)
    ds = (dout @ v.mT).sub_(delta).mul_(p)
    if nonfinite:
        bad = _nonfinite_rows(dout)
        p = p.masked_fill((distance <= 0) & bad.unsqueeze(-1), torch.nan)
        ds.masked_fill_(distance > 0, 0)
        dout = zero_rows(dout, bad)
        q, k = zero_rows(q, _nonfinite_rows(q)), zero_rows(k, _nonfinite_rows(k))
    return (ds @ k) * scale, ds.mT @ (q * scale), p.mT @ dout
