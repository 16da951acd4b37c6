"""Context parallelism: attention over sequences of which every process holds a part.

Queries stay where they are, keys and values come from everywhere. A process holds one chunk of every sequence, or two
where the head-tail balancer pairs an early chunk, whose queries see little, with a late one. Its queries are then the
last of the first keys, chunk by chunk, which is what every stage takes: no kernel knows of it.

Compressed keys are made where their blocks begin. Blocks that reach into the next chunk need its first `l - d` tokens,
which are all that is exchanged of uncompressed keys of that branch. Keys and values of the other branches are gathered
for a few heads at a time. What is gathered at one time is one exchange: each costs the host more than the GPU.

Gathering sums the gradients of all processes, so keys and compressors get the same gradients as in one process.

Legend: `B` batch, `T` tokens of the whole sequence, `t` tokens of a process, `n` of a chunk, `H` heads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention.bias import causal_lower_right

from nsa.backends import BackendName
from nsa.config import NSAConfig
from nsa.functional import apply_rope, nsa_attention
from nsa.module import NativeSparseAttention

GATHERED_BYTES = 1 << 30
"""Of the keys and values gathered at a time; heads wait for their turn beyond that."""


class _AllGather(torch.autograd.Function):
    """The tensors of all processes one behind another; the gradient is the sum of what all processes have for it.

    The operators are those behind `torch.distributed`'s functional collectives, whose names differ between releases;
    compilers know them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, group: str) -> Tensor:
        ctx.size, ctx.group = size, group
        collectives = torch.ops._c10d_functional
        return collectives.wait_tensor(collectives.all_gather_into_tensor(x.contiguous(), size, group))

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
        collectives = torch.ops._c10d_functional
        scattered = collectives.reduce_scatter_tensor(dout.contiguous(), "sum", ctx.size, ctx.group)
        return collectives.wait_tensor(scattered), None, None


