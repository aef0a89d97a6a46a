"""How much memory the states kept in memory may take, decided before training and shown in the plan."""

from __future__ import annotations

from dataclasses import dataclass

import psutil

from finitune.core.messages.catalogue import text
from finitune.core.types import Finding
from finitune.core.units import bytes_text
from finitune.engine.codes import MEMORY_SHORT
from finitune.engine.codes_time import NO_SNAPSHOTS
from finitune.engine.snapshot import SnapshotRing, state_bytes
from finitune.train.plan import Derived, Plan
from finitune.train.recipe import Recipe
from finitune.train.step import TrainPort

# Moments that the optimizer keeps for each weight, in the weight's own number format.
_MOMENTS = {"adamw_torch_fused": 2, "adamw_torch": 2, "sgd": 1}


@dataclass(frozen=True, slots=True)
class SnapshotPlan:
    """The budget and what it is spent on."""

    snapshot_bytes: int
    budget_bytes: int
    free_bytes: int
    num_slots: int
    """Snapshots in the ring."""
    background: bool
    """There is memory for the copy that a background save needs."""
    shadow: bool

    @property
    def used_bytes(self) -> int:
        """What all of it takes once it is filled."""
        return self.snapshot_bytes * (self.num_slots + self.background + self.shadow)

    def ring(self, recipe: Recipe) -> SnapshotRing:
        """The empty ring."""
        return SnapshotRing(self.num_slots, cost_share=recipe.snapshots.cost_share)


def plan_snapshots(recipe: Recipe, port: TrainPort, free_bytes: int | None = None) -> SnapshotPlan:
    """Share the budget out: the copy for saves first, then the shadow, then the ring."""
    settings = recipe.snapshots
    free = int(psutil.virtual_memory().available) if free_bytes is None else free_bytes
    size = state_bytes(port) * (1 + _MOMENTS[recipe.optim])
    budget = int(free * settings.memory_share)
    fitting = budget // max(1, size)
    background = recipe.save_in_background and fitting > 0
    shadow = settings.shadow and fitting > background
    slots = max(0, min(settings.max_count, fitting - background - shadow))
    return SnapshotPlan(size, budget, free, int(slots), background, shadow)


def derived(planned: SnapshotPlan) -> Derived:
    """The line of the plan that says so."""
    value = text("train.snapshots", count=planned.num_slots, size=bytes_text(planned.snapshot_bytes))
    key = "train.why_snapshots" if planned.background else "train.why_snapshots_only"
    why = text(key, used=bytes_text(planned.used_bytes), free=bytes_text(planned.free_bytes))
    return Derived("snapshots", value, why)


def finding(recipe: Recipe, planned: SnapshotPlan) -> list[Finding]:
    """A note where snapshots were wanted and none fits."""
    share = recipe.snapshots.memory_share
    if planned.num_slots or share <= 0:
        return []
    return [
        NO_SNAPSHOTS.find(
            needed=bytes_text(planned.snapshot_bytes),
            budget=bytes_text(planned.budget_bytes),
            free=bytes_text(planned.free_bytes),
            share=share,
        )
    ]


def shortage(recipe: Recipe, planned: Plan) -> list[Finding]:
    """A warning where the run will need more memory than there is."""
    if planned.memory_bytes <= planned.available_bytes:
        return []
    return [
        MEMORY_SHORT.find(
            needed=bytes_text(planned.memory_bytes),
            free=bytes_text(planned.available_bytes),
            batch=recipe.per_device_train_batch_size,
            length=recipe.data.max_length,
        )
    ]
