"""How alike the selections of neighbouring queries are: of the workloads' inputs, and of a trained model.

    python -m validation.perf.neighbours                                       # of the workloads, on a CPU
    python -m validation.perf.neighbours --checkpoint FOLDER --text FILE --length 16384

Means over the last queries of a sequence, all heads and, of a model, all NSA layers: the share of a query's free blocks
that the next one keeps, and the number of different blocks of 2, 4, 8, 16 and 64 neighbours. `indices` are
those that selected attention is timed on, `selection` is what queries and keys of the whole op lead to.
"""

import argparse
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nsa import NativeSparseAttention, select_blocks
from nsa.config import NSAConfig
from nsa.titan.health import membership, selection_metrics

from .report import table
from .workloads import WORKLOADS, Inputs, Workload

NEIGHBOURS = (2, 4, 8, 16, 64)
LAST = 512
"""Queries that are looked at: those that have the most blocks to choose from."""


def likeness(indices: Tensor, config: NSAConfig, length: int) -> dict[str, float]:
    """`kept`, and unions by their number of neighbours, of `indices [B, Tq, Hk, N]` of the last of `length` queries."""
    first, block = length - indices.shape[1], torch.arange(config.num_selectable(length), device=indices.device)
    own = torch.arange(first, length, device=indices.device)[:, None] // config.select_block_size
    chosen, forced = membership(indices, len(block)), config.forced(block, own)[None, :, None]
    free = chosen[:, :-1] & ~forced[:, :-1] & ~forced[:, 1:]  # a block that must be taken now is not kept by choice
    found = selection_metrics(indices, config, first=first, neighbours=NEIGHBOURS)
    kept = ((free & chosen[:, 1:]).sum() / free.sum()).item()
    return {"kept": kept, **{str(number): found[f"union_{number}"] for number in NEIGHBOURS}}


def selection(workload: Workload, x: Inputs, length: int) -> Tensor:
    """Blocks that the operator selects for the last queries of a workload's inputs, in float32 on the CPU."""
    q, k_cmp = x["q"][:, -LAST:].float(), x["k_cmp"].float()
    return select_blocks(q, k_cmp, x["lse"][:, -LAST:], workload.config, num_keys=length, backend="eager")


def of_workload(workload: Workload, length: int) -> dict[str, dict[str, float]]:
    """`likeness` of the indices that a workload draws and of what its inputs select."""
    x = workload.draw(length, "cpu")
    drawn = {"indices": x["indices"][:, -LAST:], "selection": selection(workload, x, length)}
    return {what: likeness(indices, workload.config, length) for what, indices in drawn.items()}


@torch.no_grad()
def of_model(model: Any, tokens: Tensor) -> dict[str, float]:
    """`likeness` of what a model of `nsa.titan` selects on `tokens [B, T]`, a mean over its NSA layers."""
    _, indices = model(tokens, return_indices=True)
    layers = [module for module in model.modules() if isinstance(module, NativeSparseAttention)]
    found = [
        likeness(used[:, -LAST:], layer.config, tokens.shape[1])
        for used, layer in zip(indices.values(), layers, strict=True)
    ]
    return {name: statistics.fmean(each[name] for each in found) for name in found[0]}


def of_checkpoint(folder: Path, text: str, length: int) -> dict[str, float]:
    """`of_model` for a checkpoint, on the first tokens of a text.

    Raises:
        ValueError: the text has fewer tokens.
        JobError: see `nsa.titan.load.load_model`.
    """
    from nsa.titan.load import load_model

    model, tokenizer = load_model(folder, room_for=lambda _: length)
    tokens = tokenizer.encode(text)[:length]
    if len(tokens) < length:
        raise ValueError(f"the text must have at least {length} tokens, got {len(tokens)}")
    return of_model(model, torch.tensor([tokens], device=next(model.parameters()).device))


def _rows(found: Mapping[str, Mapping[str, float]], *names: str) -> Iterator[tuple[str, ...]]:
    for what, values in found.items():
        yield (*names, what, f"{values['kept']:.2f}", *(f"{values[str(n)]:.1f}" for n in NEIGHBOURS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8192, help="in tokens")
    parser.add_argument("--workloads", default="W,WC", help=f"of {', '.join(WORKLOADS)}")
    parser.add_argument("--checkpoint", type=Path, help="of a run of nsa.train, instead of workloads")
    parser.add_argument("--text", type=Path, help="a file for the model to read")
    options = parser.parse_args()
    if options.checkpoint:
        if not options.text:
            parser.error("--checkpoint needs --text")
        found = of_checkpoint(options.checkpoint, options.text.read_text(), options.length)
        rows = list(_rows({"selection": found}, str(options.checkpoint)))
    else:
        names = options.workloads.split(",")
        rows = [row for name in names for row in _rows(of_workload(WORKLOADS[name], options.length), name)]
    print(table(("", "of", "kept", *(f"{n} neighbours" for n in NEIGHBOURS)), rows))


if __name__ == "__main__":
    main()
