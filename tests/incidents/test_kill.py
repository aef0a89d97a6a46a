"""A run with an incident, killed at a journal record of it and resumed, ends as the run that nobody killed.

The kill is an exception out of the journal, before or after the record is written, at every record that an incident
writes: what is on the disk then is what a kill of the process would leave.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from finitune.numerics.fingerprint import fingerprint
from incidents import planted
from support.incidents import Rig, Story, opened, summary
from support.killed import losses
from support.runs import write_rows

KINDS = ("phase", "treatment", "rollback", "incident")
FIXED = ("save_steps=4", "save_in_background=false", "data.eval_fraction=0.1")


class Killed(BaseException):
    """The process ended here."""


@dataclass
class Course:
    """A fault, its recipe, and the run that nobody killed."""

    fault: Callable[[Rig], Any]
    overrides: tuple[str, ...]
    steps: int
    story: Story = None  # type: ignore[assignment]
    end: Any = None
    losses: list[float] = field(default_factory=list)
    records: list[str] = field(default_factory=list)
    truth: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    redone: dict[int, str] = field(default_factory=dict)

    def again(self, rig: Rig) -> None:
        """The fault after a resume: what it did to the weights is in the checkpoint."""
        if rig.step() == 1:
            self.fault(rig)
            return
        kept = {n: p.detach().clone() for n, p in rig.model.named_parameters()}
        self.fault(rig)
        with torch.no_grad():
            for name, parameter in rig.model.named_parameters():
                parameter.copy_(kept[name])


def end_of(session: Any) -> Any:
    """Weights, moments and everything else of the state, as one digest."""
    port = session.prepared.port
    return fingerprint(port.state_tensors(), port.state_record())


def counted(session: Any, at: int | None, *, after: bool, seen: list[str]) -> None:
    """Raise Killed at the record number ``at`` of an incident."""
    real = session.journal.write

    def write(kind: str, **record: Any) -> None:
        mine = kind in KINDS
        if mine:
            seen.append(kind if kind != "phase" else record["phase"])
        due = mine and len(seen) - 1 == at
        if due and not after:
            raise Killed
        real(kind, **record)
        if due:
            raise Killed

    session.journal.write = write


def whole(folder: Path, course: Course) -> Course:
    """The run without a kill; the state after each batch as the next one found it, and as the timeline gives it."""
    # The same file for all: row ids hold its path.
    course.overrides += (f"data.train={write_rows(folder / 'rows.jsonl')}",)
    session, course.story = opened(folder, course.fault, *FIXED, *course.overrides, steps=course.steps)
    counted(session, None, after=False, seen=course.records)
    port, real = session.prepared.port, session.machine.after_step

    def after_step(step_s: float) -> Any:
        if port.state.step:
            course.truth[port.state.step] = {n: t.detach().clone() for n, t in port.state_tensors()}
        findings = real(step_s)
        if port.state.step == course.steps:
            for step in sorted(course.truth):
                found = session.machine.timeline.state_at(step).tensors
                true = course.truth[step]
                if found.keys() != true.keys() or not all(torch.equal(found[n], t) for n, t in true.items()):
                    course.redone[step] = "differs"
                else:
                    course.redone[step] = "equal"
        return findings

    session.machine.after_step = after_step
    course.story.result = session.run()
    course.end, course.losses = end_of(session), losses(folder / "run")
    return course


COURSES = {
    "island": lambda: Course(
        planted.loud_row(6, 1),
        ("precision=fp16-emulated", "learning_rate=1e-4", "guard.probation_steps=3"),
        14,
    ),
    "lower rate": lambda: Course(planted.high_rate(20, 100.0), ("learning_rate=3e-3",), 34),
    "quarantine": lambda: Course(planted.nan_inputs((6, 2)), (), 12),
}


@pytest.fixture(scope="module")
def courses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Course]:
    return {name: whole(tmp_path_factory.mktemp("whole"), make()) for name, make in COURSES.items()}


@pytest.mark.parametrize("name", COURSES)
def test_the_timeline_gives_every_state_across_incidents(courses: dict[str, Course], name: str) -> None:
    course = courses[name]
    assert course.story.incidents, course.story.actions
    assert course.story.result.status == "finished", summary(course.story.incidents[-1])
    assert not course.story.poisoned
    assert set(course.redone) == set(range(1, course.steps + 1))
    assert set(course.redone.values()) == {"equal"}, course.redone


def test_the_courses_hold_what_they_should(courses: dict[str, Course]) -> None:
    assert courses["island"].story.first.remedy == "fp32_modules", summary(courses["island"].story.first)
    lower = courses["lower rate"].story.first
    assert lower.remedy == "lower_lr", summary(lower)
    assert lower.steps_lost > 0
    assert "rollback" in courses["lower rate"].records
    assert courses["quarantine"].story.first.remedy == "skip_rows"


@pytest.mark.parametrize("name", COURSES)
@pytest.mark.parametrize("after", [False, True])
def test_killed_at_a_record_of_an_incident_and_resumed_it_ends_the_same(
    tmp_path: Path, courses: dict[str, Course], name: str, after: bool
) -> None:
    course = courses[name]
    kinds = course.records
    # Before a record: nothing of what it says was done. After it: it was said, and not yet done.
    wanted = ("rollback", "treatment", "incident") if after else ("frozen", "rollback", "treatment")
    for number in [n for n, kind in enumerate(kinds) if kind in wanted]:
        folder = tmp_path / f"{number}"
        session, _ = opened(folder, course.fault, *FIXED, *course.overrides, steps=course.steps)
        counted(session, number, after=after, seen=[])
        with pytest.raises(Killed):
            session.run()
        session.journal.abandon()
        session.start.close()
        resumed, story = opened(folder, course.again, resume=True, like=course.story.rig)
        story.result = resumed.run()
        told = f"{name}: record {number} ({kinds[number]}), {'after' if after else 'before'} it"
        assert story.result.status == "finished", told
        assert not story.poisoned, told
        assert losses(folder / "run") == course.losses, told
        assert end_of(resumed).digest == course.end.digest, told
