"""The transformer: TorchTitan's llama3 with Native Sparse Attention in the layers that ask for it.

Everything but attention and the drawing of initial weights is llama3's own, so that TorchTitan's plans for FSDP,
activation checkpointing and `torch.compile` apply as they are, and a dense twin differs in nothing else.
"""

import math
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torchtitan.components.tokenizer import BaseTokenizer, build_hf_tokenizer
from torchtitan.config import JobConfig
from torchtitan.models.attention import VarlenMetadata
from torchtitan.models.llama3 import Transformer as LlamaTransformer
from torchtitan.models.llama3 import TransformerModelArgs
from torchtitan.models.llama3.model.model import TransformerBlock as LlamaBlock

from nsa.backends import BackendName
from nsa.cache import DenseCache, KVCache
from nsa.checks import check_backend
from nsa.config import NSAConfig, integer
from nsa.functional import apply_rope, pack_sequences
from nsa.module import INIT_STD, PAPER, Compressor, NativeSparseAttention
from nsa.titan.context import ContextParallel, nsa_attention_over
from nsa.titan.data import ByteTokenizer
from nsa.titan.dense import DenseAttention, DocumentAttention, Documents
from nsa.titan.refusals import JobError, require

ATTENTION_KINDS = ("dense", "nsa")
MASK_KINDS = ("causal", "block_causal")


def build_tokenizer(job_config: JobConfig) -> BaseTokenizer | ByteTokenizer:
    """The Hugging Face tokenizer in `model.hf_assets_path`, or bytes where that is nothing, as it is by default.

    Raises:
        JobError: there is no such folder, or no tokenizer in it.
    """
    folder = job_config.model.hf_assets_path
    if folder == os.devnull:
        return ByteTokenizer()
    must = f"be a folder with the files of a tokenizer, or {os.devnull} for bytes as tokens"
    require(os.path.isdir(folder), "model.hf_assets_path", must, folder)
    try:
        return build_hf_tokenizer(job_config)
    except Exception as error:  # the library that reads the files has no class of its own for what is wrong with them
        raise JobError(f"model.hf_assets_path must {must}, got {folder!r}: {error}") from error


