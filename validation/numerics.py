"""How close is close enough: the one tolerance policy and the comparisons every test uses.

Values. An implementation is never held to be exact in a narrow dtype, only to be about as good as plain PyTorch in
the same dtype (the baseline), both being measured against the float64 oracle:

    |actual - oracle| <= BASELINE_FACTOR * |baseline - oracle| + slack
    slack = eps(dtype) * magnitude + sqrt(reduction) * logit * eps(accumulator) * max(magnitude, CANCELLED_MAGNITUDE)

for the maximum and for the mean, of the whole tensor and of every row (last dimension), with the oracle's magnitude
taken in the same way. Without a baseline, as for plain PyTorch itself, its error is taken to be
`UNAIDED_ROUNDINGS * eps(dtype) * magnitude`; roundings of the terms of a sum average out, so its length plays no part,
unless it is one that cancels: `shifts`, see `SHIFT_ROUNDING`.
In float64 every element is held to `FLOAT64_BOUND` of the tensor's scale and the same sums.
Shapes, and the positions of NaN and of either infinity, are compared first and exactly.

`logit` is how large logits are where that is above 1: an exponential makes relative error of absolute one, and what
makes a logit large, keys or the scale, multiplies what is left of a gradient of probabilities that cancels.

Selections. Forced blocks are compared exactly, free ones by the oracle's importance, see `assert_selection_matches`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BASELINE_FACTOR = 2.0
"""An implementation may be this many times as far from the oracle as the baseline is."""

UNAIDED_ROUNDINGS = 3.0
"""Roundings to the narrow dtype before the last: a hidden layer, a saved output, the products of a gradient."""

SHIFT_ROUNDING = 0.15
"""Rounding of one term of a sum that cancels, in epsilons: a uniform one, sqrt(1 / 12), of about a half.

A position embedding of compression moves all blocks alike, and its gradient adds up that of every block, rounded to
the dtype. Those may cancel altogether: a hidden layer of five leaves five numbers to be small by chance. What their
rounding leaves does not cancel: the root of as many as there are blocks. Through attention, keys that move alike change
nothing at all: backward passes subtract the product of the saved output and the gradient from above from the gradient
of every score of a query, exactly what makes those sum to 0, but for the output's rounding, of as many as there are
queries. The weights of compression see the position in every block: that part of their gradient is the position's, as
many times as large as the position is.
"""

CANCELLED_MAGNITUDE = 4.0
"""Size of the terms of sums that may cancel altogether, for inputs of unit scale: products of a few normal numbers."""

FLOAT64_BOUND = 1e-12
"""Error of float64 arithmetic as a part of the tensor's scale: a few thousand roundings, far below any mistake."""

TWIN_LOSS_RATIO = 1.03
"""A sparse model's loss over its dense twin's, at most: the price it may have."""

SEEDS_LOSS_RATIO = 1.01
"""A sparse model's validation loss over its dense twin's, mean over seeds, at most, unless a standard error is more."""

SOLVED = 0.95
"""A task is solved by a model that answers this part of its questions."""

RECALL_RATIO = 0.99
"""A sparse model's score at the trained length over the dense one's, at least, where that solves the task."""

CONVERTED_LOSS_RATIO = 1.02
"""Loss of a sparse model that was made from a dense one, over the dense one's, at most."""

LEARNING_RATIO = 0.7
"""A loss over what it was at first, at most, after the few steps of a test: far from chance, and reached early."""

LAYOUT_BOUND = 5e-5
"""Difference of a float32 loss, gradient norm or parameter between layouts: sums in another order, over a few steps."""

KNOWN_WORDS = 2 / 3
"""At least this part of the words of generated text is in the corpus; for tokens drawn by their frequency it is 0.4."""

PARSED_LINES = 1 / 3
"""At least this part of the lines of generated text is Python; for tokens drawn by their frequency it is 0.1."""

TRANSFORMERS_BOUND = 1e-5
"""Difference of a float32 logit between `transformers` and a dense model, as a part of the largest."""

PEAK_MEMORY_BYTES = 2**30
"""Of the eager backend, forward and backward, at 16k tokens, one head of 64: a float32 for every pair of tokens."""

SHOWN_BLOCKS = 12
"""Importances of a row that a message shows, at most."""

GRADCHECK_STEP = 1e-6
"""Half the width of the central difference: its truncation error is about its square, its rounding `1e-16 / step`."""

