"""Jobs that TorchTitan 0.3 is not given: the message names the option."""

from collections.abc import Callable
from typing import Any

import pytest
from torchtitan.config import ParallelismConfig

from nsa.titan.refusals import JobError
from nsa.titan3 import config_registry
from nsa.titan3.data import CorpusDataLoader


def job(**parallelism: Any) -> Any:
    config = config_registry.nsa_debug()
    config.training.disable_cuda_graphs = True
    config.parallelism = ParallelismConfig(**parallelism)
    return config


def updated(config: Any) -> Any:
    config.model_spec.model.update_from_config(config=config)
    return config


@pytest.mark.parametrize(
    ("parallelism", "message"),
    [
        ({"spmd_backend": "full_dtensor"}, 'parallelism.spmd_backend must be "spmd_types"'),
        ({"expert_parallel_degree": 2}, "parallelism.expert_parallel_degree must be 1"),
        (
            {"pipeline_parallel_degree": 2, "pipeline_parallel_schedule": "ZBVZeroBubble"},
            "parallelism.pipeline_parallel_schedule must be one of",
        ),
        (
            {"context_parallel_degree": 2, "context_parallel_load_balancer": "ptrr"},
            'context_parallel_load_balancer must be "headtail"',
        ),
        ({"context_parallel_degree": 64}, r"training.seq_len must be a multiple of .* \(4096\), got 1024"),
    ],
)
def test_layouts_that_would_fail_later(parallelism: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError, match=message):
        updated(job(**parallelism))


def test_heads_that_tensor_parallelism_cannot_share_out() -> None:
    with pytest.raises(ValueError, match="tensor_parallel_degree"):
        updated(job(tensor_parallel_degree=4))


def test_an_unknown_flavor() -> None:
    with pytest.raises(JobError, match="flavor must be one of"):
        config_registry.model_spec("2m")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": "dense,sparse"}, r"attention must be a pattern of \('dense', 'nsa'\), got 'dense,sparse'"),
        ({"backend": "cuda"}, "backend must be"),
        ({"n_kv_heads": 3}, r"n_heads must be a multiple of n_kv_heads \(3\), got 4"),
    ],
)
def test_models_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_registry.model_spec("debug", **changes)


def test_gates_that_are_no_gates() -> None:
    config = job()
    config.model_spec = config_registry.model_spec("debug", initial_gates="1,2,3")
    with pytest.raises(JobError, match="initial_gates"):
        updated(config)


def test_positions_come_with_context_parallelism_alone() -> None:
    assert not updated(job()).dataloader.positions
    assert updated(job(context_parallel_degree=2)).dataloader.positions


def test_a_dataset_that_is_not_there() -> None:
    loader = CorpusDataLoader.Config(dataset="nothing")
    build: Callable[..., Any] = loader.build
    with pytest.raises(JobError, match=r"dataloader\.dataset must be one of"):
        build(dp_world_size=1, dp_rank=0, tokenizer=None, seq_len=8, local_batch_size=1)


@pytest.mark.parametrize("name", [name for name in dir(config_registry) if name.startswith("nsa_")])
def test_every_configuration_is_made(name: str) -> None:
    config = getattr(config_registry, name)()
    assert config.model_spec.model.layers
