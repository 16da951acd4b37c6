"""The public stages of Native Sparse Attention: check the arguments, pick a backend, dispatch.

Layout is `[B, T, H, D]` throughout, any strides. Queries are the last `Tq` of `Tk` tokens, so one rule serves training
(`Tq == Tk`), chunked prefill and decoding. Packed sequences come as one batch row with `cu_seqlens_q` and
`cu_seqlens_k` (int32 `[N + 1]`); every stage then treats each sequence by itself, block indices included.

Legend: `B` batch, `T` tokens, `C` compressed blocks, `S` selection blocks, `Hq`, `Hk` query and key/value heads,
`G = Hq / Hk`, `Dk`, `Dv` head dims, `N` selected blocks. Section and equation numbers are those of arXiv 2502.11089.

Errors raised by every function, before any work starts, naming the argument, what was expected and what came:
`TypeError` for a wrong type or dtype, `ValueError` for a wrong shape, size, device or value, and for
`backend="triton"` where Triton's kernels do not support the arguments: they want a GPU (or `TRITON_INTERPRET=1`), head
dims from 16 to 256 and block sizes that are powers of two, `d` from 8 and `l`, `l'` from 16. Derivatives are those of
`torch.autograd`; forward-mode ones and those of `torch.func` (`grad`, `vjp`, `jacrev`, ...) are refused with a
`ValueError`.

`torch.compile` and `torch.export` see no values, so offsets of packed sequences cannot be refused there. They are made
legal instead: clamped to the tokens there are, and never falling. Tokens that lie in no sequence, and queries of a
sequence that has more of them than keys, get an output of 0, and no gradient comes of them.

A token that a query does not attend to has no influence on its output, whatever it holds; nor has a query on the
gradients of tokens that it does not attend to. Padding may hold infinities and NaNs.
"""

import math
from types import ModuleType
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch._C import _functorch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from nsa import eager
from nsa.config import NSAConfig

Backend = Literal["auto", "eager", "triton"]

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class CompressionParams(NamedTuple):
    """What `compress` learns, for keys or for values; `None` stands for the `"mean"` kind, which learns nothing.

    Attributes:
        position: `[Hk, l, D]`, intra-block position embedding, added to every block.
        weight: `[Hk, l * D, F]`, first layer over the block's tokens, token-major; `F == D` for the `"linear"` kind.
        weight_out: `[Hk, F, D]`, second layer of the `"mlp"` kind, after a SiLU.
    """

    position: Tensor
    weight: Tensor
    weight_out: Tensor | None = None


class BlockStarts(NamedTuple):
    """Where compressed blocks begin, each `[C]`.

    Attributes:
        tokens: int64, first token of each block in the packed row.
        positions: int64, the same within its own sequence.
        filled: bool, or `None` where every block is: packed sequences leave room at the end.
    """

    tokens: Tensor
    positions: Tensor
    filled: Tensor | None


