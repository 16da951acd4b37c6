"""Operations of Triton's interpreter that find out only once what their types decide.

An operation checks types, converts, broadcasts and only then computes. It does so by calls of a builder, and which
calls they are follows from the types of its tensors and the values of all else. The first operation of a kind notes its
calls, and the others repeat them.
"""

from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime.interpreter import TensorHandle

MOST_KINDS = 10_000
"""Kinds of one operation that are remembered: numbers are part of a kind, and loops count far."""


def repeating(builder: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator for builtins of `triton.language`, which the interpreter's builder is to carry out."""
    semantic = TritonSemantic(builder)

    def decorate(operation: Callable[..., Any]) -> Callable[..., Any]:
        known: dict[Any, Any] = {}

        def repeat(*args: Any, _semantic: Any = None, **kwargs: Any) -> Any:
            if semantic.builder is not builder:  # an operation within one whose calls are being noted
                return operation(*args, **kwargs, _semantic=semantic)
            tensors: list[Any] = []
            try:
                kind = *[_kind(x, tensors) for x in args], *[(name, _kind(x, tensors)) for name, x in kwargs.items()]
                steps = known.get(kind)
            except TypeError:
                return operation(*args, **kwargs, _semantic=semantic)
            if steps:
                return steps(tensors)
            if steps is False:
                return operation(*args, **kwargs, _semantic=semantic)
            semantic.builder = notes = _Notes(builder)
            try:
                result = operation(*args, **kwargs, _semantic=semantic)
            finally:
                semantic.builder = builder
            # Notes do not say which of two arguments was used where both are one tensor.
            if len({id(x.handle) for x in tensors}) == len(tensors):
                if len(known) == MOST_KINDS:
                    known.clear()
                known[kind] = _steps(builder, notes.calls, tensors, result) or False
            return result

        return repeat

    return decorate


def _kind(x: Any, tensors: list[Any]) -> Any:
    """The type of a tensor, which is appended to `tensors`; the value of anything else.

    Raises:
        TypeError: for what has no value that can be looked up.
    """
    if type(x) is tl.tensor:
        tensors.append(x)
        return x.type.name
    if isinstance(x, (tuple, list, tl.tuple)):
        return type(x), *[_kind(part, tensors) for part in x]
    if isinstance(x, tl.constexpr):
        return tl.constexpr, _kind(x.value, tensors)
    if isinstance(x, tl.core.base_value):
        raise TypeError(f"{type(x).__name__} stands for memory")
    # Slices have no hash before Python 3.12. 0.0 and -0.0 are one kind: Triton takes every zero constant as 0.0.
    return type(x), repr(x) if isinstance(x, slice) else x


class _Notes:
    """A builder that passes calls on to another and notes them."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder
        self.calls: list[tuple[str, tuple[Any, ...], Any]] = []

    def __getattr__(self, name: str) -> Any:
        member = getattr(self.builder, name)
        if not callable(member):
            return member

        def call(*args: Any) -> Any:
            result = member(*args)
            self.calls.append((name, args, result))
            return result

        return call


CONSTANT = ("get_", "create_splat", "create_int_cast", "create_si_to_fp", "create_fp_ext", "create_fp_trunc")
"""Starts of the names of calls that give the same again where no argument comes of a tensor."""


def _steps(
    builder: Any, calls: list[tuple[str, tuple[Any, ...], Any]], tensors: list[Any], result: Any
) -> Callable[[list[Any]], Any] | None:
    """A function that repeats the calls for other tensors; None where they use or give what it cannot follow."""
    if result is not None and type(result) is not tl.tensor:
        return None
    # Handles by identity: those of the tensors, then one a call that is to be repeated.
    places = {id(x.handle): place for place, x in enumerate(tensors)}
    constants: set[int] = set()
    program: list[tuple[Callable[..., Any], list[Any], list[tuple[int, int]]]] = []
    for name, args, made in calls:
        varying = [(at, places[id(x)]) for at, x in enumerate(args) if id(x) in places]
        for x in args:
            parts = x if isinstance(x, (list, tuple)) else ()
            foreign = isinstance(x, TensorHandle) and id(x) not in places and id(x) not in constants
            if foreign or any(isinstance(part, TensorHandle) for part in parts):
                return None
        if not varying and name.startswith(CONSTANT):
            constants.add(id(made))
            continue
        places[id(made)] = len(tensors) + len(program)
        program.append((getattr(builder, name), list(args), varying))

    if result is None or result.handle is None:  # what Triton 3.9 gives of a store
        last, kind = None, None
    elif id(result.handle) in constants:
        return lambda tensors: tl.tensor(result.handle, result.type)
    elif id(result.handle) in places:
        last, kind = places[id(result.handle)], result.type
    else:
        return None

    def repeat(tensors: list[Any]) -> Any:
        values = [x.handle for x in tensors]
        for call, args, varying in program:
            for at, place in varying:
                args[at] = values[place]
            values.append(call(*args))
        return None if last is None else tl.tensor(values[last], kind)

    return repeat
