"""Weights in Hugging Face's format: names, layouts and shapes, both ways, and NSA layers from those of a dense model.

Dense layers have the names that `transformers` has for llama, and its rotary layout: it rotates the two halves of a
head against each other where TorchTitan rotates neighbours, so that the rows of `q_proj` and `k_proj` stand in another
order. NSA layers, which `transformers` does not know, keep TorchTitan's names and layouts, below `self_attn`.

An NSA layer that is given a dense one's projections begins with them in every branch: keys and values are copied, gates
are the constants of `ModelArgs.initial_gates`, and compressors give the mean of a block.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from nsa.config import NSAConfig
from nsa.titan.refusals import JobError, require

_ATTENTION = re.compile(r"layers\.(\d+)\.attention\.(.+)")
_NEVER_LOADED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_HIDDEN_SCALE = 1 / 16
"""Scale of the mean in the hidden layer of a compressor: SiLU is nearly half of its argument where that is small."""

_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "layers.{}.attention.wq.weight": "model.layers.{}.self_attn.q_proj.weight",
    "layers.{}.attention.wk.weight": "model.layers.{}.self_attn.k_proj.weight",
    "layers.{}.attention.wv.weight": "model.layers.{}.self_attn.v_proj.weight",
    "layers.{}.attention.wo.weight": "model.layers.{}.self_attn.o_proj.weight",
    "layers.{}.feed_forward.w1.weight": "model.layers.{}.mlp.gate_proj.weight",
    "layers.{}.feed_forward.w3.weight": "model.layers.{}.mlp.up_proj.weight",
    "layers.{}.feed_forward.w2.weight": "model.layers.{}.mlp.down_proj.weight",
    "layers.{}.attention_norm.weight": "model.layers.{}.input_layernorm.weight",
    "layers.{}.ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
"""Names in `transformers` of the parameters of a llama."""


class Sizes(Protocol):
    """What the weights of a model depend on; `nsa.titan.model.ModelArgs` has it."""

    dim: int
    n_layers: int
    n_heads: int
    kv_heads: int
    nsa: NSAConfig
    layer_kinds: list[str]
    gate_logits: tuple[float, ...]


class Weights:
    """Both ways between the parameters of a model and tensors in Hugging Face's format.

    Attributes:
        model_args: sizes of the model.
        from_dense: NSA layers that are made from dense ones by the next `from_hf`.
        tied: whether the output's weights are those of the embeddings in the next `from_hf`.
    """

    model_args: Any

    def __init__(self, sizes: Sizes):
        self.model_args = sizes
        self.from_dense: frozenset[int] = frozenset()
        self.tied = False
        self._native: dict[str, Any] = {}

    def look(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Decides what the next `from_hf` makes of tensors, from their shapes by name."""
        theirs = {i for i in range(self.model_args.n_layers) if f"model.layers.{i}.self_attn.k_proj.weight" in shapes}
        self.from_dense = frozenset(self._sparse if theirs & self._sparse else ())
        self.tied = "lm_head.weight" not in shapes and "model.embed_tokens.weight" in shapes

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Names and layouts of Hugging Face; where `look` has found a dense layer, its tensors for a layer of NSA."""
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
                found[llama_name(name)] = self._rotate(name, value, to_halves)
        return found

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        """The parameters that `to_hf` was given last, from tensors of those names; ends what `look` began."""
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
                found[name] = self._rotate(name, hf_state_dict[llama_name(name)], to_neighbours)
        self.from_dense, self.tied, self._native = frozenset(), False, {}
        return found

    @property
    def _sparse(self) -> set[int]:
        return {i for i, kind in enumerate(self.model_args.layer_kinds) if kind == "nsa"}

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
                return to_neighbours(x, args.n_heads)
            x = to_neighbours(x, args.kv_heads) if short == "wk" else x
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


def misfits(expected: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What is missing, extra or misshapen among tensors of these `shapes`, where `expected` ones are asked for."""
    extra = sorted(name for name in shapes.keys() - expected.keys() if not _NEVER_LOADED.fullmatch(name))
    return [
        f"{name} is {list(shape)}, and {list(shapes[name]) if name in shapes else 'missing'} in the checkpoint"
        for name, shape in expected.items()
        if shapes.get(name) != shape
    ] + [f"{name} is of no layer of the model, and {list(shapes[name])} in the checkpoint" for name in extra]


def llama_name(name: str) -> str:
    """The name that `transformers` has for a parameter of a dense layer, or of none."""
    number = re.search(r"\d+", name)
    theirs = _NAMES[re.sub(r"\d+", "{}", name, count=1)]
    return theirs.format(number[0]) if number else theirs


def to_halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of a projection `[heads * D, dim]` for RoPE that turns the two halves of a head, from neighbouring pairs."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def to_neighbours(weight: Tensor, heads: int) -> Tensor:
    """The inverse of `to_halves`."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


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
        remedy = 'pip install "nsa[hf]"'
        raise JobError(f"safetensors must be installed for weights in Hugging Face's format: {remedy}") from error
    try:
        return safe_open(file, framework="pt")
    except Exception as error:  # the library's own kind
        raise JobError(f"{str(file)!r} must be a safetensors file: {error}") from error
