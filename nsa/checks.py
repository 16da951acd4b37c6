"""Argument checks of the public functions: each raises before any work starts.

A message names the argument, what was expected and what came. A check that has to look at values (offsets of packed
sequences, blocks listed twice) is skipped where there are none: while tracing or capturing a CUDA graph, and on fake
and meta tensors.
"""

import math
from typing import NamedTuple, get_args

import torch
from torch import Tensor
from torch._C import _functorch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from nsa.backends import BackendName
from nsa.blocks import CompressionParams
from nsa.config import NSAConfig
from nsa.varlen import PackedSequences, Varlen, block_sizes, make_tables

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_backend(backend: str) -> None:
    """Refuses a `backend` that is no backend's name."""
    if backend not in get_args(BackendName):
        raise ValueError(f"backend must be one of {get_args(BackendName)}, got {backend!r}")


def check_scale(scale: float | None, q: Tensor) -> float:
    """The factor of the logits: `scale`, or `Dk ** -0.5` for `q [B, Tq, Hq, Dk]` unless given."""
    if scale is None:
        return float(q.shape[-1] ** -0.5)
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"scale must be a float or None, got {scale!r} ({type(scale).__name__})")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale!r}")
    return float(scale)


def check_config(config: NSAConfig) -> None:
    """Refuses a `config` of another type, which would fail somewhere inside a stage."""
    if not isinstance(config, NSAConfig):
        raise TypeError(f"config must be an NSAConfig, got {type(config).__name__}")


