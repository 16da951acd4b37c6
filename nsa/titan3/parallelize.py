"""What NSA adds to TorchTitan's plan for llama3, which does the rest: FSDP2, HSDP, checkpointing, compilation."""

from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torchtitan.config import ParallelismConfig
from torchtitan.distributed import ParallelDims
from torchtitan.models.llama3.parallelize import parallelize_llama

from nsa.titan.context import ContextParallel
from nsa.titan3.model import Transformer


def parallelize_nsa(
    model: Transformer, *, parallel_dims: ParallelDims, parallelism: ParallelismConfig, **options: Any
) -> nn.Module:
    """Applies every parallelism but the pipeline's to a model on the meta device; arguments are TorchTitan's."""
    if parallel_dims.cp_enabled:
        balanced = parallelism.context_parallel_load_balancer == "headtail"
        context = ContextParallel(parallel_dims.get_mesh("cp"), balanced)
        for block in model.layers.values():
            block.attention.context = context
    parallelize_llama(model, parallel_dims=parallel_dims, parallelism=parallelism, **options)
    for module in model.modules():
        # Gloo has no scaled sums, with which FSDP2 reduces gradients by default.
        if isinstance(module, FSDPModule) and parallel_dims.world_mesh.device_type == "cpu":
            module.set_force_sum_reduction_for_comms(True)
    return model