RATIO_SPREAD = 0.02
"""By how much ratios of got to expected may differ, of the largest, to be called one: a hint, no verdict."""

GRADCHECK_ABSOLUTE = 1e-7
GRADCHECK_RELATIVE = 1e-6


@dataclass(frozen=True)
class Margin:
    """An error and what it may be: of all that was measured, what came nearest to its bound."""

    error: float = 0.0
    bound: float = 0.0

    @property
    def ratio(self) -> float:
        """Part of the bound that is used up; above 1 is a failure."""
        return self.error / self.bound if self.bound else 0.0


class Mismatch(AssertionError):
    """A comparison that failed.

    Attributes:
        margin: the error and the bound that it is over, where there is one.
        where: how large the error is beside its bound, `[rows][columns]` of tokens by what is of a token, coarsened.
        notes: lines that explain the message; whoever knows more about the comparison adds to them.
    """

    def __init__(self, message: str, margin: Margin | None = None, where: list[list[float]] | None = None) -> None:
        super().__init__(message)
        self.margin, self.where = margin, where or []
        self.notes: list[str] = []

    def __str__(self) -> str:
        return "\n".join([super().__str__(), *self.notes])


AXES = {4: ("batch", "token", "head", "dim"), 3: ("batch", "token", "head"), 2: ("batch", "token")}
"""Names of a tensor's axes by their number, where nothing else is said."""


def assert_matches(
    actual: Tensor,
    oracle: Tensor,
    *,
    what: str,
    baseline: Tensor | None = None,
    reduction: int = 1,
    shifts: float = 0,
    logit: float = 1.0,
    dtype: torch.dtype | None = None,
    axes: Sequence[str] | None = None,
) -> Margin:
    """Fail unless `actual` is as near to the float64 `oracle` as the policy above asks.

    Args:
        actual: any shape, any floating dtype.
        oracle: the same shape, float64.
        what: name of the tensor, for the message.
        baseline: plain PyTorch's result in the same dtype; None when `actual` is that itself.
        reduction: length of the longest sum behind an element.
        shifts: rounded terms of a sum that may cancel, where this is the gradient of what moves all of something alike;
            times the square of what that sum is multiplied by.
        logit: magnitude of the logits, where that is above 1.
        dtype: dtype of the inputs, where `actual` is kept in a wider one; its own by default.
        axes: names of the axes, for the message; by default those of `AXES`.

    Returns:
        How near it came to its bound.

    Raises:
        Mismatch: it is not near enough.
    """
    __tracebackhide__ = True
    axes = AXES.get(actual.ndim) if axes is None else axes
    if oracle.dtype != torch.float64:
        raise TypeError(f"oracle must be float64, got {oracle.dtype}")
    dtype = actual.dtype if dtype is None else dtype
    actual, oracle = actual.detach().to(oracle.device), oracle.detach()
    _assert_same_structure(actual, oracle, what, axes)
    if actual.numel() == 0:
        return Margin()
    if baseline is not None:
        # Beside a baseline of NaN or infinity every error would look small.
        _assert_same_structure(baseline.detach().to(oracle.device), oracle, f"plain PyTorch's {what}")
    error, magnitude = _error(actual, oracle), _finite(oracle.abs())
    if dtype == torch.float64:
        size = magnitude.max()
        bound = FLOAT64_BOUND * size.clamp(min=1.0) + _sums(size, dtype, reduction, logit)
        return _check("maximum", error, error.max(), bound, actual, oracle, what, axes)
    expected = None if baseline is None else _measures(_error(baseline.detach().to(oracle.device), oracle))
    magnitudes, margins = _measures(magnitude), []
    for name, measured in _measures(error).items():
        # Sums cancel, in gradients above all: no row is held to less than the magnitude of the mean row (rows that see
        # nothing aside). Which row suffers most is chance, so none is held to less than the baseline's worst row.
        size = torch.maximum(magnitudes[name], _typical(magnitudes[name]))
        typical = None if expected is None else expected[name].max()
        bound = error_bound(size, dtype, baseline=typical, reduction=reduction, shifts=shifts, logit=logit)
        margins.append(_check(name, error, measured, bound, actual, oracle, what, axes))
    return max(margins, key=lambda margin: margin.ratio)


