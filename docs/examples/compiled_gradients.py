"""Gradients that Inductor overwrites, without this repository: docs/pytorch-compiled-gradients.md says why.

python docs/examples/compiled_gradients.py
"""

import torch
from torch import Tensor, nn


@torch.library.custom_op("report::times", mutates_args=())
def times(x: Tensor, factor: float) -> Tensor:
    return x * factor


@torch.library.custom_op("report::times_backward", mutates_args=())
def times_backward(gradient: Tensor, factor: float) -> Tensor:
    return gradient * factor


def keep(ctx, inputs, output):
    ctx.factor = inputs[1]


times.register_fake(lambda x, factor: torch.empty_like(x))
times_backward.register_fake(lambda x, factor: torch.empty_like(x))
times.register_autograd(lambda ctx, gradient: (times_backward(gradient, ctx.factor), None), setup_context=keep)


class Gated(nn.Module):
    """Three branches, weighed by gates that are taken apart by slices or by `unbind`."""

    def __init__(self, slices: bool):
        super().__init__()
        self.values, self.gates, self.out = nn.Linear(128, 32), nn.Linear(128, 6), nn.Linear(32, 128)
        self.slices = slices

    def forward(self, x: Tensor) -> Tensor:
        gates = self.gates(x).unflatten(-1, (2, 3)).sigmoid()
        values = self.values(x).unflatten(-1, (2, 16))
        if self.slices:
            parts = [gates[..., i : i + 1] for i in range(3)]
        else:
            parts = [gate.unsqueeze(-1) for gate in gates.unbind(-1)]
        branches = [times(values, factor) for factor in (1.0, 2.0, 3.0)]
        return self.out(sum(x * part for x, part in zip(branches, parts, strict=True)).flatten(2))


def worst_error(slices: bool) -> float:
    """The largest error of a compiled gradient, relative to the largest element of the right one."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    module, x = Gated(slices), torch.randn(1, 40, 128)
    parameters = list(module.parameters())
    right = torch.autograd.grad(module(x).sum(), parameters)
    compiled = torch.autograd.grad(torch.compile(module)(x).sum(), parameters)
    return max(((a - b).abs().max() / a.abs().max()).item() for a, b in zip(right, compiled, strict=True))


if __name__ == "__main__":
    print(f"torch {torch.__version__}: unbind {worst_error(slices=False):.1e}, slices {worst_error(slices=True):.1e}")
