"""The entry point for pytest: a run that names `nsa_validation` gets the harness's plugin, any other gets nothing.

Such a run is
`pytest --import-mode=importlib --pyargs nsa_validation.unit.conformance --impl=package.module:object`.
"""

import re

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config, args: list[str]) -> None:
    if any(re.match(r"nsa_validation(\.|$)", argument) for argument in args):
        early_config.pluginmanager.import_plugin("nsa_validation.plugin")
