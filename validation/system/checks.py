"""What must hold of a layer while it trains, beyond the length it was trained on, and while it generates.

Each check compares with the oracle's layer in float64, over many calls of the same layer where unit tests make one.
Mistakes that these find are in `mutants.py`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from nsa import NativeSparseAttention, NSAConfig, rope_table
from validation import numerics, oracle

CONFIG = NSAConfig(8, 4, 8, 4, 1, 1, 12)
DIM, HEADS, KV_HEADS = 32, 4, 2
TRAINED = 48
"""Tokens of a sequence of training. A query can leave blocks out."""


def layer() -> NativeSparseAttention:
    """A layer whose selection matters: weights large enough for probabilities that are far from equal."""
    made = NativeSparseAttention(DIM, HEADS, KV_HEADS, config=CONFIG, backend="eager").double()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith(("wq.weight", "wk.weight", "wv.weight", "wg.weight")):
                parameter.normal_(std=DIM**-0.5)
    return made


def rope(length: int) -> Tensor:
    return rope_table(length, DIM // HEADS)


def expected(of: NativeSparseAttention, x: Tensor) -> Tensor:
    """The oracle's output of a layer as it is now."""
    weights = {name: weight.detach() for name, weight in of.state_dict().items()}
    sizes: dict[str, Any] = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": DIM // HEADS}
    return oracle.native_sparse_attention(x, weights, CONFIG, rope=rope(x.shape[1]), **sizes)


def assert_right(of: NativeSparseAttention, x: Tensor, what: str) -> None:
    out = of(x, rope(x.shape[1])).detach()
    numerics.assert_matches(out, expected(of, x), what=what, reduction=x.shape[1])


def rows(length: int, seed: int) -> Tensor:
    return torch.randn(2, length, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def both_modes() -> None:
    """A layer computes the same in training and in evaluation: there is no dropout in it."""
    made, x = layer(), rows(TRAINED, 1)
    for mode in (True, False):
        assert_right(made.train(mode), x, f"output of a layer in {'training' if mode else 'evaluation'}")


def fresh_selection() -> None:
    """Nothing of a step stays for the next one: other rows get the blocks that they would get alone."""
    made = layer()
    for step in range(3):
        assert_right(made, rows(TRAINED, step), f"output of step {step}")


STEPS = 110


def all_learn() -> None:
    """Every parameter has a gradient in every step, however many there were before."""
    made, x, target = layer(), rows(TRAINED, 1)[:1, :24], rows(TRAINED, 2)[:1, :24]
    optimizer = torch.optim.SGD(made.parameters(), lr=1e-3)
    for step in range(STEPS):
        optimizer.zero_grad()
        (made(x, rope(24)) - target).square().mean().backward()
        still = [name for name, p in made.named_parameters() if p.grad is None or not p.grad.any()]
        assert not still, f"without a gradient in step {step}: {', '.join(still)}"
        optimizer.step()


def longer() -> None:
    """Sequences beyond the length of training are computed by the same rules."""
    made = layer()
    for times in (1, 2, 4):
        assert_right(made, rows(times * TRAINED, times), f"output at {times} times the length of training")


def generation() -> None:
    """Token by token with a cache, past the window and past the length of training, as all at once."""
    made, length = layer(), TRAINED + 2 * CONFIG.window_size
    x = rows(length, 1)
    cache = made.make_cache(2, length)
    table = rope(length)
    parts = [made(x[:, :TRAINED], table, cache=cache)]
    parts += [made(x[:, t : t + 1], table, cache=cache) for t in range(TRAINED, length)]
    numerics.assert_matches(torch.cat(parts, 1), expected(made, x), what="output with a cache", reduction=length)


CHECKS: Mapping[str, Callable[[], Any]] = {
    check.__name__: check for check in (both_modes, fresh_selection, all_learn, longer, generation)
}
