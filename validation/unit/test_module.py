"""The layer: against the whole-module oracle, its gradients, compilation, memory, and what it refuses."""

import math
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nsa import NativeSparseAttention, NSAConfig, RopeScaling, nsa_attention, rope_table
from validation import oracle
from validation.cases import cumulative
from validation.numerics import PEAK_MEMORY_BYTES, assert_equal, assert_matches, gradcheck

pytestmark = pytest.mark.usefixtures("on_device")

SMALL = NSAConfig(compress_block_size=8, compress_stride=4, select_block_size=16, num_selected_blocks=4, window_size=20)
KINDS = [
    replace(SMALL, compression=kind, shared_kv=shared)
    for kind in ("mlp", "linear", "mean")
    for shared in (0 > 1, 1 > 0)
]
each_kind = pytest.mark.parametrize("config", KINDS, ids=lambda c: f"{c.compression}{'-shared' * c.shared_kv}")


def make(
    config: NSAConfig,
    dtype: torch.dtype = torch.float64,
    *,
    heads: int = 6,
    kv_heads: int = 2,
    head_dim: int = 8,
    dim: int = 24,
    **options: Any,
) -> NativeSparseAttention:
    return NativeSparseAttention(dim, heads, kv_heads, head_dim, config, **options).to(dtype)


def expected(layer: NativeSparseAttention, x: Tensor, rope: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    sizes: dict[str, Any] = {"num_heads": 6, "num_kv_heads": 2, "head_dim": 8}
    weights, sizes["gate_activation"] = dict(layer.named_parameters()), layer.gate_activation
    return oracle.native_sparse_attention(x, weights, layer.config, **sizes, rope=rope, cu_seqlens=cu_seqlens)


PARTS: dict[str, dict[str, Any]] = {
    "bias": {"bias": True},
    "softmax": {"gate_activation": "softmax"},
    "gates_for_all_heads": {"gate_per_head": False},
    "gates_by_an_mlp": {"gate_hidden": 10},
    "all": {"bias": True, "gate_activation": "softmax", "gate_per_head": False, "gate_hidden": 10},
}


@pytest.mark.parametrize("options", PARTS.values(), ids=PARTS)
def test_other_projections_and_gates_match_the_oracle(options: dict[str, Any]) -> None:
    layer = make(SMALL, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)  # biases as well
    check_against_the_oracle(layer, None)


@pytest.mark.parametrize("options", PARTS.values(), ids=PARTS)
def test_other_projections_and_gates_go_on_from_a_cache(options: dict[str, Any]) -> None:
    layer, rope = make(SMALL, **options), rope_table(40, 8)
    x, cache = torch.randn(2, 40, 24, dtype=torch.float64), layer.make_cache(2, 40)
    parts = [layer(part, rope, cache=cache) for part in x.split((25, 1, 14), 1)]
    assert_matches(torch.cat(parts, 1), layer(x, rope).detach(), what="output")


def test_parameters_of_other_gates_start_as_they_should() -> None:
    layer = make(SMALL, **PARTS["all"])
    assert isinstance(layer.wg, nn.Sequential)
    last = layer.wg[2]
    assert isinstance(last, nn.Linear)
    assert last.out_features == 3
    assert_equal(last.bias.detach(), torch.zeros(3, dtype=torch.float64), what="gate bias")
    assert_equal(layer.wk.bias.detach(), torch.zeros(48, dtype=torch.float64), what="bias of keys")


@each_kind
@pytest.mark.parametrize("lengths", [None, (30, 0, 7, 33)], ids=["whole", "packed"])
def test_matches_the_oracle_with_all_gradients(config: NSAConfig, lengths: tuple[int, ...] | None) -> None:
    check_against_the_oracle(make(config), lengths)


def check_against_the_oracle(layer: NativeSparseAttention, lengths: tuple[int, ...] | None) -> None:
    rope = rope_table(70, 8)
    x = torch.randn(1 if lengths else 2, 70, 24, dtype=torch.float64, requires_grad=True)
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int() if lengths else None
    actual, oracles = layer(x, rope, cu_seqlens), expected(layer, x, rope, cu_seqlens)
    assert_matches(actual, oracles, what="output")
    inputs = {"x": x, **dict(layer.named_parameters())}
    dout = torch.randn_like(actual)
    gradients = (torch.autograd.grad(out, list(inputs.values()), dout) for out in (actual, oracles))
    for name, got, wanted in zip(inputs, *gradients, strict=True):
        assert_matches(got, wanted, what=f"gradient of {name}")


@pytest.mark.parametrize("length", [0, 1, 7])
def test_sequences_without_a_whole_block(length: int) -> None:
    layer, rope, x = make(SMALL), rope_table(8, 8), torch.randn(1, length, 24, dtype=torch.float64)
    assert_matches(layer(x, rope), expected(layer, x, rope), what="output")


@each_kind
def test_gradcheck_of_the_whole_module(config: NSAConfig) -> None:
    layer = make(config, heads=2, kv_heads=1, head_dim=4, dim=6)
    rope, x = rope_table(24, 4), torch.randn(1, 24, 6, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x, rope))

    gradcheck(run, (x, *parameters), fast=True)


