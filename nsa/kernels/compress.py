"""Blocks of keys or values as one vector each (paper, section 3.3.1, equation 7).

Neighbouring blocks share all but `d` of their `l` tokens; to lay the blocks out side by side would copy every token
`l / d` times. The mean reads its tokens where they are. A linear layer over a block is cut into layers over pieces of
`d` tokens, of which each is computed once and serves as the first piece of one block, the second of the one before, and
so on:

    hidden[c] = sum_m (x[c + m] + position[m]) W[m],    x[p] the tokens [p d, (p + 1) d),    m < l / d

One product gives all pieces under all parts of the weight; the sum over `m` is one over shifted results, which are
`d D / F` times smaller than the tokens. Pieces of packed sequences do not line up: their blocks are gathered.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from nsa.config import NSAConfig
from nsa.kernels.primitives import accumulator, find_program, rows_contiguous
from nsa.ops import Gradient, Operator, accumulation_dtype

_ROWS = 16
"""Blocks or tokens a program of the mean takes."""

# Sizes that change from call to call and are no reason to compile again.
_LENGTHS = ("count", "num_tokens", "num_tiles")


@triton.jit(do_not_specialize=_LENGTHS)
def _mean_kernel(
    x, starts, out, count, num_tiles, x_batch, x_token, x_head, HEADS, LENGTH: tl.constexpr, STRIDE: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """`ROWS` blocks of one head; a packed block that does not exist starts at -1 and is 0."""
    tile, head, batch = find_program(num_tiles, HEADS)
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


@triton.jit(do_not_specialize=_LENGTHS)
def _mean_backward_kernel(
    dout, starts, lasts, dx, count, num_tokens, num_tiles, o_batch, o_token, o_head, HEADS, LENGTH: tl.constexpr,
    STRIDE: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """A token belongs to the last block that starts at or before it and to some before that, while they reach it."""
    tile, head, batch = find_program(num_tiles, HEADS)
    token = tile * ROWS + tl.arange(0, ROWS)
    head = head.to(tl.int64)
    batch = batch.to(tl.int64)
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
        if PACKED:
            start = tl.load(starts + block, mask=covers, other=-LENGTH)
            covers = covers & (token < start + LENGTH)
        pointers = dout + batch * o_batch + head * o_head + (block.to(tl.int64) * o_token)[:, None] + column[None, :]
        total += tl.load(pointers, mask=covers[:, None] & inside[None, :], other=0.0)
    rows = (batch * num_tokens + token) * HEADS + head
    mask = live[:, None] & inside[None, :]
    tl.store(dx + rows[:, None] * DIM + column[None, :], (total / LENGTH).to(dx.dtype.element_ty), mask=mask)


def _launch(kernel: Any, rows: int, x: Tensor, arguments: tuple[Any, ...], length: int, stride: int) -> None:
    """`arguments` as the kernel takes them, up to its constants; the second is the table of starts or None."""
    if x.numel() == 0 or rows == 0:
        return
    tiles = triton.cdiv(rows, _ROWS)
    with torch.cuda.device_of(x):
        kernel[(tiles * x.shape[2] * x.shape[0], 1, 1)](
            *arguments, tiles, *x.stride()[:3], x.shape[2], LENGTH=length, STRIDE=stride, DIM=x.shape[3],
            WIDTH=triton.next_power_of_2(x.shape[3]), ROWS=_ROWS, ACC=accumulator(x.dtype),
            PACKED=arguments[1] is not None,
        )  # fmt: skip


def _mean_forward(x: Tensor, starts: Tensor | None, count: int, length: int, stride: int) -> Tensor:
    x = rows_contiguous(x)
    out = x.new_empty(x.shape[0], count, *x.shape[2:])
    _launch(_mean_kernel, count, x, (x, starts, out, count), length, stride)
    return out


def _fake_mean(x: Tensor, starts: Tensor | None, count: int, length: int, stride: int) -> Tensor:
    return x.new_empty(x.shape[0], count, *x.shape[2:])


def _mean_backward(dout: Tensor, starts: Tensor | None, num_tokens: int, length: int, stride: int) -> Tensor:
    dout = rows_contiguous(dout)
    count = dout.shape[1]
    dx = dout.new_zeros(dout.shape[0], num_tokens, *dout.shape[2:])
    lasts = None
    if starts is not None:
        # Blocks that do not exist stand at the end; put beyond all tokens, they keep the table ascending.
        ascending = starts.where(starts >= 0, num_tokens)
        lasts = torch.searchsorted(ascending, torch.arange(num_tokens, device=dout.device), right=True) - 1
    if count:
        arguments = (dout, starts, lasts, dx, count, num_tokens)
        _launch(_mean_backward_kernel, num_tokens, dout, arguments, length, stride)
    return dx


def _fake_mean_backward(dout: Tensor, starts: Tensor | None, num_tokens: int, length: int, stride: int) -> Tensor:
    return dout.new_empty(dout.shape[0], num_tokens, *dout.shape[2:])


def _save(inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
    x, starts, _, length, stride = inputs
    return (starts,), (x.shape[1], length, stride)


_mean = Operator(
    "nsa_triton::compress_mean",
    _mean_forward,
    _fake_mean,
    Gradient(Operator("nsa_triton::compress_mean_backward", _mean_backward, _fake_mean_backward), _save, num_inputs=1),
)


def _first_layer(x: Tensor, position: Tensor, weight: Tensor, config: NSAConfig, count: int) -> Tensor:
    """Blocks `[B, C, Hk, F]` of one sequence through one layer, from products of pieces of `d` tokens."""
    length, stride = config.compress_block_size, config.compress_stride
    parts = length // stride
    batch, _, heads, dim = x.shape
    pieces = count + parts - 1 if count else 0
    tokens = x[:, : pieces * stride].transpose(1, 2).reshape(batch, heads, pieces, stride * dim)
    # Positions go through the product as pieces of their own, for one rounding of the weight's gradient.
    positions = position.reshape(1, heads, parts, stride * dim).expand(batch, -1, -1, -1)
    weights = weight.view(heads, parts, stride * dim, -1).transpose(1, 2).flatten(2)
    products = torch.matmul(torch.cat((tokens, positions), 2), weights)
    products = products.view(batch, heads, pieces + parts, parts, -1).to(accumulation_dtype(x.dtype))
    # Indexed from the end of what was cut off: an index that depends on the length would compile for each anew.
    of_tokens, of_positions = products[:, :, :pieces], products[:, :, pieces:]
    total = sum(of_tokens[:, :, m : m + count, m] + of_positions[:, :, m : m + 1, m] for m in range(parts))
    return cast(Tensor, total).transpose(1, 2).to(x.dtype)


def compress(x: Tensor, params: Any, config: NSAConfig, blocks: Any) -> Tensor:
    """`[B, T, Hk, D] -> [B, C, Hk, D]` for blocks that start where `nsa.functional.block_starts` says."""
    # A shape, since `len` of a tensor would be a number where a length is traced as a symbol.
    count, packed = blocks.tokens.shape[0], blocks.filled is not None
    if params is None:
        starts = blocks.tokens.where(blocks.filled, -1) if packed else None
        return _mean(x, starts, count, config.compress_block_size, config.compress_stride)
    position, weight = params.position.to(x.dtype), params.weight.to(x.dtype)
    if packed:
        within = torch.arange(config.compress_block_size, device=x.device)
        tokens = x[:, blocks.tokens.unsqueeze(-1) + within].transpose(2, 3)
        # A block that does not exist starts at token 0, whose values must not reach the gradients of the weights.
        rows = (tokens.masked_fill(~blocks.filled.view(-1, 1, 1, 1), 0) + position).flatten(3)
        out = torch.einsum("bchi,hif->bchf", rows, weight)
    else:
        out = _first_layer(x, position, weight, config, count)
    if params.weight_out is not None:
        out = torch.einsum("bchf,hfd->bchd", F.silu(out), params.weight_out.to(x.dtype))
    return out.masked_fill(~blocks.filled.view(-1, 1, 1), 0) if packed else out
