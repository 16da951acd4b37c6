"""Attention of the last tokens of sequences over a cache, one sequence after the other."""

import torch
from torch import Tensor

from nsa.config import NSAConfig
from nsa.eager.compressed import compressed_attention
from nsa.eager.gates import combine
from nsa.eager.select import select_blocks
from nsa.eager.selected import selected_attention
from nsa.eager.window import sliding_window_attention


def decode_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    lengths: Tensor,
    gates: Tensor,
    config: NSAConfig,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output `[B, Tq, Hq, Dv]` and the indices used; see `nsa.decode.decode_attention`."""
    outs, used, rest = [], [], (None, scale)
    for row, length in enumerate(lengths.clamp(max=k_slc.shape[1]).tolist()):
        one = slice(row, row + 1)
        query, blocks, size = q[one], config.num_compressed(length), max(1, k_win.shape[1])
        compressed, lse = compressed_attention(query, k_cmp[one, :blocks], v_cmp[one, :blocks], config, length, *rest)
        indices = select_blocks(query, k_cmp[one, :blocks], lse, config, length, *rest)
        selected, _ = selected_attention(query, k_slc[one, :length], v_slc[one, :length], indices, config, *rest)
        seen = min(length, q.shape[1] + max(config.window_size - 1, 0), k_win.shape[1] or length)
        slots = torch.arange(length - seen, length, device=q.device) % size
        if config.window_size:
            k, v = k_win[one, slots], v_win[one, slots]
        else:  # nothing is seen, whatever it is
            k, v = k_slc[one, length - seen : length], v_slc[one, length - seen : length]
        window, _ = sliding_window_attention(query, k, v, config, *rest)
        outs.append(combine((compressed, selected, window), gates[one]))
        used.append(indices)
    if not outs:
        shape = *q.shape[:2], k_slc.shape[2], config.num_selected_blocks
        return q.new_empty(*q.shape[:3], v_slc.shape[3]), q.new_empty(shape, dtype=torch.int32)
    return torch.cat(outs), torch.cat(used)
