"""Rotary position embedding of all that a layer rotates, in one launch (RoFormer, arXiv 2104.09864).

The pair of dimensions `2 i` and `2 i + 1` of a row at position `p` is turned by the angle of row `p` of a table:

    y[2 i]     = x[2 i] cos - x[2 i + 1] sin
    y[2 i + 1] = x[2 i] sin + x[2 i + 1] cos

or, where pairs are not interleaved, that of dimensions `i` and `i + D / 2`.

The inverse of a rotation is its transpose, so the gradient is the same with the angle negated.

Each of the tensors `[B, T, H, D]` is read as rows, (token, head) pairs, in tiles of one batch row. Programs are
numbered through all of them: a layer launches one kernel, for as many launches take the host longer than the GPU.
"""

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.config import NSAConfig
from nsa.kernels.launches import recordable, recorded
from nsa.kernels.primitives import accumulator, cdiv, next_power_of_2, rows_contiguous
from nsa.ops import Gradient, Operator

_ELEMENTS = 4096
"""Elements of a tile, at least one row."""

# Sizes that change from call to call and are no reason to compile again.
_LENGTHS = ("batch", "num_tokens", "num_blocks", "num_angles", "query_tiles", "block_tiles", "key_tiles")


@triton.jit
def rotate_rows(
    source, target, angles, live, known, DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    ACC: tl.constexpr, INVERSE: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Rotates the rows that are `live [ROWS]`, from `source [ROWS, 1]` to `target`, by `angles`; NaN unless `known`."""
    if INTERLEAVED:
        column = tl.arange(0, WIDTH)[None, :]
        inside = live[:, None] & (column < DIM)
        a, b = tl.split(tl.load(source + column, mask=inside, other=0.0).to(ACC).reshape(ROWS, WIDTH // 2, 2))
        both = tl.load(angles + column, mask=inside & known[:, None], other=float("nan"))
        cos, sin = tl.split(both.to(ACC).reshape(ROWS, WIDTH // 2, 2))
    else:
        column = tl.arange(0, WIDTH // 2)[None, :]
        inside = live[:, None] & (column < DIM // 2)
        a = tl.load(source + column, mask=inside, other=0.0).to(ACC)
        b = tl.load(source + DIM // 2 + column, mask=inside, other=0.0).to(ACC)
        cos = tl.load(angles + 2 * column, mask=inside & known[:, None], other=float("nan")).to(ACC)
        sin = tl.load(angles + 2 * column + 1, mask=inside & known[:, None], other=float("nan")).to(ACC)
    if INVERSE:
        sin = -sin
    first = a * cos - b * sin
    second = a * sin + b * cos
    if INTERLEAVED:
        rotated = tl.join(first, second).reshape(ROWS, WIDTH)
        tl.store(target + column, rotated.to(target.dtype.element_ty), mask=inside)
    else:
        tl.store(target + column, first.to(target.dtype.element_ty), mask=inside)
        tl.store(target + DIM // 2 + column, second.to(target.dtype.element_ty), mask=inside)


@triton.jit
def _rotate_tile(
    program, tiles, x, out, table, positions, batch, num_tokens, num_angles, x_batch, x_token, x_head,
    STRIDE: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    ACC: tl.constexpr, INVERSE: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """One tile of rows of one tensor, if the program is one of its own: `tiles` for each of its batch rows."""
    if (program >= 0) & (program < tiles * batch):
        batch_row = (program // tiles).to(tl.int64)
        row = (program % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        token = row // HEADS
        live = token < num_tokens
        if positions is None:
            position = token * STRIDE
        else:
            position = tl.load(positions + token, mask=live, other=0).to(tl.int64)
        # A position without an angle is an error that nobody could report from here, so its row is NaN.
        known = live & (position >= 0) & (position < num_angles)
        source = x + batch_row * x_batch + (token * x_token + row % HEADS * x_head)[:, None]
        target = out + ((batch_row * num_tokens * HEADS + row) * DIM)[:, None]
        angles = table + position[:, None] * DIM
        rotate_rows(source, target, angles, live, known, DIM, WIDTH, ROWS, ACC, INVERSE, INTERLEAVED)


@recordable(do_not_specialize=_LENGTHS)
def _rope_kernel(
    q, k_cmp, k_slc, k_win, q_out, cmp_out, slc_out, win_out, table, positions, block_positions, batch, num_tokens,
    num_blocks, num_angles, query_tiles, block_tiles, key_tiles, q_batch, q_token, q_head, cmp_batch, cmp_token,
    cmp_head, slc_batch, slc_token, slc_head, win_batch, win_token, win_head, STRIDE: tl.constexpr,
    QUERY_HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    ACC: tl.constexpr, INVERSE: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    _rotate_tile(
        program, query_tiles, q, q_out, table, positions, batch, num_tokens, num_angles, q_batch, q_token, q_head,
        1, QUERY_HEADS, DIM, WIDTH, ROWS, ACC, INVERSE, INTERLEAVED,
    )  # fmt: skip
    program -= query_tiles * batch
    _rotate_tile(
        program, block_tiles, k_cmp, cmp_out, table, block_positions, batch, num_blocks, num_angles, cmp_batch,
        cmp_token, cmp_head, STRIDE, KEY_HEADS, DIM, WIDTH, ROWS, ACC, INVERSE, INTERLEAVED,
    )  # fmt: skip
    program -= block_tiles * batch
    _rotate_tile(
        program, key_tiles, k_slc, slc_out, table, positions, batch, num_tokens, num_angles, slc_batch, slc_token,
        slc_head, 1, KEY_HEADS, DIM, WIDTH, ROWS, ACC, INVERSE, INTERLEAVED,
    )  # fmt: skip
    program -= key_tiles * batch
    _rotate_tile(
        program, key_tiles, k_win, win_out, table, positions, batch, num_tokens, num_angles, win_batch, win_token,
        win_head, 1, KEY_HEADS, DIM, WIDTH, ROWS, ACC, INVERSE, INTERLEAVED,
    )  # fmt: skip


def angle_accumulator(x: Tensor, table: Tensor | None) -> Any:
    """The Triton dtype of a rotation: angles of a wider dtype than what they turn are not rounded."""
    dtypes = [accumulator(y.dtype) for y in (x, table) if y is not None]
    return max(dtypes, key=lambda dtype: dtype.primitive_bitwidth)


Rotated = tuple[Tensor, Tensor, Tensor, Tensor]
"""Queries and the keys of the compressed, the selected and the window branch."""


def _rotate(
    tensors: Rotated,
    table: Tensor,
    positions: Tensor | None,
    block_positions: Tensor | None,
    stride: int,
    interleaved: bool,
    *,
    inverse: bool,
) -> Rotated:
    q, k_cmp, k_slc, k_win = (rows_contiguous(x) for x in tensors)
    positions, block_positions = (None if x is None else x.contiguous() for x in (positions, block_positions))
    outs = (
        q.new_empty(q.shape),
        k_cmp.new_empty(k_cmp.shape),
        k_slc.new_empty(k_slc.shape),
        k_win.new_empty(k_win.shape),
    )
    batch, _, query_heads, dim = q.shape
    width = next_power_of_2(dim)
    rows = max(1, _ELEMENTS // width)
    tiles = [cdiv(x.shape[1] * x.shape[2], rows) for x in (q, k_cmp, k_slc)]
    programs = batch * (tiles[0] + tiles[1] + 2 * tiles[2])
    if programs:
        strides = (*q.stride()[:3], *k_cmp.stride()[:3], *k_slc.stride()[:3], *k_win.stride()[:3])
        with torch.cuda.device_of(q):
            _rope_kernel[(programs, 1, 1)](
                q, k_cmp, k_slc, k_win, *outs, table.contiguous(), positions, block_positions, batch, q.shape[1],
                k_cmp.shape[1], table.shape[0], *tiles, *strides, STRIDE=stride, QUERY_HEADS=query_heads,
                KEY_HEADS=k_slc.shape[2], DIM=dim, WIDTH=width, ROWS=rows, ACC=angle_accumulator(q, table),
                INVERSE=inverse, INTERLEAVED=interleaved, num_warps=4,
            )  # fmt: skip
    return outs


def _forward(
    q: Tensor,
    k_cmp: Tensor,
    k_slc: Tensor,
    k_win: Tensor,
    table: Tensor,
    positions: Tensor | None,
    block_positions: Tensor | None,
    stride: int,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _rotate((q, k_cmp, k_slc, k_win), table, positions, block_positions, stride, interleaved, inverse=False)


def _backward(
    dq: Tensor,
    dk_cmp: Tensor,
    dk_slc: Tensor,
    dk_win: Tensor,
    table: Tensor,
    positions: Tensor | None,
    block_positions: Tensor | None,
    stride: int,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _rotate((dq, dk_cmp, dk_slc, dk_win), table, positions, block_positions, stride, interleaved, inverse=True)


def _fake(*inputs: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in inputs[:4])


def _save(inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
    return inputs[4:7], inputs[7:]


_rope = Operator(
    "nsa_triton::rope",
    recorded(_forward),
    _fake,
    Gradient(Operator("nsa_triton::rope_backward", recorded(_backward), _fake), _save, num_inputs=4, num_outputs=4),
    cheap=True,
)


def apply_rope(
    q: Tensor,
    k_cmp: Tensor,
    k_slc: Tensor,
    k_win: Tensor,
    rope: Tensor,
    config: NSAConfig,
    positions: Tensor | None,
    block_positions: Tensor | None,
    interleaved: bool,
) -> Rotated:
    """The four, rotated; see `nsa.functional.apply_rope`."""
    rest = (positions, block_positions, config.compress_stride, interleaved)
    return cast(Rotated, _rope(q, k_cmp, k_slc, k_win, rope, *rest))
