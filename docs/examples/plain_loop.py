"""Train a model of one's own with the layer, without TorchTitan: docs/integrate.md.

python docs/examples/plain_loop.py
"""

import torch
from torch import Tensor, nn

from nsa import NativeSparseAttention, NSAConfig, rope_table


class Model(nn.Module):
    """One layer of attention between an embedding and a projection: logits `[B, T, vocabulary]`."""

    def __init__(self, vocabulary: int, dim: int, length: int):
        super().__init__()
        sizes = NSAConfig(
            compress_block_size=8, compress_stride=4, select_block_size=8, num_selected_blocks=4, window_size=16
        )
        self.embed, self.norm = nn.Embedding(vocabulary, dim), nn.RMSNorm(dim)
        self.attention = NativeSparseAttention(dim, num_heads=4, num_kv_heads=2, config=sizes)
        self.head = nn.Linear(dim, vocabulary)
        self.register_buffer("rope", rope_table(length, dim // 4), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head(x + self.attention(self.norm(x), self.rope))


def train(steps: int = 30) -> list[float]:
    """Losses of learning one text by heart."""
    torch.manual_seed(0)
    text = torch.tensor(list(b"the quick brown fox jumps over the lazy dog. " * 3))[None, :129]
    model = Model(vocabulary=256, dim=32, length=128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print("loss from {:.2f} to {:.2f}".format(*(train()[i] for i in (0, -1))))
