"""The stages of Native Sparse Attention, each declared once: whatever is said of all stages is read from `REGISTRY`.

Conformance, first calls, mutants and verdicts, the precision layer, benchmarks, tuning, reports and pictures have no
list of stages of their own.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nsa.functional import CompressionParams

from . import costs, oracle
from .cases import PARAMETERS, Case, Tensors, declares, draw_cotangent, require
from .costs import Costs
from .numerics import Margin

Call = Callable[[Any, Case, Mapping[str, Any]], Tensors]
"""Calls a stage on anything that has the stages as attributes, the oracle included; gives results by name."""


@dataclass(frozen=True)
class StageSpec:
    """A stage: a function of named tensors to named tensors, and what is known of it.

    Attributes:
        name: as tests, verdicts and reports have it.
        functions: the attributes of `Implementation` that it calls; the oracle has functions of the same names.
        inputs: the tensors that it computes with, by their names in `cases.shapes`.
        call: calls it. What it gives is called `out...`, `lse` or `indices`.
        reduction: the most terms that a sum has in its forward pass, a bound of rounding.
        compared: whether it is held to the oracle by itself.
        given: what it takes beside the inputs: results of other stages.
        differentiable: whether gradients flow to the inputs.
        own_keys: whether branches have keys and values of their own.
        parts: the stages that it is made of, in their order.
        cost: what it costs at least; None where it is not timed.
        title, colour: in reports and pictures; colour-blind people tell the colours apart (Okabe and Ito).
        sizes: what of a configuration it is paid in, as reports say it.
    """

    name: str
    functions: tuple[str, ...]
    inputs: tuple[str, ...]
    call: Call
    reduction: Callable[[Case], int]
    compared: bool = True
    given: tuple[str, ...] = ()
    differentiable: bool = True
    own_keys: bool = False
    parts: tuple[str, ...] = ()
    cost: Costs | None = None
    title: str = ""
    colour: str = "#000000"
    sizes: str = ""

    def run(self, subject: Any, case: Case, tensors: Mapping[str, Any]) -> Tensors:
        """What it gives, by name; skips the test where the subject does not declare what that takes."""
        require(subject, case, self.functions, tensors[self.inputs[0]].dtype, own_keys=self.own_keys)
        if declares(subject):
            SEEN.stages.append(self.name)
            SEEN.case = case
        return self.call(subject, case, tensors)

    def leaves(self, tensors: Mapping[str, Any]) -> Tensors:
        """The differentiable inputs among `tensors`, as fresh leaves of the same strides."""
        return {name: tensors[name].detach().requires_grad_() for name in self.inputs if name in tensors}

    def results(
        self,
        subject: Any,
        case: Case,
        tensors: Mapping[str, Any],
        dtype: torch.dtype | None = None,
        *,
        cotangent: Tensor | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """Outputs, then, where there are any, the gradient of every differentiable input under a cotangent.

        Unless given, that is a fixed one, drawn in `dtype` or else that of the inputs. Of an implementation that
        declares no backward pass there are outputs alone: a test that is about gradients asks for them by `require`.
        """
        dtype = dtype or tensors[self.inputs[0]].dtype
        leaves = self.leaves(tensors)
        outputs = self.run(subject, case, {**tensors, **leaves})
        yield from outputs.items()
        if not self.differentiable or (declares(subject) and subject.lacks(case, backward=True)):
            return
        out = outputs["out"]
        if cotangent is None:
            cotangent = draw_cotangent(case, out, dtype)
        gradients = torch.autograd.grad(
            out, list(leaves.values()), cotangent.to(out.dtype), materialize_grads=True, allow_unused=True
        )
        yield from ((f"gradient of {name}", gradient) for name, gradient in zip(leaves, gradients, strict=True))


@dataclass
class Seen:
    """What a test did: the plugin empties it before one and reads it after it."""

    stages: list[str] = field(default_factory=list)
    """Those that were run on an implementation, in order."""
    case: Case | None = None
    """The last that an implementation was run on."""
    margins: dict[tuple[str, str, str], Margin] = field(default_factory=dict)
    """The worst by stage, tensor and dtype."""

    def clear(self) -> None:
        self.stages, self.case, self.margins = [], None, {}

    def note(self, stage: str, tensor: str, dtype: torch.dtype, margin: Margin) -> None:
        key = stage, tensor, str(dtype).removeprefix("torch.")
        self.margins[key] = max(self.margins.get(key, Margin()), margin, key=lambda margin: margin.ratio)


SEEN = Seen()


def _compress(kind: str) -> Call:
    def run(subject: Any, case: Case, x: Mapping[str, Any]) -> Tensors:
        params = None
        if case.config.compression != "mean":
            params = CompressionParams(x[f"{kind}_position"], x[f"{kind}_weight"], x.get(f"{kind}_weight_out"))
        return {"out": subject.compress(x[kind], params, case.config, cu_seqlens=case.cu_seqlens.get("cu_seqlens_k"))}

    return run


def _compress_both(subject: Any, case: Case, x: Mapping[str, Any]) -> Tensors:
    return {f"out_{kind}": _compress(kind)(subject, case, x)["out"] for kind in "kv"}


def _compressed_attention(subject: Any, case: Case, x: Mapping[str, Any]) -> Tensors:
    out, lse = subject.compressed_attention(x["q"], x["k_cmp"], x["v_cmp"], case.config, **case.behind)
    return {"out": out, "lse": lse}


def _select_blocks(subject: Any, case: Case, x: Mapping[str, Any]) -> Tensors:
    return {"indices": subject.select_blocks(x["q"], x["k_cmp"], x["lse"], case.config, **case.behind)}


def _selected_attention(subject: Any, case: Case, x: Mapping[str, Any]) -> Tensors:
    return {"out": subject.selected_attention(x["q"], x["k"], x["v"], x["indices"], case.config, **case.call)}


def _window(subject: Any, case: Case, x: Mapping[str, Any]) -> Tensors:
    return {"out": subject.sliding_window_attention(x["q"], x["k"], x["v"], case.config, **case.call)}


def _combine(subject: Any, case: Case, x: Mapping[str, Any]) -> Tensors:
    return {"out": subject.combine([x[name] for name in _OUTPUTS], x["gates"])}


def _nsa_attention(subject: Any, case: Case, x: Mapping[str, Any]) -> Tensors:
    """With the selection that is there among the tensors; without one it selects itself."""
    tensors = (x[name] for name in _BRANCHES)
    return {"out": subject.nsa_attention(*tensors, case.config, indices=x.get("indices"), **case.call)}


def _from_shared_keys(subject: Any, case: Case, x: Mapping[str, Any]) -> Tensors:
    blocks = {f"{kind}_cmp": _compress(kind)(subject, case, x)["out"] for kind in ("k", "v")}
    branches = {f"{kind}_{branch}": x[kind] for kind in ("k", "v") for branch in ("slc", "win")}
    return _nsa_attention(subject, case, {**x, **blocks, **branches})


_BRANCHES = ("q", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gates")
_OUTPUTS = ("out_cmp", "out_slc", "out_win")
_WEIGHTS = {kind: tuple(f"{kind}{name}" for name in PARAMETERS) for kind in "kv"}
_COMPRESSED = costs.attention("cmp", costs.compressed_pairs)
_SELECTED = costs.attention("slc", costs.selected_pairs, selected=True)
_WINDOW = costs.attention("win", costs.window_pairs)

REGISTRY = (
    StageSpec(
        "compress_keys",
        functions=("compress",),
        inputs=("k", *_WEIGHTS["k"]),
        call=_compress("k"),
        reduction=lambda case: case.config.compress_block_size * case.key_dim,
    ),
    StageSpec(
        "compress_values",
        functions=("compress",),
        inputs=("v", *_WEIGHTS["v"]),
        call=_compress("v"),
        reduction=lambda case: case.config.compress_block_size * case.value_dim,
    ),
    StageSpec(
        "compress",
        functions=("compress",),
        inputs=("k", "v", *_WEIGHTS["k"], *_WEIGHTS["v"]),
        call=_compress_both,
        reduction=lambda case: case.config.compress_block_size * max(case.key_dim, case.value_dim),
        compared=False,  # keys and values are, one by one
        cost=costs.compression,
        title="compress",
        colour="#999999",
    ),
    StageSpec(
        "compressed_attention",
        functions=("compressed_attention",),
        inputs=("q", "k_cmp", "v_cmp"),
        call=_compressed_attention,
        reduction=lambda case: case.config.num_compressed(case.num_keys) + case.key_dim,
        cost=_COMPRESSED,
        title="compressed attention",
        colour="#0072b2",
        sizes="`d`",
    ),
    StageSpec(
        "select_blocks",
        functions=("select_blocks",),
        inputs=("q", "k_cmp"),
        call=_select_blocks,
        reduction=lambda case: case.key_dim,
        given=("lse",),
        differentiable=False,
        cost=costs.selection,
        title="select blocks",
        colour="#56b4e9",
        sizes="`d`",
    ),
    StageSpec(
        "selected_attention",
        functions=("selected_attention",),
        inputs=("q", "k", "v"),
        call=_selected_attention,
        reduction=lambda case: case.config.num_selected_blocks * case.config.select_block_size + case.key_dim,
        given=("indices",),
        cost=_SELECTED,
        title="selected attention",
        colour="#e69f00",
        sizes="`n`, `l'`",
    ),
    StageSpec(
        "sliding_window_attention",
        functions=("sliding_window_attention",),
        inputs=("q", "k", "v"),
        call=_window,
        reduction=lambda case: case.config.window_size + case.key_dim,
        cost=_WINDOW,
        title="window attention",
        colour="#009e73",
        sizes="`w`",
    ),
    StageSpec(
        "combine",
        functions=("combine",),
        inputs=(*_OUTPUTS, "gates"),
        call=_combine,
        reduction=lambda case: len(_OUTPUTS),
        compared=False,  # as a part of the whole it is
        differentiable=False,  # the other way it is part of every branch
        cost=costs.gating,
        title="combine",
        colour="#cc79a7",
    ),
    StageSpec(
        "nsa_attention",
        functions=("nsa_attention",),
        inputs=_BRANCHES,
        call=_nsa_attention,
        reduction=lambda case: case.num_keys + case.key_dim,
        own_keys=True,
        parts=("compressed_attention", "select_blocks", "selected_attention", "sliding_window_attention", "combine"),
        cost=costs.together((_COMPRESSED, costs.selection, _SELECTED, _WINDOW, costs.gating)),
        title="whole op",
    ),
    # Compression and all three branches from one `k` and one `v`, for cases with `shared_kv`.
    StageSpec(
        "nsa_attention_from_shared_keys",
        functions=("compress", "nsa_attention"),
        inputs=("q", "k", "v", "gates", *_WEIGHTS["k"], *_WEIGHTS["v"]),
        call=_from_shared_keys,
        reduction=lambda case: case.num_keys + case.config.compress_block_size * case.key_dim,
        parts=(
            "compress_keys", "compress_values",
            "compressed_attention", "select_blocks", "selected_attention", "sliding_window_attention",
        ),
    ),
)  # fmt: skip
"""Every stage, in the order of the computation."""

BY_NAME = {stage.name: stage for stage in REGISTRY}
SELECTION, WHOLE, SHARED = (
    BY_NAME[name] for name in ("select_blocks", "nsa_attention", "nsa_attention_from_shared_keys")
)
FUNCTIONS = {stage.name: stage for stage in REGISTRY if stage.compared}
"""Those that are held to the oracle by themselves."""
EVERY = {name: stage for name, stage in FUNCTIONS.items() if stage is not SHARED}
"""Those that have a meaning on every case."""
STAGES = {name: stage for name, stage in EVERY.items() if stage.differentiable}
"""Those with gradients: a selection has indices instead, and a comparison of its own."""
TIMED = {stage.name: stage for stage in REGISTRY if stage.cost is not None}
"""Those that are timed; each is an attribute of `Implementation`."""


def select_blocks(subject: Any, case: Case, x: Mapping[str, Any]) -> Tensor:
    """Indices of the selection on a case."""
    return SELECTION.run(subject, case, x)["indices"]


def importance(case: Case, x: Mapping[str, Any]) -> Tensor:
    """The oracle's importance of every block, to judge a selection by."""
    return oracle.importance(x["q"], x["k_cmp"], case.config, **case.behind)
