"""The page of measurements: made from a saved run, and from nothing else."""

from typing import Any

import pytest

from validation.perf import records
from validation.perf.report import (
    BEGIN,
    END,
    PASSES,
    TRAINED,
    WHOLE,
    newcomers,
    readme,
    render,
    results_page,
    training_of,
)

MACHINE = {
    "date": "2026-01-01T00:00:00+00:00",
    "command": ["python", "-m", "validation.perf.stages", "--workloads", "W"],
    "device": "a GPU",
    "driver": "1",
    "python": "3",
    "torch": "2",
    "triton": "3",
    "clocks": {"clocks.sm": "1980 MHz"},
}


def record(subject: str, direction: str, ms: float, stage: str = "nsa_attention", length: int = 8192) -> dict:
    key = {"workload": "W", "length": length, "stage": stage, "subject": subject, "direction": direction}
    return {**key, "median": ms, "lower": ms, "upper": ms, "rounds": 3, "memory": 2**30}


def test_a_page_has_ratios_floors_the_best_other_and_failures() -> None:
    results = [record("ours", "forward", 2.0), record("ours", "backward", 4.0)]
    results += [record("dense (cuDNN)", "forward", 3.0), record("dense (cuDNN)", "backward", 6.0)]
    results += [record(name, "forward", ms, "combine") for name, ms in (("ours", 0.2), ("slow", 0.9), ("good", 0.3))]
    failures = [{"workload": "W", "length": 8192, "stage": "combine", "subject": "bad", "error": "Error: a | b\n c"}]
    report = {
        "machine": MACHINE,
        "roofs": {"flops": 1e15, "bytes": 4e12},
        "subject": "ours",
        "results": results,
        "failures": failures,
    }
    # What a second run has besides is added, what both have is the first one's; peers stand beside us in one run.
    later = [record(name, "forward", ms) for name, ms in (("ours", 9.0), ("late", 5.0))]
    later += [record("ours", "forward", 1.0, length=4096)]
    second = {**report, "results": later}
    page = render({"run.json": report, "other.json": second})
    assert "python -m validation.perf.stages --workloads W" in page
    assert "| ours, forward | 1.000 | 2.000 |" in page
    assert "| **dense (cuDNN) / ours**, both passes |  | **1.50** |" in page
    combined = next(line for line in page.splitlines() if line.startswith("| combine | forward | 8k |"))
    assert combined.split(" | ")[3] == "0.200"
    assert combined.endswith("| 0.300 (good) |")
    assert page.count("late") == 2
    assert "## Beside late\n" in page
    assert "| workload | stage | pass | tokens | ours | late |" in page.splitlines()
    assert "| W | whole op | forward | 8k | 9.000 | 5.000 |" in page
    assert page.count("a \\| b c |") == 1  # what neither run could do is said once


def test_what_the_first_run_lacks_is_shown_in_the_run_that_has_it() -> None:
    first = [record(s, "forward", ms, "combine") for s, ms in (("ours", 0.2), ("rival", 0.3))]
    first += [record("ours", "backward", 0.2, "combine")]
    second = [record(s, d, 0.4, "combine") for s in ("theirs", "rival") for d in ("forward", "backward")]
    roofs = {"flops": 1e15, "bytes": 4e12}
    report: dict[str, Any] = {"machine": MACHINE, "roofs": roofs, "subject": "ours", "failures": []}
    a, b = {**report, "results": first}, {**report, "subject": "theirs", "results": second}
    assert newcomers(b, a) == ["rival"]
    page = render({"a.json": a, "b.json": b})
    # Forward passes of both are in the first run already; a picture takes the whole op, at several lengths.
    assert "## Beside rival\n" in page
    assert "| W | combine | backward | 8k | 0.400 | 0.400 |" in page
    assert "| W | combine | forward | 8k | 0.400 | 0.400 |" not in page
    assert "beside-1" not in page
    b["results"] += [record(s, d, 1.0, length=n) for s in ("theirs", "rival") for d in PASSES for n in (1024, 2048)]
    assert "img/perf-beside-1.png" in render({"a.json": a, "b.json": b})


def test_the_page_compares_with_the_fastest_dense_attention_of_each_length() -> None:
    times = {"ours": (2.0, 2.0), "dense (math)": (8.0, 1.0), "dense (flash)": (4.0, 3.0)}
    results = [
        record(subject, direction, ms / 2, length=length)
        for subject, found in times.items()
        for length, ms in zip((1024, 2048), found, strict=True)
        for direction in PASSES
    ]
    report = {"machine": MACHINE, "roofs": {"flops": 1e15, "bytes": 4e12}, "subject": "ours", "failures": []}
    page = render({"run.json": {**report, "results": results}})
    assert "| **the fastest dense attention / ours**, both passes | **2.00** | **0.50** |" in page


