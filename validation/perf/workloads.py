"""The named workloads of all measurements."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from nsa.config import NSAConfig

from .. import costs
from ..cases import Case, initialised, shapes, whole
from ..costs import Cost, Roofs
from ..stages import BY_NAME, TIMED

Inputs = dict[str, Tensor]


DENSE = costs.attention("slc", costs.causal_pairs)
"""The cost of causal attention, which others do in place of the whole op."""


@dataclass(frozen=True)
class Workload:
    """Sizes of one attention layer: batch 1, as many queries as keys.

    Attributes:
        query_heads, kv_heads: `Hq`, `Hk`.
        key_dim, value_dim: `Dk`, `Dv`.
        kept: how alike neighbouring queries are: the share of its free blocks that a query keeps from the one before. 0
            stands for queries that are independent, and agree on what they must take.
    """

    name: str
    query_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    config: NSAConfig = field(default_factory=NSAConfig)
    dtype: torch.dtype = torch.bfloat16
    kept: float = 0.0

    @property
    def group(self) -> int:
        """`G`, query heads a KV head."""
        return self.query_heads // self.kv_heads

    def case(self, length: int) -> Case:
        """The workload at a length, as the stages are called on it."""
        return Case(
            self.name,
            whole(length),
            self.config,
            kv_heads=self.kv_heads,
            group=self.group,
            key_dim=self.key_dim,
            value_dim=self.value_dim,
            hidden_dim=None,
        )

    def draw(self, length: int, device: torch.device | str, seed: int = 0) -> Inputs:
        """Normal inputs of every stage; of those that are another stage's output, something much like it.

        So that a stage can be measured where no other works. With `lse [1, T, Hq]`, float32: logits of normal inputs
        are normal, and the mean of their exponentials is `exp(1/2)`. And `indices [1, T, Hk, N]`, and the branches
        `out_cmp`, `out_slc` and `out_win [1, T, Hq, Dv]`. `k` and `v` are those of the selected branch.

        With `kept` a query resembles the one before, so that what is selected by `q` is alike too (`correlation`).
        """
        generator = torch.Generator(device).manual_seed(seed)
        out = (1, length, self.query_heads, self.value_dim)
        wanted = {**shapes(self.case(length)), "out_cmp": out, "out_slc": out, "out_win": out}
        inputs = initialised(
            {
                name: torch.randn(shape, device=device, dtype=self.dtype, generator=generator)
                for name, shape in wanted.items()
                if name not in ("k", "v")
            }
        )
        inputs |= {"k": inputs["k_slc"], "v": inputs["v_slc"]}
        if self.kept:
            inputs["q"] = alike(inputs["q"], self.correlation(length))
        config, position = self.config, torch.arange(length, device=device)
        seen = (position + 1 - config.compress_block_size).div(config.compress_stride, rounding_mode="floor") + 1
        lse = seen.clamp(min=0).float().log() + 0.5
        inputs["lse"] = lse.view(1, -1, 1).expand(-1, -1, self.query_heads).contiguous()
        inputs["indices"] = self._draw_indices(length, generator)
        return inputs

    def correlation(self, length: int) -> float:
        """The correlation `rho` of neighbouring queries with which about `kept` of the free blocks are kept.

        `1 - rho = 0.8 (1 - kept)^2 sqrt(8192 / T)`, found by trying on W: the more blocks there are, the smaller the
        change of a query that changes which of them are the best. Of WC `rho` is 0.8 at 8k. There the operator keeps
        0.49, and 2, 4, 8, 16 and 64 neighbours have 22.6, 32.9, 49.0, 72.1 and 117.2 blocks together (of W: 0.13, and
        27.3, 46.2, 72.4, 99.9 and 123.6); at 4k, 16k, 32k and 64k it keeps 0.54, 0.49, 0.52 and
        0.53. Measured by

            python -m validation.perf.neighbours --workloads W,WC --length 8192
        """
        return max(0.0, 1 - 0.8 * (1 - self.kept) ** 2 * (8192 / length) ** 0.5)

    def _draw_indices(self, length: int, generator: torch.Generator) -> Tensor:
        """Forced blocks and any others: a free block of the query before with probability `kept`, the rest at random.

        Blocks that were not kept come back only where there are too few others. The queries that stand in one block
        have the same candidates and follow one another; the first of them takes its free blocks at random. So the loop
        is as long as a block, whatever the length.
        """
        config, device = self.config, generator.device
        wanted, size, blocks = config.num_selected_blocks, config.select_block_size, config.num_selectable(length)
        block = torch.arange(blocks, device=device)
        own = block.view(-1, 1, 1)
        forced, future = config.forced(block, own), block > own
        indices = torch.full((1, length, self.kv_heads, wanted), -1, dtype=torch.int32, device=device)
        before = torch.zeros(blocks, self.kv_heads, blocks, dtype=torch.bool, device=device)
        for first in range(min(size, length)):
            place = indices[0, first::size]  # a query of every block, but perhaps of the last
            rows = len(place)
            score = torch.rand(rows, self.kv_heads, blocks, device=device, generator=generator)
            if self.kept:
                lasting = torch.rand(score.shape, device=device, generator=generator) < self.kept
                score = score.where(~before[:rows], score + 2.0 * lasting - 1)  # 1 to 2 where kept, else below 0
            score = score.masked_fill(forced[:rows], 3).masked_fill(future[:rows], -2)
            best = score.topk(min(wanted, blocks))
            chosen = best.indices.where(best.values > -2, blocks).sort().values
            place[..., : chosen.shape[-1]] = chosen.where(chosen < blocks, -1).int()
            before = torch.zeros_like(score, dtype=torch.bool).scatter(-1, best.indices, best.values > -2)
        return indices

    def costs(self, length: int) -> dict[tuple[str, str], Cost]:
        """The cost of each stage and of `dense` attention, by its name and direction; the stages' are in `costs.py`."""
        case, size = self.case(length), self.dtype.itemsize
        each = {"dense": DENSE, **{name: stage.cost for name, stage in TIMED.items()}}
        return {
            (name, direction): cost
            for name, costs_of in each.items()
            if costs_of is not None
            for direction, cost in costs_of(case, size).items()
        }

    def decode_cost(self, length: int, batch: int, dense: bool = False) -> Cost:
        """The cost of a new token of each of `batch` sequences over a cache of `length` tokens, or of dense attention.

        A query head and a key make `2 (Dk + Dv)` operations; keys and values of a KV head are read once. With `C`
        compressed blocks these are `C + n l' + w` keys (no more of each kind than there are), or all `length`.
        """
        config = self.config
        selected = min(length, config.num_selected_blocks * config.select_block_size)
        keys = length if dense else config.num_compressed(length) + selected + min(length, config.window_size)
        width = self.key_dim + self.value_dim
        elements = batch * (keys * self.kv_heads * width + self.query_heads * width)
        return Cost(2 * batch * self.query_heads * keys * width, elements * self.dtype.itemsize)

    def floor(self, stage: str, direction: str, length: int, roofs: Roofs) -> float:
        """The least time, in ms, of a stage or of a whole op, whose stages follow one another."""
        found = self.costs(length)
        parts = BY_NAME[stage].parts if stage in BY_NAME else ()
        return sum(found[part, direction].floor(roofs) for part in parts or (stage,) if (part, direction) in found)


