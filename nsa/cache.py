"""Key/value caches of a layer, for prefill in chunks and for decoding.

Of earlier tokens a query needs the keys and values of the selected branch, all of them; the compressed ones; and of the
window branch the last `w - 1`. Compression needs the last `l - 1` at most as they were before it and before rotation:
those that no compressed block has taken in yet. The latter two are kept in rings, which do not grow with the context: a
ring has the token at position `p` in slot `p % size`.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from nsa.config import NSAConfig, integer

Compress = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""From keys and values `[b, t, Hk, D]`, not rotated, and the number of the block that starts at the first of them, to
the compressed blocks `[b, c, Hk, D]` that lie in these tokens, keys rotated."""

CompressAt = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""From keys and values `[B, l, Hk, D]`, not rotated, of one block a sequence and the position of its first token, int64
`[B]`, to the compressed blocks `[B, 1, Hk, D]`, keys rotated."""

_Pair = tuple[Tensor, Tensor]


class StepKeys(NamedTuple):
    """The stores of a cache, which steps fill in place, and the lengths of its sequences.

    Attributes:
        k_cmp, v_cmp: `[B, C, Hk, D]`.
        k_slc, v_slc: `[B, capacity, Hk, D]`.
        k_win, v_win: `[B, R, Hk, D]`, a ring: the token at position `p` is in slot `p % R`.
        lengths: int64 `[B]`, tokens so far, on the device.
    """

    k_cmp: Tensor
    v_cmp: Tensor
    k_slc: Tensor
    v_slc: Tensor
    k_win: Tensor
    v_win: Tensor
    lengths: Tensor


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


def computed_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of products with `weight`: autocast's where that is on, or else its own."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


class _Cache:
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
        self._pairs: dict[str, _Pair] = {}
        for name, length in lengths.items():
            keys, values = (
                torch.zeros(self.batch, length, heads, width, dtype=dtype, device=device) for width in self._widths
            )
            self._pairs[name] = keys, values
        self._lengths = [0] * self.batch
        self._lengths_on_device = torch.zeros(self.batch, dtype=torch.int64, device=device)
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

    def check_room(self, batch: int, tokens: int, most: int | None = None) -> None:
        """Refuses `tokens` more for each of `batch` sequences unless they fit, also into `most` positions if given.

        Raises:
            ValueError: another batch, or no room.
        """
        if batch != self.batch:
            raise ValueError(f"cache must be for a batch of {batch}, got one for {self.batch}")
        self._check_capacity(max(self._lengths), tokens, most)

    def check_like(self, x: Tensor, tokens: int) -> None:
        """Refuses `tokens` more for every sequence, of the batch, dtype and device of `x`, unless they fit.

        Raises:
            TypeError: another dtype.
            ValueError: another device; as `check_room` does.
        """
        self.check_room(x.shape[0], tokens)
        keys = self._any()
        if x.device != keys.device:
            raise ValueError(f"cache must be on {x.device}, like the tensors beside it, got {keys.device}")
        if x.dtype != keys.dtype:
            raise TypeError(f"cache must have dtype {x.dtype}, like the tensors beside it, got {keys.dtype}")

    def _check_capacity(self, length: int, tokens: int, most: int | None = None) -> None:
        room = self.capacity if most is None else min(self.capacity, most)
        if length + tokens > room:
            raise ValueError(f"cache must have room for {tokens} tokens after {length}, got {room} in all")

    def _any(self) -> Tensor:
        return next(iter(self._pairs.values()))[0]

    def _check_new(self, rows: slice, k: Sequence[Tensor], v: Sequence[Tensor]) -> int:
        """The length of the sequences `rows`, to which `k` and `v`, `[b, t, Hk, D]` each, must fit."""
        length = self._lengths[rows.start]
        if any(other != length for other in self._lengths[rows]):
            raise ValueError(f"rows must be of one length, got {self._lengths[rows]}")
        self._check_tensors(len(self._lengths[rows]), k[0].shape[1], k, v)
        self._check_capacity(length, k[0].shape[1])
        return length

    def _check_tensors(self, rows: int, tokens: int, k: Sequence[Tensor], v: Sequence[Tensor]) -> None:
        own = self._any()
        for name, tensors, width in (("k", k, self._widths[0]), ("v", v, self._widths[1])):
            for x in tensors:
                expected = (rows, tokens, own.shape[2], width)
                if tuple(x.shape) != expected:
                    raise ValueError(f"{name} must have shape [b, t, Hk, D] = {expected}, got {tuple(x.shape)}")
                if x.dtype != own.dtype:
                    raise TypeError(f"{name} must have dtype {own.dtype}, like the cache, got {x.dtype}")
                if x.device != own.device:
                    raise ValueError(f"{name} must be on {own.device}, like the cache, got {x.device}")

    def _put(self, name: str, rows: slice, first: int, *new: Tensor) -> _Pair:
        """Writes keys and values `[b, t, Hk, D]` from place `first` on, and gives all up to their end."""
        stop = first + new[0].shape[1]
        for store, x in zip(self._pairs[name], new, strict=True):
            store[rows, first:stop] = x
        keys, values = self._pairs[name]
        return keys[rows, :stop], values[rows, :stop]

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

    @torch.no_grad()
    def fork(self, sequences: Sequence[int] | None = None) -> Self:
        """A cache of its own with the tokens of these sequences, which may come several times; all unless given.

        Raises:
            TypeError: a number that is not an integer.
            ValueError: no sequence, or one that is not there.
        """
        chosen = [*range(self.batch)] if sequences is None else [integer("sequences", i, 0) for i in sequences]
        if not chosen or max(chosen) >= self.batch:
            raise ValueError(f"sequences must be some of the {self.batch} there are, got {chosen}")
        rows, new = torch.tensor(chosen, device=self._any().device), copy.copy(self)
        new.batch = len(chosen)
        new._pairs = {name: (k.index_select(0, rows), v.index_select(0, rows)) for name, (k, v) in self._pairs.items()}
        new._lengths = [self._lengths[i] for i in chosen]
        new._lengths_on_device, new._known_on_device = torch.zeros_like(rows), False
        return new


class KVCache(_Cache):
    """Keys and values of one NSA layer for `batch` sequences, each of its own length.

    With `C` the compressed blocks of `capacity` tokens it takes

        nbytes = batch Hk (Dk + Dv) itemsize (capacity + C + window + tail)
        window = min(capacity, w + spare), or 0 with `shared_kv` or `w = 0`
        tail   = min(capacity, l + spare)

    Args:
        config: of the layer.
        batch: sequences.
        capacity: tokens that a sequence can have.
        num_kv_heads: `Hk`.
        head_dim: `Dk`.
        value_dim: `Dv`; `Dk` unless given.
        spare: the last tokens that `truncate` can always take back, as speculative decoding does.
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
        capacity, spare = integer("capacity", capacity, 1), integer("spare", spare, 0)
        window = 0 if config.shared_kv or not config.window_size else config.window_size + spare
        lengths = {
            "selected": capacity,
            "compressed": config.num_compressed(capacity),
            "window": min(capacity, window),
            "tail": min(capacity, config.compress_block_size + spare),
        }
        super().__init__(batch, capacity, num_kv_heads, head_dim, value_dim, dtype, device, lengths)
        self.config, self.spare = config, spare
        self._held_from = [{"window": 0, "tail": 0} for _ in range(self.batch)]
        """The first position that each ring still holds."""

    @torch.no_grad()
    def append(self, rows: slice, k: Sequence[Tensor], v: Sequence[Tensor], compress: Compress) -> CachedKeys:
        """Takes in new tokens of some sequences and returns what attention to them needs.

        Args:
            rows: sequences of one length, from `runs_of_equal_length`.
            k: of the compressed branch, not rotated, of the selected and of the window branch, `[b, t, Hk, Dk]` each.
            v: likewise, `[b, t, Hk, Dv]`.
            compress: makes blocks of those that the new tokens complete.

        Raises:
            ValueError: rows of several lengths, tensors of other sizes than the cache, another device, no room.
            TypeError: another dtype.
        """
        config, length = self.config, self._check_new(rows, k, v)
        stop = length + k[0].shape[1]
        blocks, after = config.num_compressed(length), config.num_compressed(stop)
        if after > blocks:
            waiting = self._read("tail", rows, blocks * config.compress_stride, length)
            raw_keys, raw_values = (torch.cat((x, y), 1) for x, y in zip(waiting, (k[0], v[0]), strict=True))
            new = compress(raw_keys, raw_values, blocks)
            self._check_blocks(new, (raw_keys.shape[0], after - blocks))
            self._put("compressed", rows, blocks, *new)
        k_cmp, v_cmp = (x[rows, :after] for x in self._pairs["compressed"])
        k_slc, v_slc = self._put("selected", rows, length, k[1], v[1])
        begin = max(0, length - max(config.window_size - 1, 0))
        if config.shared_kv or not config.window_size:
            k_win, v_win = k_slc[:, begin:], v_slc[:, begin:]
        else:
            earlier = self._read("window", rows, begin, length)
            k_win, v_win = (torch.cat((x, y), 1) for x, y in zip(earlier, (k[2], v[2]), strict=True))
            self._write("window", rows, length, k[2], v[2])
        self._write("tail", rows, length, k[0], v[0])
        self._set_lengths(rows, stop)
        return CachedKeys(k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, stop)

    @torch.no_grad()
    def step(self, k: Sequence[Tensor], v: Sequence[Tensor], compress: CompressAt) -> StepKeys:
        """Takes in one new token of every sequence, whatever their lengths.

        Nothing waits for the device. What is started there depends on one thing only, `completes_block`; so two CUDA
        graphs are enough for all steps of a cache. Before one is replayed, `count_step` counts the step.

        Args:
            k: of the compressed branch, not rotated, of the selected and of the window branch, `[B, 1, Hk, Dk]` each.
            v: likewise, `[B, 1, Hk, Dv]`.
            compress: makes the block of the last `l` tokens of every sequence, for those that complete one.

        Raises:
            ValueError: tensors of other sizes than the cache, another device, no room; the cache stays as it was.
            TypeError: another dtype.

        Returns:
            The stores and the lengths themselves, which the next step changes.
        """
        self._check_tensors(self.batch, 1, k, v)
        self._check_capacity(max(self._lengths), 1)
        config, lengths = self.config, self.lengths_on_device()
        rows = torch.arange(self.batch, device=lengths.device)
        first, new = lengths + 1 - config.compress_block_size, None
        if self.completes_block():
            of_block = torch.arange(config.compress_block_size - 1, device=lengths.device)
            slots = (first[:, None] + of_block) % self._pairs["tail"][0].shape[1]
            earlier = (store[rows[:, None], slots] for store in self._pairs["tail"])
            raw_keys, raw_values = (torch.cat((x, y), 1) for x, y in zip(earlier, (k[0], v[0]), strict=True))
            new = compress(raw_keys, raw_values, first)
            self._check_blocks(new, (self.batch, 1))
        for name, i in (("tail", 0), ("selected", 1), ("window", 2)):
            for store, x in zip(self._pairs[name], (k[i], v[i]), strict=True):
                if store.shape[1]:
                    store.index_put_((rows, lengths % store.shape[1]), x[:, 0])
        if new is not None:
            place = (first // config.compress_stride).clamp(min=0)
            complete = ((first >= 0) & (first % config.compress_stride == 0))[:, None, None]
            for store, x in zip(self._pairs["compressed"], new, strict=True):
                store.index_put_((rows, place), torch.where(complete, x[:, 0], store[rows, place]))
        lengths += 1
        self.count_step()
        window = self._pairs["selected" if config.shared_kv else "window"]
        return StepKeys(*self._pairs["compressed"], *self._pairs["selected"], *window, lengths)

    def completes_block(self) -> bool:
        """Whether the next token of some sequence completes a compressed block."""
        config = self.config
        return any(config.num_compressed(n + 1) > config.num_compressed(n) for n in self._lengths)

    def count_step(self) -> None:
        """Counts on the host a token of every sequence that a replayed graph takes in.

        Raises:
            ValueError: no room is left.
        """
        self._check_capacity(max(self._lengths), 1)
        self.lengths_on_device()  # a graph goes on from what the device knows
        for row in range(self.batch):
            self._lengths[row] += 1
            for ring, held in self._held_from[row].items():
                self._held_from[row][ring] = max(held, self._lengths[row] - self._pairs[ring][0].shape[1])

    def counted(self) -> Any:
        """Copies what the host has counted so far, as `count_again` takes it."""
        return [*self._lengths], copy.deepcopy(self._held_from)

    def count_again(self, counted: Any) -> None:
        """Goes back to what was counted before steps that the device has not taken in."""
        self._lengths, self._held_from = counted
        self._known_on_device = False

    def _check_blocks(self, new: _Pair, sizes: tuple[int, int]) -> None:
        """Refuses compressed blocks that do not have their `sizes`, rows and blocks, or those of heads of the cache."""
        for name, x, store in zip(("k_cmp", "v_cmp"), new, self._pairs["compressed"], strict=True):
            if x.shape != (*sizes, *store.shape[2:]):
                expected = (*sizes, *store.shape[2:])
                raise ValueError(f"{name} must have shape [b, c, Hk, D] = {expected}, got {tuple(x.shape)}")

    def _read(self, ring: str, rows: slice, first: int, stop: int) -> _Pair:
        """Keys and values at positions `first` to `stop`, in order."""
        keys, values = self._pairs[ring]
        slots = torch.arange(first, stop, device=keys.device) % max(keys.shape[1], 1)
        return keys[rows].index_select(1, slots), values[rows].index_select(1, slots)

    def _write(self, ring: str, rows: slice, first: int, *new: Tensor) -> None:
        """Keeps what there is room for of keys and values `[b, t, Hk, D]`, which begin at position `first`."""
        stop, size = first + new[0].shape[1], self._pairs[ring][0].shape[1]
        begin = max(first, stop - size)
        slots = torch.arange(begin, stop, device=new[0].device) % max(size, 1)
        for store, x in zip(self._pairs[ring], new, strict=True):
            store[rows].index_copy_(1, slots, x[:, begin - first :])
        for row in range(self.batch)[rows]:
            self._held_from[row][ring] = max(self._held_from[row][ring], stop - size)

    def _shortest(self, row: int) -> int:
        config, held = self.config, self._held_from[row]
        shortest = 1
        if held["window"] and self._pairs["window"][0].shape[1]:  # the next query sees `w - 1` tokens before it
            shortest = max(shortest, held["window"] + config.window_size - 1)
        if held["tail"]:  # the next block to be completed begins with a token that is held
            blocks = -(-held["tail"] // config.compress_stride)
            shortest = max(shortest, (blocks - 1) * config.compress_stride + config.compress_block_size)
        return shortest

    def truncate(self, lengths: int | Sequence[int]) -> None:
        super().truncate(lengths)
        for row, length in enumerate(self._lengths):
            if length == 0:
                self._held_from[row] = {"window": 0, "tail": 0}

    truncate.__doc__ = _Cache.truncate.__doc__

    def fork(self, sequences: Sequence[int] | None = None) -> Self:
        chosen = [*range(self.batch)] if sequences is None else list(sequences)
        new = super().fork(chosen)
        new._held_from = [dict(self._held_from[i]) for i in chosen]
        return new

    fork.__doc__ = _Cache.fork.__doc__


class DenseCache(_Cache):
    """Keys and values of one layer of dense attention; arguments as `KVCache` has them.

    It takes `nbytes = batch Hk (Dk + Dv) itemsize capacity`.
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        capacity = integer("capacity", capacity, 1)
        super().__init__(batch, capacity, num_kv_heads, head_dim, value_dim, dtype, device, {"all": capacity})

    @torch.no_grad()
    def append(self, rows: slice, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Takes in `[b, t, Hk, D]` of sequences of one length and returns theirs, `[b, length + t, Hk, D]`.

        Raises:
            ValueError, TypeError: as `KVCache.append` does.
        """
        length = self._check_new(rows, [k], [v])
        pair = self._put("all", rows, length, k, v)
        self._set_lengths(rows, length + k.shape[1])
        return pair
