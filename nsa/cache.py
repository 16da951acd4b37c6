"""Key/value cache of one layer, for prefill in chunks and for decoding.

Of earlier tokens a query needs the keys and values of the selected branch, all of them; the compressed ones; and of the
window branch the last `w - 1`. Compression needs the last `l - 1` at most as they were before it and before rotation:
those that no compressed block has taken in yet. The latter two are kept in rings, which do not grow with the context.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nsa.config import NSAConfig, integer

Compress = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""From keys and values `[b, t, Hk, D]`, not rotated, and the number of the block that starts at the first of them, to
the compressed blocks `[b, c, Hk, D]` that lie in these tokens, keys rotated."""


class CachedKeys(NamedTuple):
    """Keys and values that the last `Tq` of `num_keys` tokens see, of rows of one length.

    Attributes:
        k_cmp, v_cmp: `[b, C, Hk, D]`.
        k_slc, v_slc: `[b, num_keys, Hk, D]`.
        k_win, v_win: `[b, t, Hk, D]`, those of the last `t >= min(num_keys, Tq + w - 1)` tokens.
        num_keys: tokens so far.
    """

    k_cmp: Tensor
    v_cmp: Tensor
    k_slc: Tensor
    v_slc: Tensor
    k_win: Tensor
    v_win: Tensor
    num_keys: int


