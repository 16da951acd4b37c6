"""Selection health: what a model's selection does while it trains, as metrics.

At every step that is logged the first row of the run goes through the model once more, without gradients. The row is
always the same, so what changes from step to step is the model's doing. Shares are from 0 to 1, means are over queries,
heads and NSA layers.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor

from nsa.config import NSAConfig
from nsa.module import NativeSparseAttention

BRANCHES = ("compressed", "selected", "window")
NEIGHBOURS = (4, 8)


def membership(indices: Tensor, num_blocks: int) -> Tensor:
    """Which blocks `indices [B, T, Hk, N]` name: bool `[B, T, Hk, S]`."""
    chosen = indices.new_zeros(*indices.shape[:3], num_blocks + 1, dtype=torch.bool)
    return chosen.scatter(3, indices.long().where(indices >= 0, num_blocks), True)[..., :num_blocks]


def selection_metrics(
    indices: Tensor,
    config: NSAConfig,
    before: Tensor | None = None,
    *,
    first: int = 0,
    neighbours: Sequence[int] = NEIGHBOURS,
) -> dict[str, float]:
    """Metrics of a selection.

    Args:
        indices: int32 `[B, T, Hk, N]`, those of whole sequences or of their last tokens, `T` of at least `neighbours`.
        config: of the layer.
        before: the indices of the same tokens at an earlier step.
        first: the position of the first of the tokens.
        neighbours: how many neighbouring queries unions are of.

    Returns:
        `neighbour_change`, the share of a query's blocks that the query before it did not have; `step_change`, that of
        blocks it did not have at the earlier step, where there is one; `union_4` and `union_8`, the mean number of
        different blocks of so many `neighbours`; `forced`, the share of blocks that every query must take; `entropy` of
        the free choices over blocks, as a part of the largest there can be; `never`, the share of blocks that no query
        chose freely. The last two are 0 where no query has a choice.
    """
    length = indices.shape[1]
    block = torch.arange(config.num_selectable(first + length), device=indices.device)
    own = torch.arange(first, first + length, device=indices.device)[:, None] // config.select_block_size
    chosen = membership(indices, len(block))
    count = chosen.sum(-1).clamp(min=1).double()
    forced = config.forced(block, own)[None, :, None] & chosen
    metrics = {"forced": (forced.sum(-1) / count).mean()}
    changed = (chosen[:, 1:] & ~chosen[:, :-1]).sum(-1) / count[:, 1:]
    metrics["neighbour_change"] = changed.mean()
    if before is not None:
        metrics["step_change"] = ((chosen & ~membership(before, len(block))).sum(-1) / count).mean()
    for number in neighbours:
        together = chosen[:, : length // number * number].unflatten(1, (-1, number)).any(2)
        metrics[f"union_{number}"] = together.sum(-1).double().mean()
    free = (chosen & ~forced).sum((0, 1)).double()  # [Hk, S]
    # Blocks that some query could have chosen and did not have to.
    choosable = ~config.forced(block, own[-1])
    share = free[:, choosable] / free.sum(-1, keepdim=True).clamp(min=1)
    spread = torch.special.entr(share).sum(-1)
    largest = torch.tensor(float(share.shape[-1]), dtype=torch.float64, device=share.device).clamp(min=2).log()
    metrics["entropy"] = (spread / largest).mean() if share.numel() else share.new_zeros(())
    metrics["never"] = (share == 0).double().mean() if free.sum() else share.new_zeros(())
    return {name: value.item() for name, value in metrics.items()}


class SelectionHealth:
    """Metrics of a model's selection and gates; `observe` a row, then call it as often as wanted.

    Args:
        model: whose layers are `layers`, as those of `nsa.titan.model.Transformer`.
        autocast: the context in which the model computes; none unless given.
    """

    def __init__(self, model: Any, autocast: AbstractContextManager[Any] | None = None):
        self._model, self._autocast = model, autocast
        self._row: Tensor | None = None
        self._before: dict[str, Tensor] = {}

    def observe(self, tokens: Tensor) -> None:
        """Takes the first of the rows `tokens [B, T]` to look at; later calls change nothing."""
        if self._row is None:
            self._row = tokens[:1].clone()

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """`selection/...` (see `selection_metrics`) and `gates/...`, the mean gate of each branch."""
        if self._row is None:
            return {}
        gates: list[Tensor] = []
        with ExitStack() as stack:
            # A compiled layer would be compiled once more for this, and hooks in it would not be called.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            if self._autocast is not None:
                stack.enter_context(self._autocast)
            layers = [module for module in self._model.modules() if isinstance(module, NativeSparseAttention)]
            for layer in layers:

                def note(module: Any, inputs: Any, logits: Any, layer: NativeSparseAttention = layer) -> None:
                    split = logits.detach().float().unflatten(-1, (-1, 3))
                    squash = split.sigmoid() if layer.gate_activation == "sigmoid" else split.softmax(-1)
                    gates.append(squash.flatten(0, -2).mean(0))

                stack.callback(layer.wg.register_forward_hook(note).remove)
            _, indices = self._model(self._row, return_indices=True)
        found = [
            selection_metrics(used, layer.config, self._before.get(name))
            for (name, used), layer in zip(indices.items(), layers, strict=True)
        ]
        self._before = indices
        if not found:
            return {}
        named: Mapping[str, float] = {name: sum(x[name] for x in found) / len(found) for name in found[0]}
        mean = torch.stack(gates).mean(0).tolist()
        return {
            **{f"selection/{name}": value for name, value in named.items()},
            **{f"gates/{branch}": value for branch, value in zip(BRANCHES, mean, strict=True)},
        }
