"""What stands in the way to a step is named: damaged bases, steps that do not repeat, gaps; and nothing has changed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from finitune.core.journal import encode
from finitune.data.loader import Cursor
from finitune.engine.timeline import Unreachable
from support.faults import at_step, poison_gradient
from support.timelines import EMBEDDING, Run, Shared, bits, bits_of, full_disk, run_of, spoil


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    return Shared.of(run_of(tmp_path_factory.mktemp("shared")).prepared)


@pytest.fixture
def run(shared: Shared, tmp_path: Path) -> Run:
    return shared.run(tmp_path)


# ---------------------------------------------------------------- damaged bases


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


def test_a_step_that_does_not_repeat_is_named_with_the_number_that_differs(tmp_path: Path) -> None:
    run = run_of(tmp_path)
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


def test_a_gradient_alone_that_does_not_repeat_is_named(tmp_path: Path) -> None:
    run = run_of(tmp_path)
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
