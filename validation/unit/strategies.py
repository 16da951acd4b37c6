"""Cases drawn at random within what an implementation says it can do, for tests of what holds for all of them.

They have a few hundred tokens at most and shrink to the fewest sequences, tokens, heads and dimensions that fail.
"""

import inspect
import random
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
from hypothesis import Phase, assume, example, given, seed, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from nsa.config import NSAConfig
from validation.implementations import Implementation
from validation.unit.cases import Case, config, whole

Blocks = tuple[int, int, int]

BLOCKS: list[Blocks] = [
    (stride * overlapping, stride, stride * longer)
    for stride in (1, 2, 3)
    for overlapping in (1, 2, 3)
    for longer in (overlapping, overlapping + 1, 4)
]
"""Small `(l, d, l')`, the simplest first; like the shapes below, of every kind: equal, disjoint, overlapping."""

COMPILED_SHAPES: list[tuple[Blocks, int, int, int]] = [
    ((16, 8, 16), 1, 16, 16),
    ((16, 16, 16), 3, 16, 32),
    ((16, 16, 32), 2, 24, 16),
    ((32, 16, 64), 4, 64, 64),
    ((32, 8, 32), 16, 48, 80),
]
"""Blocks, group, head dims of keys and of values. They are constants of kernels, which are compiled for each."""

FRESH_EXAMPLES = 10
"""As many at a time: then Hypothesis would turn to varying those it has, which shows less than others do."""

INTERPRETED_EXAMPLES = 4
INTERPRETED_TOKENS = 34

RELATIONS: dict[str, Callable[[NSAConfig], bool]] = {
    "any": lambda c: True,
    "l = d = l'": lambda c: c.compress_block_size == c.compress_stride == c.select_block_size,
    "l = l'": lambda c: c.compress_block_size == c.select_block_size,
    "l = d": lambda c: c.compress_block_size == c.compress_stride,
}
"""Special cases of block sizes, by name."""


def supports(impl: Implementation, case: Case) -> bool:
    """Whether a case is within the declared capabilities."""
    return (
        impl.config(case.config)
        and impl.groups(case.group)
        and impl.head_dims(case.key_dim)
        and impl.head_dims(case.value_dim)
        and (impl.value_head_dim or case.key_dim == case.value_dim)
        and (impl.packed or not case.packed)
        and (impl.partial_queries or all(queries == keys for queries, keys in case.lengths))
    )


def widest(impl: Implementation) -> torch.dtype:
    """The dtype that leaves least to rounding."""
    return min(impl.dtypes, key=lambda dtype: torch.finfo(dtype).eps)


@st.composite
def cases(
    draw: DrawFn,
    impl: Implementation,
    *,
    relation: str = "any",
    packed: bool | None = None,
    partial: bool = True,
    settings: Mapping[str, Any] | None = None,
    **fixed: Any,
) -> Case:
    """Cases of every structure.

    Args:
        relation: of the block sizes, from `RELATIONS`.
        packed: whether there are several sequences; either, unless given.
        partial: whether queries may be fewer than keys.
        settings: fields of the configuration that are not to be drawn.
        fixed: fields of the case that are not to be drawn; or strategies for them.
    """
    blocks, shape = draw(_shapes(impl, RELATIONS[relation]))
    packed = draw(st.booleans()) if packed is None and impl.packed else bool(packed)
    drawn = {
        "id": str(draw(st.integers(0, 999))),
        "lengths": draw(_lengths(impl, blocks, packed, partial and impl.partial_queries)),
        "config": config(blocks, **{**draw(_settings(blocks)), **(settings or {})}),
        "batch": 1 if packed else draw(st.integers(1, 2)),
        "kv_heads": draw(st.integers(1, 2)),
        "scale": draw(st.sampled_from([None, 0.5])),
        **shape,
        **{name: draw(x) if isinstance(x, SearchStrategy) else x for name, x in fixed.items()},
    }
    case = Case(**drawn)
    assume(supports(impl, case) and case.num_queries > 0)
    return case


