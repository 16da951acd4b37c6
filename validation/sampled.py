"""Long sequences held to the oracle at some of their queries.

The oracle's masks grow with the square of the length, so it is asked for single queries: query `t` is the last of a
sequence of `t + 1` tokens, by the rule that queries are the last of their keys. With a cotangent that is zero but for
sampled queries, their gradients are all there is, and the oracle has every element of `dk` and `dv` too.
"""

from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import oracle
from .cases import PARAMETERS, Case, Tensors, draw_inputs
from .implementations import Implementation
from .numerics import assert_matches, assert_selection_matches
from .stages import STAGES, StageSpec, importance, select_blocks

BY_QUERY = ("q", "gates", "indices", "lse", "out")
"""Tensors with a row for each query."""


def draw_long(impl: Implementation, case: Case, dtype: torch.dtype) -> Tensors:
    """Inputs whose `lse` and `indices` are the implementation's own, for the oracle has none at this length."""
    tensors = draw_inputs(case, dtype)
    compressed = STAGES["compressed_attention"].run(impl, case, tensors)
    tensors["lse"] = compressed["lse"]
    return {**tensors, "indices": select_blocks(impl, case, tensors)}


def sample(case: Case, count: int) -> list[int]:
    """Queries on both sides of every kind of edge, at both ends, and anywhere."""
    c, end = case.config, case.num_queries
    edges = {c.compress_stride, c.compress_block_size, c.select_block_size, c.window_size, end // 2, end}
    wanted = {0, 1, end - 2, *(edge + side for edge in edges for side in (-1, 0))} & set(range(end))
    for token in torch.randperm(end).tolist():
        if len(wanted) >= count:
            break
        wanted.add(token)
    return sorted(wanted)


def up_to(case: Case, name: str, x: Tensor, query: int) -> Tensor:
    """What one query, or the query at its place, has of a tensor."""
    if name in BY_QUERY:
        return x[:, query : query + 1]
    return x[:, : case.config.num_compressed(query + 1)] if name.endswith("_cmp") else x[:, : query + 1]


def alone(case: Case, tensors: Tensors, query: int) -> tuple[Case, Tensors]:
    """The query as the only one, last of its keys."""
    names = [name for name in tensors if not name.endswith(PARAMETERS)]
    return replace(case, lengths=((1, query + 1),)), {n: up_to(case, n, tensors[n], query) for n in names}


def by_queries(
    stage: StageSpec, case: Case, tensors: Tensors, queries: list[int], cotangent: Tensor, dtype: torch.dtype
) -> Tensors:
    """Outputs and gradients as the oracle has them in a dtype: rows of `queries`, and all keys and values."""
    rows: dict[str, list[Tensor]] = defaultdict(list)
    sums = {name: torch.zeros(tensors[name].shape, dtype=torch.float64) for name in stage.inputs if name[0] in "kv"}
    for query in queries:
        one, inputs = alone(case, tensors, query)
        inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
        given = up_to(case, "out", cotangent, query)
        for name, x in stage.results(oracle, one, inputs, dtype, cotangent=given.to(dtype)):
            key = name.removeprefix("gradient of ")
            if key in sums:
                up_to(case, key, sums[key], query).add_(x)
            else:
                rows[name].append(x)
    return {name: torch.cat(parts, 1) for name, parts in rows.items()} | {
        f"gradient of {n}": x for n, x in sums.items()
    }


def sampled_results(
    impl: Implementation, stage: StageSpec, case: Case, tensors: Tensors, queries: list[int], dtype: torch.dtype
) -> tuple[Tensors, Tensor]:
    """The implementation's results, rows of `queries` alone, and the cotangent, zero for all other queries."""
    cotangent = torch.zeros(*tensors["q"].shape[:3], case.value_dim, dtype=dtype)
    cotangent[:, queries] = torch.randn(case.batch, len(queries), *cotangent.shape[2:], dtype=dtype)
    results = dict(stage.results(impl, case, tensors, dtype, cotangent=cotangent))
    for name, x in results.items():
        if name.removeprefix("gradient of ") in BY_QUERY:
            results[name] = x[:, queries]
            if name.startswith("gradient"):
                others = x.detach().clone()
                others[:, queries] = 0
                assert not others.any(), f"{name}: not 0 where the cotangent is"
    return results, cotangent


def assert_sampled_match(
    impl: Implementation, stage: StageSpec, case: Case, dtype: torch.dtype, queries: list[int]
) -> None:
    """Hold outputs and gradients of a long case to the oracle's at some queries, beside plain PyTorch's."""
    tensors = draw_long(impl, case, dtype)
    results, cotangent = sampled_results(impl, stage, case, tensors, queries, dtype)
    expected = by_queries(stage, case, tensors, queries, cotangent, torch.float64)
    nearest: Tensors = {}
    if dtype != torch.float64:
        with oracle.computing_in(dtype):
            nearest = by_queries(stage, case, tensors, queries, cotangent, dtype)
    reduction = max(stage.reduction(case), len(queries) * case.group)
    for name, actual in results.items():
        bound: dict[str, Any] = {"baseline": nearest.get(name), "reduction": reduction, "dtype": dtype}
        assert_matches(actual, expected[name], what=f"{stage.name}, case {case.id}, {name}", **bound)


def assert_selection_sampled(impl: Implementation, case: Case, dtype: torch.dtype, queries: list[int]) -> None:
    """Hold the selection of a long case to the oracle's importances at some queries."""
    tensors = draw_long(impl, case, dtype)
    for query in queries:
        one, inputs = alone(case, tensors, query)
        expected, scores = select_blocks(oracle, one, inputs), importance(one, inputs)
        bound: dict[str, Any] = {**case.selection, "positions": torch.tensor([query])}
        what = f"indices of query {query}"
        assert_selection_matches(inputs["indices"], expected, scores, case.config, dtype, **bound, what=what)
