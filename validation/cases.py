"""What the stages are tried on: a list of cases, one generator of inputs, and how to run a stage on them.

A case is here because it differs from the others in a way that has broken somebody's kernel; it is not a product. It is
written as small as it can be, and `fitted` to what an implementation can do. What that cannot do at any scale is
skipped when it is asked for, in `Stage.run` and `select_blocks`, and nowhere else.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa.config import NSAConfig
from nsa.functional import CompressionParams

from . import oracle
from .implementations import Implementation
from .numerics import Margin, Mismatch, assert_equal, assert_matches, assert_selection_matches, gradcheck
from .seeds import seed_of

Tensors = dict[str, Any]


PARAMETERS = ("_position", "_weight", "_weight_out")
"""How names of compression's parameters end, after `k` or `v`."""


def config(blocks: tuple[int, int, int] = (4, 2, 8), selected: int = 4, window: int = 7, **rest: Any) -> NSAConfig:
    """A configuration with blocks `(l, d, l')`, `n` and `w`."""
    return NSAConfig(*blocks, num_selected_blocks=selected, window_size=window, **rest)


@dataclass(frozen=True)
class Case:
    """Shapes and structure of one try: `lengths` are `(Tq, Tk)` of each sequence, packed if there are several."""

    id: str
    lengths: tuple[tuple[int, int], ...]
    config: NSAConfig = field(default_factory=config)
    batch: int = 1
    kv_heads: int = 2
    group: int = 2
    key_dim: int = 8
    value_dim: int = 8
    scale: float | None = None
    scrambled: bool = False
    """Indices in any order with -1 among them."""
    emptied: float = 0.25
    """Part of the scrambled slots that is emptied; some queries are then left without any block."""

    def __str__(self) -> str:
        c = self.config
        sizes = f"l {c.compress_block_size}, d {c.compress_stride}, l' {c.select_block_size}, w {c.window_size}"
        counts = f"n {c.num_selected_blocks} ({c.num_initial_blocks} initial, {c.num_local_blocks} local)"
        shape = f"B {self.batch}, Hk {self.kv_heads}, G {self.group}, Dk {self.key_dim}, Dv {self.value_dim}"
        scale = "" if self.scale is None else f", scale {self.scale:g}"
        return f"{self.id}: (Tq, Tk) {self.lengths}, {sizes}, {counts}, {c.compression}, {shape}{scale}"

    @property
    def packed(self) -> bool:
        return len(self.lengths) > 1

    @property
    def num_queries(self) -> int:
        return sum(queries for queries, _ in self.lengths)

    @property
    def num_keys(self) -> int:
        return sum(keys for _, keys in self.lengths)

    @property
    def cu_seqlens(self) -> dict[str, Tensor]:
        """`cu_seqlens_q` and `cu_seqlens_k`, or nothing."""
        if not self.packed:
            return {}
        queries, keys = zip(*self.lengths, strict=True)
        return {"cu_seqlens_q": cumulative(queries), "cu_seqlens_k": cumulative(keys)}

    @property
    def logit(self) -> float:
        """How large logits of normal inputs are: 1 unless the scale says otherwise."""
        return 1.0 if self.scale is None else abs(self.scale) * self.key_dim**0.5

    @property
    def selection(self) -> dict[str, Any]:
        """Keyword arguments of `assert_selection_matches`: a score is a sum over `Dk`."""
        return {"positions": self.positions, "group": self.group, "reduction": self.key_dim, "logit": self.logit}

    @property
    def call(self) -> dict[str, Any]:
        """Keyword arguments every attention stage takes."""
        return {**self.cu_seqlens, "scale": self.scale}

    @property
    def positions(self) -> Tensor:
        """Positions `[Tq]` of the queries in their sequences."""
        return oracle.query_positions(self.num_queries, self.num_keys, **self.cu_seqlens)


def cumulative(lengths: tuple[int, ...]) -> Tensor:
    """`cu_seqlens`, int32 `[N+1]`."""
    return torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)


def whole(*lengths: int) -> tuple[tuple[int, int], ...]:
    """Sequences all of whose tokens ask."""
    return tuple((length, length) for length in lengths)


