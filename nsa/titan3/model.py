"""The transformer: TorchTitan's llama3 with the attention that each layer asks for."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm, compute_ffn_hidden_dim
from torchtitan.models.common.config_utils import make_ffn_config
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.common.nn_modules import Identity
from torchtitan.models.common.param_init import skip_param_init
from torchtitan.models.llama3.model import Llama3TransformerBlock

from nsa.backends import BackendName
from nsa.checks import check_backend
from nsa.config import NSAConfig
from nsa.module import PAPER
from nsa.titan.data import ByteTokenizer, padded_vocab_size
from nsa.titan.flavors import check_heads, layer_kinds, num_params_and_flops
from nsa.titan.initial import gate_logits, init_parameters
from nsa.titan3.attention import DenseAttention, HeadCompressor, NSAAttention
from nsa.titan3.checks import check_job
from nsa.titan3.data import CorpusDataLoader
from nsa.titan3.sharding import set_sharding

# All parameters are drawn by `Transformer.init_states`.
_DRAWN_LATER = dict.fromkeys(("weight", "bias", "position", "weight_out"), skip_param_init)
_Linear = partial(Linear.Config, param_init=_DRAWN_LATER)


class Transformer(Decoder):
    """llama3 whose layers are dense or NSA, with the parameters of `nsa.titan.model.Transformer`.

    The last projection is `lm_head`, where that has `output`.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Decoder.Config):
        """Sizes, and what `model_config` makes of them.

        Attributes:
            kinds: of the layers, `"nsa"` or `"dense"`.
            nsa: block sizes and counts of the NSA layers.
            initial_gates: what the gates of the compressed, the selected and the window branch begin with.
            seed: of the initial weights; the job's.
        """

        kinds: list[str]
        nsa: NSAConfig
        initial_gates: str
        seed: int = 0

        def update_from_config(self, *, config: Any, **kwargs: Any) -> None:
            """Takes over what the job says.

            Raises:
                JobError: the job cannot be done as it was asked for.
            """
            Decoder.Config.update_from_config(self, config=config, **kwargs)
            check_job(config, self)
            self.seed = config.debug.seed or 0
            for loader in (config.dataloader, config.validator.dataloader):
                if isinstance(loader, CorpusDataLoader.Config):
                    loader.positions = config.parallelism.context_parallel_degree > 1
            set_sharding(self, enable_sp=config.parallelism.enable_sequence_parallel)

        def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
            """Parameters, and FLOPs a token of a training step."""
            return num_params_and_flops(model, seq_len, self.dim, self.kinds, self.nsa)

    config: Config

    @torch.no_grad()
    def init_states(self, *, buffer_device: torch.device | None = None) -> None:
        """Makes rotary tables and draws every parameter, see `nsa.titan.initial`."""
        super().init_states(buffer_device=buffer_device)
        gates = gate_logits(self.config.initial_gates)
        init_parameters(self, self.config.dim, gates, self.config.seed, other_name)

    def get_attention_masks(self, positions: Tensor) -> None:
        """None: tokens attend to all tokens before them."""


def other_name(name: str) -> str:
    """The name that `nsa.titan.model.Transformer` has for a parameter."""
    return name.replace("lm_head.", "output.")


def own_name(name: str) -> str:
    """The inverse of `other_name`."""
    return name.replace("output.", "lm_head.")


def model_config(
    *,
    dim: int,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int,
    attention: str = "nsa",
    nsa: NSAConfig = PAPER,
    backend: BackendName = "auto",
    initial_gates: str = "0.5,0.5,0.5",
    vocab_size: int = 0,
    ffn_dim_multiplier: float | None = None,
    max_seq_len: int = 131072,
) -> Transformer.Config:
    """The configuration of a model.

    Args:
        attention: kind of each layer, a pattern of `"nsa"` and `"dense"` that is repeated over the depth.
        nsa: block sizes and counts of the NSA layers.
        backend: implementation of the NSA layers, `"auto"`, `"eager"` or `"triton"`.
        initial_gates: what the gates of the compressed, the selected and the window branch begin with.
        vocab_size: that of bytes, rounded up, unless given.
        ffn_dim_multiplier: of the hidden width, as llama3 has it.
        max_seq_len: the longest sequence.

    Raises:
        ValueError: an unknown kind of attention or backend, or heads that do not divide one another or `dim`.
    """
    check_heads(dim, n_heads, n_kv_heads)
    check_backend(backend)
    vocab_size = vocab_size or padded_vocab_size(ByteTokenizer())
    kinds, head_dim = layer_kinds(attention, n_layers), dim // n_heads
    norm = partial(RMSNorm.Config, normalized_shape=dim, param_init=_DRAWN_LATER)
    hidden = compute_ffn_hidden_dim(dim, multiple_of=256, ffn_dim_multiplier=ffn_dim_multiplier)

    def layer(kind: str) -> Llama3TransformerBlock.Config:
        rope = ComplexRoPE.Config(dim=head_dim, max_seq_len=max_seq_len, scaling="llama")
        branches = 1 if kind == "dense" or nsa.shared_kv else 3
        keys = n_kv_heads * branches * head_dim
        common: dict[str, Any] = {
            "dim": dim,
            "n_heads": n_heads,
            "n_kv_heads": n_kv_heads,
            "inner_attention": Identity.Config(),  # TorchTitan looks at it; nothing calls it
            "wq": _Linear(in_features=dim, out_features=dim),
            "wk": _Linear(in_features=dim, out_features=keys),
            "wv": _Linear(in_features=dim, out_features=keys),
            "wo": _Linear(in_features=dim, out_features=dim),
            "rope": rope,
            "param_init": {},
        }
        if kind == "dense":
            attention_config: Any = DenseAttention.Config(**common)
        else:
            blocks = HeadCompressor.Config(num_kv_heads=n_kv_heads, head_dim=head_dim, nsa=nsa, param_init=_DRAWN_LATER)
            gate = _Linear(in_features=dim, out_features=3 * n_heads, bias=True)
            attention_config = NSAAttention.Config(**common, nsa=nsa, backend=backend, wg=gate, compressor=blocks)
        return Llama3TransformerBlock.Config(
            attention_norm=norm(),
            ffn_norm=norm(),
            attention=attention_config,
            feed_forward=make_ffn_config(
                dim=dim, hidden_dim=hidden, w1_param_init=_DRAWN_LATER, w2w3_param_init=_DRAWN_LATER
            ),
        )

    return Transformer.Config(
        dim=dim,
        vocab_size=vocab_size,
        tok_embeddings=Embedding.Config(num_embeddings=vocab_size, embedding_dim=dim, param_init=_DRAWN_LATER),
        norm=norm(),
        lm_head=_Linear(in_features=dim, out_features=vocab_size),
        layers=[layer(kind) for kind in kinds],
        kinds=kinds,
        nsa=nsa,
        initial_gates=initial_gates,
    )
