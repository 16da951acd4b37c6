"""Selected branch: every query attends to the tokens of its chosen blocks (paper, section 3.3.2).

The keys of a sequence are laid out as a table of its `S` blocks, from which every query gathers its own. Gradients of
gathered rows are added back to the table.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa.config import NSAConfig
from nsa.eager.flash import attend, attend_backward, may_be_nonfinite
from nsa.eager.layout import grouped, head_major, token_major, ungrouped
from nsa.eager.operators import branch
from nsa.eager.tiles import Segment, Tile, tiles
from nsa.ops import sizes_of
from nsa.varlen import Varlen, tensors_of


def _chosen_rows(
    q: Tensor, v: Tensor, indices: Tensor, segment: Segment, config: NSAConfig
) -> Iterator[tuple[Tile, Tensor, Tensor]]:
    """Tiles of `c` queries, the table rows `[B, Hk, c, N]` that each query gathers and the distances of their keys.

    Distances are `[B, Hk, c, 1, N l']`; the keys of a slot that names no block are masked.
    """
    size = config.select_block_size
    batch, heads, slots = q.shape[0], indices.shape[2], indices.shape[3]
    blocks = config.num_selectable(segment.keys.stop - segment.keys.start)
    first_rows = torch.arange(batch * heads, device=q.device).view(batch, heads, 1, 1) * blocks
    within = torch.arange(size, device=q.device, dtype=torch.float32)
    gathered_bytes = 4 * batch * heads * slots * size * (q.shape[3] + v.shape[3])
    for tile in tiles(segment, gathered_bytes, q.device):
        chosen = indices[:, tile.queries].transpose(1, 2).long()
        first_distance = (chosen * size - tile.positions(q.device).view(-1, 1)).masked_fill_(chosen < 0, 1)
        distance = first_distance.float().unsqueeze(-1) + within
        # Masked keys are gathered too, so the row of a slot that names no block must be a legal one.
        yield tile, first_rows + chosen.clamp(0, blocks - 1), distance.flatten(3).unsqueeze(3)


def _table(x: Tensor, keys: slice, size: int) -> Tensor:
    """Blocks of one sequence of keys or values: `[B, Hk, T, D]` to `[B Hk S, l', D]`, padded with 0."""
    x = x[:, :, keys]
    return F.pad(x, (0, 0, 0, -x.shape[2] % size)).unflatten(2, (-1, size)).flatten(0, 2)


def _gather(table: Tensor, rows: Tensor) -> Tensor:
    """Rows `[B, Hk, c, N]` of a table `[B Hk S, l', D]` as keys one after the other, `[B, Hk, c, N l', D]`."""
    return table.index_select(0, rows.flatten()).view(*rows.shape[:3], rows.shape[3] * table.shape[1], table.shape[2])


def _scatter_add(table: Tensor, rows: Tensor, gathered: Tensor) -> None:
    """Adds `gathered [B, Hk, c, N l', D]` to those rows of the table, in the same order in every run."""
    gathered = gathered.reshape(-1, *table.shape[1:])
    if table.device.type == "cpu":
        table.index_add_(0, rows.flatten(), gathered)
    else:  # There index_add_ uses atomics, whose order changes; index_put_ sorts.
        table.index_put_((rows.flatten(),), gathered, accumulate=True)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    segments: Iterable[Segment],
    config: NSAConfig,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output `[B, Tq, Hq, Dv]` and lse `[B, Tq, Hq]`."""
    queries, keys, values = grouped(q, k.shape[2]), head_major(k), head_major(v)
    out = queries.new_zeros(*queries.shape[:-1], v.shape[-1])
    lse = queries.new_full(queries.shape[:-1], -torch.inf)
    nonfinite = may_be_nonfinite(q, k, v)
    for segment in segments if indices.shape[3] else ():  # a table has all keys
        k_table, v_table = (_table(x, segment.keys, config.select_block_size) for x in (keys, values))
        for tile, rows, distance in _chosen_rows(q, v, indices, segment, config):
            out[:, :, tile.queries], lse[:, :, tile.queries] = attend(
                queries[:, :, tile.queries], _gather(k_table, rows), _gather(v_table, rows), distance, scale, nonfinite
            )
    return ungrouped(out, q.dtype), ungrouped(lse, lse.dtype)


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    indices: Tensor,
    segments: Iterable[Segment],
    config: NSAConfig,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `_forward` for `dout [B, Tq, Hq, Dv]`, in the shapes of `q`, `k` and `v`."""
    per_query = [grouped(x, k.shape[2]) for x in (dout, q, out, lse)]
    keys, values = head_major(k), head_major(v)
    dq, dk, dv = torch.zeros_like(per_query[1]), torch.zeros_like(keys), torch.zeros_like(values)
    nonfinite = may_be_nonfinite(dout, q, k, v, out)
    for segment in segments if indices.shape[3] else ():  # a table has all keys
        k_table, v_table = (_table(x, segment.keys, config.select_block_size) for x in (keys, values))
        dk_table, dv_table = torch.zeros_like(k_table), torch.zeros_like(v_table)
        for tile, rows, distance in _chosen_rows(q, v, indices, segment, config):
            tile_dout, queries, tile_out, tile_lse = (x[:, :, tile.queries] for x in per_query)
            gathered_k, gathered_v = _gather(k_table, rows), _gather(v_table, rows)
            dq[:, :, tile.queries], tile_dk, tile_dv = attend_backward(
                tile_dout, queries, gathered_k, gathered_v, tile_out, tile_lse, distance, scale, nonfinite
            )
            _scatter_add(dk_table, rows, tile_dk)
            _scatter_add(dv_table, rows, tile_dv)
        for total, table in ((dk, dk_table), (dv, dv_table)):
            length = segment.keys.stop - segment.keys.start
            padded = config.num_selectable(length) * config.select_block_size
            total[:, :, segment.keys] = table.view(*total.shape[:2], padded, table.shape[2])[:, :, :length]
    return ungrouped(dq, q.dtype), token_major(dk, k.dtype), token_major(dv, v.dtype)


_selected = branch("selected_attention", _forward, _backward)


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    config: NSAConfig,
    varlen: Varlen | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output `[B, Tq, Hq, Dv]` and lse `[B, Tq, Hq]`; see `nsa.functional.selected_attention`."""
    return _selected(q, k, v, indices, *tensors_of(varlen), k.shape[1], sizes_of(config), scale)
