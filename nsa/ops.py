"""What autograd, `torch.compile` and activation checkpointing see of the stages.

Each stage is an operator of `torch.library`: a schema, a fake kernel and a gradient, so that whoever traces, saves or
repeats operators finds the stages by name. PyTorch takes 150 us to pass fifteen arguments through a registered
gradient and 15 us through an `autograd.Function`. Hence a call takes the second way where nobody looks at operators.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch

from nsa.config import NSAConfig
from nsa.varlen import varlen_of


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


_SIZES = tuple(field.name for field in fields(NSAConfig) if field.type is int)


def sizes_of(config: NSAConfig) -> list[int]:
    """The integers of a configuration, as an operator takes them: a schema knows no NSAConfig."""
    return [getattr(config, name) for name in _SIZES]


def config_of(sizes: Sequence[int]) -> NSAConfig:
    """The configuration with those integers; what else it holds concerns no operator."""
    return _config_of(tuple(sizes))


@lru_cache(maxsize=256)
def _config_of(sizes: tuple[int, ...]) -> NSAConfig:
    return NSAConfig(*sizes)  # type: ignore[arg-type]


class Gradient(NamedTuple):
    """How the gradient of an operator is made.

    Attributes:
        operator: called as `operator(*douts, *tensors, *rest)`; returns a gradient for each differentiable input.
        save: from the inputs and the tuple of outputs to `tensors` and `rest`.
        num_inputs: the first inputs, as many as these, are differentiable.
        num_outputs: likewise of the outputs; the gradient of a single one may be missing, those of several may not.
    """

    operator: Callable[..., Any]
    save: Callable[[tuple[Any, ...], tuple[Tensor, ...]], tuple[tuple[Tensor | None, ...], tuple[Any, ...]]]
    num_inputs: int
    num_outputs: int = 1


OPERATORS: "dict[str, Operator]" = {}
"""The operators of the backends imported so far, by `namespace::name`."""


class Operator:
    """A function of tensors that PyTorch sees as the operator `name`.

    Args:
        name: `namespace::name`.
        function: returns a tensor or a tuple of them, none of which shares memory with an input. Its annotations make
            the schema, in which no input is a list of tensors. It runs without a graph, gradients or not.
        fake: the same for shapes alone.
        gradient: without one, a gradient that is asked for is an error.
        cheap: whether it takes less to compute the outputs again than to keep them.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        fake: Callable[..., Any],
        gradient: Gradient | None = None,
        *,
        cheap: bool = False,
    ):
        namespace, _, short = name.partition("::")
        self._library = torch.library.Library(namespace, "FRAGMENT")
        schema = torch.library.infer_schema(function, mutates_args=())
        self._library.define(short + schema, tags=(torch.Tag.pt2_compliant_tag,))
        self._library.impl(short, function, "CompositeExplicitAutograd")
        torch.library.register_fake(name, fake, lib=self._library)
        self.function, self.gradient, self.cheap = function, gradient, cheap
        OPERATORS[name] = self
        self.registered = getattr(getattr(torch.ops, namespace), short).default
        if gradient is None:
            torch.library.register_autograd(name, partial(_refuse, name), lib=self._library)
        else:
            torch.library.register_autograd(
                name,
                partial(_differentiate, gradient),
                setup_context=partial(_setup_context, gradient),
                lib=self._library,
            )

    def __call__(self, *inputs: Any) -> Any:
        if _is_observed(inputs):
            return self.registered(*inputs)
        if torch.is_grad_enabled():
            for x in inputs if self.gradient is None else inputs[: self.gradient.num_inputs]:
                if isinstance(x, Tensor) and x.requires_grad:
                    # Without a gradient, the dispatcher sees to it that none is asked for in vain.
                    return self.registered(*inputs) if self.gradient is None else _Direct.apply(self, *inputs)
        with torch.no_grad():
            return self.function(*inputs)


_PLAIN = {Tensor, torch.nn.Parameter, type(None), int, float, list}


