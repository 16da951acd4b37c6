"""The oracle with one mistake in it, of the kinds that people make: a failure is explained by the one it agrees with.

Each mutant changes one rule of the semantics: the configuration the oracle is given, the tensors, or one of its
functions. What an implementation gave is compared with every mutant of the stage, by the same tolerance as with the
oracle. Agreement is a likely reason, never a verdict: the verdict is the comparison with the oracle itself.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import gelu, pad, silu

from . import oracle
from .cases import Case, Tensors, draw_cotangent, upcast, whole
from .comparison import bounds
from .numerics import assert_matches
from .stages import SELECTION, StageSpec

Patch = Callable[[Any], Any]
"""Makes another function of one of the oracle's."""

COMPRESSION = ("compress_keys", "compress_values")
COMPRESSED, SELECTED, WINDOW = "compressed_attention", "selected_attention", "sliding_window_attention"
NSA, SHARED = "nsa_attention", "nsa_attention_from_shared_keys"
WHOLE = (NSA, SHARED)
ATTENTION = (COMPRESSED, SELECTED, WINDOW, *WHOLE)
SELECTING = (SELECTION.name,)


@dataclass(frozen=True)
class Mutant:
    """One mistake.

    Attributes:
        says: it as a condition: `"the window is w + 1"`.
        stages: those in which it shows.
        case: the case that is computed in place of the one asked for; None where the mistake means nothing there.
        tensors: what is computed with in place of the inputs.
        patches: replacements of the oracle's functions, by name.
        results: what becomes of a result, by its name.
        cotangent: what becomes of the gradient from above.
        backward: whether only gradients are wrong.
    """

    says: str
    stages: tuple[str, ...]
    case: Callable[[Case], Case | None] = lambda case: case
    tensors: Callable[[Case, Tensors], Tensors] = lambda case, tensors: tensors
    patches: Mapping[str, Patch] = field(default_factory=dict)
    results: Callable[[Case, str, Tensor], Tensor] = lambda case, name, x: x
    cotangent: Callable[[Case, Tensor], Tensor] | None = None
    backward: bool = False

    @contextmanager
    def made(self) -> Iterator[None]:
        """The oracle has the mistake."""
        with ExitStack() as stack:
            for name, patch in self.patches.items():
                stack.enter_context(mock.patch.object(oracle, name, patch(getattr(oracle, name))))
            yield


def settings(**change: Callable[[Any], Any]) -> Callable[[Case], Case | None]:
    """Fields of the configuration are other ones; None where no configuration has these."""

    def changed(case: Case) -> Case | None:
        try:
            fields = {name: make(case.config) for name, make in change.items()}
            return replace(case, config=replace(case.config, **fields))
        except ValueError:
            return None

    return changed


def scaled(scale: Callable[[Case, float], float | None]) -> Callable[[Case], Case]:
    """The scale is another one, made of the case and the right one."""
    return lambda case: replace(case, scale=scale(case, case.key_dim**-0.5 if case.scale is None else case.scale))


def called(change: Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]) -> Patch:
    """A function of the oracle is called with other arguments."""

    def patch(function: Any) -> Any:
        @wraps(function)
        def other(*arguments: Any, **named: Any) -> Any:
            positional, keywords = change(*arguments, **named)
            return function(*positional, **keywords)

        return other

    return patch


