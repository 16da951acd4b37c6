"""Initial weights: drawn from generators of their own, seeded by their names.

A parameter's values then depend on the seed and its name alone: not on how it is sharded, on which pipeline stage or
device it lies, or in which order layers are made. Distributions are llama3's, cut at three standard deviations.
"""

import math
import re
import zlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from nsa.module import INIT_STD, NativeSparseAttention


def gate_logits(gates: str) -> tuple[float, ...]:
    """Logits of gates; those of 0 and 1 are finite, and round to them.

    Raises:
        ValueError: they are not three such numbers.
    """
    try:
        values = [float(x) for x in gates.split(",")]
    except ValueError:
        values = []
    if len(values) != 3 or not all(0 <= x <= 1 for x in values):
        raise ValueError(f"initial_gates must be three numbers from 0 to 1 with commas between, got {gates!r}")
    return tuple(max(-30.0, min(30.0, math.log(x) - math.log1p(-x))) if 0 < x < 1 else 60.0 * x - 30 for x in values)


def complete_gradient(parameter: Tensor) -> None:
    """Sums a gradient that tensor parallelism left in parts: torch 2.11 clips by the norm of a part."""
    gradient = parameter.grad
    if isinstance(parameter, DTensor) and isinstance(gradient, DTensor) and gradient.placements != parameter.placements:
        parameter.grad = gradient.redistribute(placements=parameter.placements)


DRAWN = 1 << 18
"""Numbers from one generator: a parameter is drawn in pieces of so many, and a process draws those it has a part of."""


def draw(local: Tensor, offset: Sequence[int], shape: Sequence[int], std: float, name: str, seed: int) -> None:
    """Fills `local`, which lies at `offset` in a parameter of `shape`, with numbers that belong to the parameter.

    They are drawn on the CPU: generators of other devices give other numbers.
    """
    if not local.numel():
        return
    rows = max(1, DRAWN // math.prod(shape[1:]))
    begin, end = offset[0], offset[0] + len(local)
    columns = tuple(slice(first, first + size) for first, size in zip(offset[1:], local.shape[1:], strict=True))
    for piece in range(begin // rows, -(-end // rows)):
        first = piece * rows
        drawn = torch.empty(min(rows, shape[0] - first), *shape[1:], device="cpu")
        code = zlib.crc32((f"{name} {piece}" if piece else name).encode()) ^ seed
        generator = torch.Generator("cpu").manual_seed(code)
        nn.init.trunc_normal_(drawn, std=std, a=-3 * std, b=3 * std, generator=generator)
        start, stop = max(begin, first), min(end, first + rows)
        local[start - begin : stop - begin].copy_(drawn[(slice(start - first, stop - first), *columns)])


def initial_std(model: nn.Module, name: str, dim: int) -> float:
    """Standard deviation that a parameter of a transformer starts with.

    Args:
        model: whose `layers` have an `attention`.
        name: of the parameter, with `output` for the last projection.
        dim: width of the model.
    """
    if name == "tok_embeddings.weight":
        return 1.0
    if name == "output.weight":
        return float(dim**-0.5)
    _, layer, part = name.split(".", 2)
    if part in ("attention.wo.weight", "feed_forward.w2.weight", "feed_forward.w3.weight"):
        # Smaller, by depth, where the residual is written.
        return float(INIT_STD / (2 * (int(layer) + 1)) ** 0.5)
    attention = model.get_submodule(f"layers.{layer}").attention
    if isinstance(attention, NativeSparseAttention) and part.startswith("attention."):
        return attention.initial_std()[part.removeprefix("attention.")]
    return INIT_STD


@torch.no_grad()
def init_parameters(
    model: nn.Module, dim: int, gates: Sequence[float], seed: int, rename: Callable[[str], str] = lambda name: name
) -> None:
    """Gives every parameter, or what this process has of it, its first values.

    Args:
        model: as `initial_std` takes it.
        dim: width of the model.
        gates: logits of the gates, `gate_logits`.
        seed: of the whole model.
        rename: gives the name that a parameter is drawn by.
    """
    for wrapped_name, parameter in model.named_parameters():
        name = rename(re.sub(r"_orig_mod\.|_checkpoint_wrapped_module\.", "", wrapped_name))
        local, offset = parameter.data, (0,) * parameter.dim()
        if isinstance(parameter, DTensor):
            _, offset = compute_local_shape_and_global_offset(
                parameter.shape, parameter.device_mesh, parameter.placements
            )
            local = parameter.to_local()
        if re.search(r"norm\.weight$", name):
            local.fill_(1)
        elif name.endswith("attention.wg.bias"):
            rows = torch.arange(offset[0], offset[0] + len(local), device=local.device)
            local.copy_(torch.tensor(gates, device=local.device)[rows % 3])
        elif std := initial_std(model, name, dim):
            draw(local, offset, parameter.shape, std, name, seed)
        else:
            local.zero_()
