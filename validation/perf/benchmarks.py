"""What is timed here: every stage on every workload, the layer, a training step, and whoever else does the same.

A benchmark is a name for something that can be called, made from the stages and `WORKLOADS`; what a machine runs is its
plan, below. On a GPU every kernel is compiled beforehand, by copies of this module:

    python -m validation.perf.benchmarks --precompile-into FOLDER
"""

import argparse
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from importlib.util import find_spec
from itertools import chain, cycle, product
from pathlib import Path
from typing import Any

import torch

from nsa import (
    NativeSparseAttention,
    PackedSequences,
    StepKeys,
    decode_attention,
    nsa_attention,
    pack_sequences,
    rope_table,
)
from nsa.backends import BackendName

from ..cases import cumulative, shapes, whole
from ..costs import Cost, Roofs
from ..implementations import Implementation, load
from ..stages import BY_NAME, TIMED
from ..stages import WHOLE as WHOLE_OP
from . import stages
from .precompile import OPTION, take_jobs
from .records import SAME_SHAPES
from .rivals import decoders, dense, flash, flex
from .workloads import CHOICES, PACKED, WORKLOADS, Inputs, Workload, chosen

K = 1024
DRAWS = 2
"""Draws of a benchmark's inputs, taken in turn: no round finds the data of the one before."""
DECODE = "decode"
WHOLE = WHOLE_OP.name
LAYERS: int | None = None
"""Of the models that are trained; their own number unless given."""


@dataclass(frozen=True)
class Calls:
    """What is timed, and what memory is asked of: for a backward pass that is forward and backward together."""

    timed: Callable[[], Any]
    peak: Callable[[], Any]


@dataclass(frozen=True)
class Benchmark:
    """One thing to be timed.

    Attributes:
        role: `"ours"`, which gates are about; `"rival"`, which is always there to compare with; `"peer"`, somebody
            else's, which may be there or not.
        make: makes what is called.
        cost, floor: what it needs at least, and the ms for that, where they are known.
    """

    workload: str
    length: int
    stage: str
    direction: str
    subject: str
    role: str
    make: Callable[[], Calls] = field(repr=False)
    cost: Cost | None = None
    floor: Callable[[Roofs], float] | None = field(default=None, repr=False)

    @property
    def id(self) -> str:
        """Its name among tests."""
        return "-".join((self.workload, size(self.length), self.stage, self.direction, self.subject))

    @property
    def group(self) -> str:
        """Those that do the same work, or the same in place of it, stand in one table."""
        return " ".join((self.workload, size(self.length), self.stage, self.direction))


def size(length: int) -> str:
    """A number of tokens in few letters."""
    return str(length) if length % K else f"{length // K}k"


@dataclass(frozen=True)
class Plan:
    """Lengths in tokens, by workload, flavor or nothing, at which things are timed.

    Attributes:
        stages: every stage and both of its passes.
        selected: selected attention, where it is not among these.
        whole: the whole op.
        dense: dense attention beside it.
        flash: dense attention by FlashAttention.
        flex: the window by FlexAttention.
        peers: what peers have, and ours where that is not timed anyway.
        choices: compression and the whole op with other sizes and counts.
        module: the layer.
        packed: the whole op and the layer over packed documents.
        steps: a training step of a model and of its dense twin.
        decode: a new token of each of `batches` sequences, over caches of such lengths.
    """

    stages: dict[str, tuple[int, ...]]
    selected: dict[str, tuple[int, ...]]
    whole: dict[str, tuple[int, ...]]
    dense: dict[str, tuple[int, ...]]
    flash: dict[str, tuple[int, ...]]
    flex: dict[str, tuple[int, ...]]
    peers: dict[str, tuple[int, ...]]
    choices: dict[str, tuple[int, ...]]
    module: dict[str, tuple[int, ...]]
    packed: dict[str, tuple[int, ...]]
    steps: dict[str, tuple[int, ...]]
    decode: dict[str, tuple[int, ...]]
    batches: tuple[int, ...]


