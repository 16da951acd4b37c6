"""docs/performance.md, from saved runs of one machine, of `make perf-baseline` or of `validation.perf.stages`:

    python -m validation.perf.report BASELINE docs/runs/stages_h200.json > docs/performance.md
    python -m validation.perf.report BASELINE docs/runs/stages_h200.json --readme README.md
    python -m validation.perf.report BASELINE docs/runs/stages_h200.json --results docs/results.md

`BASELINE` is a file of `validation/perf/baselines`. The second puts the figures of the same runs into the README, the
third those of generation into the results. The
same files always give the same page. What several of them hold is taken from the first, and what is compared is always
of one run: a peer that only a later one measured has a table of its own, with our figures of that run. The pictures are
drawn by `validation.perf.plots`.
"""

import argparse
import itertools
import operator
import re
import shlex
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from ..costs import Roofs
from ..runs import ACTIVE_GIB, read_log
from ..stages import TIMED
from ..stages import WHOLE as WHOLE_OP
from . import gates, records
from .records import Record
from .workloads import CHOICES, PACKED, WORKLOADS, Workload, chosen

WHOLE = WHOLE_OP.name

LENGTHS = (8192, 32768, 65536)
"""Of the stages' tables, where a run has them; the whole op is shown at all."""

TITLES = {name: stage.title for name, stage in TIMED.items()}
DENSE = "dense"
PASSES = ("forward", "backward")
DRIVEN = {
    sizes: [name for name, stage in TIMED.items() if stage.sizes == sizes]
    for sizes in dict.fromkeys(stage.sizes for stage in TIMED.values() if stage.sizes)
}
"""The stages that a size or a count is paid in; `l` is paid where blocks are compressed, outside the op."""
HEAD = """# Performance

Made by

```sh
python -m validation.perf.report {paths} > docs/performance.md
python -m validation.perf.plots {paths} --history --out docs/img --prefix perf-
```

from runs on {device}, driver {driver}, PyTorch {torch}, Triton {triton}, Python {python}, {date}{clocks}:

```sh
{commands}
```

`make perf` measures this machine and compares it with its baseline, `make perf-baseline` makes a new one, and
`make perf-docs` this page. A peer is anybody's implementation of the stages, as an object for
[`--peer`](../validation/implementations.py).

## How to read this

Times are medians in ms by {clock}, each call with a cold second-level cache and the host ahead of it
([`timing.py`](../validation/perf/timing.py)): what starts the kernels is not in them, and has a line of its own. The
floor is what the stage cannot get below at the {flops:.0f} TFLOP/s of bfloat16 products and {bytes:.2f} TB/s of copying
that this machine reached in the same run, each operation and each byte counted once
([`costs.py`](../validation/costs.py) has the formulas); TFLOP/s and TB/s are by the same count. Memory is
the peak of forward and backward pass beyond the inputs and the gradient from above. All workloads have batch 1, but for
decoding, and are in bfloat16:

| workload | query heads | KV heads | head dims of keys, values | `l`, `d`, `l'` | `n` | `w` | compression |
|---|---|---|---|---|---|---|---|
{workloads}{alike}

In pictures, lines that go down to the right of others have won; the dotted one is the floor. Both axes are logarithmic:
dense attention, whose time grows with the square of the length, is twice as steep as what grows with the length.

![Time of forward and backward pass against length, for every workload](img/perf-time.png)

![How many times as fast as dense attention, with promises and targets](img/perf-speedup.png)

![Peak memory against length](img/perf-memory.png)

![The stages' parts of the time of the whole op](img/perf-stages.png)

![Roofline: what each stage reaches of the machine's rates](img/perf-roofline.png)
"""
ALIKE = """{name} is {like} with inputs of which a query keeps about {kept:.0%} of the free blocks of the query before \
(`python -m validation.perf.neighbours`); in the others neighbouring queries choose independently. Its dense attention \
is that of {like}: it takes the same time on any values."""
HISTORY = """Every stage of which a gated figure changed between commits by more than its bound, with what changed
marked and the most of it named. Two cards of a kind may differ: below each commit stands the rate that a large product
reached."""
PROMISES = """## What is promised

From [`promises.toml`](../validation/perf/promises.toml); unless something else is named, for the whole op, forward and
backward, against dense attention (cuDNN) in the same run. `make perf` fails on a GPU of this kind where a promise is
broken. A target is an aim; nothing fails where it is not reached."""
BESIDE = """## Beside {peers}

In ms, all in one run, of {date}: a few rounds each, without waiting until the clock of a GPU at
heavy work is steady, and so not to be compared with what is above:

```sh
{command}
```"""
BEGIN, END = "<!-- made by make perf-docs -->", "<!-- end of what make perf-docs makes -->"
SPEED = """One {device}, {versions}{pinned}. Head dim 128, bfloat16, batch 1. All figures are ratios to dense \
attention {dense} beside it. **Speed** is dense attention's time over NSA's: above 1 NSA is faster, below 1 it is \
slower. **Memory** is NSA's peak over dense attention's: below 1 NSA needs less.

{table}

- The **operation** is forward and backward of `nsa_attention` alone, for query heads / key/value heads. It is faster \
than dense attention {pays}. Groups of few query heads cost memory, the more the shorter the sequence.
- A **training step** is forward, backward and update of a whole model on one sequence, **`nsa.train`** is all of \
training; both are beside the dense twin ([how they were measured](docs/results.md)). Training `100m` is faster than \
its twin {trained}. On one GPU `nsa.train` compiles, and replays forward and backward pass as one CUDA graph: no step \
waits for the host."""
ROOT = Path(__file__).parents[2]
TRAINED = ROOT / "docs" / "runs"
CONSTRAINTS = ROOT / "constraints.txt"
CHOOSING = """## Choosing l, d, l', n and w

What a size or a count costs, in the paper's names: the stages it is paid in, and their part of the whole op's time,
both passes, {workload}:"""
PACKING = """## Packed sequences

The whole op and the layer over eight documents of unequal length, whose tables are made once a batch, beside one
sequence of as many tokens, which has more to attend to."""
DECODING = """## Decoding

Attention of one new token of each sequence over a filled cache, as a CUDA graph; dense attention likewise, by whatever
of PyTorch takes the least time. What must be read are the compressed keys and values, those of the selected blocks and
those of the window, once each.

![Time of a step against the tokens in the cache](img/perf-decode.png)"""
GENERATING = """## Generation

Whole models with noise for weights, in bfloat16 on a GPU, and their dense twins in the same run. Prompts are taken in
in chunks, which is the time until the first token; a step is one more token of every sequence, sampling and the host
included. By the wall clock; a step's percentiles are of {rounds} steps."""
ADVICE = """- `d`, the stride of compression, is the only one that costs the square of the length: a query sees up to
  `T / d` compressed keys, twice (once for its output, once for the importance of blocks). Halving it doubles both
  stages; take the largest one at which the right blocks are still found, and more so the longer the sequences.
- `l`, the compressed block, costs next to nothing here: only the compressor's weights grow with it. `l = 2 d`, blocks
  that overlap by half, is the paper's.
- `n l'` keys are read by every query, whatever the length: time in proportion, and most of the time of short sequences.
  For the same `n l'`, fewer and longer blocks make the choice coarser and cheaper: there are `T / l'` to choose from.
- `w` keys are read in order and shared by neighbouring queries, so that a key in the window costs less than one in a
  selected block. What every token needs of its neighbourhood belongs there."""


