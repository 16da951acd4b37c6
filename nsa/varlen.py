"""Packed sequences: the tables that all stages need, made once a batch.

Sequences of different lengths stand one after the other in one row of the batch. Offsets say where: sequence `s` has
tokens `[cu_seqlens[s], cu_seqlens[s + 1])`. From them follow the positions of tokens and the places of compressed and
of selection blocks. Nothing here waits for the device.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa.blocks import BlockStarts, block_starts, count_blocks
from nsa.config import NSAConfig


class Varlen(NamedTuple):
    """Tables of packed sequences, on the device of the tensors they belong to.

    Attributes:
        cu_seqlens_q: int32 `[N + 1]`, offsets of the sequences' queries.
        cu_seqlens_k: int32 `[N + 1]`, offsets of their keys.
        cu_blocks: int32 `[N + 1]`, offsets of their compressed blocks, which follow one another without gaps.
        queries: int32 `[Tq, 3]`, for each query its position, the first key and the first selection block of its
            sequence. Selection blocks of sequence `s` begin at `cu_seqlens_k[s] // l' + s`: some numbers stand for
            no block.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    cu_blocks: Tensor
    queries: Tensor

    @staticmethod
    def of(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, num_queries: int, config: NSAConfig) -> "Varlen":
        """Tables for legal offsets: rising from 0 to the number of tokens, with no fewer keys than queries each."""
        lengths = cu_seqlens_k.diff()
        cu_blocks = F.pad(count_blocks(cu_seqlens_k, config).cumsum(0), (1, 0)).int()
        query = torch.arange(num_queries, device=cu_seqlens_q.device, dtype=torch.int32)
        # Not of `cu_seqlens_q[1:]`: compiled for a GPU, PyTorch 2.11 would search from the start of the tensor sliced.
        sequence = torch.searchsorted(cu_seqlens_q, query, right=True, out_int32=True) - 1
        # Compiled, there may be queries in no sequence, for which sequences without keys are made.
        sequence = sequence.clamp(max=lengths.shape[0] - 1)
        position = query - cu_seqlens_q[sequence + 1] + lengths[sequence]
        first_key = cu_seqlens_k[sequence]
        first_block = first_key // config.select_block_size + sequence
        return Varlen(cu_seqlens_q, cu_seqlens_k, cu_blocks, torch.stack((position, first_key, first_block), 1))


def tensors_of(varlen: Varlen | None) -> tuple[Tensor | None, ...]:
    """The tables as the arguments of an operator, `None` each where nothing is packed."""
    return (None, None, None, None) if varlen is None else varlen


def varlen_of(*tensors: Tensor | None) -> Varlen | None:
    """The inverse of `tensors_of`."""
    return None if tensors[0] is None else Varlen(*tensors)  # type: ignore[arg-type]


class PackedSequences(NamedTuple):
    """Packed sequences with every table that stages need, for all stages of all layers.

    `nsa.pack_sequences` makes it from offsets. To give it to a stage instead of the offsets spares the stage to look at
    their values, which waits for the device, and to make tables of its own.

    Attributes:
        varlen: tables of the attention stages.
        positions: int64 `[Tk]`, position of each key in its sequence.
        blocks: where compressed blocks start.
        longest: keys of the longest sequence, 0 where values cannot be looked at.
        sizes: `l`, `d` and `l'` that the tables are for.
    """

    varlen: Varlen
    positions: Tensor
    blocks: BlockStarts
    longest: int
    sizes: tuple[int, int, int]


def block_sizes(config: NSAConfig) -> tuple[int, int, int]:
    """The sizes that tables depend on: `l`, `d` and `l'`."""
    return config.compress_block_size, config.compress_stride, config.select_block_size


def token_positions(num_tokens: int, cu_seqlens: Tensor) -> Tensor:
    """Position of each packed token in its own sequence, int64 `[T]`, for offsets that rise from 0 to `T`."""
    token, bounds = torch.arange(num_tokens, device=cu_seqlens.device), cu_seqlens.long()
    return token - bounds[torch.searchsorted(bounds, token, right=True) - 1]


def make_tables(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, num_queries: int, num_keys: int, longest: int, config: NSAConfig
) -> PackedSequences:
    """All tables for legal offsets."""
    return PackedSequences(
        Varlen.of(cu_seqlens_q, cu_seqlens_k, num_queries, config),
        token_positions(num_keys, cu_seqlens_k),
        block_starts(num_keys, config, cu_seqlens_k, device=cu_seqlens_k.device),
        longest,
        block_sizes(config),
    )
