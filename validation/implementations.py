"""What the harness needs of an implementation: the stage functions and an honest account of what they can do.

Our own backends go through the same door as everybody else's. A subject is named by its module in `adapters`, by an
entry point of the group `nsa_validation.implementations`, or as `package.module:object`; each is an `Implementation` or
a function that makes one. What it declares is tested, and fails where it does not hold; what it does not declare is
skipped, visibly.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import torch

STAGES = (
    "compress",
    "compressed_attention",
    "select_blocks",
    "selected_attention",
    "sliding_window_attention",
    "nsa_attention",
)
"""The stage functions by name; each has the signature of the oracle's function of that name."""


COMPRESSIONS = frozenset({"mlp", "linear", "mean"})
"""Every kind of compression an `NSAConfig` knows."""


INVARIANCES = {
    "gradients": "whether they are wanted: the forward pass without gradients is the one with",
    "batch": "what is beside a sequence in a batch",
    "chunks": "how many queries come at a time",
    "graphs": "whether a call is made or replayed as a CUDA graph",
}
"""What a result's bits may be independent of."""

DEVICES = frozenset({"cpu", "cuda"})
"""Device types on which the harness makes inputs."""


@dataclass(frozen=True)
class Sizes:
    """A range of sizes as a capability: asked by calling it, printed in words."""

    least: int = 1
    most: int | None = None
    powers_of_two: bool = False

    def __call__(self, size: int) -> bool:
        fits = self.least <= size and (self.most is None or size <= self.most)
        return fits and not (self.powers_of_two and size & (size - 1))

    def __str__(self) -> str:
        kind = "powers of two " if self.powers_of_two else ""
        return f"{kind}from {self.least}" if self.most is None else f"{kind}{self.least} to {self.most}"


