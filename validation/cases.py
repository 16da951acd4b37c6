"""Cases that the stages are tried on, and one generator of inputs.

A case is here because it differs from the others in a way that has broken somebody's kernel; it is not a product. It is
written as small as it can be, and `fitted` to what an implementation can do. What that cannot do at any scale is
skipped when it is asked for, in `StageSpec.run`, and nowhere else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa.config import NSAConfig

from . import oracle
from .implementations import Implementation
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
    hidden_dim: int | None = 5
    """Width of the hidden layer of `"mlp"` compression; as wide as the head if None."""

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
    def behind(self) -> dict[str, Any]:
        """Keyword arguments of the stages that see compressed keys only."""
        return {**self.call, "num_keys": self.num_keys}

    @property
    def positions(self) -> Tensor:
        """Positions `[Tq]` of the queries in their sequences."""
        return oracle.query_positions(self.num_queries, self.num_keys, **self.cu_seqlens)


def cumulative(lengths: Sequence[int]) -> Tensor:
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
    Case(
        f"gradcheck_{name}",
        lengths,
        config((16, 8, 16), 2, window, num_local_blocks=1, compression=kind),
        kv_heads=1,
        group=group,
        key_dim=key_dim,
        value_dim=value_dim,
    )
    for name, lengths, window, kind, group, key_dim, value_dim in (
        ("large", whole(40), 6, "mlp", 2, 16, 16),
        ("large_few", ((5, 40),), 9, "linear", 3, 16, 20),
        ("large_packed", whole(1, 17, 0, 9), 5, "mean", 1, 20, 16),
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


def declares(subject: Any) -> bool:
    """Whether it is an implementation, not the oracle. Where pytest imports the harness as files, there are two classes
    of that name."""
    return hasattr(subject, "lacks")


def require(subject: Any, case: Case, stages: tuple[str, ...], dtype: torch.dtype, **wanted: bool) -> None:
    """Skip the test where an implementation does not declare what is about to be asked of it."""
    missing = subject.lacks(case, stages, dtype, **wanted) if declares(subject) else None
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
    lse = oracle.compressed_attention(q, k_cmp, v_cmp, case.config, **case.behind)[1]
    indices = oracle.select_blocks(q, k_cmp, None, case.config, **case.behind)
    return {**tensors, "lse": lse if q.dtype == torch.float64 else lse.float(), "indices": indices}


def draw_inputs(case: Case, dtype: torch.dtype = torch.float64) -> Tensors:
    """What a case starts from, at any length: unit normal, the same at every call.

    `q [B, Tq, Hq, Dk]`, `k`, `k_slc`, `k_win [B, Tk, Hk, Dk]`, `v`, `v_slc`, `v_win [B, Tk, Hk, Dv]`,
    `k_cmp`, `v_cmp [B, C, Hk, D]`, `gates [B, Tq, Hq, 3]` and the compression parameters `k_position`, `k_weight`,
    `k_weight_out`, `v_...`.
    """
    generator = _generator(case.id)
    tensors = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in shapes(case).items()
    }
    tensors["gates"] = tensors["gates"].sigmoid()
    return initialised(tensors)


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    """Shapes of the inputs by name, in the order in which they are drawn; those of parameters by the kind."""
    keys = (case.batch, case.num_keys, case.kv_heads)
    queries = (case.batch, case.num_queries, case.kv_heads * case.group)
    blocks = (case.batch, case.config.num_compressed(case.num_keys), case.kv_heads)
    found: dict[str, tuple[int, ...]] = {"q": (*queries, case.key_dim), "gates": (*queries, 3)}
    for kind, width in (("k", case.key_dim), ("v", case.value_dim)):
        found |= {f"{kind}{branch}": (*keys, width) for branch in ("", "_slc", "_win")}
        found[f"{kind}_cmp"] = (*blocks, width)
        found |= {f"{kind}{name}": shape for name, shape in _params(case, width).items()}
    return found


def initialised(tensors: Tensors) -> Tensors:
    """The tensors, weights among them scaled as a layer initialises them."""
    return {name: x * x.shape[-2] ** -0.5 if "_weight" in name else x for name, x in tensors.items()}


def draw_cotangent(case: Case, out: Tensor, dtype: torch.dtype) -> Tensor:
    """A gradient from above for an output of a case: the same at every call, and none of the inputs once more."""
    return torch.randn(out.shape, generator=_generator(f"{case.id} cotangent"), dtype=torch.float64).to(dtype)


def _generator(seed: str) -> torch.Generator:
    return torch.Generator(torch.get_default_device()).manual_seed(seed_of(seed))


def upcast(tensors: Mapping[str, Any]) -> Tensors:
    """The same values in float64, for the oracle to differentiate."""
    return {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}


def _params(case: Case, width: int) -> dict[str, tuple[int, ...]]:
    length, heads, hidden = case.config.compress_block_size, case.kv_heads, case.hidden_dim or width
    if case.config.compression == "mean":
        return {}
    position, fan_in = (heads, length, width), length * width
    if case.config.compression == "linear":
        return dict(zip(PARAMETERS, (position, (heads, fan_in, width)), strict=False))
    return dict(zip(PARAMETERS, (position, (heads, fan_in, hidden), (heads, hidden, width)), strict=True))


def _scramble(indices: Tensor, generator: torch.Generator, part: float) -> Tensor:
    """Any order, and about so large a part of the slots emptied wherever they stand."""
    order = torch.rand(indices.shape, generator=generator).argsort(-1)
    emptied = torch.rand(indices.shape, generator=generator) < part
    return indices.gather(-1, order).masked_fill(emptied, -1).int()
