"""Every measured figure in the README and in docs/ comes from a saved run in the repository."""

import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa.kernels import configs
from validation import numerics
from validation.integration import throughput
from validation.perf import records
from validation.perf.report import BEGIN, END, notes_page, readme, render, results_page
from validation.runs import ACTIVE_GIB, LOSS, MEMORY_GIB, VALIDATION_LOSS, Metrics, read_log
from validation.system import repeats, tasks, variations, watch
from validation.system.twins import LAST_STEPS

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "docs" / "runs"
PAGE = (ROOT / "docs" / "performance.md").read_text()
TOKENS_A_STEP = 16384
"""Of training at 4k and at 16k."""
UNITS = "ms|s|seconds|GiB|tokens/s|TFLOP/s|TB/s|times|passed|failed|skipped|xfailed|tests|lines"
FIGURE = rf"(?m)\d+\.\d+|\d+%|\b[\d,]+ (?:{UNITS})\b|(?:failed|passed) \d+|^ +\d+  "
"""What is taken for measured: whatever has decimals or a unit, or is counted; versions aside."""
NAMED = "PyTorch|Python|Triton|TorchTitan|fla-core|attn_gym|version|or"
VERSIONS = rf"({NAMED}) \d[\d.]*\d|arXiv 2502\.11089|arxiv\.org/abs/2502\.11089"


def figures(text: str, tables: bool = False) -> list[str]:
    """Those outside tables, or in them too: in prose, in commands and in quoted output."""
    prose = text if tables else re.sub(r"(?m)^\|.*$", "", text)
    return re.findall(FIGURE, re.sub(VERSIONS, "", prose))


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
    # Nothing else in there is a figure, in no other table either.
    assert not figures(text.partition(BEGIN)[0] + text.partition(END)[2], tables=True)


def test_the_notes_on_kernels_have_the_times_of_the_same_runs() -> None:
    text = (ROOT / "docs" / "kernel-notes.md").read_text()
    assert notes_page([records.read(ROOT / name) for name in sources()], text) == text, "make perf-docs"


def test_generation_among_the_results_is_that_of_the_same_runs() -> None:
    assert results_page([records.read(ROOT / name) for name in sources()], RESULTS) == RESULTS, "make perf-docs"


def test_every_other_page_is_looked_at_or_has_no_figures() -> None:
    pages = {file.name: file.read_text() for file in (ROOT / "docs").glob("*.md")}
    assert pages.keys() >= {"performance.md", "results.md", "peers.md"}
    looked_at = rf"(?m)^> .*$|{re.escape(suite())}"  # by the next test
    pages["peers.md"] = re.sub(looked_at, "", pages["peers.md"])
    for name in pages.keys() - {"performance.md", "results.md"}:
        assert not figures(pages[name]), name


def suite() -> str:
    """The sentence on what came of the unit tests on fla."""
    failed, passed, skipped = re.findall(r"\d+", (RUNS / "h200-fla-suite.txt").read_text().partition("\n")[0])
    return f"{passed} tests passed, {failed} failed, {skipped} were skipped"


