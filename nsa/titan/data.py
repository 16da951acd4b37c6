"""Training data that needs no network: a byte-level tokenizer, a corpus that is always there, an exact loader.

The corpus is the source code of the running Python's standard library, or a folder of text the user names. It becomes
one stream of tokens, each document followed by end-of-sequence, and the stream is cut into rows of `L` tokens. The
loader hands rows out by their place in the stream alone, so what a training step sees depends on the global batch size
and on nothing else: not on the data-parallel degree, not on gradient accumulation, not on where a run was interrupted.

Shapes: `T` tokens of a text or stream, `b` rows a rank and iteration, `L` sequence length.
"""

import ctypes
import hashlib
import json
import operator
import os
import sysconfig
import zlib
from collections.abc import Container, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, get_args

import torch
from torch import Tensor

Split = Literal["train", "validation"]

DATASETS: dict[str, Split] = {"python_stdlib": "train", "python_stdlib_validation": "validation"}
"""Dataset names of a job configuration, and the split each stands for."""

_INTEGERS = (torch.uint8, torch.uint16, torch.int16, torch.int32, torch.int64)
_VALIDATION_EVERY = 20  # one file in so many, about 5%, is held out for validation
_STDLIB_SUFFIXES = frozenset({".py"})
_FOLDER_SUFFIXES = frozenset({".py", ".txt", ".md"})
# Installed packages are not the standard library, and its tests are half its bytes, much of that tables of numbers.
_STDLIB_PRUNED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})


class Tokenizer(Hashable, Protocol):
    """What the corpus asks of a tokenizer; TorchTitan's `BaseTokenizer` and `ByteTokenizer` both have it."""

    def encode(self, text: str, *, add_bos: bool, add_eos: bool) -> list[int]:
        """Token ids of `text`."""


