"""Compressed and window branch as operators: flash attention, each with its map of positions (paper, section 3.3)."""

from collections.abc import Callable
from typing import cast

from torch import Tensor

from nsa.config import NSAConfig
from nsa.kernels import flash_backward, flash_forward
from nsa.kernels.bwd_preprocess import preprocess
from nsa.kernels.flash_tiles import PositionMap
from nsa.kernels.launches import recorded
from nsa.kernels.primitives import rows_contiguous
from nsa.ops import Operator, branch_operator, sizes_of
from nsa.varlen import Varlen, tensors_of


def _branch(name: str, positions: Callable[[NSAConfig, int], PositionMap]) -> Operator:
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        indices: None,
        varlen: Varlen | None,
        num_tokens: int,
        config: NSAConfig,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        return flash_forward.forward(positions(config, num_tokens), q, k, v, varlen, num_tokens, scale)

    def backward(
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        indices: None,
        varlen: Varlen | None,
        num_tokens: int,
        config: NSAConfig,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dout, lse = rows_contiguous(dout), lse.contiguous()
        (rows,) = preprocess(dout, [out.contiguous()], [lse], head_major=[True])
        return flash_backward.backward(
            positions(config, num_tokens), dout, q, k, v, lse, rows, varlen, num_tokens, scale
        )

    return branch_operator("nsa_triton", name, forward, backward, recorded)


_compressed = _branch("compressed_attention", PositionMap.compressed)
_window = _branch("sliding_window_attention", PositionMap.sliding)


def compressed_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    config: NSAConfig,
    num_keys: int,
    varlen: Varlen | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output `[B, Tq, Hq, Dv]` and log-sum-exp `[B, Tq, Hq]`; see `nsa.functional.compressed_attention`."""
    rest = (*tensors_of(varlen), num_keys, sizes_of(config), scale)
    return cast(tuple[Tensor, Tensor], _compressed(q, k_cmp, v_cmp, None, *rest))


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: NSAConfig,
    varlen: Varlen | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output `[B, Tq, Hq, Dv]` and lse `[B, Tq, Hq]`; see `nsa.functional.sliding_window_attention`."""
    rest = (*tensors_of(varlen), k.shape[1], sizes_of(config), scale)
    return cast(tuple[Tensor, Tensor], _window(q, k, v, None, *rest))
