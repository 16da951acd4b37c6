"""The doctor tells the truth about machines other than this one."""

import tomllib
from importlib import metadata
from typing import Any

import pytest

from validation import doctor
from validation.doctor import Layer, Machine, Package

Installed = dict[str, str | None]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Installed:
    """What is installed, as far as the doctor can see: a dict to change, None for what is missing."""
    versions: Installed = {
        "torch": "2.13.0+cpu",
        "triton": "3.7.1",
        "torchtitan": "0.2.2",
        "pytest": "9.2.0",
        "hypothesis": "6.0",
        "matplotlib": "3.11.2",
        "pytest-benchmark": "5.3.1",
    }

    def version(name: str) -> str:
        found = versions[name]
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(doctor.metadata, "version", version)
    monkeypatch.setattr(doctor.platform, "system", lambda: "Linux")
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.11.7")
    monkeypatch.setattr(doctor.importlib, "import_module", lambda name: None)  # TorchTitan's takes seconds
    return versions


def machine(**fields: Any) -> Machine:
    packages = {name: Package(name, "1") for needs in doctor.NEEDS.values() for name in needs}
    usual: dict[str, Any] = {"packages": packages, "cores": 8, "memory": 64.0, "backends": ("gloo",)}
    return Machine(**usual | fields)


def verdicts(machine: Machine) -> dict[str, Layer]:
    return {layer.name: layer for layer in doctor.layers(machine)}


# 1. Ranges


@pytest.mark.parametrize(
    ("version", "bounds", "expected"),
    [
        ("3.6.0", ">=3.6,<3.8", True),
        ("3.7.1", ">=3.6,<3.8", True),
        ("3.5.1", ">=3.6,<3.8", False),
        ("3.8.0", ">=3.6,<3.8", False),
        ("3.10.0", ">=3.6", True),  # numbers, not text
        ("2.13.0+cpu", ">=2.11,<2.14", True),
        ("2.14.0.dev20260901", ">=2.11,<2.14", False),
        ("2.12.0a0+git1234567", ">=2.11,<2.14", True),
        ("0.2.2", "==0.2.2", True),
        ("0.3.0", "==0.2.2", False),
        ("1", "", True),
    ],
)
def test_within(version: str, bounds: str, expected: bool) -> None:
    assert doctor.within(version, bounds) is expected


def test_ranges_are_those_of_the_package() -> None:
    project = tomllib.loads(doctor.PYPROJECT.read_text())["project"]
    assert doctor.supported("python") == project["requires-python"]
    for name in ("torch", "triton", "torchtitan"):
        bounds = doctor.supported(name)
        assert bounds
        lines = project["optional-dependencies"]["titan"] if name == "torchtitan" else project["dependencies"]
        assert any(line.partition(";")[0].strip() == name + bounds for line in lines)
    assert doctor.supported("hypothesis") == ""


def test_extras_are_those_of_the_package() -> None:
    extras = tomllib.loads(doctor.PYPROJECT.read_text())["project"]["optional-dependencies"]
    found = {name: doctor.extra_of(name) for needs in doctor.NEEDS.values() for name in needs}
    assert {name for name, extra in found.items() if not extra} == {"python", "torch", "triton"}
    for name, extra in found.items():
        assert not extra or any(line.startswith(name) for line in extras[extra])


# 2. Packages


def test_all_is_well(installed: Installed, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main() == 0
    out = capsys.readouterr().out
    assert "!!" not in out
    for layer in doctor.NEEDS:
        assert f"ok  make {layer}" in out


@pytest.mark.parametrize(
    ("name", "version", "stopped"),
    [
        ("triton", "3.5.1", {"unit", "integration", "system", "perf"}),
        ("triton", None, {"unit", "integration", "system", "perf"}),
        ("torch", "2.10.0", {"unit", "integration", "system", "perf"}),
        ("torch", "2.16.0", {"unit", "integration", "system", "perf"}),
        ("torchtitan", "0.3.0", {"integration", "system"}),
        ("torchtitan", None, {"integration", "system"}),
        ("hypothesis", None, {"unit"}),
    ],
)
def test_what_is_missing_or_unsupported_is_named_with_a_remedy(
    installed: Installed, capsys: pytest.CaptureFixture[str], name: str, version: str | None, stopped: set[str]
) -> None:
    installed[name] = version
    assert doctor.main() == 1
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith(f"!!  {name} ")]
    assert doctor.supported(name) in line
    assert doctor.extra_of(name) in line
    assert "make setup" in line
    assert version is None or version in line
    found = {layer.name: layer for layer in doctor.layers(doctor.inspect())}
    assert {layer.name for layer in found.values() if not layer.runs} == stopped
    assert all(name in found[layer].how for layer in stopped)