def test_rope_follows_its_definition() -> None:
    table = rope_table(3, 4, theta=100.0).double()
    angles = torch.tensor([[0.0, 0.0], [1.0, 0.1], [2.0, 0.2]], dtype=torch.float64)
    assert_equal(table, torch.stack((angles.cos(), angles.sin()), -1).float().double(), what="table")


SCALINGS = {
    "longer_contexts": RopeScaling(),
    "narrow_band": RopeScaling(32.0, 1.0, 1.5, 64),
    "none": RopeScaling(factor=1.0),
}


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_scaled_frequencies_are_those_of_their_definition(scaling: RopeScaling, theta: float) -> None:
    """Wavelength by wavelength, as the release of llama 3.1 has it."""
    table = rope_table(2, 64, theta, scaling=scaling, device=torch.device("cpu")).double()
    for pair in range(32):
        frequency = theta ** -(2 * pair / 64)
        wavelength = 2 * math.pi / frequency
        if wavelength > scaling.original_length / scaling.low_freq_factor:
            frequency /= scaling.factor
        elif wavelength >= scaling.original_length / scaling.high_freq_factor:
            part = scaling.original_length / wavelength - scaling.low_freq_factor
            part /= scaling.high_freq_factor - scaling.low_freq_factor
            frequency = (1 - part) * frequency / scaling.factor + part * frequency
        expected = torch.tensor([math.cos(frequency), math.sin(frequency)], dtype=torch.float64)
        assert_matches(table[1, pair], expected, what=f"pair {pair}", dtype=torch.float32)


@pytest.mark.parametrize(
    "wrong", [{"factor": 0.5}, {"low_freq_factor": 0.0}, {"high_freq_factor": 1.0}, {"original_length": 0}]
)
def test_scaling_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^scaling must have a factor of at least 1"):
        rope_table(2, 8, scaling=RopeScaling(**wrong))


def test_gates_start_half_open_and_heads_are_their_own() -> None:
    layer = make(SMALL)
    assert isinstance(layer.wg, nn.Linear)
    assert_equal(layer.wg.bias.detach(), torch.zeros(18, dtype=torch.float64), what="gate bias")
    assert layer.wk.out_features == 2 * 3 * 8
    assert make(replace(SMALL, shared_kv=True)).wk.out_features == 2 * 8


# test_compile.py has every kind, compiled to other bits.
@pytest.mark.parametrize("config", [KINDS[1], KINDS[4]], ids=["mlp-shared", "mean"])
def test_compiles_as_one_graph_to_the_same_function(config: NSAConfig) -> None:
    layer, rope, x = make(config, torch.float32), rope_table(48, 8), torch.randn(2, 48, 24)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    # On a GPU cuBLAS may take another algorithm for a compiled product, and its bits with it.
    longest_sum = 2 * 48 * 6  # tokens and heads behind an element of a gradient

    def check(got: Tensor, wanted: Tensor, what: str) -> None:
        if x.device.type == "cpu":
            assert_equal(got, wanted, what=what)
        assert_matches(got, wanted.double(), what=what, reduction=longest_sum)

    check(compiled(x, rope), layer(x, rope), "compiled output")
    gradients = (torch.autograd.grad(f(x, rope).sum(), list(layer.parameters())) for f in (compiled, layer))
    for name, got, wanted in zip(dict(layer.named_parameters()), *gradients, strict=True):
        check(got, wanted, f"gradient of {name}")


