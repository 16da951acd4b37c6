"""Generation by whole models, beside their dense twins: how long a prompt takes, and each token after it.

Times are of the wall clock, so they include sampling and the host. Weights are noise, which changes no time.
"""

import gc
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import torch

from nsa.generate import stream

GENERATION = "generation"
K = 1024
STEPS, WARM_UP = (128, 64) if torch.cuda.is_available() else (32, 8)
"""Steps that are timed, and those before them, in which graphs are captured."""
PLAN: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = (
    {"1b": ((8 * K, 32 * K, 64 * K), (1, 16))} if torch.cuda.is_available() else {"debug": ((256,), (1, 2))}
)
"""Tokens of a prompt and numbers of sequences, by flavor."""


@dataclass(frozen=True)
class Generation:
    """Prompts of `length` tokens, `batch` of them, continued by a model of a flavor.

    Attributes:
        workload: the flavor that is compared, whose twin a rival is.
        flavor: of the model.
        role: `"ours"` or `"rival"`.
    """

    workload: str
    length: int
    batch: int
    flavor: str
    subject: str
    role: str

    @property
    def id(self) -> str:
        """Its name among tests."""
        return f"{self.workload}-{self.length}-{self.direction}-{self.subject}"

    @property
    def direction(self) -> str:
        return f"batch {self.batch}"

    def prefill(self, tokens: int) -> float:
        """The time, in ms, until the first token after a prompt of so many tokens."""
        return self.start(tokens, 1)[1]

    def start(self, tokens: int, steps: int) -> tuple[Iterator[list[int]], float]:
        """The steps after a prompt that has been taken in, and the ms that this took."""
        steps_left = stream(model(self.flavor), [[i % 251 for i in range(tokens)]] * self.batch, steps)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        begin = time.perf_counter()
        next(steps_left)
        return steps_left, 1e3 * (time.perf_counter() - begin)


def generations(ours: str) -> list[Generation]:
    """What is measured on this machine, one model after the other."""
    found = []
    for flavor, (lengths, batches) in PLAN.items():
        for twin, subject, role in ((flavor, ours, "ours"), (f"{flavor}_dense", "dense (twin)", "rival")):
            found += [Generation(flavor, n, batch, twin, subject, role) for n, batch in product(lengths, batches)]
    return found


@lru_cache(maxsize=1)
def model(flavor: str) -> Any:
    """A model with room for the longest prompt; the one before is given back."""
    from nsa.titan.load import untrained_model

    gc.collect()
    room = max(max(lengths) for lengths, _ in PLAN.values()) + STEPS + WARM_UP + 1
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return untrained_model(flavor, dtype=dtype, room_for=lambda tokenizer: room)[0]


def summary(batch: int, prefills: list[float], steps: list[float]) -> dict[str, float]:
    """Figures of a record beside the median of its steps, from times in ms."""
    ordered = statistics.quantiles(steps, n=100, method="inclusive")
    return {
        "prefill": statistics.median(prefills),
        "p90": ordered[89],
        "p99": ordered[98],
        "tokens_per_second": 1e3 * batch / statistics.median(steps),
    }
