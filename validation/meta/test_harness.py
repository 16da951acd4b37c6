"""The harness itself: what its options promise, and that it tells a right implementation from wrong ones.

Nearly every test runs the suite in a process of its own: on the example of docs/validate-your-own.md, or a broken one.
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

from docs.examples.my_nsa import my_nsa
from nsa.config import NSAConfig
from validation import plugin, reports, seeds
from validation.adapters import sdpa
from validation.cases import BY_ID, config, draw, draw_cotangent, fitted
from validation.faults.trial import LEFT_OUT
from validation.implementations import Implementation, Sizes, load

ROOT = Path(__file__).parents[2]
RIGHT = "docs.examples.my_nsa:my_nsa"
CONFORMANCE = "validation/unit/conformance"
STAGES = f"{CONFORMANCE}/test_stages.py"
SEMANTICS = f"{CONFORMANCE}/test_semantics.py"
WINDOW = f"{SEMANTICS}::test_a_window_of_one_is_the_value_itself"


def one_more_token() -> Implementation:
    """A window of `w + 1`."""

    def window(q: Tensor, k: Tensor, v: Tensor, config: NSAConfig, **rest: Any) -> Tensor:
        return my_nsa.sliding_window_attention(q, k, v, replace(config, window_size=config.window_size + 1), **rest)

    return replace(my_nsa, name="wrong", sliding_window_attention=window)


def crashes() -> Implementation:
    """Ends its process in the middle of a call."""

    def window(q: Tensor, *rest: Any, **options: Any) -> Tensor:
        if q.shape[1] == BY_ID["window_1"].num_queries:
            os._exit(139)
        return my_nsa.sliding_window_attention(q, *rest, **options)

    return replace(my_nsa, name="wrong", sliding_window_attention=window)


def packs() -> Implementation:
    """What it declares and has not."""
    return replace(my_nsa, name="wrong", packed=True)


def not_finite() -> Implementation:
    """Gives NaN in place of every output."""

    def nsa_attention(*arguments: Any, **options: Any) -> Tensor:
        return torch.nan * my_nsa.nsa_attention(*arguments, **options)

    return replace(my_nsa, name="wrong", nsa_attention=nsa_attention)


def no_stage() -> Implementation:
    """Declares every capability and has no stage."""
    return Implementation("no_stage")


def not_made() -> Implementation:
    raise RuntimeError("it cannot be made here")


def run(*arguments: str, impl: str = RIGHT) -> tuple[int, str]:
    """The exit status and the output of the suite on an implementation."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--impl={impl}", *arguments]
    # What this shows does not depend on a GPU, and each process would take seconds to start one.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def own(name: str) -> str:
    return f"validation.meta.test_harness:{name}"


# 1. Implementations and what they declare.