def block_starts(
    num_keys: int, config: NSAConfig, cu_seqlens: Tensor | None = None, *, device: torch.device | None = None
) -> BlockStarts:
    """First tokens of the `C` compressed blocks of `num_keys` tokens; block `i` of a sequence starts at `i d`.

    Sequence ends waste blocks, so packed sequences have at most as many as one sequence of their total length. `C` is
    always that many, a static shape; blocks that do not exist start at 0 and are not `filled`.
    """
    block = torch.arange(config.num_compressed(num_keys), device=device)
    if cu_seqlens is None:
        return BlockStarts(block * config.compress_stride, block * config.compress_stride, None)
    bounds = cu_seqlens.long()
    counts = ((bounds.diff() - config.compress_block_size) // config.compress_stride + 1).clamp(min=0)
    ends = counts.cumsum(0)
    sequence = torch.searchsorted(ends, block, right=True)
    filled = sequence < ends.shape[0]
    sequence = sequence.clamp(max=ends.shape[0] - 1)
    positions = (block - (ends - counts)[sequence]) * config.compress_stride * filled
    return BlockStarts((bounds[sequence] + positions) * filled, positions, filled)


def token_positions(num_tokens: int, cu_seqlens: Tensor) -> Tensor:
    """Position of each packed token in its own sequence, int64 `[T]`; offsets rise from 0 to `T`."""
    token, bounds = torch.arange(num_tokens, device=cu_seqlens.device), cu_seqlens.long()
    return token - bounds[torch.searchsorted(bounds, token, right=True) - 1]


def apply_rope(
    q: Tensor,
    k_cmp: Tensor,
    k_slc: Tensor,
    k_win: Tensor,
    rope: Tensor,
    config: NSAConfig,
    *,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rotary position embedding of queries and of the keys of all branches (RoFormer, arXiv 2104.09864).

    Tokens are rotated at their own positions, compressed blocks at those of their first tokens, `i d`. Arithmetic is
    done in float32, or in float64 where anything is given in it, and rounded once.

    Args:
        q: `[B, T, Hq, D]`, `D` even.
        k_cmp: `[B, C, Hk, D]`, from `compress`.
        k_slc, k_win: `[B, T, Hk, D]`.
        rope: `[L, D / 2, 2]`, cosine and sine of every position and pair, from `rope_table`; no gradient comes of it.
        positions: int32 or int64 `[T]`, those of the tokens of a part of a sequence; `0` to `T - 1` unless given. All
            must be below `L`, which is checked on a CPU.
        cu_seqlens: int32 `[N + 1]`, token offsets of packed sequences, in each of which positions start anew.

    Returns:
        The four rotated, contiguous, in their dtype.
    """
    _check_config(config)
    _check_tensor("q", q, "[B, T, Hq, D]")
    batch, num_tokens, _, dim = q.shape
    for name, x, layout in (("k_slc", k_slc, "[B, T, Hk, D]"), ("k_win", k_win, "[B, T, Hk, D]")):
        _check_tensor(name, x, layout, like=q, dtype=q.dtype)
        _check_tensor(name, x, layout, shape=(batch, num_tokens, k_slc.shape[2], dim))
    _check_tensor("k_cmp", k_cmp, "[B, C, Hk, D]", like=q, dtype=q.dtype)
    num_blocks = k_cmp.shape[1] if cu_seqlens is None else config.num_compressed(num_tokens)
    _check_tensor("k_cmp", k_cmp, "[B, C, Hk, D]", shape=(batch, num_blocks, k_slc.shape[2], dim))
    _check_rope(rope, q)
    block_positions = None
    if cu_seqlens is not None:
        if positions is not None:
            raise ValueError("positions must be None where cu_seqlens says what they are, got a tensor")
        lengths = _check_cu_seqlens("cu_seqlens", cu_seqlens, q, num_tokens)
        if lengths is None:
            cu_seqlens, _ = _legal_offsets(cu_seqlens, cu_seqlens, num_tokens, num_tokens)
        elif num_tokens:
            _check_rope_length(rope, int(lengths.max()))
        positions = token_positions(num_tokens, cu_seqlens)
        block_positions = block_starts(num_tokens, config, cu_seqlens, device=q.device).positions
    else:
        _check_rope_length(rope, num_tokens if positions is None else _check_positions(positions, q))
        _check_rope_length(rope, (num_blocks - 1) * config.compress_stride + 1)
    implementation = _load(backend, config, q)
    _check_derivatives(q=q, k_cmp=k_cmp, k_slc=k_slc, k_win=k_win)
    return implementation.apply_rope(q, k_cmp, k_slc, k_win, rope, config, positions, block_positions)


def compress(
    x: Tensor,
    params: CompressionParams | None,
    config: NSAConfig,
    *,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Blocks of keys or values, each as one vector (section 3.3.1, equation 7).

    Block `i` covers tokens `[i d, i d + l)`. Packed input gives the blocks of all sequences one after the other,
    followed by zeros: `C` depends on `T` alone, so shapes stay static.

    Args:
        x: `[B, T, Hk, D]`, unrotated.
        params: what `config.compression` calls for; cast to the dtype of `x`.
        cu_seqlens: int32 `[N + 1]`, token offsets of packed sequences.

    Returns:
        `[B, C, Hk, D]` with `C = max(0, (T - l) // d + 1)`.
    """
    return _compress({"x": x}, [params], config, cu_seqlens, backend)[0]


def compress_keys_and_values(
    k: Tensor,
    v: Tensor,
    k_params: CompressionParams | None,
    v_params: CompressionParams | None,
    config: NSAConfig,
    *,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """`compress` of keys and of values with parameters of their own, in fewer launches than two calls take.

    Args:
        k: `[B, T, Hk, Dk]`, unrotated.
        v: `[B, T, Hk, Dv]`.
        k_params, v_params, cu_seqlens: as `compress` takes them.

    Returns:
        `[B, C, Hk, Dk]` and `[B, C, Hk, Dv]`.
    """
    k_cmp, v_cmp = _compress({"k": k, "v": v}, [k_params, v_params], config, cu_seqlens, backend)
    return k_cmp, v_cmp


def _compress(
    tensors: dict[str, Tensor],
    params: list[CompressionParams | None],
    config: NSAConfig,
    cu_seqlens: Tensor | None,
    backend: Backend,
) -> tuple[Tensor, ...]:
    _check_config(config)
    xs = list(tensors.values())
    for (name, x), learned in zip(tensors.items(), params, strict=True):
        _check_tensor(name, x, "[B, T, Hk, D]", like=xs[0], dtype=_DTYPES if x is xs[0] else xs[0].dtype)
        _check_tensor(name, x, "[B, T, Hk, D]", shape=(*xs[0].shape[:3], x.shape[3]))
        _check_params(learned, x, config)
    num_tokens, device = xs[0].shape[1], xs[0].device
    if cu_seqlens is not None:
        _check_cu_seqlens("cu_seqlens", cu_seqlens, xs[0], num_tokens)
        if not _has_values(cu_seqlens):
            cu_seqlens, _ = _legal_offsets(cu_seqlens, cu_seqlens, num_tokens, num_tokens)
    implementation = _load(backend, config, *xs)
    _check_derivatives(**tensors)
    # Kernels find the blocks of whole sequences by themselves.
    listed = cu_seqlens is not None or implementation is eager
    blocks = block_starts(num_tokens, config, cu_seqlens, device=device) if listed else None
    outs = implementation.compress(xs, params, config, blocks)
    # Under autocast products come in another dtype than the keys that they stand beside.
    return tuple(out.to(x.dtype) for out, x in zip(outs, xs, strict=True))


def compressed_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    config: NSAConfig,
    *,
    num_keys: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention over compressed keys: query `t` sees block `i` once all of it has passed, `i d + l - 1 <= t`.

    Args:
        q: `[B, Tq, Hq, Dk]`.
        k_cmp: `[B, C, Hk, Dk]`.
        v_cmp: `[B, C, Hk, Dv]`.
        num_keys: tokens `Tk` behind `k_cmp`; `Tq` unless given.
        scale: of the logits; `Dk ** -0.5` unless given.

    Returns:
        Output `[B, Tq, Hq, Dv]` and log-sum-exp `[B, Tq, Hq]` (float32, float64 for float64 inputs; not
        differentiable). A query that sees no block gets 0, `-inf` and zero gradients.
    """
    num_keys = q.shape[1] if num_keys is None and isinstance(q, Tensor) and q.dim() == 4 else num_keys
    _check_config(config)
    _check_attention(q, k_cmp, v_cmp, ("k_cmp", "v_cmp"), "C")
    tokens = _check_blocks(k_cmp, config, num_keys)
    cu = _check_packing(q, tokens, cu_seqlens_q, cu_seqlens_k)
    factor, implementation = _scale(scale, q), _load(backend, config, q, v_cmp)
    _check_derivatives(q=q, k_cmp=k_cmp, v_cmp=v_cmp)
    return implementation.compressed_attention(q, k_cmp, v_cmp, config, tokens, *cu, factor)


def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    config: NSAConfig,
    *,
    num_keys: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """The blocks each query attends to, by importance (section 3.3.2, equations 8 to 12). Not differentiable.

    The importance of block `j` is the compressed probability that overlaps it, summed over the query heads of a KV
    head. Of the candidates `j <= t // l'` the first `num_initial_blocks` and the last `num_local_blocks` are always
    taken and count towards `n`; ties go to the lower index; a candidate is never lost to padding.

    Args:
        q: `[B, Tq, Hq, Dk]`.
        k_cmp: `[B, C, Hk, Dk]`.
        lse: `[B, Tq, Hq]`, as `compressed_attention` returned it for the same `q`, `k_cmp` and `scale`.
        num_keys: tokens `Tk` behind `k_cmp`; `Tq` unless given.

    Returns:
        int32 `[B, Tq, Hk, N]`, ascending, `-1` at the end where there are fewer candidates than `N = n`.
    """
    num_keys = q.shape[1] if num_keys is None and isinstance(q, Tensor) and q.dim() == 4 else num_keys
    _check_config(config)
    _check_attention(q, k_cmp, None, ("k_cmp", ""), "C")
    _check_tensor("lse", lse, "[B, Tq, Hq]", like=q, shape=tuple(q.shape[:3]), dtype=None)
    tokens = _check_blocks(k_cmp, config, num_keys)
    cu = _check_packing(q, tokens, cu_seqlens_q, cu_seqlens_k)
    factor, implementation = _scale(scale, q), _load(backend, config, q)
    _check_derivatives(q=q, k_cmp=k_cmp, lse=lse)
    return implementation.select_blocks(q, k_cmp, lse, config, tokens, *cu, factor)


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    config: NSAConfig,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Attention of query `t` over the tokens `s <= t` of its selected blocks (section 3.3.2).

    Args:
        q: `[B, Tq, Hq, Dk]`.
        k: `[B, Tk, Hk, Dk]`.
        v: `[B, Tk, Hk, Dv]`.
        indices: int32 `[B, Tq, Hk, N]`, any order, any `N`. What names no block that the query sees is skipped
            wherever it stands: `-1`, blocks beyond the query, any number below 0 or too large. A block listed twice
            for one query is an error, which only the eager backend looks for, uncompiled.

    Returns:
        `[B, Tq, Hq, Dv]`; a query with no block gets 0.
    """
    _check_config(config)
    _check_attention(q, k, v, ("k", "v"), "Tk")
    _check_indices(indices, q, k)
    cu = _check_packing(q, k.shape[1], cu_seqlens_q, cu_seqlens_k)
    factor, implementation = _scale(scale, q), _load(backend, config, q, v)
    if implementation is eager:
        _check_no_block_twice(indices, config.num_selectable(k.shape[1]))
    _check_derivatives(q=q, k=k, v=v)
    return implementation.selected_attention(q, k, v, indices, config, *cu, factor)


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: NSAConfig,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Attention of query `t` over `t - w < s <= t`: exactly `w` tokens, itself included (section 3.3.3).

    Args:
        q: `[B, Tq, Hq, Dk]`.
        k: `[B, Tk, Hk, Dk]`.
        v: `[B, Tk, Hk, Dv]`.

    Returns:
        `[B, Tq, Hq, Dv]`.
    """
    _check_config(config)
    _check_attention(q, k, v, ("k", "v"), "Tk")
    cu = _check_packing(q, k.shape[1], cu_seqlens_q, cu_seqlens_k)
    factor, implementation = _scale(scale, q), _load(backend, config, q, v)
    _check_derivatives(q=q, k=k, v=v)
    return implementation.sliding_window_attention(q, k, v, config, *cu, factor)


def nsa_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    config: NSAConfig,
    *,
    indices: Tensor | None = None,
    return_indices: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Native Sparse Attention: the gated sum of its three branches (section 3.2, equation 5).

    Args:
        q: `[B, Tq, Hq, Dk]`.
        k_cmp, v_cmp: `[B, C, Hk, Dk]`, `[B, C, Hk, Dv]`, from `compress`.
        k_slc, v_slc: `[B, Tk, Hk, Dk]`, `[B, Tk, Hk, Dv]`, of the selected branch.
        k_win, v_win: the same, of the window branch.
        gates: `[B, Tq, Hq, 3]` in the order compressed, selected, window.
        indices: int32 `[B, Tq, Hk, N]`, replaces the selection.
        return_indices: also return the indices used.

    Returns:
        `[B, Tq, Hq, Dv]`, or that and the indices `[B, Tq, Hk, N]`.
    """
    _check_config(config)
    _check_attention(q, k_slc, v_slc, ("k_slc", "v_slc"), "Tk")
    _check_attention(q, k_win, v_win, ("k_win", "v_win"), "Tk")
    _check_attention(q, k_cmp, v_cmp, ("k_cmp", "v_cmp"), "C")
    tokens = _check_blocks(k_cmp, config, k_slc.shape[1])
    for name, tensor in (("k_win", k_win), ("k_cmp", k_cmp)):
        if tensor.shape[2] != k_slc.shape[2]:
            raise ValueError(f"{name} must have as many heads as k_slc ({k_slc.shape[2]}), got {tensor.shape[2]}")
    for name, tensor in (("v_win", v_win), ("v_cmp", v_cmp)):
        if tensor.shape[3] != v_slc.shape[3]:
            raise ValueError(f"{name} must have the head dim of v_slc ({v_slc.shape[3]}), got {tensor.shape[3]}")
    if k_win.shape[1] != tokens:
        raise ValueError(f"k_win must have as many tokens as k_slc ({tokens}), got {k_win.shape[1]}")
    _check_tensor("gates", gates, "[B, Tq, Hq, 3]", like=q, shape=(*q.shape[:3], 3), dtype=None)
    cu = _check_packing(q, tokens, cu_seqlens_q, cu_seqlens_k)
    factor = _scale(scale, q)
    implementation = _load(backend, config, q, v_slc)
    if indices is not None:
        _check_indices(indices, q, k_slc)
        if implementation is eager:
            _check_no_block_twice(indices, config.num_selectable(tokens))
    _check_derivatives(q=q, k_cmp=k_cmp, v_cmp=v_cmp, k_slc=k_slc, v_slc=v_slc, k_win=k_win, v_win=v_win, gates=gates)

    tensors = (q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates)
    out, indices = implementation.nsa_attention(*tensors, indices, config, *cu, factor)
    return (out, indices) if return_indices else out


def _load(backend: str, config: NSAConfig, *tensors: Tensor) -> ModuleType:
    """The module that implements the stages for these heads, `[B, T, H, D]`: Triton where it can, if left to choose."""
    _check_backend(backend)
    if backend == "eager" or (backend == "auto" and tensors[0].device.type != "cuda"):
        return eager
    from nsa import kernels

    reason = kernels.why_not(config, *tensors)
    if reason is None:
        return kernels
    if backend == "triton":
        raise ValueError(f'backend must be "auto" or "eager" where Triton lacks support, got "triton" and {reason}')
    return eager


def _check_backend(backend: str) -> None:
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {get_args(Backend)}, got {backend!r}")


def _scale(scale: float | None, q: Tensor) -> float:
    if scale is None:
        return float(q.shape[-1] ** -0.5)
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"scale must be a float or None, got {scale!r} ({type(scale).__name__})")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale!r}")
    return float(scale)


def _check_config(config: NSAConfig) -> None:
    if not isinstance(config, NSAConfig):
        raise TypeError(f"config must be an NSAConfig, got {type(config).__name__}")


def _check_tensor(
    name: str,
    x: Tensor,
    layout: str,
    *,
    like: Tensor | None = None,
    shape: tuple[int, ...] | None = None,
    dtype: torch.dtype | tuple[torch.dtype, ...] | None = _DTYPES,
) -> None:
    """Rank, dtype, and device and shape beside a tensor checked before; `dtype=None` takes any floating type."""
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


@torch.compiler.disable
def _transforms() -> list[Any]:
    return _functorch.get_interpreter_stack() or []


@torch.compiler.assume_constant_result  # true of the place in a program, not of a call
def _differentiated_by_functorch() -> bool:
    return any(level.key() == _functorch.TransformType.Grad for level in _transforms())


def _check_derivatives(**tensors: Tensor) -> None:
    """Refuses derivatives that operators do not have. PyTorch would take those of forward mode to be 0."""
    differentiated = _differentiated_by_functorch()
    for name, x in tensors.items():
        if forward_ad.unpack_dual(x).tangent is not None:
            raise ValueError(f"{name} must have no tangent, since there are no forward-mode derivatives, got one")
        if differentiated and (torch.compiler.is_compiling() or _functorch.is_gradtrackingtensor(x)):
            raise ValueError(f"{name} must be differentiated by torch.autograd, got a transform of torch.func")


def _check_attention(q: Tensor, k: Tensor, v: Tensor | None, names: tuple[str, str], length: str) -> None:
    _check_tensor("q", q, "[B, Tq, Hq, Dk]")
    _check_tensor(names[0], k, f"[B, {length}, Hk, Dk]", like=q, dtype=q.dtype)
    batch, _, heads, dim = q.shape
    for what, got, expected in (("batch", k.shape[0], batch), ("head dim", k.shape[3], dim)):
        if got != expected:
            raise ValueError(f"{names[0]} must have the {what} of q ({expected}), got {got}")
    if heads == 0 or k.shape[2] == 0 or heads % k.shape[2]:
        raise ValueError(f"q must have a multiple of the heads of {names[0]} ({k.shape[2]}), got {heads}")
    if v is not None:
        layout = f"[B, {length}, Hk, Dv]"
        _check_tensor(names[1], v, layout, like=q, dtype=q.dtype)
        _check_tensor(names[1], v, layout, shape=(*k.shape[:3], v.shape[3]))


def _check_blocks(k_cmp: Tensor, config: NSAConfig, num_keys: int | None) -> int:
    """The number of tokens behind `k_cmp`, which must have been made from that many."""
    if isinstance(num_keys, bool) or not isinstance(num_keys, int | torch.SymInt):
        raise TypeError(f"num_keys must be an int or None, got {num_keys!r} ({type(num_keys).__name__})")
    if k_cmp.shape[1] != config.num_compressed(num_keys):
        raise ValueError(
            f"k_cmp must have the {config.num_compressed(num_keys)} blocks of num_keys = {num_keys} tokens, "
            f"got {k_cmp.shape[1]}"
        )
    return num_keys


def _check_packing(
    q: Tensor, num_keys: int, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Offsets of queries and keys, both or neither; keys share those of the queries unless given their own."""
    if cu_seqlens_q is None:
        if cu_seqlens_k is not None:
            raise ValueError("cu_seqlens_q must be given where cu_seqlens_k is, got None")
        if q.shape[1] > num_keys:
            raise ValueError(f"q must have at most as many tokens as there are keys ({num_keys}), got {q.shape[1]}")
        return None, None
    lengths_q = _check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q, q.shape[1])
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
    lengths_k = _check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, q, num_keys)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_k must have as many entries as cu_seqlens_q ({len(cu_seqlens_q)}), got {len(cu_seqlens_k)}"
        )
    if lengths_q is not None and lengths_k is not None and bool((lengths_q > lengths_k).any()):
        raise ValueError(
            f"cu_seqlens_k must give every sequence at least as many keys as queries ({lengths_q.tolist()}), "
            f"got {lengths_k.tolist()}"
        )
    if lengths_q is None or lengths_k is None:
        return _legal_offsets(cu_seqlens_q, cu_seqlens_k, q.shape[1], num_keys)
    return cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()


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
    _check_tensor(name, offsets, "[N + 1]", like=x, dtype=torch.int32)
    if x.shape[0] != 1:
        raise ValueError(f"{name} needs a batch of 1, since sequences are packed along T, got {x.shape[0]}")
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
    return not (torch.compiler.is_compiling() or x.device.type == "meta" or isinstance(x, FakeTensor))


def _check_indices(indices: Tensor, q: Tensor, k: Tensor) -> None:
    _check_tensor("indices", indices, "[B, Tq, Hk, N]", like=q, dtype=torch.int32)
    expected = (q.shape[0], q.shape[1], k.shape[2])
    if tuple(indices.shape[:3]) != expected:
        raise ValueError(f"indices must have shape [B, Tq, Hk, N] = {(*expected, 'N')}, got {tuple(indices.shape)}")


def _check_no_block_twice(indices: Tensor, num_blocks: int) -> None:
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


def _check_rope(rope: Tensor, q: Tensor) -> None:
    dim = q.shape[3]
    if dim % 2:
        raise ValueError(f"q must have an even head dim to be rotated in pairs, got {dim}")
    _check_tensor("rope", rope, "[L, D / 2, 2]", like=q, dtype=None)
    if rope.shape[1:] != (dim // 2, 2):
        raise ValueError(f"rope must have shape [L, D / 2, 2] = (L, {dim // 2}, 2), got {tuple(rope.shape)}")


def _check_rope_length(rope: Tensor, num_positions: int) -> None:
    if rope.shape[0] < num_positions:
        raise ValueError(f"rope must have a row for each of the {num_positions} positions, got {rope.shape[0]}")


def _check_positions(positions: Tensor, q: Tensor) -> int:
    """The number of rows that positions ask of a table; 0 where to look at them would mean to wait for a device."""
    _check_tensor("positions", positions, "[T]", like=q, shape=(q.shape[1],), dtype=(torch.int32, torch.int64))
    if not _has_values(positions) or positions.device.type != "cpu" or not positions.numel():
        return 0
    if int(positions.min()) < 0:
        raise ValueError(f"positions must be at least 0, got {int(positions.min())}")
    return int(positions.max()) + 1


def _check_params(params: CompressionParams | None, x: Tensor, config: NSAConfig) -> None:
    kind = config.compression
    if kind == "mean":
        if params is not None:
            raise ValueError('params must be None for compression "mean", which learns nothing, got CompressionParams')
        return
    if not isinstance(params, CompressionParams):
        raise TypeError(f'params must be CompressionParams for compression "{kind}", got {type(params).__name__}')
    heads, dim, length = x.shape[2], x.shape[3], config.compress_block_size
    _check_tensor("params.position", params.position, "[Hk, l, D]", like=x, shape=(heads, length, dim), dtype=None)
    if (params.weight_out is None) != (kind == "linear"):
        expected = "None" if kind == "linear" else "a tensor [Hk, F, D]"
        got = "None" if params.weight_out is None else "a tensor"
        raise ValueError(f'params.weight_out must be {expected} for compression "{kind}", got {got}')
    _check_tensor("params.weight", params.weight, "[Hk, l * D, F]", like=x, dtype=None)
    hidden = dim if params.weight_out is None else params.weight.shape[2]
    _check_tensor("params.weight", params.weight, "[Hk, l * D, F]", shape=(heads, length * dim, hidden), dtype=None)
    if params.weight_out is not None:
        _check_tensor("params.weight_out", params.weight_out, "[Hk, F, D]", like=x, dtype=None)
        shape = (heads, hidden, dim)
        _check_tensor("params.weight_out", params.weight_out, "[Hk, F, D]", shape=shape, dtype=None)