def render(reports: Mapping[str, dict[str, Any]]) -> str:
    """The page for reports, by the paths of their files in the repository."""
    first, report = next(iter(reports.values())), merge(list(reports.values()))
    machine, roofs = report["machine"], Roofs(**report["roofs"])
    found = {record["workload"] for record in report["results"]}
    workloads = [workload for workload in WORKLOADS.values() if workload.name in found]
    clocks = ", ".join(f"{key} {value}" for key, value in machine.get("clocks", {}).items())
    head = HEAD.format(
        paths=" ".join(reports),
        **{key: machine[key] for key in ("device", "driver", "torch", "triton", "python", "date")},
        clocks=f" ({clocks})" if clocks else "",
        commands="\n".join(_commands(each["machine"]) for each in reports.values()),
        clock=records.clock({"measured": machine}),
        flops=roofs.flops / 1e12,
        bytes=roofs.bytes / 1e12,
        workloads="\n".join(
            f"| {w.name} | {w.query_heads} | {w.kv_heads} | {w.key_dim}, {w.value_dim} "
            f"| {w.config.compress_block_size}, {w.config.compress_stride}, {w.config.select_block_size} "
            f"| {w.config.num_selected_blocks} | {w.config.window_size} | {w.config.compression} |"
            for w in workloads
        ),
        alike="".join(
            "\n\n" + _wrapped(ALIKE.format(name=w.name, like=records.SAME_SHAPES[w.name], kept=w.kept))
            for w in workloads
            if w.kept
        ),
    )
    parts = [head, history(list(reports.values()))]
    promises = gates.read_table().promises_of(machine.get("name", ""))
    if promises:
        parts += [PROMISES, promised(report, promises)]
    for workload in workloads:
        results = Results(report, workload)
        parts += [f"## {workload.name}", whole_op(results), stages(results)]
    parts += [beside(each, first, number) for number, each in enumerate(reports.values())]
    parts += [choosing(report, workloads), packing(report), training(report), decoding(report), generating(report)]
    if report["failures"]:
        parts.append("## What did not run")
        parts.append(
            table(
                ("workload", "tokens", "stage", "pass", "subject", "error"),
                (
                    (
                        f["workload"],
                        _tokens(f["length"]),
                        TITLES.get(f["stage"], f["stage"]),
                        f.get("direction", ""),
                        f["subject"],
                        _one_line(f["error"]),
                    )
                    for f in report["failures"]
                ),
            )
        )
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def history(reports: Sequence[records.Report]) -> str:
    """The pictures that `plots` draws of how figures changed over commits; nothing where none did."""
    files = {"time": "history", "memory": "history-memory"}
    changed = [kind for kind in files if gates.changes(records.history(reports), kind)]
    pictures = (f"![Changes of {kind} over commits, against the first](img/perf-{files[kind]}.png)" for kind in changed)
    return "\n\n".join([HISTORY, *pictures]) if changed else ""


