"""A trained model goes on with text: caches of the whole model, sampling, and the command."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa.config import NSAConfig
from nsa.generate import Printer, benchmark, generate, main, sample, stream
from nsa.titan.data import ByteTokenizer
from nsa.titan.load import find_checkpoint, load_model, model_args
from nsa.titan.model import ModelArgs, Transformer
from nsa.titan.refusals import JobError
from validation.numerics import assert_equal, assert_matches
from validation.runs import train
from validation.system.definitions import train_tokenizer

pytestmark = pytest.mark.smoke

SMALL = NSAConfig(8, 4, 16, 4, window_size=20)
KINDS = ["nsa", "dense", "dense,nsa"]
POSITIONS, VOCABULARY = 96, 320
LONGEST_SUM = 256  # the hidden width of the feed-forward layers


def make(attention: str = "nsa", dtype: torch.dtype = torch.float64) -> Transformer:
    sizes: dict[str, Any] = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": VOCABULARY}
    model = Transformer(ModelArgs(**sizes, max_seq_len=POSITIONS, attention=attention, nsa=SMALL, backend="eager"))
    model.init_weights()
    model.freqs_cis = model.freqs_cis.to(torch.complex128) if dtype == torch.float64 else model.freqs_cis
    for name, parameter in model.named_parameters():
        # As it starts, a model goes by its last token, whatever came before it.
        parameter.data = parameter.data.to(dtype) * (30 if "attention.w" in name else 1)
    return model


def greedy(model: Transformer, prompt: list[int], count: int) -> list[int]:
    """Tokens that forward passes over everything so far find most likely."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


# 1. Caches of a model.


@pytest.mark.parametrize("sizes", [(70,), (33, 1, 1, 30, 5)])
@pytest.mark.parametrize("attention", KINDS)
def test_chunks_give_the_logits_of_the_whole(attention: str, sizes: tuple[int, ...]) -> None:
    model, tokens = make(attention), torch.randint(VOCABULARY, (2, 70))
    cache = model.make_cache(2, 70)
    logits = torch.cat([model(piece, cache=cache) for piece in tokens.split(sizes, 1)], 1)
    assert_matches(logits, model(tokens).detach(), what="logits", reduction=LONGEST_SUM)


@pytest.mark.parametrize("attention", KINDS)
def test_logits_of_some_tokens_are_those_of_all(attention: str) -> None:
    model, tokens, at = make(attention), torch.randint(VOCABULARY, (2, 30)), torch.tensor([29, 7])
    expected = model(tokens, cache=model.make_cache(2, 30))[torch.arange(2), at]
    found = model(tokens, cache=model.make_cache(2, 30), at=at)
    assert_matches(found, expected, what="logits", reduction=LONGEST_SUM)
    with pytest.raises(ValueError, match=r"^at must be None without a cache, got a tensor$"):
        model(tokens, at=at)


def test_caches_are_refused_what_they_have_no_room_for_and_stay() -> None:
    model, tokens = make("dense,nsa"), torch.randint(VOCABULARY, (1, 30))
    cache = model.make_cache(1, 40)
    model(tokens, cache=cache)
    with pytest.raises(ValueError, match=r"^cache must have room for 30 tokens after 30, got 40 in all"):
        model(tokens, cache=cache)
    with pytest.raises(ValueError, match=r"^nothing but tokens can be given beside a cache"):
        model(tokens[:, :1], cache=cache, return_indices=True)
    others = {**cache, "1": model.make_cache(2, 40)["1"]}
    with pytest.raises(ValueError, match=r"^cache must be for a batch of 1, got one for 2"):
        model(tokens[:, :1], cache=others)
    with pytest.raises(ValueError, match=r"^cache must be of the layers \['0', '1'\], got \['0'\]"):
        model(tokens[:, :1], cache={"0": cache["0"]})
    with pytest.raises(TypeError, match=r"^cache of layer 1 must be a KVCache, got DenseCache"):
        model(tokens[:, :1], cache={"0": cache["0"], "1": cache["0"]})
    assert {one.lengths for one in cache.values()} == {(30,)}
    assert not model(tokens[:, :1], cache=cache).requires_grad
    with pytest.raises(ValueError, match=r"^capacity must be at most the model's positions \(96\), got 97"):
        model.make_cache(1, 97)


