"""Launchers that are written down and done again (`nsa.kernels.launches`), with kernels in Python: no GPU is needed.

The kernels of these tests read and write the addresses that they are given, as those of a GPU would.
"""

import ctypes
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from nsa.kernels import launches
from nsa.kernels.configs import override
from nsa.kernels.launches import Recording, direct, recorded
from validation.numerics import assert_matches


@pytest.fixture(autouse=True)
def on_a_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors are launched on, and the interpreter is none."""
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
    monkeypatch.setattr(launches, "_directly", 0)  # where tests replace something it is not


def address(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(address, value))
    value = value.base if isinstance(value, TensorDescriptor | GluonDescriptor) else value
    return value.data_ptr() if hasattr(value, "data_ptr") else value


def floats(at: int, count: int) -> Any:
    return (ctypes.c_float * count).from_address(at)


class Kernel:
    """A Python function of addresses and numbers, launched as Triton's kernels are."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function
        self.grids: list[tuple[int, ...]] = []
        self.compiled = SimpleNamespace(run=self.run, function=function, packed_metadata="metadata")

    def run(self, x: int, y: int, z: int, stream: int, function: Any, metadata: str, *rest: Any) -> None:
        assert (stream, metadata, rest[:3]) == (7, "metadata", (None, None, None))
        self.grids.append((x, y, z))
        function(*map(address, rest[3:]))

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any) -> None:
            self.compiled.run(*(*grid, 1, 1)[:3], 7, self.function, "metadata", None, None, None, *arguments)
            recorder = getattr(launches._state, "recorder", None)
            if recorder is not None:
                recorder.launch(self.compiled, grid, arguments)

        return launch


@Kernel
def add(out: int, x: int, y: int, count: int) -> None:
    """`out = x + y`, elementwise."""
    sums = [a + b for a, b in zip(floats(x, count), floats(y, count), strict=True)]
    floats(out, count)[:] = sums


@Kernel
def add_all(out: int, xs: tuple[int, ...], count: int) -> None:
    for x in xs:
        add.function(out, out, x, count)


class Launcher:
    """A launcher that counts how often it is called, and how often its recording is used instead."""

    def __init__(self, function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = self.repeated = 0
        self.function = function
        again = Recording.__call__

        def counted(recording: Recording, addresses: list[int]) -> Any:
            self.repeated += 1
            return again(recording, addresses)

        monkeypatch.setattr(Recording, "__call__", counted)
        self.recorded = recorded(self.call)

    def call(self, *inputs: Any) -> Any:
        self.calls += 1
        return self.function(*inputs)

    def __call__(self, *inputs: Any) -> Any:
        with torch.no_grad():
            return self.recorded(*inputs)


Make = Callable[[Callable[..., Any]], Launcher]


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Make:
    return lambda function: Launcher(function, monkeypatch)


def sums(x: Tensor, y: Tensor) -> Tensor:
    out = x.new_empty(x.shape)
    add[(3,)](out, x, y, x.numel())
    return out


def pairs(*shape: int) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield torch.randn(*shape), torch.randn(*shape)


def test_the_second_call_is_written_down_and_later_ones_repeat_it(launcher: Make) -> None:
    run, given = launcher(sums), pairs(2, 5)
    add.grids.clear()
    for calls, repeated in ((1, 0), (2, 0), (2, 1), (2, 2)):
        x, y = next(given)
        assert torch.equal(run(x, y), x + y)
        assert (run.calls, run.repeated) == (calls, repeated)
    assert add.grids == [(3, 1, 1)] * 4


def described_for_gluon(*arguments: Any) -> GluonDescriptor:
    return GluonDescriptor(*arguments, NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32))


