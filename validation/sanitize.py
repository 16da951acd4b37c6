"""The Triton kernels under NVIDIA's compute-sanitizer, `make sanitize`: bad addresses (memcheck), races (racecheck).

Every stage runs forward and backward on small cases of every structure, once under each tool. That takes a GPU and the
sanitizer, which comes with the CUDA toolkit; where either is missing it says so and fails.
"""

import os
import re
import shutil
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nsa.kernels import configs
from nsa.kernels.hopper import portable

from .cases import Case, config, draw, whole
from .implementations import load
from .stages import STAGES, select_blocks

TOOLS = ("memcheck", "racecheck")
TOOLKIT = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
MISSING = f"compute-sanitizer is missing: it comes with the CUDA toolkit, and was looked for on PATH and in {TOOLKIT}"
SUMMARY = re.compile(r"(?:ERROR SUMMARY: |RACECHECK SUMMARY: \d+ hazards? displayed \()(\d+) error")

# By query and by block, one sequence and several, queries for some keys only, head dims of one chunk, two and neither.
# No length is a multiple of anything, so that the last tile of everything reaches beyond the end.
BLOCKS = config((32, 16, 64), 3, 48, num_local_blocks=1)
SMALL_BLOCKS = config((16, 16, 16), 3, 48, num_local_blocks=1)
DIMS: dict[str, Any] = {"kv_heads": 2, "key_dim": 128, "value_dim": 128}
WHOLE, PACKED = whole(211), whole(97, 0, 1, 70)
CASES = {
    Case("by_query", WHOLE, BLOCKS, group=16, **DIMS): torch.bfloat16,
    Case("by_query_packed", PACKED, BLOCKS, group=16, **DIMS): torch.bfloat16,
    Case("by_block", WHOLE, BLOCKS, group=3, **DIMS): torch.bfloat16,
    Case("by_block_packed", PACKED, BLOCKS, group=3, **DIMS): torch.bfloat16,
    Case("last_queries", ((50, 211),), BLOCKS, group=16, **DIMS): torch.bfloat16,
    Case("wide_keys", WHOLE, BLOCKS, group=16, kv_heads=1, key_dim=192, value_dim=128): torch.bfloat16,
    Case("small_blocks", WHOLE, SMALL_BLOCKS, group=3, kv_heads=1, key_dim=64, value_dim=64): torch.float32,
    Case("wide_values", WHOLE, BLOCKS, group=3, kv_heads=1, key_dim=48, value_dim=80): torch.float32,
}


def find_sanitizer() -> str | None:
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=TOOLKIT)


def problem(tool: str, status: int, report: str) -> str | None:
    """Why a run under a tool does not pass, or None: a tool that gives no account of errors has shown nothing."""
    errors = [int(count) for count in SUMMARY.findall(report)]
    if not errors:
        return f"{tool} came to no end (exit status {status})"
    if sum(errors) or status:
        return f"{tool} found {sum(errors)} errors (exit status {status})"
    return None


def run_under(sanitizer: str, tool: str) -> str | None:
    """Runs the workload in a process of its own and hands its report on; the problem, if there is one."""
    # What a caching allocator hands out has no bounds that the tool could know.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # Compilers are programs too, and PyTorch asks the driver questions that may be answered by an error.
    options = [f"--tool={tool}", "--target-processes=application-only", "--report-api-errors=no", "--error-exitcode=99"]
    command = [sanitizer, *options, sys.executable, "-m", "validation.sanitize", tool]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr, sep="", flush=True)
    return problem(tool, done.returncode, done.stdout + done.stderr)


def exercise(case: Case, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Every stage, forward and backward; compression of every kind that has a kernel of its own."""
    triton, mean = load("triton"), replace(case, config=replace(case.config, compression="mean"))
    for name, stage in STAGES.items():
        for each in (case, mean) if name.startswith("compress_") else (case,):
            dict(stage.results(triton, each, tensors, dtype))
    select_blocks(triton, case, tensors)


def work(tool: str) -> None:
    """What is checked. Inputs come from the CPU, so that little else than our kernels runs on the GPU."""
    with ExitStack() as stack:
        if tool == "racecheck":
            # The tool takes copies by tensor descriptors, whose barriers it does not follow, for races. So it looks at
            # no kernel of Hopper, all of which copy like that.
            for name in (name for name, config in configs.KERNELS.items() if "TMA" in config.__dataclass_fields__):
                stack.enter_context(configs.override(name, TMA=False))
            stack.enter_context(portable())
        for case, dtype in CASES.items():
            tensors = {name: x.cuda() for name, x in draw(case, dtype).items()}
            with torch.device("cuda"):
                exercise(case, tensors, dtype)
            torch.cuda.synchronize()
            print(f"{tool}: {case.id} done", flush=True)


def main() -> int:
    if sys.argv[1:]:
        work(sys.argv[1])
        return 0
    sanitizer = find_sanitizer()
    if sanitizer is None or not torch.cuda.is_available():
        print(MISSING if sanitizer is None else "there is no GPU to run the kernels on", file=sys.stderr)
        return 1
    problems = [found for tool in TOOLS if (found := run_under(sanitizer, tool))]
    print("\n".join(problems) or f"no errors under {' and '.join(TOOLS)}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
