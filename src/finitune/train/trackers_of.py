"""Trackers as observers: the numbers of a run for tools that people already use."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from finitune.core import registry
from finitune.core.errors import UserError
from finitune.engine.codes import MISSING_PACKAGE
from finitune.train.observer import EvalEvent, StepEvent


class Tracked:
    """One tracker, fed with scalars; non-finite values go through as they are."""

    def __init__(self, tracker: Any) -> None:
        self._tracker = tracker

    def on_step(self, event: StepEvent) -> None:
        """Scalars of a step."""
        reading = event.reading
        values = {
            "train/loss": reading.loss,
            "train/grad_norm": reading.grad_norm,
            "train/learning_rate": reading.lr,
            "train/loss_scale": reading.loss_scale,
            "train/headroom_bits": reading.headroom_bits,
            "train/committed": float(event.judgement.verdict.value == "commit"),
        }
        self._tracker.log(reading.step, {k: v for k, v in values.items() if v is not None})

    def on_eval(self, event: EvalEvent) -> None:
        """Held-out loss."""
        self._tracker.log(event.step, {"eval/loss": event.loss})

    def on_end(self, _result: Any) -> None:
        """Flush and close."""
        self._tracker.close()


def missing_packages(names: Sequence[str]) -> list[UserError]:
    """One fault for each tracker whose package is not installed."""
    needed = [(name, getattr(registry.load("trackers", name), "REQUIRES", None)) for name in names]
    return [
        UserError(MISSING_PACKAGE, "report_to", name=name, package=package)
        for name, package in needed
        if package is not None and find_spec(package) is None
    ]


def trackers_of(names: Sequence[str], run_dir: Path) -> list[Tracked]:
    """The trackers a recipe names; their presence was checked with the recipe."""
    return [Tracked(registry.load("trackers", name).Tracker(run_dir)) for name in names]
