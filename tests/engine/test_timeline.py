"""The state of any step is reached again bit for bit, or it is said why not, and nothing has changed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from finitune.core.types import Reading
from finitune.engine.line import Event
from finitune.engine.policy import Action
from finitune.engine.timeline import Arrival, Unreachable, compare, redo
from finitune.numerics.fingerprint import fingerprint
from support.faults import at_step, poison_gradient, poison_output
from support.timelines import Run, Shared, bits, bits_of, run_of, spoil


@pytest.fixture(autouse=True)
def _drawn() -> None:
    """Whatever the global generator did before must not matter."""
    torch.rand(3)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    return Shared.of(run_of(tmp_path_factory.mktemp("shared")).prepared)


@pytest.fixture
def run(shared: Shared, tmp_path: Path) -> Run:
    return shared.run(tmp_path)


# ---------------------------------------------------------------- arriving


def test_the_nearest_snapshot_is_the_base_and_only_what_follows_is_computed(run: Run) -> None:
    run.to(12, snapshots=(3, 7))
    here = bits(run.prepared)
    for step, base, redone in ((3, 3, 0), (5, 3, 2), (7, 7, 0), (8, 7, 1), (12, 7, 5)):
        assert bits_of(run.machine.state_at(step)) == run.truth[step]
        assert bits(run.prepared) == here
        assert run.go(step) == Arrival(step, base, redone, ())
        assert bits(run.prepared) == run.truth[step]
        assert run.go(12).step == 12


def test_every_step_is_reached_with_snapshots_checkpoints_and_the_start_as_bases(run: Run) -> None:
    run.to(12, snapshots=(9,), checkpoints=(5,))
    for step, base in {4: 0, 5: 5, 6: 5, 7: 5, 8: 5, 9: 9, 10: 9, 11: 9, 12: 9}.items():
        assert run.go(step).base_step == base
        assert bits(run.prepared) == run.truth[step]


def test_going_to_the_present_step_changes_nothing(run: Run) -> None:
    run.to(6, snapshots=(2,))
    assert run.go(6).num_redone == 4
    assert bits(run.prepared) == run.truth[6]
    run.machine.ring.take(run.prepared.port, 0.0)
    assert run.go(6) == Arrival(6, 6, 0, ())
    assert bits(run.prepared) == run.truth[6]


def test_the_start_is_reached_from_a_snapshot_and_without_one(run: Run) -> None:
    run.machine.ring.take(run.prepared.port, 0.0)
    run.to(5)
    assert run.go(0) == Arrival(0, 0, 0, ())
    assert bits(run.prepared) == run.truth[0]
    assert not run.prepared.port.parts.optimizer.state
    run.go(5)
    run.machine.ring.forget_after(-1)
    assert run.go(0) == Arrival(0, 0, 0, ())
    assert bits(run.prepared) == run.truth[0]


def test_before_the_first_step_the_start_is_there_already(run: Run) -> None:
    assert bits_of(run.machine.state_at(0)) == run.truth[0]
    assert run.go(0).step == 0
    run.refused(1)


def test_going_back_and_training_on_gives_the_same_bits_as_before(run: Run) -> None:
    run.to(10, snapshots=(2, 6))
    truth = dict(run.truth)
    run.machine.roll_back(5, "a test")
    assert run.step == 5
    run.truth.clear()
    run.to(12)
    assert {s: run.truth[s] for s in range(6, 11)} == {s: truth[s] for s in range(6, 11)}
    for step in (3, 5, 8, 12):
        assert bits_of(run.machine.state_at(step)) == {**truth, **run.truth}[step]


def test_a_snapshot_of_the_line_that_was_left_is_no_base(run: Run) -> None:
    run.to(8, snapshots=(2, 7))
    run.machine.roll_back(4, "a test")
    assert [s.step for s in run.machine.ring.taken] == [2]
    run.to(9)
    assert run.go(8).base_step == 2
    assert bits(run.prepared) == run.truth[8]


def test_a_checkpoint_of_the_line_that_was_left_is_no_base(run: Run) -> None:
    run.to(8, checkpoints=(2, 7))
    run.machine.roll_back(4, "a test")
    run.to(9)
    assert run.go(8).base_step == 2
    assert bits(run.prepared) == run.truth[8]


def test_a_rollback_of_a_rollback(run: Run) -> None:
    run.to(8, snapshots=(1, 3))
    run.machine.roll_back(6, "one")
    run.to(9)
    run.machine.roll_back(2, "two")
    run.to(7)
    for step in (1, 2, 4, 7):
        assert bits_of(run.machine.state_at(step)) == run.truth[step]
    assert [r["to_step"] for r in run.records() if r["kind"] == "rollback"] == [6, 2]
    run.refused(8)


LORA = "lora={r: 2, lora_dropout: 0.2}"


@pytest.mark.parametrize("overrides", [("precision=fp16-emulated", LORA), ("precision=bf16-pure",)], ids=str)
def test_other_formats_and_adapters_with_dropout_come_out_again(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    run = run_of(tmp_path, *overrides, "gradient_accumulation_steps=2")
    run.to(7, snapshots=(4,), checkpoints=(2,))
    for step in (1, 3, 5):
        assert bits_of(run.machine.state_at(step)) == run.truth[step]


def test_refused_batches_and_retries_are_not_computed_but_carried_out(tmp_path: Path) -> None:
    run = run_of(tmp_path, "precision=fp16-emulated", "scaler.growth_interval=3", "scaler.max_retries=2")
    port = run.prepared.port
    mlp = port.parts.model.get_submodule("model.layers.0.mlp")
    poison_output(mlp, at_step(port, 4))
    scaler = port.state.scaler
    parameter = port.parts.parameters[0][1]
    poison_gradient(parameter, lambda: port.state.step == 6 and scaler.scale > 16384, math.inf)
    poison_gradient(parameter, at_step(port, 9), math.inf)
    run.to(12, snapshots=(2,))
    actions = [r["action"] for r in run.records() if r["kind"] == "step"]
    assert actions.count("skip_batch") >= 2
    assert actions.count("retry_smaller_scale") >= 3
    for hook in (mlp._forward_hooks, parameter._backward_hooks):
        hook.clear()  # a redo must not need the fault
    for step in range(13):
        assert bits_of(run.machine.state_at(step)) == run.truth[step], step
    arrival = run.go(5)
    assert (arrival.base_step, arrival.num_redone) == (2, 2), "steps 3 and 5; step 4 was given up"
    run.go(12)
    assert bits(run.prepared) == run.truth[12]


@pytest.mark.parametrize("source", ["checkpoints", "origin"])
def test_without_a_budget_for_snapshots_checkpoints_or_the_start_are_enough(tmp_path: Path, source: str) -> None:
    run = run_of(tmp_path, "snapshots.memory_share=0")
    assert run.machine.ring.num_slots == 0
    assert run.machine.after_step(0.01) == []
    run.to(8, checkpoints=(3, 6) if source == "checkpoints" else ())
    assert bits_of(run.machine.state_at(7)) == run.truth[7]
    assert run.go(5).base_step == (3 if source == "checkpoints" else 0)
    assert bits(run.prepared) == run.truth[5]


def test_going_back_drops_nothing_that_the_ring_holds_when_it_was_only_a_look(run: Run) -> None:
    run.to(8, snapshots=(2, 4, 6))
    kept = [(s.step, bits_of(s)) for s in run.machine.ring.taken]
    run.machine.state_at(5)
    assert [(s.step, bits_of(s)) for s in run.machine.ring.taken] == kept


# ---------------------------------------------------------------- going back for good


def test_a_rollback_is_journalled_with_where_from_and_to(run: Run) -> None:
    run.to(8, snapshots=(3,))
    arrival = run.machine.roll_back(5, "a reason")
    record = next(r for r in run.records() if r["kind"] == "rollback")
    kept = {k: record[k] for k in ("from_step", "to_step", "attempt", "reason", "base")}
    assert kept == {"from_step": 8, "to_step": 5, "attempt": 5, "reason": "a reason", "base": 3}
    assert (arrival.step, arrival.base_step) == (5, 3)
    assert run.step == 5


def test_a_rollback_that_cannot_be_is_not_journalled(run: Run) -> None:
    run.to(8, snapshots=(3,))
    taken = [s.step for s in run.machine.ring.taken]
    before = bits(run.prepared)
    with pytest.raises(Unreachable):
        run.machine.roll_back(20, "a test")
    assert bits(run.prepared) == before
    assert [s.step for s in run.machine.ring.taken] == taken
    assert not [r for r in run.records() if r["kind"] == "rollback"]


def test_after_a_rollback_the_shadow_is_of_the_line_that_is_left(tmp_path: Path) -> None:
    """It is "the state before the step at hand"; one of a step that no longer counts would lead back to it."""
    run = run_of(tmp_path, "snapshots.shadow=true")
    for step in range(1, 7):
        run.to(step)
        run.machine.after_step(0.01)
    assert run.machine.shadow is not None
    assert run.machine.shadow.step == 6
    run.machine.roll_back(3, "a test")
    assert run.machine.shadow is None or run.machine.shadow.step <= 3


def test_no_memory_for_the_shadow_is_a_finding_and_not_the_end_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(tmp_path, "snapshots.shadow=true")
    run.to(2)

    def full(*_args: Any, **_kw: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")

    monkeypatch.setattr(torch, "empty", full)
    findings = run.machine.after_step(0.01)
    assert {f.code for f in findings} == {"SYS014"}


# ---------------------------------------------------------------- the pieces


class Fake:
    """A port that only counts what it is asked to do."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def settle(self, action: Action, reading: Reading, *, clean: bool) -> None:
        self.calls.append((action, reading.step, clean))


@pytest.mark.parametrize("action", [Action.SKIP_BATCH, Action.RETRY_SMALLER_SCALE, Action.HALT])
def test_what_was_not_committed_is_never_computed(action: Action) -> None:
    port = Fake()
    redo(port, Event(3, Reading(2, math.nan, math.nan), action, clean=False))  # type: ignore[arg-type]
    assert port.calls == [(action, 2, False)]


def test_a_state_is_compared_with_its_own_mark(run: Run) -> None:
    port = run.to(2).prepared.port
    mark = fingerprint(port.state_tensors(), port.state_record()).to_json()
    compare(port, mark, 2)
    spoil(dict(port.state_tensors()))
    with pytest.raises(Unreachable, match="NUM120"):
        compare(port, mark, 2)
