"""Keys and values of sequences, each of its own length, in memory that is taken once: what all caches share."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from nsa.config import integer

Pair = tuple[Tensor, Tensor]


def computed_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of products with `weight`: autocast's where that is on, or else its own."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def put_next(pair: Pair, lengths: Tensor, k: Tensor, v: Tensor) -> None:
    """Writes keys and values `[B, 1, Hk, D]` of the next token of every sequence, at its place in a ring."""
    rows = torch.arange(len(lengths), device=lengths.device)
    for store, x in zip(pair, (k, v), strict=True):
        if store.shape[1]:
            store.index_put_((rows, lengths % store.shape[1]), x[:, 0])


class Stores:
    """Keeps keys and values of sequences, each of its own length; all memory is taken at once.

    Args:
        batch, capacity, num_kv_heads, head_dim, value_dim, dtype, device: as `KVCache` takes them.
        lengths: tokens a sequence that there is room for, of each kind of keys and values.
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        value_dim: int | None,
        dtype: torch.dtype,
        device: torch.device | str | None,
        lengths: Mapping[str, int],
    ):
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be floating, got {dtype}")
        self.batch, self.capacity = integer("batch", batch, 1), capacity
        heads, dim = integer("num_kv_heads", num_kv_heads, 1), integer("head_dim", head_dim, 1)
        self._widths = dim, dim if value_dim is None else integer("value_dim", value_dim, 1)
        self._pairs: dict[str, Pair] = {}
        with torch.inference_mode(False):  # what is made in that mode cannot be written to outside of it
            for name, length in lengths.items():
                keys, values = (
                    torch.zeros(self.batch, length, heads, width, dtype=dtype, device=device) for width in self._widths
                )
                self._pairs[name] = keys, values
            self._lengths_on_device = torch.zeros(self.batch, dtype=torch.int64, device=device)
        self._lengths = [0] * self.batch
        self._known_on_device = True

    def lengths_on_device(self) -> Tensor:
        """Tokens of each sequence so far, int64 `[B]`; steps count on there."""
        if not self._known_on_device:
            self._lengths_on_device.copy_(torch.tensor(self._lengths))
            self._known_on_device = True
        return self._lengths_on_device

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence so far."""
        return tuple(self._lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(x.nbytes for pair in self._pairs.values() for x in pair)

    def runs_of_equal_length(self) -> list[slice]:
        """The sequences, in runs of neighbours that have one length."""
        starts = [i for i in range(self.batch) if i == 0 or self._lengths[i] != self._lengths[i - 1]]
        return [slice(*ends) for ends in zip(starts, [*starts[1:], self.batch], strict=True)]

    def check_room(self, batch: int, tokens: int | Sequence[int], most: int | None = None) -> None:
        """Refuses `tokens` more for each of `batch` sequences unless they fit, also into `most` positions if given.

        Args:
            tokens: of all sequences, or of each.

        Raises:
            ValueError: another batch, or no room.
        """
        if batch != self.batch:
            raise ValueError(f"cache must be for a batch of {batch}, got one for {self.batch}")
        if isinstance(tokens, int):
            self._check_capacity(max(self._lengths), tokens, most)
        else:
            self._check_capacity(*max(zip(self._lengths, tokens, strict=True), key=sum), most)

    def check_like(self, x: Tensor) -> None:
        """Refuses a cache of another dtype or device than `x`.

        Raises:
            TypeError: another dtype.
            ValueError: another device.
        """
        if x.device != self.keys.device:
            raise ValueError(f"cache must be on {x.device}, like the tensors beside it, got {self.keys.device}")
        if x.dtype != self.keys.dtype:
            raise TypeError(f"cache must have dtype {x.dtype}, like the tensors beside it, got {self.keys.dtype}")

    def _check_capacity(self, length: int, tokens: int, most: int | None = None) -> None:
        room = self.capacity if most is None else min(self.capacity, most)
        if length + tokens > room:
            raise ValueError(f"cache must have room for {tokens} tokens after {length}, got {room} in all")

    @property
    def keys(self) -> Tensor:
        """The keys that every token has, `[B, capacity, Hk, Dk]`."""
        return next(iter(self._pairs.values()))[0]

    def _check_new(self, rows: slice, k: Sequence[Tensor], v: Sequence[Tensor]) -> int:
        """The length of the sequences `rows`, to which `k` and `v`, `[b, t, Hk, D]` each, must fit."""
        length = self._lengths[rows.start]
        if any(other != length for other in self._lengths[rows]):
            raise ValueError(f"rows must be of one length, got {self._lengths[rows]}")
        self._check_tensors(len(self._lengths[rows]), k[0].shape[1], k, v)
        self._check_capacity(length, k[0].shape[1])
        return length

    def _check_step(self, k: Sequence[Tensor], v: Sequence[Tensor]) -> None:
        """Refuses tensors that are not one token of every sequence, and a step that there is no room for."""
        self._check_tensors(self.batch, 1, k, v)
        self._check_capacity(max(self._lengths), 1)

    def _check_tensors(self, rows: int, tokens: int, k: Sequence[Tensor], v: Sequence[Tensor]) -> None:
        own = self.keys
        for name, tensors, width in (("k", k, self._widths[0]), ("v", v, self._widths[1])):
            for x in tensors:
                expected = (rows, tokens, own.shape[2], width)
                if tuple(x.shape) != expected:
                    raise ValueError(f"{name} must have shape [b, t, Hk, D] = {expected}, got {tuple(x.shape)}")
                if x.dtype != own.dtype:
                    raise TypeError(f"{name} must have dtype {own.dtype}, like the cache, got {x.dtype}")
                if x.device != own.device:
                    raise ValueError(f"{name} must be on {own.device}, like the cache, got {x.device}")

    def _put(self, name: str, rows: slice, first: int, *new: Tensor) -> Pair:
        """Writes keys and values `[b, t, Hk, D]` from place `first` on, and gives all up to their end."""
        stop = first + new[0].shape[1]
        for store, x in zip(self._pairs[name], new, strict=True):
            store[rows, first:stop] = x
        keys, values = self._pairs[name]
        return keys[rows, :stop], values[rows, :stop]

    def count_step(self) -> None:
        """Counts on the host a token of every sequence that a replayed graph takes in.

        Raises:
            ValueError: no room is left.
        """
        self._check_capacity(max(self._lengths), 1)
        self.lengths_on_device()  # a graph goes on from what the device knows
        self._lengths = [length + 1 for length in self._lengths]

    def counted(self) -> Any:
        """Copies what the host has counted so far, as `count_again` takes it."""
        return [*self._lengths]

    def count_again(self, counted: Any) -> None:
        """Goes back to what was counted before steps that the device has not taken in."""
        self._lengths, self._known_on_device = counted, False

    def _set_lengths(self, rows: slice, length: int) -> None:
        self._lengths[rows] = [length] * len(self._lengths[rows])
        self._known_on_device = False

    def _shortest(self, row: int) -> int:
        """The fewest tokens that a sequence can be cut to without being empty."""
        return 1

    def truncate(self, lengths: int | Sequence[int]) -> None:
        """Takes back the last tokens of every sequence.

        Args:
            lengths: tokens that are left, of all sequences or of each.

        Raises:
            TypeError: a length that is not an integer.
            ValueError: not one length a sequence; a sequence would become longer, or so short that a ring does not hold
                its last tokens any more. All tokens can be taken back, and always the last `spare` of the most that the
                sequence has had since it was empty. A dense cache has no rings.
        """
        wanted: list[Any] = [lengths] * self.batch if hasattr(lengths, "__index__") else [*lengths]
        if len(wanted) != self.batch:
            raise ValueError(f"lengths must be one number or {self.batch}, got {len(wanted)}")
        for row, value in enumerate(wanted):
            wanted[row] = length = integer("lengths", value, 0)
            if length > self._lengths[row]:
                raise ValueError(f"lengths must be at most {self._lengths[row]} for sequence {row}, got {length}")
            if 0 < length < self._shortest(row):
                raise ValueError(
                    f"lengths must be 0 or at least {self._shortest(row)} for sequence {row}, as a ring holds no more "
                    f"of it, got {length}"
                )
        for row, length in enumerate(wanted):
            self._lengths[row] = length
        self._known_on_device = False

    def reset(self) -> None:
        """Forgets every token; memory is kept."""
        self.truncate(0)

    def fork(self, sequences: Sequence[int] | None = None) -> Self:
        """A cache of its own with the tokens of these sequences, which may come several times; all unless given.

        Raises:
            TypeError: a number that is not an integer.
            ValueError: no sequence, or one that is not there.
        """
        chosen = [*range(self.batch)] if sequences is None else [integer("sequences", i, 0) for i in sequences]
        if not chosen or max(chosen) >= self.batch:
            raise ValueError(f"sequences must be some of the {self.batch} there are, got {chosen}")
        new = copy.copy(self)
        with torch.inference_mode(False), torch.no_grad():
            rows = torch.tensor(chosen, device=self.keys.device)
            pairs = self._pairs.items()
            new._pairs = {name: (k.index_select(0, rows), v.index_select(0, rows)) for name, (k, v) in pairs}
            new._lengths_on_device, new._known_on_device = torch.zeros_like(rows), False
        new.batch, new._lengths = len(chosen), [self._lengths[i] for i in chosen]
        return new
