"""What this machine has, and which layers of the harness it can run: `make doctor`, and the header of every pytest run.

Only the standard library is imported up front: a machine without PyTorch is among those to report on.
"""

from __future__ import annotations

import importlib
import operator
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
REMEDY = (
    "`make setup`, or pip install -c constraints.txt -e .[dev]" if PYPROJECT.exists() else "pip install nsa[testing]"
)

# What a layer cannot do without, by the names of the packages.
NEEDS = {
    "unit": ("python", "torch", "triton", "pytest", "hypothesis"),
    "integration": ("python", "torch", "triton", "torchtitan", "pytest"),
    "system": ("python", "torch", "triton", "torchtitan", "pytest", "matplotlib"),
    "perf": ("python", "torch", "triton", "pytest", "pytest-benchmark", "matplotlib"),
}
CORE = ("python", "torch", "triton", "torchtitan")  # those with a supported range, and worth a line in every header


@dataclass(frozen=True)
class Package:
    name: str
    version: str | None
    problem: str = ""  # what is wrong with it and what to do about it


@dataclass(frozen=True)
class Machine:
    packages: dict[str, Package]
    cores: int
    memory: float  # GiB
    gpus: tuple[str, ...] = ()  # those torch can use
    driver: str | None = None  # set where there is an NVIDIA driver, whether or not torch can use it
    backends: tuple[str, ...] = ()  # of torch.distributed


@dataclass(frozen=True)
class Layer:
    name: str
    runs: bool
    how: str  # on what, or why not


def supported(name: str) -> str:
    """The range of versions pyproject.toml asks for, such as `>=3.6,<3.8`; empty where any will do."""
    pattern = r'^requires-python = "([^"]*)"' if name == "python" else rf'"{name} *([<>=][^";]*)'
    match = re.search(pattern, declared(), re.MULTILINE)
    return match[1].strip() if match else ""


def extra_of(name: str) -> str:
    """The extra that brings a package; empty for what comes with `nsa` itself."""
    if not PYPROJECT.exists():
        lines = metadata.metadata("nsa").get_all("Requires-Dist") or ()
        found = [line for line in lines if re.match(rf"{name}\b(?!-)", line)]
        extras = [re.search(r'extra == "(\w+)"', line) for line in found]
        return "" if not all(extras) or not extras else str(extras[0][1])  # type: ignore[index]
    own, _, rest = PYPROJECT.read_text().partition("[project.optional-dependencies]")
    groups = re.findall(r"(?ms)^(\w+) = \[(.*?)\]$", rest.partition("\n[")[0])
    named = re.compile(rf'"{name}[ "<>=]')
    return next((extra for extra, packages in groups if named.search(packages) and not named.search(own)), "")


def declared() -> str:
    """The text of pyproject.toml; where the harness is installed, the same lines out of the package's metadata."""
    if PYPROJECT.exists():
        return PYPROJECT.read_text()
    package = metadata.metadata("nsa")
    needed = [f'"{line}"' for line in package.get_all("Requires-Dist") or () if "extra ==" not in line]
    return "\n".join([f'requires-python = "{package["Requires-Python"]}"', *needed])


def within(version: str, bounds: str) -> bool:
    """Whether a version is in a range. Suffixes are passed over: 2.13.0+cpu and 2.13.0a0 both count as 2.13.0."""

    def numbers(text: str) -> tuple[int, ...]:
        release = re.match(r"\d+(\.\d+)*", text)
        return tuple(int(part) for part in re.findall(r"\d+", release[0] if release else ""))

    compare = {">=": operator.ge, "<": operator.lt, "==": operator.eq}
    return all(
        compare[sign](numbers(version), numbers(bound)) for sign, bound in re.findall(r"(>=|<|==)\s*([\d.]+)", bounds)
    )


def inspect_package(name: str, imports: bool) -> Package:
    """One package's state; `imports` also tries those whose import can fail by itself (TorchTitan's takes seconds)."""
    if name == "triton" and platform.system() != "Linux":
        return Package(name, None)  # nothing requires it there: the kernels stay unused
    bounds = supported(name)
    of = f", of the extra {extra}," if (extra := extra_of(name)) else ""
    try:
        version = platform.python_version() if name == "python" else metadata.version(name)
    except metadata.PackageNotFoundError:
        return Package(name, None, f"missing: {name}{bounds}{of} is needed: {REMEDY}")
    if not within(version, bounds):
        remedy = "make setup PYTHON=python3.12" if name == "python" else REMEDY
        return Package(name, version, f"{name}{bounds}{of} is needed, {version} is installed: {remedy}")
    if imports and name in ("torch", "triton", "torchtitan"):
        try:
            importlib.import_module(name)
        except Exception as error:  # a broken installation may raise anything
            return Package(name, version, f"does not import: {type(error).__name__}: {error}")
    return Package(name, version)


