"""The TorchTitan TrainSpec `nsa`: flavors, job options, data. The one file that knows TorchTitan's registry.

Importing it registers the spec. A job reaches it with `experimental.custom_import = "nsa.train"`, and the `[nsa]`
section of its options with `job.custom_config_module = "nsa.titan.train_spec"`, which also imports it;
`python -m nsa.train` does both. Without either TorchTitan knows neither the model nor how to run on a CPU.
"""

import nsa.titan.release  # noqa: F401  (says which extra is missing)

# isort: split
import copy
import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, make_dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from torchtitan import config as titan
from torchtitan.components import validate
from torchtitan.components.loss import build_cross_entropy_loss
from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.components.optimizer import build_optimizers
from torchtitan.config import job_config as titan_sections
from torchtitan.hf_datasets.text_datasets import DATASETS as OTHER_DATASETS
from torchtitan.hf_datasets.text_datasets import build_text_dataloader
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec
from torchtitan.tools.logging import logger

from nsa.config import NSAConfig
from nsa.titan.cpu import prepare_cpu
from nsa.titan.data import DATASETS, CorpusLoader, corpus_tokens, tokenizer_name
from nsa.titan.flavors import FLAVORS
from nsa.titan.hugging_face import HuggingFaceAdapter
from nsa.titan.job_checks import check_job, check_trainer
from nsa.titan.metrics import build_metrics_processor
from nsa.titan.model import ModelArgs, Transformer, build_tokenizer
from nsa.titan.parallelize import parallelize_nsa, pipeline_nsa
from nsa.titan.refusals import naming, require


class _Flavors(Mapping[str, ModelArgs]):
    """Model arguments by flavor, made anew each time: TorchTitan writes the job's options into what it gets."""

    def __getitem__(self, flavor: str) -> ModelArgs:
        require(flavor in FLAVORS, "model.flavor", f"be one of {tuple(FLAVORS)}", flavor)
        return ModelArgs(**copy.deepcopy(FLAVORS[flavor]))

    def __iter__(self) -> Iterator[str]:
        return iter(FLAVORS)

    def __len__(self) -> int:
        return len(FLAVORS)


# Job options: TorchTitan's, with defaults that need no network, and one section more.

_NSA_OPTIONS: dict[str, Any] = {
    "attention": str | list[str],
    "attn_mask_type": str,
    "backend": str,
    "initial_gates": str,
    **{option.name: option.type for option in fields(NSAConfig)},
}

NSAOptions = make_dataclass(
    "NSAOptions",
    [
        *((name, kind | None, None) for name, kind in _NSA_OPTIONS.items()),
        ("cuda_graphs", Literal["auto", "on", "off"], "auto"),
        ("selection_metrics", bool, False),
        ("max_loss_ratio", float, 0.0),
        ("allow_changes", list[str], field(default_factory=list)),
    ],
)


def _describe_options() -> str:
    """The docstring of `NSAOptions`, which `--help` shows: what the classes say of which these are fields."""
    lines = ["What to change of the flavor's model: its attention, and any field of NSAConfig.", "", "Attributes:"]
    described = _described(ModelArgs) | _described(NSAConfig)
    for name in _NSA_OPTIONS:
        flavors: dict[str, list[str]] = {}
        for flavor, args in _Flavors().items():
            named = flavors.setdefault(str({**vars(args), **vars(args.nsa)}[name]), [])
            if not any(flavor == f"{other}_{kind}" for other in named for kind in ("dense", "hybrid")):
                named.append(flavor)  # no twin of one that has the same
        each = [f"{value} ({', '.join(names)})" for value, names in flavors.items()]
        defaults = "; ".join(each) if len(each) > 1 else next(iter(flavors))
        lines.append(f"    {name}: {described.get(name, '')} Unless given, the flavor's: {defaults}.")
    graphs = (
        "whether forward and backward pass of a step are captured and replayed as one CUDA graph: auto does where it "
        "can, and logs what keeps it from it."
    )
    lines.append(f"    cuda_graphs: {graphs}")
    health = "whether each step that is logged also logs how healthy the selection is, and the mean gates."
    lines.append(f"    selection_metrics: {health}")
    watch = "the run ends where the loss is so many times the median of those logged before; 0 is any that is finite."
    lines.append(f"    max_loss_ratio: {watch}")
    changes = "fields of the job that may differ from those of the checkpoint that is resumed, named as in job.json."
    return "\n".join((*lines, f"    allow_changes: {changes}"))