def check_tensor(
    name: str,
    x: Tensor,
    layout: str,
    *,
    like: Tensor | None = None,
    shape: tuple[int, ...] | None = None,
    dtype: torch.dtype | tuple[torch.dtype, ...] | None = _DTYPES,
) -> None:
    """Refuses `x` unless it has the rank of `layout`, the dtype, the device of `like` and the shape.

    `dtype=None` takes any floating dtype; a device or shape that is not given is not checked.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor {layout}, got {type(x).__name__}")
    rank = layout.count(",") + 1
    if x.dim() != rank:
        raise ValueError(f"{name} must have {rank} dimensions {layout}, got shape {tuple(x.shape)}")
    if dtype is None and not x.is_floating_point():
        raise TypeError(f"{name} must have a floating dtype, got {x.dtype}")
    expected = dtype if isinstance(dtype, tuple) else (dtype,)
    if dtype is not None and x.dtype not in expected:
        cast = f": pass {name}.int()" if expected == (torch.int32,) else ""
        raise TypeError(f"{name} must have dtype {' or '.join(map(str, expected))}, got {x.dtype}{cast}")
    if like is not None and x.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, like the tensors before it, got {x.device}")
    if shape is not None and tuple(x.shape) != shape:
        raise ValueError(f"{name} must have shape {layout} = {shape}, got {tuple(x.shape)}")


def check_derivatives(**tensors: Tensor) -> None:
    """Refuses derivatives that the operators do not have: PyTorch would take those of forward mode to be 0."""
    differentiated = False
    if torch.compiler.is_compiling() or _functorch.peek_interpreter_stack() is not None:
        from nsa.transforms import differentiated_by_functorch

        differentiated = differentiated_by_functorch()
    for name, x in tensors.items():
        if forward_ad.unpack_dual(x).tangent is not None:
            raise ValueError(f"{name} must have no tangent, since there are no forward-mode derivatives, got one")
        if differentiated and (torch.compiler.is_compiling() or _functorch.is_gradtrackingtensor(x)):
            raise ValueError(f"{name} must be differentiated by torch.autograd, got a transform of torch.func")


def check_attention(q: Tensor, k: Tensor, v: Tensor | None, names: tuple[str, str], length: str) -> None:
    """Refuses `q [B, Tq, Hq, Dk]`, `k [B, length, Hk, Dk]` and `v [B, length, Hk, Dv]` that do not fit one another.

    `names` are those of `k` and `v` in the call, `length` is the letter of their tokens or blocks.
    """
    check_tensor("q", q, "[B, Tq, Hq, Dk]")
    check_tensor(names[0], k, f"[B, {length}, Hk, Dk]", like=q, dtype=q.dtype)
    batch, _, heads, dim = q.shape
    for what, got, expected in (("batch", k.shape[0], batch), ("head dim", k.shape[3], dim)):
        if got != expected:
            raise ValueError(f"{names[0]} must have the {what} of q ({expected}), got {got}")
    if heads == 0 or k.shape[2] == 0 or heads % k.shape[2]:
        raise ValueError(f"q must have a multiple of the heads of {names[0]} ({k.shape[2]}), got {heads}")
    if v is not None:
        layout = f"[B, {length}, Hk, Dv]"
        check_tensor(names[1], v, layout, like=q, dtype=q.dtype)
        check_tensor(names[1], v, layout, shape=(*k.shape[:3], v.shape[3]))


def check_branches(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    config: NSAConfig,
) -> int:
    """The number of keys `Tk` of the three branches; their tensors must fit one another, and the gates must fit `q`."""
    check_attention(q, k_slc, v_slc, ("k_slc", "v_slc"), "Tk")
    check_attention(q, k_win, v_win, ("k_win", "v_win"), "Tk")
    check_attention(q, k_cmp, v_cmp, ("k_cmp", "v_cmp"), "C")
    tokens = check_blocks(q, k_cmp, config, k_slc.shape[1])
    for name, tensor in (("k_win", k_win), ("k_cmp", k_cmp)):
        if tensor.shape[2] != k_slc.shape[2]:
            raise ValueError(f"{name} must have as many heads as k_slc ({k_slc.shape[2]}), got {tensor.shape[2]}")
    for name, tensor in (("v_win", v_win), ("v_cmp", v_cmp)):
        if tensor.shape[3] != v_slc.shape[3]:
            raise ValueError(f"{name} must have the head dim of v_slc ({v_slc.shape[3]}), got {tensor.shape[3]}")
    if k_win.shape[1] != tokens:
        raise ValueError(f"k_win must have as many tokens as k_slc ({tokens}), got {k_win.shape[1]}")
    check_tensor("gates", gates, "[B, Tq, Hq, 3]", like=q, shape=(*q.shape[:3], 3), dtype=None)
    return tokens


def check_blocks(q: Tensor, k_cmp: Tensor, config: NSAConfig, num_keys: int | None) -> int:
    """The number of tokens behind `k_cmp`, `Tq` unless given; `k_cmp` must have the blocks of that many."""
    num_keys = q.shape[1] if num_keys is None else num_keys
    if isinstance(num_keys, bool) or not isinstance(num_keys, int | torch.SymInt):
        raise TypeError(f"num_keys must be an int or None, got {num_keys!r} ({type(num_keys).__name__})")
    if k_cmp.shape[1] != config.num_compressed(num_keys):
        raise ValueError(
            f"k_cmp must have the {config.num_compressed(num_keys)} blocks of num_keys = {num_keys} tokens, "
            f"got {k_cmp.shape[1]}"
        )
    return num_keys


class Offsets(NamedTuple):
    """Legal offsets of queries and of keys, and the keys of the longest sequence, 0 where nobody can know."""

    queries: Tensor
    keys: Tensor
    longest: int


def check_one_row(name: str, x: Tensor) -> None:
    """Refuses packed sequences `name` for `x [B, T, ...]` with several rows."""
    if x.shape[0] != 1:
        raise ValueError(f"{name} needs a batch of 1, since sequences are packed along T, got {x.shape[0]}")


def check_packing(
    like: Tensor,
    num_queries: int | None,
    num_keys: int,
    cu_seqlens_q: Tensor | PackedSequences,
    cu_seqlens_k: Tensor | None,
    config: NSAConfig,
    *,
    names: tuple[str, str] = ("cu_seqlens_q", "cu_seqlens_k"),
) -> PackedSequences | Offsets:
    """Tables that were made before, or legal offsets.

    Args:
        like: a tensor on the device where the offsets must be.
        num_queries: `None` where only keys are at hand, and tables may be for any queries.
        cu_seqlens_k: those of the queries unless given.
    """
    if isinstance(cu_seqlens_q, PackedSequences):
        if cu_seqlens_k is not None:
            raise ValueError(f"{names[1]} must be None where {names[0]} is PackedSequences, got a tensor")
        _check_tables(names[0], cu_seqlens_q, like, num_queries, num_keys, config)
        return cu_seqlens_q
    num_queries = num_keys if num_queries is None else num_queries
    lengths_q = _check_cu_seqlens(names[0], cu_seqlens_q, like, num_queries)
    lengths_k = lengths_q
    if cu_seqlens_k is None and num_keys == num_queries:
        cu_seqlens_k = cu_seqlens_q
    else:
        cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        lengths_k = _check_cu_seqlens(names[1], cu_seqlens_k, like, num_keys)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"{names[1]} must have as many entries as {names[0]} ({len(cu_seqlens_q)}), got {len(cu_seqlens_k)}"
        )
    if lengths_q is None or lengths_k is None:
        return Offsets(*_legal_offsets(cu_seqlens_q, cu_seqlens_k, num_queries, num_keys), 0)
    if bool((lengths_q > lengths_k).any()):
        raise ValueError(
            f"{names[1]} must give every sequence at least as many keys as queries ({lengths_q.tolist()}), "
            f"got {lengths_k.tolist()}"
        )
    longest = int(lengths_k.max()) if len(lengths_k) else 0
    return Offsets(cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), longest)


def pack_tokens(
    x: Tensor, cu_seqlens: Tensor | PackedSequences | None, config: NSAConfig, *, keys_alone: bool = False
) -> PackedSequences | None:
    """Tables of the sequences packed in `x [1, T, ...]`; `None` where nothing is packed.

    With `keys_alone`, tables that were made before may be for fewer queries.
    """
    if cu_seqlens is None:
        return None
    num_tokens, names = x.shape[1], ("cu_seqlens", "cu_seqlens")
    num_queries = None if keys_alone else num_tokens
    check_one_row("cu_seqlens", x)
    packed = check_packing(x, num_queries, num_tokens, cu_seqlens, None, config, names=names)
    if isinstance(packed, PackedSequences):
        return packed
    return make_tables(packed.queries, packed.keys, num_tokens, num_tokens, packed.longest, config)


def attention_tables(
    q: Tensor,
    num_keys: int,
    config: NSAConfig,
    cu_seqlens_q: Tensor | PackedSequences | None,
    cu_seqlens_k: Tensor | None,
) -> Varlen | None:
    """Tables of packed sequences with queries `q [1, Tq, Hq, Dk]`; `None` where nothing is packed."""
    num_queries = q.shape[1]
    if cu_seqlens_q is None:
        if cu_seqlens_k is not None:
            raise ValueError("cu_seqlens_q must be given where cu_seqlens_k is, got None")
        if num_queries > num_keys:
            raise ValueError(f"q must have at most as many tokens as there are keys ({num_keys}), got {num_queries}")
        return None
    check_one_row("cu_seqlens_q", q)
    packed = check_packing(q, num_queries, num_keys, cu_seqlens_q, cu_seqlens_k, config)
    if isinstance(packed, PackedSequences):
        return packed.varlen
    return Varlen.of(packed.queries, packed.keys, num_queries, config)


def _check_tables(
    name: str, packed: PackedSequences, like: Tensor, num_queries: int | None, num_keys: int, config: NSAConfig
) -> None:
    """Refuses tables of another batch or for other block sizes."""
    for what, got, expected in (
        ("queries", packed.varlen.queries.shape[0], num_queries),
        ("keys", packed.positions.shape[0], num_keys),
        ("block sizes", packed.sizes, block_sizes(config)),
    ):
        if expected is not None and got != expected:
            raise ValueError(f"{name} must be packed for the {what} at hand ({expected}), got {got}")
    if packed.positions.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, like the tensors before it, got {packed.positions.device}")


def _legal_offsets(cu_queries: Tensor, cu_keys: Tensor, num_queries: int, num_keys: int) -> tuple[Tensor, Tensor]:
    """Offsets from 0 to the last token, whatever is given, for where values cannot be looked at.

    What lies outside of all sequences becomes sequences too: of queries that have no keys, and of keys that have no
    queries.
    """
    queries, keys = (
        offsets.clamp(0, total).cummax(0).values for offsets, total in ((cu_queries, num_queries), (cu_keys, num_keys))
    )
    zero = torch.zeros_like(queries[:1])
    last_query, last_key = torch.full_like(zero, num_queries), torch.full_like(zero, num_keys)
    return (
        torch.cat((zero, queries[:1], queries, last_query, last_query)),
        torch.cat((zero, zero, keys, keys[-1:], last_key)),
    )


def _check_cu_seqlens(name: str, offsets: Tensor, x: Tensor, total: int) -> Tensor | None:
    """Sequence lengths of valid offsets; `None` while tracing, when there are no values to look at."""
    check_tensor(name, offsets, "[N + 1]", like=x, dtype=torch.int32)
    if offsets.shape[0] == 0:
        raise ValueError(f"{name} must have at least one entry, got none")
    if not _has_values(offsets):
        return None
    values = offsets.cpu()
    lengths = values.diff()
    if values[0] != 0 or values[-1] != total or bool((lengths < 0).any()):
        raise ValueError(f"{name} must rise from 0 to {total} without falling, got {values.tolist()}")
    return lengths


def _has_values(x: Tensor) -> bool:
    """Whether the elements of `x` can be looked at.

    While tracing, and of fake and meta tensors, there are shapes alone. A CUDA graph that is being captured has no
    values yet.
    """
    if torch.compiler.is_compiling() or x.device.type == "meta" or isinstance(x, FakeTensor):
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def check_indices(indices: Tensor, q: Tensor, k: Tensor) -> None:
    """Refuses indices that are not int32 `[B, Tq, Hk, N]` for `q [B, Tq, Hq, Dk]` and `k [B, Tk, Hk, Dk]`."""
    check_tensor("indices", indices, "[B, Tq, Hk, N]", like=q, dtype=torch.int32)
    expected = (q.shape[0], q.shape[1], k.shape[2])
    if tuple(indices.shape[:3]) != expected:
        raise ValueError(f"indices must have shape [B, Tq, Hk, N] = {(*expected, 'N')}, got {tuple(indices.shape)}")


def check_no_block_twice(indices: Tensor, num_blocks: int) -> None:
    """Refuses indices `[B, Tq, Hk, N]` that name one of the `num_blocks` blocks twice for one query."""
    if not _has_values(indices) or indices.numel() == 0:
        return
    ordered = indices.sort(dim=-1).values
    named = (ordered[..., 1:] >= 0) & (ordered[..., 1:] < num_blocks)
    repeated = (ordered[..., 1:] == ordered[..., :-1]) & named
    if bool(repeated.any()):
        raise ValueError(
            f"indices must name a block once a query, got {ordered[..., 1:][repeated][0]} twice in one of "
            f"{int(repeated.any(-1).sum())} rows"
        )


def check_rope(rope: Tensor, q: Tensor) -> None:
    """Refuses a table that does not hold the pairs of `q [B, T, Hq, D]`."""
    dim = q.shape[3]
    if dim % 2:
        raise ValueError(f"q must have an even head dim to be rotated in pairs, got {dim}")
    check_tensor("rope", rope, "[L, D / 2, 2]", like=q, dtype=None)
    if rope.shape[1:] != (dim // 2, 2):
        raise ValueError(f"rope must have shape [L, D / 2, 2] = (L, {dim // 2}, 2), got {tuple(rope.shape)}")


def check_rope_length(rope: Tensor, num_positions: int) -> None:
    """Refuses a table with fewer rows than there are positions."""
    if rope.shape[0] < num_positions:
        raise ValueError(f"rope must have a row for each of the {num_positions} positions, got {rope.shape[0]}")


def check_rotated(q: Tensor, k_slc: Tensor, k_win: Tensor) -> None:
    """Refuses keys that are not `[B, T, Hk, D]` for queries `[B, T, Hq, D]`."""
    check_tensor("q", q, "[B, T, Hq, D]")
    batch, num_tokens, _, dim = q.shape
    for name, x in (("k_slc", k_slc), ("k_win", k_win)):
        check_tensor(name, x, "[B, T, Hk, D]", like=q, dtype=q.dtype)
        check_tensor(name, x, "[B, T, Hk, D]", shape=(batch, num_tokens, k_slc.shape[2], dim))


def check_positions(name: str, positions: Tensor | None, x: Tensor, layout: str, rope: Tensor, length: int) -> None:
    """Refuses positions of `x [B, T, H, D]` that do not fit it, or that the table has no rows for.

    There are `length` without any. Those on a device other than a CPU are not looked at, which would mean to wait.
    """
    if positions is None:
        check_rope_length(rope, length)
        return
    check_tensor(name, positions, layout, like=x, shape=(x.shape[1],), dtype=(torch.int32, torch.int64))
    if not _has_values(positions) or positions.device.type != "cpu" or not positions.numel():
        return
    if int(positions.min()) < 0:
        raise ValueError(f"{name} must be at least 0, got {int(positions.min())}")
    check_rope_length(rope, int(positions.max()) + 1)


def check_no_positions(**positions: Tensor | None) -> None:
    """Refuses positions of packed sequences."""
    for name, given in positions.items():
        if given is not None:
            raise ValueError(f"{name} must be None where cu_seqlens says what they are, got a tensor")


def check_params(params: CompressionParams | None, x: Tensor, config: NSAConfig) -> None:
    """Refuses parameters that `config.compression` does not call for, or that do not fit `x [B, T, Hk, D]`."""
    kind = config.compression
    if kind == "mean":
        if params is not None:
            raise ValueError('params must be None for compression "mean", which learns nothing, got CompressionParams')
        return
    if not isinstance(params, CompressionParams):
        raise TypeError(f'params must be CompressionParams for compression "{kind}", got {type(params).__name__}')
    heads, dim, length = x.shape[2], x.shape[3], config.compress_block_size
    check_tensor("params.position", params.position, "[Hk, l, D]", like=x, shape=(heads, length, dim), dtype=None)
    if (params.weight_out is None) != (kind == "linear"):
        expected = "None" if kind == "linear" else "a tensor [Hk, F, D]"
        got = "None" if params.weight_out is None else "a tensor"
        raise ValueError(f'params.weight_out must be {expected} for compression "{kind}", got {got}')
    check_tensor("params.weight", params.weight, "[Hk, l * D, F]", like=x, dtype=None)
    hidden = dim if params.weight_out is None else params.weight.shape[2]
    check_tensor("params.weight", params.weight, "[Hk, l * D, F]", shape=(heads, length * dim, hidden), dtype=None)
    if params.weight_out is not None:
        check_tensor("params.weight_out", params.weight_out, "[Hk, F, D]", like=x, dtype=None)
        shape = (heads, hidden, dim)
        check_tensor("params.weight_out", params.weight_out, "[Hk, F, D]", shape=shape, dtype=None)
