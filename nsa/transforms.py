"""Transformations of PyTorch around a call.

Importing this imports PyTorch's compiler, which takes as long as PyTorch itself: `nsa.checks` does it where a program
compiles or transforms.
"""

from typing import Any

import torch
from torch._C import _functorch


@torch.compiler.disable
def _transforms() -> list[Any]:
    return _functorch.get_interpreter_stack() or []


@torch.compiler.assume_constant_result  # true of the place in a program, not of a call
def differentiated_by_functorch() -> bool:
    """Whether `torch.func` takes derivatives of what is going on (`grad`, `vjp`, `jacrev`, ...)."""
    return any(level.key() == _functorch.TransformType.Grad for level in _transforms())
