"""Generation: `python -m nsa.generate --checkpoint DIR --prompt TEXT`, and `generate` for any model with a cache.

A checkpoint is one that training saved, in any layout: a folder `step-N`, or the folder of a run, whose last one is
taken; or a folder with safetensors and the `config.json` of a llama. The text goes to standard output as it comes, what
is said about it to standard error.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nsa.decode_graphs import DecodeGraphs


def sample(
    logits: Tensor,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A token for each row of `logits [B, V]`, int64 `[B]`.

    Args:
        temperature: what logits are divided by; 0 takes the most likely token.
        top_k: only so many of the most likely tokens are drawn from.
        top_p: only the most likely tokens are drawn from that together have at least this probability, with the
            temperature (nucleus sampling, arXiv 1904.09751).
        generator: on the CPU, where numbers are drawn, so that a seed gives the same ones on any device.

    Raises:
        ValueError: an argument out of range.
    """
    _check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return logits.argmax(-1)
    ordered, tokens = logits.double().cpu().sort(dim=-1, descending=True, stable=True)
    # Differences from the largest, which a small temperature cannot make infinite all at once.
    probabilities = ((ordered - ordered[:, :1]) / temperature).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    if top_k is not None:
        probabilities[:, top_k:] = 0
    if top_p is not None:
        probabilities[before >= top_p] = 0
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return tokens.gather(-1, drawn).squeeze(-1).to(logits.device)


def _check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be at least 0 and finite, got {temperature!r}")
    if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"top_k must be an integer of at least 1, got {top_k!r}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p!r}")


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: Collection[int] = (),
    vocab_size: int | None = None,
    on_token: Callable[[int, int], None] | None = None,
    chunk: int = 1024,
) -> list[list[int]]:
    """Continues each prompt by at most `max_new_tokens` tokens; on a GPU steps are CUDA graphs where they can be.

    Args:
        model: called as `model(tokens, cache=cache, at=at)` for logits `[B, V]` of the tokens at `at [B]`;
            `make_cache(batch, capacity, spare=s)` gives its caches by layer.
        prompts: token ids, at least one each; their lengths may differ.
        temperature, top_k, top_p: as `sample` takes them.
        seed: the same seed gives the same tokens for the same prompts; unless given, every call draws its own.
        stop: tokens that end a sequence, and are its last.
        vocab_size: tokens from this one on stand for nothing and are never drawn: models are padded by some.
        on_token: called with the number of the prompt and the token as each one comes.
        chunk: tokens of the prompts that are taken in at a time.

    Returns:
        The new tokens of each prompt.

    Raises:
        ValueError: no prompt or an empty one, a number out of range, more tokens than the model has positions for.
    """
    if not prompts or not all(prompts):
        raise ValueError("prompts must have at least one token each, got none")
    for name, number, least in (("max_new_tokens", max_new_tokens, 0), ("chunk", chunk, 1)):
        if number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")
    _check_sampling(temperature, top_k, top_p)
    device = next(model.parameters()).device
    generator = torch.Generator("cpu")
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths)
    # Shorter prompts are filled up, and what that left in the caches is taken back.
    cache = model.make_cache(len(prompts), longest + max_new_tokens, spare=longest - min(lengths))
    padded = torch.tensor([[*prompt, *[prompt[-1]] * (longest - len(prompt))] for prompt in prompts], device=device)
    last = torch.tensor(lengths, device=device) - 1
    logits: Tensor | None = None
    for first in range(0, longest, chunk):
        tokens = padded[:, first : first + chunk]
        found = model(tokens, cache=cache, at=(last - first).clamp(0, tokens.shape[1] - 1))
        logits = found if logits is None else found.where((last >= first)[:, None], logits)
    for one in cache.values():
        one.truncate(lengths)
    assert logits is not None

    outputs: list[list[int]] = [[] for _ in prompts]
    step = DecodeGraphs(model, cache)
    going = [max_new_tokens > 0] * len(prompts)
    while any(going):
        tokens = sample(logits[:, :vocab_size], temperature, top_k, top_p, generator)
        for row, token in enumerate(tokens.tolist()):
            if going[row]:
                outputs[row].append(token)
                if on_token is not None:
                    on_token(row, token)
                going[row] = token not in stop and len(outputs[row]) < max_new_tokens
        if any(going):
            logits = step(tokens)
    return outputs


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 90th and 99th percentile in milliseconds."""
    found = torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor([0.5, 0.9, 0.99], dtype=torch.float64))
    return {name: round(1e3 * x, 3) for name, x in zip(("p50", "p90", "p99"), found.tolist(), strict=True)}


def benchmark(model: Any, prompt: Sequence[int], new_tokens: int, repeats: int, batch: int = 1) -> dict[str, Any]:
    """Latencies of taking in a prompt and of each step after it, in milliseconds; steps are greedy.

    Args:
        repeats: generations that are timed, after one that is not.
        batch: sequences that are continued at a time, all from the same prompt.

    Raises:
        ValueError: fewer than 2 new tokens, of which the first comes with the prompt, or a batch below 1; as `generate`
            does.
    """
    if new_tokens < 2:
        raise ValueError(f"a benchmark must be of at least 2 new tokens, got {new_tokens}")
    if batch < 1:
        raise ValueError(f"a benchmark must be of at least 1 sequence, got {batch}")
    prompts = [prompt] * batch
    generate(model, prompts, new_tokens)
    prefill, steps = [], []
    for _ in range(repeats):
        times = [time.perf_counter()]

        def note(row: int, token: int, times: list[float] = times) -> None:
            if row == 0:
                times.append(time.perf_counter())

        generate(model, prompts, new_tokens, on_token=note)
        prefill.append(times[1] - times[0])
        steps += [after - before for before, after in pairwise(times[1:])]
    return {
        "prompt_tokens": len(prompt),
        "batch": batch,
        "prefill_ms": _percentiles(prefill),
        "decode_ms": _percentiles(steps),
        "decode_tokens_per_second": round(batch / statistics.median(steps), 1),
    }


def _seed(text: str) -> int:
    """A seed that PyTorch's generators take."""
    number = int(text)
    if not 0 <= number < 2**63:
        raise ValueError(text)
    return number


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m nsa.generate", description=__doc__.partition("\n\n")[2])
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="step-N, or the folder of a run")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what is continued; - reads standard input")
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="default 200")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0 is greedy; default 0.8")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K most likely tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the tokens that make up this probability")
    parser.add_argument("--seed", type=_seed, help="the same seed gives the same text")
    parser.add_argument("--device", help="default: a GPU where there is one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: that of training")
    parser.add_argument("--hf-assets-path", type=Path, metavar="DIR", help="the tokenizer, where it is not bytes")
    parser.add_argument("--benchmark", action="store_true", help="print latencies as JSON instead of text")
    parser.add_argument(
        "--batch", type=int, default=1, metavar="N", help="sequences at a time of --benchmark; default 1"
    )
    given = parser.parse_args(arguments)
    from nsa.titan.load import load_model
    from nsa.titan.refusals import JobError

    text = sys.stdin.read() if given.prompt == "-" else given.prompt
    try:
        model, tokenizer = load_model(
            given.checkpoint,
            device=given.device,
            dtype=None if given.dtype is None else getattr(torch, given.dtype),
            hf_assets_path=given.hf_assets_path,
            room_for=lambda tokenizer: len(_encode(tokenizer, text)) + given.max_new_tokens,
        )
        prompt = _encode(tokenizer, text)
        if given.benchmark:
            print(json.dumps(benchmark(model, prompt, given.max_new_tokens, 5, given.batch)))
            return
        _print_tokens(model, tokenizer, prompt, given)
    except (JobError, ValueError) as error:
        parser.exit(1, f"{error}\n")