def promised(report: Mapping[str, Any], promises: Sequence[gates.Promise]) -> str:
    """Promises beside what the run measured."""
    rows = []
    for promise in promises:
        found = gates.measured(report["results"], promise)
        sign = "≥" if gates.KINDS[promise.kind] else "≤"
        rows.append((
            promise.workload, _tokens(promise.length), promise.kind, "" if found is None else f"{found:.2f}",
            f"{sign} {promise.promise:.2f}", "" if promise.target is None else f"{sign} {promise.target:g}",
        ))  # fmt: skip
    return table(("workload", "tokens", "", "measured", "promised", "target"), rows)


def newcomers(report: Mapping[str, Any], first: Mapping[str, Any]) -> list[str]:
    """Those who have figures that the first run has not, ours aside: they are not compared with it."""
    shown = set(map(records.which, first["results"]))
    found = dict.fromkeys(r["subject"] for r in report["results"] if records.which(r) not in shown)
    return [subject for subject in found if subject != report["subject"] and not subject.startswith(DENSE)]


def pictured(report: Mapping[str, Any], first: Mapping[str, Any]) -> bool:
    """Whether any of them has the whole op at lengths of which a picture can be drawn."""
    peers = newcomers(report, first)
    return any(results.both(n, peer) for results in curves(report) for n in results.lengths for peer in peers)


def beside(report: Mapping[str, Any], first: Mapping[str, Any], number: int) -> str:
    """Every stage beside newcomers, in their own run, of which `plots` draws a picture by its number."""
    peers = newcomers(report, first)
    names = [report["subject"], *peers]
    rows = []
    for workload in WORKLOADS.values():
        results, shown = Results(report, workload), Results(first, workload)
        for place in itertools.product(TITLES, PASSES, results.lengths):
            if any(results.get(*place, peer) and not shown.get(*place, peer) for peer in peers):
                stage, direction, length = place
                times = (_ms(results.get(*place, name)) for name in names)
                rows.append((workload.name, TITLES[stage], direction, _tokens(length), *times))
    if not rows:
        return ""
    machine = report["machine"]
    listed = " and ".join(filter(None, (", ".join(peers[:-1]), peers[-1])))
    head = BESIDE.format(peers=listed, date=machine["date"], command=_commands(machine))
    if pictured(report, first):
        head += f"\n\n![Time of forward and backward pass against length, in that run](img/perf-beside-{number}.png)"
    return f"{head}\n\n{table(('workload', 'stage', 'pass', 'tokens', *names), rows)}"


