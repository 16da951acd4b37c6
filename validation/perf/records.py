"""Saved runs: those of `validation.perf.stages` and of `make perf`, both as a report with a record for every figure.

A report has `machine`, `date`, `commit`, `roofs`, `subject`, `results` and `failures`; a record says what was measured
(`workload`, `length`, `stage`, `direction`, `subject`, `role`) and holds `median`, `lower` and `upper` in ms, `memory`
in bytes, and more where it is known.
"""

import json
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Report = dict[str, Any]

BASELINES = Path(__file__).with_name("baselines")
"""Of the machines that have one: a run in a file by the machine's name."""
STORAGE = Path(".benchmarks")
"""Where pytest-benchmark saves runs."""
KEY = operator.itemgetter("workload", "length", "stage", "direction")
SAME_SHAPES = {"WC": "W"}
"""Workloads that differ from another one in the values of their inputs alone, on which dense attention's time does not
depend: it is timed on the other one."""


EVENTS, WALL = "CUDA events", "wall time (perf_counter)"
"""The clocks that times are of: the device's on a GPU, the host's elsewhere."""


def which(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """Whose time for what, of a record or of a failure: the same in every run."""
    return tuple(record.get(name) for name in ("workload", "length", "stage", "direction", "subject"))


def read(file: Path) -> Report:
    """The report in a file of either kind."""
    return report(json.loads(file.read_text()))


def report(content: Mapping[str, Any]) -> Report:
    """The report in what a file of either kind holds."""
    if "benchmarks" not in content:
        results = [
            {
                "role": _role(record["subject"], content["subject"]),
                "fullname": " ".join(map(str, which(record))),
                **_renamed(record),
            }
            for record in content["results"]
        ]
        # Machines had no names yet when the first runs were saved.
        machine = {"name": slug(content["machine"]["device"].partition(" (")[0]), **content["machine"]}
        return {**content, "machine": machine, "date": machine["date"], "commit": "", "results": lend(results)}
    results = lend(figures(content["benchmarks"]))
    ours = next((record["subject"] for record in results if record["role"] == "ours"), "")
    return {
        "machine": content["measured"],
        "date": content["datetime"],
        "commit": content["commit_info"]["id"],
        "roofs": content["roofs"],
        "subject": ours,
        "results": [record for record in results if "workload" in record],
        "failures": content["failures"],
        "partial": content["partial"],
    }


def clock(content: Mapping[str, Any]) -> str:
    """The clock that a run of `make perf` was timed by, in words.

    Runs that were saved before it was written down were timed by events on a GPU, and by the processor time of the
    process elsewhere.
    """
    machine = content["measured"]
    return machine.get("clock") or ("processor time" if machine.get("name", "").startswith("cpu-") else EVENTS)


def history(runs: Iterable[Report]) -> list[Report]:
    """The last whole run of every commit, of reports of `make perf`, the oldest first: others are not gated."""
    whole = sorted(
        (run for run in runs if run.get("commit") and not run.get("partial")), key=operator.itemgetter("date")
    )
    return sorted({run["commit"]: run for run in whole}.values(), key=operator.itemgetter("date"))


def slug(text: str) -> str:
    """A text as part of a file's name."""
    return re.sub(r"\W+", "-", text.lower()).strip("-")


def _role(subject: str, ours: str) -> str:
    return "ours" if subject == ours else "rival" if subject.startswith(("dense", "Flex")) else "peer"


def _renamed(record: Mapping[str, Any]) -> Record:
    """A record with today's names: there was one figure of the host once, the cold one."""
    return {"host_cold" if name == "host" else name: value for name, value in record.items()}


def figures(benchmarks: Iterable[Mapping[str, Any]]) -> list[Record]:
    """The records in benchmarks as pytest-benchmark writes them; times are its own, which are in seconds."""
    return [
        {
            "role": "ours",
            **_renamed(benchmark["extra_info"]),
            "fullname": benchmark["fullname"],
            **{ms: 1e3 * benchmark["stats"][s] for ms, s in (("median", "median"), ("lower", "q1"), ("upper", "q3"))},
            "rounds": benchmark["stats"]["rounds"],
        }
        for benchmark in benchmarks
    ]


def lend(results: Sequence[Record]) -> list[Record]:
    """The records of a run, with dense attention's once more for workloads of `SAME_SHAPES` where ours is measured."""
    ours = {which(record)[:-1] for record in results if record["role"] == "ours"}
    there = set(map(which, results))
    lent = [
        {**record, "workload": workload}
        for workload, like in SAME_SHAPES.items()
        for record in results
        if record.get("workload") == like and is_dense(record)
    ]
    return [*results, *(r for r in lent if which(r)[:-1] in ours and which(r) not in there)]


def compare_within(results: Sequence[Record]) -> dict[str, dict[str, float]]:
    """For records of ours, by full name, how they stand to others of the same run: times as fast as these."""
    alike: dict[Any, list[Record]] = {}
    for record in results:
        if "workload" in record:
            alike.setdefault(KEY(record), []).append(record)
    found: dict[str, dict[str, float]] = {}
    for group in alike.values():
        dense = min((r["median"] for r in group if is_dense(r)), default=None)
        peers = min((r["median"] for r in group if r["role"] != "ours" and not is_dense(r)), default=None)
        for record in group:
            if record["role"] == "ours":
                ratios = {"over_dense": dense, "over_best_peer": peers}
                found[record["fullname"]] = {k: ms / record["median"] for k, ms in ratios.items() if ms}
    return found


def is_dense(record: Record) -> bool:
    return record["subject"].startswith("dense")


def write(content: dict[str, Any], file: Path) -> None:
    """Writes a run as pytest-benchmark has it, a benchmark a line: for a repository, and to be read in a diff."""
    lines = ",\n".join(json.dumps(benchmark) for benchmark in content["benchmarks"])
    head = json.dumps({key: value for key, value in content.items() if key != "benchmarks"}, indent=1)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'{head[:-2]},\n "benchmarks": [\n{lines}\n]\n}}\n')


def saved(storage: Path, machine: str) -> list[tuple[Path, dict[str, Any]]]:
    """Runs of a machine that pytest-benchmark saved, the oldest first."""
    found = []
    for file in sorted(storage.glob("*/[0-9][0-9][0-9][0-9]_*.json")):
        content = json.loads(file.read_text())
        if content.get("machine_info", {}).get("name") == machine:
            found.append((file, content))
    return sorted(found, key=lambda pair: pair[1]["datetime"])