def _is_observed(inputs: tuple[Any, ...]) -> bool:
    """Whether somebody looks at operators: a compiler, a mode of dispatching, a transformation, a kind of tensor."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or _functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    ):
        return True
    return any(issubclass(kind, Tensor) for kind in set(map(type, inputs)) - _PLAIN)


def _setup_context(gradient: Gradient, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    outputs = output if isinstance(output, tuple) else (output,)
    tensors, ctx.rest = gradient.save(inputs, outputs)
    ctx.save_for_backward(*tensors)
    ctx.no_gradients = (None,) * len(inputs)
    ctx.mark_non_differentiable(*outputs[gradient.num_outputs :])
    # Else the gradients of outputs that have none come as zeros, as large as they are.
    ctx.set_materialize_grads(gradient.num_outputs > 1)


def _differentiate(gradient: Gradient, ctx: Any, *douts: Tensor | None) -> tuple[Any, ...]:
    douts = douts[: gradient.num_outputs]
    if douts == (None,):
        return ctx.no_gradients
    found = gradient.operator(*douts, *ctx.saved_tensors, *ctx.rest)
    found = found if isinstance(found, tuple) else (found,)
    return (*found, *ctx.no_gradients[gradient.num_inputs :])


def _refuse(name: str, ctx: Any, *douts: Tensor | None) -> None:
    """Refuses derivatives that are not there, second ones above all, instead of taking them for 0."""
    raise RuntimeError(f"{name} has no derivatives")


class _Direct(torch.autograd.Function):
    """Any operator's function and gradient, around the dispatcher."""

    @staticmethod
    def forward(ctx: Any, operator: Operator, *inputs: Any) -> Any:
        output = operator.function(*inputs)
        assert operator.gradient is not None
        ctx.gradient = operator.gradient
        _setup_context(operator.gradient, ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *douts: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *_differentiate(ctx.gradient, ctx, *douts)


def forward_operators() -> set[torch._ops.OpOverload]:
    """The operators of the backends imported so far that are costly to compute again; gradients are none of them."""
    return {
        operator.registered
        for name, operator in OPERATORS.items()
        if not (operator.cheap or name.endswith("_backward"))
    }


def branch_operator(
    namespace: str,
    name: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function,
) -> Operator:
    """A branch of attention as the operator `namespace::name`; its gradient is another.

    All branches share one signature, `(q, k, v, indices, *tensors_of(varlen), num_keys, sizes, scale)`, and each
    ignores what it does not need.

    Args:
        forward: `(q, k, v, indices, varlen, num_keys, config, scale)` to output `[B, Tq, Hq, Dv]` and log-sum-exp
            `[B, Tq, Hq]`.
        backward: `(dout, q, k, v, out, lse, ...)` and the rest as above, to `dq`, `dk` and `dv`, all contiguous.
        wrap: what the functions of both operators are wrapped in.
    """

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        indices: Tensor | None,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
        cu_blocks: Tensor | None,
        queries: Tensor | None,
        num_keys: int,
        sizes: Sequence[int],
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        varlen = varlen_of(cu_seqlens_q, cu_seqlens_k, cu_blocks, queries)
        return forward(q, k, v, indices, varlen, num_keys, config_of(sizes), scale)

    def run_backward(
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        indices: Tensor | None,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
        cu_blocks: Tensor | None,
        queries: Tensor | None,
        num_keys: int,
        sizes: Sequence[int],
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        varlen = varlen_of(cu_seqlens_q, cu_seqlens_k, cu_blocks, queries)
        return backward(dout, q, k, v, out, lse, indices, varlen, num_keys, config_of(sizes), scale)

    def fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        lse = q.new_empty(q.shape[:-1], dtype=accumulation_dtype(q.dtype))
        return q.new_empty(*q.shape[:-1], v.shape[-1]), lse

    def fake_backward(dout: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        return tuple(x.new_empty(x.shape) for x in inputs[:3])

    def save(inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
        return (*inputs[:3], *outputs, *inputs[3:8]), inputs[8:]

    differentiated = Operator(f"{namespace}::{name}_backward", wrap(run_backward), fake_backward)
    return Operator(f"{namespace}::{name}", wrap(run), fake, Gradient(differentiated, save, num_inputs=3))
