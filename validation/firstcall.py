"""The first call of every stage that is declared, on one tiny case: what cannot be called is not tested any further."""

import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

from . import oracle
from .cases import BY_ID, Case, draw, fitted, upcast
from .implementations import Implementation
from .stages import EVERY, StageSpec

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
            message, where = _first_call(impl, stage, case)
            if message:
                found.setdefault(message, (where, []))[1].append(stage.name)
    return [Slip(tuple(stages), f"{message}{where}") for message, (where, stages) in found.items()]


def _first_call(impl: Implementation, stage: StageSpec, case: Case) -> tuple[str, str]:
    """What went wrong, if anything, and where."""
    device = "cpu" if "cpu" in impl.devices or not torch.cuda.is_available() else "cuda"
    with torch.device(device):
        tensors = draw(case, impl.widest)
        wanted = stage.run(oracle, case, upcast(tensors))
        try:
            outputs = stage.run(impl, case, tensors)
            if impl.backward and not impl.interpreted and stage.differentiable:
                list(stage.results(impl, case, tensors))
        except Exception as error:
            # An error in the harness alone comes of what it was given.
            return described(error), place(error) or f" (it must return {' and '.join(wanted)})"
        for name, expected in wanted.items():
            got = outputs[name]
            if not isinstance(got, torch.Tensor):
                return f"{name} must be a tensor, got {type(got).__name__}", ""
            if got.shape != expected.shape:
                return f"{name} must be of shape {tuple(expected.shape)}, got {tuple(got.shape)}", ""
    return "", ""


def described(error: BaseException) -> str:
    """The kind of an error and its message, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def place(error: BaseException) -> str:
    """The last line of somebody else's code that the error went through, in parentheses; `""` if there is none."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _ours(frame.filename)]
    frames = [frame for frame in frames if "site-packages" not in frame.filename] or frames
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno}: {frames[-1].line})" if frames else ""


def _ours(file: str) -> bool:
    """Whether a file is of the harness, of Python's import system, or none at all (generated code)."""
    return HERE in Path(file).parents or "importlib" in file or file.startswith("<")