def error_bound(
    magnitude: Tensor,
    dtype: torch.dtype,
    *,
    baseline: Tensor | None = None,
    reduction: int = 1,
    shifts: float = 0,
    logit: float = 1.0,
) -> Tensor:
    """The most by which something of a magnitude may miss the oracle: the policy above in a narrow dtype.

    Args:
        baseline: by how much plain PyTorch misses it; as much as it has a right to, unless given.
        reduction, shifts, logit: as in `assert_matches`.
    """
    typical = UNAIDED_ROUNDINGS * _eps(dtype) * magnitude if baseline is None else baseline
    sums = _sums(magnitude, torch.float32, reduction, logit)
    cancelled = SHIFT_ROUNDING * _eps(dtype) * math.sqrt(shifts)
    return BASELINE_FACTOR * (typical + cancelled) + _eps(dtype) * magnitude + sums


def _sums(magnitude: Tensor, accumulator: torch.dtype, reduction: int, logit: float) -> Tensor:
    return math.sqrt(reduction) * max(logit, 1.0) * _eps(accumulator) * magnitude.clamp(min=CANCELLED_MAGNITUDE)


def assert_equal(actual: Tensor, expected: Tensor, *, what: str) -> None:
    """Fail unless the two are the same bit for bit (NaN equals NaN): for integers, copies and repeated runs."""
    __tracebackhide__ = True
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        raise Mismatch(
            f"{what}: got {actual.dtype} {tuple(actual.shape)}, expected {expected.dtype} {tuple(expected.shape)}"
        )
    different = (actual != expected) & ~(actual.isnan() & expected.isnan())
    if different.any():
        index = tuple(different.nonzero()[0].tolist())
        axes = AXES.get(actual.ndim)
        raise Mismatch(
            f"{what}: {int(different.sum())} of {different.numel()} elements differ and none may, "
            f"{_rows(different, axes)}; first at {_place(index, axes)}: got {actual[index].item()!r}, expected "
            f"{expected[index].item()!r}",
            where=_picture(different.double()),
        )


def assert_selection_matches(
    indices: Tensor,
    oracle_indices: Tensor,
    importance: Tensor,
    config: Any,
    dtype: torch.dtype,
    *,
    positions: Tensor,
    group: int = 1,
    reduction: int = 1,
    logit: float = 1.0,
    what: str = "indices",
) -> None:
    """Fail unless a selection is well formed, holds every forced block and no avoidably poor free one.

    Rounding may swap blocks of nearly equal importance, so a free choice is judged by what it is worth: every chosen
    block's importance must be at least the best unchosen one's less `score_bound`.

    Args:
        indices, oracle_indices: int32 `[B, Tq, Hk, N]`.
        importance: the oracle's, `[B, Tq, Hk, S]`.
        dtype: of the inputs.
        positions: of the queries in their own sequence, `[Tq]`.
        group: query heads a KV head, over which importance is summed.
        reduction: length of the sum behind a score, the key head dim.
        logit: magnitude of the logits, where that is above 1.
    """
    __tracebackhide__ = True
    if indices.dtype != torch.int32 or indices.shape != oracle_indices.shape:
        raise Mismatch(
            f"{what}: got {indices.dtype} {tuple(indices.shape)}, expected {torch.int32} {tuple(oracle_indices.shape)}"
        )
    indices, oracle_indices, positions = (x.to(importance.device) for x in (indices, oracle_indices, positions))
    try:
        _check_selection(indices, oracle_indices, importance, config, dtype, positions, group, reduction, logit, what)
    except Mismatch as mismatch:
        wrong = (indices != oracle_indices).any(-1)
        if wrong.any():
            row = tuple(wrong.nonzero()[0].tolist())
            worth = ", ".join(f"{value:.4g}" for value in importance[row].tolist()[:SHOWN_BLOCKS])
            more = ", ..." if importance.shape[-1] > SHOWN_BLOCKS else ""
            mismatch.notes.append(
                f"the first other row, {_place(row, AXES[3])} (position {int(positions[row[1]])}): got "
                f"{indices[row].tolist()}, the oracle {oracle_indices[row].tolist()}; importances {worth}{more}"
            )
        raise


