"""The state of any step is reached again bit for bit, or it is said why not, and nothing has changed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from finitune.core.journal import encode, read
from finitune.core.types import Reading
from finitune.data.loader import Cursor
from finitune.engine.line import Event, line_of
from finitune.engine.policy import Action
from finitune.engine.snapshot import Snapshot
from finitune.engine.timeline import Arrival, Unreachable, compare, redo
from finitune.numerics.digest import digest
from finitune.numerics.fingerprint import fingerprint
from finitune.train import checkpoint
from finitune.train.checkpoint import Content
from finitune.train.loop import Loop
from finitune.train.prepare import Prepared
from finitune.train.time_machine import TimeMachine
from support.faults import at_step, poison_gradient, poison_output
from support.runs import loop_of, ready

SMALL = "tiny-llama:hidden=16,layers=1,heads=2,kv_heads=1,mlp=32"
EMBEDDING = "model.embed_tokens.weight"


def bits(prepared: Prepared) -> str:
    return digest(prepared.port.state_tensors(), prepared.port.state_record())


def bits_of(snapshot: Snapshot) -> str:
    return digest(snapshot.tensors.items(), snapshot.record)


@dataclass
class Run:
    """A tiny run whose snapshots and checkpoints stand where a test wants them."""

    prepared: Prepared
    folder: Path
    loop: Loop = field(init=False)
    machine: TimeMachine = field(init=False)
    truth: dict[int, str] = field(default_factory=dict)
    """The bits after each step."""
    before_digest: dict[int, Callable[[], None]] = field(default_factory=dict)
    """What happens behind the run's back after a step, before its digest is journalled."""

    def __post_init__(self) -> None:
        self.loop = loop_of(self.prepared, self.folder)
        self.machine = TimeMachine(self.prepared, self.loop.journal, self.folder)
        self._note()

    @property
    def step(self) -> int:
        return self.prepared.port.state.step

    def _note(self) -> None:
        state = self.prepared.port.state
        self.before_digest.pop(state.step, lambda: None)()
        self.truth[state.step] = bits(self.prepared)
        if state.step % self.prepared.recipe.snapshots.digest_steps == 0:
            self.machine._journal_digest(None)

    def to(self, step: int, *, snapshots: tuple[int, ...] = (), checkpoints: tuple[int, ...] = ()) -> Run:
        while self.step < step:
            before = self.step
            self.loop.one()
            if self.step == before:
                continue
            self._note()
            if self.step in snapshots:
                assert self.machine.ring.take(self.prepared.port, 0.0) is not None
            if self.step in checkpoints:
                self.save()
        return self

    def save(self) -> Path:
        port = self.prepared.port
        line = len(line_of(self.records()).rollbacks)
        now = Content(dict(port.state_tensors()), port.state_record(), line)
        return checkpoint.write(now, port.parts, self.prepared.tokenizer, self.folder)

    def records(self) -> list[dict[str, Any]]:
        return list(read(self.folder / "journal.jsonl"))

    def go(self, step: int) -> Arrival:
        return self.machine.timeline.go_to(step)

    def refused(self, step: int) -> Unreachable:
        """Going there fails, both ways, with nothing changed."""
        before = bits(self.prepared)
        with pytest.raises(Unreachable) as found:
            self.machine.state_at(step)
        assert bits(self.prepared) == before
        with pytest.raises(Unreachable) as found:
            self.go(step)
        assert bits(self.prepared) == before
        assert all(p.grad is None for _, p in self.prepared.port.parts.parameters)
        assert found.value.finding.data["step"] is not None
        return found.value


def run_of(folder: Path, *overrides: str) -> Run:
    folder.mkdir(exist_ok=True)
    return Run(ready(folder, "data.eval_fraction=0", "snapshots.digest_steps=4", *overrides, model=SMALL), folder)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return run_of(tmp_path)


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
    bases = {s: 0 if s < 5 else 5 if s < 9 else 9 for s in range(13)}
    for step, base in bases.items():
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
    for step in (2, 3, 5, 8):
        assert bits_of(run.machine.state_at(step)) == run.truth[step]
    assert run.go(5).base_step == (3 if source == "checkpoints" else 0)