def choosing(report: dict[str, Any], workloads: Sequence[Workload]) -> str:
    """What the sizes and counts cost, by the stages they are paid in, and by other choices that were measured."""
    base = next(
        (Results(report, w) for w in workloads if any(r["workload"] == w.name for r in report["results"])), None
    )
    if base is None:
        return ""
    parts = [CHOOSING.format(workload=base.workload.name)]
    lengths = [n for n in base.lengths if base.total("selected_attention", n) and base.total(WHOLE, n)]
    if not lengths:
        return ""
    rows: list[Sequence[Any]] = []
    for size, driven in DRIVEN.items():
        ms = [sum(base.total(stage, n) or 0 for stage in driven) for n in lengths]
        rows.append((
            size, ", ".join(TITLES[stage] for stage in driven),
            *(f"{_ms(x)} ({x / (base.total(WHOLE, n) or 1):.0%})" for x, n in zip(ms, lengths, strict=True)),
        ))  # fmt: skip
    parts.append(table(("", "stages", *(f"{_tokens(n)}: ms (part)" for n in lengths)), rows))
    parts.append(ADVICE)
    others = {c: Results(report, chosen(base.workload, c)) for c in CHOICES}
    rows = []
    for choice, results in others.items():
        for length in results.lengths:
            cells: list[str] = []
            for stage in ("compress", WHOLE):
                here, usual = results.total(stage, length), base.total(stage, length)
                cells += [_ms(here), _ms(usual), _over(here, usual)]
            rows.append((f"`{choice}`", _tokens(length), *cells))
    if rows:
        parts.append(
            "With one choice made otherwise than the paper's `l=32`, `d=16`, `l'=64`, `n=16`, `w=512`, both passes of "
            "compression\nand of the whole op, in ms:"
        )
        heads = [f"{title}{what}" for title in ("compress", "whole op") for what in ("", ", paper's", ", ratio")]
        parts.append(table(("choice", "tokens", *heads), rows))
    return "\n\n".join(parts)


def packing(report: Mapping[str, Any]) -> str:
    """Packed documents beside one sequence of as many tokens."""
    found: dict[tuple[str, int, str, str], dict[str, float]] = {}
    for r in report["results"]:
        if r["workload"].endswith(PACKED):
            place = r["workload"].removesuffix(PACKED), r["length"], r["stage"], r["direction"]
            found.setdefault(place, {})[r["role"]] = r["median"]
    rows = [
        (workload, _tokens(n), TITLES.get(stage, stage), direction, *map(_ms, pair), f"**{_over(*pair)}**")
        for (workload, n, stage, direction), ms in found.items()
        if None not in (pair := (ms.get("ours"), ms.get("rival")))
    ]
    names = ("workload", "tokens", "", "pass", "packed, ms", "one sequence, ms", "ratio")
    return f"{PACKING}\n\n{table(names, rows)}" if rows else ""


def decoding(report: Mapping[str, Any]) -> str:
    """A new token of each sequence over a cache, beside the fastest dense attention of the same batch."""
    rows = []
    for (workload, length, batch), (ours, dense) in decoded(report).items():
        cost = WORKLOADS[workload].decode_cost(length, batch)
        ms, floor = ours["median"], cost.floor(Roofs(**ours["roofs"]))
        rival = min(dense, key=lambda r: r["median"], default=None)
        rows.append((
            workload, _tokens(length), batch, _ms(ms), f"{cost.bytes / 2**20:.1f}", _ms(floor), _over(ms, floor),
            f"{_ms(rival['median'])} ({rival['subject']})" if rival else "",
            f"**{_over(rival['median'], ms)}**" if rival else "",
        ))  # fmt: skip
    if not rows:
        return ""
    names = ("workload", "cached tokens", "batch", "ms", "must read, MiB", "floor", "ms / floor", "dense", "dense / ms")
    return f"{DECODING}\n\n{table(names, rows)}"


