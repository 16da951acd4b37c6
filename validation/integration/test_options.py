"""Options of a job, on the command line and in a TOML file: taken as they are, or refused in one line before work."""

import io
import re
import subprocess
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchtitan.components.optimizer import build_optimizers
from torchtitan.config import ConfigManager
from torchtitan.config.job_config import Optimizer
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.model_converter import _registry_model_converter_cls

from nsa.config import NSAConfig
from nsa.titan import job_checks
from nsa.titan.job_checks import check_job
from nsa.titan.parallelize import FLOAT8
from nsa.titan.refusals import JobError
from nsa.titan.train_spec import JobConfig, NSAOptions
from nsa.train import complete, parse
from validation import runs
from validation.integration import ranks

on_cpus = pytest.mark.skipif(torch.accelerator.is_available(), reason="is refused without an accelerator only")


Job = Callable[..., JobConfig]


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """Parses and checks a job as each of several processes does, and returns its configuration."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    for name in ("NGPU", "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)

    def checked(*options: str, toml: str | None = None, processes: int = 1) -> JobConfig:
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        if toml is not None:
            (tmp_path / "job.toml").write_text(toml)
            options = (*options, "--job.config_file=job.toml")
        job_config = parse(options)
        check_job(job_config)
        return job_config

    return checked


def refused(job: Job, message: str, *options: str, **arguments: Any) -> str:
    """Fails unless the job is refused by this message, a pattern."""
    with pytest.raises(JobError, match=message) as caught:
        job(*options, **arguments)
    return str(caught.value)


# 1. Options that no job can have: (options, message), for one process.

REFUSED = [
    ("--nsa.windw_size=3", "^Unrecognized options: --nsa.windw_size=3; similar: .*--nsa.window-size"),
    ("--nsa.window_size=wide", "--nsa.window-size: no type matching .* could be instantiated from .*wide"),
    ("--nsa.window_size=-1", "^nsa.window_size must be at least 0, got -1"),
    (f"--nsa.window_size={2**70}", f"^nsa.window_size must be at most 2147483647, got {2**70}"),
    ("--nsa.compress_stride=12", r"^nsa.compress_block_size must be a multiple of compress_stride \(12\), got 16"),
    ("--nsa.num_selected_blocks=2", "^nsa.num_selected_blocks must be at least num_initial_blocks"),
    ("--nsa.compression=max", "invalid choice 'max' for argument '--nsa.compression'"),
    ("--nsa.backend=trtion", "^nsa.backend must be one of .'auto', 'eager', 'triton'., got 'trtion'"),
    ("--nsa.attn_mask_type=full", "^nsa.attn_mask_type must be one of .'causal', 'block_causal'., got 'full'"),
    ("--nsa.attention=dense,sparse", "^nsa.attention must be a pattern of .'dense', 'nsa'., got 'dense,sparse'"),
    ("--training.steps=-1", "^training.steps must be at least 0, got -1"),
    ("--training.steps", "Missing value for argument '--training.steps'"),
    ("--training.local_batch_size=0", "^training.local_batch_size must be at least 1, got 0"),
    ("--training.seq_len=0", "^training.seq_len must be at least 1, got 0"),
    ("--training.global_batch_size=0", "^training.global_batch_size must be at least 1, or -1 .*, got 0"),
    (
        "--training.global_batch_size=3 --training.local_batch_size=2",
        r"^training.global_batch_size must be a multiple of training.local_batch_size .* \(2\), or -1, got 3",
    ),
    ("--training.max_norm=0", "^training.max_norm must be above 0, got 0.0"),
    ("--training.max_norm=-1", "^training.max_norm must be above 0, got -1.0"),
    ("--training.max_norm=nan", "^training.max_norm must be above 0, got nan"),
    ("--training.gc_freq=0", "^training.gc_freq must be at least 1, got 0"),
    ("--training.dtype=float16", "invalid choice 'float16' for argument '--training.dtype'"),
    ("--training.dataset=nope", "^training.dataset must be one of .*'python_stdlib'.*, got 'nope'"),
    ("--training.dataset_path=/nowhere", "^training.dataset_path must be a folder, got '/nowhere'"),
    ("--training.enable_cpu_offload", "^training.enable_cpu_offload must be false without FSDP"),
    ("--validation.dataset=nope", "^validation.dataset must be one of .*'python_stdlib_validation'.*, got 'nope'"),
    ("--validation.freq=0", "^validation.freq must be at least 1, got 0"),
    ("--validation.steps=0", "^validation.steps must be positive or -1"),
    ("--validation.seq_len=0", "^validation.seq_len must be at least 1, got 0"),
    ("--validation.local_batch_size=0", "^validation.local_batch_size must be at least 1, got 0"),
    ("--metrics.log_freq=0", "^metrics.log_freq must be at least 1, got 0"),
    ("--optimizer.name=SGD", "^optimizer.name must be one of .'Adam', 'AdamW'., got 'SGD'"),
    ("--optimizer.lr=-1", "^optimizer.lr must be at least 0 and finite, got -1.0"),
    ("--optimizer.lr=nan", "^optimizer.lr must be at least 0 and finite, got nan"),
    ("--optimizer.beta2=1", "^optimizer.beta2 must be at least 0 and below 1, got 1.0"),
    ("--lr_scheduler.warmup_steps=-1", "^lr_scheduler.warmup_steps must be at least 0, got -1"),
    ("--lr_scheduler.total_steps=2 --training.steps=3", r"^lr_scheduler.total_steps must be at least .* \(3\), got 2"),
    ("--lr_scheduler.decay_ratio=2", "^lr_scheduler.decay_ratio must be from 0 to 1, got 2.0"),
    ("--lr_scheduler.min_lr_factor=-1", "^lr_scheduler.min_lr_factor must be from 0 to 1, got -1.0"),
    ("--checkpoint.interval=0", "^checkpoint.interval must be at least 1, got 0"),
    ("--checkpoint.keep_latest_k=1", "^checkpoint.keep_latest_k must be at least 2, or 0 for all, got 1"),
    ("--checkpoint.exclude_from_loading=optimiser", "^checkpoint.exclude_from_loading must be among .*'optimizer'"),
    (
        "--checkpoint.last_save_in_hf --checkpoint.no-last-save-model-only",
        "^checkpoint.last_save_model_only must be true for checkpoint.last_save_in_hf, which is of the model alone",
    ),
    (
        "--checkpoint.initial_load_in_hf --checkpoint.no-initial-load-model-only",
        "^checkpoint.initial_load_model_only must be true for checkpoint.initial_load_in_hf",
    ),
    ("--checkpoint.initial_load_in_hf_quantized", "^checkpoint.initial_load_in_hf_quantized must be false, got True"),
    ("--nsa.initial_gates=1,2", "^nsa.initial_gates must be three numbers from 0 to 1 .* got '1,2'"),
    (
        "--checkpoint.create_seed_checkpoint --checkpoint.no-enable",
        "^checkpoint.enable must be true for checkpoint.create_seed_checkpoint, got False",
    ),
    (
        "--activation_checkpoint.mode=selective --activation_checkpoint.selective_ac_option=ops",
        "^activation_checkpoint.selective_ac_option must be \"op\" or a number of at least 1, got 'ops'",
    ),
    (
        "--activation_checkpoint.mode=memory_budget",
        '^activation_checkpoint.mode must be another than "memory_budget" where the model is not compiled',
    ),
    ("--activation_checkpoint.memory_budget=2", "^activation_checkpoint.memory_budget must be from 0 to 1, got 2.0"),
    ("--activation_checkpoint.determinism_check=no", "^activation_checkpoint.determinism_check must be one of"),
    ("--compile.components=modle", "^compile.components must be among .'model', 'loss'., got 'modle'"),
    ("--compile.enable --compile.backend=induktor", "^compile.backend must be a backend of torch.compile"),
    ("--model.name=lama", '^model.name must be "nsa", or a model of TorchTitan'),
    ("--model.name=llama3", "^model.flavor must be one of .*'8B'.*, got 'debug'"),
    (
        "--model.name=llama3 --model.flavor=8B",
        "^model.hf_assets_path must be a folder with the files of a tokenizer for model.name 'llama3'",
    ),
    ("--model.flavor=7b", "^model.flavor must be one of .*'debug'.*, got '7b'"),
    ("--model.converters=float8", "^model.converters must be among .*'quantize.linear.float8'.*, got 'float8'"),
    ("--model.hf_assets_path=/nowhere", "^model.hf_assets_path must be a folder .* bytes as tokens, got '/nowhere'"),
    ("--model.hf_assets_path=.", "^model.hf_assets_path must be a folder .*, got '.': No supported tokenizer"),
    ("--profiling.profile_freq=0", "^profiling.profile_freq must be at least 1, got 0"),
    ("--parallelism.tensor_parallel_degree=0", "^parallelism.tensor_parallel_degree must be at least 1, got 0"),
    ("--parallelism.data_parallel_shard_degree=0", "^parallelism.data_parallel_shard_degree must be at least 1, or -1"),
    ("--parallelism.context_parallel_degree=2", r"^parallelism.context_parallel_degree must divide .* \(1\), got 2"),
    ("--parallelism.context_parallel_load_balancer=", "context_parallel_load_balancer cannot be an empty string"),
    ("--parallelism.pipeline_parallel_microbatch_size=0", "^parallelism.pipeline_parallel_microbatch_size must be"),
    ("--fault_tolerance.enable", "^fault_tolerance.enable must be false"),
    ("--memory_estimation.enable", "^memory_estimation.enable must be false"),
    ("--comm.mode=fake_backend", "^NGPU must be a number for comm.mode fake_backend, got ''"),
    ("--comm.train_timeout_seconds=0", "^comm.train_timeout_seconds must be at least 1, got 0"),
    ("--debug.seed=-1", "^debug.seed must be at least 0 and below 2\\*\\*63, got -1"),
    ("--job.config_file=nowhere.toml", "^job.config_file must be a TOML file, got 'nowhere.toml': .*No such file"),
    ("--job.custom_config_module=nowhere", "^job.custom_config_module must be a module that has a JobConfig"),
    ("--job.custom_config_module=os", "^job.custom_config_module must be a module that has a JobConfig"),
    ("--experimental.custom_import=nowhere", "^experimental.custom_import must be a module, got 'nowhere'"),
    ("--job.dump_folder=/dev/null", "^job.dump_folder must be a folder that can be written to, got '/dev/null'"),
    ("everything", "^Unrecognized options: everything"),
]


@pytest.mark.smoke
@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[options for options, _ in REFUSED])
def test_a_wrong_option_is_refused_by_name(options: str, message: str, job: Job) -> None:
    text = refused(job, message, *options.split(" "))
    assert len(text) < 500, "more than anyone reads"


@pytest.mark.smoke
@on_cpus
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--profiling.enable_profiling", "^profiling.enable_profiling must be false without an accelerator"),
        (
            "--profiling.enable_memory_snapshot",
            "^profiling.enable_memory_snapshot must be false without an accelerator",
        ),
        (f"--model.converters={FLOAT8}", "^model.converters must be such as this machine has, got .*float8"),
    ],
)
def test_what_needs_an_accelerator_is_refused_without(option: str, message: str, job: Job) -> None:
    refused(job, message, option)


@pytest.mark.smoke
@on_cpus
def test_triton_is_refused_where_it_cannot_run(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nsa.kernels.INTERPRETED", False)
    refused(
        job,
        '^nsa.backend must be "auto" or "eager" where Triton lacks support, got "triton" and tensors on',
        "--nsa.backend=triton",
    )
    job("--nsa.backend=triton", "--nsa.attention=dense")


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("processes", "options", "message"),
    [
        (4, "tensor=3", r"parallelism.tensor_parallel_degree must divide the number of processes \(4\), got 3"),
        (
            4,
            "tensor=2 data_parallel_shard=3",
            r"parallelism.data_parallel_shard_degree \* parallelism.tensor_parallel_degree must be .* \(4\), got 6",
        ),
        (4, "data_parallel_shard=1", r"parallelism.data_parallel_shard_degree must be the number .* \(4\), got 1"),
        (2, "data_parallel_replicate=2", "parallelism.data_parallel_shard_degree must be at least 2 beside"),
    ],
)
def test_degrees_that_do_not_make_the_number_of_processes_are_refused(
    processes: int, options: str, message: str, job: Job
) -> None:
    degrees = (option.replace("tensor=", "tensor_parallel=").replace("=", "_degree=") for option in options.split(" "))
    refused(job, f"^{message}", *(f"--parallelism.{degree}" for degree in degrees), processes=processes)


@pytest.mark.smoke
def test_a_seed_checkpoint_is_refused_over_several_processes(job: Job) -> None:
    message = "^checkpoint.create_seed_checkpoint must be false over 2 processes, got True"
    refused(job, message, "--checkpoint.create_seed_checkpoint", processes=2)


def test_a_corpus_too_short_for_a_row_is_refused_by_the_section_it_is_for(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"error: training.dataset: tokens must hold a sequence") as failure:
        runs.train(("--training.seq_len=1000000000",), tmp_path)
    assert "Traceback" not in str(failure.value)


# 2. What only a TOML file can say.

TOML = [
    ('[nsa]\nwindow_size = "3"', "^nsa.window_size must be an int, got '3'"),
    ("[nsa]\nwindow_size = 3.5", "^nsa.window_size must be an int, got 3.5"),
    ("[nsa]\nwindow_size = true", "^nsa.window_size must be an int, got True"),
    ("[nsa]\nshared_kv = 1", "^nsa.shared_kv must be true or false, got 1"),
    ('[nsa]\nbackend = "trtion"', "^nsa.backend must be one of .'auto', 'eager', 'triton'., got 'trtion'"),
    ('[nsa]\nattn_mask_type = "full"', "^nsa.attn_mask_type must be one of .'causal', 'block_causal'., got 'full'"),
    ('[nsa]\ncompression = "max"', "^nsa.compression must be one of .'mlp', 'linear', 'mean'., got 'max'"),
    ('[nsa]\nattention = ["dense", "sparse"]', "^nsa.attention must be a pattern of .*, got 'dense,sparse'"),
    ("[nsa]\nattention = [1]", "^nsa.attention must be a string or a list, each entry a string, got .1."),
    ("[nsa]\nattention = []", "^nsa.attention must be a pattern of .*, got ''"),
    ("[nsa]\nwindw_size = 3", "^nsa.windw_size must be an option, one of .*'window_size'.*, got 3"),
    ("[nsaa]\nwindow_size = 3", "^nsaa must be an option, one of .*'nsa'.*, got"),
    ("nsa = 3", "^nsa must be a section, got 3"),
    ('[training]\nsteps = "10"', "^training.steps must be an int, got '10'"),
    ("[training]\ndataloader = 3", "^training.dataloader must be a section, got 3"),
    ('[training.dataloader]\nnum_workers = "x"', "^training.dataloader.num_workers must be an int, got 'x'"),
    ('[training]\ndtype = "float16"', "^training.dtype must be one of .'bfloat16', 'float32'., got 'float16'"),
    ('[optimizer]\nlr = "1e-3"', "^optimizer.lr must be a number, got '1e-3'"),
    ('[model]\nconverters = "float8"', "^model.converters must be a list, each entry a string, got 'float8'"),
    ('[checkpoint]\nenable = "yes"', "^checkpoint.enable must be true or false, got 'yes'"),
    ("[validation]\nsteps = 0", "^validation.steps must be positive or -1"),
    ('[job]\ncustom_config_module = "nowhere"', "^job.custom_config_module must be a module that has a JobConfig"),
    ("[training", "^job.config_file must be a TOML file, got 'job.toml': "),
]


@pytest.mark.smoke
@pytest.mark.parametrize(("toml", "message"), TOML, ids=[toml.replace("\n", " ") for toml, _ in TOML])
def test_a_wrong_toml_file_is_refused_by_option(toml: str, message: str, job: Job) -> None:
    refused(job, message, toml=toml)


@pytest.mark.smoke
@pytest.mark.parametrize("pattern", ['["dense", "nsa"]', '"dense,nsa"'])
def test_a_pattern_of_layers_may_be_a_list(pattern: str, job: Job) -> None:
    from torchtitan.protocols.train_spec import get_train_spec

    job_config = job(toml=f"[nsa]\nattention = {pattern}")
    args = get_train_spec("nsa").model_args["debug"]
    args.update_from_config(job_config)
    assert args.layer_kinds == ["dense", "nsa"]
    assert args.attention == "dense,nsa"


@pytest.mark.smoke
def test_whole_numbers_are_numbers(job: Job) -> None:
    assert job(toml="[optimizer]\nlr = 1").optimizer.lr == 1


# 3. What the entry point adds gives way to what the user says.


@pytest.mark.smoke
def test_a_toml_file_has_its_own_word(job: Job, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass, field\nfrom nsa.titan.train_spec import JobConfig as Ours\n"
        "@dataclass\nclass Mine:\n    option: int = 1\n"
        "@dataclass\nclass JobConfig(Ours):\n    mine: Mine = field(default_factory=Mine)\n"
    )
    own = '[job]\ncustom_config_module = "mine"\ndump_folder = "here"\n[mine]\noption = 2'
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        job_config = job(toml=own)
    assert (job_config.job.custom_config_module, job_config.job.dump_folder) == ("mine", "here")
    assert job_config.mine.option == 2


@pytest.mark.smoke
@pytest.mark.parametrize("spelling", ["--job.config_file=job.toml", "--job.config-file job.toml"])
def test_nothing_is_added_beside_a_toml_file_but_the_options_of_nsa(
    spelling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.toml").write_text("[training]\nsteps = 3")
    options = spelling.split(" ")
    assert complete(options) == ["--job.custom_config_module=nsa.titan.train_spec", *options]


@pytest.mark.smoke
def test_a_flavor_has_its_file_and_its_folder() -> None:
    added = complete(["--model.flavor", "debug_dense"])
    assert any(option.endswith("configs/debug.toml") for option in added)
    assert "--job.dump_folder=./outputs/debug_dense" in added
    assert not any("dump_folder=./" in option for option in complete(["--job.dump_folder", "mine"]))


@on_cpus
def test_a_toml_file_without_custom_import_trains_on_a_cpu(tmp_path: Path) -> None:
    """TorchTitan's own entry point imports `nsa.titan.train_spec` for its options, and with it what a CPU needs."""
    (tmp_path / "job.toml").write_text(
        '[job]\ncustom_config_module = "nsa.titan.train_spec"\n[model]\nname = "nsa"\nflavor = "debug"\n'
        "[training]\nsteps = 1\nseq_len = 64\nlocal_batch_size = 1\n"
    )
    options = (f"--job.config_file={tmp_path / 'job.toml'}", "--metrics.log_freq=1")
    assert list(runs.train(options, tmp_path / "ours")[runs.LOSS]) == [1]
    assert list(runs.train(options, tmp_path / "titan", module="torchtitan.train", processes=1)[runs.LOSS]) == [1]


