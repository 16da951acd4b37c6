"""What the stages are tried on: a list of cases, one generator of inputs, and how to run a stage on them.

A case is here because it differs from the others in a way that has broken somebody's kernel; it is not a product.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from nsa.config import NSAConfig
from nsa.functional import CompressionParams
from validation import oracle
from validation.numerics import assert_matches

Tensors = dict[str, Any]


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
    Case("scrambled", whole(49), config(selected=5), batch=2, kv_heads=1, scrambled=True),
    Case("scrambled_last_queries", ((11, 64),), config(selected=6), scrambled=True),
    Case("more_selected_than_blocks", whole(25), config(selected=11)),
    Case("window_1", whole(19), config(window=1)),
    Case("window_over_length", whole(19), config(window=100)),
    Case("no_local_blocks", whole(45), config(selected=3, num_local_blocks=0)),
    Case("nothing_forced", whole(45), config(selected=2, num_initial_blocks=0, num_local_blocks=0)),
    Case("all_forced", whole(45), config(selected=4, num_initial_blocks=2, num_local_blocks=2)),
    Case("mean", whole(21), config(compression="mean")),
    Case("linear", whole(21), config(compression="linear"), key_dim=6, value_dim=10),
    Case("packed", whole(0, 1, 3, 4, 23, 0), group=3),
    Case("packed_paper", whole(31, 0, 1, 32, 97), config((32, 16, 64), 3, 48), kv_heads=1, key_dim=16, value_dim=16),
    Case("packed_mean", whole(5, 17, 2), config(compression="mean")),
    Case("packed_last_queries", ((3, 19), (0, 5), (1, 1), (8, 8), (2, 31)), value_dim=12),
    Case("packed_scrambled", whole(29, 0, 1, 18), config(selected=5), scrambled=True),
]

BY_ID = {case.id: case for case in CASES}


def for_kernels(case: Case, factor: int) -> Case:
    """The case for kernels, whose smallest blocks are `(16, 8, 16)`: about `factor` times as long, its heads wider.

    What is special about a length stays so: nothing, a single token, one token less than a compressed block, a block.
    """
    length, stride, size = case.config.compress_block_size, case.config.compress_stride, case.config.select_block_size
    if stride >= 8:
        return replace(case, key_dim=max(16, case.key_dim), value_dim=max(16, case.value_dim))

    def longer(tokens: int) -> int:
        return {0: 0, 1: 1, length - 1: 4 * length - 1, length: 4 * length}.get(tokens, factor * tokens)

    return replace(
        case,
        lengths=tuple((longer(queries), longer(keys)) for queries, keys in case.lengths),
        config=replace(
            case.config,
            compress_block_size=4 * length,
            compress_stride=4 * stride,
            select_block_size=factor * size,
            window_size=factor * case.config.window_size - 1 if case.config.window_size > 1 else 1,
        ),
        key_dim=4 * case.key_dim,
        value_dim=4 * case.value_dim,
    )


def kernel_cases(factor: int) -> list[Case]:
    """`CASES` for kernels, but for those with strides of 1 and blocks of 3 tokens, which are beyond kernels anyhow.

    Args:
        factor: how many times as long, 2 at least. Kernels cut sequences into tiles: the longer these are, the longer
            is a sequence that has several.
    """
    return [for_kernels(case, factor) for case in CASES if case.id not in ("dense_stride", "disjoint_compression")]


def draw(case: Case, dtype: torch.dtype = torch.float64) -> Tensors:
    """Inputs of every stage for a case, the same at every call: those of `draw_inputs`, and what follows from them.

    `lse [B, Tq, Hq]` of the compressed branch and `indices [B, Tq, Hk, N]`, both the oracle's.
    """
    tensors = with_selection(case, draw_inputs(case, dtype))
    if case.scrambled:
        tensors["indices"] = _scramble(tensors["indices"], _generator(case.id + " scrambled"))
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


def _generator(seed: str) -> torch.Generator:
    return torch.Generator(torch.get_default_device()).manual_seed(zlib.crc32(seed.encode()))


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


def _scramble(indices: Tensor, generator: torch.Generator) -> Tensor:
    """Any order, and about a quarter of the slots emptied wherever they stand."""
    order = torch.rand(indices.shape, generator=generator).argsort(-1)
    emptied = torch.rand(indices.shape, generator=generator) < 0.25
    return indices.gather(-1, order).masked_fill(emptied, -1).int()


def _behind(case: Case) -> dict[str, Any]:
    """Keyword arguments of the stages that see compressed keys only."""
    return {**case.call, "num_keys": case.num_keys}


@dataclass(frozen=True)
class Stage:
    """A stage as the tests see it: a function of named tensors to named tensors.

    `run(subject, case, tensors)` calls it on anything with the stages as attributes, the oracle included.
    """

    name: str
    inputs: tuple[str, ...]
    run: Callable[[Any, Case, Mapping[str, Any]], Tensors]
    reduction: Callable[[Case], int]

    def leaves(self, tensors: Mapping[str, Any]) -> Tensors:
        """The differentiable inputs among `tensors`, as fresh leaves of the same strides."""
        return {name: tensors[name].detach().requires_grad_() for name in self.inputs if name in tensors}

    def results(
        self,
        subject: Any,
        case: Case,
        tensors: Mapping[str, Any],
        dtype: torch.dtype = torch.float64,
        *,
        cotangent: Tensor | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """Outputs, then the gradient of every differentiable input under a cotangent, a fixed one drawn in `dtype`."""
        leaves = self.leaves(tensors)
        outputs = self.run(subject, case, {**tensors, **leaves})
        yield from outputs.items()
        out = outputs["out"]
        if cotangent is None:
            cotangent = torch.randn(out.shape, generator=_generator(case.id), dtype=torch.float64).to(dtype)
        gradients = torch.autograd.grad(
            out, list(leaves.values()), cotangent.to(out.dtype), materialize_grads=True, allow_unused=True
        )
        yield from ((f"gradient of {name}", gradient) for name, gradient in zip(leaves, gradients, strict=True))


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

    `logit` is the magnitude of the log-sum-exp, where that is far above 1.
    """
    expected = dict(stage.results(oracle, case, upcast(tensors), dtype))
    nearest: Tensors = {}
    if beside_plain:
        with oracle.computing_in(dtype):
            nearest = dict(stage.results(oracle, case, tensors, dtype))
    for name, actual in stage.results(impl, case, tensors, dtype):
        what = f"{stage.name}, case {case.id}, {name}"
        # A gradient of keys sums over queries, whatever the stage sums over.
        reduction = max(stage.reduction(case), case.num_queries * case.group)
        bound = {"baseline": nearest.get(name), "reduction": reduction, "logit": logit, "dtype": dtype}
        assert_matches(actual, expected[name], what=what, **bound)


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