def decoded(report: Mapping[str, Any]) -> dict[tuple[str, int, int], tuple[Record, list[Record]]]:
    """Groups the records of decoding by workload, length and batch: ours, and those of dense attention."""
    found: dict[tuple[str, int, int], tuple[list[Record], list[Record]]] = {}
    for record in report["results"]:
        if record["stage"] == "decode":
            place = record["workload"], record["length"], int(record["direction"].removeprefix("batch "))
            ours, dense = found.setdefault(place, ([], []))
            (ours if record["role"] == "ours" else dense).append(record)
    return {place: (ours[0], dense) for place, (ours, dense) in sorted(found.items()) if ours}


def generating(report: Mapping[str, Any]) -> str:
    """Prompts and steps of whole models, beside their dense twins."""
    found = generated(report)
    rows = []
    for (flavor, length, batch), records_of in found.items():
        dense = next((r for r in records_of if r["role"] == "rival"), None)
        for record in records_of:
            twin = dense if record["role"] == "ours" else None
            rows.append((
                flavor, _tokens(length), batch, record["subject"], _ms(record["prefill"]),
                f"{1e3 * batch * length / record['prefill']:,.0f}", _ms(record["median"]), _ms(record["p90"]),
                _ms(record["p99"]), f"{record['tokens_per_second']:,.0f}",
                *(f"**{_over(twin[x], record[x])}**" if twin else "" for x in ("prefill", "median")),
            ))  # fmt: skip
    if not rows:
        return ""
    names = (
        "model", "prompt", "batch", "attention", "prompt, ms", "tokens/s", "step, ms: p50", "p90", "p99", "tokens/s",
        "times as fast as dense: prompt", "step",
    )  # fmt: skip
    rounds = next(iter(found.values()))[0]["rounds"]
    picture = (
        "![Time until the first token and time of a step against the tokens of the prompt](img/perf-generation.png)"
    )
    return f"{GENERATING.format(rounds=rounds)}\n\n{picture}\n\n{table(names, rows)}"


def generated(report: Mapping[str, Any]) -> dict[tuple[str, int, int], list[Record]]:
    """Groups the records of generation by flavor, length and batch, ours first."""
    found: dict[tuple[str, int, int], list[Record]] = {}
    for record in report["results"]:
        if record["stage"] == "generation":
            place = record["workload"], record["length"], int(record["direction"].removeprefix("batch "))
            found.setdefault(place, []).append(record)
    return {place: sorted(found[place], key=lambda r: r["role"]) for place in sorted(found)}


def training(report: Mapping[str, Any]) -> str:
    """Training steps beside those of dense twins."""
    found = {
        (r["workload"], r["length"], r["role"]): r["median"] for r in report["results"] if r["stage"] == "training"
    }
    rows = [
        (flavor, _tokens(n), _ms(found[flavor, n, "ours"]), _ms(found[flavor, n, "rival"]), _figure(ratio))
        for (flavor, n), ratio in steps(report).items()
    ]
    if not rows:
        return ""
    head = table(("model", "tokens", "ms", "dense twin", "times as fast"), rows)
    return f"## A training step\n\nForward, backward and update, one sequence, beside the dense twin.\n\n{head}"


def readme(reports: Sequence[dict[str, Any]], text: str) -> str:
    """The README with the figures of these runs, and of those of training in `TRAINED`, between its marks."""
    return _between_marks(text, speed(merge(reports)))


def results_page(reports: Sequence[dict[str, Any]], text: str) -> str:
    """The page of results with the figures of generation of these runs between its marks."""
    measured = next((report for report in reports if generated(report)), None)
    if measured is None:
        return _between_marks(text, "")
    machine = measured["machine"]
    of_run = f"One {machine['device']}, PyTorch {machine['torch']}, Triton {machine['triton']}, {machine['date'][:10]}:"
    made = generating(measured)
    return _between_marks(text, f"{made}\n\n{of_run}\n\n```sh\n{_commands(machine)}\n```")