def _check_selection(
    indices: Tensor,
    oracle_indices: Tensor,
    importance: Tensor,
    config: Any,
    dtype: torch.dtype,
    positions: Tensor,
    group: int,
    reduction: int,
    logit: float,
    what: str,
) -> None:
    __tracebackhide__ = True
    filled = indices >= 0
    after = indices[..., 1:]
    ordered = ((after > indices[..., :-1]) | (after == -1)).all(-1, keepdim=True) & (indices >= -1)
    _check_rows(ordered.all(-1), indices, oracle_indices, f"{what}: not ascending with -1 at the end")
    same_count = filled.sum(-1) == (oracle_indices >= 0).sum(-1)
    _check_rows(same_count, indices, oracle_indices, f"{what}: the wrong number of blocks")
    if config.num_selected_blocks == 0:  # forced blocks are not selected either
        return

    own = positions[:, None, None] // config.select_block_size
    block = torch.arange(importance.shape[-1], device=importance.device)
    candidate = block <= own
    _check_rows((indices <= own).all(-1), indices, oracle_indices, f"{what}: a block beyond the query's own")
    forced = candidate & ((block < config.num_initial_blocks) | (block > own - config.num_local_blocks))
    chosen = (indices[..., None] == block).any(-2)
    _check_rows((chosen | ~forced).all(-1), indices, oracle_indices, f"{what}: a forced block is missing")

    worst_chosen = importance.masked_fill(~chosen | forced, math.inf).amin(-1)
    best_left = importance.masked_fill(chosen | ~candidate, 0.0).amax(-1)
    # Overlaps with one block, over d: what its importance sums up, a query head.
    weight = group * config.compress_block_size * config.select_block_size / config.compress_stride**2
    good = worst_chosen >= best_left - score_bound(best_left, dtype, reduction, logit, weight)
    _check_rows(
        good, indices, oracle_indices, f"{what}: a free block is worth less than one left out", worst_chosen, best_left
    )


def assert_same_training(actual: Any, expected: Any, names: Sequence[str], *, baseline: Any = None) -> None:
    """Fail unless two runs log the same steps and, at each, the same metrics: in float32 but for `LAYOUT_BOUND`.

    Args:
        actual, expected: metrics by name, each by step.
        baseline: one process in bfloat16, where the run is in bfloat16 as well; `expected`, in float32, is then what
            the policy above holds both to.
    """
    for name in names:
        if actual[name].keys() != expected[name].keys() or not expected[name]:
            raise AssertionError(f"{name}: logged at steps {list(actual[name])}, expected {list(expected[name])}")
        if baseline is not None:
            curve, oracle, plain = (torch.tensor(list(run[name].values())) for run in (actual, expected, baseline))
            assert_matches(curve, oracle.double(), what=name, baseline=plain, dtype=torch.bfloat16)
            continue
        for step, value in expected[name].items():
            if not abs(actual[name][step] - value) <= LAYOUT_BOUND:
                raise AssertionError(
                    f"{name} of step {step}: got {actual[name][step]!r}, expected {value!r} within {LAYOUT_BOUND:.1e}"
                )


