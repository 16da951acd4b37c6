"""Native Sparse Attention as a layer: projections, compression, rotary embedding, gates (paper, 3.2 and 3.3)."""

import math
from collections.abc import Callable
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from nsa.backends import BackendName
from nsa.blocks import BlockFunction, CompressionParams
from nsa.cache import KVCache
from nsa.checks import check_backend, check_config, check_rope, check_rope_length, check_tensor, pack_tokens
from nsa.config import NSAConfig, integer
from nsa.decode import cached_attention, decode_attention
from nsa.functional import (
    apply_rope,
    compress,
    compress_keys_and_values,
    load_backend,
    nsa_attention,
)
from nsa.joined import Joined
from nsa.stores import computed_dtype
from nsa.varlen import PackedSequences

PAPER = NSAConfig()
"""The block sizes and counts of the paper's experiments (section 4.1)."""

INIT_STD = 0.02
"""Standard deviation of freshly made projections, as is usual for transformers."""


class RopeScaling(NamedTuple):
    """Scaling of rotary frequencies for contexts longer than those of pre-training, as llama 3.1 does it.

    Wavelengths above `original_length / low_freq_factor` become `factor` times as long, those below
    `original_length / high_freq_factor` stay, and frequencies between are interpolated.

    Attributes:
        factor: at least 1.
        low_freq_factor, high_freq_factor: the second is above the first.
        original_length: tokens of the contexts of pre-training.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192


def rope_table(
    length: int,
    head_dim: int,
    theta: float = 10000.0,
    *,
    scaling: RopeScaling | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Cosines and sines of rotary position embedding (RoFormer, arXiv 2104.09864), for interleaved pairs.

    Args:
        length: number of positions.
        head_dim: `D`, even.
        theta: base of the frequencies.
        scaling: of the frequencies; none unless given.
        device: of the table; PyTorch's default unless given.

    Returns:
        float32 `[length, head_dim / 2, 2]`.

    Raises:
        TypeError: a length or head dim that is not an integer.
        ValueError: a negative length, a `head_dim` that is odd or below 1, a `theta` that is not positive and finite, a
            `scaling` out of range.
    """
    if isinstance(length, bool) or not isinstance(length, int | torch.SymInt):
        raise TypeError(f"length must be an int, got {length!r} ({type(length).__name__})")
    if length < 0:
        raise ValueError(f"length must be at least 0, got {length}")
    if not 0 < theta < math.inf:
        raise ValueError(f"theta must be positive and finite, got {theta!r}")
    if integer("head_dim", head_dim, 1) % 2:
        raise ValueError(f"head_dim must be even to be rotated in pairs, got {head_dim}")
    frequency = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim)
    if scaling is not None:
        frequency = _scaled(frequency, scaling)
    angle = torch.outer(torch.arange(length, dtype=torch.float64, device=device), frequency)
    return torch.stack((angle.cos(), angle.sin()), -1).float()


def _scaled(frequency: Tensor, scaling: RopeScaling) -> Tensor:
    factor, low, high, original = scaling
    if not (factor >= 1 and 0 < low < high and original > 0):
        raise ValueError(
            "scaling must have a factor of at least 1, factors of frequencies that rise from above 0, and a length "
            f"above 0, got {scaling}"
        )
    periods = original * frequency / (2 * math.pi)
    kept = ((periods - low) / (high - low)).clamp(0, 1)
    return frequency * (kept + (1 - kept) / factor)


