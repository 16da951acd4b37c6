"""Attention alone, of which processes have some heads or some tokens: output and gradients are those of one process.

In float64, where no difference of rounding can hide a difference of anything else, on the CPU.
"""

import multiprocessing
import os
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from validation import numerics
from validation.integration import ranks

SIZES = {"compress_block_size": 16, "compress_stride": 8, "select_block_size": 16, "num_selected_blocks": 4}


@dataclass(frozen=True)
class Case:
    """A layer and how it is shared out; `sizes` are of its NSAConfig, `gathered` bytes a time, in `turns`.

    Inputs are `[batch, length, 16 * heads]`, with two query heads for each of keys and values.
    """

    name: str
    tp: int = 1
    cp: int = 1
    balancer: str | None = None
    attention: str = "nsa"
    backend: str = "eager"
    sizes: dict[str, Any] = field(default_factory=dict)
    gathered: int | None = None
    turns: int = 1
    batch: int = 2
    length: int = 128
    heads: int = 8


CASES = (
    Case("tp2", tp=2),
    Case("tp4", tp=4),
    Case("tp2-mean", tp=2, sizes={"compression": "mean"}),
    Case("cp2", cp=2),
    Case("cp2-headtail", cp=2, balancer="headtail"),
    Case("cp2-head-by-head", cp=2, balancer="headtail", gathered=1, turns=4),
    Case("cp2-two-heads-a-turn", cp=2, balancer="headtail", gathered=1 << 18, turns=2),
    Case("cp2-blocks-apart", cp=2, balancer="headtail", sizes={"compress_stride": 16}),
    Case("cp2-shared-kv", cp=2, balancer="headtail", sizes={"shared_kv": True, "compression": "linear"}),
    Case("cp2-compressed-alone", cp=2, balancer="headtail", sizes={"num_selected_blocks": 0, "window_size": 0}),
    Case("cp4", cp=4),
    Case("cp4-headtail", cp=4, balancer="headtail"),
    Case("tp2-cp2", tp=2, cp=2, balancer="headtail"),
    Case("cp2-dense", cp=2, attention="dense"),
    Case("tp2-cp2-dense", tp=2, cp=2, balancer="headtail", attention="dense"),
    # Interpreted, and therefore small.
    Case("tp2-triton", tp=2, backend="triton", batch=1, length=64, heads=4),
    Case("cp2-headtail-triton", cp=2, balancer="headtail", backend="triton", batch=1, length=64, heads=4),
)


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name, marks=ranks.needs(case.tp * case.cp)) for case in CASES]
)
def test_is_that_of_one_process(case: Case, tmp_path: Path) -> None:
    # Triton decides when it is imported whether to interpret, so that what has imported it cannot be forked.
    start = multiprocessing.get_context("spawn") if case.backend == "triton" else ranks._context
    with mock.patch.object(ranks, "_context", start), ranks.Job(compare, (case,), tmp_path, case.tp * case.cp) as job:
        job.wait()


def compare(case: Case) -> None:
    """Asserts, in one rank, that its part is a part of what one process makes of the whole."""
    if case.backend == "triton":
        os.environ["TRITON_INTERPRET"] = "1"
        from validation import interpreter

        interpreter.accelerate()
        interpreter.round_to_nearest()
        interpreter.keep_conditions()
    from torch.distributed.device_mesh import init_device_mesh
    from torchtitan.distributed.context_parallel import cp_shard
    from torchtitan.models.llama3.infra.parallelize import apply_tp

    from nsa.titan import context
    from nsa.titan.parallelize import share_heads, share_tokens

    torch.distributed.init_process_group("gloo")  # where there are GPUs too
    mesh = init_device_mesh("cpu", (case.cp, case.tp), mesh_dim_names=("cp", "tp"))
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch, case.length, 16 * case.heads)
    x, dout = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2))

    whole, model = make(case, "eager"), make(case, case.backend)
    expected = run(whole, x, dout)
    tokens, positions = torch.arange(case.length), None
    if case.tp > 1:
        share_heads(model, mesh["tp"])
        apply_tp(model, mesh["tp"], loss_parallel=False, enable_float8_tensorwise_tp=False)
    if case.cp > 1:
        context.GATHERED_BYTES = case.gathered or context.GATHERED_BYTES
        calls = counted(context, "nsa_attention")
        share_tokens(model, context.ContextParallel(mesh["cp"], case.balancer is not None))
        (tokens,), _ = cp_shard(mesh["cp"], (tokens.unsqueeze(0),), None, case.balancer)
        tokens = tokens.squeeze(0)
        positions = tokens.expand(case.batch, -1)
    mine = tokens.chunk(case.tp)[mesh["tp"].get_local_rank()]  # sequence parallel, as llama3's norms are
    actual = run(model, x[:, mine], dout[:, mine], positions)
    if case.cp > 1 and case.attention == "nsa":
        chunks = 2 if case.balancer else 1
        assert len(calls) == case.turns * chunks, f"{len(calls)} calls for {chunks} chunks in {case.turns} turns"

    for name, of_whole in expected.items():
        part = actual[name]
        if name in ("output", "gradient of x"):
            of_whole = of_whole[:, mine]
        else:
            part = part.full_tensor() if case.tp > 1 else part
            if case.cp > 1:
                torch.distributed.all_reduce(part, group=mesh["cp"].get_group())
        numerics.assert_matches(part, of_whole, what=name)
    torch.distributed.destroy_process_group()


def make(case: Case, backend: str) -> Any:
    """A model of one layer, in float64, with the same weights in every process and backend."""
    from nsa import NSAConfig
    from nsa.titan.model import ModelArgs, Transformer

    config = NSAConfig(**{**SIZES, "window_size": 24, **case.sizes})
    heads: dict[str, Any] = {
        "dim": 16 * case.heads,
        "n_layers": 1,
        "n_heads": case.heads,
        "n_kv_heads": case.heads // 2,
    }
    kind: dict[str, Any] = {"nsa": config, "attention": case.attention, "backend": backend}
    model = Transformer(ModelArgs(**heads, **kind, vocab_size=64, max_seq_len=case.length))
    model.init_weights()
    return model.double()


def counted(module: ModuleType, name: str) -> list[str]:
    """A list that gets an entry at every call of a function of a module."""
    function, calls = getattr(module, name), list[str]()

    def call(*arguments: Any, **options: Any) -> Any:
        calls.append(name)
        return function(*arguments, **options)

    setattr(module, name, call)
    return calls


def run(model: Any, x: Tensor, dout: Tensor, positions: Tensor | None = None) -> dict[str, Any]:
    """Output and all gradients of the model's attention."""
    attention = model.layers["0"].attention
    x = x.clone().requires_grad_()
    out = attention(x, model.freqs_cis, None, positions)
    out.backward(dout)
    gradients = {f"gradient of {name}": parameter.grad for name, parameter in attention.named_parameters()}
    return {"output": out, "gradient of x": x.grad, **gradients}
