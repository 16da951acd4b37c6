"""Checks of a whole training job, before any work: what TorchTitan or PyTorch would fail at later, or ignore.

`check_table` is for a TOML file, whose values TorchTitan takes as they are; `check_job` for the job that file and
command line make together. Every refusal is a `JobError`. Options that are checked where they are read, TorchTitan's
included, are not checked here.
"""

import importlib
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields, is_dataclass
from functools import reduce
from importlib.util import find_spec
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import torch
from torch._dynamo import list_backends
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import _allowed_determinism_checks_to_fns as determinism_checks
from torchtitan.components import checkpoint as titan_checkpoint
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.hf_datasets.text_datasets import DATASETS as TITAN_DATASETS
from torchtitan.protocols.model_converter import _registry_model_converter_cls as CONVERTERS
from torchtitan.protocols.model_converter import build_model_converters
from torchtitan.protocols.train_spec import TrainSpec, get_train_spec
from torchtitan.tools.logging import logger

from nsa.titan import graphs
from nsa.titan.data import DATASETS
from nsa.titan.model import ModelArgs
from nsa.titan.parallelize import check_layout
from nsa.titan.refusals import JobError, naming, require
from nsa.titan.runs import require_writable

OPTIMIZERS = ("Adam", "AdamW")
"""Names that TorchTitan's `build_optimizers` knows."""

COMPILED = ("model", "loss")
"""Components that TorchTitan compiles."""

LOADABLE = tuple(
    getattr(titan_checkpoint, name) for name in ("MODEL", "OPTIMIZER", "LR_SCHEDULER", "DATALOADER", "TRAIN_STATE")
)
"""Parts of a checkpoint, as `checkpoint.exclude_from_loading` names them."""

DEGREES = tuple(
    f"{name}_parallel{part}_degree"
    for name, part in (("data", "_replicate"), ("data", "_shard"), ("context", ""), ("tensor", ""), ("pipeline", ""))
)
"""Options of `parallelism` whose product is the number of processes."""


def _at_least(least: int) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value >= least, f"be at least {least}"


_FINITE = (lambda value: 0 <= value < math.inf, "be at least 0 and finite")
_PART = (lambda value: 0 <= value <= 1, "be from 0 to 1")
_BETA = (lambda value: 0 <= value < 1, "be at least 0 and below 1")

_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "training.local_batch_size": _at_least(1),
    "training.global_batch_size": (lambda rows: rows == -1 or rows > 0, "be at least 1, or -1 for what fits"),
    "training.seq_len": _at_least(1),
    "training.steps": _at_least(0),
    "training.gc_freq": _at_least(1),
    # Of nothing, and of less than nothing, all gradients would be clipped to zero or turned around.
    "training.max_norm": (lambda norm: norm > 0, "be above 0"),
    "validation.local_batch_size": _at_least(1),
    "validation.seq_len": _at_least(1),
    "validation.freq": _at_least(1),
    "validation.steps": (lambda steps: steps == -1 or steps > 0, "be at least 1, or -1 for the whole set"),
    "metrics.log_freq": _at_least(1),
    "optimizer.lr": _FINITE,
    "optimizer.beta1": _BETA,
    "optimizer.beta2": _BETA,
    "optimizer.eps": _FINITE,
    "optimizer.weight_decay": _FINITE,
    "lr_scheduler.warmup_steps": _at_least(0),
    "lr_scheduler.decay_ratio": _PART,
    "lr_scheduler.min_lr_factor": _PART,
    "activation_checkpoint.memory_budget": _PART,
    "checkpoint.interval": _at_least(1),
    "checkpoint.keep_latest_k": (lambda kept: kept == 0 or kept > 1, "be at least 2, or 0 for all"),
    "checkpoint.load_step": _at_least(-1),
    "profiling.profile_freq": _at_least(1),
    "profiling.profiler_active": _at_least(1),
    "profiling.profiler_warmup": _at_least(0),
    "parallelism.pipeline_parallel_microbatch_size": _at_least(1),
    "parallelism.pipeline_parallel_layers_per_stage": _at_least(1),
    "parallelism.pipeline_parallel_first_stage_less_layers": _at_least(0),
    "parallelism.pipeline_parallel_last_stage_less_layers": _at_least(0),
    **{f"parallelism.{name}": _at_least(1) for name in DEGREES},
    "parallelism.data_parallel_shard_degree": (
        lambda degree: degree == -1 or degree > 0,
        "be at least 1, or -1 for the processes that are left",
    ),
    "comm.init_timeout_seconds": _at_least(1),
    "comm.train_timeout_seconds": _at_least(1),
    "comm.trace_buf_size": _at_least(0),
    "debug.seed": (lambda seed: 0 <= seed < 2**63, "be at least 0 and below 2**63"),
}

