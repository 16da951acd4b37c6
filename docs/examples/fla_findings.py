"""What the suite found in fla-core 0.6.0, each finding alone: `python docs/examples/fla_findings.py`.

Needs a GPU, PyTorch and fla-core. References are written out in float64.
"""

import warnings

import torch
from torch import Tensor

warnings.simplefilter("ignore")
from fla.ops.nsa import parallel  # noqa: E402 (it warns while it is imported)
from fla.ops.nsa.compression import parallel_nsa_compression  # noqa: E402

SIZE, GROUP = 32, 16
"""Tokens a block; query heads, all of one KV head."""


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def error(actual: Tensor, expected: Tensor) -> str:
    """Largest difference, and what that is of the largest value."""
    difference = (actual.double() - expected.double()).abs().max().item()
    return f"{difference:.3g} ({difference / expected.double().abs().max().item():.1%} of the largest)"


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Attention of `q [1, T, H, K]` over what each query sees of `k, v [1, S, 1, D]`, `seen [T, S]`; 0 if nothing."""
    logits = torch.einsum("bthd,bskd->bhts", q, k) * scale
    p = logits.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhts,bskd->bthd", p, v)


def compressed_gradient(value_dim: int, tokens: int = 256) -> None:
    """dq of compressed attention, against autograd of the definition."""
    blocks = tokens // SIZE
    q, k, v = normal(1, tokens, GROUP, 64), normal(1, blocks, 1, 64), normal(1, blocks, 1, value_dim)
    cotangent = normal(1, tokens, GROUP, value_dim)
    leaf, exact = q.clone().requires_grad_(), q.double().requires_grad_()
    out, _ = parallel_nsa_compression(leaf, k, v, tokens, SIZE, 64**-0.5)
    out.backward(cotangent)
    seen = torch.arange(tokens, device="cuda")[:, None] + 1 >= SIZE * (torch.arange(blocks, device="cuda") + 1)
    reference = attend(exact, k.double(), v.double(), seen, 64**-0.5)
    reference.backward(cotangent.double())
    print(f"Dv = {value_dim}: output off by {error(out, reference)}, dq by {error(leaf.grad, exact.grad)}")


def chosen_blocks(counts: int, tokens: int = 512) -> None:
    """How many blocks a query attends to, and whether gradients are those of the output."""
    q, k, v = normal(1, tokens, GROUP, 64), normal(1, tokens, 1, 64), normal(1, tokens, 1, 64)
    ones = torch.ones(1, tokens, GROUP, device="cuda", dtype=q.dtype)
    # Values that say which block they are of: the output of a query has a part of each block it attends to.
    block = torch.arange(tokens, device="cuda") // SIZE
    v[0, :, 0] = torch.nn.functional.one_hot(block, 64).to(v.dtype)
    leaf = v.clone().requires_grad_()
    out = parallel.parallel_nsa(q, k, leaf, 0 * ones, ones, None, block_counts=counts, block_size=SIZE, scale=64**-0.5)
    attended = (out[0, -1] > 0).any(0).sum().item()
    cotangent = normal(*out.shape)
    out.backward(cotangent)
    # The output is linear in v: along v itself the directional derivative is the output's own product.
    slope, gradient = (out.double() * cotangent.double()).sum(), (leaf.grad.double() * v.double()).sum()
    products = f"<out, do> = {slope:.4g}, <v, dv> = {gradient:.4g}"
    print(f"block_counts = {counts}: {attended} blocks in the output; {products}")


def window_scale() -> None:
    """What the window branch is told of the scale."""
    seen = {}

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        seen.update(options)
        return torch.zeros_like(q)

    parallel.flash_attn_func = flash_attn_func
    q, k = normal(1, 64, GROUP, 64), normal(1, 64, 1, 64)
    ones = torch.ones(1, 64, GROUP, device="cuda", dtype=q.dtype)
    parallel.parallel_nsa(q, k, k, ones, ones, ones, block_counts=4, block_size=SIZE, window_size=16, scale=0.5)
    print(f"scale = 0.5: flash_attn_func was called with {seen}")


def underflow(tokens: int = 160) -> None:
    """Blocks of the last query where one block has all the importance; all there are fit into the slots."""
    blocks = tokens // SIZE
    q, k = normal(1, tokens, GROUP, 64).sign(), torch.zeros(1, blocks, 1, 64, device="cuda", dtype=torch.bfloat16)
    k[0, 0, 0] = 50 * q[0, -1, 0]
    q[:, -1] = q[:, -1, :1]
    _, lse = parallel_nsa_compression(q, k, k, tokens, SIZE, 1.0)
    indices = parallel.parallel_nsa_topk(q, k, tokens, lse, 8, SIZE, 1.0)
    print(f"{blocks} blocks, 8 slots: {sorted(indices[0, -1, 0].tolist())}")


if __name__ == "__main__":
    torch.manual_seed(0)
    for dim in (64, 128, 192, 256):
        compressed_gradient(dim)
    for count in (2, 3, 4, 5, 8):
        chosen_blocks(count)
    window_scale()
    underflow()
