"""The tables of docs/performance.md, from runs of `validation.perf.stages` on one machine that were saved:

    python -m validation.perf.report docs/runs/stages_h200.json docs/runs/whole_h200.json > docs/performance.md

The same files always give the same page. What several of them hold is taken from the first.
"""

import argparse
import json
import operator
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from validation.perf.workloads import WORKLOADS, Roofs, Workload

LENGTHS = (8192, 32768, 65536)
"""Of the stages' tables, where a run has them; the whole op is shown at all."""

TITLES = {
    "compress": "compress",
    "compressed_attention": "compressed attention",
    "select_blocks": "select blocks",
    "selected_attention": "selected attention",
    "sliding_window_attention": "window attention",
    "combine": "combine",
    "nsa_attention": "whole op",
}
DENSE = "dense"
HEAD = """# Performance

Made by

```sh
python -m validation.perf.report {paths} > docs/performance.md
```

from runs on {device}, driver {driver}, PyTorch {torch}, Triton {triton}, Python {python}, {date}{clocks}:

```sh
{commands}
```

A peer is anybody's implementation of the stages, as an object for [`--peer`](../validation/implementations.py).

Times are medians in ms on the device, each call with a cold second-level cache and the host ahead of it
([`timing.py`](../validation/perf/timing.py)): what starts the kernels is not in them, and has a line of its own. The
floor is what the stage cannot get below at the {flops:.0f} TFLOP/s of bfloat16 products and {bytes:.2f} TB/s of copying
that this machine reached in the same run, each operation and each byte counted once
([`workloads.py`](../validation/perf/workloads.py) has the formulas); TFLOP/s and TB/s are by the same count. Memory is
the peak of forward and backward pass beyond the inputs and the gradient from above. All workloads have batch 1 and are
in bfloat16:

| workload | query heads | KV heads | head dims of keys, values |
|---|---|---|---|
{workloads}
"""


def render(reports: Mapping[str, dict[str, Any]]) -> str:
    """The page for reports, by the names of their files."""
    report = merge(list(reports.values()))
    machine, roofs = report["machine"], Roofs(**report["roofs"])
    found = {record["workload"] for record in report["results"]}
    workloads = [workload for workload in WORKLOADS.values() if workload.name in found]
    clocks = ", ".join(f"{key} {value}" for key, value in machine.get("clocks", {}).items())
    head = HEAD.format(
        paths=" ".join(f"docs/runs/{name}" for name in reports),
        **{key: machine[key] for key in ("device", "driver", "torch", "triton", "python", "date")},
        clocks=f" ({clocks})" if clocks else "",
        commands="\n".join(shlex.join(each["machine"]["command"]) for each in reports.values()),
        flops=roofs.flops / 1e12,
        bytes=roofs.bytes / 1e12,
        workloads="\n".join(
            f"| {w.name} | {w.query_heads} | {w.kv_heads} | {w.key_dim}, {w.value_dim} |" for w in workloads
        ),
    )
    parts = [head]
    for workload in workloads:
        results = Results(report, workload)
        parts += [f"## {workload.name}", whole_op(results), stages(results, roofs)]
    if report["failures"]:
        parts.append("## What did not run")
        parts.append(
            table(
                ("workload", "length", "stage", "subject", "error"),
                (
                    (f["workload"], f["length"], TITLES[f["stage"]], f["subject"], _one_line(f["error"]))
                    for f in report["failures"]
                ),
            )
        )
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def merge(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The first report, with what only the others have."""
    key = operator.itemgetter("workload", "length", "stage", "subject", "direction")
    results = {key(record): record for report in reversed(reports) for record in report["results"]}
    failures = [failure for report in reports for failure in report["failures"]]
    return {**reports[0], "results": list(results.values()), "failures": failures}


class Results:
    """The records of one workload, by `(stage, direction, length, subject)`."""

    def __init__(self, report: dict[str, Any], workload: Workload) -> None:
        self.workload, self.subject = workload, report["subject"]
        self.records = {
            (r["stage"], r["direction"], r["length"], r["subject"]): r
            for r in report["results"]
            if r["workload"] == workload.name
        }
        self.lengths = sorted({length for _, _, length, _ in self.records})
        self.rivals = [s for s in dict.fromkeys(subject for *_, subject in self.records) if s != self.subject]
        self.dense = next((s for s in self.rivals if s.startswith(DENSE)), None)

    def get(self, stage: str, direction: str, length: int, subject: str, what: str = "median") -> float | None:
        """A figure of one record, None where there is none."""
        return self.records.get((stage, direction, length, subject), {}).get(what)

    def both(self, length: int, subject: str) -> float | None:
        """Forward and backward pass of the whole op."""
        times = [self.get("nsa_attention", direction, length, subject) for direction in ("forward", "backward")]
        return None if None in times else sum(times)  # type: ignore[arg-type]


def whole_op(results: Results) -> str:
    """The whole op at every length beside its rivals."""
    names = [results.subject, *results.rivals]
    names = [n for n in names if any(results.both(length, n) is not None for length in results.lengths)]
    dense = results.dense
    rows: list[Sequence[Any]] = []
    for name in names:
        for title, direction, what in (
            ("forward", "forward", "median"),
            ("backward", "backward", "median"),
            ("host, forward", "forward", "host"),
            ("host, backward", "backward", "host"),
        ):
            figures = [results.get("nsa_attention", direction, length, name, what) for length in results.lengths]
            rows.append((f"{name}, {title}", *map(_ms, figures)))
        memory = [results.get("nsa_attention", "backward", length, name, "memory") for length in results.lengths]
        rows.append((f"{name}, memory (GiB)", *("" if m is None else f"{m / 2**30:.2f}" for m in memory)))
    for name in names if dense else []:
        if name != dense:
            figures = [_over(results.both(n, dense), results.both(n, name)) for n in results.lengths]
            rows.append((f"**{dense} / {name}**, both passes", *(f and f"**{f}**" for f in figures)))
    return table(("ms", *(f"{length // 1024}k" for length in results.lengths)), rows)


def stages(results: Results, roofs: Roofs) -> str:
    """Every stage at some lengths: what it reaches, its floor, and the best of its rivals."""
    rows: list[Sequence[Any]] = []
    for stage, title in TITLES.items():
        for direction in ("forward", "backward"):
            for length in [n for n in results.lengths if n in LENGTHS] or results.lengths:
                ms = results.get(stage, direction, length, results.subject)
                if ms is None:
                    continue
                cost = results.workload.costs(length)[stage, direction]
                floor = results.workload.floor(stage, direction, length, roofs)
                others = {s: results.get(stage, direction, length, s) for s in results.rivals if DENSE not in s}
                best = min(((t, s) for s, t in others.items() if t is not None), default=None)
                rows.append((
                    title, direction, f"{length // 1024}k", _ms(ms), f"{cost.flops / ms / 1e9:.0f}",
                    f"{cost.bytes / ms / 1e9:.2f}", _ms(floor), _over(ms, floor),
                    f"{_ms(best[0])} ({best[1]})" if best else "",
                ))  # fmt: skip
    names = ("stage", "pass", "tokens", "ms", "TFLOP/s", "TB/s", "floor", "ms / floor", "best other")
    return table(names, rows)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _over(a: float | None, b: float | None) -> str:
    return "" if a is None or b is None else f"{a / b:.2f}"


def _one_line(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())[:120]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="what validation.perf.stages wrote")
    sys.stdout.write(render({file.name: json.loads(file.read_text()) for file in parser.parse_args().files}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
