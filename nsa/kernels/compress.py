"""Blocks of keys or values as one vector each (paper, section 3.3.1, equation 7).

The mean reads its tokens where they are. A learned layer takes a block as one row, its `l` tokens with their position
embeddings one after the other:

    hidden[c] = row[c] W,    row[c] = (x[c d] + position[0], ..., x[c d + l - 1] + position[l - 1])

Neighbouring blocks share all but `d` of their tokens, so the rows take `l / d` times the memory of the tokens. They are
made by one kernel, multiplied by cuBLAS and dropped; the backward makes them anew. Of packed sequences, whose blocks do
not stand at multiples of `d`, the kernel reads where each begins. What follows, and all gradients, are products too:

    out = silu(hidden) W',    dhidden = silu'(hidden) (dout W'^T),    dW' = silu(hidden)^T dout,
    dW = row^T dhidden,    drow = dhidden W^T,    dposition = (sum_c dhidden[c]) W^T,

and `dx` adds up what the rows that hold a token got for it. Keys and values have parameters of their own, but the
kernels do both in one launch: at the lengths of most training the host cannot keep up with the GPU.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor

from nsa.config import NSAConfig
from nsa.kernels.launches import recordable, recorded
from nsa.kernels.primitives import accumulator, cdiv, find_program, next_power_of_2, rows_contiguous
from nsa.ops import Gradient, Operator

_ROWS = 16
"""Blocks of the mean, or tokens, that a program takes."""

_ELEMENTS = 4096
"""Elements of a row that a program has at a time."""

# Sizes that change from call to call and are no reason to compile again.
_LENGTHS = ("count", "num_tokens", "num_tiles", "batch")


@recordable(do_not_specialize=_LENGTHS)
def _mean_kernel(
    x, starts, out, count, num_tiles, x_batch, x_token, x_head, HEADS, LENGTH: tl.constexpr, STRIDE: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """`ROWS` blocks of one head; a packed block that does not exist starts at -1 and is 0."""
    tile, head, batch = find_program(tl.program_id(0), num_tiles, HEADS)
    block = tile * ROWS + tl.arange(0, ROWS)
    head = head.to(tl.int64)
    batch = batch.to(tl.int64)
    start = block.to(tl.int64) * STRIDE
    filled = block < count
    if PACKED:
        start = tl.load(starts + block, mask=filled, other=-1)
        filled = start >= 0
    column = tl.arange(0, WIDTH)
    inside = filled[:, None] & (column < DIM)[None, :]
    pointers = x + batch * x_batch + head * x_head + start[:, None] * x_token + column[None, :]
    total = tl.zeros([ROWS, WIDTH], dtype=ACC)
    for token in range(LENGTH):
        total += tl.load(pointers + token * x_token, mask=inside, other=0.0)
    rows = (batch * count + block) * HEADS + head
    real = (block < count)[:, None] & (column < DIM)[None, :]
    tl.store(out + rows[:, None] * DIM + column[None, :], (total / LENGTH).to(out.dtype.element_ty), mask=real)


@recordable(do_not_specialize=_LENGTHS)
def _rows_kernel(
    x, y, x_position, y_position, starts, rows, count, batch, x_batch, x_token, x_head, y_batch, y_token, y_head,
    HEADS, LENGTH: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
    ACC: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One row of `[2, H, B C, l D]`; a packed block that does not exist starts at -1 and is 0."""
    block, head, batch_row = find_program(tl.program_id(0), count, HEADS)
    head = head.to(tl.int64)
    batch_row = batch_row.to(tl.int64)
    row = (head * batch + batch_row) * count + block
    tokens = x + batch_row * x_batch + head * x_head
    token_stride = tl.cast(x_token, tl.int64)
    position = x_position
    if batch_row >= batch:
        batch_row -= batch
        row = ((HEADS + head) * batch + batch_row) * count + block
        tokens = y + batch_row * y_batch + head * y_head
        token_stride = tl.cast(y_token, tl.int64)
        position = y_position
    start = block.to(tl.int64) * STRIDE
    filled = start >= 0
    if PACKED:
        start = tl.load(starts + block).to(tl.int64)
        filled = start >= 0
    column = tl.arange(0, WIDTH)
    for first in range(0, LENGTH, TOKENS):
        token = first + tl.arange(0, TOKENS)
        inside = (token < LENGTH)[:, None] & (column < DIM)[None, :]
        element = token[:, None] * DIM + column[None, :]
        pointers = tokens + ((start + token) * token_stride)[:, None] + column[None, :]
        total = tl.load(pointers, mask=inside & filled, other=0.0).to(ACC)
        total += tl.load(position + head * LENGTH * DIM + element, mask=inside & filled, other=0.0).to(ACC)
        tl.store(rows + row * (LENGTH * DIM) + element, total.to(rows.dtype.element_ty), mask=inside)


