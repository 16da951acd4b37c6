"""Context parallelism: attention over sequences of which every process holds a part.

Queries stay where they are, keys and values come from everywhere. A process holds one chunk of every sequence, or two
where the head-tail balancer pairs an early chunk, whose queries see little, with a late one. Its queries are then the
last of the first keys, chunk by chunk, which is what every stage takes: no kernel knows of it.

Compressed keys are made where their blocks begin. Blocks that reach into the next chunk need its first `l - d` tokens,
which are all that is exchanged of uncompressed keys of that branch. Keys and values of the other branches are gathered
for a few heads at a time.

Gathering sums the gradients of all processes, so keys and compressors get the same gradients as in one process.

Legend: `B` batch, `T` tokens of the whole sequence, `t` tokens of a process, `n` of a chunk, `H` heads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.nn.attention.bias import causal_lower_right

from nsa.backends import BackendName
from nsa.config import NSAConfig
from nsa.functional import nsa_attention

GATHERED_BYTES = 1 << 30
"""Of the keys and values gathered at a time; heads wait for their turn beyond that."""


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

    def gather(self, x: Tensor) -> Tensor:
        """The parts `[B, t, ...]` of all processes as whole sequences `[B, T, ...]`; gradients are summed."""
        size = self.mesh.size()
        ranks = DTensor.from_local(x.contiguous(), self.mesh, [Shard(0)], run_check=False)
        # `full_tensor` is short for this, and does not compile in PyTorch 2.11.
        parts = ranks.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()]).chunk(size)
        held = [chunk for rank in range(size) for chunk in self.chunks(rank)]
        pieces = [piece for part in parts for piece in part.chunk(len(held) // size, 1)]
        return torch.cat([pieces[held.index(chunk)] for chunk in range(self.num_chunks)], 1)

    def compress(self, compressor: Callable[[Tensor], Tensor], x: Tensor, config: NSAConfig) -> Tensor:
        """Compressed blocks `[B, C, H, D]` of whole sequences, from the part `x [B, t, H, D]` of this process.

        Chunks must be multiples of `d` and no shorter than `l - d`; `check_layout` asks for more.
        """
        mine = self.chunks(self.mesh.get_local_rank())
        chunks = torch.stack(x.chunk(len(mine), 1))  # [chunks of this process, B, n, H, D]
        reach = config.compress_block_size - config.compress_stride
        if reach:
            starts = self.gather(chunks[:, :, :reach].transpose(0, 1).flatten(1, 2))
            # Nothing follows the last chunk: blocks that reach beyond it are none, and are cut off below.
            starts = F.pad(starts.unflatten(1, (self.num_chunks, reach)), (0, 0, 0, 0, 0, 0, 0, 1))
            following = torch.stack([starts[:, chunk + 1] for chunk in mine])
            chunks = torch.cat((chunks, following), 2)
        blocks = compressor(chunks.flatten(0, 1)).unflatten(0, (len(mine), -1))
        whole = self.gather(blocks.transpose(0, 1).flatten(1, 2))
        return whole[:, : config.num_compressed(x.shape[1] * self.mesh.size())]

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
            whole = [self.gather(x) for x in few_keys]
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


def dense_attention_over(context: ContextParallel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense causal attention `[B, t, H, D]` of the tokens of this process over whole sequences."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = causal_lower_right(q.shape[1], k.shape[1])
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)

    return context.attend(attention, (q,), (k, v))
