"""The whole ladder, from a single stage to a trained model, and one report: `make validate`.

    python -m validation.ladder [--impl NAME|package.module:object] [--layers unit,system] [--out out/validate]

Each layer is a run of pytest, or of the benchmarks. The report is `index.html` in the folder, one file that needs no
other. The same verdict is printed, and written as `junit.xml`, `summary.md` and `verdict.json` (docs/verdict.md). The
exit status is the verdict: 0 if every layer holds, 1 if one does not or was not tested, 2 if the command is wrong.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from nsa.titan.runs import write_whole
from validation import reports
from validation.implementations import load
from validation.ladder.page import page
from validation.system.repeats import TIER, TIERS
from validation.system.tasks import SUBJECT
from validation.verdict import BAD, versions

SCHEMA, VERSION = "nsa-validation/ladder", 1
ROOT = Path(__file__).parents[2]
FEW = "test_rules or test_semantics or small or paper"
"""The tests of the unit layer that are run here: rules, semantics, the smallest cases and the paper's."""
SYSTEM = "validation/system/"

Claim = dict[str, Any]


@dataclass(frozen=True)
class Rung:
    """A layer of the ladder.

    Attributes:
        asks: the question that it answers.
        command: of an implementation's name and the folder for results, what follows `python -m`.
        read: what came of it, of the folder: a claim each, with `id`, `outcome`, `seconds` and, if bad, `message`.
        theirs: whether it is about any implementation; the others are about ours alone.
        seconds: about how long it takes on two idle cores.
    """

    asks: str
    command: Callable[[str, Path], list[str]]
    read: Callable[[Path], list[Claim]]
    theirs: bool
    seconds: int


def _unit(subject: str, folder: Path) -> list[str]:
    jobs = str(os.cpu_count() or 1)
    json_file = f"--json={folder / 'unit.json'}"
    return ["validation", subject, "--layers=unit,precision", "-k", FEW, "--jobs", jobs, json_file]


def _pytest(name: str, *tests: str) -> Callable[[str, Path], list[str]]:
    return lambda subject, folder: ["pytest", "-q", f"--junitxml={folder / name}.xml", f"--out={folder}", *tests]


def _system(subject: str, folder: Path) -> list[str]:
    files = ["test_checks.py", "test_tasks.py", "test_repeats.py"] if subject == OURS else ["test_tasks.py"]
    return _pytest("system", *(SYSTEM + file for file in files))(subject, folder)


def _perf(subject: str, folder: Path) -> list[str]:
    return ["validation.perf.stages", "--quick", f"--impl={subject}", f"--out={folder / 'perf.json'}"]


def _of_verdict(folder: Path) -> list[Claim]:
    verdict = json.loads((folder / "unit.json").read_text())
    problems = [{"id": "unit", "outcome": "failed", "seconds": 0.0, "message": text} for text in verdict["problems"]]
    slips = [
        {"id": f"first call of {', '.join(slip['stages'])}", "outcome": "failed", "seconds": 0.0, **slip}
        for slip in verdict["first_calls"]
    ]
    kept = ("id", "outcome", "seconds", "message")
    return problems + slips + [{name: c[name] for name in kept if name in c} for c in verdict["claims"]]


def _of_junit(name: str) -> Callable[[Path], list[Claim]]:
    def read(folder: Path) -> list[Claim]:
        claims = []
        for case in ElementTree.parse(folder / f"{name}.xml").iter("testcase"):
            bad = next((case.find(tag) for tag in ("failure", "error", "skipped") if case.find(tag) is not None), None)
            outcome = {"failure": "failed", "error": "error", "skipped": "skipped"}[bad.tag] if bad is not None else ""
            if bad is not None and bad.get("type") == "pytest.xfail":
                outcome = "xfailed"
            id = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
            claim = {"id": id, "outcome": outcome or "passed", "seconds": float(case.get("time", 0))}
            claims.append(claim | ({"message": bad.get("message", "")} if bad is not None else {}))
        return claims

    return read