NOTED = ("W", (8 * 1024, 64 * 1024))
"""The workload and the lengths of which the notes on kernels have figures."""


def notes_page(reports: Sequence[Mapping[str, Any]], text: str) -> str:
    """The notes on kernels with the stages' times between its marks: of the first run, and of the second as before."""
    workload, lengths = NOTED
    now, before = (Results(report, WORKLOADS[workload]) for report in reports[:2])
    rows = []
    for stage, direction in dict.fromkeys((stage, direction) for stage, direction, *_ in now.records):
        places = [(stage, direction, length, now.subject) for length in lengths]
        if all(now.get(*place) for place in places):
            cells = [(before.get(*p), now.get(*p), now.get(*p, "floor")) for p in places]
            rows.append((stage, direction, *(_ms(ms) for cell in cells for ms in cell)))
    head = [f"{_tokens(length)}: {what}" for length in lengths for what in ("before", "now", "floor")]
    return _between_marks(text, table(("stage", "pass", *head), rows))


def _commands(machine: Mapping[str, Any]) -> str:
    """The commands of a run, one a line: it may be made of several."""
    return "\n".join(map(shlex.join, machine.get("commands") or [machine["command"]]))


def _between_marks(text: str, made: str) -> str:
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not after:
        raise ValueError(f"the file must have the lines {BEGIN} and {END}, between which the figures go")
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{after}"


def speed(report: Mapping[str, Any]) -> str:
    """Where NSA pays: the operation alone by length and group size, and whole training steps."""
    shown = [Results(report, WORKLOADS[name]) for name in ("W", "W4")]
    lengths = [n for n in shown[0].lengths if shown[0].over_dense(n, shown[0].subject)]
    rows, pays = [], []
    for results in shown:
        ours, heads = results.subject, f"{results.workload.query_heads} / {results.workload.kv_heads} heads"
        ratios = {n: results.over_dense(n, ours) for n in lengths}
        rows.append((f"operation, {heads}", "speed", *map(_figure, ratios.values())))
        rows.append(("", "memory", *(_figure(results.memory_over_dense(n, ours)) for n in lengths)))
        faster = next((n for n, ratio in ratios.items() if ratio and ratio > 1), None)
        pays.append(f"from {_tokens(faster)} tokens with {heads}" if faster else f"nowhere with {heads}")
    for (flavor, length), step in steps(report).items():
        rows.append((f"training step, `{flavor}`", "speed", *(_figure(step if n == length else None) for n in lengths)))
    trained = {n: both for n in lengths if (both := training_of("100m", n))}
    for kind, what in enumerate(("speed", "memory")):
        cells = (_figure(trained[n][kind]) if n in trained else "" for n in lengths)
        rows.append(("" if kind else "`nsa.train`, `100m`", what, *cells))
    faster = next((n for n, (ratio, _) in trained.items() if ratio > 1), None)
    machine, pins = report["machine"], dict(re.findall(r"(?m)^(torch|triton)==([\d.]+)", CONSTRAINTS.read_text()))
    versions = f"PyTorch {machine['torch']} and Triton {machine['triton']}"
    pinned = f"PyTorch {pins['torch']} and Triton {pins['triton']}"
    text = SPEED.format(
        device=machine["device"].partition(" (")[0],
        versions=versions,
        pinned="" if versions == pinned else f" (`make setup` installs {pinned}: these are not figures of those)",
        dense=(shown[0].dense or "").removeprefix(DENSE).strip(),
        table=table(("", "relative to dense", *map(_tokens, lengths)), rows),
        pays=" and ".join(pays),
        trained=f"from {_tokens(faster)} tokens on" if faster else "at none of these lengths",
    )
    return "\n".join(line if line.startswith("|") else _wrapped(line) for line in text.splitlines())


def steps(report: Mapping[str, Any]) -> dict[tuple[str, int], float]:
    """How many times as fast as that of its dense twin a training step of a model is, by flavor and length."""
    found = {
        (r["workload"], r["length"], r["role"]): r["median"] for r in report["results"] if r["stage"] == "training"
    }
    twins = {(flavor, n): found.get((flavor, n, "rival")) for flavor, n, role in found if role == "ours"}
    return {key: dense / found[*key, "ours"] for key, dense in twins.items() if dense}


