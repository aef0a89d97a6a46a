"""What a guard hands out and is set up with, and what it says before the first step."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from finitune.adapters.bare_look import Looks
from finitune.adapters.bare_memory import Room
from finitune.adapters.codes import BAD_AT_START
from finitune.core.incident import Incident
from finitune.core.types import Finding, Reading
from finitune.engine.capsule import CapsuleOptions
from finitune.engine.guard import GuardSettings
from finitune.engine.look.codes import NOT_FINITE
from finitune.engine.policy import Action


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What became of one batch."""

    loss: float
    """Mean loss of the batch; NaN or inf where it was that."""
    committed: bool
    """The batch changed the weights."""
    action: Action
    findings: tuple[Finding, ...]
    """Everything that was found on the way, in order."""
    incident: Incident | None
    """The last failure that was investigated."""
    reading: Reading
    """All numbers of the step."""


@dataclass(frozen=True, slots=True)
class BareSettings:
    """Limits that hardly anybody needs to change."""

    guard: GuardSettings = field(default_factory=GuardSettings)
    max_aborts_in_a_row: int = 8
    detectors: Mapping[str, Mapping[str, Any] | bool] = field(default_factory=dict)
    """By detector: fields of its Config, or False."""
    max_snapshots: int = 8
    memory_share: float = 0.25
    """Of the free memory, for snapshots of the training state."""
    capsule: CapsuleOptions = field(default_factory=CapsuleOptions)
    """What goes into capsules."""
    check_accumulation: bool = False
    """Compute the first step once more, to see whether its gradient depends on how it is cut into micro-batches."""


def at_start(room: Room, looks: Looks, bad_from_start: Collection[str]) -> Iterator[Finding]:
    """What is to be said before the first step. Weights that are not finite are named by the look at them."""
    missing = room.missing()
    if missing is not None:
        yield missing
    found = looks.start()
    yield from found
    named = any(f.code == NOT_FINITE.code for f in found)
    bad = sorted(n for n in bad_from_start if not named or "|" in n)
    if bad:
        yield BAD_AT_START.find(bad[0], count=len(bad), first=bad[0])


def known_of(model: nn.Module) -> dict[str, Mapping[str, Any]]:
    """Settings of detectors that follow from the model: the loss of guessing among the tokens of its vocabulary."""
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    return {"runaway": {"guess_loss": math.log(size)}} if isinstance(size, int) and size > 1 else {}


def exact_loss(loss: torch.Tensor | None, reading: Reading) -> float:
    """The loss to the bit; a Reading has gone through a sum over tokens, and has 0 where nothing is supervised."""
    if loss is None:
        return reading.loss
    exact = float(loss)
    same = math.isclose(exact, reading.loss, rel_tol=1e-5) or not (math.isfinite(exact) or math.isfinite(reading.loss))
    return exact if same or reading.supervised_tokens == 0 else reading.loss
