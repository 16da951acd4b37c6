"""Models from checkpoints, in one process, whatever layout saved them."""

import nsa.titan.release  # noqa: F401  (says which extra is missing)

# isort: split
import re
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.models.llama3.model.args import RoPEScalingArgs
from torchtitan.protocols.train_spec import get_train_spec

from nsa.config import NSAConfig
from nsa.module import INIT_STD, NativeSparseAttention
from nsa.titan import runs
from nsa.titan.data import ByteTokenizer, padded_vocab_size, tokenizer_name
from nsa.titan.hugging_face import CONFIG_FILE, HuggingFaceAdapter, read_config
from nsa.titan.model import ModelArgs, Transformer
from nsa.titan.refusals import JobError
from nsa.titan.weights import weight_files


def find_checkpoint(folder: Path) -> Path:
    """The whole checkpoint that `folder` is, or the last one of the run that it belongs to.

    Raises:
        JobError: there is none.
    """
    folder = folder.resolve()
    if runs.is_whole(folder):
        return folder
    for checkpoints in (folder, folder / "checkpoint"):
        if steps := runs.saved_steps(checkpoints):
            return runs.checkpoints(checkpoints)[steps[-1]]
    raise JobError(
        f"the checkpoint must be a folder step-N, or the folder of a run that saved one, got {str(folder)!r}"
    )


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
        folder: as `find_checkpoint` takes it, or one with `config.json` and weights in Hugging Face's format.
        device: a GPU where there is one, unless given.
        dtype: of the parameters; that in which they were trained unless given.
        hf_assets_path: folder of the tokenizer, unless tokens are bytes; where it was in training unless given.
        room_for: the positions that will be needed, given the tokenizer; those of training unless given.

    Raises:
        JobError: no checkpoint, no record of what it is of, weights that are not those of the record, a tokenizer that
            is not at hand or another one, a device that is not there.
    """
    checkpoint = folder if (folder / CONFIG_FILE).exists() else find_checkpoint(folder)
    if (checkpoint / CONFIG_FILE).exists():
        return _load_weights(checkpoint, device, dtype, hf_assets_path, room_for)
    record = checkpoint.parent / runs.JOB_FILE
    step = re.fullmatch(r"step-(\d+)", checkpoint.name)
    entry = runs.entry_of(checkpoint.parent, int(step[1])) if step is not None else None
    if entry is None:
        raise JobError(f"{str(record)!r} must say what {checkpoint.name!r} is a checkpoint of, and does not")
    job, assets = entry["job"], entry.get("with", {}).get("hf_assets_path")
    try:
        known = None if assets is None else checkpoint.parent / assets
        tokenizer = _find_tokenizer(job["tokenizer"], hf_assets_path or known)
        positions = max(job["training.seq_len"], room_for(tokenizer) if room_for is not None else 0)
        arguments, trained_in = model_args(job, max_seq_len=positions), getattr(torch, job["training.dtype"])
    except (KeyError, TypeError) as error:
        raise JobError(f"{str(record)!r} must be of this version of the code, and lacks something: {error}") from error
    model = _empty(arguments, trained_in, device)
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            dcp.load(state, checkpoint_id=str(checkpoint), no_dist=True)
    except CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise JobError(f"{str(checkpoint)!r} must hold the weights that {record.name} tells of: {reason}") from error
    return _finished(model, dtype), tokenizer


def untrained_model(
    flavor: str,
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    room_for: Callable[[Any], int] | None = None,
) -> tuple[Transformer, ByteTokenizer]:
    """A model of a flavor whose weights are noise, to be measured, and the tokenizer that takes bytes for tokens.

    Args:
        flavor: as training knows it, `"1b"` for one.
        device, dtype, room_for: as `load_model` takes them.

    Raises:
        JobError: no such flavor, or a device that is not there.
    """
    import nsa.titan.train_spec  # noqa: F401 (registers the flavors)

    tokenizer, arguments = ByteTokenizer(), get_train_spec("nsa").model_args[flavor]
    assert isinstance(arguments, ModelArgs)
    arguments.vocab_size = padded_vocab_size(tokenizer)
    if room_for is not None:
        arguments.max_seq_len = max(arguments.max_seq_len, room_for(tokenizer))
    model = _empty(arguments, dtype or torch.float32, device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1)
            else:  # drawn where it lies: the weights of training are drawn on the CPU, which takes long
                parameter.normal_(std=INIT_STD)
    return _finished(model, None), tokenizer


def _load_weights(
    folder: Path,
    device: str | None,
    dtype: torch.dtype | None,
    assets: Path | None,
    room_for: Callable[[Any], int] | None,
) -> tuple[Transformer, Any]:
    """`load_model` of weights in Hugging Face's format."""
    arguments, config = read_config(folder)
    if config.get("tokenizer") == "bytes":
        tokenizer = _find_tokenizer("bytes", assets)
    else:
        assets = assets or folder
        tokenizer = _find_tokenizer(config.get("tokenizer"), assets)
    if room_for is not None:
        arguments.max_seq_len = max(arguments.max_seq_len, room_for(tokenizer))
    saved_in = getattr(torch, config.get("torch_dtype") or config.get("dtype") or "float32")
    model = _empty(arguments, saved_in, device)
    adapter = HuggingFaceAdapter(arguments, None)
    if misfits := adapter.read(folder):
        raise JobError(f"{str(folder)!r} must hold the weights that its {CONFIG_FILE} tells of: {misfits[0]}")
    from safetensors.torch import load_file

    theirs: dict[str, Tensor] = {}
    for file in weight_files(folder):
        theirs |= load_file(file)
    adapter.to_hf(dict(model.named_parameters()))
    with torch.no_grad():
        for name, value in adapter.from_hf(theirs).items():
            model.get_parameter(name).copy_(value)
    return _finished(model, dtype), tokenizer


def _empty(arguments: ModelArgs, dtype: torch.dtype, device: str | None) -> Transformer:
    """A model without weights; raises `JobError` where there is no such device."""
    target = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        raise JobError(f"the device must be one that is here, got {target!r}: {error}") from error
    with torch.device("meta"):
        model = Transformer(arguments)
    # The table of angles is complex, and no parameter.
    _convert(model, dtype)
    model.to_empty(device=target)
    with torch.device(target):
        model.freqs_cis = model._precompute_freqs_cis()
    return model


def _finished(model: Transformer, dtype: torch.dtype | None) -> Transformer:
    if dtype is not None:
        _convert(model, dtype)
    for layer in model.modules():
        if isinstance(layer, NativeSparseAttention):
            layer.join_projections()
    return model.requires_grad_(False)


def _convert(model: Transformer, dtype: torch.dtype) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _find_tokenizer(name: str | None, folder: Path | None) -> Any:
    """The tokenizer of that name in a job, or any where it has none.

    Raises:
        JobError: another one is at hand, or none.
    """
    if name == "bytes":
        if folder is not None:
            raise JobError(f"there must be no folder of a tokenizer where tokens are bytes, got {str(folder)!r}")
        return ByteTokenizer()
    if folder is None:
        raise JobError(f"the folder of the tokenizer must be given, {name}, got none")
    try:
        tokenizer = HuggingFaceTokenizer(str(folder))
    except Exception as error:  # the library's own kinds
        raise JobError(f"{str(folder)!r} must hold the files of a tokenizer: {error}") from error
    if name is not None and tokenizer_name(tokenizer) != name:
        raise JobError(f"the tokenizer must be that of training, {name}, got {tokenizer_name(tokenizer)}")
    return tokenizer
