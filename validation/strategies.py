"""Cases drawn at random within what an implementation says it can do, for tests of what holds for all of them.

They have a few hundred tokens at most and shrink to the fewest sequences, tokens, heads and dimensions that fail.
"""

import inspect
import random
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import Phase, assume, example, given, seed, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from nsa.config import NSAConfig

from . import seeds
from .cases import Case, config, fitted, whole
from .implementations import Implementation
from .seeds import seed_of

Blocks = tuple[int, int, int]
Shape = tuple[Blocks, int, int, int]
"""Blocks `(l, d, l')`, group, head dims of keys and of values."""

BLOCKS: list[Blocks] = [
    (stride * overlapping, stride, stride * longer)
    for stride in (1, 2, 3)
    for overlapping in (1, 2, 3)
    for longer in (overlapping, overlapping + 1, 4)
]
"""Small ones, the simplest first; like the shapes below, of every kind: equal, disjoint, overlapping."""

COMPILED_SHAPES: dict[Shape, tuple[int, int, int]] = {
    ((16, 8, 16), 2, 16, 16): (0, 0, 1),
    ((16, 16, 16), 16, 16, 16): (1, 2, 2),
    ((32, 16, 64), 3, 48, 80): (1, 2, 2),
}
"""For those who take no smaller ones, with how many blocks are initial, local and free: constants of kernels, which are
compiled for each."""

FRESH_EXAMPLES = 10
"""As many at a time: then Hypothesis would turn to varying those it has, which shows less than others do."""

INTERPRETED_EXAMPLES = 3
INTERPRETED_TOKENS = 34

RELATIONS: dict[str, Callable[[NSAConfig], bool]] = {
    "any": lambda c: True,
    "l = d = l'": lambda c: c.compress_block_size == c.compress_stride == c.select_block_size,
    "l = l'": lambda c: c.compress_block_size == c.select_block_size,
    "l = d": lambda c: c.compress_block_size == c.compress_stride,
}
"""Special cases of block sizes, by name."""


def cases(
    impl: Implementation,
    *,
    relation: str = "any",
    packed: bool | None = None,
    partial: bool = True,
    settings: Mapping[str, Any] | None = None,
    **fixed: Any,
) -> SearchStrategy[Case]:
    """Cases of every structure; skips the test where an implementation declares none of the kind.

    Args:
        relation: of the block sizes, from `RELATIONS`.
        packed: whether there are several sequences; either, unless given.
        partial: whether queries may be fewer than keys.
        settings: fields of the configuration that are not to be drawn.
        fixed: fields of the case that are not to be drawn; or strategies for them.
    """
    if packed and not impl.packed:
        pytest.skip(f"{impl.name} lacks packed sequences")
    shapes = _shapes(impl, RELATIONS[relation])
    if not shapes:
        pytest.skip(f"{impl.name} lacks blocks of {relation} sizes")
    return _cases(impl, shapes, packed if impl.packed else False, partial, settings or {}, fixed)


def relations(impl: Implementation) -> list[str]:
    """Those of `RELATIONS` that an implementation has blocks for."""
    return [name for name, related in RELATIONS.items() if _shapes(impl, related)]


@st.composite
def _cases(
    draw: DrawFn,
    impl: Implementation,
    shapes: list[Shape],
    packed: bool | None,
    partial: bool,
    settings: Mapping[str, Any],
    fixed: Mapping[str, Any],
) -> Case:
    shape = draw(st.sampled_from(shapes))
    blocks, group, key_dim, value_dim = shape
    small = blocks in BLOCKS
    if small:
        group, key_dim, value_dim = draw(st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)))
    packed, several = draw(st.booleans()) if packed is None else packed, st.integers(1, 1 if impl.interpreted else 2)
    drawn = {
        "id": str(draw(st.integers(0, 999))),
        "lengths": draw(_lengths(impl, blocks, packed, partial and impl.partial_queries)),
        "config": config(blocks, **{**draw(_settings(impl, shape)), **settings}),
        "batch": 1 if packed else draw(several),
        "kv_heads": draw(several) if small else 1 if impl.interpreted or group >= 4 else 2,
        "group": group,
        "key_dim": key_dim,
        "value_dim": value_dim if impl.value_head_dim else key_dim,
        "scale": draw(st.sampled_from([None, 0.5])),
        **{name: draw(x) if isinstance(x, SearchStrategy) else x for name, x in fixed.items()},
    }
    case = Case(**drawn)
    assume(_takes(impl, case) and case.num_queries > 0)
    return case


def _shapes(impl: Implementation, related: Callable[[NSAConfig], bool]) -> list[Shape]:
    """The small ones that an implementation takes, else those that are compiled; one where each call takes seconds."""

    def takes(shape: Shape) -> bool:
        blocks, group, key_dim, value_dim = shape
        chosen = config(blocks, compression=_compressions(impl)[0])
        # All other things as an implementation is most likely to have them.
        case = Case("", whole(5 * blocks[2]), chosen, group=group, key_dim=key_dim, value_dim=value_dim)
        return related(chosen) and _takes(impl, case)

    small = [(blocks, 1, 1, 1) for blocks in BLOCKS]
    found = [shape for shape in small if takes(shape)] or [shape for shape in COMPILED_SHAPES if takes(shape)]
    return found[: 1 if impl.interpreted else None]


