"""Operations that are NaN over finite numbers because there were too few of them: shown, not guessed."""

from __future__ import annotations

import pytest

from engine.causes.scenes import at, case, evidence
from finitune.engine.case import Case
from finitune.engine.diagnose import diagnose

ALL_ROWS = evidence("scan_state supervised_tokens", "rows")


def of(op: str, **data: object) -> Case:
    found = {"nan": True, "micro": 2, "num_elements": 4, **data}
    return case(suspects=at("(loss)", op, **found), evidence=ALL_ROWS, supervised_tokens=44)


@pytest.mark.parametrize("op", ["aten.std", "aten.var", "aten.std_mean", "aten.var_mean"])
def test_a_deviation_of_one_number_is_the_math_of_the_loss(op: str) -> None:
    top = diagnose(of(op)).top
    assert top is not None
    assert (top.code, top.named) == ("NUM404", True)


@pytest.mark.parametrize(("op", "data"), [("aten.std", {"input_finite": False}), ("aten.mul", {}), ("aten.sqrt", {})])
def test_bad_numbers_that_came_in_or_other_operations_show_nothing(op: str, data: dict[str, object]) -> None:
    assert [c.code for c in diagnose(of(op, **data)).causes if c.named] == []


def test_a_cross_entropy_over_finite_logits_names_the_micro_batch_without_a_target() -> None:
    top = diagnose(of("aten.nll_loss_forward")).top
    assert top is not None
    assert (top.code, top.named) == ("DAT400", True)
    assert top.data["supervised"] == "0 (micro 3)"


def test_a_cross_entropy_over_bad_logits_is_something_else() -> None:
    top = diagnose(of("aten.nll_loss_forward", input_finite=False)).top
    assert top is None or not top.named
