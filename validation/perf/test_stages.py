"""How long each stage takes on the eager backend, forward alone and with backward, on any machine.

Eager is the yardstick everything else is compared with and what runs where there is no GPU, so it must not get slower
unnoticed either. One group a stage and direction: the rows of a group differ in length only, and show how it scales.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from nsa import functional as F
from nsa.config import NSAConfig

# Small, so that a laptop is done in a minute: 4 selected blocks are all there are at 256 tokens, a quarter at 1024.
CONFIG = NSAConfig(num_selected_blocks=4, window_size=128)
LENGTHS = (256, 1024)
HQ, HK, DIM = 4, 2, 32

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Stage:
    call: Callable[[Inputs], Tensor]
    wrt: tuple[str, ...] = ()  # what it is differentiated by; nothing for the selection


def _params(x: Inputs) -> F.CompressionParams:
    return F.CompressionParams(x["position"], x["weight"], x["weight_out"])


WHOLE = ("q", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gates")
eager = {"config": CONFIG, "backend": "eager"}

STAGES = {
    "compress": Stage(
        lambda x: F.compress(x["k_slc"], _params(x), **eager), ("k_slc", "position", "weight", "weight_out")
    ),
    "compressed": Stage(
        lambda x: F.compressed_attention(x["q"], x["k_cmp"], x["v_cmp"], **eager)[0], ("q", "k_cmp", "v_cmp")
    ),
    "select": Stage(lambda x: F.select_blocks(x["q"], x["k_cmp"], x["lse"], **eager)),
    "selected": Stage(
        lambda x: F.selected_attention(x["q"], x["k_slc"], x["v_slc"], x["indices"], **eager), ("q", "k_slc", "v_slc")
    ),
    "window": Stage(
        lambda x: F.sliding_window_attention(x["q"], x["k_win"], x["v_win"], **eager), ("q", "k_win", "v_win")
    ),
    "whole": Stage(lambda x: F.nsa_attention(*(x[name] for name in WHOLE), **eager), WHOLE),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """A pool of threads measures what else the machine is doing: tenfold differences on a busy one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_inputs(length: int) -> Inputs:
    l, blocks = CONFIG.compress_block_size, CONFIG.num_compressed(length)
    shapes = {
        "q": (1, length, HQ, DIM),
        **dict.fromkeys(("k_slc", "v_slc", "k_win", "v_win"), (1, length, HK, DIM)),
        **dict.fromkeys(("k_cmp", "v_cmp"), (1, blocks, HK, DIM)),
        "gates": (1, length, HQ, 3),
        "position": (HK, l, DIM),
        "weight": (HK, l * DIM, DIM),
        "weight_out": (HK, DIM, DIM),
    }
    x = {name: torch.randn(shape) for name, shape in shapes.items()}
    _, x["lse"] = F.compressed_attention(x["q"], x["k_cmp"], x["v_cmp"], **eager)
    x["indices"] = F.select_blocks(x["q"], x["k_cmp"], x["lse"], **eager)
    return x


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    ("name", "backward"),
    [
        pytest.param(name, backward, id=f"{name}-{'forward_backward' if backward else 'forward'}")
        for name, stage in STAGES.items()
        for backward in ((False, True) if stage.wrt else (False,))
    ],
)
def test_stage(benchmark, name, backward, length):
    stage, x = STAGES[name], make_inputs(length)
    if backward:
        leaves = [x[key].requires_grad_() for key in stage.wrt]
        upstream = torch.randn_like(stage.call(x))

        def run() -> tuple[Tensor, ...]:
            return torch.autograd.grad(stage.call(x), leaves, upstream)
    else:
        run = partial(torch.no_grad()(stage.call), x)

    benchmark.group = f"{name}, {'forward and backward' if backward else 'forward'}"
    benchmark.extra_info.update(tokens=length, threads=1, backend="eager", dtype="float32")
    result = benchmark.pedantic(run, rounds=5, warmup_rounds=1)

    # Speed is worth nothing where the numbers are not.
    for tensor in result if backward else (result,):
        assert tensor.isfinite().all()
