"""The key/value cache: chunks and steps give what the whole sequence does, and bad use leaves it as it was."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nsa import CachedKeys, KVCache, NativeSparseAttention, NSAConfig, cached_attention, rope_table
from nsa.backends import BackendName
from validation.cases import config
from validation.numerics import assert_equal, assert_matches

pytestmark = pytest.mark.usefixtures("on_device")

DIM, HEADS, KV_HEADS, HEAD_DIM, TOKENS = 16, 4, 2, 8, 61
REDUCTION = TOKENS * HEADS * HEAD_DIM
CONFIGS = {
    "mlp": config(),
    "mean": config(compression="mean"),
    "disjoint_blocks": config((4, 4, 8), compression="linear"),
    "shared_keys": config(shared_kv=True),
    "window_1": config(window=1),
    "no_window": config(window=0),
    "nothing_selected": config(selected=0),
}
KERNELS = config((16, 8, 16), 3, 12)
each_config = pytest.mark.parametrize("name", CONFIGS)


def make(
    settings: NSAConfig, backend: BackendName = "eager", dtype: torch.dtype = torch.float64, **options: Any
) -> NativeSparseAttention:
    layer = NativeSparseAttention(DIM, HEADS, KV_HEADS, HEAD_DIM, settings, backend=backend, **options)
    return layer.to(dtype)


def feed(layer: NativeSparseAttention, cache: KVCache, x: Tensor, *sizes: int) -> tuple[Tensor, Tensor]:
    """Outputs and selected blocks of `x` in pieces of these sizes."""
    rope = rope_table(256, HEAD_DIM)
    assert sum(sizes) == x.shape[1]
    parts = [layer(piece, rope, cache=cache, return_indices=True) for piece in x.split(sizes, 1)]
    outs, indices = zip(*parts, strict=True)
    return torch.cat(outs, 1), torch.cat(indices, 1)


def check(layer: NativeSparseAttention, found: tuple[Tensor, Tensor], x: Tensor, first: int = 0) -> None:
    """Holds outputs from token `first` on to those of a forward pass over all of `x`."""
    out, indices = layer(x, rope_table(256, HEAD_DIM), return_indices=True)
    assert_equal(found[1], indices[:, first:], what="selected blocks")
    assert_matches(found[0], out[:, first:].detach(), what="output", reduction=REDUCTION)


@each_config
@settings(max_examples=15)
@given(data=st.data())
def test_any_split_gives_what_the_whole_sequence_does(name: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, TOKENS - 1), max_size=6)))
    sizes = [b - a for a, b in zip([0, *cuts], [*cuts, TOKENS], strict=True)]
    layer, x = make(CONFIGS[name]), torch.randn(2, TOKENS, DIM, dtype=torch.float64)
    check(layer, feed(layer, layer.make_cache(2, TOKENS), x, *sizes), x)


@each_config
@pytest.mark.parametrize("size", [1, 3])
def test_piece_by_piece(size: int, name: str) -> None:
    layer, x = make(CONFIGS[name]), torch.randn(1, TOKENS, DIM, dtype=torch.float64)
    pieces = [size] * (TOKENS // size) + [1] * (TOKENS % size)
    check(layer, feed(layer, layer.make_cache(1, TOKENS), x, *pieces), x)


def test_pieces_with_pairs_of_two_halves() -> None:
    layer, x = make(CONFIGS["mlp"], rope_interleaved=False), torch.randn(1, TOKENS, DIM, dtype=torch.float64)
    found = feed(layer, layer.make_cache(1, TOKENS), x, 40, 1, 1, TOKENS - 42)
    check(layer, found, x)
    layer.rope_interleaved = True
    assert not torch.equal(layer(x, rope_table(TOKENS, HEAD_DIM)), found[0])


@pytest.mark.parametrize("sizes", [(61,), (40, 1, 1, 1, 18), (15, 2, 30, 14)])
def test_kernels_go_on_from_a_cache(sizes: tuple[int, ...]) -> None:
    layer = NativeSparseAttention(32, HEADS, 1, 16, KERNELS, backend="triton")
    x, rope, cache = torch.randn(1, TOKENS, 32), rope_table(TOKENS, 16), layer.make_cache(1, TOKENS)
    out = torch.cat([layer(piece, rope, cache=cache) for piece in x.split(sizes, 1)], 1)
    assert_matches(out, layer(x, rope).detach().double(), what="output", reduction=TOKENS * HEADS * 16)


def test_sequences_of_their_own_lengths() -> None:
    """Sequences that were truncated to lengths of their own go on from there."""
    layer, x = make(CONFIGS["mlp"]), torch.randn(4, TOKENS, DIM, dtype=torch.float64)
    cache, lengths = layer.make_cache(4, TOKENS, spare=20), (40, 40, 23, 31)
    feed(layer, cache, x[:, :40], 40)
    cache.truncate(lengths)
    assert cache.lengths == lengths
    new = torch.randn(4, 6, DIM, dtype=torch.float64)
    out, indices = feed(layer, cache, new, 4, 1, 1)
    for row, length in enumerate(lengths):
        sequence = torch.cat((x[row : row + 1, :length], new[row : row + 1]), 1)
        check(layer, (out[row : row + 1], indices[row : row + 1]), sequence, first=length)


@each_config
def test_packed_sequences_go_on_from_a_cache(name: str) -> None:
    """Each in a row of its own: as prompts, as later pieces, some of them empty, and then step by step."""
    layer, total = make(CONFIGS[name]), (40, 7, 23)
    x = [torch.randn(1, length, DIM, dtype=torch.float64) for length in total]
    cache, taken = layer.make_cache(3, TOKENS), [0, 0, 0]
    found: list[list[tuple[Tensor, ...]]] = [[], [], []]
    for sizes in ((30, 5, 0), (0, 0, 0), (9, 0, 21), (0, 1, 1)):
        pieces = [row[:, begin : begin + size] for row, begin, size in zip(x, taken, sizes, strict=True)]
        offsets = torch.tensor([0, *sizes]).cumsum(0).int()
        both = layer(torch.cat(pieces, 1), rope_table(256, HEAD_DIM), offsets, cache=cache, return_indices=True)
        for row, parts in enumerate(zip(*(y.split(sizes, 1) for y in both), strict=True)):
            found[row].append(parts)
        taken = [begin + size for begin, size in zip(taken, sizes, strict=True)]
        assert cache.lengths == tuple(taken)
    last = feed(layer, cache, torch.cat([row[:, -1:] for row in x]), 1)
    for row, sequence in enumerate(x):
        begin = taken[row]
        whole = torch.cat((sequence[:, :begin], sequence[:, -1:]), 1)
        all_parts = [*found[row], tuple(y[row : row + 1] for y in last)]
        out, indices = (torch.cat(y, 1) for y in zip(*all_parts, strict=True))
        check(layer, (out, indices), whole)


OPTIONS: dict[str, dict[str, Any]] = {
    "biases": {"bias": True},
    "softmax": {"gate_activation": "softmax"},
    "gates_for_all_heads": {"gate_per_head": False},
    "gates_by_an_mlp": {"gate_hidden": 6},
}


@pytest.mark.parametrize("joined", [False, True], ids=["apart", "joined"])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_kind_of_layer_goes_on_from_a_cache(name: str, joined: bool) -> None:
    layer, x = make(CONFIGS["mlp"], **OPTIONS[name]), torch.randn(2, TOKENS, DIM, dtype=torch.float64)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    if joined:
        before = {key: value.clone() for key, value in layer.state_dict().items()}
        layer.join_projections()
        for key, value in layer.state_dict().items():
            assert_equal(value, before[key], what=key)
    check(layer, feed(layer, layer.make_cache(2, TOKENS), x, 40, 1, 1, TOKENS - 42), x)


class Doubled(torch.nn.Linear):
    """What somebody may put in place of a layer: its own weight, and something more."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def doubled(layer: NativeSparseAttention) -> None:
    other = Doubled(DIM, layer.wq.out_features, bias=False)
    other.weight, layer.wq = layer.wq.weight, other


