"""Operators of the eager backend: a branch takes segments where an operator takes offsets of sequences."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nsa.eager.tiles import segments
from nsa.ops import Operator, branch_operator


def no_autocast(x: Tensor) -> torch.autocast:
    """A context without autocast: inputs were widened to float32, and their products must stay in float32."""
    return torch.autocast(x.device.type, enabled=False)


def branch(name: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> Operator:
    """A branch of attention as the operator `nsa_eager::name`.

    Args:
        forward: `(q, k, v, indices, segments, config, scale)` to output `[B, Tq, Hq, Dv]` and lse `[B, Tq, Hq]`.
        backward: `(dout, q, k, v, out, lse, indices, segments, config, scale)` to `dq`, `dk` and `dv`.
    """
    return branch_operator("nsa_eager", name, _over_segments(forward), _over_segments(backward))


def _over_segments(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with the arguments that `nsa.ops.branch_operator` passes."""

    def run(*arguments: Any) -> Any:
        *tensors, varlen, num_keys, config, scale = arguments
        sequences = segments(tensors[0].shape[1], num_keys, varlen, config)
        with no_autocast(tensors[0]):
            return function(*tensors, sequences, config, scale)

    return run