@dataclass(frozen=True)  # all instances are equal, so that they share one cached corpus
class ByteTokenizer:
    """Every UTF-8 byte is its own token, 0 to 255; three special tokens follow. Stands in for a `BaseTokenizer`."""

    bos_id: ClassVar[int] = 256
    eos_id: ClassVar[int] = 257
    pad_id: ClassVar[int] = 258
    _special: ClassVar[dict[int, bytes]] = {256: b"<bos>", 257: b"<eos>", 258: b"<pad>"}

    def encode(self, text: str, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        """Token ids of `text`; raises `UnicodeEncodeError`, a `ValueError`, for a lone surrogate: it has no bytes."""
        return [self.bos_id] * add_bos + list(text.encode()) + [self.eos_id] * add_eos

    def encode_bytes(self, data: bytes) -> Tensor:
        """Token ids of UTF-8 bytes as an int32 tensor `[T]`, at memory speed."""
        if not data:  # torch.frombuffer refuses an empty buffer, and warns of one that cannot be written to
            return torch.empty(0, dtype=torch.int32)
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(torch.int32)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`, with U+FFFD where bytes are not UTF-8; raises `ValueError` for an id out of the vocabulary."""
        data = bytearray()
        for i in map(int, ids):
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"ids must lie in [0, {self.vocab_size}), got {i}")
            if i < 256:
                data.append(i)
            elif not skip_special_tokens:
                data += self._special[i]
        return data.decode(errors="replace")

    @property
    def vocab_size(self) -> int:
        """Number of token ids, the special ones included."""
        return 256 + len(self._special)

    def get_vocab_size(self) -> int:
        """`vocab_size`, under the name TorchTitan calls it by."""
        return self.vocab_size


def padded_vocab_size(tokenizer: Any) -> int:
    """The vocabulary of a model for `tokenizer`: a multiple of 64, so that matrix products stay aligned."""
    return -(-tokenizer.get_vocab_size() // 64) * 64


def corpus_files(split: Split, path: str | os.PathLike[str] | None = None) -> list[Path]:
    """Files of a split, in the order in which they are read.

    A file's split and place follow from a hash of its path relative to the folder and from nothing else: about 5% of
    the files are validation, subjects are mixed, and neither the order of directory listings nor where the folder
    lies matters.

    Args:
        split: `"train"` or `"validation"`.
        path: a folder, whose `*.py`, `*.txt` and `*.md` files are taken at any depth; without it the standard library
            of the running Python, whose `*.py` files are taken, tests and installed packages left out.

    Raises:
        ValueError: an unknown split, no such folder, or a folder with no file for this split.
    """
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {get_args(Split)}, got {split!r}")
    if path:
        folder, suffixes, pruned = Path(path), _FOLDER_SUFFIXES, frozenset[str]()
    else:
        folder, suffixes, pruned = Path(sysconfig.get_path("stdlib")), _STDLIB_SUFFIXES, _STDLIB_PRUNED
    if not folder.is_dir():
        raise ValueError(f"the corpus must be a folder, but there is none at {str(folder)!r}")
    every = sorted((zlib.crc32(os.fsencode(name)), name) for name in _relative_names(folder, suffixes, pruned))
    files = [folder / name for code, name in every if (code % _VALIDATION_EVERY == 0) == (split == "validation")]
    if not files:
        raise ValueError(
            f"the corpus in {str(folder)!r} has no {split} file: of its {len(every)} files {sorted(suffixes)}, "
            f"about one in {_VALIDATION_EVERY}, chosen by name, is for validation and the others are for training"
        )
    return files


def _relative_names(folder: Path, suffixes: Container[str], pruned: Container[str]) -> Iterator[str]:
    """POSIX paths, relative to `folder`, of the files with one of the suffixes outside directories called `pruned`."""
    for root, directories, names in os.walk(folder):
        directories[:] = [name for name in directories if name not in pruned]  # os.walk enters what is left
        for name in names:
            file = Path(root, name)
            if file.suffix in suffixes and file.is_file():  # not a dangling link
                yield file.relative_to(folder).as_posix()


def corpus_tokens(split: Split, tokenizer: Tokenizer, path: str | os.PathLike[str] | None = None) -> Tensor:
    """All documents of a split as one int32 stream `[T]`, each followed by the tokenizer's end-of-sequence.

    Read once a process: later calls with the same split, tokenizer and folder share the tensor, which is therefore
    not to be written to. Bytes that are not UTF-8 become U+FFFD before the tokenizer sees them.

    Args:
        split: `"train"` or `"validation"`.
        tokenizer: a `ByteTokenizer`, for which this is fast, or any other `Tokenizer`.
        path: as in `corpus_files`.

    Raises:
        ValueError: as `corpus_files`.
    """
    return _corpus_tokens(split, tokenizer, os.path.abspath(path) if path else None)


@lru_cache(maxsize=4)
def _corpus_tokens(split: Split, tokenizer: Tokenizer, path: str | None) -> Tensor:
    # Bytes, because read_text would turn "\r\n" into "\n".
    texts = (file.read_bytes().decode(errors="replace") for file in corpus_files(split, path))
    if isinstance(tokenizer, ByteTokenizer):
        # All at once, because converting file by file takes longer than reading them.
        documents = [text.encode() + b"\0" for text in texts]  # the last byte is the place of end-of-sequence
        tokens = tokenizer.encode_bytes(b"".join(documents))
        tokens[torch.tensor([len(document) for document in documents]).cumsum(0) - 1] = tokenizer.eos_id
        return tokens
    ids = [i for text in texts for i in tokenizer.encode(text, add_bos=False, add_eos=True)]
    return torch.tensor(ids, dtype=torch.int32)


def tokenizer_name(tokenizer: Any) -> str:
    """A name that equal tokenizers share: `"bytes"`, or the class and a hash of the vocabulary."""
    if isinstance(tokenizer, ByteTokenizer):
        return "bytes"
    name = type(tokenizer).__name__
    if not hasattr(tokenizer, "get_vocab"):
        return name
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items(), key=operator.itemgetter(1))).encode()
    return f"{name} {hashlib.sha256(vocabulary).hexdigest()[:12]}"


class CorpusLoader:
    """Batches of a token stream, the same whatever the layout, exactly resumable in any layout.

    A row is `L` tokens and their successors: the row at token `p` has `tokens[p : p + L]` as its input and
    `tokens[p + 1 : p + L + 1]` as its labels, and the next row is at `p + L`. The first row of a pass over the stream
    is at token 0; where the tokens left do not make a row, the next pass begins. With `n` ranks a batch is the next
    `n b` rows, of which data-parallel rank `k` gets the `k`-th `b`. A step of `a` iterations thus sees the next `a n b`
    rows of the stream, however that product is made up, and the position is the same on every rank.

    Iterating yields `({"input": int64 [b, L]}, labels int64 [b, L])`.

    The position is kept in tokens. A run that is resumed with another `L` goes on with the first token that was not an
    input yet, wherever that lies between its own rows: nothing is skipped and nothing seen twice.

    Args:
        tokens: the stream, integers `[T]`.
        seq_len: `L`.
        batch_size: `b`, rows a rank and iteration.
        dp_rank: `k`.
        dp_world_size: `n`.
        infinite: go on with the first row after the last, for ever; otherwise stop where the rows left do not make a
            batch for every rank, so that all ranks get equally many.
        restart: every `iter()` begins at token 0, as validation wants it; otherwise it goes on from the position, as
            training wants it. By default only an infinite loader goes on.
        tokenizer: the name of what made the tokens, see `tokenizer_name`.

    Raises:
        TypeError: a size or rank that is not an integer, or tokens that are not a tensor of integers.
        ValueError: a size or rank out of range, tokens of another shape, too few tokens for one row, or for one batch
            for every rank where the loader is not infinite.
    """

    def __init__(
        self,
        tokens: Tensor,
        seq_len: int,
        batch_size: int,
        dp_rank: int = 0,
        dp_world_size: int = 1,
        *,
        infinite: bool = True,
        restart: bool | None = None,
        tokenizer: str = "",
    ) -> None:
        self.seq_len = _at_least("seq_len", seq_len, 1)
        self.batch_size = _at_least("batch_size", batch_size, 1)
        self.dp_world_size = _at_least("dp_world_size", dp_world_size, 1)
        self.dp_rank = _at_least("dp_rank", dp_rank, 0)
        if self.dp_rank >= self.dp_world_size:
            raise ValueError(f"dp_rank must be less than dp_world_size ({self.dp_world_size}), got {self.dp_rank}")
        if not isinstance(tokens, Tensor) or tokens.dtype not in _INTEGERS:
            raise TypeError(f"tokens must be a tensor of integers, got {getattr(tokens, 'dtype', type(tokens))}")
        if tokens.ndim != 1:
            raise ValueError(f"tokens must have one dimension, got shape {tuple(tokens.shape)}")
        if len(tokens) <= self.seq_len:
            raise ValueError(f"tokens must hold a sequence, seq_len + 1 = {self.seq_len + 1}, got {len(tokens)}")
        self.tokens = tokens
        self._rows = tokens.unfold(0, self.seq_len + 1, 1)  # [T - L, L + 1], a view: the row at every token
        self.num_rows = self._rows_from(0)
        self._global_batch_size = self.batch_size * self.dp_world_size
        if not infinite and self.num_rows < self._global_batch_size:
            raise ValueError(
                f"tokens must hold a batch for every rank, batch_size * dp_world_size = {self._global_batch_size} "
                f"rows of seq_len {self.seq_len}, got {self.num_rows}"
            )
        self.infinite = infinite
        self.restart = restart if restart is not None else not infinite
        self.tokenizer = tokenizer
        self._position = (0, 0)  # passes that are over, and the token of the next row

    @cached_property
    def corpus(self) -> str:
        """What tells the stream from others: its length and a hash of its tokens."""
        tokens = self.tokens.to(torch.int32).contiguous()
        view = (ctypes.c_char * tokens.nbytes).from_address(tokens.data_ptr())  # no copy, and no need of NumPy
        return f"{len(tokens)} tokens, sha256 {hashlib.sha256(view).hexdigest()[:16]}"

    def _rows_from(self, token: int) -> int:
        """The number of whole rows from a token to the end of the pass."""
        return (len(self.tokens) - 1 - token) // self.seq_len

    def _advance(self, position: tuple[int, int], rows: int) -> tuple[int, int]:
        """The position so many rows further on, which may be the end of a pass: no row need be left there."""
        over, token = position
        left = self._rows_from(token)
        if rows <= left:
            return over, token + rows * self.seq_len
        passes, row = divmod(rows - left - 1, self.num_rows)
        return over + 1 + passes, (row + 1) * self.seq_len

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        own = (0, 0)  # restarting iterators do not disturb one another; the others are all one stream
        while True:
            start = own if self.restart else self._position
            if not self.infinite and self._rows_from(start[1]) < self._global_batch_size:
                return
            # Moved before the batch is handed over: a state taken while the batch is in use counts it as seen.
            self._position = own = self._advance(start, self._global_batch_size)
            first = self.dp_rank * self.batch_size
            ends = [self._advance(start, first + row + 1)[1] for row in range(self.batch_size)]
            rows = self._rows[torch.tensor(ends) - self.seq_len].long()  # [b, L + 1]
            yield {"input": rows[:, :-1].contiguous()}, rows[:, 1:].contiguous()

    def state_dict(self) -> dict[str, Any]:
        """The position and what it is a position in, the same on every rank.

        `passes` over the stream are over and the next row is at `token`, unless no row is left there; rows were of
        `seq_len` tokens, of the stream `corpus` made by `tokenizer`.
        """
        passes, token = self._position
        return {
            "passes": passes,
            "token": token,
            "seq_len": self.seq_len,
            "corpus": self.corpus,
            "tokenizer": self.tokenizer,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Move to a position saved in this or any other layout; an empty state leaves the loader where it is.

        Another row length is taken on from the same token. A loader that restarts begins at token 0 all the same.

        Raises:
            ValueError: a state that `state_dict` does not make, or one of another corpus or tokenizer.
        """
        if not state_dict:
            return
        fields = {"passes": int, "token": int, "seq_len": int, "corpus": str, "tokenizer": str}
        if state_dict.keys() != fields.keys() or any(
            type(state_dict[name]) is not kind for name, kind in fields.items()
        ):
            raise ValueError(f"state_dict must have {_typed(fields)}, got {dict(state_dict)!r}")
        for name in ("tokenizer", "corpus"):
            if state_dict[name] != getattr(self, name):
                raise ValueError(
                    f"the state is of another {name}: {state_dict[name]!r}, where this loader has "
                    f"{getattr(self, name)!r}, in which its position means nothing"
                )
        passes, token = state_dict["passes"], state_dict["token"]
        if passes < 0 or not 0 <= token < len(self.tokens):
            raise ValueError(
                f"passes must be at least 0 and token in [0, {len(self.tokens)}), got {passes} and {token}"
            )
        self._position = (passes, token)


def _typed(fields: Mapping[str, type]) -> str:
    return ", ".join(f"{name}: {kind.__name__}" for name, kind in fields.items())


def _at_least(name: str, value: Any, least: int) -> int:
    """`value` as an int; raises `TypeError` where it is none, `ValueError` where it is below `least`."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, got {value!r} ({type(value).__name__})")
    if operator.index(value) < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return operator.index(value)