def test_the_page_says_what_a_workload_of_other_values_is() -> None:
    whole = [record(s, d, ms) for s, ms in (("ours", 4.0), ("dense (cuDNN)", 6.0)) for d in PASSES]
    here = [
        {**record("ours", d, 2.0, stage), "workload": "WC"} for stage in (WHOLE, "selected_attention") for d in PASSES
    ]
    roofs = {"flops": 1e15, "bytes": 4e12}
    report: dict[str, Any] = {"machine": MACHINE, "roofs": roofs, "subject": "ours", "failures": []}

    def page(results: list[dict]) -> str:
        return render({"run.json": records.report({**report, "results": results})})

    without, made = page(whole), page([*whole, *here])
    assert "WC" not in without
    _, _, part = made.partition("\n## WC\n")
    assert "| **dense (cuDNN) / ours**, both passes | **3.00** |" in part
    assert "| selected attention | backward | 8k | 2.000 |" in part
    assert "WC is W with inputs of which a query keeps about 50% of the free blocks of the query before" in made
    # What dense attention took is of the same run, or is not said.
    runs = {name: records.report({**report, "results": found}) for name, found in (("a", whole), ("b", here))}
    _, _, part = render(runs).partition("\n## WC\n")
    assert "| ours, forward | 2.000 |" in part
    assert "**dense (cuDNN) / ours**" not in part


BASELINE = records.read(records.BASELINES / "nvidia-h200.json")


def test_decoding_is_beside_the_fastest_dense_attention() -> None:
    results = [
        {**record(subject, "batch 16", ms, "decode"), "role": "rival" if subject.startswith("dense") else "ours"}
        for subject, ms in (("ours", 0.02), ("dense (cuDNN)", 0.05), ("dense (flash)", 0.04))
    ]
    report = {"machine": MACHINE, "roofs": {"flops": 1e15, "bytes": 4e12}, "subject": "ours", "failures": []}
    page = render({"run.json": {**report, "results": results}})
    line = next(line for line in page.splitlines() if line.startswith("| W | 8k | 16 |"))
    assert line == "| W | 8k | 16 | 0.020 | 64.5 | 0.017 | 1.18 | 0.040 (dense (flash)) | **2.00** |"
    assert "## Decoding" not in render({"run.json": {**report, "results": [record("ours", "forward", 1.0)]}})


def test_packed_documents_are_beside_one_sequence() -> None:
    results = [
        {**record(subject, "backward", ms, "layer"), "workload": "W,packed", "role": role}
        for subject, role, ms in (("ours", "ours", 3.0), ("one sequence", "rival", 2.0))
    ]
    report = {"machine": MACHINE, "roofs": {"flops": 1e15, "bytes": 4e12}, "subject": "ours", "failures": []}
    page = render({"run.json": {**report, "results": results}})
    assert "| W | 8k | layer | backward | 3.000 | 2.000 | **1.50** |" in page
    assert "## Packed sequences" not in render({"run.json": {**report, "results": [record("ours", "forward", 1.0)]}})


def test_generation_is_beside_the_dense_twin() -> None:
    place = {"workload": "1b", "length": 65536, "stage": "generation", "direction": "batch 16", "rounds": 128}
    times = {"prefill": 8192.0, "median": 2.0, "p90": 2.5, "p99": 12.0, "tokens_per_second": 8000.0}
    twin = {**times, "prefill": 16384.0, "median": 5.0, "tokens_per_second": 3200.0}
    run = [
        {**place, **twin, "subject": "dense (twin)", "role": "rival"},
        {**place, **times, "subject": "triton", "role": "ours"},
    ]
    report = {"machine": MACHINE, "roofs": {"flops": 1e15, "bytes": 4e12}, "subject": "triton", "failures": []}
    page = render({"run.json": {**report, "results": run}})
    rows = [line for line in page.splitlines() if line.startswith("| 1b | 64k | 16 |")]
    assert rows == [
        "| 1b | 64k | 16 | triton | 8192.0 | 128,000 | 2.000 | 2.500 | 12.0 | 8,000 | **2.00** | **2.50** |",
        "| 1b | 64k | 16 | dense (twin) | 16384.0 | 64,000 | 5.000 | 2.500 | 12.0 | 3,200 |  |  |",
    ]
    made = results_page([{**report, "results": run}], f"before\n{BEGIN}\nold\n{END}\nafter")
    assert all(row in made for row in rows)
    assert "old" not in made
    assert "python" in made
    nothing = {**report, "results": [record("ours", "forward", 1.0)]}
    assert "## Generation" not in render({"run.json": nothing}) + results_page([nothing], f"{BEGIN}\nold\n{END}\n")


def speeds(ratio: float) -> str:
    """The README's part on speed, NSA's time being that of dense attention over a ratio at every length."""
    results = [
        {**r, "median": 1.0 if r["role"] == "ours" else ratio} if r["stage"] in ("nsa_attention", "training") else r
        for r in BASELINE["results"]
    ]
    made = readme([{**BASELINE, "results": results}], f"before\n{BEGIN}\nold\n{END}\nafter")
    assert made.startswith(f"before\n{BEGIN}\n")
    assert made.endswith(f"\n{END}\nafter")
    assert "old" not in made
    return " ".join(made.split())


def test_the_readme_says_where_nsa_pays() -> None:
    assert "faster than dense attention from 4k tokens with 64 / 4 heads and from 4k tokens with 32 / 8" in speeds(1.5)
    assert "faster than dense attention nowhere with 64 / 4 heads and nowhere with 32 / 8 heads" in speeds(0.5)
    assert "above 1 NSA is faster, below 1 it is slower" in speeds(1.5)
    assert "PyTorch {torch} and Triton {triton}".format(**BASELINE["machine"]) in speeds(1.5)


def test_training_of_which_there_is_no_run_is_not_shown() -> None:
    assert training_of("100m", 4096, TRAINED)
    assert training_of("100m", 65536, TRAINED) is None


def test_a_readme_without_its_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="the file must have the lines <!-- made by"):
        readme([BASELINE], "# Title")
