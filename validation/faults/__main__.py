"""Tries every fault, or those named, and prints which test killed which.

    python -m validation.faults [NAME ...] [--jobs 2] [--markdown docs/faults.md]

The tests that should kill something first run on a copy without a fault: they must pass, or a kill means nothing. The
exit status is 0 only if every fault was killed.
"""

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from validation.faults import trial
from validation.faults.catalogue import FAULTS, PUBLIC_BUGS, Fault
from validation.faults.trial import Outcome

PAGE = """# Seeded faults

Tests are themselves under test: every change below is made to a copy of `nsa/`, one at a time, and some test must fail,
a unit test unless another layer is named. Each is the first that did. "Bug" is the number of the public bug that a
fault is an example of.

```sh
make faults                                                  # prints this table, fails if a fault survives
python -m validation.faults --markdown docs/faults.md        # writes this page
```

| fault | what it does | where | bug | killed by |
|---|---|---|---|---|
{rows}

## Bugs that real kernels shipped

{bugs}
"""


def main() -> int:
    arguments = _parse()
    named = {fault.name: fault for fault in FAULTS}
    faults = [named[name] for name in arguments.names] or FAULTS
    with ThreadPoolExecutor(arguments.jobs) as pool:
        if not _tests_pass_without_a_fault(pool, faults, arguments.jobs):
            return 1
        outcomes = _try(pool, faults)
    survivors = [fault.name for fault in faults if not outcomes[fault].killer]
    broken = [fault.name for fault in faults if outcomes[fault].problem]
    print(f"\n{len(faults)} faults, {len(faults) - len({*survivors, *broken})} killed")
    for kind, names in (("survived", [name for name in survivors if name not in broken]), ("broken", broken)):
        if names:
            print(f"{kind}: {', '.join(names)}")
    if survivors or broken:
        return 1
    if arguments.markdown:
        arguments.markdown.write_text(page(outcomes))
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m validation.faults", description="Seeded faults the tests must kill."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="faults to try; all unless given")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time (2)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table of all faults there")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - {fault.name for fault in FAULTS}
    if unknown:
        parser.error(f"no such fault: {', '.join(sorted(unknown))}; there are {', '.join(f.name for f in FAULTS)}")
    if arguments.names and arguments.markdown:
        parser.error("--markdown writes a table of all faults, so none may be named")
    return arguments


def _tests_pass_without_a_fault(pool: ThreadPoolExecutor, faults: Sequence[Fault], jobs: int) -> bool:
    tests = list(dict.fromkeys(test for fault in faults for test in trial.related(fault)))
    shares = [tests[share::jobs] for share in range(min(jobs, len(tests)))]
    for outcome in pool.map(trial.run, shares):
        print(f"without a fault: {outcome.passed} tests passed in {outcome.seconds:.0f} s", flush=True)
        if outcome.killer or outcome.problem:
            print(f"but {outcome.problem or outcome.killer}: {outcome.message}", file=sys.stderr)
            return False
    return True


def _try(pool: ThreadPoolExecutor, faults: Sequence[Fault]) -> dict[Fault, Outcome]:
    outcomes, width = {}, max(len(fault.name) for fault in faults)
    running = {pool.submit(trial.attempt, fault): fault for fault in faults}
    for done in as_completed(running):
        fault, outcome = running[done], done.result()
        outcomes[fault] = outcome
        verdict = "broken" if outcome.problem else "killed" if outcome.killer else "SURVIVED"
        progress = f"[{len(outcomes):{len(str(len(faults)))}}/{len(faults)}]"
        by = outcome.problem or outcome.killer.removeprefix(trial.UNIT)
        print(f"{progress} {verdict:8} {fault.name:{width}} {outcome.seconds:4.0f} s  {by}", flush=True)
        if outcome.killer and not outcome.problem:
            print(f"{'':{len(progress)}} {'':8} {'':{width}}         {outcome.message}", flush=True)
    return outcomes


def page(outcomes: dict[Fault, Outcome]) -> str:
    """docs/faults.md, from what became of every fault."""
    rows = [
        f"| {fault.name} | {fault.what} | `{fault.file}` | {fault.models or ''} | "
        f"`{outcomes[fault].killer.removeprefix(trial.UNIT)}` |"
        for fault in FAULTS
    ]
    bugs = [f"{number}. {bug[0].upper()}{bug[1:]}." for number, bug in PUBLIC_BUGS.items()]
    return PAGE.format(rows="\n".join(rows), bugs="\n".join(bugs))


if __name__ == "__main__":
    sys.exit(main())
