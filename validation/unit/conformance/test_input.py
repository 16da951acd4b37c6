"""Bad input is refused, by everybody who says so; our own words for it are in test_errors.py."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ...cases import BY_ID, draw, fitted
from ...implementations import Implementation
from ...stages import FUNCTIONS

BAD: dict[str, tuple[str, dict[str, Callable[[Tensor], Tensor]]]] = {
    "rank_of_q": ("sliding_window_attention", {"q": lambda x: x[0]}),
    "dtype_of_k": ("sliding_window_attention", {"k": lambda x: x.to(torch.float8_e4m3fn)}),
    "integer_v": ("selected_attention", {"v": lambda x: x.long()}),
    "floating_indices": ("selected_attention", {"indices": lambda x: x.float()}),
    "key_dim": ("compressed_attention", {"k_cmp": lambda x: x[..., :-1]}),
    "tokens_of_v": ("sliding_window_attention", {"v": lambda x: x[:, :-1]}),
    "batch_of_k": ("selected_attention", {"k": lambda x: x.repeat(2, 1, 1, 1)}),
    "query_heads": ("sliding_window_attention", {"q": lambda x: torch.cat([x, x[:, :, :1]], 2)}),
    "more_queries_than_keys": ("sliding_window_attention", {name: lambda x: x[:, :8] for name in ("k", "v")}),
    "blocks_of_other_keys": ("compressed_attention", {name: lambda x: x[:, :-1] for name in ("k_cmp", "v_cmp")}),
    "queries_of_indices": ("selected_attention", {"indices": lambda x: x[:, :-1]}),
    "gates_of_two": ("nsa_attention_from_shared_keys", {"gates": lambda x: x[..., :-1]}),
}


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_refused(impl: Implementation, kind: str) -> None:
    if not impl.checks_input:
        pytest.skip(f"{impl.name} lacks checks of input")
    name, changes = BAD[kind]
    stage, case = FUNCTIONS[name], fitted(impl, BY_ID["mean"], BY_ID["pooled"])
    tensors = draw(case, impl.widest)
    stage.run(impl, case, tensors)
    with pytest.raises((TypeError, ValueError)):
        stage.run(impl, case, {**tensors, **{name: change(tensors[name]) for name, change in changes.items()}})