def _of_stages(folder: Path) -> list[Claim]:
    claims = []
    for record in json.loads((folder / "perf.json").read_text())["results"]:
        id = " ".join(str(record.get(name, "")) for name in ("workload", "length", "stage", "direction", "subject"))
        error = record.get("error")
        claim = {"id": id, "outcome": "failed" if error else "passed", "seconds": 0.0}
        claims.append(claim | ({"message": str(error)} if error else {}))
    return claims


OURS = "triton" if torch.cuda.is_available() else "eager"
"""The implementation that the ladder is about unless another is named."""

RUNGS: Mapping[str, Rung] = {
    "unit": Rung("is each stage right?", _unit, _of_verdict, True, 10),
    "integration": Rung(
        "do the parts work together, over processes?",
        _pytest("integration", "validation/integration", "-m", "smoke"),
        _of_junit("integration"),
        False,
        90,
    ),
    "system": Rung("does it learn what dense attention learns?", _system, _of_junit("system"), True, 320),
    "perf": Rung("how long does each stage take?", _perf, _of_stages, True, 35),
}


def run(names: Sequence[str], subject: str, folder: Path, tier: str, only: str | None) -> dict[str, Any]:
    """Climbs the ladder: the verdict, as its JSON, which is saved after each layer."""
    layers: dict[str, Any] = {}
    names = [name for name in names if subject == OURS or RUNGS[name].theirs]
    verdict = _verdict(layers, len(names), subject, tier)
    spent = planned = 0.0
    environment = {**os.environ, SUBJECT: "" if subject == OURS else subject, TIER: tier}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.getcwd(), os.environ.get("PYTHONPATH"))))
    for number, name in enumerate(names, 1):
        rung = RUNGS[name]
        pace = spent / planned if planned else 1.0
        left = pace * sum(RUNGS[other].seconds for other in names[number - 1 :]) / 60
        print(f"\n[{number} of {len(names)}] {name}: {rung.asks} (about {left:.0f} min left)", flush=True)
        command = rung.command(subject, folder)
        if only and "pytest" in command:
            command += ["-k", only]
        begun = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=environment, check=False)
        seconds = time.perf_counter() - begun
        spent, planned = spent + seconds, planned + rung.seconds
        layers[name] = _layer(name, folder, command, done.returncode, seconds)
        verdict = _verdict(layers, len(names), subject, tier)
        save(folder, verdict)
    return verdict


def _verdict(layers: dict[str, Any], of: int, subject: str, tier: str) -> dict[str, Any]:
    """The verdict of so many layers, not all of which may have been run yet."""
    failed = [name for name, layer in layers.items() if layer["verdict"] != "passed"]
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "verdict": "failed" if failed else "passed" if len(layers) == of else "unfinished",
        "failed": failed,
        "implementation": subject,
        "tier": tier,
        "versions": versions(),
        "layers": layers,
        "not_run": {name: tier.missing() for name, tier in TIERS.items() if tier.missing()},
    }


def save(folder: Path, verdict: Mapping[str, Any]) -> None:
    """Writes a verdict as `verdict.json`, `junit.xml` and `summary.md`."""
    write_whole(folder / "verdict.json", json.dumps(verdict, indent=1) + "\n")
    write_whole(folder / "junit.xml", junit(verdict))
    write_whole(folder / "summary.md", summary(verdict))


def _layer(name: str, folder: Path, command: list[str], status: int, seconds: float) -> dict[str, Any]:
    """What came of one layer."""
    try:
        claims = RUNGS[name].read(folder)
    except (OSError, ValueError, KeyError, ElementTree.ParseError) as error:
        claims = []
        message = f"the run ended with status {status} and left no results: {error}"
        claims.append({"id": name, "outcome": "error", "seconds": seconds, "message": message})
    counts = Counter(claim["outcome"] for claim in claims)
    bad = sum(counts[outcome] for outcome in BAD)
    if not bad and status not in (0, 5):
        claims.append({"id": name, "outcome": "error", "seconds": 0.0, "message": f"the run ended with {status}"})
        bad = 1
    word = "failed" if bad else "passed" if counts["passed"] else "not tested"
    shown = reports.command_line(command[0], command[1:])
    return {
        "verdict": word, "asks": RUNGS[name].asks, "counts": dict(counts), "seconds": round(seconds, 1),
        "command": shown, "claims": claims,
    }  # fmt: skip


