"""The table of configurations: what it holds, and which entry a lookup takes."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.cache import get_cache_manager

from nsa import KVCache, NativeSparseAttention, NSAConfig, kernels, nsa_attention, rope_table
from nsa.kernels import cache, configs, selected_by_block
from nsa.kernels.configs import Entry, KeyMajorConfig, kernel_config, make_config, read_table, write_table
from nsa.kernels.selected_by_block import shortened
from nsa.ops import OPERATORS, sizes_of
from nsa.varlen import tensors_of
from validation.perf import tune

FLASH = {"num_warps": 4, "num_stages": 2, "BLOCK_N": 64, "TMA": True, "SPLIT": True}


def entry(group: int, rows: int) -> Entry:
    config = make_config("window_forward", BLOCK_M=rows, **FLASH)
    return Entry("window_forward", "sm90", 2, 128, 128, group, config)


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Looks up in a table of its own as a Hopper GPU would, wherever the test runs."""
    table = [entry(4, 32), entry(16, 64)]
    monkeypatch.setattr(configs, "_table", lambda: table)
    monkeypatch.setattr(configs.triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(configs, "architecture", lambda device: "sm90")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    configs._choose.cache_clear()
    yield
    configs._choose.cache_clear()


def window(group: int = 16, device: torch.device | None = None) -> Any:
    return kernel_config("window_forward", torch.bfloat16, 128, 128, group, device)


@pytest.mark.parametrize(
    ("heads", "tokens", "pieces", "least", "expected"),
    [
        (4, 4096, 16, 128, 128),
        (8, 4096, 16, 128, 256),
        (8, 8192, 16, 128, 512),
        (4, 65536, 16, 128, 1024),
        (8, 4096, 8, 1024, 1024),
        (4, 4096, 8, 512, 512),
        (4, 32768, 8, 512, 1024),
        (1, 1, 16, 128, 128),
    ],
)
def test_pieces_are_short_beside_all_that_is_to_do(
    monkeypatch: pytest.MonkeyPatch, heads: int, tokens: int, pieces: int, least: int, expected: int
) -> None:
    """On a GPU of 132 multiprocessors, with 16 blocks a query, the lengths that were measured to be best there."""
    monkeypatch.setattr(selected_by_block, "multiprocessors", lambda device: 132)
    config = make_config("selected_forward_key_major", num_warps=4, num_stages=2, BLOCK_M=64, CHUNK=1024)
    assert isinstance(config, KeyMajorConfig)
    found = shortened(config, heads * tokens * 16, pieces, least, torch.device("cuda"))
    assert found == replace(config, CHUNK=expected)


@pytest.mark.parametrize(("group", "rows"), [(1, 32), (4, 32), (6, 32), (8, 32), (9, 64), (12, 64), (16, 64), (64, 64)])
def test_the_nearest_group_is_taken_by_ratio_and_the_smaller_of_two(on_hopper: None, group: int, rows: int) -> None:
    assert rows == window(group).BLOCK_M


@pytest.mark.parametrize("name", ["selected", "window", ""])
def test_kernels_that_are_not_there_are_refused(name: str) -> None:
    """They would change nothing, and whoever measures them would not notice."""
    unknown = f"kernel must be one of .*'window_bwd_dkdv'.*, got '{name}'$"
    with pytest.raises(ValueError, match=unknown), configs.override(name, SPLIT=False):
        pass
    with pytest.raises(ValueError, match=unknown):
        kernel_config(name, torch.bfloat16, 128, 128)


def test_fields_that_a_kernel_has_not_got_are_refused() -> None:
    unknown = "selected_forward has BLOCK_N, TMA, key_major, maxnreg, num_stages, num_warps, not key_mayor$"
    with pytest.raises(ValueError, match=unknown), configs.override("selected_forward", key_mayor=False):
        pass
    with pytest.raises(ValueError, match=r"window_forward has .*, not CHUNK$"):
        make_config("window_forward", BLOCK_M=64, CHUNK=3, **FLASH)


def test_a_configuration_is_complete() -> None:
    with pytest.raises(ValueError, match=r"a configuration of window_forward needs BLOCK_M$"):
        make_config("window_forward", **FLASH)


def test_all_names_are_those_of_the_tuner() -> None:
    assert tune.KERNELS.keys() == configs.KERNELS.keys()


def test_other_sizes_get_blocks_that_fit(on_hopper: None) -> None:
    for name, dtype, key_dim in (
        ("window_bwd_dkdv", torch.bfloat16, 128),
        ("window_forward", torch.float32, 128),
        ("window_forward", torch.bfloat16, 64),
    ):
        found: Any = kernel_config(name, dtype, key_dim, 128, 16)
        assert not found.TMA
        assert type(found) is configs.KERNELS[name]


# Where nothing was measured, every architecture has the blocks of sm86, which has the least shared memory.
@pytest.mark.parametrize(
    ("architecture", "kilobytes", "sizes"),
    [("sm86", 99, "float32 64 128 256 bfloat16 128 256"), ("sm90", 227, "bfloat16 128")],
    ids=["sm86", "sm90"],
)
def test_blocks_fit_into_shared_memory(architecture: str, kilobytes: int, sizes: str) -> None:
    """Compiled for a GPU that need not be here: a program has to fit before it can be wrong."""
    command = (sys.executable, "-m", "validation.offline", architecture, *sizes.split())
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    for size, shared in json.loads(done.stdout).items():
        files = {name.partition(".")[0] for name in shared}
        assert files >= {"selected_by_block", "rope", "compress", "step", "decode"}
        assert {name: x for name, x in shared.items() if x > kilobytes * 1024} == {}, size


def test_an_override_stands_above_the_table(on_hopper: None) -> None:
    with configs.override("window_forward", BLOCK_N=16):
        assert (window().BLOCK_M, window().BLOCK_N) == (64, 16)
    assert window().BLOCK_N == 64


def test_plans_do_not_outlive_the_configurations_they_were_made_of(on_hopper: None) -> None:
    @configs.plan
    def planned(kernel: str) -> int:
        return kernel_config(kernel, torch.bfloat16, 128, 128, 16).BLOCK_N

    assert planned("window_forward") == 64
    with configs.override("window_forward", BLOCK_N=16):
        assert planned("window_forward") == 16
    assert planned("window_forward") == 64


def test_the_table_is_as_the_tuner_writes_it(tmp_path: Path) -> None:
    entries = read_table()
    write_table(entries, tmp_path / "table.json")
    assert (tmp_path / "table.json").read_text() == configs.TABLE.read_text()


def test_a_later_entry_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    write_table([entry(16, 64), entry(4, 32), entry(16, 128)], file)
    assert read_table(file) == [entry(4, 32), entry(16, 128)]


def test_a_head_dim_is_cut_into_powers_of_two_that_cover_it_and_are_not_narrow() -> None:
    for dim in range(16, 257):
        first, second = configs.chunks(dim)
        assert first + second >= dim, dim
        assert second <= first, dim
        assert {width for width in (first, second) if width} <= {32, 64, 128, 256}, dim
        assert first + second <= max(32, 1 << (dim - 1).bit_length()), f"{dim}: more than one power of two would take"


def test_configurations_are_those_of_the_inputs_device(on_hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "architecture", lambda index: ("sm90", "sm80")[index])
    assert window(device=torch.device("cuda", 0)).TMA
    assert not window(device=torch.device("cuda", 1)).TMA, "nothing was measured for the device of the inputs"


MOST = 65_535
"""Blocks along the second and the third side of a grid that CUDA takes."""


MODULES = [path.stem for path in Path(cache.__file__).parent.glob("[!_]*.py")]
"""Below `nsa.kernels`."""


Grids = list[tuple[int, ...]]


class Recorder:
    """Stands for a kernel, and keeps the grids it would be launched with."""

    def __init__(self, grids: Grids) -> None:
        self.grids = grids

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: self.grids.append(grid)


def record_launches(monkeypatch: pytest.MonkeyPatch) -> Grids:
    """The grids of all kernels that are launched from now on, and do not run."""
    grids: Grids = []
    for name in MODULES:
        module = import_module(f"nsa.kernels.{name}")
        for kernel in (name for name in vars(module) if name.endswith("_kernel")):
            monkeypatch.setattr(module, kernel, Recorder(grids))
    return grids


def launch_windows(q: Tensor, k: Tensor, lse: Tensor, indices: Tensor, config: NSAConfig) -> None:
    inputs = (None, *tensors_of(None), k.shape[1], sizes_of(config), 1.0)
    OPERATORS["nsa_triton::sliding_window_attention"](q, k, k, *inputs)
    OPERATORS["nsa_triton::sliding_window_attention_backward"](q, q, k, k, q, lse, *inputs)


def launch_compressed(q: Tensor, k: Tensor, lse: Tensor, indices: Tensor, config: NSAConfig) -> None:
    blocks, inputs = k[:, :1], (None, *tensors_of(None), k.shape[1], sizes_of(config), 1.0)
    OPERATORS["nsa_triton::compressed_attention"](q, blocks, blocks, *inputs)
    OPERATORS["nsa_triton::compressed_attention_backward"](q, q, blocks, blocks, q, lse, *inputs)


def launch_selected(q: Tensor, k: Tensor, lse: Tensor, indices: Tensor, config: NSAConfig) -> None:
    selected = import_module("nsa.kernels.selected_attention")
    selected.forward(q, k, k, indices, None, k.shape[1], config, 1.0)
    selected.backward(q, q, k, k, q, lse, indices, None, k.shape[1], config, 1.0)


def launch_selection(q: Tensor, k: Tensor, lse: Tensor, indices: Tensor, config: NSAConfig) -> None:
    import_module("nsa.kernels.select").select_blocks(q, k[:, :1], lse, config, k.shape[1], None, 1.0)


def launch_compress(q: Tensor, k: Tensor, lse: Tensor, indices: Tensor, config: NSAConfig) -> None:
    compress = import_module("nsa.kernels.compress")
    out = compress._mean(k, None, 1, config.compress_block_size, config.compress_stride)
    compress._mean_backward(out, None, k.shape[1], config.compress_block_size, config.compress_stride)
    position, weight = torch.zeros(1, 16, 16), torch.zeros(1, 16 * 16, 16)
    sizes = (config.compress_block_size, config.compress_stride)
    tensors = (k, position, weight, *[None] * 6)
    out, hidden = compress._forward(*tensors, 1, *sizes)
    compress._backward(out, *tensors, hidden, *sizes)


def launch_rope(q: Tensor, k: Tensor, lse: Tensor, indices: Tensor, config: NSAConfig) -> None:
    table = torch.zeros(16, 8, 2)
    import_module("nsa.kernels.rope").apply_rope(q, k[:, :1], k[:, :1], k[:, :1], table, config, None, None, True)


def launch_combine(q: Tensor, k: Tensor, lse: Tensor, indices: Tensor, config: NSAConfig) -> None:
    import_module("nsa.kernels.attention").combine((q, q, q), torch.zeros(*q.shape[:3], 3))


def launch_step(q: Tensor, k: Tensor, lse: Tensor, indices: Tensor, config: NSAConfig) -> None:
    KVCache(config, q.shape[0], 1, 1, 16).step(q, [q] * 3, [q] * 3, [None, None], backend="triton")


@pytest.mark.parametrize(
    "launches",
    [
        launch_windows,
        launch_compressed,
        launch_selected,
        launch_selection,
        launch_compress,
        launch_combine,
        launch_rope,
        launch_step,
    ],
    ids=lambda function: function.__name__.removeprefix("launch_"),
)
def test_grids_have_one_side(launches: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """No batch is too large for a grid: what grows with it lies along the side that has no low limit."""
    grids = record_launches(monkeypatch)
    monkeypatch.setattr(configs.triton.knobs.runtime, "interpret", True)
    batch, config = MOST + 1, NSAConfig(16, 16, 16, 1, 0, 0, 1, "mean")
    q = torch.zeros(batch, 1, 1, 16)
    k = torch.zeros(1, 16, 1, 16).expand(batch, -1, -1, -1)
    indices = torch.zeros(batch, 1, 1, 1, dtype=torch.int32)
    launches(q, k, torch.zeros(batch, 1, 1), indices, config)
    assert grids
    for grid in grids:
        assert max((1, *grid[1:])) <= MOST, grid
        assert grid[0] < 2**31, grid


class Starts(TorchDispatchMode):
    """Counts the operations of PyTorch that do something on a device."""

    IDLE = ("empty", "view", "detach", "promote_types")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name().partition("::")[2].partition(".")[0]
        is_view = all(out.alias_info is not None and not out.alias_info.is_write for out in function._schema.returns)
        if function.namespace == "aten" and not is_view and not any(part in name for part in self.IDLE):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "forward", "backward"), [(64, 4, 8, 16), (32, 8, 12, 16)], ids=["W", "W4"]
)
def test_a_pass_starts_few_operations(
    monkeypatch: pytest.MonkeyPatch, heads: int, kv_heads: int, forward: int, backward: int
) -> None:
    """At the shapes of benchmarks, with the configurations of an H200; what is started does not depend on values."""
    launches = record_launches(monkeypatch)
    monkeypatch.setattr(configs.triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(configs, "architecture", lambda device: "sm90")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    config, tokens = NSAConfig(), 4096

    def draw(number: int, *shape: int) -> Tensor:
        return torch.zeros(1, number, *shape, dtype=torch.bfloat16, requires_grad=True)

    blocks = [draw(config.num_compressed(tokens), kv_heads, 128) for _ in range(2)]
    keys = [draw(tokens, kv_heads, 128) for _ in range(4)]
    inputs = [draw(tokens, heads, 128), *blocks, *keys, draw(tokens, heads, 3)]
    attend: Callable[..., Any] = partial(nsa_attention, backend="triton")
    monkeypatch.setattr(kernels, "INTERPRETED", True)  # CPU tensors are good enough to be counted
    with Starts() as started:
        out = attend(*inputs, config)
        assert len(launches) + len(started.found) <= forward, (len(launches), started.found)
        dout = torch.empty_like(out)
        launches.clear()
        started.found.clear()
        torch.autograd.grad(out, inputs, dout)
    assert len(launches) + len(started.found) <= backward, (len(launches), started.found)


@pytest.mark.parametrize("length", [8190, 8191, 40000], ids=["no_block", "block", "long"])
@pytest.mark.parametrize("batch", [1, 16])
def test_a_step_of_decoding_starts_few_operations(monkeypatch: pytest.MonkeyPatch, batch: int, length: int) -> None:
    """In a layer of the flavor 1b: projections, gates, what goes into the cache, attention and the last projection.

    A step that completes a compressed block starts the same. Attention is three kernels, and one more in long contexts.
    """
    launches = record_launches(monkeypatch)
    layer = NativeSparseAttention(2048, 32, 4, backend="triton").to(torch.bfloat16)
    layer.join_projections()
    cache, rope = layer.make_cache(batch, length + 1), rope_table(length + 1, 64)
    cache._set_lengths(slice(0, batch), length)
    cache.lengths_on_device()
    x = torch.zeros(batch, 1, 2048, dtype=torch.bfloat16)
    with torch.no_grad(), Starts() as started:
        layer(x, rope, cache=cache)
    assert len(launches) == 4 + (length > 8192)
    assert started.found == ["addmm", "sigmoid", "mm"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home that Triton's cache is in by default, which the test makes, beside what is made of temporary files."""
    monkeypatch.setenv("TRITON_CACHE_DIR", "")  # so that the variable is as it was when the test is over
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.setenv("TRITON_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / "home"


@pytest.mark.parametrize("taken", [False, True])
def test_compiled_kernels_have_a_place_where_the_home_has_none(home: Path, taken: bool) -> None:
    home.touch()  # a file, below which nobody can make a folder, root included
    folder = home.with_name(f"triton-of-user-{os.getuid()}")
    if taken:
        folder.touch()
    cache.use_writable()
    place = get_cache_manager("0123456789").put("kernel", "kernel.txt")
    assert Path(place).is_relative_to(os.environ["TRITON_CACHE_DIR"])
    assert Path(place).is_relative_to(folder) is not taken


def test_a_cache_that_can_be_written_to_stays_where_it_is(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.use_writable()
    assert "TRITON_CACHE_DIR" not in os.environ
    home.touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", "mine")
    cache.use_writable()
    assert os.environ["TRITON_CACHE_DIR"] == "mine"
