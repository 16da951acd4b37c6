"""Configurations by name: `python -m torchtitan.train --module nsa.titan3 --config nsa_debug`.

Options of TorchTitan come last. For another model, name a function of your own module that returns one of these
configurations with another `model_spec`.
"""

import os
import tomllib
from functools import partial
from typing import Any

import torch
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.components.validate import Validator
from torchtitan.config import CompileConfig, TrainingConfig
from torchtitan.distributed.activation_checkpoint import FullAC
from torchtitan.distributed.pipeline_parallel import pipeline_llm
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.trainer import Trainer

from nsa.titan.cpu import prepare_cpu
from nsa.titan.flavors import FLAVORS, config_file
from nsa.titan.refusals import require
from nsa.titan3.data import ByteTokenizer, CorpusDataLoader
from nsa.titan3.model import model_config
from nsa.titan3.parallelize import parallelize_nsa
from nsa.titan3.state_dict_adapter import HuggingFaceAdapter

if not torch.accelerator.is_available():
    prepare_cpu()

# A single process is a group of one, as under torchrun; port 0 lets the system choose a port.
for _name, _value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
    os.environ.setdefault(_name, _value)
os.environ.setdefault("MASTER_ADDR", "localhost")
os.environ.setdefault("MASTER_PORT", "0")


def model_spec(flavor: str, **changes: Any) -> ModelSpec:
    """The spec of a flavor, with changes to the arguments of `model_config`.

    Raises:
        JobError: there is no such flavor.
    """
    require(flavor in FLAVORS, "flavor", f"be one of {tuple(FLAVORS)}", flavor)
    return ModelSpec(
        name="nsa",
        flavor=flavor,
        model=model_config(**{**FLAVORS[flavor], **changes}),
        parallelize_fn=parallelize_nsa,
        pipelining_fn=pipeline_llm,
        post_optimizer_build_fn=None,
        state_dict_adapter=HuggingFaceAdapter,
    )


def _job(flavor: str) -> Trainer.Config:
    """The job of the flavor's file in `nsa/configs`, as a configuration of TorchTitan 0.3."""
    job = tomllib.loads(config_file(flavor).read_text())
    spec, validation = model_spec(flavor), job["validation"]
    # CUDA graphs cannot hold what reads the state of the random generator on the host; there is no dropout.
    recomputing = FullAC.Config(preserve_rng_state=False)
    return Trainer.Config(
        model_spec=spec,
        loss=CrossEntropyLoss.Config(global_vocab_size=spec.model.vocab_size),
        hf_assets_path=os.devnull,
        dump_folder=f"./outputs/titan3/{flavor}",
        tokenizer=ByteTokenizer.Config(),
        dataloader=CorpusDataLoader.Config(),
        optimizer=default_adamw(**job["optimizer"]),
        lr_scheduler=LRSchedulersContainer.Config(**job["lr_scheduler"]),
        training=TrainingConfig(
            **job["training"],
            mixed_precision_param="bfloat16" if torch.accelerator.is_available() else "float32",
        ),
        metrics=MetricsProcessor.Config(**job["metrics"]),
        compile=CompileConfig(**job.get("compile", {})),
        # Unless the file says otherwise, 0.2.2 recomputes parts of each layer.
        activation_checkpoint=None if job.get("activation_checkpoint") == {"mode": "none"} else recomputing,
        checkpoint=CheckpointManager.Config(**job["checkpoint"]),
        validator=Validator.Config(
            **{name: validation[name] for name in ("enable", "freq", "steps")},  # sizes are those of training there
            dataloader=CorpusDataLoader.Config(dataset="python_stdlib_validation"),
        ),
    )


nsa_debug = partial(_job, "debug")
nsa_debug_dense = partial(_job, "debug_dense")
nsa_debug_parallel = partial(_job, "debug_parallel")
nsa_debug_parallel_dense = partial(_job, "debug_parallel_dense")
nsa_100m = partial(_job, "100m")
nsa_100m_dense = partial(_job, "100m_dense")
nsa_100m_hybrid = partial(_job, "100m_hybrid")
nsa_1b = partial(_job, "1b")
nsa_1b_dense = partial(_job, "1b_dense")
