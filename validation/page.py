"""A verdict as one page of HTML that a person reads: no other file, no script."""

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from .verdict import ASPECTS, BAD, cell, command, downstream, in_cases, smallest

STYLE = """
:root { color-scheme: light dark; --text: #222; --back: #fff; --line: #ddd; --code: #f5f5f5; --bad: #b00020;
  --good: #12703a }
@media (prefers-color-scheme: dark) { :root { --text: #ddd; --back: #161616; --line: #444; --code: #262626;
  --bad: #ff8a80; --good: #81c995 } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: var(--text); background: var(--back); overflow-wrap: anywhere }
table { border-collapse: collapse } td, th { padding: .25rem .8rem; border-bottom: 1px solid var(--line);
  text-align: left }
.wide { overflow-x: auto } .wide td, .wide th { overflow-wrap: normal } .source { font-size: 13px; opacity: .8 }
figure { margin: 1rem 0 } img { max-width: 100%; background: #fff }
.failed { color: var(--bad); font-weight: 600 } .passed { color: var(--good); font-weight: 600 }
pre { background: var(--code); padding: .8rem; overflow-x: auto; white-space: pre-wrap }
"""
CELL = 6


def page(verdict: Mapping[str, Any]) -> str:
    """The page of a verdict: the table, stages that fail with their smallest cases, worst errors, what was skipped."""
    implementation = verdict["implementation"]
    title = f"{implementation.get('name', '?')}: {verdict['verdict']}"
    word = "passed" if verdict["verdict"] == "passed" else "failed"
    counts = ", ".join(f"{count} {outcome}" for outcome, count in verdict["counts"].items())
    parts = [f'<h1 class="{word}">{escape(title)}</h1>', f"<p>{escape(counts)}</p>"]
    parts += [f"<p class=failed>{escape(problem)}</p>" for problem in verdict["problems"]]
    for slip in verdict["first_calls"]:
        parts.append(
            f"<p class=failed>first call of {escape(', '.join(slip['stages']))}: {escape(slip['message'])}</p>"
        )
    rows = [
        [stage, *(cell(row["aspects"].get(aspect)) for aspect in ASPECTS)] for stage, row in verdict["stages"].items()
    ]
    parts += ["<h2>Claims by stage</h2>", table(["stage", *ASPECTS], rows)]
    for stage, row in verdict["stages"].items():
        if "explanations" in row:
            parts += failing(verdict, stage, row)
    errors = [
        [e["stage"], e["tensor"], e["dtype"], f"{e['error']:.2e}", f"{e['bound']:.2e}", f"{e['ratio']:.0%}", e["case"]]
        for e in verdict["errors"]
    ]
    head = ["stage", "tensor", "dtype", "error", "bound", "part of the bound", "case"]
    parts += ["<h2>Worst errors</h2>", table(head, errors)]
    parts += ["<h2>Not tested</h2>", table(["reason", "times"], verdict["skips"].items())]
    declared = implementation.get("capabilities", {}).items()
    parts += ["<h2>What it declares</h2>", table(["capability", "declared"], declared)]
    parts += ["<h2>Versions</h2>", table(["package", "version"], verdict["versions"].items())]
    return f"<!doctype html><meta charset=utf-8><title>{escape(title)}</title><style>{STYLE}</style>{''.join(parts)}\n"


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    def line(cells: Iterable[Any], tag: str) -> str:
        words = (str(cell) for cell in cells)
        marked = (f"<{tag}{' class=failed' * word.startswith('FAIL')}>{escape(word)}</{tag}>" for word in words)
        return f"<tr>{''.join(marked)}</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def failing(verdict: Mapping[str, Any], stage: str, row: Mapping[str, Any]) -> list[str]:
    """What is to say of a stage that fails: why, the smallest failing case as a program, where the error lies."""
    parts = [f"<h2>{escape(stage)} fails</h2>"]
    if row.get("downstream_of"):
        parts.append(f"<p>It is {escape(downstream(row['downstream_of']))}.</p>")
    for found in row["explanations"]:
        parts.append(f"<p><b>{escape(found['text'])}</b> ({in_cases(found)})</p>")
    for aspect, counts in row["aspects"].items():
        if counts.get("common"):
            parts.append(f"<p>{escape(aspect)}: {escape(counts['common'])}</p>")
    bad = [claim for claim in verdict["claims"] if claim.get("stage") == stage and claim["outcome"] in BAD]
    first = smallest([claim for claim in bad if claim.get("where")] or bad)  # one with a picture, if any has one
    parts.append(
        f"<p>The smallest failing case: {escape(first['id'])}</p><pre>{escape(first.get('message', ''))}</pre>"
    )
    parts.append(f"<pre>{escape(snippet(verdict, first))}</pre>")
    if first.get("where"):
        parts.append("<p>Error over its bound: tokens downwards, all that belongs to a token to the right.</p>")
        parts.append(picture(first["where"]))
    return parts


def snippet(verdict: Mapping[str, Any], claim: Mapping[str, Any]) -> str:
    """Five lines that repeat a comparison with the oracle; for another test, the command."""
    if not claim["id"].startswith("test_stages.py::test_matches") or not claim.get("dtype"):
        return command(verdict, claim)
    subject = verdict["implementation"]["subject"]
    return f"""import torch; from nsa_validation import cases, comparison, implementations, stages
impl, stage, dtype = implementations.load("{subject}"), stages.BY_NAME["{claim["stage"]}"], torch.{claim["dtype"]}
case = cases.fitted(impl, cases.BY_ID["{claim["case"]}"], stages=stage.functions)
plain = dtype != torch.float64 and not impl.plain
comparison.compare(impl, stage, case, cases.draw(case, dtype), dtype, beside_plain=plain)"""


def picture(where: list[list[float]]) -> str:
    """Squares, the redder the further beyond the bound; grey within it."""

    def colour(ratio: float) -> str:
        return "#e8e8e8" if ratio <= 1 else "#f4b6a8" if ratio <= 10 else "#e0614a" if ratio <= 1e3 else "#8f1010"

    squares = "".join(
        f'<rect x="{CELL * x}" y="{CELL * y}" width="{CELL - 1}" height="{CELL - 1}" fill="{colour(ratio)}"/>'
        for y, line in enumerate(where)
        for x, ratio in enumerate(line)
    )
    return f'<svg width="{CELL * len(where[0])}" height="{CELL * len(where)}">{squares}</svg>'
