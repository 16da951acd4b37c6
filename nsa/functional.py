"""The public stages of Native Sparse Attention: check the arguments, pick a backend, dispatch.

Layout is `[B, T, H, D]` throughout, any strides. Queries are the last `Tq` of `Tk` tokens, so one rule serves training
(`Tq == Tk`), chunked prefill and decoding. Packed sequences come as one batch row with `cu_seqlens_q` and
`cu_seqlens_k` (int32 `[N + 1]`); every stage then treats each sequence by itself, block indices included. In place of
offsets functions take what `pack_sequences` makes of them.

Legend: `B` batch, `T` tokens, `C` compressed blocks, `S` selection blocks, `Hq`, `Hk` query and key/value heads,
`G = Hq / Hk`, `Dk`, `Dv` head dims, `N` selected blocks. Section and equation numbers are those of arXiv 2502.11089.

Errors are raised before any work starts and name the argument, what was expected and what came. Triton's kernels want a
GPU (or `TRITON_INTERPRET=1`), head dims from 16 to 256 and block sizes that are powers of two, `d` from 8 and `l`, `l'`
from 16. Derivatives are those of `torch.autograd`; forward-mode ones and those of `torch.func` (`grad`, `vjp`,
`jacrev`, ...) are refused with a `ValueError`.

`torch.compile`, `torch.export` and the capture of a CUDA graph see no values, so offsets of packed sequences cannot be
refused there. They are made legal instead: clamped to the tokens there are, and never falling. Tokens that lie in no
sequence, and queries before the first key of theirs, get an output of 0, and no gradient comes of them.

A token that a query does not attend to has no influence on its output, whatever it holds; nor has a query on the
gradients of tokens that it does not attend to. Padding may hold infinities and NaNs.
"""

import torch
from torch import Tensor

from nsa import eager
from nsa.backends import Backend, BackendName
from nsa.blocks import BlockFunction, CompressionParams, block_starts, compress_by
from nsa.checks import (
    attention_tables,
    check_attention,
    check_backend,
    check_blocks,
    check_branches,
    check_config,
    check_derivatives,
    check_indices,
    check_no_block_twice,
    check_no_positions,
    check_packing,
    check_params,
    check_positions,
    check_rope,
    check_rope_length,
    check_rotated,
    check_scale,
    check_tensor,
    pack_tokens,
)
from nsa.config import NSAConfig
from nsa.varlen import PackedSequences, make_tables


def compress(
    x: Tensor,
    params: CompressionParams | BlockFunction | None,
    config: NSAConfig,
    *,
    cu_seqlens: Tensor | PackedSequences | None = None,
    backend: BackendName = "auto",
) -> Tensor:
    """Blocks of keys or values, each as one vector (section 3.3.1, equation 7).

    Block `i` covers tokens `[i d, i d + l)`. Packed input gives the blocks of all sequences one after the other,
    followed by zeros: `C` depends on `T` alone, so shapes stay static.

    Args:
        x: `[B, T, Hk, D]`, unrotated.
        params: what `config.compression` calls for; cast to the dtype of `x`. Or any function of blocks,
            `[B, C, Hk, l, D] -> [B, C, Hk, D]`, whatever `config.compression` is; the blocks take `l / d` times the
            memory of `x`.
        config: block sizes and counts.
        cu_seqlens: int32 `[N + 1]`, token offsets of packed sequences; or what `pack_sequences` makes of them.
        backend: `"auto"` takes `"triton"` on a GPU where its kernels support the arguments, else `"eager"`.

    Returns:
        `[B, C, Hk, D]` with `C = max(0, (T - l) // d + 1)`.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: a shape, size, device, value or derivative that is not supported, by `backend="triton"` for one.
    """
    return _compress({"x": x}, [params], config, cu_seqlens, backend)[0]


def compress_keys_and_values(
    k: Tensor,
    v: Tensor,
    k_params: CompressionParams | BlockFunction | None,
    v_params: CompressionParams | BlockFunction | None,
    config: NSAConfig,
    *,
    cu_seqlens: Tensor | PackedSequences | None = None,
    backend: BackendName = "auto",
) -> tuple[Tensor, Tensor]:
    """`compress` of keys and of values with parameters of their own, in fewer launches than two calls take
    (section 3.3.1, equation 7).

    Args:
        k: `[B, T, Hk, Dk]`, unrotated.
        v: `[B, T, Hk, Dv]`.
        k_params, v_params: as `compress` takes them.
        config, cu_seqlens, backend: as `compress` takes them.

    Returns:
        `[B, C, Hk, Dk]` and `[B, C, Hk, Dv]`.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: a shape, size, device, value or derivative that is not supported, by `backend="triton"` for one.
    """
    k_cmp, v_cmp = _compress({"k": k, "v": v}, [k_params, v_params], config, cu_seqlens, backend)
    return k_cmp, v_cmp


