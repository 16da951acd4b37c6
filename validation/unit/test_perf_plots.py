"""Pictures of saved runs: what is in them, and that every axis says what it is."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
from matplotlib.colors import to_hex

from validation.perf import plots, records

PEERS = records.read(Path(__file__).parents[2] / "docs" / "runs" / "stages_h200.json")
REPORT = records.read(records.BASELINES / "nvidia-h200.json")


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    plt.close("all")


def shown(figure: Any) -> list[Any]:
    return [axes for axes in figure.axes if axes.get_visible()]


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
    ours = dict(zip(*lines["triton"].get_data(), strict=True))
    found = {
        r["direction"]: r["median"]
        for r in PEERS["results"]
        if (r["workload"], r["length"], r["stage"], r["subject"]) == ("W", 8192, "nsa_attention", "triton")
    }
    assert ours[8192] == pytest.approx(sum(found.values()))
    looks = {(to_hex(line.get_color()), line.get_linestyle()) for line in lines.values()}
    assert len(looks) == len(lines)


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


def test_history_is_in_order_and_marks_what_got_worse() -> None:
    figure = plots.history(
        [run(3, forward=1.3, backward=2.0), run(1, forward=1.0, backward=2.0), run(2, forward=1.0, backward=2.1)]
    )
    assert figure is not None
    lines = figure.axes[0].get_lines()
    marks = [list(zip(*line.get_data(), strict=True)) for line in lines if line.get_marker() == "X"]
    assert marks == [[(2, pytest.approx(1.3))]]
    assert [1.0, 1.0, pytest.approx(1.3)] in [list(line.get_ydata()) for line in lines]
    assert "W-1k-forward +30%" in words(figure)


def test_one_run_has_no_history() -> None:
    assert plots.history([run(1, forward=1.0)]) is None