@dataclass(frozen=True)
class Implementation:
    """One subject of the harness. A stage it lacks is None; a capability declared is a capability tested.

    Raises:
        ValueError: a capability has a name that no test knows, or there is no dtype.
    """

    name: str
    compress: Callable[..., Any] | None = None
    compressed_attention: Callable[..., Any] | None = None
    select_blocks: Callable[..., Any] | None = None
    selected_attention: Callable[..., Any] | None = None
    sliding_window_attention: Callable[..., Any] | None = None
    nsa_attention: Callable[..., Any] | None = None
    combine: Callable[..., Any] | None = None
    """The gated sum, `(branches, gates)`: part of `nsa_attention` and tested with it, but timed by itself."""

    dtypes: frozenset[torch.dtype] = frozenset({torch.float32})
    """Floating dtypes of the inputs."""
    devices: frozenset[str] = DEVICES
    """Device types of the inputs."""
    backward: bool = True
    """Whether gradients flow."""
    second_derivatives: bool = True
    """Whether derivatives of gradients are right or refused by an error; otherwise they are not tested."""
    deterministic: bool = True
    """Whether the same inputs give the same bits, gradients included."""
    packed: bool = True
    """Several sequences in one row, by `cu_seqlens_q` and `cu_seqlens_k`."""
    partial_queries: bool = True
    """Fewer queries than keys (`Tq < Tk`)."""
    partial_queries_backward: bool = True
    """Gradients then, too."""
    own_keys: bool = True
    """Keys and values of their own a branch in `nsa_attention`; otherwise all come of one `k` and one `v`."""
    value_head_dim: bool = True
    """Values of another head dim than keys (`Dv != Dk`)."""
    any_indices: bool = True
    """Indices in any order, -1 anywhere among them, blocks beyond the query among them."""
    empty_queries: bool = True
    """Queries with no block at all among the indices given: their output is 0."""
    branches_off: bool = True
    """No selected blocks (`n = 0`) and no window (`w = 0`): the branch gives 0."""
    checks_input: bool = True
    """Whether bad input is refused before work starts, by `ValueError` or `TypeError`."""
    hidden_values: bool = True
    """Whether what a query does not attend to may hold infinities and NaNs, as padding does."""
    invariant: frozenset[str] = frozenset()
    """What a result's bits do not depend on, of `INVARIANCES`."""
    compressions: frozenset[str] = COMPRESSIONS
    """Kinds of compression."""
    lengths: Callable[[int], bool] = Sizes(0)
    """Whether a number of tokens a sequence is supported; 0 is an empty one among others."""
    head_dims: Callable[[int], bool] = Sizes()
    """Whether a head dim (`Dk`, `Dv`) is supported."""
    groups: Callable[[int], bool] = Sizes()
    """Whether a number of query heads a KV head (`G`) is supported."""
    config: Callable[[Any], bool] = lambda config: True
    """Whether the sizes and counts of an `NSAConfig` are supported; the first line of its docstring says which are."""

    longest: int = 2048
    """Tokens of the longest sequence that there is memory and time for: it is tried at this length."""
    tile: int = 1
    """Tokens it takes at a time, about: sequences are tried that are longer than several of them."""
    interpreted: bool = False
    """Whether it runs under Triton's interpreter: seconds a call, and rounding like no GPU's."""
    plain: bool = False
    """Whether it is plain PyTorch, as the baseline of others is: it is then held to the oracle without any."""

    def __post_init__(self) -> None:
        # Under a misspelt name nothing would be tested.
        for field, known in (("devices", DEVICES), ("invariant", INVARIANCES), ("compressions", COMPRESSIONS)):
            unknown = sorted(set(getattr(self, field)) - set(known))
            if unknown:
                raise ValueError(f"{field} of {self.name} must be of {sorted(known)}, got {unknown}")
        if not self.dtypes:
            raise ValueError(f"dtypes of {self.name} must hold one at least")

    def has(self, stage: str) -> bool:
        """Whether the stage of that name (one of `STAGES`) is there."""
        return getattr(self, stage) is not None

    def function(self, stage: str) -> Callable[..., Any]:
        """The stage of that name.

        Raises:
            ValueError: it is not there.
        """
        found: Callable[..., Any] | None = getattr(self, stage)
        if found is None:
            raise ValueError(f"{self.name} lacks the stage {stage}")
        return found

    @property
    def widest(self) -> torch.dtype:
        """The dtype that leaves least to rounding."""
        return min(self.dtypes, key=lambda dtype: torch.finfo(dtype).eps)

    def lacks(
        self,
        case: Any,
        stages: Collection[str] = (),
        dtype: torch.dtype | None = None,
        *,
        backward: bool = False,
        own_keys: bool = False,
    ) -> str | None:
        """The first capability that is wanted and not declared, in words; None where there is none.

        Args:
            case: a `validation.cases.Case`.
            stages: the stages that will be called; how blocks are compressed matters to `compress` alone.
            dtype: of the inputs; any, unless given.
            backward: whether gradients are wanted.
            own_keys: whether branches have keys and values of their own.
        """
        partial = any(queries != keys for queries, keys in case.lengths)
        sizes = (case.config.compress_block_size, case.config.compress_stride, case.config.select_block_size)
        kind = case.config.compression
        there = {
            **{f"the stage {stage}": self.has(stage) for stage in stages},
            _name(dtype): dtype is None or dtype in self.dtypes,
            f"blocks {sizes}, {case.config.num_selected_blocks} selected": self.config(case.config),
            "packed sequences": self.packed or not case.packed,
            "fewer queries than keys": self.partial_queries or not partial,
            "keys of their own a branch": self.own_keys or not own_keys,
            "Dv != Dk": self.value_head_dim or case.key_dim == case.value_dim,
            **{f"a head dim of {dim}": self.head_dims(dim) for dim in (case.key_dim, case.value_dim)},
            f"groups of {case.group}": self.groups(case.group),
            f"{kind} compression": kind in self.compressions or "compress" not in stages,
            **{f"sequences of {keys} tokens": self.lengths(keys) for _, keys in case.lengths},
            "indices in any order": self.any_indices or not case.scrambled,
            "queries without a block": self.empty_queries or not (case.scrambled and case.emptied),
            "branches that are off": self.branches_off
            or min(case.config.num_selected_blocks, case.config.window_size) > 0,
            "a backward pass": self.backward or not backward,
            "a backward pass of fewer queries than keys": self.partial_queries_backward or not (backward and partial),
        }
        return next((capability for capability, is_there in there.items() if not is_there), None)

    def capabilities(self) -> dict[str, str]:
        """What it declares, in words: for the table at the end of a run."""
        missing = [stage for stage in STAGES if not self.has(stage)]
        partial = "forward only" if self.partial_queries and not self.partial_queries_backward else None
        return {
            "stages": f"all but {', '.join(missing)}" if missing else "all",
            "dtypes": ", ".join(sorted(map(_name, self.dtypes))),
            "devices": ", ".join(sorted(self.devices)),
            "backward": _yes(self.backward),
            "second derivatives": "right or refused" if self.second_derivatives else "declined",
            "deterministic": _yes(self.deterministic),
            "packed sequences": _yes(self.packed),
            "Tq < Tk": partial or _yes(self.partial_queries),
            "keys of their own a branch": _yes(self.own_keys),
            "Dv != Dk": _yes(self.value_head_dim),
            "head dims": _words(self.head_dims),
            "group sizes": _words(self.groups),
            "tokens a sequence": _words(self.lengths),
            "longest sequence tried": str(self.longest),
            "compression": ", ".join(sorted(self.compressions)),
            "blocks": _words(self.config),
            "indices in any order": _yes(self.any_indices),
            "queries without a block": _yes(self.empty_queries),
            "branches that are off": _yes(self.branches_off),
            "checks of input": _yes(self.checks_input),
            "NaN in hidden tokens": _yes(self.hidden_values),
            "same bits whatever the": ", ".join(sorted(self.invariant)) or "no",
        }


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _yes(there: bool) -> str:
    return "yes" if there else "no"


