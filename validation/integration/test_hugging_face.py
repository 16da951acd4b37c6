"""Weights in Hugging Face's format: what is saved is what is loaded, by us and by `transformers`, and dense models
become sparse ones that compute the same."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from nsa.config import Compression, NSAConfig
from nsa.titan.hugging_face import CONFIG_FILE, HuggingFaceAdapter, read_config, write_config
from nsa.titan.load import load_model
from nsa.titan.model import ModelArgs, Transformer
from nsa.titan.refusals import JobError
from validation import runs
from validation.integration.layouts import BY_NAME, ONE, STEPS, TRAINING, assert_same, train
from validation.numerics import TRANSFORMERS_BOUND, assert_equal, assert_matches, assert_same_parameters

SMALL = NSAConfig(16, 8, 16, 4, window_size=20)
SIZES: dict[str, Any] = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 320, "max_seq_len": 96}
LONGEST_SUM = 512  # the hidden width of the feed-forward layers
WEIGHTS = "model.safetensors"


def make(attention: str, config: NSAConfig = SMALL, **options: Any) -> Transformer:
    model = Transformer(ModelArgs(**SIZES, attention=attention, nsa=config, backend="eager", **options))
    model.init_weights()
    for name, parameter in model.named_parameters():
        if "attention.w" in name and parameter.dim() > 1:
            parameter.data *= 20  # what tokens attend to matters
    return model.requires_grad_(False)


def save(model: Transformer, folder: Path, files: int = 1) -> None:
    folder.mkdir()
    weights = HuggingFaceAdapter(model.model_args, None).to_hf(dict(model.named_parameters()))
    names = [WEIGHTS] if files == 1 else [f"model-{i + 1:05}-of-{files:05}.safetensors" for i in range(files)]
    for number, file in enumerate(names):
        save_file({name: weights[name].contiguous() for name in [*weights][number::files]}, folder / file)
    write_config(folder, model.model_args, torch.float32, "bytes")


def change(folder: Path, weights: dict[str, torch.Tensor | None]) -> None:
    """Replaces weights in a folder, or removes them (None)."""
    held = {**load_file(folder / WEIGHTS), **weights}
    save_file({name: x for name, x in held.items() if x is not None}, folder / WEIGHTS)


TOKENS = torch.arange(2 * 90).view(2, 90) * 7919 % 320


@pytest.mark.smoke
@pytest.mark.parametrize("attention", ["nsa", "dense", "dense,nsa"])
@pytest.mark.parametrize(
    "options", [{}, {"shared_kv": True}, {"compression": "linear"}, {"compression": "mean"}], ids=str
)
@pytest.mark.parametrize("files", [1, 3])
def test_what_is_saved_is_loaded(tmp_path: Path, attention: str, options: dict[str, Any], files: int) -> None:
    config = NSAConfig(16, 8, 16, 4, window_size=20, **options)
    model = make(attention, config)
    save(model, tmp_path / "saved", files)
    loaded, _ = load_model(tmp_path / "saved", device="cpu")
    assert loaded.model_args.nsa == config or attention == "dense"
    assert_equal(loaded(TOKENS), model(TOKENS), what="logits")


@pytest.fixture
def transformers() -> ModuleType:
    """The library, of which only these tests make use."""
    return pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.mark.smoke
def test_transformers_computes_what_a_dense_model_does(tmp_path: Path, transformers: ModuleType) -> None:
    model = make("dense")
    save(model, tmp_path / "saved")
    with torch.no_grad():
        found = model(TOKENS)
        for dtype in (torch.float64, torch.float32):
            theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "saved", dtype=dtype)(TOKENS).logits
            if dtype == torch.float64:
                assert_matches(found, theirs, what="logits", reduction=LONGEST_SUM, logit=20)
            else:
                error = (found - theirs).abs().max() / theirs.abs().max()
                assert error <= TRANSFORMERS_BOUND, f"logits differ by {error:.1e} of the largest"


@pytest.mark.smoke
def test_models_of_transformers_are_loaded(tmp_path: Path, transformers: ModuleType) -> None:
    """Without scaling of the frequencies, with tied embeddings, and in several files."""
    sizes = {"hidden_size": 64, "intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=320, tie_word_embeddings=True)
    theirs = transformers.LlamaForCausalLM(config)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    said = json.loads((tmp_path / "theirs" / CONFIG_FILE).read_text())
    (tmp_path / "theirs" / CONFIG_FILE).write_text(json.dumps({**said, "tokenizer": "bytes"}))
    ours, _ = load_model(tmp_path / "theirs", device="cpu")
    with torch.no_grad():
        assert_matches(ours(TOKENS), theirs.double()(TOKENS).logits, what="logits", reduction=LONGEST_SUM)


def to_sparse(folder: Path, attention: str, config: NSAConfig = SMALL, gates: str = "0,1,0") -> Transformer:
    """A model that is given the weights in a folder."""
    model = make(attention, config, initial_gates=gates)
    adapter = HuggingFaceAdapter(model.model_args, None)
    assert adapter.read(folder) == []
    adapter.to_hf(dict(model.named_parameters()))
    model.load_state_dict(adapter.from_hf(load_file(folder / WEIGHTS)))
    return model


@pytest.mark.smoke
@pytest.mark.parametrize("attention", ["nsa", "dense,nsa"])
@pytest.mark.parametrize("options", [{}, {"shared_kv": True}], ids=str)
def test_a_sparse_model_of_a_dense_one_computes_the_same(
    tmp_path: Path, attention: str, options: dict[str, Any]
) -> None:
    """With all blocks selected and no other branch."""
    dense = make("dense")
    save(dense, tmp_path / "dense")
    sparse = to_sparse(tmp_path / "dense", attention, NSAConfig(16, 8, 16, 6, window_size=20, **options))
    expected = dense.double()
    expected.freqs_cis = dense.freqs_cis.to(torch.complex128)
    assert_matches(sparse(TOKENS), expected(TOKENS), what="logits", reduction=LONGEST_SUM, logit=20)


@pytest.mark.smoke
@pytest.mark.parametrize("attention", ["nsa", "dense"])
def test_what_a_model_began_with_does_not_matter_when_it_is_saved(tmp_path: Path, attention: str) -> None:
    """An adapter that has loaded dense or tied weights saves those of the model."""
    save(make("dense"), tmp_path / "dense")
    change(tmp_path / "dense", {"lm_head.weight": None})
    model = make(attention)
    adapter = HuggingFaceAdapter(model.model_args, None)
    assert adapter.read(tmp_path / "dense") == []
    parameters = dict(model.named_parameters())
    adapter.to_hf(parameters)
    adapter.from_hf(load_file(tmp_path / "dense" / WEIGHTS))
    found, expected = adapter.to_hf(parameters), HuggingFaceAdapter(model.model_args, None).to_hf(parameters)
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert_equal(found[name], x, what=name)


@pytest.mark.smoke
def test_a_stage_without_embeddings_has_tied_weights(tmp_path: Path) -> None:
    save(make("dense"), tmp_path / "dense")
    change(tmp_path / "dense", {"lm_head.weight": None})
    adapter = HuggingFaceAdapter(make("dense").model_args, None)
    assert adapter.read(tmp_path / "dense") == []
    held = load_file(tmp_path / "dense" / WEIGHTS)
    room = adapter.to_hf({"output.weight": torch.zeros(320, 64)})
    assert list(room) == ["model.embed_tokens.weight"]
    loaded = adapter.from_hf({name: held[name] for name in room})
    assert_equal(loaded["output.weight"], held["model.embed_tokens.weight"], what="output")


def test_files_of_a_tokenizer_do_not_say_where_weights_go(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    assert HuggingFaceAdapter(make("nsa").model_args, str(tmp_path)).fqn_to_index_mapping is None


OTHERS = {
    "theta": ({"rope_theta": 5e5}, {"model.rope_theta": (5e5, 10000)}),
    "heads": ({"num_attention_heads": 8, "head_dim": 8}, {"model.n_heads": (8, 4)}),
    "same": ({}, {}),
}


@pytest.mark.parametrize(("changes", "expected"), OTHERS.values(), ids=OTHERS)
def test_weights_of_another_model_are_told_by_their_config(
    tmp_path: Path, changes: dict[str, Any], expected: dict[str, Any]
) -> None:
    save(make("dense"), tmp_path / "dense")
    said(tmp_path / "dense", **changes)
    assert HuggingFaceAdapter(make("nsa").model_args, None).differences(tmp_path / "dense") == expected


@pytest.mark.smoke
@pytest.mark.parametrize("compression", ["mlp", "linear", "mean"])
def test_compressors_begin_with_the_mean(tmp_path: Path, compression: Compression) -> None:
    save(make("dense"), tmp_path / "dense")
    model = to_sparse(tmp_path / "dense", "nsa", NSAConfig(16, 8, 16, 4, compression=compression))
    x = torch.randn(1, 64, 2, 16)
    mean = x.double().unfold(1, 16, 8).mean(-1)
    for compressor in (model.layers["1"].attention.compress_k, model.layers["0"].attention.compress_v):
        found = compressor(x, backend="eager")
        # The activation of the hidden layer bends, which is little where its argument is.
        expected = 32 * F.silu(mean / 16) if compression == "mlp" else mean
        assert_matches(found, expected, what="block", reduction=16 * 16)


@pytest.mark.parametrize(
    ("gates", "message"),
    [("0,1", "got '0,1'"), ("0,1,2", "got '0,1,2'"), ("a,b,c", "got 'a,b,c'"), ("nan,0,0", "got 'nan,0,0'")],
)
def test_gates_that_are_none_are_refused(gates: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^initial_gates must be three numbers from 0 to 1 .*{message}"):
        ModelArgs(**SIZES, initial_gates=gates)


def test_gates_begin_as_they_are_told() -> None:
    bias = make("nsa", initial_gates="0.25,1,0").layers["0"].attention.wg.bias
    assert_matches(bias.view(4, 3).sigmoid(), torch.tensor([[0.25, 1, 0]]).double().expand(4, 3), what="gates")


K = "model.layers.1.self_attn.k_proj.weight"
MISFITS = {
    "missing": ({K: None}, f"{K} is [32, 64], and missing in the checkpoint"),
    "misshapen": ({K: torch.zeros(16, 64)}, f"{K} is [32, 64], and [16, 64] in the checkpoint"),
    "extra": (
        {"model.layers.2.mlp.up_proj.weight": torch.zeros(3)},
        "model.layers.2.mlp.up_proj.weight is of no layer of the model, and [3] in the checkpoint",
    ),
    "never_loaded": ({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}, None),
}


@pytest.mark.parametrize(("weights", "expected"), MISFITS.values(), ids=MISFITS)
@pytest.mark.parametrize("attention", ["nsa", "dense"])
def test_what_does_not_fit_is_named(
    tmp_path: Path, weights: dict[str, torch.Tensor | None], expected: str | None, attention: str
) -> None:
    save(make("dense"), tmp_path / "dense")
    change(tmp_path / "dense", weights)
    found = HuggingFaceAdapter(make(attention).model_args, None).read(tmp_path / "dense")
    assert found == ([] if expected is None else [expected])


REFUSED = {
    "no_weights": (lambda f: (f / WEIGHTS).unlink(), "be a folder with safetensors files"),
    "torn": (lambda f: (f / WEIGHTS).write_bytes(b"torn"), "must be a safetensors file"),
    "no_layer": (lambda f: change(f, {"model.norm.weight": None}), "model.norm.weight is .64., and missing"),
    "no_json": (lambda f: (f / CONFIG_FILE).write_text("{"), "must say of what model the weights beside it are"),
    "other": (lambda f: said(f, model_type="gpt2"), 'model_type in .* must be "llama" or "nsa", got .gpt2.'),
    "bias": (lambda f: said(f, attention_bias=True), "attention_bias in .* must be false"),
    "wide_heads": (lambda f: said(f, head_dim=32), "head_dim in .* must be hidden_size / 4, got 32"),
    "scaling": (lambda f: said(f, rope_scaling={"rope_type": "yarn"}), "rope_type in .* got .yarn."),
    "old_scaling": (lambda f: said(f, rope_scaling={"type": "linear", "factor": 4.0}), "rope_type in .* got .linear."),
    "activation": (lambda f: said(f, hidden_act="gelu"), 'hidden_act in .* must be "silu", got .gelu.'),
    "lacks": (lambda f: said(f, rms_norm_eps=...), "must describe a llama or NSA model"),
}


def said(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    changed = {name: x for name, x in {**config, **changes}.items() if x is not ...}
    (folder / CONFIG_FILE).write_text(json.dumps(changed))


@pytest.mark.parametrize(("spoil", "message"), REFUSED.values(), ids=REFUSED)
def test_a_folder_that_is_none_is_refused(tmp_path: Path, spoil: Callable[[Path], object], message: str) -> None:
    save(make("dense"), tmp_path / "saved")
    spoil(tmp_path / "saved")
    with pytest.raises(JobError, match=message):
        load_model(tmp_path / "saved", device="cpu")


@pytest.mark.parametrize("width", [32, 100, 171, 512, 1000])
def test_any_width_of_the_feed_forward_layers_is_read(tmp_path: Path, width: int) -> None:
    save(make("dense"), tmp_path / "saved")
    said(tmp_path / "saved", intermediate_size=width)
    with torch.device("meta"):
        model = Transformer(read_config(tmp_path / "saved")[0])
    assert model.layers["0"].feed_forward.w1.out_features == width


# Over processes.

EXPORT = ("--checkpoint.last_save_in_hf", "--checkpoint.last_save_model_only")


@pytest.fixture(scope="module")
def dense_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a training of the dense twin has exported."""
    folder = tmp_path_factory.mktemp("dense")
    train(ONE, folder, *EXPORT, "--nsa.attention=dense")
    (exported,) = (folder / "checkpoint").glob("step-*/config.json")
    return exported.parent