@dataclass
class ModelArgs(TransformerModelArgs):
    """llama3's arguments and what NSA adds; each field of the last five can be set from the job's `[nsa]` section.

    Attributes:
        attention: kind of each layer, `"nsa"`, `"dense"` or a pattern of them repeated over the depth, such as
            `"dense,nsa"` or `["dense", "nsa"]`.
        attn_mask_type: `"causal"`, or `"block_causal"`: documents that end-of-text tokens separate do not see one
            another.
        backend: implementation of the NSA layers, `"auto"`, `"eager"` or `"triton"`.
        nsa: block sizes and counts of the NSA layers.
        initial_gates: what the gates of the compressed, the selected and the window branch begin with, three numbers
            from 0 to 1 with commas between.
        vocab_size: 0 takes the tokenizer's, rounded up so that matrix products stay aligned.
        seed: of the initial weights.

    Raises:
        ValueError: an unknown kind of attention, mask or backend; heads that do not divide one another or `dim`;
            gates that are not three numbers from 0 to 1.
    """

    vocab_size: int = 0
    seed: int = 0
    attention: str = "nsa"
    backend: BackendName = "auto"
    nsa: NSAConfig = PAPER
    initial_gates: str = "0.5,0.5,0.5"

    def __post_init__(self) -> None:
        if not isinstance(self.attention, str):
            self.attention = ",".join(map(str, self.attention))
        unknown = set(self.attention.split(",")) - set(ATTENTION_KINDS)
        if unknown:
            raise ValueError(f"attention must be a pattern of {ATTENTION_KINDS}, got {self.attention!r}")
        check_backend(self.backend)
        self.gate_logits = _logits(self.initial_gates)
        if self.attn_mask_type not in MASK_KINDS:
            raise ValueError(f"attn_mask_type must be one of {MASK_KINDS}, got {self.attn_mask_type!r}")
        if self.dim % self.n_heads:
            raise ValueError(f"dim must be a multiple of n_heads ({self.n_heads}), got {self.dim}")
        if self.n_heads % self.kv_heads:
            raise ValueError(f"n_heads must be a multiple of n_kv_heads ({self.kv_heads}), got {self.n_heads}")
        # The trainer asks for document masks only where the attention type is one that takes them.
        self.attn_type = "varlen" if self.attn_mask_type == "block_causal" else "sdpa"

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def layer_kinds(self) -> list[str]:
        """The kind of attention of every layer."""
        return list(islice(cycle(self.attention.split(",")), self.n_layers))

    def update_from_config(self, job_config: JobConfig, **kwargs: Any) -> None:
        """Takes over what the job says; NSA's own options where the job has an `[nsa]` section."""
        super().update_from_config(job_config, **kwargs)
        if job_config.validation.enable:
            self.max_seq_len: int = max(job_config.training.seq_len, job_config.validation.seq_len)
        if not self.vocab_size:
            self.vocab_size = -(-build_tokenizer(job_config).get_vocab_size() // 64) * 64
        self.seed = job_config.debug.seed or 0
        options = {k: v for k, v in vars(getattr(job_config, "nsa", object)).items() if v is not None}
        sizes = {field.name for field in fields(NSAConfig)}
        self.nsa = replace(self.nsa, **{k: v for k, v in options.items() if k in sizes})
        for name in ("attention", "attn_mask_type", "backend", "initial_gates"):
            setattr(self, name, options.get(name, getattr(self, name)))
        self.__post_init__()

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        """Parameters, and FLOPs a token of a training step, counting the keys that each kind of attention looks at.

        Weights of compressors are gone through once a block, every `d` tokens. As is the custom for dense attention,
        causal masking is not discounted.
        """
        num_params = sum(p.numel() for p in model.parameters())
        apart = sum(p.numel() for m in model.children() if isinstance(m, nn.Embedding) for p in m.parameters())
        once_a_block = 0
        for compressor in (module for module in model.modules() if isinstance(module, Compressor)):
            for name, parameter in compressor.named_parameters():
                apart += parameter.numel()
                once_a_block += parameter.numel() if name != "position" else 0  # those are only added
        config = self.nsa
        selected = min(config.num_selected_blocks * config.select_block_size, seq_len)
        sparse = config.num_compressed(seq_len) + selected + min(config.window_size, seq_len)
        keys = sum(seq_len if kind == "dense" else sparse for kind in self.layer_kinds)
        products = num_params - apart + once_a_block // config.compress_stride
        return num_params, 6 * products + 12 * self.dim * keys


def _logits(gates: str) -> tuple[float, ...]:
    """Logits of gates; those of 0 and 1 are finite, and round to them.

    Raises:
        ValueError: they are not three such numbers.
    """
    try:
        values = [float(x) for x in gates.split(",")]
    except ValueError:
        values = []
    if len(values) != 3 or not all(0 <= x <= 1 for x in values):
        raise ValueError(f"initial_gates must be three numbers from 0 to 1 with commas between, got {gates!r}")
    return tuple(max(-30.0, min(30.0, math.log(x) - math.log1p(-x))) if 0 < x < 1 else 60.0 * x - 30 for x in values)


class NSAAttention(NativeSparseAttention):
    """`NativeSparseAttention` behind the signature of llama3's attention.

    Attributes:
        context: how sequences are shared out, under context parallelism.
        inner_attention: what TorchTitan's context parallelism would take hold of; nothing calls it.
    """

    context: ContextParallel | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.inner_attention = nn.Identity()

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        freqs_cis: Tensor,
        attention_masks: Documents | None,
        positions: Tensor | None = None,
        indices: Tensor | None = None,
        return_indices: bool = False,
        cache: KVCache | None = None,
    ) -> Any:
        """Attention of `x [B, T, dim]`; under document masks the batch is packed into one row.

        `positions [B, T]`, the same in every row, come with context parallelism and with it alone. `indices
        [B, T, Hk, N]` replace the selection, and `return_indices` returns those used beside the output. With a cache
        rows continue its sequences, as in `NativeSparseAttention`.

        Raises:
            ValueError: `indices` or `return_indices` under context parallelism.
        """
        rope = torch.view_as_real(freqs_cis)
        if cache is not None:
            return super().forward(x, rope, indices=indices, return_indices=return_indices, cache=cache)
        if self.context is not None:
            if indices is not None or return_indices:
                raise ValueError("indices must be None under context parallelism, and return_indices false")
            assert positions is not None  # TorchTitan gives them to whom it gives a part of a sequence
            return self.wo(self._attend_over(self.context, x, rope, positions[0]))
        if attention_masks is None:
            out, used = self.attend(x, rope, indices=indices)
        else:
            packed = indices if indices is None else indices.flatten(0, 1).unsqueeze(0)
            out, used = self.attend(x.flatten(0, 1).unsqueeze(0), rope, attention_masks.packed, packed)
            # Tensor parallelism splits the tokens of the batch as it was, so that is how `wo` must see them.
            out, used = (y.view(*x.shape[:2], *y.shape[2:]) for y in (out, used))
        return (self.wo(out), used) if return_indices else self.wo(out)

    def _attend_over(self, context: ContextParallel, x: Tensor, rope: Tensor, positions: Tensor) -> Tensor:
        """`attend` of the tokens `x [B, t, dim]` at `positions [t]` over the whole sequences they are part of."""
        q, (k_cmp, k_slc, k_win), (v_cmp, v_slc, v_win), gates = self.project(x)
        k_cmp, v_cmp = context.compress(self._compress, k_cmp, v_cmp, self.config)
        kind: dict[str, Any] = {"interleaved": self.rope_interleaved, "backend": self.backend}
        tensors = (q, k_cmp, k_slc, k_win)
        q, k_cmp, k_slc, k_win = apply_rope(*tensors, rope, self.config, positions=positions, **kind)
        inputs = (q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates)
        return nsa_attention_over(context, *inputs, self.config, backend=self.backend).flatten(2)


