"""Refusals before anything is built: jobs that would fail later, or would silently train something else."""

from typing import Any

import torch

from nsa.titan.initial import gate_logits
from nsa.titan.refusals import naming, require


def check_job(config: Any, model: Any) -> None:
    """Refuses a job that cannot be done as it was asked for.

    Args:
        config: TorchTitan's `Trainer.Config`.
        model: the `Transformer.Config` of the model.

    Raises:
        JobError: naming the option to change, what it must be and what it is.
    """
    # Before, PyTorch's FSDP and pipelines lack what TorchTitan calls.
    require(hasattr(torch.distributed, "set_timeout"), "PyTorch", "be 2.14 or newer", torch.__version__)
    parallelism, compiler = config.parallelism, config.compile
    backend = parallelism.spmd_backend
    require(backend == "spmd_types", "parallelism.spmd_backend", 'be "spmd_types"', backend)
    experts = parallelism.expert_parallel_degree
    require(experts == 1, "parallelism.expert_parallel_degree", "be 1: there are no experts", experts)
    with naming("initial_gates: "):
        gate_logits(model.initial_gates)
    if parallelism.context_parallel_degree > 1:
        _check_context_parallel(config, model)
    if parallelism.pipeline_parallel_degree > 1:
        schedule = parallelism.pipeline_parallel_schedule
        known = ("GPipe", "1F1B", "Interleaved1F1B")
        require(schedule in known, "parallelism.pipeline_parallel_schedule", f"be one of {known}", schedule)
    asynchronous = compiler.enable_async_tensor_parallel
    require(not asynchronous, "compile.enable_async_tensor_parallel", "be false for NSA models", asynchronous)
    if not config.training.disable_cuda_graphs and torch.cuda.is_available() and "nsa" in model.kinds:
        _check_graphs(model)


def _check_context_parallel(config: Any, model: Any) -> None:
    parallelism, degree = config.parallelism, config.parallelism.context_parallel_degree
    balancer = parallelism.context_parallel_load_balancer
    must = 'be "headtail" or none'
    require(balancer in (None, "headtail"), "parallelism.context_parallel_load_balancer", must, balancer)
    compiled = config.compile.enable and "model" in config.compile.components
    if "dense" in model.kinds:
        # Their mask is a tensor of a kind that compilers do not know.
        must = 'be without "model" under context parallelism with dense layers'
        require(not compiled, "compile.components", must, config.compile.components)
    if "nsa" in model.kinds:
        chunks, block, length = degree * (2 if balancer else 1), model.nsa.select_block_size, config.training.seq_len
        must = f"be a multiple of select_block_size in each of {chunks} chunks ({chunks * block})"
        require(length % (chunks * block) == 0, "training.seq_len", must, length)


def _check_graphs(model: Any) -> None:
    """Refuses to capture the eager backend, which looks at values on the host."""
    from nsa import kernels

    attention = next(layer.attention for layer in model.layers if hasattr(layer.attention, "nsa"))
    head = torch.empty(model.dim // attention.n_heads, device="cuda")
    reason = 'backend is "eager"' if attention.backend == "eager" else kernels.why_not(model.nsa, head)
    must = f"be true where NSA layers run on the eager backend ({reason})"
    require(reason is None, "training.disable_cuda_graphs", must, False)
