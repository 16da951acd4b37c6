"""Shared memory of the kernels on a GPU that need not be here: they are compiled for it and never launched.

    python -m validation.offline sm86 float32 128 256 bfloat16 128     # architecture, then head dims by dtype

prints a JSON object: for each of these, and each kernel of forward and backward passes, in groups of 2 and of 16 query
heads, and of decoding, the most bytes of shared memory that one of its programs takes. What the compiler refuses and
the interpreter takes, fails.
"""

import argparse
import json
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from nsa import (
    KVCache,
    NSAConfig,
    StepKeys,
    apply_rope,
    compress_keys_and_values,
    decode_attention,
    dense_decode_attention,
    kernels,
    nsa_attention,
    rope_table,
)
from nsa.kernels import configs
from nsa.module import Compressor

TOKENS = 1024  # lengths are no constants of a kernel


class Found(Exception):
    """Carries the shared memory of a kernel out of the compiler, which has no more to do then."""

    def __init__(self, shared: int) -> None:
        super().__init__(shared)
        self.shared = shared


class Absent:
    """A driver of a GPU of this architecture that answers as much as Triton asks while it compiles."""

    def __init__(self, architecture: str) -> None:
        self.target = GPUTarget("cuda", int(architecture.removeprefix("sm")), 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def _check_options(backend: Any = None, stages: dict[str, Any] | None = None, *_: Any) -> tuple[str, str] | None:
    if stages is None:  # Triton asks for what goes into the key of its cache
        return "", ""
    lower = stages["llir"]

    def check(module: Any, metadata: dict[str, Any]) -> Any:
        assert metadata["enable_fp_fusion"], "products and sums are not fused: their bits are those of another release"

        def stop(passes: Any) -> None:
            passes.run(module, "until shared memory is shared out")
            raise Found(module.get_int_attr("ttg.shared"))

        # The pass that this would add comes after; those that make LLVM's code of a module take half of the time.
        compiler.passes.ttgpuir.add_allocate_global_scratch_memory = stop
        return lower(module, metadata)

    stages["llir"] = check
    return None


@cache
def _compile_for(architecture: str) -> dict[str, int]:
    """Makes Triton compile for that GPU and launch nothing, for the rest of the process.

    Returns the dictionary that gets the shared memory of what is compiled, by kernel.
    """
    driver.set_active(Absent(architecture))
    triton.knobs.runtime.add_stages_inspection_hook = _check_options
    triton.knobs.compilation.always_compile = True  # what is in the cache on disk tells nothing
    triton.knobs.compilation.store_binary_only = True  # and nothing is put there
    configs.architecture = lambda device: architecture  # type: ignore[assignment]
    torch.cuda.current_device = lambda: 0
    torch.cuda.device_of = nullcontext  # type: ignore[assignment,misc]
    kernels.INTERPRETED = True  # CPU tensors are good enough for that
    found: dict[str, int] = {}
    compile_whole, compile_and_launch = triton.compiler.compile, JITFunction.run

    def compile_until_found(*arguments: Any, **named: Any) -> Found:
        """Compiles a variant of a kernel, and returns what the kernel keeps of it: the next call finds that."""
        try:
            compile_whole(*arguments, **named)
        except Found as result:
            return result
        raise AssertionError("compiled past the pass that shares out shared memory")

    def compile_alone(kernel: JITFunction[Any], *arguments: Any, **named: Any) -> None:
        # Whether integers overflow is asked in debugging alone, and what asks it is compiled away late.
        named |= {"warmup": True, "sanitize_overflow": False}
        name = f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"
        found[name] = max(found.get(name, 0), compile_and_launch(kernel, *arguments, **named).shared)

    triton.compiler.compile = compile_until_found
    JITFunction.run = compile_alone
    return found


def shared_memory(architecture: str, dtype: torch.dtype, head_dim: int) -> dict[str, int]:
    """Bytes of shared memory by kernel, the most of all its variants. A process has one architecture."""
    found = _compile_for(architecture)
    found.clear()
    config = NSAConfig()

    def draw(length: int, *shape: int) -> torch.Tensor:
        return torch.zeros(1, length, *shape, dtype=dtype, requires_grad=True)

    k_cmp, v_cmp = (draw(config.num_compressed(TOKENS), 1, head_dim) for _ in range(2))
    k_slc, v_slc, k_win, v_win = (draw(TOKENS, 1, head_dim) for _ in range(4))
    # In large groups other kernels run where they were measured, and in small ones the rest.
    tiles = configs.kernel_config("selected_forward_tiles", dtype, head_dim, head_dim, 16)
    for heads in (16, 2) if tiles.most_keys else (2,):
        q, gates = draw(TOKENS, heads, head_dim), draw(TOKENS, heads, 3)
        out = nsa_attention(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, config, backend="triton")
        assert isinstance(out, torch.Tensor)
        torch.autograd.grad(out, [q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates], torch.zeros_like(out))
    table = rope_table(TOKENS, head_dim)
    for interleaved in (True, False):
        leaves = [q, k_cmp, k_slc, k_win]
        rotated = apply_rope(q, k_cmp, k_slc, k_win, table, config, interleaved=interleaved, backend="triton")
        torch.autograd.grad(rotated, leaves, [torch.zeros_like(x) for x in rotated])
    params = Compressor(1, head_dim, config).params()
    for settings, learned in ((replace(config, compression="mean"), None), (config, params)):
        pair = compress_keys_and_values(k_slc, v_slc, learned, learned, settings, backend="triton")
        torch.autograd.grad(pair, [k_slc, v_slc], [torch.zeros_like(x) for x in pair])
        with torch.no_grad():
            cache = KVCache(settings, 1, TOKENS, 1, head_dim, dtype=dtype)
            query, k, v = (x[:, :1].detach() for x in (q, k_slc, v_slc))
            for interleaved in (True, False):
                options: Any = {"interleaved": interleaved, "backend": "triton"}
                cache.step(query, [k] * 3, [v] * 3, [learned] * 2, table, **options)
    stores = (x.detach() for x in (k_cmp, v_cmp, k_slc, v_slc, k_win, v_win))
    steps = StepKeys._make([*stores, torch.zeros(1, dtype=torch.int64)])
    decode_attention(q[:, :1], steps, gates[:, :1], config, backend="triton")
    dense_decode_attention(q[:, :1], steps.k_slc, steps.v_slc, steps.lengths, backend="triton")
    return dict(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architecture", help="sm80, sm86, sm90 and so on")
    parser.add_argument("sizes", nargs="+", help="a dtype, its head dims, the next dtype and so on")
    given = parser.parse_args()
    found, dtype = {}, ""
    for word in given.sizes:
        if word.isdecimal():
            found[f"{dtype} {word}"] = shared_memory(given.architecture, getattr(torch, dtype), int(word))
        else:
            dtype = word
    print(json.dumps(found))


if __name__ == "__main__":
    main()
