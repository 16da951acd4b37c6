"""The rules of the package: which of its files may import which, and how long a file may be.

Import statements are read, not run. Those inside functions count for every rule but the one on circles, since an import
that waits for a call closes none.
"""

import ast
from collections.abc import Iterable, Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = {str(path.relative_to(ROOT)): path for path in sorted((ROOT / "nsa").rglob("*.py"))}
ENTRY_POINTS = ("nsa/train.py", "nsa/generate.py")

LONGEST = 500


def module(file: str) -> str:
    """The name a file is imported by: `nsa/eager/flash.py` is `nsa.eager.flash`, `nsa/__init__.py` is `nsa`."""
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MODULES = {module(file) for file in FILES}


def statements(node: ast.AST, *, inside_functions: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """The import statements below a node."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif inside_functions or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from statements(child, inside_functions=inside_functions)


@cache
def imports(file: str, *, inside_functions: bool = True) -> frozenset[str]:
    """The modules that a file imports; `from nsa import kernels` imports `nsa.kernels`, for it is a module of ours."""
    found: set[str] = set()
    for statement in statements(ast.parse(FILES[file].read_text()), inside_functions=inside_functions):
        if isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
            continue
        assert not statement.level, f"{file} has a relative import in line {statement.lineno}"
        parent = str(statement.module)
        names = {f"{parent}.{alias.name}" for alias in statement.names}
        found |= names & MODULES if names <= MODULES else {parent} | names & MODULES
    return frozenset(found)


def below(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def breaches(package: str, files: Iterable[str]) -> list[str]:
    """The imports of a package, or of anything below it, that these files have."""
    return [f"{file} imports {name}" for file in files for name in sorted(imports(file)) if below(name, package)]


def test_all_files_are_read() -> None:
    assert {"nsa", "nsa.functional", "nsa.eager.flash", "nsa.kernels.attention", "nsa.titan.model"} <= MODULES
    assert {"nsa.eager", "nsa.kernels", "nsa.checks"} <= imports("nsa/functional.py")


def test_the_package_does_not_import_its_tests() -> None:
    found = breaches("validation", FILES)
    assert not found, f"nsa must work without validation: {'; '.join(found)}"


@pytest.mark.parametrize("package", ["torchtitan", "nsa.titan", "nsa.titan3"])
def test_only_titan_and_the_entry_points_know_torchtitan(package: str) -> None:
    others = (file for file in FILES if not file.startswith(("nsa/titan/", "nsa/titan3/")) and file not in ENTRY_POINTS)
    found = breaches(package, others)
    assert not found, f"nsa must work without TorchTitan: {'; '.join(found)}"


@pytest.mark.parametrize(("one", "other"), [("eager", "kernels"), ("kernels", "eager")])
def test_backends_do_not_import_one_another(one: str, other: str) -> None:
    found = breaches(f"nsa.{other}", (file for file in FILES if file.startswith(f"nsa/{one}/")))
    assert not found, f"what both backends need stands beside them, in nsa: {'; '.join(found)}"


def test_imports_close_no_circle() -> None:
    graph = {module(file): imports(file, inside_functions=False) & MODULES for file in FILES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle = " <- ".join(error.args[1])
        pytest.fail(f"modules import one another in a circle: {circle}")


def test_files_are_short() -> None:
    lengths = {file: len(path.read_text().splitlines()) for file, path in FILES.items()}
    found = [f"{file} has {length} lines" for file, length in lengths.items() if length > LONGEST]
    assert not found, f"a file of more than {LONGEST} lines holds more than one idea: {'; '.join(found)}"
