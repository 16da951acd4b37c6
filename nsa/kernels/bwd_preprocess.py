"""Backward preprocessing: numbers that all branches need for each row (token, head), made in one pass over `dout`.

For every branch `c` with output `out_c`, log-sum-exp `lse_c` and, if there are gates, `gate_c`:

    delta_c = dout.out_c,    dgate_c = delta_c,    lse2_c = lse_c / ln 2 - log2 |gate_c|  (`weigh` adds the gate's sign)

With `lse2_c` the dk/dv kernels get the probabilities times the gate. A row that sees nothing has `lse_c = -inf`, which
becomes `lse2_c = +inf`: its probabilities are 0 without a special case.

The rows of `dout` and of each output are read once. Rows of a program are some tokens by some heads, so that it writes
whole sectors of memory in either layout of the results: kernels that gather tokens want the heads of a token together
(token-major), kernels that walk over the tokens of a head want those together (head-major).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from nsa.kernels.configs import chunks
from nsa.kernels.launches import recordable
from nsa.kernels.primitives import LOG2E, accumulator, cdiv, load_chunks, next_power_of_2, weigh

_ROWS, _HEADS = 64, 8
"""Rows of a program, and of how many heads they are at most."""


@recordable(do_not_specialize=["num_queries"])
def _preprocess_kernel(
    dout, outs, lses, gates, deltas, lse2s, dgates, dout_strides, row_strides, num_queries, HEADS,
    DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr,
    ROW_HEADS: tl.constexpr,
):  # fmt: skip
    """`outs` and what follows are tuples with an entry a branch."""
    head_tiles = tl.cdiv(HEADS, ROW_HEADS)
    token_tiles = tl.cdiv(num_queries, ROWS // ROW_HEADS)
    program = tl.program_id(0)
    row = tl.arange(0, ROWS)
    head = program % head_tiles * ROW_HEADS + row % ROW_HEADS
    query = program // head_tiles % token_tiles * (ROWS // ROW_HEADS) + row // ROW_HEADS
    batch = (program // head_tiles // token_tiles).to(tl.int64)
    inside = (query < num_queries) & (head < HEADS)
    head = head.to(tl.int64)
    query = query.to(tl.int64)
    row = (batch * num_queries + query) * HEADS + head
    dout_offsets = batch * dout_strides[0] + query * dout_strides[1] + head * dout_strides[2]
    do0, do1 = load_chunks(dout, dout_offsets, inside, DV, V0, V1)
    for i in tl.static_range(len(outs)):
        o0, o1 = load_chunks(outs[i], row * DV, inside, DV, V0, V1)
        delta = tl.sum(o0.to(ACC) * do0.to(ACC), 1)
        if V1:
            delta += tl.sum(o1.to(ACC) * do1.to(ACC), 1)
        lse2 = tl.load(lses[i] + row, mask=inside, other=0.0) * LOG2E
        lse2 = tl.where(lse2 == float("-inf"), float("inf"), lse2)
        if gates is not None:
            lse2 = weigh(lse2, tl.load(gates[i] + 3 * row, mask=inside, other=0.0).to(ACC), ACC)
            tl.store(dgates[i] + 3 * row, delta.to(dgates[i].dtype.element_ty), mask=inside)
        row_offsets = batch * row_strides[i][0] + query * row_strides[i][1] + head * row_strides[i][2]
        tl.store(deltas[i] + row_offsets, delta, mask=inside)
        tl.store(lse2s[i] + row_offsets, lse2, mask=inside)


class BackwardRows(NamedTuple):
    """Numbers a row (token, head) of one branch, `[B, Tq, Hq]`, in the accumulator's dtype.

    Attributes:
        delta: `dout.out`.
        lse2: log-sum-exp in base 2, weighted by the gate if there is one.
    """

    delta: Tensor
    lse2: Tensor


def preprocess(
    dout: Tensor,
    outs: Sequence[Tensor],
    lses: Sequence[Tensor],
    gates: Sequence[Tensor] | None = None,
    dgates: Sequence[Tensor] | None = None,
    head_major: Sequence[bool] | None = None,
) -> list[BackwardRows]:
    """The rows of each branch.

    Args:
        dout: `[B, Tq, Hq, Dv]`, with a contiguous last dimension.
        outs: outputs of the branches, of the same shape, contiguous.
        lses: their natural log-sum-exps `[B, Tq, Hq]`, contiguous.
        gates: `[B, Tq, Hq]` a branch, every third element of contiguous memory: what `dout` is multiplied by.
        dgates: likewise for the gradients of `gates`, written.
        head_major: whether a branch's results lie as `[B, Hq, Tq]` in memory, each head at a whole 64 bytes; otherwise
            as `[B, Tq, Hq]`, the default. Their shape is `[B, Tq, Hq]` either way.
    """
    batch, num_queries, heads, dim = dout.shape
    rows = [_new_rows(lse, major) for lse, major in zip(lses, head_major or [False] * len(lses), strict=True)]
    if not dout.numel():
        return rows
    v0, v1 = chunks(dim)
    row_heads = min(_HEADS, next_power_of_2(heads))
    programs = batch * cdiv(heads, row_heads) * cdiv(num_queries, _ROWS // row_heads)
    with torch.cuda.device_of(dout):
        _preprocess_kernel[(programs,)](
            dout, tuple(outs), tuple(lses), gates and tuple(gates), tuple(x.delta for x in rows),
            tuple(x.lse2 for x in rows), dgates and tuple(dgates), dout.stride()[:3],
            tuple(x.delta.stride() for x in rows), num_queries, heads, DV=dim, V0=v0, V1=v1,
            ACC=accumulator(dout.dtype), ROWS=_ROWS, ROW_HEADS=row_heads, num_warps=8,
        )  # fmt: skip
    return rows


def _new_rows(lse: Tensor, head_major: bool) -> BackwardRows:
    if not head_major:
        return BackwardRows(lse.new_empty(lse.shape), lse.new_empty(lse.shape))
    batch, num_queries, heads = lse.shape
    # Heads begin at a whole 64 bytes, however long: kernels are compiled for strides that do and others that do not.
    rows = lse.new_empty(2, batch, heads, cdiv(num_queries, 16) * 16)
    return BackwardRows(*rows[..., :num_queries].transpose(2, 3))
