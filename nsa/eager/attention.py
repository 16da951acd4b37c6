"""Native Sparse Attention as a whole: the three branches one after the other, then their gated sum."""

from torch import Tensor

from nsa.config import NSAConfig
from nsa.eager.compressed import compressed_attention
from nsa.eager.gates import combine
from nsa.eager.select import select_blocks
from nsa.eager.selected import selected_attention
from nsa.eager.window import sliding_window_attention
from nsa.varlen import Varlen


def nsa_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    indices: Tensor | None,
    config: NSAConfig,
    varlen: Varlen | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output `[B, Tq, Hq, Dv]` and the indices used; see `nsa.functional.nsa_attention`."""
    num_keys, rest = k_slc.shape[1], (varlen, scale)
    out_cmp, lse = compressed_attention(q, k_cmp, v_cmp, config, num_keys, *rest)
    if indices is None:
        indices = select_blocks(q, k_cmp, lse, config, num_keys, *rest)
    out_slc, _ = selected_attention(q, k_slc, v_slc, indices, config, *rest)
    out_win, _ = sliding_window_attention(q, k_win, v_win, config, *rest)
    return combine((out_cmp, out_slc, out_win), gates), indices