class Block(LlamaBlock):
    """llama3's block with the attention its layer asks for."""

    def __init__(self, layer_id: int, model_args: ModelArgs):
        super().__init__(layer_id, model_args)
        if model_args.layer_kinds[layer_id] == "nsa":
            self.attention = NSAAttention(
                model_args.dim,
                model_args.n_heads,
                model_args.kv_heads,
                config=model_args.nsa,
                backend=model_args.backend,
            )
        else:
            self.attention = DenseAttention(model_args)
            if model_args.attn_type == "varlen":
                self.attention.inner_attention = DocumentAttention()

    def forward(
        self,
        x: Tensor,
        freqs_cis: Tensor,
        attention_masks: Any,
        positions: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """llama3's; `options` are those of the layer's attention: `indices`, `return_indices`, `cache`."""
        if not options:
            return super().forward(x, freqs_cis, attention_masks, positions)
        h = self.attention(self.attention_norm(x), freqs_cis, attention_masks, positions, **options)
        h, *used = h if isinstance(h, tuple) else (h,)
        h = x + h
        out = h + self.feed_forward(self.ffn_norm(h))
        return (out, *used) if used else out

    def initial_std(self, name: str) -> float:
        """Standard deviation this parameter starts with: smaller, by depth, where the residual is written."""
        if name in ("attention.wo.weight", "feed_forward.w2.weight", "feed_forward.w3.weight"):
            return float(self.weight_init_std)
        if isinstance(self.attention, NSAAttention) and name.startswith("attention."):
            return self.attention.initial_std()[name.removeprefix("attention.")]
        return INIT_STD


def complete_gradient(parameter: Tensor) -> None:
    """Sums a gradient that tensor parallelism left in parts: torch 2.11 clips by the norm of a part."""
    if isinstance(parameter, DTensor) and isinstance(parameter.grad, DTensor):
        parameter.grad = parameter.grad.redistribute(placements=parameter.placements)


DRAWN = 1 << 18
"""Numbers from one generator: a process draws what it has of a parameter, in whole pieces of so many."""


def _draw(local: Tensor, offset: Sequence[int], shape: Sequence[int], std: float, name: str, seed: int) -> None:
    """Fills `local`, which lies at `offset` in a parameter of `shape`, with numbers that belong to the parameter.

    They are drawn on the CPU: generators of other devices give other numbers.
    """
    if not local.numel():
        return
    rows = max(1, DRAWN // math.prod(shape[1:]))
    begin, end = offset[0], offset[0] + len(local)
    columns = tuple(slice(first, first + size) for first, size in zip(offset[1:], local.shape[1:], strict=True))
    for piece in range(begin // rows, -(-end // rows)):
        first = piece * rows
        drawn = torch.empty(min(rows, shape[0] - first), *shape[1:], device="cpu")
        code = zlib.crc32((f"{name} {piece}" if piece else name).encode()) ^ seed
        generator = torch.Generator("cpu").manual_seed(code)
        nn.init.trunc_normal_(drawn, std=std, a=-3 * std, b=3 * std, generator=generator)
        start, stop = max(begin, first), min(end, first + rows)
        local[start - begin : stop - begin].copy_(drawn[(slice(start - first, stop - first), *columns)])


class Transformer(LlamaTransformer):
    """llama3 whose layers are dense or NSA as `ModelArgs.attention` says."""

    freqs_cis: Tensor
    model_args: ModelArgs

    def __init__(self, model_args: ModelArgs):
        super().__init__(model_args)
        for layer_id in range(model_args.n_layers):
            self.layers[str(layer_id)] = Block(layer_id, model_args)

    @torch.no_grad()
    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Draws every parameter from generators of its own, seeded by its name.

        A parameter's values then depend on the seed and its name alone: not on how it is sharded, on which pipeline
        stage or device it lies, or in which order layers are made. Distributions are llama3's, cut at three standard
        deviations.
        """
        with torch.device(buffer_device or self.freqs_cis.device):
            self.freqs_cis = self._precompute_freqs_cis()
        for wrapped_name, parameter in self.named_parameters():
            name = re.sub(r"_orig_mod\.|_checkpoint_wrapped_module\.", "", wrapped_name)
            local, offset = parameter.data, (0,) * parameter.dim()
            if isinstance(parameter, DTensor):
                _, offset = compute_local_shape_and_global_offset(
                    parameter.shape, parameter.device_mesh, parameter.placements
                )
                local = parameter.to_local()
                parameter.register_post_accumulate_grad_hook(complete_gradient)
            if re.search(r"norm\.weight$", name):
                local.fill_(1)
            elif name.endswith("attention.wg.bias"):
                rows = torch.arange(offset[0], offset[0] + len(local), device=local.device)
                local.copy_(torch.tensor(self.model_args.gate_logits, device=local.device)[rows % 3])
            elif std := self._initial_std(name):
                _draw(local, offset, parameter.shape, std, name, self.model_args.seed)
            else:
                local.zero_()

    def forward(
        self,
        tokens: Tensor,
        attention_masks: Any = None,
        positions: Tensor | None = None,
        *,
        indices: Mapping[str, Tensor] | None = None,
        return_indices: bool = False,
        cache: Mapping[str, Any] | None = None,
        at: Tensor | None = None,
    ) -> Any:
        """Logits `[B, T, vocabulary]` of `tokens [B, T]`; stages of a pipeline take or give hidden states.

        Args:
            attention_masks: what `get_attention_masks` gives. Tables of the documents are made of them here, once for
                all layers.
            positions: `[B, T]`, under context parallelism alone.
            indices: int32 `[B, T, Hk, N]` by the name of an NSA layer in `layers`, replace its selection: blocks that
                an earlier call recorded, for one.
            return_indices: also return the indices that each NSA layer used.
            cache: from `make_cache`; tokens continue its sequences, and of what is above nothing may be given.
            at: int64 `[B]`, beside a cache: gives logits `[B, vocabulary]` of one of the tokens of each row.

        Raises:
            ValueError: `indices` of a layer that is not there or is dense; either argument under context parallelism;
                masks, positions or indices beside a cache, or a cache without room, which then stays as it was; `at`
                without a cache.
        """
        if cache is not None:
            return self._continue(tokens, cache, at, (attention_masks, positions, indices, return_indices or None))
        if at is not None:
            raise ValueError("at must be None without a cache, got a tensor")
        if isinstance(attention_masks, VarlenMetadata):
            packed = pack_sequences(
                attention_masks.cu_seq_q, self.model_args.nsa, num_tokens=tokens.shape[0] * tokens.shape[1]
            )
            attention_masks = Documents(attention_masks, packed)
        if indices is None and not return_indices:
            return super().forward(tokens, attention_masks, positions)
        given = indices or {}
        sparse = [name for name, kind in self._kinds().items() if kind == "nsa"]
        if unknown := sorted(set(given) - set(sparse)):
            raise ValueError(f"indices must be of NSA layers, {sorted(sparse)}, got {unknown}")
        options = {name: {"indices": given.get(name), "return_indices": True} for name in sparse}
        out, used = self._through_layers(tokens, attention_masks, positions, options)
        return (out, used) if return_indices else out

    def _through_layers(
        self,
        tokens: Tensor,
        attention_masks: Any,
        positions: Tensor | None,
        options: Mapping[str, Mapping[str, Any]],
        at: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`forward` with options for the attention of layers by name; also the indices of those that return them."""
        used = {}
        h = self.tok_embeddings(tokens) if self.tok_embeddings is not None else tokens
        for name, layer in self.layers.items():
            h = layer(h, self.freqs_cis, attention_masks, positions, **options.get(name, {}))
            if isinstance(h, tuple):
                h, used[name] = h
        if at is not None:
            h = h[torch.arange(len(h), device=h.device), at]
        h = self.norm(h) if self.norm is not None else h
        return self.output(h) if self.output is not None else h, used

    def make_cache(self, batch: int, capacity: int, *, spare: int = 0) -> dict[str, Any]:
        """A cache for every layer, by its name in `layers`; arguments as `KVCache` takes them.

        Raises:
            TypeError: a size that is not an integer.
            ValueError: a capacity beyond the positions of the model, or a size out of range.
        """
        if integer("capacity", capacity, 1) > len(self.freqs_cis):
            raise ValueError(f"capacity must be at most the model's positions ({len(self.freqs_cis)}), got {capacity}")
        return {name: layer.attention.make_cache(batch, capacity, spare=spare) for name, layer in self.layers.items()}

    @torch.no_grad()
    def _continue(self, tokens: Tensor, cache: Mapping[str, Any], at: Tensor | None, others: Sequence[Any]) -> Tensor:
        """`forward` of tokens that continue the sequences of a cache."""
        if any(x is not None for x in others):
            raise ValueError("nothing but tokens can be given beside a cache, got masks, positions or indices")
        self._check_cache(tokens, cache)
        options = {name: {"cache": one} for name, one in cache.items()}
        return self._through_layers(tokens, None, None, options, at)[0]

    def _check_cache(self, tokens: Tensor, cache: Mapping[str, Any]) -> None:
        """Refuses a cache that not every layer can go on from, before any of them does."""
        if tokens.dim() != 2:
            raise ValueError(f"tokens must have 2 dimensions [B, T], got shape {tuple(tokens.shape)}")
        if set(cache) != set(self.layers):
            raise ValueError(f"cache must be of the layers {sorted(self.layers)}, got {sorted(cache)}")
        for name, kind in self._kinds().items():
            one = cache[name]
            expected = KVCache if kind == "nsa" else DenseCache
            if not isinstance(one, expected):
                raise TypeError(f"cache of layer {name} must be a {expected.__name__}, got {type(one).__name__}")
            if isinstance(one, KVCache) and one.config != self.model_args.nsa:
                raise ValueError(f"cache of layer {name} must be for {self.model_args.nsa}, got {one.config}")
            one.check_room(tokens.shape[0], tokens.shape[1], len(self.freqs_cis))

    def _kinds(self) -> dict[str, str]:
        """The kind of attention of each layer here; a stage of a pipeline has some of them."""
        return {name: self.model_args.layer_kinds[int(name)] for name in self.layers}

    def _initial_std(self, name: str) -> float:
        if name == "tok_embeddings.weight":
            return 1.0
        if name == "output.weight":
            return float(self.model_args.dim**-0.5)
        _, layer_id, name = name.split(".", 2)
        return self.layers[layer_id].initial_std(name)

    def get_attention_masks(
        self, input_batch: Tensor, tokenizer: BaseTokenizer, extra_inputs: dict[str, Tensor] | None = None
    ) -> Any:
        """Offsets of the documents in `input_batch [B, T]`, each of which ends with the tokenizer's end-of-text.

        Raises:
            TypeError: the model's mask is plainly causal; TorchTitan's validator takes this for "no masks".
        """
        return super().get_attention_masks(input_batch, tokenizer, extra_inputs)