@st.composite
def _shapes(draw: DrawFn, impl: Implementation, related: Callable[[NSAConfig], bool]) -> tuple[Blocks, dict[str, int]]:
    """Block sizes, group and head dims."""
    small = [blocks for blocks in BLOCKS if impl.config(config(blocks)) and related(config(blocks))]
    if small:
        dims = st.integers(1, 9)
        shape = {"group": draw(st.integers(1, 4)), "key_dim": draw(dims), "value_dim": draw(dims)}
        return draw(st.sampled_from(small)), shape
    shapes = [shape for shape in COMPILED_SHAPES if impl.config(config(shape[0])) and related(config(shape[0]))]
    shapes = shapes[: 1 if impl.interpreted else None]
    blocks, group, key_dim, value_dim = draw(st.sampled_from(shapes))
    return blocks, {"group": group, "key_dim": key_dim, "value_dim": value_dim if impl.value_head_dim else key_dim}


@st.composite
def _lengths(draw: DrawFn, impl: Implementation, blocks: Blocks, packed: bool, partial: bool) -> Any:
    """`(Tq, Tk)` of one sequence, or of several, empty ones among them."""
    most = INTERPRETED_TOKENS if impl.interpreted else max(24, 5 * blocks[2])
    edges = [edge for size in blocks for edge in (size - 1, size, size + 1) if edge <= most]
    tokens = st.integers(0, most) | st.sampled_from(edges)
    several = st.lists(tokens, min_size=2, max_size=2 if impl.interpreted else 4)
    keys = draw(several) if packed else [max(1, draw(tokens))]
    if not partial or draw(st.booleans()):
        return whole(*keys)
    return tuple((draw(st.integers(0 if packed else 1, count)), count) for count in keys)


@st.composite
def _settings(draw: DrawFn, blocks: Blocks) -> dict[str, Any]:
    """The rest of a configuration, as `cases.config` takes it."""
    initial, local, free = draw(st.integers(0, 2)), draw(st.integers(0, 2)), draw(st.integers(0, 4))
    return {
        "selected": max(1, initial + local + free),
        "num_initial_blocks": initial,
        "num_local_blocks": local,
        "window": draw(st.integers(1, 3 * blocks[2])),
        "compression": draw(st.sampled_from(["mean", "linear", "mlp"])),
    }


def for_all(
    *examples: Mapping[str, Any], **strategies: Callable[[Implementation], SearchStrategy[Any]]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a test of `impl` and drawn arguments one of `impl`: `@for_all(case=cases)`; marks go above it.

    Args:
        examples: tried first, by all implementations that support their `case`: what failed once.
        strategies: of the arguments that are drawn, each made for the implementation.
    """

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(test)

        @wraps(test, updated=())
        def run(impl: Implementation, **parameters: Any) -> None:
            tried = [known for known in examples if supports(impl, known["case"])]
            for profile in _profiles(impl):

                @wraps(test)
                def check(**drawn: Any) -> None:
                    test(impl, **parameters, **drawn)

                check.__signature__ = signature.replace(  # type: ignore[attr-defined]
                    parameters=[inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in strategies]
                )
                while tried:
                    check = example(**tried.pop())(check)
                if profile.derandomize:
                    # Python's generator is seeded from the test's id; Hypothesis would know no more than its source.
                    check = seed(random.getrandbits(32))(check)
                given(**{name: strategy(impl) for name, strategy in strategies.items()})(profile(check))()

        kept = [parameter for name, parameter in signature.parameters.items() if name not in strategies]
        run.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
        return run

    return decorate


def _profiles(impl: Implementation) -> list[settings]:
    """The profile in parts of fresh examples; few, and none made smaller, where each takes seconds."""
    profile = settings()
    if impl.interpreted:
        few = max(INTERPRETED_EXAMPLES, profile.max_examples // 20)
        return [settings(profile, max_examples=few, phases=set(Phase) - {Phase.shrink, Phase.explain})]
    return [settings(profile, max_examples=FRESH_EXAMPLES)] * max(1, profile.max_examples // FRESH_EXAMPLES)
