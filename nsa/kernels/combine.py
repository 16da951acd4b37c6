"""The gated sum of the three branches in one pass over each of them (paper, equation 5).

    out = sum_c gate_c out_c,    dout_c = gate_c dout,    dgate_c = sum over the head dim of (dout out_c)

Rows are (token, head) pairs: `Dv` wide in the branches, 3 wide in the gates.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.kernels.common import accumulator


@triton.jit
def _tile(count, DIM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """This program's rows, which of them there are, and their elements `[ROWS, WIDTH]` with the same."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    live = row < count
    return row, live, row[:, None] * DIM + column[None, :], live[:, None] & (column < DIM)[None, :]


@triton.jit
def _forward_kernel(
    compressed, selected, window, gates, out, count, DIM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    row, live, element, inside = _tile(count, DIM, ROWS, WIDTH)
    total = tl.load(gates + 3 * row, mask=live, other=0.0).to(ACC)[:, None] * tl.load(compressed + element, mask=inside)
    total += tl.load(gates + 3 * row + 1, mask=live, other=0.0).to(ACC)[:, None] * tl.load(selected + element, inside)
    total += tl.load(gates + 3 * row + 2, mask=live, other=0.0).to(ACC)[:, None] * tl.load(window + element, inside)
    tl.store(out + element, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _branch_backward(branch, dbranch, gate, dgate, dout, live, element, inside):
    """One branch's gradient and its gate's, given those of the output `[ROWS, WIDTH]`."""
    weight = tl.load(gate, mask=live, other=0.0).to(dout.dtype)
    tl.store(dbranch + element, (weight[:, None] * dout).to(dbranch.dtype.element_ty), mask=inside)
    total = tl.sum(dout * tl.load(branch + element, mask=inside, other=0.0), 1)
    tl.store(dgate, total.to(dgate.dtype.element_ty), mask=live)


@triton.jit
def _backward_kernel(
    dout, compressed, selected, window, gates, dcompressed, dselected, dwindow, dgates, count, DIM: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row, live, element, inside = _tile(count, DIM, ROWS, WIDTH)
    do = tl.load(dout + element, mask=inside, other=0.0).to(ACC)
    gate = gates + 3 * row
    dgate = dgates + 3 * row
    _branch_backward(compressed, dcompressed, gate, dgate, do, live, element, inside)
    _branch_backward(selected, dselected, gate + 1, dgate + 1, do, live, element, inside)
    _branch_backward(window, dwindow, gate + 2, dgate + 2, do, live, element, inside)


def _launch(kernel: Any, tensors: Sequence[Tensor], dim: int) -> None:
    count = tensors[0].numel() // dim if dim else 0
    if count == 0:
        return
    width = triton.next_power_of_2(dim)
    rows = max(1, 4096 // width)
    # Gates may be wider than what they weigh.
    acc = max((accumulator(x.dtype) for x in tensors), key=lambda dtype: dtype.primitive_bitwidth)
    with torch.cuda.device_of(tensors[0]):
        kernel[(triton.cdiv(count, rows),)](*tensors, count, DIM=dim, ROWS=rows, WIDTH=width, ACC=acc, num_warps=4)


@torch.library.custom_op("nsa_triton::combine", mutates_args=())
def _combine(compressed: Tensor, selected: Tensor, window: Tensor, gates: Tensor) -> Tensor:
    branches = [x.contiguous() for x in (compressed, selected, window)]
    out = torch.empty_like(branches[0])
    _launch(_forward_kernel, (branches[0], branches[1], branches[2], gates.contiguous(), out), out.shape[-1])
    return out


@_combine.register_fake
def _(compressed: Tensor, selected: Tensor, window: Tensor, gates: Tensor) -> Tensor:
    return compressed.new_empty(compressed.shape)


@torch.library.custom_op("nsa_triton::combine_backward", mutates_args=())
def _combine_backward(
    dout: Tensor, compressed: Tensor, selected: Tensor, window: Tensor, gates: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = [x.contiguous() for x in (dout, compressed, selected, window, gates)]
    gradients = [torch.empty_like(x) for x in inputs[1:]]
    _launch(_backward_kernel, (*inputs, *gradients), dout.shape[-1])
    return gradients[0], gradients[1], gradients[2], gradients[3]


@_combine_backward.register_fake
def _(dout: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in inputs)


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
    return _combine_backward(dout, *ctx.saved_tensors)


_combine.register_autograd(_differentiate, setup_context=_setup_context)


def combine(branches: Sequence[Tensor], gates: Tensor) -> Tensor:
    """Gated sum of the branch outputs `[B, Tq, Hq, Dv]` under gates `[B, Tq, Hq, 3]`."""
    return _combine(*branches, gates)