class _Ring:
    """The last `size` tokens of each row: that at position `p` is in slot `p % size`."""

    def __init__(self, keys: Tensor, values: Tensor):
        self.keys, self.values, self.size = keys, values, keys.shape[1]

    def read(self, rows: slice, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values at positions `first` to `stop`, in order."""
        slots = torch.arange(first, stop, device=self.keys.device) % max(self.size, 1)
        return self.keys[rows].index_select(1, slots), self.values[rows].index_select(1, slots)

    def write(self, rows: slice, first: int, keys: Tensor, values: Tensor) -> None:
        """Keeps what there is room for of `[b, t, Hk, D]`, which begin at position `first`."""
        kept = min(keys.shape[1], self.size)
        begin = first + keys.shape[1] - kept
        slots = torch.arange(begin, begin + kept, device=self.keys.device) % max(self.size, 1)
        self.keys[rows].index_copy_(1, slots, keys[:, keys.shape[1] - kept :])
        self.values[rows].index_copy_(1, slots, values[:, values.shape[1] - kept :])


class KVCache:
    """Keys and values of one layer for `batch` sequences, each of its own length; all memory is taken at once.

    For each sequence, in elements of `dtype`, with `C` the compressed blocks of `capacity` tokens:

        nbytes = batch Hk (Dk + Dv) itemsize (capacity + C + window + tail)
        window = min(capacity, w - 1 + spare), or 0 with `shared_kv` or `w = 0`
        tail   = min(capacity, l - 1 + spare)

    Args:
        config: of the layer.
        batch: sequences.
        capacity: tokens that a sequence can have.
        num_kv_heads: `Hk`.
        head_dim: `Dk`.
        value_dim: `Dv`; `Dk` unless given.
        spare: tokens that `truncate` can take back at least, as speculative decoding does.
        dtype, device: of the keys and values.

    Raises:
        TypeError: a size that is not an integer, a `config` of another type, a `dtype` that is not floating.
        ValueError: a size out of range.
    """

    def __init__(
        self,
        config: NSAConfig,
        batch: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        spare: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        if not isinstance(config, NSAConfig):
            raise TypeError(f"config must be an NSAConfig, got {type(config).__name__}")
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be floating, got {dtype}")
        self.config, self.batch = config, integer("batch", batch, 1)
        self.capacity, self.spare = integer("capacity", capacity, 1), integer("spare", spare, 0)
        heads, dim = integer("num_kv_heads", num_kv_heads, 1), integer("head_dim", head_dim, 1)
        value_dim = dim if value_dim is None else integer("value_dim", value_dim, 1)

        def pair(length: int) -> tuple[Tensor, Tensor]:
            keys, values = (
                torch.zeros(self.batch, length, heads, width, dtype=dtype, device=device) for width in (dim, value_dim)
            )
            return keys, values

        self._selected = pair(self.capacity)
        self._compressed = pair(config.num_compressed(self.capacity))
        window = 0 if config.shared_kv or not config.window_size else config.window_size - 1 + self.spare
        self._window = _Ring(*pair(min(self.capacity, window)))
        self._tail = _Ring(*pair(min(self.capacity, config.compress_block_size - 1 + self.spare)))
        self._lengths = [0] * self.batch
        self._held_from = [(0, 0)] * self.batch
        """The first positions that the rings of the window and of the tail still hold."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence so far."""
        return tuple(self._lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(x.nbytes for x in self._tensors())

    def _tensors(self) -> list[Tensor]:
        rings = (self._window.keys, self._window.values, self._tail.keys, self._tail.values)
        return [*self._selected, *self._compressed, *rings]

    def runs_of_equal_length(self) -> list[slice]:
        """The sequences, in runs of neighbours that have one length."""
        starts = [i for i in range(self.batch) if i == 0 or self._lengths[i] != self._lengths[i - 1]]
        return [slice(*ends) for ends in zip(starts, [*starts[1:], self.batch], strict=True)]

    def check_room(self, x: Tensor, tokens: int) -> None:
        """Refuses `tokens` more for every sequence, of the batch, dtype and device of `x`, unless they fit.

        Raises:
            TypeError: another dtype.
            ValueError: another batch or device, or no room.
        """
        keys = self._selected[0]
        if x.shape[0] != self.batch:
            raise ValueError(f"cache must be for a batch of {x.shape[0]}, got one for {self.batch}")
        if x.device != keys.device:
            raise ValueError(f"cache must be on {x.device}, like the tensors beside it, got {keys.device}")
        if x.dtype != keys.dtype:
            raise TypeError(f"cache must have dtype {x.dtype}, like the tensors beside it, got {keys.dtype}")
        if (longest := max(self._lengths)) + tokens > self.capacity:
            raise ValueError(f"cache must have room for {tokens} tokens after {longest}, got {self.capacity} in all")

    @torch.no_grad()
    def append(self, rows: slice, k: Sequence[Tensor], v: Sequence[Tensor], compress: Compress) -> CachedKeys:
        """Takes in new tokens of some sequences and returns what attention to them needs.

        Args:
            rows: sequences of one length, from `runs_of_equal_length`.
            k: of the compressed branch, not rotated, of the selected and of the window branch, `[b, t, Hk, Dk]` each.
            v: likewise, `[b, t, Hk, Dv]`.
            compress: makes blocks of those that the new tokens complete.

        Raises:
            ValueError: rows of several lengths, tensors of other sizes than the cache, no room; as `check_room` does.
            TypeError: another dtype.
        """
        config, length = self.config, self._lengths[rows.start]
        if any(other != length for other in self._lengths[rows]):
            raise ValueError(f"rows must be of one length, got {self._lengths[rows]}")
        count, tokens = len(self._lengths[rows]), k[0].shape[1]
        for name, tensors, own in (("k", k, self._selected[0]), ("v", v, self._selected[1])):
            for x in tensors:
                expected = (count, tokens, *own.shape[2:])
                if tuple(x.shape) != expected:
                    raise ValueError(f"{name} must have shape [b, t, Hk, D] = {expected}, got {tuple(x.shape)}")
                if x.dtype != own.dtype:
                    raise TypeError(f"{name} must have dtype {own.dtype}, like the cache, got {x.dtype}")
                if x.device != own.device:
                    raise ValueError(f"{name} must be on {own.device}, like the cache, got {x.device}")
        stop = length + tokens
        if stop > self.capacity:
            raise ValueError(f"cache must have room for {tokens} tokens after {length}, got {self.capacity} in all")

        blocks, after = config.num_compressed(length), config.num_compressed(stop)
        first = blocks * config.compress_stride  # of the first block that is not complete yet
        if after > blocks:
            waiting = self._tail.read(rows, first, length)
            raw_keys, raw_values = (torch.cat((x, y), 1) for x, y in zip(waiting, (k[0], v[0]), strict=True))
            for store, made in zip(self._compressed, compress(raw_keys, raw_values, blocks), strict=True):
                store[rows, blocks:after] = made
        for store, new in zip(self._selected, (k[1], v[1]), strict=True):
            store[rows, length:stop] = new
        begin = max(0, length - max(config.window_size - 1, 0))
        if config.shared_kv or not config.window_size:
            k_win, v_win = (x[rows, begin:stop] for x in self._selected)
        else:
            earlier = self._window.read(rows, begin, length)
            k_win, v_win = (torch.cat((x, y), 1) for x, y in zip(earlier, (k[2], v[2]), strict=True))
            self._window.write(rows, length, k[2], v[2])
        self._tail.write(rows, length, k[0], v[0])
        for row in range(self.batch)[rows]:
            self._lengths[row] = stop
            in_window, in_tail = self._held_from[row]
            self._held_from[row] = max(in_window, stop - self._window.size), max(in_tail, stop - self._tail.size)
        k_cmp, v_cmp = (x[rows, :after] for x in self._compressed)
        k_slc, v_slc = (x[rows, :stop] for x in self._selected)
        return CachedKeys(k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, stop)

    def _shortest(self, row: int) -> int:
        """The fewest tokens that a sequence can be cut to without being empty."""
        config, (in_window, in_tail) = self.config, self._held_from[row]
        shortest = 1
        if self._window.size:  # the next query sees `w - 1` tokens before it
            shortest = max(shortest, in_window + config.window_size - 1 if in_window else 0)
        if in_tail:  # the next block to be completed begins with a token that is held
            blocks = -(-in_tail // config.compress_stride)
            shortest = max(shortest, (blocks - 1) * config.compress_stride + config.compress_block_size)
        return shortest

    def truncate(self, lengths: int | Sequence[int]) -> None:
        """Takes back the last tokens of every sequence.

        Args:
            lengths: tokens that are left, of all sequences or of each.

        Raises:
            TypeError: a length that is not an integer.
            ValueError: not one length a sequence; a sequence would become longer, or so short that a ring does not hold
                its last tokens any more. All tokens can be taken back, and `spare` of the longest it has been.
        """
        wanted = [lengths] * self.batch if isinstance(lengths, int) else list(lengths)
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
            if length == 0:
                self._held_from[row] = (0, 0)

    def reset(self) -> None:
        """Forgets every token; memory is kept."""
        self.truncate(0)

    @torch.no_grad()
    def fork(self, sequences: Sequence[int] | None = None) -> "KVCache":
        """A cache of its own with the tokens of these sequences, which may come several times; all unless given.

        Raises:
            TypeError: a number that is not an integer.
            ValueError: no sequence, or one that is not there.
        """
        chosen = range(self.batch) if sequences is None else [integer("sequences", i, 0) for i in sequences]
        if not len(chosen) or max(chosen) >= self.batch:
            raise ValueError(f"sequences must be some of the {self.batch} there are, got {list(chosen)}")
        new = object.__new__(KVCache)
        new.config, new.batch, new.capacity, new.spare = self.config, len(chosen), self.capacity, self.spare
        rows = torch.tensor(list(chosen), device=self._selected[0].device)
        parts = [x.index_select(0, rows) for x in self._tensors()]
        new._selected, new._compressed = (parts[0], parts[1]), (parts[2], parts[3])
        new._window, new._tail = _Ring(*parts[4:6]), _Ring(*parts[6:8])
        new._lengths = [self._lengths[i] for i in chosen]
        new._held_from = [self._held_from[i] for i in chosen]
        return new
