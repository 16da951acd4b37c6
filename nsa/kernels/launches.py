"""Records what a launcher does on the host, its launches and its memory, and repeats it.

A launcher looks up configurations, computes grids and strides, makes tensor descriptors and passes some 40 arguments
through Triton's binder: 20 to 50 us a launch. All of that follows from the shapes, strides, types and alignment of its
tensors and from its other arguments. So the second call with the same ones is recorded: what memory it takes and frees,
which compiled kernels it starts, and where their arguments point to. Later calls take memory and start the kernels with
the new addresses, which is all that differs.

A recording is only of memory that is taken or filled, of views and of our own kernels. A launcher that does anything
else (a copy of what is not contiguous, a matrix product) is not repeated but called, as all of them are under the
interpreter, where something looks at operators or launches, and inside `direct`.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from nsa.kernels.configs import forget_with

Function = TypeVar("Function", bound=Callable[..., Any])

_LARGEST = 1024
"""Recordings kept of one launcher."""

_SMALL = 1 << 20
"""Bytes up to which workspaces lie in one piece of memory for the whole of a recording: taking memory has its price."""

_ALIGNED = 512
"""Bytes, as PyTorch's allocator aligns what it gives."""

_state = threading.local()
_directly = 0


@contextmanager
def direct() -> Iterator[None]:
    """Launchers are called inside the context, in every thread: for what watches or replaces a part of them."""
    global _directly
    _directly += 1
    try:
        yield
    finally:
        _directly -= 1