def select_blocks(subject: Any, case: Case, x: Mapping[str, Any]) -> Tensor:
    """The selection stage on a case; not a `Stage`, since it has no gradients and a comparison of its own."""
    return subject.select_blocks(x["q"], x["k_cmp"], x["lse"], case.config, **_behind(case))


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


STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "compress_keys",
            ("k", "k_position", "k_weight", "k_weight_out"),
            _compress("k"),
            lambda case: case.config.compress_block_size * case.key_dim,
        ),
        Stage(
            "compress_values",
            ("v", "v_position", "v_weight", "v_weight_out"),
            _compress("v"),
            lambda case: case.config.compress_block_size * case.value_dim,
        ),
        Stage(
            "compressed_attention",
            ("q", "k_cmp", "v_cmp"),
            _compressed_attention,
            lambda case: case.config.num_compressed(case.num_keys) + case.key_dim,
        ),
        Stage(
            "selected_attention",
            ("q", "k", "v"),
            _selected_attention,
            lambda case: case.config.num_selected_blocks * case.config.select_block_size + case.key_dim,
        ),
        Stage(
            "sliding_window_attention",
            ("q", "k", "v"),
            _window,
            lambda case: case.config.window_size + case.key_dim,
        ),
        Stage("nsa_attention", _BRANCHES, _nsa_attention, lambda case: case.num_keys + case.key_dim),
    )
}