CHANGES: dict[str, Callable[[NativeSparseAttention], Any]] = {
    "in_place": lambda layer: layer.wq.weight.data.mul_(2),
    "other_memory": lambda layer: setattr(layer.wq.weight, "data", 2 * layer.wq.weight),
    "other_bias": lambda layer: setattr(layer.wg.bias, "data", 1 + layer.get_parameter("wg.bias")),
    "another_layer": doubled,
}


@pytest.mark.parametrize("name", CHANGES)
def test_joined_projections_are_those_of_the_layer(name: str) -> None:
    """Whatever becomes of a weight, or of a layer, after they have been joined."""
    layer, x = make(CONFIGS["mlp"]), torch.randn(2, TOKENS, DIM, dtype=torch.float64)
    layer.join_projections()
    expected = layer(x, rope_table(TOKENS, HEAD_DIM))
    CHANGES[name](layer)
    assert not torch.equal(layer(x, rope_table(TOKENS, HEAD_DIM)), expected)
    check(layer, feed(layer, layer.make_cache(2, TOKENS), x, 40, 1, TOKENS - 41), x)


@each_config
@pytest.mark.parametrize("back", [1, 5, 9])
def test_tokens_taken_back_leave_no_trace(name: str, back: int) -> None:
    layer, x = make(CONFIGS[name]), torch.randn(1, TOKENS, DIM, dtype=torch.float64)
    cache = layer.make_cache(1, TOKENS, spare=9)
    feed(layer, cache, x[:, :50], 23, 27)
    cache.truncate(50 - back)
    other = torch.cat((x[:, : 50 - back], torch.randn(1, 9, DIM, dtype=torch.float64)), 1)
    check(layer, feed(layer, cache, other[:, 50 - back :], 2, 1, 6), other, first=50 - back)


