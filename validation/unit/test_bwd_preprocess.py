"""The numbers a row that backward kernels begin with, held to their definition."""

import math

import pytest
import torch
from torch import Tensor

from nsa import kernels
from nsa.kernels.bwd_preprocess import preprocess
from validation.numerics import assert_equal, assert_matches

pytestmark = pytest.mark.usefixtures("on_device")

DTYPE = torch.float64 if kernels.INTERPRETED else torch.float32
SHAPES = [(2, 37, 3, 16), (1, 9, 10, 80), (1, 70, 1, 192)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))


def branches(shape: tuple[int, ...], count: int) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """`dout` with strides of its own, outputs, log-sum-exps (of some rows of nothing) and gates of both signs."""
    batch, tokens, heads, dim = shape
    dout = torch.randn(batch, heads, tokens, dim + 3, dtype=DTYPE)[..., :dim].transpose(1, 2)
    outs = [torch.randn(shape, dtype=DTYPE) for _ in range(count)]
    lses = [torch.randn(shape[:3], dtype=DTYPE) for _ in range(count)]
    for lse in lses:
        lse[:, : tokens // 5] = -torch.inf
    return dout, outs, lses, torch.randn(*shape[:3], 3, dtype=DTYPE)


@each_shape
@pytest.mark.parametrize("count", [1, 3])
def test_rows_are_those_of_the_definition(shape: tuple[int, ...], count: int) -> None:
    dout, outs, lses, _ = branches(shape, count)
    for (delta, lse2), out, lse in zip(preprocess(dout, outs, lses), outs, lses, strict=True):
        assert_matches(delta, (dout.double() * out.double()).sum(-1), what="delta", reduction=shape[3], dtype=DTYPE)
        expected = (lse.double() / math.log(2)).masked_fill(lse == -torch.inf, torch.inf)
        assert_matches(lse2, expected, what="lse2", reduction=1, dtype=DTYPE)


@each_shape
def test_the_gradient_of_a_gate_is_delta(shape: tuple[int, ...]) -> None:
    dout, outs, lses, gates = branches(shape, 3)
    dgates = torch.full_like(gates, torch.nan)
    found = preprocess(dout, outs, lses, gates.unbind(-1), dgates.unbind(-1))
    assert_equal(dgates, torch.stack([rows.delta for rows in found], -1), what="dgates")


@each_shape
def test_a_gate_weights_the_log_sum_exp_and_leaves_its_sign_in_the_last_bit(shape: tuple[int, ...]) -> None:
    dout, outs, lses, gates = branches(shape, 3)
    gates[:, -1, :, 1] = 0
    integer = torch.int64 if torch.float64 == DTYPE else torch.int32
    found = preprocess(dout, outs, lses, gates.unbind(-1), torch.empty_like(gates).unbind(-1))
    for (_, lse2), lse, gate in zip(found, lses, gates.unbind(-1), strict=True):
        nothing = (lse == -torch.inf) | (gate == 0)
        expected = (lse.double() / math.log(2) - gate.double().abs().log2()).masked_fill(nothing, torch.inf)
        assert_matches(lse2, expected, what="lse2", reduction=2, dtype=DTYPE)
        assert_equal(lse2.view(integer) & 1 == 1, (gate < 0) & ~nothing, what="signs")


@each_shape
def test_head_major_rows_are_the_same_in_another_layout(shape: tuple[int, ...]) -> None:
    dout, outs, lses, gates = branches(shape, 3)
    arguments = (dout, outs, lses, gates.unbind(-1), torch.empty_like(gates).unbind(-1))
    expected = preprocess(*arguments)
    for mine, other in zip(preprocess(*arguments, head_major=[True, False, True]), expected, strict=True):
        assert_equal(mine.delta, other.delta, what="delta")
        assert_equal(mine.lse2, other.lse2, what="lse2")


def test_heads_begin_at_whole_64_bytes_where_they_are_together() -> None:
    dout, outs, lses, _ = branches((2, 37, 3, 16), 2)
    tokens, heads = (rows.delta.stride() for rows in preprocess(dout, outs, lses, head_major=[False, True]))
    assert tokens == (37 * 3, 3, 1)
    assert heads == (3 * 48, 1, 48)