def test_going_back_drops_nothing_that_the_ring_holds_when_it_was_only_a_look(run: Run) -> None:
    run.to(8, snapshots=(2, 4, 6))
    kept = [(s.step, bits_of(s)) for s in run.machine.ring.taken]
    run.machine.state_at(5)
    assert [(s.step, bits_of(s)) for s in run.machine.ring.taken] == kept


# ---------------------------------------------------------------- damaged bases


def spoil(tensors: dict[str, torch.Tensor], name: str = EMBEDDING) -> None:
    tensors[name].detach().view(torch.uint8).view(-1)[0] ^= 1


def test_a_damaged_snapshot_is_passed_over_and_named_and_the_older_base_used(run: Run) -> None:
    run.to(8, snapshots=(2, 5))
    spoil(run.machine.ring.taken[1].tensors)
    arrival = run.go(7)
    assert (arrival.base_step, arrival.num_redone) == (2, 5)
    assert [(f.code, f.data["step"]) for f in arrival.findings] == [("SYS013", 5)]
    assert "step 5" in arrival.findings[0].where
    assert bits(run.prepared) == run.truth[7]


def test_a_damaged_checkpoint_is_passed_over_and_named(run: Run) -> None:
    run.to(8, checkpoints=(2, 5))
    path = run.folder / "checkpoint-5" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))
    arrival = run.go(7)
    assert (arrival.base_step, [f.code for f in arrival.findings]) == (2, ["SYS013"])
    assert bits(run.prepared) == run.truth[7]


def test_with_all_others_damaged_the_start_is_left(run: Run) -> None:
    run.to(6, snapshots=(2, 4))
    for snapshot in run.machine.ring.taken:
        spoil(snapshot.tensors)
    arrival = run.go(6)
    assert arrival.base_step == 0
    assert [f.data["step"] for f in arrival.findings] == [4, 2]
    assert bits(run.prepared) == run.truth[6]


@dataclass
class Refusing:
    """A stored state that looks whole and cannot be restored: of another version, or its files vanish meanwhile."""

    step: int
    attempt: int
    error: Exception

    def intact(self) -> bool:
        return True

    def restore(self, port: Any) -> None:
        raise self.error


@pytest.mark.parametrize("error", [OSError("gone"), ValueError("training state of schema 1"), KeyError("w")])
def test_a_base_that_cannot_be_restored_is_passed_over_like_a_damaged_one(run: Run, error: Exception) -> None:
    run.to(8, snapshots=(2,))
    real = run.machine.timeline.stored
    run.machine.timeline.stored = lambda: [Refusing(5, 5, error), *real()]
    arrival = run.go(7)
    assert (arrival.base_step, [f.code for f in arrival.findings]) == (2, ["SYS013"])
    assert bits(run.prepared) == run.truth[7]


def test_where_nothing_is_left_that_is_said_with_the_damaged_ones(run: Run) -> None:
    run.to(6, snapshots=(4,))
    spoil(run.machine.ring.taken[0].tensors)
    run.machine.timeline.stored = tuple
    finding = run.refused(5).finding
    assert finding.code == "SYS012"
    assert "step 4" in finding.data["reason"]
    assert str(run.folder / "journal.jsonl") == finding.data["journal"]


# ---------------------------------------------------------------- steps that do not come out again


class Unseeded(nn.Module):
    """A layer whose author has a random generator of his own."""

    def __init__(self, inner: nn.Module, when: Callable[[], bool]) -> None:
        super().__init__()
        self.inner, self.when = inner, when
        self.generator = torch.Generator().manual_seed(5)

    def forward(self, *args: Any, **kw: Any) -> torch.Tensor:
        out = self.inner(*args, **kw)
        return out * (1 + 100 * torch.rand((), generator=self.generator)) if self.when() else out


def test_a_step_that_does_not_repeat_is_named_with_the_number_that_differs(run: Run) -> None:
    layer = run.prepared.port.parts.model.get_submodule("model.layers.0")
    layer.mlp = Unseeded(layer.mlp, at_step(run.prepared.port, 5))
    run.to(8, snapshots=(2,))
    finding = run.refused(7).finding
    assert (finding.code, finding.data["step"], finding.data["what"]) == ("NUM120", 5, "loss")
    assert finding.where == "step 5: loss"
    journalled = next(r["loss"] for r in run.records() if r["kind"] == "step" and r["step"] == 5)
    assert finding.data["was"] == repr(journalled)
    assert finding.data["now"] != finding.data["was"]
    assert bits_of(run.machine.state_at(4)) == run.truth[4], "what comes before it is as good as ever"


