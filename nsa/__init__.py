"""Native Sparse Attention (arXiv 2502.11089): three gated branches in place of dense attention.

`nsa.functional` has the stages and `nsa_attention`, `nsa.module` the layer and `nsa.cache` its key/value cache.
`nsa.titan` has a model of such layers for TorchTitan 0.2.2, and `nsa.titan3` has it for TorchTitan 0.3. Only they and
the entry points, `nsa.train` and `nsa.generate`, need TorchTitan.
"""

from importlib.metadata import PackageNotFoundError, version

from nsa.cache import CachedKeys, DenseCache, KVCache, StepKeys
from nsa.config import NSAConfig
from nsa.decode import cached_attention, decode_attention, dense_decode_attention
from nsa.functional import (
    CompressionParams,
    apply_rope,
    compress,
    compress_keys_and_values,
    compressed_attention,
    nsa_attention,
    pack_sequences,
    select_blocks,
    selected_attention,
    sliding_window_attention,
)
from nsa.module import NativeSparseAttention, RopeScaling, rope_table
from nsa.varlen import PackedSequences

__all__ = [
    "CachedKeys",
    "CompressionParams",
    "DenseCache",
    "KVCache",
    "NSAConfig",
    "NativeSparseAttention",
    "PackedSequences",
    "RopeScaling",
    "StepKeys",
    "apply_rope",
    "cached_attention",
    "compress",
    "compress_keys_and_values",
    "compressed_attention",
    "decode_attention",
    "dense_decode_attention",
    "nsa_attention",
    "pack_sequences",
    "rope_table",
    "select_blocks",
    "selected_attention",
    "sliding_window_attention",
]

try:
    __version__ = version("nsa")
except PackageNotFoundError:  # sources that are imported without being installed
    __version__ = "0+unknown"
