"""Log-sum-exps of the selected and of the window branch, which ours return on request."""

import math

import pytest
import torch
from torch import Tensor

from nsa import selected_attention, sliding_window_attention
from nsa.backends import BackendName
from validation import oracle
from validation.cases import BY_ID, Case, Tensors, draw, fitted
from validation.implementations import load
from validation.numerics import assert_equal, assert_matches

pytestmark = pytest.mark.usefixtures("on_device")

each_backend = pytest.mark.parametrize("backend", ["eager", "triton"])
each_case = pytest.mark.parametrize("name", ["small", "packed", "last_queries", "packed_last_queries", "scrambled"])


def chosen(name: str, backend: BackendName) -> tuple[Case, Tensors]:
    impl = load(backend)
    case = fitted(impl, BY_ID[name])
    return case, draw(case, impl.widest)


def expected(case: Case, x: Tensors, branch: str) -> Tensor:
    """Log-sum-exps of the scaled products of each query with the keys that it sees."""
    config, parts = case.config, []
    packing = {key: value for key, value in case.call.items() if key.startswith("cu_seqlens")}
    for sequence in oracle.sequences(config, x["q"].shape[1], x["k"].shape[1], **packing):
        keys, values = x["k"][:, sequence.keys], x["v"][:, sequence.keys]
        position = sequence.positions[:, None]
        token = torch.arange(keys.shape[1], device=position.device)
        mask = (token <= position)[:, None]
        if branch == "window":
            mask = mask & (position - token < config.window_size)[:, None]
        else:
            blocks = x["indices"][:, sequence.queries].to(token.device)
            mask = mask & (blocks[..., None] == token // config.select_block_size).any(-2)
        parts.append(oracle.attend(x["q"][:, sequence.queries], keys, values, mask, case.call.get("scale"))[1])
    return torch.cat(parts, 1)


@each_case
@each_backend
def test_lse_of_the_window(backend: BackendName, name: str) -> None:
    case, x = chosen(name, backend)
    tensors = x["q"], x["k"], x["v"]
    out, lse = sliding_window_attention(*tensors, case.config, **case.call, backend=backend, return_lse=True)
    assert_matches(lse, expected(case, x, "window"), what="lse", reduction=case.key_dim + case.config.window_size)
    alone = sliding_window_attention(*tensors, case.config, **case.call, backend=backend)
    assert isinstance(alone, Tensor)
    assert_equal(out, alone, what="output")


@each_case
@each_backend
def test_lse_of_selected_blocks(backend: BackendName, name: str) -> None:
    case, x = chosen(name, backend)
    tensors = x["q"], x["k"], x["v"], x["indices"]
    out, lse = selected_attention(*tensors, case.config, **case.call, backend=backend, return_lse=True)
    assert_matches(lse, expected(case, x, "selected"), what="lse", reduction=case.key_dim + case.num_keys)
    alone = selected_attention(*tensors, case.config, **case.call, backend=backend)
    assert isinstance(alone, Tensor)
    assert_equal(out, alone, what="output")


@each_backend
def test_a_query_without_a_block_has_none(backend: BackendName) -> None:
    case, x = chosen("small", backend)
    nothing = torch.full_like(x["indices"], -1)
    _, lse = selected_attention(x["q"], x["k"], x["v"], nothing, case.config, backend=backend, return_lse=True)
    assert (lse == -math.inf).all()
    assert not lse.requires_grad
