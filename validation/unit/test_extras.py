"""The error where a package of an extra is missing or of another release."""

import re
import sys
from importlib import import_module, metadata

import pytest

from nsa import extras


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Versions by package, as far as `nsa` can see."""
    versions: dict[str, str] = {}

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(extras, "version", version)
    return versions


@pytest.mark.parametrize("found", ["0.3", "0.3.0", "0.3.12+cpu"])
def test_a_release_that_fits_is_taken(installed: dict[str, str], found: str) -> None:
    installed["torchtitan"] = found
    extras.require("titan3", "torchtitan", "0.3")


def test_a_missing_package_names_its_extra(installed: dict[str, str]) -> None:
    message = r'torchtitan 0\.2\.2 is missing; the extra `titan` brings it: pip install "nsa\[titan\]"'
    with pytest.raises(ModuleNotFoundError, match=message):
        extras.require("titan", "torchtitan", "0.2.2")


@pytest.mark.parametrize("found", ["0.3.0", "0.2.20", "0.2.1", "10.2.2"])
def test_another_release_is_refused(installed: dict[str, str], found: str) -> None:
    installed["torchtitan"] = found
    with pytest.raises(ModuleNotFoundError, match=rf"torchtitan 0\.2\.2 is needed, but {re.escape(found)} is"):
        extras.require("titan", "torchtitan", "0.2.2")


@pytest.mark.parametrize("module", ["nsa.titan.model", "nsa.titan.train_spec", "nsa.titan.load", "nsa.train"])
def test_modules_say_which_extra_they_need(
    module: str, monkeypatch: pytest.MonkeyPatch, installed: dict[str, str]
) -> None:
    for name in [name for name in sys.modules if re.match(r"nsa\.(titan|train)\b", name)]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ModuleNotFoundError, match=r"nsa\[titan\]"):
        import_module(module)
