"""What is allowed to change and what is promised: a run is judged by another one and by `promises.toml`.

python -m validation.perf.gates A.json B.json    # by how much two runs of one machine disagree
"""

import argparse
import math
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from . import records
from .records import Record

TABLE = Path(__file__).with_name("promises.toml")
K = 1024
WHOLE, DENSE = "nsa_attention", "dense (cuDNN)"
"""What promises are about, and what they are measured against."""


@dataclass(frozen=True)
class Bounds:
    """How many times a figure of the baseline a figure may be; memory that grew by no more than `mib` has not."""

    time: float
    memory: float
    mib: float = 0.0

    def exceeded(self, kind: str, now: float, then: float) -> bool:
        """Whether a figure, of time or of memory, has grown beyond what is allowed."""
        least = self.mib * 2**20 if kind == "memory" else 0.0
        return now > max(getattr(self, kind) * then, then + least)


@dataclass(frozen=True)
class Promise:
    """A line of the table; `kind` is one of `KINDS`."""

    kind: str
    workload: str
    length: int
    promise: float
    target: float | None = None

    @property
    def name(self) -> str:
        return f"{self.workload} at {self.length // K}k: {self.kind}"

    def broken(self, figure: float) -> bool:
        return not (figure >= self.promise if KINDS[self.kind] else figure <= self.promise)  # NaN keeps none


@dataclass(frozen=True)
class Figure:
    """Which records a promise is about, and what of them.

    Attributes:
        more: whether more is better.
        stage, directions: those of the records, whose figures are added up.
        field: of a record.
        against: subjects that the figure is a ratio to, the least of theirs in each direction; all of them must be
            there. `None` stands for every rival, and with nobody the figure is ours alone.
    """

    more: bool
    stage: str = WHOLE
    directions: tuple[str, ...] = ("forward", "backward")
    field: str = "median"
    against: tuple[str, ...] | None = (DENSE,)


_FIGURES = {
    "times as fast as dense": Figure(True),
    "times the memory of dense": Figure(False, directions=("backward",), field="memory"),
    **{
        f"{what}, {direction}": Figure(False, directions=(direction,), field=field, against=())
        for what, field in (("ms of the host", "host_sustained"), ("device operations", "device_ops"))
        for direction in ("forward", "backward")
    },
    **{
        f"times as fast as dense, decoding {batch}": Figure(
            True, "decode", (f"batch {batch}",), against=(DENSE, "dense (flash)")
        )
        for batch in (1, 16, 64)
    },
    "times one sequence": Figure(False, against=None),
    "times one sequence, layer": Figure(False, "layer", against=None),
    "times as fast as the dense twin, training": Figure(True, "training", ("step",), against=None),
    **{
        f"times as fast as the dense twin, {what} {batch}": Figure(
            True, "generation", (f"batch {batch}",), field, against=None
        )
        for what, field in (("prompts of", "prefill"), ("steps of", "median"))
        for batch in (1, 16)
    },
}
KINDS = {kind: figure.more for kind, figure in _FIGURES.items()}
"""The kinds of promises, and whether more is better: of the whole op unless something else is named."""


@dataclass(frozen=True)
class Table:
    """`promises.toml`."""

    bounds: Mapping[str, Bounds]
    promises: Mapping[str, Sequence[Promise]]

    def bounds_of(self, machine: str) -> Bounds:
        """The bounds for a machine by its name."""
        return self.bounds["cpu" if machine.startswith("cpu-") else "gpu"]

    def promises_of(self, machine: str) -> Sequence[Promise]:
        return self.promises.get(machine, ())


def read_table(file: Path = TABLE) -> Table:
    content = tomllib.loads(file.read_text())
    bounds = {kind: Bounds(**numbers) for kind, numbers in content.pop("bounds").items()}
    return Table(bounds, {machine: list(_promises(kinds)) for machine, kinds in content.items()})


def _promises(kinds: Mapping[str, Mapping[str, Any]]) -> Iterator[Promise]:
    for kind, lines in kinds.items():
        if kind not in KINDS:
            raise ValueError(f"{TABLE.name}: kind of promise must be one of {list(KINDS)}, got {kind!r}")
        for name, numbers in lines.items():
            workload, length = name.split()
            yield Promise(kind, workload, int(length.removesuffix("k")) * K, **numbers)


def figure(record: Record, kind: str) -> float | None:
    """What is compared between runs: time, or memory. Where there is no GPU and other processes lengthen rounds, time
    is the shortest round over the shortest call of dense attention in its company."""
    return record.get("relative", record["median"]) if kind == "time" else record.get("memory")


def regressions(run: Sequence[Record], baseline: Sequence[Record], bounds: Bounds) -> Iterator[str]:
    """Figures of ours that are worse than those of the same name in the baseline, by more than is allowed."""
    before = {record["fullname"]: record for record in baseline}
    for record in run:
        name, old = record["fullname"], before.get(record["fullname"])
        if old is None or "ours" not in (record["role"], old["role"]):
            continue
        if record["role"] != old["role"] or ("relative" in record) != ("relative" in old):
            yield f"{name}: not of the kind that it is in the baseline"
            continue
        for kind in ("time", "memory"):
            now, then = figure(record, kind), figure(old, kind)
            if now is None and then is None:
                continue
            if not (_measured(now, kind) and _measured(then, kind)):
                yield f"{name}: {kind} {now} against {then} in the baseline, which cannot be compared"
                continue
            if bounds.exceeded(kind, now, then):
                growth = f"{now / then - 1:+.1%}" if then else "from nothing"
                allowed = f"allowed {getattr(bounds, kind) - 1:+.0%}"
                yield f"{name}: {kind} {now:.4g} against {then:.4g} in the baseline, {growth}, {allowed}"


