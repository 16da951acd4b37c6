"""Every stage of Native Sparse Attention in plain PyTorch: any device, any float dtype, float64 included.

All three branches are softmax attention over some set of keys, so one pair of functions (`_attend` and
`_attend_backward`) holds the arithmetic and each branch only says which keys a tile of queries looks at:

- compressed: a prefix of the compressed blocks (paper, section 3.3.1);
- selected: the chosen blocks of keys, gathered for every query (section 3.3.2);
- window: the keys just before the tile (section 3.3.3).

Queries are taken a tile at a time and the backward pass computes the probabilities again from the saved log-sum-exp, so
memory beyond inputs and outputs is that of a tile (`_rows`) whatever the length. Arithmetic is done in float32, or in
float64 for float64 inputs; results are rounded once, when they are returned.

Tensors inside this file are head-major: `[B, Hk, T, G, D]` for queries, `[B, Hk, T, D]` for keys and values.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa.config import NSAConfig
from nsa.eager_rope import apply_rope as apply_rope
from nsa.ops import Operator, accumulation_dtype, branch_operator, config_of, sizes_of


class _Segment(NamedTuple):
    """One sequence: where its queries, keys and compressed blocks stand, and the position of its first query."""

    queries: slice
    keys: slice
    blocks: slice
    first_position: int


class _Tile(NamedTuple):
    """A run of queries of one sequence: where they stand, and their first and last positions in it."""

    queries: slice
    first: int
    last: int

    def positions(self, device: torch.device) -> Tensor:
        return torch.arange(self.first, self.last + 1, device=device)


def _segments(
    num_queries: int, num_keys: int, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, config: NSAConfig
) -> Iterator[_Segment]:
    if cu_seqlens_q is None or cu_seqlens_k is None:
        bounds_q, bounds_k = [0, num_queries], [0, num_keys]
    else:
        bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    first_block = 0
    for q0, q1, k0, k1 in zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:], strict=False):
        last_block = first_block + config.num_compressed(k1 - k0)
        q0 = max(q0, q1 - (k1 - k0))  # queries before the first key see nothing
        if q1 > q0:
            yield _Segment(slice(q0, q1), slice(k0, k1), slice(first_block, last_block), (k1 - k0) - (q1 - q0))
        first_block = last_block


def _rows(bytes_per_query: int, device: torch.device) -> int:
    """Queries in a tile whose largest intermediate has a good size: a CPU's cache, or enough to fill an accelerator."""
    tile_bytes, fewest = (2 << 20, 4) if device.type == "cpu" else (512 << 20, 1)
    return max(fewest, tile_bytes // max(1, bytes_per_query))


def _tiles(segment: _Segment, rows: int) -> Iterator[_Tile]:
    offset = segment.first_position - segment.queries.start
    for start in range(segment.queries.start, segment.queries.stop, rows):
        stop = min(start + rows, segment.queries.stop)
        yield _Tile(slice(start, stop), start + offset, stop + offset - 1)


def _grouped(x: Tensor, num_kv_heads: int) -> Tensor:
    """`[B, T, Hq, ...]` to `[B, Hk, T, G, ...]` in the accumulation dtype."""
    return x.unflatten(2, (num_kv_heads, -1)).transpose(1, 2).to(accumulation_dtype(x.dtype))


def _head_major(x: Tensor) -> Tensor:
    """`[B, T, Hk, D]` to contiguous `[B, Hk, T, D]` in the accumulation dtype."""
    return x.transpose(1, 2).to(accumulation_dtype(x.dtype)).contiguous()


def _token_major(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`[B, Hk, T, ...]` back to contiguous `[B, T, Hk, ...]` in the caller's dtype."""
    return x.transpose(1, 2).to(dtype).contiguous()


def _ungrouped(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`[B, Hk, T, G, ...]` back to contiguous `[B, T, Hq, ...]` in the caller's dtype."""
    return _token_major(x, dtype).flatten(2, 3)


# The arithmetic of one tile, shared by all branches: M query rows over L keys. What a row sees is said by how far each
# key lies ahead of it, `ahead [..., M, L]`: positive hides the key, 0 or less shows it. Where everything is finite,
# that number hides a key by arithmetic alone; a boolean mask takes several times as long on a CPU. An infinity or a
# NaN would pass through (0 times NaN is NaN), so with `careful` masks are boolean, and rows that are not finite are
# taken out of products. They count as NaN for those who see them.

_HIDDEN = -1e30  # far below any logit, and finite: a row that sees nothing must not become NaN


def _needs_care(*tensors: Tensor) -> bool:
    """Whether anything may not be finite. Other devices than a CPU are not asked: the answer would have to wait."""
    return tensors[0].device.type != "cpu" or not all(bool(x.isfinite().all()) for x in tensors)


def _without(x: Tensor, bad: Tensor) -> Tensor:
    """`x [..., M, D]` with 0 in the rows that are `bad [..., M]`."""
    return x.masked_fill(bad.unsqueeze(-1), 0)


def _not_finite(x: Tensor) -> Tensor:
    """Which rows of `x [..., M, D]` hold an infinity or a NaN."""
    return ~x.isfinite().all(-1)


def _probabilities(q: Tensor, k: Tensor, ahead: Tensor, scale: float, careful: bool) -> tuple[Tensor, Tensor]:
    """Softmax `[..., M, L]` over visible keys and its log-sum-exp `[..., M]`.

    A row that sees nothing gets some probabilities and `-inf`, which tells it from the others.
    """
    scores = (q * scale) @ k.mT
    if not scores.shape[-1]:
        return scores, scores.new_full(scores.shape[:-1], -torch.inf)
    if careful:
        scores.masked_fill_(ahead > 0, _HIDDEN)
    else:
        scores.add_(ahead.clamp(0, 1).to(q.dtype) * _HIDDEN)
    peak = scores.amax(-1)
    p = scores.softmax(-1)
    lse = (peak - p.amax(-1).log_()).masked_fill_(peak < _HIDDEN / 2, -torch.inf)
    return (p.masked_fill_(ahead > 0, 0) if careful else p), lse


def _attend(q: Tensor, k: Tensor, v: Tensor, ahead: Tensor, scale: float, careful: bool) -> tuple[Tensor, Tensor]:
    """Attention of `q [..., M, Dk]` over `k [..., L, Dk]`, `v [..., L, Dv]`; 0 and `-inf` where nothing is seen."""
    p, lse = _probabilities(q, k, ahead, scale, careful)
    if not careful:
        return _without(p @ v, lse == -torch.inf), lse
    bad = _not_finite(v)
    out = p @ _without(v, bad)
    return out.masked_fill_(((ahead <= 0) & bad.unsqueeze(-2)).any(-1, keepdim=True), torch.nan), lse


def _attend_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, ahead: Tensor, scale: float, careful: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `_attend` with respect to `q`, `k` and `v`."""
    p, _ = _probabilities(q, k, ahead, scale, careful)
    dout = _without(dout, lse == -torch.inf)
    ds = (dout @ v.mT).sub_((out * dout).sum(-1, keepdim=True)).mul_(p)
    if careful:
        bad = _not_finite(dout)
        p = p.masked_fill((ahead <= 0) & bad.unsqueeze(-1), torch.nan)
        ds.masked_fill_(ahead > 0, 0)
        dout, q, k = _without(dout, bad), _without(q, _not_finite(q)), _without(k, _not_finite(k))
    return (ds @ k) * scale, ds.mT @ (q * scale), p.mT @ dout


# Compressed and window branches: all queries of a tile look at one contiguous run of keys, under a mask.

_Spans = Iterator[tuple[_Tile, slice, Tensor]]
"""Tiles of queries, the run of keys each looks at, and how far those lie ahead: `[c G, L]`."""


def _prefixes(q: Tensor, k: Tensor, segments: Iterable[_Segment], config: NSAConfig) -> _Spans:
    """Compressed block `i` is seen by the positions from its last token, `i d + l - 1`, onwards."""
    group = q.shape[2] // k.shape[2]
    for segment in segments:
        first = segment.blocks.start
        score_bytes = 4 * q.shape[0] * q.shape[2] * (segment.blocks.stop - first)
        for tile in _tiles(segment, _rows(score_bytes, q.device)):
            seen = config.num_compressed(tile.last + 1)
            last_token = torch.arange(seen, device=q.device) * config.compress_stride + config.compress_block_size - 1
            ahead = last_token - tile.positions(q.device)[:, None]
            yield tile, slice(first, first + seen), ahead.repeat_interleave(group, 0)


def _windows(q: Tensor, k: Tensor, segments: Iterable[_Segment], config: NSAConfig) -> _Spans:
    """Position `t` sees the `w` keys `t - w < s <= t`."""
    group = q.shape[2] // k.shape[2]
    for segment in segments:
        window = min(config.window_size, segment.keys.stop - segment.keys.start)
        # In a tile as long as the window half of the products are masked; a shorter one would read keys more often.
        longest = max(window, 64)
        score_bytes = 4 * q.shape[0] * q.shape[2] * (longest + window)
        for tile in _tiles(segment, min(longest, _rows(score_bytes, q.device))):
            start = max(0, tile.first - window + 1)
            keys = slice(segment.keys.start + start, segment.keys.start + tile.last + 1)
            ahead = torch.arange(start, tile.last + 1, device=q.device) - tile.positions(q.device)[:, None]
            behind = 1 - window - ahead
            yield tile, keys, torch.maximum(ahead, behind).repeat_interleave(group, 0)


def _contiguous_forward(
    spans: Callable[..., _Spans],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: None,
    segments: Iterable[_Segment],
    config: NSAConfig,
    scale: float,
) -> tuple[Tensor, Tensor]:
    queries, keys, values = _grouped(q, k.shape[2]), _head_major(k), _head_major(v)
    out = queries.new_zeros(*queries.shape[:-1], v.shape[-1])
    lse = queries.new_full(queries.shape[:-1], -torch.inf)
    careful = _needs_care(q, k, v)
    for tile, span, ahead in spans(q, k, segments, config):
        rows = tile.queries
        o, z = _attend(queries[:, :, rows].flatten(2, 3), keys[:, :, span], values[:, :, span], ahead, scale, careful)
        out[:, :, rows] = o.view_as(out[:, :, rows])
        lse[:, :, rows] = z.view_as(lse[:, :, rows])
    return _ungrouped(out, q.dtype), _ungrouped(lse, lse.dtype)


def _contiguous_backward(
    spans: Callable[..., _Spans],
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    indices: None,
    segments: Iterable[_Segment],
    config: NSAConfig,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    per_query = [_grouped(x, k.shape[2]) for x in (dout, q, out, lse)]
    keys, values = _head_major(k), _head_major(v)
    dq, dk, dv = torch.zeros_like(per_query[1]), torch.zeros_like(keys), torch.zeros_like(values)
    careful = _needs_care(dout, q, k, v, out)
    for tile, span, ahead in spans(q, k, segments, config):
        do, queries, o, z = (x[:, :, tile.queries].flatten(2, 3) for x in per_query)
        tile_dq, tile_dk, tile_dv = _attend_backward(
            do, queries, keys[:, :, span], values[:, :, span], o, z, ahead, scale, careful
        )
        dq[:, :, tile.queries] = tile_dq.view_as(dq[:, :, tile.queries])
        dk[:, :, span] += tile_dk
        dv[:, :, span] += tile_dv
    return _ungrouped(dq, q.dtype), _token_major(dk, k.dtype), _token_major(dv, v.dtype)


# Selected branch: every query gathers its own blocks from a table of them.


def _choices(
    q: Tensor, v: Tensor, indices: Tensor, segment: _Segment, config: NSAConfig
) -> Iterator[tuple[_Tile, Tensor, Tensor]]:
    """Tiles of queries, the table rows each gathers `[B, Hk, c, N]`, how far those lie ahead `[B, Hk, c, 1, N l']`."""
    size = config.select_block_size
    batch, heads, slots = q.shape[0], indices.shape[2], indices.shape[3]
    blocks = config.num_selectable(segment.keys.stop - segment.keys.start)
    first_rows = torch.arange(batch * heads, device=q.device).view(batch, heads, 1, 1) * blocks
    within = torch.arange(size, device=q.device, dtype=torch.float32)
    gathered_bytes = 4 * batch * heads * slots * size * (q.shape[3] + v.shape[3])
    for tile in _tiles(segment, _rows(gathered_bytes, q.device)):
        chosen = indices[:, tile.queries].transpose(1, 2).long()
        first_ahead = (chosen * size - tile.positions(q.device).view(-1, 1)).masked_fill_(chosen < 0, 1)
        ahead = first_ahead.float().unsqueeze(-1) + within
        # What is hidden is read all the same, so its address has to be a legal one.
        yield tile, first_rows + chosen.clamp(0, blocks - 1), ahead.flatten(3).unsqueeze(3)


def _table(x: Tensor, keys: slice, size: int) -> Tensor:
    """The keys or values of one sequence as rows to gather: `[B, Hk, T, D]` to `[B Hk S, l', D]`."""
    x = x[:, :, keys]
    return F.pad(x, (0, 0, 0, -x.shape[2] % size)).unflatten(2, (-1, size)).flatten(0, 2)


def _gather(table: Tensor, rows: Tensor) -> Tensor:
    """Rows `[B, Hk, c, N]` of a table as keys one after the other: `[B, Hk, c, N l', D]`."""
    return table.index_select(0, rows.flatten()).view(*rows.shape[:3], rows.shape[3] * table.shape[1], table.shape[2])


def _scatter_add(table: Tensor, rows: Tensor, gathered: Tensor) -> None:
    """Adds what belongs to gathered rows to the table, in an order that does not change from run to run."""
    gathered = gathered.reshape(-1, *table.shape[1:])
    if table.device.type == "cpu":
        table.index_add_(0, rows.flatten(), gathered)
    else:  # where index_add_ is a race of atomics, while this sorts
        table.index_put_((rows.flatten(),), gathered, accumulate=True)


def _selected_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    segments: Iterable[_Segment],
    config: NSAConfig,
    scale: float,
) -> tuple[Tensor, Tensor]:
    queries, keys, values = _grouped(q, k.shape[2]), _head_major(k), _head_major(v)
    out = queries.new_zeros(*queries.shape[:-1], v.shape[-1])
    lse = queries.new_full(queries.shape[:-1], -torch.inf)
    careful = _needs_care(q, k, v)
    for segment in segments:
        k_table, v_table = (_table(x, segment.keys, config.select_block_size) for x in (keys, values))
        for tile, rows, ahead in _choices(q, v, indices, segment, config):
            out[:, :, tile.queries], lse[:, :, tile.queries] = _attend(
                queries[:, :, tile.queries], _gather(k_table, rows), _gather(v_table, rows), ahead, scale, careful
            )
    return _ungrouped(out, q.dtype), _ungrouped(lse, lse.dtype)


def _selected_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    indices: Tensor,
    segments: Iterable[_Segment],
    config: NSAConfig,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    per_query = [_grouped(x, k.shape[2]) for x in (dout, q, out, lse)]
    keys, values = _head_major(k), _head_major(v)
    dq, dk, dv = torch.zeros_like(per_query[1]), torch.zeros_like(keys), torch.zeros_like(values)
    careful = _needs_care(dout, q, k, v, out)
    for segment in segments:
        k_table, v_table = (_table(x, segment.keys, config.select_block_size) for x in (keys, values))
        dk_table, dv_table = torch.zeros_like(k_table), torch.zeros_like(v_table)
        for tile, rows, ahead in _choices(q, v, indices, segment, config):
            do, queries, o, z = (x[:, :, tile.queries] for x in per_query)
            dq[:, :, tile.queries], tile_dk, tile_dv = _attend_backward(
                do, queries, _gather(k_table, rows), _gather(v_table, rows), o, z, ahead, scale, careful
            )
            _scatter_add(dk_table, rows, tile_dk)
            _scatter_add(dv_table, rows, tile_dv)
        for total, table in ((dk, dk_table), (dv, dv_table)):
            length = segment.keys.stop - segment.keys.start
            padded = config.num_selectable(length) * config.select_block_size
            total[:, :, segment.keys] = table.view(*total.shape[:2], padded, table.shape[2])[:, :, :length]
    return _ungrouped(dq, q.dtype), _token_major(dk, k.dtype), _token_major(dv, v.dtype)


# Importance and selection.


def _importance(p: Tensor, num_blocks: int, config: NSAConfig) -> Tensor:
    """Paper, equation 9: compressed probabilities `[..., C]` shared out to selection blocks `[..., S]` by overlap.

    The sum over the few overlapping blocks is written out so that equal inputs give exactly equal importances.
    """
    length, stride, size = config.compress_block_size, config.compress_stride, config.select_block_size
    ratio, earlier = size // stride, length // stride - 1
    padded = F.pad(p, (earlier, num_blocks * ratio - p.shape[-1]))
    total = p.new_zeros(*p.shape[:-1], num_blocks)
    for tap in range(earlier + ratio):
        start = (tap - earlier) * stride
        overlap = min(start + length, size) - max(start, 0)
        total += padded[..., tap : tap + (num_blocks - 1) * ratio + 1 : ratio] * (overlap / stride)
    return total


def _take_best(importance: Tensor, positions: Tensor, config: NSAConfig) -> Tensor:
    """The chosen blocks `[..., c, N]`, ascending with `-1` at the end, from importances `[..., c, S]`."""
    wanted, blocks = config.num_selected_blocks, importance.shape[-1]
    block = torch.arange(blocks, device=importance.device)
    own = (positions // config.select_block_size).unsqueeze(-1)
    forced = (block < config.num_initial_blocks) | (block > own - config.num_local_blocks)
    # A score that is not a number stands below the forced blocks.
    score = importance.nan_to_num(nan=torch.finfo(importance.dtype).max, posinf=torch.inf)
    score = score.masked_fill_(forced, torch.inf).masked_fill_(block > own, -torch.inf)
    # A stable sort is what sends ties to the lower index; topk promises no order.
    best, chosen = score.sort(dim=-1, descending=True, stable=True)
    best, chosen = best[..., :wanted], chosen[..., :wanted]
    ascending = chosen.masked_fill(best == -torch.inf, blocks).sort(dim=-1).values
    ascending = ascending.masked_fill(ascending == blocks, -1)
    return F.pad(ascending, (0, wanted - ascending.shape[-1]), value=-1)


# Operators.


def _no_autocast(x: Tensor) -> torch.autocast:
    """Products of what was widened to float32 are to be in float32, whatever the layer around says."""
    return torch.autocast(x.device.type, enabled=False)


def _by_segment(function: Callable[..., Any]) -> Callable[..., Any]:
    """A branch's function over segments as `nsa.ops.branch_operator` wants it: over offsets of sequences."""

    def run(*arguments: Any) -> Any:
        *tensors, cu_seqlens_q, cu_seqlens_k, num_keys, config, scale = arguments
        segments = _segments(tensors[0].shape[1], num_keys, cu_seqlens_q, cu_seqlens_k, config)
        with _no_autocast(tensors[0]):
            return function(*tensors, segments, config, scale)

    return run


def _register(name: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    return branch_operator("nsa_eager", name, _by_segment(forward), _by_segment(backward))


_compressed = _register(
    "compressed_attention", partial(_contiguous_forward, _prefixes), partial(_contiguous_backward, _prefixes)
)
_selected = _register("selected_attention", _selected_forward, _selected_backward)
_window = _register(
    "sliding_window_attention", partial(_contiguous_forward, _windows), partial(_contiguous_backward, _windows)
)


def _choose_blocks(
    q: Tensor,
    k_cmp: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    num_keys: int,
    sizes: Sequence[int],
    scale: float,
) -> Tensor:
    config, heads = config_of(sizes), k_cmp.shape[2]
    segments = _segments(q.shape[1], num_keys, cu_seqlens_q, cu_seqlens_k, config)
    queries, keys = _grouped(q, heads), _head_major(k_cmp)
    careful = _needs_care(q, k_cmp)
    indices = q.new_full((q.shape[0], heads, q.shape[1], config.num_selected_blocks), -1, dtype=torch.int32)
    with _no_autocast(q):
        for tile, span, ahead in _prefixes(q, k_cmp, segments, config):
            p, lse = _probabilities(queries[:, :, tile.queries].flatten(2, 3), keys[:, :, span], ahead, scale, careful)
            p = _without(p, lse == -torch.inf).unflatten(2, (-1, queries.shape[3])).sum(3)
            importance = _importance(p, tile.last // config.select_block_size + 1, config)
            indices[:, :, tile.queries] = _take_best(importance, tile.positions(q.device), config).int()
    return _token_major(indices, torch.int32)


def _fake_indices(q: Tensor, k_cmp: Tensor, cu_q: Any, cu_k: Any, num_keys: int, sizes: Any, scale: float) -> Tensor:
    return q.new_empty((*q.shape[:2], k_cmp.shape[2], config_of(sizes).num_selected_blocks), dtype=torch.int32)


_select = Operator("nsa_eager::select_blocks", _choose_blocks, _fake_indices)


# The backend's side of nsa.functional, which has checked every argument.


def compress(xs: Sequence[Tensor], params: Sequence[Any], config: NSAConfig, blocks: Any) -> tuple[Tensor, ...]:
    """`[B, T, Hk, D] -> [B, C, Hk, D]`, each with its parameters, for blocks that start where
    `nsa.functional.block_starts` says."""
    return tuple(_compress(x, learned, config, blocks) for x, learned in zip(xs, params, strict=True))


def _compress(x: Tensor, params: Any, config: NSAConfig, blocks: Any) -> Tensor:
    within = torch.arange(config.compress_block_size, device=x.device)
    tokens = x[:, blocks.tokens.unsqueeze(-1) + within].transpose(2, 3)
    if blocks.filled is not None:
        # A block that does not exist starts at token 0, whose values must not reach the gradients of the weights.
        tokens = tokens.masked_fill(~blocks.filled.view(-1, 1, 1, 1), 0)
    if params is None:
        out = tokens.to(accumulation_dtype(x.dtype)).mean(3).to(x.dtype)
    else:
        rows = (tokens + params.position.to(x.dtype)).flatten(3)
        out = torch.einsum("bchi,hif->bchf", rows, params.weight.to(x.dtype))
        if params.weight_out is not None:
            out = torch.einsum("bchf,hfd->bchd", F.silu(out), params.weight_out.to(x.dtype))
    return out if blocks.filled is None else out.masked_fill(~blocks.filled.view(-1, 1, 1), 0)


def compressed_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    config: NSAConfig,
    num_keys: int,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output `[B, Tq, Hq, Dv]` and log-sum-exp `[B, Tq, Hq]`; see `nsa.functional.compressed_attention`."""
    return _compressed(q, k_cmp, v_cmp, None, cu_seqlens_q, cu_seqlens_k, num_keys, sizes_of(config), scale)


def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    config: NSAConfig,
    num_keys: int,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
) -> Tensor:
    """Indices `[B, Tq, Hk, N]`; see `nsa.functional.select_blocks`. `lse` would save nothing here."""
    rest = (cu_seqlens_q, cu_seqlens_k, num_keys, sizes_of(config), scale)
    return cast(Tensor, _select(q.detach(), k_cmp.detach(), *rest))


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    config: NSAConfig,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
) -> Tensor:
    """Output `[B, Tq, Hq, Dv]`; see `nsa.functional.selected_attention`."""
    return _selected(q, k, v, indices, cu_seqlens_q, cu_seqlens_k, k.shape[1], sizes_of(config), scale)[0]


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: NSAConfig,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
) -> Tensor:
    """Output `[B, Tq, Hq, Dv]`; see `nsa.functional.sliding_window_attention`."""
    return _window(q, k, v, None, cu_seqlens_q, cu_seqlens_k, k.shape[1], sizes_of(config), scale)[0]


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
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output `[B, Tq, Hq, Dv]` and the indices used; see `nsa.functional.nsa_attention`."""
    num_keys, rest = k_slc.shape[1], (cu_seqlens_q, cu_seqlens_k, scale)
    out_cmp, lse = compressed_attention(q, k_cmp, v_cmp, config, num_keys, *rest)
    if indices is None:
        indices = select_blocks(q, k_cmp, lse, config, num_keys, *rest)
    out_slc = selected_attention(q, k_slc, v_slc, indices, config, *rest)
    out_win = sliding_window_attention(q, k_win, v_win, config, *rest)
    return combine((out_cmp, out_slc, out_win), gates), indices


def combine(branches: Sequence[Tensor], gates: Tensor) -> Tensor:
    """Gated sum of the branch outputs `[B, Tq, Hq, Dv]` under gates `[B, Tq, Hq, 3]` (paper, equation 5)."""
    dtype = accumulation_dtype(torch.promote_types(branches[0].dtype, gates.dtype))
    # Slices instead of `unbind`: Inductor would write the gates' gradient over views that it has still to read
    # (docs/pytorch-compiled-gradients.md).
    compressed, selected, window = (
        out.to(dtype) * gates[..., branch : branch + 1].to(dtype) for branch, out in enumerate(branches)
    )
    return (compressed + selected + window).to(branches[0].dtype)
