"""Mutants of the oracle: each is wrong on some case, and what is wrong in its way is explained by it."""

import pytest
import torch

from validation import mutants, oracle
from validation.cases import BY_ID, Case, config, draw, whole
from validation.comparison import bounds
from validation.mutants import MUTANTS, Mutant
from validation.stages import FUNCTIONS, SHARED

# Of every structure, and short.
TRIED = (
    "wide_keys", "scrambled", "last_queries", "packed_mean", "small", "linear", "mean", "many_blocks",
    "shared_keys", "pooled_decode", "nothing_forced",
)  # fmt: skip


def wrong(mutant: Mutant, stage: str, case: Case) -> tuple[dict[str, torch.Tensor], str]:
    """What the mutant gives up to the first result that is wrong, and its name; `""` where all is right."""
    tensors, given = draw(case), {}
    right = dict(FUNCTIONS[stage].results(oracle, case, tensors))
    for name, x in mutants.results(mutant, FUNCTIONS[stage], case, tensors, torch.float64):
        if mutant.backward and not name.startswith("gradient"):
            x = right[name]
        given[name] = x
        bound = bounds(FUNCTIONS[stage], case, tensors, name, x, torch.float64)
        same = x.shape == right[name].shape and (
            mutants._near(x, right[name], bound) if x.is_floating_point() else torch.equal(x, right[name])
        )
        if not same:
            return given, name
    return given, ""


TIES = "of equal importances the higher index is taken"
"""Random numbers have none."""


@pytest.mark.parametrize(
    "mutant", [m for m in MUTANTS if m.says != TIES], ids=lambda m: f"{m.stages[0]}-{m.says}".replace(" ", "_")[:90]
)
def test_a_mutant_is_wrong_and_explained_by_itself(mutant: Mutant) -> None:
    stage = FUNCTIONS[mutant.stages[0]]
    cases = [BY_ID[name] for name in TRIED if stage.name != SHARED.name or BY_ID[name].config.shared_kv]
    for case in cases:
        try:
            given, name = wrong(mutant, stage.name, case)
        except (ValueError, IndexError, RuntimeError):
            continue
        if not name:
            continue
        mutants._explained.clear()
        tensors = draw(case)
        if name == "indices":
            said = mutants.explain_selection(case, tensors, given[name])
        else:
            bound = bounds(stage, case, tensors, name, given[name], torch.float64)
            said = mutants.explain(None, stage, case, tensors, torch.float64, given, bound)
        assert f"agrees with the oracle if {mutant.says}" in said
        return
    pytest.fail("it is right on every case")


def test_another_rule_for_ties_is_explained() -> None:
    case = Case("ties", whole(33), config((4, 4, 4), 5, num_local_blocks=1))
    tensors = draw(case)
    tensors["k_cmp"] = tensors["k_cmp"][:, :1].expand_as(tensors["k_cmp"]).round()
    tensors["q"] = tensors["q"].round()
    [mutant] = (mutant for mutant in MUTANTS if mutant.says == TIES)
    indices = dict(mutants.results(mutant, FUNCTIONS["select_blocks"], case, tensors, torch.float64))["indices"]
    mutants._explained.clear()
    assert f"agrees with the oracle if {TIES}" in mutants.explain_selection(case, tensors, indices)


@pytest.mark.parametrize(
    ("factor", "says"), [(0.0, "it is 0"), (2.0, "twice what it should be"), (-1.0, "its sign is wrong")]
)
def test_a_factor_is_named(factor: float, says: str) -> None:
    case, stage, tensors = BY_ID["group_3"], FUNCTIONS["sliding_window_attention"], draw(BY_ID["group_3"])
    given = dict(stage.results(oracle, case, tensors))
    given = {"out": given["out"], "gradient of q": factor * given["gradient of q"]}
    mutants._explained.clear()
    bound = bounds(stage, case, tensors, "gradient of q", given["gradient of q"], torch.float64)
    [said] = mutants.explain(None, stage, case, tensors, torch.float64, given, bound)
    assert said.startswith("the gradient of q agrees with the oracle but for a factor")
    assert said.endswith(says)


def test_what_is_kept_in_a_narrow_dtype_is_named() -> None:
    case, stage, tensors = BY_ID["small"], FUNCTIONS["sliding_window_attention"], draw(BY_ID["small"])
    given = {"out": stage.call(oracle, case, tensors)["out"].half().double()}
    mutants._explained.clear()
    bound = bounds(stage, case, tensors, "out", given["out"], torch.float64)
    [said] = mutants.explain(None, stage, case, tensors, torch.float64, given, bound)
    assert "to the precision of float16" in said


def test_the_oracle_is_as_before_when_a_mutant_is_gone() -> None:
    before = dict(vars(oracle))
    for mutant in MUTANTS:
        with mutant.made():
            pass
    assert vars(oracle) == before