def assert_same_parameters(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Fail unless two float32 models have the same parameters but for `LAYOUT_BOUND`."""
    if actual.keys() != expected.keys() or not expected:
        raise AssertionError(f"parameters: got {sorted(actual)}, expected {sorted(expected)}")
    for name, value in expected.items():
        _assert_same_structure(actual[name], value, name)
        error = (actual[name] - value).abs()
        _check("maximum", error, error.max(), torch.tensor(LAYOUT_BOUND), actual[name], value, name)


def score_bound(score: Tensor, dtype: torch.dtype, reduction: int, logit: float = 1.0, weight: float = 1.0) -> Tensor:
    """How far two importances may be apart and still change places.

    An importance is a sum of exponentials, so its relative error is the absolute error of the scores above it: sums of
    `reduction` products in the accumulator, as large as `logit`, perhaps rounded to the dtype. Every exponential below
    the smallest normal number may have become 0: terms of `weight` in all.
    """
    if dtype == torch.float64:
        return FLOAT64_BOUND * max(logit, 1.0) * score + weight * torch.finfo(torch.float64).tiny
    rounding = BASELINE_FACTOR * _eps(dtype) + math.sqrt(reduction) * max(logit, 1.0) * _eps(torch.float32)
    return rounding * score + weight * torch.finfo(torch.float32).tiny


def gradcheck(function: Callable[..., Any], inputs: Sequence[Any], *, fast: bool = False) -> None:
    """Fail unless float64 autograd agrees with central differences."""
    torch.autograd.gradcheck(
        function,
        tuple(inputs),
        eps=GRADCHECK_STEP,
        atol=GRADCHECK_ABSOLUTE,
        rtol=GRADCHECK_RELATIVE,
        fast_mode=fast,
        # A gradient is a sum over queries, and must come out the same each time.
        nondet_tol=0.0,
    )


def difference_step(dtype: torch.dtype, magnitude: float, reduction: int) -> float:
    """Half the width of a central difference in a dtype, where all inputs move at once: a power of two.

    Relative to the values behind it, a difference of step `h` errs by about `h**2` in truncation and `eps / h` in
    rounding, which are equal at `eps ** (1 / 3)`. Of `reduction` inputs that all move the way that counts the sum moves
    `reduction ** 0.5` times as far, in proportion to its size, as each of them does.
    """
    return 2.0 ** round(math.log2(_eps(dtype)) / 3 + math.log2(magnitude) - math.log2(reduction) / 2)


def on_grid(x: Tensor, step: float, dtype: torch.dtype) -> Tensor:
    """The values nearest to `x` that the dtype holds exactly, as it does those one or two steps away."""
    most = 2 / _eps(dtype) - 2
    return ((x.double() / step).round().clamp(-most, most) * step).to(dtype)


def assert_slope_matches(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    gradient: Tensor,
    cotangent: Tensor,
    *,
    direction: Tensor,
    step: float,
    what: str,
) -> None:
    """Fail unless a gradient agrees with the central difference of `<function(x), cotangent>` along a direction.

    The difference is known up to its truncation, which one of twice the width shows (theirs differ by three times that
    of the narrower), and up to the rounding of the function's values, of which half go up and half go down.

    Args:
        x: on the grid of the step, in the dtype of `function`.
        gradient, direction: of the shape of `x`; the direction of signs only.
        cotangent: of the shape of `function(x)`.
    """
    out, direction, cotangent = function(x).detach().double(), direction.double(), cotangent.double()

    def slope(width: float) -> float:
        after, before = (
            (function((x.double() + side * width * direction).to(x.dtype)).detach().double() * cotangent).sum().item()
            for side in (1, -1)
        )
        return (after - before) / (2 * width)

    def scatter(values: Tensor) -> float:
        bound = FLOAT64_BOUND if x.dtype == torch.float64 else error_bound(values.abs().mean(), x.dtype).item()
        return math.sqrt(values.numel()) * bound

    near, far = slope(step), slope(2 * step)
    expected = (gradient.double() * direction).sum().item()
    rounding = scatter(out) * cotangent.square().mean().sqrt().item() / step + scatter(gradient.double())
    bound = abs(far - near) + rounding
    if not abs(near - expected) <= bound:
        raise AssertionError(
            f"{what}: slope {near:.6e} of finite differences ({far:.6e} of twice the step), gradient says "
            f"{expected:.6e}: they differ by {abs(near - expected):.3e}, over the bound {bound:.3e} ({x.dtype})"
        )


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def _finite(x: Tensor) -> Tensor:
    return x.where(x.isfinite(), 0.0)


def _error(x: Tensor, oracle: Tensor) -> Tensor:
    """Absolute error where the oracle is finite; elsewhere the values were compared already and count as exact."""
    return (x.double() - oracle).abs().where(oracle.isfinite(), 0.0)


def _typical(x: Tensor) -> Tensor:
    """Mean of what is not exactly zero."""
    return x.sum() / (x > 0).sum().clamp(min=1)


def _measures(x: Tensor) -> dict[str, Tensor]:
    """What is bounded, of errors and of magnitudes alike: scalars for the tensor, `[...]` for its rows."""
    return {
        "maximum": x.amax(),
        "mean": x.mean(),
        "row maximum": x.amax(-1) if x.ndim else x,
        "row mean": x.mean(-1) if x.ndim else x,
    }


def _assert_same_structure(actual: Tensor, oracle: Tensor, what: str, axes: Sequence[str] | None = None) -> None:
    __tracebackhide__ = True
    if actual.shape != oracle.shape:
        raise Mismatch(f"{what}: got shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}")
    for name, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        different = test(actual) != test(oracle)
        if different.any():
            index = tuple(different.nonzero()[0].tolist())
            raise Mismatch(
                f"{what}: {name} in {int(different.sum())} wrong places, {_rows(different, axes)}; first at "
                f"{_place(index, axes)}: got {actual[index].item()!r}, expected {oracle[index].item()!r}",
                where=_picture(different.double()),
            )


def _check(
    name: str,
    error: Tensor,
    measured: Tensor,
    bound: Tensor,
    actual: Tensor,
    oracle: Tensor,
    what: str,
    axes: Sequence[str] | None = None,
) -> Margin:
    __tracebackhide__ = True
    bound = bound.to(measured.device)
    excess = measured - bound
    if not (excess > 0).any():
        at = tuple(_unravel(measured / bound.clamp(min=torch.finfo(torch.float64).tiny)))
        return Margin(measured[at].item(), bound.expand_as(measured)[at].item())
    limit = bound.amax()
    if excess.ndim:
        row = tuple(_unravel(excess))
        index = (*row, int(error[row].argmax()))
        measured, bound = measured[row], bound.expand_as(excess)[row]
    else:
        index = tuple(_unravel(error))
    beyond = error > limit
    wrong = f", {_rows(beyond, axes)}" if beyond.any() and error.ndim else ""
    raise Mismatch(
        f"{what}: {name} error {measured.item():.3e} is over the bound {bound.item():.3e} ({actual.dtype}){wrong}; "
        f"worst at {_place(index, axes)}: got {actual[index].item():.6g}, expected {oracle[index].item():.6g}"
        f"{_one_ratio(actual.double(), oracle, error, beyond)}",
        Margin(measured.item(), bound.item()),
        _picture(error / limit.clamp(min=torch.finfo(torch.float64).tiny)),
    )


def _place(index: Sequence[int], axes: Sequence[str] | None) -> str:
    """An index with the names of its axes, where they are known."""
    if axes is None or len(axes) != len(index):
        return str(tuple(index))
    return ", ".join(f"{axis} {i}" for axis, i in zip(axes, index, strict=True))


def _rows(wrong: Tensor, axes: Sequence[str] | None) -> str:
    """How many rows of the last axis are wrong, and at which tokens where these are known."""
    rows = wrong.any(-1) if wrong.ndim > 1 else wrong
    count = f"in {int(rows.sum())} of {rows.numel()} rows"
    if axes is None or len(axes) != wrong.ndim or axes[1:2] not in (("token",), ["token"]):
        return count
    tokens = wrong.transpose(0, 1).flatten(1).any(1)
    return f"{count}, at tokens {_ranges(tokens.nonzero().flatten().tolist())} of {len(tokens)}"


def _ranges(numbers: Sequence[int], most: int = 6) -> str:
    """Ascending numbers in few words: `0-3, 7, 9-12`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in runs[:most]]
    return ", ".join([*shown, *(["..."] if len(runs) > most else [])])


