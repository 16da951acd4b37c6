"""How rounding error grows with length, head dim and size of logits: against the oracle, beside plain PyTorch's.

Inputs are drawn in the dtype, all three see the same ones and the same selection. An error is the mean over a tensor,
relative to the mean magnitude of the oracle's; its bound is that of the tolerance policy (`validation.numerics`).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import compress, cycle
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

from . import oracle
from .cases import Case, config, draw, upcast, whole
from .implementations import Implementation
from .numerics import assert_matches, error_bound
from .stages import WHOLE

matplotlib.use("Agg")  # before pyplot: there may be no screen
from matplotlib import pyplot as plt
from matplotlib.axes import Axes as Panel
from matplotlib.lines import Line2D

MIDDLE = Case("middle", whole(256), config((32, 16, 64), 4, 64), kv_heads=1, group=4, key_dim=64, value_dim=64)
"""Where the axes meet: sparse in every branch, and of the paper's block sizes."""

STAGE = WHOLE
"""What is measured, the blocks to select being given: every branch, and the sum of them."""

NARROW = {"float32": "#0072b2", "float16": "#009e73", "bfloat16": "#d55e00"}
"""The dtypes and a colour for each, as far apart for the colour-blind as for others (Okabe and Ito)."""

SHOWN = {"out": "output", "gradient of q": "gradient of queries", "gradient of k_slc": "gradient of selected keys"}
"""What is drawn of all that is measured."""


@dataclass(frozen=True)
class Axis:
    """What grows, and the case at each value of it."""

    label: str
    values: Sequence[int]
    case: Callable[[int], Case]


AXES = {
    "length": Axis("length T, tokens", (32, 64, 128, 256, 512), lambda n: replace(MIDDLE, lengths=whole(n))),
    "head_dim": Axis("head dim D, elements", (16, 32, 64, 128, 256), lambda n: replace(MIDDLE, key_dim=n, value_dim=n)),
    "logits": Axis(
        "factor on logits, times", (1, 4, 16, 64), lambda n: replace(MIDDLE, scale=n * MIDDLE.key_dim**-0.5)
    ),
}


@dataclass(frozen=True)
class Result:
    """One tensor that an implementation and plain PyTorch made of the same inputs."""

    implementation: str
    axis: str
    value: int
    name: str
    dtype: torch.dtype
    actual: Tensor
    plain: Tensor
    true: Tensor
    reduction: int
    logit: float

    def check(self) -> None:
        """Fail unless it is as near to the truth as the policy asks."""
        assert_matches(
            self.actual,
            self.true,
            what=f"{self.name} at {AXES[self.axis].label} {self.value}",
            baseline=self.plain,
            reduction=self.reduction,
            logit=self.logit,
            dtype=self.dtype,
        )

    def point(self) -> "Point":
        """What is drawn of it."""
        size = self.true.abs().mean()
        error, plain = ((x.double() - self.true).abs().mean() for x in (self.actual, self.plain))
        bound = error_bound(size, self.dtype, baseline=plain, reduction=self.reduction, logit=self.logit)
        relative = ((x / size).item() for x in (error, plain, bound))
        return Point(self.implementation, self.axis, self.value, self.name, str(self.dtype)[6:], *relative)


@dataclass(frozen=True)
class Point:
    """Relative errors of an implementation and of plain PyTorch, and the bound of the former."""

    implementation: str
    axis: str
    value: int
    name: str
    dtype: str
    error: float
    plain: float
    bound: float


def measure(impl: Implementation, axis: str, dtype: torch.dtype) -> Iterator[Result]:
    """Outputs and gradients all along an axis."""
    for value in AXES[axis].values:
        case = AXES[axis].case(value)
        tensors = draw(case, dtype)
        true = dict(STAGE.results(oracle, case, upcast(tensors), dtype))
        with oracle.computing_in(dtype):
            plain = dict(STAGE.results(oracle, case, tensors, dtype))
        logit = tensors["lse"].where(tensors["lse"].isfinite(), 0).abs().max().item() if axis == "logits" else 1.0
        for name, actual in STAGE.results(impl, case, tensors, dtype):
            # Gradients of keys and values are sums over queries.
            over_queries = name.startswith(("gradient of k", "gradient of v"))
            reduction = case.num_queries * case.group if over_queries else STAGE.reduction(case)
            three = actual.detach(), plain[name].detach(), true[name].detach()
            yield Result(impl.name, axis, value, name, dtype, *three, reduction, logit)


NOT_FINITE = "X"
"""The marker of what is infinite or no number."""


def _draw(panel: Panel, x: Sequence[int], y: Sequence[float], **style: Any) -> None:
    """A line through what a logarithmic axis can show. What is not finite is marked at the top, what is 0 left out."""
    shown = [math.isfinite(value) and value > 0 for value in y]
    panel.plot(list(compress(x, shown)), list(compress(y, shown)), **style)
    lost = [place for place, value in zip(x, y, strict=True) if not math.isfinite(value)]
    if lost:
        top = panel.get_xaxis_transform()
        panel.plot(lost, [0.97] * len(lost), NOT_FINITE, color=style["color"], transform=top)


def plot(points: Iterable[Point], file: Path) -> None:
    """Errors against every axis, a column each, on logarithmic scales; a row for each tensor shown."""
    points = list(points)
    implementations = sorted({point.implementation for point in points})
    markers = dict(zip(implementations, cycle("osD^v"), strict=False))
    figure, panels = plt.subplots(
        len(SHOWN), len(AXES), figsize=(12, 10), sharex="col", sharey="row", layout="constrained"
    )
    for row, (name, title) in zip(panels, SHOWN.items(), strict=True):
        for panel, (key, axis) in zip(row, AXES.items(), strict=True):
            # Before there is data: a wrong implementation may have none that a logarithmic axis can show.
            panel.set(title=title, xscale="log", yscale="log", xlim=(axis.values[0] / 1.3, axis.values[-1] * 1.3))
            for dtype, color in NARROW.items():
                for implementation in implementations:
                    which = (implementation, key, name, dtype)
                    line = sorted(
                        (p for p in points if (p.implementation, p.axis, p.name, p.dtype) == which),
                        key=lambda p: p.value,
                    )
                    x, marker = [p.value for p in line], markers[implementation]
                    _draw(panel, x, [p.error for p in line], color=color, marker=marker, ls="-", ms=5)
                    _draw(panel, x, [p.plain for p in line], color=color, ls="--", lw=1)
                    _draw(panel, x, [p.bound for p in line], color=color, ls=":", lw=1.5)
            panel.set_xticks(axis.values, [str(value) for value in axis.values])
            panel.minorticks_off()
            panel.grid(alpha=0.3)
    for panel, axis in zip(panels[-1], AXES.values(), strict=True):
        panel.set_xlabel(axis.label)
    for row in panels:
        row[0].set_ylabel("mean |error| / mean |value|, no unit")
    title = "Rounding error of nsa_attention against the float64 oracle, by what grows"
    handles = [Line2D([], [], color=color, lw=3, label=dtype) for dtype, color in NARROW.items()]
    handles += [Line2D([], [], color="0.3", marker=marker, label=name) for name, marker in markers.items()]
    handles += [Line2D([], [], color="0.3", ls="--", lw=1, label="plain PyTorch, same dtype")]
    handles += [Line2D([], [], color="0.3", ls=":", lw=1.5, label="bound of the tolerance policy")]
    if not all(math.isfinite(x) for p in points if p.name in SHOWN for x in (p.error, p.plain, p.bound)):
        handles += [Line2D([], [], color="0.3", ls="", marker=NOT_FINITE, label="not finite")]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False, title=title)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)
