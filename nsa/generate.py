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
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nsa.decode_graphs import DecodeGraphs

_CHUNK = 16384
"""Tokens of all prompts that are taken in at a time, unless told otherwise."""


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


def stream(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    vocab_size: int | None = None,
    chunk: int | None = None,
) -> Iterator[list[int]]:
    """The next token of every prompt, one step after another, of which the first takes in the prompts.

    On a GPU steps are CUDA graphs where they can be.

    Args:
        model: called as `model(tokens, cache=cache, at=at)` for logits `[B, V]` of the tokens at `at [B]`;
            `make_cache(batch, capacity, spare=s)` gives its caches by layer.
        prompts: token ids, at least one each; their lengths may differ.
        max_new_tokens: steps, at most.
        temperature, top_k, top_p: as `sample` takes them.
        seed: the same seed gives the same tokens for the same prompts; unless given, every call draws its own.
        vocab_size: tokens from this one on stand for nothing and are never drawn: models are padded by some.
        chunk: tokens of each prompt that are taken in at a time; unless given, as many as make 16384 of all together.

    Raises:
        ValueError: no prompt or an empty one, a number out of range, more tokens than the model has positions for.
    """
    if not prompts or not all(prompts):
        raise ValueError("prompts must have at least one token each, got none")
    chunk = max(1, _CHUNK // len(prompts)) if chunk is None else chunk
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
    with torch.no_grad():
        for first in range(0, longest, chunk):
            tokens = padded[:, first : first + chunk]
            found = model(tokens, cache=cache, at=(last - first).clamp(0, tokens.shape[1] - 1))
            logits = found if logits is None else found.where((last >= first)[:, None], logits)
    for one in cache.values():
        one.truncate(lengths)
    assert logits is not None

    step = DecodeGraphs(model, cache)
    for number in range(max_new_tokens):
        if number:
            logits = step(tokens)
        tokens = sample(logits[:, :vocab_size], temperature, top_k, top_p, generator)
        yield tokens.tolist()


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
    chunk: int | None = None,
) -> list[list[int]]:
    """Continues each prompt by at most `max_new_tokens` tokens, as `stream` does.

    Args:
        model, prompts: as `stream` takes them, and so are `temperature`, `top_k`, `top_p`, `seed`, `vocab_size` and
            `chunk`.
        stop: tokens that end a sequence, and are its last.
        on_token: called with the number of the prompt and the token as each one comes.

    Returns:
        The new tokens of each prompt.

    Raises:
        ValueError: as `stream` does.
    """
    sampling: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    outputs: list[list[int]] = [[] for _ in prompts]
    going = [True] * len(prompts)
    for tokens in stream(model, prompts, max_new_tokens, vocab_size=vocab_size, chunk=chunk, **sampling):
        for row, token in enumerate(tokens):
            if going[row]:
                outputs[row].append(token)
                if on_token is not None:
                    on_token(row, token)
                going[row] = token not in stop
        if not any(going):
            break
    return outputs


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 90th and 99th percentile in milliseconds."""
    found = torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor([0.5, 0.9, 0.99], dtype=torch.float64))
    return {name: round(1e3 * x, 3) for name, x in zip(("p50", "p90", "p99"), found.tolist(), strict=True)}


def benchmark(model: Any, prompt: Sequence[int], new_tokens: int, repeats: int, batch: int = 1) -> dict[str, Any]:
    """Latencies of taking in a prompt and of each step after it, in milliseconds; steps are greedy.

    Args:
        repeats: generations that are timed, after one that is not.
        batch: sequences that are continued at a time, all from the same prompt.

    Raises:
        ValueError: fewer than 2 new tokens, of which the first comes with the prompt, or a batch below 1; as `stream`
            does.
    """
    if new_tokens < 2:
        raise ValueError(f"a benchmark must be of at least 2 new tokens, got {new_tokens}")
    if batch < 1:
        raise ValueError(f"a benchmark must be of at least 1 sequence, got {batch}")
    prefill, steps = [], []
    for repeat in range(repeats + 1):
        times = [time.perf_counter()]
        times += [time.perf_counter() for _ in stream(model, [prompt] * batch, new_tokens)]
        if repeat:
            prefill.append(times[1] - times[0])
            steps += [after - before for before, after in pairwise(times[1:])]
    return {
        "prompt_tokens": len(prompt),
        "batch": batch,
        "prefill_ms": percentiles(prefill),
        "decode_ms": percentiles(steps),
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
    model_of = parser.add_mutually_exclusive_group(required=True)
    model_of.add_argument("--checkpoint", type=Path, metavar="DIR", help="step-N, or the folder of a run")
    model_of.add_argument("--flavor", metavar="NAME", help="measure an untrained model, with --benchmark")
    parser.add_argument("--prompt", metavar="TEXT", help="what is continued; - reads standard input")
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="default 200")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0 is greedy; default 0.8")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K most likely tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the tokens that make up this probability")
    parser.add_argument("--seed", type=_seed, help="the same seed gives the same text")
    parser.add_argument("--device", help="default: a GPU where there is one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: that of training")
    parser.add_argument("--hf-assets-path", type=Path, metavar="DIR", help="the tokenizer, if it was moved")
    parser.add_argument("--benchmark", action="store_true", help="print latencies as JSON instead of text")
    parser.add_argument("--prompt-tokens", type=int, metavar="N", help="of --benchmark: any N tokens are the prompt")
    parser.add_argument("--batch", type=int, metavar="N", help="sequences at a time of --benchmark; default 1")
    given = parser.parse_args(arguments)
    if (given.prompt is None) == (given.prompt_tokens is None):
        parser.error("either --prompt or --prompt-tokens must be given")
    for name in ("flavor", "prompt_tokens", "batch"):
        if getattr(given, name) is not None and not given.benchmark:
            parser.error(f"--{name.replace('_', '-')} is for --benchmark alone")
    from nsa.titan.load import load_model, untrained_model
    from nsa.titan.refusals import JobError

    text = sys.stdin.read() if given.prompt == "-" else given.prompt

    def encode(tokenizer: Any) -> list[int]:
        count = given.prompt_tokens
        return _encode(tokenizer, text) if count is None else [i % tokenizer.get_vocab_size() for i in range(count)]

    try:
        options: dict[str, Any] = {
            "device": given.device,
            "dtype": None if given.dtype is None else getattr(torch, given.dtype),
            "room_for": lambda tokenizer: len(encode(tokenizer)) + given.max_new_tokens,
        }
        if given.flavor:
            model, tokenizer = untrained_model(given.flavor, **options)
        else:
            model, tokenizer = load_model(given.checkpoint, hf_assets_path=given.hf_assets_path, **options)
        prompt = encode(tokenizer)
        if given.benchmark:
            batch = 1 if given.batch is None else given.batch
            print(json.dumps(benchmark(model, prompt, given.max_new_tokens, 5, batch)))
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
