"""Pictures of saved runs: what is in them, and that every axis says what it is."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy
import pytest
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D

from validation.perf import plots, records, report

PEERS = records.read(Path(__file__).parents[2] / "docs" / "runs" / "stages_h200.json")


def decoding(length: int, batch: int, subject: str, ms: float) -> dict[str, Any]:
    """A record of a decoding step."""
    place = {"workload": "W", "length": length, "stage": "decode", "direction": f"batch {batch}"}
    role = "rival" if subject.startswith("dense") else "ours"
    return {**place, "subject": subject, "role": role, "median": ms, "lower": ms, "upper": ms, "rounds": 5, "memory": 1}


STEPS = [
    decoding(length, batch, subject, ms * batch * length / 8192)
    for length in (8192, 65536)
    for batch in (1, 16)
    for subject, ms in (("triton", 0.02), ("dense (cuDNN)", 0.03), ("dense (flash)", 0.025))
]


def generation(length: int, batch: int, role: str, ms: float) -> dict[str, Any]:
    """A record of a model's prompts and steps."""
    place = {"workload": "1b", "length": length, "stage": "generation", "direction": f"batch {batch}"}
    times = {"median": ms, "lower": ms, "upper": ms, "p90": 1.1 * ms, "p99": 2 * ms, "prefill": 50 * ms}
    subject = "triton" if role == "ours" else "dense (twin)"
    return {**place, "subject": subject, "role": role, "rounds": 128, "tokens_per_second": 1e3 * batch / ms, **times}


GENERATED = [
    generation(length, batch, role, ms * length / 8192)
    for length in (8192, 65536)
    for batch in (1, 16)
    for role, ms in (("rival", 4.0), ("ours", 2.0))
]
SAVED = records.read(records.BASELINES / "nvidia-h200.json")
REPORT = {**SAVED, "results": [*SAVED["results"], *STEPS, *GENERATED]}


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    plt.close("all")


def shown(figure: Any) -> list[Any]:
    return [axes for axes in figure.axes if axes.get_visible()]


def points(line: Line2D) -> list[tuple[float, float]]:
    return [(x, y) for x, y in numpy.asarray(line.get_xydata()).tolist()]


def words(figure: Any) -> str:
    return " ".join(text.get_text() for text in figure.findobj(plt.Text))


@pytest.mark.parametrize("name", plots.PICTURES)
def test_a_picture_names_its_axes_its_machine_and_its_lines(name: str) -> None:
    figure = plots.PICTURES[name](REPORT)
    assert figure is not None
    figure.draw_without_rendering()
    for axes in shown(figure):
        assert axes.get_xlabel()
        assert axes.get_ylabel()
        assert axes.get_title()
        assert axes.get_legend() or figure.legends
    assert "NVIDIA H200" in words(figure)


def test_time_is_that_of_both_passes_of_all_beside_the_floor() -> None:
    figure = plots.time(PEERS)
    assert figure is not None
    axes = figure.axes[0]
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert set(lines) == {"triton", "dense (cuDNN)", "SNSA with FlexAttention", "floor of NSA"}
    ours = dict(points(lines["triton"]))
    found = {
        r["direction"]: r["median"]
        for r in PEERS["results"]
        if (r["workload"], r["length"], r["stage"], r["subject"]) == ("W", 8192, "nsa_attention", "triton")
    }
    assert ours[8192] == pytest.approx(sum(found.values()))
    looks = {(to_hex(line.get_color()), line.get_linestyle()) for line in lines.values()}
    assert len(looks) == len(lines)


def on_a_cpu() -> records.Report:
    """A run of one workload with two kinds of dense attention, of which the second is the faster."""
    times = {"eager": ("ours", 8.0), "dense (math)": ("rival", 16.0), "dense (flash)": ("rival", 4.0)}
    results = [
        {
            "workload": "tiny", "length": length, "stage": "nsa_attention", "direction": direction, "subject": subject,
            "role": role, "fullname": f"{subject}-{length}-{direction}", "median": ms, "memory": int(ms * 2**20),
        }
        for subject, (role, ms) in times.items() for length in (256, 1024) for direction in plots.PASSES
    ]  # fmt: skip
    machine = {**REPORT["machine"], "name": "cpu-test", "device": "a CPU of a rather long name, 64 cores"}
    return {**REPORT, "machine": machine, "subject": "eager", "results": results}


