"""The line: what counts of a journal in which a run went back, was resumed, and was damaged."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from finitune.core.journal import encode
from finitune.engine.line import event_of, is_clean, line_of
from finitune.engine.policy import Action
from support.lines import ERROR, NOTE, WARNING, attempts, mark, resume, rollback, step

# ---------------------------------------------------------------- one line


def test_an_empty_journal_knows_the_start_and_nothing_else() -> None:
    line = line_of([])
    assert line.attempt_of(0) == 0
    assert line.attempt_of(1) is None
    assert line.path(0, 0) == []
    assert line.path(0, 1) is None
    assert line.rollbacks == []


def test_steps_in_a_row() -> None:
    line = line_of([step(1), step(2), step(3)])
    assert [line.attempt_of(s) for s in range(5)] == [0, 1, 2, 3, None]
    assert attempts(line, 0, 3) == [1, 2, 3]
    assert attempts(line, 1, 2) == [2]
    assert attempts(line, 2, 2) == []
    assert attempts(line, 2, 4) is None


def test_a_step_that_was_tried_again_ends_with_its_last_try() -> None:
    line = line_of([
        step(1, 1, "retry_smaller_scale"),
        step(2, 1, "retry_smaller_scale"),
        step(3, 1),
        step(4, 2, "retry_smaller_scale"),
        step(5, 2, "skip_batch"),
        step(6, 3, "retry_smaller_scale"),
    ])  # fmt: skip
    assert [line.attempt_of(s) for s in range(4)] == [0, 3, 5, None]
    assert [e.uses_batch for e in line.path(0, 6) or []] == [False, False, True, False, True, False]


@pytest.mark.parametrize("action", ["proceed", "skip_batch", "halt"])
def test_every_other_decision_uses_the_batch_up(action: str) -> None:
    line = line_of([step(1, 1, action)])
    assert line.attempt_of(1) == 1
    assert line.events[1].action is Action(action)


def test_numbers_survive_the_journal_bit_for_bit() -> None:
    record = step(7, 7, loss=0.1 + 0.2, grad_norm=5e-324, lr=-0.0, loss_scale=65536.0)
    again = json.loads(json.dumps(encode(record)))
    reading = event_of(again).reading
    assert (reading.loss, reading.grad_norm, reading.loss_scale) == (0.1 + 0.2, 5e-324, 65536.0)
    assert math.copysign(1.0, reading.lr) == -1.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_come_back_as_they_were(value: float) -> None:
    record = json.loads(json.dumps(encode(step(1, 1, "skip_batch", loss=value, grad_norm=value))))
    reading = event_of(record).reading
    for found in (reading.loss, reading.grad_norm):
        assert found == value or (math.isnan(found) and math.isnan(value))


def test_without_a_scaler_there_is_no_scale() -> None:
    assert event_of(step(1)).reading.loss_scale is None
    assert event_of(step(1, loss_scale=None)).reading.loss_scale is None


@pytest.mark.parametrize(
    ("action", "findings", "clean"),
    [
        ("proceed", [], True),
        ("proceed", [NOTE], True),
        ("proceed", [NOTE, WARNING], False),
        ("proceed", [ERROR], False),
        ("skip_batch", [], False),
        ("skip_batch", [ERROR], False),
        ("retry_smaller_scale", [NOTE], False),
        ("halt", [ERROR], False),
    ],
)
def test_a_clean_transaction_is_committed_and_found_nothing_worth_a_warning(
    action: str, findings: list[dict[str, str]], clean: bool
) -> None:
    assert event_of(step(1, 1, action, findings=findings)).clean is clean
    assert is_clean(Action(action), [f["severity"] for f in findings]) is clean


# ---------------------------------------------------------------- going back


def test_what_came_after_a_rollback_no_longer_counts() -> None:
    line = line_of([step(1), step(2), mark(2), step(3), mark(3), rollback(2, 2), step(3, 3, "skip_batch"), step(4)])
    assert line.events[3].action is Action.SKIP_BATCH
    assert set(line.marks) == {2}
    assert attempts(line, 0, 4) == [1, 2, 3, 4]
    assert line.rollbacks == [2]


def test_a_rollback_with_nothing_after_it_leaves_the_later_steps_unknown() -> None:
    line = line_of([*(step(a) for a in range(1, 9)), rollback(3, 3)])
    assert line.attempt_of(3) == 3
    assert line.attempt_of(4) is None


def test_a_rollback_to_the_start_leaves_nothing() -> None:
    line = line_of([mark(0), step(1), step(2), mark(2), rollback(0, 0)])
    assert line.events == {}
    assert set(line.marks) == {0}
    assert line.attempt_of(0) == 0


def test_a_resume_cuts_but_is_no_rollback() -> None:
    """The killed session had journalled steps beyond its last checkpoint; they are trained again."""
    line = line_of([step(1), step(2), step(3), mark(3), resume(1), step(2, 2, "skip_batch")])
    assert attempts(line, 0, 2) == [1, 2]
    assert line.attempt_of(3) is None
    assert line.marks == {}
    assert line.rollbacks == []


def test_several_rollbacks_and_resumes_each_cut_the_line_that_was_there() -> None:
    first = [step(a, lr=1.0) for a in range(1, 7)]
    second = [step(a, lr=2.0) for a in range(5, 9)]
    third = [step(a, lr=3.0) for a in range(3, 6)]
    line = line_of([*first, rollback(4, 4), *second, rollback(2, 2), *third, resume(4), step(5, lr=4.0)])
    assert [e.reading.lr for e in line.path(0, 5) or []] == [1.0, 1.0, 3.0, 3.0, 4.0]
    assert line.attempt_of(6) is None
    assert line.rollbacks == [4, 2]


def test_going_back_into_the_midst_of_retries_keeps_those_before() -> None:
    """A stop may come between two tries of a step; the checkpoint then holds the smaller scale."""
    tries = [step(a, 2, "retry_smaller_scale") for a in (2, 3, 4)]
    line = line_of([step(1), *tries, resume(3), step(4, 2)])
    assert [e.uses_batch for e in line.path(0, 4) or []] == [True, False, False, True]
    assert line.attempt_of(2) == 4


# ---------------------------------------------------------------- settings that were changed


def test_what_was_done_under_other_settings_cannot_be_redone() -> None:
    line = line_of([*(step(a) for a in range(1, 7)), resume(4, "explained"), step(5), step(6)])
    assert line.path(2, 4) is None
    assert line.path(0, 6) is None
    assert line.path(3, 5) is None
    assert attempts(line, 4, 6) == [5, 6]
    assert attempts(line, 5, 6) == [6]
    assert attempts(line, 2, 2) == [], "a state that is stored needs no redo"
    assert line.attempt_of(2) == 2


def test_a_resume_with_nothing_changed_or_nothing_that_matters_is_no_wall() -> None:
    for changed in ((), ("harmless",), ("harmless", "harmless")):
        line = line_of([step(1), step(2), step(3), resume(2, *changed), step(3)])
        assert attempts(line, 0, 3) == [1, 2, 3]
    line = line_of([step(1), step(2), resume(2, "harmless", "needs_permission"), step(3)])
    assert line.path(0, 3) is None


def test_going_back_beyond_the_change_takes_the_wall_along() -> None:
    """What follows was trained under the settings of now, from a state that is stored."""
    line = line_of([*(step(a) for a in range(1, 9)), resume(8, "explained"), step(9), rollback(3, 3), step(4), step(5)])
    assert attempts(line, 3, 5) == [4, 5]
    assert line.path(2, 5) is None


@pytest.mark.parametrize("facts", [None, 5, "text", [], {}, {"changes": None}, {"changes": 5}, {"changes": [5]}])
def test_facts_of_the_wrong_kind_raise_nothing_and_the_resume_still_cuts(facts: Any) -> None:
    line = line_of([step(1), step(2), {"kind": "resume", "attempt": 1, "facts": facts}, step(2), step(3)])
    assert attempts(line, 1, 3) == [2, 3]


# ---------------------------------------------------------------- against a naive model


@dataclass
class Model:
    """The line as a plain list: what a run would remember if it never forgot anything."""

    transactions: list[tuple[int, str, float]] = field(default_factory=list)
    """(step, action, a number that is never used twice), one for each attempt from 1 on."""
    settings: list[int] = field(default_factory=list)
    """Under which settings each of them was made."""
    now: int = 0
    """The settings of now."""
    marks: list[tuple[int, str]] = field(default_factory=list)
    rollbacks: list[int] = field(default_factory=list)
    lost: set[int] = field(default_factory=set)
    """Attempts whose record is not in the journal."""

    @property
    def step(self) -> int:
        return sum(action != "retry_smaller_scale" for _, action, _ in self.transactions)

    def go_back(self, attempt: int) -> None:
        self.transactions, self.settings = self.transactions[:attempt], self.settings[:attempt]
        self.marks = [m for m in self.marks if m[0] <= attempt]
        self.lost = {a for a in self.lost if a <= attempt}

    def attempt_of(self, number: int) -> int | None:
        if number == 0:
            return 0
        for attempt, (of_step, action, _) in enumerate(self.transactions, 1):
            if of_step == number and action != "retry_smaller_scale" and attempt not in self.lost:
                return attempt
        return None

    def path(self, after: int, to: int) -> list[float] | None:
        if to > len(self.transactions) or self.lost & set(range(after + 1, to + 1)):
            return None
        if set(self.settings[after:to]) - {self.now}:
            return None
        return [unique for _, _, unique in self.transactions[after:to]]


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(
            ["proceed"] * 6
            + ["skip_batch", "retry_smaller_scale", "retry_smaller_scale", "halt", "mark", "noise", "lose"]
            + ["rollback", "resume", "resume_in_retry", "resume_changed"]
        ),
        st.floats(0, 1),
    ),
    max_size=60,
)


def history(operations: list[tuple[str, float]]) -> tuple[list[dict[str, Any]], Model]:
    """The journal of a run that does these things, and what really happened."""
    model, records = Model(), []
    for number, (what, share) in enumerate(operations):
        now = len(model.transactions)
        unique = float(number) + 0.5
        if what in ("proceed", "skip_batch", "retry_smaller_scale", "halt", "lose"):
            action = "proceed" if what == "lose" else what
            model.transactions.append((model.step + 1, action, unique))
            model.settings.append(model.now)
            if what == "lose":
                model.lost.add(now + 1)
                records.append({"kind": "step", "attempt": now + 1})  # damaged
            else:
                records.append(step(now + 1, model.transactions[-1][0], action, lr=unique))
        elif what == "mark":
            model.marks.append((now, str(unique)))
            records.append(mark(now, str(unique)))
        elif what == "noise":
            records.append({"kind": "eval", "attempt": 0, "step": 0, "loss": 1.0})
        else:
            ends = [a for a, t in enumerate(model.transactions, 1) if t[1] != "retry_smaller_scale"]
            places = list(range(now + 1)) if what == "resume_in_retry" else [0, *ends]
            attempt = places[round(share * (len(places) - 1))]
            model.go_back(attempt)
            if what == "rollback":
                model.rollbacks.append(model.step)
                records.append(rollback(attempt, model.step))
            elif what == "resume_changed":
                model.now = number + 1
                records.append(resume(attempt, "harmless", "explained"))
            else:
                records.append(resume(attempt, "harmless"))
    return records, model


@given(OPERATIONS)
@example([("proceed", 0), ("mark", 0), ("proceed", 0), ("rollback", 0.5), ("lose", 0), ("proceed", 0)])
@example([("proceed", 0), ("proceed", 0), ("resume_changed", 1), ("rollback", 0), ("proceed", 0), ("proceed", 0)])
@settings(max_examples=200, deadline=None)
def test_any_history_is_told_as_it_happened(operations: list[tuple[str, float]]) -> None:
    records, model = history(operations)
    line = line_of(json.loads(json.dumps(records)))
    total = len(model.transactions)
    assert [line.attempt_of(s) for s in range(total + 2)] == [model.attempt_of(s) for s in range(total + 2)]
    for after in range(total + 1):
        for to in range(after, total + 2):
            path = line.path(after, to)
            assert (None if path is None else [e.reading.lr for e in path]) == model.path(after, to)
    assert {a: m["digest"] for a, m in line.marks.items()} == dict(model.marks)
    assert line.rollbacks == model.rollbacks
