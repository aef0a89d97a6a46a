"""Treatments in the line: at their place, cut with it, and told from each other by what a state says of them."""

from __future__ import annotations

import pytest

from finitune.engine.conditions import Conditions
from finitune.engine.line import line_of, treated
from finitune.engine.plan import Mend, Operation
from support.lines import attempts, mark, resume, rollback, step, treatment


def test_a_treatment_stands_after_its_transaction_and_uses_no_batch() -> None:
    line = line_of([step(1), step(2, 2, "treat"), treatment(2, lr_factor=0.5), step(3, 2), step(4, 3)])
    assert [c.conditions for c in line.changes[2]] == [Conditions(lr_factor=0.5)]
    assert line.attempt_of(1) == 1
    assert line.attempt_of(2) == 3
    assert attempts(line, 0, 4) == [1, 2, 3, 4]


def test_what_cannot_be_redone_is_a_wall_for_those_before_it_only() -> None:
    line = line_of([step(1), step(2), treatment(2, redo=False), step(3)])
    assert attempts(line, 0, 1) == [1]
    assert attempts(line, 1, 3) is None
    assert attempts(line, 2, 3) == [3], "a state from after it"
    assert line.path(2, 3, done=0) is None
    assert line.path(2, 3, done=1) is not None


def test_a_state_tells_how_many_of_the_treatments_at_its_place_it_has() -> None:
    one, two = treatment(2, lr_factor=0.5), treatment(2, incidents=2, lr_factor=0.5)
    line = line_of([step(1), step(2), one, two])
    assert line.done(2, treated({})) == 0
    assert line.done(2, treated(one)) == 1
    assert line.done(2, treated(two)) == 2
    assert line.done(1, treated(two)) == 0


def test_a_resume_forgets_the_treatments_that_its_state_lacks() -> None:
    one, two = treatment(2, lr_factor=0.5), treatment(2, incidents=2)
    journal = [step(1), step(2), one, two, mark(2), step(3)]
    for record, left in (({}, 0), (one, 1), (two, 2)):
        line = line_of([*journal, {**resume(2), "treated": treated(record)}])
        assert len(line.changes.get(2, [])) == left
        assert (2 in line.marks) is (left == 2)
    assert len(line_of([*journal, resume(2)]).changes[2]) == 2, "a journal that does not tell"
    assert line_of([*journal, resume(1)]).changes == {}


def test_a_way_back_keeps_what_was_done_before_it() -> None:
    line = line_of([step(1), treatment(1, lr_factor=0.5), step(2), treatment(2), step(3), rollback(1, 1), step(2, 2)])
    assert set(line.changes) == {1}


def test_a_digest_belongs_to_the_side_it_was_taken_on() -> None:
    line = line_of([step(1), mark(1), treatment(1), step(2), treatment(2), mark(2)])
    assert line.marked == {1: 0, 2: 1}


def test_a_treatment_that_says_nothing_of_the_memory_keeps_it() -> None:
    second = treatment(2, lr_factor=0.5)
    del second["guard"]
    line = line_of([step(1), treatment(1, incidents=3), step(2), second])
    assert line.changes[2][0].guard == line.changes[1][0].guard


def test_mends_are_read_as_they_were_written() -> None:
    mends = [
        {"what": "reset_moments", "names": ["a", "b"], "from_step": None},
        {"what": "repair", "names": ["c"], "from_step": 4},
    ]
    line = line_of([step(1), {**treatment(1), "mends": mends}])
    assert line.changes[1][0].mends == (
        Mend(Operation.RESET_MOMENTS, ("a", "b")),
        Mend(Operation.REPAIR, ("c",), 4),
    )


@pytest.mark.parametrize(
    "wrong",
    [{"conditions": {"no_such": 1}}, {"attempt": "x"}, {"mends": [{"what": "melt", "names": []}]}, {"guard": 3}],
    ids=str,
)
def test_a_record_that_is_no_treatment_is_left_out(wrong: dict[str, object]) -> None:
    assert line_of([step(1), {**treatment(1), **wrong}]).changes == {}