def _words(supports: Callable[..., bool]) -> str:
    if isinstance(supports, Sizes):
        return str(supports)
    if supports is Implementation.config:
        return "any"
    return (supports.__doc__ or "some").splitlines()[0].rstrip(".")


ENTRY_POINTS = "nsa_validation.implementations"
"""The group of entry points by which another package names its implementations."""


@contextmanager
def needing(module: str, package: str) -> Iterator[None]:
    """Import a peer's `module` of the `package`; where that is not installed, the error names the extra `peers`."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != module:
            raise
        message = f"{package} is missing, a package of the extra `peers`: pip install 'nsa[peers]'"
        raise ModuleNotFoundError(message, name=module) from error


def shipped() -> list[str]:
    """Names of the implementations that ship with the harness: the modules of `adapters`."""
    return sorted(module.name for module in iter_modules([str(Path(__file__).with_name("adapters"))]))


def names() -> list[str]:
    """Every name `load` knows."""
    return sorted({*shipped(), *(point.name for point in entry_points(group=ENTRY_POINTS))})


def load(name: str) -> Implementation:
    """The implementation called `name`, or found at `package.module:object`.

    Raises:
        ValueError: no implementation has this name.
        ImportError: what it needs is not installed; the message names the extra.
        TypeError: the object neither is an `Implementation` nor makes one.
    """
    others = {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}
    if name in shipped():
        place = f"{__package__}.adapters.{name}:{name}"
    else:
        place = others.get(name, name)
    module, colon, attribute = place.partition(":")
    if not colon:
        raise ValueError(f"name must be one of {names()} or package.module:object, got {name!r}")
    found: Any = import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    found = found() if callable(found) else found
    if not isinstance(found, Implementation):
        raise TypeError(f"{name} must be an Implementation or make one, got {type(found).__name__}")
    return found
