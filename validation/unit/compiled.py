"""Kernels for Hopper compiled where there is no such GPU, and what NVIDIA's tools say of them."""

import json
import os
import subprocess
import sys
from typing import Any

_BEFORE = """
import json, pathlib, re, subprocess, tempfile, torch, triton
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime.jit import JITFunction
from nsa.config import NSAConfig
from nsa.kernels.flash_tiles import PositionMap
from validation.offline import Absent

triton.runtime.driver.set_active(Absent("sm90"))
launch, found = JITFunction.run, []

def ask(compiled, kind, tool, *options):
    code = compiled.asm[kind]
    with tempfile.NamedTemporaryFile(suffix=f".{kind}") as file:
        file.write(code if isinstance(code, bytes) else code.encode())
        file.flush()
        told = subprocess.run([tool, *options, file.name], capture_output=True, text=True, check=True)
    return told.stdout + told.stderr

def disassembler(name):
    return pathlib.Path(triton.__file__).with_name("backends") / "nvidia/bin" / name

def compile_alone(kernel, *arguments, **named):
    compiled = launch(kernel, *arguments, **{**named, "warmup": True})
    if kernel.is_gluon():
        found.append({"shared": compiled.metadata.shared, **look(compiled)})

JITFunction.run = compile_alone
"""


def compile_for_hopper(code: str) -> list[dict[str, Any]]:
    """What `look(compiled)`, defined in `code`, says of each Gluon kernel that the rest of `code` launches, and the
    bytes of its shared memory.

    `code` has `ask(compiled, kind, tool, *options)`: what a tool prints of the kernel's `"ptx"` or `"cubin"`.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", f"{_BEFORE}{code}\nprint(json.dumps(found))"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found: list[dict[str, Any]] = json.loads(run.stdout)
    return found