def _one_ratio(actual: Tensor, oracle: Tensor, error: Tensor, beyond: Tensor) -> str:
    """That every element that is wrong is so many times what it should be, where that is so."""
    here = beyond & (oracle.abs() > oracle.abs().mean())
    if int(here.sum()) < 3:
        return ""
    ratios = actual[here] / oracle[here]
    ratio = ratios.median().item()
    if not (ratios - ratio).abs().max() <= RATIO_SPREAD * max(abs(ratio), RATIO_SPREAD):
        return ""
    return f"; wherever it is wrong, got / expected is {ratio:.4g}"


def _picture(x: Tensor, most: int = 48) -> list[list[float]]:
    """The largest of every patch of `[tokens, the rest]`, the first axis (batch) and the rest taken together."""
    if x.ndim < 2 or not x.numel():
        return []
    flat = x.detach().cpu().double().movedim(1, 0).flatten(1)
    rows, columns = (min(most, size) for size in flat.shape)
    pooled = torch.nn.functional.adaptive_max_pool2d(flat.nan_to_num(posinf=1e9)[None], (rows, columns))[0]
    return [[float(f"{value:.3g}") for value in row] for row in pooled.tolist()]


def _unravel(x: Tensor) -> list[int]:
    return [int(i) for i in torch.unravel_index(x.argmax(), x.shape)] if x.ndim else []


def _check_rows(good: Tensor, indices: Tensor, oracle_indices: Tensor, message: str, *values: Tensor) -> None:
    __tracebackhide__ = True
    if good.all():
        return
    row = tuple((~good).nonzero()[0].tolist())
    worth = " against ".join(f"{value[row].item():.6e}" for value in values)
    raise Mismatch(
        f"{message}{worth and f' ({worth})'}, {_rows(~good[..., None], AXES[good.ndim + 1])}; first at "
        f"{_place(row, AXES[good.ndim])}: got {indices[row].tolist()}, expected {oracle_indices[row].tolist()}"
    )