def alike(noise: Tensor, rho: float) -> Tensor:
    """Tokens that resemble their neighbours, of independent ones `x [B, T, H, D]` with variance 1, which they keep.

    `y[t] = rho y[t - 1] + sqrt(1 - rho^2) x[t]` and `y[0] = x[0]`: the sum of `rho^s x[t - s]` over all `s`, of which
    every pass adds twice as many as there were. In float32, some heads at a time: those of all would take gigabytes.
    """
    out = torch.empty_like(noise)
    for x, place in zip(noise.split(8, dim=2), out.split(8, dim=2), strict=True):
        y, shift = x.to(torch.float32, copy=True), 1
        y[:, 1:] *= (1 - rho**2) ** 0.5
        while shift < y.shape[1] and rho**shift > torch.finfo(torch.float32).eps:
            y[:, shift:] += rho**shift * y[:, :-shift]
            shift *= 2
        place.copy_(y)
    return out


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("W", 64, 4, 128, 128),
        # Trained models select much the same for neighbouring queries, normal inputs do not.
        Workload("WC", 64, 4, 128, 128, kept=0.5),
        Workload("W4", 32, 8, 128, 128),
        Workload("W192", 64, 4, 192, 128),
        # What implementations can do that pool blocks of one size for all branches, as fla-core does.
        Workload("P", 64, 4, 128, 128, NSAConfig(64, 64, 64, 16, compression="mean")),
        # For machines without a GPU: at 256 tokens 4 selected blocks are all there are, at 1024 a quarter.
        Workload("tiny", 4, 2, 32, 32, NSAConfig(num_selected_blocks=4, window_size=128), torch.float32),
    )
}

CHOICES: dict[str, dict[str, Any]] = {
    "l=64": {"compress_block_size": 64},
    "d=8": {"compress_stride": 8},
    "d=32": {"compress_stride": 32},
    "l'=128": {"select_block_size": 128},
    "n=8": {"num_selected_blocks": 8},
    "n=32": {"num_selected_blocks": 32},
    "w=256": {"window_size": 256},
    "w=1024": {"window_size": 1024},
}
"""What else one might choose, under the paper's names: each a change of the sizes and counts of a workload."""


PACKED = ",packed"
"""Behind the name of a workload whose tokens are several documents."""


def chosen(base: Workload, choice: str) -> Workload:
    """A workload with another choice of sizes and counts, and their name behind its own."""
    return replace(base, name=f"{base.name},{choice}", config=replace(base.config, **CHOICES[choice]))


def workload(name: str) -> Workload:
    """A workload by its name, with a choice or without, its tokens packed or not."""
    base, _, choice = name.removesuffix(PACKED).partition(",")
    return chosen(WORKLOADS[base], choice) if choice else WORKLOADS[base]