def test_the_example_passes_and_is_skipped_for_what_it_lacks(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    status, output = run(STAGES, "-k", "mean or paper or last_queries", f"--junitxml={report}")
    assert status == 0, output
    assert "my_nsa lacks mlp compression" in output
    assert "my_nsa: passed (" in output
    rows = [line.split() for line in output.splitlines()]
    assert ["my_nsa"] in rows
    assert ["packed", "sequences", "no"] in rows
    assert ["compression", "mean"] in rows
    properties = ElementTree.parse(report).getroot().findall("./testsuite/properties/property")
    counts = {x.attrib["name"]: x.attrib["value"] for x in properties}
    assert int(counts["skipped: my_nsa lacks packed sequences"]) > 0


def test_a_stage_that_is_not_there_is_skipped_everywhere() -> None:
    status, output = run(CONFORMANCE, impl=own("no_stage"))
    assert status == 1, output
    assert "no_stage: not tested (" in output


def test_whoever_ends_the_process_has_failed() -> None:
    chosen = "test_matches and sliding and float32 and (small or window_1)"
    status, output = run(STAGES, "-k", chosen, "-n", "1", impl=own("crashes"))
    assert status == 1
    assert "wrong: failed 1" in output


@pytest.mark.parametrize(
    ("name", "selection", "test"),
    [
        ("one_more_token", (WINDOW,), "test_a_window_of_one_is_the_value_itself[wrong]"),
        ("packs", (STAGES, "-k", "pooled_packed and float64 and sliding"), "pooled_packed"),
    ],
)
def test_a_wrong_one_fails(name: str, selection: tuple[str, ...], test: str) -> None:
    status, output = run(*selection, impl=own(name))
    assert status == 1, output
    assert any(line.startswith("FAILED") and test in line for line in output.splitlines())
    assert "wrong: failed " in output


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (
            "nobody",
            ValueError,
            r"name must be one of \['attention_gym', 'eager', .*\] or package.module:object, got 'nobody'",
        ),
        ("nowhere:thing", ImportError, "No module named 'nowhere'"),
        ("validation.implementations:STAGES", TypeError, "must be an Implementation or make one, got tuple"),
    ],
)
def test_an_unknown_implementation_is_refused(name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load(name)


@pytest.mark.parametrize(
    ("subject", "message"),
    [
        ("nobody", "ValueError: name must be one of"),
        (own("not_made"), "RuntimeError: it cannot be made here"),
    ],
)
def test_an_implementation_that_cannot_be_loaded_is_a_usage_error(subject: str, message: str) -> None:
    status, output = run(WINDOW, impl=subject)
    assert status == pytest.ExitCode.USAGE_ERROR, output
    assert f"--impl: {message}" in output


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"devices": {"gpu"}}, r"devices of x must be of \['cpu', 'cuda'\], got \['gpu'\]"),
        ({"invariant": {"gradient"}}, "invariant of x must be of"),
        ({"compressions": {"average"}}, "compressions of x must be of"),
        ({"dtypes": frozenset()}, "dtypes of x must hold one at least"),
    ],
)
def test_a_capability_that_no_test_knows_is_refused(declared: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Implementation("x", **declared)


@pytest.mark.parametrize(
    ("peer", "module", "package"), [("fla", "fla", "fla-core"), ("attention_gym", "attn_gym", "attn_gym")]
)
def test_a_missing_peer_names_the_extra(monkeypatch: pytest.MonkeyPatch, peer: str, module: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"validation.adapters.{peer}", raising=False)
    message = rf"^{package} is missing, a package of the extra `peers`: pip install .*\[peers\]"
    with pytest.raises(ModuleNotFoundError, match=message):
        load(peer)


@pytest.mark.parametrize("peer", ["flex", "sdpa"])
def test_peers_that_pytorch_has_keep_to_the_rules(peer: str) -> None:
    refusal = f"{CONFORMANCE}/test_gradcheck.py::test_second_derivatives_are_not_wrong"
    status, output = run(f"{CONFORMANCE}/test_rules.py", refusal, impl=peer)
    assert status == 0, output
    assert f"{peer}: passed" in output


def test_cudnn_is_called_as_its_operator_declares() -> None:
    """Without a GPU: tensors without numbers go through the same call."""
    q, k, v = (torch.empty(1, 5, heads, 16, dtype=torch.float16, device="meta") for heads in (4, 2, 2))
    stages, settings = sdpa.sdpa(), config((4, 2, 8), 3, 3)
    window = stages.function("sliding_window_attention")(q, k, v, settings)
    out, lse = stages.function("compressed_attention")(q, k, v, settings, num_keys=12)
    assert window.shape == out.shape == (1, 5, 4, 16)
    assert lse.shape == (1, 5, 4)


@pytest.mark.parametrize(
    ("declared", "case", "missing"),
    [
        ({"packed": False}, "packed", "packed sequences"),
        ({"partial_queries": False}, "last_queries", "fewer queries than keys"),
        ({"value_head_dim": False}, "wide_values", "Dv != Dk"),
        ({"groups": Sizes(16, powers_of_two=True)}, "group_3", "groups of 3"),
        ({"compressions": frozenset({"mean"})}, "linear", "linear compression"),
        ({"any_indices": False}, "scrambled", "indices in any order"),
        ({"empty_queries": False}, "scrambled", "queries without a block"),
        ({"branches_off": False}, "no_window", "branches that are off"),
        ({"branches_off": False}, "nothing_selected", "branches that are off"),
        ({"lengths": Sizes(1)}, "packed", "sequences of 0 tokens"),
        ({"head_dims": Sizes(1, 4)}, "small", "a head dim of 8"),
        ({"config": lambda config: False}, "small", "blocks (4, 2, 8), 4 selected"),
    ],
)
def test_a_capability_not_declared_is_found_missing(declared: dict[str, Any], case: str, missing: str) -> None:
    whole, stages = Implementation("all", compress=my_nsa.compress), ("compress",)
    assert whole.lacks(BY_ID[case], stages) is None
    less = replace(whole, **declared)
    assert less.lacks(fitted(less, BY_ID[case], stages=stages), stages) == missing


def test_compressions_matter_to_compression_alone() -> None:
    means = replace(my_nsa, compressions=frozenset({"mean"}))
    assert means.lacks(BY_ID["linear"], ("compress",)) == "linear compression"
    assert means.lacks(BY_ID["linear"], ("compressed_attention", "select_blocks")) is None


# 2. Expected failures.


def test_expected_failures_are_strict(tmp_path: Path) -> None:
    file = tmp_path / "xfails"
    file.write_text(f"# known\n\n{WINDOW}[wrong] # one token too many\n")
    status, output = run(WINDOW, f"--xfails-file={file}", impl=own("one_more_token"))
    assert status == 0, output
    assert "1 xfailed" in output
    file.write_text(f"{WINDOW}[my_nsa] # it does not fail\n")
    status, output = run(WINDOW, f"--xfails-file={file}")
    assert status == 1, output
    assert "XPASS(strict)" in output


@pytest.mark.parametrize("processes", ["0", "1"])
def test_an_expected_failure_of_no_test_is_a_usage_error(tmp_path: Path, processes: str) -> None:
    file = tmp_path / "xfails"
    file.write_text("nothing::like_this # gone")
    status, output = run(WINDOW, f"--xfails-file={file}", "-n", processes)
    assert status == pytest.ExitCode.USAGE_ERROR, output
    assert "no test of this run has the id\n  nothing::like_this" in output
    assert "no test was executed" not in output


@pytest.mark.parametrize(
    ("text", "message"), [("a::b", ":1: a::b needs a reason"), ("a::b # c\na::b # d", ":2: a::b is there twice")]
)
def test_an_unusable_file_of_expected_failures_is_a_usage_error(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "xfails"
    file.write_text(text)
    with pytest.raises(pytest.UsageError, match=message):
        plugin._read_xfails(file)


# 3. Gates.


def test_gpus_that_are_required_and_not_there_fail() -> None:
    status, output = run(WINDOW, "--require-gpus=99")
    assert status == pytest.ExitCode.USAGE_ERROR, output
    assert "--require-gpus=99: " in output


@pytest.mark.parametrize(("required", "outcome"), [(0, pytest.skip.Exception), (1, pytest.fail.Exception)])
def test_a_gpu_that_is_not_there_skips_unless_required(
    monkeypatch: pytest.MonkeyPatch, required: int, outcome: type[BaseException]
) -> None:
    monkeypatch.setattr(plugin, "GPUS", [])
    config: Any = SimpleNamespace(option=SimpleNamespace(require_gpus=required))
    with pytest.raises(outcome, match="missing hardware: 1 GPU of 80 GiB, 0 found"):
        plugin._need_gpus(config, 1, gib=80)


def test_a_run_that_executed_nothing_fails() -> None:
    status, output = run(STAGES, "-k", "test_matches and packed_paper")
    assert status == 1, output
    assert "no test was executed" in output
    assert "my_nsa: not tested" in output


# 4. Reports at the end of a run.

GROWTH = "validation/unit/conformance/test_precision.py::test_error_grows_no_faster_than_the_policy_lets_it"


@pytest.mark.parametrize("processes", ["0", "1"])
def test_a_wrong_one_is_drawn_and_blamed_on_no_other_test(tmp_path: Path, processes: str) -> None:
    # The test of pictures is the last to run: at its teardown a picture would be made.
    tests = (GROWTH, "validation/meta/test_precision_plot.py")
    status, output = run(*tests, f"--out={tmp_path}", "-n", processes, impl=own("not_finite"))
    assert status == 1, output
    assert "ERROR" not in output
    assert "could not be made" not in output
    assert "wrong: failed 3 " in output
    assert (tmp_path / "unit" / "precision.png").exists()


def test_a_picture_that_cannot_be_made_says_so_and_changes_no_result(tmp_path: Path) -> None:
    (tmp_path / "out").touch()  # where a folder is needed
    status, output = run(GROWTH, "-k", "head_dim", f"--out={tmp_path / 'out'}")
    assert status == 0, output
    assert f"the picture {tmp_path / 'out' / 'unit' / 'precision.png'} could not be made: " in output


@pytest.mark.parametrize("error", [ValueError("no\ndata"), OSError("disk full"), UserWarning("odd")])
def test_a_report_ends_with_its_own_error(error: Exception) -> None:
    said: list[str] = []
    with reports.attempt("the table", said.append):
        raise error
    assert said == [f"the table could not be made: {type(error).__name__}: {' '.join(str(error).split())}"]


def test_a_report_does_not_hold_up_an_interruption() -> None:
    with pytest.raises(KeyboardInterrupt), reports.attempt("the table", print):
        raise KeyboardInterrupt


def test_the_command_of_a_run_is_what_a_shell_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tasks.py", "--tasks", "copy"])
    assert reports.command_line("a.tasks") == "python -m a.tasks --tasks copy"
    assert reports.command_line("a.tasks", []) == "python -m a.tasks"
    given = ["--variants", "oracle's blocks"]
    assert shlex.split(reports.command_line("a.tasks", given)) == ["python", "-m", "a.tasks", *given]


@pytest.mark.parametrize(("kept", "freed"), [(1 << 30, 0), (14 << 30, 1)])
def test_a_process_keeps_little_of_a_gpu_for_its_next_test(
    kept: int, freed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[None] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: kept)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append(None))
    plugin.give_back_memory()
    assert len(calls) == freed


# 5. Order, seeds and the report.


def reported(file: Path) -> list[tuple[str, str]]:
    """Names and seeds of the tests in a JUnit report, in its order; every one has a duration."""
    cases = ElementTree.parse(file).getroot().findall(".//testcase")
    assert all(float(case.attrib["time"]) >= 0 for case in cases)
    seeds = [case.findall(".//property[@name='seed']")[0] for case in cases]
    return [(case.attrib["name"], seed.attrib["value"]) for case, seed in zip(cases, seeds, strict=True)]


def test_shuffling_changes_order_and_numbers_and_says_so(tmp_path: Path) -> None:
    runs = []
    for number, shuffle in enumerate((1, 1, 2)):
        report = tmp_path / f"{number}.xml"
        status, output = run(SEMANTICS, "-k", "position or window", f"--shuffle-seed={shuffle}", f"--junitxml={report}")
        assert status == 0, output
        assert f'name="shuffle-seed" value="{shuffle}"' in report.read_text()
        runs.append(reported(report))
    assert runs[0] == runs[1]
    (names, seeds), (other_names, other_seeds) = (zip(*chosen, strict=True) for chosen in runs[1:])
    assert names != other_names
    assert sorted(names) == sorted(other_names)
    assert not set(seeds) & set(other_seeds)


def test_a_variation_draws_other_inputs_and_cotangents(monkeypatch: pytest.MonkeyPatch) -> None:
    case, drawn = BY_ID["small"], []
    for variation in (None, 1, 1):
        monkeypatch.setattr(seeds, "variation", variation)
        x = draw(case)
        drawn.append({**x, "cotangent": draw_cotangent(case, x["q"], torch.float64)})
    first, second, again = drawn
    assert [name for name, x in second.items() if torch.equal(x, first[name])] == []
    assert [name for name, x in second.items() if not torch.equal(x, again[name])] == []


def test_a_cotangent_is_no_input_once_more() -> None:
    """Otherwise whoever confuses the two would be right."""
    x = draw(BY_ID["small"])
    cotangent = draw_cotangent(BY_ID["small"], x["q"], torch.float64)
    assert [name for name, value in x.items() if torch.equal(value, cotangent)] == []


def test_a_seed_is_of_the_test_alone(tmp_path: Path) -> None:
    seeds = []
    for number, selection in enumerate(([WINDOW], [SEMANTICS, "-k", "window"])):
        report = tmp_path / f"{number}.xml"
        status, output = run(*selection, f"--junitxml={report}")
        assert status == 0, output
        seeds.append(dict(reported(report)))
    name = f"{WINDOW.partition('::')[2]}[my_nsa]"
    assert len(seeds[1]) > len(seeds[0])
    assert seeds[1][name] == seeds[0][name]
    assert len(set(seeds[1].values())) == len(seeds[1])


# 6. Places that cannot be written to.

TAKEN = ("out", "outputs", ".benchmarks", ".pytest_cache", ".hypothesis", ".ruff_cache", ".mypy_cache", ".coverage")
"""Names in a checkout under which runs would write."""
OF_USERS = ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "TRITON_HOME")
"""Variables that say where the rest goes; what is more special than they are is not set."""
CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "MPLCONFIGDIR", "COVERAGE_FILE", "PYTEST_ADDOPTS", "OUT")


