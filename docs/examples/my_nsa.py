"""An adapter for an implementation that is not ours: `make unit IMPL=docs.examples.my_nsa:my_nsa`."""

import torch
from torch.nn.functional import pad

from docs.examples import somebody
from validation.implementations import Implementation


def theirs(config, num_keys, q, *tensors):
    """Tensors with heads before tokens, the positions of the queries, and the settings."""
    sizes = (config.compress_block_size, config.compress_stride, config.select_block_size)
    counts = (config.num_selected_blocks, config.num_initial_blocks, config.num_local_blocks)
    settings, positions = somebody.Settings(*sizes, *counts, config.window_size), torch.arange(num_keys)[-q.shape[1] :]
    return *(x.transpose(1, 2) for x in (q, *tensors)), positions, settings


def as_indices(chosen, config):
    """Ascending and ended with -1, where theirs come by importance, in no more slots than there are blocks."""
    chosen = pad(chosen, (0, config.num_selected_blocks - chosen.shape[-1]), value=somebody.NOTHING).sort(-1).values
    return chosen.masked_fill(chosen == somebody.NOTHING, -1).transpose(1, 2).int()


def compress(x, params, config, *, cu_seqlens=None):
    x, _, settings = theirs(config, x.shape[1], x)
    return somebody.pooled(x, settings).transpose(1, 2)


def compressed_attention(q, k, v, config, *, num_keys=None, scale=None):
    out, _, lse = somebody.compressed(*theirs(config, num_keys or q.shape[1], q, k, v), scale)
    return out.transpose(1, 2), lse.transpose(1, 2).detach()


def select_blocks(q, k, lse, config, *, num_keys=None, scale=None):
    return as_indices(somebody.choose(*theirs(config, num_keys or q.shape[1], q, k), scale), config)


def selected_attention(q, k, v, indices, config, *, scale=None):
    return somebody.selected(*theirs(config, k.shape[1], q, k, v, indices), scale).transpose(1, 2)


def sliding_window_attention(q, k, v, config, *, scale=None):
    return somebody.window(*theirs(config, k.shape[1], q, k, v), scale).transpose(1, 2)


def nsa_attention(q, *others, indices=None, return_indices=False, scale=None):
    *tensors, config = others  # compressed, selected and window keys and values, gates
    chosen, num_keys = None if indices is None else indices.transpose(1, 2), tensors[2].shape[1]
    out, chosen = somebody.nsa(*theirs(config, num_keys, q, *tensors), chosen, scale)
    used = as_indices(chosen, config) if indices is None else indices
    return (out.transpose(1, 2), used) if return_indices else out.transpose(1, 2)


my_nsa = Implementation(
    "my_nsa", compress, compressed_attention, select_blocks, selected_attention, sliding_window_attention,
    nsa_attention, dtypes=frozenset({torch.float64, torch.float32}), packed=False, checks_input=False,
    hidden_values=False, compressions=frozenset({"mean"}),
)  # fmt: skip
