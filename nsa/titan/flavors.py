"""Flavors: sizes of models, the attention of their layers, and what a token costs. A twin differs in nothing else."""

from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from torch import nn

from nsa.config import NSAConfig
from nsa.module import Compressor

ATTENTION_KINDS = ("dense", "nsa")
_SMALL = NSAConfig(
    compress_block_size=16, compress_stride=8, select_block_size=32, num_selected_blocks=8, window_size=128
)
_SIZES: dict[str, dict[str, Any]] = {
    "debug": {"dim": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "nsa": _SMALL},
    "debug_parallel": {"dim": 128, "n_layers": 6, "n_heads": 8, "n_kv_heads": 4, "nsa": _SMALL},
    "100m": {"dim": 1024, "n_layers": 8, "n_heads": 16, "n_kv_heads": 4},
    "1b": {"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 4, "ffn_dim_multiplier": 1.5},
}
FLAVORS: dict[str, dict[str, Any]] = {
    **_SIZES,
    **{f"{name}_dense": {**sizes, "attention": "dense"} for name, sizes in _SIZES.items()},
    "100m_hybrid": {**_SIZES["100m"], "attention": "dense,nsa,nsa,nsa"},
}
"""Arguments of a model that differ from their defaults, by flavor."""


def config_file(flavor: str) -> Path:
    """The file of `nsa/configs` that says how a flavor is trained; twins share one. There may be none."""
    return Path(__file__).parents[1] / "configs" / f"{flavor.partition('_')[0]}.toml"


def layer_kinds(attention: str, n_layers: int) -> list[str]:
    """The kind of attention of every layer, from a pattern such as `"dense,nsa"`, repeated over the depth.

    Raises:
        ValueError: an unknown kind.
    """
    kinds = attention.split(",")
    if not set(kinds) <= set(ATTENTION_KINDS):
        raise ValueError(f"attention must be a pattern of {ATTENTION_KINDS}, got {attention!r}")
    return list(islice(cycle(kinds), n_layers))


def check_heads(dim: int, n_heads: int, n_kv_heads: int) -> None:
    """Refuses heads that do not share out the width, or the queries.

    Raises:
        ValueError: `dim` or `n_heads` is not a multiple of what it must be.
    """
    if dim % n_heads:
        raise ValueError(f"dim must be a multiple of n_heads ({n_heads}), got {dim}")
    if n_heads % n_kv_heads:
        raise ValueError(f"n_heads must be a multiple of n_kv_heads ({n_kv_heads}), got {n_heads}")


def num_params_and_flops(
    model: nn.Module, seq_len: int, dim: int, kinds: Sequence[str], config: NSAConfig
) -> tuple[int, int]:
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
    selected = min(config.num_selected_blocks * config.select_block_size, seq_len)
    sparse = config.num_compressed(seq_len) + selected + min(config.window_size, seq_len)
    keys = sum(seq_len if kind == "dense" else sparse for kind in kinds)
    products = num_params - apart + once_a_block // config.compress_stride
    return num_params, 6 * products + 12 * dim * keys