@pytest.mark.parametrize("describe", [TensorDescriptor, described_for_gluon], ids=["triton", "gluon"])
def test_workspaces_fills_views_tuples_and_descriptors_are_repeated(
    launcher: Make, describe: Callable[..., Any]
) -> None:
    def function(x: Tensor, scale: float) -> tuple[Tensor, list[Tensor], Tensor]:
        rows, columns = x.shape
        both, twos = x.new_zeros(2, rows, columns), x.new_full((columns,), scale)
        ones, empty = torch.empty_like(twos), x.new_empty(0, 4)
        ones.fill_(1)
        described = describe(x[1:], [1, columns], [columns, 1], [1, columns])
        add[(1,)](both, described, twos, columns)  # the second row, and `scale`
        add_all[(1, 2)](both[0], (twos, x[0], ones), columns)  # `scale`, the first row and 1
        return both[0], [empty], both.view(2, -1)[1:, :columns]

    run = launcher(function)
    for i in range(5):
        x = torch.randn(2, 4)
        first, (empty,), zeros = run(x, 2.0)
        assert_matches(first[0], (x[1].double() + 4 + x[0] + 1), what="sum", reduction=5)
        assert (empty.shape, zeros.shape) == ((0, 4), (1, 4))
        assert not zeros.any()
        assert first.untyped_storage().data_ptr() == zeros.untyped_storage().data_ptr()
        assert run.repeated == max(0, i - 1)