def begin(folder: Path) -> tuple[str, ...]:
    return "--checkpoint.initial_load_in_hf", f"--checkpoint.initial_load_path={folder}", "--nsa.initial_gates=.1,.8,.2"


def test_nothing_goes_on_from_an_export(tmp_path: Path, dense_weights: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(dense_weights.parent.parent, folder)
    options = (*TRAINING, *ONE.arguments, *EXPORT, "--nsa.attention=dense", f"--training.steps={STEPS + 1}")
    with pytest.raises(RuntimeError, match="has weights in Hugging Face's format, which is too little to go on from"):
        runs.train(options, folder)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=BY_NAME[name].marks) for name in ("fsdp2", "tp2", "fsdp2-tp2", "pp2-1f1b")]
)
def test_layouts_begin_with_the_same_and_export_the_same(tmp_path: Path, dense_weights: Path, name: str) -> None:
    layout = BY_NAME[name]
    train(ONE, tmp_path / "one", *begin(dense_weights))
    train(layout, tmp_path / name, *begin(dense_weights))
    assert_same(tmp_path / name, tmp_path / "one")
    trained = runs.read_parameters(tmp_path / "one", STEPS)
    for folder, one in ((tmp_path / "one", ONE), (tmp_path / name, layout)):
        shutil.rmtree(folder)
        train(one, folder, *begin(dense_weights), *EXPORT)
        model, _ = load_model(folder, device="cpu")
        assert_same_parameters(dict(model.named_parameters()), trained)