def _split(x: Tensor, *sizes: int) -> Tensor:
    """The last dimension as `[..., whatever is left, *sizes]`; unlike `unflatten`, compiles under a device context."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // math.prod(sizes), *sizes)


class Compressor(nn.Module):
    """The learned map from a block of keys, or of values, to one vector (section 3.3.1), by KV head.

    Shapes: `[B, T, Hk, D] -> [B, C, Hk, D]`. The hidden width of the `"mlp"` kind is `D`. The parameters of
    `CompressionParams` are kept as matrices, those of one head below those of another: FSDP2 shares out rows, and gives
    each of more processes than there are rows a row of padding.

    Attributes:
        local: gives the part of a parameter that belongs to the heads at hand; tensor parallelism, which shares both
            out, sets it.
    """

    local: Callable[[Any], Tensor] = staticmethod(lambda parameter: parameter)

    def __init__(self, num_kv_heads: int, head_dim: int, config: NSAConfig):
        super().__init__()
        self.config = config
        length = config.compress_block_size
        self._rows_of_head: dict[str, int] = {}
        if config.compression != "mean":
            self._rows_of_head |= {"position": length, "weight": length * head_dim}
        if config.compression == "mlp":
            self._rows_of_head["weight_out"] = head_dim
        for name, number in self._rows_of_head.items():
            self.register_parameter(name, nn.Parameter(torch.empty(num_kv_heads * number, head_dim)))

    def initial_std(self) -> dict[str, float]:
        """Standard deviation each parameter starts with; the layers keep the variance of what they are given."""
        return {name: INIT_STD if name == "position" else rows**-0.5 for name, rows in self._rows_of_head.items()}

    def params(self) -> CompressionParams | None:
        """The parameters by head."""
        parameters = {
            name: self.local(parameter).view(-1, self._rows_of_head[name], parameter.shape[1])
            for name, parameter in self.named_parameters()
        }
        return CompressionParams(**parameters) if parameters else None

    def forward(
        self, x: Tensor, cu_seqlens: Tensor | PackedSequences | None = None, backend: BackendName = "auto"
    ) -> Tensor:
        return compress(x, self.params(), self.config, cu_seqlens=cu_seqlens, backend=backend)


_Params = CompressionParams | BlockFunction | None


def _params(compressor: Compressor | BlockFunction) -> _Params:
    """Gives what `compress` takes of a compressor or a function."""
    return compressor.params() if isinstance(compressor, Compressor) else compressor


class NativeSparseAttention(nn.Module):
    """Causal self-attention with three gated branches over their own keys and values (section 3.3.3).

    Parameters are head-major, so that a slice of the output features of every projection is a set of whole heads:
    `wk` and `wv` give `[B, T, Hk, branches, D]`, the gate `wg` gives `[B, T, Hq, 3]`, or `[B, T, 1, 3]` for all heads.

    Args:
        dim: width of the model.
        num_heads: query heads `Hq`.
        num_kv_heads: key/value heads `Hk`, which divides `Hq`; `num_heads` unless given.
        head_dim: `D`; `dim / num_heads` unless given. Rotary embedding needs an even one.
        config: block sizes, counts and the kind of compression.
        backend: `"auto"`, `"eager"` or `"triton"`.
        bias: whether the projections of queries, keys and values add one.
        gate_activation: `"sigmoid"`, or `"softmax"` over the branches.
        gate_per_head: whether each query head has gates of its own.
        gate_hidden: hidden width of the gate's MLP (section 3.2; SiLU); 0 makes it a linear map.
        rope_interleaved: whether RoPE turns neighbouring dimensions, or else those of the two halves of a head.
        phi: functions of blocks `[B, C, Hk, l, D] -> [B, C, Hk, D]` for keys and for values (equation 7), in place of
            what `config.compression` says. The parameters of modules among them are the layer's; they start as they
            are.

    Raises:
        TypeError: a size or number of heads that is not an integer, a `config` or `phi` of another type.
        ValueError: a size or number of heads below 1, heads that do not divide one another, a `dim` that `num_heads`
            does not divide, an unknown backend or activation.
    """

    _joined: Joined | None = None

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        config: NSAConfig = PAPER,
        *,
        backend: BackendName = "auto",
        bias: bool = False,
        gate_activation: Literal["sigmoid", "softmax"] = "sigmoid",
        gate_per_head: bool = True,
        gate_hidden: int = 0,
        rope_interleaved: bool = True,
        phi: tuple[BlockFunction, BlockFunction] | None = None,
    ):
        super().__init__()
        dim, num_heads = integer("dim", dim, 1), integer("num_heads", num_heads, 1)
        num_kv_heads = num_heads if num_kv_heads is None else integer("num_kv_heads", num_kv_heads, 1)
        check_config(config)
        check_backend(backend)
        if num_heads % num_kv_heads:
            raise ValueError(f"num_heads must be a multiple of num_kv_heads ({num_kv_heads}), got {num_heads}")
        if head_dim is None:
            if dim % num_heads:
                raise ValueError(f"dim must be a multiple of num_heads ({num_heads}) without a head_dim, got {dim}")
            head_dim = dim // num_heads
        self.config, self.backend = config, backend
        self.dim, self.head_dim = dim, integer("head_dim", head_dim, 1)
        self.branches = 1 if config.shared_kv else 3

        self.wq = nn.Linear(dim, num_heads * head_dim, bias=bias)
        self.wk = nn.Linear(dim, num_kv_heads * self.branches * head_dim, bias=bias)
        self.wv = nn.Linear(dim, num_kv_heads * self.branches * head_dim, bias=bias)
        self.wo = nn.Linear(num_heads * head_dim, dim, bias=False)
        if gate_activation not in ("sigmoid", "softmax"):
            raise ValueError(f"gate_activation must be 'sigmoid' or 'softmax', got {gate_activation!r}")
        self.gate_activation, self.rope_interleaved = gate_activation, rope_interleaved
        gates, hidden = 3 * (num_heads if gate_per_head else 1), integer("gate_hidden", gate_hidden, 0)
        layers = [nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, gates)] if hidden else []
        self.wg = nn.Sequential(*layers) if layers else nn.Linear(dim, gates)
        if phi is not None and (len(phi) != 2 or not all(map(callable, phi))):
            raise TypeError(f"phi must be two functions, for keys and for values, got {phi!r}")
        if phi is None:
            phi = Compressor(num_kv_heads, head_dim, config), Compressor(num_kv_heads, head_dim, config)
        self.compress_k, self.compress_v = phi
        self.reset_parameters()

    def initial_std(self) -> dict[str, float]:
        """Standard deviation that parameters start with, by name; biases of 0 start all gates alike."""
        own = [name for name, _ in self.named_parameters() if not name.startswith("compress_")]
        std = {name: 0.0 if name.endswith("bias") else INIT_STD for name in own}
        for name in ("compress_k", "compress_v"):
            compressor = getattr(self, name)
            if isinstance(compressor, Compressor):
                std |= {f"{name}.{key}": value for key, value in compressor.initial_std().items()}
        return std

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws every parameter, but for those of `phi`, anew from the global generator."""
        std = self.initial_std()
        for name, parameter in self.named_parameters():
            if name in std:
                parameter.normal_(std=std[name])

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        cu_seqlens: Tensor | PackedSequences | None = None,
        *,
        indices: Tensor | None = None,
        return_indices: bool = False,
        cache: KVCache | None = None,
    ) -> Any:
        """Attention of every token of `x` over those before it.

        Args:
            x: `[B, T, dim]`; batch 1 where sequences are packed.
            rope: `[L, D / 2, 2]` with `L >= T`, from `rope_table`; positions count from the start of each sequence.
                No rotation unless given.
            cu_seqlens: int32 `[N + 1]`, token offsets of packed sequences, or what `pack_sequences` makes of them,
                which several layers can share.
            indices: int32 `[B, T, Hk, N]`, replaces the selection: blocks recorded by an earlier call, for one.
            return_indices: also return the indices used.
            cache: from `make_cache`. Each row of `x`, or each packed sequence, continues the sequence of that row, and
                is taken in; positions count from its start, so that `L` must be at least its length then. There are no
                gradients.

        Returns:
            `[B, T, dim]`, or that and the indices `[B, T, Hk, N]`.

        Raises:
            ValueError, TypeError: as the functions of `nsa.functional` do; an `x` of another width, dtype or device
                than the layer's; a RoPE table too short for `T`, for another `D`, or for an odd one; a cache without
                room, for another batch, dtype or device, or beside `indices`: it stays as it was.
        """
        self._check_input(x)
        if cache is None:
            out, used = self.attend(x, rope, cu_seqlens, indices)
            out = self.wo(out)
        else:
            if indices is not None:
                raise ValueError("indices must be None beside a cache, got a tensor")
            with torch.no_grad():
                out, used = self._attend_cached(x, rope, cache, pack_tokens(x, cu_seqlens, self.config))
                out = self.wo(out)
        return (out, used) if return_indices else out

    def _check_input(self, x: Tensor) -> None:
        check_tensor("x", x, "[B, T, dim]")
        if x.shape[2] != self.dim:
            raise ValueError(f"x must have the width of the layer ({self.dim}), got shape {tuple(x.shape)}")
        weight = self.wq.weight
        if x.device != weight.device:
            raise ValueError(f"x must be on {weight.device}, like the layer's parameters, got {x.device}")
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"x must have the dtype of the layer's parameters ({weight.dtype}), got {x.dtype}")

    def project(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
        """Queries, keys and values of the three branches, and gates of `x`."""
        return self.by_head(self.wq(x), self.wk(x), self.wv(x), self.wg(x))

    def join_projections(self) -> None:
        """Lays the weights of `project` behind one another, so that over a cache one product is enough.

        They stay parameters as they were. Where one gets other memory later, there are four products again.
        """
        layers = self._projections()
        self._joined = Joined.of(layers) if all(type(layer) is nn.Linear for layer in layers) else None

    def _projections(self) -> list[Any]:
        return [self.wq, self.wk, self.wv, self.wg]

    def _project_at_once(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
        """`project` by one product, where weights lie as `join_projections` laid them."""
        if self._joined is None or not self._joined.holds(self._projections()):
            return self.project(x)
        return self.by_head(*self._joined(x))

    def by_head(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
        """The result of `project`, from the outputs of its four layers."""
        q, gates = _split(q, self.head_dim), _split(gates, 3)
        gates = gates.sigmoid() if self.gate_activation == "sigmoid" else gates.softmax(-1).to(gates.dtype)
        if gates.shape[2] != q.shape[2]:
            gates = gates.expand(-1, -1, q.shape[2], -1)
        return q, self._branches(k), self._branches(v), gates

    def attend(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        cu_seqlens: Tensor | PackedSequences | None = None,
        indices: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`forward` without its last projection: the outputs of all heads, `[B, T, Hq * D]`, and the indices used."""
        packed = pack_tokens(x, cu_seqlens, self.config)
        q, (k_cmp, k_slc, k_win), (v_cmp, v_slc, v_win), gates = self.project(x)
        if rope is not None:
            # The backward keeps what was compressed, and with a view all keys, whose rotated copies it keeps as well.
            k_cmp = k_cmp.contiguous()
        k_cmp, v_cmp = self.compress(k_cmp, v_cmp, packed)
        if rope is not None:
            if self.head_dim % 2:
                raise ValueError(f"rope must be None where head_dim is odd ({self.head_dim}), got a table")
            tensors = (q, k_cmp, k_slc, k_win)
            kind: dict[str, Any] = {"interleaved": self.rope_interleaved, "backend": self.backend}
            q, k_cmp, k_slc, k_win = apply_rope(*tensors, rope, self.config, cu_seqlens=packed, **kind)
        out, used = nsa_attention(
            q,
            k_cmp,
            v_cmp,
            k_slc,
            v_slc,
            k_win,
            v_win,
            gates,
            self.config,
            indices=indices,
            return_indices=True,
            cu_seqlens_q=packed,
            backend=self.backend,
        )
        return out.flatten(2), used

    def compress(self, k: Tensor, v: Tensor, packed: PackedSequences | None = None) -> tuple[Tensor, Tensor]:
        """Blocks `[B, C, Hk, D]` of keys and of values `[B, T, Hk, D]`, each as one vector."""
        params = self._compression()
        return compress_keys_and_values(k, v, *params, self.config, cu_seqlens=packed, backend=self.backend)

    def _compression(self) -> tuple[_Params, _Params]:
        """What `compress` takes for keys and for values."""
        return _params(self.compress_k), _params(self.compress_v)

    def make_cache(
        self,
        batch: int,
        capacity: int,
        *,
        spare: int = 0,
        dtype: torch.dtype | None = None,
    ) -> KVCache:
        """A cache for this layer, on its device; arguments as `KVCache` has them.

        `dtype` is that of what the layer computes unless given: autocast's where that is on, or else the parameters'.
        """
        weight = self.wk.weight
        heads = weight.shape[0] // self.branches // self.head_dim
        sizes = (self.config, batch, capacity, heads, self.head_dim)
        return KVCache(*sizes, spare=spare, dtype=dtype or computed_dtype(weight), device=weight.device)

    def _attend_cached(
        self, x: Tensor, rope: Tensor | None, cache: KVCache, packed: PackedSequences | None
    ) -> tuple[Tensor, Tensor]:
        """`attend` of tokens that continue the sequences of a cache."""
        if not isinstance(cache, KVCache):
            raise TypeError(f"cache must be a KVCache, from make_cache, got {type(cache).__name__}")
        if cache.config != self.config:
            raise ValueError(f"cache must be for the configuration of the layer, {self.config}, got {cache.config}")
        new = [x.shape[1]] * x.shape[0] if packed is None else packed.varlen.cu_seqlens_q.diff().tolist()
        cache.check_room(len(new), new)
        q, keys, values, gates = self._project_at_once(x)
        cache.check_like(keys[0])
        load_backend(self.backend, self.config, q, values[0])  # refuses what it does not support
        if rope is not None:
            check_rope(rope, q)
            check_rope_length(rope, max(map(sum, zip(cache.lengths, new, strict=True))))

        kind: dict[str, Any] = {"interleaved": self.rope_interleaved, "backend": self.backend}
        if packed is None and x.shape[1] == 1:
            query, stores = cache.step(q, keys, values, self._compression(), rope, **kind)
            out, used = decode_attention(query, stores, gates, self.config, backend=self.backend)
            return out.flatten(2), used

        def rotated(q: Tensor, k_cmp: Tensor, k_slc: Tensor, k_win: Tensor, first: int) -> tuple[Tensor, ...]:
            if rope is None:
                return q, k_cmp, k_slc, k_win
            token, block = (torch.arange(x.shape[1], device=x.device) for x in (q, k_cmp))
            kind["positions"], kind["block_positions"] = first + token, first + block * self.config.compress_stride
            return apply_rope(q, k_cmp, k_slc, k_win, rope, self.config, **kind)

        def compressed(k: Tensor, v: Tensor, block: int) -> tuple[Tensor, Tensor]:
            k_cmp, v_cmp = self.compress(k, v)
            no = k_cmp[:, :0]
            return rotated(no, k_cmp, no, no, block * self.config.compress_stride)[1], v_cmp

        every, parts = slice(None), []
        places: list[tuple[slice, tuple[slice, slice]]]
        if packed is None:
            places = [(rows, (rows, every)) for rows in cache.runs_of_equal_length()]
        else:
            ends = [*accumulate(new)]
            tokens = [slice(end - count, end) for count, end in zip(new, ends, strict=True)]
            places = [(slice(i, i + 1), (every, here)) for i, here in enumerate(tokens)]
        for rows, here in places:
            first = cache.lengths[rows.start]
            k_raw, k_slc, k_win = (k[here] for k in keys)
            query, _, k_slc, k_win = rotated(q[here], k_slc[:, :0], k_slc, k_win, first)
            cached = cache.append(rows, (k_raw, k_slc, k_win), [v[here] for v in values], compressed)
            parts.append(cached_attention(query, cached, gates[here], self.config, backend=self.backend))
        whole = [x[0] if len(x) == 1 else torch.cat(x, 0 if packed is None else 1) for x in zip(*parts, strict=True)]
        return whole[0].flatten(2), whole[1]

    def _branches(self, projected: Tensor) -> tuple[Tensor, ...]:
        """Keys or values of the three branches, `[B, T, Hk, D]` each, from one projection."""
        branches = _split(projected, self.branches, self.head_dim).unbind(3)
        return branches * (3 // self.branches)