@on_cpus
def test_the_peak_of_memory_is_that_of_the_process_alone(tmp_path: Path) -> None:
    gib = 3
    held = b"x" * (gib * 2**30)  # by the process that starts it
    options = ("--training.steps=1", "--training.seq_len=64", "--training.local_batch_size=1", "--metrics.log_freq=1")
    assert 0 < runs.train(options, tmp_path)[runs.ACTIVE_GIB][1] < gib
    del held


# 4. One line, and no traceback.


def test_a_mistake_is_one_line_on_stderr(tmp_path: Path) -> None:
    command = runs.command(("--training.seq_len=0",), tmp_path)
    done = subprocess.run(command, env=runs.environment(), capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (1, "error: training.seq_len must be at least 1, got 0\n")
    assert "Traceback" not in done.stdout


@ranks.needs(2)
def test_a_mistake_is_named_by_torchrun_and_no_rank_has_a_traceback(tmp_path: Path) -> None:
    command = runs.command(("--training.seq_len=0",), tmp_path, processes=2)
    done = subprocess.run(command, env=runs.environment(2), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "[rank" not in done.stderr
    cause = done.stderr.partition("Root Cause")[2]
    assert re.search(r"traceback : error: training.seq_len must be at least 1, got 0$", cause, re.MULTILINE)
    assert done.stderr.count("Traceback") == 1  # torchrun's own


# 5. Help.


@pytest.mark.smoke
def test_help_describes_each_option_of_nsa(job: Job) -> None:
    printed = io.StringIO()
    with redirect_stdout(printed), pytest.raises(SystemExit) as ended:
        job("--help")
    assert ended.value.code == 0
    text = " ".join(re.sub("[│|]", " ", printed.getvalue()).split())
    for option in fields(NSAOptions):
        default = " Unless given, the flavor's: (.*?)" if option.default is None else ""
        name = option.name.replace("_", "-")
        described = re.search(rf"--nsa.{name}(?:, --nsa.no-{name}| \S+) (.*?){default}\.", text)
        assert described, f"{option.name} is not described"
        assert len(described[1]) > 20, f"{option.name} is hardly described: {described[1]}"
    assert "Unless given, the flavor's: 128 (debug, debug_parallel); 512 (100m, 1b)." in text  # window_size
    assert "dense,nsa,nsa,nsa(100m_hybrid)" in text.replace(" ", "")  # lines may end at a comma
    assert "{None,mlp,linear,mean}" in text


def test_a_job_needs_no_options(job: Job) -> None:
    assert job().model.flavor == "debug"


def test_every_field_of_the_configuration_is_an_option() -> None:
    assert {option.name for option in fields(NSAConfig)} <= {option.name for option in fields(NSAOptions)}


# 6. What is refused by name has that name in TorchTitan.


@pytest.mark.smoke
def test_options_that_are_checked_exist_and_their_defaults_are_right() -> None:
    job_config = ConfigManager._merge_configs(ConfigManager().config_cls, JobConfig)()
    for option, (right, must) in job_checks._RANGES.items():
        value = job_checks._value(job_config, option)
        assert value is None or right(value), f"{option} = {value!r} must {must}"
    for option in job_checks._IGNORED:
        assert job_checks._value(job_config, option) is False
    assert all(hasattr(job_config.parallelism, name) for name in job_checks.DEGREES)


@pytest.mark.smoke
def test_names_that_are_checked_are_those_of_torchtitan() -> None:
    assert FLOAT8 in _registry_model_converter_cls
    assert list(job_checks.COMPILED) == JobConfig().compile.components
    one = ParallelDims(1, 1, 1, 1, 1, 1, 1, world_size=1)
    for name in job_checks.OPTIMIZERS:
        assert build_optimizers([nn.Linear(2, 2)], Optimizer(name=name), one).optimizers
    with pytest.raises(NotImplementedError):
        build_optimizers([nn.Linear(2, 2)], Optimizer(name="SGD"), one)


def test_parts_of_a_checkpoint_are_named_as_they_are_saved(tmp_path: Path) -> None:
    from torchtitan.components.checkpoint import CheckpointManager

    parts = {"dataloader": None, "model_parts": [nn.Linear(2, 2)], "optimizers": None, "lr_schedulers": None}
    options = JobConfig().checkpoint
    manager = CheckpointManager(
        **parts, states={"train_state": None}, checkpoint_config=options, sd_adapter=None, base_folder=str(tmp_path)
    )
    assert set(manager.states) == set(job_checks.LOADABLE)