CASES = [
    Case("small", whole(37)),
    Case("batch", whole(21), batch=2, group=1),
    Case("single_token", whole(1)),
    Case("before_first_block", whole(3)),
    Case("one_block_exactly", whole(4)),
    Case("paper", whole(211), config((32, 16, 64), 3, 48), group=4, kv_heads=1, key_dim=16, value_dim=16),
    Case("equal_blocks", whole(100), config((16, 16, 16), 4, 20), group=3, kv_heads=1),
    Case("short_select", whole(90), config((32, 16, 32), 4, 33), kv_heads=1, key_dim=16),
    Case("disjoint_compression", whole(41), config((2, 2, 8), 3)),
    Case("dense_stride", whole(23), config((3, 1, 4), 4, num_initial_blocks=0)),
    Case("group_3", whole(35), group=3),
    Case("group_16", whole(26), group=16, kv_heads=1),
    Case("wide_values", whole(33), key_dim=4, value_dim=12),
    Case("wide_keys", whole(33), key_dim=12, value_dim=5, scale=0.3),
    Case("last_queries", ((7, 40),)),
    Case("decode", ((1, 37),), batch=3),
    Case("many_blocks", ((9, 150),), config(selected=6)),
    Case("scrambled", whole(49), config(selected=6), batch=2, scrambled=True),
    Case("scrambled_last_queries", ((11, 64),), config(selected=6), scrambled=True),
    Case("more_selected_than_blocks", whole(25), config(selected=6)),
    Case("window_1", whole(19), config(window=1)),
    Case("window_over_length", whole(19), config(window=100)),
    Case("no_window", whole(37), config(window=0), group=3),
    Case("nothing_selected", whole(37), config(selected=0), group=3),
    Case("packed_compressed_alone", whole(21, 0, 16), config(selected=0, window=0)),
    Case("no_local_blocks", whole(45), config(selected=3, num_local_blocks=0)),
    Case("nothing_forced", whole(45), config(selected=3, num_initial_blocks=0, num_local_blocks=0)),
    Case("all_forced", whole(45), config(selected=4, num_initial_blocks=2, num_local_blocks=2)),
    Case("mean", whole(21), config(compression="mean")),
    Case("linear", whole(21), config(compression="linear"), key_dim=4, value_dim=12),
    Case("packed", whole(0, 1, 3, 4, 23, 0), group=3),
    Case("packed_paper", whole(31, 0, 1, 32, 97), config((32, 16, 64), 3, 48), kv_heads=1, key_dim=16, value_dim=16),
    Case("packed_mean", whole(5, 17, 2), config(compression="mean"), group=3),
    Case("packed_last_queries", ((3, 19), (0, 5), (1, 1), (8, 8), (2, 31)), value_dim=12),
    Case("packed_scrambled", whole(29, 0, 1, 18), config(selected=5), scrambled=True),
    Case("shared_keys", whole(39), config(shared_kv=True), group=3),
    # At the scale of kernels 96 and 80, 192 and 128, 256 and 64.
    Case("odd_head_dims", whole(20), config(selected=3), group=3, kv_heads=1, key_dim=24, value_dim=20),
    Case("latent_head_dims", whole(20), config(selected=3), kv_heads=1, key_dim=48, value_dim=32),
    Case("largest_head_dims", whole(20), config(selected=3), kv_heads=1, key_dim=64, value_dim=16),
]


def pooled(id: str, lengths: tuple[tuple[int, int], ...], selected: int, window: int = 9, **rest: Any) -> Case:
    """A case of the least common denominator: means of equal blocks, all forced ones, groups of 16, shared keys."""
    shape = {"kv_heads": 1, "group": 16} | rest
    return Case(id, lengths, config((4, 4, 4), selected, window, compression="mean", shared_kv=True), **shape)