def test_python_out_of_range(installed: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.13.1")
    assert "PYTHON=" in doctor.inspect_package("python", imports=True).problem


def test_an_installation_that_does_not_import(
    installed: Installed, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(name: str) -> None:
        if name == "torchtitan":
            raise OSError("lost a library")

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    assert doctor.main() == 1
    assert "does not import: OSError: lost a library" in capsys.readouterr().out


def test_triton_is_not_missed_where_it_does_not_exist(installed: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    installed["triton"] = None
    monkeypatch.setattr(doctor.platform, "system", lambda: "Darwin")
    assert not doctor.inspect_package("triton", imports=True).problem


def test_works_without_torch(
    installed: Installed, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed["torch"] = None
    monkeypatch.setitem(doctor.sys.modules, "torch", None)  # importing it fails from here on
    assert doctor.main() == 1
    assert "missing: torch" in capsys.readouterr().out
    assert any("torch missing" in line for line in doctor.facts())


# 3. Layers


@pytest.mark.parametrize(
    ("gpus", "backends", "processes", "runs", "how"),
    [
        (8, ("NCCL 2.29.7", "gloo"), 4, True, "4 processes over NCCL"),
        (2, ("NCCL 2.29.7", "gloo"), 2, True, "2 processes over NCCL"),
        (1, ("NCCL 2.29.7", "gloo"), 4, True, "4 processes over gloo on the CPU: NCCL takes 4 GPUs, 1 here"),
        (0, ("gloo",), 4, True, "over gloo"),
        (1, ("NCCL 2.29.7",), 4, False, "neither"),
        (0, (), 4, False, "neither"),
    ],
)
def test_integration_says_over_what(
    monkeypatch: pytest.MonkeyPatch, gpus: int, backends: tuple[str, ...], processes: int, runs: bool, how: str
) -> None:
    monkeypatch.setenv("NGPU", str(processes))
    layer = verdicts(machine(gpus=("H200",) * gpus, backends=backends))["integration"]
    assert layer.runs is runs
    assert how in layer.how


def test_kernels_are_compiled_only_where_there_is_a_gpu() -> None:
    assert "interpreter" in verdicts(machine())["unit"].how
    assert "compiled" not in verdicts(machine())["unit"].how
    assert "compiled" in verdicts(machine(gpus=("H200",)))["unit"].how
    assert "GPU" in verdicts(machine(gpus=("H200",)))["perf"].how


def test_whether_kernels_for_hopper_run_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    h200, a100 = (f"NVIDIA {name} (capability {number}, 80 GiB)" for name, number in (("H200", "9.0"), ("A100", "8.0")))
    assert "with those for Hopper" in verdicts(machine(gpus=(h200,)))["unit"].how
    assert "Hopper" not in verdicts(machine(gpus=(a100,)))["unit"].how
    monkeypatch.setenv("NSA_KERNELS", "portable")
    assert "without those for Hopper" in verdicts(machine(gpus=(h200,)))["unit"].how


def test_a_gpu_torch_cannot_use_is_mentioned() -> None:
    assert doctor.describe_gpus(machine()) == "none"
    assert "CUDA build" in doctor.describe_gpus(machine(driver="580.1"))
    assert doctor.describe_gpus(machine(driver="580.1", gpus=("H200", "H200"))) == "2 x H200, driver 580.1"


# 4. The header


def test_facts_are_short_lines() -> None:
    facts = doctor.facts()
    assert any(metadata.version("torch") in line for line in facts)
    assert all("\n" not in line for line in facts)
