"""The eager backend: every stage in plain PyTorch, on any device, in any float dtype, float64 included.

The files are the twins of those of the Triton backend, one stage a file. All three branches are softmax attention over
some set of keys: `flash` holds the arithmetic of one tile of queries, forward and backward, and every branch says which
keys a tile looks at.

- `compressed`: a prefix of the compressed blocks (paper, section 3.3.1);
- `selected`: the chosen blocks of keys, gathered for every query (section 3.3.2);
- `window`: the keys just before the tile (section 3.3.3).

The backward pass computes the probabilities of a tile again. Memory beyond inputs and outputs is therefore that of one
tile, whatever the length. Arithmetic is done in float32, or in float64 for float64 inputs; results are rounded once,
when they are returned.
"""

from nsa.eager.attention import nsa_attention
from nsa.eager.compress import compress
from nsa.eager.compressed import compressed_attention
from nsa.eager.decode import decode_attention
from nsa.eager.gates import combine
from nsa.eager.rope import apply_rope
from nsa.eager.select import select_blocks
from nsa.eager.selected import selected_attention
from nsa.eager.step import take_in
from nsa.eager.window import sliding_window_attention

__all__ = [
    "apply_rope",
    "combine",
    "compress",
    "compressed_attention",
    "decode_attention",
    "nsa_attention",
    "select_blocks",
    "selected_attention",
    "sliding_window_attention",
    "take_in",
]
