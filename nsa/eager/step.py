"""A new token of every sequence, rotated and written into a cache, with the compressed blocks that it completes."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nsa.blocks import BlockFunction, BlockStarts, CompressionParams, check_vectors, compress_by
from nsa.config import NSAConfig
from nsa.eager.compress import compress
from nsa.eager.rope import rotate
from nsa.stores import Pair, put_next


def take_in(
    q: Tensor,
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    rope: Tensor | None,
    pairs: Mapping[str, Pair],
    lengths: Tensor,
    arrived: Tensor,
    params: Sequence[CompressionParams | BlockFunction | None],
    config: NSAConfig,
    interleaved: bool,
) -> Tensor:
    """Queries `[B, 1, Hq, Dk]`, rotated; see `nsa.cache.KVCache.step`. Functions may stand for parameters here."""

    def rotated(x: Tensor, positions: Tensor) -> Tensor:
        if rope is None:
            return x
        return rotate(x.transpose(0, 1), rope[positions], interleaved).transpose(0, 1)

    rows, blocks = torch.arange(len(q), device=q.device), pairs["compressed"]
    first, new = lengths + 1 - config.compress_block_size, None
    complete = (first >= 0) & (first % config.compress_stride == 0)
    # Asking a GPU whether there is one would mean to wait; a CPU knows.
    if blocks[0].shape[1] and (lengths.is_cuda or bool(complete.any())):
        of_block = torch.arange(config.compress_block_size - 1, device=q.device)
        slots = rows[:, None], (first[:, None] + of_block) % pairs["tail"][0].shape[1]
        tokens = (torch.cat((store[slots], x), 1) for store, x in zip(pairs["tail"], (k[0], v[0]), strict=True))
        k_cmp, v_cmp = (_vector(x, of_x, config) for x, of_x in zip(tokens, params, strict=True))
        new = rotated(k_cmp, first.clamp(min=0)), v_cmp
        check_vectors(new, blocks, (len(q), 1))
    query, k_slc, k_win = (rotated(x, lengths) for x in (q, k[1], k[2]))
    for name, keys, values in (("tail", k[0], v[0]), ("selected", k_slc, v[1]), ("window", k_win, v[2])):
        put_next(pairs[name], lengths, keys, values)
    if new is not None:
        place = rows, (first // config.compress_stride).clamp(min=0)
        for store, x in zip(blocks, new, strict=True):
            store.index_put_(place, torch.where(complete[:, None, None], x[:, 0], store[place]))
    lengths += 1
    return query


def _vector(x: Tensor, params: CompressionParams | BlockFunction | None, config: NSAConfig) -> Tensor:
    """The vector `[B, 1, Hk, D]` of one block `[B, l, Hk, D]`."""
    begin = torch.zeros(1, dtype=torch.int64, device=x.device)
    starts = BlockStarts(begin, begin, None)
    out = compress_by(params, x, starts, config) if callable(params) else compress([x], [params], config, starts)[0]
    return out.to(x.dtype)
