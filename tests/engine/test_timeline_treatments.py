"""Treatments are part of the line: what was done to the state between two steps is done again on the way to a step."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finitune.core.types import Reading
from finitune.engine.conditions import AS_CONFIGURED, Conditions
from finitune.engine.line import line_of, treated
from finitune.engine.mend import mend
from finitune.engine.monitor import read
from finitune.engine.plan import Mend, Operation
from finitune.engine.policy import Action
from finitune.engine.timeline import Unreachable
from finitune.train import checkpoint
from finitune.train.loop import record_or_halt
from support.runs import OPEN
from support.timelines import EMBEDDING, Run, Shared, bits, bits_of, run_of, spoil

LOWER = Conditions(lr_factor=0.5, max_grad_norm=0.1)
RESET = (Mend(Operation.RESET_MOMENTS, (EMBEDDING,)),)
REPAIR = (Mend(Operation.REPAIR, (EMBEDDING,), 2),)


KEPT: list[Shared] = []
"""The same, for a test of Hypothesis, which takes no fixtures."""


@pytest.fixture(scope="module", autouse=True)
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    KEPT[:] = [Shared.of(run_of(tmp_path_factory.mktemp("shared")).prepared)]
    return KEPT[0]


@pytest.fixture
def run(shared: Shared, tmp_path: Path) -> Run:
    return shared.run(tmp_path)


def treat(
    run: Run,
    conditions: Conditions = AS_CONFIGURED,
    mends: Sequence[Mend] = (),
    *,
    redo: bool = True,
    incident: int = 1,
) -> None:
    """As the guard does it: the journal first, then the act."""
    port = run.prepared.port
    memory = copy.deepcopy(port.state.guard)
    memory.setdefault("incidents", []).append({"number": incident, "step": port.state.step})
    record_or_halt(
        run.loop.journal,
        "treatment",
        step=port.state.step,
        attempt=port.state.attempt,
        incident=incident,
        conditions=conditions.to_json(),
        mends=[{"what": m.what.value, "names": list(m.names), "from_step": m.from_step} for m in mends],
        guard=memory,
        redo=redo,
    )
    mend(port, mends, run.machine.state_at)
    port.adopt(conditions)
    port.state.guard = memory
    note(run)


def note(run: Run) -> None:
    """The state of a step is that right after its batch was used up: before it was tried with the next one."""
    if line_of(run.records()).attempt_of(run.step) == run.prepared.port.state.attempt:
        run.truth[run.step] = bits(run.prepared)


def refuse(run: Run) -> None:
    """The step at hand fails and will be treated."""
    port = run.prepared.port
    reading = read(port.forward_backward())
    port.abort()
    record_or_halt(
        run.loop.journal,
        "step",
        attempt=port.state.attempt + 1,
        **reading.to_json(),
        action=Action.TREAT.value,
        findings=[],
    )
    port.settle(Action.TREAT, reading, clean=False)


def go_on(run: Run, folder: Path) -> None:
    """As a resume does: the state of a checkpoint, and a journal line that says which treatments it has."""
    port = run.prepared.port
    port.restore(dict(_weights(run, folder)), _record(folder))
    state = port.state
    record = {"step": state.step, "attempt": state.attempt, "treated": treated(port.state_record())}
    record_or_halt(run.loop.journal, "resume", **record)
    run.machine.ring.forget_after(-1)
    run.truth = {s: t for s, t in run.truth.items() if s <= state.step}
    note(run)


def _weights(run: Run, folder: Path) -> dict[str, torch.Tensor]:
    (base,) = [b for b in checkpoint.bases(run.folder, [], run.prepared.port.parts) if b.folder == folder]
    taken: dict[str, torch.Tensor] = {}

    class Taking:
        def restore(self, tensors: Any, record: Any) -> None:
            taken.update(tensors)

    base.restore(Taking())  # type: ignore[arg-type]
    return taken


def _record(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "state.json").read_text(encoding="utf-8")))


def every_step(run: Run) -> None:
    """The state of each step of the line comes out again, and the run stays where it is."""
    here = bits(run.prepared)
    for step, truth in sorted(run.truth.items()):
        if step <= run.step:
            assert bits_of(run.machine.state_at(step)) == truth, step
    assert bits(run.prepared) == here


# ---------------------------------------------------------------- redo


def test_conditions_and_reset_moments_are_redone_at_their_place(run: Run) -> None:
    run.to(3, snapshots=(1,))
    refuse(run)
    treat(run, LOWER, RESET)
    run.to(7)
    treat(run)
    run.to(9)
    every_step(run)
    rates = [r["lr"] for r in run.records() if r["kind"] == "step" and r["action"] == "proceed"]
    assert rates[3:7] == [pytest.approx(rates[7] / 2, rel=0.2)] * 4
    assert run.go(3).step == 3
    assert run.prepared.port.conditions == AS_CONFIGURED
    run.go(5)
    assert run.prepared.port.conditions == LOWER
    assert run.prepared.port.state.guard["incidents"] == [{"number": 1, "step": 3}]


@pytest.mark.parametrize("after", [False, True], ids=["base before it", "base after it"])
@pytest.mark.parametrize("source", ["snapshots", "checkpoints"])
def test_a_base_at_the_place_of_a_treatment_is_used_whichever_side_it_is_of(run: Run, source: str, after: bool) -> None:
    run.to(4, **{source: () if after else (4,)})
    treat(run, LOWER, RESET)
    if after:
        assert run.machine.ring.take(run.prepared.port, 0.0) if source == "snapshots" else run.save()
    run.to(6)
    assert run.go(6).base_step == 4
    assert bits(run.prepared) == run.truth[6]
    every_step(run)


def test_two_treatments_at_one_place_are_each_made_once(run: Run) -> None:
    run.machine.ring.take(run.prepared.port, 0.0)
    run.to(4, snapshots=(4,))
    treat(run, LOWER, RESET)
    run.machine.ring.take(run.prepared.port, 0.0)
    treat(run, Conditions(lr_factor=0.1), incident=2)
    run.to(6)
    for _ in range(3):
        every_step(run)
        run.machine.ring.forget(run.machine.ring.taken[-1])


def test_a_digest_from_before_a_treatment_is_not_held_against_the_state_after_it(run: Run) -> None:
    """Digests are journalled every 4 steps, before the next step begins with a treatment."""
    run.to(8, snapshots=(2,))
    treat(run, LOWER)
    run.to(10)
    every_step(run)


def test_a_digest_from_after_a_treatment_is_held_against_it(run: Run) -> None:
    run.to(3, snapshots=(2,))
    treat(run, LOWER)
    spoil(dict(run.prepared.port.state_tensors()))
    run.machine._journal_digest(None)
    finding = run.refused(3).finding
    assert (finding.code, finding.data["what"]) == ("NUM120", EMBEDDING)


def test_what_cannot_be_redone_is_passed_by_with_bases_on_either_side(run: Run) -> None:
    run.to(4, snapshots=(1,))
    treat(run, LOWER, REPAIR, redo=False)
    run.machine.ring.take(run.prepared.port, 0.0)
    run.to(7)
    truth = dict(run.truth)
    for step, base in {3: 1, 4: 4, 5: 4, 7: 4}.items():
        assert run.go(step).base_step == base
        assert bits(run.prepared) == truth[step]
        run.go(7)
    run.machine.ring.forget(run.machine.ring.taken[-1])
    assert run.refused(6).finding.code == "SYS012"
    assert bits_of(run.machine.state_at(3)) == truth[3]


def test_a_repair_from_a_step_that_can_be_had_is_redone_where_the_journal_allows_it(run: Run) -> None:
    run.to(5, snapshots=(1,))
    treat(run, LOWER, REPAIR)
    run.to(7)
    every_step(run)


def test_a_treatment_that_cannot_be_made_any_more_is_said_and_nothing_changes(run: Run) -> None:
    run.to(3, snapshots=(2,))
    treat(run, LOWER, RESET)
    run.to(5)
    record = {"step": 5, "attempt": 5, "incident": 2, "mends": [], "redo": True}
    record_or_halt(run.loop.journal, "treatment", **record, conditions={"clipper": "no-such-clipper"})
    finding = run.refused(5).finding
    assert finding.code == "SYS012"
    assert "no-such-clipper" in finding.data["reason"]


# ---------------------------------------------------------------- going back, resuming


def test_going_back_and_treating_there_is_a_line_of_its_own(run: Run) -> None:
    run.to(8, snapshots=(2, 6), checkpoints=(4,))
    before = dict(run.truth)
    run.machine.roll_back(4, "incident 1")
    treat(run, LOWER, RESET)
    run.to(7)
    assert bits(run.prepared) != before[7]
    every_step(run)
    for step in (1, 3):
        assert run.truth[step] == before[step]


@pytest.mark.parametrize("save_at", [2, 4, 5])
def test_a_run_that_goes_on_from_a_checkpoint_has_the_conditions_it_had_there(run: Run, save_at: int) -> None:
    run.to(4, checkpoints=(save_at,))
    treat(run, LOWER, RESET)
    run.to(5, checkpoints=(save_at,))
    run.to(6)
    go_on(run, run.folder / f"checkpoint-{save_at}")
    assert run.prepared.port.conditions == (LOWER if save_at == 5 else AS_CONFIGURED)
    run.to(8)
    every_step(run)


def test_a_run_that_is_killed_between_journal_and_act_forgets_the_treatment(run: Run) -> None:
    """It goes on from before it, fails again, and treats again."""
    run.to(4, checkpoints=(4,))
    refuse(run)
    treat(run, LOWER, RESET)
    go_on(run, run.folder / "checkpoint-4")
    refuse(run)
    treat(run, LOWER, RESET)
    truth = bits(run.prepared)
    run.to(6)
    run.machine.ring.forget_after(-1)
    every_step(run)
    assert truth != run.truth[6]


# ---------------------------------------------------------------- undoing an update


@pytest.mark.parametrize("retried", [False, True])
def test_an_update_is_undone_before_it_is_settled(run: Run, retried: bool) -> None:
    run.to(5, snapshots=(3,))
    port = run.prepared.port
    if retried:
        refuse(run)
        treat(run, LOWER)
    before = bits(run.prepared)
    reading = read(port.forward_backward())
    port.commit(reading)
    spoil(dict(port.state_tensors()))
    assert run.machine.timeline.undo().step == 5
    assert bits(run.prepared) == before
    assert (port.state.step, port.state.attempt) == (5, 6 if retried else 5)


def test_the_shadow_is_enough_to_undo_an_update(tmp_path: Path) -> None:
    run = run_of(tmp_path, "snapshots.shadow=true")
    run.machine.ring.num_slots = 0
    run.machine.after_step(0.01)
    run.to(1)
    run.machine.after_step(0.01)
    before = bits(run.prepared)
    run.prepared.port.commit(read(run.prepared.port.forward_backward()))
    assert run.machine.timeline.undo().num_redone == 0
    assert bits(run.prepared) == before


def test_what_cannot_be_undone_is_said_and_the_state_stays(run: Run) -> None:
    run.to(3)
    run.machine.timeline.stored = tuple
    port = run.prepared.port
    port.commit(read(port.forward_backward()))
    after = bits(run.prepared)
    with pytest.raises(Unreachable, match="SYS012"):
        run.machine.timeline.undo()
    assert bits(run.prepared) == after


# ---------------------------------------------------------------- any course


MOVES = st.lists(
    st.sampled_from(["step", "step", "step", "refuse", "lower", "reset", "back", "snapshot", "save", "resume"]),
    min_size=4,
    max_size=14,
)


@settings(max_examples=15, deadline=None)
@given(MOVES)
def test_every_step_of_any_course_comes_out_again(moves: list[str]) -> None:
    """Steps, refusals, changed conditions, reset moments, ways back, kills with a resume; bases here and there."""
    run = KEPT[0].run(Path(tempfile.mkdtemp(dir=KEPT[0].prepared.recipe.output_dir.rpartition("/")[0])))
    try:
        _walk(run, moves)
        every_step(run)
    finally:
        run.loop.journal.close()
        OPEN.remove(run.loop.journal)


def _walk(run: Run, moves: list[str]) -> None:
    saved: list[int] = []
    run.machine.ring.take(run.prepared.port, 0.0)
    for number, move in enumerate(moves):
        if move == "step":
            run.to(run.step + 1)
        elif move == "refuse":
            refuse(run)
            treat(run, Conditions(lr_factor=1 / (2 + number)), incident=number)
        elif move == "lower":
            treat(run, Conditions(lr_factor=1 / (2 + number)), incident=number)
        elif move == "reset" and run.step > 0:
            treat(run, run.prepared.port.conditions, RESET, incident=number)
        elif move == "back" and run.step > 2:
            _back(run, run.step // 2, saved)
        elif move == "snapshot":
            run.machine.ring.take(run.prepared.port, 0.0)
        elif move == "save" and run.step not in saved:
            run.save()
            saved.append(run.step)
        elif move == "resume" and saved:
            go_on(run, run.folder / f"checkpoint-{saved[-1]}")
            saved[:] = [s for s in saved if s <= run.step]


def _back(run: Run, step: int, saved: list[int]) -> None:
    run.machine.roll_back(step, "a test")
    run.truth = {s: t for s, t in run.truth.items() if s < step} | {step: bits(run.prepared)}
    saved[:] = [s for s in saved if s <= step]


def test_a_treatment_counts_as_no_step_and_uses_no_batch(run: Run) -> None:
    run.to(2)
    state = run.prepared.port.state
    before = (state.step, state.cursor, state.updates, state.clean_steps, state.history.state())
    run.prepared.port.settle(Action.TREAT, Reading(3, 1.0, 1.0), clean=False)
    assert (state.step, state.cursor, state.updates, state.clean_steps, state.history.state()) == before
    assert state.attempt == 3