def test_parameters_are_cast_to_the_dtype_of_the_keys() -> None:
    layer, x = make(SMALL, torch.float32), torch.randn(1, 40, 24)
    with torch.autocast(x.device.type, torch.bfloat16):
        out = layer(x, rope_table(40, 8))
    assert out.dtype == torch.bfloat16
    assert_matches(out, expected(layer, x, rope_table(40, 8)), what="output under autocast", reduction=24 * 48)


BAD_LAYERS = {
    "heads_that_do_not_divide": (
        {"num_kv_heads": 4},
        ValueError,
        "num_heads must be a multiple of num_kv_heads (4), got 6",
    ),
    "dim_not_divided": (
        {"num_heads": 5, "num_kv_heads": 1},
        ValueError,
        "dim must be a multiple of num_heads (5) without a head_dim, got 24",
    ),
    "no_such_gates": (
        {"gate_activation": "tanh"},
        ValueError,
        "gate_activation must be 'sigmoid' or 'softmax', got 'tanh'",
    ),
    "gates_less_than_none": ({"gate_hidden": -1}, ValueError, "gate_hidden must be at least 0, got -1"),
    "no_dim": ({"dim": 0}, ValueError, "dim must be at least 1, got 0"),
    "no_heads": ({"num_heads": 0}, ValueError, "num_heads must be at least 1, got 0"),
    "no_kv_heads": ({"num_kv_heads": 0}, ValueError, "num_kv_heads must be at least 1, got 0"),
    "no_head_dim": ({"head_dim": 0}, ValueError, "head_dim must be at least 1, got 0"),
    "negative_head_dim": ({"head_dim": -8}, ValueError, "head_dim must be at least 1, got -8"),
    "float_dim": ({"dim": 24.0}, TypeError, "dim must be an int, got 24.0 (float)"),
    "float_heads": ({"num_heads": 6.0}, TypeError, "num_heads must be an int, got 6.0 (float)"),
    "str_heads": ({"num_heads": "6"}, TypeError, "num_heads must be an int, got '6' (str)"),
    "bool_heads": ({"num_heads": True}, TypeError, "num_heads must be an int, got True (bool)"),
    "float_kv_heads": ({"num_kv_heads": 2.0}, TypeError, "num_kv_heads must be an int, got 2.0 (float)"),
    "str_head_dim": ({"head_dim": "8"}, TypeError, "head_dim must be an int, got '8' (str)"),
    "heads_beyond_32_bits": ({"num_heads": 2**70}, ValueError, f"num_heads must be at most 2147483647, got {2**70}"),
    "dict_as_config": ({"config": {"window_size": 8}}, TypeError, "config must be an NSAConfig, got dict"),
    "no_config": ({"config": None}, TypeError, "config must be an NSAConfig, got NoneType"),
    "misspelt_backend": ({"backend": "trtion"}, ValueError, "backend must be one of ('auto', 'eager', 'triton'), got"),
    "list_of_backends": ({"backend": ["eager"]}, ValueError, "backend must be one of ('auto', 'eager', 'triton'), got"),
}


