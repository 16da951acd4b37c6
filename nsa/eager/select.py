"""Selection: the importance of every block to a query, and the `n` blocks it attends to (paper, section 3.3.2)."""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa.config import NSAConfig
from nsa.eager.compressed import visible_blocks
from nsa.eager.flash import may_be_nonfinite, probabilities, zero_rows
from nsa.eager.layout import grouped, head_major, token_major
from nsa.eager.operators import no_autocast
from nsa.eager.tiles import segments
from nsa.ops import Operator, config_of, sizes_of
from nsa.varlen import Varlen, tensors_of, varlen_of


def _importance(p: Tensor, num_blocks: int, config: NSAConfig) -> Tensor:
    """Importance `[..., S]` of selection blocks: compressed probabilities `[..., C]` by overlap (equation 9).

    The sum over the few overlapping blocks is written out, so that equal inputs give exactly equal importances.
    """
    length, stride, size = config.compress_block_size, config.compress_stride, config.select_block_size
    ratio, earlier = size // stride, length // stride - 1
    padded = F.pad(p, (earlier, num_blocks * ratio - p.shape[-1]))
    total = p.new_zeros(*p.shape[:-1], num_blocks)
    for tap in range(earlier + ratio):
        start = (tap - earlier) * stride
        overlap = min(start + length, size) - max(start, 0)
        total += padded[..., tap : tap + (num_blocks - 1) * ratio + 1 : ratio] * (overlap / stride)
    return total


def _top_blocks(importance: Tensor, positions: Tensor, config: NSAConfig) -> Tensor:
    """The chosen blocks `[..., c, N]`, ascending with `-1` at the end (equations 11 and 12).

    Args:
        importance: `[..., c, S]`.
        positions: `[c]`, positions of the queries.
    """
    wanted, blocks = config.num_selected_blocks, importance.shape[-1]
    block = torch.arange(blocks, device=importance.device)
    own = (positions // config.select_block_size).unsqueeze(-1)
    # NaN becomes the largest finite score, below that of the forced blocks.
    score = importance.nan_to_num(nan=torch.finfo(importance.dtype).max, posinf=torch.inf)
    score = score.masked_fill_(config.forced(block, own), torch.inf).masked_fill_(block > own, -torch.inf)
    # A stable sort sends ties to the lower index; topk promises no order.
    best, chosen = score.sort(dim=-1, descending=True, stable=True)
    best, chosen = best[..., :wanted], chosen[..., :wanted]
    ascending = chosen.masked_fill(best == -torch.inf, blocks).sort(dim=-1).values
    ascending = ascending.masked_fill(ascending == blocks, -1)
    return F.pad(ascending, (0, wanted - ascending.shape[-1]), value=-1)


def _choose_blocks(
    q: Tensor,
    k_cmp: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    cu_blocks: Tensor | None,
    queries: Tensor | None,
    num_keys: int,
    sizes: Sequence[int],
    scale: float,
) -> Tensor:
    """Indices `[B, Tq, Hk, N]` for `q [B, Tq, Hq, Dk]` and `k_cmp [B, C, Hk, Dk]`, from probabilities made anew."""
    config, heads = config_of(sizes), k_cmp.shape[2]
    indices = q.new_full((q.shape[0], heads, q.shape[1], config.num_selected_blocks), -1, dtype=torch.int32)
    if not indices.numel():
        return token_major(indices, torch.int32)
    varlen = varlen_of(cu_seqlens_q, cu_seqlens_k, cu_blocks, queries)
    sequences = segments(q.shape[1], num_keys, varlen, config)
    grouped_q, keys = grouped(q, heads), head_major(k_cmp)
    nonfinite = may_be_nonfinite(q, k_cmp)
    with no_autocast(q):
        for tile, span, distance in visible_blocks(q, k_cmp, sequences, config):
            rows = grouped_q[:, :, tile.queries].flatten(2, 3)
            p, lse = probabilities(rows, keys[:, :, span], distance, scale, nonfinite)
            p = zero_rows(p, lse == -torch.inf).unflatten(2, (-1, grouped_q.shape[3])).sum(3)
            importance = _importance(p, tile.last // config.select_block_size + 1, config)
            indices[:, :, tile.queries] = _top_blocks(importance, tile.positions(q.device), config).int()
    return token_major(indices, torch.int32)


def _fake(q: Tensor, k_cmp: Tensor, *inputs: Any) -> Tensor:
    sizes = inputs[-2]
    return q.new_empty((*q.shape[:2], k_cmp.shape[2], config_of(sizes).num_selected_blocks), dtype=torch.int32)


_select = Operator("nsa_eager::select_blocks", _choose_blocks, _fake)


def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    config: NSAConfig,
    num_keys: int,
    varlen: Varlen | None,
    scale: float,
) -> Tensor:
    """Indices `[B, Tq, Hk, N]`; see `nsa.functional.select_blocks`. `lse` is not used: it would save nothing here."""
    rest = (*tensors_of(varlen), num_keys, sizes_of(config), scale)
    return cast(Tensor, _select(q.detach(), k_cmp.detach(), *rest))