def without_scale(*arguments: Any, **named: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return arguments, {**named, "scale": None}


# Who sees what.


def blocks_seen(rule: Callable[[Tensor, Tensor, Any], Tensor]) -> dict[str, Patch]:
    """Compressed blocks are seen by a rule of their first tokens `[C]`, positions `[Tq, 1]` and the configuration."""

    def mask(positions: Tensor, config: Any, count: int) -> Tensor:
        return rule(torch.arange(count) * config.compress_stride, positions[:, None], config)[:, None]

    return {"_block_mask": lambda original: mask}


def tokens_seen(
    function: str, rule: Callable[[Tensor, Tensor, Any, Tensor | None], Tensor], indices: bool
) -> dict[str, Patch]:
    """Tokens are seen by a rule of their positions `[Tk]`, those of queries, the configuration and the indices."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Tensor:
        *chosen, config = rest
        packing = {name: options.get(name) for name in ("cu_seqlens_q", "cu_seqlens_k")}
        parts = []
        for sequence in oracle.sequences(config, q.shape[1], k.shape[1], **packing):
            keys, values = k[:, sequence.keys], v[:, sequence.keys]
            token, position = torch.arange(keys.shape[1]), sequence.positions[:, None, None]
            mask = rule(token, position, config, chosen[0][:, sequence.queries] if indices else None)
            parts.append(oracle.attend(q[:, sequence.queries], keys, values, mask, options.get("scale"))[0])
        return torch.cat(parts, dim=1)

    return {function: lambda original: attend}


def window_of(rule: Callable[[Tensor, int], Tensor]) -> dict[str, Patch]:
    """The window is a rule of the distance `[Tq, 1, Tk]` back from the query and `w`."""
    return tokens_seen(WINDOW, lambda token, t, config, _: rule(t - token, config.window_size), indices=False)


def members(indices: Tensor, token: Tensor, config: Any) -> Tensor:
    return (indices[..., None] == token // config.select_block_size).any(-2)


def selected_of(rule: Callable[[Tensor, Tensor, Any, Any], Tensor]) -> dict[str, Patch]:
    return tokens_seen(SELECTED, rule, indices=True)


def indices_of(change: Callable[[Tensor, Case], Tensor]) -> Callable[[Case, Tensors], Tensors]:
    return lambda case, x: {**x, "indices": change(x["indices"], case)}


def last_block(case: Case) -> int:
    return max(0, (case.num_keys - 1) // case.config.select_block_size)


def without_last(indices: Tensor, case: Case) -> Tensor:
    """No query has the highest block of its row."""
    return indices.masked_fill(indices == indices.amax(-1, keepdim=True), -1)


# Whose heads are whose.


def interleaved(q: Tensor, heads: int) -> Tensor:
    """An order of query heads in which those of KV head `k` are the heads `h` with `h % Hk = k`."""
    return torch.arange(q.shape[2]).view(-1, heads).T.flatten()


def interleaved_attend(attend: Any) -> Any:
    def other(q: Tensor, k: Tensor, *rest: Any) -> Any:
        order = interleaved(q, k.shape[2])
        return tuple(x[:, :, order.argsort()] for x in attend(q[:, :, order], k, *rest))

    return other


def interleaved_probabilities(probabilities: Any) -> Any:
    return lambda q, k, *rest: probabilities(q[:, :, interleaved(q, k.shape[2])], k, *rest)


def first_kv_head(attend: Any) -> Any:
    def other(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
        return attend(q, *(x[:, :, :1].expand_as(x) for x in (k, v)), *rest)

    return other


class FromTheStart(oracle.Sequence):
    """A sequence whose queries are the first tokens of the keys."""

    @property
    def positions(self) -> Tensor:
        return torch.arange(self.queries.stop - self.queries.start)


def from_the_start(sequences: Any) -> Any:
    return lambda *arguments, **named: [FromTheStart(*parts) for parts in sequences(*arguments, **named)]


def one_sequence(case: Case) -> Case | None:
    """The pack as one sequence."""
    if not case.packed or case.num_queries != case.num_keys:
        return None
    return replace(case, lengths=whole(case.num_keys))


# Importance.


def shifted(by: int) -> dict[str, Patch]:
    """Importance is that of the compressed blocks so many further on."""

    def patch(overlap: Any) -> Any:
        def other(num_blocks: int, num_selectable: int, config: Any) -> Tensor:
            weights = overlap(num_blocks + 1, num_selectable, config)
            return weights[1:] if by < 0 else pad(weights[: max(0, num_blocks - 1)], (0, 0, min(1, num_blocks), 0))

        return other

    return {"overlap": patch}


def weighed(rule: Callable[[Tensor, Tensor, Any], Tensor]) -> dict[str, Patch]:
    """A block's weight is a rule of the overlap `[C, S]`, the first token of each block `[C, 1]` and the settings."""

    def patch(overlap: Any) -> Any:
        def other(num_blocks: int, num_selectable: int, config: Any) -> Tensor:
            found = overlap(num_blocks, num_selectable, config)
            return rule(found, torch.arange(num_blocks)[:, None] * config.compress_stride, config).to(found)

        return other

    return {"overlap": patch}


def starting(found: Tensor, start: Tensor, config: Any) -> Tensor:
    own = start // config.select_block_size
    return (own == torch.arange(found.shape[1])) * config.compress_stride


def of_heads(reduce: Callable[[Tensor], Tensor]) -> dict[str, Patch]:
    """Importance is made of the probabilities `[B, Tq, Hk, G, C]` that this leaves of a group."""

    def patch(probabilities: Any) -> Any:
        def other(*arguments: Any) -> Any:
            p, lse = probabilities(*arguments)
            return reduce(p), lse

        return other

    return {"probabilities": patch}


def highest(order: Any) -> Any:
    """Of equal importances the last comes first."""
    return lambda ranked: ranked.shape[-1] - 1 - order(ranked.flip(-1))


# Compression.


def compressing(**options: Any) -> dict[str, Patch]:
    """Blocks are made with another activation, another order of what is in them, or of other tokens."""
    activation, order = options.get("activation", silu), options.get("order", lambda x: x)

    def patch(original: Any) -> Any:
        def compress(x: Tensor, params: Any, config: Any) -> Tensor:
            if config.compression == "mean" and "mean" not in options:
                return original(x, params, config)
            starts = config.compress_stride * torch.arange(oracle.num_compressed(x.shape[1], config))
            tokens = starts[:, None] + torch.arange(config.compress_block_size) + options.get("later", 0)
            blocks = x[:, tokens.clamp(0, max(0, x.shape[1] - 1))].transpose(2, 3)
            if config.compression == "mean":
                return options["mean"](blocks, config)
            flat = order(blocks + params.position.to(blocks)).flatten(-2)
            hidden = torch.einsum("bchi,hij->bchj", flat, params.weight.to(blocks))
            if config.compression == "linear":
                return hidden
            return torch.einsum("bchf,hfd->bchd", activation(hidden), params.weight_out.to(blocks))

        return compress

    return {"_compress_one": patch}


def mean_of(x: Tensor, config: Any) -> Tensor:
    return x.mean(-2)


def no_position(case: Case, tensors: Tensors) -> Tensors:
    return {name: torch.zeros_like(x) if name.endswith("_position") else x for name, x in tensors.items()}


# Gates and branches.

BRANCHES = ("compressed", "selected", "window")


def gates(change: Callable[[Tensor], Tensor]) -> Callable[[Case, Tensors], Tensors]:
    return lambda case, x: {**x, "gates": change(x["gates"])}


def _reordered(order: tuple[int, ...], x: Tensor) -> Tensor:
    return x[..., [order.index(i) for i in range(3)]]


def _without(branch: int, x: Tensor) -> Tensor:
    return x * (torch.arange(3) != branch).to(x)


def keys_of(branch: str, other: str) -> Callable[[Case, Tensors], Tensors]:
    return lambda case, x: {**x, **{f"{kind}_{branch}": x[f"{kind}_{other}"] for kind in "kv"}}


# Gradients.


def constant_normaliser(probabilities: Any) -> Any:
    """The softmax is differentiated as if what it is divided by were a constant."""

    def other(*arguments: Any) -> Any:
        p, lse = probabilities(*arguments)
        # p as it is, with the derivative of exp(logit - constant).
        q, k, _, scale = arguments
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        logits = scale * torch.einsum(
            "bthgd,bshd->bthgs", q.double().unflatten(2, (k.shape[2], q.shape[2] // k.shape[2])), k.double()
        )
        return p.detach() * (1 + logits - logits.detach()), lse

    return other


def heads(which: Callable[[int], Tensor]) -> Callable[[Case, Tensor], Tensor]:
    """Only these heads of a group `[G]` have a gradient from above."""
    return lambda case, x: x * which(case.group).repeat(case.kv_heads)[:, None].to(x)


def queries(which: Callable[[int], Tensor]) -> Callable[[Case, Tensor], Tensor]:
    return lambda case, x: x * which(x.shape[1])[:, None, None].to(x)


ORDERS = [(0, 2, 1), (1, 0, 2), (2, 1, 0), (1, 2, 0), (2, 0, 1)]

MUTANTS = [
    # The window.
    Mutant("the window is w + 1", (WINDOW, *WHOLE), settings(window_size=lambda c: c.window_size + 1)),
    Mutant("the window is w - 1", (WINDOW, *WHOLE), settings(window_size=lambda c: max(0, c.window_size - 1))),
    Mutant("the window is that of 2 w", (WINDOW, *WHOLE), settings(window_size=lambda c: 2 * c.window_size)),
    Mutant(
        "the window has no causal mask: it reaches w tokens ahead too",
        (WINDOW, *WHOLE),
        patches=window_of(lambda back, w: back.abs() < w),
    ),
    Mutant(
        "the window leaves out the query's own token",
        (WINDOW, *WHOLE),
        patches=window_of(lambda back, w: (back > 0) & (back < w)),
    ),
    Mutant(
        "the window is the w tokens before the query, without its own",
        (WINDOW, *WHOLE),
        patches=window_of(lambda back, w: (back > 0) & (back <= w)),
    ),
    Mutant("there is no window: every earlier token is seen", (WINDOW, *WHOLE), patches=window_of(lambda b, w: b >= 0)),
    # Compressed blocks.
    Mutant(
        "block i is first seen at t = i d + l, one token late (strict causality)",
        (COMPRESSED, *SELECTING, *WHOLE),
        patches=blocks_seen(lambda start, t, c: start + c.compress_block_size - 1 < t),
    ),
    Mutant(
        "block i is first seen at t = i d + l - 2, one token early",
        (COMPRESSED, *SELECTING, *WHOLE),
        patches=blocks_seen(lambda start, t, c: start + c.compress_block_size - 2 <= t),
    ),
    Mutant(
        "block i is seen from its first token on, t = i d",
        (COMPRESSED, *SELECTING, *WHOLE),
        patches=blocks_seen(lambda start, t, c: start <= t),
    ),
    Mutant(
        "block i is seen from t = i d + d - 1 on, before it is complete",
        (COMPRESSED, *SELECTING, *WHOLE),
        patches=blocks_seen(lambda start, t, c: start + c.compress_stride - 1 <= t),
    ),
    Mutant(
        "every compressed block is seen: there is no causal mask",
        (COMPRESSED, *SELECTING, *WHOLE),
        patches=blocks_seen(lambda start, t, c: (start >= 0).expand(t.shape[0], -1)),
    ),
    Mutant(
        "block i is first seen a stride late, at t = (i + 1) d + l - 1",
        (COMPRESSED, *SELECTING, *WHOLE),
        patches=blocks_seen(lambda start, t, c: start + c.compress_stride + c.compress_block_size - 1 <= t),
    ),
    Mutant(
        "the first compressed block is never seen",
        (COMPRESSED, *SELECTING, *WHOLE),
        patches=blocks_seen(lambda start, t, c: (start > 0) & (start + c.compress_block_size - 1 <= t)),
    ),
    Mutant(
        "the log-sum-exp is of base 2",
        (COMPRESSED,),
        results=lambda case, name, x: x / torch.log(torch.tensor(2.0, dtype=x.dtype)) if name == "lse" else x,
    ),
    # Selected blocks.
    Mutant(
        "selected blocks have no causal mask: later tokens of the query's own block are seen",
        (SELECTED, *WHOLE),
        patches=selected_of(lambda token, t, c, indices: members(indices, token, c)),
    ),
    Mutant(
        "the query's own token is hidden in its selected block",
        (SELECTED, *WHOLE),
        patches=selected_of(lambda token, t, c, indices: members(indices, token, c) & (token < t)),
    ),
    Mutant(
        "a -1 among the indices is read as block 0",
        (SELECTED, *WHOLE),
        tensors=indices_of(lambda indices, case: indices.clamp(min=0)),
    ),
    Mutant(
        "a -1 among the indices is read as the last block",
        (SELECTED, *WHOLE),
        tensors=indices_of(lambda indices, case: indices.where(indices >= 0, last_block(case))),
    ),
    Mutant(
        "what follows the first -1 of a row is not read",
        (SELECTED, *WHOLE),
        tensors=indices_of(lambda i, case: i.masked_fill((i < 0).cumsum(-1) > 0, -1)),
    ),
    Mutant(
        "the last slot of the indices is not read",
        (SELECTED, *WHOLE),
        tensors=indices_of(lambda indices, case: indices[..., :-1]),
    ),
    Mutant("the highest selected block is left out", (SELECTED, *WHOLE), tensors=indices_of(without_last)),
    Mutant(
        "the first slot of the indices is not read",
        (SELECTED, *WHOLE),
        tensors=indices_of(lambda indices, case: indices[..., 1:]),
    ),
    Mutant(
        "every query head of all KV heads has the blocks of KV head 0",
        (SELECTED, *WHOLE),
        tensors=indices_of(lambda indices, case: indices[:, :, :1].expand_as(indices)),
    ),
    # Importance and choice.
    Mutant("importance is that of the compressed blocks one further on", SELECTING, patches=shifted(1)),
    Mutant("importance is that of the compressed blocks one before", SELECTING, patches=shifted(-1)),
    Mutant(
        "every compressed block that touches a selection block has the same weight",
        SELECTING,
        patches=weighed(lambda found, start, c: (found > 0) * c.compress_stride),
    ),
    Mutant(
        "a compressed block counts in full for the selection block in which it begins",
        SELECTING,
        patches=weighed(starting),
    ),
    Mutant(
        "only compressed blocks that lie within a selection block count",
        SELECTING,
        patches=weighed(lambda found, start, c: found * (found == c.compress_block_size)),
    ),
    Mutant(
        "importance is that of a group's first query head",
        SELECTING,
        patches=of_heads(lambda p: p[:, :, :, :1].expand_as(p) / p.shape[3]),
    ),
    Mutant(
        "importance is the largest of a group's query heads, not their sum",
        SELECTING,
        patches=of_heads(lambda p: p.amax(3, keepdim=True).expand_as(p) / p.shape[3]),
    ),
    Mutant(
        "importance is the sum over all query heads, for every KV head the same",
        SELECTING,
        patches=of_heads(lambda p: p.mean(2, keepdim=True).expand_as(p)),
    ),
    Mutant("of equal importances the higher index is taken", SELECTING, patches={"_order": highest}),
    Mutant("no initial block is forced", SELECTING, settings(num_initial_blocks=lambda c: 0)),
    Mutant("no local block is forced", SELECTING, settings(num_local_blocks=lambda c: 0)),
    Mutant("one local block too few is forced", SELECTING, settings(num_local_blocks=lambda c: c.num_local_blocks - 1)),
    Mutant(
        "one local block too many is forced", SELECTING, settings(num_local_blocks=lambda c: c.num_local_blocks + 1)
    ),
    Mutant(
        "one initial block too many is forced",
        SELECTING,
        settings(num_initial_blocks=lambda c: c.num_initial_blocks + 1),
    ),
    # The scale.
    Mutant(
        "the scale given is ignored and the default taken",
        (*ATTENTION, *SELECTING),
        lambda case: None if case.scale is None else replace(case, scale=None),
    ),
    Mutant("the scale is dropped", (*ATTENTION, *SELECTING), scaled(lambda case, scale: 1.0)),
    Mutant("the scale is applied twice", (*ATTENTION, *SELECTING), scaled(lambda case, scale: scale * scale)),
    Mutant("the scale is that of Dv", (*ATTENTION, *SELECTING), scaled(lambda case, scale: case.value_dim**-0.5)),
    *(
        Mutant(f"the scale given does not reach the {branch} branch", WHOLE, patches={name: called(without_scale)})
        for name, branch in zip((COMPRESSED, SELECTED, WINDOW), BRANCHES, strict=True)
    ),
    # Heads, queries and sequences.
    Mutant(
        "query head h reads KV head h % Hk",
        ATTENTION,
        lambda case: case if min(case.kv_heads, case.group) > 1 else None,
        patches={"attend": interleaved_attend},
    ),
    Mutant(
        "query head h reads KV head h % Hk",
        SELECTING,
        lambda case: case if min(case.kv_heads, case.group) > 1 else None,
        patches={"probabilities": interleaved_probabilities},
    ),
    Mutant(
        "every query head reads KV head 0",
        ATTENTION,
        lambda case: case if case.kv_heads > 1 else None,
        patches={"attend": first_kv_head},
    ),
    Mutant(
        "queries are the first Tq tokens of the keys, not the last",
        (*ATTENTION, *SELECTING),
        lambda case: case if case.num_queries != case.num_keys else None,
        patches={"sequences": from_the_start},
    ),
    Mutant("sequences of a pack are not kept apart", (*COMPRESSION, *ATTENTION, *SELECTING), one_sequence),
    # Compression.
    Mutant("the position embedding is left out", (*COMPRESSION, SHARED), tensors=no_position),
    Mutant("the hidden layer has GELU, not SiLU", (*COMPRESSION, SHARED), patches=compressing(activation=gelu)),
    Mutant("the hidden layer has ReLU, not SiLU", (*COMPRESSION, SHARED), patches=compressing(activation=torch.relu)),
    Mutant("the hidden layer has no activation", (*COMPRESSION, SHARED), patches=compressing(activation=lambda x: x)),
    Mutant(
        "what is in a block is flattened dimension by dimension, not token by token",
        (*COMPRESSION, SHARED),
        patches=compressing(order=lambda x: x.mT.contiguous().view_as(x)),
    ),
    Mutant("blocks begin one token late", (*COMPRESSION, SHARED), patches=compressing(later=1, mean=mean_of)),
    Mutant("a mean is a sum", (*COMPRESSION, SHARED), patches=compressing(mean=lambda x, config: x.sum(-2))),
    Mutant(
        "a mean is of the first d tokens of a block",
        (*COMPRESSION, SHARED),
        patches=compressing(mean=lambda x, config: x[..., : config.compress_stride, :].mean(-2)),
    ),
    # The whole.
    *(
        Mutant(
            f"gates are in the order {', '.join(BRANCHES[i] for i in order)}",
            WHOLE,
            tensors=gates(partial(_reordered, order)),
        )
        for order in ORDERS
    ),
    Mutant("gates are not applied", WHOLE, tensors=gates(torch.ones_like)),
    Mutant("gates go through a sigmoid once more", WHOLE, tensors=gates(torch.sigmoid)),
    Mutant("gates go through a softmax", WHOLE, tensors=gates(lambda x: x.softmax(-1))),
    *(
        Mutant(
            f"the {branch} branch gives 0",
            WHOLE,
            tensors=gates(partial(_without, i)),
        )
        for i, branch in enumerate(BRANCHES)
    ),
    Mutant("the window branch has the keys and values of the selected one", (NSA,), tensors=keys_of("win", "slc")),
    Mutant("the selected branch has the keys and values of the window", (NSA,), tensors=keys_of("slc", "win")),
    # Gradients.
    Mutant(
        "the gradient takes the softmax's normaliser for a constant (delta is left out)",
        ATTENTION,
        patches={"probabilities": constant_normaliser},
        backward=True,
    ),
    Mutant(
        "only the first query head of a group adds to the gradient",
        ATTENTION,
        cotangent=heads(lambda group: torch.arange(group) == 0),
        backward=True,
    ),
    Mutant(
        "only the last query head of a group adds to the gradient",
        ATTENTION,
        cotangent=heads(lambda group: torch.arange(group) == group - 1),
        backward=True,
    ),
    Mutant(
        "the last query adds nothing to the gradient",
        ATTENTION,
        cotangent=queries(lambda tokens: torch.arange(tokens) < tokens - 1),
        backward=True,
    ),
    Mutant(
        "the first query adds nothing to the gradient",
        ATTENTION,
        cotangent=queries(lambda tokens: torch.arange(tokens) > 0),
        backward=True,
    ),
    Mutant(
        "the highest selected block has no gradient",
        (SELECTED, *WHOLE),
        tensors=indices_of(without_last),
        backward=True,
    ),
    Mutant(
        "the gradient is that of a window of w - 1",
        (WINDOW, *WHOLE),
        settings(window_size=lambda c: max(0, c.window_size - 1)),
        backward=True,
    ),
    Mutant(
        "the gradient is that of a window of w + 1",
        (WINDOW, *WHOLE),
        settings(window_size=lambda c: c.window_size + 1),
        backward=True,
    ),
]
"""The mistakes; those of the forward pass first."""

FACTORS: dict[str, Callable[[Case], float]] = {
    "it is 0": lambda case: 0.0,
    "the scale is left out of it": lambda case: 1 / _scale(case),
    "the scale is in it twice": lambda case: _scale(case),
    "it is G times what it should be": lambda case: float(case.group),
    "it is a G-th of what it should be": lambda case: 1 / case.group,
    "it is l times what it should be": lambda case: float(case.config.compress_block_size),
    "it is an l-th of what it should be": lambda case: 1 / case.config.compress_block_size,
    "it is twice what it should be": lambda case: 2.0,
    "it is half of what it should be": lambda case: 0.5,
    "its sign is wrong": lambda case: -1.0,
    "the logarithm of 2 is left out of it": lambda case: 1 / 0.6931471805599453,
    "the logarithm of 2 is in it once too often": lambda case: 0.6931471805599453,
}
"""What one tensor may be times the oracle's, in words."""

NARROWER = (torch.float32, torch.float16, torch.bfloat16)

MOST = 6
"""Failing cases of a stage that are explained in one process: each takes as long as many comparisons."""

_explained: Counter[tuple[str, str]] = Counter()


def _scale(case: Case) -> float:
    return case.key_dim**-0.5 if case.scale is None else case.scale


def results(
    mutant: Mutant, stage: StageSpec, case: Case, tensors: Mapping[str, Any], dtype: torch.dtype
) -> Iterator[Any]:
    """What the oracle with the mistake gives, as `StageSpec.results`; nothing where it means nothing."""
    changed = mutant.case(case)
    if changed is None:
        return
    x = mutant.tensors(changed, upcast(tensors))
    cotangent = None
    if mutant.cotangent is not None and stage.name != SELECTION.name:
        like = stage.call(oracle, case, x)["out"]
        cotangent = mutant.cotangent(case, draw_cotangent(case, like, dtype).to(like))
    with mutant.made():
        for name, value in stage.results(oracle, changed, x, dtype, cotangent=cotangent):
            yield name, mutant.results(case, name, value)


def explain(
    impl: Any,
    stage: StageSpec,
    case: Case,
    tensors: Mapping[str, Any],
    dtype: torch.dtype,
    given: Mapping[str, Tensor],
    bound: Mapping[str, Any],
) -> list[str]:
    """Lines that say with what the last of the results `given`, which is wrong, agrees, if with anything.

    Args:
        given: what the implementation gave, by name, in order; all but the last agree with the oracle.
        bound: keyword arguments of `assert_matches` for the last.
    """
    key = getattr(impl, "name", ""), stage.name
    _explained[key] += 1
    if _explained[key] > MOST:
        return []
    *_, wrong = given
    gradient = wrong.startswith("gradient of ")
    of = f"the gradient of {wrong.removeprefix('gradient of ')}" if gradient else wrong
    right = dict(stage.results(oracle, case, upcast(tensors), dtype))[wrong]
    unaided = {**bound, "baseline": None}
    found = []
    for mutant in MUTANTS:
        if stage.name not in mutant.stages or (mutant.backward and not gradient):
            continue
        before = {wrong} if mutant.backward else set(given)
        try:
            agrees = _agrees(mutant, stage, case, tensors, dtype, given, before, bound)
        except (ValueError, IndexError, RuntimeError):  # the mistake makes no sense on this case
            continue
        if agrees:
            found.append(f"agrees with the oracle if {mutant.says}")
    if not found:
        for says, factor in FACTORS.items():
            if factor(case) != 1 and _near(given[wrong], factor(case) * right, unaided):
                found.append(f"{of} agrees with the oracle but for a factor: {says}")
    if not found:
        for narrower in NARROWER:
            coarser = torch.finfo(narrower).eps > torch.finfo(dtype).eps
            if coarser and _near(given[wrong], right, {**unaided, "dtype": narrower}):
                name = str(narrower).removeprefix("torch.")
                found.append(f"{of} agrees with the oracle to the precision of {name}: something is kept in {name}")
                break
    return found


def _agrees(
    mutant: Mutant,
    stage: StageSpec,
    case: Case,
    tensors: Mapping[str, Any],
    dtype: torch.dtype,
    given: Mapping[str, Tensor],
    names: set[str],
    bound: Mapping[str, Any],
) -> bool:
    missing = set(names)
    for name, value in results(mutant, stage, case, tensors, dtype):
        if name in names:
            if not _near(given[name], value, bounds(stage, case, tensors, name, given[name], dtype)):
                return False
            missing.discard(name)
        if not missing:
            return True
    return False


def _near(actual: Tensor, expected: Tensor, bound: Mapping[str, Any]) -> bool:
    try:
        assert_matches(actual, expected.double(), what="", **bound)
    except AssertionError:
        return False
    return True


SAME_ROWS = 0.98
"""Part of the rows of a selection that must be a mutant's: rounding may decide a few."""


def explain_selection(case: Case, tensors: Mapping[str, Any], indices: Tensor) -> list[str]:
    """Lines that say with what wrong indices agree, if with anything."""
    key = "", f"{SELECTION.name} {case.id}"
    _explained[key] += 1
    if _explained[key] > MOST:
        return []
    found = []
    for mutant in MUTANTS:
        if SELECTION.name not in mutant.stages:
            continue
        try:
            expected = dict(results(mutant, SELECTION, case, tensors, torch.float64)).get("indices")
        except (ValueError, IndexError, RuntimeError):
            continue
        if expected is None or expected.shape != indices.shape:
            continue
        same = (expected == indices.to(expected.device)).all(-1).double().mean().item()
        if same >= SAME_ROWS:
            found.append(f"agrees with the oracle if {mutant.says}")
    return found
