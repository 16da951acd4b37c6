"""Decoding: one token or a few of every sequence, over all that a cache has room for, whatever the lengths."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nsa import (
    CompressionParams,
    DenseCache,
    KVCache,
    NativeSparseAttention,
    NSAConfig,
    StepKeys,
    decode_attention,
    decode_graphs,
    dense_decode_attention,
    rope_table,
)
from nsa.decode_graphs import DecodeGraphs, can_capture
from validation.cases import config
from validation.numerics import assert_equal, assert_matches
from validation.unit.synchronisation import no_synchronisation

pytestmark = pytest.mark.usefixtures("on_device")

PLAIN = config((16, 8, 16), 6, 24)
CONFIGS = {
    "plain": PLAIN,
    "paper": NSAConfig(window_size=100),
    "disjoint": config((16, 16, 32), 4, 40),
    "large_blocks": config((32, 8, 64), 4, 20),
    "nothing_selected": config((16, 8, 16), 0, 24, num_initial_blocks=0, num_local_blocks=0),
    "no_window": config((16, 8, 16), 3, 0),
}


def make_keys(
    settings: NSAConfig,
    lengths: Sequence[int],
    capacity: int,
    heads: int = 2,
    dims: tuple[int, int] = (16, 32),
    dtype: torch.dtype = torch.float32,
    unseen: float = 0.0,
    queries: int = 1,
) -> StepKeys:
    """A cache with noise for the tokens of each sequence and `unseen` everywhere else."""
    batch, ring = len(lengths), max(1, min(capacity, settings.window_size + queries - 1))
    rooms = (settings.num_compressed(capacity), capacity, ring)
    stores = [torch.full((batch, room, heads, dim), unseen, dtype=dtype) for room in rooms for dim in dims]
    for row, length in enumerate(lengths):
        for store, filled in zip(stores[:4], [settings.num_compressed(length)] * 2 + [length] * 2, strict=True):
            store[row, :filled] = torch.randn(filled, heads, store.shape[3], dtype=dtype)
        slots = torch.arange(max(0, length - ring), length) % ring
        for store in stores[4:]:
            store[row, slots] = torch.randn(len(slots), heads, store.shape[3], dtype=dtype)
    return StepKeys._make([*stores, torch.tensor(lengths)])


def with_stores(keys: StepKeys, change: Callable[[Tensor], Tensor]) -> StepKeys:
    """The same sequences in stores that are changed."""
    return StepKeys._make([*(change(x) for x in keys[:-1]), keys.lengths])


def make_queries(keys: StepKeys, group: int = 4, queries: int = 1) -> tuple[Tensor, Tensor]:
    batch, _, heads, dim = keys.k_slc.shape
    q = torch.randn(batch, queries, heads * group, dim, dtype=keys.k_slc.dtype)
    return q, torch.rand(batch, queries, heads * group, 3, dtype=q.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_kernels_give_what_eager_does(name: str, queries: int, dtype: torch.dtype) -> None:
    settings, lengths = CONFIGS[name], (3, 17, 300, 131)
    keys = make_keys(settings, lengths, 320, dtype=dtype, queries=queries)
    q, gates = make_queries(keys, queries=queries)
    out, indices = decode_attention(q, keys, gates, settings, backend="triton")
    wide = with_stores(keys, Tensor.double)
    expected, chosen = decode_attention(q.double(), wide, gates.double(), settings, backend="eager")
    baseline, _ = decode_attention(q, keys, gates, settings, backend="eager")
    assert_equal(indices, chosen, what="selected blocks")
    assert_matches(out, expected, what="output", baseline=baseline, reduction=max(lengths))


@pytest.mark.parametrize("group", [1, 6, 16])
@pytest.mark.parametrize("dims", [(64, 64), (192, 128)], ids=["64", "192-128"])
def test_any_group_and_head_dim(dims: tuple[int, int], group: int) -> None:
    keys = make_keys(PLAIN, (90, 41), 96, dims=dims)
    q, gates = make_queries(keys, group)
    out, _ = decode_attention(q, keys, gates, PLAIN, backend="triton")
    wide = with_stores(keys, Tensor.double)
    expected, _ = decode_attention(q.double(), wide, gates.double(), PLAIN, backend="eager")
    assert_matches(out, expected, what="output", reduction=96)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_what_no_query_sees_has_no_influence(backend: Any) -> None:
    outs = []
    for unseen in (0.0, float("nan")):
        torch.manual_seed(0)
        keys = make_keys(PLAIN, (5, 70, 33), 96, unseen=unseen)
        q, gates = make_queries(keys)
        outs.append(decode_attention(q, keys, gates, PLAIN, backend=backend)[0])
    assert_equal(outs[1], outs[0], what="output")


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_dense_attention_sees_all_tokens_and_nothing_else(backend: Any, group: int, queries: int) -> None:
    """Also where the room is no multiple of anything; what lies beyond a sequence is NaN."""
    lengths, capacity = (3, 90, 41), 90
    k, v = (torch.full((3, capacity, 2, dim), torch.nan) for dim in (16, 32))
    q, expected = torch.randn(3, queries, 2 * group, 16), []
    for row, length in enumerate(lengths):
        for store in (k, v):
            store[row, :length] = torch.randn(length, 2, store.shape[3])
        keys, values = (x[row, :length].double().repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
        scores = q[row].double().transpose(0, 1) @ keys.mT / 4
        late = torch.arange(length) > torch.arange(length - queries, length)[:, None]
        expected.append((scores.masked_fill(late, -torch.inf).softmax(-1) @ values).transpose(0, 1))
    out = dense_decode_attention(q, k, v, torch.tensor(lengths), backend=backend)
    assert_matches(out, torch.stack(expected), what="output", reduction=capacity)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_lengths_beyond_the_room_are_taken_for_the_room(backend: Any, queries: int) -> None:
    keys = make_keys(PLAIN, (96, 96), 96, queries=queries)
    q, gates = make_queries(keys, queries=queries)
    beyond = keys._replace(lengths=torch.tensor([97, 1 << 20]))
    found, expected = (decode_attention(q, x, gates, PLAIN, backend=backend)[0] for x in (beyond, keys))
    assert_equal(found, expected, what="output")


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize(("batch", "queries"), [(0, 1), (2, 0)])
def test_no_queries_give_nothing(backend: Any, batch: int, queries: int) -> None:
    keys = make_keys(PLAIN, (96,) * batch, 96)
    q, gates = make_queries(keys, queries=queries)
    keys = keys._replace(lengths=keys.lengths.long())
    out, indices = decode_attention(q, keys, gates, PLAIN, backend=backend)
    assert (out.shape, indices.shape) == ((batch, queries, 8, 32), (batch, queries, 2, 6))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_cache_may_have_no_room_for_a_compressed_block(name: str) -> None:
    settings, lengths = CONFIGS[name], (1, 7, 10)
    keys = make_keys(settings, lengths, 10)
    q, gates = make_queries(keys)
    out, indices = decode_attention(q, keys, gates, settings, backend="triton")
    wide = with_stores(keys, Tensor.double)
    expected, chosen = decode_attention(q.double(), wide, gates.double(), settings, backend="eager")
    assert_equal(indices, chosen, what="selected blocks")
    assert_matches(out, expected, what="output", reduction=max(lengths))


def test_stores_may_have_any_strides() -> None:
    keys = make_keys(PLAIN, (90, 41), 96)
    q, gates = make_queries(keys)
    strided = with_stores(keys, lambda x: x.mT.contiguous().mT)
    found, expected = (decode_attention(q, x, gates, PLAIN, backend="triton")[0] for x in (strided, keys))
    assert_equal(found, expected, what="output")


@pytest.mark.parametrize("candidates", [2048, 16], ids=["long", "very_long"])
def test_a_long_context_is_shared_among_programs(monkeypatch: pytest.MonkeyPatch, candidates: int) -> None:
    """The compressed branch in several parts, as on a GPU with many multiprocessors, and its sums a few at a time. From
    some length on the selection has a launch of its own."""
    from nsa.kernels import decode

    keys = make_keys(PLAIN, (2000, 700), 2048, heads=1)
    q, gates = make_queries(keys)
    monkeypatch.setattr(decode, "multiprocessors", lambda device: 5)
    monkeypatch.setattr(decode, "_SUMS", 512)
    monkeypatch.setattr(decode, "_MOST_CANDIDATES", candidates)
    out, indices = decode_attention(q, keys, gates, PLAIN, backend="triton")
    wide = with_stores(keys, Tensor.double)
    expected, chosen = decode_attention(q.double(), wide, gates.double(), PLAIN, backend="eager")
    assert_equal(indices, chosen, what="selected blocks")
    assert_matches(out, expected, what="output", reduction=2048)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"keys": "keys"}, TypeError, "keys must be StepKeys, from KVCache.step, got str"),
        ({"q": torch.zeros(2, 1, 8)}, ValueError, "q must have 4 dimensions"),
        ({"q": torch.zeros(2, 1, 7, 16)}, ValueError, "q must have a multiple of the 2 key/value heads, got 7"),
        ({"gates": torch.zeros(2, 1, 8, 2)}, ValueError, "gates must have shape"),
        ({"lengths": torch.zeros(2, dtype=torch.int32)}, TypeError, "lengths must have dtype torch.int64"),
        ({"lengths": torch.zeros(3, dtype=torch.int64)}, ValueError, "lengths must have shape"),
        ({"k_cmp": torch.zeros(2, 3, 2, 16)}, ValueError, "k_cmp must have shape"),
        ({"v_slc": torch.zeros(2, 90, 2, 32)}, ValueError, "v_slc must have shape"),
        ({"q": torch.zeros(2, 2, 8, 16), "gates": torch.zeros(2, 2, 8, 3)}, ValueError, "k_win must have room for"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], error: type, message: str) -> None:
    keys = make_keys(PLAIN, (90, 41), 96)
    q, gates = make_queries(keys)
    moved = {name: x.to(q.device) if isinstance(x, Tensor) else x for name, x in changes.items()}
    given: dict[str, Any] = {"q": q, "gates": gates, "keys": keys}
    given |= {name: x for name, x in moved.items() if name in given}
    fields = {name: x for name, x in moved.items() if name not in given}
    if fields:
        given["keys"] = keys._replace(**fields)
    with pytest.raises(error, match=f"^{message}"):
        decode_attention(given["q"], given["keys"], given["gates"], PLAIN, backend="eager")


def test_a_step_that_has_no_room_leaves_the_cache_as_it_was() -> None:
    layer = NativeSparseAttention(32, 4, 1, 16, PLAIN, backend="eager")
    cache = layer.make_cache(1, 20)
    layer(torch.randn(1, 20, 32), cache=cache)
    before = [x.clone() for pair in cache._pairs.values() for x in pair]
    for act in (lambda: layer(torch.randn(1, 1, 32), cache=cache), cache.count_step):
        with pytest.raises(ValueError, match=r"^cache must have room for 1 tokens after 20, got 20 in all$"):
            act()
    assert cache.lengths == (20,)
    for x, y in zip(before, (x for pair in cache._pairs.values() for x in pair), strict=True):
        assert_equal(y, x, what="cache")


def random_params(settings: NSAConfig, heads: int, dim: int) -> CompressionParams | None:
    """Parameters of blocks, of a hidden width that is no power of two where it may be any."""
    if settings.compression == "mean":
        return None
    length, hidden = settings.compress_block_size, 20 if settings.compression == "mlp" else dim
    rows = length * dim
    weight_out = torch.randn(heads, hidden, dim) if settings.compression == "mlp" else None
    return CompressionParams(torch.randn(heads, length, dim), torch.randn(heads, rows, hidden) / rows**0.5, weight_out)


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("rope", ["interleaved", "halves", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("compression", ["mean", "linear", "mlp"])
def test_steps_of_kernels_leave_what_those_of_eager_do(
    compression: Any, dtype: torch.dtype, rope: str, shared: bool
) -> None:
    """Sequences of their own lengths complete blocks at different steps, and rings go round."""
    settings, heads, dims = replace(PLAIN, compression=compression, shared_kv=shared), 2, (24, 16)
    params = [random_params(settings, heads, dim) for dim in dims]
    table = None if rope == "none" else rope_table(80, dims[0])
    runs: dict[str, Any] = {"triton": dtype, "eager": dtype, "exact": torch.float64}
    caches = {name: KVCache(settings, 3, 80, heads, *dims, spare=9, dtype=runs[name]) for name in runs}
    for number in range(50):
        if number == 20:
            for one in caches.values():
                one.truncate((20, 17, 12))
        q, *keys = (torch.randn(3, 1, count, dims[0]).to(dtype) for count in (6, heads, heads, heads))
        values = [torch.randn(3, 1, heads, dims[1]).to(dtype) for _ in range(3)]
        found = {}
        for name, one in caches.items():
            k, v = ([x.to(runs[name]) for x in tensors] for tensors in (keys, values))
            options: Any = {"interleaved": rope == "interleaved", "backend": "triton" if name == "triton" else "eager"}
            found[name], stores = one.step(q.to(runs[name]), k, v, params, table, **options)
            assert stores.lengths.tolist() == list(one.lengths)
        assert_matches(found["triton"], found["exact"], what="queries", baseline=found["eager"], reduction=2)
    for name in caches["exact"]._pairs:
        pairs = (caches[run]._pairs[name] for run in ("triton", "exact", "eager"))
        for kind_of, x, expected, baseline in zip("kv", *pairs, strict=True):
            assert_matches(x, expected, what=f"{kind_of} {name}", baseline=baseline, reduction=16 * 24)


class Breaking:
    """The largest of each block, until it raises or gives blocks that would be spread over the cache's width."""

    def __init__(self, how: str) -> None:
        self.how, self.broken = how, False

    def __call__(self, blocks: Tensor) -> Tensor:
        if self.broken and self.how == "raises":
            raise RuntimeError("no")
        return blocks.amax(3)[..., : 1 if self.broken else None]


