"""Dense attention as llama3 has it, with documents on a CPU, caches and NSA's context parallelism."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torchtitan.models.attention import VarlenAttentionWrapper, VarlenMetadata
from torchtitan.models.llama3.model.model import Attention as LlamaAttention
from torchtitan.models.llama3.model.model import apply_rotary_emb

from nsa.cache import DenseCache
from nsa.config import integer
from nsa.decode import dense_decode_attention
from nsa.stores import computed_dtype
from nsa.titan.context import ContextParallel, dense_attention_over
from nsa.varlen import PackedSequences


class Documents(NamedTuple):
    """The documents of a batch as layers take them: TorchTitan's for dense ones, tables for those of NSA."""

    masks: VarlenMetadata
    packed: PackedSequences


class DenseAttention(LlamaAttention):
    """llama3's attention, with caches and NSA's context parallelism: TorchTitan's needs a GPU."""

    context: ContextParallel | None = None

    def make_cache(self, batch: int, capacity: int, *, spare: int = 0, dtype: torch.dtype | None = None) -> DenseCache:
        """A cache for this layer, as `NativeSparseAttention.make_cache` makes one. Any token can be taken back."""
        integer("spare", spare, 0)
        weight = self.wk.weight
        sizes = (batch, capacity, self.n_kv_heads, self.head_dim)
        return DenseCache(*sizes, dtype=dtype or computed_dtype(weight), device=weight.device)

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of `x [B, T, dim]`, `[B, T, H, D]`."""
        projected = (project(x) for project in (self.wq, self.wk, self.wv))
        return tuple(y.unflatten(-1, (y.shape[-1] // self.head_dim, self.head_dim)) for y in projected)

    @torch.no_grad()
    def _attend_cached(self, x: Tensor, freqs_cis: Tensor, cache: DenseCache) -> Tensor:
        """Attention of tokens that continue the sequences of a cache."""
        q, k, v = self._project(x)
        cache.check_room(*x.shape[:2])
        cache.check_like(k)
        if x.shape[1] == 1:
            query, key = apply_rotary_emb(q, k, freqs_cis, cache.lengths_on_device()[:, None])
            return self.wo(dense_decode_attention(query, *cache.step(key, v)).flatten(2))
        parts = []
        for rows in cache.runs_of_equal_length():
            first = cache.lengths[rows.start]
            position = torch.arange(first, first + x.shape[1], device=x.device)
            query, key = apply_rotary_emb(q[rows], k[rows], freqs_cis, position.expand(q[rows].shape[0], -1))
            keys, values = cache.append(rows, key, v[rows])
            mask = causal_lower_right(query.shape[1], keys.shape[1])  # of which FlashAttention makes no tensor
            query, keys, values = (y.transpose(1, 2) for y in (query, keys, values))
            out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)
            parts.append(out.transpose(1, 2))
        return self.wo(torch.cat(parts).flatten(2))

    def forward(
        self,
        x: Tensor,
        freqs_cis: Tensor,
        attention_masks: Any,
        positions: Tensor | None = None,
        cache: DenseCache | None = None,
    ) -> Tensor:
        if cache is not None:
            return self._attend_cached(x, freqs_cis, cache)
        if self.context is None:
            masks = attention_masks.masks if isinstance(attention_masks, Documents) else attention_masks
            return super().forward(x, freqs_cis, masks, positions)
        q, k, v = self._project(x)
        q, k = apply_rotary_emb(q, k, freqs_cis, positions)
        return self.wo(dense_attention_over(self.context, q, k, v).flatten(2))


class DocumentAttention(VarlenAttentionWrapper):
    """Dense attention inside packed documents, on a CPU too, where PyTorch has no variable-length kernel."""

    def forward(self, xq: Tensor, xk: Tensor, xv: Tensor, attention_masks: VarlenMetadata, **kwargs: Any) -> Tensor:
        """Queries `[B, Hq, T, D]` over keys and values `[B, Hk, T, D]` to `[B * T, Hq, D]`."""
        if xq.device.type != "cpu":
            return super().forward(xq, xk, xv, attention_masks, **kwargs)
        batch, _, length, _ = xq.shape
        token = torch.arange(batch * length, device=xq.device)
        document = torch.searchsorted(attention_masks.cu_seq_q.long(), token, right=True).view(batch, 1, length)
        mask = (document.unsqueeze(-1) == document.unsqueeze(-2)).tril()
        out = F.scaled_dot_product_attention(xq, xk, xv, attn_mask=mask, enable_gqa=True, **kwargs)
        return out.transpose(1, 2).flatten(0, 1)