def _compress(
    tensors: dict[str, Tensor],
    params: list[CompressionParams | BlockFunction | None],
    config: NSAConfig,
    cu_seqlens: Tensor | PackedSequences | None,
    backend: BackendName,
) -> tuple[Tensor, ...]:
    check_config(config)
    xs = list(tensors.values())
    for (name, x), learned in zip(tensors.items(), params, strict=True):
        check_tensor(name, x, "[B, T, Hk, D]", like=xs[0])
        if x is not xs[0]:
            check_tensor(name, x, "[B, T, Hk, D]", shape=(*xs[0].shape[:3], x.shape[3]), dtype=xs[0].dtype)
        if not callable(learned):
            check_params(learned, x, config)
    packed = pack_tokens(xs[0], cu_seqlens, config, keys_alone=True)
    if any(map(callable, params)):
        check_backend(backend)
        starts = block_starts(xs[0].shape[1], config, device=xs[0].device) if packed is None else packed.blocks
        return tuple(
            compress_by(p, x, starts, config).to(x.dtype)
            if callable(p)
            else _compress({name: x}, [p], config, packed, backend)[0]
            for (name, x), p in zip(tensors.items(), params, strict=True)
        )
    given = [p for p in params if p is None or isinstance(p, CompressionParams)]
    implementation = load_backend(backend, config, *xs)
    learned_tensors = {
        f"{'params' if len(xs) == 1 else f'{name}_params'}.{field}": p
        for name, learned in zip(tensors, given, strict=True)
        for field, p in (learned._asdict().items() if learned is not None else ())
        if p is not None
    }
    check_derivatives(**tensors, **learned_tensors)
    blocks = None if packed is None else packed.blocks
    if blocks is None and implementation is eager:
        blocks = block_starts(xs[0].shape[1], config, device=xs[0].device)
    outs = implementation.compress(xs, given, config, blocks)
    # Under autocast products come in another dtype than the keys that they stand beside.
    return tuple(out.to(x.dtype) for out, x in zip(outs, xs, strict=True))