@pytest.mark.parametrize("how", ["raises", "another width"])
def test_a_step_that_fails_leaves_the_cache_as_it_was(how: str) -> None:
    phi = Breaking(how)
    layer = NativeSparseAttention(32, 4, 1, 16, PLAIN, backend="eager", phi=(phi, phi)).double()
    cache, x = layer.make_cache(1, 40), torch.randn(1, 24, 32, dtype=torch.float64)
    for token in x[:, :23].split(1, 1):
        layer(token, cache=cache)
    before = [y.clone() for pair in cache._pairs.values() for y in pair]
    phi.broken = True
    with pytest.raises((RuntimeError, ValueError), match=r"^(no|k_cmp must have shape)"):
        layer(x[:, 23:], cache=cache)
    for y, z in zip(before, (y for pair in cache._pairs.values() for y in pair), strict=True):
        assert_equal(z, y, what="cache")
    assert (cache.lengths, cache.lengths_on_device().tolist()) == ((23,), [23])


def test_the_device_knows_the_lengths() -> None:
    layer = NativeSparseAttention(32, 4, 1, 16, PLAIN, backend="eager")
    cache = layer.make_cache(2, 60, spare=30)
    layer(torch.randn(2, 40, 32), cache=cache)
    assert cache.lengths_on_device().tolist() == [40, 40]
    cache.truncate((40, 21))
    for number in range(3):
        assert cache.lengths_on_device().tolist() == [40 + number, 21 + number] == list(cache.lengths)
        layer(torch.randn(2, 1, 32), cache=cache)
    assert cache.fork([1]).lengths_on_device().tolist() == [24]


