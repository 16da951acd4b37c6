"""What NSA adds to TorchTitan's plan for llama3, which does the rest: FSDP2, HSDP, checkpointing, compilation."""

from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class
from torch.distributed.tensor import DTensor, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, parallelize_module
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.pipeline_parallel import generate_llm_fqn_per_model_part, pipeline_llm
from torchtitan.models.llama3 import parallelize_llama
from torchtitan.models.llama3.infra.parallelize import _op_sac_save_list

from nsa.module import Compressor
from nsa.ops import forward_operators
from nsa.titan.context import ContextParallel
from nsa.titan.initial import complete_gradient
from nsa.titan.model import ModelArgs, NSAAttention, Transformer
from nsa.titan.refusals import JobError, require

if find_spec("triton"):
    import nsa.kernels  # noqa: F401  (registers its operators)

# What activation checkpointing keeps under "selective" by "op": TorchTitan's list has dense attention's operators.
_op_sac_save_list.update(forward_operators())

FLOAT8 = "quantize.linear.float8"
"""TorchTitan's converter to float8, as `model.converters` names it."""


def schedules(accelerated: bool) -> tuple[str, ...]:
    """Pipeline schedules that give the gradients of one process, on accelerators or over gloo."""
    anywhere = ("GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble")
    # Before, a process sends to itself where it has two stages in a row, which gloo cannot.
    return (*anywhere, "ZBVZeroBubble") if accelerated or torch.__version__ >= "2.13" else anywhere


def stages_again() -> bool:
    """Whether PyTorch can stage a second checkpoint: 2.11 takes its stager apart after the first
    (pytorch/pytorch#183413)."""
    stager = DefaultStager(
        StagingOptions(
            use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
        )
    )
    with suppress(KeyError):
        return all(stager.stage({}) == {} for _ in range(2))
    return False


def check_layout(parallel_dims: ParallelDims, job_config: JobConfig, model_args: ModelArgs) -> None:
    """Refuses a layout that would fail later, or train something else without a word.

    Raises:
        JobError: naming the option to change, what it must be and what it is.
    """
    parallelism, validation = job_config.parallelism, job_config.validation
    lengths = {"training.seq_len": job_config.training.seq_len}
    if validation.enable:
        lengths["validation.seq_len"] = validation.seq_len
    early = job_config.optimizer.early_step_in_backward
    must = "be false: no gradient would be left to clip, and each that accumulates would be a step"
    require(not early, "optimizer.early_step_in_backward", must, early)
    if not parallel_dims.fsdp_enabled:
        offload = job_config.training.enable_cpu_offload
        require(not offload, "training.enable_cpu_offload", "be false without FSDP, whose it is", offload)
    checkpoint = job_config.checkpoint
    if checkpoint.enable and checkpoint.async_mode == "async_with_pinned_mem":
        must = 'be "async" with this release of PyTorch, which fails at the second checkpoint'
        require(stages_again(), "checkpoint.async_mode", must, checkpoint.async_mode)
    for name in ("expert_parallel_degree", "expert_tensor_parallel_degree"):
        degree = getattr(parallelism, name)
        require(degree == 1, f"parallelism.{name}", "be 1: there are no experts", degree)
    if parallel_dims.dp_replicate_enabled and not parallel_dims.fsdp_enabled:
        # TorchTitan normalises gradients by tokens, and DDP would divide them by its degree once more.
        must = f"be at least 2 beside data_parallel_replicate_degree = {parallel_dims.dp_replicate} (HSDP)"
        require(False, "parallelism.data_parallel_shard_degree", must, parallel_dims.dp_shard)
    if parallel_dims.tp_enabled or parallel_dims.cp_enabled:
        divisor = parallel_dims.seq_len_divisor
        must = f"be a multiple of 2 * context_parallel_degree * tensor_parallel_degree ({divisor})"
        for name, length in lengths.items():
            require(length % divisor == 0, name, must, length)
    if parallel_dims.tp_enabled:
        _check_tensor_parallel(parallel_dims, job_config, model_args)
    if parallel_dims.cp_enabled:
        _check_context_parallel(parallel_dims, job_config, model_args, lengths)
    if parallel_dims.pp_enabled:
        _check_pipeline(parallel_dims, job_config, model_args)


def _check_tensor_parallel(parallel_dims: ParallelDims, job_config: JobConfig, model_args: ModelArgs) -> None:
    option, degree = "parallelism.tensor_parallel_degree", parallel_dims.tp
    heads = model_args.kv_heads
    require(heads % degree == 0, option, f"divide the {heads} key/value heads of the model", degree)
    asynchronous = job_config.parallelism.enable_async_tensor_parallel
    require(not asynchronous, "parallelism.enable_async_tensor_parallel", "be false for NSA models", asynchronous)
    if FLOAT8 in job_config.model.converters:
        # Nobody has tried it scaled by tensor: TorchTitan's plan for it asks for a name that is no converter's.
        recipe, rowwise = job_config.quantize.linear.float8.recipe_name, ("rowwise", "rowwise_with_gw_hp")
        must = f"be one of {rowwise} under tensor parallelism"
        require(recipe in rowwise, "quantize.linear.float8.recipe_name", must, recipe)


