"""Every measured figure in the README and in docs/ comes from a saved run in the repository."""

import json
import re
import statistics
from pathlib import Path
from typing import Any

import torch

from validation.perf import records
from validation.perf.report import readme, render
from validation.runs import LOSS, TOKENS_PER_SECOND, VALIDATION_LOSS, Metrics
from validation.system.twins import LAST_STEPS

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "docs" / "runs"
PAGE = (ROOT / "docs" / "performance.md").read_text()
ACTIVE, RESERVED = "memory/max_active(GiB)", "memory/max_reserved(GiB)"


def sources() -> list[str]:
    """Paths of the runs that the page of measurements says it is made from."""
    command = next(line for line in PAGE.splitlines() if line.startswith("python -m validation.perf.report "))
    return command.partition("report ")[2].partition(" >")[0].split()


def test_the_page_of_measurements_is_what_its_runs_give() -> None:
    assert render({name: records.read(ROOT / name) for name in sources()}) == PAGE


def test_its_pictures_are_there() -> None:
    for name in re.findall(r"\]\((img/[^)]*)\)", PAGE):
        assert (ROOT / "docs" / name).stat().st_size > 10_000, name


def test_the_table_in_the_readme_is_that_of_the_same_runs() -> None:
    text = (ROOT / "README.md").read_text()
    made = readme([records.read(ROOT / name) for name in sources()], text)
    assert made == text, "make perf-docs"
    # Nothing else in there is a figure: outside code only versions and the name of the paper have decimals.
    prose = re.sub(r"(?ms)^```.*?^```|^\| (tokens|faster than dense|memory) \|.*?$", "", text)
    allowed = r"(Python|or) 3\.1[12]\b|2502\.11089"
    assert not re.findall(r"\d+\.\d+|\d+%", re.sub(allowed, "", prose))


def table_after(text: str, heading: str) -> dict[str, list[list[str]]]:
    """Rows of the first table after a heading: for every cell its numbers, by the row's title."""
    lines = text.partition(heading)[2].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        title, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        rows[title] = [[number.strip() for number in cell.split("/")] for cell in cells]
    return rows


def last(metrics: Metrics) -> float:
    return sum(list(metrics[LOSS].values())[-LAST_STEPS:]) / LAST_STEPS


def of_h200(metrics: Metrics) -> dict[str, list[str]]:
    losses = metrics[VALIDATION_LOSS]
    return {
        "validation loss after 1 / 100 / 200 steps (nats a byte)": [f"{losses[step]:.3f}" for step in (1, 100, 200)],
        "training loss, mean of the last 10 logged": [f"{last(metrics):.3f}"],
        "tokens/s, median": [f"{statistics.median(metrics[TOKENS_PER_SECOND].values()):,.0f}"],
        "peak memory, active / reserved (GiB)": [f"{max(metrics[kind].values()):.2f}" for kind in (ACTIVE, RESERVED)],
    }


def of_cpu(summary: dict[str, Any]) -> dict[str, list[str]]:
    return {
        "training loss, mean of the last 10 logged (nats a byte)": [f"{summary['training_loss']:.3f}"],
        "validation loss": [f"{summary['validation_loss']:.3f}"],
        "tokens/s, median": [f"{summary['tokens_per_second']:,.0f}"],
        "peak memory of the process (GiB)": [f"{summary['memory_gib']:.2f}"],
    }


def test_the_results_of_training_are_those_of_its_runs() -> None:
    text = (ROOT / "docs" / "results.md").read_text()
    runs = [
        Metrics(tuple(map(json.loads, (RUNS / f"h200-{name}.jsonl").read_text().splitlines())))
        for name in ("100m", "100m_dense")
    ]
    made = [of_h200(metrics) for metrics in runs]
    assert table_after(text, "## `100m` and its dense twin") == {title: [m[title] for m in made] for title in made[0]}
    saved = json.loads((RUNS / "train.json").read_text())["summary"]
    made = [of_cpu(saved[name]) for name in ("NSA", "dense")]
    assert table_after(text, "## `debug` and its dense twin") == {title: [m[title] for m in made] for title in made[0]}

    # What is said between the tables.
    prose = re.sub(r"(?ms)^```.*?^```|^\|.*?$", "", text)
    sizes = [parameters(flavor) / 1e6 for flavor in ("100m", "100m_dense")]
    known = {f"{size:.1f}" for size in sizes} | {
        f"{sizes[0] / sizes[1] - 1:.0%}",
        f"{saved['validation_loss_ratio']:.3f}",
    }
    figures = re.findall(r"\d+\.\d+|\d+%", re.sub(r"PyTorch [\d.]+\d|Python [\d.]+\d", "", prose))
    assert set(figures) <= known


def parameters(flavor: str) -> int:
    """How many a model has, at the vocabulary of bytes."""
    from nsa.data import ByteTokenizer
    from nsa.model import Transformer
    from nsa.train_spec import _Flavors

    args = _Flavors()[flavor]
    args.vocab_size = -(-ByteTokenizer().get_vocab_size() // 64) * 64
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(args).parameters())
