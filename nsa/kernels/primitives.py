"""Primitives of the kernels: dtypes, tiles of packed sequences, rows in chunks of columns, the online softmax.

Packed sequences are cut into tiles that never cross a boundary. How many tiles that makes depends on the lengths, which
live on the device, while a grid must be known on the host. So grids have room for as many tiles as there could be, each
program finds its tile from the offsets (`find_sequence`), and programs without one have nothing to do.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nsa.kernels.configs import chunks, kernel_config

# The interpreter holds bfloat16 as integers and multiplies them as such.
_WIDEN_BFLOAT16 = tl.constexpr(triton.knobs.runtime.interpret)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


def accumulator(dtype: torch.dtype) -> Any:
    """The Triton dtype sums are kept in: float64 for float64 (under the interpreter), else float32."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def dot_precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies: three TF32 products make a float32 one, nothing narrower is split."""
    return "tf32x3" if dtype == torch.float32 else "ieee"


# Triton's functions of these names work in kernels too, which makes calls on the host slow.


def cdiv(x: int, y: int) -> int:
    """`x / y`, rounded up."""
    return -(-x // y)


def next_power_of_2(x: int) -> int:
    """The least power of two that is not below `x >= 1`."""
    return 1 << (x - 1).bit_length()


def logit_factor(scale: float) -> float:
    """The positive factor of logits in base 2. Where `scale` is negative, kernels negate the products, so that the
    largest product is the largest logit. The factor is never 0, because 0 times a hidden `-inf` is NaN."""
    return max(abs(scale) * LOG2E.value, 1e-30)


def rows_contiguous(x: Tensor) -> Tensor:
    """`x` itself where its last dimension is contiguous, as every kernel assumes, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def count_tiles(length: int, factor: int, block: int, offsets: tuple[Any, Any, Any, int]) -> int:
    """Tiles of `block` rows that `length` steps of `factor` rows make, or that packed sequences could make of them.

    Args:
        offsets: as kernels take them; the last is the number of packed sequences, 0 where there is one sequence.
    """
    sequences = offsets[3]
    return length * factor // block + sequences if sequences else cdiv(length * factor, block)


def describable(*tensors: Tensor) -> bool:
    """Whether tensor descriptors can stand for `[B, T, H, D]`: they want strides and addresses of whole 16 bytes."""
    for x in tensors:
        if x.numel() == 0 or x.data_ptr() % 16:
            return False
        whole = 16 // x.element_size()
        for stride in x.stride()[:3]:
            if stride <= 0 or stride % whole:
                return False
    return True


class _Descriptor(TensorDescriptor):
    """A descriptor whose fields are known to be right, by `describable` and by configurations."""

    def __post_init__(self) -> None:
        pass


def descriptors(x: Tensor, block: int, use: bool) -> tuple[TensorDescriptor | None, TensorDescriptor | None]:
    """Descriptors of `[B, T, H, D]` read as `[B, H, T, D]`, one a chunk of `D`, in tiles of `block` tokens."""
    if not use:
        return None, None
    (batch, tokens, heads, dim), (of_batch, of_token, of_head, of_dim) = x.shape, x.stride()
    shape, strides = [batch, heads, tokens, dim], [of_batch, of_head, of_token, of_dim]
    first, second = chunks(dim)
    return (
        _Descriptor(x, shape, strides, [1, 1, block, first]),
        _Descriptor(x, shape, strides, [1, 1, block, second]) if second else None,
    )


class Heads(NamedTuple):
    """Dtype, group and head dimensions of the tensors of a branch."""

    dtype: torch.dtype
    group: int
    dk: int
    dv: int

    @staticmethod
    def of(q: Tensor, k: Tensor, v: Tensor) -> "Heads":
        """Describes `q [B, Tq, Hq, Dk]`, `k [B, T, Hk, Dk]` and `v [B, T, Hk, Dv]`."""
        return Heads(q.dtype, q.shape[2] // k.shape[2], k.shape[3], v.shape[3])

    def config(self, kernel: str, device: torch.device) -> Any:
        """Configuration of a kernel, of its type in `nsa.kernels.configs.KERNELS`."""
        return kernel_config(kernel, self.dtype, self.dk, self.dv, self.group, device)

    def constants(self) -> dict[str, Any]:
        """Constants that every attention kernel has."""
        (k0, k1), (v0, v1) = chunks(self.dk), chunks(self.dv)
        return {
            "G": self.group,
            "DK": self.dk,
            "K0": k0,
            "K1": k1,
            "DV": self.dv,
            "V0": v0,
            "V1": v1,
            "ACC": accumulator(self.dtype),
            "PRECISION": dot_precision(self.dtype),
        }


WORKSPACE_BYTES = 1 << 30
"""Workspace held at a time by kernels that work on some heads after others, if one head does not need more."""

_LARGEST_GRID = 65535  # along any side but the first


def head_runs(heads: int, bytes_per_head: int) -> list[tuple[int, int]]:
    """Runs of heads whose workspace is held at a time, each the first head and their number; the first is longest."""
    step = min(_LARGEST_GRID, max(1, WORKSPACE_BYTES // max(1, bytes_per_head)))
    return [(first, min(step, heads - first)) for first in range(0, heads, step)]


# In the kernels. A head dimension comes in one or two chunks; where there is one, the second is a copy of the first
# that nobody uses.


@triton.jit
def dot(a, b, total, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """`a b + total`, summed in ACC; `total` may be None."""
    if _WIDEN_BFLOAT16 and a.dtype == tl.bfloat16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def dot_chunks(a0, a1, b0, b1, D1: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """`a b^T` of rows `a [M, D]` and `b [N, D]` in two chunks of columns."""
    product = dot(a0, tl.trans(b0), None, ACC, PRECISION)
    if D1:
        product = dot(a1, tl.trans(b1), product, ACC, PRECISION)
    return product


@triton.jit
def weigh(lse2, weight, ACC: tl.constexpr):
    """Log-sum-exps in base 2 that make `probability` give `weight` times as much.

    The weight's sign goes into the last bit, below what rounding leaves certain. One number a row instead of two:
    kernels that hold a tile of keys' gradients have no registers left.
    """
    INTEGER: tl.constexpr = tl.int64 if tl.float64 == ACC else tl.int32
    nothing = weight == 0
    lse2 = tl.where(nothing, float("inf"), lse2 - tl.log2(tl.where(nothing, 1.0, tl.abs(weight))))
    negative = (weight < 0) & (lse2 < float("inf"))
    return (lse2.to(INTEGER, bitcast=True) & -2 | negative.to(INTEGER)).to(ACC, bitcast=True)


@triton.jit
def probability(x, lse2, ACC: tl.constexpr, WEIGHTED: tl.constexpr):
    """`2^(x - lse2)`; with WEIGHTED `lse2` is what `weigh` made."""
    p = tl.exp2(x - lse2)
    if WEIGHTED:
        INTEGER: tl.constexpr = tl.int64 if tl.float64 == ACC else tl.int32
        sign = lse2.to(INTEGER, bitcast=True) << (63 if tl.float64 == ACC else 31)
        p = (p.to(INTEGER, bitcast=True) ^ sign).to(ACC, bitcast=True)
    return p


@triton.jit
def find_program(program, num_tiles, HEADS):
    """A program's tile, KV head and batch row. Grids have one side: CUDA limits the others to 65,535 blocks."""
    return program % num_tiles, program // num_tiles % HEADS, program // num_tiles // HEADS


@triton.jit
def wait_for_previous(EARLY: tl.constexpr):
    """With EARLY this kernel may have started before the one before has ended: waits for that."""
    if EARLY:
        tl.extra.cuda.gdc_wait()


@triton.jit
def start_next(EARLY: tl.constexpr):
    """With EARLY lets the next kernel start, once all programs of this one have come here: starting takes its time."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def find_sequence(offsets, num_sequences, slot, FACTOR: tl.constexpr, BLOCK: tl.constexpr):
    """The packed sequence that has slot number `slot`, and the number of that slot within the sequence.

    Sequences are cut into blocks of `BLOCK` rows, `FACTOR` rows for each step of `offsets [N + 1]`. The slots of
    sequence `s` begin at `offsets[s] FACTOR // BLOCK + s`, which leaves room for all of its blocks; some slots have
    none. So the slots of all sequences are known to be `offsets[N] FACTOR // BLOCK + N` without a look at the device.
    """
    sequence = slot * 0 - 1
    for start in range(0, num_sequences, 32):
        candidate = start + tl.arange(0, 32)
        offset = tl.load(offsets + candidate, mask=candidate < num_sequences, other=0)
        begins = (candidate < num_sequences) & (offset * FACTOR // BLOCK + candidate <= slot)
        sequence += tl.sum(begins.to(tl.int32), 0)
    return sequence, slot - tl.load(offsets + sequence) * FACTOR // BLOCK - sequence


@triton.jit
def find_tile(
    offsets, cu_queries, cu_tokens, cu_keys, num_sequences, num_queries, num_tokens, num_keys, tile,
    FACTOR: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """First row of a tile of `BLOCK` rows, then start and number of queries, number of tokens, start and number of keys
    of its sequence. `offsets` are those of what is cut into tiles, with `FACTOR` rows a step. Tiles that do not exist,
    for which `find_sequence` leaves room, belong to a sequence of nothing."""
    query_start = 0
    key_start = 0
    if PACKED:
        sequence, tile = find_sequence(offsets, num_sequences, tile, FACTOR, BLOCK)
        rows = (tl.load(offsets + sequence + 1) - tl.load(offsets + sequence)) * FACTOR
        exists = (tile * BLOCK < rows).to(tl.int32)
        query_start = tl.load(cu_queries + sequence)
        key_start = tl.load(cu_keys + sequence)
        num_queries = (tl.load(cu_queries + sequence + 1) - query_start) * exists
        num_keys = (tl.load(cu_keys + sequence + 1) - key_start) * exists
        num_tokens = (tl.load(cu_tokens + sequence + 1) - tl.load(cu_tokens + sequence)) * exists
    return tile * BLOCK, query_start, num_queries, num_tokens, key_start, num_keys


@triton.jit
def load_rows(base, offsets, seen, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, MASKED: tl.constexpr):
    """Columns `FIRST` to `FIRST + WIDTH` of the rows at `base + offsets [M]`; 0 beyond `DIM` and, if MASKED, unseen."""
    columns = FIRST + tl.arange(0, WIDTH)
    pointers = base + offsets[:, None] + columns[None, :]
    if FIRST + WIDTH > DIM:
        if MASKED:
            return tl.load(pointers, mask=seen[:, None] & (columns < DIM)[None, :], other=0.0)
        else:
            return tl.load(pointers, mask=(columns < DIM)[None, :], other=0.0)
    else:
        if MASKED:
            return tl.load(pointers, mask=seen[:, None], other=0.0)
        else:
            return tl.load(pointers)


@triton.jit
def load_chunks(
    base, offsets, seen, DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, MASKED: tl.constexpr = True
):
    """The rows at `base + offsets [M]` in two chunks, `[M, D0]` and `[M, D1]`; 0 if MASKED and not `seen [M]`."""
    first = load_rows(base, offsets, seen, 0, D0, DIM, MASKED)
    second = first
    if D1:
        second = load_rows(base, offsets, seen, D0, D1, DIM, MASKED)
    return first, second


@triton.jit
def fetch(
    tiles0, tiles1, base, offsets, seen, batch, head, row, stride,
    DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Rows `row` to `row + BLOCK` of one head in two chunks, by descriptor (which pads with 0) or by pointers."""
    if TMA:
        first = tiles0.load([batch, head, row, 0]).reshape(BLOCK, D0)
        second = first
        if D1 > 0:
            second = tiles1.load([batch, head, row, D0]).reshape(BLOCK, D1)
    else:
        base += tl.cast(row, tl.int64) * stride
        first, second = load_chunks(base, offsets, seen, DIM, D0, D1, MASKED)
    return first, second


@triton.jit
def not_finite(x0, x1, D1: tl.constexpr, ACC: tl.constexpr):
    """Which rows of `[M, D0]` and `[M, D1]` hold an infinity or a NaN."""
    found = tl.max((~(tl.abs(x0.to(ACC)) < float("inf"))).to(tl.int32), 1)
    if D1 > 0:
        found = tl.maximum(found, tl.max((~(tl.abs(x1.to(ACC)) < float("inf"))).to(tl.int32), 1))
    return found > 0


@triton.jit
def zero_unless_finite(x0, x1, D1: tl.constexpr, ACC: tl.constexpr):
    """0, or NaN where `[M, D0]` or `[M, D1]` holds an infinity or a NaN: the sum of 0 times everything, which takes
    fewer instructions than to compare everything."""
    zeros = tl.sum(x0.to(ACC) * 0.0, 1)
    if D1 > 0:
        zeros += tl.sum(x1.to(ACC) * 0.0, 1)
    return tl.sum(zeros, 0)


@triton.jit
def program_of(poisoned, CLEAN: tl.constexpr):
    """This program's number. With CLEAN `poisoned` is NaN, and so adds 0, which the compiler does not know: it finds
    everything of the second pass anew, instead of keeping it in registers throughout the first."""
    program = tl.program_id(0)
    if CLEAN:
        program += (poisoned == poisoned).to(tl.int32)
    return program


@triton.jit
def without(x0, x1, rows, D1: tl.constexpr):
    """`[M, D0]` and `[M, D1]` with 0 in these `rows [M]`."""
    x0 = tl.where(rows[:, None], 0.0, x0).to(x0.dtype)
    if D1 > 0:
        x1 = tl.where(rows[:, None], 0.0, x1).to(x1.dtype)
    else:
        x1 = x0
    return x0, x1


@triton.jit
def store_rows(
    base, offsets, seen, x, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, ADD: tl.constexpr = False
):
    """The counterpart of `load_rows`: `x [M, WIDTH]`, added to what is there with ADD, rounded to its dtype."""
    columns = FIRST + tl.arange(0, WIDTH)
    mask = seen[:, None]
    if FIRST + WIDTH > DIM:
        mask = mask & (columns < DIM)[None, :]
    pointers = base + offsets[:, None] + columns[None, :]
    if ADD:
        x += tl.load(pointers, mask=mask, other=0.0).to(x.dtype)
    tl.store(pointers, x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def store_chunks(
    base, offsets, seen, x0, x1, DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ADD: tl.constexpr = False
):
    """The counterpart of `load_chunks`; ADD as in `store_rows`."""
    store_rows(base, offsets, seen, x0, 0, D0, DIM, ADD)
    if D1 > 0:
        store_rows(base, offsets, seen, x1, D0, D1, DIM, ADD)


@triton.jit
def add_dot(p, v0, v1, acc0, acc1, D1: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """`acc + p v` for `p [M, N]` and `v [N, D]`."""
    acc0 = dot(p, v0, acc0, ACC, PRECISION)
    if D1 > 0:
        acc1 = dot(p, v1, acc1, ACC, PRECISION)
    return acc0, acc1


@triton.jit
def online_softmax_update(s, row_max, scale, MASKED: tl.constexpr):
    """One step of the online softmax, base 2.

    Args:
        s: logits `[M, N]`; if MASKED scaled already, and `-inf` where hidden.
        row_max: `[M]`, the largest scaled logit of each row so far.

    Returns:
        `2^(s - new_max)`, the factor by which earlier sums shrink, and the new maximum.
    """
    if MASKED:
        new_max = tl.maximum(row_max, tl.max(s, 1))
        # A row may have seen nothing yet; -inf less -inf is no number.
        base = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.exp2(s - base[:, None])
    else:
        new_max = tl.maximum(row_max, tl.max(s, 1) * scale)
        base = new_max
        p = tl.exp2(s * scale - base[:, None])
    return p, tl.exp2(row_max - base), new_max
