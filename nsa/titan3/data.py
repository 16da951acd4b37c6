"""The corpus and the byte-level tokenizer of `nsa.titan.data` as TorchTitan builds them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.tokenizer import BaseTokenizer

from nsa.titan import data
from nsa.titan.refusals import naming, require


class ByteTokenizer(BaseTokenizer):
    """Bytes as tokens."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, tokenizer_path: str = ""):
        super().__init__()
        self.bytes = data.ByteTokenizer()
        self.eos_id = self.bytes.eos_id

    def encode(self, *args: Any, **kwargs: Any) -> list[int]:
        return self.bytes.encode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        return self.bytes.decode(*args, **kwargs)

    def get_vocab_size(self) -> int:
        return self.bytes.get_vocab_size()


class CorpusDataLoader(BaseDataLoader):
    """`nsa.titan.data.CorpusLoader`: the same batches in every layout, resumable in any."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        dataset: str = "python_stdlib"
        infinite: bool = True
        positions: bool = False
        """Whether batches have positions, which TorchTitan's context parallelism asks for."""

    def __init__(
        self,
        config: Config,
        *,
        dp_world_size: int,
        dp_rank: int,
        tokenizer: BaseTokenizer,
        seq_len: int,
        local_batch_size: int,
        snapshot_every_n_steps: int | None = None,
    ):
        known = tuple(data.DATASETS)
        require(config.dataset in known, "dataloader.dataset", f"be one of {known}", config.dataset)
        encoder = tokenizer.bytes if isinstance(tokenizer, ByteTokenizer) else tokenizer
        with naming("dataloader.dataset: "):
            tokens = data.corpus_tokens(data.DATASETS[config.dataset], encoder, config.dataset_path)
            sizes = (seq_len, local_batch_size, dp_rank, dp_world_size)
            name = data.tokenizer_name(encoder)
            self._loader = data.CorpusLoader(tokens, *sizes, tokenizer=name, infinite=config.infinite)
        self._positions = torch.arange(seq_len).expand(local_batch_size, -1) if config.positions else None

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        for inputs, labels in self._loader:
            yield (inputs if self._positions is None else {**inputs, "positions": self._positions}), labels

    def state_dict(self) -> dict[str, Any]:
        return self._loader.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._loader.load_state_dict(state_dict)
