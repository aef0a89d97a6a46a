"""Errors that teach: what, where, why, what to try, with the numbers."""

from __future__ import annotations

import pytest

from finitune.core.codes import Code, Text
from finitune.core.errors import Exit, FiniTuneError, Halted, UserError, UserErrors, describe, raise_all
from finitune.core.messages.catalogue import set_language
from finitune.core.types import Severity

CODE = Code(
    "CFG999",
    Severity.ERROR,
    Text("t", "The rate is {lr}.", "It must be below {limit}.", ("write {limit}", "or less")),
    Text("t", "学习率为 {lr}。", "必须小于 {limit}。", ("写 {limit}", "或更小")),
)


@pytest.fixture(autouse=True)
def _language():
    set_language("en")
    yield
    set_language(None)


def test_an_error_says_what_where_why_and_what_to_try() -> None:
    assert str(UserError(CODE, "recipe.yaml: lr", lr=0.5, limit=0.1)).splitlines() == [
        "CFG999 The rate is 0.5.",
        "  where: recipe.yaml: lr",
        "  why: It must be below 0.1.",
        "  try: write 0.1",
        "  try: or less",
    ]


def test_it_says_the_same_in_chinese() -> None:
    error = UserError(CODE, "recipe.yaml", lr=0.5, limit=0.1)
    set_language("zh")
    assert str(error).splitlines()[0] == "CFG999 学习率为 0.5。"
    assert "必须小于 0.1" in str(error)


def test_a_missing_number_stays_visible() -> None:
    assert "below {limit}" in str(UserError(CODE, lr=0.5))


def test_without_a_place_or_a_reason_the_line_is_left_out() -> None:
    bare = Code("CFG998", Severity.ERROR, Text("t", "w", "", ()), Text("t", "w", "", ()))
    assert describe(bare, "", {}) == "CFG998 w"


def test_an_error_is_also_a_value() -> None:
    found = UserError(CODE, "here", lr=0.5).finding()
    assert (found.code, found.severity, found.where, dict(found.data)) == (
        "CFG999",
        Severity.ERROR,
        "here",
        {"lr": 0.5},
    )
    assert not found.veto


def test_nothing_collected_raises_nothing() -> None:
    raise_all([])


def test_one_error_is_raised_as_itself() -> None:
    error = UserError(CODE)
    with pytest.raises(UserError) as caught:
        raise_all([error])
    assert caught.value is error


def test_several_errors_are_raised_together() -> None:
    errors = [UserError(CODE, "a", lr=1, limit=2), UserError(CODE, "b", lr=3, limit=4)]
    with pytest.raises(UserErrors) as caught:
        raise_all(errors)
    assert caught.value.errors == tuple(errors)
    assert "The rate is 1." in str(caught.value)
    assert "The rate is 3." in str(caught.value)


def test_a_bundle_of_nothing_is_a_bug() -> None:
    with pytest.raises(ValueError, match="at least one"):
        UserErrors([])


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (UserError(CODE), 2),
        (UserErrors([UserError(CODE)]), 2),
        (Halted(CODE, "step 7", lr=1.0, limit=2.0), 3),
        (FiniTuneError("broken"), 4),
    ],
)
def test_exit_codes(error: FiniTuneError, exit_code: int) -> None:
    assert error.exit_code == exit_code
    assert isinstance(error, FiniTuneError)


def test_exit_codes_are_those_of_the_manual() -> None:
    assert {e.name: int(e) for e in Exit} == {"GOOD": 0, "FINDINGS": 1, "USAGE": 2, "HALTED": 3, "INTERNAL": 4}


def test_a_halt_says_what_happened() -> None:
    assert str(Halted(CODE, "step 7", lr=1.0, limit=2.0)).startswith("CFG999 The rate is 1.\n  where: step 7")
