"""Linear layers of one input as one product: at a token a step, each product takes longer to start than to compute."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Joined(NamedTuple):
    """Weights and biases of several layers, in one memory that the parameters of the layers are parts of.

    Attributes:
        weight, bias: `[all outputs, inputs]` and `[all outputs]`, 0 where a layer has no bias.
        sizes: outputs of each layer.
    """

    weight: Tensor
    bias: Tensor
    sizes: list[int]

    @staticmethod
    @torch.no_grad()
    def of(layers: Sequence[nn.Linear]) -> "Joined":
        """Moves the parameters of layers into one memory; they stay parameters as they were."""
        weights: list[Tensor] = [layer.weight for layer in layers]
        weight = torch.cat(weights)
        biases: list[Tensor] = [x.weight.new_zeros(len(x.weight)) if x.bias is None else x.bias for x in layers]
        joined = Joined(weight, torch.cat(biases), [len(layer.weight) for layer in layers])
        for layer, (its_weight, its_bias) in zip(layers, joined._parts(), strict=True):
            layer.weight.data = its_weight
            if layer.bias is not None:
                layer.bias.data = its_bias
        return joined

    def _parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.weight.split(self.sizes), self.bias.split(self.sizes), strict=True)

    def holds(self, layers: Sequence[nn.Module]) -> bool:
        """Whether the layers are plain ones whose parameters still lie here: `to(device)` gives them other memory."""
        return all(
            type(layer) is nn.Linear
            and layer.weight.data_ptr() == weight.data_ptr()
            and (layer.bias is None or layer.bias.data_ptr() == bias.data_ptr())
            for layer, (weight, bias) in zip(layers, self._parts(), strict=True)
        )

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """The outputs of all layers, parts of one tensor."""
        return F.linear(x, self.weight, self.bias).split(self.sizes, -1)
