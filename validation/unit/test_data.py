"""The tokenizer is lossless, the corpus is the same everywhere, and the loader's batches know nothing of the layout."""

import os
import sysconfig
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.checkpoint.stateful import Stateful

from nsa.titan.data import (
    DATASETS,
    ByteTokenizer,
    CorpusLoader,
    Split,
    corpus_files,
    corpus_tokens,
    padded_vocab_size,
    tokenizer_name,
)

SPLITS: tuple[Split, ...] = get_args(Split)
STDLIB = Path(sysconfig.get_path("stdlib"))
EOS = ByteTokenizer.eos_id
L = 8
GLOBAL_BATCH = 8
# Ways to make a global batch: (data-parallel degree, local batch, iterations a step).
LAYOUTS = [(1, 8, 1), (1, 2, 4), (1, 1, 8), (2, 4, 1), (2, 1, 4), (4, 2, 1), (4, 1, 2), (8, 1, 1)]

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no fault


# The tokenizer


@unhurried
@given(st.text(), st.booleans(), st.booleans())
def test_every_text_survives_encoding_and_decoding(text: str, add_bos: bool, add_eos: bool) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text, add_bos=add_bos, add_eos=add_eos)
    assert ids == [256] * add_bos + list(text.encode()) + [257] * add_eos
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<bos>" * add_bos + text + "<eos>" * add_eos


@unhurried
@given(st.binary())
def test_bytes_become_the_same_tokens_as_a_tensor(data: bytes) -> None:
    tokens = ByteTokenizer().encode_bytes(data)
    assert tokens.dtype == torch.int32
    assert tokens.tolist() == list(data)


@unhurried
@given(st.lists(st.integers(0, 258)))
def test_whatever_a_model_emits_can_be_decoded(ids: list[int]) -> None:
    expected = bytes(i for i in ids if i < 256).decode(errors="replace")
    assert ByteTokenizer().decode(ids) == expected
    assert ByteTokenizer().decode(torch.tensor(ids, dtype=torch.int64)) == expected


def test_the_vocabulary_is_the_bytes_and_three_special_tokens() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.vocab_size == tokenizer.get_vocab_size() == 259
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (256, 257, 258)
    assert tokenizer.encode("a") == [97]  # nothing is added unasked
    assert tokenizer.decode([258, 97, 258]) == "a"
    assert tokenizer.decode([258, 97], skip_special_tokens=False) == "<pad>a"
    assert tokenizer == ByteTokenizer()
    assert hash(tokenizer) == hash(ByteTokenizer())


@pytest.mark.parametrize(("tokens", "padded"), [(1, 64), (64, 64), (65, 128), (259, 320)])
def test_the_vocabulary_of_a_model_is_the_next_multiple_of_64(tokens: int, padded: int) -> None:
    assert padded_vocab_size(SimpleNamespace(get_vocab_size=lambda: tokens)) == padded


@pytest.mark.parametrize("bad", [-1, 259])
def test_an_id_outside_the_vocabulary_is_an_error(bad: int) -> None:
    with pytest.raises(ValueError, match=rf"\[0, 259\), got {bad}$"):
        ByteTokenizer().decode([97, bad])


def test_a_lone_surrogate_is_an_error() -> None:
    with pytest.raises(ValueError, match="surrogates not allowed"):
        ByteTokenizer().encode("\ud800")


