"""Mistakes that no single call shows: in training alone, after many steps, beyond the length of training, in a cache.

`NSA_VALIDATION_MUTANT=NAME make validate` makes one of them, and must fail in the system layer.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from nsa import module
from nsa.eager.rope import rotate
from validation.system.checks import TRAINED

VARIABLE = "NSA_VALIDATION_MUTANT"
"""The environment variable that names the mutant of a run."""


@dataclass(frozen=True)
class Mutant:
    """A mistake in a module or class.

    Attributes:
        says: what it is.
        killer: the check that must find it.
        place: what has the functions that are replaced.
        names: their names.
        make: makes what replaces each of them.
    """

    says: str
    killer: str
    place: Any
    names: tuple[str, ...]
    make: Callable[[Any], Any]

    @contextmanager
    def made(self) -> Iterator[None]:
        """The mistake is there."""
        with ExitStack() as stack:
            for name in self.names:
                stack.enter_context(mock.patch.object(self.place, name, self.make(getattr(self.place, name))))
            yield


def _swapped_gates(project: Any) -> Any:
    def mutant(self: Any, x: Tensor) -> Any:
        *tensors, gates = project(self, x)
        return *tensors, gates.flip(-1) if self.training else gates

    return mutant


def _stale_selection(attention: Any) -> Any:
    before: dict[Any, Tensor] = {}

    def mutant(q: Tensor, *tensors: Any, indices: Tensor | None = None, **options: Any) -> Any:
        _, own = attention(q, *tensors, indices=indices, **options)
        used = before.get(q.shape, own)
        before[q.shape] = own
        return attention(q, *tensors, indices=used, **options)

    return mutant


def _no_gradient_after_100(compress: Any) -> Any:
    steps = 0

    def mutant(*arguments: Any, **options: Any) -> Any:
        nonlocal steps
        compressed = compress(*arguments, **options)
        if torch.is_grad_enabled():
            steps += 1
        return tuple(x.detach() for x in compressed) if steps > 100 else compressed

    return mutant


def _shifted_rope(apply: Any) -> Any:
    def mutant(q: Tensor, k_cmp: Tensor, *rest: Any, **options: Any) -> Any:
        *_, rope, config = rest
        rotated = apply(q, k_cmp, *rest, **options)
        stride, blocks = config.compress_stride, k_cmp.shape[1]
        if q.shape[1] <= TRAINED:
            return rotated
        later = rope[stride * torch.arange(1, blocks + 1).clamp(max=(len(rope) - 1) // stride)]
        return rotated[0], rotate(k_cmp, later, options["interleaved"]), *rotated[2:]

    return mutant


def _short_window(attention: Any) -> Any:
    def mutant(q: Tensor, cached: Any, gates: Tensor, config: Any, **options: Any) -> Any:
        return attention(q, cached, gates, replace(config, window_size=config.window_size - 1), **options)

    return mutant


LAYER = module.NativeSparseAttention
MUTANTS: Mapping[str, Mutant] = {
    "gates": Mutant("gates are swapped, in training only", "both_modes", LAYER, ("project",), _swapped_gates),
    "stale": Mutant("the selection is one step old", "fresh_selection", module, ("nsa_attention",), _stale_selection),
    "compressor": Mutant(
        "the compressor has no gradient after step 100",
        "all_learn",
        module,
        ("compress_keys_and_values",),
        _no_gradient_after_100,
    ),
    "rope": Mutant(
        "compressed keys are rotated one block too far, beyond the length of training",
        "longer",
        module,
        ("apply_rope",),
        _shifted_rope,
    ),
    "cache": Mutant(
        "the cache drops the oldest token of the window",
        "generation",
        module,
        ("decode_attention", "cached_attention"),
        _short_window,
    ),
}
