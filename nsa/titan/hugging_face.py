"""Weights in Hugging Face's format: names, layouts and shapes, both ways, and NSA layers from those of a dense model.

Dense layers have the names that `transformers` has for llama, and its rotary layout: it rotates the two halves of a
head against each other where TorchTitan rotates neighbours, so that the rows of `q_proj` and `k_proj` stand in another
order. NSA layers, which `transformers` does not know, keep TorchTitan's names and layouts, below `self_attn`.

An NSA layer that is given a dense one's projections begins with them in every branch: keys and values are copied, gates
are the constants of `ModelArgs.initial_gates`, and compressors give the mean of a block.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torchtitan.models.llama3.model.args import RoPEScalingArgs
from torchtitan.models.llama3.model.state_dict_adapter import Llama3StateDictAdapter

from nsa.config import NSAConfig
from nsa.titan.model import ModelArgs, Transformer
from nsa.titan.refusals import JobError, require
from nsa.titan.runs import write_whole

CONFIG_FILE = "config.json"

_ATTENTION = re.compile(r"layers\.(\d+)\.attention\.(.+)")
_NEVER_LOADED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_HIDDEN_SCALE = 1 / 16
"""Scale of the mean in the hidden layer of a compressor: SiLU is nearly half of its argument where that is small."""


class HuggingFaceAdapter(Llama3StateDictAdapter):
    """TorchTitan's adapter for `Transformer`.

    Attributes:
        from_dense: NSA layers that are made from dense ones by the next load, as `read` has found.
        tied: whether the output's weights are those of the embeddings in the next load, as `read` has found.
    """

    model_args: ModelArgs

    def __init__(self, model_args: ModelArgs, hf_assets_path: str | None):
        is_folder = hf_assets_path is not None and os.path.isdir(hf_assets_path)
        super().__init__(model_args, hf_assets_path if is_folder else None)
        # Which file each weight was in over there says nothing of ours.
        self.fqn_to_index_mapping = None
        self.from_dense: frozenset[int] = frozenset()
        self.tied = False
        self._native: dict[str, Any] = {}

    def read(self, folder: Path) -> list[str]:
        """Names what is missing, extra or misshapen among the weights in a folder, which are loaded next.

        Raises:
            JobError: there are none, or safetensors is not installed.
        """
        shapes = read_shapes(folder)
        theirs = {i for i in range(self.model_args.n_layers) if f"model.layers.{i}.self_attn.k_proj.weight" in shapes}
        self.from_dense = frozenset(self._sparse if theirs & self._sparse else ())
        self.tied = "lm_head.weight" not in shapes and "model.embed_tokens.weight" in shapes
        with torch.device("meta"):
            model = Transformer(self.model_args)
        expected = {name: tuple(x.shape) for name, x in self.to_hf(model.state_dict()).items()}
        extra = sorted(name for name in shapes.keys() - expected.keys() if not _NEVER_LOADED.fullmatch(name))
        return [
            f"{name} is {list(shape)}, and {list(shapes[name]) if name in shapes else 'missing'} in the checkpoint"
            for name, shape in expected.items()
            if shapes.get(name) != shape
        ] + [f"{name} is of no layer of the model, and {list(shapes[name])} in the checkpoint" for name in extra]

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

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Names and layouts of Hugging Face; where `read` has found a dense layer, its tensors for a layer of NSA."""
        self._native = dict(state_dict)
        found: dict[str, Any] = {}
        for name, value in state_dict.items():
            layer, part = _attention(name)
            if layer in self.from_dense:
                found |= self._dense_like(layer, part, value)
            elif layer in self._sparse:
                found[f"model.layers.{layer}.self_attn.{part}"] = value
            elif self.tied and name == "output.weight":
                found.setdefault("model.embed_tokens.weight", value)  # a stage of a pipeline may have no embeddings
            else:
                found[self._theirs(name)] = self._rotate(name, value, self._permute)
        return found

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        """The parameters that `to_hf` was given last, from tensors of those names; ends what `read` began."""
        found = {}
        for name, native in self._native.items():
            layer, part = _attention(name)
            if layer in self.from_dense:
                found[name] = _like(native, self._from_dense(layer, part, native, hf_state_dict))
            elif layer in self._sparse:
                found[name] = hf_state_dict[f"model.layers.{layer}.self_attn.{part}"]
            elif self.tied and name == "output.weight":
                found[name] = hf_state_dict["model.embed_tokens.weight"]
            else:
                found[name] = self._rotate(name, hf_state_dict[self._theirs(name)], self._reverse_permute)
        self.from_dense, self.tied, self._native = frozenset(), False, {}
        return found

    @property
    def _sparse(self) -> set[int]:
        return {i for i, kind in enumerate(self.model_args.layer_kinds) if kind == "nsa"}

    def _theirs(self, name: str) -> str:
        number = re.search(r"\d+", name)
        abstract = re.sub(r"\d+", "{}", name, count=1)
        theirs = next(theirs for theirs, ours in self.from_hf_map.items() if ours == abstract)
        return theirs.format(number[0]) if number else theirs

    def _rotate(self, name: str, value: Any, permute: Any) -> Any:
        """A tensor of a dense layer in the other rotary layout, if it is one that is rotated."""
        heads = {"wq": self.model_args.n_heads, "wk": self.model_args.kv_heads}
        part = name.split(".")[-2]
        return _like(value, permute(_whole(value), heads[part])) if part in heads else value

    def _dense_like(self, layer: int, part: str, value: Any) -> dict[str, Any]:
        """Room for the tensor of a dense layer that a parameter of NSA is made from."""
        short, args = part.removesuffix(".weight"), self.model_args
        rows = {"wq": args.n_heads, "wk": args.kv_heads, "wv": args.kv_heads}
        if short in rows:
            shape = (rows[short] * (args.dim // args.n_heads), args.dim)
            return {_projection(layer, short): torch.zeros(shape, dtype=value.dtype, device=value.device)}
        return {_projection(layer, short): value} if short == "wo" else {}

    def _from_dense(self, layer: int, part: str, native: Any, theirs: Mapping[str, Any]) -> Tensor:
        """The first value of a parameter of NSA, as a whole tensor."""
        args, short = self.model_args, part.removesuffix(".weight")
        if short == "wo":
            return _whole(theirs[_projection(layer, short)])
        if short in ("wq", "wk", "wv"):
            x = theirs[_projection(layer, short)]
            if short == "wq":
                return self._reverse_permute(x, args.n_heads)
            x = self._reverse_permute(x, args.kv_heads) if short == "wk" else x
            branches = native.shape[0] // x.shape[0]
            return x.view(args.kv_heads, 1, -1, args.dim).expand(-1, branches, -1, -1).reshape(native.shape)
        if part == "wg.bias":
            return torch.tensor(args.gate_logits, device=native.device).repeat(native.shape[0] // 3)
        if short.startswith("compress_") and part.split(".")[1] != "position":
            return self._mean(part.split(".")[1], native)
        return torch.zeros(native.shape, device=native.device)

    def _mean(self, name: str, native: Any) -> Tensor:
        """Weights of a compressor, of all KV heads, that give the mean of a block."""
        heads, eye = self.model_args.kv_heads, torch.eye(native.shape[1], device=native.device)
        length, mlp = self.model_args.nsa.compress_block_size, self.model_args.nsa.compression == "mlp"
        if name == "weight_out":
            return eye.repeat(heads, 1) * (2 / _HIDDEN_SCALE)
        return eye.repeat(heads * length, 1) * ((_HIDDEN_SCALE if mlp else 1) / length)


def _attention(name: str) -> tuple[int, str]:
    """Layer and parameter of an attention; layer -1 for what belongs to none."""
    match = _ATTENTION.fullmatch(name)
    return (int(match[1]), match[2]) if match else (-1, "")


def _projection(layer: int, short: str) -> str:
    return f"model.layers.{layer}.self_attn.{short[1]}_proj.weight"


def _whole(x: Any) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def _like(native: Any, whole: Tensor) -> Any:
    """A tensor that all ranks have, shared out as `native` is, and of its dtype."""
    whole = whole.to(native.dtype)
    if isinstance(native, DTensor):
        return distribute_tensor(whole, native.device_mesh, native.placements, src_data_rank=None)
    return whole


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in the safetensors files of a folder, by name.

    Raises:
        JobError: there is no such file, one that cannot be read, or safetensors is not installed.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder):
        with _opened(file) as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return shapes


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder.

    Raises:
        JobError: there are none.
    """
    files = sorted(folder.glob("*.safetensors"))
    require(bool(files), "the checkpoint", "be a folder with safetensors files", str(folder))
    return files


def _opened(file: Path) -> Any:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise JobError("safetensors must be installed for weights in Hugging Face's format") from error
    try:
        return safe_open(file, framework="pt")
    except Exception as error:  # the library's own kind
        raise JobError(f"{str(file)!r} must be a safetensors file: {error}") from error


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
