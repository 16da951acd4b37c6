"""Gates may be any number, and need not come from a sigmoid: negative ones turn a branch round, 0 switches it off."""

import pytest
import torch

from validation.cases import Case, config, draw, whole
from validation.comparison import compare
from validation.implementations import load
from validation.stages import STAGES

pytestmark = pytest.mark.usefixtures("on_device")

BLOCKS = config((16, 8, 16), 3, 12, num_local_blocks=1)
WIDEST = torch.float32 if torch.cuda.is_available() else torch.float64


@pytest.mark.parametrize("group", [2, 8])
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_gates_of_either_sign_and_zero(backend: str, group: int) -> None:
    case = Case("gates", whole(40), BLOCKS, kv_heads=1, group=group, key_dim=16, value_dim=16)
    tensors = draw(case, WIDEST)
    tensors["gates"] = (4 * tensors["gates"] - 2).round()
    for sign in (-1, 0, 1):
        assert (tensors["gates"].sign() == sign).any()
    narrow = torch.cuda.is_available()
    compare(load(backend), STAGES["nsa_attention"], case, tensors, WIDEST, beside_plain=narrow)
