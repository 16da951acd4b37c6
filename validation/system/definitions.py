"""What `make train` trains on: functions and classes of the installed Python, and a tokenizer made of them.

A model this small learns within minutes to write lines that look like Python only if every step shows it many of them.
So documents are short definitions in a mixed order, instead of whole files one after the other, and tokens
are pieces of words by byte-pair encoding (arXiv 1508.07909). Nothing is downloaded.
"""

import ast
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from nsa.titan.data import corpus_files
from nsa.titan.runs import write_whole

LARGEST = 2048
"""Characters of a definition, at most: about as long as a sequence of training."""
VOCABULARY = 1024
END = "<|end|>"


def prepare(folder: Path) -> tuple[Path, Path]:
    """Writes the definitions, a file each, and the tokenizer, unless they are there; returns both folders."""
    corpus, tokenizer = folder / "definitions", folder / "tokenizer"
    if not (tokenizer / "tokenizer_config.json").exists():  # what is written last
        corpus.mkdir(parents=True, exist_ok=True)
        found = dict(definitions())
        for name, text in found.items():
            (corpus / f"{name}.py").write_text(text)
        train_tokenizer(list(found.values()), tokenizer)
    return corpus, tokenizer


def definitions() -> Iterator[tuple[str, str]]:
    """Functions and classes at the top level of the standard library's modules, by name; long ones are left out."""
    library = Path(sysconfig.get_path("stdlib"))
    for file in sorted([*corpus_files("train"), *corpus_files("validation")]):
        text = file.read_bytes().decode(errors="replace")
        try:
            body = ast.parse(text).body
        except SyntaxError:  # templates, and code for other versions
            continue
        lines, module = text.splitlines(keepends=True), ".".join(file.relative_to(library).with_suffix("").parts)
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                source = "".join(lines[first - 1 : node.end_lineno])
                if len(source) <= LARGEST:
                    yield f"{module}.{node.name}", source


def train_tokenizer(texts: list[str], folder: Path) -> None:
    """Byte-pair encoding of these texts, in the files that TorchTitan reads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "tokenizer.json", tokenizer.to_str())
    write_whole(folder / "tokenizer_config.json", json.dumps({"eos_token": END}) + "\n")
