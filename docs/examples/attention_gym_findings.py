"""What the suite found in attn_gym 0.0.17, each finding alone: `python docs/examples/attention_gym_findings.py`.

Needs PyTorch and attn_gym; all of it is seen on a CPU, in the implementation called `reference`.
"""

import torch
from attn_gym.masks import generate_sliding_window
from attn_gym.sparse import gather_attn
from torch import Tensor

TOKENS = 704


def attend(q: Tensor, kv: Tensor, indices: Tensor, **options: object) -> Tensor:
    """Attention of `q [1, H, T, D]` to the listed ones of `kv [1, 1, T, D]`, keys and values in one, without window."""
    return gather_attn(q, torch.zeros_like(kv), kv, indices, sliding_window_size=0, impl="reference", **options)


def causal(tokens: int) -> Tensor:
    """Indices `[1, T, T]` of the tokens that every query sees."""
    tokens_before = torch.arange(tokens).expand(tokens, -1)
    return tokens_before.where(tokens_before <= torch.arange(tokens)[:, None], -1)[None]


def gradient_of_the_first_value(dtype: torch.dtype, packed: bool) -> None:
    """A sum over queries: with equal logits, the first value has the weights 1, 1/2, 1/3 and so on."""
    offsets = torch.tensor([0, TOKENS], dtype=torch.int32)
    packing = {"cu_seqlens": offsets, "cu_seqlens_k": offsets} if packed else {}
    kv = torch.zeros(1, 1, TOKENS, 16, dtype=dtype, requires_grad=True)
    out = attend(torch.zeros(1, 1, TOKENS, 16, dtype=dtype), kv, causal(TOKENS), **packing)
    (gradient,) = torch.autograd.grad(out, kv, torch.ones_like(out))
    exact = (1 / torch.arange(1, TOKENS + 1).double()).sum().item()
    name = f"{'packed' if packed else 'not packed'}, {str(dtype).removeprefix('torch.')}"
    print(f"{name}: gradient of the first value {gradient[0, 0, 0, 0].item():.4g}, exactly {exact:.4g}")


def under_autocast(dtype: torch.dtype) -> None:
    """How far from the definition the output is, with autocast and without; inputs are narrow in both."""
    q, kv = (torch.randn(1, heads, TOKENS, 64).mul(3).to(dtype) for heads in (4, 1))
    logits = (q.double() @ kv.double().mT) * 64**-0.5
    unseen = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    exact = logits.masked_fill(unseen, -torch.inf).softmax(-1) @ kv.double()
    plain = (attend(q, kv, causal(TOKENS)).double() - exact).abs().max().item()
    with torch.autocast("cpu", dtype):
        cast = (attend(q, kv, causal(TOKENS)).double() - exact).abs().max().item()
    largest = exact.abs().max().item()
    name = str(dtype).removeprefix("torch.")
    print(f"{name}: off by {plain / largest:.2%} of the largest, under autocast by {cast / largest:.2%}")


def scaled_by(scale: float) -> None:
    """Says whether a scale of the logits is taken or refused."""
    ones = torch.ones(1, 1, 4, 16)
    try:
        attend(ones, ones, causal(4), scale=scale)
        answer = "taken"
    except ValueError as error:
        answer = f"refused: {error}"
    print(f"scale = {scale}: {answer}")


def tokens_in_a_window(size: int) -> None:
    """How many tokens the last of 32 queries sees in windows of one size."""
    values = torch.eye(32)[None, None]
    nothing = torch.empty(1, 32, 0, dtype=torch.int32)
    zeros = torch.zeros(1, 1, 32, 32)
    out = gather_attn(zeros, values, values[:, :, :0], nothing, sliding_window_size=size, impl="reference")
    zero = torch.tensor(0)
    seen = generate_sliding_window(size)(zero, zero, torch.tensor(31), torch.arange(32))
    print(f"window of {size}: {(out[0, 0, -1] > 0).sum().item()} in gather_attn, {seen.sum().item()} in the mask")


if __name__ == "__main__":
    torch.manual_seed(0)
    for dtype in (torch.float16, torch.bfloat16):
        for packed in (False, True):
            gradient_of_the_first_value(dtype, packed)
    for dtype in (torch.float16, torch.bfloat16):
        under_autocast(dtype)
    for scale in (0.7, 0.0, -0.7):
        scaled_by(scale)
    tokens_in_a_window(4)