def test_the_device_knows_the_lengths_of_dense_caches() -> None:
    cache, token = DenseCache(2, 8, 1, 16), torch.randn(2, 1, 1, 16)
    cache.append(slice(0, 2), torch.randn(2, 5, 1, 16), torch.randn(2, 5, 1, 16))
    cache.truncate((5, 2))
    for number in range(1, 4):
        k, v, lengths = cache.step(token, 2 * token)
        assert lengths.tolist() == [5 + number, 2 + number] == list(cache.lengths)
        assert_equal(k[0, 4 + number], token[0, 0], what="key")
        assert_equal(v[1, 1 + number], 2 * token[1, 0], what="value")
    with pytest.raises(ValueError, match=r"^cache must have room for 1 tokens after 8, got 8 in all$"):
        cache.step(token, token)
    assert (cache.lengths, cache.lengths_on_device().tolist()) == ((8, 5), [8, 5])


class Dense(nn.Module):
    """A layer of dense attention, as small as one can be."""

    def __init__(self) -> None:
        super().__init__()
        self.projection, self.out = nn.Linear(64, 12 * 16), nn.Linear(8 * 16, 64)

    def make_cache(self, batch: int, capacity: int, spare: int) -> DenseCache:
        weight = self.projection.weight
        return DenseCache(batch, capacity, 2, 16, dtype=weight.dtype, device=weight.device)

    def forward(self, x: Tensor, rope: Tensor, cache: DenseCache) -> Tensor:
        q, k, v = self.projection(x).unflatten(-1, (12, 16)).split((8, 2, 2), 2)
        if x.shape[1] > 1:  # all at once, and of one length
            k, v = cache.append(slice(0, len(x)), k, v)
            q, k, v = (y.transpose(1, 2) for y in (q, k, v))
            out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
        else:
            out = dense_decode_attention(q, *cache.step(k, v))
        return self.out(out.flatten(2))