ALL = (4 * K, 8 * K, 11 * K, 16 * K, 32 * K, 64 * K, 128 * K)
FEW = (8 * K, 32 * K, 64 * K)
GPU = Plan(
    stages={
        "W": tuple(n for n in ALL if n != 11 * K),
        "W4": (8 * K, 32 * K, 128 * K),
        "W192": (8 * K, 32 * K),
    },
    selected={"WC": (8 * K, 16 * K, 32 * K, 64 * K)},  # the others do not depend on what neighbours agree on
    # At 128k tokens dense attention on W192 takes seconds a pass.
    whole={"W": ALL, "WC": tuple(n for n in ALL if n != 11 * K), "W4": ALL, "W192": ALL[:-1]},
    # On WC it takes the time that it takes on W: `records.SAME_SHAPES`.
    dense={"W": ALL, "W4": ALL, "W192": ALL[:-1]},
    flash={"W": (4 * K, 8 * K, 16 * K, 32 * K)},
    # It is compiled for every length, and its mask made from all pairs, of which 128k tokens have too many.
    flex={"W": (8 * K, 32 * K), "W4": (32 * K,), "W192": (32 * K,)},
    peers={"W": FEW, "W4": FEW, "P": (8 * K, 32 * K)},
    choices={"W": (32 * K,)},
    module={"W": (8 * K, 32 * K)},
    packed={"W": (16 * K,)},
    # Of shorter sequences the host would be measured, which starts thousands of kernels a step.
    steps={"100m": (64 * K,), "1b": (32 * K,)},
    decode={"W": (8 * K, 16 * K, 32 * K, 64 * K)},
    batches=(1, 16, 64),
)
CPU = Plan(
    stages={"tiny": (256, K)},
    selected={},
    whole={"tiny": (256, 512, K, 2 * K)},
    dense={"tiny": (256, 512, K, 2 * K)},
    flash={"tiny": (256, 512, K, 2 * K)},
    flex={},
    peers={"tiny": (256, K)},
    choices={"tiny": (K,)},
    module={"tiny": (K,)},
    packed={"tiny": (K,)},
    steps={"debug": (256,)},
    decode={"tiny": (K,)},
    batches=(1, 2),
)


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def default() -> str:
    """The implementation of ours that is measured unless another one is named."""
    return "triton" if torch.cuda.is_available() else "eager"


def collect(impl: str | None = None, peers: Sequence[str] = ()) -> list[Benchmark]:
    """What this machine runs, those with the same inputs one after the other.

    Args:
        impl: ours; Triton on a GPU, eager elsewhere, unless named.
        peers: further ones by name, beside fla-core, which is taken where it is installed and there is a GPU.
    """
    on_gpu = torch.cuda.is_available()
    plan, ours = (GPU if on_gpu else CPU), load(impl or default())
    others = [load(name) for name in dict.fromkeys([*(["fla"] if on_gpu and find_spec("fla") else []), *peers])]
    others = [peer for peer in others if device() in peer.devices and not peer.interpreted]
    found: list[Benchmark] = []

    def add(role: str, subject: Implementation, names: Sequence[str], where: dict[str, tuple[int, ...]]) -> None:
        there = {benchmark.id for benchmark in found}
        for workload in (WORKLOADS[name] for name in where):
            for stage in names:
                if (role == "peer" and not _can(subject, workload, stage)) or getattr(subject, stage) is None:
                    continue
                for length in where[workload.name]:
                    found.extend(b for b in _stage(role, subject, workload, length, stage) if b.id not in there)

    add("ours", ours, [stage for stage in TIMED if stage != WHOLE], plan.stages)
    add("ours", ours, ["selected_attention"], plan.selected)
    add("ours", ours, [WHOLE], plan.whole)
    add("rival", dense(), [WHOLE], plan.dense)
    add("rival", flash(), [WHOLE], plan.flash)
    if plan.flex:
        add("rival", flex(), ["sliding_window_attention"], plan.flex)
    for peer in others:
        # Compression is left out: what is learned there differs between implementations. Gates are part of the whole.
        add("peer", peer, [name for name, stage in TIMED.items() if stage.compared], plan.peers)
    if "P" in plan.peers:
        add("ours", ours, ["compressed_attention", "select_blocks", "selected_attention"], {"P": plan.peers["P"]})
    for name, lengths in plan.choices.items():
        for length in lengths:
            for choice in CHOICES:
                for stage in ("compress", WHOLE):
                    found += _stage("ours", ours, chosen(WORKLOADS[name], choice), length, stage)
    ours_by_name: dict[str, BackendName] = {"eager": "eager", "triton": "triton"}
    backend = ours_by_name.get(ours.name, "auto")
    for name, lengths in plan.module.items():
        for length in lengths:
            for direction in ("forward", "backward"):
                make = partial(_layer, WORKLOADS[name], (length,), direction, backend)
                found.append(Benchmark(name, length, "layer", direction, ours.name, "ours", make))
    for flavor, lengths in plan.steps.items():
        for length in lengths:
            step = partial(_training_step, length=length)
            found.append(Benchmark(flavor, length, "training", "step", ours.name, "ours", partial(step, flavor)))
            twin = partial(step, f"{flavor}_dense")
            found.append(Benchmark(flavor, length, "training", "step", "dense (twin)", "rival", twin))
    if backend != "auto":
        for name, lengths in plan.packed.items():
            for length in lengths:
                found += _packed(WORKLOADS[name], length, ours.name, backend)
        for name, lengths in plan.decode.items():
            for length, batch in product(lengths, plan.batches):
                found += _decoding(WORKLOADS[name], length, batch, backend)
    order = [*plan.whole, *plan.peers]
    return sorted(found, key=lambda b: (b.stage in ("layer", "training", DECODE), _place(b.workload, order), b.length))


