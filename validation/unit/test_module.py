"""The layer: against the whole-module oracle, its gradients, compilation, memory, and what it refuses."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from nsa import NativeSparseAttention, NSAConfig, nsa_attention, rope_table
from validation import oracle
from validation.numerics import PEAK_MEMORY_BYTES, assert_equal, assert_matches, gradcheck

pytestmark = pytest.mark.usefixtures("on_device")

SMALL = NSAConfig(compress_block_size=8, compress_stride=4, select_block_size=16, num_selected_blocks=4, window_size=20)
KINDS = [
    replace(SMALL, compression=kind, shared_kv=shared)
    for kind in ("mlp", "linear", "mean")
    for shared in (0 > 1, 1 > 0)
]
each_kind = pytest.mark.parametrize("config", KINDS, ids=lambda c: f"{c.compression}{'-shared' * c.shared_kv}")


def make(config, dtype=torch.float64, *, heads=6, kv_heads=2, head_dim=8, dim=24):
    return NativeSparseAttention(dim, heads, kv_heads, head_dim, config).to(dtype)


def expected(layer, x, rope, cu_seqlens=None):
    sizes = {"num_heads": 6, "num_kv_heads": 2, "head_dim": 8}
    weights = dict(layer.named_parameters())
    return oracle.native_sparse_attention(x, weights, layer.config, **sizes, rope=rope, cu_seqlens=cu_seqlens)


@each_kind
@pytest.mark.parametrize("lengths", [None, (30, 0, 7, 33)], ids=["whole", "packed"])
def test_matches_the_oracle_with_all_gradients(config, lengths):
    layer, rope = make(config), rope_table(70, 8)
    x = torch.randn(1 if lengths else 2, 70, 24, dtype=torch.float64, requires_grad=True)
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int() if lengths else None
    actual, oracles = layer(x, rope, cu_seqlens), expected(layer, x, rope, cu_seqlens)
    assert_matches(actual, oracles, what="output")
    inputs = {"x": x, **dict(layer.named_parameters())}
    dout = torch.randn_like(actual)
    gradients = (torch.autograd.grad(out, inputs.values(), dout) for out in (actual, oracles))
    for name, got, wanted in zip(inputs, *gradients, strict=True):
        assert_matches(got, wanted, what=f"gradient of {name}")


@pytest.mark.parametrize("length", [0, 1, 7])
def test_sequences_without_a_whole_block(length):
    layer, rope, x = make(SMALL), rope_table(8, 8), torch.randn(1, length, 24, dtype=torch.float64)
    assert_matches(layer(x, rope), expected(layer, x, rope), what="output")


@each_kind
def test_gradcheck_of_the_whole_module(config):
    layer = make(config, heads=2, kv_heads=1, head_dim=4, dim=6)
    rope, x = rope_table(24, 4), torch.randn(1, 24, 6, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x, rope))

    gradcheck(run, (x, *parameters), fast=True)


def test_rope_follows_its_definition():
    table = rope_table(3, 4, theta=100.0).double()
    angles = torch.tensor([[0.0, 0.0], [1.0, 0.1], [2.0, 0.2]], dtype=torch.float64)
    assert_equal(table, torch.stack((angles.cos(), angles.sin()), -1).float().double(), what="table")


def test_gates_start_half_open_and_heads_are_their_own():
    layer = make(SMALL)
    assert_equal(layer.wg.bias.detach(), torch.zeros(18, dtype=torch.float64), what="gate bias")
    assert layer.wk.out_features == 2 * 3 * 8
    assert make(replace(SMALL, shared_kv=True)).wk.out_features == 2 * 8


@each_kind
def test_compiles_as_one_graph_to_the_same_function(config):
    layer, rope, x = make(config, torch.float32), rope_table(48, 8), torch.randn(2, 48, 24)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    # On a GPU cuBLAS may take another algorithm for a compiled product, and its bits with it.
    longest_sum = 2 * 48 * 6  # tokens and heads behind an element of a gradient

    def check(got, wanted, what):
        if x.device.type == "cpu":
            assert_equal(got, wanted, what=what)
        assert_matches(got, wanted.double(), what=what, reduction=longest_sum)

    check(compiled(x, rope), layer(x, rope), "compiled output")
    gradients = (torch.autograd.grad(f(x, rope).sum(), list(layer.parameters())) for f in (compiled, layer))
    for name, got, wanted in zip(dict(layer.named_parameters()), *gradients, strict=True):
        check(got, wanted, f"gradient of {name}")


def test_parameters_are_cast_to_the_dtype_of_the_keys():
    layer, x = make(SMALL, torch.float32), torch.randn(1, 40, 24)
    with torch.autocast(x.device.type, torch.bfloat16):
        out = layer(x, rope_table(40, 8))
    assert out.dtype == torch.bfloat16
    assert_matches(out, expected(layer, x, rope_table(40, 8)), what="output under autocast", reduction=24 * 48)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 6, "num_kv_heads": 4}, r"num_heads must be a multiple of num_kv_heads \(4\), got 6"),
        ({"num_heads": 0, "num_kv_heads": 1}, r"num_heads must be a multiple of num_kv_heads \(1\), got 0"),
        ({"num_heads": 5}, r"dim must be a multiple of num_heads \(5\) without a head_dim, got 24"),
    ],
)
def test_heads_that_do_not_divide_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        NativeSparseAttention(24, **arguments)


@pytest.mark.parametrize("bounds", [None, [0, 4, 40]], ids=["whole", "packed"])
def test_a_rope_table_that_is_too_short_is_refused(bounds):
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32) if bounds else None
    with pytest.raises(ValueError, match="rope must have a row for each of the"):
        make(SMALL)(torch.randn(1, 40, 24, dtype=torch.float64), rope_table(30, 8), cu_seqlens)


def test_a_rope_table_of_another_width_is_refused():
    with pytest.raises(ValueError, match=r"rope must have shape \[L, D / 2, 2\] = \(L, 4, 2\), got \(40, 1, 2\)"):
        make(SMALL)(torch.randn(1, 40, 24, dtype=torch.float64), rope_table(40, 2))


IMPORT_ALONE = """
import sys
for blocked in ("torchtitan", "triton"):
    sys.modules[blocked] = None