def _measured(value: float | None, kind: str) -> TypeGuard[float]:
    """Whether a figure can be one: memory may be 0, time cannot."""
    return value is not None and math.isfinite(value) and (value > 0 or (kind == "memory" and value == 0))


def differences(
    run: Sequence[Record],
    baseline: Sequence[Record],
    skipped: Mapping[str, str],
    partial: bool,
    failures: Sequence[Mapping[str, Any]] = (),
) -> Iterator[str]:
    """Benchmarks that only one of the two has; peers may be there or not. Of a partial run nobody expects them all, and
    what a rival could not do when the baseline was made, one of its `failures`, it may do now."""
    could_not = {records.which(failure) for failure in failures}
    run = [record for record in run if record["role"] == "ours" or records.which(record) not in could_not]
    names, before = ({r["fullname"] for r in records if r["role"] != "peer"} for records in (run, baseline))
    if not names & before:
        yield "nothing was compared: this run and the baseline have no benchmark in common"
    for name in sorted(before - names if not partial else ()):
        why = f"skipped: {skipped[name]}" if name in skipped else "renamed, removed or failed?"
        yield f"{name}: in the baseline, not in this run ({why})"
    for name in sorted(names - before):
        yield f"{name}: in this run, not in the baseline (new or renamed? a new baseline is made by make perf-baseline)"


def promised(run: Sequence[Record], promises: Sequence[Promise], partial: bool) -> Iterator[tuple[Promise, str | None]]:
    """Promises with what is wrong with them; those of figures that a partial run lacks are left out."""
    for promise in promises:
        found = measured(run, promise)
        if found is not None and not promise.broken(found):
            yield promise, None
        elif found is not None:
            side = "at least" if KINDS[promise.kind] else "at most"
            yield promise, f"{promise.name}: {found:.3f}, promised is {side} {promise.promise}"
        elif not partial:
            yield promise, f"{promise.name}: promised, but this run lacks the figures"


def measured(run: Sequence[Record], promise: Promise) -> float | None:
    """The figure that a promise is about, None where a record of it is missing."""
    wanted = _FIGURES[promise.kind]
    place = promise.workload, promise.length, wanted.stage
    found = [r for r in run if (r.get("workload"), r.get("length"), r.get("stage")) == place]
    rivals = {r["subject"] for r in found if r["role"] == "rival"} if wanted.against is None else set(wanted.against)
    ours, theirs = 0.0, 0.0
    for direction in wanted.directions:
        here = [r for r in found if r["direction"] == direction]
        own = [r[wanted.field] for r in here if r["role"] == "ours" and wanted.field in r]
        dense = {r["subject"]: r[wanted.field] for r in here if r["role"] == "rival" and r["subject"] in rivals}
        if not own or set(dense) != rivals or (wanted.against != () and not dense):
            return None
        ours += own[0]
        theirs += min(dense.values(), default=0.0)
    if wanted.against == ():
        return ours
    over, under = (theirs, ours) if wanted.more else (ours, theirs)
    return over / under if under else math.nan


@dataclass(frozen=True)
class Change:
    """A figure of ours that changed from one run to the next by more than its bound, for the worse or the better."""

    run: int
    stage: str
    key: tuple[Any, ...]
    ratio: float
    """Of the figure to that of the run before."""


def changes(runs: Sequence[Mapping[str, Any]], kind: str) -> list[Change]:
    """What changed between reports in a row, in time or in memory; `Change.run` counts from 0."""
    if not runs:
        return []
    bounds, found, last = read_table().bounds_of(runs[0]["machine"]["name"]), [], dict[Any, float]()
    for number, run in enumerate(runs):
        for record in run["results"]:
            now = figure(record, kind)
            if record["role"] != "ours" or not _measured(now, kind):
                continue
            key = records.KEY(record)
            then = last.get(key, now)
            if now and then and (bounds.exceeded(kind, now, then) or bounds.exceeded(kind, then, now)):
                found.append(Change(number, record["stage"], key, now / then))
            last[key] = now
    return found


def disagreements(a: Sequence[Record], b: Sequence[Record], kind: str = "time") -> list[tuple[float, str]]:
    """By how much the figures that two runs have differ, the worst first: 0.03 is 3%."""
    before, after = ({record["fullname"]: record for record in run} for run in (a, b))
    pairs = ((name, figure(after[name], kind), figure(before[name], kind)) for name in after if name in before)
    return sorted(((max(x / y, y / x) - 1, name) for name, x, y in pairs if x and y), reverse=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs=2)
    parser.add_argument("--within", type=float, help="fail where figures disagree by more than this part, such as 0.03")
    parser.add_argument("--above", type=float, default=0.0, help="leave out figures of less than so many ms")
    options = parser.parse_args()
    a, b = (records.read(file) for file in options.files)
    if a["machine"]["name"] != b["machine"]["name"]:
        parser.error(f"{options.files[0]} is of {a['machine']['name']}, {options.files[1]} of {b['machine']['name']}")
    first = [record for record in a["results"] if record["median"] >= options.above]
    ours, bad = {record["fullname"] for record in first if record["role"] == "ours"}, 0
    for kind in ("time", "memory"):
        found = disagreements(first, b["results"], kind)
        print(f"{kind}: {len(found)} figures, the worst:")
        for difference, name in found[:10]:
            print(f"  {difference:7.2%}  {name}")
        if options.within and kind == "time":
            over = [name for difference, name in found if difference > options.within]
            bad = len(over)
            print(
                f"{bad} figures disagree by more than {options.within:.1%}, {len(ours.intersection(over))} of them ours"
            )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
