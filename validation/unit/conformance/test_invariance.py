"""Bits that do not depend on what is beside them, for implementations that say so: gradients, batch, chunks, graphs.

Training in one way and generating in another takes the same numbers for the same tokens; a selection makes of the last
bit another block. What is invariant only up to rounding is in test_properties.py.
"""

from dataclasses import replace

import pytest
import torch

from ...cases import BY_ID, Case, draw, fitted, require
from ...implementations import Implementation
from ...numerics import assert_equal
from ...stages import EVERY, StageSpec

pytestmark = pytest.mark.usefixtures("on_device")

PARTS = ("compressed_attention", "select_blocks", "selected_attention")
each_stage = pytest.mark.parametrize("stage", EVERY.values(), ids=EVERY.keys())
each_query_stage = pytest.mark.parametrize(
    "stage", [stage for stage in EVERY.values() if not stage.name.startswith("compress_")], ids=lambda stage: stage.name
)
parts = pytest.mark.sparing(stage=PARTS)


def declared(impl: Implementation, what: str) -> None:
    if what not in impl.invariant:
        pytest.skip(f"{impl.name} lacks invariance of {what}")


@each_stage
@parts
def test_the_forward_without_gradients_is_the_forward_with(impl: Implementation, stage: StageSpec) -> None:
    declared(impl, "gradients")
    case = fitted(impl, BY_ID["small"], BY_ID["pooled"], stages=stage.functions)
    require(impl, case, stage.functions, impl.widest, backward=True)
    for dtype in sorted(impl.dtypes & {impl.widest, torch.bfloat16}, key=str):
        tensors = draw(case, dtype)
        expected = stage.run(impl, case, {**tensors, **stage.leaves(tensors)})
        with torch.no_grad():
            alone = stage.run(impl, case, tensors)
        for name, x in alone.items():
            assert_equal(x, expected[name].detach(), what=f"{name} without gradients, {dtype}")


@each_query_stage
@parts
def test_a_sequence_alone_is_the_same_in_a_batch(impl: Implementation, stage: StageSpec) -> None:
    declared(impl, "batch")
    case = fitted(impl, *(replace(BY_ID[name], batch=3) for name in ("small", "pooled")), stages=stage.functions)
    tensors = draw(case, impl.widest)
    expected = stage.run(impl, case, tensors)
    for i in range(case.batch):
        one = {name: x[i : i + 1] if x.shape[:1] == (case.batch,) and x.dim() > 2 else x for name, x in tensors.items()}
        for name, x in stage.run(impl, replace(case, batch=1), one).items():
            assert_equal(x, expected[name][i : i + 1], what=f"{name} of sequence {i} alone")


@each_query_stage
@parts
def test_the_last_queries_alone_are_the_same_in_the_whole(impl: Implementation, stage: StageSpec) -> None:
    declared(impl, "chunks")
    case = fitted(impl, BY_ID["small"], BY_ID["pooled"], stages=stage.functions)
    last = last_queries(case, 11)
    require(impl, last, stage.functions, impl.widest)
    tensors = draw(case, impl.widest)
    expected = stage.run(impl, case, tensors)
    few = {**tensors, **{name: tensors[name][:, -11:] for name in ("q", "gates", "lse", "indices")}}
    for name, x in stage.run(impl, last, few).items():
        assert_equal(x, expected[name][:, -11:], what=f"{name} of the last queries alone")


def last_queries(case: Case, number: int) -> Case:
    return replace(case, lengths=((number, case.num_keys),))


@pytest.mark.needs_gpu
@each_query_stage
def test_a_graph_replays_the_same_bits(impl: Implementation, stage: StageSpec) -> None:
    declared(impl, "graphs")
    case = fitted(impl, BY_ID["small"], BY_ID["pooled"], stages=stage.functions)
    tensors = draw(case, impl.widest)
    expected = stage.run(impl, case, tensors)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(2):
            stage.run(impl, case, tensors)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        replayed = stage.run(impl, case, tensors)
    for _ in range(2):
        graph.replay()
        for name, x in replayed.items():
            assert_equal(x, expected[name].detach(), what=f"{name} of a replay")