def test_forks_go_their_own_ways() -> None:
    layer, x = make(CONFIGS["mlp"]), torch.randn(2, TOKENS, DIM, dtype=torch.float64)
    cache = layer.make_cache(2, TOKENS)
    feed(layer, cache, x[:, :30], 30)
    fork = cache.fork([1, 0, 1])
    new = torch.randn(3, 8, DIM, dtype=torch.float64)
    of_fork = feed(layer, fork, new, 5, 3)
    check(layer, feed(layer, cache, x[:, 30:], TOKENS - 30), x, first=30)
    check(layer, of_fork, torch.cat((x[[1, 0, 1], :30], new), 1), first=30)
    assert (cache.lengths, fork.lengths) == ((TOKENS,) * 2, (38,) * 3)


def test_forks_have_the_lengths_of_their_sequences() -> None:
    layer, x = make(CONFIGS["mlp"]), torch.randn(2, TOKENS, DIM, dtype=torch.float64)
    cache = layer.make_cache(2, TOKENS, spare=10)
    feed(layer, cache, x[:, :30], 30)
    cache.truncate((30, 25))
    fork = cache.fork([1])
    assert fork.lengths == (25,)
    check(layer, feed(layer, fork, x[1:, 25:], TOKENS - 25), x[1:], first=25)


def test_a_reset_cache_is_a_new_one() -> None:
    layer, x = make(CONFIGS["mlp"]), torch.randn(1, TOKENS, DIM, dtype=torch.float64)
    cache = layer.make_cache(1, TOKENS)
    feed(layer, cache, torch.randn(1, TOKENS, DIM, dtype=torch.float64), 20, 41)
    cache.reset()
    check(layer, feed(layer, cache, x, 33, 28), x)


