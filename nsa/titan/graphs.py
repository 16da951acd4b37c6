"""Forward and backward pass of a training step as one CUDA graph, so that the GPU does not wait for Python.

The first steps run as usual, while kernels are compiled and libraries get their workspaces. Then one is captured, and
every later step copies its batch to where the captured one had its own and replays it: the same kernels on the same
memory, hence the same losses and gradients, to the bit. Clipping and the optimizer's step run outside of the graph.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchtitan.config import JobConfig

from nsa.titan.model import ModelArgs

_WARM_UP = 3


def mode_of(job_config: JobConfig) -> str:
    """The job's `nsa.cuda_graphs`: `"auto"`, `"on"` or `"off"`, as for jobs without that section."""
    return getattr(getattr(job_config, "nsa", None), "cuda_graphs", "off")


def why_not(job_config: JobConfig, model_args: ModelArgs, processes: int) -> str | None:
    """The reason why the training step of a job cannot be captured, or None."""
    if not torch.cuda.is_available():
        return "there is no GPU"
    if processes > 1:
        return f"{processes} processes exchange gradients during the backward pass"
    if model_args.attn_mask_type != "causal":
        return "nsa.attn_mask_type is block_causal, and every batch has another number of documents"
    if job_config.model.converters:
        return f"model.converters is {job_config.model.converters}, whose scales may be read on the host"
    if "nsa" in model_args.layer_kinds and (reason := _no_kernels(model_args)):
        return f"NSA layers run on the eager backend, {reason}"
    checkpointing, compiler = job_config.activation_checkpoint, job_config.compile
    compiled = compiler.enable and "model" in compiler.components
    if compiler.enable and compiler.backend == "cudagraphs":
        return "compile.backend captures graphs of its own"
    if checkpointing.mode != "none" and checkpointing.preserve_rng_state and not compiled:
        return "activation_checkpoint.preserve_rng_state reads the state of the random generator on the host"
    return None


def _no_kernels(model_args: ModelArgs) -> str | None:
    if model_args.backend == "eager":
        return "as nsa.backend says"
    from nsa import kernels

    head = torch.empty(model_args.dim // model_args.n_heads, device="cuda")
    return kernels.why_not(model_args.nsa, head)


class StepGraph:
    """A function of a batch that accumulates gradients, as a CUDA graph from its fourth call on.

    Args:
        step: takes tensors by name and returns the loss, after it has added to the gradients of `parameters`.
        parameters: those whose gradients it makes.
        steps: calls that accumulate into one gradient. With a single one gradients stay where the graph writes them.
    """

    def __init__(self, step: Callable[[dict[str, Tensor]], Tensor], parameters: Sequence[nn.Parameter], steps: int = 1):
        self._step, self._parameters, self._accumulates = step, list(parameters), steps > 1
        self._stream, self._calls = torch.cuda.Stream(), 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: dict[str, Tensor] = {}
        self._gradients: list[Tensor | None] = []
        self._loss: Tensor | None = None

    @property
    def captured(self) -> bool:
        """Whether calls replay a graph by now."""
        return self._graph is not None

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss of a batch, whose gradients are accumulated.

        Raises:
            RuntimeError: the step cannot be captured.
        """
        self._calls += 1
        first = all(parameter.grad is None for parameter in self._parameters)
        if self._graph is None and self._calls > _WARM_UP and first:
            self._capture(batch)
        if self._graph is None or not self._fits(batch):
            return self._on_stream(batch)
        for name, x in batch.items():
            self._batch[name].copy_(x)
        self._graph.replay()
        self._accumulate()
        assert self._loss is not None
        return self._loss.clone()

    def _fits(self, batch: dict[str, Tensor]) -> bool:
        return _shapes(batch) == _shapes(self._batch)

    def _on_stream(self, batch: dict[str, Tensor]) -> Tensor:
        # Gradients are accumulated on the stream of their first use, which a capture cannot leave.
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            loss = self._step(batch)
        current.wait_stream(self._stream)
        return loss

    def _capture(self, batch: dict[str, Tensor]) -> None:
        self._batch = {name: x.clone() for name, x in batch.items()}
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads, which save checkpoints or load data, may use the GPU meanwhile.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._loss = self._step(self._batch).detach()
        except RuntimeError as error:
            must = 'the training step cannot be captured; nsa.cuda_graphs must be "off"'
            # The end of a capture that failed is an error itself.
            raise RuntimeError(f"{must}: {error.__context__ or error}") from error
        self._gradients = [parameter.grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        self._graph = graph

    def _accumulate(self) -> None:
        pairs = zip(self._parameters, self._gradients, strict=True)
        made = [(parameter, gradient) for parameter, gradient in pairs if gradient is not None]
        older = [(parameter.grad, gradient) for parameter, gradient in made if parameter.grad is not None]
        for parameter, gradient in made:
            if parameter.grad is None:  # the next call writes over it
                parameter.grad = gradient.clone() if self._accumulates else gradient
        if older:
            sums, gradients = zip(*older, strict=True)
            torch._foreach_add_(sums, gradients)


def _shapes(batch: dict[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (x.shape, x.dtype) for name, x in batch.items()}


def step_graph(trainer: Any, step: Callable[..., Tensor]) -> StepGraph:
    """`Trainer.forward_backward_step` of a trainer, `step`, as a function of a batch by name."""
    apart = ("labels", "global_valid_tokens")

    def run(batch: dict[str, Tensor]) -> Tensor:
        inputs = {name: x for name, x in batch.items() if name not in apart}
        return step(input_dict=inputs, **{name: batch[name] for name in apart})

    parameters = [parameter for part in trainer.model_parts for parameter in part.parameters()]
    return StepGraph(run, parameters, trainer.gradient_accumulation_steps)