@pytest.mark.parametrize("name", plots.PICTURES)
@pytest.mark.parametrize("saved", [REPORT, PEERS, on_a_cpu()], ids=["gpu", "peers", "cpu"])
def test_all_words_of_a_picture_are_on_it(name: str, saved: records.Report) -> None:
    with plt.rc_context(plots.STYLE):
        figure = plots.PICTURES[name](saved)
        if figure is None:
            assert saved is not REPORT
            return
        all_words_are_on(figure)


def all_words_are_on(figure: Any) -> None:
    """Fails if any text is cut off, but for names of changes and for ticks: some of these are beyond their axis."""
    figure.draw_without_rendering()
    ticks = {label for axes in figure.axes for label in (*axes.get_xticklabels(), *axes.get_yticklabels())}
    page = figure.bbox.padded(1)  # rounding
    for text in figure.findobj(plt.Text):
        if text.get_visible() and text.get_text() and text not in ticks and not isinstance(text, plt.Annotation):
            box = text.get_window_extent()
            assert page.x0 <= box.x0 <= box.x1 <= page.x1, text.get_text()
            assert page.y0 <= box.y0 <= box.y1 <= page.y1, text.get_text()


def test_decoding_is_beside_the_fastest_dense_attention() -> None:
    figure = plots.decode(REPORT)
    assert figure is not None
    panels = {axes.get_title(): axes for axes in shown(figure)}
    assert set(panels) == {"W, 1 sequence", "W, 16 sequences"}
    lines = {line.get_label(): [*line.get_ydata()] for line in panels["W, 16 sequences"].get_lines()}
    assert lines["triton"] == pytest.approx([0.32, 2.56])
    assert lines["dense, the fastest"] == pytest.approx([0.4, 3.2])


def test_generation_is_beside_the_dense_twin() -> None:
    figure = plots.generation(REPORT)
    assert figure is not None
    panels = {axes.get_title(): axes for axes in shown(figure)}
    step = "1b, 16 sequences: a step, up to its 99th percentile"
    assert {*panels} >= {step, "1b, 1 sequence: until the first token"}
    lines = {line.get_label(): [*line.get_ydata()] for line in panels[step].get_lines()}
    assert lines == {"triton": [2.0, 16.0], "dense (twin)": [4.0, 32.0]}
    (line, _) = panels["1b, 1 sequence: until the first token"].get_lines()
    assert [*line.get_ydata()] == [100.0, 800.0]


def test_speed_is_relative_to_the_fastest_dense_attention() -> None:
    figure = plots.speedup(on_a_cpu())
    assert figure is not None
    lines = {line.get_label(): {y for _, y in points(line)} for line in figure.axes[0].get_lines()}
    assert lines == {"eager": {0.5}, "dense (math)": {0.25}, "dense (flash)": {1}}
    assert figure.axes[0].get_ylabel() == "time of dense (flash) / time"


def test_a_workload_of_other_values_has_a_panel_beside_dense_attention_on_the_first() -> None:
    ours = [
        {**r, "workload": "WC", "fullname": f"WC {r['fullname']}", "median": r["median"] / 2}
        for r in SAVED["results"]
        if (r["workload"], r["stage"], r["role"]) == ("W", "nsa_attention", "ours")
    ]
    figure = plots.speedup({**REPORT, "results": records.lend([*SAVED["results"], *ours])})
    assert figure is not None
    panels = {axes.get_title(): axes for axes in shown(figure)}
    assert len(panels) == len(shown(figure)) == 4  # and none that is empty
    first, alike = (
        dict(points(next(line for line in panels[title].get_lines() if line.get_label() == "triton")))
        for title in ("W: 64 query heads, 4 KV heads, dim 128", "WC: W with neighbouring queries alike")
    )
    assert alike == {length: pytest.approx(2 * ratio) for length, ratio in first.items()}
    all_words_are_on(figure)


