"""Lengths and batches of real training, where loops are long, tiles are many and offsets pass 32 bits.

Long sequences are compared at sampled queries (see `validation/sampled.py`).

Compiled kernels only; under Triton's interpreter the same tests take a short sequence, to prove themselves.
"""

import gc
import os
from collections.abc import Iterator
from dataclasses import replace
from fcntl import LOCK_EX, flock
from itertools import product
from pathlib import Path
from tempfile import gettempdir

import pytest
import torch

from nsa import kernels
from nsa.config import Compression, NSAConfig
from validation import oracle
from validation.cases import Case, config, draw_inputs, whole
from validation.implementations import load
from validation.numerics import assert_equal, assert_matches
from validation.sampled import assert_sampled_match, assert_selection_sampled, draw_long, sample
from validation.stages import STAGES, StageSpec, select_blocks

pytestmark = pytest.mark.usefixtures("on_device", "memory_given_back")

TRITON = load("triton")
ATTENTION = [stage for stage in STAGES.values() if "compress_" not in stage.name]
SAMPLES = 64
"""Queries (or blocks) at which a long sequence is compared."""


def shaped(name: str, tokens: int, heads: int, kv_heads: int, key_dim: int = 128, batch: int = 1) -> Case:
    return Case(
        f"{name}-{batch}x{tokens}",
        whole(tokens),
        NSAConfig(),
        batch=batch,
        kv_heads=kv_heads,
        group=heads // kv_heads,
        key_dim=key_dim,
        value_dim=128,
    )


SHAPES = {"W": (64, 4), "W4": (32, 8), "W192": (64, 4, 192)}
NARROW = (torch.float32, torch.float16, torch.bfloat16)
DTYPE = torch.float64 if kernels.INTERPRETED else torch.bfloat16
if kernels.INTERPRETED:
    SAMPLES = 5
    SMALL = config((16, 8, 16), 3, 12, num_local_blocks=1)
    TINY = Case("tiny", whole(44), SMALL, kv_heads=1, key_dim=16, value_dim=16)
    LONG = [(TINY, torch.float64)]
    LARGE = [replace(TINY, id="tiny-batch", batch=2, lengths=whole(20))]
    ATTENTION = ATTENTION[:-1]  # the whole takes as long as its parts together
else:
    LONG = [(shaped(name, 1 << 14, *sizes), dtype) for (name, sizes), dtype in product(SHAPES.items(), NARROW)]
    LONG += [(shaped(name, 1 << 16, *sizes), torch.bfloat16) for name, sizes in SHAPES.items()]
    # The last row of each ends beyond 2**31 elements, and so does the very long sequence.
    LARGE = [shaped("W", 1 << 13, 64, 4, batch=33), shaped("W4", 1 << 13, 32, 8, batch=65)]
VERY_LONG = shaped("W", (1 << 18) + 200, 64, 4)


each_stage = pytest.mark.parametrize("stage", ATTENTION, ids=lambda stage: stage.name)
each_long = pytest.mark.parametrize(
    ("case", "dtype"), [pytest.param(*pair, id=f"{pair[0].id}-{str(pair[1]).removeprefix('torch.')}") for pair in LONG]
)
each_large = pytest.mark.parametrize("case", LARGE, ids=lambda case: case.id)
# Under the interpreter both are done without, on tensors of a few elements.
needs_memory = pytest.mark.needs_gpu(0 if kernels.INTERPRETED else 1, gib=120)  # more than 2**31 elements
needs_gpu = pytest.mark.needs_gpu  # a sequence of 2**31 query elements


@pytest.fixture
def memory_given_back() -> Iterator[None]:
    """Tests that need most of a GPU's memory find it free and whole: where tests run in parallel, they take turns."""
    with open(Path(gettempdir(), f"nsa-gpu-memory-{os.getuid()}.lock"), "w") as lock:
        if torch.cuda.is_available():
            flock(lock, LOCK_EX)
        yield
        gc.collect()
        torch.cuda.empty_cache()


