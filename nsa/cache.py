"""Key/value caches of a layer, for prefill in chunks and for decoding.

Of earlier tokens a query needs the keys and values of the selected branch, all of them; the compressed ones; and of the
window branch the last `w - 1`. Compression needs at most the last `l - 1`, not rotated: those that are not in a
compressed block yet. The latter two are kept in rings, which do not grow with the context: a ring has the token at
position `p` in slot `p % size`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from nsa.backends import BackendName
from nsa.blocks import BlockFunction, CompressionParams, check_vectors
from nsa.checks import check_params, check_rope, check_rope_length, check_tensor
from nsa.config import NSAConfig, integer
from nsa.functional import load_backend
from nsa.stores import Pair, Stores, put_next

Compress = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""From keys and values `[b, t, Hk, D]`, not rotated, and the number of the block that starts at the first of them, to
the compressed blocks `[b, c, Hk, D]` that lie in these tokens, keys rotated."""


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
        with torch.inference_mode(False):
            self._arrived = torch.zeros(self.batch, dtype=torch.int32, device=device)
        self._most = [0] * self.batch
        """The most tokens that each sequence has had since it was empty, before the last `truncate`."""

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
            check_vectors(new, self._pairs["compressed"], (len(raw[0]), after - blocks))
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
    def step(
        self,
        q: Tensor,
        k: Sequence[Tensor],
        v: Sequence[Tensor],
        params: Sequence[CompressionParams | BlockFunction | None],
        rope: Tensor | None = None,
        *,
        interleaved: bool = True,
        backend: BackendName = "auto",
    ) -> tuple[Tensor, StepKeys]:
        """Takes in one new token of every sequence, whatever their lengths: rotates, stores and compresses.

        Nothing waits for the device, and what is started there is the same at every step. So one CUDA graph is enough
        for all steps of a cache. Before it is replayed, `count_step` counts the step.

        Args:
            q: `[B, 1, Hq, Dk]`, not rotated.
            k: of the compressed, the selected and the window branch, `[B, 1, Hk, Dk]` each, not rotated.
            v: likewise, `[B, 1, Hk, Dv]`.
            params: those of keys and those of values, as `compress` takes them.
            rope: `[L, Dk / 2, 2]` from `rope_table`; no rotation unless given.
            interleaved: as `apply_rope` takes it.
            backend: `"auto"`, `"eager"` or `"triton"`; functions among `params` are always called by the first.

        Raises:
            ValueError: tensors of other sizes than the cache, another device, no room, a table that is too short, an
                unsupported backend; the cache stays as it was.
            TypeError: another dtype.

        Returns:
            Queries, rotated, and the stores and lengths themselves, which the next step changes.
        """
        self._check_step(k, v)
        check_tensor("q", q, "[B, 1, Hq, Dk]", like=k[0], shape=(self.batch, 1, q.shape[-2], self._widths[0]))
        for x, of_x in zip((k[0], v[0]), params, strict=True):
            if not callable(of_x):
                check_params(of_x, x, self.config)
        if rope is not None:
            check_rope(rope, q)
            check_rope_length(rope, max(self._lengths) + 1)
            rope = rope.contiguous()
        name: BackendName = "eager" if any(map(callable, params)) else backend
        implementation = load_backend(name, self.config, q, v[0])
        lengths = self.lengths_on_device()
        counters = lengths, self._arrived
        query = implementation.take_in(q, k, v, rope, self._pairs, *counters, params, self.config, interleaved)
        self.count_step()
        window = self._pairs["selected" if self.config.shared_kv else "window"]
        return query, StepKeys(*self._pairs["compressed"], *self._pairs["selected"], *window, lengths)

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

    def _shortest(self, row: int) -> int:
        config, shortest = self.config, 1
        window, tail = (self._pairs[ring][0].shape[1] for ring in ("window", "tail"))
        most = max(self._most[row], self._lengths[row])
        if 0 < window < most:  # the next query sees `w - 1` tokens before it
            shortest = most - window + config.window_size - 1
        if tail < most:  # the next block to be completed begins with a token that is held
            blocks = -(-(most - tail) // config.compress_stride)
            shortest = max(shortest, (blocks - 1) * config.compress_stride + config.compress_block_size)
        return shortest

    def truncate(self, lengths: int | Sequence[int]) -> None:
        most = [*map(max, self._most, self._lengths)]
        super().truncate(lengths)
        self._most = [number if length else 0 for number, length in zip(most, self._lengths, strict=True)]

    def fork(self, sequences: Sequence[int] | None = None) -> Self:
        chosen = [*range(self.batch)] if sequences is None else list(sequences)
        new = super().fork(chosen)
        with torch.inference_mode(False):
            new._arrived = torch.zeros(new.batch, dtype=torch.int32, device=self.keys.device)
        new._most = [self._most[i] for i in chosen]
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
        put_next(self._pairs["all"], lengths, k, v)
        lengths += 1
        self.count_step()
        return *self._pairs["all"], lengths
