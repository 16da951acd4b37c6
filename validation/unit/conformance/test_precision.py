"""Rounding: every dtype, mixtures of them and what grows with size, beside plain PyTorch in the same dtype."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from nsa import NativeSparseAttention
from nsa.backends import BackendName

from ... import oracle
from ...cases import BY_ID, PARAMETERS, Case, config, draw, require, scaled, whole
from ...comparison import compare
from ...implementations import Implementation
from ...numerics import assert_equal, assert_matches, assert_selection_matches
from ...precision import AXES, NARROW, Point, measure
from ...stages import STAGES, StageSpec, importance, select_blocks

pytestmark = pytest.mark.usefixtures("on_device")

PAPER = config((32, 16, 64), 4, 48)
SHAPES = [
    Case("head_dim_64", whole(200), PAPER, group=4, kv_heads=1, key_dim=64, value_dim=64),
    Case("head_dim_128", ((57, 300),), PAPER, group=4, kv_heads=1, key_dim=128, value_dim=128),
    Case("head_dim_256", whole(70), PAPER, group=4, kv_heads=1, key_dim=256, value_dim=256),
    *(
        replace(larger, id=id)
        for id, name in (("head_dims_192_128", "latent_head_dims"), ("head_dims_96_80", "odd_head_dims"))
        if (larger := scaled(BY_ID[name], 4, 4))
    ),
    BY_ID["packed_paper"],
]
"""Common head dims, the largest, and unequal ones. The last three are cases of every stage too, the first three are
sizes of the axes below, and the same kernels are compiled for them."""

each_stage = pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES.keys())
each_shape = pytest.mark.parametrize("case", SHAPES, indirect=True, ids=lambda case: case.id)
each_dtype = pytest.mark.parametrize("dtype_name", NARROW)
each_half = pytest.mark.parametrize("dtype_name", ["float16", "bfloat16"])


@pytest.fixture
def dtype(dtype_name: str) -> torch.dtype:
    return getattr(torch, dtype_name)


@pytest.fixture(autouse=True)
def _rounds(request: pytest.FixtureRequest) -> None:
    if "impl" in request.fixturenames and request.getfixturevalue("impl").interpreted:
        pytest.skip("Triton's interpreter rounds where it likes: it shows algebra, not precision")


# 1. Every dtype, over head dims, groups and lengths.


@each_dtype
@each_stage
@each_shape
@pytest.mark.claim("forward", "gradients")
def test_stages_are_about_as_good_as_plain_pytorch(
    impl: Implementation, stage: StageSpec, case: Case, dtype: torch.dtype
) -> None:
    compare(impl, stage, case, draw(case, dtype), dtype, beside_plain=True)


@each_dtype
@each_shape
def test_selections_are_about_as_good_as_exact_ones(impl: Implementation, case: Case, dtype: torch.dtype) -> None:
    x = draw(case, dtype)
    indices = select_blocks(impl, case, x)
    assert_selection_matches(indices, x["indices"], importance(case, x), case.config, dtype, **case.selection)


@each_half
@pytest.mark.parametrize(
    "stage", [STAGES["sliding_window_attention"], STAGES["selected_attention"]], ids=lambda stage: stage.name
)
def test_sums_are_kept_in_more_than_the_dtype(impl: Implementation, stage: StageSpec, dtype: torch.dtype) -> None:
    """The first value gets `1 + 1/2 + 1/3 + ...`: kept in bfloat16, the sum would soon grow no more."""
    case = Case("harmonic", whole(704), config((16, 8, 64), 11, 704), group=1, kv_heads=1, key_dim=16, value_dim=16)
    x = draw(case, dtype)
    x["q"] = torch.zeros_like(x["q"])
    ones = torch.ones(1, case.num_queries, 1, case.value_dim, dtype=dtype)
    require(impl, case, stage.functions, dtype, backward=True)
    gradient = dict(stage.results(impl, case, x, dtype, cotangent=ones))["gradient of v"]
    terms = 1 / torch.arange(1, case.num_keys + 1).double()
    sums = terms.flip(0).cumsum(0).flip(0)[None, :, None, None].expand(gradient.shape)
    assert_matches(gradient, sums, what="gradient of values that every query sees", reduction=case.num_queries)


# 2. Mixtures.


@each_half
@pytest.mark.parametrize("name", ["compress_keys", "compress_values", "nsa_attention"])
@pytest.mark.parametrize("compression", ["mlp", "linear"])
def test_float32_parameters_meet_narrow_activations(
    impl: Implementation, name: str, compression: str, dtype: torch.dtype
) -> None:
    stage = STAGES[name]
    case = Case("mixed", whole(100), config((16, 8, 16), 3, 20, compression=compression), key_dim=32, value_dim=16)
    wide = {key: x for key, x in draw(case, torch.float32).items() if key.endswith(("gates", *PARAMETERS))}
    x = {**draw(case, dtype), **wide}
    compare(impl, stage, case, x, dtype, beside_plain=True)
    for key, result in stage.results(impl, case, x, dtype):
        like = x[key.removeprefix("gradient of ")] if key.startswith("gradient") else x["q"]
        assert result.dtype == like.dtype, key


@each_half
@each_stage
def test_autocast_does_not_reach_inside_a_stage(impl: Implementation, stage: StageSpec, dtype: torch.dtype) -> None:
    """What is narrow already is left to a stage, which keeps its sums in float32."""
    case = Case("autocast", whole(100), config((16, 8, 16), 3, 20), key_dim=32, value_dim=16)
    x = draw(case, dtype)
    expected = dict(stage.results(impl, case, x, dtype))
    with torch.autocast(x["q"].device.type, dtype):
        actual = dict(stage.results(impl, case, x, dtype))
    for name, result in actual.items():
        assert_equal(result, expected[name], what=f"{name} under autocast")


@each_half
@pytest.mark.parametrize("compression", ["mean", "linear", "mlp"])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_autocast_leaves_compression_the_dtype_of_its_input(
    impl: Implementation, compression: str, packed: bool, dtype: torch.dtype
) -> None:
    settings = config((16, 8, 16), 3, 20, compression=compression)
    case = Case("autocast", whole(*((60, 40) if packed else (100,))), settings, key_dim=16, value_dim=16)
    with torch.autocast(torch.get_default_device().type, dtype):
        out = STAGES["compress_keys"].run(impl, case, draw(case, torch.float32))["out"]
    assert out.dtype == torch.float32


@each_half
def test_autocast_does_not_reach_inside_the_selection(impl: Implementation, dtype: torch.dtype) -> None:
    case = Case("autocast", whole(300), config((16, 8, 16), 4, 20), key_dim=32, value_dim=16)
    x = draw(case, dtype)
    with torch.autocast(x["q"].device.type, dtype):
        indices = select_blocks(impl, case, x)
    assert_equal(indices, select_blocks(impl, case, x), what="indices under autocast")


@each_half
@pytest.mark.parametrize("way", ["autocast", "cast"])
@pytest.mark.parametrize("compression", ["mlp", "linear", "mean"])
def test_a_layer_of_float32_parameters_computes_in_a_narrow_dtype(
    impl: Implementation, compression: str, way: str, dtype: torch.dtype
) -> None:
    """Under autocast, or with copies of the parameters, as FSDP makes them; gradients arrive in float32."""
    if impl.name not in ("eager", "triton"):
        pytest.skip(f"{impl.name} is no backend of our layer")
    sizes: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    backend: BackendName = "eager" if impl.plain else "triton"
    # Room for all blocks: which are selected does not depend on rounding.
    layer = NativeSparseAttention(
        32, **sizes, config=config((16, 8, 16), 4, 20, compression=compression), backend=backend
    )
    parameters, x = dict(layer.named_parameters()), torch.randn(2, 60, 32)
    cotangent = torch.randn_like(x)

    def gradients(out: torch.Tensor) -> list[torch.Tensor]:
        return [out, *torch.autograd.grad(out, list(parameters.values()), cotangent.to(out.dtype))]

    if way == "autocast":
        with torch.autocast(x.device.type, dtype):
            out = layer(x)
    else:
        copies = {name: parameter.to(dtype) for name, parameter in parameters.items()}
        out = torch.func.functional_call(layer, copies, x.to(dtype))
    actual = gradients(out)
    true = gradients(oracle.native_sparse_attention(x, parameters, layer.config, **sizes))
    with oracle.computing_in(dtype):
        plain = gradients(oracle.native_sparse_attention(x, parameters, layer.config, **sizes))
    assert actual[0].dtype == dtype
    for name, got, wanted, nearest in zip(["output", *parameters], actual, true, plain, strict=True):
        assert got.dtype == (dtype if name == "output" else torch.float32), name
        assert_matches(got, wanted.double(), what=name, baseline=nearest, reduction=2 * 60 * 4, dtype=dtype)


# 3. Growth.


@each_dtype
@pytest.mark.parametrize("axis", AXES)
def test_error_grows_no_faster_than_the_policy_lets_it(
    impl: Implementation, axis: str, dtype: torch.dtype, points: list[Point]
) -> None:
    for result in measure(impl, axis, dtype):
        points.append(result.point())
        result.check()
