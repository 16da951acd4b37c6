"""Weights in Hugging Face's format for TorchTitan 0.2.2: what `nsa.titan.weights` makes, and the config beside it."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torchtitan.models.llama3.model.args import RoPEScalingArgs
from torchtitan.protocols.state_dict_adapter import StateDictAdapter

from nsa.config import NSAConfig
from nsa.titan.model import ModelArgs, Transformer
from nsa.titan.refusals import JobError, require
from nsa.titan.runs import write_whole
from nsa.titan.weights import Weights, misfits, read_shapes

CONFIG_FILE = "config.json"


class HuggingFaceAdapter(Weights, StateDictAdapter):
    """TorchTitan's adapter for `Transformer`."""

    model_args: ModelArgs

    def __init__(self, model_args: ModelArgs, hf_assets_path: str | None):
        Weights.__init__(self, model_args)
        is_folder = hf_assets_path is not None and os.path.isdir(hf_assets_path)
        StateDictAdapter.__init__(self, model_args, hf_assets_path if is_folder else None)
        # The files that loaded weights came from do not decide the files of saved ones.
        self.fqn_to_index_mapping = None

    def read(self, folder: Path) -> list[str]:
        """Names what is missing, extra or misshapen among the weights in a folder, which are loaded next.

        Raises:
            JobError: there are none, or safetensors is not installed.
        """
        shapes = read_shapes(folder)
        self.look(shapes)
        with torch.device("meta"):
            model = Transformer(self.model_args)
        return misfits({name: tuple(x.shape) for name, x in self.to_hf(model.state_dict()).items()}, shapes)

    def differences(self, folder: Path) -> dict[str, tuple[Any, Any]]:
        """Fields of the model in which the weights of a folder are of another, theirs and ours; none without a config.

        Raises:
            JobError: as `read_config` does.
        """
        if not (folder / CONFIG_FILE).exists():
            return {}
        theirs, config = read_config(folder)
        names = ["n_heads", "kv_heads", "norm_eps", "rope_theta", "rope_scaling_args"]
        names += ["attention", "nsa"] if config["model_type"] == "nsa" else []
        pairs = {f"model.{name}": (getattr(theirs, name), getattr(self.model_args, name)) for name in names}
        return {name: (old, new) for name, (old, new) in pairs.items() if old != new}


def write_config(folder: Path, args: ModelArgs, dtype: torch.dtype, tokenizer: str) -> None:
    """Writes what the weights in `folder` are of: for dense models as `transformers` reads it.

    Args:
        tokenizer: its name, as `nsa.titan.data.tokenizer_name` gives it.
    """
    shapes, scaling = read_shapes(folder), args.rope_scaling_args
    dense = "nsa" not in args.layer_kinds
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM" if dense else "NSAForCausalLM"],
        "model_type": "llama" if dense else "nsa",
        "vocab_size": args.vocab_size,
        "hidden_size": args.dim,
        "intermediate_size": shapes["model.layers.0.mlp.gate_proj.weight"][0],
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.kv_heads,
        "head_dim": args.dim // args.n_heads,
        "hidden_act": "silu",
        "max_position_embeddings": args.max_seq_len,
        "rms_norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": scaling.scaling_factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        },
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "tokenizer": tokenizer,
    }
    if not dense:
        config |= {"attention": args.attention, "attn_mask_type": args.attn_mask_type, "nsa": asdict(args.nsa)}
    write_whole(folder / CONFIG_FILE, json.dumps(config, indent=1) + "\n")


def read_config(folder: Path, **changes: Any) -> tuple[ModelArgs, dict[str, Any]]:
    """Arguments of the model of which the weights in `folder` are, and all that its `config.json` says.

    Raises:
        JobError: the file is not there, or is of a model that `Transformer` is not.
    """
    file = folder / CONFIG_FILE
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise JobError(f"{str(file)!r} must say of what model the weights beside it are: {error}") from error
    kind = config.get("model_type")
    require(kind in ("llama", "nsa"), f"model_type in {str(file)!r}", 'be "llama" or "nsa"', kind)
    activation = config.get("hidden_act", "silu")
    require(activation == "silu", f"hidden_act in {str(file)!r}", 'be "silu"', activation)
    for name in ("attention_bias", "mlp_bias"):
        require(not config.get(name), f"{name} in {str(file)!r}", "be false: projections have no bias", True)
    try:
        dim, heads, width = config["hidden_size"], config["num_attention_heads"], config["intermediate_size"]
        head_dim = config.get("head_dim") or dim // heads
        require(head_dim * heads == dim, f"head_dim in {str(file)!r}", f"be hidden_size / {heads}", head_dim)
        arguments = {
            "dim": dim,
            "n_layers": config["num_hidden_layers"],
            "n_heads": heads,
            "n_kv_heads": config.get("num_key_value_heads", heads),
            "vocab_size": config["vocab_size"],
            # The width is 8 dim / 3, multiplied and rounded up to a multiple: so it is what it should be.
            "multiple_of": width,
            "ffn_dim_multiplier": min(1.0, width / (8 * dim)),
            "norm_eps": config["rms_norm_eps"],
            "rope_theta": config.get("rope_theta") or config["rope_parameters"]["rope_theta"],
            "rope_scaling_args": _scaling(config, file),
            "max_seq_len": config["max_position_embeddings"],
            "attention": config.get("attention", "dense"),
        }
        if "attn_mask_type" in config:
            arguments["attn_mask_type"] = config["attn_mask_type"]
        sizes = NSAConfig(**config["nsa"]) if "nsa" in config else NSAConfig()
        return ModelArgs(**{**arguments, "nsa": sizes, **changes}), config
    except (KeyError, TypeError) as error:
        raise JobError(f"{str(file)!r} must describe a llama or NSA model, and lacks something: {error}") from error


def _scaling(config: Mapping[str, Any], file: Path) -> RoPEScalingArgs:
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    require(kind in ("default", "llama3"), f"rope_type in {str(file)!r}", 'be "default" or "llama3"', kind)
    if kind == "default":
        return RoPEScalingArgs(scaling_factor=1.0)
    names = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return RoPEScalingArgs(scaling_factor=scaling["factor"], **{name: scaling[name] for name in names})
