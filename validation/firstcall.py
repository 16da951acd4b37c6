"""The first call of every stage that is declared, on one tiny case: what cannot be called is not tested any further."""

import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

from . import oracle
from .cases import BY_ID, EVERY, Stage, draw, fitted, upcast
from .implementations import Implementation

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Slip:
    """What went wrong in a first call, in a line, and the stages in which it did."""

    stages: tuple[str, ...]
    message: str

    def __str__(self) -> str:
        return f"{', '.join(self.stages)}: {self.message}"


def first_calls(impl: Implementation) -> list[Slip]:
    """What the first calls show: exceptions and results of another form than the oracle's; equal ones are one."""
    found: dict[str, tuple[str, list[str]]] = {}
    for stage in EVERY.values():
        case = fitted(impl, BY_ID["small"], BY_ID["pooled"], stages=stage.functions)
        if impl.lacks(case, stage.functions, impl.widest, own_keys=stage.own_keys) is None:
            message, place = _first_call(impl, stage, case)
            if message:
                found.setdefault(message, (place, []))[1].append(stage.name)
    return [Slip(tuple(stages), f"{message}{place}") for message, (place, stages) in found.items()]


def _first_call(impl: Implementation, stage: Stage, case: object) -> tuple[str, str]:
    """What went wrong, if anything, and where."""
    device = "cpu" if "cpu" in impl.devices or not torch.cuda.is_available() else "cuda"
    with torch.device(device):
        tensors = draw(case, impl.widest)  # type: ignore[arg-type]
        try:
            outputs = stage.run(impl, case, tensors)  # type: ignore[arg-type]
            if impl.backward and not impl.interpreted and stage.name != "select_blocks":
                list(stage.results(impl, case, tensors))  # type: ignore[arg-type]
        except Exception as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())}", _place(error)
        for name, expected in stage.run(oracle, case, upcast(tensors)).items():  # type: ignore[arg-type]
            got = outputs[name]
            if not isinstance(got, torch.Tensor):
                return f"{name} must be a tensor, got {type(got).__name__}", ""
            if got.shape != expected.shape:
                return f"{name} must be of shape {tuple(expected.shape)}, got {tuple(got.shape)}", ""
    return "", ""


def _place(error: BaseException) -> str:
    """The last line of somebody else's code that the error went through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if HERE not in Path(frame.filename).parents]
    frames = [frame for frame in frames if "site-packages" not in frame.filename] or frames
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno}: {frames[-1].line})" if frames else ""