def test_a_picture_that_cannot_be_drawn_keeps_no_other_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(report: records.Report) -> None:
        raise ValueError("no data")

    monkeypatch.setattr(plots, "PICTURES", {"broken": broken, "time": plots.time})
    run = str(records.BASELINES / "nvidia-h200.json")
    monkeypatch.setattr(sys, "argv", ["plots", run, "--out", str(tmp_path)])
    assert plots.main() == 1
    assert [file.name for file in tmp_path.iterdir()] == ["time.png"]
    assert "the picture broken.png could not be made: ValueError: no data" in capsys.readouterr().err


def test_a_run_without_the_whole_op_has_no_picture_of_it() -> None:
    few = [r for r in REPORT["results"] if r["stage"] == "combine"]
    assert plots.draw({**REPORT, "results": few}) == {}


def run(day: int, **figures: float) -> dict[str, Any]:
    where = {"workload": "W", "length": 1024, "stage": "nsa_attention", "role": "ours", "subject": "x"}
    results = [{**where, "fullname": name, "direction": name, "median": ms} for name, ms in figures.items()]
    return {
        "machine": {"name": "gpu", "device": "a GPU", "torch": "2", "date": "2026-01-01"},
        "date": f"2026-01-{day:02}T00:00:00",
        "commit": f"{day}" * 7,
        "results": results,
    }


def words_on_panels(figure: Any) -> set[str]:
    """Lines that name changes."""
    return {line for text in figure.findobj(plt.Annotation) for line in text.get_text().splitlines()}


def test_history_marks_and_names_what_changed_between_commits() -> None:
    runs = [run(3, forward=1.3, backward=2.0), run(1, forward=1.0, backward=2.0), run(2, forward=1.0, backward=1.0)]
    figure = plots.history(records.history(runs))
    assert figure is not None
    lines = figure.axes[0].get_lines()
    marks = {
        name: [point for line in lines if line.get_marker() == look["marker"] for point in points(line)]
        for name, look in (("worse", plots.WORSE), ("better", plots.BETTER))
    }
    assert marks == {"worse": [(2, pytest.approx(1.3)), (2, pytest.approx(1.0))], "better": [(1, pytest.approx(0.5))]}
    assert [1.0, 1.0, pytest.approx(1.3)] in [[y for _, y in points(line)] for line in lines]
    assert words_on_panels(figure) == {"W-1k-forward +30%", "W-1k-backward +100%", "W-1k-backward -50%"}
    all_words_are_on(figure)


def test_history_shows_no_stage_that_is_as_it_was() -> None:
    runs = [run(1, forward=1.0), run(2, forward=2.0)]
    for each in runs:
        each["results"].append({**each["results"][0], "stage": "combine", "median": 1.0})
    figure = plots.history(runs)
    assert figure is not None
    assert [axes.get_title() for axes in shown(figure)] == ["whole op"]


@pytest.mark.parametrize(
    "runs",
    [
        [],
        [run(1, forward=1.0)],
        [run(1, forward=1.0), run(2, forward=1.05)],  # within the bound
        [{**run(1, forward=1.0), "commit": "same"}, {**run(2, forward=9.0), "commit": "same"}],
        [run(1, forward=1.0), {**run(2, forward=9.0), "partial": True}],
        [run(1, forward=1.0), {**run(2, forward=9.0), "commit": ""}],
    ],
)
def test_without_a_change_between_commits_there_is_no_history(runs: list[dict[str, Any]]) -> None:
    commits = records.history(runs)
    assert plots.history(commits) is None
    assert plots.history(commits, "memory") is None
    assert report.history(runs) == ""


def test_the_page_shows_history_where_there_is_some() -> None:
    runs = [run(1, forward=1.0), run(2, forward=2.0)]
    assert "(img/perf-history.png)" in report.history(runs)
    assert "history-memory" not in report.history(runs)