def _place(name: str, order: list[str]) -> tuple[int, str]:
    base = name.partition(",")[0]
    return (order.index(base) if base in order else len(order), name)


def _can(peer: Implementation, workload: Workload, stage: str) -> bool:
    """Whether somebody else's implementation says it can do this."""
    sizes = peer.head_dims(workload.key_dim) and peer.head_dims(workload.value_dim) and peer.groups(workload.group)
    sizes = sizes and (peer.value_head_dim or workload.key_dim == workload.value_dim) and peer.config(workload.config)
    # Without flash-attn its window is a stand-in of ours.
    borrowed = peer.name == "fla" and stage == WHOLE and not find_spec("flash_attn")
    return sizes and workload.dtype in peer.dtypes and not borrowed


def _stage(role: str, subject: Implementation, workload: Workload, length: int, name: str) -> Iterator[Benchmark]:
    costs = workload.costs(length)
    for direction in ("forward", "backward") if TIMED[name].differentiable and subject.backward else ("forward",):
        make = partial(_calls, subject, workload, length, name, direction)
        kind = "dense" if subject.name.startswith("dense") else name
        floor = partial(workload.floor, kind, direction, length)
        cost = costs[kind, direction]
        yield Benchmark(workload.name, length, name, direction, subject.name, role, make, cost, floor)