Locked = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Locked]:
    """A function that runs a command in a checkout, at a path with a space, from a home: none can be written to.

    Permissions do not hold root up. What it cannot do either is to make a folder where a file is.
    """
    checkout = tmp_path_factory.mktemp("with space") / "nsa checkout"
    shutil.copytree(ROOT, checkout, ignore=LEFT_OUT)
    for name in TAKEN:
        (checkout / name).touch()
    folders = [folder for folder in checkout.rglob("*") if folder.is_dir()]
    for folder in (checkout, *folders):
        folder.chmod(0o555)
    inherited = {name: value for name, value in os.environ.items() if name not in CACHES}
    places = dict.fromkeys(OF_USERS, str(checkout / "Makefile" / "home"))

    def run(*command: str) -> tuple[int, str]:
        environment = {**inherited, **places, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ""}
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    yield run
    for folder in (checkout, *folders):
        folder.chmod(0o755)  # to be removed


def test_unit_tests_need_no_place_to_write_to(locked: Locked) -> None:
    options = "-k 'error_grows and eager and head_dim and float32'"
    status, output = locked("make", "unit", "VENV=", f"PYTHON={sys.executable}", "JOBS=0", f"PYTEST_ARGS={options}")
    assert status == 0, output
    assert "precision.png could not be made: " in output
    assert "eager: passed (1 passed)" in output


def test_training_needs_no_place_to_write_to_but_its_own(locked: Locked, tmp_path: Path) -> None:
    options = ("--model.flavor=debug", "--training.steps=1", "--training.seq_len=64", "--validation.no-enable")
    status, output = locked(sys.executable, "-m", "nsa.train", *options, f"--job.dump_folder={tmp_path / 'a run'}")
    assert status == 0, output
    assert (tmp_path / "a run" / "metrics.jsonl").exists()


def test_what_must_write_says_where_it_cannot(locked: Locked) -> None:
    status, output = locked("make", "train", "VENV=", f"PYTHON={sys.executable}")
    assert status != 0
    assert "--folder out/train cannot be made (Not a directory): name another, as in make train OUT=FOLDER" in output
