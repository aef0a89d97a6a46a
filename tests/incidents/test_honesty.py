"""Honesty: what does not repeat, what nothing explains, and policies that forbid to act."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from finitune.core.errors import Exit
from finitune.engine.policy import Action
from finitune.train import checkpoint
from incidents import planted
from support.incidents import PORTS, Rig, Story, named, ours, summary, tell
from support.killed import records


def bits(story: Story) -> list[torch.Tensor]:
    return [p.detach().clone() for p in story.rig.model.parameters()]


def nothing(_rig: Rig) -> None:
    """A healthy run."""


@pytest.mark.parametrize("port", PORTS)
@pytest.mark.parametrize("step", [3, 7])
def test_what_does_not_repeat_is_said_so_and_the_step_is_computed_again(tmp_path: Path, port: str, step: int) -> None:
    story = tell(port, tmp_path / "hurt", planted.once(step))
    found = story.one
    assert found.step == step
    assert found.diagnosis.code == "SYS400", summary(found)
    assert named(found) == ["SYS400"], summary(found)
    assert found.remedy == "retry", summary(found)
    assert sorted(story.losses) == list(range(1, 11))
    assert not story.poisoned
    clean = tell(port, tmp_path / "clean", planted.once(10**6))
    assert all(torch.equal(a, b) for a, b in zip(bits(story), bits(clean), strict=True))


@pytest.mark.parametrize("port", PORTS)
def test_what_nothing_explains_is_unknown_and_the_run_halts_with_finite_weights(tmp_path: Path, port: str) -> None:
    story = tell(port, tmp_path, planted.for_ever(8), "save_steps=2", "guard.trust_steps=4", steps=14)
    found = story.first
    assert found.step == 8
    assert found.diagnosis.code == "unknown", summary(found)
    assert named(found) == []
    assert found.outcome == "halted"
    assert not story.poisoned
    assert story.stopped
    if port == "ours":
        assert story.result.exit_code == Exit.HALTED == 3
        assert story.run is not None
        kept = checkpoint.listed(story.run)
        assert kept
        assert any(checkpoint.is_trusted(c) for c in kept)


@pytest.mark.parametrize("port", PORTS)
def test_observe_says_all_and_changes_nothing(tmp_path: Path, port: str) -> None:
    [(step, row)] = planted.places(1)
    fault = planted.nan_inputs((step, row))
    story = tell(port, tmp_path, fault, "guard.policy=observe", policy="observe")
    found = story.one
    assert found.diagnosis.code == "DAT401", summary(found)
    assert found.remedy is None
    assert found.trials == ()
    assert found.outcome == "observed"
    assert dict(story.actions)[step] is Action.SKIP_BATCH
    assert sorted(story.losses) == [s for s in range(1, 11) if s != step]
    assert not story.poisoned


@pytest.mark.parametrize("port", PORTS)
def test_safe_applies_no_plan_that_loses_something(tmp_path: Path, port: str) -> None:
    [(step, row)] = planted.places(1)
    story = tell(port, tmp_path, planted.nan_inputs((step, row)), "guard.policy=safe", policy="safe")
    found = story.one
    assert found.diagnosis.code == "DAT401", summary(found)
    assert found.remedy is None
    assert all(t.plan["safety"] == "safe" for t in found.trials), summary(found)
    assert story.stopped
    assert not story.poisoned


@pytest.mark.parametrize("port", PORTS)
def test_safe_applies_a_cure_that_loses_nothing(tmp_path: Path, port: str) -> None:
    more = ("precision=fp16-emulated", "guard.policy=safe")
    story = tell(port, tmp_path, planted.grown_mlp(1), *more, half=True, policy="safe", steps=5)
    assert story.first.remedy in ("fp32_modules", "bf16", "fp32"), summary(story.first)
    assert sorted(story.losses) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("port", PORTS)
def test_without_a_budget_nothing_is_investigated_and_the_batch_is_refused(tmp_path: Path, port: str) -> None:
    [(step, row)] = planted.places(1)
    fault = planted.nan_inputs((step, row))
    story = tell(port, tmp_path, fault, "guard.max_replays=0", max_replays=0)
    assert story.incidents == []
    assert dict(story.actions)[step] is Action.SKIP_BATCH
    assert not story.poisoned
    assert not story.stopped


@pytest.mark.parametrize("budget", [1, 3, 8])
def test_a_small_budget_is_kept_and_never_ends_in_a_wrong_name(tmp_path: Path, budget: int) -> None:
    [(step, row)] = planted.places(1)
    story = ours(tmp_path, planted.nan_inputs((step, row)), f"guard.max_replays={budget}")
    found = story.first
    assert found.replays <= budget + 1.5, summary(found)
    assert set(named(found)) <= {"DAT401"}, summary(found)
    assert not story.poisoned


def test_every_incident_is_in_the_journal(tmp_path: Path) -> None:
    [(step, row)] = planted.places(0)
    story = ours(tmp_path, planted.nan_inputs((step, row)))
    assert story.run is not None
    [record] = records(story.run, "incident")
    assert record["incident"]["step"] == step
    phases = [r["phase"] for r in records(story.run, "phase")]
    assert phases == ["frozen", "replaying", "localising", "diagnosing", "recovering", "probation"]