@dataclass(frozen=True)
class ContextParallel:
    """How sequences are shared out among the processes of a mesh.

    Attributes:
        mesh: one-dimensional.
        balanced: process `r` of `w` holds chunks `r` and `2w - 1 - r` of `2w`, instead of chunk `r` of `w`.
    """

    mesh: DeviceMesh
    balanced: bool

    @property
    def num_chunks(self) -> int:
        """Of a whole sequence."""
        return self.mesh.size() * (2 if self.balanced else 1)

    def chunks(self, rank: int) -> tuple[int, ...]:
        """Numbers of the chunks that process `rank` holds, in the order in which it holds them."""
        return (rank, self.num_chunks - 1 - rank) if self.balanced else (rank,)

    def positions(self, x: Tensor) -> Tensor:
        """Positions `[t]` of the tokens `x [B, t, ...]` of this process in their sequence."""
        mine = self.chunks(self.mesh.get_local_rank())
        length = x.shape[1] // len(mine)
        return torch.cat([torch.arange(length, device=x.device) + chunk * length for chunk in mine])

    def gather(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Whole sequences `[B, T, ...]` of one dtype from the parts `[B, t, ...]` of all processes, in one exchange.

        Gradients are summed.
        """
        rows = [part.flatten(2) for part in parts]
        size = self.mesh.size()
        ranks = _AllGather.apply(torch.cat(rows, 2), size, self.mesh.get_group().group_name).chunk(size)
        held = [chunk for rank in range(size) for chunk in self.chunks(rank)]
        pieces = [piece for rank in ranks for piece in rank.chunk(len(held) // size, 1)]
        whole = torch.cat([pieces[held.index(chunk)] for chunk in range(self.num_chunks)], 1)
        widths = [row.shape[2] for row in rows]
        shapes = [part.shape[2:] for part in parts]
        return tuple(x.unflatten(2, shape) for x, shape in zip(whole.split(widths, 2), shapes, strict=True))

    def compress(
        self, compressor: Callable[[Tensor, Tensor], tuple[Tensor, ...]], k: Tensor, v: Tensor, config: NSAConfig
    ) -> tuple[Tensor, ...]:
        """Compressed blocks `[B, C, H, D]` of whole sequences, from the parts `[B, t, H, D]` of this process.

        Chunks must be multiples of `d` and no shorter than `l - d`; `check_layout` asks for more.
        """
        mine = self.chunks(self.mesh.get_local_rank())
        both = [torch.stack(x.chunk(len(mine), 1)) for x in (k, v)]  # [chunks of this process, B, n, H, D]
        reach = config.compress_block_size - config.compress_stride
        if reach:
            starts = self.gather(*(chunks[:, :, :reach].transpose(0, 1).flatten(1, 2) for chunks in both))
            both = [torch.cat((x, self._following(y, reach)), 2) for x, y in zip(both, starts, strict=True)]
        blocks = compressor(*(chunks.flatten(0, 1) for chunks in both))
        whole = self.gather(*(x.unflatten(0, (len(mine), -1)).transpose(0, 1).flatten(1, 2) for x in blocks))
        count = config.num_compressed(k.shape[1] * self.mesh.size())
        return tuple(x[:, :count] for x in whole)

    def _following(self, starts: Tensor, reach: int) -> Tensor:
        """First tokens of the chunks behind those of this process, from those `[B, chunks * reach, H, D]` of all."""
        # Nothing follows the last chunk: blocks that reach beyond it are none, and are cut off afterwards.
        starts = F.pad(starts.unflatten(1, (self.num_chunks, reach)), (0, 0, 0, 0, 0, 0, 0, 1))
        return torch.stack([starts[:, chunk + 1] for chunk in self.chunks(self.mesh.get_local_rank())])

    def attend(
        self,
        attention: Callable[..., Tensor],
        queries: Sequence[Tensor],
        keys: Sequence[Tensor],
        compressed: Sequence[Tensor] = (),
    ) -> Tensor:
        """Attention of this process's tokens over whole sequences.

        Args:
            attention: called with chunks `[B, n, Hq, ...]` of `queries`, with `compressed` as it is and with the first
                `Tk` tokens of the gathered `keys`, of which the last are those of the chunk; returns `[B, n, Hq, D]`.
            queries: `[B, t, Hq, ...]`, parts of this process.
            keys: `[B, t, Hk, ...]`, parts of this process.
            compressed: `[B, C, Hk, D]`, of whole sequences.

        Returns:
            `[B, t, Hq, D]`, the part of this process.
        """
        mine, heads = self.chunks(self.mesh.get_local_rank()), keys[0].shape[2]
        total = sum(x.numel() * x.element_size() for x in keys) * self.mesh.size()
        turns = next((n for n in range(1, heads) if heads % n == 0 and total <= n * GATHERED_BYTES), heads)
        outs = []
        for turn in range(turns):
            few_queries, few_keys, blocks = (
                [x.chunk(turns, 2)[turn] for x in xs] for xs in (queries, keys, compressed)
            )
            whole = self.gather(*few_keys)
            parts = zip(*(x.chunk(len(mine), 1) for x in few_queries), strict=True)
            ends = [(chunk + 1) * (whole[0].shape[1] // self.num_chunks) for chunk in mine]
            seen = ([x[:, :end] for x in whole] for end in ends)
            outs.append(torch.cat([attention(*part, *blocks, *ks) for part, ks in zip(parts, seen, strict=True)], 1))
        return torch.cat(outs, 2)


def nsa_attention_over(
    context: ContextParallel,
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    config: NSAConfig,
    *,
    backend: BackendName = "auto",
) -> Tensor:
    """`nsa_attention` where `k_cmp` and `v_cmp` are of whole sequences, all else parts of this process."""

    def attention(q: Tensor, gates: Tensor, k_cmp: Tensor, v_cmp: Tensor, *keys: Tensor) -> Tensor:
        count = config.num_compressed(keys[0].shape[1])
        k_slc, v_slc, k_win, v_win = keys
        k_cmp, v_cmp = k_cmp[:, :count], v_cmp[:, :count]
        out = nsa_attention(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, config, backend=backend)
        assert isinstance(out, Tensor)  # no indices were asked for
        return out

    return context.attend(attention, (q, gates), (k_slc, v_slc, k_win, v_win), (k_cmp, v_cmp))


def attend_over(
    layer: NativeSparseAttention, context: ContextParallel, x: Tensor, rope: Tensor, positions: Tensor
) -> Tensor:
    """`layer.attend` of the tokens `x [B, t, dim]` at `positions [t]` over the whole sequences they are part of."""
    q, (k_cmp, k_slc, k_win), (v_cmp, v_slc, v_win), gates = layer.project(x)
    k_cmp, v_cmp = context.compress(layer.compress, k_cmp, v_cmp, layer.config)
    kind: dict[str, Any] = {"interleaved": layer.rope_interleaved, "backend": layer.backend}
    tensors = (q, k_cmp, k_slc, k_win)
    q, k_cmp, k_slc, k_win = apply_rope(*tensors, rope, layer.config, positions=positions, **kind)
    inputs = (q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates)
    return nsa_attention_over(context, *inputs, layer.config, backend=layer.backend).flatten(2)


def dense_attention_over(context: ContextParallel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense causal attention `[B, t, H, D]` of the tokens of this process over whole sequences."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = causal_lower_right(q.shape[1], k.shape[1])
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)

    return context.attend(attention, (q,), (k, v))