@lru_cache(maxsize=1)
def draws(workload: Workload, length: int) -> list[Inputs]:
    """The inputs, of which several benchmarks in a row make use."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the next may be the largest that fit
    return [workload.draw(length, device(), seed) for seed in range(DRAWS)]


def release() -> None:
    """Gives back what benchmarks keep for one another."""
    draws.cache_clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def in_turn(calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """A call that is each of these in turn."""
    each = cycle(calls)
    return lambda: next(each)()


def _calls(subject: Implementation, workload: Workload, length: int, name: str, direction: str) -> Calls:
    stage, case, inputs = TIMED[name], workload.case(length), draws(workload, length)
    if direction == "forward":
        call = in_turn([stages.forward(stage, subject, case, x) for x in inputs])
        return Calls(call, call)
    backward = in_turn([stages.backward(stage, subject, case, x) for x in inputs])
    return Calls(backward, stages.step(stage, subject, case, inputs[0]))


def _passes(calls: Sequence[tuple[Callable[[], torch.Tensor], list[torch.Tensor]]], direction: str) -> Calls:
    """Functions in turn, or their backward passes to the leaves that each is given with."""
    if direction == "forward":
        call = in_turn([torch.no_grad()(function) for function, _ in calls])
        return Calls(call, call)
    for x in chain.from_iterable(leaves for _, leaves in calls):
        x.requires_grad_()
    outputs = [function() for function, _ in calls]
    upstream = torch.randn_like(outputs[0])
    backward = partial(torch.autograd.grad, grad_outputs=upstream, retain_graph=True)
    timed = in_turn([partial(backward, out, leaves) for out, (_, leaves) in zip(outputs, calls, strict=True)])
    function, leaves = calls[0]
    return Calls(timed, lambda: torch.autograd.grad(function(), leaves, upstream))


def _layer(workload: Workload, lengths: Sequence[int], direction: str, backend: BackendName) -> Calls:
    """The layer with its projections, as wide as its heads together, on sequences of such lengths."""
    release()
    w, width, length = workload, workload.query_heads * workload.key_dim, sum(lengths)
    layer = NativeSparseAttention(
        width, w.query_heads, w.kv_heads, w.key_dim, w.config, backend=backend
    ).to(device(), w.dtype)  # fmt: skip
    rope, packing = rope_table(length, w.key_dim).to(device()), _packing(w, lengths)
    inputs, parameters = [_noise(w, 1, length, width) for _ in range(DRAWS)], list(layer.parameters())
    return _passes([(partial(layer, x, rope, packing), [x, *parameters]) for x in inputs], direction)


def _attention(workload: Workload, lengths: Sequence[int], direction: str, backend: BackendName) -> Calls:
    """The whole op on sequences of such lengths, packed if there are several."""
    release()
    case = replace(workload.case(sum(lengths)), lengths=whole(*lengths))
    inputs = [_noise(workload, *shapes(case)[name]) for name in BY_NAME[WHOLE].inputs]
    options: dict[str, Any] = {"cu_seqlens_q": _packing(workload, lengths), "backend": backend}
    attend: Callable[..., Any] = nsa_attention
    return _passes([(partial(attend, *inputs, workload.config, **options), inputs)], direction)


def _packing(workload: Workload, lengths: Sequence[int]) -> PackedSequences | None:
    """The tables of packed sequences, which a model makes once a batch."""
    if len(lengths) == 1:
        return None
    return pack_sequences(cumulative(lengths).to(device()), workload.config, num_tokens=sum(lengths))


def documents(length: int) -> tuple[int, ...]:
    """So many tokens as eight documents, the first of which is the longest."""
    rest = [length * part // 36 for part in range(7, 0, -1)]
    return (length - sum(rest), *rest)


def _packed(workload: Workload, length: int, subject: str, backend: BackendName) -> Iterator[Benchmark]:
    """Op and layer over packed documents, beside one sequence of as many tokens."""
    for stage, make in ((WHOLE, _attention), ("layer", _layer)):
        for direction in ("forward", "backward"):
            for name, role, lengths in ((subject, "ours", documents(length)), ("one sequence", "rival", (length,))):
                call = partial(make, workload, lengths, direction, backend)
                yield Benchmark(f"{workload.name}{PACKED}", length, stage, direction, name, role, call)


def _training_step(flavor: str, length: int) -> Calls:
    """Forward, backward and update of a model on one sequence, in bfloat16 on a GPU, as the trainer has them."""
    from torchtitan.protocols.train_spec import get_train_spec

    import nsa.titan.train_spec  # noqa: F401 (registers the spec)
    from nsa.titan.data import ByteTokenizer, padded_vocab_size

    release()
    spec = get_train_spec("nsa")
    args: Any = spec.model_args[flavor]
    args.vocab_size, args.max_seq_len = padded_vocab_size(ByteTokenizer()), length
    args.n_layers = LAYERS or args.n_layers
    with torch.device(device()):
        model: Any = spec.model_cls(args)
        model.init_weights()
        batches = [torch.randint(args.vocab_size, (1, length + 1)) for _ in range(DRAWS)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=torch.cuda.is_available())

    def step(batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device(), torch.bfloat16, enabled=torch.cuda.is_available()):
            logits = model(batch[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    call = in_turn([partial(step, batch) for batch in batches])
    return Calls(call, call)


def _decoding(workload: Workload, length: int, batch: int, backend: BackendName) -> Iterator[Benchmark]:
    """Ours and dense attention; a number of sequences stands where other benchmarks have a direction."""
    ours = partial(_decode, workload, length, batch, backend)
    others = [(n, "rival", partial(_decode_dense, workload, length, batch, f)) for n, f in decoders().items()]
    for subject, role, make in ((backend, "ours", ours), *others):
        cost = workload.decode_cost(length, batch, dense=role == "rival")
        yield Benchmark(workload.name, length, DECODE, f"batch {batch}", subject, role, make, cost, cost.floor)


def _noise(workload: Workload, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=device(), dtype=workload.dtype)


def _decode(workload: Workload, length: int, batch: int, backend: BackendName) -> Calls:
    release()
    w, config = workload, workload.config
    rooms = (config.num_compressed(length), length, min(length, config.window_size))
    stores = [_noise(w, batch, room, w.kv_heads, dim) for room in rooms for dim in (w.key_dim, w.value_dim)]
    keys = StepKeys._make([*stores, torch.full((batch,), length, device=device())])
    q, gates = _noise(w, batch, 1, w.query_heads, w.key_dim), _noise(w, batch, 1, w.query_heads, 3).sigmoid()
    call = partial(decode_attention, q, keys, gates, config, backend=backend)
    return Calls(captured(call) if backend == "triton" else call, call)


def _decode_dense(workload: Workload, length: int, batch: int, attend: Callable[..., torch.Tensor]) -> Calls:
    release()
    w = workload
    k, v = (_noise(w, batch, length, w.kv_heads, dim) for dim in (w.key_dim, w.value_dim))
    call = torch.no_grad()(partial(attend, _noise(w, batch, 1, w.query_heads, w.key_dim), k, v))
    return Calls(captured(call), call)


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call as a CUDA graph, as steps of generation are, where there is a GPU."""
    if not torch.cuda.is_available():
        return call
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()

    def replay() -> Any:
        graph.replay()
        return out

    return replay


