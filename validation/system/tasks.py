"""Long-sequence tasks made by the repository: does sparse attention find what dense attention finds?

Each task hides something in a long sequence and asks for it at the end. Small models learn them within seconds on a
CPU. Every model sees the same rows. A model is scored at the length it was trained on, at twice and at four times that.

    python -m validation.system.tasks --out out/tasks                  # everything: minutes on two cores
    python -m validation.system.tasks --tasks recall --variants dense NSA --seeds 0 1 2

What is asked for is never in the questions, so a model that sees a window alone can only guess: that is the control.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import matplotlib

matplotlib.use("Agg")  # before pyplot: there may be no screen
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn

from nsa import NativeSparseAttention, NSAConfig, rope_table
from nsa.eager.rope import rotate
from nsa.titan.runs import write_whole
from validation import reports
from validation.cases import Case
from validation.implementations import Implementation, load

SUBJECT = "NSA_VALIDATION_SUBJECT"
"""The environment variable that names the implementation in a run of the tests; ours where it is not set."""

# Rows of a task.

KEYS, VALUES, NOISE = 16, 16, 32
VOCABULARY = KEYS + VALUES + NOISE
UNASKED = -100
QUESTIONS = 24
LETTERS = 8


class Rows(NamedTuple):
    """`tokens` and `answers`, int64 `[B, T]`; `sources [B, T]`: where the answer stands. No answer is `UNASKED`."""

    tokens: Tensor
    answers: Tensor
    sources: Tensor


Draw = Callable[..., Rows]
"""Makes rows: of a generator, how many and how long; `depth`, from 0 to 1, says where what is asked for stands."""


def _rows(haystack: Tensor, questions: Tensor, answers: Tensor, sources: Tensor) -> Rows:
    """Rows of a haystack and questions at its end."""
    unasked = torch.full_like(haystack, UNASKED)
    return Rows(*(torch.cat(pair, 1) for pair in ((haystack, questions), (unasked, answers), (unasked, sources))))


def _some(generator: torch.Generator, batch: int, of: int, count: int) -> Tensor:
    """`[batch, count]`: so many different numbers below `of` in each row."""
    return torch.rand(batch, of, generator=generator).argsort(1)[:, :count]


def _noise(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(KEYS + VALUES, VOCABULARY, shape, generator=generator)


def _pairs(
    generator: torch.Generator, batch: int, length: int, pairs: int, questions: int, depth: float | None, decoys: int
) -> Rows:
    """Keys with values after them, in noise. `decoys` times as many of the keys stand there with noise after them."""
    room = length - questions
    keys = _some(generator, batch, KEYS, pairs)
    values = KEYS + torch.randint(VALUES, (batch, pairs), generator=generator)
    places = _some(generator, batch, room // 2, pairs * (1 + decoys))
    if depth is not None:  # the pair that is asked for changes places with whatever is there
        wanted = min(int(depth * (room // 2)), room // 2 - 1)
        places = torch.where(places == wanted, places[:, :1], places)
        places[:, 0] = wanted
    haystack = _noise(generator, batch, room)
    haystack.scatter_(1, 2 * places, keys.repeat(1, 1 + decoys))
    haystack.scatter_(1, 2 * places[:, :pairs] + 1, values)
    asked = torch.randint(pairs, (batch, questions), generator=generator)
    if depth is not None:
        asked = torch.zeros_like(asked)
    return _rows(haystack, keys.gather(1, asked), values.gather(1, asked), 2 * places.gather(1, asked) + 1)


def recall(generator: torch.Generator, batch: int, length: int, *, depth: float | None = None) -> Rows:
    """Multi-query associative recall (Zoology, arXiv 2312.04927): 8 keys with a value each, asked for 24 times."""
    return _pairs(generator, batch, length, 8, QUESTIONS, depth, 0)


def needle(generator: torch.Generator, batch: int, length: int, *, depth: float | None = None) -> Rows:
    """A needle in a haystack: a key with a value, three others that distract, and one question."""
    return _pairs(generator, batch, length, 4, QUESTIONS if depth is None else 1, depth, 0)


def induction(generator: torch.Generator, batch: int, length: int, *, depth: float | None = None) -> Rows:
    """Selective induction: each of 4 keys stands there three times, and only one of them has a value after it."""
    return _pairs(generator, batch, length, 4, QUESTIONS, depth, 2)


def copy(generator: torch.Generator, batch: int, length: int, *, depth: float | None = None) -> Rows:
    """A text of 8 different letters, noise, and the text again, letter by letter from the second on."""
    text = _some(generator, batch, KEYS, LETTERS)
    room = length - (LETTERS - 1)
    first = torch.randint(room - LETTERS, (batch, 1), generator=generator)
    if depth is not None:
        first[:] = int(depth * (room - LETTERS - 1))
    places = first + torch.arange(LETTERS)
    haystack = _noise(generator, batch, room).scatter_(1, places, text)
    return _rows(haystack, text[:, :-1], text[:, 1:], places[:, 1:])


def dictionary(generator: torch.Generator, batch: int, length: int, *, depth: float | None = None) -> Rows:
    """Recall of 16 keys, every key there is: at the trained length most blocks of 4 tokens hold two of the pairs."""
    return _pairs(generator, batch, length, KEYS, QUESTIONS, depth, 0)


TASKS: Mapping[str, Draw] = {
    "recall": recall,
    "needle": needle,
    "copy": copy,
    "induction": induction,
    "dictionary": dictionary,
}


# Models.


SMALL = NSAConfig(4, 2, 4, 4, 1, 1, 8)
"""Of 64 tokens a query sees 2 blocks of its own choice and 2 forced ones, 4 tokens each, and a window of 8."""


@dataclass(frozen=True)
class Setting:
    """Sizes of the models, and how they are trained."""

    length: int = 64
    batch: int = 16
    steps: int = 160
    scored: int = 64
    rate: float = 5e-3
    dim: int = 64
    layers: int = 2
    heads: int = 2
    kv_heads: int = 1
    config: NSAConfig = SMALL
    previous: bool = True
    """Whether a token's embedding is joined by that of the token before it: half of what induction needs is there
    then, so that a model only has to learn to find things, which takes a tenth of the steps."""


@dataclass(frozen=True)
class Variant:
    """What a model's layers are.

    Attributes:
        layers: `"dense"`, `"nsa"` or a pattern of them.
        gates: which outputs are let through: of the compressed, the selected and the window branch.
        blocks: the free blocks of a query: `"own"`, those that it selects; `"random"`; `"oracle"`, that of the answer.
        opens: the part of the steps before which the selected output is not let through.
        solves, fails: tasks that it must solve, beside what whole models must, and those that it cannot solve.
        says: what it is, in words.
    """

    layers: str = "nsa"
    gates: tuple[int, int, int] = (1, 1, 1)
    blocks: str = "own"
    opens: float = 0.0
    solves: tuple[str, ...] = ()
    fails: tuple[str, ...] = ()
    says: str = ""


VARIANTS: Mapping[str, Variant] = {
    "dense": Variant("dense", says="full attention"),
    "NSA": Variant(says="all three branches"),
    "hybrid": Variant("dense,nsa", says="one dense layer, one of NSA"),
    "oracle's blocks": Variant(blocks="oracle", solves=("recall",), says="the free blocks are those of the answer"),
    "selection first": Variant(opens=0.4, solves=("dictionary",), says="the selected branch joins at 40% of the steps"),
    "no compressed output": Variant(gates=(0, 1, 1), says="the compressed branch only selects, and learns nothing"),
    "no selected": Variant(gates=(1, 0, 1), fails=("dictionary",), says="compressed blocks and the window"),
    "no window": Variant(gates=(1, 1, 0), says="compressed and selected blocks"),
    "random blocks": Variant(
        gates=(0, 1, 1), blocks="random", fails=("recall",), says="free blocks at random, the window"
    ),
    "window alone": Variant(gates=(0, 0, 1), fails=("recall",), says="the last tokens"),
}

MODELS = ("dense", "NSA", "hybrid")
"""Those that are whole; the others lack something, or are given something."""


class Dense(nn.Module):
    """Full causal attention with the projections and the rotation of a layer of NSA with one branch."""

    def __init__(self, dim: int, heads: int, kv_heads: int):
        super().__init__()
        self.head_dim = dim // heads
        self.wq, self.wo = (nn.Linear(dim, dim, bias=False) for _ in range(2))
        self.wk, self.wv = (nn.Linear(dim, kv_heads * self.head_dim, bias=False) for _ in range(2))

    def forward(self, x: Tensor, rope: Tensor, indices: Tensor | None = None) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q, k = (rotate(y, rope[: x.shape[1]]) for y in (q, k))
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.wo(out.transpose(1, 2).flatten(2))


class Sparse(NativeSparseAttention):
    """A layer of NSA of whose branches some may be silent. It keeps the blocks and the gates of its last call."""

    open_gates: Tensor
    blocks: Tensor
    gates: Tensor

    def __init__(self, *args: Any, open_gates: tuple[int, int, int], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.register_buffer("open_gates", torch.tensor(open_gates), persistent=False)

    def project(self, x: Tensor) -> Any:
        *projected, gates = super().project(x)
        gates = gates * self.open_gates.to(gates.dtype)
        self.gates = gates.detach()
        return *projected, gates

    def attend(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        out, self.blocks = super().attend(*args, **kwargs)
        return out, self.blocks


class Model(nn.Module):
    """A transformer that answers: logits `[B, T, VOCABULARY]` of tokens `[B, T]`."""

    def __init__(self, variant: Variant, setting: Setting, backend: Any = "auto"):
        super().__init__()
        self.setting, self.variant = setting, variant
        dim, kinds = setting.dim, variant.layers.split(",")
        heads = setting.heads, setting.kv_heads
        self.embed = nn.Embedding(VOCABULARY, dim)
        self.before = nn.Linear(dim, dim, bias=False) if setting.previous else None
        self.layers = nn.ModuleList()
        for i in range(setting.layers):
            attention: nn.Module
            if kinds[i % len(kinds)] == "dense":
                attention = Dense(dim, *heads)
            else:
                attention = Sparse(dim, *heads, config=setting.config, backend=backend, open_gates=variant.gates)
            wide = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
            parts = {"norm": nn.RMSNorm(dim), "attention": attention, "wide_norm": nn.RMSNorm(dim), "wide": wide}
            self.layers.append(nn.ModuleDict(parts))
        self.norm, self.head = nn.RMSNorm(dim), nn.Linear(dim, VOCABULARY, bias=False)
        self.register_buffer("rope", rope_table(max(SCORED) * setting.length, dim // setting.heads), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 and "compress" not in name and "wg" not in name:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)

    def let_through(self, done: float) -> None:
        """Opens the gates of the branches that take part when this part of the steps is done."""
        compressed, selected, window = self.variant.gates
        for layer in self.modules():
            if isinstance(layer, Sparse):
                layer.open_gates = torch.tensor((compressed, selected * (done >= self.variant.opens), window))

    def forward(self, tokens: Tensor, indices: Tensor | None = None) -> Tensor:
        x = self.embed(tokens)
        if self.before is not None:
            x = x + self.before(F.pad(x, (0, 0, 1, -1)))
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleDict)
            x = x + layer["attention"](layer["norm"](x), self.rope, indices=indices)
            x = x + layer["wide"](layer["wide_norm"](x))
        return self.head(self.norm(x))


def blocks_of(rows: Rows, setting: Setting, kind: str, generator: torch.Generator) -> Tensor | None:
    """Blocks in place of the selection: int32 `[B, T, Hk, N]`, the forced ones and, free, random ones or the answer's.

    None where queries select their own.
    """
    if kind == "own":
        return None
    config, (batch, length) = setting.config, rows.tokens.shape
    own = torch.arange(length)[:, None] // config.select_block_size
    block = torch.arange(config.num_selectable(length))
    worth = torch.rand(batch, length, len(block), generator=generator)
    if kind == "oracle":
        worth += rows.sources[..., None] // config.select_block_size == block
    worth = (worth + 2 * config.forced(block, own)).masked_fill(block > own, -1)
    best = worth.topk(min(config.num_selected_blocks, len(block)))
    chosen = best.indices.masked_fill(best.values < 0, len(block)).sort(-1).values
    chosen = F.pad(chosen, (0, config.num_selected_blocks - chosen.shape[-1]), value=len(block))
    chosen = chosen.masked_fill(chosen == len(block), -1).int()
    return chosen[:, :, None].expand(-1, -1, setting.kv_heads, -1).contiguous()


@contextmanager
def functions_of(implementation: Any) -> Iterator[None]:
    """Layers are computed by the functions of an `Implementation`, ours where it is None."""
    with ExitStack() as stack:
        if implementation is not None:

            def attention(*tensors: Any, backend: Any = None, return_indices: bool = True, **options: Any) -> Any:
                given = {name: option for name, option in options.items() if option is not None}
                return implementation.nsa_attention(*tensors, **given), None  # who uses the layer asks for no indices

            def compressed(k: Tensor, v: Tensor, k_params: Any, v_params: Any, config: Any, **options: Any) -> Any:
                make = implementation.compress  # of sequences that are not packed, on whatever device they are
                return make(k, k_params, config), make(v, v_params, config)

            stack.enter_context(mock.patch("nsa.module.nsa_attention", attention))
            stack.enter_context(mock.patch("nsa.module.compress_keys_and_values", compressed))
        yield


def why_not(implementation: Implementation, setting: Setting) -> str | None:
    """What these layers need of an implementation and it does not declare, or None."""
    head_dim = setting.dim // setting.heads
    lengths, group = ((setting.length, setting.length),), setting.heads // setting.kv_heads
    case = Case("tasks", lengths, setting.config, setting.batch, setting.kv_heads, group, head_dim, head_dim)
    if "cpu" not in implementation.devices:
        return "inputs on a CPU"
    stages = ("compress", "nsa_attention")
    return implementation.lacks(case, stages, torch.float32, backward=True, own_keys=True)


# Training and scores.

SCORED = (1, 2, 4)
"""Lengths at which models are scored, in lengths of training."""
DEPTHS = (0.0, 0.25, 0.5, 0.75, 0.95)


@dataclass
class Result:
    """What became of one model: `scores` by length, `grid[length][depth]`, and losses by step."""

    task: str
    variant: str
    seed: int
    parameters: int
    scores: dict[int, float]
    grid: dict[int, list[float]]
    losses: list[float]
    seconds: float
    setting: dict[str, Any] = field(default_factory=dict)


def answered(model: Model, rows: Rows, generator: torch.Generator) -> float:
    """The part of the questions that are answered rightly."""
    asked = rows.answers != UNASKED
    with torch.no_grad():
        logits = model(rows.tokens, blocks_of(rows, model.setting, model.variant.blocks, generator))
    return (logits.argmax(-1) == rows.answers)[asked].double().mean().item()


def train(
    task: str,
    variant: str,
    seed: int = 0,
    setting: Setting | None = None,
    subject: str | None = None,
    watch: Callable[[int, Model], object] | None = None,
) -> Result:
    """Trains a model on a task, and scores it. The same seed gives every variant the same rows.

    Args:
        task: of `TASKS`.
        variant: of `VARIANTS`.
        seed: of the initial weights and of the rows.
        setting: sizes; those of a CPU unless given.
        subject: name or place of an `Implementation` that computes the layers; ours unless given.
        watch: is called with every step's number, from 1, and the model after it.
    """
    setting = setting or Setting()
    implementation = load(subject) if subject else None
    draw, begun = TASKS[task], time.perf_counter()
    torch.manual_seed(seed)
    data, blocks = (torch.Generator().manual_seed(2 * seed + i) for i in range(2))
    model = Model(VARIANTS[variant], setting)
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_factor, steps=setting.steps))
    losses = []
    with functions_of(implementation):
        for step in range(1, setting.steps + 1):
            model.let_through((step - 1) / setting.steps)
            rows = draw(data, setting.batch, setting.length)
            logits = model(rows.tokens, blocks_of(rows, setting, model.variant.blocks, blocks))
            asked = rows.answers != UNASKED
            loss = F.cross_entropy(logits[asked], rows.answers[asked])
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
            if watch is not None:
                watch(step, model)
        fresh = torch.Generator().manual_seed(10**6 + seed)
        scores, grid = {}, {}
        for times in SCORED:
            length = times * setting.length
            scores[length] = answered(model, draw(fresh, setting.scored, length), blocks)
            grid[length] = [answered(model, draw(fresh, setting.scored, length, depth=at), blocks) for at in DEPTHS]
    count = sum(parameter.numel() for parameter in model.parameters())
    return Result(task, variant, seed, count, scores, grid, losses, time.perf_counter() - begun, asdict(setting))


def _factor(step: int, steps: int) -> float:
    """Of the learning rate: a short rise, level, and a fall over the last third."""
    return min(1.0, (step + 1) / 20, max(0.05, 3 * (steps - step) / steps))


USUAL: Mapping[str, Setting] = {
    "copy": Setting(steps=640),
    "dictionary": Setting(steps=400, layers=1, config=NSAConfig(4, 4, 4, 4, 1, 1, 8, "mean")),
}
"""How models are trained on a task, where that is not `Setting()`.