class Model(nn.Module):
    """Two layers and an embedding, called as `generate` calls models."""

    def __init__(self, settings: NSAConfig, backend: Any, dense: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 64)
        sparse = (NativeSparseAttention(64, 8, 2, 16, settings, backend=backend) for _ in range(2 - dense))
        self.layers: Any = nn.ModuleList([*([Dense()] if dense else []), *sparse])
        self.rope = rope_table(256, 16)

    def forward(self, tokens: Tensor, cache: dict[str, KVCache], at: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for name, layer in enumerate(self.layers):
            x = x + layer(x, self.rope, cache=cache[str(name)])
        return (x @ self.embedding.weight.T)[torch.arange(len(x)), at]

    def make_caches(self, batch: int) -> dict[str, KVCache]:
        return {str(name): layer.make_cache(batch, 256, spare=64) for name, layer in enumerate(self.layers)}


def steps_of(model: Model, captured: bool, count: int) -> list[Tensor]:
    """Logits of greedy steps after two prompts of 70 and 47 tokens, some of which are taken back on the way."""
    tokens = torch.arange(140).reshape(2, 70) % 50
    cache = model.make_caches(2)
    with torch.no_grad():
        logits = model(tokens, cache=cache, at=torch.full((2,), 69))
        for one in cache.values():
            one.truncate((70, 47))
        graphs = DecodeGraphs(model, cache)
        graphs._captures = graphs._captures and captured
        found = []
        for number in range(count):
            if number == 2 * count // 3:
                for one in cache.values():
                    one.truncate(tuple(length - 5 for length in one.lengths))
            logits = graphs(logits.argmax(-1)).clone()
            found.append(logits)
    return found


@pytest.mark.needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("shared", "dense"), [(False, False), (True, False), (False, True)])
def test_replayed_steps_give_the_same_bits(shared: bool, dense: bool, dtype: torch.dtype) -> None:
    model = Model(replace(PLAIN, shared_kv=shared), "triton", dense).to(dtype)
    assert can_capture(model, model.make_caches(1))
    called, replayed = steps_of(model, False, 80), steps_of(model, True, 80)
    for number, (x, y) in enumerate(zip(replayed, called, strict=True)):
        assert_equal(x, y, what=f"logits of step {number}")


