"""Key/value caches of a layer, for prefill in chunks and for decoding.

Of earlier tokens a query needs the keys and values of the selected branch, all of them; the compressed ones; and of the
window branch the last `w - 1`. Compression needs at most the last `l - 1`, not rotated: those that are not in a
compressed block yet. The latter two are kept in rings, which do not grow with the context: a ring has the token at
position `p` in slot `p % size`.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from nsa.config import NSAConfig, integer
from nsa.stores import Pair, Stores

Compress = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""From keys and values `[b, t, Hk, D]`, not rotated, and the number of the block that starts at the first of them, to
the compressed blocks `[b, c, Hk, D]` that lie in these tokens, keys rotated."""

CompressAt = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""From keys and values `[B, l, Hk, D]`, not rotated, of one block a sequence and the position of its first token, int64
`[B]`, to the compressed blocks `[B, 1, Hk, D]`, keys rotated."""


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


def _joined(earlier: Pair, new: Pair) -> Pair:
    """Keys and values `[b, t, Hk, D]`, the new ones behind the earlier ones."""
    return torch.cat((earlier[0], new[0]), 1), torch.cat((earlier[1], new[1]), 1)


class KVCache(Stores):
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
            raw = _joined(waiting, (k[0], v[0]))
            new = compress(*raw, blocks)
            self._check_blocks(new, (len(raw[0]), after - blocks))
            self._put("compressed", rows, blocks, *new)
        k_cmp, v_cmp = (x[rows, :after] for x in self._pairs["compressed"])
        k_slc, v_slc = self._put("selected", rows, length, k[1], v[1])
        begin = max(0, length - max(config.window_size - 1, 0))
        if config.shared_kv or not config.window_size:
            k_win, v_win = k_slc[:, begin:], v_slc[:, begin:]
        else:
            earlier = self._read("window", rows, begin, length)
            k_win, v_win = _joined(earlier, (k[2], v[2]))
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
        self._check_step(k, v)
        config, lengths = self.config, self.lengths_on_device()
        rows = torch.arange(self.batch, device=lengths.device)
        first, new = lengths + 1 - config.compress_block_size, None
        if self.completes_block():
            of_block = torch.arange(config.compress_block_size - 1, device=lengths.device)
            slots = (first[:, None] + of_block) % self._pairs["tail"][0].shape[1]
            keys, values = self._pairs["tail"]
            new = compress(*_joined((keys[rows[:, None], slots], values[rows[:, None], slots]), (k[0], v[0])), first)
            self._check_blocks(new, (self.batch, 1))
        for name, i in (("tail", 0), ("selected", 1), ("window", 2)):
            self._put_next(name, k[i], v[i])
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
        config = self.config
        return any(config.num_compressed(n + 1) > config.num_compressed(n) for n in self._lengths)

    def count_step(self) -> None:
        super().count_step()
        for length, held in zip(self._lengths, self._held_from, strict=True):
            for ring, first in held.items():
                held[ring] = max(first, length - self._pairs[ring][0].shape[1])

    def counted(self) -> Any:
        return super().counted(), copy.deepcopy(self._held_from)

    def count_again(self, counted: Any) -> None:
        lengths, self._held_from = counted
        super().count_again(lengths)

    def _check_blocks(self, new: Pair, sizes: tuple[int, int]) -> None:
        """Refuses compressed blocks that do not have their `sizes`, rows and blocks, or those of heads of the cache."""
        for name, x, store in zip(("k_cmp", "v_cmp"), new, self._pairs["compressed"], strict=True):
            if x.shape != (*sizes, *store.shape[2:]):
                expected = (*sizes, *store.shape[2:])
                raise ValueError(f"{name} must have shape [b, c, Hk, D] = {expected}, got {tuple(x.shape)}")

    def _read(self, ring: str, rows: slice, first: int, stop: int) -> Pair:
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

    def fork(self, sequences: Sequence[int] | None = None) -> Self:
        chosen = [*range(self.batch)] if sequences is None else list(sequences)
        new = super().fork(chosen)
        new._held_from = [dict(self._held_from[i]) for i in chosen]
        return new


class DenseCache(Stores):
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

    @torch.no_grad()
    def step(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Takes in `[B, 1, Hk, D]`, one new token of every sequence, as `KVCache.step` does: nothing waits.

        Returns:
            All keys `[B, capacity, Hk, Dk]`, all values and the lengths, int64 `[B]`, which the next step changes.

        Raises:
            ValueError, TypeError: as `KVCache.step` does.
        """
        self._check_step([k], [v])
        lengths = self.lengths_on_device()
        self._put_next("all", k, v)
        lengths += 1
        self.count_step()
        return *self._pairs["all"], lengths