def _encode(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a prompt: as in training nothing comes before a document, and this one has not ended."""
    return list(tokenizer.encode(text, add_bos=False, add_eos=False))


class Printer:
    """Prints the text of tokens as they come, as far as it is certain: a character may be several tokens."""

    def __init__(self, decode: Callable[[list[int]], str]):
        self._decode = decode
        self._line: list[int] = []
        self._printed = ""
        self.count = 0

    def __call__(self, row: int, token: int) -> None:
        self.count += 1
        self._line.append(token)
        text = self._decode(self._line)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text[len(self._printed) :], end="", flush=True)
            self._printed = text
        if self._printed.endswith("\n") and self._printed == text:
            self._line, self._printed = [], ""

    def end(self) -> None:
        """Prints what is left, whole or not."""
        print(self._decode(self._line)[len(self._printed) :])


def _print_tokens(model: Any, tokenizer: Any, prompt: list[int], given: argparse.Namespace) -> None:
    printer = Printer(tokenizer.decode)
    options = {"temperature": given.temperature, "top_k": given.top_k, "top_p": given.top_p, "seed": given.seed}
    options |= {"stop": (tokenizer.eos_id,), "vocab_size": tokenizer.get_vocab_size()}
    start = time.perf_counter()
    generate(model, [prompt], given.max_new_tokens, on_token=printer, **options)
    seconds = time.perf_counter() - start
    printer.end()
    print(f"{printer.count} tokens in {seconds:.1f} s, {printer.count / seconds:.0f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    main()