def jobs(benchmarks: Sequence[Benchmark], wanted: Sequence[str] = ()) -> list[list[Benchmark]]:
    """What has to be called for every kernel to have been: of each kind the shortest and a long one.

    Of `wanted`, ids of benchmarks, if there are any, for every kernel of theirs.

    Kernels are compiled for sizes of heads and blocks, and for whether the work of a short sequence is shared out; but
    FlexAttention's, which take the longest to compile, for every length. The layer has no kernels of its own, nor has
    a dense twin. What has the most kernels comes first, and passes and lengths of the whole op each by itself, the
    forward last: jobs that run at the same time each compile what they have in common.
    """
    kinds: dict[tuple[object, ...], list[Benchmark]] = {}
    for b in benchmarks:
        if b.subject == "FlexAttention":
            kinds[b.workload, b.length, b.direction] = [b]
        elif b.stage != "layer" and not b.subject.startswith("dense"):
            kinds.setdefault((SAME_SHAPES.get(b.workload, b.workload), b.stage, b.subject), []).append(b)
    found: list[list[Benchmark]] = []
    for kind in kinds.values():
        if not wanted or any(b.id in wanted for b in kind):
            # The number of candidates is a constant of the selection's kernel, and grows with the length.
            job = [b for b in kind if b.stage == "select_blocks" or b.length in _ends(kind)]
            each = {(b.length, b.direction): b for b in reversed(job)}.values()
            found += [[b] for b in each] if job[0].stage == WHOLE else [job]
    return sorted(found, key=_rank)


def _rank(job: Sequence[Benchmark]) -> int:
    """The place of a job among others: the backward of the whole op calls its forward, and most of the stages'."""
    if job[0].stage not in (WHOLE, "training"):
        return 1
    return 2 if job[0].direction == "forward" else 0


def _ends(kind: Sequence[Benchmark]) -> tuple[int, int]:
    """The shortest length and the longest of those that many processes can hold at once."""
    lengths = [b.length for b in kind]
    return min(lengths), max((n for n in lengths if n <= 32 * K), default=min(lengths))


def _call_once(job: Sequence[Benchmark]) -> None:
    for benchmark in job:
        benchmark.make().timed()
    release()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--impl")
    parser.add_argument("--peer", action="append", default=[])
    parser.add_argument(OPTION, dest="jobs", type=Path, required=True)
    parser.add_argument("--only", action="append", default=[], metavar="ID", help="a benchmark, instead of all")
    options = parser.parse_args()
    global DRAWS, LAYERS
    DRAWS = LAYERS = 1  # memory is shared by all copies
    take_jobs(jobs(collect(options.impl, options.peer), options.only), options.jobs, _call_once)
    return 0


if __name__ == "__main__":
    sys.exit(main())