def _described(kind: type) -> dict[str, str]:
    """Attributes in the docstring of a class, each with its description in one line."""
    section = (inspect.getdoc(kind) or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^    (\w+): (.*(?:\n     .*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


NSAOptions.__doc__ = _describe_options()


@dataclass
class Model(titan_sections.Model):
    name: str = "nsa"
    flavor: str = "debug"
    hf_assets_path: str = os.devnull
    """Folder with Hugging Face tokenizer files; without any, bytes are tokens."""


@dataclass
class Training(titan_sections.Training):
    dataset: str = "python_stdlib"
    mixed_precision_param: Literal["bfloat16", "float32"] = field(
        default_factory=lambda: "bfloat16" if torch.accelerator.is_available() else "float32"
    )


@dataclass
class Validation(titan_sections.Validation):
    dataset: str = ""
    """By default the validation split of what is trained on, `training.dataset_path` included."""


@dataclass
class JobConfig(titan.JobConfig):
    """TorchTitan's job options with NSA's own section."""

    model: Model = field(default_factory=Model)
    training: Training = field(default_factory=Training)
    validation: Validation = field(default_factory=Validation)
    nsa: NSAOptions = field(default_factory=NSAOptions)  # type: ignore[valid-type]


# Data: our corpus by name, TorchTitan's own datasets otherwise.


def build_checked_tokenizer(job_config: titan.JobConfig) -> Any:
    """The tokenizer of a job that has been checked: the first thing that TorchTitan's trainer builds."""
    check_trainer(job_config)
    check_job(job_config)
    return build_tokenizer(job_config)


def build_dataloader(
    dp_world_size: int, dp_rank: int, tokenizer: Any, job_config: titan.JobConfig, infinite: bool = True
) -> Any:
    """The loader of `training.dataset`."""
    options = job_config.training
    if options.dataset not in DATASETS:
        return build_text_dataloader(dp_world_size, dp_rank, tokenizer, job_config, infinite)
    return _corpus_loader("training", options, tokenizer, dp_rank, dp_world_size, infinite=infinite)


_build_other_validation_dataloader = validate.build_text_validation_dataloader


def build_validation_dataloader(
    dp_world_size: int, dp_rank: int, tokenizer: Any, job_config: titan.JobConfig, infinite: bool = False
) -> Any:
    """The loader of `validation.dataset`; over our corpus every validation sees the same rows.

    Raises:
        ValueError: a dataset that does not exist, or a folder with no file for validation.
    """
    options, training = job_config.validation, job_config.training
    if not options.dataset:
        path = options.dataset_path or training.dataset_path
        options = replace(options, dataset=f"{training.dataset}_validation", dataset_path=path)
        job_config = replace(job_config, validation=options)
    known = (*DATASETS, *OTHER_DATASETS)
    if options.dataset not in known:
        raise ValueError(
            f"validation.dataset must be one of {known}, or validation.enable false, got {options.dataset!r}"
        )
    if options.dataset not in DATASETS:
        return _build_other_validation_dataloader(dp_world_size, dp_rank, tokenizer, job_config, infinite)
    return _corpus_loader("validation", options, tokenizer, dp_rank, dp_world_size, infinite=infinite, restart=True)


# The stock validator can be given everything but a loader, which it looks up by this name.
validate.build_text_validation_dataloader = build_validation_dataloader


def _corpus_loader(
    section: str, options: Any, tokenizer: Any, dp_rank: int, dp_world_size: int, **kwargs: bool
) -> CorpusLoader:
    with naming(f"{section}.dataset: "):
        tokens = corpus_tokens(DATASETS[options.dataset], tokenizer, options.dataset_path)
        sizes = (options.seq_len, options.local_batch_size, dp_rank, dp_world_size)
        return CorpusLoader(tokens, *sizes, tokenizer=tokenizer_name(tokenizer), **kwargs)


class _Stopped(Exception):
    """Validation is over before its end."""


class Validator(validate.Validator):
    """TorchTitan's validator, which can be stopped between two batches.

    Attributes:
        stopped: asked before every batch; all ranks must be given the same answer.
    """

    validation_dataloader: Any
    stopped: Callable[[], Any] = staticmethod(lambda: False)

    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        """Logs the validation loss, unless it is stopped: then no loss is logged for this step."""
        loader = self.validation_dataloader
        self.validation_dataloader = self._until_stopped(loader)
        try:
            super().validate(model_parts, step)
        except _Stopped:
            logger.info(f"Validation of step {step} was stopped, and is not logged")
        finally:
            self.validation_dataloader = loader
            for model in model_parts:
                model.train()

    def _until_stopped(self, loader: Any) -> Iterator[Any]:
        for batch in loader:
            if self.stopped():
                raise _Stopped
            yield batch


if not torch.accelerator.is_available():
    prepare_cpu()

register_train_spec(
    "nsa",
    TrainSpec(
        model_cls=Transformer,
        model_args=_Flavors(),
        parallelize_fn=parallelize_nsa,
        pipelining_fn=pipeline_nsa,
        build_optimizers_fn=build_optimizers,
        build_lr_schedulers_fn=build_lr_schedulers,
        build_dataloader_fn=build_dataloader,
        build_tokenizer_fn=build_checked_tokenizer,
        build_loss_fn=build_cross_entropy_loss,
        build_validator_fn=Validator,
        build_metrics_processor_fn=build_metrics_processor,
        state_dict_adapter=HuggingFaceAdapter,
    ),
)
