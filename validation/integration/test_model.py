"""The transformer without a trainer: flavors, options, initial weights, documents."""

import copy
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchtitan.config.job_config import ActivationCheckpoint
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.models.llama3.infra.parallelize import _op_sac_save_list
from torchtitan.protocols.train_spec import get_train_spec

from nsa.backends import BackendName
from nsa.config import Compression, NSAConfig
from nsa.ops import forward_operators
from nsa.titan.data import ByteTokenizer
from nsa.titan.initial import draw
from nsa.titan.model import ModelArgs, NSAAttention, Transformer
from nsa.titan.train_spec import JobConfig, NSAOptions
from validation.numerics import assert_equal, assert_matches

pytestmark = pytest.mark.smoke

SMALL = NSAConfig(8, 4, 16, 4, window_size=20)
LONGEST_SUM = 256  # the hidden width of the feed-forward layers


def make(attention: str = "nsa", **arguments: Any) -> Transformer:
    sizes: dict[str, Any] = {
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "vocab_size": 320,
        "max_seq_len": 64,
    }
    model = Transformer(ModelArgs(**sizes, attention=attention, nsa=SMALL, **arguments))
    model.init_weights()
    return model


def kinds(model: Transformer) -> list[str]:
    return ["nsa" if isinstance(layer.attention, NSAAttention) else "dense" for layer in model.layers.values()]


def test_every_flavor_has_its_twin() -> None:
    flavors = get_train_spec("nsa").model_args
    names = ("debug", "debug_parallel", "100m", "1b")
    assert set(flavors) == {*names, *(f"{name}_dense" for name in names), "100m_hybrid"}
    for name in names:
        sparse, dense = flavors[name], flavors[f"{name}_dense"]
        assert (sparse.dim, sparse.n_layers, sparse.n_heads) == (dense.dim, dense.n_layers, dense.n_heads)
        assert set(sparse.layer_kinds) == {"nsa"}
        assert set(dense.layer_kinds) == {"dense"}
    assert flavors["100m_hybrid"].layer_kinds == ["dense", "nsa", "nsa", "nsa"] * 2


def parameters(flavor: str) -> dict[str, nn.Parameter]:
    """Of a flavor, without their values."""
    args = get_train_spec("nsa").model_args[flavor]
    args.update_from_config(JobConfig())
    with torch.device("meta"):
        return dict(Transformer(args).named_parameters())


@pytest.mark.parametrize(("flavor", "low", "high"), [("100m", 95e6, 115e6), ("1b", 0.9e9, 1.2e9)])
def test_flavors_have_the_size_they_are_named_after(flavor: str, low: float, high: float) -> None:
    assert low < sum(p.numel() for p in parameters(flavor).values()) < high


def test_little_is_padding_where_many_processes_share_out_parameters() -> None:
    """FSDP2 shares out rows, as many to each process, and gathers padding from those that have none."""
    shapes = [tuple(p.shape) for p in parameters("1b").values()]
    padding = sum(-rows % 1024 * prod(columns) for rows, *columns in shapes)
    assert padding < sum(map(prod, shapes)) / 10


def test_a_flavor_is_not_changed_by_the_jobs_that_use_it() -> None:
    flavors = get_train_spec("nsa").model_args
    flavors["debug"].update_from_config(JobConfig(nsa=NSAOptions(window_size=7)))
    assert flavors["debug"].nsa.window_size == 128


