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
    tensor = tl.tensor

    def decorate(operation: Callable[..., Any]) -> Callable[..., Any]:
        known: dict[Any, Any] = {}

        def repeat(*args: Any, _semantic: Any = None, **kwargs: Any) -> Any:
            if semantic.builder is not builder:  # an operation within one whose calls are being noted
                return operation(*args, **kwargs, _semantic=semantic)
            tensors: list[Any] = []
            kinds: list[Any] = []
            try:
                for x in args:
                    if type(x) is tensor:  # as `_kind` has it, without a call
                        tensors.append(x)
                        kinds.append(x.type.name)
                    else:
                        kinds.append(_kind(x, tensors))
                for name, x in kwargs.items():
                    kinds.append((name, _kind(x, tensors)))
                kind = tuple(kinds)
                steps = known.get(kind)
            except TypeError:
                return operation(*args, **kwargs, _semantic=semantic)
            if steps:
                return steps(*tensors)
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
    known = type(x)
    if known is tl.constexpr:
        return known, _kind(x.value, tensors)
    if known is tl.tensor:
        tensors.append(x)
        return x.type.name
    if isinstance(x, (tuple, list, tl.tuple)):
        return known, *[_kind(part, tensors) for part in x]
    if isinstance(x, tl.core.base_value):
        raise TypeError(f"{known.__name__} stands for memory")
    # Slices have no hash before Python 3.12. 0.0 and -0.0 are one kind: Triton takes every zero constant as 0.0.
    return known, repr(x) if known is slice else x


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
) -> Callable[..., Any] | None:
    """A function that repeats the calls for other tensors; None where they use or give what it cannot follow."""
    if result is not None and type(result) is not tl.tensor:
        return None
    # Names of handles by identity: those of the tensors, then one a call that is to be repeated.
    names = {id(x.handle): f"x{place}.handle" for place, x in enumerate(tensors)}
    constants: set[int] = set()
    given: dict[str, Any] = {}
    lines = [f"def repeat({', '.join(f'x{place}' for place in range(len(tensors)))}):"]
    for number, (name, args, made) in enumerate(calls):
        for x in args:
            parts = x if isinstance(x, (list, tuple)) else ()
            foreign = isinstance(x, TensorHandle) and id(x) not in names and id(x) not in constants
            if foreign or any(isinstance(part, TensorHandle) for part in parts):
                return None
        varying = [names.get(id(x)) for x in args]
        if not any(varying) and name.startswith(CONSTANT):
            constants.add(id(made))
            continue
        given |= {f"call{number}": getattr(builder, name)}
        given |= {f"constant{number}_{at}": x for at, x in enumerate(args)}
        passed = ", ".join(x or f"constant{number}_{at}" for at, x in enumerate(varying))
        lines.append(f"    made{number} = call{number}({passed})")
        names[id(made)] = f"made{number}"

    if result is not None and result.handle is not None:  # Triton 3.9 gives something of a store
        handle = "constant" if id(result.handle) in constants else names.get(id(result.handle))
        if handle is None:
            return None
        # Without the constructor, which would look up what is known here.
        attributes = {name: value for name, value in vars(result).items() if name != "handle"}
        given |= {"attributes": attributes, "constant": result.handle, "tensor": tl.tensor, "new": object.__new__}
        lines += ["    result = new(tensor)", "    result.__dict__.update(attributes)"]
        lines += [f"    result.handle = {handle}", "    return result"]
    exec("\n".join([*lines, "    return None"]), given)
    repeat: Callable[..., Any] = given["repeat"]
    return repeat