# 1. Long sequences.


@each_long
@each_stage
def test_long_sequences_match_the_oracle_at_sampled_queries(stage: StageSpec, case: Case, dtype: torch.dtype) -> None:
    assert_sampled_match(TRITON, stage, case, dtype, sample(case, SAMPLES))


@each_long
def test_selection_of_long_sequences_at_sampled_queries(case: Case, dtype: torch.dtype) -> None:
    assert_selection_sampled(TRITON, case, dtype, sample(case, SAMPLES))


@each_long
@pytest.mark.parametrize("kind", ["mean", "linear", "mlp"])
def test_compression_of_long_sequences_at_sampled_blocks(kind: Compression, case: Case, dtype: torch.dtype) -> None:
    case = replace(case, config=replace(case.config, compression=kind))
    stage, tensors, length = STAGES["compress_keys"], draw_inputs(case, dtype), case.config.compress_block_size
    count = case.config.num_compressed(case.num_keys)
    blocks = sorted({0, count - 1, *torch.randperm(count)[:SAMPLES].tolist()})
    actual = stage.run(TRITON, case, tensors)["out"][:, blocks]
    starts = [block * case.config.compress_stride for block in blocks]
    pieces = [{**tensors, "k": tensors["k"][:, start : start + length]} for start in starts]
    one = replace(case, lengths=whole(length))
    expected = torch.cat([stage.run(oracle, one, piece)["out"] for piece in pieces], 1)
    assert_matches(actual, expected, what=f"blocks, {case.id}", reduction=stage.reduction(case), dtype=dtype)


# 2. Offsets that need 64 bits.


@needs_memory
@each_large
@pytest.mark.parametrize("stage", [*ATTENTION, STAGES["compress_keys"]], ids=lambda stage: stage.name)
def test_the_last_row_of_a_large_batch_is_what_it_is_as_the_first(stage: StageSpec, case: Case) -> None:
    if stage.name == "compress_keys":
        tensors = {"k": torch.randn(case.batch, case.num_keys, case.kv_heads * case.group, case.key_dim, dtype=DTYPE)}
        case = replace(case, config=replace(case.config, compression="mean"))
    else:
        tensors = draw_long(TRITON, case, DTYPE)
    cotangent = torch.randn_like(stage.run(TRITON, case, tensors)["out"])
    results = stage.results(TRITON, case, tensors, DTYPE, cotangent=cotangent)
    last = {name: x[-1].clone() for name, x in results}
    # Rows change places rather than be run alone: how a sum is shared out may depend on the number of rows.
    tensors = {name: tensors.pop(name).flip(0) for name in list(tensors)}
    for name, x in stage.results(TRITON, case, tensors, DTYPE, cotangent=cotangent.flip(0)):
        assert_equal(x[0], last[name], what=f"{name} of the row that was last")


@needs_memory
@each_large
def test_the_selection_of_a_large_batch_keeps_its_rows(case: Case) -> None:
    tensors = draw_long(TRITON, case, DTYPE)
    turned = {name: x.flip(0) for name, x in tensors.items() if name in ("q", "k_cmp", "lse")}
    assert_equal(select_blocks(TRITON, case, turned).flip(0), tensors["indices"], what="indices of rows turned round")


@needs_gpu
@needs_memory
@each_stage
def test_the_end_of_a_very_long_sequence_matches_the_oracle(stage: StageSpec) -> None:
    end = VERY_LONG.num_queries
    assert_sampled_match(TRITON, stage, VERY_LONG, DTYPE, [0, end // 2, end - 2, end - 1])


@needs_gpu
@needs_memory
def test_the_selection_at_the_end_of_a_very_long_sequence() -> None:
    end = VERY_LONG.num_queries
    assert_selection_sampled(TRITON, VERY_LONG, DTYPE, [0, end // 2, end - 2, end - 1])
