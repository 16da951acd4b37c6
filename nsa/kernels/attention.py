"""The three branches and their gated sum (paper, equation 5), with one backward for all of it.

    out = sum_c gate_c out_c,    dgate_c = dout.out_c

A branch's output has the gradient `gate_c dout`, which is never written anywhere: the backward of a branch takes `dout`
as it is and the gate beside it, since

    P (gate dout.v - gate dout.out) = gate P (dout.v - delta),    delta = dout.out.

So `dq` is scaled a row at the end, `dk` and `dv` are made of `gate P`, and `delta`, which every backward needs, is the
gate's gradient. The branches add to one `dq` in turn. That leaves the backward of 64k tokens with the three outputs
and one `dq` in memory, instead of three of everything.

The compressed branch is done beforehand, for the blocks are chosen by it, and the choice is an operator of its own:
what saves or repeats operators (activation checkpointing) sees it.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import triton.language as tl
from torch import Tensor

from nsa.config import NSAConfig
from nsa.kernels import flash_backward, flash_forward, selected_attention
from nsa.kernels.bwd_preprocess import preprocess
from nsa.kernels.flash_attention import compressed_attention
from nsa.kernels.flash_tiles import PositionMap
from nsa.kernels.launches import recordable, recorded
from nsa.kernels.primitives import accumulator, cdiv, next_power_of_2, rows_contiguous
from nsa.kernels.select import select_blocks
from nsa.ops import Gradient, Operator, accumulation_dtype, config_of, sizes_of
from nsa.varlen import Varlen, tensors_of, varlen_of


@recordable(do_not_specialize=["count"])
def _combine_kernel(
    compressed, selected, window, gates, out, count, DIM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Rows are (token, head) pairs: `Dv` wide in the branches, 3 wide in the gates."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    live = row < count
    element = row[:, None] * DIM + column[None, :]
    inside = live[:, None] & (column < DIM)[None, :]
    total = tl.load(gates + 3 * row, mask=live, other=0.0).to(ACC)[:, None] * tl.load(compressed + element, mask=inside)
    total += tl.load(gates + 3 * row + 1, mask=live, other=0.0).to(ACC)[:, None] * tl.load(selected + element, inside)
    total += tl.load(gates + 3 * row + 2, mask=live, other=0.0).to(ACC)[:, None] * tl.load(window + element, inside)
    tl.store(out + element, total.to(out.dtype.element_ty), mask=inside)


def combine(branches: Sequence[Tensor], gates: Tensor) -> Tensor:
    """Gated sum of the branch outputs `[B, Tq, Hq, Dv]` under gates `[B, Tq, Hq, 3]`."""
    compressed, selected, window = (x.contiguous() for x in branches)
    gates, out, dim = gates.contiguous(), torch.empty_like(compressed), compressed.shape[-1]
    if not out.numel():
        return out
    width = next_power_of_2(dim)
    rows, count = max(1, 4096 // width), out.numel() // dim
    # Gates may be wider than what they weigh.
    acc = max((accumulator(x.dtype) for x in (out, gates)), key=lambda dtype: dtype.primitive_bitwidth)
    with torch.cuda.device_of(out):
        _combine_kernel[(cdiv(count, rows),)](
            compressed, selected, window, gates, out, count, DIM=dim, ROWS=rows, WIDTH=width, ACC=acc, num_warps=4
        )
    return out


def _attend_forward(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    out_cmp: Tensor,
    lse_cmp: Tensor,
    indices: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    cu_blocks: Tensor | None,
    queries: Tensor | None,
    sizes: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gated sum, and output and log-sum-exp of the selected and of the window branch for the backward.

    `out_cmp` and `lse_cmp` are what the compressed branch gives for `q`, `k_cmp` and `v_cmp`.
    """
    config, num_keys = config_of(sizes), k_slc.shape[1]
    varlen = varlen_of(cu_seqlens_q, cu_seqlens_k, cu_blocks, queries)
    out_slc, lse_slc = selected_attention.forward(q, k_slc, v_slc, indices, varlen, num_keys, config, scale)
    window = PositionMap.sliding(config, num_keys)
    out_win, lse_win = flash_forward.forward(window, q, k_win, v_win, varlen, num_keys, scale)
    out = combine((out_cmp, out_slc, out_win), gates)
    return out, out_slc, lse_slc, out_win, lse_win