def _check_context_parallel(
    parallel_dims: ParallelDims, job_config: JobConfig, model_args: ModelArgs, lengths: dict[str, int]
) -> None:
    balancer = job_config.parallelism.context_parallel_load_balancer
    option = "parallelism.context_parallel_load_balancer"
    require(balancer in (None, "headtail"), option, 'be "headtail" or none', balancer)
    mask = model_args.attn_mask_type
    require(mask == "causal", "nsa.attn_mask_type", 'be "causal" under context parallelism', mask)
    if "dense" in model_args.layer_kinds:
        # Their mask is a tensor of a kind that compilers do not know.
        components = job_config.compile.components
        compiled = job_config.compile.enable and "model" in components
        must = 'be without "model" under context parallelism with dense layers'
        require(not compiled, "compile.components", must, components)
    if "nsa" in model_args.layer_kinds:
        chunks, block = parallel_dims.cp * (2 if balancer else 1), model_args.nsa.select_block_size
        must = f"be a multiple of nsa.select_block_size in each of {chunks} chunks ({chunks * block})"
        for name, length in lengths.items():
            require(length % (chunks * block) == 0, name, must, length)


def _check_pipeline(parallel_dims: ParallelDims, job_config: JobConfig, model_args: ModelArgs) -> None:
    parallelism, training, validation = job_config.parallelism, job_config.training, job_config.validation
    schedule = parallelism.pipeline_parallel_schedule
    known = schedules(torch.accelerator.is_available())
    require(schedule in known, "parallelism.pipeline_parallel_schedule", f"be one of {known}", schedule)
    if schedule.endswith("ZeroBubble"):
        # Halves of a backward pass are taken apart by PyTorch itself, which then goes through parts of it twice.
        require(not job_config.compile.enable, "compile.enable", f"be false under {schedule}", True)
        checkpoint = job_config.activation_checkpoint
        by_op = checkpoint.mode == "selective" and checkpoint.selective_ac_option == "op"
        must = f"be a number under {schedule}"
        require(not by_op, "activation_checkpoint.selective_ac_option", must, checkpoint.selective_ac_option)
    file = parallelism.pipeline_parallel_schedule_csv
    require(not file, "parallelism.pipeline_parallel_schedule_csv", "be empty", file)
    mask = model_args.attn_mask_type
    # Schedules cut tensors along the batch, which offsets of documents do not have.
    require(mask == "causal", "nsa.attn_mask_type", 'be "causal" under pipeline parallelism', mask)
    _check_stages(parallel_dims.pp, job_config, model_args)
    size = parallelism.pipeline_parallel_microbatch_size
    must = f"be a multiple of parallelism.pipeline_parallel_microbatch_size ({size})"
    require(training.local_batch_size % size == 0, "training.local_batch_size", must, training.local_batch_size)
    microbatches = training.local_batch_size // size
    if schedule == "1F1B":
        must = f"give a microbatch to each of {parallel_dims.pp} stages"
        require(microbatches >= parallel_dims.pp, "training.local_batch_size", must, training.local_batch_size)
    elif schedule.startswith("Interleaved"):
        rounds = max(1, microbatches // parallel_dims.pp)
        must = f"give each of {rounds} rounds over {parallel_dims.pp} processes as many microbatches"
        require(microbatches % rounds == 0, "training.local_batch_size", must, training.local_batch_size)
    if validation.enable:
        # Its schedule takes the gradient that one stage hands to the next on the same process, even if there is none.
        forward = schedule != "ZBVZeroBubble"
        require(forward, "validation.enable", "be false under ZBVZeroBubble, which cannot run forward alone", True)
        # Stages are made for inputs of one shape.
        for name in ("seq_len", "local_batch_size"):
            expected, got = getattr(training, name), getattr(validation, name)
            must = f"be training.{name} ({expected}) under pipeline parallelism"
            require(got == expected, f"validation.{name}", must, got)


def _check_stages(degree: int, job_config: JobConfig, model_args: ModelArgs) -> None:
    parallelism = job_config.parallelism
    schedule = parallelism.pipeline_parallel_schedule
    a_process = 1 if issubclass(get_schedule_class(schedule), PipelineScheduleSingle) else 2
    ends = (parallelism.pipeline_parallel_first_stage_less_layers, parallelism.pipeline_parallel_last_stage_less_layers)
    parts = model_args.n_layers + sum(ends)
    if parallelism.module_fqns_per_model_part is not None:
        option, value = "parallelism.module_fqns_per_model_part", parallelism.module_fqns_per_model_part
        modules = ("tok_embeddings", *(f"layers.{i}" for i in range(model_args.n_layers)), "norm", "output")
        given = [name for part in value for name in part]
        require(sorted(given) == sorted(modules), option, f"have each of {modules} once", value)
        stages = len(value)
    elif parallelism.pipeline_parallel_layers_per_stage is not None:
        option, value = "parallelism.pipeline_parallel_layers_per_stage", parallelism.pipeline_parallel_layers_per_stage
        stages = -(-parts // value)
    else:
        option, value = "parallelism.pipeline_parallel_degree", degree
        stages = degree * a_process
        must = (
            f"give at most {parts} stages (layers, {sum(ends)} for embedding and output), where {schedule} has {stages}"
        )
        require(stages <= parts, option, must, value)
    more = a_process == 2 and not schedule.startswith("ZBV")
    right = stages >= 2 * degree and stages % degree == 0 if more else stages == a_process * degree
    number = "2 or more, but as many" if more else a_process
    must = f"give {number} stages to each of {degree} processes under {schedule}, not {stages} to all"
    require(right, option, must, value)
    if parallelism.module_fqns_per_model_part is None:
        try:
            generate_llm_fqn_per_model_part(stages, model_args.n_layers, *ends)
        except ValueError as error:
            raise JobError(f"parallelism.pipeline_parallel_*_stage_less_layers do not fit: {error}") from error


def _to_local(parameter: DTensor) -> Tensor:
    # Called so, not as a function of the class, compilers know it.
    return parameter.to_local()


class HeadParallel(ParallelStyle):
    """Shares out the parameters of a compressor by KV head, as `wk` and `wv` share out what it is given."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, device_mesh, self._partition)

    def _partition(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        assert isinstance(module, Compressor)
        for key, parameter in module.named_parameters(recurse=False):
            shard = distribute_tensor(parameter, device_mesh, [Shard(0)], src_data_rank=self.src_data_rank)
            module.register_parameter(key, nn.Parameter(shard))
        module.local = _to_local


def share_heads(model: Transformer, mesh: DeviceMesh) -> None:
    """Adds to llama3's tensor parallelism what its attention does not have: gates and compressors."""
    plan = {"wg": ColwiseParallel(), "compress_k": HeadParallel(), "compress_v": HeadParallel()}
    for block in model.layers.values():
        if isinstance(block.attention, NSAAttention):
            parallelize_module(block.attention, mesh, plan)


def share_tokens(model: Transformer, context: ContextParallel) -> None:
    """Tells every layer, sparse or dense, how sequences are shared out."""
    for block in model.layers.values():
        block.attention.context = context


def parallelize_nsa(model: Transformer, parallel_dims: ParallelDims, job_config: JobConfig) -> nn.Module:
    """Applies every parallelism but the pipeline's, checkpointing and compilation to a model on the meta device.

    Raises:
        JobError: see `check_layout`.
    """
    check_layout(parallel_dims, job_config, model.model_args)
    if parallel_dims.tp_enabled:
        share_heads(model, parallel_dims.get_mesh("tp"))
    if parallel_dims.cp_enabled:
        balanced = job_config.parallelism.context_parallel_load_balancer == "headtail"
        share_tokens(model, ContextParallel(parallel_dims.get_mesh("cp"), balanced))
    parallelize_llama(model, parallel_dims, job_config)
    if parallel_dims.tp_enabled and job_config.compile.enable and model.tok_embeddings is not None:
        # What a collective under way gives enters a compiled block as a tensor of its own kind, to which no gradient
        # comes back: embeddings would not learn, without a word. A copy is a plain tensor.
        model.tok_embeddings.register_forward_hook(lambda module, args, out: out.clone())
    if parallel_dims.world_mesh.device_type == "cpu":
        # Gloo knows no scaled sums, which is how FSDP2 reduces gradients otherwise.
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
    return model


def pipeline_nsa(
    model: nn.Module,
    parallel_dims: ParallelDims,
    job_config: JobConfig,
    device: torch.device,
    model_args: ModelArgs,
    parallelize_fn: Callable[..., nn.Module],
    loss_fn: Callable[..., Tensor],
) -> Any:
    """TorchTitan's pipeline with gradients as without it: there they are sums over tokens, not means, perhaps in parts.

    Raises:
        JobError: see `check_layout`.
    """
    check_layout(parallel_dims, job_config, model_args)
    training = job_config.training
    rows = training.global_batch_size
    if rows < 0:  # TorchTitan's way to leave it to the other two
        rows = training.local_batch_size * parallel_dims.dp_replicate * parallel_dims.dp_shard

    def loss_of_tokens(*args: Any) -> Tensor:
        loss = loss_fn(*args)
        mean = loss / (rows * training.seq_len)
        # The value of the sum, which the trainer reports, and the gradient of the mean, by which it trains.
        return loss.detach() + (mean - mean.detach())

    schedule, parts, has_first, has_last = pipeline_llm(
        model, parallel_dims, job_config, device, model_args, parallelize_fn, loss_of_tokens
    )
    step = schedule.step

    def step_to_whole_gradients(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        # The late half of a zero-bubble schedule's backward pass calls no hooks.
        for parameter in (parameter for part in parts for parameter in part.parameters()):
            complete_gradient(parameter)
        return result

    schedule.step = step_to_whole_gradients
    return schedule, parts, has_first, has_last