@pytest.mark.parametrize(("changes", "error", "message"), BAD_LAYERS.values(), ids=BAD_LAYERS)
def test_a_layer_that_cannot_be_is_refused_when_it_is_made(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        NativeSparseAttention(**{"dim": 24, "num_heads": 6, "num_kv_heads": 2, **changes})


BAD_INPUTS = {
    "x_without_a_batch": (
        {"x": lambda x: x[0]},
        ValueError,
        "x must have 3 dimensions [B, T, dim], got shape (40, 24)",
    ),
    "x_by_head": (
        {"x": lambda x: x[None]},
        ValueError,
        "x must have 3 dimensions [B, T, dim], got shape (1, 1, 40, 24)",
    ),
    "width_of_x": (
        {"x": lambda x: x[..., :8]},
        ValueError,
        "x must have the width of the layer (24), got shape (1, 40, 8)",
    ),
    "integer_x": ({"x": lambda x: x.long()}, TypeError, "x must have dtype"),
    "narrower_x": (
        {"x": lambda x: x.half()},
        TypeError,
        "x must have the dtype of the layer's parameters (torch.float64), got torch.float16",
    ),
    "list_as_x": ({"x": lambda x: x.tolist()}, TypeError, "x must be a tensor [B, T, dim], got list"),
    "device_of_x": ({"x": lambda x: x.to("meta")}, ValueError, "x must be on"),
    "list_as_rope": ({"rope": lambda rope: rope.tolist()}, TypeError, "rope must be a tensor [L, D / 2, 2], got list"),
    "flat_rope": ({"rope": lambda rope: rope[..., 0]}, ValueError, "rope must have 3 dimensions [L, D / 2, 2], got"),
    "complex_rope": ({"rope": torch.view_as_complex}, ValueError, "rope must have 3 dimensions [L, D / 2, 2], got"),
    "integer_rope": ({"rope": lambda rope: rope.long()}, TypeError, "rope must have a floating dtype, got torch.int64"),
    "device_of_rope": ({"rope": lambda rope: rope.to("meta")}, ValueError, "rope must be on"),
    "list_as_offsets": ({"cu_seqlens": lambda _: [0, 40]}, TypeError, "cu_seqlens must be a tensor [N + 1], got list"),
    "floating_offsets": ({"cu_seqlens": lambda _: torch.tensor([0.0, 40.0])}, TypeError, "cu_seqlens must have dtype"),
    "offsets_in_two_dimensions": (
        {"cu_seqlens": lambda _: torch.tensor([[0, 40]], dtype=torch.int32)},
        ValueError,
        "cu_seqlens must have 1 dimensions [N + 1], got shape (1, 2)",
    ),
}


@pytest.mark.parametrize(("changes", "error", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input_of_the_layer_is_refused_by_name(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    inputs = {"x": torch.randn(1, 40, 24, dtype=torch.float64), "rope": rope_table(40, 8), "cu_seqlens": None}
    layer = make(SMALL)
    layer(**inputs)
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        layer(**inputs | {name: change(inputs[name]) for name, change in changes.items()})


def test_an_odd_head_dim_is_refused_where_it_would_be_rotated_and_only_there() -> None:
    layer, x = make(SMALL, head_dim=7), torch.randn(1, 40, 24, dtype=torch.float64)
    assert layer(x).shape == x.shape
    with pytest.raises(ValueError, match=r"rope must be None where head_dim is odd \(7\)"):
        layer(x, rope_table(40, 6))


BAD_TABLES = {
    "odd": ((8, 7), ValueError, "head_dim must be even to be rotated in pairs, got 7"),
    "no_head_dim": ((8, 0), ValueError, "head_dim must be at least 1, got 0"),
    "float_head_dim": ((8, 4.0), TypeError, "head_dim must be an int, got 4.0"),
    "negative_length": ((-1, 8), ValueError, "length must be at least 0, got -1"),
    "float_length": ((8.0, 8), TypeError, "length must be an int, got 8.0"),
    "no_theta": ((8, 8, 0.0), ValueError, "theta must be positive and finite, got 0.0"),
    "theta_that_is_no_number": ((8, 8, float("nan")), ValueError, "theta must be positive and finite, got nan"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_TABLES.values(), ids=BAD_TABLES)
def test_a_rope_table_that_cannot_be_is_refused(
    arguments: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        rope_table(*arguments)


@pytest.mark.parametrize("bounds", [None, [0, 4, 40]], ids=["whole", "packed"])
def test_a_rope_table_that_is_too_short_is_refused(bounds: list[int] | None) -> None:
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32) if bounds else None
    with pytest.raises(ValueError, match="rope must have a row for each of the"):
        make(SMALL)(torch.randn(1, 40, 24, dtype=torch.float64), rope_table(30, 8), cu_seqlens)


def test_a_rope_table_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rope must have shape \[L, D / 2, 2\] = \(L, 4, 2\), got \(40, 1, 2\)"):
        make(SMALL)(torch.randn(1, 40, 24, dtype=torch.float64), rope_table(40, 2))


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_a_recorded_selection_is_replayed(packed: bool) -> None:
    cu_seqlens = cumulative((25, 15)) if packed else None
    layer, x, rope = make(SMALL), torch.randn(1, 40, 24, dtype=torch.float64), rope_table(40, 8)
    out, indices = layer(x, rope, cu_seqlens, return_indices=True)
    assert_equal(layer(x, rope, cu_seqlens), out, what="output without the indices")
    assert_equal(layer(x, rope, cu_seqlens, indices=indices), out, what="output when replayed")
    local = indices.where(indices == indices.max(-1, keepdim=True).values, -1)
    replayed, used = layer(x, rope, cu_seqlens, indices=local, return_indices=True)
    assert_equal(used, local, what="indices used")
    assert not torch.equal(replayed, out), "another selection made no difference"


IMPORT_ALONE = """
import sys
for blocked in ("torchtitan", "triton"):
    sys.modules[blocked] = None
import torch
torch.cuda.is_available = torch.cuda._lazy_init = lambda: (_ for _ in ()).throw(RuntimeError("no GPU here"))
import nsa
assert "torch._dynamo" not in sys.modules, "the compiler was imported, which takes as long as all of PyTorch"
x = torch.randn(1, 40, 32)
print(tuple(nsa.NativeSparseAttention(32, 4, 2)(x, nsa.rope_table(40, 8)).shape))
"""


def test_import_needs_neither_torchtitan_nor_a_gpu() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT_ALONE], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "(1, 40, 32)", done.stderr


MEMORY = """
import re, torch
from nsa import NSAConfig, nsa_attention
torch.set_num_threads(1)  # as conftest.py has it for tests
T, H, D, config = 16384, 1, 64, NSAConfig()
def draw(tokens): return torch.randn(1, tokens, H, D, requires_grad=True)
C = config.num_compressed(T)
inputs = [draw(T), draw(C), draw(C), *[draw(T) for _ in range(4)], torch.rand(1, T, H, 3, requires_grad=True)]
nsa_attention(*inputs, config, backend="eager").sum().backward()
assert all(x.grad.isfinite().all() for x in inputs)
# getrusage counts what the process had that started this one.
print(int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024)
"""


def test_memory_of_long_sequences_is_bounded() -> None:
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= PEAK_MEMORY_BYTES, f"peak of {int(done.stdout) / 2**30:.2f} GiB"


@pytest.mark.parametrize("compression", ["mlp", "linear"])
def test_the_backward_keeps_the_keys_of_no_branch_that_it_does_not_read(compression: Any) -> None:
    config = NSAConfig(32, 16, 64, 4, window_size=32, compression=compression)
    layer = make(config, torch.float32, head_dim=16, backend="triton")
    kept: dict[int, tuple[int, set[tuple[Any, int]]]] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept.setdefault(storage.data_ptr(), (storage.nbytes(), set()))[1].add((x.storage_offset(), x.nbytes))
        return x

    x = torch.randn(1, 256, 24, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        layer(x, rope_table(256, 16))
    of_branch = 256 * 2 * 16 * 4  # bytes
    assert max(whole - sum(size for _, size in read) for whole, read in kept.values()) < of_branch


def test_indices_can_be_returned_and_given() -> None:
    q, keys, blocks = torch.randn(1, 50, 2, 8), torch.randn(1, 50, 1, 8), torch.randn(1, 11, 1, 8)
    inputs = (q, blocks, blocks, keys, keys, keys, keys, torch.rand(1, 50, 2, 3), SMALL)
    out, indices = nsa_attention(*inputs, return_indices=True)
    again = nsa_attention(*inputs, indices=indices)
    assert isinstance(again, Tensor)
    assert_equal(again, out, what="output of the same indices")