# Structure enough for implementations that can do no more than this, numbers of blocks that are no power of two among
# it, and heads as wide as 192 and 256 at the scale of kernels.
CASES += [
    pooled("pooled", whole(38), 5, scale=0.3),
    pooled("pooled_power_of_two", whole(38), 4, batch=2, kv_heads=2),
    pooled("pooled_forced", whole(27), 3, window=1),
    pooled("pooled_short", whole(6), 5),
    pooled("pooled_wide", whole(26), 4, key_dim=32, value_dim=32),
    pooled("pooled_wide_values", whole(26), 5, key_dim=16, value_dim=48),
    pooled("pooled_widest_values", whole(18), 4, key_dim=16, value_dim=64),
    pooled("pooled_last_queries", ((7, 38),), 6),
    pooled("pooled_decode", ((1, 31),), 5, batch=2),
    pooled("pooled_many_blocks", ((5, 150),), 6),
    pooled("pooled_scrambled", whole(34), 6, scrambled=True, emptied=0.0),
    pooled("pooled_packed", whole(1, 3, 4, 25), 5),
    pooled("pooled_packed_last_queries", ((3, 19), (1, 1), (8, 8)), 5),
]

BY_ID = {case.id: case for case in CASES}

# For finite differences where blocks are (16, 8, 16) at least: one of each compression, of queries of all keys and of
# the last. They are as short as may be, and so not among the others.
DIFFERENTIATED = [
    Case(f"gradcheck_{name}", lengths, config((16, 8, 16), 2, window, num_local_blocks=1, compression=kind), **shape)
    for name, lengths, window, kind, shape in (
        ("large", whole(40), 6, "mlp", {"kv_heads": 1, "key_dim": 16, "value_dim": 16}),
        ("large_few", ((5, 40),), 9, "linear", {"kv_heads": 1, "group": 3, "key_dim": 16, "value_dim": 20}),
        ("large_packed", whole(1, 17, 0, 9), 5, "mean", {"kv_heads": 1, "group": 1, "key_dim": 20, "value_dim": 16}),
    )
]


SCALES = ((1, 1), (4, 2), (4, 4), (8, 4), (8, 8), (16, 8), (16, 16))
"""How much larger `l` and `d`, and all other lengths with `l'`, may be than a case says: the smallest that fits."""


def scaled(case: Case, blocks: int, tokens: int) -> Case | None:
    """The case with `l` and `d` so many times as large, sequences, `l'` and `w` so many times as long, wider heads.

    What is special about a length stays so: nothing, a single token, one token less than a compressed block, a block.
    None where block sizes do not fit one another any more.
    """
    length, size = case.config.compress_block_size, case.config.select_block_size
    if blocks * length > tokens * size or tokens * size % (blocks * case.config.compress_stride):
        return None

    def longer(count: int) -> int:
        return {0: 0, 1: 1, length - 1: blocks * length - 1, length: blocks * length}.get(count, tokens * count)

    return replace(
        case,
        lengths=tuple((longer(queries), longer(keys)) for queries, keys in case.lengths),
        config=replace(
            case.config,
            compress_block_size=blocks * length,
            compress_stride=blocks * case.config.compress_stride,
            select_block_size=tokens * size,
            window_size=tokens * case.config.window_size - 1
            if case.config.window_size > 1
            else case.config.window_size,
        ),
        key_dim=4 * case.key_dim,
        value_dim=4 * case.value_dim,
    )


TYPICAL_LENGTH = 37
"""Of the sequences below: what an implementation's tile is compared with."""


