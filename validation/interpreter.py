"""Triton's interpreter, made fast enough for a CPU to put every kernel through every case, and to round as GPUs do.

Of the time an operation takes under the interpreter, NumPy has a small part. Most goes into finding out again, for
each operation of each program, what does not change. `accelerate` sees to these places; results stay the same, bit for
bit:

- `triton.language` is made to interpret when a kernel is launched, and again whenever one function calls another,
  attribute by attribute. Here that happens once and for good: such a process compiles nothing.
- An operation checks types, converts and broadcasts before it computes, the same for all operands of the same types.
  Here that is found out by the first (`validation.interpreted`).
- A tensor describes its shape, and a block type spells its name, anew for every result. Both follow from the type: here
  the second of a kind copies the first.
- The NumPy dtype of a Triton dtype is looked up in a dictionary made for the purpose. Here it is remembered.
- Whether an array is too wide for its Triton dtype is asked of every array. Here it is not.
- NumPy's functions that broadcast an array or add an axis take longer than a copy of a small array, or an index. Here a
  copy is made, or the array is indexed.
- Whether a sum or product of integers overflows is found out by several more interpreted operations, and then ignored
  unless Triton is being debugged. Here it is not asked.
- Coverage follows every line of every program, to leave kernels out of its report. Here it does not follow them.

Kernels of other people that tune themselves at the first call find no clock there: they get the first configuration.

Triton 3.6 to 3.9 have these places.

`round_to_nearest` does change results. Where a GPU rounds a float32 to the nearest bfloat16, the interpreter cuts it
off: twice as far from it on average, and always towards zero, so that errors add up which else cancel.

`keep_conditions` mends a fault: a condition on a scalar becomes a block of integers, which loads of Triton 3.9 refuse
as a mask.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np


@cache
def accelerate() -> bool:
    """Speeds up Triton's interpreter, where this process uses it and it is as described above; returns whether it did.

    There is no way back.
    """
    import triton.language as tl
    from triton import knobs
    from triton.runtime import autotuner, interpreter

    from .interpreted import repeating

    places = ("_patch_lang", "_patch_attr", "_get_np_dtype", "interpreter_builder", "GridExecutor")
    if not knobs.runtime.interpret or not all(hasattr(interpreter, place) for place in places):
        return False

    builder = interpreter.interpreter_builder
    decorate = repeating(builder)
    interpreter._patch_attr = lambda place, name, member, *rest: setattr(place, name, decorate(member))
    # Whatever a function has the language from, the one module or the other, it finds it patched.
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda function: SimpleNamespace(restore=lambda: None)
    tl.tensor.__index__ = lambda self: self.handle.data.item()  # that of Triton 3.6 fails with NumPy 2.4
    interpreter._get_np_dtype = _remembering(interpreter._get_np_dtype)
    handle = interpreter.TensorHandle
    handle.__init__ = _unasked
    kind = type(builder)
    kind.create_broadcast = lambda self, x, shape: handle(_broadcast(x.data, shape), x.dtype.scalar)
    kind.create_expand_dims = lambda self, x, axis: handle(x.data[(slice(None),) * axis + (None,)], x.dtype.scalar)
    tl.tensor.__init__ = _copying_tensors(tl.tensor.__init__)
    tl.block_type.__init__ = _copying_block_types(tl.block_type.__init__, tl.constexpr)
    builder.options = replace(builder.options, sanitize_overflow=builder.options.debug)
    interpreter.GridExecutor.__call__ = _unfollowed(interpreter.GridExecutor.__call__)
    autotuner.Autotuner.do_bench = lambda self, call, quantiles: [1.0 for _ in quantiles]
    return True


@cache
def round_to_nearest() -> None:
    """Makes a float32 the nearest bfloat16 in the interpreter, of two as near the even one. There is no way back."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, target)
        bits = source.data.view(np.uint32).astype(np.uint64)
        nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        return TensorHandle(np.where(np.isnan(source.data), 0x7FC0, nearest).astype(np.uint16), target.scalar)

    InterpreterBuilder.cast_impl = cast_impl


@cache
def keep_conditions() -> None:
    """Makes blocks of conditions from scalar conditions, whatever was compared. There is no way back."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    splat = InterpreterBuilder.create_splat

    def create_splat(self: Any, kind: Any, scalar: Any) -> Any:
        # What comparing integers gave is labelled as an integer.
        return splat(self, kind, TensorHandle(scalar.data, tl.int1) if scalar.data.dtype == np.bool_ else scalar)

    InterpreterBuilder.create_splat = create_splat


def _unasked(self: Any, data: Any, dtype: Any, attr: dict[str, Any] | None = None) -> None:
    self.data, self.dtype, self.attr = data, dtype, attr or {}


def _broadcast(x: Any, shape: Any) -> Any:
    out = np.empty(shape, x.dtype)
    out[...] = x
    return out


def _remembering(numpy_dtype: Callable[..., Any]) -> Callable[..., Any]:
    known: dict[str, Any] = {}

    def remember(dtype: Any) -> Any:
        # By name: not every dtype can be hashed.
        if dtype.name not in known:
            known[dtype.name] = numpy_dtype(dtype)
        return known[dtype.name]

    return remember


def _copying_tensors(construct: Callable[..., None]) -> Callable[..., None]:
    known: dict[str, dict[str, Any]] = {}

    def init(self: Any, handle: Any, type: Any) -> None:
        attributes = known.get(type.name)
        if attributes is None:
            construct(self, handle, type)
            known[type.name] = {name: value for name, value in vars(self).items() if name != "handle"}
        else:
            vars(self).update(attributes)
            self.handle = handle

    return init


def _copying_block_types(construct: Callable[..., None], constexpr: Any) -> Callable[..., None]:
    known: dict[tuple[Any, ...], dict[str, Any]] = {}

    def init(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, *[size.value if isinstance(size, constexpr) else size for size in shape]
        attributes = known.get(key)
        if attributes is None:
            construct(self, element_ty, shape)
            known[key] = dict(vars(self))
        else:
            vars(self).update(attributes)

    return init


def _unfollowed(launch: Callable[..., None]) -> Callable[..., None]:
    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        tracer = sys.gettrace()
        # Debuggers trace too, and are to stop in kernels.
        if not type(tracer).__module__.startswith("coverage"):
            return launch(self, *args, **kwargs)
        sys.settrace(None)
        try:
            return launch(self, *args, **kwargs)
        finally:
            sys.settrace(tracer)

    return call
