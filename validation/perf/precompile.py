"""Kernels compiled beforehand by many processes at once, into the cache on disk that all of them share.

Triton compiles a kernel when it is launched, one at a time and on one core, while the GPU waits. A benchmark that needs
hundreds of variants has a list of jobs, each of which launches what it needs once; copies of the benchmark's own
command take jobs from the list until none is left. A job is taken by making the file with its number in a folder that
they share; its outcome is written there. So a copy that hangs in the compiler, or loses its GPU to a kernel that does
not work, costs the job it was at and no other.
"""

import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

OPTION = "--precompile-into"
"""The option by which a copy is told the folder of the jobs."""


def precompile(command: Sequence[str], processes: int, seconds: float) -> dict[int, str | None]:
    """Starts copies of a command and waits for them, `seconds` at most.

    Returns:
        For every job that came to an end in time, by its number: None, or what went wrong.
    """
    with tempfile.TemporaryDirectory() as folder:
        copies = [subprocess.Popen([*command, OPTION, folder], stdout=subprocess.DEVNULL) for _ in range(processes)]
        deadline = time.monotonic() + seconds
        for copy in copies:
            try:
                copy.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                copy.kill()
                copy.wait()
        outcomes = {int(file.name): file.read_text() for file in Path(folder).iterdir()}
    return {number: json.loads(text) for number, text in sorted(outcomes.items()) if text}


def take_jobs(jobs: Sequence[Any], folder: Path, function: Callable[[Any], Any]) -> None:
    """What a copy does: calls `function` with jobs that no other copy has taken, until none is left."""
    for number, job in enumerate(jobs):
        try:
            taken = (folder / str(number)).open("x")
        except FileExistsError:
            continue
        with taken:
            try:
                function(job)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                error = None
            except Exception as failure:  # whatever it is, the others go on
                error = f"{type(failure).__name__}: {failure}"
            taken.write(json.dumps(error))
        if error and torch.cuda.is_available():
            torch.ones(1, device="cuda").item()  # raises after an illegal access: nothing works here any more
