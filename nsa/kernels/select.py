"""Selection of blocks: importance from the compressed probabilities, then each query's best (paper, section 3.3.2).

With `p[i] = sum over the G query heads of exp(scale q k_cmp_i - lse)` for the visible compressed blocks `i`, and
weights that count, in strides `d`, the tokens that compressed and selection blocks have in common (equation 9):

    importance[j] = sum_i overlap(i, j) / d * p[i]

A compressed block is no longer than a selection block (`l <= l'`), so it lies in the block it starts in and perhaps the
next one. With `r = l' / d` compressed blocks starting in each:

    importance[j] = sum_{c < r} own[c] p[j r + c] + sum_{c < r} next[c] p[(j - 1) r + c]
    own[c] = min(l, l' - c d) / d,    next[c] = l / d - own[c]

Scores are computed transposed, keys down and columns `(head, query)` across: on the matrix units' layout the sum over
the heads of a KV head then stays within a thread. Probabilities never reach memory. Importances do, for as many
queries at a time as fit into a workspace of fixed size; a second kernel takes each query's best from there, so memory
does not grow with the square of the length, and no sorting stands between two products. On Hopper
`nsa.kernels.hopper.importance` takes the place of the first kernel where it can.

The best `n` need no sort: the `n`-th largest importance is found by bisection on its bits (numbers that are not
negative are ordered like their bits), and running counts of the blocks above it, and of as many equal to it as are
still wanted, give each its place in ascending order. Forced blocks stand above every number, so none is ever lost; ties
go to the lower index because equals are counted from there.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.config import NSAConfig
from nsa.kernels.configs import chunks, kernel_config
from nsa.kernels.flash_tiles import PositionMap
from nsa.kernels.hopper import available
from nsa.kernels.hopper import importance as hopper
from nsa.kernels.launches import recordable, recorded
from nsa.kernels.primitives import (
    LOG2E,
    accumulator,
    cdiv,
    count_tiles,
    dot_chunks,
    dot_precision,
    find_tile,
    load_chunks,
    next_power_of_2,
    rows_contiguous,
)
from nsa.ops import Operator, accumulation_dtype, config_of, sizes_of
from nsa.varlen import Varlen, tensors_of, varlen_of

WORKSPACE_BYTES = 128 << 20
"""Importances held at a time: enough queries to fill a large GPU, little beside the queries themselves."""

ALIGNED = tl.constexpr(4)
"""Importances of a query take a multiple of this many places."""

# Sizes that change from call to call and are no reason to compile again.
_LENGTHS = ("num_sequences", "num_queries", "num_tokens", "num_blocks", "first_tile", "num_tiles", "width", "span")


@recordable(do_not_specialize=_LENGTHS)
def _importance_kernel(
    q, k, lse, scores, cu_queries, cu_tokens, cu_blocks, num_sequences, q_strides, k_strides, num_queries, num_tokens,
    num_blocks, first_tile, num_tiles, width, span, scale, HEADS, G: tl.constexpr, PADDED_G: tl.constexpr,
    QUERIES: tl.constexpr, BLOCKS: tl.constexpr, RATIO: tl.constexpr, LENGTH: tl.constexpr, STRIDE: tl.constexpr,
    DK: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Importances of `span` blocks to `QUERIES` queries, `BLOCKS` at a time; scores are `[..., QUERIES, width]`."""
    SIZE: tl.constexpr = RATIO * STRIDE
    # Compressed blocks that reach into the next selection block need the one before: tiles overlap by one.
    BEFORE: tl.constexpr = 1 if LENGTH > STRIDE else 0
    program = tl.program_id(0)
    # Late queries see most and take longest, so they go first.
    local_tile = num_tiles - 1 - program % num_tiles
    head = (program // num_tiles % HEADS).to(tl.int64)
    batch = (program // num_tiles // HEADS).to(tl.int64)
    first, query_start, queries, tokens, block_start, count = find_tile(
        cu_queries, cu_queries, cu_tokens, cu_blocks, num_sequences, num_queries, num_tokens, num_blocks,
        first_tile + local_tile, 1, QUERIES, PACKED,
    )  # fmt: skip
    within = tl.arange(0, QUERIES)
    position = first + within + tokens - queries
    live = first + within < queries
    last = tl.minimum(first + QUERIES, queries) - 1 + tokens - queries
    begin = tl.program_id(1) * span
    end = tl.minimum(begin + span, tl.where(first < queries, last // SIZE + 1, 0))

    column = tl.arange(0, PADDED_G * QUERIES)
    member = column // QUERIES
    query = first + column % QUERIES
    real = (member < G) & (query < queries)
    query = (query_start + query).to(tl.int64)
    offsets = query * q_strides[1] + member.to(tl.int64) * q_strides[2]
    q += batch * q_strides[0] + head * G * q_strides[2]
    k += batch * k_strides[0] + block_start.to(tl.int64) * k_strides[1] + head * k_strides[2]
    q0, q1 = load_chunks(q, offsets, real, DK, K0, K1)
    rows = (batch * num_queries + query) * HEADS * G + head * G + member
    log_sum = tl.load(lse + rows, mask=real, other=float("-inf")).to(ACC) * LOG2E
    # Columns of nothing, and queries that see nothing, have probabilities of 0.
    log_sum = tl.where(log_sum == float("-inf"), float("inf"), log_sum)

    share = tl.arange(0, RATIO) * STRIDE
    own_weight = (tl.minimum(LENGTH, SIZE - share) // STRIDE).to(ACC)
    next_weight = LENGTH // STRIDE - own_weight
    group = tl.arange(0, BLOCKS)
    previous = tl.zeros([BLOCKS, QUERIES], dtype=tl.int32) + tl.maximum(group - 1, 0)[:, None]
    scores += ((batch * HEADS + head) * num_tiles + local_tile) * QUERIES * width
    for start in range(begin, end, BLOCKS - BEFORE):
        block = (start - BEFORE) * RATIO + tl.arange(0, BLOCKS * RATIO)
        exists = (block >= 0) & (block < count)
        k_offsets = block.to(tl.int64) * k_strides[1]
        k0, k1 = load_chunks(k, k_offsets, exists, DK, K0, K1)
        s = dot_chunks(k0, k1, q0, q1, K1, ACC, PRECISION)
        # A hidden key's logit may be any height above the log-sum-exp; a visible one's is not, but for rounding.
        p = tl.exp2(tl.minimum(s * (scale * LOG2E) - log_sum[None, :], 0.0))
        p = tl.sum(tl.reshape(p, [BLOCKS * RATIO, PADDED_G, QUERIES]), 1)
        seen = exists[:, None] & ((block * STRIDE + LENGTH - 1)[:, None] <= position[None, :])
        p = tl.where(seen, p, 0.0)
        p = tl.reshape(p, [BLOCKS, RATIO, QUERIES])
        importance = tl.sum(p * own_weight[None, :, None], 1)
        if BEFORE > 0:
            importance += tl.gather(tl.sum(p * next_weight[None, :, None], 1), previous, 0)
        chosen = start - BEFORE + group
        tl.store(
            scores + within[None, :] * width + chosen[:, None],
            importance,
            mask=((group >= BEFORE) & (chosen < end))[:, None] & live[None, :],
        )


@triton.jit
def best_candidates(
    score, block, own, WANTED: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr, ROWS: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """Which blocks `[1, N]` are among the best `WANTED` candidates of each query, and the place of each of them.

    Args:
        score: `[ROWS, N]`.
        own: `[ROWS, 1]`, the block of each query, its last candidate; -1 where there is no query.
        BITS: an integer as wide as a score.
    """
    FORCED: tl.constexpr = 2 ** (BITS.primitive_bitwidth - 1) - 2
    candidate = block <= own
    rank = tl.minimum(tl.maximum(score.to(BITS, bitcast=True), 0), FORCED - 1)  # not even NaN is above
    rank = tl.where((block < INITIAL) | (block > own - LOCAL), FORCED, rank)
    rank = tl.where(candidate, rank, -1)

    # At least `wanted` candidates reach `low`, and at most as many reach `high`.
    wanted = tl.minimum(own + 1, WANTED)
    free = candidate & (rank < FORCED)
    low = tl.min(tl.where(free, rank, FORCED - 1), 1)[:, None]
    high = tl.max(tl.where(free, rank, -1), 1)[:, None] + 1
    while tl.max(tl.max(high - low, 1), 0) > 1:
        middle = low + (high - low) // 2
        reached = tl.sum((rank >= middle).to(tl.int32), 1)[:, None]
        high = tl.where(reached > wanted, high, tl.where(reached == wanted, middle + 1, middle))
        low = tl.where(reached >= wanted, middle, low)

    above = rank > low
    equal = rank == low
    spare = wanted - tl.sum(above.to(tl.int32), 1)[:, None]
    # Running counts of both kinds in one number.
    ABOVE: tl.constexpr = 2 * score.shape[1]
    tl.static_assert(WANTED * ABOVE < 2**31, "too many blocks to count")
    running = tl.cumsum(tl.where(above, ABOVE, equal.to(tl.int32)), 1).to(tl.uint32)
    equals = (running % ABOVE).to(tl.int32)
    place = (running // ABOVE).to(tl.int32) + tl.minimum(equals, spare) - 1
    return above | (equal & (equals <= spare)), place


@recordable(do_not_specialize=_LENGTHS)
def _best_kernel(
    scores, indices, cu_queries, cu_tokens, num_sequences, num_queries, num_tokens, first_tile, num_tiles, width, HEADS,
    WANTED: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr, SIZE: tl.constexpr, QUERIES: tl.constexpr,
    ROWS: tl.constexpr, CANDIDATES: tl.constexpr, BITS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The best `WANTED` candidates of `ROWS` queries, into indices that are -1 so far."""
    program = tl.program_id(0)
    local_row = program * ROWS % (num_tiles * QUERIES)
    head = program * ROWS // (num_tiles * QUERIES) % HEADS
    batch = (program * ROWS // (num_tiles * QUERIES) // HEADS).to(tl.int64)
    first, query_start, queries, tokens, _, _ = find_tile(
        cu_queries, cu_queries, cu_tokens, cu_queries, num_sequences, num_queries, num_tokens, 0,
        first_tile + local_row // QUERIES, 1, QUERIES, PACKED,
    )  # fmt: skip
    row = tl.arange(0, ROWS)
    query = first + local_row % QUERIES + row
    live = query < queries
    own = tl.where(live, (query + tokens - queries + SIZE) // SIZE - 1, -1)[:, None]
    block = tl.arange(0, CANDIDATES)[None, :]
    candidate = block <= own
    # Neighbouring candidates are one thread's then, and running counts of them need fewer exchanges between threads.
    width = width // ALIGNED * ALIGNED
    scores += ((batch * HEADS + head) * num_tiles * QUERIES + local_row) * width
    score = tl.load(scores + row.to(tl.int64)[:, None] * width + block, mask=candidate, other=0.0)
    chosen, place = best_candidates(score, block, own, WANTED, INITIAL, LOCAL, ROWS, BITS)
    indices += ((batch * num_queries + query_start + query.to(tl.int64)) * HEADS + head)[:, None] * WANTED
    tl.store(indices + place, tl.zeros([ROWS, CANDIDATES], dtype=tl.int32) + block, mask=chosen)


def _choose_blocks(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    cu_blocks: Tensor | None,
    queries: Tensor | None,
    num_keys: int,
    sizes: Sequence[int],
    scale: float,
) -> Tensor:
    config = config_of(sizes)
    (batch, num_queries, query_heads, dim), heads = q.shape, k_cmp.shape[2]
    indices = q.new_full((batch, num_queries, heads, config.num_selected_blocks), -1, dtype=torch.int32)
    if indices.numel() == 0:
        return indices
    q, k_cmp, lse = rows_contiguous(q), rows_contiguous(k_cmp), lse.contiguous()
    group, ratio = query_heads // heads, config.select_block_size // config.compress_stride
    padded_group = next_power_of_2(group)
    kernel = kernel_config("importance", q.dtype, dim, dim, group, q.device)
    # Columns of a product: the heads of at least as many queries as make 16, at most as many as there are.
    tile_queries = min(max(16, kernel.BLOCK_M) // padded_group, next_power_of_2(num_queries))
    tile_queries = max(tile_queries, 16 // padded_group, 1)

    varlen = varlen_of(cu_seqlens_q, cu_seqlens_k, cu_blocks, queries)
    on_hopper = available(q.device) and varlen is None and hopper.applies(q, k_cmp, config)
    if on_hopper:
        tile_queries = hopper.QUERIES
    offsets = PositionMap.compressed(config, num_keys).offsets(varlen)
    count = count_tiles(num_queries, 1, tile_queries, offsets)
    first_chunk, second_chunk = chunks(dim)
    constants: dict[str, Any] = {
        "G": group,
        "PADDED_G": padded_group,
        "BLOCKS": max(2, max(16, kernel.BLOCK_N) // ratio),
        "RATIO": ratio,
        "LENGTH": config.compress_block_size,
        "STRIDE": config.compress_stride,
        "DK": dim,
        "K0": first_chunk,
        "K1": second_chunk,
        "ACC": accumulator(q.dtype),
        "PRECISION": dot_precision(q.dtype),
    }
    dtype = accumulation_dtype(q.dtype)
    row_bytes = batch * heads * tile_queries * config.num_selectable(num_keys) * dtype.itemsize
    step = max(1, WORKSPACE_BYTES // max(1, row_bytes))
    for first in range(0, count, step):
        taken = min(step, count - first)
        # Unless sequences are packed, the last query of the part says how far importances can reach.
        reach = num_keys - num_queries + min((first + taken) * tile_queries, num_queries)
        reached = config.num_selectable(reach if varlen is None else num_keys)
        width = cdiv(reached, ALIGNED.value) * ALIGNED.value
        scores = q.new_empty((batch, heads, taken * tile_queries, width), dtype=dtype)
        programs = batch * heads * taken
        parts = max(1, min(kernel.num_programs // programs, reached // (4 * constants["BLOCKS"])))
        candidates = max(16, next_power_of_2(reached))
        rows = max(1, min(tile_queries, 256 // candidates))  # few a warp, so that many warps have room
        bits = 8 * dtype.itemsize
        with torch.cuda.device_of(q):
            if on_hopper:
                hopper.importance(q, k_cmp, lse, scores, config, num_keys, first, scale)
            else:
                _importance_kernel[(programs, parts)](
                    q, k_cmp, lse, scores, *offsets, q.stride()[:3], k_cmp.stride()[:3], num_queries, num_keys,
                    k_cmp.shape[1], first, taken, width, cdiv(reached, parts), scale, heads, **constants,
                    QUERIES=tile_queries, PACKED=varlen is not None, **kernel.compiled,
                )  # fmt: skip
            _best_kernel[(programs * (tile_queries // rows),)](
                scores, indices, *offsets[:2], offsets[3], num_queries, num_keys, first, taken, width, heads,
                WANTED=config.num_selected_blocks, INITIAL=config.num_initial_blocks, LOCAL=config.num_local_blocks,
                SIZE=config.select_block_size, QUERIES=tile_queries, ROWS=rows, CANDIDATES=candidates,
                BITS=tl.int64 if bits == 64 else tl.int32, PACKED=varlen is not None,
                num_warps=min(16, max(1, candidates // 1024)),
            )  # fmt: skip
    return indices


def _fake(q: Tensor, k_cmp: Tensor, *inputs: Any) -> Tensor:
    slots = config_of(inputs[-2]).num_selected_blocks
    return q.new_empty((*q.shape[:2], k_cmp.shape[2], slots), dtype=torch.int32)


_select = Operator("nsa_triton::select_blocks", recorded(_choose_blocks), _fake)


def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    config: NSAConfig,
    num_keys: int,
    varlen: Varlen | None,
    scale: float,
) -> Tensor:
    """Indices `[B, Tq, Hk, N]`; see `nsa.functional.select_blocks`."""
    rest = (*tensors_of(varlen), num_keys, sizes_of(config), scale)
    return cast(Tensor, _select(q.detach(), k_cmp.detach(), lse.detach(), *rest))