@pytest.mark.needs_gpu
def test_replayed_steps_outlive_the_casts_of_autocast() -> None:
    """Each step is in a block of its own, at whose end autocast throws away the weights that it has cast."""
    model, found = Model(PLAIN, "triton"), []
    for captured in (False, True):
        tokens = torch.arange(60).reshape(2, 30) % 50
        with torch.autocast("cuda", torch.bfloat16):
            cache = model.make_caches(2)
            model(tokens, cache=cache, at=torch.full((2,), 29))
        graphs = DecodeGraphs(model, cache)
        graphs._captures = captured
        for number in range(60):
            with torch.autocast("cuda", torch.bfloat16):
                logits = graphs(torch.tensor([number % 50, 7])).clone()
            torch.full((1 << 22,), torch.nan)  # where the casts may have been
        found.append(logits)
    assert_equal(found[1], found[0], what="logits")


@pytest.mark.needs_gpu
@pytest.mark.parametrize("dense", [False, True])
def test_a_step_waits_for_nothing(dense: bool) -> None:
    model = Model(PLAIN, "triton", dense)
    cache, tokens, at = model.make_caches(2), torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    with torch.no_grad():
        for _ in range(24):
            model(tokens, cache=cache, at=at)
        with no_synchronisation():
            for _ in range(24):
                model(tokens, cache=cache, at=at)


class Counter:
    """A cache that counts tokens on the host and on the device."""

    batch = 1

    def __init__(self) -> None:
        self.host = self.device = 0
        self.captured = False

    def check_room(self, batch: int, tokens: int) -> None:
        assert (batch, tokens) == (1, 1)

    def count_step(self) -> None:
        self.host += 1

    def counted(self) -> int:
        return self.host

    def count_again(self, counted: int) -> None:
        self.host = counted

    def lengths_on_device(self) -> None:
        self.device = self.host


