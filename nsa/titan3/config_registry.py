"""Configurations by name: `python -m torchtitan.train --module nsa.titan3 --config nsa_debug`.

Options of TorchTitan come last. For another model, name a function of your own module that returns one of these
configurations with another `model_spec`.
"""

import os
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
from nsa.titan.flavors import FLAVORS
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


def _job(
    flavor: str,
    *,
    lr: float,
    warmup_steps: int,
    decay_ratio: float,
    local_batch_size: int,
    seq_len: int,
    steps: int,
    log_freq: int,
    interval: int,
    validate_every: int,
    compiled: bool = False,
    checkpointing: FullAC.Config | None = None,
) -> Trainer.Config:
    """What `nsa/configs` has for TorchTitan 0.2.2, as a configuration of TorchTitan 0.3."""
    spec = model_spec(flavor)
    return Trainer.Config(
        model_spec=spec,
        loss=CrossEntropyLoss.Config(global_vocab_size=spec.model.vocab_size),
        hf_assets_path=os.devnull,
        dump_folder=f"./outputs/titan3/{flavor}",
        tokenizer=ByteTokenizer.Config(),
        dataloader=CorpusDataLoader.Config(),
        optimizer=default_adamw(lr=lr),
        lr_scheduler=LRSchedulersContainer.Config(
            warmup_steps=warmup_steps, decay_ratio=decay_ratio, decay_type="cosine", min_lr_factor=0.1
        ),
        training=TrainingConfig(
            local_batch_size=local_batch_size,
            seq_len=seq_len,
            steps=steps,
            mixed_precision_param="bfloat16" if torch.accelerator.is_available() else "float32",
        ),
        metrics=MetricsProcessor.Config(log_freq=log_freq),
        compile=CompileConfig(enable=compiled),
        activation_checkpoint=checkpointing,
        checkpoint=CheckpointManager.Config(
            enable=True, interval=interval, keep_latest_k=2, last_save_model_only=False
        ),
        validator=Validator.Config(
            enable=True,
            freq=validate_every,
            steps=8,
            dataloader=CorpusDataLoader.Config(dataset="python_stdlib_validation"),
        ),
    )


def _debug(flavor: str) -> Trainer.Config:
    schedule: dict[str, Any] = {"lr": 3e-3, "warmup_steps": 20, "decay_ratio": 0.5, "steps": 200}
    return _job(flavor, **schedule, local_batch_size=2, seq_len=1024, log_freq=5, interval=50, validate_every=100)


def _100m(flavor: str) -> Trainer.Config:
    schedule: dict[str, Any] = {"lr": 1e-3, "warmup_steps": 100, "decay_ratio": 0.8, "steps": 2000}
    sizes: dict[str, Any] = {"local_batch_size": 4, "seq_len": 4096, "compiled": True}
    return _job(flavor, **schedule, **sizes, log_freq=10, interval=500, validate_every=100)


def _1b(flavor: str) -> Trainer.Config:
    schedule: dict[str, Any] = {"lr": 3e-4, "warmup_steps": 500, "decay_ratio": 0.8, "steps": 10000}
    sizes: dict[str, Any] = {"local_batch_size": 2, "seq_len": 8192, "compiled": True}
    # CUDA graphs cannot hold what reads the state of the random generator on the host; there is no dropout.
    whole = FullAC.Config(preserve_rng_state=False)
    return _job(flavor, **schedule, **sizes, log_freq=10, interval=500, validate_every=500, checkpointing=whole)


nsa_debug = partial(_debug, "debug")
nsa_debug_dense = partial(_debug, "debug_dense")
nsa_debug_parallel = partial(_debug, "debug_parallel")
nsa_debug_parallel_dense = partial(_debug, "debug_parallel_dense")
nsa_100m = partial(_100m, "100m")
nsa_100m_dense = partial(_100m, "100m_dense")
nsa_100m_hybrid = partial(_100m, "100m_hybrid")
nsa_1b = partial(_1b, "1b")
nsa_1b_dense = partial(_1b, "1b_dense")