def _fake_forward(q: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    shape = (*q.shape[:3], inputs[1].shape[3])
    out, out_slc, out_win = (q.new_empty(shape) for _ in range(3))
    lse_slc, lse_win = (q.new_empty(shape[:3], dtype=accumulation_dtype(q.dtype)) for _ in range(2))
    return out, out_slc, lse_slc, out_win, lse_win


def _attend_backward(
    dout: Tensor,
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    out_cmp: Tensor,
    lse_cmp: Tensor,
    indices: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    cu_blocks: Tensor | None,
    queries: Tensor | None,
    out_slc: Tensor,
    lse_slc: Tensor,
    out_win: Tensor,
    lse_win: Tensor,
    sizes: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    config, num_keys = config_of(sizes), k_slc.shape[1]
    varlen = varlen_of(cu_seqlens_q, cu_seqlens_k, cu_blocks, queries)
    dout, q, gates = rows_contiguous(dout), rows_contiguous(q), gates.contiguous()
    dgates = torch.empty_like(gates)
    outs = [x.contiguous() for x in (out_cmp, out_slc, out_win)]
    lses = lse_cmp, lse_slc, lse_win = [x.contiguous() for x in (lse_cmp, lse_slc, lse_win)]
    by_branch = gates.unbind(-1)
    rows_cmp, rows_slc, rows_win = preprocess(
        dout, outs, lses, by_branch, dgates.unbind(-1), head_major=(True, False, True)
    )
    compressed, window = PositionMap.compressed(config, num_keys), PositionMap.sliding(config, num_keys)
    rest = (varlen, num_keys, scale)
    dq, dk_cmp, dv_cmp = flash_backward.backward(
        compressed, dout, q, k_cmp, v_cmp, lse_cmp, rows_cmp, *rest, gate=by_branch[0]
    )
    dq, dk_slc, dv_slc = selected_attention.gradients(
        dout, q, k_slc, v_slc, lse_slc, rows_slc, indices, varlen, num_keys, config, scale, gate=by_branch[1], dq=dq
    )
    dq, dk_win, dv_win = flash_backward.backward(
        window, dout, q, k_win, v_win, lse_win, rows_win, *rest, gate=by_branch[2], dq=dq
    )
    return dq, dk_cmp, dv_cmp, dk_slc, dv_slc, dk_win, dv_win, dgates


def _fake_backward(dout: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in inputs[:8])


def _save(inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
    return (*inputs[:15], *outputs[1:]), inputs[15:]


_attend = Operator(
    "nsa_triton::attend",
    recorded(_attend_forward),
    _fake_forward,
    Gradient(Operator("nsa_triton::attend_backward", recorded(_attend_backward), _fake_backward), _save, num_inputs=8),
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
    indices: Tensor | None,
    config: NSAConfig,
    varlen: Varlen | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output `[B, Tq, Hq, Dv]` and the indices used; see `nsa.functional.nsa_attention`."""
    num_keys = k_slc.shape[1]
    with torch.no_grad():  # its gradients are made with the others'
        out_cmp, lse = compressed_attention(q, k_cmp, v_cmp, config, num_keys, varlen, scale)
    if indices is None:
        indices = select_blocks(q, k_cmp, lse, config, num_keys, varlen, scale)
    tensors = (q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, out_cmp, lse, indices)
    return cast(tuple[Tensor, ...], _attend(*tensors, *tensors_of(varlen), sizes_of(config), scale))[0], indices