@pytest.mark.parametrize("spare", [0, 7])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("capacity", [5, 100])
def test_memory_is_what_the_formula_says(capacity: int, shared: bool, spare: int) -> None:
    sizes = config((4, 2, 8), 4, 20, shared_kv=shared)
    cache = KVCache(sizes, 3, capacity, 2, 16, 8, spare=spare, dtype=torch.bfloat16)
    window = 0 if shared else min(capacity, 20 + spare)
    a_token = 3 * 2 * (16 + 8) * 2
    assert cache.nbytes == a_token * (capacity + (capacity - 4) // 2 + 1 + window + min(capacity, 4 + spare))


def test_rings_do_not_grow_with_the_context() -> None:
    short, long = (KVCache(NSAConfig(shared_kv=True), 1, capacity, 4, 128) for capacity in (2048, 65536))
    dense = 2 * 4 * 128 * 4
    assert long.nbytes <= 1.1 * dense * 65536
    assert long.nbytes - short.nbytes == dense * (65536 - 2048) * 17 // 16


# Refusals.


def new_tokens(count: int = 1, **options: Any) -> Tensor:
    return torch.randn(options.pop("batch", 2), count, DIM, dtype=options.pop("dtype", torch.float64), **options)


REFUSED = {
    "no_room": (
        {"x": lambda: new_tokens(12)},
        ValueError,
        "cache must have room for 12 tokens after 29, got 40 in all",
    ),
    "another_batch": ({"x": lambda: new_tokens(batch=3)}, ValueError, "cache must be for a batch of 3, got one for 2"),
    "offsets_of_other_sequences": (
        {"x": lambda: new_tokens(batch=1, count=4), "cu_seqlens": lambda: torch.tensor([0, 4], dtype=torch.int32)},
        ValueError,
        "cache must be for a batch of 1, got one for 2",
    ),
    "no_room_for_a_packed_sequence": (
        {
            "x": lambda: new_tokens(batch=1, count=20),
            "cu_seqlens": lambda: torch.tensor([0, 2, 20], dtype=torch.int32),
        },
        ValueError,
        "cache must have room for 18 tokens after 29, got 40 in all",
    ),
    "indices": (
        {"x": new_tokens, "indices": lambda: torch.zeros(2, 1, 2, 4, dtype=torch.int32)},
        ValueError,
        "indices must be None beside a cache, got a tensor",
    ),
    "short_table": (
        {"x": new_tokens, "rope": lambda: rope_table(29, HEAD_DIM)},
        ValueError,
        "rope must have a row for each of the 30 positions, got 29",
    ),
    "another_configuration": (
        {"x": new_tokens, "cache": lambda: KVCache(KERNELS, 2, 40, KV_HEADS, HEAD_DIM, dtype=torch.float64)},
        ValueError,
        "cache must be for the configuration of the layer",
    ),
    "another_kind": ({"x": new_tokens, "cache": dict}, TypeError, "cache must be a KVCache, from make_cache, got dict"),
    "another_dtype": (
        {"x": new_tokens, "cache": lambda: KVCache(CONFIGS["mlp"], 2, 40, KV_HEADS, HEAD_DIM)},
        TypeError,
        "cache must have dtype torch.float64, like the tensors beside it, got torch.float32",
    ),
    "other_heads": (
        {"x": new_tokens, "cache": lambda: KVCache(CONFIGS["mlp"], 2, 40, 1, HEAD_DIM, dtype=torch.float64)},
        ValueError,
        r"k must have shape \[b, t, Hk, D\] = \(2, 1, 1, 8\), got \(2, 1, 2, 8\)",
    ),
}


@pytest.fixture
def filled() -> tuple[NativeSparseAttention, KVCache]:
    layer = make(CONFIGS["mlp"])
    cache = layer.make_cache(2, 40)
    feed(layer, cache, new_tokens(29), 29)
    return layer, cache


@pytest.mark.parametrize(("given", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(filled: Any, given: dict[str, Any], error: type, message: str) -> None:
    layer, cache = filled
    before = copy.deepcopy(cache)
    arguments = {"rope": rope_table(64, HEAD_DIM), "cache": cache, **{name: value() for name, value in given.items()}}
    with pytest.raises(error, match=f"^{message}"):
        layer(**arguments)
    more = new_tokens(5)
    assert cache.lengths == before.lengths == (29, 29)
    assert_equal(feed(layer, cache, more, 5)[0], feed(layer, before, more, 5)[0], what="output after the refusal")


def test_a_backend_that_cannot_is_refused_before_anything_is_taken_in() -> None:
    layer = NativeSparseAttention(DIM, HEADS, KV_HEADS, HEAD_DIM, CONFIGS["mlp"], backend="triton")
    cache = layer.make_cache(1, 8)
    with pytest.raises(ValueError, match=r"^backend must be"):
        layer(torch.randn(1, 3, DIM), cache=cache)
    assert cache.lengths == (0,)


def test_nothing_is_differentiated() -> None:
    layer = make(CONFIGS["mlp"])
    out = layer(new_tokens(3).requires_grad_(), cache=layer.make_cache(2, 8))
    assert not out.requires_grad


def test_a_cache_is_of_the_dtype_of_autocast() -> None:
    layer, x = make(CONFIGS["mlp"], dtype=torch.float32), torch.randn(1, 9, DIM)
    with torch.autocast(x.device.type, torch.bfloat16):
        cache = layer.make_cache(1, 9)
        out = torch.cat([layer(piece, cache=cache) for piece in x.split(4, 1)], 1)
        expected = layer(x)
    assert_matches(out, expected.detach().double(), what="output", reduction=REDUCTION)


KEYS = {
    "k_slc": "k_slc must have the 5 tokens of num_keys, got 4",
    "k_win": "k_win must have at least the last 5 tokens",
}


@pytest.mark.parametrize(("name", "message"), KEYS.items(), ids=KEYS)
def test_keys_that_are_too_few_are_refused(name: str, message: str) -> None:
    sizes, keys = CONFIGS["mlp"], dict[str, Tensor]()
    for of, length in (("cmp", sizes.num_compressed(5)), ("slc", 5), ("win", 5)):
        keys |= {f"{x}_{of}": torch.randn(1, length, 2, 8) for x in "kv"}
    keys[name] = keys[name][:, 1:]
    with pytest.raises(ValueError, match=f"^{message}"):
        cached_attention(torch.randn(1, 2, 4, 8), CachedKeys(**keys, num_keys=5), torch.rand(1, 2, 4, 3), sizes)


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        (30, ValueError, "lengths must be at most 29 for sequence 0, got 30"),
        (
            [29, 27],
            ValueError,
            "lengths must be 0 or at least 28 for sequence 1, as a ring holds no more of it, got 27",
        ),
        ([29], ValueError, "lengths must be one number or 2, got 1"),
        (-1, ValueError, "lengths must be at least 0, got -1"),
        ([29, 2.5], TypeError, "lengths must be an int, got 2.5"),
    ],
)
def test_what_cannot_be_taken_back_is_refused(filled: Any, lengths: Any, error: type, message: str) -> None:
    _, cache = filled
    with pytest.raises(error, match=f"^{message}"):
        cache.truncate(lengths)
    assert cache.lengths == (29, 29)


def test_all_that_the_rings_hold_can_be_taken_back() -> None:
    """A length is refused only where a ring has lost what the sequence needs, and works otherwise."""
    layer, x = make(CONFIGS["mlp"]), torch.randn(1, TOKENS, DIM, dtype=torch.float64)
    for spare, total, refused in ((0, 3, []), (4, 7, []), (4, 40, [*range(1, 35)]), (11, 33, [*range(1, 21)])):
        found = []
        for length in range(1, total + 1):
            cache = layer.make_cache(1, TOKENS, spare=spare)
            feed(layer, cache, x[:, :total], total)
            try:
                cache.truncate(min(length + 1, total))  # what the rings have lost is lost, however it is asked for
                cache.truncate(length)
            except ValueError:
                found.append(length)
            else:
                check(layer, feed(layer, cache, x[:, length:], TOKENS - length), x, first=length)
        assert found == refused


@pytest.mark.parametrize("sequences", [[], [2], [0, 5]])
def test_forks_of_sequences_that_are_not_there_are_refused(filled: Any, sequences: list[int]) -> None:
    with pytest.raises(ValueError, match=r"^sequences must be some of the 2 there are, got"):
        filled[1].fork(sequences)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"batch": 0}, ValueError, "batch must be at least 1, got 0"),
        ({"capacity": 2.0}, TypeError, "capacity must be an int, got 2.0"),
        ({"spare": -1}, ValueError, "spare must be at least 0, got -1"),
        ({"head_dim": 0}, ValueError, "head_dim must be at least 1, got 0"),
        ({"dtype": torch.int32}, TypeError, "dtype must be floating, got torch.int32"),
        ({"config": {}}, TypeError, "config must be an NSAConfig, got dict"),
    ],
)
def test_sizes_that_cannot_be_are_refused(changes: dict[str, Any], error: type, message: str) -> None:
    sizes = {"config": CONFIGS["mlp"], "batch": 1, "capacity": 8, "num_kv_heads": 1, "head_dim": 8}
    with pytest.raises(error, match=f"^{message}"):
        KVCache(**{**sizes, **changes})