def apply_rope(
    q: Tensor,
    k_cmp: Tensor,
    k_slc: Tensor,
    k_win: Tensor,
    rope: Tensor,
    config: NSAConfig,
    *,
    positions: Tensor | None = None,
    block_positions: Tensor | None = None,
    cu_seqlens: Tensor | PackedSequences | None = None,
    interleaved: bool = True,
    backend: BackendName = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rotary position embedding of queries and of the keys of all branches (RoFormer, arXiv 2104.09864).

    Tokens are rotated at their own positions, compressed blocks at those of their first tokens, `i d`. Arithmetic is
    done in float32, or in float64 where anything is given in it, and rounded once.

    Args:
        q: `[B, T, Hq, D]`, `D` even.
        k_cmp: `[B, C, Hk, D]`, from `compress`.
        k_slc, k_win: `[B, T, Hk, D]`.
        rope: `[L, D / 2, 2]`, cosine and sine of every position and pair, from `rope_table`; no gradient comes of it.
        config: block sizes and counts.
        positions, block_positions: int32 or int64 `[T]` and `[C]`, those of the tokens and blocks of a part of a
            sequence; `0` to `T - 1` and `i d` unless given. All must be below `L`, which is checked on a CPU; rows of
            others come out as NaN.
        cu_seqlens: int32 `[N + 1]`, token offsets of packed sequences, in each of which positions start anew.
        interleaved: pairs are dimensions `2 i` and `2 i + 1`; else `i` and `i + D / 2`, as in `transformers`.
        backend: `"auto"` takes `"triton"` on a GPU where its kernels support the arguments, else `"eager"`.

    Returns:
        The four rotated, contiguous, in their dtype.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: a shape, size, device, value or derivative that is not supported, by `backend="triton"` for one.
    """
    check_config(config)
    check_rotated(q, k_slc, k_win)
    batch, num_tokens, _, dim = q.shape
    check_tensor("k_cmp", k_cmp, "[B, C, Hk, D]", like=q, dtype=q.dtype)
    num_blocks = k_cmp.shape[1] if cu_seqlens is None else config.num_compressed(num_tokens)
    check_tensor("k_cmp", k_cmp, "[B, C, Hk, D]", shape=(batch, num_blocks, k_slc.shape[2], dim))
    check_rope(rope, q)
    packed = pack_tokens(q, cu_seqlens, config)
    if packed is not None:
        check_no_positions(positions=positions, block_positions=block_positions)
        check_rope_length(rope, packed.longest)
        positions, block_positions = packed.positions, packed.blocks.positions
    else:
        check_positions("positions", positions, q, "[T]", rope, num_tokens)
        last = (num_blocks - 1) * config.compress_stride
        check_positions("block_positions", block_positions, k_cmp, "[C]", rope, last + 1)
    implementation = load_backend(backend, config, q)
    check_derivatives(q=q, k_cmp=k_cmp, k_slc=k_slc, k_win=k_win)
    return implementation.apply_rope(q, k_cmp, k_slc, k_win, rope, config, positions, block_positions, interleaved)


def pack_sequences(
    cu_seqlens: Tensor,
    config: NSAConfig,
    *,
    num_tokens: int,
    cu_seqlens_k: Tensor | None = None,
    num_keys: int | None = None,
) -> PackedSequences:
    """Packed sequences as all functions take them in place of offsets: checked, and with their tables made once.

    Args:
        cu_seqlens: int32 `[N + 1]`, offsets of the sequences among the queries, rising from 0 to `Tq`.
        config: block sizes and counts.
        num_tokens: `Tq`.
        cu_seqlens_k: int32 `[N + 1]`, offsets among the keys; those of the queries unless given.
        num_keys: `Tk`; `Tq` unless given.

    Returns:
        Tables for every stage, which stand for `cu_seqlens_q` or `cu_seqlens`.

    Raises:
        TypeError: offsets that are not int32.
        ValueError: offsets that fall or do not end with the tokens, a sequence with more queries than keys.
    """
    check_config(config)
    check_tensor("cu_seqlens", cu_seqlens, "[N + 1]", dtype=torch.int32)
    num_keys = num_tokens if num_keys is None else num_keys
    names = ("cu_seqlens", "cu_seqlens_k")
    offsets = check_packing(cu_seqlens, num_tokens, num_keys, cu_seqlens, cu_seqlens_k, config, names=names)
    assert not isinstance(offsets, PackedSequences)
    return make_tables(offsets.queries, offsets.keys, num_tokens, num_keys, offsets.longest, config)


def compressed_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    config: NSAConfig,
    *,
    num_keys: int | None = None,
    cu_seqlens_q: Tensor | PackedSequences | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    backend: BackendName = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention over compressed keys: query `t` sees block `i` once all of it has passed, `i d + l - 1 <= t`
    (sections 3.3.1 and 3.2).

    Args:
        q: `[B, Tq, Hq, Dk]`.
        k_cmp: `[B, C, Hk, Dk]`.
        v_cmp: `[B, C, Hk, Dv]`.
        config: block sizes and counts.
        num_keys: tokens `Tk` behind `k_cmp`; `Tq` unless given.
        cu_seqlens_q, cu_seqlens_k: int32 `[N + 1]`, offsets of packed sequences; or what `pack_sequences` gave, alone.
        scale: of the logits; `Dk ** -0.5` unless given.
        backend: `"auto"` takes `"triton"` on a GPU where its kernels support the arguments, else `"eager"`.

    Returns:
        Output `[B, Tq, Hq, Dv]` and log-sum-exp `[B, Tq, Hq]` (float32, float64 for float64 inputs; not
        differentiable). A query that sees no block gets 0, `-inf` and zero gradients.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: a shape, size, device, value or derivative that is not supported, by `backend="triton"` for one.
    """
    check_config(config)
    check_attention(q, k_cmp, v_cmp, ("k_cmp", "v_cmp"), "C")
    tokens = check_blocks(q, k_cmp, config, num_keys)
    varlen = attention_tables(q, tokens, config, cu_seqlens_q, cu_seqlens_k)
    factor, implementation = check_scale(scale, q), load_backend(backend, config, q, v_cmp)
    check_derivatives(q=q, k_cmp=k_cmp, v_cmp=v_cmp)
    return implementation.compressed_attention(q, k_cmp, v_cmp, config, tokens, varlen, factor)


def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    config: NSAConfig,
    *,
    num_keys: int | None = None,
    cu_seqlens_q: Tensor | PackedSequences | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    backend: BackendName = "auto",
) -> Tensor:
    """The blocks each query attends to, by importance (section 3.3.2, equations 8 to 12). Not differentiable.

    The importance of block `j` is the compressed probability that overlaps it, summed over the query heads of a KV
    head. Of the candidates `j <= t // l'` the first `num_initial_blocks` and the last `num_local_blocks` are always
    taken and count towards `n`; ties go to the lower index; a candidate is never lost to padding.

    Args:
        q: `[B, Tq, Hq, Dk]`.
        k_cmp: `[B, C, Hk, Dk]`.
        lse: `[B, Tq, Hq]`, as `compressed_attention` returned it for the same `q`, `k_cmp` and `scale`.
        config: block sizes and counts.
        num_keys: tokens `Tk` behind `k_cmp`; `Tq` unless given.
        cu_seqlens_q, cu_seqlens_k: int32 `[N + 1]`, offsets of packed sequences; or what `pack_sequences` gave, alone.
        scale: of the logits; `Dk ** -0.5` unless given.
        backend: `"auto"` takes `"triton"` on a GPU where its kernels support the arguments, else `"eager"`.

    Returns:
        int32 `[B, Tq, Hk, N]`, ascending, `-1` at the end where there are fewer candidates than `N = n`.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: a shape, size, device, value or derivative that is not supported, by `backend="triton"` for one.
    """
    check_config(config)
    check_attention(q, k_cmp, None, ("k_cmp", ""), "C")
    check_tensor("lse", lse, "[B, Tq, Hq]", like=q, shape=tuple(q.shape[:3]), dtype=None)
    tokens = check_blocks(q, k_cmp, config, num_keys)
    varlen = attention_tables(q, tokens, config, cu_seqlens_q, cu_seqlens_k)
    factor, implementation = check_scale(scale, q), load_backend(backend, config, q)
    check_derivatives(q=q, k_cmp=k_cmp, lse=lse)
    return implementation.select_blocks(q, k_cmp, lse, config, tokens, varlen, factor)


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    config: NSAConfig,
    *,
    return_lse: bool = False,
    cu_seqlens_q: Tensor | PackedSequences | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    backend: BackendName = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of query `t` over the tokens `s <= t` of its selected blocks (section 3.3.2).

    Args:
        q: `[B, Tq, Hq, Dk]`.
        k: `[B, Tk, Hk, Dk]`.
        v: `[B, Tk, Hk, Dv]`.
        indices: int32 `[B, Tq, Hk, N]`, any order, any `N`. What names no block that the query sees is skipped
            wherever it stands: `-1`, blocks beyond the query, any number below 0 or too large. A block listed twice
            for one query is an error, which only the eager backend looks for, uncompiled.
        config: block sizes and counts.
        return_lse: also return the log-sum-exps, with which attention to other keys can be merged.
        cu_seqlens_q, cu_seqlens_k: int32 `[N + 1]`, offsets of packed sequences; or what `pack_sequences` gave, alone.
        scale: of the logits; `Dk ** -0.5` unless given.
        backend: `"auto"` takes `"triton"` on a GPU where its kernels support the arguments, else `"eager"`.

    Returns:
        Output `[B, Tq, Hq, Dv]`, or that and the log-sum-exp `[B, Tq, Hq]` (float32, float64 for float64 inputs; not
        differentiable). A query with no block gets 0 and `-inf`.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: a shape, size, device, value or derivative that is not supported, by `backend="triton"` for one.
    """
    check_config(config)
    check_attention(q, k, v, ("k", "v"), "Tk")
    check_indices(indices, q, k)
    varlen = attention_tables(q, k.shape[1], config, cu_seqlens_q, cu_seqlens_k)
    factor, implementation = check_scale(scale, q), load_backend(backend, config, q, v)
    if implementation is eager:
        check_no_block_twice(indices, config.num_selectable(k.shape[1]))
    check_derivatives(q=q, k=k, v=v)
    out, lse = implementation.selected_attention(q, k, v, indices, config, varlen, factor)
    return (out, lse) if return_lse else out


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: NSAConfig,
    *,
    return_lse: bool = False,
    cu_seqlens_q: Tensor | PackedSequences | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    backend: BackendName = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of query `t` over `t - w < s <= t`: exactly `w` tokens, itself included (section 3.3.3).

    Args:
        q: `[B, Tq, Hq, Dk]`.
        k: `[B, Tk, Hk, Dk]`.
        v: `[B, Tk, Hk, Dv]`.
        config: block sizes and counts.
        return_lse: also return the log-sum-exps, with which attention to other keys can be merged.
        cu_seqlens_q, cu_seqlens_k: int32 `[N + 1]`, offsets of packed sequences; or what `pack_sequences` gave, alone.
        scale: of the logits; `Dk ** -0.5` unless given.
        backend: `"auto"` takes `"triton"` on a GPU where its kernels support the arguments, else `"eager"`.

    Returns:
        Output `[B, Tq, Hq, Dv]`, or that and the log-sum-exp `[B, Tq, Hq]` (float32, float64 for float64 inputs; not
        differentiable).

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: a shape, size, device, value or derivative that is not supported, by `backend="triton"` for one.
    """
    check_config(config)
    check_attention(q, k, v, ("k", "v"), "Tk")
    varlen = attention_tables(q, k.shape[1], config, cu_seqlens_q, cu_seqlens_k)
    factor, implementation = check_scale(scale, q), load_backend(backend, config, q, v)
    check_derivatives(q=q, k=k, v=v)
    out, lse = implementation.sliding_window_attention(q, k, v, config, varlen, factor)
    return (out, lse) if return_lse else out


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
    cu_seqlens_q: Tensor | PackedSequences | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    backend: BackendName = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Native Sparse Attention: the gated sum of its three branches (section 3.2, equation 5).

    Args:
        q: `[B, Tq, Hq, Dk]`.
        k_cmp, v_cmp: `[B, C, Hk, Dk]`, `[B, C, Hk, Dv]`, from `compress`.
        k_slc, v_slc: `[B, Tk, Hk, Dk]`, `[B, Tk, Hk, Dv]`, of the selected branch.
        k_win, v_win: the same, of the window branch.
        gates: `[B, Tq, Hq, 3]` in the order compressed, selected, window.
        config: block sizes and counts.
        indices: int32 `[B, Tq, Hk, N]`, replaces the selection.
        return_indices: also return the indices used.
        cu_seqlens_q, cu_seqlens_k: int32 `[N + 1]`, offsets of packed sequences; or what `pack_sequences` gave, alone.
        scale: of the logits; `Dk ** -0.5` unless given.
        backend: `"auto"` takes `"triton"` on a GPU where its kernels support the arguments, else `"eager"`.

    Returns:
        `[B, Tq, Hq, Dv]`, or that and the indices `[B, Tq, Hk, N]`.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: a shape, size, device, value or derivative that is not supported, by `backend="triton"` for one.
    """
    check_config(config)
    tokens = check_branches(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, config)
    varlen = attention_tables(q, tokens, config, cu_seqlens_q, cu_seqlens_k)
    factor = check_scale(scale, q)
    implementation = load_backend(backend, config, q, v_slc)
    if indices is not None:
        check_indices(indices, q, k_slc)
        if implementation is eager:
            check_no_block_twice(indices, config.num_selectable(tokens))
    check_derivatives(q=q, k_cmp=k_cmp, v_cmp=v_cmp, k_slc=k_slc, v_slc=v_slc, k_win=k_win, v_win=v_win, gates=gates)

    tensors = (q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates)
    out, indices = implementation.nsa_attention(*tensors, indices, config, varlen, factor)
    return (out, indices) if return_indices else out


def load_backend(backend: str, config: NSAConfig, *tensors: Tensor) -> Backend:
    """The backend of that name for `tensors` of heads `[B, T, H, D]`; `"auto"` is Triton on a GPU where it can.

    Raises:
        ValueError: no backend has that name, or it does not support the tensors.
    """
    check_backend(backend)
    if backend == "eager" or (backend == "auto" and tensors[0].device.type != "cuda"):
        return eager
    from nsa import kernels

    reason = kernels.why_not(config, *tensors)
    if reason is None:
        return kernels
    if backend == "triton":
        raise ValueError(f'backend must be "auto" or "eager" where Triton lacks support, got "triton" and {reason}')
    return eager
