"""What NSA adds to TorchTitan's plan for llama3, which does the rest: FSDP2, HSDP, checkpointing, compilation."""

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.models.llama3 import parallelize_llama


def check_layout(parallel_dims: ParallelDims, job_config: JobConfig) -> None:
    """Refuses a layout that would fail later, or train something else without a word.

    Raises:
        ValueError: a sequence length that the layout cannot divide, or plain data parallelism.
        NotImplementedError: tensor, context or pipeline parallelism.
    """
    divisor = parallel_dims.seq_len_divisor if parallel_dims.tp_enabled or parallel_dims.cp_enabled else 1
    if job_config.training.seq_len % divisor:
        raise ValueError(
            f"training.seq_len must be a multiple of 2 * context_parallel_degree * tensor_parallel_degree ({divisor}), "
            f"got {job_config.training.seq_len}"
        )
    for name, degree in (("tensor", parallel_dims.tp), ("context", parallel_dims.cp), ("pipeline", parallel_dims.pp)):
        if degree > 1:
            raise NotImplementedError(f"parallelism.{name}_parallel_degree must be 1 for NSA models, got {degree}")
    if parallel_dims.dp_replicate_enabled and not parallel_dims.dp_shard_enabled:
        # TorchTitan normalises gradients by tokens, and DDP would divide them by its degree once more.
        raise ValueError(
            "parallelism.data_parallel_shard_degree must be at least 2 beside data_parallel_replicate_degree = "
            f"{parallel_dims.dp_replicate} (HSDP), got {parallel_dims.dp_shard}"
        )


def parallelize_nsa(model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig) -> nn.Module:
    """Applies activation checkpointing, compilation and data parallelism to a model on the meta device.

    Raises:
        ValueError, NotImplementedError: see `check_layout`.
    """
    check_layout(parallel_dims, job_config)
    model = parallelize_llama(model, parallel_dims, job_config)
    if parallel_dims.world_mesh.device_type == "cpu":
        # Gloo knows no scaled sums, which is how FSDP2 reduces gradients otherwise.
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
    return model
