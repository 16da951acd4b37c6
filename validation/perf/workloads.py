"""The named workloads of all measurements, and what each stage of one costs at least.

Operations are those of the matrix units: every product of a query with a key it sees, once. Softmax, gates and
positions are left out. Bytes are those of tensors that must be read or written in device memory, each once; what a
kernel reads again, or keeps for its backward pass beside the log-sum-exp, is its own affair. So the floor, the larger
of operations over the rate of the matrix units and bytes over the bandwidth, is one that no implementation of the same
stages gets below; where it is approached is another matter: selected attention, for one, fetches each query's blocks
from the second-level cache, `2 l' (Dk + Dv)` bytes for each KV head, query and block, which the floor knows nothing of.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from nsa.config import NSAConfig

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Roofs:
    """The rates a machine reaches: `flops` a second of bfloat16 products, `bytes` a second read and written."""

    flops: float = 795e12
    bytes: float = 4.3e12


@dataclass(frozen=True)
class Cost:
    """What something needs at least: `flops` of the matrix units, `bytes` of device memory."""

    flops: float
    bytes: float

    def floor(self, roofs: Roofs) -> float:
        """The least time, in ms."""
        return 1e3 * max(self.flops / roofs.flops, self.bytes / roofs.bytes)


@dataclass(frozen=True)
class Workload:
    """Sizes of one attention layer: batch 1, as many queries as keys.

    Attributes:
        query_heads, kv_heads: `Hq`, `Hk`.
        key_dim, value_dim: `Dk`, `Dv`.
    """

    name: str
    query_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    config: NSAConfig = field(default_factory=NSAConfig)
    dtype: torch.dtype = torch.bfloat16

    @property
    def group(self) -> int:
        """`G`, query heads a KV head."""
        return self.query_heads // self.kv_heads

    def shapes(self, length: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the floating inputs, by name; the compressors are those of the `"mlp"` kind."""
        blocks, block, heads = self.config.num_compressed(length), self.config.compress_block_size, self.kv_heads
        shapes: dict[str, tuple[int, ...]] = {
            "q": (1, length, self.query_heads, self.key_dim),
            "gates": (1, length, self.query_heads, 3),
        }
        for name, dim in (("k", self.key_dim), ("v", self.value_dim)):
            shapes[f"{name}_cmp"] = (1, blocks, heads, dim)
            shapes[f"{name}_slc"] = shapes[f"{name}_win"] = (1, length, heads, dim)
            shapes[f"{name}_position"] = (heads, block, dim)
            shapes[f"{name}_weight"] = (heads, block * dim, dim)
            shapes[f"{name}_weight_out"] = (heads, dim, dim)
        for name in ("out_cmp", "out_slc", "out_win"):
            shapes[name] = (1, length, self.query_heads, self.value_dim)
        return shapes

    def draw(self, length: int, device: torch.device | str, seed: int = 0) -> Inputs:
        """Normal inputs of every stage; of those that are another stage's output, something much like it.

        So that a stage can be measured where no other works. With `lse [1, T, Hq]`, float32: logits of normal inputs
        are normal, and the mean of their exponentials is `exp(1/2)`. And `indices [1, T, Hk, N]`.
        """
        generator = torch.Generator(device).manual_seed(seed)
        inputs = {
            name: torch.randn(shape, device=device, dtype=self.dtype, generator=generator)
            for name, shape in self.shapes(length).items()
        }
        for name in inputs:  # as a layer initialises its weights
            if "weight" in name:
                inputs[name] *= inputs[name].shape[-2] ** -0.5
        config, position = self.config, torch.arange(length, device=device)
        seen = (position + 1 - config.compress_block_size).div(config.compress_stride, rounding_mode="floor") + 1
        lse = seen.clamp(min=0).float().log() + 0.5
        inputs["lse"] = lse.view(1, -1, 1).expand(-1, -1, self.query_heads).contiguous()
        inputs["indices"] = self._draw_indices(length, generator)
        return inputs

    def _draw_indices(self, length: int, generator: torch.Generator) -> Tensor:
        """Forced blocks and any others, as random inputs select them: neighbouring queries agree on nothing else."""
        config, device = self.config, generator.device
        wanted, size, blocks = config.num_selected_blocks, config.select_block_size, config.num_selectable(length)
        block = torch.arange(blocks, device=device)
        indices = torch.full((1, length, self.kv_heads, wanted), -1, dtype=torch.int32, device=device)
        for part in torch.arange(length, device=device).split(4096):  # scores of all would take gigabytes
            own = (part // size).view(-1, 1, 1)
            score = torch.rand(len(part), self.kv_heads, blocks, device=device, generator=generator)
            score = score.masked_fill((block < config.num_initial_blocks) | (block > own - config.num_local_blocks), 2)
            best = score.masked_fill(block > own, -1).topk(min(wanted, blocks))
            chosen = best.indices.where(best.values >= 0, blocks).sort().values
            indices[0, part, :, : chosen.shape[-1]] = chosen.where(chosen < blocks, -1).int()
        return indices

    def pairs(self, length: int) -> dict[str, int]:
        """Pairs of a query and a key it sees, a head, by the stage that multiplies them.

        Causal: `T (T + 1) / 2`. Compressed: `sum_t floor((t + 1 - l) / d) + 1`, about `T^2 / 2 d`. Window:
        `sum_t min(t + 1, w)`. Selected: `t mod l' + 1` keys of the query's own block and `l'` of each other,
        `min(n, t // l' + 1)` blocks in all.
        """
        config, t = self.config, torch.arange(length)
        size = config.select_block_size
        blocks = (t // size + 1).clamp(max=config.num_selected_blocks)
        seen = (t + 1 - config.compress_block_size).div(config.compress_stride, rounding_mode="floor") + 1
        return {
            "causal": length * (length + 1) // 2,
            "compressed_attention": int(seen.clamp(min=0).sum()),
            "selected_attention": int(((blocks - 1) * size + t % size + 1).sum()),
            "sliding_window_attention": int((t + 1).clamp(max=config.window_size).sum()),
        }

    def costs(self, length: int) -> dict[tuple[str, str], Cost]:
        """The cost of each stage, by its name and direction, `"forward"` or `"backward"` (that alone).

        - Attention over `P` pairs a head: forward `q.k` and `p.v`, `2 Hq P (Dk + Dv)` operations; backward `q.k` again,
          `dout.v`, and the sums of `dq`, `dk` and `dv`: `2 Hq P (3 Dk + 2 Dv)`. Bytes: forward reads queries, keys,
          values and indices and writes output and log-sum-exp; backward reads all of them and `dout` and writes the
          gradients.
        - `select_blocks`: `q.k` over the compressed pairs, `2 Hq P Dk`. Reads queries, compressed keys and log-sum-exp,
          writes indices.
        - `compress` (`"mlp"`, keys and values, `C` blocks each): `2 C Hk (l D D + D D)`, backward twice that, for the
          gradients of inputs and of weights. Reads tokens and weights, writes blocks; backward reads those and the
          blocks' gradients and writes gradients of tokens and weights.
        - `combine`: reads three branches and gates and writes the output. Its backward costs nothing but the gates and
          their gradients: the backward of a branch reads its output and `dout` anyway, and may take the gate beside it.
        - `nsa_attention`: the sum of its stages, which follow one another; `dense`: causal attention.
        """
        shapes, size = self.shapes(length), self.dtype.itemsize
        numbers = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
        lse = 4 * length * self.query_heads
        indices = 4 * length * self.kv_heads * self.config.num_selected_blocks
        pairs = self.pairs(length)

        def elements(*names: str) -> int:
            return size * sum(numbers[name] for name in names)

        out, costs = elements("out_slc"), {}
        for stage, kind, branch, chosen in (
            ("dense", "causal", "slc", 0),
            ("compressed_attention", "compressed_attention", "cmp", 0),
            ("selected_attention", "selected_attention", "slc", indices),
            ("sliding_window_attention", "sliding_window_attention", "win", 0),
        ):
            products, inputs = 2 * self.query_heads * pairs[kind], elements("q", f"k_{branch}", f"v_{branch}")
            forward = inputs + chosen + out + lse
            backward = forward + out + inputs
            costs[stage, "forward"] = Cost(products * (self.key_dim + self.value_dim), forward)
            costs[stage, "backward"] = Cost(products * (3 * self.key_dim + 2 * self.value_dim), backward)

        products = 2 * self.query_heads * pairs["compressed_attention"] * self.key_dim
        costs["select_blocks", "forward"] = Cost(products, elements("q", "k_cmp") + lse + indices)

        weights = [f"{name}_{part}" for name in "kv" for part in ("position", "weight", "weight_out")]
        blocks, tokens = elements("k_cmp", "v_cmp"), elements("k_slc", "v_slc")
        layers = sum(dim * dim for dim in (self.key_dim, self.value_dim)) * (self.config.compress_block_size + 1)
        products = 2 * self.config.num_compressed(length) * self.kv_heads * layers
        costs["compress", "forward"] = Cost(products, tokens + blocks + elements(*weights))
        costs["compress", "backward"] = Cost(2 * products, 2 * tokens + blocks + 2 * elements(*weights))

        costs["combine", "forward"] = Cost(0, 4 * out + elements("gates"))
        costs["combine", "backward"] = Cost(0, 2 * elements("gates"))

        for direction in ("forward", "backward"):
            parts = [costs[part, direction] for part in PARTS if (part, direction) in costs]
            costs["nsa_attention", direction] = Cost(sum(x.flops for x in parts), sum(x.bytes for x in parts))
        return costs

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
        costs = self.costs(length)
        parts = PARTS if stage == "nsa_attention" else (stage,)
        return sum(costs[part, direction].floor(roofs) for part in parts if (part, direction) in costs)


PARTS = ("compressed_attention", "select_blocks", "selected_attention", "sliding_window_attention", "combine")
"""The stages of `nsa_attention`, in their order."""

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("W", 64, 4, 128, 128),
        Workload("W4", 32, 8, 128, 128),
        Workload("W192", 64, 4, 192, 128),
        # What implementations can do that pool blocks of one size for all branches, as fla-core does.
        Workload("P", 64, 4, 128, 128, NSAConfig(64, 64, 64, 16, compression="mean")),
        # For machines without a GPU: at 256 tokens 4 selected blocks are all there are, at 1024 a quarter.
        Workload("tiny", 4, 2, 32, 32, NSAConfig(num_selected_blocks=4, window_size=128), torch.float32),
    )
}

CHOICES: dict[str, dict[str, int]] = {
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


def chosen(base: Workload, choice: str) -> Workload:
    """A workload with another choice of sizes and counts, and their name behind its own."""
    return replace(base, name=f"{base.name},{choice}", config=replace(base.config, **CHOICES[choice]))


def workload(name: str) -> Workload:
    """A workload by its name, with a choice or without."""
    base, _, choice = name.partition(",")
    return chosen(WORKLOADS[base], choice) if choice else WORKLOADS[base]
