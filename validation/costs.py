"""The least cost of a stage: operations of the matrix units and bytes of device memory.

Operations are every product of a query with a key it sees, once. Softmax, gates and positions are left out. Bytes are
those of tensors that must be read or written in device memory, each once; what a kernel reads again, or keeps for its
backward pass beside the log-sum-exp, is its own affair. So the floor, the larger of operations over the rate of the
matrix units and bytes over the bandwidth, is one that no implementation of the same stages gets below; where it is
approached is another matter: selected attention, for one, fetches each query's blocks from the second-level cache,
`2 l' (Dk + Dv)` bytes for each KV head, query and block, which the floor knows nothing of.

All of it is for cases of one sequence, all of whose tokens ask.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch

from .cases import PARAMETERS, Case, shapes


@dataclass(frozen=True)
class Roofs:
    """The rates a machine reaches: `flops` a second of bfloat16 products, `bytes` a second read and written."""

    flops: float = 795e12
    bytes: float = 4.3e12


@dataclass(frozen=True)
class Cost:
    """The least that something needs: `flops` of the matrix units, `bytes` of device memory."""

    flops: float
    bytes: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def floor(self, roofs: Roofs) -> float:
        """The least time, in ms."""
        return 1e3 * max(self.flops / roofs.flops, self.bytes / roofs.bytes)


Costs = Callable[[Case, int], Mapping[str, Cost]]
"""The cost by direction, `"forward"` or `"backward"` (that alone), of a case whose elements have so many bytes."""


# Pairs of a query and a key it sees, a head.


def causal_pairs(case: Case) -> int:
    """`T (T + 1) / 2`."""
    return case.num_keys * (case.num_keys + 1) // 2


def compressed_pairs(case: Case) -> int:
    """`sum_t floor((t + 1 - l) / d) + 1`, about `T^2 / 2 d`."""
    ends = torch.arange(case.num_keys) + 1 - case.config.compress_block_size
    seen = ends.div(case.config.compress_stride, rounding_mode="floor") + 1
    return int(seen.clamp(min=0).sum())


def selected_pairs(case: Case) -> int:
    """`t mod l' + 1` keys of the query's own block and `l'` of each other, `min(n, t // l' + 1)` blocks in all."""
    t, size = torch.arange(case.num_keys), case.config.select_block_size
    blocks = (t // size + 1).clamp(max=case.config.num_selected_blocks)
    return int(((blocks - 1) * size + t % size + 1).sum())


def window_pairs(case: Case) -> int:
    """`sum_t min(t + 1, w)`."""
    return int((torch.arange(case.num_keys) + 1).clamp(max=case.config.window_size).sum())


# Costs of stages.


def attention(branch: str, pairs: Callable[[Case], int], *, selected: bool = False) -> Costs:
    """Attention over `P` pairs a head to the keys `k_<branch>`.

    Forward `q.k` and `p.v`, `2 Hq P (Dk + Dv)` operations; backward `q.k` again, `dout.v`, and the sums of `dq`, `dk`
    and `dv`: `2 Hq P (3 Dk + 2 Dv)`. Bytes: forward reads queries, keys, values and indices and writes output and
    log-sum-exp; backward reads all of them and `dout` and writes the gradients.
    """

    def costs(case: Case, size: int) -> dict[str, Cost]:
        products = 2 * _queries(case) * pairs(case) // case.num_queries
        inputs, out = size * _elements(case, "q", f"k_{branch}", f"v_{branch}"), size * _out(case)
        forward = inputs + _indices(case) * selected + out + _lse(case)
        return {
            "forward": Cost(products * (case.key_dim + case.value_dim), forward),
            "backward": Cost(products * (3 * case.key_dim + 2 * case.value_dim), forward + out + inputs),
        }

    return costs


def selection(case: Case, size: int) -> dict[str, Cost]:
    """`q.k` over the compressed pairs, `2 Hq P Dk`. Reads queries, compressed keys and log-sum-exp, writes indices."""
    products = 2 * _queries(case) * compressed_pairs(case) // case.num_queries * case.key_dim
    return {"forward": Cost(products, size * _elements(case, "q", "k_cmp") + _lse(case) + _indices(case))}


def compression(case: Case, size: int) -> dict[str, Cost]:
    """Compression of keys and of values by `"mlp"`, `C` blocks each: `2 C Hk (l D D + D D)`.

    Backward twice that, for the gradients of inputs and of weights. Reads tokens and weights, writes blocks; backward
    reads those and the blocks' gradients and writes gradients of tokens and weights.
    """
    weights = size * _elements(case, *(f"{kind}{name}" for kind in "kv" for name in PARAMETERS))
    blocks, tokens = size * _elements(case, "k_cmp", "v_cmp"), size * _elements(case, "k", "v")
    layers = sum(dim * dim for dim in (case.key_dim, case.value_dim)) * (case.config.compress_block_size + 1)
    products = 2 * case.batch * case.config.num_compressed(case.num_keys) * case.kv_heads * layers
    return {
        "forward": Cost(products, tokens + blocks + weights),
        "backward": Cost(2 * products, 2 * tokens + blocks + 2 * weights),
    }


def gating(case: Case, size: int) -> dict[str, Cost]:
    """Reads three branches and gates and writes the output.

    Its backward costs nothing but the gates and their gradients: the backward of a branch reads its output and `dout`
    anyway, and may take the gate beside it.
    """
    gates = size * _elements(case, "gates")
    return {"forward": Cost(0, 4 * size * _out(case) + gates), "backward": Cost(0, 2 * gates)}


def together(parts: Iterable[Costs]) -> Costs:
    """The sum of stages, which follow one another."""
    parts = tuple(parts)

    def costs(case: Case, size: int) -> dict[str, Cost]:
        found: dict[str, Cost] = {}
        for part in parts:
            for direction, cost in part(case, size).items():
                found[direction] = found.get(direction, Cost(0, 0)) + cost
        return found

    return costs


def _elements(case: Case, *names: str) -> int:
    """Elements of inputs; parameters that a kind of compression has not count nothing."""
    there = shapes(case)
    return sum(prod(there[name]) for name in names if name in there)


def _queries(case: Case) -> int:
    return case.batch * case.num_queries * case.kv_heads * case.group


def _out(case: Case) -> int:
    """Elements of an output."""
    return _queries(case) * case.value_dim


def _lse(case: Case) -> int:
    """Bytes of the log-sum-exp."""
    return 4 * _queries(case)


def _indices(case: Case) -> int:
    """Bytes of indices."""
    return 4 * case.batch * case.num_queries * case.kv_heads * case.config.num_selected_blocks