def inspect_memory() -> float:
    """GiB this process may use: the machine's, or less where a container says so."""
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        size = min(size, int(text))
    return size / 2**30


def inspect_driver() -> str | None:
    """The NVIDIA driver's version, asked of the driver itself: torch's CPU build knows of none."""
    if not (program := shutil.which("nvidia-smi")):
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return answer.stdout.split()[0] if answer.returncode == 0 and answer.stdout.strip() else None


def inspect(imports: bool = False) -> Machine:
    names = dict.fromkeys(name for needs in NEEDS.values() for name in needs)
    gpus: list[str] = []
    backends: list[str] = []
    try:
        import torch
        import torch.distributed as dist
    except Exception:  # the package's own entry says what is wrong with it
        pass
    else:
        for i in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(i)
            gpus.append(f"{gpu.name} (capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB)")
        if dist.is_available() and dist.is_nccl_available():
            backends.append("NCCL " + ".".join(map(str, torch.cuda.nccl.version())))
        if dist.is_available() and dist.is_gloo_available():
            backends.append("gloo")
    return Machine(
        packages={name: inspect_package(name, imports) for name in names},
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory=inspect_memory(),
        gpus=tuple(gpus),
        driver=inspect_driver(),
        backends=tuple(backends),
    )


def _for_hopper(machine: Machine) -> str:
    """Says whether those for Hopper GPUs run, where there is one."""
    if not any("(capability 9.0," in gpu for gpu in machine.gpus):
        return ""
    portable = os.environ.get("NSA_KERNELS") == "portable"
    return " without those for Hopper (NSA_KERNELS=portable)" if portable else " with those for Hopper"


def layers(machine: Machine) -> list[Layer]:
    """For every layer whether this machine can run it, and on what or why not."""
    gpus, processes = len(machine.gpus), int(os.environ.get("NGPU", "4"))
    has = {backend.split()[0] for backend in machine.backends}
    found = []
    for name, needs in NEEDS.items():
        lacking = [need for need in needs if machine.packages[need].problem]
        if lacking:
            found.append(Layer(name, False, "see " + ", ".join(lacking)))
            continue
        if name == "unit":
            how = "eager on the CPU; the kernels "
            if gpus:
                how += f"compiled on the GPU{_for_hopper(machine)}, and under Triton's interpreter"
            elif machine.packages["triton"].version:
                how += "under Triton's interpreter: no GPU to compile them for"
            else:
                how += "not at all: Triton is for Linux"
        elif name == "integration":
            if gpus >= processes and "NCCL" in has:
                how = f"{processes} processes over NCCL, a GPU each"
            elif "gloo" in has:
                how = f"{processes} processes over gloo on the CPU: NCCL takes {processes} GPUs, {gpus} here"
            else:
                found.append(Layer(name, False, "this build of torch has neither NCCL nor gloo for the GPUs here"))
                continue
        elif name == "system":
            how = "on the GPU" if gpus else "on the CPU, with the smallest models"
        else:
            how = "kernels on the GPU" if gpus else "eager stages on the CPU: its kernels and gates take a GPU"
        found.append(Layer(name, True, how))
    return found


def describe_gpus(machine: Machine) -> str:
    if machine.gpus:
        kinds = dict.fromkeys(machine.gpus)
        return ", ".join(f"{machine.gpus.count(kind)} x {kind}" for kind in kinds) + f", driver {machine.driver}"
    if machine.driver:
        return f"none that torch can use, though there is a driver {machine.driver}: it takes torch's CUDA build"
    return "none"


def facts() -> list[str]:
    """The lines that head every pytest run, so that no result is read without knowing where it comes from."""
    machine = inspect()
    versions = ", ".join(f"{name} {machine.packages[name].version or 'missing'}" for name in CORE)
    lines = [
        f"machine: {machine.cores} cores, {machine.memory:.0f} GiB; GPUs: {describe_gpus(machine)}",
        f"software: {versions}; {', '.join(machine.backends) or 'no torch.distributed'}",
    ]
    return lines + [f"problem: {package.problem}" for package in machine.packages.values() if package.problem]


def main() -> int:
    machine = inspect(imports=True)
    rows = [
        *(
            (not package.problem, package.name, package.problem or package.version)
            for package in machine.packages.values()
        ),
        (True, "cores", machine.cores),
        (True, "memory", f"{machine.memory:.0f} GiB"),
        (True, "GPUs", describe_gpus(machine)),
        (bool(machine.backends), "distributed", ", ".join(machine.backends) or "no backend: see torch"),
    ]
    verdicts = layers(machine)
    for good, name, text in rows:
        print(f"{'ok' if good else '!!'}  {name:<16}  {text or 'not needed here'}")
    print()
    for layer in verdicts:
        print(f"{'ok' if layer.runs else '!!'}  make {layer.name:<11}  {layer.how}")
    return 0 if all(good for good, *_ in rows) and all(layer.runs for layer in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