@recordable(do_not_specialize=_LENGTHS)
def _tokens_kernel(
    dblocks, starts, lasts, dx, dy, count, num_tokens, num_tiles, batch, d_batch, d_block, d_head, d_second, HEADS,
    LENGTH: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    ACC: tl.constexpr, PACKED: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """Gradients of tokens from those of blocks: with MEAN `[D]`, else the rows `[l D]` that were made of them.

    A token belongs to the last block that starts at or before it and to some before that, while they reach it.
    """
    tile, head, batch_row = find_program(tl.program_id(0), num_tiles, HEADS)
    token = tile * ROWS + tl.arange(0, ROWS)
    head = head.to(tl.int64)
    batch_row = batch_row.to(tl.int64)
    target = dx
    if batch_row >= batch:
        batch_row -= batch
        dblocks += d_second
        target = dy
    dblocks += batch_row * d_batch + head * d_head
    live = token < num_tokens
    last = token // STRIDE
    if PACKED:
        last = tl.load(lasts + token, mask=live, other=-1)
    column = tl.arange(0, WIDTH)
    inside = column < DIM
    total = tl.zeros([ROWS, WIDTH], dtype=ACC)
    for back in tl.static_range(LENGTH // STRIDE):
        block = last - back
        covers = live & (block >= 0) & (block < count)
        start = block * STRIDE
        if PACKED:
            start = tl.load(starts + block, mask=covers, other=-LENGTH)
            covers = covers & (token < start + LENGTH)
        offsets = block.to(tl.int64) * d_block
        if not MEAN:
            offsets += (token - start) * DIM
        pointers = dblocks + offsets[:, None] + column[None, :]
        total += tl.load(pointers, mask=covers[:, None] & inside[None, :], other=0.0).to(ACC)
    if MEAN:
        total /= LENGTH
    rows = (batch_row * num_tokens + token) * HEADS + head
    mask = live[:, None] & inside[None, :]
    tl.store(target + rows[:, None] * DIM + column[None, :], total.to(dx.dtype.element_ty), mask=mask)


# The mean, which learns nothing.


def _mean_forward(x: Tensor, starts: Tensor | None, count: int, length: int, stride: int) -> Tensor:
    x = rows_contiguous(x)
    out = x.new_empty(x.shape[0], count, *x.shape[2:])
    if out.numel():
        tiles, heads, dim = cdiv(count, _ROWS), *x.shape[2:]
        with torch.cuda.device_of(x):
            _mean_kernel[(tiles * heads * x.shape[0], 1, 1)](
                x, starts, out, count, tiles, *x.stride()[:3], heads, LENGTH=length, STRIDE=stride, DIM=dim,
                WIDTH=next_power_of_2(dim), ROWS=_ROWS, ACC=accumulator(x.dtype), PACKED=starts is not None,
            )  # fmt: skip
    return out


def _fake_mean(x: Tensor, starts: Tensor | None, count: int, length: int, stride: int) -> Tensor:
    return x.new_empty(x.shape[0], count, *x.shape[2:])


def _mean_backward(dout: Tensor, starts: Tensor | None, num_tokens: int, length: int, stride: int) -> Tensor:
    dout = rows_contiguous(dout)
    dx = dout.new_empty(dout.shape[0], num_tokens, *dout.shape[2:])
    _add_up(dout, (*dout.stride()[:3], 0), dout.shape[1], [dx], starts, length, stride, True)
    return dx


def _fake_mean_backward(dout: Tensor, starts: Tensor | None, num_tokens: int, length: int, stride: int) -> Tensor:
    return dout.new_empty(dout.shape[0], num_tokens, *dout.shape[2:])


def _save_mean(
    inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]
) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
    x, starts, _, length, stride = inputs
    return (starts,), (x.shape[1], length, stride)


@recorded
def _add_up(
    dblocks: Tensor,
    strides: Sequence[int],
    count: int,
    dxs: Sequence[Tensor],
    starts: Tensor | None,
    length: int,
    stride: int,
    mean: bool,
) -> None:
    """Fills one or two `dxs [B, T, H, D]`.

    `strides` of `dblocks` are those from one batch row, block, head and half of a pair to the next.
    """
    batch, num_tokens, heads, dim = dxs[0].shape
    if not dxs[0].numel():
        return
    lasts = None
    if starts is not None:
        # Blocks that do not exist stand at the end; put beyond all tokens, they keep the table ascending.
        ascending = starts.where(starts >= 0, num_tokens)
        lasts = torch.searchsorted(ascending, torch.arange(num_tokens, device=dblocks.device), right=True) - 1
    tiles = cdiv(num_tokens, _ROWS)
    with torch.cuda.device_of(dblocks):
        _tokens_kernel[(tiles * heads * batch * len(dxs), 1, 1)](
            dblocks, starts, lasts, dxs[0], dxs[-1], count, num_tokens, tiles, batch, *strides, heads, LENGTH=length,
            STRIDE=stride, DIM=dim, WIDTH=next_power_of_2(dim), ROWS=_ROWS, ACC=accumulator(dblocks.dtype),
            PACKED=starts is not None, MEAN=mean,
        )  # fmt: skip


_mean = Operator(
    "nsa_triton::compress_mean",
    recorded(_mean_forward),
    _fake_mean,
    Gradient(
        Operator("nsa_triton::compress_mean_backward", recorded(_mean_backward), _fake_mean_backward),
        _save_mean,
        num_inputs=1,
    ),
)


# One or two layers that learn, of one tensor or of a pair, whose second half is None where there is none. Weights of a
# pair are multiplied as one batch. Products are written into tensors made for them: those have the dtype of the inputs,
# which autocast would change.


def _join(first: Tensor, second: Tensor | None) -> Tensor:
    return first if second is None else torch.cat((first, second))


def _multiply(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.bmm(a, b, out=a.new_empty(*a.shape[:2], b.shape[2]) if out is None else out)


@recorded
def _rows(
    x: Tensor,
    position: Tensor,
    y: Tensor | None,
    y_position: Tensor | None,
    starts: Tensor | None,
    count: int,
    length: int,
    stride: int,
) -> Tensor:
    """Blocks and their position embeddings as rows, `[H or 2 H, B C, l D]`."""
    x, position = rows_contiguous(x), position.contiguous()
    other, other_position = x, position
    if y is not None and y_position is not None:
        other, other_position = rows_contiguous(y), y_position.contiguous()
    number = 1 if y is None else 2
    batch, _, heads, dim = x.shape
    rows = x.new_empty(number * heads, batch * count, length * dim)
    if rows.numel():
        width = next_power_of_2(dim)
        with torch.cuda.device_of(x):
            _rows_kernel[(count * heads * batch * number, 1, 1)](
                x, other, position, other_position, starts, rows, count, batch, *x.stride()[:3], *other.stride()[:3],
                heads, LENGTH=length, STRIDE=stride, DIM=dim, WIDTH=width,
                TOKENS=max(1, min(length, _ELEMENTS // width)), ACC=accumulator(x.dtype), PACKED=starts is not None,
            )  # fmt: skip
    return rows


def _forward(
    x: Tensor,
    position: Tensor,
    weight: Tensor,
    weight_out: Tensor | None,
    y: Tensor | None,
    y_position: Tensor | None,
    y_weight: Tensor | None,
    y_weight_out: Tensor | None,
    starts: Tensor | None,
    count: int,
    length: int,
    stride: int,
) -> tuple[Tensor, Tensor]:
    """Blocks `[1 or 2, B, C, H, D]`, and the hidden layer `[H or 2 H, B C, F]` where there is one."""
    batch, _, heads, dim = x.shape
    rows = _rows(x, position, y, y_position, starts, count, length, stride)
    blocks, hidden = _multiply(rows, _join(weight, y_weight)), rows.new_empty(0)
    if weight_out is not None:
        blocks, hidden = _multiply(F.silu(blocks), _join(weight_out, y_weight_out)), blocks
    return blocks.view(len(rows) // heads, heads, batch, count, dim).permute(0, 2, 3, 1, 4), hidden


def _fake(
    x: Tensor, position: Tensor, weight: Tensor, weight_out: Tensor | None, y: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    count = rest[-3]
    number, (batch, _, heads, dim) = 1 if y is None else 2, x.shape
    blocks = x.new_empty(number, heads, batch, count, dim).permute(0, 2, 3, 1, 4)
    hidden = x.new_empty(0) if weight_out is None else x.new_empty(number * heads, batch * count, weight.shape[2])
    return blocks, hidden


def _backward(
    dout: Tensor,
    x: Tensor,
    position: Tensor,
    weight: Tensor,
    weight_out: Tensor | None,
    y: Tensor | None,
    y_position: Tensor | None,
    y_weight: Tensor | None,
    y_weight_out: Tensor | None,
    starts: Tensor | None,
    hidden: Tensor,
    length: int,
    stride: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `x` and of `y`, and of the three parameters of both, those of `y` behind those of `x`."""
    number, batch, count, heads, dim = dout.shape
    if starts is not None:
        dout = dout.masked_fill((starts < 0).view(-1, 1, 1), 0)
    dhidden = dout.permute(0, 3, 1, 2, 4).reshape(number * heads, batch * count, dim)
    dweight_out = hidden.new_empty(0)
    if weight_out is not None:
        dweight_out = _multiply(F.silu(hidden).mT, dhidden)
        dactivated = _multiply(dhidden, _join(weight_out, y_weight_out).mT)
        dhidden = torch.ops.aten.silu_backward(dactivated, hidden)
    transposed = _join(weight, y_weight).mT
    dposition = _multiply(dhidden.sum(1, keepdim=True, dtype=dhidden.dtype), transposed)
    rows = _rows(x, position, y, y_position, starts, count, length, stride)
    dweight = _multiply(rows.mT, dhidden)
    _multiply(dhidden, transposed, out=rows)  # which nobody needs again
    dx, dy = x.new_empty(x.shape), x.new_empty(0) if y is None else y.new_empty(y.shape)
    of_batch, of_head = count * length * dim, batch * count * length * dim
    strides = (of_batch, length * dim, of_head, heads * of_head)
    _add_up(rows, strides, count, [dx, dy][:number], starts, length, stride, False)
    return dx, dy, dposition.view(-1, length, dim), dweight, dweight_out


def _fake_backward(
    dout: Tensor,
    x: Tensor,
    position: Tensor,
    weight: Tensor,
    weight_out: Tensor | None,
    y: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    number = dout.shape[0]
    dx, dy = x.new_empty(x.shape), x.new_empty(0) if y is None else y.new_empty(y.shape)
    dposition, dweight = (p.new_empty(number * p.shape[0], *p.shape[1:]) for p in (position, weight))
    if weight_out is None:
        return dx, dy, dposition, dweight, x.new_empty(0)
    return dx, dy, dposition, dweight, weight_out.new_empty(number * weight_out.shape[0], *weight_out.shape[1:])


_learned_backward = Operator("nsa_triton::compress_backward", _backward, _fake_backward)


def _gradient(dout: Tensor, *saved: Any) -> tuple[Tensor | None, ...]:
    dx, dy, *parameters = cast(tuple[Tensor, ...], _learned_backward(dout, *saved))
    if dout.shape[0] == 1:
        return dx, *(p if p.numel() else None for p in parameters), *[None] * 4
    halves = [p.chunk(2) if p.numel() else (None, None) for p in parameters]
    return dx, *(half[0] for half in halves), dy, *(half[1] for half in halves)


def _save(inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
    *tensors, _, length, stride = inputs
    return (*tensors, outputs[1]), (length, stride)


_learned = Operator("nsa_triton::compress", _forward, _fake, Gradient(_gradient, _save, num_inputs=8))


def compress(xs: Sequence[Tensor], params: Sequence[Any], config: NSAConfig, blocks: Any) -> tuple[Tensor, ...]:
    """`[B, T, Hk, D] -> [B, C, Hk, D]` for each of one or two tensors with their parameters.

    `blocks` are those of `nsa.functional.block_starts`; whole sequences need none.
    """
    if len(xs) > 1 and _shapes(xs[0], params[0]) != _shapes(xs[1], params[1]):
        return tuple(compress([x], [p], config, blocks)[0] for x, p in zip(xs, params, strict=True))
    starts, count = None, config.num_compressed(xs[0].shape[1])
    if blocks is not None:
        # A shape, since `len` of a tensor would be a number where a length is traced as a symbol.
        starts, count = blocks.tokens.where(blocks.filled, -1), blocks.tokens.shape[0]
    sizes = (count, config.compress_block_size, config.compress_stride)
    if params[0] is None:
        return tuple(_mean(x, starts, *sizes) for x in xs)
    tensors: list[Tensor | None] = []
    for x, of_x in zip(xs, params, strict=True):
        tensors += [x, *(None if p is None else p.to(x.dtype) for p in of_x)]
    tensors += [None] * (8 - len(tensors))
    blocks_of_all = cast(tuple[Tensor, Tensor], _learned(*tensors, starts, *sizes))[0]
    # Autograd does not allow the outputs of `unbind` to be changed in place. Those of `unsafe_split` may be.
    return tuple(one.squeeze(0) for one in blocks_of_all.unsafe_split(1))


def _shapes(x: Tensor, params: Any) -> list[Any]:
    return [x.shape] + [None if p is None else p.shape for p in params or ()]