OTHERS = {
    "shape": lambda x, y: (torch.cat((x, x)), torch.cat((y, y)), 1.0),
    "stride": lambda x, y: (torch.stack((x, x), -1)[..., 0], y, 1.0),
    "dtype": lambda x, y: (x.double(), y, 1.0),
    "alignment": lambda x, y: (torch.cat((x[:1], x))[1:], y, 1.0),
    "value": lambda x, y: (x, y, 2.0),
    "list": lambda x, y: (x, [y], 1.0),
    "none": lambda x, y: (x, None, 1.0),
    "same": lambda x, y: (x, x, 1.0),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_inputs_of_another_kind_are_not_taken_for_the_same(
    launcher: Make, other: Callable[[Tensor, Tensor], tuple[Any, ...]]
) -> None:
    run, given = launcher(lambda *inputs: torch.empty(1)), pairs(5)
    for _ in range(3):
        run(*next(given), 1.0)
    assert (run.calls, run.repeated) == (2, 1)
    run(*other(*next(given)))
    assert (run.calls, run.repeated) == (3, 1)


def second_row_of_the_first(x: Tensor, y: Tensor) -> Tensor:
    out = x.new_empty(2)
    add[(1,)](out, x[1], y, 2)
    return out


RELATED = {
    "side_by_side": lambda whole: (whole[:, :4], whole[:, 4:]),
    "one_in_the_other": lambda whole: (whole, whole[1:]),
    "apart": lambda whole: (whole, torch.randn(3, 8)),
    "slices_apart": lambda whole: (whole[:, :4], torch.randn(3, 8)[:, 4:]),
}


@pytest.mark.parametrize("first", RELATED.values(), ids=RELATED)
@pytest.mark.parametrize("then", RELATED.values(), ids=RELATED)
@pytest.mark.parametrize("function", [sums, second_row_of_the_first])
def test_inputs_that_lay_within_one_another_need_not_the_next_time(
    launcher: Make,
    function: Callable[..., Tensor],
    first: Callable[[Tensor], tuple[Tensor, Tensor]],
    then: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> None:
    """Where an address is in two inputs, a recording is of how these lie to one another."""
    run = launcher(function)
    for i in range(6):
        x, y = (first if i % 3 < 2 else then)(torch.randn(3, 8))
        x, y = x[:2], y[:2]
        assert torch.equal(run(x, y), function(x, y)), f"call {i}"
    assert run.repeated


UNKNOWN = {
    "arithmetic": lambda x: x + 1,
    "input": lambda x: x,
    "part_of_an_input": lambda x: x[1:],
    "copy": lambda x: x.t().contiguous(),
    "other_dtype": lambda x: x.new_zeros(3, 4).view(torch.int32),
    "part_filled": lambda x: x.new_zeros(3, 4)[1:].fill_(2),
    "host": lambda x: x.new_zeros(int(x[0, 0] > 0)),
}


@pytest.mark.parametrize("function", UNKNOWN.values(), ids=UNKNOWN)
def test_a_launcher_that_does_something_else_is_called(launcher: Make, function: Callable[..., Tensor]) -> None:
    run = launcher(function)
    for i in range(4):
        x = torch.randn(3, 3)
        assert torch.equal(run(x), function(x))
        assert (run.calls, run.repeated) == (i + 1, 0)


def uses_workspaces(x: Tensor) -> Tensor:
    out = x.new_zeros(x.shape)
    for _ in range(3):
        workspace = x.new_empty(x.shape)
        add[(1,)](workspace, x, out, x.numel())
        add[(1,)](out, workspace, x, x.numel())
        del workspace
    return out


@pytest.mark.parametrize(
    ("small", "expected"),
    [(15, {"empty_strided": (4, 2), "empty": (0, 0)}), (16, {"empty_strided": (1, 1), "empty": (1, 1)})],
    ids=["large", "small"],
)
def test_memory_is_taken_and_freed_as_the_launcher_does(
    launcher: Make, monkeypatch: pytest.MonkeyPatch, small: int, expected: dict[str, tuple[int, int]]
) -> None:
    """Number of times, and the most at a time; small workspaces are taken together instead."""
    monkeypatch.setattr(launches, "_SMALL", small)
    run, x = launcher(uses_workspaces), torch.randn(4)
    for _ in range(2):
        run(x)
    alive: dict[str, list[Any]] = {name: [] for name in expected}
    most = dict.fromkeys(expected, 0)

    def watch(name: str, take: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def watched(*arguments: Any, **options: Any) -> Tensor:
            made = take(*arguments, **options)
            alive[name].append(StorageWeakRef(made.untyped_storage()))
            most[name] = max(most[name], sum(not storage.expired() for storage in alive[name]))
            return made

        return watched

    for name in expected:
        monkeypatch.setattr(torch, name, watch(name, getattr(torch, name)))
    assert_matches(run(x), 6 * x.double(), what="sum", reduction=6)
    assert run.repeated == 1
    assert {name: (len(alive[name]), most[name]) for name in expected} == expected


def test_small_workspaces_do_not_overlap(launcher: Make) -> None:
    def function(x: Tensor) -> Tensor:
        first, second, out = (x.new_empty(x.shape) for _ in range(3))
        add[(1,)](first, x, x, x.numel())
        add[(1,)](second, first, x, x.numel())
        add[(1,)](out, first, second, x.numel())
        return out

    run = launcher(function)
    for length in (3, 200):
        for _ in range(3):
            x = torch.randn(length)
            assert_matches(run(x), 5 * x.double(), what="sum", reduction=5)
    assert run.repeated == 2


def test_what_a_recording_was_derived_from_may_change(launcher: Make) -> None:
    run, given = launcher(sums), pairs(2)
    for _ in range(3):
        run(*next(given))
    with override("importance", BLOCK_M=32):
        run(*next(given))
    assert (run.calls, run.repeated) == (3, 1)


class Observer(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("how", ["direct", "mode", "enter", "exit"])
def test_who_looks_sees_a_call(launcher: Make, how: str) -> None:
    run, given = launcher(sums), pairs(2)
    for _ in range(3):
        run(*next(given))
    runtime = triton.knobs.runtime
    hook = getattr(runtime, f"launch_{how}_hook", None)

    def look(metadata: Any) -> None:
        raise AssertionError("no kernel of Triton's was launched")

    if hook is not None:
        hook.add(look)
    try:
        with direct() if how == "direct" else Observer() if how == "mode" else torch.no_grad():
            run(*next(given))
    finally:
        if hook is not None:
            hook.remove(look)
    assert (run.calls, run.repeated) == (3, 1)
    run(*next(given))
    assert (run.calls, run.repeated) == (3, 2)


def test_recordings_do_not_grow_without_end(launcher: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "_LARGEST", 4)
    run = launcher(sums)
    for _ in range(3):
        run(*next(pairs(1)))
    for length in range(2, 6):
        run(*next(pairs(length)))
    calls = run.calls
    run(*next(pairs(1)))
    assert run.calls == calls + 1, "the first kind is still there"


def test_a_launcher_that_fails_leaves_no_recorder(launcher: Make) -> None:
    def function(x: Tensor) -> Tensor:
        if fails:
            raise ValueError("no")
        return sums(x, x)

    run, x, fails = launcher(function), torch.randn(2), False
    run(x)
    fails = True
    with pytest.raises(ValueError, match=r"^no$"):
        run(x)
    fails = False
    assert getattr(launches._state, "recorder", None) is None
    for _ in range(3):
        assert torch.equal(run(x), x + x)
    assert run.repeated == 2
