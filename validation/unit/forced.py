"""Paths of our code that exist for large sizes, forced at small size, and the proof that they were taken.

A path that was not taken would be tested by nothing, however right the results: every `Path` says how its calls show.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from nsa import kernels
from nsa.kernels.configs import override
from validation import oracle
from validation.cases import Case, Tensors
from validation.comparison import compare
from validation.implementations import load
from validation.memory import WORKSPACES, fresh_memory_is_poisoned, memory_is_guarded
from validation.numerics import assert_selection_matches
from validation.stages import EVERY, importance, select_blocks
from validation.unit.ways import fitting

DTYPE = torch.float64 if kernels.INTERPRETED else torch.float32
SMALL_TILES = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1, "TMA": False, "SPLIT": True}
"""Tiles so small that small cases have many, on a GPU too."""

Calls = list[SimpleNamespace]
"""Arguments, by name, of the calls of one function or the launches of one kernel."""


@dataclass(frozen=True)
class Path:
    """A path, how it is forced and how it shows.

    Attributes:
        id: what happens on it.
        stages: names of the stages that take it, of `EVERY`.
        cases: what it is tried on.
        seen: by `module.function` or `module.kernel` below `nsa`, whether its calls are those of the path.
        constants: by `module.name` below `nsa`, what replaces constants and functions.
        launch: fields of configurations, by the name that the kernel has in their table.
        backend: whose path it is.
    """

    id: str
    stages: tuple[str, ...]
    cases: tuple[Case, ...]
    seen: Mapping[str, Callable[[Calls], bool]]
    constants: Mapping[str, Any] = field(default_factory=dict)
    launch: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    backend: str = "triton"


def at(names: Sequence[str], **parameters: Any) -> dict[str, dict[str, Any]]:
    """Configurations of kernels of these names: small tiles, and what is given, as far as they have fields for it."""
    return {name: fitting(name, {**SMALL_TILES, **parameters}) for name in names}


class Watched:
    """A function or kernel whose calls are written down."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.calls: Calls = []

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        given = inspect.signature(self.function).bind(*arguments, **named).arguments
        self.calls.append(SimpleNamespace(**given))
        return self.function(*arguments, **named)

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*arguments: Any, **named: Any) -> Any:
            given = dict(zip(self.function.arg_names, arguments, strict=False))
            self.calls.append(SimpleNamespace(**given, **named))
            return self.function[grid](*arguments, **named)

        return launch


def _place(name: str) -> tuple[ModuleType, str]:
    """The module below `nsa` and the attribute that `module.attribute` names."""
    module, _, attribute = name.rpartition(".")
    return import_module(f"nsa.{module}"), attribute


def check(stage: str, case: Case, backend: str, tensors: Tensors) -> None:
    """Hold a stage to the oracle, gradients included."""
    subject = load(backend)
    if stage != "select_blocks":
        compare(subject, EVERY[stage], case, tensors, DTYPE, beside_plain=not kernels.INTERPRETED)
        return
    indices, expected = select_blocks(subject, case, tensors), select_blocks(oracle, case, tensors)
    scores = importance(case, tensors)
    assert_selection_matches(indices, expected, scores, case.config, DTYPE, **case.selection)


@contextmanager
def launched_as(path: Path) -> Iterator[None]:
    """Kernels are launched as the path wants it."""
    with ExitStack() as stack:
        for name, parameters in path.launch.items():
            stack.enter_context(override(name, **parameters))
        yield


def force(path: Path, stage: str, case: Case, tensors: Tensors, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hold a stage to the oracle on the path, and see that it was taken.

    Meanwhile nothing may be written beside what kernels work in, and on a CPU memory that was never written is NaN
    (on a GPU the oracle has no deterministic products).
    """
    for name, value in path.constants.items():
        monkeypatch.setattr(*_place(name), value)
    watched = {name: Watched(getattr(*_place(name))) for name in path.seen}
    for name, function in watched.items():
        monkeypatch.setattr(*_place(name), function)
    poisoned = fresh_memory_is_poisoned() if kernels.INTERPRETED else nullcontext()
    guards = memory_is_guarded(monkeypatch, WORKSPACES) if path.backend == "triton" else nullcontext()
    with launched_as(path), poisoned, guards:
        check(stage, case, path.backend, tensors)
    for name, taken in path.seen.items():
        calls = watched[name].calls
        assert calls, f"{name} was not called"
        was_taken = taken(calls)  # said apart, for a message without the arguments of all calls
        assert was_taken, f"{path.id}: the path was not taken in {len(calls)} calls of {name}"
