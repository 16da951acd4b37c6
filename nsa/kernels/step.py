"""A new token of every sequence, rotated and written into a cache, with the compressed blocks that it completes.

A step of decoding does little with each of many small tensors, and each launch takes longer than what it does. So all
between the projections and attention is one launch. Of each sequence and KV head there are six programs, which wait for
memory at the same time:

1. one rotates the query heads;
2. three write the key and the value of a branch into their store or ring, the key rotated but for the compressed one;
3. two see whether the token completes a compressed block, and if so, make its key and its value: `silu(row W) W'` with
   `row` as in `nsa.kernels.compress`, whose tokens but the last are in a ring.

The programs read the length of their sequence on the device. The last of them to come to its end counts the token.
"""

from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.blocks import BlockFunction, CompressionParams
from nsa.config import NSAConfig
from nsa.kernels.launches import recordable
from nsa.kernels.primitives import accumulator, next_power_of_2, rows_contiguous
from nsa.kernels.rope import angle_accumulator, rotate_rows

_PROGRAMS = tl.constexpr(6)

_ELEMENTS = 16384
"""Elements of a weight that a program has at a time."""

# Sizes that change from cache to cache and are no reason to compile again.
_LENGTHS = ("num_angles", "tail_size", "num_tokens", "ring_size", "capacity")


@triton.jit
def _move_row(source, target, table, position, num_angles, DIM: tl.constexpr, WIDTH: tl.constexpr, TURN: tl.constexpr,
              ANGLE: tl.constexpr, INTERLEAVED: tl.constexpr):  # fmt: skip
    """Writes a row of one head, rotated with TURN."""
    if TURN:
        one = tl.zeros([1], tl.int64)
        live = one == 0
        known = live & (position < num_angles)
        rotate_rows(
            source + one[:, None], target + one[:, None], table + (position + one[:, None]) * DIM, live, known,
            DIM, WIDTH, 1, ANGLE, False, INTERLEAVED,
        )  # fmt: skip
    else:
        column = tl.arange(0, WIDTH)
        tl.store(target + column, tl.load(source + column, mask=column < DIM), mask=column < DIM)


