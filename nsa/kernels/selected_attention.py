"""Selected attention: query `t` attends to the tokens `s <= t` of the blocks chosen for it (paper, section 3.3.2).

Forward, for one query and one KV head, over the chosen blocks and their tokens `s <= t`:

    S = scale q k_s,    lse = log sum exp(S),    out = sum_s exp(S - lse) v_s

Backward, with `P = exp(S - lse)`, `dP = dout v_s` and `delta = dout.out`:

    dS = P (dP - delta),    dq = scale sum_s dS k_s,    dk_s = scale sum dS q,    dv_s = sum P dout

There are two ways to bring queries and blocks together:

- query-major: a program has a query and reads its blocks (`nsa.kernels.selected_by_query`), or a few neighbouring ones
  and reads the blocks of all (`nsa.kernels.selected_by_tile`, on Hopper `nsa.kernels.hopper.selected`);
- key-major (`nsa.kernels.selected_by_block`): a program has a block and reads the queries that selected it.

`dk` and `dv` are always made key-major, and where this does not make `dq` as well, on Hopper by
`nsa.kernels.hopper.selected_dkdv`. For the output and `dq` the faster way depends on `G`, the query heads of a KV head:
query-major reads the keys of a block once for `G` rows, key-major writes partial results for each row. The field
`key_major` of the configuration chooses between Triton's kernels. On Hopper, tiles are taken up to the `longest`
sequences for which they are faster than either.
"""

from typing import Any, cast

import torch
from torch import Tensor

from nsa.config import NSAConfig
from nsa.kernels import selected_by_block, selected_by_query, selected_by_tile
from nsa.kernels.block_index import Packing
from nsa.kernels.bwd_preprocess import BackwardRows, preprocess
from nsa.kernels.configs import KernelConfig, plan
from nsa.kernels.hopper import available
from nsa.kernels.hopper import selected as selected_on_hopper
from nsa.kernels.launches import recorded
from nsa.kernels.primitives import Heads, rows_contiguous
from nsa.ops import accumulation_dtype, branch_operator, sizes_of
from nsa.varlen import Varlen, tensors_of


@plan
def _constants(heads: Heads, num_selected: int, block_size: int, packed: bool) -> dict[str, Any]:
    """The constants of all kernels of the arithmetic; query-major ones choose `BLOCK_N`, keys a step, themselves."""
    constants = heads.constants()
    # Wide float32 rows come fewer at a time: split in two for its products, one takes twice the shared memory.
    widest = max(constants["K0"] + constants["K1"], constants["V0"] + constants["V1"])
    row_bytes = widest * heads.dtype.itemsize * (2 if heads.dtype == torch.float32 else 1)
    return {
        **constants,
        "NUM_SELECTED": num_selected,
        "BLOCK_SIZE": block_size,
        "BLOCK_N": min(block_size, 64 if row_bytes < 512 else 32 if row_bytes < 1024 else 16),
        "PACKED": packed,
    }


def _query_major(
    kernel: str, key_major: bool, heads: Heads, constants: dict[str, Any], num_keys: int, *tensors: Tensor
) -> tuple[Any, KernelConfig] | None:
    """The module whose query-major launchers are taken and the configuration of theirs, or None for the key-major ones.

    Args:
        key_major: whether these are faster than query-major kernels written in Triton.
        tensors: `[B, T, H, D]`, `q`, `k` and `v` first.
    """
    device = tensors[0].device
    if available(device):
        on_hopper = heads.config(f"{kernel}_hopper", device)
        if selected_on_hopper.applies(on_hopper, heads, constants, num_keys, tensors):
            return selected_on_hopper, on_hopper
    if key_major:
        return None
    tiles = heads.config(f"{kernel}_tiles", device)
    if selected_by_tile.applies(tiles, heads.group, num_keys):
        return selected_by_tile, tiles
    return selected_by_query, heads.config(kernel, device)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    varlen: Varlen | None,
    num_keys: int,
    config: NSAConfig,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; `branch_operator` describes the arguments."""
    out = q.new_empty(*q.shape[:3], v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype))
    if not indices.numel():
        return out.zero_(), lse.fill_(-torch.inf)
    q, k, v = map(rows_contiguous, (q, k, v))
    packing = Packing.of(varlen, num_keys, config.select_block_size)
    heads = Heads.of(q, k, v)
    constants = _constants(heads, indices.shape[3], config.select_block_size, varlen is not None)
    key_major = heads.config("selected_forward", q.device).key_major
    way, kernel = _query_major("selected_forward", key_major, heads, constants, num_keys, q, k, v, out) or (
        selected_by_block,
        heads.config("selected_forward_key_major", q.device),
    )
    with torch.cuda.device_of(q):
        way.forward(q, k, v, indices, out, lse, packing, constants, kernel, scale)
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    indices: Tensor,
    varlen: Varlen | None,
    num_keys: int,
    config: NSAConfig,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`dq`, `dk` and `dv`; `branch_operator` describes the arguments."""
    dout, lse = rows_contiguous(dout), lse.contiguous()
    (rows,) = preprocess(dout, [out.contiguous()], [lse])
    return gradients(dout, q, k, v, lse, rows, indices, varlen, num_keys, config, scale)


def gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    rows: BackwardRows,
    indices: Tensor,
    varlen: Varlen | None,
    num_keys: int,
    config: NSAConfig,
    scale: float,
    *,
    gate: Tensor | None = None,
    dq: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`dq`, `dk` and `dv` from what `nsa.kernels.bwd_preprocess` makes.

    Args:
        lse: contiguous.
        rows: token-major; weighted if there is a gate.
        gate: `[B, Tq, Hq]`, every third element of contiguous memory: what `dout` is multiplied by.
        dq: contiguous, added to.
    """
    add = dq is not None
    if not indices.numel():
        return q.new_zeros(q.shape) if dq is None else dq, k.new_zeros(k.shape), v.new_zeros(v.shape)
    dq, dk, dv = q.new_empty(q.shape) if dq is None else dq, k.new_empty(k.shape), v.new_empty(v.shape)
    dout, q, k, v = map(rows_contiguous, (dout, q, k, v))
    packing = Packing.of(varlen, num_keys, config.select_block_size)
    heads = Heads.of(q, k, v)
    constants = _constants(heads, indices.shape[3], config.select_block_size, varlen is not None)
    kernel = heads.config("selected_bwd_dkdv", q.device)
    query_major = _query_major("selected_bwd_dq", kernel.key_major, heads, constants, num_keys, q, k, v, dout, dq)
    with torch.cuda.device_of(q):
        if query_major:
            way, config_dq = query_major
            way.bwd_dq(dout, q, k, v, indices, lse, rows.delta, gate, dq, packing, constants, config_dq, scale, add)
        selected_by_block.bwd_dkdv(
            dout, q, k, v, indices, rows, dk, dv, None if query_major else dq, packing, constants, kernel, scale,
            gate is not None, add,
        )  # fmt: skip
    return dq, dk, dv


_selected = branch_operator("nsa_triton", "selected_attention", forward, backward, recorded)


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
    rest = (*tensors_of(varlen), k.shape[1], sizes_of(config), scale)
    return cast(tuple[Tensor, Tensor], _selected(q, k, v, indices, *rest))
