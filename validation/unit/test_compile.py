"""What PyTorch does to a program, done to this one: compilation to one graph, operators under test, recomputation."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from nsa import NativeSparseAttention, NSAConfig, kernels, rope_table
from nsa.operators import sizes_of
from validation.numerics import assert_equal, assert_matches
from validation.unit.cases import Case, Tensors, config, cumulative, draw, whole

pytestmark = pytest.mark.usefixtures("on_device")

DIM, HEADS, HEAD_DIM = 32, 2, 16
PACKED = [(17, 0, 7), (3, 19, 2)]
# Every block there is: rounding that differs cannot lead to another choice.
ALL_BLOCKS = config((16, 8, 16), 3, 12, num_local_blocks=1, compression="mean")
ONE_FREE_BLOCK = config((16, 8, 16), 2, 12, num_initial_blocks=0, num_local_blocks=1)
BACKENDS = ["aot_eager"] if kernels.INTERPRETED else ["aot_eager", "inductor"]

each_packing = pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])


def make_layer(settings: NSAConfig) -> NativeSparseAttention:
    return NativeSparseAttention(DIM, HEADS, 1, HEAD_DIM, settings, backend="triton")


def gradients(layer: NativeSparseAttention, function: Callable[..., Tensor], *inputs: Tensor | None) -> Tensors:
    """Output and gradients of the input and of every parameter, under the same cotangent each time."""
    x = inputs[0].detach().requires_grad_()
    out = function(x, *inputs[1:])
    leaves = {"x": x, **dict(layer.named_parameters())}
    found = torch.autograd.grad(out, list(leaves.values()), torch.linspace(-1, 1, out.numel()).view_as(out))
    return {"output": out.detach(), **{f"gradient of {name}": g for name, g in zip(leaves, found, strict=True)}}


# 1. Compilation.


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", BACKENDS)
@each_packing
def test_compiles_once_to_the_same_function(packed: bool, backend: str) -> None:
    layer, rope, counter = make_layer(ALL_BLOCKS), rope_table(24, HEAD_DIM), CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for lengths in PACKED:
        inputs = (torch.randn(1, 24, DIM), rope, cumulative(lengths) if packed else None)
        actual, expected = gradients(layer, compiled, *inputs), gradients(layer, layer, *inputs)
        for name, x in expected.items():
            if backend == "aot_eager" and x.device.type == "cpu":
                assert_equal(actual[name], x, what=f"compiled {name}")
            # A GPU's cuBLAS may take another algorithm for a compiled product, and inductor fuses roundings away.
            assert_matches(actual[name], x.double(), what=f"compiled {name}", reduction=24 * HEADS * HEAD_DIM)
    assert counter.frame_count == 1, f"compiled {counter.frame_count} times for one set of shapes"


# 2. Operators.

CASE = Case("operators", whole(24), ALL_BLOCKS, kv_heads=1, key_dim=16, value_dim=32)


def branch(name: str, namespace: str, x: Tensors) -> tuple:
    k, v = ("k_cmp", "v_cmp") if name == "compressed_attention" else ("k", "v")
    indices = x["indices"] if name == "selected_attention" else None
    return (x["q"], x[k], x[v], indices, None, None, CASE.num_keys, sizes_of(ALL_BLOCKS), 0.25)


def branch_backward(name: str, namespace: str, x: Tensors) -> tuple:
    name = name.removesuffix("_backward")
    inputs = branch(name, namespace, x)
    out, lse = getattr(getattr(torch.ops, namespace), name)(*inputs)
    return (torch.randn_like(out), *inputs[:3], out, lse, *inputs[3:])


def select(name: str, namespace: str, x: Tensors) -> tuple:
    lse = (x["lse"],) if namespace == "nsa_triton" else ()
    return (x["q"], x["k_cmp"], *lse, None, None, CASE.num_keys, sizes_of(ALL_BLOCKS), 0.25)


def attend(name: str, namespace: str, x: Tensors) -> tuple:
    out_cmp, lse_cmp = torch.ops.nsa_triton.compressed_attention(*branch("compressed_attention", namespace, x))
    names = ("q", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gates")
    return (*(x[n] for n in names), out_cmp, lse_cmp, x["indices"], None, None, sizes_of(ALL_BLOCKS), 0.25)


def attend_backward(name: str, namespace: str, x: Tensors) -> tuple:
    *inputs, sizes, scale = attend(name, namespace, x)
    out, *saved = torch.ops.nsa_triton.attend(*inputs, sizes, scale)
    return (torch.randn_like(out), *inputs, *saved, sizes, scale)


def compress_mean(name: str, namespace: str, x: Tensors) -> tuple:
    return (
        x["k"],
        None,
        ALL_BLOCKS.num_compressed(CASE.num_keys),
        ALL_BLOCKS.compress_block_size,
        ALL_BLOCKS.compress_stride,
    )


def compress_mean_backward(name: str, namespace: str, x: Tensors) -> tuple:
    return (x["k_cmp"], None, CASE.num_keys, ALL_BLOCKS.compress_block_size, ALL_BLOCKS.compress_stride)


BRANCHES = ("compressed_attention", "selected_attention", "sliding_window_attention")
OPERATORS: dict[str, Callable[[str, str, Tensors], tuple]] = {
    **{f"{space}::{name}": branch for space in ("nsa_eager", "nsa_triton") for name in BRANCHES},
    **{f"{space}::{name}_backward": branch_backward for space in ("nsa_eager", "nsa_triton") for name in BRANCHES},
    "nsa_eager::select_blocks": select,
    "nsa_triton::select_blocks": select,
    "nsa_triton::attend": attend,
    "nsa_triton::attend_backward": attend_backward,
    "nsa_triton::compress_mean": compress_mean,
    "nsa_triton::compress_mean_backward": compress_mean_backward,
}


def test_every_operator_is_among_those_tested() -> None:
    registered = {
        name for name in torch._C._dispatch_get_all_op_names() if name.startswith(("nsa_eager", "nsa_triton"))
    }
    assert registered == set(OPERATORS)


@pytest.mark.parametrize("qualified", OPERATORS)
def test_operators_keep_the_rules(qualified: str) -> None:
    namespace, name = qualified.split("::")
    inputs = OPERATORS[qualified](name, namespace, draw(CASE, torch.float32))
    if not name.endswith("_backward"):
        inputs = tuple(x.requires_grad_(x.is_floating_point()) if isinstance(x, Tensor) else x for x in inputs)
    torch.library.opcheck(getattr(getattr(torch.ops, namespace), name).default, inputs)


@pytest.mark.parametrize("qualified", OPERATORS)
def test_operators_promise_what_they_give(qualified: str) -> None:
    """In a narrow dtype, where it matters which results are kept in a wider one."""
    namespace, name = qualified.split("::")
    inputs = OPERATORS[qualified](name, namespace, draw(CASE, torch.bfloat16))
    torch.library.opcheck(getattr(getattr(torch.ops, namespace), name).default, inputs, test_utils="test_faketensor")


@each_packing
def test_shapes_are_known_without_values(packed: bool) -> None:
    layer, x = make_layer(ALL_BLOCKS), torch.randn(1, 24, DIM)
    with FakeTensorMode(allow_non_fake_inputs=True) as fakes:
        out = layer(fakes.from_tensor(x), None, fakes.from_tensor(cumulative(PACKED[0])) if packed else None)
    assert out.shape == x.shape


# 3. Recomputation in the backward pass.


class Selections(TorchDispatchMode):
    """Keeps the indices of every selection that is computed, the second time in a backward pass too."""

    def __init__(self) -> None:
        super().__init__()
        self.indices: list[Tensor] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.nsa_triton.select_blocks.default:
            self.indices.append(result.detach().clone())
        return result


ATTENTION = {
    getattr(torch.ops.nsa_triton, name).default for name in ("compressed_attention", "select_blocks", "attend")
}
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}


def keeping(kept: set, context, function, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if function in kept else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize(
    ("kept", "packed", "selections"),
    [(None, False, 2), (None, True, 2), (ATTENTION, False, 1), (PRODUCTS, False, 2)],
    ids=["full", "full_packed", "attention_kept", "products_kept"],
)
def test_recomputation_gives_the_same_bits(kept: set | None, packed: bool, selections: int) -> None:
    layer, rope = make_layer(ONE_FREE_BLOCK), rope_table(40, HEAD_DIM)
    inputs = (torch.randn(1, 40, DIM), rope, cumulative((3, 0, 37)) if packed else None)
    options = (
        {} if kept is None else {"context_fn": partial(create_selective_checkpoint_contexts, partial(keeping, kept))}
    )
    with Selections() as recorded:
        actual = gradients(layer, partial(checkpoint, layer, use_reentrant=False, **options), *inputs)
    for name, x in gradients(layer, layer, *inputs).items():
        assert_equal(actual[name], x, what=name)
    assert len(recorded.indices) == selections, "blocks were selected another number of times than the policy says"
    assert_equal(recorded.indices[-1], recorded.indices[0], what="indices when recomputed")