class Kernel(JITFunction):
    """A kernel whose launches can be written down, and whose products and sums are fused whatever Triton's default is.

    Bits depend on it, and releases of Triton differ.
    """

    def run(self, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kwargs.setdefault("enable_fp_fusion", True)
        compiled = super().run(*args, grid=grid, warmup=warmup, **kwargs)
        recorder = getattr(_state, "recorder", None)
        if recorder is not None and not warmup:
            binder = self.device_caches[triton.runtime.driver.active.get_current_device()][-1]
            recorder.launch(compiled, grid, binder(*args, **kwargs)[0].values())
        return compiled


def recordable(*, gluon: bool = False, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`triton.jit`, or `gluon.jit`, for kernels that launchers start; options as these take them."""
    if gluon:
        from triton.experimental.gluon._runtime import GluonJITFunction

        return lambda function: type("GluonKernel", (Kernel, GluonJITFunction), {})(function, **options)
    if triton.knobs.runtime.interpret:
        return triton.jit(**options)
    return lambda function: Kernel(function, **options)


class _Place(NamedTuple):
    """An address: bytes from the beginning of an input or of memory that was taken, by their number."""

    memory: int
    offset: int


class _Taken(NamedTuple):
    """Memory that was taken, and what it was filled with."""

    number: int
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    fill: float | None
    nbytes: int


class _Freed(NamedTuple):
    number: int


class _Output(NamedTuple):
    """A tensor that is returned: all of the memory that was taken for it, or a view (`layout`) of some."""

    memory: int
    layout: tuple[Any, Any, int] | None


class _Address:
    """An address where Triton asks for a tensor."""

    def __init__(self, address: int) -> None:
        self.address = address

    def data_ptr(self) -> int:
        return self.address


Step = Callable[[list[int], list[Any], int], None]
"""Something to do again with addresses and tensors by number, on a stream."""


class _Unknown(Exception):
    """A launcher does what no recording is made of."""


def _take(taken: _Taken) -> Step:
    number, size, stride, dtype, device, fill, _ = taken

    def step(addresses: list[int], tensors: list[Any], stream: int) -> None:
        tensors[number] = x = torch.empty_strided(size, stride, dtype=dtype, device=device)
        addresses[number] = x.data_ptr()
        if fill is not None:
            x.fill_(fill)

    return step


def _take_small(places: dict[int, int], nbytes: int, device: torch.device) -> Step:
    pairs, last = list(places.items()), max(places)

    def step(addresses: list[int], tensors: list[Any], stream: int) -> None:
        tensors[last] = memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        start = memory.data_ptr()
        for number, offset in pairs:
            addresses[number] = start + offset

    return step


def _fill(number: int, value: float) -> Step:
    return lambda addresses, tensors, stream: tensors[number].fill_(value)


def _free(number: int) -> Step:
    def step(addresses: list[int], tensors: list[Any], stream: int) -> None:
        tensors[number] = None

    return step


def _is_descriptor(value: Any) -> bool:
    """Whether an argument is a tensor descriptor, Triton's or Gluon's: two classes with nothing but names in common."""
    return hasattr(value, "block_shape")


def _again(value: Any, addresses: list[int]) -> Any:
    """An argument of a kernel, with the addresses of this call for the places of the recorded one."""
    if isinstance(value, _Place):
        return addresses[value.memory] + value.offset
    if _is_descriptor(value):
        copy = object.__new__(type(value))
        copy.__dict__.update(value.__dict__, base=_Address(_again(value.base, addresses)))
        return copy
    return tuple(_again(x, addresses) for x in value) if isinstance(value, tuple) else value


def _has_place(value: Any) -> bool:
    if isinstance(value, tuple) and not isinstance(value, _Place):
        return any(map(_has_place, value))
    return isinstance(value, _Place) or _is_descriptor(value)


def _launch(compiled: Any, grid: Sequence[int], values: list[Any]) -> Step:
    x, y, z = (*grid, 1, 1)[:3]
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    # Most arguments are addresses of tensors; descriptors and tuples take longer.
    places = [(i, *value) for i, value in enumerate(values) if isinstance(value, _Place)]
    others = [(i, v) for i, v in enumerate(values) if _has_place(v) and not isinstance(v, _Place)]

    def step(addresses: list[int], tensors: list[Any], stream: int) -> None:
        arguments = values.copy()
        for i, memory, offset in places:
            arguments[i] = addresses[memory] + offset
        for i, value in others:
            arguments[i] = _again(value, addresses)
        run(x, y, z, stream, function, metadata, None, None, None, *arguments)

    return step


_TAKEN = {
    getattr(getattr(torch.ops.aten, name), overload)
    for name, overload in (
        ("empty", "memory_format"), ("empty_like", "default"), ("empty_strided", "default"),
        ("new_empty", "default"), ("new_empty_strided", "default"),
    )
}  # fmt: skip
_FILLED = {torch.ops.aten.zeros.default, torch.ops.aten.new_zeros.default, torch.ops.aten.zeros_like.default}
_FULL = {torch.ops.aten.full.default: 1, torch.ops.aten.new_full.default: 2, torch.ops.aten.full_like.default: 1}


def _is_view(operator: Any) -> bool:
    returned = operator._schema.returns
    return bool(returned) and all(x.alias_info is not None and not x.alias_info.is_write for x in returned)


class _Recorder(TorchDispatchMode):
    """Writes down what a launcher does, given its tensors."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.inputs, self.steps = inputs, list[Step | _Taken | _Freed]()
        self.known = not any(x.get_device() != torch.cuda.current_device() for x in inputs)
        self._spans = [(x.data_ptr(), x.data_ptr() + _span(x)) for x in inputs]
        self._alive: dict[int, StorageWeakRef] = {}
        self.taken: dict[int, _Taken] = {}
        self._filled = set[int]()
        self._relations = set[tuple[int, int, int]]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._free()
        out = function(*args, **(kwargs or {}))
        with torch.utils._python_dispatch._disable_current_modes():
            try:
                self._write_down(function, args, out)
            except _Unknown:
                self.known = False
        return out

    def _write_down(self, function: Any, args: Any, out: Any) -> None:
        if function in _TAKEN:
            self._taken(out, None)
        elif function in _FILLED:
            self._taken(out, 0.0)
        elif function in _FULL:
            self._taken(out, args[_FULL[function]])
        elif function in (torch.ops.aten.zero_.default, torch.ops.aten.fill_.Scalar):
            output = self.output(args[0])
            if output.layout is not None:
                raise _Unknown
            self._filled.add(output.memory)
            self.steps.append(_fill(output.memory, args[1] if len(args) > 1 else 0.0))
        elif not _is_view(function):
            raise _Unknown

    def _taken(self, x: Tensor, fill: float | None) -> None:
        number = len(self._spans)
        if x.get_device() != torch.cuda.current_device():
            raise _Unknown
        storage = x.untyped_storage()
        self._spans.append((x.data_ptr(), x.data_ptr() + storage.nbytes()))
        self._alive[number] = StorageWeakRef(storage)
        self.taken[number] = _Taken(number, x.shape, x.stride(), x.dtype, x.device, fill, storage.nbytes())
        self.steps.append(self.taken[number])

    def _free(self) -> None:
        for number in [number for number, storage in self._alive.items() if storage.expired()]:
            del self._alive[number]
            self.steps.append(_Freed(number))

    def finish(self, outputs: Any) -> "Recording":
        """The recording, given what is returned: small workspaces get one piece of memory."""
        kept = self._filled | {output.memory for output in _each(outputs)}
        small, nbytes = dict[int, int](), 0
        for number, taken in self.taken.items():
            if taken.fill is None and taken.nbytes <= _SMALL and number not in kept:
                small[number] = nbytes
                nbytes += -(-taken.nbytes // _ALIGNED) * _ALIGNED
        steps: list[Step] = []
        if small:
            steps.append(_take_small(small, nbytes, self.taken[next(iter(small))].device))
        for step in self.steps:
            if isinstance(step, _Taken | _Freed):
                if step.number not in small:
                    steps.append(_take(step) if isinstance(step, _Taken) else _free(step.number))
            else:
                steps.append(step)
        return Recording(steps, len(self.taken), outputs, torch.cuda.current_device(), tuple(self._relations))

    def launch(self, compiled: Any, grid: Any, values: Any) -> None:
        """Writes down that a kernel was started."""
        with torch.utils._python_dispatch._disable_current_modes():
            try:
                self.steps.append(_launch(compiled, grid, [self._placed(value) for value in values]))
            except _Unknown:
                self.known = False

    def _placed(self, value: Any) -> Any:
        """An argument of a kernel, with places for its addresses."""
        if isinstance(value, Tensor):
            return self._place(value) if value.numel() else 0
        if _is_descriptor(value):
            copy = object.__new__(type(value))
            copy.__dict__.update(value.__dict__, base=self._place(value.base))
            return copy
        if isinstance(value, tuple):
            entries = [self._placed(x) for x in value]
            return type(value)(*entries) if hasattr(value, "_fields") else tuple(entries)
        return value

    def _place(self, x: Tensor) -> _Place:
        address, number_of_inputs = x.data_ptr(), len(self.inputs)
        for number in sorted(self._alive, reverse=True):
            start, stop = self._spans[number]
            if start <= address < stop:
                return _Place(number, address - start)
        found = [i for i in range(number_of_inputs) if self._spans[i][0] <= address < self._spans[i][1]]
        if not found:
            raise _Unknown
        # It may be of any of these. Whose it is does not matter as long as they lie in the same way to one another.
        first, *others = (self._spans[i][0] for i in found)
        self._relations |= {(found[0], i, first - other) for i, other in zip(found[1:], others, strict=True)}
        return _Place(found[0], address - first)

    def output(self, x: Tensor) -> _Output:
        """How to make a tensor that lies in memory that was taken."""
        place, number_of_inputs = self._place(x) if x.numel() else self._empty(x), len(self.inputs)
        if place.memory < number_of_inputs:
            raise _Unknown
        taken = self.taken[place.memory]
        if x.dtype != taken.dtype:
            raise _Unknown
        if (x.shape, x.stride(), place.offset) == (taken.size, taken.stride, 0):
            return _Output(place.memory, None)
        return _Output(place.memory, (x.shape, x.stride(), place.offset // x.element_size()))

    def _empty(self, x: Tensor) -> _Place:
        for number, storage in self._alive.items():
            if storage.cdata == x.untyped_storage()._cdata:
                return _Place(number, 0)
        raise _Unknown


def _span(x: Tensor) -> int:
    """Bytes from the first to the end of the last element."""
    if not x.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (last + 1) * x.element_size()


class Recording:
    """Repeats what a launcher did with inputs of some kind, with other inputs of the same kind."""

    def __init__(
        self,
        steps: Sequence[Step],
        count: int,
        outputs: Any,
        device: int,
        relations: tuple[tuple[int, int, int], ...],
    ) -> None:
        self._steps, self._count, self._outputs, self._device = steps, count, outputs, device
        self._relations = relations

    def fits(self, addresses: list[int]) -> bool:
        """Whether inputs that lay within one another lie in the same way to one another."""
        return all(addresses[i] - addresses[j] == distance for i, j, distance in self._relations)

    def __call__(self, addresses: list[int]) -> Any:
        """Does it with inputs at these addresses."""
        tensors: list[Any] = [None] * (len(addresses) + self._count)
        addresses += [0] * self._count
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        for step in self._steps:
            step(addresses, tensors, stream)
        return _returned(self._outputs, tensors)


def _returned(output: Any, tensors: list[Any]) -> Any:
    if output is None:
        return None
    if isinstance(output, _Output):
        x = tensors[output.memory]
        return x if output.layout is None else x.as_strided(*output.layout)
    return type(output)(_returned(each, tensors) for each in output)


def _each(outputs: Any) -> Iterator[_Output]:
    if isinstance(outputs, _Output):
        yield outputs
    elif outputs is not None:
        for output in outputs:
            yield from _each(output)


def _outputs(recorder: _Recorder, out: Any) -> Any:
    if out is None:
        return None
    return recorder.output(out) if isinstance(out, Tensor) else type(out)(_outputs(recorder, x) for x in out)


def _record(function: Callable[..., Any], inputs: tuple[Any, ...], tensors: list[Tensor]) -> tuple[Any, Any]:
    """Calls a launcher; also its recording, or None where none can be made."""
    recorder = _Recorder(tensors)
    _state.recorder = recorder
    try:
        with recorder:
            out = function(*inputs)
    finally:
        _state.recorder = None
    recording = None
    try:
        outputs = _outputs(recorder, out)
        if recorder.known:
            recording = recorder.finish(outputs)
    except _Unknown:
        pass
    return out, recording


def _watched() -> bool:
    """Whether something looks at operators or at launches."""
    runtime = triton.knobs.runtime
    hooks = (runtime.launch_enter_hook, runtime.launch_exit_hook)
    return torch._C._len_torch_dispatch_stack() > 0 or any(getattr(hook, "calls", hook) for hook in hooks)


_SEEN = object()


def recorded(function: Function) -> Function:
    """A launcher that is recorded the second time it gets inputs of a kind, and repeated from then on.

    Its inputs are tensors, lists of them and what can be hashed; it returns nothing, or a tensor, or a tuple or list of
    them, in memory of its own. What else it does follows from its other inputs and from the shapes, strides, dtypes,
    devices and alignment of the tensors.
    """
    if triton.knobs.runtime.interpret:
        return function
    recordings: dict[Any, Any] = {}
    forget_with(recordings.clear)

    @wraps(function)
    def call(*inputs: Any) -> Any:
        if _directly or _watched():
            return function(*inputs)
        key: list[Any] = [torch.cuda.current_device()]
        tensors: list[Tensor] = []
        if list in map(type, inputs):
            # Lists are as long as they are, and stand out from what is beside them.
            given = [y for x in inputs for y in ((len(x), list, *x) if isinstance(x, list) else (x,))]
        else:
            given = list(inputs)
        addresses: list[int] = []
        for x in given:
            if isinstance(x, Tensor):
                address = x.data_ptr()
                key += (x.shape, x.stride(), x.dtype, x.get_device(), address & 15)
                tensors.append(x)
                addresses.append(address)
            else:
                key.append(x)
        if len(set(addresses)) < len(addresses):
            key += [addresses.index(address) for address in addresses]
        kind = tuple(key)
        recording = recordings.get(kind)
        if recording is None:
            if len(recordings) >= _LARGEST:
                recordings.clear()
            recordings[kind] = _SEEN
            return function(*inputs)
        if recording is _SEEN:
            out, made = _record(function, inputs, tensors)
            recordings[kind] = made or function
            return out
        if recording is function or not recording.fits(addresses):
            return function(*inputs)
        return recording(addresses)

    return call  # type: ignore[return-value]
