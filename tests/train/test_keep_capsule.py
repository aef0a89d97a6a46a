"""What a run keeps of its incidents: written for every one, within a limit, and never at the run's cost."""

from __future__ import annotations

import json

import pytest

from finitune.engine.capsule import CapsuleOptions
from finitune.engine.capsule_read import read_capsule
from finitune.engine.snapshot import as_snapshot
from finitune.numerics.fingerprint import fingerprint
from finitune.train import keep_capsule
from finitune.train.keep_capsule import CapsuleKeeper
from support.capsules import failing

pytestmark = pytest.mark.usefixtures("quick_plan")


@pytest.fixture
def made(tmp_path):
    return failing(tmp_path)


def keeper(made, found=None, **options):
    run_dir = made.home / "run"
    told = found if found is not None else []
    return CapsuleKeeper(run_dir, made.port, made.recipe, told.append, CapsuleOptions(**options))


def test_an_incident_is_kept_with_its_capsule_and_told_again_when_it_is_closed(made):
    keeping = keeper(made)
    before = as_snapshot(made.port)
    place = keeping.keep(made.incident, made.case, before)
    assert place == "incidents/001/capsule"
    assert read_capsule(made.home / "run" / place).weights == "lora"
    assert fingerprint(made.port.state_tensors(), made.port.state_record()).digest == before.mark.digest
    for outcome in ("", "cured"):
        made.incident.outcome = outcome
        keeping.tell(made.incident)
        assert json.loads((made.home / "run/incidents/001/incident.json").read_text())["outcome"] == outcome
    assert read_capsule(made.home / "run" / "incidents" / "001").step == 3


def test_a_disk_that_refuses_costs_the_capsule_and_is_said(made, monkeypatch):
    found: list = []
    keeping = keeper(made, found)

    def full(*_args, **_kw):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(keep_capsule, "write_capsule", full)
    monkeypatch.setattr(keep_capsule, "write_incident", full)
    assert keeping.keep(made.incident, made.case, as_snapshot(made.port)) is None
    keeping.tell(made.incident)
    assert [f.code for f in found] == ["SYS418", "SYS418"]
    assert "No space left" in found[0].data["reason"]


def test_later_capsules_hold_no_weights_once_the_run_has_many(made, monkeypatch):
    keeping = keeper(made)
    keeping.keep(made.incident, made.case, as_snapshot(made.port))
    monkeypatch.setattr(keep_capsule, "MAX_CAPSULES_BYTES", 1000)
    made.incident.number = 2
    place = keeping.keep(made.incident, made.case, as_snapshot(made.port))
    assert read_capsule(made.home / "run" / place).weights == "digest"


def test_a_capsule_without_weights_is_replayed_from_the_run_it_lies_in(tmp_path):
    from finitune.engine.capsule_replay import Replay
    from finitune.train.replay_capsule import replay_capsule
    from finitune.train.run import train_run
    from support.capsules import case_of
    from support.runs import tiny_recipe

    train_run(tiny_recipe(tmp_path, "max_steps=4", "data.eval_fraction=0", "save_steps=100"))
    made = failing(tmp_path, "max_steps=4", "data.eval_fraction=0")
    assert case_of(made.port, made.case.reading, made.case.trigger)[0].reading.step == 3
    path = made.written(weights="digest", rows="ids")
    done = replay_capsule(str(path))
    assert done.verdict is Replay.BITS, done
