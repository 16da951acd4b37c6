"""Models from checkpoints, in one process, whatever layout saved them."""

import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.models.llama3.model.args import RoPEScalingArgs

from nsa.config import NSAConfig
from nsa.titan import runs
from nsa.titan.data import ByteTokenizer
from nsa.titan.model import ModelArgs, Transformer
from nsa.titan.refusals import JobError


def find_checkpoint(folder: Path) -> Path:
    """The whole checkpoint that `folder` is, or the last one of the run that it belongs to.

    Raises:
        JobError: there is none.
    """
    if runs.is_whole(folder):
        return folder
    for checkpoints in (folder, folder / "checkpoint"):
        if steps := runs.saved_steps(checkpoints):
            return runs.checkpoints(checkpoints)[steps[-1]]
    raise JobError(f"--checkpoint must be a checkpoint, or the folder of a run that saved one, got {str(folder)!r}")


def model_args(job: runs.Job, **changes: Any) -> ModelArgs:
    """The arguments of the model that a recorded job trained."""
    model = {name.partition(".")[2]: value for name, value in job.items() if name.startswith("model.")}
    nsa = {name.partition(".")[2]: value for name, value in job.items() if name.startswith("nsa.")}
    sizes = {field.name for field in fields(NSAConfig)}
    arguments = {name: value for name, value in model.items() if name in {f.name for f in fields(ModelArgs)}}
    arguments["rope_scaling_args"] = RoPEScalingArgs(**model["rope_scaling_args"])
    arguments |= {name: value for name, value in nsa.items() if name not in sizes}
    return ModelArgs(**arguments, nsa=NSAConfig(**{k: v for k, v in nsa.items() if k in sizes}), **changes)


def load_model(
    folder: Path,
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    hf_assets_path: Path | None = None,
    room_for: Callable[[Any], int] | None = None,
) -> tuple[Transformer, Any]:
    """The model of a checkpoint, without gradients, and its tokenizer.

    Args:
        folder: as `find_checkpoint` takes it.
        device: a GPU where there is one, unless given.
        dtype: of the parameters; that in which they were saved unless given.
        hf_assets_path: folder of the tokenizer, unless tokens are bytes.
        room_for: the positions that will be needed, given the tokenizer; those of training unless given.

    Raises:
        JobError: no checkpoint, no record of what it is of, a tokenizer that is not at hand.
    """
    checkpoint = find_checkpoint(folder)
    job = runs.job_of(checkpoint.parent, int(checkpoint.name.rpartition("-")[2]))
    if job is None:
        raise JobError(f"{str(checkpoint.parent / runs.JOB_FILE)!r} must say what the checkpoint is of, and does not")
    if job["tokenizer"] == "bytes":
        tokenizer: Any = ByteTokenizer()
    elif hf_assets_path is None:
        raise JobError(f"--hf-assets-path must be the folder of the tokenizer, {job['tokenizer']}, got none")
    else:
        tokenizer = HuggingFaceTokenizer(str(hf_assets_path))
    positions = max(job["training.seq_len"], room_for(tokenizer) if room_for is not None else 0)
    target = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with torch.device("meta"):
        model = Transformer(model_args(job, max_seq_len=positions))
    model.to_empty(device=target)
    with torch.device(target):
        model.freqs_cis = model._precompute_freqs_cis()
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        dcp.load(state, checkpoint_id=str(checkpoint), no_dist=True)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.to(dtype) if dtype is not None else model, tokenizer
