"""How modules are shared out under tensor parallelism: all of attention by head, the rest as llama3's.

Declarations for a mesh that is not there are skipped, so they are made once for every layout.
"""

import spmd_types as spmd
from torchtitan.models.common.attention import BaseAttention
from torchtitan.models.common.decoder import Decoder, TransformerBlock
from torchtitan.models.common.decoder_sharding import (
    colwise_config,
    dense_activation_placement,
    dense_param_placement,
    dense_sequence_parallel_placement,
    norm_config,
    rowwise_config,
    set_decoder_sharding_config,
    set_dense_ffn_sharding,
)
from torchtitan.protocols.sharding import ShardingConfig

from nsa.titan3.attention import NSAAttention


def set_sharding(config: Decoder.Config, *, enable_sp: bool) -> None:
    """Fills in the sharding of every module of a model; `enable_sp` shares out tokens between the layers."""
    set_decoder_sharding_config(config, enable_sp=enable_sp)
    for layer in config.layers:
        _set_layer(layer, enable_sp)


def _set_layer(layer: TransformerBlock.Config, enable_sp: bool) -> None:
    layer.attention_norm.sharding_config = layer.ffn_norm.sharding_config = norm_config(enable_sp=enable_sp)
    between = dense_sequence_parallel_placement() if enable_sp else dense_activation_placement(tp=spmd.I)
    _set_attention(layer.attention, between, enable_sp)
    set_dense_ffn_sharding(layer.feed_forward, attn_x_layout=between, enable_sp=enable_sp)


def _set_attention(attention: BaseAttention.Config, between: object, enable_sp: bool) -> None:
    whole = dense_activation_placement(tp=spmd.R)
    attention.sharding_config = ShardingConfig(in_src_shardings={"x": between}, in_dst_shardings={"x": whole})
    attention.rope.sharding_config = ShardingConfig(state_shardings={"cache": dense_param_placement(tp=spmd.R)})
    for name in ("wq", "wk", "wv"):
        getattr(attention, name).sharding_config = colwise_config()
    attention.wo.sharding_config = rowwise_config(output_sp=enable_sp)
    if isinstance(attention, NSAAttention.Config):
        attention.wg.sharding_config = colwise_config()
        by_head = dense_param_placement(tp=spmd.S(0))
        names = ("position", "weight", "weight_out")
        attention.compressor.sharding_config = ShardingConfig(state_shardings=dict.fromkeys(names, by_head))