import torch
torch.cuda.is_available = torch.cuda._lazy_init = lambda: (_ for _ in ()).throw(RuntimeError("no GPU here"))
import nsa
x = torch.randn(1, 40, 32)
print(tuple(nsa.NativeSparseAttention(32, 4, 2)(x, nsa.rope_table(40, 8)).shape))
"""


def test_import_needs_neither_torchtitan_nor_a_gpu():
    done = subprocess.run([sys.executable, "-c", IMPORT_ALONE], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "(1, 40, 32)", done.stderr


MEMORY = """
import resource, torch
from nsa import NSAConfig, nsa_attention
torch.set_num_threads(1)  # as conftest.py has it for tests
T, H, D, config = 16384, 4, 64, NSAConfig()
def draw(tokens): return torch.randn(1, tokens, H, D, requires_grad=True)
C = config.num_compressed(T)
inputs = [draw(T), draw(C), draw(C), *[draw(T) for _ in range(4)], torch.rand(1, T, H, 3, requires_grad=True)]
nsa_attention(*inputs, config, backend="eager").sum().backward()
assert all(x.grad.isfinite().all() for x in inputs)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def test_memory_of_long_sequences_is_bounded():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= PEAK_MEMORY_BYTES, f"peak of {int(done.stdout) / 2**30:.2f} GiB"


def test_indices_can_be_returned_and_given():
    q, keys, blocks = torch.randn(1, 50, 2, 8), torch.randn(1, 50, 1, 8), torch.randn(1, 11, 1, 8)
    inputs = (q, blocks, blocks, keys, keys, keys, keys, torch.rand(1, 50, 2, 3), SMALL)
    out, indices = nsa_attention(*inputs, return_indices=True)
    assert_equal(nsa_attention(*inputs, indices=indices), out, what="output of the same indices")
