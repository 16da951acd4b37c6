"""The report of the ladder as one page of HTML: no other file and no script, for any width, light or dark."""

import base64
import json
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

from validation.page import STYLE, table
from validation.system import repeats, tasks
from validation.system.mutants import MUTANTS
from validation.verdict import ASPECTS, BAD, cell

PICTURES = {
    "repeats": "Training with error bars: the mean over seeds as a line, from the least to the most as a band",
    "selection": "Health of the selection and mean gates of NSA while it trains",
    "tasks-heat": "Recall by length and by the depth of the answer",
    "tasks-curves": "Losses on the long-sequence tasks",
}


def page(verdict: Mapping[str, Any], folder: Path) -> str:
    """The page of a verdict, with the results that its layers left in a folder."""
    title = f"{verdict['implementation']}: {verdict['verdict']}"
    parts = [f'<h1 class="{verdict["verdict"]}">{escape(title)}</h1>', *_layers(verdict), *_failures(verdict)]
    parts += _known(verdict)
    parts += [*_unit(folder), *_mutants(verdict), *_training(verdict, folder), *_speed(verdict, folder)]
    parts += ["<h2>Not run here</h2>", wide(["tier", "reason"], list(verdict["not_run"].items()))] * bool(
        verdict["not_run"]
    )
    parts += ["<h2>Versions</h2>", wide(["package", "version"], list(verdict["versions"].items()))]
    parts += ["<h2>Commands</h2>", "<p>Each runs one layer again, from the root of the repository.</p>"]
    parts += [f"<pre>{escape(layer['command'])}</pre>" for layer in verdict["layers"].values()]
    head = (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<link rel=icon href='data:,'><title>{escape(title)}</title><style>{STYLE}</style>"
    )
    return f"{head}<body>{''.join(parts)}</body></html>\n"


def wide(head: list[str], rows: list[Any]) -> str:
    """A table that scrolls by itself where the screen is narrower."""
    return f"<div class=wide>{table(head, rows)}</div>"


def _layers(verdict: Mapping[str, Any]) -> Iterator[str]:
    rows = []
    for name, layer in verdict["layers"].items():
        counts = ", ".join(f"{count} {outcome}" for outcome, count in layer["counts"].items())
        word = "FAILED" if layer["verdict"] == "failed" else layer["verdict"]
        rows.append([name, layer["asks"], word, counts, f"{layer['seconds']:.0f} s"])
    yield wide(["layer", "asks", "verdict", "claims", "time"], rows)


def _failures(verdict: Mapping[str, Any]) -> Iterator[str]:
    for name, layer in verdict["layers"].items():
        bad = [claim for claim in layer["claims"] if claim["outcome"] in BAD]
        if bad:
            yield f"<h2>What fails in {escape(name)}</h2>"
        for claim in bad:
            yield f"<p class=failed>{escape(claim['id'])}</p><pre>{escape(claim.get('message', ''))}</pre>"


def _known(verdict: Mapping[str, Any]) -> Iterator[str]:
    claims = [claim for layer in verdict["layers"].values() for claim in layer["claims"]]
    rows = [[claim["id"], claim.get("message", "")] for claim in claims if claim["outcome"] == "xfailed"]
    if rows:
        yield "<h2>What is known not to hold</h2>" + wide(["claim", "reason"], rows)


def _unit(folder: Path) -> Iterator[str]:
    file = folder / "unit.json"
    if not file.exists():
        return
    found = json.loads(file.read_text())
    rows = [[stage, *(cell(row["aspects"].get(name)) for name in ASPECTS)] for stage, row in found["stages"].items()]
    yield "<h2>Claims by stage</h2>" + wide(["stage", *ASPECTS], rows) + source(file)
    errors = [
        [e["stage"], e["tensor"], e["dtype"], f"{e['error']:.2e}", f"{e['bound']:.2e}", f"{e['ratio']:.0%}"]
        for e in found["errors"]
    ]
    head = ["stage", "tensor", "dtype", "error", "bound", "part of the bound"]
    yield "<h2>Precision: the worst errors</h2>" + wide(head, errors) + source(file)
    declared = list(found["implementation"].get("capabilities", {}).items())
    yield "<h2>What it declares</h2>" + wide(["capability", "declared"], declared) + source(file)


def _mutants(verdict: Mapping[str, Any]) -> Iterator[str]:
    claims = {c["id"]: c["outcome"] for c in verdict["layers"].get("system", {}).get("claims", ())}
    words = {"passed": "killed", "failed": "FAILED: it lives", "skipped": "not tried"}
    rows = []
    for name, mutant in MUTANTS.items():
        outcome = next((o for id, o in claims.items() if id.endswith(f"test_mutant_is_killed[{name}]")), "skipped")
        rows.append([mutant.says, mutant.killer, words.get(outcome, outcome)])
    if claims:
        yield "<h2>Mutants</h2><p>Mistakes that are made on purpose, and that a check must find.</p>"
        yield wide(["mistake", "check", "outcome"], rows)


def _training(verdict: Mapping[str, Any], folder: Path) -> Iterator[str]:
    file = folder / "repeats.json"
    if file.exists():
        yield f"<h2>Training beside dense attention, tier {escape(verdict['tier'])}</h2>"
        runs = repeats.read(file)
        yield markdown(repeats.table(runs)) + source(file)
        yield picture(folder, "repeats", file)
        if repeats.watched(runs):
            yield picture(folder, "selection", file)
    file = folder / "tasks.json"
    if file.exists():
        results = tasks.read(file)
        yield "<h2>Long-sequence tasks</h2>" + markdown(tasks.table(results)) + source(file)
        says = [[name, variant.says] for name, variant in tasks.VARIANTS.items()]
        yield wide(["model", "what it is"], says)
        yield from (picture(folder, name, file) for name in ("tasks-heat", "tasks-curves"))


def _speed(verdict: Mapping[str, Any], folder: Path) -> Iterator[str]:
    file = folder / "perf.json"
    if not file.exists():
        return
    rows = []
    for record in json.loads(file.read_text())["results"]:
        if "median" in record:
            memory = record.get("memory")
            shown = "" if memory is None else f"{memory / 2**30:.2f}"
            names = [record[name] for name in ("workload", "length", "stage", "direction", "subject")]
            rows.append([*names, f"{record['median']:.3f}", shown])
    head = ["workload", "tokens", "stage", "direction", "subject", "median (ms)", "peak memory (GiB)"]
    yield "<h2>Speed and memory</h2>" + wide(head, rows) + source(file)


def markdown(lines: list[str]) -> str:
    """A table of Markdown as HTML."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return wide(rows[0], rows[2:])


def source(file: Path) -> str:
    """The line below a figure that names the run it comes from."""
    return f"<p class=source>From {escape(file.name)}, of this run.</p>"


def picture(folder: Path, name: str, file: Path) -> str:
    """A picture inside the page, or that it could not be drawn."""
    drawn = folder / f"{name}.png"
    if not drawn.exists():
        return f"<p>{escape(PICTURES[name])}: the picture could not be drawn.</p>"
    data = base64.b64encode(drawn.read_bytes()).decode()
    caption = f"{escape(PICTURES[name])}. From {escape(file.name)}, of this run."
    alt = escape(PICTURES[name], quote=True)
    return f'<figure><img alt="{alt}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