def junit(verdict: Mapping[str, Any]) -> str:
    """The verdict as JUnit XML: a suite a layer."""
    root = ElementTree.Element("testsuites")
    for name, layer in verdict["layers"].items():
        suite = ElementTree.SubElement(root, "testsuite", name=name, tests=str(len(layer["claims"])))
        for claim in layer["claims"]:
            case = ElementTree.SubElement(
                suite, "testcase", classname=name, name=claim["id"], time=str(claim["seconds"])
            )
            if claim["outcome"] in BAD:
                ElementTree.SubElement(case, "failure", message=claim.get("message", ""))
            elif claim["outcome"] != "passed":
                ElementTree.SubElement(case, "skipped", message=claim.get("message", ""))
    return ElementTree.tostring(root, encoding="unicode")


def text(verdict: Mapping[str, Any]) -> list[str]:
    """Lines for a terminal; the verdict is the last."""
    lines = []
    for name, layer in verdict["layers"].items():
        counts = ", ".join(f"{count} {outcome}" for outcome, count in layer["counts"].items())
        lines.append(f"{name:12} {layer['verdict']:10} {counts} ({layer['seconds']:.0f} s)")
        for claim in layer["claims"]:
            if claim["outcome"] == "xfailed":
                lines.append(f"    known not to hold: {claim['id']}: {claim.get('message', '')}")
            if claim["outcome"] in BAD:
                lines.append(f"    {claim['id']}: {claim.get('message', '').partition(chr(10))[0][:160]}")
    lines += [f"tier {name} was not run here: it {reason}" for name, reason in verdict["not_run"].items()]
    word = verdict["verdict"]
    return [*lines, f"{verdict['implementation']}: {word}" + f" in {', '.join(verdict['failed'])}" * (word == "failed")]


def summary(verdict: Mapping[str, Any]) -> str:
    """The verdict in Markdown, for the summary of a job."""
    rows = ["| layer | asks | verdict | time |", "|---|---|---|---|"]
    for name, layer in verdict["layers"].items():
        rows.append(f"| {name} | {layer['asks']} | {layer['verdict']} | {layer['seconds']:.0f} s |")
    lines = "\n".join(text(verdict))
    return f"## {verdict['implementation']}: {verdict['verdict']}\n\n" + "\n".join(rows) + f"\n\n```\n{lines}\n```\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m validation.ladder", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--impl", default=OURS, help=f"the implementation (default: {OURS})")
    parser.add_argument("--layers", default=",".join(RUNGS), help=f"of {', '.join(RUNGS)}, with commas between them")
    parser.add_argument("--tier", choices=TIERS, default="cpu", help="size of the training runs (default: cpu)")
    parser.add_argument("--out", type=Path, default=Path("out/validate"), help="folder of the report")
    parser.add_argument("-k", dest="only", metavar="EXPRESSION", help="run only these tests of integration and system")
    given = parser.parse_args(arguments)
    names = given.layers.split(",")
    if unknown := set(names) - set(RUNGS):
        parser.error(f"--layers must be of {', '.join(RUNGS)}, got {', '.join(sorted(unknown))}")
    theirs = [name for name, rung in RUNGS.items() if rung.theirs]
    if given.impl != OURS and not set(names) & set(theirs):
        parser.error(f"--layers must have one of {', '.join(theirs)} beside --impl, got {given.layers}")
    if reason := TIERS[given.tier].missing():
        parser.error(f"--tier {given.tier} cannot be run here: it {reason}")
    try:
        load(given.impl)
    except Exception as error:  # somebody else's module may raise anything
        parser.error(f"--impl: {error}")
    folder = given.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("*.json"), *folder.glob("*.xml"), *folder.glob("*.png")):
        old.unlink()  # what an earlier run found is not this run's
    verdict = run(names, given.impl, folder, given.tier, given.only)
    with reports.attempt("the page", print):
        (folder / "index.html").write_text(page(verdict, folder))
        print(f"\nthe report is {folder / 'index.html'}")
    print("\n".join(["", *text(verdict)]))
    return 0 if verdict["verdict"] == "passed" else 1


if __name__ == "__main__":
    sys.exit(main())
