"""Validates an implementation of Native Sparse Attention, from any folder; the exit status is the verdict.

    nsa-validate package.module:object [--layers unit,precision,perf] [--json FILE] [--report FILE.html]
    nsa-validate compare BEFORE.json AFTER.json

The argument names an `Implementation` (see nsa_validation.implementations) or a function that makes one: by its place,
or by the name of one that ships or that a package declares as an entry point. The exit status is 0 if every claim
holds, 1 if one does not or nothing was tested, and 2 if the command is wrong.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CONFORMANCE = HERE / "unit" / "conformance"
LAYERS = ("unit", "precision", "perf")


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    missing = [name for name in ("pytest", "hypothesis", "matplotlib") if find_spec(name) is None]
    if missing:
        print(f"nsa-validate needs {', '.join(missing)}: pip install 'nsa[testing]'", file=sys.stderr)
        return 2
    if given[:1] == ["compare"]:
        return _compare(given[1:])
    options = _parse(given)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # the folder with the implementation

    import pytest

    from .verdict import Collector, benchmarks, text

    collector = Collector(options.subject, options.layers)
    status = 0
    if set(options.layers) & {"unit", "precision"} or options.only:
        status = int(pytest.main(_pytest_arguments(options), plugins=[collector]))
    if status in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.INTERRUPTED):
        print(*collector.problems, sep="\n", file=sys.stderr)
        return 2
    verdict = collector.verdict()
    if "perf" in options.layers and verdict["verdict"] == "passed":
        verdict["performance"], failed = _measure(options.subject)
        if failed:
            verdict["verdict"] = "failed"
            verdict["problems"].append("a stage failed while it was timed; the output above says which")
    if options.json:
        options.json.write_text(json.dumps(verdict, indent=1) + "\n")
    if options.benchmark_json:
        options.benchmark_json.write_text(json.dumps(benchmarks(verdict), indent=1) + "\n")
    if options.report:
        from .page import page

        options.report.write_text(page(verdict))
    print()
    for line in text(verdict):
        print(line)
    return 0 if verdict["verdict"] == "passed" else 1


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="nsa-validate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("subject", metavar="NAME|package.module:object", help="the implementation")
    parser.add_argument(
        "--layers",
        type=_layers,
        default=["unit"],
        help="one or more of unit, precision, perf, with commas between them (default: unit)",
    )
    parser.add_argument("--json", type=_file, metavar="FILE", help="write the verdict for machines")
    parser.add_argument(
        "--benchmark-json",
        type=_file,
        metavar="FILE",
        help="write what perf timed as pytest-benchmark does, for dashboards; needs --layers with perf",
    )
    parser.add_argument("--report", type=_file, metavar="FILE.html", help="write the verdict as a page")
    parser.add_argument(
        "--xfails",
        type=Path,
        metavar="FILE",
        help="tests that are expected to fail: on each line an id, ' # ' and a reason",
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="ID", help="run this test only; may be given several times"
    )
    parser.add_argument(
        "-k", dest="keyword", metavar="EXPRESSION", help="run the tests whose names match, as pytest's -k does"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="number of processes; more than one needs pytest-xdist (default: 1)"
    )
    parser.add_argument(
        "--shuffle-seed",
        type=int,
        metavar="N",
        help="run in another order and on other numbers, the same for the same N",
    )
    parser.add_argument("--require-gpus", type=int, metavar="N", help="fail if there are fewer than N GPUs")
    options = parser.parse_args(arguments)
    if options.benchmark_json and "perf" not in options.layers:
        parser.error("--benchmark-json needs --layers with perf, which times")
    return options


def _layers(text: str) -> list[str]:
    layers = text.split(",")
    if not set(layers) <= set(LAYERS):
        raise argparse.ArgumentTypeError(f"must be of {', '.join(LAYERS)}, got {text!r}")
    if layers == ["perf"]:
        raise argparse.ArgumentTypeError("perf needs unit or precision beside it: what is wrong is not timed")
    return layers


def _file(text: str) -> Path:
    """A file that can be written when the run is over."""
    file = Path(text)
    if file.is_dir() or not file.parent.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file in a folder that exists, got {text!r}")
    return file


def _pytest_arguments(options: argparse.Namespace) -> list[str]:
    files = sorted(CONFORMANCE.glob("test_*.py"))
    precision = CONFORMANCE / "test_precision.py"
    chosen = [file for file in files if ("precision" if file == precision else "unit") in options.layers]
    package = __package__ or HERE.name
    arguments = [
        "-p",
        f"{package}.plugin",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:benchmark",
        "-c",
        str(HERE / "conformance.ini"),
    ]
    arguments += [f"--rootdir={HERE.parent}", f"--impl={options.subject}", "-q", "--tb=no", "-rN"]
    arguments += [f"--xfails-file={options.xfails}"] if options.xfails else []
    arguments += ["-k", options.keyword] if options.keyword else []
    arguments += ["-n", str(options.jobs), "--dist", "worksteal"] if options.jobs > 1 else []
    arguments += [] if options.shuffle_seed is None else [f"--shuffle-seed={options.shuffle_seed}"]
    arguments += [] if options.require_gpus is None else [f"--require-gpus={options.require_gpus}"]
    return arguments + ([str(CONFORMANCE / name) for name in options.only] or [str(file) for file in chosen])


def _measure(subject: str) -> tuple[list[dict[str, Any]], bool]:
    """Figures of every stage beside dense attention, and whether a stage failed."""
    import subprocess
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        file = Path(folder, "stages.json")
        command = [sys.executable, "-m", f"{__package__}.perf.stages", f"--out={file}", f"--impl={subject}", "--quick"]
        # The folder with the implementation is where this runs; a console script does not look there by itself.
        path = os.pathsep.join(filter(None, (os.getcwd(), os.environ.get("PYTHONPATH"))))
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False)
        return json.loads(file.read_text())["results"] if file.exists() else [], done.returncode != 0


def _compare(arguments: Sequence[str]) -> int:
    from .verdict import compare, read

    parser = argparse.ArgumentParser(prog="nsa-validate compare", description="What changed between two verdicts.")
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    options = parser.parse_args(arguments)
    try:
        lines, worse = compare(read(options.before), read(options.after))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print("\n".join(lines))
    return int(worse)


if __name__ == "__main__":
    sys.exit(main())