@triton.jit
def _make_vector(
    new, tail, params, first, batch, head, tail_size, HEADS, LENGTH: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr, HIDDEN: tl.constexpr, HIDDEN_WIDTH: tl.constexpr, ROWS: tl.constexpr, MEAN: tl.constexpr,
    LINEAR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The vector `[WIDTH]` of the block of one head whose first token is at position `first`; its last is `new [D]`.

    With MEAN a row of the loop is a token, else an element of the block. Roundings are those of `nsa.kernels.compress`.
    """
    DTYPE: tl.constexpr = tail.dtype.element_ty
    column = tl.arange(0, HIDDEN_WIDTH)[None, :]
    total = tl.zeros([HIDDEN_WIDTH], ACC)
    for start in range(0, LENGTH if MEAN else LENGTH * DIM, ROWS):
        row = (start + tl.arange(0, ROWS))[:, None]
        if MEAN:
            token = row
            element = column
            inside = (token < LENGTH) & (element < DIM)
        else:
            token = row // DIM
            element = row % DIM
            inside = token < LENGTH
        last = token == LENGTH - 1
        place = ((batch * tail_size + (first + token) % tail_size) * HEADS + head) * DIM + element
        x = tl.load(tail + place, mask=inside & (token < LENGTH - 1), other=0.0).to(ACC)
        x += tl.load(new + element + token * 0, mask=inside & last, other=0.0).to(ACC)
        if not MEAN:
            of_block = head * LENGTH * DIM + row
            x += tl.load(params[0] + of_block, mask=inside, other=0.0).to(DTYPE).to(ACC)
            x = x.to(DTYPE).to(ACC)
            weight = tl.load(params[1] + of_block * HIDDEN + column, mask=inside & (column < HIDDEN), other=0.0)
            x = x * weight.to(DTYPE).to(ACC)
        total += tl.sum(x, 0)
    if MEAN:
        total = total / LENGTH
    elif not LINEAR:
        total = total.to(DTYPE).to(ACC)
        total = (total / (1 + tl.exp(-total))).to(DTYPE).to(ACC)
        row = tl.arange(0, HIDDEN_WIDTH)[:, None]
        element = tl.arange(0, WIDTH)[None, :]
        weight = params[2] + (head * HIDDEN + row) * DIM + element
        weight = tl.load(weight, mask=(row < HIDDEN) & (element < DIM), other=0.0).to(DTYPE).to(ACC)
        total = tl.sum(total[:, None] * weight, 0)
    return total.to(DTYPE)


@recordable(do_not_specialize=_LENGTHS)
def _step_kernel(
    q, k, v, out, unrotated, table, lengths, arrived, k_stores, v_stores, k_cmp, v_cmp, k_params, v_params, q_strides,
    k_strides, v_strides, num_angles, tail_size, num_tokens, ring_size, capacity, HEADS, G: tl.constexpr,
    ROWS: tl.constexpr, LENGTH: tl.constexpr, STRIDE: tl.constexpr, DK: tl.constexpr, K_WIDTH: tl.constexpr,
    K_HIDDEN: tl.constexpr, K_HIDDEN_WIDTH: tl.constexpr, K_ROWS: tl.constexpr, DV: tl.constexpr,
    V_WIDTH: tl.constexpr, V_HIDDEN: tl.constexpr, V_HIDDEN_WIDTH: tl.constexpr, V_ROWS: tl.constexpr,
    MEAN: tl.constexpr, LINEAR: tl.constexpr, TURN: tl.constexpr, ACC: tl.constexpr, ANGLE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """One of the programs of a sequence and KV head. Tuples have the compressed branch, the selected, the window.

    `unrotated [B, Hk, Dk]` is for keys of blocks, which all threads of a program have to see before they are rotated.
    """
    task = tl.program_id(0) % _PROGRAMS
    head = (tl.program_id(0) // _PROGRAMS % HEADS).to(tl.int64)
    batch = (tl.program_id(0) // _PROGRAMS // HEADS).to(tl.int64)
    position = tl.load(lengths + batch)
    first = position + 1 - LENGTH
    block = first // STRIDE
    place = (batch * capacity + block) * HEADS + head
    complete = (first >= 0) & (first % STRIDE == 0) & (block < capacity)
    if task == 0:
        row = tl.arange(0, ROWS).to(tl.int64)[:, None]
        source = q + batch * q_strides[0] + (head * G + row) * q_strides[1]
        target = out + ((batch * HEADS + head) * G + row) * DK
        if TURN:
            live = tl.arange(0, ROWS) < G
            known = live & (position < num_angles)
            rotate_rows(
                source, target, table + (position + row * 0) * DK, live, known, DK, K_WIDTH, ROWS, ANGLE, False,
                INTERLEAVED,
            )  # fmt: skip
    elif task <= 3:
        sizes = (tail_size, num_tokens, ring_size)
        for branch in tl.static_range(3):
            size = sizes[branch]
            if (task == branch + 1) & (size > 0):
                own = (batch * size + position % size) * HEADS + head
                _move_row(
                    k[branch] + batch * k_strides[branch][0] + head * k_strides[branch][1], k_stores[branch] + own * DK,
                    table, position, num_angles, DK, K_WIDTH, TURN and branch > 0, ANGLE, INTERLEAVED,
                )  # fmt: skip
                _move_row(
                    v[branch] + batch * v_strides[branch][0] + head * v_strides[branch][1], v_stores[branch] + own * DV,
                    table, position, num_angles, DV, V_WIDTH, False, ANGLE, INTERLEAVED,
                )  # fmt: skip
    elif complete:
        if task == 4:
            new = k[0] + batch * k_strides[0][0] + head * k_strides[0][1]
            vector = _make_vector(
                new, k_stores[0], k_params, first, batch, head, tail_size, HEADS, LENGTH, DK, K_WIDTH, K_HIDDEN,
                K_HIDDEN_WIDTH, K_ROWS, MEAN, LINEAR, ACC,
            )  # fmt: skip
            column = tl.arange(0, K_WIDTH)
            if TURN:
                own = unrotated + (batch * HEADS + head) * DK
                tl.store(own + column, vector, mask=column < DK)
                tl.debug_barrier()
                _move_row(
                    own, k_cmp + place * DK, table, first, num_angles, DK, K_WIDTH, True, ANGLE, INTERLEAVED
                )  # fmt: skip
            else:
                tl.store(k_cmp + place * DK + column, vector, mask=column < DK)
        else:
            new = v[0] + batch * v_strides[0][0] + head * v_strides[0][1]
            vector = _make_vector(
                new, v_stores[0], v_params, first, batch, head, tail_size, HEADS, LENGTH, DV, V_WIDTH, V_HIDDEN,
                V_HIDDEN_WIDTH, V_ROWS, MEAN, LINEAR, ACC,
            )  # fmt: skip
            column = tl.arange(0, V_WIDTH)
            tl.store(v_cmp + place * DV + column, vector, mask=column < DV)
    tl.debug_barrier()  # all threads have read the length
    if tl.atomic_add(arrived + batch, 1) == HEADS * _PROGRAMS - 1:
        tl.store(arrived + batch, 0)
        tl.store(lengths + batch, position + 1)


def take_in(
    q: Tensor,
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    rope: Tensor | None,
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    lengths: Tensor,
    arrived: Tensor,
    params: Sequence[CompressionParams | BlockFunction | None],
    config: NSAConfig,
    interleaved: bool,
) -> Tensor:
    """Queries `[B, 1, Hq, Dk]`, rotated; see `nsa.cache.KVCache.step`."""
    k, v = [rows_contiguous(x) for x in k], [rows_contiguous(x) for x in v]
    (batch, _, heads, dk), dv = k[0].shape, v[0].shape[3]
    q = rows_contiguous(q)
    out = q.new_empty(q.shape)
    stores = [pairs[name] for name in ("tail", "selected", "window")]
    learned = [p for p in params if p is None or isinstance(p, CompressionParams)]
    tensors: list[tuple[Tensor, ...]] = []
    sizes: dict[str, int] = {}
    for kind, dim, of_x in zip("KV", (dk, dv), learned, strict=True):
        # The mean has none, of which a tuple stands for something that nobody reads.
        tensors.append((q,) if of_x is None else tuple(x.contiguous() for x in of_x if x is not None))
        hidden = dim if of_x is None else of_x.weight.shape[2]
        width, tall = next_power_of_2(hidden), config.compress_block_size * (1 if of_x is None else dim)
        rows = min(next_power_of_2(tall), max(16, _ELEMENTS // width))
        sizes |= {f"{kind}_WIDTH": next_power_of_2(dim), f"{kind}_HIDDEN": hidden, f"{kind}_HIDDEN_WIDTH": width}
        sizes[f"{kind}_ROWS"] = rows
    if batch:
        with torch.cuda.device_of(q):
            _step_kernel[(_PROGRAMS.value * heads * batch, 1, 1)](
                q, tuple(k), tuple(v), out, q.new_empty(batch, heads, dk), rope, lengths, arrived,
                tuple(pair[0] for pair in stores), tuple(pair[1] for pair in stores), *pairs["compressed"], *tensors,
                (q.stride(0), q.stride(2)), tuple((x.stride(0), x.stride(2)) for x in k),
                tuple((x.stride(0), x.stride(2)) for x in v), 0 if rope is None else rope.shape[0],
                *(pair[0].shape[1] for pair in stores), pairs["compressed"][0].shape[1], heads,
                G=q.shape[2] // heads, ROWS=next_power_of_2(q.shape[2] // heads), LENGTH=config.compress_block_size,
                STRIDE=config.compress_stride, DK=dk, DV=dv, MEAN=config.compression == "mean",
                LINEAR=config.compression == "linear", TURN=rope is not None,
                ACC=accumulator(q.dtype), ANGLE=angle_accumulator(q, rope), INTERLEAVED=interleaved, **sizes,
                num_warps=8,
            )  # fmt: skip
    return q if rope is None else out