# 2. Generation.


@pytest.mark.parametrize("attention", KINDS)
@pytest.mark.parametrize("chunk", [7, 1024])
def test_greedy_tokens_are_those_of_full_passes(attention: str, chunk: int) -> None:
    model = make(attention)
    prompts = [torch.randint(VOCABULARY, (length,)).tolist() for length in (40, 1, 23, 40)]
    found = generate(model, prompts, 12, chunk=chunk)
    assert found == [greedy(model, prompt, 12) for prompt in prompts]
    assert found[2] != greedy(model, [3] * 17 + prompts[2], 12), "what came before makes no difference"


def test_tokens_come_as_they_are_drawn_and_end_with_a_stop_token() -> None:
    model, prompt = make(), torch.randint(VOCABULARY, (20,)).tolist()
    whole, came = greedy(model, prompt, 8), []
    other = greedy(model, prompt[:9], 8)
    stop = whole[3]
    found = generate(
        model, [prompt, prompt[:9]], 8, stop=(stop,), on_token=lambda row, token: came.append((row, token))
    )
    assert found[0] == whole[: whole.index(stop) + 1]
    assert found[1] == (other[: other.index(stop) + 1] if stop in other else other)
    for row in (0, 1):
        assert [token for of, token in came if of == row] == found[row]
    assert generate(model, [prompt], 0) == [[]]
    assert max(generate(model, [prompt], 40, temperature=9.0, vocab_size=7)[0]) < 7


def test_tokens_are_drawn_no_sooner_than_they_are_asked_for() -> None:
    model, prompt = make(), torch.randint(VOCABULARY, (20,)).tolist()
    calls, expected = [], generate(make(), [prompt, prompt[:9]], 2)
    model.register_forward_hook(lambda *_: calls.append(1))
    steps = stream(model, [prompt, prompt[:9]], 3)
    assert not calls
    assert [next(steps) for _ in range(2)] == [list(step) for step in zip(*expected, strict=True)]
    assert len(calls) == 2, "a call for the prompts, and one for each token after the first"


def test_a_seed_is_repeated_and_another_gives_other_tokens() -> None:
    model, prompt = make(), [5, 6, 7]
    first, again, other = (generate(model, [prompt], 30, temperature=1.0, seed=seed) for seed in (3, 3, 4))
    assert first == again != other
    assert generate(model, [prompt], 30, temperature=1.0) != generate(model, [prompt], 30, temperature=1.0)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "prompts must have at least one token each, got none"),
        ([[1], []], {}, "prompts must have at least one token each, got none"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens must be at least 0"),
        ([[1]], {"max_new_tokens": POSITIONS}, "capacity must be at most the model's positions"),
        ([[1]], {"temperature": -1.0}, "temperature must be at least 0 and finite, got -1.0"),
        ([[1]], {"top_k": 0}, "top_k must be an integer of at least 1, got 0"),
        ([[1]], {"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
    ],
)
def test_what_cannot_be_generated_is_refused(prompts: list[list[int]], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        generate(make(), prompts, **{"max_new_tokens": 3, **options})


PROBABILITIES = torch.tensor([0.1, 0.4, 0.2, 0.3])


def drawn(**options: Any) -> list[float]:
    """Which tokens are drawn, of many, and how often."""
    logits = PROBABILITIES.log().expand(4000, -1)
    tokens = sample(logits, generator=torch.Generator().manual_seed(0), **{"temperature": 1.0, **options})
    return (tokens.bincount(minlength=4) / 4000).tolist()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 9}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_p": 0.4}, [0, 1, 0, 0]),
        ({"top_p": 0.41}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.9, "top_k": 1}, [0, 1, 0, 0]),
        ({"temperature": 0.0}, [0, 1, 0, 0]),
        ({"temperature": 1e-40}, [0, 1, 0, 0]),
    ],
)
def test_tokens_are_drawn_as_often_as_they_should_be(options: dict[str, Any], expected: list[float]) -> None:
    for found, wanted in zip(drawn(**options), expected, strict=True):
        assert (found == 0) == (wanted == 0)
        # Five standard deviations of a mean of 4000 draws.
        assert abs(found - wanted) <= 5 * (wanted * (1 - wanted) / 4000) ** 0.5


