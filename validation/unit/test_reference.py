"""The API reference: it has every public name, and what it says of a function is complete.

Pages are made of docstrings by `make docs`, which fails where one is missing or cannot be read.
"""

import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import nsa
from nsa.functional import load_backend

PAGES = Path(__file__).parents[2] / "docs" / "reference"
FUNCTIONS = {name: value for name in nsa.__all__ if inspect.isfunction(value := getattr(nsa, name))}
SOURCE = r"sections? \d|equations? \d|arXiv \d"
OF_NO_PAPER = {"pack_sequences", "dense_decode_attention"}
"""Tables of sequences are our own, and dense attention is nobody's."""

each_function = pytest.mark.parametrize("name", FUNCTIONS)


def section(function: Any, title: str) -> str:
    """A section of a docstring, empty where there is none."""
    text = inspect.getdoc(function) or ""
    return text.partition(f"\n{title}:\n")[2].partition("\n\n")[0]


def described(function: Any) -> dict[str, str]:
    """Descriptions of the arguments by name; some share one."""
    entries = re.findall(r"^    (\w+(?:, \w+)*): (.*(?:\n     .*)*)", section(function, "Args"), re.MULTILINE)
    return {name: text for names, text in entries for name in names.split(", ")}


def test_every_public_name_has_a_place() -> None:
    named = [name for page in PAGES.glob("*.md") for name in re.findall(r"(?m)^::: ([\w.]+)$", page.read_text())]
    alone = {name.rpartition(".")[2] for name in named}
    assert "nsa.functional" in named  # whole, whose own functions are there with it
    ours = {name for name, value in FUNCTIONS.items() if value.__module__ == "nsa.functional"}
    assert set(nsa.__all__) <= alone | ours
    for name in named:
        if name.startswith("nsa.titan"):  # also nsa.titan3; has TorchTitan imported; `make docs` looks at those
            continue
        module, _, attribute = name.rpartition(".")
        assert hasattr(import_module(module), attribute) if module != "nsa" else import_module(name), name


@each_function
def test_every_argument_is_described(name: str) -> None:
    assert list(described(FUNCTIONS[name])) == list(inspect.signature(FUNCTIONS[name]).parameters)


@each_function
def test_every_tensor_has_a_shape(name: str) -> None:
    texts = described(FUNCTIONS[name])
    for argument, parameter in inspect.signature(FUNCTIONS[name]).parameters.items():
        if "Tensor" in str(parameter.annotation):
            # Another function, or another argument, may be where the shape is said.
            assert re.search(r"`\[[^`]*\]`|as `\w+`|the same", texts[argument]), argument


@each_function
def test_results_errors_and_source_are_said(name: str) -> None:
    function = FUNCTIONS[name]
    assert section(function, "Returns")
    errors = section(function, "Raises")
    assert "TypeError" in errors
    assert "ValueError" in errors
    assert re.search(SOURCE, inspect.getdoc(function) or "") or name in OF_NO_PAPER


@pytest.mark.parametrize("name", [name for name in nsa.__all__ if inspect.isclass(getattr(nsa, name))])
def test_every_method_is_described(name: str) -> None:
    """Pages leave out what has no docstring, without a word. That of a base class will do."""
    own = {member: value for member, value in vars(getattr(nsa, name)).items() if not member.startswith("_")}
    methods = {member for member, value in own.items() if inspect.isroutine(value) or isinstance(value, property)}
    assert methods - {member for member in methods if inspect.getdoc(getattr(getattr(nsa, name), member))} == set()


def test_a_function_that_is_not_public_is_on_no_page() -> None:
    assert load_backend.__name__ not in nsa.__all__
    assert f"!^{load_backend.__name__}$" in (PAGES / "functions.md").read_text()