def _takes(impl: Implementation, case: Case) -> bool:
    """Whether an implementation can do the case in every stage that it has."""
    return impl.lacks(case) is None and case.config.compression in _compressions(impl)


def _compressions(impl: Implementation) -> list[str]:
    """The simplest first; it matters to compression alone, so that who has none takes any."""
    return [kind for kind in ("mean", "linear", "mlp") if kind in impl.compressions or not impl.has("compress")]


@st.composite
def _lengths(draw: DrawFn, impl: Implementation, blocks: Blocks, packed: bool, partial: bool) -> Any:
    """`(Tq, Tk)` of one sequence, or of several, empty ones among them."""
    most = INTERPRETED_TOKENS // (1 + packed) if impl.interpreted else max(24, 5 * blocks[2])
    edges = [edge for size in blocks for edge in (size - 1, size, size + 1) if edge <= most]
    tokens = (st.integers(0, most) | st.sampled_from(edges)).filter(impl.lengths)
    several = st.lists(tokens, min_size=2, max_size=2 if impl.interpreted else 4)
    keys = draw(several) if packed else [max(1, draw(tokens))]
    if not partial or draw(st.booleans()):
        return whole(*keys)
    return tuple((draw(st.integers(0 if packed else 1, count)), count) for count in keys)


@st.composite
def _settings(draw: DrawFn, impl: Implementation, shape: Shape) -> dict[str, Any]:
    """The rest of a configuration, as `cases.config` takes it."""
    blocks = shape[0]
    free = 1 if impl.interpreted else 4  # of its tokens there are no more blocks
    tried: Iterable[tuple[int, int, int]] = product(range(3), range(3), range(free + 1))
    constants = blocks not in BLOCKS and not impl.interpreted
    if constants:  # the shape's own, or else those of another
        tried = sorted(COMPILED_SHAPES.values(), key=lambda counts: counts != COMPILED_SHAPES[shape])
    counts = [
        {"selected": max(1, initial + local + free), "num_initial_blocks": initial, "num_local_blocks": local}
        for initial, local, free in tried
    ]
    taken = [count for count in counts if impl.config(config(blocks, **count))]
    return {
        **draw(st.sampled_from(taken[:1] if constants else taken)),
        "window": draw(st.integers(1, 3 * blocks[2])),
        "compression": draw(st.sampled_from(_compressions(impl))),
    }


ANYTHING = Implementation("anything")
"""What no implementation takes part in is tried on cases of every kind."""


def for_all(
    *examples: Mapping[str, Any], **strategies: Callable[[Implementation], SearchStrategy[Any]]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a test of drawn arguments one without: `@for_all(case=cases)`; marks go above it.

    To Hypothesis and its pytest plugin it is a test like any under `@given`: `--hypothesis-seed` and
    `--hypothesis-show-statistics` (of the last examples tried at a time) work, and so do `@seed` and
    `@reproduce_failure` above it.

    Args:
        examples: tried first, their `case` fitted to the implementation: what failed once. They are larger than what
            the interpreter has time for.
        strategies: of the arguments that are drawn, each made for the implementation under test.
    """

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(test)

        # What Hypothesis's plugin looks at; the strategies are not known before the implementation is.
        @wraps(given(**{name: st.nothing() for name in strategies})(test))
        def run(**parameters: Any) -> None:
            impl = parameters.get("impl", ANYTHING)
            known = [] if impl.interpreted else [{**each, "case": fitted(impl, each["case"])} for each in examples]
            known = [each for each in known if _takes(impl, each["case"])]
            for profile in _profiles(impl):

                @wraps(test)
                def check(**drawn: Any) -> None:
                    # An example is the same numbers each time: when it is made smaller, when it is tried again.
                    torch.manual_seed(seed_of(repr(drawn)))
                    test(**parameters, **drawn)

                check.__signature__ = signature.replace(  # type: ignore[attr-defined]
                    parameters=[inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in strategies]
                )
                while known:
                    check = example(**known.pop())(check)
                if profile.derandomize:
                    # Python's generator is seeded from the test's id; Hypothesis would know no more than its source.
                    own = random.getrandbits(32)
                    check = seed(own if seeds.forced is None else seeds.forced)(check)
                tested = given(**{name: strategy(impl) for name, strategy in strategies.items()})(profile(check))
                asked_for = [_hand_over(name, run, tested) for name in ASKED_FOR]
                tested()
                if any(asked_for):  # another part would do the same
                    break

        kept = [parameter for name, parameter in signature.parameters.items() if name not in strategies]
        run.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
        return run

    return decorate


ASKED_FOR = ("_hypothesis_internal_use_seed", "_hypothesis_internal_use_reproduce_failure")
"""Where `@seed` and `@reproduce_failure` leave what they are given on a test."""


def _hand_over(name: str, test: Any, other: Any) -> bool:
    """Gives another test what is asked of one, if anything is."""
    asked = getattr(test, name, None)
    if asked is not None:
        setattr(other, name, asked)
    return asked is not None


def _profiles(impl: Implementation) -> list[settings]:
    """The profile in parts of fresh examples; few, and none made smaller, where each takes seconds."""
    profile = settings()
    if impl.interpreted:
        few = max(INTERPRETED_EXAMPLES, profile.max_examples // 20)
        return [settings(profile, max_examples=few, phases=set(Phase) - {Phase.shrink, Phase.explain})]
    return [settings(profile, max_examples=FRESH_EXAMPLES)] * max(1, profile.max_examples // FRESH_EXAMPLES)