# 3. Checkpoints and the command.


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training run of two short steps."""
    folder = tmp_path_factory.mktemp("run") / "nsa"
    options = ("--training.steps=2", "--training.seq_len=64", "--validation.no-enable", f"--job.dump_folder={folder}")
    command = (sys.executable, "-m", "nsa.train", *options, "--nsa.attention=dense,nsa", "--nsa.window_size=48")
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def run(folder: Path, *options: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-m", "nsa.generate", f"--checkpoint={folder}", *options)
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=300, check=False)


def test_a_checkpoint_is_the_model_that_was_trained(run_folder: Path) -> None:
    model, tokenizer = load_model(run_folder, device="cpu", room_for=lambda tokenizer: 200)
    assert model.model_args.layer_kinds == ["dense", "nsa"]
    assert model.model_args.nsa.window_size == 48
    assert len(model.freqs_cis) == 200
    assert not any(p.requires_grad for p in model.parameters())
    again, _ = load_model(run_folder / "checkpoint" / "step-2", device="cpu")
    tokens = torch.tensor([list(tokenizer.encode("import os\n"))])
    assert_equal(again(tokens), model(tokens), what="logits of the checkpoint by its own name")
    other = Transformer(model_args({**job(run_folder), "debug.seed": 0}, max_seq_len=64))
    other.init_weights()
    assert not torch.equal(other(tokens), model(tokens)), "the weights are those that training began with"


def job(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "checkpoint" / "job.json").read_text())["jobs"][-1]["job"]


def test_the_command_goes_on_with_a_prompt(run_folder: Path) -> None:
    options = ("--max-new-tokens=20", "--seed=1")
    by_option = run(run_folder, "--prompt=def main():", *options)
    assert by_option.returncode == 0, by_option.stderr
    assert by_option.stderr.startswith("20 tokens in ")
    by_input = run(run_folder, "--prompt=-", *options, text="def main():")
    assert by_input.stdout == by_option.stdout != ""


def test_the_command_measures_latencies(run_folder: Path) -> None:
    done = run(run_folder, "--prompt=def main():", "--max-new-tokens=6", "--benchmark")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["prompt_tokens"] == 11
    for name in ("prefill_ms", "decode_ms"):
        assert 0 < found[name]["p50"] <= found[name]["p90"] <= found[name]["p99"]


def test_a_flavor_is_measured_without_a_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--flavor=debug", "--device=cpu", "--benchmark", "--max-new-tokens=3", "--batch=2"]
    main([*options, "--prompt-tokens=70"])
    found = json.loads(capsys.readouterr().out)
    assert (found["prompt_tokens"], found["batch"]) == (70, 2)


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--flavor=debgu", "--benchmark", "--prompt-tokens=3"], 1, "model.flavor must be one of ('debug', "),
        (["--flavor=debug", "--prompt=x"], 2, "--flavor is for --benchmark alone"),
        (["--checkpoint=x", "--prompt-tokens=3"], 2, "--prompt-tokens is for --benchmark alone"),
        (["--checkpoint=x", "--prompt=x", "--batch=2"], 2, "--batch is for --benchmark alone"),
        (["--checkpoint=x"], 2, "either --prompt or --prompt-tokens must be given"),
        (["--flavor=debug", "--prompt=x", "--prompt-tokens=3", "--benchmark"], 2, "either --prompt or --prompt-tokens"),
        (["--flavor=debug", "--checkpoint=x", "--prompt=x"], 2, "not allowed with argument"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    options: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        main([*options, "--device=cpu"])
    assert exit.value.code == status
    assert message in capsys.readouterr().err


def test_folders_without_a_checkpoint_are_refused(tmp_path: Path, run_folder: Path) -> None:
    message = "the checkpoint must be a folder step-N, or the folder of a run that saved one, got "
    with pytest.raises(JobError, match=f"^{message}"):
        find_checkpoint(tmp_path)
    done = run(tmp_path, "--prompt=x")
    assert (done.returncode, done.stderr.startswith(message)) == (1, True)
    shutil.copytree(run_folder / "checkpoint" / "step-2", tmp_path / "step-2")
    with pytest.raises(JobError, match=r"job.json' must say what 'step-2' is a checkpoint of, and does not"):
        load_model(tmp_path, device="cpu")


def test_a_checkpoint_knows_its_tokenizer(tmp_path: Path) -> None:
    """Also if the folder with both is somewhere else by then."""
    texts = ["def f(x):\n    return x\n"] * 90
    for name, text in enumerate(texts):
        (tmp_path / f"{name}.txt").write_text(text)
    train_tokenizer(texts, tmp_path / "before" / "tokenizer")
    options = (
        "--training.steps=1", "--training.seq_len=16", "--training.local_batch_size=1", "--validation.no-enable",
        f"--training.dataset_path={tmp_path}", f"--model.hf_assets_path={tmp_path / 'before' / 'tokenizer'}",
    )  # fmt: skip
    train(options, tmp_path / "before" / "run")
    (tmp_path / "before").rename(tmp_path / "after")
    _, tokenizer = load_model(tmp_path / "after" / "run", device="cpu")
    assert tokenizer.decode(tokenizer.encode(texts[0], add_bos=False, add_eos=False)) == texts[0]
    shutil.rmtree(tmp_path / "after" / "tokenizer")
    with pytest.raises(JobError, match="tokenizer' must hold the files of a tokenizer"):
        load_model(tmp_path / "after" / "run", device="cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": None}, "must be of this version of the code, and lacks something: 'tokenizer'"),
        ({"tokenizer": "Other 123"}, "the folder of the tokenizer must be given, Other 123, got none"),
        ({"model.dim": 256}, "must hold the weights that job.json tells of"),
    ],
)
def test_records_that_do_not_fit_are_refused(
    tmp_path: Path, run_folder: Path, changes: dict[str, Any], message: str
) -> None:
    shutil.copytree(run_folder / "checkpoint", tmp_path / "checkpoint")
    record = json.loads((tmp_path / "checkpoint" / "job.json").read_text())
    of_job = record["jobs"][-1]["job"]
    for name, value in changes.items():
        of_job[name] = value
        if value is None:
            del of_job[name]
    (tmp_path / "checkpoint" / "job.json").write_text(json.dumps(record))
    with pytest.raises(JobError, match=re.escape(message)):
        load_model(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "nowhere"}, "the device must be one that is here, got 'nowhere'"),
        (
            {"hf_assets_path": Path("there")},
            "there must be no folder of a tokenizer where tokens are bytes, got 'there'",
        ),
    ],
)
def test_what_a_checkpoint_cannot_be_loaded_with_is_refused(
    run_folder: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(JobError, match=f"^{message}"):
        load_model(run_folder, **{"device": "cpu", **options})


def test_a_narrower_dtype_rounds_weights_and_nothing_else(run_folder: Path) -> None:
    """The table of angles is complex: converted, it would lose its sines."""
    model, tokenizer = load_model(run_folder, device="cpu")
    rounded, _ = load_model(run_folder, device="cpu", dtype=torch.bfloat16)
    tokens = torch.tensor([list(tokenizer.encode("import os\n" * 4))])
    assert {p.dtype for p in rounded.parameters()} == {torch.bfloat16}
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    assert_equal(rounded.freqs_cis, model.freqs_cis, what="table of angles")
    assert_equal(rounded(tokens), model(tokens), what="logits")


def test_characters_are_printed_once_they_are_whole(capsys: pytest.CaptureFixture[str]) -> None:
    printer = Printer(ByteTokenizer().decode)
    shown = []
    for byte in "aé\n€".encode():
        printer(0, byte)
        shown.append(capsys.readouterr().out)
    assert shown == ["a", "", "é", "\n", "", "", "€"]
    printer(0, 0xE2)
    printer.end()
    assert capsys.readouterr().out == "\N{REPLACEMENT CHARACTER}\n"
    assert printer.count == 8


def test_a_benchmark_of_one_token_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^a benchmark must be of at least 2 new tokens, got 1"):
        benchmark(make(), [1], 1, repeats=1)
    with pytest.raises(ValueError, match=r"^a benchmark must be of at least 1 sequence, got 0"):
        benchmark(make(), [1], 2, repeats=1, batch=0)


def test_a_benchmark_counts_the_tokens_of_all_sequences() -> None:
    found = benchmark(make(), [1, 2], 5, repeats=1, batch=3)
    assert (found["batch"], found["prompt_tokens"]) == (3, 2)
    assert found["decode_tokens_per_second"] == pytest.approx(3e3 / found["decode_ms"]["p50"], rel=1e-2)
