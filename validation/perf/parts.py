"""A baseline made of several runs of some benchmarks each, for a machine that is there for minutes at a time.

    pytest validation/perf --benchmark-only -k "not generation" --benchmark-json=first.json
    pytest validation/perf --benchmark-only -k generation --benchmark-json=second.json
    python -m validation.perf.parts first.json second.json

Together they must have all that a whole run has, and be of one machine, one commit and the same versions. What would
keep a whole run from being the baseline, a broken promise for one, keeps these from it. With `--out` they make a run
for pages and pictures, which may lack benchmarks and break promises.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import gates, records

ALIKE = ("name", "device", "driver", "torch", "triton", "python")
"""Fields of the machine that must be the same in all parts."""


def merge(parts: Sequence[dict[str, Any]], *, whole: bool = True) -> dict[str, Any]:
    """The run that the parts are of: what was measured twice is the first part's, as are the roofs.

    Raises:
        ValueError: parts of different machines, versions, commits or plans; of a `whole` run also a part with problems
            of its own, or benchmarks that none of them has.
    """
    first = parts[0]
    for number, part in enumerate(parts, 1):
        for name in ALIKE:
            here, there = part["measured"].get(name), first["measured"].get(name)
            if here != there:
                raise ValueError(f"part {number} is of {name} {here}, the first of {there}")
        here, there = (x["commit_info"]["id"] for x in (part, first))
        if here != there:
            raise ValueError(f"part {number} is of commit {here}, the first of {there}")
        if whole and part["problems"]:
            raise ValueError(f"part {number}: {part['problems'][0]}")
        if part["planned"] != first["planned"]:
            raise ValueError(f"part {number} was not chosen from the same benchmarks as the first")
    found = {b["fullname"]: b for part in reversed(parts) for b in part["benchmarks"]}
    lacking = [x for x in first["planned"] if x not in found and not any(x in part["skipped"] for part in parts)]
    if whole and lacking:
        raise ValueError(f"{len(lacking)} benchmarks are in none of the parts, {lacking[0]} the first of them")
    run = {name: value for name, value in first.items() if name not in ("planned", "skipped")}
    run["measured"] = {**first["measured"], "commands": [part["measured"]["command"] for part in parts]}
    failures = {records.which(failure): failure for part in parts for failure in part["failures"]}
    measured = [found[name] for name in first["planned"] if name in found]
    return {**run, "benchmarks": measured, "failures": list(failures.values()), "partial": bool(lacking)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, help="a file for pages, instead of the baseline of the machine")
    options = parser.parse_args()
    try:
        run = merge([json.loads(file.read_text()) for file in options.parts], whole=options.out is None)
    except (KeyError, ValueError) as wrong:
        lacks = f"a part lacks {wrong}: it is a whole run, or of an earlier version"
        print(lacks if isinstance(wrong, KeyError) else wrong, file=sys.stderr)
        return 1
    name = run["measured"]["name"]
    promises = gates.read_table().promises_of(name)
    broken = [problem for _, problem in gates.promised(records.report(run)["results"], promises, False) if problem]
    if broken and not options.out:
        print("\n".join(broken), file=sys.stderr)
        return 1
    file = options.out or records.BASELINES / f"{name}.json"
    records.write(run, file)
    print(f"{len(run['benchmarks'])} benchmarks: {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
