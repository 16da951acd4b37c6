"""Context parallelism: attention over sequences of which every process holds a part.

Queries stay where they are, keys and values come from everywhere. A process holds one chunk of every sequence, or two
where the head-tail balancer pairs an early chunk, whose queries see little, with a late one. Its queries are then the
last of the first keys, chunk by chunk, which is what every stage takes: no kernel knows of it.

Compressed keys are made, and rotated, where their blocks begin. Blocks that reach into the next chunk need its first
`l - d` tokens, which are all that is exchanged of uncompressed keys of that branch. Blocks, and keys and values of the
other branches, are gathered for a few heads at a time. What is gathered at one time is one exchange, and one node of
the graph: each costs the host more than the GPU.

Gathering sums the gradients of all processes, so keys and compressors get the same gradients as in one process.

Legend: `B` batch, `T` tokens of the whole sequence, `t` tokens of a process, `n` of a chunk, `H` heads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
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


class _Gather(torch.autograd.Function):
    """Spans of whole sequences, made of what all processes have; gradients are the sums over all processes.

    The collectives are the operators behind `torch.distributed`'s functional ones, whose names differ between releases;
    compilers know them.
    """

    @staticmethod
    def forward(
        ctx: Any, group: str, chunks: tuple[tuple[int, ...], ...], spans: tuple[tuple[int, int], ...], *parts: Tensor
    ) -> tuple[Tensor, ...]:
        """The rows `spans` of every one of `parts [B, t, ...]`, span by span, where `chunks` has those of each rank.

        Rows beyond the end of a sequence are 0.
        """
        ctx.group, ctx.chunks, ctx.spans, ctx.count = group, chunks, spans, len(parts)
        collectives, size = torch.ops._c10d_functional, len(chunks)
        widths = [prod(part.shape[2:]) for part in parts]
        mine = torch.cat([part.flatten(2) for part in parts], 2)
        ctx.length = length = size * mine.shape[1]
        ranks = collectives.wait_tensor(collectives.all_gather_into_tensor(mine, size, group)).chunk(size)
        pieces = [piece for rank in ranks for piece in rank.chunk(len(chunks[0]), 1)]
        held = [chunk for of_rank in chunks for chunk in of_rank]
        ordered = [pieces[held.index(chunk)] for chunk in range(len(held))]
        beyond = max(stop for _, stop in spans) - length
        if beyond > 0:
            ordered.append(mine.new_zeros(mine.shape[0], beyond, mine.shape[2]))
        columns = zip(torch.cat(ordered, 1).split(widths, 2), parts, strict=True)
        wholes = [x.unflatten(2, part.shape[2:]) for x, part in columns]
        return tuple(x[:, start:stop] for start, stop in spans for x in wholes)

    @staticmethod
    def backward(ctx: Any, *douts: Tensor) -> tuple[Any, ...]:
        collectives, size = torch.ops._c10d_functional, len(ctx.chunks)
        of_spans = [douts[i : i + ctx.count] for i in range(0, len(douts), ctx.count)]
        # The longest span first, to which others are added.
        by_length = sorted(zip(ctx.spans, of_spans, strict=True), key=lambda x: x[0][0] - x[0][1])
        whole = None
        for (start, stop), gradients in by_length:
            rows = torch.cat([x.flatten(2) for x in gradients], 2)
            if stop > ctx.length:
                stop = max(start, ctx.length)
                rows = rows[:, : stop - start]
            if whole is None:
                ends = (start, ctx.length - stop)
                whole = F.pad(rows, (0, 0, *ends)) if any(ends) else rows
            elif start < stop:
                whole[:, start:stop] += rows
        assert whole is not None
        pieces = whole.chunk(sum(map(len, ctx.chunks)), 1)
        ordered = torch.cat([pieces[chunk] for of_rank in ctx.chunks for chunk in of_rank], 1)
        ranks = ordered.unflatten(1, (size, -1)).transpose(0, 1).flatten(0, 1).contiguous()
        summed = collectives.wait_tensor(collectives.reduce_scatter_tensor(ranks, "sum", size, ctx.group))
        parts = summed.split([prod(x.shape[2:]) for x in of_spans[0]], 2)
        shapes = [x.shape[2:] for x in of_spans[0]]
        return None, None, None, *(x.unflatten(2, shape) for x, shape in zip(parts, shapes, strict=True))


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
        mine = self.mine
        length = x.shape[1] // len(mine)
        return torch.cat([torch.arange(length, device=x.device) + chunk * length for chunk in mine])

    @property
    def mine(self) -> tuple[int, ...]:
        """Numbers of the chunks of this process."""
        return self.chunks(self.mesh.get_local_rank())

    def gather(self, spans: Sequence[tuple[int, int]], *parts: Tensor) -> list[tuple[Tensor, ...]]:
        """Rows `[start, stop)` of whole sequences `[B, T, ...]` of one dtype, for every span, in one exchange.

        Rows beyond `T` are 0. Gradients of spans and processes are summed.

        Args:
            spans: none of them empty.
            parts: `[B, t, ...]` of this process.

        Returns:
            For each span the rows of every one of `parts`.
        """
        ranks = tuple(self.chunks(rank) for rank in range(self.mesh.size()))
        found = _Gather.apply(self.mesh.get_group().group_name, ranks, tuple(spans), *parts)
        return [found[i : i + len(parts)] for i in range(0, len(found), len(parts))]

    def compress(
        self, compressor: Callable[[Tensor, Tensor], tuple[Tensor, ...]], k: Tensor, v: Tensor, config: NSAConfig
    ) -> tuple[Tensor, ...]:
        """Compressed blocks `[B, t / d, H, D]` that begin in the parts `k` and `v [B, t, H, D]` of this process.

        Chunks must be multiples of `d` and no shorter than `l - d`; `check_layout` asks for more. Blocks that reach
        beyond the end of a sequence are none; they come last of it, for who gathers to leave out.
        """
        chunks = len(self.mine)
        both = [x.unflatten(1, (chunks, -1)) for x in (k, v)]
        reach = config.compress_block_size - config.compress_stride
        if reach:
            starts = [x[:, :, :reach].flatten(1, 2) for x in both]
            spans = [((chunk + 1) * reach, (chunk + 2) * reach) for chunk in self.mine]
            following = zip(*self.gather(spans, *starts), strict=True)
            both = [torch.cat((x, torch.stack(after, 1)), 2) for x, after in zip(both, following, strict=True)]
        blocks = compressor(*(x.flatten(0, 1) for x in both))
        return tuple(x.unflatten(0, (-1, chunks)).flatten(1, 2) for x in blocks)

    def attend(
        self,
        attention: Callable[..., Tensor],
        queries: Sequence[Tensor],
        keys: Sequence[Tensor],
        blocks: Sequence[Tensor] = (),
        count: Callable[[int], int] = lambda tokens: tokens,
    ) -> Tensor:
        """Attention of this process's tokens over whole sequences.

        Args:
            attention: called with chunks `[B, n, Hq, ...]` of `queries`, with the first `count(Tk)` of the gathered
                `blocks` and with the first `Tk` tokens of the gathered `keys`, of which the last are those of the
                chunk; returns `[B, n, Hq, D]`.
            queries: `[B, t, Hq, ...]`, parts of this process.
            keys: `[B, t, Hk, ...]`, parts of this process.
            blocks: `[B, t / d, Hk, ...]`, likewise.
            count: blocks of the first tokens of a sequence.

        Returns:
            `[B, t, Hq, D]`, the part of this process.
        """
        mine, heads = self.mine, keys[0].shape[2]
        total = sum(x.numel() * x.element_size() for x in keys) * self.mesh.size()
        turns = next((n for n in range(1, heads) if heads % n == 0 and total <= n * GATHERED_BYTES), heads)
        ends = [(chunk + 1) * (keys[0].shape[1] // len(mine)) for chunk in mine]
        outs = []
        for turn in range(turns):
            few_queries, few_keys, few_blocks = (
                [x.chunk(turns, 2)[turn] for x in xs] if turns > 1 else xs for xs in (queries, keys, blocks)
            )
            parts = zip(*(x.chunk(len(mine), 1) for x in few_queries), strict=True)
            seen = self.gather([(0, end) for end in ends], *few_keys)
            seen_blocks = self.gather([(0, count(end)) for end in ends], *few_blocks) if blocks else [()] * len(ends)
            each = zip(parts, seen_blocks, seen, strict=True)
            outs.append(torch.cat([attention(*part, *bs, *ks) for part, bs, ks in each], 1))
        return torch.cat(outs, 2) if turns > 1 else outs[0]


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
    """`nsa_attention` of parts of this process; `k_cmp` and `v_cmp` are blocks that begin in them."""

    def attention(q: Tensor, gates: Tensor, k_cmp: Tensor, v_cmp: Tensor, *keys: Tensor) -> Tensor:
        k_slc, v_slc, k_win, v_win = keys
        out = nsa_attention(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, config, backend=backend)
        assert isinstance(out, Tensor)  # no indices were asked for
        return out

    return context.attend(attention, (q, gates), (k_slc, v_slc, k_win, v_win), (k_cmp, v_cmp), config.num_compressed)


def attend_over(
    layer: NativeSparseAttention, context: ContextParallel, x: Tensor, rope: Tensor, positions: Tensor
) -> Tensor:
    """`layer.attend` of the tokens `x [B, t, dim]` at `positions [t]` over the whole sequences they are part of."""
    q, (k_cmp, k_slc, k_win), (v_cmp, v_slc, v_win), gates = layer.project(x)
    k_cmp, v_cmp = context.compress(layer.compress, k_cmp, v_cmp, layer.config)
    q, k_cmp, k_slc, k_win = apply_rope(
        q,
        k_cmp,
        k_slc,
        k_win,
        rope,
        layer.config,
        positions=positions,
        # A block begins at every `d`-th token.
        block_positions=positions[:: layer.config.compress_stride].contiguous(),
        interleaved=layer.rope_interleaved,
        backend=layer.backend,
    )
    inputs = (q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates)
    return nsa_attention_over(context, *inputs, layer.config, backend=layer.backend).flatten(2)


def dense_attention_over(context: ContextParallel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense causal attention `[B, t, H, D]` of the tokens of this process over whole sequences."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = causal_lower_right(q.shape[1], k.shape[1])
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)

    return context.attend(attention, (q,), (k, v))
