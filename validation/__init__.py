"""The validation harness: what correct means, how close is close enough, and the tests that ask.

In the repository it is the package `validation`, installed it is `nsa_validation`; modules inside import one another
relatively. Where the repository's is imported, both names mean it: an adapter written for the installed package works.
"""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

INSTALLED = "nsa_validation"


class _OneHarness(MetaPathFinder, Loader):
    """Finds `nsa_validation.x` in this package's `x`: with two copies, one would not know the other's classes."""

    def __init__(self) -> None:
        self.specs: dict[str, ModuleSpec | None] = {}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name.startswith(f"{INSTALLED}.") else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(f"{__name__}{spec.name.removeprefix(INSTALLED)}")
        self.specs[spec.name] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # It was run under its own name; importing it under the other one has replaced its spec.
        name = module.__spec__.name if module.__spec__ else ""
        module.__spec__ = self.specs.pop(name)


if __name__ != INSTALLED:
    sys.modules[INSTALLED] = sys.modules[__name__]
    sys.meta_path.insert(0, _OneHarness())
