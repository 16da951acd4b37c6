"""The transformer: TorchTitan's llama3 with Native Sparse Attention in the layers that ask for it.

Everything but attention and the drawing of initial weights is llama3's own, so that TorchTitan's plans for FSDP,
activation checkpointing and `torch.compile` apply as they are, and a dense twin differs in nothing else.
"""

import nsa.titan.release  # noqa: F401  (says which extra is missing)

# isort: split
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
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
from nsa.functional import pack_sequences
from nsa.module import PAPER, NativeSparseAttention
from nsa.titan.context import ContextParallel, attend_over
from nsa.titan.data import ByteTokenizer, padded_vocab_size
from nsa.titan.dense import DenseAttention, DocumentAttention, Documents
from nsa.titan.flavors import check_heads, layer_kinds, num_params_and_flops
from nsa.titan.initial import complete_gradient, gate_logits, init_parameters
from nsa.titan.refusals import JobError, require

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
        layer_kinds(self.attention, self.n_layers)
        check_backend(self.backend)
        self.gate_logits = gate_logits(self.initial_gates)
        if self.attn_mask_type not in MASK_KINDS:
            raise ValueError(f"attn_mask_type must be one of {MASK_KINDS}, got {self.attn_mask_type!r}")
        check_heads(self.dim, self.n_heads, self.kv_heads)
        # The trainer asks for document masks only where the attention type is one that takes them.
        self.attn_type = "varlen" if self.attn_mask_type == "block_causal" else "sdpa"

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def layer_kinds(self) -> list[str]:
        """The kind of attention of every layer."""
        return layer_kinds(self.attention, self.n_layers)

    def update_from_config(self, job_config: JobConfig, **kwargs: Any) -> None:
        """Takes over what the job says; NSA's own options where the job has an `[nsa]` section."""
        super().update_from_config(job_config, **kwargs)
        if job_config.validation.enable:
            self.max_seq_len: int = max(job_config.training.seq_len, job_config.validation.seq_len)
        if not self.vocab_size:
            self.vocab_size = padded_vocab_size(build_tokenizer(job_config))
        self.seed = job_config.debug.seed or 0
        options = {k: v for k, v in vars(getattr(job_config, "nsa", object)).items() if v is not None}
        sizes = {field.name for field in fields(NSAConfig)}
        self.nsa = replace(self.nsa, **{k: v for k, v in options.items() if k in sizes})
        for name in ("attention", "attn_mask_type", "backend", "initial_gates"):
            setattr(self, name, options.get(name, getattr(self, name)))
        self.__post_init__()

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        return num_params_and_flops(model, seq_len, self.dim, self.layer_kinds, self.nsa)


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
            return self.wo(attend_over(self, self.context, x, rope, positions[0]))
        if attention_masks is None:
            out, used = self.attend(x, rope, indices=indices)
        else:
            packed = indices if indices is None else indices.flatten(0, 1).unsqueeze(0)
            out, used = self.attend(x.flatten(0, 1).unsqueeze(0), rope, attention_masks.packed, packed)
            # Tensor parallelism splits the tokens of the batch as it was, so that is how `wo` must see them.
            out, used = (y.view(*x.shape[:2], *y.shape[2:]) for y in (out, used))
        return (self.wo(out), used) if return_indices else self.wo(out)

    def project(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
        layers = (self.wq, self.wk, self.wv, self.wg)
        if not isinstance(x, DTensor) or any(type(layer) is not nn.Linear for layer in layers):
            return super().project(x)
        # Tensor parallelism gives the same tokens to every process and each layer's rows of some heads. Products of
        # plain tensors are the same, and take the host a fraction of the time.
        tokens = x.to_local(grad_placements=[Partial()] * x.device_mesh.ndim)
        rows: Any = [layer.parameters() for layer in layers]
        return self.by_head(*(F.linear(tokens, *(p.to_local() for p in of_layer)) for of_layer in rows))


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
        """Makes the rotary table and draws every parameter, see `nsa.titan.initial`."""
        with torch.device(buffer_device or self.freqs_cis.device):
            self.freqs_cis = self._precompute_freqs_cis()
        init_parameters(self, self.model_args.dim, self.model_args.gate_logits, self.model_args.seed)
        for parameter in self.parameters():
            if isinstance(parameter, DTensor):
                parameter.register_post_accumulate_grad_hook(complete_gradient)

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

    def get_attention_masks(
        self, input_batch: Tensor, tokenizer: BaseTokenizer, extra_inputs: dict[str, Tensor] | None = None
    ) -> Any:
        """Offsets of the documents in `input_batch [B, T]`, each of which ends with the tokenizer's end-of-text.

        Raises:
            TypeError: the model's mask is plainly causal; TorchTitan's validator takes this for "no masks".
        """
        return super().get_attention_masks(input_batch, tokenizer, extra_inputs)