class Steps(nn.Linear):
    """A model that counts, on the device too unless a graph is captured."""

    fails = False

    def forward(self, tokens: Tensor, cache: dict[str, Counter], at: Tensor) -> Tensor:  # type: ignore[override]
        cache["0"].host += 1
        cache["0"].device += not cache["0"].captured
        if self.fails and cache["0"].captured:
            raise RuntimeError("it asks for a number")
        return tokens


@pytest.fixture
def counted_graphs(monkeypatch: pytest.MonkeyPatch) -> tuple[Counter, list[int]]:
    """A cache, and the steps at which graphs are replayed, of graphs that only count."""
    counter, replayed = Counter(), list[int]()

    class Graph:
        def replay(self) -> None:
            assert torch.is_autocast_enabled(torch.get_default_device().type) is self.cast
            replayed.append(counter.device)
            counter.device += 1

        def __enter__(self) -> None:
            assert not torch.is_autocast_cache_enabled(), "casts that are kept are none of the graph's"
            self.cast = torch.is_autocast_enabled(torch.get_default_device().type)
            counter.captured = True

        def __exit__(self, *_: Any) -> None:
            counter.captured = False

    monkeypatch.setattr(decode_graphs, "can_capture", lambda model, cache: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: graph)
    return counter, replayed


def test_captured_steps_count_on_the_host_what_the_device_takes_in(counted_graphs: tuple[Counter, list[int]]) -> None:
    counter, replayed = counted_graphs
    step = DecodeGraphs(Steps(1, 1), {"0": counter})
    for number in range(20):
        step(torch.zeros(1, dtype=torch.int64))
        assert counter.host == counter.device == number + 1
    assert replayed == list(range(2, 20)), "the first two steps are called"


def test_a_graph_is_of_one_state_of_autocast(counted_graphs: tuple[Counter, list[int]]) -> None:
    counter, replayed = counted_graphs
    step, device = DecodeGraphs(Steps(1, 1), {"0": counter}), torch.get_default_device().type
    for number in range(24):
        with torch.autocast(device, torch.bfloat16, enabled=number >= 12):
            step(torch.zeros(1, dtype=torch.int64))
        assert counter.host == counter.device == number + 1
    # In each state the first two steps are called, also where the graph of the other state is there.
    assert replayed == [*range(2, 12), *range(14, 24)]
    assert torch.is_autocast_cache_enabled()


def test_a_step_that_cannot_be_captured_is_called(counted_graphs: tuple[Counter, list[int]]) -> None:
    counter, replayed = counted_graphs
    model = Steps(1, 1)
    model.fails = True
    step = DecodeGraphs(model, {"0": counter})
    for number in range(12):
        if number == 2:
            with pytest.warns(UserWarning, match="^steps are not captured as CUDA graphs: it asks for a number$"):
                step(torch.zeros(1, dtype=torch.int64))
        else:
            step(torch.zeros(1, dtype=torch.int64))
        assert counter.host == counter.device == number + 1
    assert not replayed


def test_eager_steps_are_not_captured() -> None:
    model = Model(PLAIN, "eager")
    assert not can_capture(model, model.make_caches(1))
    steps = steps_of(model, True, 6)
    assert all(torch.isfinite(x).all() for x in steps)


@pytest.mark.parametrize("forked", [True, False], ids=["forked", "new"])
@pytest.mark.parametrize("kind", ["nsa", "dense"])
@pytest.mark.parametrize("inside", [True, False])
def test_a_cache_goes_from_inference_mode_to_another_and_back(kind: str, inside: bool, forked: bool) -> None:
    """What is made in inference mode could not be written to outside: a cache, or a fork of one, can."""
    model = Model(PLAIN, "eager", kind == "dense")
    tokens, outs = torch.arange(40).reshape(2, 20) % 50, []
    for mode in (inside, None):
        with torch.inference_mode(bool(mode)):
            cache = model.make_caches(2)
            model(tokens, cache=cache, at=torch.full((2,), 19))
            cache = {name: one.fork() for name, one in cache.items()} if forked else cache
            graphs = DecodeGraphs(model, cache)
        with torch.inference_mode(mode is False), torch.no_grad():
            out = [graphs(torch.tensor([1, 2])) for _ in range(12)]
            for one in cache.values():
                one.truncate(25)
        with torch.no_grad():
            outs.append(torch.stack([*out, graphs(torch.tensor([3, 4]))]))
    assert_equal(outs[0].clone(), outs[1].clone(), what="logits")
