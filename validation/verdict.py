"""The verdict on an implementation: collected from a run of pytest, as JSON that machines compare and as text.

The JSON is documented in docs/verdict.md; `VERSION` grows whenever a field changes its meaning or goes.
"""

import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

from . import doctor, reports, seeds

SCHEMA, VERSION = "nsa-validation/verdict", 1
ASPECTS = ("rules", "forward", "gradients", "selection", "properties")
BAD = ("failed", "error", "xpassed")


class Collector:
    """Follows a run of pytest; `verdict` is what it came to."""

    def __init__(self, subject: str, layers: Iterable[str]) -> None:
        self.subject, self.layers = subject, list(layers)
        self.claims: list[dict[str, Any]] = []
        self.skips: Counter[str] = Counter()
        self.slips: list[dict[str, Any]] = []
        self.problems: list[str] = []
        self.implementation: dict[str, Any] = {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._capabilities(session.config)

    def _capabilities(self, config: pytest.Config) -> None:
        from .subjects import SLIPS, chosen

        impl = chosen(config)[0]
        self.implementation = {"name": impl.name, "subject": self.subject, "capabilities": impl.capabilities()}
        slips = config.stash.get(SLIPS, [])
        self.slips = [{"stages": list(slip.stages), "message": slip.message} for slip in slips]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not self.implementation:
            self._capabilities(session.config)
        if refused := session.config.stash[reports.REFUSED]:
            self.problems.append(refused)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.problems.append(f"{report.nodeid} could not be collected: {report.longreprtext.splitlines()[-1]}")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            found = dict(getattr(report, "claim", {}))
            expected = hasattr(report, "wasxfail")
            outcome = {"passed": "xpassed", "skipped": "xfailed"}.get(report.outcome) if expected else report.outcome
            if "[XPASS(strict)]" in str(report.longrepr or ""):
                outcome = "xpassed"
            if outcome == "skipped":
                reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
                self.skips[reason.removeprefix("Skipped: ").partition("\n")[0]] += 1
            if outcome == "failed" and "message" not in found:  # a process that died, or a fixture
                found["message"] = report.longreprtext.splitlines()[-1] if report.longreprtext else "died"
            id = seeds.name_of(report.nodeid)
            self.claims.append({"id": id, "outcome": outcome, "seconds": round(report.duration, 3), **found})

    def verdict(self) -> dict[str, Any]:
        """The JSON, without what other layers add."""
        counts = Counter(claim["outcome"] for claim in self.claims)
        bad = sum(counts[outcome] for outcome in BAD)
        word = "failed" if bad or self.slips or self.problems else "passed" if counts["passed"] else "not tested"
        return {
            "schema": SCHEMA,
            "version": VERSION,
            "verdict": word,
            "implementation": self.implementation,
            "layers": self.layers,
            "counts": dict(counts),
            "versions": versions(),
            "variation": seeds.variation,
            "problems": self.problems,
            "first_calls": self.slips,
            "stages": stages(self.claims),
            "errors": worst(self.claims),
            "skips": dict(self.skips.most_common()),
            "claims": self.claims,
        }


def versions() -> dict[str, str]:
    """What took part, by name."""
    found = {"python": sys.version.split()[0], "gpu": ", ".join(doctor.inspect().gpus) or "none"}
    for name in ("nsa", "torch", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def passes(claim: Mapping[str, Any], aspect: str) -> bool | None:
    """Whether a claim holds as far as an aspect goes; None where it says nothing of it."""
    if aspect not in claim.get("aspects", ()) or claim["outcome"] in ("skipped", "xfailed"):
        return None
    return claim["outcome"] not in BAD


def stages(claims: list[dict[str, Any]]) -> dict[str, Any]:
    """By stage: counts of each aspect and, where some fail, the smallest failing case and what they have in common."""
    from .stages import FUNCTIONS, SHARED  # with them comes `nsa`, which pytest wants to see first

    found: dict[str, Any] = {}
    rows = [name for name in (*FUNCTIONS, "whole", "any") if any(claim.get("stage") == name for claim in claims)]
    for name in rows:
        own = [claim for claim in claims if claim.get("stage") == name]
        row: dict[str, Any] = {"aspects": {}}
        for aspect in ASPECTS:
            outcomes = [(claim, passes(claim, aspect)) for claim in own]
            failed = [claim for claim, good in outcomes if good is False]
            counts: dict[str, Any] = {"passed": sum(good is True for _, good in outcomes), "failed": len(failed)}
            if failed:
                counts["first"] = smallest(failed)["id"]
                counts["common"] = common(failed, [claim for claim, good in outcomes if good])
            if counts["passed"] or failed:
                row["aspects"][aspect] = counts
        bad = [claim for claim in own if claim["outcome"] in BAD]
        if bad:
            row["explanations"] = explanations(bad)
        found[name] = row
    parts_of = {name: stage.parts for name, stage in (*FUNCTIONS.items(), ("whole", SHARED))}
    for name, parts in parts_of.items():
        if parts and "explanations" in found.get(name, {}):
            found[name]["downstream_of"] = [part for part in parts if "explanations" in found.get(part, {})]
    return found


def smallest(claims: Iterable[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The claim of the smallest case; claims without a case are last."""
    return min(claims, key=lambda claim: claim.get("size") or sys.maxsize)


def common(failed: list[dict[str, Any]], passed: list[dict[str, Any]]) -> str:
    """What all failing cases have and no passing one has, in words; what they have at all where others have it too."""
    if not passed or any(not claim.get("traits") for claim in failed):
        return ""
    shared = set.intersection(*(set(claim["traits"]) for claim in failed))
    only = [trait for trait in shared if not any(trait in claim.get("traits", ()) for claim in passed)]
    if only:
        return f"only where {' and '.join(sorted(only))}"
    lacking = {t for claim in passed for t in claim.get("traits", ())} - {t for c in failed for t in c["traits"]}
    never = [trait for trait in lacking if all(trait in claim.get("traits", ()) for claim in passed)]
    return f"never where {' or '.join(sorted(never))}" if never else ""


def explanations(failed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What failing cases agree with: what most of those agree with that were compared, and in how many."""
    compared = [claim for claim in failed if claim.get("explanations")]
    counts = Counter(line for claim in compared for line in claim["explanations"])
    most = max(counts.values(), default=0)
    return [{"text": line, "cases": count, "of": len(compared)} for line, count in counts.items() if count == most]


def worst(claims: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The error nearest to its bound of every stage, tensor and dtype."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for claim in claims:
        for stage, tensor, dtype, error, bound in claim.get("margins", ()):
            ratio = error / bound if bound else 0.0
            key = stage, tensor, dtype
            if key not in found or ratio > found[key]["ratio"]:
                found[key] = {
                    "stage": stage, "tensor": tensor, "dtype": dtype, "error": error, "bound": bound,
                    "ratio": ratio, "case": claim.get("case"),
                }  # fmt: skip
    return [found[key] for key in sorted(found)]


# As text.


def text(verdict: Mapping[str, Any]) -> Iterable[str]:
    """Lines for a terminal; the verdict is the last."""
    name = verdict["implementation"].get("name", "?")
    for problem in verdict["problems"]:
        yield f"problem: {problem}"
    for slip in verdict["first_calls"]:
        yield f"first call of {', '.join(slip['stages'])}: {slip['message']}"
    if any(row["aspects"] for row in verdict["stages"].values()):
        yield from _table(verdict["stages"])
    for stage, row in verdict["stages"].items():
        if "explanations" in row:
            yield from ("", *_stage(verdict, stage, row))
    if verdict["skips"]:
        yield from ("", "not tested, by reason:")
        yield from (f"{count:6}  {reason}" for reason, count in verdict["skips"].items())
    counts = ", ".join(f"{count} {outcome}" for outcome, count in verdict["counts"].items())
    yield from ("", f"{name}: {verdict['verdict']} ({counts or 'nothing was tested'})")


def _table(rows: Mapping[str, Any]) -> Iterable[str]:
    cells = [["", *ASPECTS]]
    for stage, row in rows.items():
        if row["aspects"]:
            cells.append([stage, *(cell(row["aspects"].get(aspect)) for aspect in ASPECTS)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    yield from ("  ".join(x.ljust(width) for x, width in zip(line, widths, strict=True)).rstrip() for line in cells)


def cell(counts: Mapping[str, Any] | None) -> str:
    """What the table says of one aspect of a stage."""
    if counts is None:
        return "-"
    total = counts["passed"] + counts["failed"]
    return f"FAIL {counts['failed']} of {total}" if counts["failed"] else f"ok {total}"


def downstream(upstream: list[str]) -> str:
    """That stages which others are made of fail as well."""
    return f"downstream of {', '.join(upstream)}, which {'fails' if len(upstream) == 1 else 'fail'} too"


def in_cases(found: Mapping[str, Any]) -> str:
    """In how many cases an explanation holds."""
    return f"{found['cases']} of {found['of']} case{'s' if found['of'] != 1 else ''} compared"


MESSAGES = 3
"""Different messages of a stage that are shown."""


def _stage(verdict: Mapping[str, Any], stage: str, row: Mapping[str, Any]) -> Iterable[str]:
    upstream = row.get("downstream_of")
    yield f"{stage} fails" + (f", {downstream(upstream)}" if upstream else "")
    for found in row["explanations"]:
        yield f"  {found['text']}  ({in_cases(found)})"
    for aspect, counts in row["aspects"].items():
        if counts.get("common"):
            yield f"  {aspect}: {counts['common']}"
    folded: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for claim in verdict["claims"]:
        if claim.get("stage") == stage and claim["outcome"] in BAD:
            folded[_alike(claim.get("message", ""))].append(claim)
    ranked = sorted(folded.values(), key=lambda same: (_aspect(same[0]), -len(same)))
    for same in ranked[:MESSAGES]:
        first = smallest(same)
        count = f"{len(same)} times" if len(same) > 1 else "once"
        message = first.get("message", first["outcome"]).replace("\n", "\n      ")
        yield f"  {count}, the smallest: {first['id']}"
        yield f"      {message}"
        yield f"      again: {command(verdict, first)}"
    if (more := len(ranked) - MESSAGES) > 0:
        yield f"  and {more} other message{'s' if more > 1 else ''}, in --json and --report"


def command(verdict: Mapping[str, Any], claim: Mapping[str, Any]) -> str:
    """The command that runs a claim's test again."""
    return f"nsa-validate {verdict['implementation']['subject']} --only '{claim['id']}'"


def _aspect(claim: Mapping[str, Any]) -> int:
    return min((ASPECTS.index(aspect) for aspect in claim.get("aspects", ()) if aspect in ASPECTS), default=9)


def _alike(message: str) -> str:
    """A message's first line without its numbers and the name of its case."""
    line = re.sub(r"case \w+", "case", message.partition("\n")[0])
    return re.sub(r"[-+]?\d[\d.,e+\-]*", "#", re.sub(r"\[[^]]*\]|, in # of.*", "", line))[:160]


# For dashboards.


def benchmarks(verdict: Mapping[str, Any]) -> dict[str, Any]:
    """Its figures of performance in the form of pytest-benchmark's JSON, which github-action-benchmark reads.

    Times are in seconds there. What dashboards draw is `ops`, calls a second: of the median, which one slow call does
    not move.
    """
    found = []
    for record in verdict.get("performance", ()):
        name = "-".join(str(record[key]) for key in ("workload", "length", "stage", "direction", "subject"))
        seconds = {key: record[key] / 1e3 for key in ("median", "lower", "upper", "mean", "deviation")}
        stats = {
            "median": seconds["median"], "q1": seconds["lower"], "q3": seconds["upper"], "mean": seconds["mean"],
            "stddev": seconds["deviation"], "rounds": record["rounds"], "ops": 1 / seconds["median"],
        }  # fmt: skip
        found.append({"name": name, "fullname": name, "group": record["stage"], "stats": stats, "extra_info": record})
    return {"machine_info": verdict["versions"], "benchmarks": found}


# Two of them.


def read(file: Path) -> dict[str, Any]:
    """A verdict from its file.

    Raises:
        ValueError: the file holds none, or one of a later version.
    """
    found = json.loads(file.read_text())
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise ValueError(f"{file} holds no verdict: its schema is not {SCHEMA!r}")
    if found["version"] > VERSION:
        raise ValueError(f"{file} is of version {found['version']}, this harness reads up to {VERSION}")
    return found


GREW = 1.25
"""A worst error is said to have grown when it is so many times what it was, as a part of its bound."""


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[list[str], bool]:
    """Lines that say what changed from one verdict to another, and whether something got worse: a claim that held."""

    def outcomes(verdict: Mapping[str, Any]) -> dict[str, str]:
        name = rf"(?<=[\[-]){re.escape(verdict['implementation'].get('name', ''))}(?=[-\]])"
        return {re.sub(name, "IMPL", claim["id"]): claim["outcome"] for claim in verdict["claims"]}

    old, new = outcomes(before), outcomes(after)
    good = ("passed", "xfailed")
    broken = sorted(id for id in new if new[id] in BAD and old.get(id) not in BAD)
    mended = sorted(id for id in new if new[id] in good and old.get(id) in BAD)
    lost = sorted(id for id in old if old[id] in good and new.get(id, "skipped") == "skipped")
    lines = [" -> ".join(f"{each['implementation'].get('name', '?')}: {each['verdict']}" for each in (before, after))]
    for key in sorted({*before["versions"], *after["versions"]}):
        was, now = before["versions"].get(key), after["versions"].get(key)
        if was != now:
            lines.append(f"{key}: {was} -> {now}")
    was, now = (verdict["implementation"].get("capabilities", {}) for verdict in (before, after))
    lines += [f"capability {key}: {was.get(key)} -> {now.get(key)}" for key in now if was.get(key) != now.get(key)]
    changes = (
        ("claim fails now", "claims fail now", broken),
        ("claim holds now", "claims hold now", mended),
        ("claim is not tested any more", "claims are not tested any more", lost),
    )
    for one, many, ids in changes:
        if ids:
            what = one if len(ids) == 1 else many
            lines.append(f"{len(ids)} {what}: {', '.join(ids[:3])}{', ...' if len(ids) > 3 else ''}")
    errors = {(e["stage"], e["tensor"], e["dtype"]): e["ratio"] for e in before["errors"]}
    for e in after["errors"]:
        ratio = errors.get((e["stage"], e["tensor"], e["dtype"]))
        if ratio and e["ratio"] > GREW * ratio:
            parts = f"{ratio:.0%} -> {e['ratio']:.0%} of its bound"
            lines.append(f"worst error of {e['tensor']} of {e['stage']} ({e['dtype']}): {parts}")
    worse = bool(broken or lost or (after["verdict"] != "passed" and before["verdict"] == "passed"))
    return [*lines, "worse" if worse else "not worse"], worse