_IGNORED = {
    "fault_tolerance.enable": "be false: this trainer is not TorchFT's",
    "memory_estimation.enable": "be false: this trainer trains",
}
"""Options that TorchTitan's trainer does not look at."""


def check_table(kind: type, table: Mapping[str, Any], section: str = "") -> None:
    """Refuses what a TOML file has of no option's name or type.

    Args:
        kind: dataclass of the options.
        table: the file, or a section of it.
        section: its name, with a dot at the end.

    Raises:
        JobError: naming the option.
    """
    hints = {field.name: field.type for field in fields(kind)}
    for name, value in table.items():
        require(name in hints, f"{section}{name}", f"be an option, one of {tuple(hints)}", value)
        hint = hints[name]
        if isinstance(hint, type) and is_dataclass(hint):
            require(isinstance(value, Mapping), f"{section}{name}", "be a section", value)
            check_table(hint, value, f"{section}{name}.")
        else:
            require(_fits(value, hint), f"{section}{name}", f"be {_words(hint)}", value)


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if origin is list:
        return isinstance(value, list) and all(_fits(entry, arguments[0]) for entry in value)
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool)
    return not isinstance(hint, type) or isinstance(value, hint)


def _words(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(_words(argument) for argument in arguments if argument is not NoneType)
    if origin is Literal:
        return f"one of {arguments}"
    if origin is list:
        return f"a list, each entry {_words(arguments[0])}"
    return {int: "an int", float: "a number", str: "a string", bool: "true or false"}.get(hint, str(hint))


def number_of_processes(job_config: JobConfig) -> int:
    """Processes of the job: torchrun's, or as many as a fake process group is to have.

    Raises:
        JobError: NGPU, which says how many a fake one has, is not there or no number.
    """
    mode = job_config.comm.mode
    if mode == "default":
        return int(os.environ["WORLD_SIZE"])
    processes = os.environ.get("NGPU", "")
    require(bool(re.fullmatch("[1-9][0-9]*", processes)), "NGPU", f"be a number for comm.mode {mode}", processes)
    return int(processes)


def check_job(job_config: JobConfig) -> None:
    """Refuses a job that would fail later, or do something else without a word.

    Raises:
        JobError: naming the option to change, what it must be and what it is.
    """
    for option, (right, must) in _RANGES.items():
        value = _value(job_config, option)
        require(value is None or right(value), option, must, value)
    for option, must in _IGNORED.items():
        require(not _value(job_config, option), option, must, True)
    spec = _check_model(job_config)
    _check_names(job_config)
    _check_steps(job_config)
    _check_checkpoints(job_config, spec)
    _check_device(job_config)
    args = spec.model_args[job_config.model.flavor]
    with naming("nsa."):
        args.update_from_config(job_config)
    processes = number_of_processes(job_config)
    parallel_dims = _check_degrees(job_config, processes)
    _check_batches(job_config, parallel_dims)
    if isinstance(args, ModelArgs):
        _check_backend(args)
        check_layout(parallel_dims, job_config, args)
        if graphs.mode_of(job_config) == "on":
            reason = graphs.why_not(job_config, args, processes)
            require(reason is None, "nsa.cuda_graphs", f'be "auto" or "off", since {reason}', "on")
    else:
        assets = job_config.model.hf_assets_path
        must = f"be a folder with the files of a tokenizer for model.name {job_config.model.name!r}"
        require(os.path.isdir(assets), "model.hf_assets_path", must, assets)
    _check_converters(job_config, parallel_dims)
    require_writable(Path(job_config.job.dump_folder))


_building: ContextVar[bool] = ContextVar("_building", default=False)


@contextmanager
def building_trainer() -> Iterator[None]:
    """A context in which the trainer of `nsa.train` is built, which does what TorchTitan's own does not."""
    token = _building.set(True)
    try:
        yield
    finally:
        _building.reset(token)


def check_trainer(job_config: JobConfig) -> None:
    """Refuses what another trainer than that of `nsa.train` would ignore, and logs that it captures no graphs.

    Raises:
        JobError: naming the option, and the entry point that knows it.
    """
    if _building.get():
        return
    elsewhere = "under this trainer: that of python -m nsa.train does it"
    mode = graphs.mode_of(job_config)
    require(mode != "on", "nsa.cuda_graphs", f'be "auto" or "off" {elsewhere}', mode)
    metrics = getattr(getattr(job_config, "nsa", None), "selection_metrics", False)
    require(not metrics, "nsa.selection_metrics", f"be false {elsewhere}", metrics)
    if mode == "auto" and torch.cuda.is_available():
        logger.info("The training step is no CUDA graph: python -m nsa.train captures it, this trainer does not")


def _value(job_config: JobConfig, option: str) -> Any:
    return reduce(getattr, option.split("."), job_config)


def _check_model(job_config: JobConfig) -> TrainSpec:
    model = job_config.model
    try:
        spec = get_train_spec(model.name)
    except (ImportError, ValueError) as error:
        raise JobError(f'model.name must be "nsa", or a model of TorchTitan that can be imported: {error}') from error
    known = tuple(spec.model_args)
    require(model.flavor in known, "model.flavor", f"be one of {known}", model.flavor)
    for converter in model.converters:
        require(converter in CONVERTERS, "model.converters", f"be among {tuple(CONVERTERS)}", converter)
    return spec


def _check_names(job_config: JobConfig) -> None:
    optimizer = job_config.optimizer.name
    require(optimizer in OPTIMIZERS, "optimizer.name", f"be one of {OPTIMIZERS}", optimizer)
    known = (*DATASETS, *TITAN_DATASETS)
    sections = {"training": job_config.training}
    if job_config.validation.enable:
        sections["validation"] = job_config.validation
    for section, options in sections.items():
        # By default the validation split of what is trained on.
        dataset = options.dataset or f"{job_config.training.dataset}_validation"
        require(dataset in known, f"{section}.dataset", f"be one of {known}", dataset)
        folder = options.dataset_path
        if dataset in DATASETS and folder:
            require(os.path.isdir(folder), f"{section}.dataset_path", "be a folder", folder)
    compiler = job_config.compile
    for component in compiler.components:
        require(component in COMPILED, "compile.components", f"be among {COMPILED}", component)
    if compiler.enable:
        must = f"be a backend of torch.compile, such as {tuple(list_backends())}"
        require(compiler.backend in list_backends(exclude_tags=None), "compile.backend", must, compiler.backend)
    _check_activation_checkpoint(job_config)
    module = job_config.experimental.custom_import
    if module:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise JobError(f"experimental.custom_import must be a module, got {module!r}: {error}") from error


def _check_activation_checkpoint(job_config: JobConfig) -> None:
    options, section = job_config.activation_checkpoint, "activation_checkpoint"
    if options.mode == "selective":
        every = options.selective_ac_option
        right = every == "op" or re.fullmatch("0*[1-9][0-9]*", every)
        require(bool(right), f"{section}.selective_ac_option", 'be "op" or a number of at least 1', every)
    if options.mode == "memory_budget":
        compiled = job_config.compile.enable and "model" in job_config.compile.components
        must = 'be another than "memory_budget" where the model is not compiled (compile.enable)'
        require(compiled, f"{section}.mode", must, options.mode)
    known = tuple(determinism_checks)
    require(
        options.determinism_check in known,
        f"{section}.determinism_check",
        f"be one of {known}",
        options.determinism_check,
    )


def _check_steps(job_config: JobConfig) -> None:
    steps, total = job_config.training.steps, job_config.lr_scheduler.total_steps
    # Past its end a schedule gives rates that rise, or are negative.
    must = f"be at least training.steps ({steps})"
    require(total is None or total >= steps, "lr_scheduler.total_steps", must, total)
    profiling = job_config.profiling
    if profiling.enable_profiling:
        needed = profiling.profiler_warmup + profiling.profiler_active
        must = f"be at least profiler_warmup + profiler_active ({needed})"
        require(profiling.profile_freq >= needed, "profiling.profile_freq", must, profiling.profile_freq)


def _check_checkpoints(job_config: JobConfig, spec: TrainSpec) -> None:
    options = job_config.checkpoint
    for name in options.exclude_from_loading:
        require(name in LOADABLE, "checkpoint.exclude_from_loading", f"be among {LOADABLE}", name)
    for name in ("last_save_in_hf", "initial_load_in_hf"):
        asked = options.enable and getattr(options, name)
        must = f"be false for model.name {job_config.model.name!r}, whose weights have no Hugging Face form"
        require(not asked or spec.state_dict_adapter is not None, f"checkpoint.{name}", must, True)
        require(not asked or bool(find_spec("safetensors")), f"checkpoint.{name}", "be false without safetensors", True)
    require(not options.initial_load_in_hf_quantized, "checkpoint.initial_load_in_hf_quantized", "be false", True)
    for when in ("last_save", "initial_load"):
        alone = not getattr(options, f"{when}_in_hf") or getattr(options, f"{when}_model_only")
        must = f"be true for checkpoint.{when}_in_hf, which is of the model alone"
        require(alone, f"checkpoint.{when}_model_only", must, False)
    if options.create_seed_checkpoint:
        require(options.enable, "checkpoint.enable", "be true for checkpoint.create_seed_checkpoint", options.enable)
        processes = number_of_processes(job_config)
        require(processes == 1, "checkpoint.create_seed_checkpoint", f"be false over {processes} processes", True)


def _check_device(job_config: JobConfig) -> None:
    if torch.accelerator.is_available():
        rank, devices = int(os.environ["LOCAL_RANK"]), torch.accelerator.device_count()
        real = job_config.comm.mode == "default"
        must = f"be at most the {devices} devices of this machine"
        require(rank < devices or not real, "nproc_per_node", must, int(os.environ.get("LOCAL_WORLD_SIZE", rank + 1)))
        return
    for name in ("enable_profiling", "enable_memory_snapshot"):
        asked = getattr(job_config.profiling, name)
        require(not asked, f"profiling.{name}", "be false without an accelerator, which TorchTitan asks", asked)


def _check_backend(args: ModelArgs) -> None:
    if args.backend != "triton" or "nsa" not in args.layer_kinds:
        return
    from nsa import kernels

    with FakeTensorMode():
        head = torch.empty(args.dim // args.n_heads, device="cuda" if torch.cuda.is_available() else "cpu")
    reason = kernels.why_not(args.nsa, head)
    if reason is not None:
        raise JobError(f'nsa.backend must be "auto" or "eager" where Triton lacks support, got "triton" and {reason}')


def _check_converters(job_config: JobConfig, parallel_dims: ParallelDims) -> None:
    try:
        build_model_converters(job_config, parallel_dims)
    except (AssertionError, ImportError, ValueError) as error:
        converters = job_config.model.converters
        raise JobError(f"model.converters must be such as this machine has, got {converters}: {error}") from error


def _check_degrees(job_config: JobConfig, processes: int) -> ParallelDims:
    degrees = {name: getattr(job_config.parallelism, name) for name in DEGREES}
    option = " * ".join(f"parallelism.{name}" for name, degree in degrees.items() if degree > 1)
    option = option or "parallelism.data_parallel_shard_degree"
    product = math.prod(degree for degree in degrees.values() if degree > 0)
    if -1 in degrees.values():
        require(processes % product == 0, option, f"divide the number of processes ({processes})", product)
    else:
        require(processes == product, option, f"be the number of processes ({processes})", product)
    replicate, shard, context, tensor, pipeline = degrees.values()
    return ParallelDims(replicate, shard, context, tensor, pipeline, ep=1, etp=1, world_size=processes)


def _check_batches(job_config: JobConfig, parallel_dims: ParallelDims) -> None:
    rows, local = job_config.training.global_batch_size, job_config.training.local_batch_size
    at_once = local * parallel_dims.dp_replicate * parallel_dims.dp_shard
    must = f"be a multiple of training.local_batch_size times the data-parallel degree ({at_once}), or -1"
    require(rows == -1 or rows % at_once == 0, "training.global_batch_size", must, rows)