def test_a_gradient_alone_that_does_not_repeat_is_named(run: Run) -> None:
    port = run.prepared.port
    generator, when = torch.Generator().manual_seed(5), at_step(port, 5)
    parameter = port.parts.parameters[0][1]
    parameter.register_hook(lambda g: g * (1 + torch.rand((), generator=generator)) if when() else None)
    run.to(8, snapshots=(2,))
    finding = run.refused(6).finding
    assert (finding.code, finding.data["step"], finding.data["what"]) == ("NUM120", 5, "grad_norm")


def unused_token(run: Run) -> int:
    """A token that stands in no row of the data: its embedding has no part in any loss (the head is not tied)."""
    port = run.prepared.port
    used = {int(t) for step in range(24) for b in port.parts.loader.at(Cursor(0, step)) for t in b.ids_BT.unique()}
    return next(t for t in range(port.parts.model.config.vocab_size) if t not in used)


def test_a_weight_that_was_changed_behind_the_runs_back_is_named_at_the_next_digest(run: Run) -> None:
    """It has no part in the losses, so that only the digest tells. Digests are journalled every 4 steps."""
    row = unused_token(run)

    def change() -> None:
        with torch.no_grad():
            dict(run.prepared.port.parts.parameters)[EMBEDDING][row, 0] += 1.0

    run.before_digest[5] = change
    run.to(11, snapshots=(2,))
    assert bits_of(run.machine.state_at(4)) == run.truth[4]
    for step in (8, 9, 11):
        finding = run.refused(step).finding
        assert (finding.code, finding.data["step"], finding.data["what"]) == ("NUM120", 8, EMBEDDING)
        assert finding.where == f"step 8: {EMBEDDING}"


@pytest.mark.parametrize("slot", ["exp_avg", "exp_avg_sq", "step"])
def test_a_moment_that_was_changed_is_named(run: Run, slot: str) -> None:
    name = f"{EMBEDDING}|{slot}"

    def change() -> None:
        dict(run.prepared.port.state_tensors())[name].view(-1)[0] += 1.0

    run.before_digest[8] = change
    run.to(9, snapshots=(2,))
    finding = run.refused(8).finding
    assert (finding.code, finding.data["what"]) == ("NUM120", name)


def test_a_changed_counter_is_called_the_record(run: Run) -> None:
    def change() -> None:
        run.prepared.port.state.supervised_tokens += 1

    run.before_digest[8] = change
    run.to(9, snapshots=(2,))
    finding = run.refused(8).finding
    assert (finding.code, finding.data["what"]) == ("NUM120", "(record)")


def test_a_snapshot_of_a_state_that_is_not_the_journalled_one_is_found_at_once(run: Run) -> None:
    """The digest of step 4 was journalled; then a weight changed, and only then the snapshot was taken."""
    run.to(4)
    spoil(dict(run.prepared.port.state_tensors()))
    run.machine.ring.take(run.prepared.port, 0.0)
    assert run.machine.ring.taken[-1].intact()
    finding = run.refused(4).finding
    assert (finding.code, finding.data["what"]) == ("NUM120", EMBEDDING)


def test_a_larger_weight_change_shows_in_the_numbers_of_the_next_step(run: Run) -> None:
    def change() -> None:
        with torch.no_grad():
            run.prepared.port.parts.parameters[-1][1].mul_(1.5)

    run.before_digest[5] = change
    run.to(8, snapshots=(2,))
    finding = run.refused(8).finding
    assert (finding.code, finding.data["step"], finding.data["what"]) == ("NUM120", 6, "loss")


def test_the_present_state_survives_an_error_of_any_kind(run: Run) -> None:
    run.to(6, snapshots=(2,))
    before = bits(run.prepared)
    mlp = run.prepared.port.parts.model.get_submodule("model.layers.0.mlp")

    def explode(*_args: Any) -> None:
        if run.step == 4:
            raise RuntimeError("a model of its own will")

    handle = mlp.register_forward_hook(explode)
    for action in (run.go, run.machine.state_at, lambda step: run.machine.roll_back(step, "a test")):
        with pytest.raises(RuntimeError, match="own will"):
            action(6)
        assert bits(run.prepared) == before
    handle.remove()
    assert run.go(6).step == 6
    assert [r for r in run.records() if r["kind"] == "rollback"] == []


