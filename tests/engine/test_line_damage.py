"""The line of a damaged journal: gaps, and never an exception."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finitune.engine.line import Line, event_of, line_of
from support.lines import attempts, mark, rollback, step


def test_a_missing_transaction_is_a_gap_for_every_path_through_it_and_no_other() -> None:
    line = line_of([step(1), step(2), step(4), step(5)])
    assert line.path(0, 5) is None
    assert line.path(2, 3) is None
    assert line.path(2, 4) is None
    assert attempts(line, 0, 2) == [1, 2]
    assert attempts(line, 3, 5) == [4, 5]
    assert line.attempt_of(3) is None


@pytest.mark.parametrize("missing", ["attempt", "step", "action", "loss", "grad_norm", "lr"])
def test_a_step_that_lacks_something_is_a_gap(missing: str) -> None:
    damaged = {key: value for key, value in step(2).items() if key != missing}
    line = line_of([step(1), damaged, step(3)])
    assert line.path(0, 3) is None
    assert attempts(line, 0, 1) == [1]
    with pytest.raises(KeyError):
        event_of(damaged)


WRONG: list[dict[str, Any]] = [
    {"attempt": None},
    {"attempt": "two"},
    {"attempt": [2]},
    {"attempt": math.inf},
    {"attempt": math.nan},
    {"step": None},
    {"step": {}},
    {"step": -math.inf},
    {"action": "dance"},
    {"action": None},
    {"action": ["proceed"]},
    {"loss": "much"},
    {"loss": [1.0]},
    {"loss": {}},
    {"grad_norm": 10**400},
    {"lr": "fast"},
    {"loss_scale": "big"},
    {"findings": 5},
    {"findings": None},
    {"findings": [5]},
    {"findings": ["text"]},
    {"findings": [{"code": "NUM001"}]},
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda w: str(w)[:30])
def test_a_step_with_values_of_the_wrong_kind_is_a_gap_and_raises_nothing(wrong: dict[str, Any]) -> None:
    line = line_of([step(1), step(2) | wrong, step(3)])
    assert line.path(1, 3) is None
    assert attempts(line, 2, 3) == [3]


@pytest.mark.parametrize("kind", ["state", "rollback", "resume"])
@pytest.mark.parametrize("attempt", [None, "x", [1], {}, math.inf, math.nan])
def test_other_records_with_values_of_the_wrong_kind_raise_nothing(kind: str, attempt: Any) -> None:
    line = line_of([step(1), {"kind": kind, "attempt": attempt, "to_step": 0, "mark": {}}, step(2)])
    assert attempts(line, 0, 2) == [1, 2]


def test_records_that_lack_everything_raise_nothing() -> None:
    kinds = ("step", "state", "rollback", "resume", "eval", "finding", "end", "whatever", "", None, 5, [], {})
    line = line_of([{"kind": kind} for kind in kinds] + [{}, {"attempt": 3}])
    assert line == Line()


@pytest.mark.parametrize("bad", [None, 5, "text", [], True])
def test_a_mark_that_is_no_record_is_left_out(bad: Any) -> None:
    """Whoever compares a state with it may rely on a mapping."""
    line = line_of([step(1), {"kind": "state", "attempt": 1, "mark": bad}])
    assert line.marks == {}


@pytest.mark.parametrize("to_step", [None, "x", math.inf, "absent"])
def test_a_rollback_that_does_not_say_its_step_is_taken_whole_or_not_at_all(to_step: Any) -> None:
    record = rollback(1, 1) | {"to_step": to_step}
    if to_step == "absent":
        del record["to_step"]
    line = line_of([step(1), step(2), step(3), record])
    cut = line.attempt_of(3) is None
    assert cut == bool(line.rollbacks), "a line that was cut by a rollback counts it"


def test_unknown_kinds_between_steps_change_nothing() -> None:
    plain = [step(1), step(2), mark(2), step(3)]
    noise = [{"kind": "eval", "step": 2, "attempt": 1}, {"kind": "future", "attempt": 0}, {"kind": "save", "step": 1}]
    mixed = [r for record in plain for r in (*noise, record)]
    assert line_of(mixed) == line_of(plain)


def test_a_number_that_comes_again_tells_of_a_rollback_whose_record_is_lost() -> None:
    line = line_of([*(step(a, lr=1.0) for a in range(1, 9)), mark(5), mark(8), step(5, lr=2.0), step(6, lr=2.0)])
    assert [e.reading.lr for e in line.path(0, 6) or []] == [1.0] * 4 + [2.0] * 2
    assert line.attempt_of(7) is None
    assert line.marks == {}


def test_a_record_that_stands_twice_counts_once() -> None:
    assert line_of([step(1), step(1), step(2), step(2)]) == line_of([step(1), step(2)])


def test_the_records_may_come_one_by_one() -> None:
    assert line_of(iter([step(1), step(2)])) == line_of([step(1), step(2)])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)
FIELDS = ("attempt", "step", "action", "loss", "grad_norm", "lr", "loss_scale", "findings", "mark", "to_step")
KINDS = st.sampled_from(["step", "state", "resume", "rollback"])


@given(st.lists(st.tuples(KINDS, st.dictionaries(st.sampled_from(FIELDS), JSON)), max_size=8))
@settings(max_examples=40, deadline=None)
def test_no_record_whatever_raises(spoilt: list[tuple[str, dict[str, Any]]]) -> None:
    whole = {"attempt": 1, "step": 1, "action": "proceed", "loss": 1.0, "grad_norm": 1.0, "lr": 1.0}
    whole |= {"mark": {}, "to_step": 0, "findings": []}
    line = line_of([{**whole, **fields, "kind": kind} for kind, fields in spoilt])
    assert all(isinstance(a, int) for a in [*line.events, *line.marks])
