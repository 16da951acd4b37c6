"""Captured in a CUDA graph and replayed, everything gives what a call gives, to the bit: replayed several times, with
other inputs each time, and whatever eager calls run in between."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa import NativeSparseAttention, NSAConfig, pack_sequences, rope_table
from nsa.config import Compression
from validation.cases import Case, draw, whole
from validation.implementations import load
from validation.numerics import assert_equal
from validation.stages import EVERY
from validation.unit.synchronisation import no_synchronisation

pytestmark = [pytest.mark.needs_gpu, pytest.mark.usefixtures("on_device")]

CONFIG = NSAConfig(num_selected_blocks=4, window_size=128)
SIZES: dict[str, Any] = {"kv_heads": 2, "group": 16, "key_dim": 64, "value_dim": 64}
CASES = [
    Case("whole", whole(1003), CONFIG, **SIZES),
    Case("group_4", whole(1003), CONFIG, **{**SIZES, "group": 4}),
]
Function = Callable[[], Sequence[Tensor]]


def check(function: Function, inputs: Sequence[Tensor]) -> None:
    """Replays against calls, with inputs that are written over."""
    # Gradients are made on the stream of the forward pass; a capture cannot leave its own.
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            replayed = function()
        before: list[Tensor] = []
        for _ in range(4):
            with torch.no_grad():
                for x in inputs:
                    x.mul_(0.75)
            expected = [x.clone() for x in function()]
            assert not before or any(not torch.equal(x, y) for x, y in zip(before, expected, strict=True))
            graph.replay()
            for i, (x, y) in enumerate(zip(replayed, expected, strict=True)):
                assert_equal(x, y, what=f"result {i} of a replay")
            before = expected
    torch.cuda.synchronize()


@pytest.mark.parametrize("stage", EVERY)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_stages(stage: str, case: Case) -> None:
    ours, tensors = load("triton"), draw(case, torch.bfloat16)
    first = next(iter(dict(EVERY[stage].results(ours, case, tensors)).values()))
    cotangent = None if first.dtype == torch.int32 else torch.randn_like(first)
    changed = [x for x in tensors.values() if isinstance(x, Tensor) and x.is_floating_point()]
    check(lambda: list(dict(EVERY[stage].results(ours, case, tensors, cotangent=cotangent)).values()), changed)


@pytest.mark.parametrize("kind", ["eager", "compiled"])
@pytest.mark.parametrize("compression", ["mlp", "mean"])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_layers(kind: str, compression: Compression, packed: bool) -> None:
    config = NSAConfig(num_selected_blocks=4, window_size=128, compression=compression)
    layer = NativeSparseAttention(128, 32, 2, 64, config, backend="triton").bfloat16()
    x, rope = torch.randn(1, 1003, 128, dtype=torch.bfloat16, requires_grad=True), rope_table(1003, 64)
    offsets = torch.tensor([0, 600, 601, 1003], dtype=torch.int32)
    sequences = pack_sequences(offsets, config, num_tokens=1003) if packed else None
    cotangent, run = torch.randn_like(x), torch.compile(layer) if kind == "compiled" else layer

    def step() -> list[Tensor]:
        out = run(x, rope, sequences)
        return [out, *torch.autograd.grad(out, [x, *layer.parameters()], cotangent)]

    check(step, [x])


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("compression", ["mlp", "mean"])
def test_a_layer_waits_for_nothing(compression: Compression, packed: bool) -> None:
    """Forward and backward pass, once the tables of packed sequences are made."""
    config = NSAConfig(num_selected_blocks=4, window_size=128, compression=compression)
    layer = NativeSparseAttention(128, 32, 2, 64, config, backend="triton").bfloat16()
    x, rope = torch.randn(1, 1003, 128, dtype=torch.bfloat16, requires_grad=True), rope_table(1003, 64)
    offsets = torch.tensor([0, 600, 601, 1003], dtype=torch.int32)
    sequences = pack_sequences(offsets, config, num_tokens=1003) if packed else None
    for _ in range(3):
        layer(x, rope, sequences).sum().backward()
    with no_synchronisation():
        for _ in range(3):
            layer(x, rope, sequences).sum().backward()
