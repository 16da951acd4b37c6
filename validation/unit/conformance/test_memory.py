"""Memory: results are of the inputs alone, nothing is written beside what was asked for, any strides are read right.

What PyTorch hands out is filled with NaN, or lies within memory of NaN that must be there afterwards. Kernels that
write where they may not, or read what nobody wrote, show here where values alone would not.
"""

import pytest

from ...cases import BY_ID, Case, Tensors, draw, draw_cotangent, fitted, require
from ...implementations import Implementation
from ...memory import EMPTY, fresh_memory_is_poisoned, memory_is_guarded
from ...numerics import assert_equal, assert_matches
from ...stages import EVERY, STAGES, StageSpec

pytestmark = [
    pytest.mark.usefixtures("on_device"),
    # Filling is a part of PyTorch's deterministic mode, which warns of operations that have no such form.
    pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning"),
]

SMALL = (BY_ID["small"], BY_ID["pooled"])
PACKED = (BY_ID["packed_last_queries"], BY_ID["pooled_packed"])
PARTS = ("compressed_attention", "select_blocks", "selected_attention", "sliding_window_attention")

each_stage = pytest.mark.parametrize("stage", EVERY.values(), ids=EVERY.keys())
each_case = pytest.mark.parametrize("case", [SMALL, PACKED], ids=["whole", "packed"], indirect=True)
parts = pytest.mark.sparing(stage=PARTS)
packed_parts = pytest.mark.sparing(stage=PARTS, case=(PACKED,))


def assert_same(impl: Implementation, actual: Tensors, expected: Tensors, case: Case, what: str) -> None:
    """To the bit where an implementation is deterministic."""
    for name, x in expected.items():
        if impl.deterministic or not x.is_floating_point():
            assert_equal(actual[name], x, what=f"{name} {what}")
        else:
            terms = case.num_keys * case.group
            assert_matches(actual[name], x.double(), what=f"{name} {what}", reduction=terms)


@each_stage
@each_case
@packed_parts
def test_no_result_comes_of_memory_never_written(impl: Implementation, stage: StageSpec, case: Case) -> None:
    tensors = draw(case, impl.widest)
    expected = dict(stage.results(impl, case, tensors))
    with fresh_memory_is_poisoned(warn_only=True):
        actual = dict(stage.results(impl, case, tensors))
    assert_same(impl, actual, expected, case, "where fresh memory is NaN")


@each_stage
@each_case
@packed_parts
def test_nothing_is_written_beside_what_was_asked_for(
    impl: Implementation, stage: StageSpec, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = draw(case, impl.widest)
    with memory_is_guarded(monkeypatch, EMPTY):
        assert list(stage.results(impl, case, tensors))


@each_stage
@parts
def test_expanded_inputs_are_read_right(impl: Implementation, stage: StageSpec) -> None:
    """One KV head, and one token of the gates, for all: strides of 0."""
    case = fitted(impl, *SMALL, stages=stage.functions)
    tensors = draw(case, impl.widest)
    names = [name for name in ("k", "v", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win") if name in tensors]
    expanded: Tensors = {**tensors, **{name: tensors[name][:, :, :1].expand_as(tensors[name]) for name in names}}
    expanded["gates"] = tensors["gates"][:, :1].expand_as(tensors["gates"])
    dense = {name: x.contiguous() for name, x in expanded.items()}
    actual, expected = (stage.run(impl, case, x) for x in (expanded, dense))
    for name, x in expected.items():
        if x.is_floating_point():
            assert_matches(actual[name], x.double(), what=f"{name} of expanded inputs", reduction=case.num_keys)
        else:
            assert_equal(actual[name], x, what=f"{name} of expanded inputs")


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES.keys())
@parts
def test_cotangents_of_any_strides_are_read_right(impl: Implementation, stage: StageSpec) -> None:
    case = fitted(impl, *SMALL, stages=stage.functions)
    require(impl, case, stage.functions, impl.widest, backward=True)
    tensors = draw(case, impl.widest)
    cotangent = draw_cotangent(case, stage.run(impl, case, tensors)["out"], impl.widest)
    strided = cotangent.transpose(1, -1).contiguous().transpose(1, -1)
    actual, expected = (dict(stage.results(impl, case, tensors, cotangent=x)) for x in (strided, cotangent))
    for name, x in expected.items():
        terms = case.num_keys * case.group
        assert_matches(actual[name], x.double(), what=f"{name} under a cotangent of other strides", reduction=terms)