def fitted(impl: Implementation, *cases: Case, stages: tuple[str, ...] = ()) -> Case:
    """The first of the cases on which the implementation can do these stages, at the smallest scale at which it can.

    Where it can do none of them it is the first, which will then be skipped.
    """
    larger = [scale for scale in SCALES[1:] if TYPICAL_LENGTH * scale[1] >= 2 * impl.tile]
    for case in cases:
        times = max(1, -(-16 // min(case.key_dim, case.value_dim)))
        wider = replace(case, key_dim=times * case.key_dim, value_dim=times * case.value_dim)
        for each in (case, wider, *(scaled(case, *scale) for scale in larger)):
            if each is not None and impl.lacks(each, stages) is None:
                return each
    return cases[0]


def _declares(subject: Any) -> bool:
    """Whether it is an implementation, not the oracle. Where pytest imports the harness as files, there are two classes
    of that name."""
    return hasattr(subject, "lacks")


def require(subject: Any, case: Case, stages: tuple[str, ...], dtype: torch.dtype, **wanted: bool) -> None:
    """Skip the test where an implementation does not declare what is about to be asked of it."""
    missing = subject.lacks(case, stages, dtype, **wanted) if _declares(subject) else None
    if missing is not None:
        pytest.skip(f"{subject.name} lacks {missing}")


def draw(case: Case, dtype: torch.dtype = torch.float64) -> Tensors:
    """Inputs of every stage for a case, the same at every call: those of `draw_inputs`, and what follows from them.

    `lse [B, Tq, Hq]` of the compressed branch and `indices [B, Tq, Hk, N]`, both the oracle's.
    """
    tensors = with_selection(case, draw_inputs(case, dtype))
    if case.scrambled:
        tensors["indices"] = _scramble(tensors["indices"], _generator(case.id + " scrambled"), case.emptied)
    return tensors


def with_selection(case: Case, tensors: Tensors) -> Tensors:
    """The tensors and what the oracle makes of them for the later stages, in place of what was there."""
    q, k_cmp, v_cmp = (tensors[name] for name in ("q", "k_cmp", "v_cmp"))
    lse = oracle.compressed_attention(q, k_cmp, v_cmp, case.config, **_behind(case))[1]
    indices = oracle.select_blocks(q, k_cmp, None, case.config, **_behind(case))
    return {**tensors, "lse": lse if q.dtype == torch.float64 else lse.float(), "indices": indices}


def draw_inputs(case: Case, dtype: torch.dtype = torch.float64) -> Tensors:
    """What a case starts from, at any length: unit normal, the same at every call.

    `q [B, Tq, Hq, Dk]`, `k`, `k_slc`, `k_win [B, Tk, Hk, Dk]`, `v`, `v_slc`, `v_win [B, Tk, Hk, Dv]`,
    `k_cmp`, `v_cmp [B, C, Hk, D]`, `gates [B, Tq, Hq, 3]` and the compression parameters `k_position`, `k_weight`,
    `k_weight_out`, `v_...`.
    """
    generator = _generator(case.id)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    keys = (case.batch, case.num_keys, case.kv_heads)
    queries = (case.batch, case.num_queries, case.kv_heads * case.group)
    blocks = (case.batch, case.config.num_compressed(case.num_keys), case.kv_heads)
    tensors = {"q": normal(*queries, case.key_dim), "gates": normal(*queries, 3).sigmoid()}
    for kind, width in (("k", case.key_dim), ("v", case.value_dim)):
        tensors |= {f"{kind}{branch}": normal(*keys, width) for branch in ("", "_slc", "_win")}
        tensors[f"{kind}_cmp"] = normal(*blocks, width)
        tensors |= {f"{kind}_{name}": x for name, x in _params(case, width, normal).items()}
    return tensors


def draw_cotangent(case: Case, out: Tensor, dtype: torch.dtype) -> Tensor:
    """A gradient from above for an output of a case: the same at every call, and none of the inputs once more."""
    return torch.randn(out.shape, generator=_generator(f"{case.id} cotangent"), dtype=torch.float64).to(dtype)


def _generator(seed: str) -> torch.Generator:
    return torch.Generator(torch.get_default_device()).manual_seed(seed_of(seed))


def upcast(tensors: Mapping[str, Any]) -> Tensors:
    """The same values in float64, for the oracle to differentiate."""
    return {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}


def _params(case: Case, width: int, normal: Callable[..., Tensor]) -> dict[str, Tensor]:
    length, heads, hidden = case.config.compress_block_size, case.kv_heads, 5
    if case.config.compression == "mean":
        return {}
    position, fan_in = normal(heads, length, width), length * width
    if case.config.compression == "linear":
        return {"position": position, "weight": normal(heads, fan_in, width) * fan_in**-0.5}
    weight, weight_out = normal(heads, fan_in, hidden), normal(heads, hidden, width)
    return {"position": position, "weight": weight * fan_in**-0.5, "weight_out": weight_out * hidden**-0.5}


def _scramble(indices: Tensor, generator: torch.Generator, part: float) -> Tensor:
    """Any order, and about so large a part of the slots emptied wherever they stand."""
    order = torch.rand(indices.shape, generator=generator).argsort(-1)
    emptied = torch.rand(indices.shape, generator=generator) < part
    return indices.gather(-1, order).masked_fill(emptied, -1).int()


def _behind(case: Case) -> dict[str, Any]:
    """Keyword arguments of the stages that see compressed keys only."""
    return {**case.call, "num_keys": case.num_keys}


@dataclass(frozen=True)
class Stage:
    """A stage as the tests see it: a function of named tensors to named tensors.

    `call(subject, case, tensors)` calls it on anything with the stages as attributes, the oracle included.
    """

    name: str
    functions: tuple[str, ...]
    inputs: tuple[str, ...]
    call: Callable[[Any, Case, Mapping[str, Any]], Tensors]
    reduction: Callable[[Case], int]
    own_keys: bool = False
    """Whether branches have keys and values of their own."""

    def run(self, subject: Any, case: Case, tensors: Mapping[str, Any]) -> Tensors:
        """What it gives, by name; skips the test where the subject does not declare what that takes."""
        require(subject, case, self.functions, tensors[self.inputs[0]].dtype, own_keys=self.own_keys)
        if _declares(subject):
            SEEN.stages.append(self.name)
            SEEN.case = case
        return self.call(subject, case, tensors)

    def leaves(self, tensors: Mapping[str, Any]) -> Tensors:
        """The differentiable inputs among `tensors`, as fresh leaves of the same strides."""
        return {name: tensors[name].detach().requires_grad_() for name in self.inputs if name in tensors}

    def results(
        self,
        subject: Any,
        case: Case,
        tensors: Mapping[str, Any],
        dtype: torch.dtype | None = None,
        *,
        cotangent: Tensor | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """Outputs, then, unless they are indices, the gradient of every differentiable input under a cotangent.

        Unless given, that is a fixed one, drawn in `dtype` or else that of the inputs.
        """
        dtype = dtype or tensors[self.inputs[0]].dtype
        leaves = self.leaves(tensors)
        outputs = self.run(subject, case, {**tensors, **leaves})
        yield from outputs.items()
        if "indices" in outputs:
            return
        require(subject, case, self.functions, dtype, backward=True)
        out = outputs["out"]
        if cotangent is None:
            cotangent = draw_cotangent(case, out, dtype)
        gradients = torch.autograd.grad(
            out, list(leaves.values()), cotangent.to(out.dtype), materialize_grads=True, allow_unused=True
        )
        yield from ((f"gradient of {name}", gradient) for name, gradient in zip(leaves, gradients, strict=True))


@dataclass
class Seen:
    """What a test did: the plugin empties it before one and reads it after it."""

    stages: list[str] = field(default_factory=list)
    """Those that were run on an implementation, in order."""
    case: Case | None = None
    """The last that an implementation was run on."""
    margins: dict[tuple[str, str, str], Margin] = field(default_factory=dict)
    """The worst by stage, tensor and dtype."""

    def clear(self) -> None:
        self.stages, self.case, self.margins = [], None, {}

    def note(self, stage: str, tensor: str, dtype: torch.dtype, margin: Margin) -> None:
        key = stage, tensor, str(dtype).removeprefix("torch.")
        self.margins[key] = max(self.margins.get(key, Margin()), margin, key=lambda margin: margin.ratio)


SEEN = Seen()


def compare(
    impl: Any,
    stage: Stage,
    case: Case,
    tensors: Mapping[str, Any],
    dtype: torch.dtype,
    *,
    beside_plain: bool = False,
    logit: float = 1.0,
) -> None:
    """Hold everything a stage gives to the oracle's value of it, beside plain PyTorch's in the same dtype if asked.

    `logit` is the magnitude of the logits, where inputs make it more than the scale does. A mismatch says which
    mistakes would give what came.
    """
    __tracebackhide__ = True
    expected = dict(stage.results(oracle, case, upcast(tensors), dtype))
    nearest: Tensors = {}
    if beside_plain:
        with oracle.computing_in(dtype):
            nearest = dict(stage.results(oracle, case, tensors, dtype))
    given: Tensors = {}
    for name, actual in stage.results(impl, case, tensors, dtype):
        given[name] = actual
        bound = {**bounds(stage, case, tensors, name, actual, dtype), "baseline": nearest.get(name)}
        bound["logit"] = max(logit, case.logit)
        try:
            margin = assert_matches(actual, expected[name], what=f"{stage.name}, case {case.id}, {name}", **bound)
        except Mismatch as mismatch:
            SEEN.note(stage.name, name, dtype, mismatch.margin or Margin())
            mismatch.notes.append(f"case {case}, {dtype}")
            from .mutants import explain  # they are made of cases

            mismatch.notes += explain(impl, stage, case, tensors, dtype, given, bound)
            raise
        SEEN.note(stage.name, name, dtype, margin)


def bounds(
    stage: Stage, case: Case, tensors: Mapping[str, Any], name: str, actual: Tensor, dtype: torch.dtype
) -> dict[str, Any]:
    """Keyword arguments of `assert_matches` for one of a stage's results, without a baseline."""
    queries, blocks = case.num_queries * case.group, case.batch * case.config.num_compressed(case.num_keys)
    # A gradient of keys sums over queries, whatever the stage sums over; one of what made blocks, over these too.
    beyond = stage.name == SHARED.name and name.endswith(PARAMETERS)
    reduction = max(stage.reduction(case), queries * blocks if beyond else queries)
    shifts = blocks if name.endswith("_position") else 0
    if stage.name == SHARED.name and name.startswith(
        "gradient of k_"
    ):  # all keys of a query have the position in common
        largest = 1.0 if name.endswith("_position") else tensors["k_position"].abs().max().item()
        shifts = queries * largest**2
    # Inputs are exact for the oracle, too: what is kept in a wider dtype is held to that.
    kept = actual.dtype if name == "lse" else dtype
    axes = None if not name.endswith(PARAMETERS) else ("head", "in", "out")
    axes = ("batch", "block", "head", "dim") if name.endswith("_cmp") else axes
    return {"reduction": reduction, "shifts": shifts, "logit": case.logit, "dtype": kept, "axes": axes}


def assert_selected(case: Case, tensors: Mapping[str, Any], indices: Tensor, expected: Tensor, *, what: str) -> None:
    """Fail unless indices are exactly these; a mismatch says which mistakes would give what came."""
    __tracebackhide__ = True
    try:
        assert_equal(indices, expected, what=what)
    except Mismatch as mismatch:
        from .mutants import explain_selection

        mismatch.notes += [f"case {case}", *explain_selection(case, tensors, indices)]
        raise


def compare_selection(impl: Any, case: Case, tensors: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Hold a selection to the oracle's importances."""
    __tracebackhide__ = True
    check_selection(case, tensors, select_blocks(impl, case, tensors), dtype)


def check_selection(case: Case, tensors: Mapping[str, Any], indices: Tensor, dtype: torch.dtype) -> None:
    """Hold indices to the oracle's importances; a mismatch says which mistakes would give what came."""
    __tracebackhide__ = True
    expected, scores = select_blocks(oracle, case, tensors), importance(case, tensors)
    try:
        assert_selection_matches(indices, expected, scores, case.config, dtype, **case.selection)
    except Mismatch as mismatch:
        from .mutants import explain_selection

        mismatch.notes.append(f"case {case}, {dtype}")
        mismatch.notes += explain_selection(case, tensors, indices)
        raise


def check_gradients(subject: Any, stage: Stage, case: Case, *, fast: bool = True) -> None:
    """Hold a stage's gradients to central differences of its own values."""
    tensors = draw(case)
    leaves = stage.leaves(tensors)

    def function(*values: Tensor) -> Tensor:
        return stage.run(subject, case, {**tensors, **dict(zip(leaves, values, strict=True))})["out"]

    gradcheck(function, leaves.values(), fast=fast)


def _compress(kind: str) -> Callable[[Any, Case, Mapping[str, Any]], Tensors]:
    def run(subject: Any, case: Case, x: Mapping[str, Any]) -> Tensors:
        params = None
        if case.config.compression != "mean":
            params = CompressionParams(x[f"{kind}_position"], x[f"{kind}_weight"], x.get(f"{kind}_weight_out"))
        return {"out": subject.compress(x[kind], params, case.config, cu_seqlens=case.cu_seqlens.get("cu_seqlens_k"))}

    return run


def _compressed_attention(subject: Any, case: Case, x: Mapping[str, Any]) -> Tensors:
    out, lse = subject.compressed_attention(x["q"], x["k_cmp"], x["v_cmp"], case.config, **_behind(case))
    return {"out": out, "lse": lse}


def _select_blocks(subject: Any, case: Case, x: Mapping[str, Any]) -> Tensors:
    return {"indices": subject.select_blocks(x["q"], x["k_cmp"], x["lse"], case.config, **_behind(case))}


SELECTION = Stage("select_blocks", ("select_blocks",), ("q", "k_cmp"), _select_blocks, lambda case: case.key_dim)
"""Not among `STAGES`: it has indices instead of an output, no gradients and a comparison of its own."""


def select_blocks(subject: Any, case: Case, x: Mapping[str, Any]) -> Tensor:
    """Indices of the selection on a case."""
    return SELECTION.run(subject, case, x)["indices"]


def importance(case: Case, x: Mapping[str, Any]) -> Tensor:
    """The oracle's importance of every block, to judge a selection by."""
    return oracle.importance(x["q"], x["k_cmp"], case.config, **_behind(case))


def _selected_attention(subject: Any, case: Case, x: Mapping[str, Any]) -> Tensors:
    return {"out": subject.selected_attention(x["q"], x["k"], x["v"], x["indices"], case.config, **case.call)}


def _window(subject: Any, case: Case, x: Mapping[str, Any]) -> Tensors:
    return {"out": subject.sliding_window_attention(x["q"], x["k"], x["v"], case.config, **case.call)}


_BRANCHES = ("q", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gates")


def _nsa_attention(subject: Any, case: Case, x: Mapping[str, Any]) -> Tensors:
    tensors = (x[name] for name in _BRANCHES)
    return {"out": subject.nsa_attention(*tensors, case.config, indices=x["indices"], **case.call)}


def _from_shared_keys(subject: Any, case: Case, x: Mapping[str, Any]) -> Tensors:
    blocks = {f"{kind}_cmp": _compress(kind)(subject, case, x)["out"] for kind in ("k", "v")}
    branches = {f"{kind}_{branch}": x[kind] for kind in ("k", "v") for branch in ("slc", "win")}
    return _nsa_attention(subject, case, {**x, **blocks, **branches})


STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "compress_keys",
            ("compress",),
            ("k", *(f"k{name}" for name in PARAMETERS)),
            _compress("k"),
            lambda case: case.config.compress_block_size * case.key_dim,
        ),
        Stage(
            "compress_values",
            ("compress",),
            ("v", *(f"v{name}" for name in PARAMETERS)),
            _compress("v"),
            lambda case: case.config.compress_block_size * case.value_dim,
        ),
        Stage(
            "compressed_attention",
            ("compressed_attention",),
            ("q", "k_cmp", "v_cmp"),
            _compressed_attention,
            lambda case: case.config.num_compressed(case.num_keys) + case.key_dim,
        ),
        Stage(
            "selected_attention",
            ("selected_attention",),
            ("q", "k", "v"),
            _selected_attention,
            lambda case: case.config.num_selected_blocks * case.config.select_block_size + case.key_dim,
        ),
        Stage(
            "sliding_window_attention",
            ("sliding_window_attention",),
            ("q", "k", "v"),
            _window,
            lambda case: case.config.window_size + case.key_dim,
        ),
        Stage(
            "nsa_attention",
            ("nsa_attention",),
            _BRANCHES,
            _nsa_attention,
            lambda case: case.num_keys + case.key_dim,
            own_keys=True,
        ),
    )
}

EVERY = {**STAGES, SELECTION.name: SELECTION}
"""Stages with gradients and the one without."""

SHARED = Stage(
    "nsa_attention_from_shared_keys",
    ("compress", "nsa_attention"),
    ("q", "k", "v", "gates", *(f"{kind}{name}" for kind in "kv" for name in PARAMETERS)),
    _from_shared_keys,
    lambda case: case.num_keys + case.config.compress_block_size * case.key_dim,
)
"""Compression and all three branches from one `k` and one `v`, for cases with `shared_kv`."""

FUNCTIONS = {**EVERY, SHARED.name: SHARED}
"""Every stage by its name."""