Copying takes NSA more steps than dense attention. In `dictionary` a compressed block is the mean of four tokens, so
that one layer finds the block of a key but cannot tell which of the block's values belongs to it: tokens say that.
"""

Job = tuple[str, str, int, Setting, str | None]
"""Arguments of `train`."""


def _alone(job: Job) -> Result:
    torch.set_num_threads(1)  # models this small gain nothing from a second
    return train(*job)


def train_all(jobs: Sequence[Job], processes: int, say: Callable[[str], object] = print) -> list[Result]:
    """Trains models, and says how far it is."""
    results: list[Result] = []
    begun = time.perf_counter()
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for result in pool.map(_alone, jobs):
            results.append(result)
            left = (time.perf_counter() - begun) / len(results) * (len(jobs) - len(results))
            scores = "  ".join(f"{length}: {score:.3f}" for length, score in result.scores.items())
            say(f"{result.task:9} {result.variant:20} seed {result.seed}  {scores}  ({left:.0f} s left)")
    return results


def usual(task: str) -> Setting:
    """How models are trained on a task unless something else is asked for."""
    return USUAL.get(task, Setting())


def pairs_of(tasks: Sequence[str], variants: Sequence[str]) -> list[tuple[str, str]]:
    """Tasks and models: every task for whole models, for others recall and what they must or cannot solve.

    The others are trained on every task where none of those is among the tasks. A hybrid needs more than one layer.
    """
    pairs = []
    for name in variants:
        said = ("recall", *VARIANTS[name].solves, *VARIANTS[name].fails)
        chosen = [task for task in tasks if task in said]
        for task in tasks if name in MODELS else chosen or tasks:
            if VARIANTS[name].layers.count(",") < usual(task).layers:
                pairs.append((task, name))
    return pairs


def jobs_of(
    pairs: Sequence[tuple[str, str]],
    seeds: Sequence[int],
    subject: str | None = None,
    **changes: Any,
) -> list[Job]:
    """Jobs of tasks and models, of which dense ones are last, as usual but for some changes of the setting."""
    ordered = sorted(pairs, key=lambda pair: VARIANTS[pair[1]].layers == "dense")
    return [(task, name, seed, replace(usual(task), **changes), subject) for seed in seeds for task, name in ordered]


# Tables and pictures.


def table(results: Sequence[Result]) -> list[str]:
    """Rows of Markdown: scores at every length, of each model on each task, as the mean over seeds."""
    lengths = sorted(results[0].scores)
    rows = [
        f"| task | model | {' | '.join(f'{length} tokens' for length in lengths)} |",
        "|---" * (2 + len(lengths)) + "|",
    ]
    for task, variant in dict.fromkeys((result.task, result.variant) for result in ordered(results)):
        same = [result for result in results if (result.task, result.variant) == (task, variant)]
        means = [sum(result.scores[length] for result in same) / len(same) for length in lengths]
        rows.append(f"| {task} | {variant} | {' | '.join(f'{mean:.1%}' for mean in means)} |")
    return rows


def ordered(results: Sequence[Result]) -> list[Result]:
    """Results by task and model, in the order of their tables."""
    return sorted(results, key=lambda r: (list(TASKS).index(r.task), list(VARIANTS).index(r.variant), r.seed))


def curves(results: Sequence[Result]) -> Figure:
    """Loss against step, a panel a task: the mean over seeds as a line, all of them as a band."""
    tasks = list(dict.fromkeys(result.task for result in ordered(results)))
    figure, axes = plt.subplots(1, len(tasks), figsize=(4 * len(tasks), 3.2), layout="constrained", squeeze=False)
    for task, axis in zip(tasks, axes[0], strict=True):
        for variant in dict.fromkeys(result.variant for result in ordered(results) if result.task == task):
            losses = torch.tensor([r.losses for r in results if (r.task, r.variant) == (task, variant)])
            width = min(5, losses.shape[1])
            smooth = F.avg_pool1d(losses[:, None], width)[:, 0]
            step = [width * (i + 1) for i in range(smooth.shape[1])]
            colour = f"C{list(VARIANTS).index(variant)}"
            axis.plot(step, smooth.mean(0), color=colour, label=variant)
            axis.fill_between(step, smooth.amin(0), smooth.amax(0), color=colour, alpha=0.2)
        axis.set(xlabel="step", ylabel="loss (nats)", title=task)
    lines = {label: line for axis in axes[0] for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines), fontsize=8)
    return figure


def heat_maps(results: Sequence[Result]) -> Figure:
    """Scores by length and by the depth at which the answer stands, a panel a model and task."""
    shown = ordered(results)
    columns = 4
    lines = -(-len(shown) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(10, 2.1 * lines), layout="constrained", squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.axis("off")
    for result, axis in zip(shown, axes.flat, strict=False):
        lengths = sorted(result.grid)
        scores = [result.grid[length] for length in lengths]
        image = axis.imshow(scores, vmin=0, vmax=1, aspect="auto", cmap="viridis")
        axis.set(title=f"{result.task}, {result.variant}", xticks=range(len(DEPTHS)), yticks=range(len(lengths)))
        axis.set_xticklabels([f"{depth:.0%}" for depth in DEPTHS])
        axis.set_yticklabels(lengths)
        axis.title.set_fontsize(8)
        for (y, line), x in product(enumerate(scores), range(len(DEPTHS))):
            axis.text(x, y, f"{line[x]:.2f}", ha="center", va="center", fontsize=7, color="w" if line[x] < 0.6 else "k")
    figure.colorbar(image, ax=axes, label="answered rightly", shrink=0.6)
    figure.supxlabel("depth of the answer")
    figure.supylabel("tokens")
    return figure


def read(file: Path) -> list[Result]:
    """Results of a saved run."""
    found = [Result(**result) for result in json.loads(file.read_text())["results"]]
    for result in found:  # JSON has no numbers as names
        result.scores = {int(length): score for length, score in result.scores.items()}
        result.grid = {int(length): scores for length, scores in result.grid.items()}
    return found


def save(folder: Path, results: Sequence[Result], command: str) -> None:
    """Saves results, with the command that made them and the versions, and their pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    saved = {"command": command, "torch": torch.__version__, "results": [asdict(result) for result in results]}
    write_whole(folder / "tasks.json", json.dumps(saved) + "\n")
    pictures = {"tasks-curves": partial(curves, results), "tasks-heat": partial(heat_maps, results)}
    reports.save_pictures(folder, pictures)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--impl", help="the implementation that computes the layers (default: ours)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="models that are trained at a time")
    parser.add_argument("--out", type=Path, default=Path("out/tasks"), help="folder of results and pictures")
    for name in ("length", "batch", "steps", "scored", "dim", "layers", "heads", "kv_heads"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--blocks", type=int, nargs=7, metavar="N", help="the numbers of an NSAConfig, in its order")
    parser.add_argument("--no-previous", dest="previous", action="store_false", default=None)
    given = vars(parser.parse_args(arguments))
    names = ("tasks", "variants", "seeds", "impl", "jobs", "out")
    tasks, variants, seeds, subject, processes, out = (given.pop(name) for name in names)
    blocks = given.pop("blocks")
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    changes |= {"config": NSAConfig(*blocks)} if blocks else {}
    results = train_all(jobs_of(pairs_of(tasks, variants), seeds, subject, **changes), processes)
    save(out, results, reports.command_line("validation.system.tasks", arguments))
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()