# The corpus


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of 200 documents, two directories deep, and files that are not to be read."""
    for i in range(200):
        file = tmp_path / f"part{i % 7}" / f"tests{i % 3}" / f"{i}{('.py', '.txt', '.md')[i % 3]}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(f"dôcument {i}\r\n".encode() * (i % 5))
    (tmp_path / "weights.bin").write_bytes(b"\xff" * 100)
    (tmp_path / "part0" / "gone.py").symlink_to(tmp_path / "nowhere.py")
    (tmp_path / "part1" / "folder.py").mkdir()
    return tmp_path


def test_the_splits_are_disjoint_and_cover_every_file(folder: Path) -> None:
    train, validation = (corpus_files(split, folder) for split in SPLITS)
    expected = [file for file in folder.rglob("*.*") if file.suffix in (".py", ".txt", ".md") and file.is_file()]
    assert len(expected) == 200
    assert sorted(train + validation) == sorted(expected)
    assert 0.01 < len(validation) / 200 < 0.10


def test_the_standard_library_is_all_there_without_tests_and_installed_packages() -> None:
    train, validation = (corpus_files(split) for split in SPLITS)
    every = set(train + validation)
    assert len(every) == len(train) + len(validation)
    for pattern in ("*.py", "json/*.py", "email/mime/*.py"):
        assert every >= set(STDLIB.glob(pattern)) > set()
    directories = {name for file in every for name in file.relative_to(STDLIB).parts[:-1]}
    assert "email" in directories
    assert directories.isdisjoint({"site-packages", "dist-packages", "test", "tests", "idle_test"})
    assert 0.01 < len(validation) / len(every) < 0.10


def test_the_order_does_not_depend_on_directory_listings(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {split: corpus_files(split, folder) for split in SPLITS}
    walk = os.walk

    def reversed_walk(top: Path) -> Iterator[tuple[str, list[str], list[str]]]:
        for root, directories, names in walk(top):
            directories.sort(reverse=True)
            yield root, directories, sorted(names, reverse=True)

    monkeypatch.setattr(os, "walk", reversed_walk)
    assert {split: corpus_files(split, folder) for split in SPLITS} == before


def test_the_order_does_not_depend_on_where_the_folder_lies(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {split: [file.relative_to(folder) for file in corpus_files(split, folder)] for split in SPLITS}
    moved = folder.rename(folder.with_name("moved"))
    monkeypatch.chdir(moved.parent)
    assert {split: [f.relative_to("moved") for f in corpus_files(split, "moved")] for split in SPLITS} == before


def test_a_split_does_not_change_when_other_files_come_and_go(folder: Path) -> None:
    before = {split: corpus_files(split, folder) for split in SPLITS}
    gone = before["train"][::2]
    for file in gone:
        file.unlink()
    assert corpus_files("validation", folder) == before["validation"]
    assert corpus_files("train", folder) == before["train"][1::2]


def test_known_names_keep_their_split_and_order(tmp_path: Path) -> None:
    for name in ("0.txt", "1.txt", "2.txt", "3.txt", "4.txt", "58.txt", "162.txt"):
        (tmp_path / name).write_text(name)
    # In the order of their crc32: 162 (958472340), 4, 3, 2, 58 (3619658400), 0, 1; those two are multiples of 20.
    assert [file.stem for file in corpus_files("validation", tmp_path)] == ["162", "58"]
    assert [file.stem for file in corpus_files("train", tmp_path)] == ["4", "3", "2", "0", "1"]


@pytest.mark.parametrize("split", SPLITS)
def test_documents_are_the_files_separated_by_eos(split: Split, folder: Path) -> None:
    tokens = corpus_tokens(split, ByteTokenizer(), folder)
    assert tokens.dtype == torch.int32
    expected = [i for file in corpus_files(split, folder) for i in [*file.read_bytes(), EOS]]
    assert tokens.tolist() == expected


def test_the_standard_library_is_read_whole() -> None:
    for name, split in DATASETS.items():
        files = corpus_files(split)
        tokens = corpus_tokens(split, ByteTokenizer())
        assert (name == "python_stdlib_validation") == (split == "validation")
        assert (tokens == EOS).sum() == len(files)
        first = tokens[: tokens.tolist().index(EOS)]
        assert ByteTokenizer().decode(first) == files[0].read_bytes().decode(errors="replace")
    assert len(corpus_tokens("train", ByteTokenizer())) > 1_000_000


def test_bytes_that_are_not_utf8_are_replaced(tmp_path: Path) -> None:
    for i in range(100):
        (tmp_path / f"{i}.txt").write_bytes(b"caf\xe9")
    documents = ByteTokenizer().decode(corpus_tokens("train", ByteTokenizer(), tmp_path), False).split("<eos>")
    assert set(documents[:-1]) == {"caf\ufffd"}
    assert documents[-1] == ""


class CodePoints:
    """A tokenizer that is not the byte tokenizer: every code point is a token, 7 is end-of-sequence."""

    eos_id = 7

    def encode(self, text: str, *, add_bos: bool, add_eos: bool) -> list[int]:
        return [6] * add_bos + [ord(character) for character in text] + [self.eos_id] * add_eos


def test_any_tokenizer_serves(folder: Path) -> None:
    tokens = corpus_tokens("train", CodePoints(), folder)
    texts = [file.read_bytes().decode() for file in corpus_files("train", folder)]
    assert tokens.dtype == torch.int32
    assert tokens.tolist() == [i for text in texts for i in [*map(ord, text), 7]]


def test_a_corpus_is_read_once(folder: Path) -> None:
    first = corpus_tokens("train", ByteTokenizer(), folder)
    assert corpus_tokens("train", ByteTokenizer(), str(folder)) is first
    assert corpus_tokens("validation", ByteTokenizer(), folder) is not first


def test_bad_corpora_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be a folder, but there is none at '.*nowhere'"):
        corpus_tokens("train", ByteTokenizer(), tmp_path / "nowhere")
    (tmp_path / "data.bin").touch()
    with pytest.raises(ValueError, match="must be a folder, but there is none"):
        corpus_tokens("train", ByteTokenizer(), tmp_path / "data.bin")
    with pytest.raises(ValueError, match=r"has no train file: of its 0 files \['\.md', '\.py', '\.txt'\]"):
        corpus_tokens("train", ByteTokenizer(), tmp_path)
    (tmp_path / "one.txt").write_text("one")
    with pytest.raises(ValueError, match="has no validation file: of its 1 files"):
        corpus_tokens("validation", ByteTokenizer(), tmp_path)
    with pytest.raises(ValueError, match=r"split must be one of \('train', 'validation'\), got 'test'"):
        corpus_files("test", tmp_path)  # type: ignore[arg-type]


# The loader


def stream(rows: int, left_over: int = 3) -> Tensor:
    """A stream of `rows` whole rows in which every token is its own position; int32 `[rows L + 1 + left_over]`."""
    return torch.arange(rows * L + 1 + left_over, dtype=torch.int32)


def ranks(tokens: Tensor, degree: int, local: int, **options: Any) -> list[CorpusLoader]:
    """The loaders of all data-parallel ranks."""
    return [CorpusLoader(tokens, L, local, rank, degree, **options) for rank in range(degree)]


def steps(loaders: list[CorpusLoader], iterations: int, count: int) -> list[list[int]]:
    """The numbers of the rows that each of `count` global steps sees, iteration by iteration, rank by rank."""
    iterators = [iter(loader) for loader in loaders]
    seen = []
    for _ in range(count):
        batches = [next(iterator) for _ in range(iterations) for iterator in iterators]
        inputs = torch.cat([batch["input"] for batch, _ in batches])
        assert torch.equal(torch.cat([labels for _, labels in batches]), inputs + 1)
        seen.append((inputs[:, 0] // L).tolist())
    return seen


def state_at(loader: CorpusLoader, row: int, *, passes: int = 0) -> dict[str, Any]:
    """The state of a loader of this kind whose next row is `row`."""
    return loader.state_dict() | {"passes": passes, "token": row * L}


def test_a_batch_is_rows_of_the_stream_and_their_successors() -> None:
    tokens = torch.randint(0, 259, (100,), dtype=torch.int32)
    batch, labels = next(islice(CorpusLoader(tokens, L, 3, dp_rank=1, dp_world_size=2), 1, None))
    assert list(batch) == ["input"]
    # The second iteration of two ranks with three rows each begins at row 6, the second rank at row 9.
    assert torch.equal(batch["input"], torch.stack([tokens[i * L : i * L + L] for i in (9, 10, 11)]).long())
    assert torch.equal(labels, torch.stack([tokens[i * L + 1 : i * L + L + 1] for i in (9, 10, 11)]).long())
    assert batch["input"].dtype == labels.dtype == torch.int64
    assert batch["input"].is_contiguous()
    assert labels.is_contiguous()


def test_batches_do_not_share_memory_with_the_stream() -> None:
    tokens = stream(4).long()
    batch, labels = next(iter(CorpusLoader(tokens, L, 2)))
    batch["input"].zero_()
    labels.zero_()
    assert torch.equal(tokens, stream(4).long())


@pytest.mark.parametrize(("degree", "local", "iterations"), LAYOUTS)
def test_every_layout_sees_the_same_global_batches(degree: int, local: int, iterations: int) -> None:
    rows = 21  # not a multiple of the global batch: the third step wraps around
    seen = steps(ranks(stream(rows), degree, local), iterations, 8)
    assert seen == [[(GLOBAL_BATCH * step + i) % rows for i in range(GLOBAL_BATCH)] for step in range(8)]


@pytest.mark.parametrize("after", LAYOUTS)
@pytest.mark.parametrize("before", [(1, 8, 1), (2, 1, 4), (4, 2, 1)])
def test_a_run_resumes_exactly_in_the_same_and_in_any_other_layout(
    before: tuple[int, int, int], after: tuple[int, int, int]
) -> None:
    tokens = stream(21)
    uninterrupted = steps(ranks(tokens, 1, GLOBAL_BATCH), 1, 9)
    first = ranks(tokens, *before[:2])
    assert steps(first, before[2], 4) == uninterrupted[:4]
    states = [loader.state_dict() for loader in first]
    assert states == [state_at(first[0], 4 * GLOBAL_BATCH - 21, passes=1)] * before[0]
    second = ranks(tokens, *after[:2])
    for loader in second:
        loader.load_state_dict(states[0])
    assert steps(second, after[2], 5) == uninterrupted[4:]


def test_a_state_is_a_snapshot() -> None:
    loader = CorpusLoader(stream(10), L, 2)
    iterator = iter(loader)
    next(iterator)
    state = loader.state_dict()
    next(iterator)
    assert state == {
        "passes": 0,
        "token": 2 * L,
        "seq_len": L,
        "corpus": "84 tokens, sha256 a5aaf28332fd0a02",
        "tokenizer": "",
    }
    assert loader.state_dict() == state | {"token": 4 * L}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_state_survives_a_distributed_checkpoint(tmp_path: Path) -> None:
    saved, loaded = ranks(stream(10), 1, 3) + ranks(stream(10), 1, 2)
    assert isinstance(saved, Stateful)
    next(iter(saved))
    dcp.save({"loader": saved}, checkpoint_id=tmp_path, no_dist=True)
    dcp.load({"loader": loaded}, checkpoint_id=tmp_path, no_dist=True)
    assert loaded.state_dict() == state_at(saved, 3)
    assert steps([loaded], 1, 1) == [[3, 4]]


def test_an_iterator_in_use_obeys_a_loaded_state() -> None:
    loader = CorpusLoader(stream(10), L, 1)
    iterator = iter(loader)
    next(iterator)
    loader.load_state_dict(state_at(loader, 7))
    assert next(iterator)[0]["input"][0, 0] == 7 * L


def test_an_empty_state_leaves_the_loader_where_it_is() -> None:
    loader = CorpusLoader(stream(10), L, 2)
    steps([loader], 1, 2)
    loader.load_state_dict({})
    assert loader.state_dict() == state_at(loader, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token": -1}, r"token in \[0, 84\), got 0 and -1"),
        ({"token": 84}, r"token in \[0, 84\), got 0 and 84"),
        ({"passes": -1}, "passes must be at least 0 .*, got -1 and 0"),
        ({"token": 1.0}, "state_dict must have passes: int, token: int, .* got"),
        ({"token": True}, "state_dict must have passes: int, token: int"),
        ({"passes": None}, "state_dict must have passes: int, token: int"),
        ({"corpus": 7}, "state_dict must have passes: int, token: int"),
        ({"world_size": 2}, "state_dict must have passes: int, token: int"),
        ({"corpus": "other"}, "the state is of another corpus: 'other', where this loader has '84 tokens, sha256 "),
        ({"tokenizer": "other"}, "the state is of another tokenizer: 'other', where this loader has ''"),
    ],
    ids=[
        "token before the first",
        "token behind the last",
        "passes",
        "float",
        "bool",
        "none",
        "int for text",
        "another field",
        "another corpus",
        "another tokenizer",
    ],
)
def test_a_senseless_state_is_an_error_and_changes_nothing(change: dict[str, Any], message: str) -> None:
    loader = CorpusLoader(stream(10), L, 2)
    state = loader.state_dict()
    steps([loader], 1, 1)
    with pytest.raises(ValueError, match=message):
        loader.load_state_dict(state | change)
    assert loader.state_dict() == state_at(loader, 2)


def test_a_position_in_rows_of_unknown_length_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"state_dict must have passes: int, .* got \{'rows': 3\}"):
        CorpusLoader(stream(10), L, 2).load_state_dict({"rows": 3})


def test_one_token_more_or_less_makes_another_corpus() -> None:
    tokens = stream(10)
    name = CorpusLoader(tokens, L, 1).corpus
    assert CorpusLoader(tokens.long(), 2 * L, 3).corpus == name  # whatever the dtype and the rows
    assert CorpusLoader(tokens[:-1], L, 1).corpus != name
    changed = tokens.clone()
    changed[-1] += 1
    assert CorpusLoader(changed, L, 1).corpus != name


@pytest.mark.parametrize("length", [L // 2, L, L + 3, 2 * L, 5 * L])
def test_another_row_length_goes_on_with_the_next_token(length: int) -> None:
    tokens = stream(21)
    short = CorpusLoader(tokens, L, 3)
    steps([short], 1, 2)
    long = CorpusLoader(tokens, length, 2)
    long.load_state_dict(short.state_dict())
    seen = [row for batch, _ in islice(long, 4) for row in batch["input"].tolist()]
    starts, token = [], 6 * L
    for _ in range(8):
        token = token if token + length + 1 <= len(tokens) else 0  # the tokens left are no row: the next pass begins
        starts.append(token)
        token += length
    assert seen == [list(range(start, start + length)) for start in starts]


def test_another_row_length_late_in_a_pass_begins_the_next_one() -> None:
    short = CorpusLoader(stream(10), L, 9)
    next(iter(short))
    long = CorpusLoader(stream(10), 2 * L, 1)
    long.load_state_dict(short.state_dict())
    assert next(iter(long))[0]["input"][0].tolist() == list(range(2 * L))
    assert long.state_dict()["passes"] == 1


def test_a_tokenizer_is_known_by_its_vocabulary() -> None:
    class Vocabulary(CodePoints):
        def __init__(self, *names: str) -> None:
            self.names = names

        def get_vocab(self) -> dict[str, int]:
            return {name: i for i, name in enumerate(self.names)}

    assert tokenizer_name(ByteTokenizer()) == "bytes"
    assert tokenizer_name(CodePoints()) == "CodePoints"
    assert tokenizer_name(Vocabulary("a", "b")) == tokenizer_name(Vocabulary("a", "b"))
    assert tokenizer_name(Vocabulary("a", "b")) != tokenizer_name(Vocabulary("b", "a"))


@pytest.mark.parametrize("left_over", [0, 1, L - 1])
def test_epochs_wrap_around_at_the_last_whole_row(left_over: int) -> None:
    loader = CorpusLoader(stream(5, left_over), L, 2)
    assert loader.num_rows == 5
    assert steps([loader], 1, 6) == [[0, 1], [2, 3], [4, 0], [1, 2], [3, 4], [0, 1]]


def test_a_batch_may_hold_more_than_an_epoch() -> None:
    assert steps(ranks(stream(3), 2, 2), 1, 2) == [[0, 1, 2, 0], [1, 2, 0, 1]]


def test_training_goes_on_where_it_stopped() -> None:
    loader = CorpusLoader(stream(10), L, 2)
    assert steps([loader], 1, 2) == [[0, 1], [2, 3]]
    assert steps([loader], 1, 2) == [[4, 5], [6, 7]]


def test_a_fixed_number_of_validation_steps_sees_the_same_rows_each_time() -> None:
    loaders = ranks(stream(5), 2, 1, restart=True)
    for _ in range(3):
        assert steps(loaders, 1, 4) == [[0, 1], [2, 3], [4, 0], [1, 2]]
    for loader in loaders:
        loader.load_state_dict(state_at(loader, 3))
    assert steps(loaders, 1, 1) == [[0, 1]]


def test_restarting_iterators_do_not_disturb_one_another() -> None:
    loader = CorpusLoader(stream(6), L, 2, infinite=False)
    pairs = [(int(a["input"][0, 0]), int(b["input"][0, 0])) for (a, _), (b, _) in zip(loader, loader, strict=True)]
    assert pairs == [(0, 0), (2 * L, 2 * L), (4 * L, 4 * L)]


@pytest.mark.parametrize(("degree", "local"), [(1, 1), (1, 4), (2, 2), (4, 1), (3, 2), (1, 11)])
def test_one_pass_over_validation_gives_every_rank_equally_many_batches(degree: int, local: int) -> None:
    rows = 11
    for _ in range(2):
        loaders = ranks(stream(rows), degree, local, infinite=False)
        for _ in range(2):
            batches = [list(loader) for loader in loaders]
            count = rows // (degree * local)
            assert [len(b) for b in batches] == [count] * degree
            seen = {int(row[0]) // L for b in batches for inputs, _ in b for row in inputs["input"]}
            assert seen == set(range(count * degree * local))


def test_a_single_pass_can_be_interrupted_too() -> None:
    loader = CorpusLoader(stream(7), L, 2, infinite=False, restart=False)
    assert steps([loader], 1, 1) == [[0, 1]]
    assert [int(batch["input"][0, 0]) // L for batch, _ in loader] == [2, 4]
    assert list(loader) == []


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16, torch.int32, torch.int64], ids=str)
def test_any_integers_are_a_stream(dtype: torch.dtype) -> None:
    assert steps([CorpusLoader(stream(5).to(dtype), L, 2)], 1, 2) == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"seq_len": 0}, ValueError, "seq_len must be at least 1, got 0"),
        ({"seq_len": 8.0}, TypeError, r"seq_len must be an int, got 8\.0 \(float\)"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"batch_size": True}, TypeError, r"batch_size must be an int, got True \(bool\)"),
        ({"dp_world_size": 0}, ValueError, "dp_world_size must be at least 1, got 0"),
        ({"dp_rank": -1}, ValueError, "dp_rank must be at least 0, got -1"),
        ({"dp_rank": 2}, ValueError, r"dp_rank must be less than dp_world_size \(2\), got 2"),
        ({"tokens": stream(5).float()}, TypeError, r"tokens must be a tensor of integers, got torch\.float32"),
        ({"tokens": stream(5).bool()}, TypeError, r"tokens must be a tensor of integers, got torch\.bool"),
        ({"tokens": [1, 2, 3]}, TypeError, r"tokens must be a tensor of integers, got <class 'list'>"),
        ({"tokens": stream(5)[None]}, ValueError, r"tokens must have one dimension, got shape \(1, 44\)"),
        ({"tokens": stream(1)[:L]}, ValueError, r"tokens must hold a sequence, seq_len \+ 1 = 9, got 8"),
        ({"tokens": stream(5)[:0]}, ValueError, r"tokens must hold a sequence, seq_len \+ 1 = 9, got 0"),
        ({"batch_size": 3, "infinite": False}, ValueError, r"batch_size \* dp_world_size = 6 rows .* 8, got 5"),
    ],
)
def test_bad_arguments_are_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"tokens": stream(5), "seq_len": L, "batch_size": 2, "dp_rank": 0, "dp_world_size": 2}
    with pytest.raises(error, match=message):
        CorpusLoader(**(arguments | change))
