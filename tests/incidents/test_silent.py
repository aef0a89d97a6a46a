"""Faults by which no number looks wrong: an update that goes uphill, a loss that is a sum where it was a mean."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import finitune
from finitune.core.errors import Halted
from finitune.core.incident import Trigger
from finitune.core.types import Severity
from finitune.engine import rescaled, silent
from incidents import planted
from support.incidents import PORTS, summary, tell

UPHILL, RESCALED = "OPT120", "OPT121"


@pytest.mark.parametrize("port", PORTS)
def test_an_update_that_goes_uphill_stops_the_run_before_its_loss_shows_it(tmp_path: Path, port: str) -> None:
    story = tell(
        port,
        tmp_path,
        planted.wrong_updates("uphill", after=1),
        "optim=adamw_torch",
        "learning_rate=1e-4",
        steps=12,
        optimizer=lambda m: torch.optim.AdamW(m.parameters(), 1e-4),
    )
    found = story.one
    assert found.trigger is Trigger.SILENT, summary(found)
    assert found.diagnosis.code == "OPT404", summary(found)
    assert [c.code for c in found.diagnosis.causes if c.named] == ["OPT404"], summary(found)
    assert found.step == 4
    assert story.stopped
    assert found.finding.code == UPHILL


class Tiny(nn.Module):
    """A few layers that learn a linear map."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(24, 64), nn.Linear(64, 24)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(torch.nn.functional.dropout(torch.tanh(self.a(x)), 0.1, self.training))
        return out


def batches(count: int, micros: int) -> Iterator[list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(3)
    for _ in range(count):
        yield [{"x": torch.randn(32, 24, generator=generator)} for _ in range(micros)]


def walked(factor: float, *, micros: int = 4, at: int = 24, steps: int = 40, sgd: bool = True) -> Any:
    """A guarded loop whose loss is ``factor`` times what it was from a step on; its guard."""
    model, made = Tiny(), {"step": 0}

    def loss(model: nn.Module, batch: Any) -> Tensor:
        error = (model(batch["x"]) - batch["x"]).square().mean()
        return error * (factor if made["step"] >= at else 1.0)

    kind = torch.optim.SGD if sgd else torch.optim.AdamW
    guard = finitune.guard(model, kind(model.parameters(), 1e-3), loss, max_grad_norm=0.05)
    with guard:
        for batch in batches(steps, micros):
            made["step"] += 1
            found = guard.step(batch).findings
            made.setdefault("codes", []).extend((made["step"], f.code) for f in found)  # type: ignore[attr-defined, arg-type]
    return guard, [pair for pair in made.get("codes", ()) if pair[1] in (UPHILL, RESCALED)]


@pytest.mark.parametrize("factor", [4.0, 0.25])
@pytest.mark.parametrize("sgd", [True, False])
def test_a_sum_that_takes_the_place_of_a_mean_is_named_once_and_the_run_goes_on(factor: float, sgd: bool) -> None:
    guard, told = walked(factor, sgd=sgd)
    assert told == [(26, RESCALED)]
    assert [(i.step, i.diagnosis.code, i.remedy) for i in guard.incidents] == [(26, "OPT403", None)]
    found = next(e for e in guard.incidents[0].evidence if e.experiment == "past_loss")
    assert found.numbers["factor"] == pytest.approx(factor, rel=1e-3)
    assert guard.port.state.step == 40


@pytest.mark.parametrize(("factor", "micros"), [(3.0, 4), (2.5, 2), (4.0, 1)])
def test_a_loss_that_is_weighed_anew_on_purpose_is_no_fault(factor: float, micros: int) -> None:
    guard, told = walked(factor, micros=micros)
    assert told == []
    assert not [i for i in guard.incidents if i.diagnosis.code == "OPT403"]


def test_the_look_back_leaves_the_run_its_bits() -> None:
    """A loss weighed anew is looked into and found fine: weights as in a loop without a guard."""
    guard, _ = walked(3.0)
    model = Tiny()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    torch.manual_seed(0)
    Tiny()
    for number, micros in enumerate(batches(40, 4), start=1):
        for batch in micros:
            error = (model(batch["x"]) - batch["x"]).square().mean()
            (error * (3.0 if number >= 24 else 1.0) / 4).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
    own = dict(guard.port.model.named_parameters())
    assert all(torch.equal(p, own[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("port", PORTS)
def test_looking_back_at_every_step_changes_nothing(tmp_path: Path, port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clean = tell(port, tmp_path / "clean", lambda _rig: None, steps=12)
    looked: list[float] = []

    def once_more(port: Any, past: Any) -> Any:
        looked.append((again := rescaled.once_more(port, past)).factor)
        return again

    monkeypatch.setattr(silent, "leapt", lambda _history: True)
    monkeypatch.setattr(silent, "_QUIET_STEPS", 1)
    monkeypatch.setattr(silent, "_LONGEST_QUIET_STEPS", 1)
    monkeypatch.setattr(silent, "once_more", once_more)
    story = tell(port, tmp_path / "looked", lambda _rig: None, steps=12)
    assert story.losses == clean.losses
    assert not story.incidents
    assert len(looked) >= 5
    assert set(looked) == {1.0}, "a step of the past has its own loss, to the bit"


def test_harder_data_are_no_other_formula() -> None:
    model, made = Tiny(), []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        found: Tensor = (model(batch["x"]) - batch["x"]).square().mean()
        return found

    with finitune.guard(model, torch.optim.SGD(model.parameters(), 1e-3), loss, max_grad_norm=0.05) as guard:
        for step, micros in enumerate(batches(40, 4), start=1):
            harder = [{"x": m["x"] * (2.0 if step >= 24 else 1.0)} for m in micros]
            made += [f.code for f in guard.step(harder).findings if f.severity is not Severity.NOTE]
    assert RESCALED not in made


class Uphill(torch.optim.SGD):
    """Goes the other way from an update on."""

    made, after = 0, 6

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        was = [(p, p.clone()) for g in self.param_groups for p in g["params"]]
        super().step(closure)
        self.made += 1
        for p, old in was:
            if self.made > self.after:
                p.copy_(2 * old - p)


@pytest.mark.parametrize("policy", ["auto", "observe"])
def test_it_is_found_under_a_loss_scale_and_only_told_where_nothing_may_be_done(policy: str) -> None:
    model = Tiny()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        found: Tensor = (model(batch["x"]) - batch["x"]).square().mean()
        return found

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    optimizer = Uphill(model.parameters(), 1e-2, momentum=0.9)
    guard = finitune.guard(model, optimizer, loss, scaler=scaler, policy=policy)
    halted, told = False, []
    try:
        for batch in batches(48, 1):
            told += [f.code for f in guard.step(batch).findings]
    except Halted:
        halted = True
    assert guard.incidents[0].diagnosis.code == "OPT404"
    assert halted is (policy == "auto")
    assert guard.port.state.step == (35 if halted else 48)
    assert told.count(UPHILL) == (0 if halted else 1)