# ---------------------------------------------------------------- gaps in the journal


def without(path: Path, drop: Callable[[dict[str, Any]], bool], records: list[dict[str, Any]]) -> None:
    """Write a journal anew without some of its records; plain lines, as an older version would."""
    kept = [json.dumps(encode(r | {"schema": 1})) for r in records if not drop(r)]
    path.write_text("\n".join(kept) + "\n")


def test_a_gap_ends_what_can_be_reached_from_before_it(run: Run) -> None:
    run.to(9, snapshots=(2, 6))
    before = bits(run.prepared)
    without(run.folder / "journal.jsonl", lambda r: r["kind"] == "step" and r["step"] == 4, run.records())
    assert bits_of(run.machine.state_at(3)) == run.truth[3]
    assert bits_of(run.machine.state_at(8)) == run.truth[8]
    for step in (4, 5):
        finding = run.refused(step).finding
        assert (finding.code, finding.data["step"]) == ("SYS012", step)
    assert bits(run.prepared) == before


def test_a_lost_retry_is_a_gap_too(tmp_path: Path) -> None:
    run = run_of(tmp_path, "precision=fp16-emulated")
    scaler = run.prepared.port.state.scaler
    poison_gradient(run.prepared.port.parts.parameters[0][1], lambda: run.step == 3 and scaler.scale > 32768, math.inf)
    run.to(6, snapshots=(2,))
    without(run.folder / "journal.jsonl", lambda r: r.get("action") == "retry_smaller_scale", run.records())
    assert run.refused(5).finding.code == "SYS012"


@pytest.mark.parametrize("step", [7, 100, -1])
def test_a_step_that_was_never_made_is_unknown(run: Run, step: int) -> None:
    run.to(6, snapshots=(2,))
    finding = run.refused(step).finding
    assert (finding.code, finding.where) == ("SYS012", f"step {step}")
    assert finding.data["reason"]


def test_a_journal_that_has_vanished_is_said_and_changes_nothing(run: Run) -> None:
    run.to(6, snapshots=(2,))
    before = bits(run.prepared)
    (run.folder / "journal.jsonl").unlink()
    run.loop.journal.abandon()
    for action in (run.go, run.machine.state_at):
        with pytest.raises(Unreachable, match="SYS012"):
            action(5)
        assert bits(run.prepared) == before


@pytest.mark.parametrize("mark", [None, 5, "text", []])
def test_a_journalled_digest_that_is_no_record_is_left_out(run: Run, mark: Any) -> None:
    run.to(3, snapshots=(2,))
    run.loop.journal.write("state", step=3, attempt=3, mark=mark)
    run.to(6)
    assert run.go(5).step == 5


@pytest.mark.parametrize("mark", [{}, {"digest": 1}, {"digest": "x", "tensors": None}])
def test_a_journalled_digest_of_another_kind_cannot_be_confirmed(run: Run, mark: Any) -> None:
    run.to(3, snapshots=(2,))
    run.loop.journal.write("state", step=3, attempt=3, mark=mark)
    run.to(6)
    finding = run.refused(5).finding
    assert (finding.code, finding.data["what"]) == ("NUM120", "(digest)")


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Journal lines are held back in memory; the run goes on, and must be able to go back."""

    def full(*_args: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        yield


def test_records_that_still_wait_for_the_disk_count(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.to(4, snapshots=(2,))
    with full_disk(monkeypatch):
        run.to(7)
        assert run.loop.journal.pending_bytes
        assert bits_of(run.machine.state_at(6)) == run.truth[6]


def test_a_rollback_that_still_waits_for_the_disk_counts_for_checkpoints_too(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.to(8, checkpoints=(2, 7))
    with full_disk(monkeypatch):
        run.machine.roll_back(4, "a test")
        run.to(9)
        assert run.go(8).base_step == 2, "checkpoint-7 is of the line that was left"
        assert bits(run.prepared) == run.truth[8]


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


@pytest.fixture(autouse=True)
def _drawn() -> None:
    """Whatever the global generator did before must not matter."""
    torch.rand(3)
