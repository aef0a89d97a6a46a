"""Observers watch a run: displays, trackers, tests. They are read-only and never needed for correctness.

An observer that raises is reported once and left out from then on; it can neither stop nor change the
training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from finitune.core.incident import Incident
from finitune.core.types import Finding, Judgement, Reading, RowId
from finitune.engine.codes import OBSERVER_FAILED
from finitune.engine.policy import Action


@dataclass(frozen=True, slots=True)
class StepEvent:
    """One transaction and what the guard did about it."""

    reading: Reading
    judgement: Judgement
    action: Action
    rows: tuple[RowId, ...]
    total_steps: int
    updates: int
    time_s: float


@dataclass(frozen=True, slots=True)
class EvalEvent:
    """Held-out loss (mean over supervised tokens) after ``step`` batches; ``rows`` rows were used."""

    step: int
    loss: float
    rows: int
    supervised_tokens: int
    time_s: float


@dataclass(frozen=True, slots=True)
class SampleEvent:
    """An answer of the model in training."""

    step: int
    prompt: str
    answer: str
    finding: Finding | None = None


class Observer(Protocol):
    """What an observer may implement; every method returns nothing."""

    def on_plan(self, plan: Any) -> None:
        """The derived settings, before training."""

    def on_step(self, event: StepEvent) -> None:
        """After every transaction."""

    def on_eval(self, event: EvalEvent) -> None:
        """After every evaluation."""

    def on_sample(self, event: SampleEvent) -> None:
        """After every sampled answer."""

    def on_finding(self, finding: Finding) -> None:
        """A finding outside a step (data, saving, machine)."""

    def on_incident(self, incident: Incident, run_dir: str) -> None:
        """After a failure was investigated and treated."""

    def on_save(self, path: str, step: int) -> None:
        """After a checkpoint stands."""

    def on_end(self, result: Any) -> None:
        """The end of the run, whatever it was."""


class Observers:
    """Calls all observers, in order, and drops one that raises."""

    def __init__(self, members: Sequence[Any]) -> None:
        self._members = list(members)
        self.failures: list[Finding] = []

    def tell(self, event: str, *args: Any) -> None:
        """Call ``on_<event>`` of every observer that has it."""
        for member in list(self._members):
            method = getattr(member, f"on_{event}", None)
            if method is None:
                continue
            try:
                method(*args)
            except Exception as error:  # noqa: BLE001  an observer may fail in any way; training must not
                self._members.remove(member)
                self.failures.append(
                    OBSERVER_FAILED.find(type(member).__name__, name=type(member).__name__, error=repr(error))
                )
