"""Short training runs through the real entry point: losses, resuming, clipping, schedules, logs."""

import ast
import math
import re
import signal
import subprocess
import time
import warnings
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nsa.generate import generate
from nsa.titan.data import corpus_tokens
from nsa.titan.load import load_model
from validation import numerics
from validation.runs import LOSS, VALIDATION_LOSS, Metrics, command, environment, read_metrics, read_parameters, train
from validation.system.twins import options_of

TINY = (
    "--training.seq_len=256",
    "--training.local_batch_size=2",
    "--training.steps=6",
    "--metrics.log_freq=1",
    "--lr_scheduler.warmup_steps=2",
    "--validation.no-enable",
    "--checkpoint.interval=3",
)
EXACT = (LOSS, "grad_norm", "lr", "n_tokens_seen")
"""Metrics that a resumed run must repeat bit for bit."""


def exact(metrics: Metrics, steps: Iterable[int] = range(1, 7)) -> dict[str, dict[int, float | None]]:
    """What of a run must not depend on interruptions."""
    return {name: {step: metrics[name].get(step) for step in steps} for name in EXACT}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps without an interruption: the folder of the run."""
    folder = tmp_path_factory.mktemp("whole")
    train(TINY, folder)
    return folder


def test_loss_falls_and_twins_agree(tmp_path: Path) -> None:
    options = (*TINY, "--training.steps=40", "--training.local_batch_size=4", "--checkpoint.no-enable")
    losses = {
        flavor: list(train((*options, f"--model.flavor={flavor}"), tmp_path / flavor)[LOSS].values())
        for flavor in ("debug", "debug_dense")
    }
    for flavor, curve in losses.items():
        assert curve[0] > math.log(256), f"{flavor} starts better than guessing: {curve[0]}"
        assert min(curve[-5:]) < numerics.LEARNING_RATIO * curve[0], f"{flavor} does not learn: {curve}"
    sparse, dense = (sum(losses[flavor][-5:]) / 5 for flavor in ("debug", "debug_dense"))
    assert sparse <= dense * numerics.TWIN_LOSS_RATIO, f"NSA ends at {sparse}, its dense twin at {dense}"


def test_a_sparse_model_goes_on_from_a_dense_one(tmp_path: Path) -> None:
    """With all blocks selected and no other branch it begins where the dense one is, and goes where that goes."""
    options = (
        *TINY, "--validation.enable", "--validation.freq=100", "--validation.steps=8", "--validation.seq_len=256",
        "--optimizer.lr=1e-3",
    )  # fmt: skip
    exported = ("--training.steps=40", "--checkpoint.last_save_model_only", "--checkpoint.last_save_in_hf")
    train((*options, *exported, "--model.flavor=debug_dense"), tmp_path / "dense")
    weights = f"--checkpoint.initial_load_path={tmp_path / 'dense' / 'checkpoint' / 'step-40'}"
    begin = (*options, "--training.steps=100", "--checkpoint.initial_load_in_hf", weights)
    dense = train((*begin, "--model.flavor=debug_dense"), tmp_path / "dense-on")
    # 8 blocks of 32 tokens are all of a sequence.
    sparse = train((*begin, "--nsa.initial_gates=0,1,0", "--nsa.num_selected_blocks=8"), tmp_path / "sparse")
    assert abs(sparse[LOSS][1] - dense[LOSS][1]) <= numerics.LAYOUT_BOUND * dense[LOSS][1], "they begin apart"
    trained = [sum(list(run[LOSS].values())[-10:]) / 10 for run in (sparse, dense)]
    validated = [run[VALIDATION_LOSS][100] for run in (sparse, dense)]
    for name, (found, expected) in {"training": trained, "validation": validated}.items():
        apart = abs(found / expected - 1)
        assert apart <= numerics.CONVERTED_LOSS_RATIO - 1, f"{name} loss: sparse {found}, dense {expected}"


WORD = re.compile(r"[^\W\d]\w+")
PROMPTS = (
    "def main(", "class Reader:\n    ", "def read_file(path):\n    ", "def __init__(self, ",
    "def get(self, name):\n    ", "def _parse(text):\n    ", "class Error(Exception):\n    ",
    "async def run(self):\n    ",
)  # fmt: skip


def is_python(line: str) -> bool:
    """Whether a line is one of Python, in whatever context."""
    contexts = (
        "{}",
        "{}\n    pass",
        "if 1:\n    pass\n{}\n    pass",
        "try:\n    pass\n{}\n    pass",
        "def f():\n    {}",
    )
    for context in contexts:
        with suppress(SyntaxError, ValueError), warnings.catch_warnings(action="ignore"):
            ast.parse(context.format(line.strip()))
            return True
    return False


def plausible(texts: list[str], words: set[str]) -> tuple[float, float]:
    """The part of the words of texts that are among `words`, and the part of their lines that are lines of Python."""
    found = [word for text in texts for word in WORD.findall(text)]
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    return sum(word in words for word in found) / len(found), sum(map(is_python, lines)) / len(lines)


def test_a_model_of_make_train_writes_python(tmp_path: Path) -> None:
    """After half of its steps. Tokens that are drawn as often as they come, one by one, are no Python."""
    options = options_of(tmp_path)
    train((*options, "--training.steps=400", "--validation.no-enable"), tmp_path / "debug", timeout=850)
    model, tokenizer = load_model(tmp_path / "debug", device="cpu", room_for=lambda tokenizer: 256)
    prompts = [list(tokenizer.encode(text, add_bos=False, add_eos=False)) for text in PROMPTS]
    written = generate(model, prompts, 200, temperature=0.7, seed=1, vocab_size=tokenizer.get_vocab_size())
    words = {word for file in (tmp_path / "definitions").iterdir() for word in WORD.findall(file.read_text())}
    texts = [tokenizer.decode(tokens) for tokens in written]
    found = plausible(texts, words)
    assert found[0] >= numerics.KNOWN_WORDS, f"{found}: {texts}"
    assert found[1] >= numerics.PARSED_LINES, f"{found}: {texts}"
    corpus = corpus_tokens("train", tokenizer, tmp_path / "definitions")
    drawn = corpus[torch.randint(len(corpus), (len(PROMPTS), 200), generator=torch.Generator().manual_seed(1))]
    control = plausible([tokenizer.decode(tokens) for tokens in drawn.tolist()], words)
    assert control[0] < numerics.KNOWN_WORDS, "any words would pass"
    assert control[1] < numerics.PARSED_LINES, "any lines would pass"


def test_same_seed_gives_the_same_run(whole: Path, tmp_path: Path) -> None:
    assert exact(train(TINY, tmp_path)) == exact(read_metrics(whole))


def test_another_seed_gives_another_run(whole: Path, tmp_path: Path) -> None:
    other = train((*TINY, "--training.steps=1", "--debug.seed=1", "--checkpoint.no-enable"), tmp_path)
    assert other[LOSS][1] != read_metrics(whole)[LOSS][1]


def test_resume_is_bit_exact(whole: Path, tmp_path: Path) -> None:
    train((*TINY, "--training.steps=3", "--lr_scheduler.total_steps=6"), tmp_path)
    resumed = train(TINY, tmp_path)
    assert exact(resumed) == exact(read_metrics(whole))
    expected = read_parameters(whole, 6)
    for name, value in read_parameters(tmp_path, 6).items():
        numerics.assert_equal(value, expected[name], what=name)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_leaves_a_resumable_checkpoint(whole: Path, tmp_path: Path, number: signal.Signals) -> None:
    options = (*TINY, "--checkpoint.interval=100")
    run = subprocess.Popen(
        command(options, tmp_path), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 120
    while not read_metrics(tmp_path)[LOSS] and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    run.send_signal(number)
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 128 + number, output
    stopped_after = max(read_metrics(tmp_path)[LOSS])
    assert stopped_after < 6, f"the run was over before the signal came:\n{output}"
    assert f"{number.name}: stopped after step {stopped_after}; it is saved, and the same command resumes" in output
    assert "completed" not in output
    assert (tmp_path / "checkpoint" / f"step-{stopped_after}" / ".metadata").exists(), output
    assert exact(train(options, tmp_path)) == exact(read_metrics(whole))


def test_gradients_are_clipped(whole: Path, tmp_path: Path) -> None:
    # Adam divides by the gradient's own size, so clipping shows only below its epsilon: there nothing moves.
    still = train(
        (*TINY, "--training.max_norm=1e-12", "--optimizer.weight_decay=0", "--checkpoint.no-enable"), tmp_path
    )
    before, after = (read_parameters(whole, step)["output.weight"] for step in (3, 6))
    assert not torch.equal(before, after)
    unclipped = read_metrics(whole)
    assert still["grad_norm"][1] == unclipped["grad_norm"][1], "the norm is logged before clipping"
    moved, unmoved = (abs(run[LOSS][6] - run[LOSS][1]) for run in (unclipped, still))
    assert unmoved < moved / 10, f"clipped run moved by {unmoved}, the other by {moved}"


def test_a_run_that_diverges_ends_and_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="exited with 4:") as stopped:
        train((*TINY, "--optimizer.lr=1e30", "--checkpoint.no-enable"), tmp_path)
    said = str(stopped.value)
    assert re.search(r"error: training diverged: the loss of step [2-6] is nan, its gradient norm ", said)
    assert "completed" not in said
    assert "Traceback" not in said


def test_selection_and_gates_are_logged_on_request(whole: Path, tmp_path: Path) -> None:
    logged = train((*TINY, "--nsa.selection_metrics", "--checkpoint.no-enable"), tmp_path)
    assert logged[LOSS] == read_metrics(whole)[LOSS], "looking at the selection changes training"
    for name in ("union_4", "union_8", "neighbour_change", "forced", "entropy", "never"):
        assert sorted(logged[f"selection/{name}"]) == [1, 2, 3, 4, 5, 6]
    assert sorted(logged["selection/step_change"]) == [2, 3, 4, 5, 6]
    assert all(0 < logged[f"gates/{branch}"][6] < 1 for branch in ("compressed", "selected", "window"))


def test_learning_rate_follows_its_schedule(tmp_path: Path) -> None:
    options = ("--optimizer.lr=1.0e-3", "--lr_scheduler.warmup_steps=2", "--lr_scheduler.decay_ratio=0.5")
    shape = ("--lr_scheduler.decay_type=linear", "--lr_scheduler.min_lr_factor=0.1", "--checkpoint.no-enable")
    rates = train((*TINY, *options, *shape), tmp_path)["lr"]
    factors = [0.5, 1.0, 1.0, 1.0, 0.7, 0.4]
    for step, factor in enumerate(factors, start=1):
        numerics.assert_matches(
            torch.tensor(rates[step]).double(), torch.tensor(1e-3 * factor).double(), what=f"rate of step {step}"
        )


def test_validation_sees_the_same_rows_every_time(tmp_path: Path) -> None:
    options = ("--validation.enable", "--validation.freq=2", "--validation.steps=2", "--validation.seq_len=256")
    frozen = ("--optimizer.lr=0", "--validation.local_batch_size=2", "--checkpoint.no-enable")
    losses = train((*TINY, *options, *frozen), tmp_path)[VALIDATION_LOSS]
    assert sorted(losses) == [1, 2, 4, 6]
    assert len(set(losses.values())) == 1, f"an unchanged model must keep its validation loss: {losses}"


def test_tensorboard_has_the_losses(whole: Path, tmp_path: Path) -> None:
    train((*TINY, "--metrics.enable_tensorboard", "--checkpoint.no-enable"), tmp_path)
    (folder,) = (tmp_path / "tb").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    logged = {event.step: event.value for event in events.Scalars(LOSS)}
    for step, loss in read_metrics(whole)[LOSS].items():
        numerics.assert_equal(torch.tensor(logged[step]), torch.tensor(loss), what=f"loss of step {step}")


def test_activation_checkpointing_changes_nothing(whole: Path, tmp_path: Path) -> None:
    again = train((*TINY, "--activation_checkpoint.mode=full", "--checkpoint.no-enable"), tmp_path)
    assert again[LOSS] == read_metrics(whole)[LOSS]


def test_gradient_accumulation_sees_the_same_batch(whole: Path, tmp_path: Path) -> None:
    options = ("--training.local_batch_size=1", "--training.global_batch_size=2", "--checkpoint.no-enable")
    numerics.assert_same_training(train((*TINY, *options), tmp_path), read_metrics(whole), (LOSS, "grad_norm"))


@pytest.mark.parametrize("flavor", ["debug", "debug_dense"])
def test_documents_are_kept_apart_on_request(tmp_path: Path, flavor: str) -> None:
    for number in range(60):
        (tmp_path / f"{number}.txt").write_text(f"document {number} counts " + " ".join(map(str, range(number, 30))))
    options = (f"--model.flavor={flavor}", f"--training.dataset_path={tmp_path}", "--checkpoint.no-enable")
    plain = train((*TINY, *options), tmp_path / "causal")[LOSS]
    apart = train((*TINY, *options, "--nsa.attn_mask_type=block_causal"), tmp_path / "block_causal")[LOSS]
    assert sorted(apart) == sorted(plain) == [1, 2, 3, 4, 5, 6]
    assert apart[1] != plain[1], "the mask does nothing"


def test_a_recipe_of_ones_own_trains(tmp_path: Path) -> None:
    run = train((*TINY, "--checkpoint.no-enable"), tmp_path, module="docs.examples.recipe")
    assert sorted(run[LOSS]) == [1, 2, 3, 4, 5, 6]


def test_every_sparse_option_reaches_the_model(whole: Path, tmp_path: Path) -> None:
    options = ("--nsa.attention=dense,nsa", "--nsa.window_size=32", "--nsa.compression=linear", "--nsa.shared_kv=True")
    run = train((*TINY, *options), tmp_path)
    assert run[LOSS] != read_metrics(whole)[LOSS]
    names = read_parameters(tmp_path, 6)
    assert "layers.0.attention.wg.weight" not in names
    assert "layers.1.attention.wg.weight" in names
    assert "layers.1.attention.compress_k.weight_out" not in names
    assert names["layers.1.attention.wk.weight"].shape[0] == 2 * 32


def test_torchtitan_runs_our_config_files(whole: Path, tmp_path: Path) -> None:
    options = ("--job.config_file=nsa/configs/debug.toml", *TINY, "--checkpoint.no-enable")
    run = train(options, tmp_path, module="torchtitan.train", processes=1)
    assert run[LOSS] == read_metrics(whole)[LOSS]


def test_torchtitan_s_own_entry_refuses_another_job(whole: Path) -> None:
    options = ("--job.config_file=nsa/configs/debug.toml", *TINY, "--optimizer.lr=1")
    with pytest.raises(RuntimeError, match=r"optimizer\.lr is 1\.0, and was 0\.003"):
        train(options, whole, module="torchtitan.train", processes=1)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--model.flavor=debgu", "model.flavor must be one of"),
        ("--nsa.attention=sparse", "attention must be a pattern of"),
        ("--nsa.attn_mask_type=diagonal", "attn_mask_type must be one of"),
        ("--nsa.backend=triton", "where Triton lacks support, got"),
        ("--nsa.backend=cuda", "backend must be one of"),
        ("--nsa.select_block_size=20", "select_block_size must be a multiple of compress_stride (8), got 20"),
    ],
)
def test_bad_options_are_refused(tmp_path: Path, option: str, message: str) -> None:
    with pytest.raises(RuntimeError, match="exited with 1") as failure:
        train((*TINY, option), tmp_path)
    assert message in str(failure.value)