def training_of(flavor: str, length: int, folder: Path | None = None) -> tuple[float, float] | None:
    """Tokens a second and peak memory of a model in training, over those of its dense twin; None without both runs."""
    files = [(folder or TRAINED) / f"h200-{_tokens(length)}-{name}.jsonl" for name in (flavor, f"{flavor}_dense")]
    if not all(file.exists() for file in files):
        return None
    ours, dense = map(read_log, files)
    ratio = statistics.median(ours.speeds) / statistics.median(dense.speeds)
    return ratio, max(ours[ACTIVE_GIB].values()) / max(dense[ACTIVE_GIB].values())


def merge(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The first report, with what only the others have: of a stage at a length, what one run measured, with the `roofs`
    of that run and, of all but the first, its `date`."""
    place = operator.itemgetter("workload", "length", "stage")
    places: dict[Any, list[dict[str, Any]]] = {}
    failures: dict[Any, dict[str, Any]] = {}
    for report in reports:
        found: dict[Any, list[dict[str, Any]]] = {}
        of_run = {"roofs": report["roofs"]} | ({} if report is reports[0] else {"date": report["machine"]["date"][:10]})
        for record in report["results"]:
            found.setdefault(place(record), []).append({**record, **of_run})
        places = {**found, **places}
        failures = {records.which(failure): failure for failure in report["failures"]} | failures
    results = list(itertools.chain.from_iterable(places.values()))
    return {**reports[0], "results": results, "failures": list(failures.values())}


class Results:
    """The records of one workload, by `(stage, direction, length, subject)`."""

    def __init__(self, report: Mapping[str, Any], workload: Workload) -> None:
        self.workload, self.subject = workload, report["subject"]
        self.records = {
            (r["stage"], r["direction"], r["length"], r["subject"]): r
            for r in report["results"]
            if r["workload"] == workload.name
        }
        self.lengths = sorted({length for _, _, length, _ in self.records})
        self.rivals = [s for s in dict.fromkeys(subject for *_, subject in self.records) if s != self.subject]
        self.denses = [s for s in self.rivals if s.startswith(DENSE)]

    def get(self, stage: str, direction: str, length: int, subject: str, what: str = "median") -> float | None:
        """A figure of one record, None where there is none."""
        return self.records.get((stage, direction, length, subject), {}).get(what)

    def both(self, length: int, subject: str) -> float | None:
        """Forward and backward pass of the whole op."""
        times = [self.get(WHOLE, direction, length, subject) for direction in PASSES]
        return None if None in times else sum(times)  # type: ignore[arg-type]

    def fastest_dense(self, length: int) -> str | None:
        """The dense attention that takes the least time for both passes of the whole op: what NSA is compared with."""
        times = {subject: self.both(length, subject) for subject in self.denses}
        return min((s for s, ms in times.items() if ms is not None), key=lambda s: times[s] or 0, default=None)

    @property
    def dense(self) -> str | None:
        """What the fastest dense attention is called: by its name where it is the same at every length."""
        found = {self.fastest_dense(length) for length in self.lengths} - {None}
        return None if not found else found.pop() if len(found) == 1 else "the fastest dense attention"

    def over_dense(self, length: int, subject: str) -> float | None:
        """How many times as fast as the fastest dense attention, both passes of the whole op."""
        dense, ours = self.fastest_dense(length), self.both(length, subject)
        theirs = self.both(length, dense) if dense else None
        return theirs / ours if theirs and ours else None

    def memory_over_dense(self, length: int, subject: str) -> float | None:
        """How many times the memory of the same dense attention, at the peak of both passes."""
        dense = self.fastest_dense(length)
        ours, theirs = (self.get(WHOLE, "backward", length, s, "memory") if s else None for s in (subject, dense))
        return ours / theirs if ours and theirs else None

    def total(self, stage: str, length: int) -> float | None:
        """All passes that a stage of ours has."""
        times = [self.get(stage, direction, length, self.subject) for direction in PASSES]
        return sum(ms for ms in times if ms is not None) or None


def curves(report: Mapping[str, Any]) -> list[Results]:
    """Workloads of which there is the whole op of ours at several lengths."""
    found = [Results(report, workload) for workload in WORKLOADS.values()]
    return [r for r in found if sum(r.both(length, r.subject) is not None for length in r.lengths) > 1]


def whole_op(results: Results) -> str:
    """The whole op at every length beside its rivals."""
    names = [results.subject, *results.rivals]
    names = [n for n in names if any(results.both(length, n) is not None for length in results.lengths)]
    if not names:
        return ""
    dense = results.dense
    rows: list[Sequence[Any]] = []
    for name in names:
        for title, direction, what in (
            ("forward", "forward", "median"),
            ("backward", "backward", "median"),
            ("host sustained, forward", "forward", "host_sustained"),
            ("host sustained, backward", "backward", "host_sustained"),
            ("host cold, forward", "forward", "host_cold"),
            ("host cold, backward", "backward", "host_cold"),
        ):
            figures = [results.get(WHOLE, direction, length, name, what) for length in results.lengths]
            if any(figure is not None for figure in figures):
                rows.append((f"{name}, {title}", *map(_ms, figures)))
        memory = [results.get(WHOLE, "backward", length, name, "memory") for length in results.lengths]
        rows.append((f"{name}, memory (GiB)", *("" if m is None else f"{m / 2**30:.2f}" for m in memory)))
    for name in names if dense else []:
        if name != dense:
            ratios = [_figure(results.over_dense(n, name)) for n in results.lengths]
            rows.append((f"**{dense} / {name}**, both passes", *(f and f"**{f}**" for f in ratios)))
    return table(("ms", *(_tokens(length) for length in results.lengths)), rows)


def stages(results: Results) -> str:
    """Every stage at some lengths: what it reaches, its floor, and the best of its rivals."""
    rows: list[Sequence[Any]] = []
    for stage, title in TITLES.items():
        for direction in ("forward", "backward"):
            for length in [n for n in results.lengths if n in LENGTHS] or results.lengths:
                ms = results.get(stage, direction, length, results.subject)
                if ms is None:
                    continue
                cost = results.workload.costs(length)[stage, direction]
                record = results.records[stage, direction, length, results.subject]
                floor = results.workload.floor(stage, direction, length, Roofs(**record["roofs"]))
                later = f" (of {record['date']})" if "date" in record else ""
                others = {s: results.get(stage, direction, length, s) for s in results.rivals if DENSE not in s}
                best = min(((t, s) for s, t in others.items() if t is not None), default=None)
                rows.append((
                    title, direction, _tokens(length) + later, _ms(ms), f"{cost.flops / ms / 1e9:.0f}",
                    f"{cost.bytes / ms / 1e9:.2f}", _ms(floor), _over(ms, floor),
                    f"{_ms(best[0])} ({best[1]})" if best else "",
                ))  # fmt: skip
    names = ("stage", "pass", "tokens", "ms", "TFLOP/s", "TB/s", "floor", "ms / floor", "best other")
    return table(names, rows)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _tokens(length: int) -> str:
    return f"{length // 1024}k" if length >= 1024 else str(length)


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _over(a: float | None, b: float | None) -> str:
    return _figure(None if a is None or b is None else a / b)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _wrapped(line: str) -> str:
    """A paragraph or an item of a list in lines of the width of this repository."""
    indent = "  " if line.startswith("- ") else ""
    return fill(line, 120, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)


def _one_line(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())[:120]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="saved runs, by paths from the repository's root")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="put figures into this file instead")
    parser.add_argument("--results", type=Path, metavar="FILE", help="put figures of generation into this file instead")
    parser.add_argument("--notes", type=Path, metavar="FILE", help="put times of stages into this file")
    options = parser.parse_args()
    reports = {file.as_posix(): records.read(file) for file in options.files}
    if options.readme:
        options.readme.write_text(readme(list(reports.values()), options.readme.read_text()))
    elif options.results:
        options.results.write_text(results_page(list(reports.values()), options.results.read_text()))
    elif options.notes:
        options.notes.write_text(notes_page(list(reports.values()), options.notes.read_text()))
    else:
        sys.stdout.write(render(reports))
    return 0


if __name__ == "__main__":
    sys.exit(main())
