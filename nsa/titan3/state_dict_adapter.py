"""Weights in Hugging Face's format for TorchTitan 0.3, by `nsa.titan.weights`."""

import os
from pathlib import Path
from typing import Any

from torchtitan.protocols.state_dict_adapter import StateDictAdapter

from nsa.titan.initial import gate_logits
from nsa.titan.refusals import JobError
from nsa.titan.weights import Weights, misfits, read_shapes
from nsa.titan3.model import Transformer, other_name, own_name


class _Sizes:
    """The sizes that `Weights` needs, from a configuration."""

    def __init__(self, config: Transformer.Config):
        attention = config.layers[0].attention
        self.dim, self.n_layers, self.nsa = config.dim, len(config.layers), config.nsa
        self.n_heads, self.kv_heads = attention.n_heads, attention.n_kv_heads
        self.layer_kinds, self.gate_logits = config.kinds, gate_logits(config.initial_gates)


class HuggingFaceAdapter(Weights, StateDictAdapter):
    """TorchTitan's adapter for `Transformer`: dense layers are llama's, and NSA layers can begin with those."""

    def __init__(self, model_config: Transformer.Config, hf_assets_path: str | None):
        Weights.__init__(self, _Sizes(model_config))
        is_folder = hf_assets_path is not None and os.path.isdir(hf_assets_path)
        StateDictAdapter.__init__(self, model_config, hf_assets_path if is_folder else None)
        # The files that loaded weights came from do not decide the files of saved ones.
        self.fqn_to_index_mapping = None
        self._asked_for: dict[str, Any] = {}

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        self._asked_for = super().to_hf({other_name(name): value for name, value in state_dict.items()})
        return self._asked_for

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        return {own_name(name): value for name, value in super().from_hf(hf_state_dict).items()}

    def get_hf_storage_reader(self, path: str, from_quantized: bool = False) -> Any:
        """A reader of the folder, after its tensors were compared with those that `to_hf` gave last.

        TorchTitan calls `to_hf` before it names the folder. The names depend on the folder, so the dictionary that
        `to_hf` gave is filled anew.

        Raises:
            JobError: weights are missing, superfluous or of another shape.
        """
        shapes = read_shapes(Path(path))
        self.look(shapes)
        asked_for = self._asked_for
        found = Weights.to_hf(self, self._native)
        asked_for.clear()
        asked_for.update(found)
        wrong = misfits({name: tuple(x.shape) for name, x in found.items()}, shapes)
        if wrong:
            raise JobError(f"{path!r} must hold the weights of the model: {'; '.join(wrong[:5])}")
        return super().get_hf_storage_reader(path, from_quantized)