@pytest.mark.parametrize("pattern", ["nsa", "dense", "dense,nsa", "nsa,nsa,dense"])
def test_layers_follow_the_pattern(pattern: str) -> None:
    model = Transformer(ModelArgs(dim=32, n_layers=5, n_heads=4, vocab_size=64, max_seq_len=64, attention=pattern))
    assert kinds(model) == [pattern.split(",")[i % len(pattern.split(","))] for i in range(5)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention": "nsa,sparse"}, "attention must be a pattern of"),
        ({"attn_mask_type": "full"}, "attn_mask_type must be one of"),
        ({"n_heads": 3}, r"dim must be a multiple of n_heads \(3\), got 32"),
        ({"n_heads": 4, "n_kv_heads": 3}, r"n_heads must be a multiple of n_kv_heads \(3\), got 4"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelArgs(**{"dim": 32, "n_heads": 4, **arguments})


def test_an_unknown_flavor_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model.flavor must be one of .*'debug'.*, got '7b'"):
        get_train_spec("nsa").model_args["7b"]


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    model, again, other = make(), make(), make(seed=1)
    hybrid = dict(make("dense,nsa").named_parameters())
    for name, parameter in model.named_parameters():
        assert_equal(dict(again.named_parameters())[name], parameter, what=name)
        if name in hybrid and hybrid[name].shape == parameter.shape:
            assert_equal(hybrid[name], parameter, what=f"{name} beside another layer")
    assert not torch.equal(other.output.weight, model.output.weight)


def test_a_part_of_a_parameter_is_drawn_as_in_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nsa.titan.initial.DRAWN", 24)  # three rows
    whole = torch.empty(10, 8)
    draw(whole, (0, 0), whole.shape, 0.02, "weight", 0)
    assert len(whole.unique()) > 75  # no piece is drawn twice
    for rows, columns in ((slice(2, 9), slice(0, 8)), (slice(4, 5), slice(2, 5)), (slice(10, 10), slice(0, 8))):
        part = torch.empty_like(whole[rows, columns])
        draw(part, (rows.start, columns.start), whole.shape, 0.02, "weight", 0)
        assert_equal(part, whole[rows, columns], what=f"rows {rows}, columns {columns}")


@pytest.mark.needs_gpu
def test_initial_weights_are_the_same_on_any_device() -> None:
    drawn = {}
    for device in ("cpu", "cuda"):
        drawn[device] = torch.empty(300, 8, device=device)
        draw(drawn[device], (0, 0), (300, 8), 0.02, "weight", 0)
    assert_equal(drawn["cuda"].cpu(), drawn["cpu"], what="weight")


@pytest.mark.parametrize("attention", ["nsa", "dense", "dense,nsa"])
def test_documents_in_a_row_are_as_if_alone(attention: str) -> None:
    model = make(attention, attn_mask_type="block_causal")
    tokens = torch.randint(0, 256, (2, 60))
    ends = [[22, 59], [9, 10]]  # the last of a document: one ends with its row, one is a single token
    for row, columns in enumerate(ends):
        tokens[row, columns] = ByteTokenizer.eos_id
    masks = model.get_attention_masks(tokens, ByteTokenizer())
    logits = model(tokens, attention_masks=masks)
    causal = make(attention)
    for row, columns in enumerate(ends):
        bounds = sorted({0, *(column + 1 for column in columns), 60})
        for start, stop in itertools.pairwise(bounds):
            alone = causal(tokens[row : row + 1, start:stop])
            together = logits[row : row + 1, start:stop]
            assert_matches(together, alone.double(), what=f"row {row}, tokens {start} to {stop}", reduction=LONGEST_SUM)


def test_plain_causal_models_have_no_masks() -> None:
    with pytest.raises(TypeError):
        make().get_attention_masks(torch.zeros(1, 8, dtype=torch.long), ByteTokenizer())


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "documents"])
def test_recorded_selections_are_replayed(packed: bool) -> None:
    """Recomputed blocks replay what was given to them, too."""
    model = make("nsa,dense", attn_mask_type="block_causal" if packed else "causal")
    apply_ac(model, ActivationCheckpoint(mode="full"))
    tokens = torch.randint(ByteTokenizer().eos_id, (2, 64))
    tokens[:, 40] = ByteTokenizer().eos_id
    masks = model.get_attention_masks(tokens, ByteTokenizer()) if packed else None
    out, indices = model(tokens, masks, return_indices=True)
    assert {name: tuple(x.shape) for name, x in indices.items()} == {"0": (2, 64, 2, SMALL.num_selected_blocks)}
    assert_equal(out, model(tokens, masks), what="logits of a recorded call")

    few = {name: torch.full_like(x, -1) for name, x in indices.items()}
    replayed, used = model(tokens, masks, indices=few, return_indices=True)
    assert_equal(used["0"], few["0"], what="indices used")
    assert not torch.equal(replayed, out), "another selection made no difference"
    weight = model.layers["0"].attention.wv.weight
    (grad,) = torch.autograd.grad(replayed.sum(), weight)
    assert_equal(grad.view(2, 3, -1)[:, 1], torch.zeros(2, grad.numel() // 6), what="gradients of unselected values")


def test_selections_of_layers_that_make_none_are_refused() -> None:
    tokens = torch.randint(320, (1, 64))
    with pytest.raises(ValueError, match=r"indices must be of NSA layers, \['0'\], got \['1'\]"):
        make("nsa,dense")(tokens, indices={"1": torch.zeros(1, 64, 2, 4, dtype=torch.int32)})


def test_the_future_changes_nothing() -> None:
    model, tokens = make("dense,nsa"), torch.randint(0, 256, (1, 60))
    changed = torch.cat((tokens[:, :41], torch.randint(0, 256, (1, 19))), 1)
    assert_equal(model(changed)[:, :41], model(tokens)[:, :41], what="logits of the past")


def test_flops_count_the_keys_each_layer_looks_at() -> None:
    model = make("dense,nsa")
    weights = sum(p.numel() for p in model.parameters())
    compressors = {name: p.numel() for name, p in model.named_parameters() if ".compress_" in name}
    a_block = sum(size for name, size in compressors.items() if not name.endswith("position"))
    a_token = weights - model.tok_embeddings.weight.numel() - sum(compressors.values())
    keys = 64 + (15 + 64 + 20)  # a dense layer; 15 compressed keys, 4 blocks of 16 and a window of 20 in the other
    size, flops = model.model_args.get_nparams_and_flops(model, 64)
    assert (size, flops) == (weights, 6 * (a_token + a_block // 4) + 12 * 32 * keys)  # blocks are 4 tokens apart


# Selective activation checkpointing.


class Operators(TorchDispatchMode):
    """Counts how often each operator of ours runs, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.ours = Counter[str](), forward_operators()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in self.ours:
            self.calls[str(function)] += 1
        return function(*args, **(kwargs or {}))


Checkpointed = Callable[[Transformer, str], Transformer]


@pytest.fixture
def checkpointed() -> Iterator[Checkpointed]:
    """A copy of a model under activation checkpointing as TorchTitan's plan for llama3 applies it."""

    def apply(model: Transformer, mode: str) -> Transformer:
        model = copy.deepcopy(model)
        options = ActivationCheckpoint(mode=mode, selective_ac_option="op")
        apply_ac(model, options, op_sac_save_list=_op_sac_save_list)
        return model

    yield apply
    # What `apply_ac` turns off for all that is compiled later.
    torch._C._dynamo.eval_frame._set_lru_cache(True)  # type: ignore[attr-defined]


def train_a_step(model: Transformer, tokens: Tensor) -> tuple[Counter[str], dict[str, Any]]:
    """How often our operators run, and the gradients, by the parameters' names in the model as it was made."""
    with Operators() as counted:
        model(tokens).square().mean().backward()
    names = (name.replace("_checkpoint_wrapped_module.", "") for name, _ in model.named_parameters())
    return counted.calls, dict(zip(names, (p.grad for p in model.parameters()), strict=True))


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("compression", ["mlp", "mean"])
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_selective_checkpointing_by_operator_computes_attention_once(
    backend: BackendName, compression: Compression, checkpointed: Checkpointed
) -> None:
    config = NSAConfig(16, 8, 16, 2, num_local_blocks=1, window_size=8, compression=compression)
    sizes: dict[str, Any] = {
        "dim": 32,
        "n_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 1,
        "vocab_size": 64,
        "max_seq_len": 48,
    }
    model = Transformer(ModelArgs(**sizes, nsa=config, backend=backend))
    model.init_weights()
    tokens = torch.randint(0, 64, (1, 48))
    calls, gradients = train_a_step(copy.deepcopy(model), tokens)
    assert len(calls) == 4, "a forward pass has other operators that are worth keeping"
    for mode, times in (("selective", 1), ("full", 2)):
        repeated, again = train_a_step(checkpointed(model, mode), tokens)
        assert repeated == Counter({name: times * number for name, number in calls.items()}), mode
        for name, gradient in gradients.items():
            assert_equal(again[name], gradient, what=f"gradient of {name} under {mode}")
