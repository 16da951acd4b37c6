"""Training steps as CUDA graphs: what a replay leaves is what the step itself leaves, and who gets none hears why."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchtitan.config import JobConfig as TitanConfig

from nsa.titan import graphs
from nsa.titan.graphs import StepGraph, why_not
from nsa.titan.job_checks import building_trainer, check_job, check_trainer
from nsa.titan.model import ModelArgs
from nsa.titan.refusals import JobError
from nsa.titan.train_spec import JobConfig
from nsa.train import parse
from validation import runs

pytestmark = pytest.mark.smoke

CAUSES: dict[str, tuple[dict[str, Any], int, dict[str, Any], str | None]] = {
    "none": ({}, 1, {}, None),
    "processes": ({}, 2, {}, "2 processes"),
    "documents": ({}, 1, {"attn_mask_type": "block_causal"}, "another number of documents"),
    "eager": ({}, 1, {"backend": "eager"}, "eager backend, as nsa.backend says"),
    "dense": ({}, 1, {"backend": "eager", "attention": "dense"}, None),
    "checkpointing": ({"activation_checkpoint.mode": "full"}, 1, {}, "random generator"),
    "state_not_kept": (
        {"activation_checkpoint.mode": "full", "activation_checkpoint.preserve_rng_state": False},
        1,
        {},
        None,
    ),
    "compiled": ({"activation_checkpoint.mode": "full", "compile.enable": True}, 1, {}, None),
    "loss_compiled": (
        {"activation_checkpoint.mode": "full", "compile.enable": True, "compile.components": ["loss"]},
        1,
        {},
        "random",
    ),
    "float8": ({"model.converters": ["quantize.linear.float8"]}, 1, {}, "model.converters"),
}


@pytest.mark.parametrize(("options", "processes", "model", "expected"), CAUSES.values(), ids=CAUSES)
def test_who_gets_no_graph_hears_why(
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    processes: int,
    model: dict[str, Any],
    expected: str | None,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(graphs.torch, "empty", lambda *sizes, device: torch.zeros(*sizes))
    monkeypatch.setattr("nsa.kernels.why_not", lambda *_: None)
    job_config = TitanConfig()
    job_config.activation_checkpoint.mode = "none"
    for name, value in options.items():
        section, _, option = name.partition(".")
        setattr(getattr(job_config, section), option, value)
    reason = why_not(job_config, ModelArgs(**model), processes)
    assert (reason is None) == (expected is None), reason
    assert expected is None or expected in (reason or "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="is refused without a GPU only")
def test_a_graph_that_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    section: Any = JobConfig().nsa
    assert section.cuda_graphs == "auto"
    check_job(parse([]))
    with pytest.raises(JobError, match=r'^nsa\.cuda_graphs must be "auto" or "off", since there is no GPU'):
        check_job(parse(["--nsa.cuda_graphs=on"]))


@pytest.mark.parametrize(("option", "must"), [("cuda_graphs=on", '"auto" or "off"'), ("selection_metrics", "false")])
def test_what_another_trainer_would_ignore_is_refused(option: str, must: str) -> None:
    job_config = parse([f"--nsa.{option}"])
    with building_trainer():
        check_trainer(job_config)
    name = option.partition("=")[0]
    with pytest.raises(JobError, match=rf"^nsa\.{name} must be {must} under this trainer: that of python -m nsa.train"):
        check_trainer(job_config)


def test_torchtitan_s_own_entry_point_refuses_graphs(tmp_path: Path) -> None:
    options = ("--job.config_file=nsa/configs/debug.toml", "--nsa.cuda_graphs=on")
    with pytest.raises(RuntimeError, match=r"JobError: nsa\.cuda_graphs must be .* under this trainer"):
        runs.train(options, tmp_path, module="torchtitan.train", processes=1)


def test_another_trainer_says_that_it_captures_no_graph(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with caplog.at_level("INFO"):
        check_trainer(parse(["--nsa.cuda_graphs=off"]))
        assert "CUDA graph" not in caplog.text
        check_trainer(parse([]))
    assert "The training step is no CUDA graph: python -m nsa.train captures it" in caplog.text


class Fake:
    """A CUDA graph on a CPU: a replay does again what was captured, and writes to the same memory."""

    made: StepGraph

    def replay(self) -> None:
        assert self.made._loss is not None
        parameters, before = self.made._parameters, [p.grad for p in self.made._parameters]
        for parameter in parameters:
            parameter.grad = None
        self.made._loss.copy_(self.made._step(self.made._batch).detach())
        for parameter, static, kept in zip(parameters, self.made._gradients, before, strict=True):
            if static is not None:
                assert parameter.grad is not None
                static.copy_(parameter.grad)
            parameter.grad = kept


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces CUDA's graphs by `Fake`, without a GPU."""
    if torch.cuda.is_available():
        return
    stream = type("Stream", (), {"wait_stream": lambda self, other: None})

    @contextmanager
    def recorded(graph: Fake, **_: Any) -> Iterator[None]:
        yield

    for name, value in {"Stream": stream, "current_stream": stream, "CUDAGraph": Fake, "graph": recorded}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.frozen = nn.Linear(4, 4), nn.Linear(4, 4)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(self.frozen(x)).tanh()


@pytest.mark.parametrize("accumulated", [1, 3])
def test_replays_leave_what_steps_leave(capture: None, monkeypatch: pytest.MonkeyPatch, accumulated: int) -> None:
    """Ten optimizer's steps, clipping included: the same losses and weights, to the bit, as without a graph."""
    trained = []
    for graphed in (False, True):
        torch.manual_seed(0)
        net = Net().to(DEVICE)
        optimizer = torch.optim.AdamW(net.used.parameters(), lr=0.1)

        def step(batch: dict[str, Tensor], net: Net = net) -> Tensor:
            loss = (net(batch["x"]) - batch["y"]).square().sum() / batch["count"]
            loss.backward()
            return loss

        graph = StepGraph(step, list(net.parameters()), accumulated) if graphed else None
        monkeypatch.setattr(Fake, "made", graph, raising=False)
        run = step if graph is None else graph
        losses = []
        for i in range(10):
            optimizer.zero_grad()
            for _ in range(accumulated):
                rows = 5 if i == 7 else 6  # one batch is of another size
                x, y = (torch.randn(rows, 4, device=DEVICE) for _ in range(2))
                losses.append(run({"x": x, "y": y, "count": torch.tensor(float(rows), device=DEVICE)}).detach())
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            optimizer.step()
        assert graph is None or graph.captured
        trained.append([*losses, *(p.detach() for p in net.parameters())])
    for i, (expected, got) in enumerate(zip(*trained, strict=True)):
        assert torch.equal(expected, got), f"tensor {i}: expected {expected}, got {got}"


@pytest.mark.needs_gpu(count=1)
def test_a_training_with_graphs_is_the_one_without(tmp_path: Path) -> None:
    """Losses, gradient norms and validation losses of a whole job whose gradients are accumulated."""
    logs = []
    for mode in ("off", "on"):
        options = (
            f"--nsa.cuda_graphs={mode}", "--training.steps=12", "--training.seq_len=256", "--metrics.log_freq=1",
            "--training.local_batch_size=2", "--training.global_batch_size=4", "--validation.freq=6",
            "--validation.steps=2", "--validation.seq_len=256", "--checkpoint.no-enable",
        )  # fmt: skip
        runs.train(options, tmp_path / mode, processes=1)
        logs.append(runs.read_log(tmp_path / mode / "metrics.jsonl"))
    for name in (runs.LOSS, "grad_norm", runs.VALIDATION_LOSS):
        assert logs[0][name] == logs[1][name], name
