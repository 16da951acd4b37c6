"""Pictures of saved runs, in one style: time, speed-up, stages, roofline, memory, and the history of what is gated.

    python -m validation.perf.plots RUN.json ... --out FOLDER
    python -m validation.perf.plots --latest --history --out out/perf    # the last run saved here, and all before it

What several runs hold is taken from the first, as in `validation.perf.report`. A picture for which a run has nothing is
left out. `--history` also draws what changed between the commits of the runs named and of the machine's baseline, with
`--latest` of all runs that `make perf` saved here too.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot: there may be no screen
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .. import reports
from ..costs import Roofs
from ..stages import TIMED
from ..stages import WHOLE as WHOLE_OP
from . import gates, records
from .benchmarks import size
from .records import Record, Report
from .report import TITLES, Results, curves, decoded, generated, pictured
from .timing import machine_name
from .workloads import WORKLOADS

Look = dict[str, Any]
"""How a line is drawn."""

# Okabe and Ito's colours, which are told apart by colour-blind people too; marks and dashes say it once more.
BLUE, RED, ORANGE, GREEN, PINK, SKY, BLACK = "#0072b2", "#d55e00", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#000000"
OURS: Look = {"color": BLUE, "marker": "o", "linestyle": "-", "linewidth": 2.2, "zorder": 5}
DENSE: Look = {"color": RED, "marker": "s", "linestyle": "--"}
FLOOR: Look = {"color": BLACK, "linestyle": ":", "linewidth": 1.2}
OTHERS: list[Look] = [
    {"color": color, "marker": marker, "linestyle": line}
    for color, marker, line in ((ORANGE, "D", "-."), (GREEN, "^", "--"), (PINK, "v", "-."), (SKY, "P", "--"))
]
WHOLE, PARTS = WHOLE_OP.name, WHOLE_OP.parts
COLOURS = {name: stage.colour for name, stage in TIMED.items()}
BESIDE = tuple(name for name in TIMED if name not in (*PARTS, WHOLE))
"""Stages that the whole op is not made of."""
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
    "legend.frameon": False,
    "figure.dpi": 130,
}
WORSE: Look = {"color": RED, "marker": "X", "linestyle": "", "markersize": 7, "zorder": 6}
BETTER: Look = {"color": GREEN, "marker": "v", "linestyle": "", "markersize": 7, "zorder": 6}
PASSES = ("forward", "backward")
TITLES_OF_HISTORY = (*PARTS, *BESIDE, WHOLE, "layer", "training", "decode", "generation")


def draw(report: Report) -> dict[str, Figure]:
    """The pictures of one run, by name."""
    drawn = {name: draw(report) for name, draw in PICTURES.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def _subjects(results: Results) -> list[str]:
    return [results.subject, *results.rivals]


def _look(results: Results, subject: str) -> dict[str, Any]:
    if subject == results.subject:
        return OURS
    first = results.denses[:1]
    if subject in first:
        return DENSE
    return OTHERS[[s for s in results.rivals if s not in first].index(subject) % len(OTHERS)]


def _panels(
    count: int, title: str, report: Report, height: float = 3.9, columns: int = 3, width: float = 4.3
) -> tuple[Figure, list[Axes]]:
    columns = min(count, columns)
    rows, width = -(-count // columns), max(5.6, width * columns)
    figure, axes = plt.subplots(rows, columns, figsize=(width, height * rows), layout="constrained", squeeze=False)
    # Nothing else makes a title fit: about nine of its letters are an inch.
    figure.suptitle(fill(title, int(9 * width)), fontsize=12, fontweight="bold")
    machine = report["machine"]
    figure.text(
        1, 0, f"{machine['device']}, PyTorch {machine['torch']}, {machine['date'][:10]} ",
        ha="right", va="bottom", fontsize=7, color="0.4",
    )  # fmt: skip
    figure.get_layout_engine().set(rect=(0, 0.16 / figure.get_figheight(), 1, 1 - 0.16 / figure.get_figheight()))  # type: ignore[union-attr,call-arg]
    for unused in axes.flat[count:]:
        unused.set_visible(False)
    return figure, list(axes.flat)


def _tokens(axes: Axes, lengths: Sequence[int]) -> None:
    """The axis of lengths: those that were measured, of close neighbours one."""
    shown: list[int] = []
    for length in lengths:
        if not shown or length >= 1.6 * shown[-1]:
            shown.append(length)
    axes.set_xscale("log")
    axes.set_xticks(shown, [size(length) for length in shown])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()
    axes.set_xlabel("tokens")


def _log(axes: Axes, label: str) -> None:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel(label)


def _line(axes: Axes, results: Results, subject: str, value: Callable[[int], float | None]) -> None:
    points = [(length, y) for length in results.lengths if (y := value(length)) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), label=subject, **_look(results, subject))


def time(report: Report) -> Figure | None:
    """Both passes of the whole op against length."""
    found = curves(report)
    if not found:
        return None
    figure, panels = _panels(len(found), "Time of forward and backward pass", report)
    roofs = Roofs(**report["roofs"])
    for axes, results in zip(panels, found, strict=False):
        for subject in _subjects(results):
            _line(axes, results, subject, partial(results.both, subject=subject))
        floors = [sum(results.workload.floor(WHOLE, d, n, roofs) for d in PASSES) for n in results.lengths]
        axes.plot(results.lengths, floors, label="floor of NSA", **FLOOR)
        _tokens(axes, results.lengths)
        _log(axes, "ms")
        axes.set_title(_title(results), fontsize=10)
        axes.legend(fontsize=8)
    return figure


def _title(results: Results) -> str:
    w = results.workload
    if w.kept:
        return f"{w.name}: {records.SAME_SHAPES[w.name]} with neighbouring queries alike"
    dims = f"{w.key_dim}" if w.key_dim == w.value_dim else f"{w.key_dim}/{w.value_dim}"
    return f"{w.name}: {w.query_heads} query heads, {w.kv_heads} KV heads, dim {dims}"


def speedup(report: Report) -> Figure | None:
    """How many times as fast as dense attention, with what is promised and what is aimed at."""
    found = [results for results in curves(report) if results.dense]
    if not found:
        return None
    figure, panels = _panels(len(found), "Times as fast as dense attention, forward and backward", report)
    table = gates.read_table().promises_of(report["machine"].get("name", ""))
    for axes, results in zip(panels, found, strict=False):
        dense = results.dense
        for subject in _subjects(results):
            if subject != dense:
                _line(axes, results, subject, partial(results.over_dense, subject=subject))
        axes.axhline(1, **{**FLOOR, "linestyle": "-"}, label=dense)
        promises = [p for p in table if (p.workload, p.kind) == (results.workload.name, "times as fast as dense")]
        for label, marker, points in (
            ("promised (gate)", "_", [(p.length, p.promise) for p in promises]),
            ("target", "*", [(p.length, p.target) for p in promises if p.target]),
        ):
            if points:
                axes.plot(*zip(*points, strict=True), marker, color=BLACK, markersize=9, label=label, zorder=6)
        _tokens(axes, results.lengths)
        _log(axes, f"time of {dense} / time")
        axes.set_title(_title(results), fontsize=10)
        axes.legend(fontsize=8)
    return figure


def stages(report: Report) -> Figure | None:
    """What the whole op is made of, as parts of its own time."""
    found = [
        r for r in curves(report)
        if any(r.get(PARTS[0], "forward", length, r.subject) is not None for length in r.lengths)
    ]  # fmt: skip
    if not found:
        return None
    figure, panels = _panels(2 * len(found), "Where the time goes", report, columns=2, width=5.6)
    for (results, direction), axes in zip([(r, d) for r in found for d in PASSES], panels, strict=False):
        lengths = [n for n in results.lengths if results.get(PARTS[0], direction, n, results.subject) is not None]
        places, bottom = range(len(lengths)), [0.0] * len(lengths)
        whole = [results.get(WHOLE, direction, n, results.subject) or 0 for n in lengths]
        for part in PARTS:
            ms = [results.get(part, direction, n, results.subject) or 0.0 for n in lengths]
            if any(ms):
                # As parts of the whole: lengths differ a hundredfold.
                height = [x / w if w else 0 for x, w in zip(ms, whole, strict=True)]
                bars = axes.bar(
                    places, height, 0.62, bottom, color=COLOURS[part], label=TITLES[part], edgecolor="white"
                )
                labels = [f"{x:.{2 if x < 1 else 3}g}" if h > 0.06 else "" for x, h in zip(ms, height, strict=True)]
                ink = "white" if COLOURS[part] in (BLUE, GREEN) else "black"
                axes.bar_label(bars, labels, label_type="center", fontsize=8, color=ink)
                bottom = [b + h for b, h in zip(bottom, height, strict=True)]
        axes.axhline(1, color=BLACK, linewidth=1, label="the whole op in one call")
        names = [f"{size(n)}\n{w:.3g} ms" for n, w in zip(lengths, whole, strict=True)]
        axes.set_xticks(places, names, fontsize=8)
        axes.set_xlabel("tokens, and time of the whole op")
        axes.set_ylabel("part of that time (in the bars: ms)")
        axes.set_ylim(0, 1.15 * max([1, *bottom]))
        axes.grid(axis="x", visible=False)
        axes.set_title(f"{results.workload.name}, {direction}", fontsize=10)
    handles = {label: h for ax in panels for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8, frameon=False)
    return figure


def roofline(report: Report) -> Figure | None:
    """What every stage reaches of the machine, by how much it has to compute for a byte."""
    found = [
        results for results in (Results(report, workload) for workload in WORKLOADS.values())
        if any(results.get(PARTS[0], "forward", n, results.subject) is not None for n in results.lengths)
        and results.workload.name != "P"
    ]  # fmt: skip
    if not found:
        return None
    figure, panels = _panels(len(found), "What the stages reach of what the machine can do", report, 4.4)
    roofs = Roofs(**report["roofs"])
    for axes, results in zip(panels, found, strict=False):
        longest = max(n for n in results.lengths if results.get(PARTS[0], "forward", n, results.subject))
        costs, intensities = results.workload.costs(longest), []
        for stage in (*PARTS, *BESIDE, WHOLE):
            for direction, filled in (("forward", True), ("backward", False)):
                ms = results.get(stage, direction, longest, results.subject)
                if ms is None or not costs[stage, direction].flops:
                    continue
                cost, colour = costs[stage, direction], COLOURS[stage]
                intensities.append(cost.flops / cost.bytes)
                axes.plot(
                    cost.flops / cost.bytes, cost.flops / ms / 1e9, "o" if filled else "D", color=colour,
                    mfc=colour if filled else "white", mew=1.6, markersize=8, linestyle="",
                    label=f"{TITLES[stage]}, {direction}",
                )  # fmt: skip
        edge = roofs.flops / roofs.bytes
        x = [min([edge / 4, *(i / 2 for i in intensities)]), edge, max([edge * 4, *(2 * i for i in intensities)])]
        roof = [min(roofs.flops, i * roofs.bytes) / 1e12 for i in x]
        axes.plot(x, roof, color=BLACK, linewidth=1.4, label="roof, measured")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel("operations a byte of device memory")
        _log(axes, "TFLOP/s")
        axes.set_title(f"{results.workload.name} at {size(longest)} tokens", fontsize=10)
    handles = {label: h for ax in panels for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8, frameon=False)
    return figure


def memory(report: Report) -> Figure | None:
    """Peak memory of both passes against length."""
    found = curves(report)
    if not found:
        return None
    figure, panels = _panels(len(found), "Peak memory of forward and backward pass, beyond the inputs", report)
    for axes, results in zip(panels, found, strict=False):
        for subject in _subjects(results):

            def gib(length: int, s: str = subject, r: Results = results) -> float | None:
                found = r.get(WHOLE, "backward", length, s, "memory")
                return None if found is None else found / 2**30

            _line(axes, results, subject, gib)
        _tokens(axes, results.lengths)
        _log(axes, "GiB")
        axes.set_title(_title(results), fontsize=10)
        axes.legend(fontsize=8)
    return figure


def decode(report: Report) -> Figure | None:
    """A step of decoding against the tokens in the cache, a panel a batch."""
    found = decoded(report)
    places = sorted({(workload, batch) for workload, _, batch in found})
    if not places:
        return None
    figure, panels = _panels(len(places), "Decoding: one new token of each sequence", report)
    roofs = Roofs(**report["roofs"])
    for axes, (workload, batch) in zip(panels, places, strict=False):
        lengths = [length for w, length, b in sorted(found) if (w, b) == (workload, batch)]
        ours = [found[workload, length, batch][0] for length in lengths]
        axes.plot(lengths, [r["median"] for r in ours], label=ours[0]["subject"], **OURS)
        rivals = [[r["median"] for r in found[workload, n, batch][1]] for n in lengths]
        if all(rivals):
            axes.plot(lengths, [min(times) for times in rivals], label="dense, the fastest", **DENSE)
        floors = [WORKLOADS[workload].decode_cost(n, batch).floor(roofs) for n in lengths]
        axes.plot(lengths, floors, label="floor of NSA", **FLOOR)
        _tokens(axes, lengths)
        _log(axes, "ms")
        axes.set_xlabel("tokens in the cache")
        axes.set_title(f"{workload}, {batch} sequence{'s' if batch > 1 else ''}", fontsize=10)
        axes.legend(fontsize=8)
    return figure


def generation(report: Report) -> Figure | None:
    """Time until the first token, and time of a step with the band up to its 99th percentile, a row a batch."""
    found = generated(report)
    places = sorted({(flavor, batch) for flavor, _, batch in found})
    if not places:
        return None
    figure, panels = _panels(2 * len(places), "Generation by whole models", report, columns=2, width=5.2)
    for axes, ((flavor, batch), field) in zip(panels, product(places, ("prefill", "median")), strict=False):
        lines: dict[str, list[Record]] = {}
        for record in (r for (f, _, b), all_of in found.items() if (f, b) == (flavor, batch) for r in all_of):
            lines.setdefault(record["subject"], []).append(record)
        for subject, line in lines.items():
            look = OURS if line[0]["role"] == "ours" else DENSE
            lengths = [record["length"] for record in line]
            axes.plot(lengths, [record[field] for record in line], label=subject, **look)
            if field == "median":
                low, high = ([record[x] for record in line] for x in ("median", "p99"))
                axes.fill_between(lengths, low, high, color=look["color"], alpha=0.15)
        _tokens(axes, sorted({record["length"] for line in lines.values() for record in line}))
        _log(axes, "ms")
        axes.set_xlabel("tokens of a prompt")
        what = "until the first token" if field == "prefill" else "a step, up to its 99th percentile"
        axes.set_title(f"{flavor}, {batch} sequence{'s' if batch > 1 else ''}: {what}", fontsize=10)
        axes.legend(fontsize=8)
    return figure


PICTURES: dict[str, Callable[[Report], Figure | None]] = {
    "time": time,
    "speedup": speedup,
    "stages": stages,
    "roofline": roofline,
    "memory": memory,
    "decode": decode,
    "generation": generation,
}


NAMED = 3
"""Changes that are named of those in one panel at one commit: the largest."""


def history(runs: Sequence[Report], kind: str = "time") -> Figure | None:
    """Figures of ours over commits, against the first that had each, of stages in which one changed beyond its bound.

    What changed since the commit before is marked, and the most of it named; None where nothing did, or there are no
    two commits.

    Args:
        runs: one a commit, the oldest first: `records.history`.
        kind: `"time"` or `"memory"`.
    """
    found = gates.changes(runs, kind)
    changed = {change.stage for change in found}
    stages = [s for s in TITLES_OF_HISTORY if s in changed]
    if not stages:
        return None
    figure, panels = _panels(len(stages), f"Changes of {kind} over commits, against the first", runs[-1], 3.6)
    bounds = gates.read_table().bounds_of(runs[0]["machine"]["name"])
    names = ["\n".join(filter(None, (run["commit"][:7], run["date"][:10], _reached(run)))) for run in runs]
    every = max(1, -(-len(runs) // 5))
    for stage, axes in zip(stages, panels, strict=False):
        here = [change for change in found if change.stage == stage]
        heights: dict[tuple[Any, int], float] = {}
        for key in dict.fromkeys(records.KEY(r) for run in runs for r in _of(run, stage)):
            line = [
                (i, gates.figure(r, kind))
                for i, run in enumerate(runs)
                for r in _of(run, stage)
                if key == records.KEY(r)
            ]
            points = [(i, value) for i, value in line if value]
            if not points:
                continue
            ratios = [value / points[0][1] for _, value in points]
            heights |= {(key, i): ratio for (i, _), ratio in zip(points, ratios, strict=True)}
            moved = any(change.key == key for change in here)
            style: Look = (
                {"color": COLOURS.get(stage, BLUE), "linewidth": 1.4} if moved else {"color": "0.8", "linewidth": 0.8}
            )
            axes.plot([i for i, _ in points], ratios, **style)
        for change in here:
            look = WORSE if change.ratio > 1 else BETTER
            axes.plot(change.run, heights[change.key, change.run], **look)
        for number, worse in dict.fromkeys((change.run, change.ratio > 1) for change in here):
            alike = [change for change in here if (change.run, change.ratio > 1) == (number, worse)]
            alike.sort(key=lambda change: change.ratio, reverse=worse)
            right = number < len(runs) / 2
            axes.annotate(
                "\n".join([_name(change) for change in alike[:NAMED]] + _more(len(alike) - NAMED)),
                (number, sum(heights[change.key, number] for change in alike) / len(alike)), (9 if right else -9, 0),
                textcoords="offset points", fontsize=7, va="center", ha="left" if right else "right",
            )  # fmt: skip
        axes.axhline(1, **FLOOR)
        axes.set_xticks(range(0, len(runs), every), names[::every], fontsize=7)
        axes.set_xlim(-0.3, len(runs) - 0.7)
        axes.set_xlabel("commit, day, rate of a product")
        axes.set_ylabel("times the first")
        low, high = axes.get_ylim()
        low, high = min(low, 0.8), max(high, 1.2)  # a few percent are to look like a few percent
        axes.set_ylim(low - 0.15 * (high - low), high + 0.15 * (high - low))  # with room for names
        axes.set_title(TITLES.get(stage, stage), fontsize=10)
    beyond = f"by over {getattr(bounds, kind) - 1:.0%}"
    if kind == "memory" and bounds.mib:
        beyond += f" and {bounds.mib:g} MiB"
    beyond += "\nsince the commit before"
    handles = [Line2D([], [], label=f"{word} {beyond}", **look) for word, look in (("more", WORSE), ("less", BETTER))]
    figure.legend(handles=handles, loc="outside right center", fontsize=8, frameon=False)
    return figure


def _name(change: gates.Change) -> str:
    workload, length, _, direction = change.key
    return f"{workload}-{size(length)}-{direction} {change.ratio - 1:+.0%}"


def _more(count: int) -> list[str]:
    return [f"and {count} more"] if count > 0 else []


def _reached(run: Report) -> str:
    """The rate of a large product: cards of a kind differ."""
    return f"{run['roofs']['flops'] / 1e12:.3g} TFLOP/s" if run.get("roofs") else ""


def _of(run: Report, stage: str) -> list[Record]:
    return [r for r in run["results"] if r["stage"] == stage and r["role"] == "ours"]


def first_of(draw: Callable[[Report], Figure | None], runs: Sequence[Report]) -> Figure | None:
    """The picture of the first run that has something for it."""
    return next((figure for run in runs if (figure := draw(run)) is not None), None)


def save(name: str, draw: Callable[[], Figure | None], folder: Path, prefix: str = "") -> Path | None:
    """Draws a picture and writes it as a PNG file; one for which there is nothing is left out."""
    figure = draw()
    if figure is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{prefix}{name}.png"
    # Without the version of matplotlib in the file the same figures give the same file.
    figure.savefig(file, metadata={"Software": None})
    plt.close(figure)
    return file


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", help="saved runs: the first, and what peers did in others")
    parser.add_argument("--latest", action="store_true", help="the last run that was saved here on this machine")
    parser.add_argument("--history", action="store_true", help="also of all saved runs")
    parser.add_argument("--storage", type=Path, default=records.STORAGE)
    parser.add_argument("--out", type=Path, required=True, help="the folder to draw into")
    parser.add_argument("--prefix", default="", help="of the names of the files")
    options = parser.parse_args()
    runs = [records.read(file) for file in options.files]
    if options.latest:
        saved = records.saved(options.storage, machine_name())
        if not saved:
            parser.error(f"no run of {machine_name()} is saved in {options.storage}")
        runs = [records.report(saved[-1][1])]
    if not runs:
        parser.error("name a run, or --latest")
    report = runs[0]
    pictures = {name: partial(first_of, draw, runs) for name, draw in PICTURES.items()}
    pictures |= {f"beside-{i}": partial(time, run) for i, run in enumerate(runs) if pictured(run, report)}
    if options.history:
        name = report["machine"]["name"]
        known = [records.read(file) for file in (*options.files, *records.BASELINES.glob(f"{name}.json"))]
        if options.latest:
            known += [records.report(content) for _, content in records.saved(options.storage, name)]
        commits = records.history(known)
        pictures |= {"history": partial(history, commits), "history-memory": partial(history, commits, "memory")}
    failures: list[str] = []
    with plt.rc_context(STYLE):
        for name, picture in pictures.items():
            with reports.attempt(f"the picture {options.prefix}{name}.png", failures.append):
                print(save(name, picture, options.out, options.prefix) or f"{name}: nothing to draw")
    print(*failures, sep="\n", file=sys.stderr, end="\n" if failures else "")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