def test_versions_that_were_run_are_those_of_the_saved_runs() -> None:
    saved = json.loads((RUNS / "versions.json").read_text())
    page = (ROOT / "docs" / "versions.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"(?m)^\|.*\|$", page)]
    expected = [list(run.values()) for run in saved["runs"]]
    expected += [[name, f"`{command}`"] for name, command in saved["commands"].items()]
    assert [row for row in rows if row[0] not in ("PyTorch", "run", "---")] == expected


@pytest.mark.parametrize(
    "text",
    ["it takes 3 ms", "```\nmine: failed 46 (29 passed)\n```", "```\n   508  mine lacks the stage\n```", "`0.5` of it"],
)
def test_a_figure_is_found_wherever_it_stands(text: str) -> None:
    assert figures(text)
    assert figures(f"before\n{text}\nafter")


def test_findings_in_others_are_those_of_the_saved_runs() -> None:
    page = (ROOT / "docs" / "peers.md").read_text()
    findings = [RUNS / f"{run}-findings.txt" for run in ("h200-fla", "cpu-attention-gym")]
    assert re.findall(r"(?m)^> (.*)$", page) == [line for file in findings for line in file.read_text().splitlines()]
    assert suite() in page


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


def saved(name: str) -> Metrics:
    """What a training run on the H200 logged."""
    return read_log(RUNS / f"h200-{name}.jsonl")


def of_h200(metrics: Metrics) -> dict[str, list[str]]:
    losses = metrics[VALIDATION_LOSS]
    return {
        "validation loss after 1 step (nats a byte)": [f"{losses[1]:.3f}"],
        "after 100 steps": [f"{losses[100]:.3f}"],
        "after 200 steps": [f"{losses[200]:.3f}"],
        "training loss, mean of the last 10 logged": [f"{last(metrics):.3f}"],
        "peak memory, active / reserved (GiB)": [
            f"{max(metrics[kind].values()):.2f}" for kind in (ACTIVE_GIB, MEMORY_GIB)
        ],
    }


def of_length(length: str) -> dict[str, list[list[str]]]:
    """Speed after the first logged steps, and memory, of both models."""
    runs = [saved(f"{length}-{flavor}") for flavor in ("100m", "100m_dense")]
    medians = [statistics.median(run.speeds) for run in runs]
    memory = [max(run[ACTIVE_GIB].values()) for run in runs]
    return {
        f"{length}, tokens/s": [[f"{x:,.0f}"] for x in medians] + [[f"{medians[0] / medians[1]:.2f}"]],
        f"{length}, peak memory, active (GiB)": [[f"{x:.2f}"] for x in memory] + [[f"{memory[0] / memory[1]:.2f}"]],
    }


def of_cpu(summary: dict[str, Any]) -> dict[str, list[str]]:
    return {
        "training loss, mean of the last 10 logged (nats a token)": [f"{summary['training_loss']:.3f}"],
        "validation loss": [f"{summary['validation_loss']:.3f}"],
        "tokens/s, median": [f"{summary['tokens_per_second']:,.0f}"],
        "peak memory of the process (GiB)": [f"{summary['memory_gib']:.2f}"],
    }


PLAIN = ("4k-100m-plain", "4k-100m_dense-plain")
"""Trained without compilation and graphs."""
RESULTS = (ROOT / "docs" / "results.md").read_text()
SUMMARY = json.loads((RUNS / "train.json").read_text())["summary"]


def test_the_results_of_training_are_those_of_its_runs() -> None:
    made = [of_h200(saved(name)) for name in ("100m-triton", "100m-eager", "100m_dense")]
    assert table_after(RESULTS, "## `100m` and its") == {title: [m[title] for m in made] for title in made[0]}
    made = [of_cpu(SUMMARY[name]) for name in ("NSA", "dense")]
    assert table_after(RESULTS, "## `debug` and its") == {title: [m[title] for m in made] for title in made[0]}


def test_losses_of_the_kernels_and_of_eager_are_those_of_their_runs() -> None:
    made = variations.table(lambda name: saved(f"variations-{name}"))
    assert "\n".join(["", *made, ""]) in RESULTS


def test_what_models_learn_is_that_of_the_saved_runs() -> None:
    copied = ("system-copy", "system-copy-longer", "system-copy-oracle")
    scored = ("system-tasks", *copied, "system-dictionary", "system-published")
    watched = ("system-watch-copy", "system-watch-dictionary")
    for name in watched:
        assert "\n".join(["", *watch.table(watch.read(RUNS / f"{name}.json")), ""]) in RESULTS, name
    for name in scored:
        assert "\n".join(["", *tasks.table(tasks.read(RUNS / f"{name}.json")), ""]) in RESULTS, name
    assert "\n".join(["", *repeats.table(repeats.read(RUNS / "system-repeats.json")), ""]) in RESULTS
    for name in (*scored, *watched, "system-repeats"):
        assert f"```sh\n{json.loads((RUNS / f'{name}.json').read_text())['command']}\n```" in RESULTS, name


def test_a_variation_that_changed_nothing_is_no_result() -> None:
    with pytest.raises(ValueError, match="triton-unsplit has the losses of triton"):
        variations.table(lambda name: saved(f"variations-{name.removesuffix('-unsplit')}"))


def test_every_variation_changes_what_is_launched() -> None:
    for name, kernels in variations.VARIATIONS.items():
        for kernel, parameters in kernels.items():
            before = configs.kernel_config(kernel, torch.bfloat16, 64, 64, 4)
            with configs.override(kernel, **parameters):
                assert configs.kernel_config(kernel, torch.bfloat16, 64, 64, 4) != before, f"{name}: {kernel}"


def test_speeds_by_length_are_those_of_their_runs() -> None:
    made = of_length("4k") | of_length("16k") | of_length("32k")
    assert table_after(RESULTS, "## Tokens a second") == made


def test_speeds_of_layouts_are_those_of_their_runs() -> None:
    made = throughput.table(lambda name: read_log(RUNS / f"h200x2-{name}.jsonl"))
    assert "\n".join(["", *made, ""]) in RESULTS


def test_what_is_said_between_the_tables_of_training_is_from_its_runs() -> None:
    sizes = [parameters(flavor) / 1e6 for flavor in ("100m", "100m_dense")]
    eager, triton = (saved(f"variations-{name}")[LOSS] for name in ("eager", "triton"))
    apart = max(abs(eager[step] - triton[step]) for step in eager)
    sets = [saved(f"variations-{name}")[LOSS] for name in variations.VARIATIONS]
    spread = max(
        max(losses) - min(losses) for losses in zip(*([x[s] for s in variations.STEPS] for x in sets), strict=False)
    )
    known = {f"{size:.1f}" for size in sizes} | {
        f"{numerics.RECALL_RATIO:.0%}",
        f"{sizes[0] / sizes[1] - 1:.0%}",
        f"{SUMMARY['validation_loss_ratio']:.3f}",
        f"{math.ceil(1e3 * apart) / 1e3}",
        f"{spread:.2f}",
        *(f"{statistics.median(saved(name).speeds):,.0f} tokens/s" for name in ("100m-eager", *PLAIN)),
    }
    steps = [1e3 * TOKENS_A_STEP / statistics.median(saved(f"{length}-100m").speeds) for length in ("4k", "16k")]
    medians = "{:.1f} ms at 4k and {:.1f} ms at 16k".format(*steps)
    assert medians in RESULTS
    before, _, rest = RESULTS.partition(BEGIN)
    assert set(figures((before + rest.partition(END)[2]).replace(medians, ""))) <= known


def parameters(flavor: str) -> int:
    """How many a model has, at the vocabulary of bytes."""
    from nsa.titan.data import ByteTokenizer, padded_vocab_size
    from nsa.titan.model import Transformer
    from nsa.titan.train_spec import _Flavors

    args = _Flavors()[flavor]
    args.vocab_size = padded_vocab_size(ByteTokenizer())
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(args).parameters())
