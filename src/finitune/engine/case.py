"""A case: what is known of a failure so far. Plain values, no tensors; causes and remedies judge by nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from finitune.core.incident import Evidence, Result, Suspect, Trigger, Verdict
from finitune.core.types import Finding, Reading


@dataclass(frozen=True, slots=True)
class Case:
    """What is known of a failure so far."""

    trigger: Trigger
    finding: Finding
    reading: Reading
    facts: Mapping[str, Any] = field(default_factory=dict)
    """See ``ReplayPort.facts``; also ``capabilities`` (names) and ``num_clean`` (clean batches at hand)."""
    past: Mapping[str, Any] = field(default_factory=dict)
    """Of the run so far: median_loss, median_grad_norm, first_loss, recent_losses, steps, num_overflows, incidents."""
    verdict: Verdict | None = None
    suspects: tuple[Suspect, ...] = ()
    evidence: Mapping[str, Evidence] = field(default_factory=dict)
    """By name of the experiment, in the order in which they were made."""

    def result(self, experiment: str) -> Result:
        """What an experiment showed; NOT_RUN where it was not made."""
        found = self.evidence.get(experiment)
        return found.result if found is not None else Result.NOT_RUN

    def good(self, *experiments: str) -> bool:
        """All of these made the failure go away."""
        return all(self.result(e) is Result.GOOD for e in experiments)

    def bad(self, *experiments: str) -> bool:
        """The failure stayed under each of these."""
        return all(self.result(e) is Result.BAD for e in experiments)

    def number(self, experiment: str, name: str, default: Any = None) -> Any:
        """A number of an experiment's evidence."""
        found = self.evidence.get(experiment)
        return default if found is None else found.numbers.get(name, default)

    def suspects_of(self, *kinds: str) -> tuple[Suspect, ...]:
        """The suspects of these kinds, in order."""
        return tuple(s for s in self.suspects if s.kind in kinds)

    @property
    def is_half(self) -> bool:
        """Products are computed in fp16, natively or emulated."""
        return str(self.facts.get("precision", "")).startswith("fp16")

    @property
    def has_half_weights(self) -> bool:
        """Trainable weights are stored in fp16."""
        return "float16" in self.facts.get("weights", ())

    def with_evidence(self, evidence: Evidence) -> Case:
        """The case with one more experiment made."""
        return replace(self, evidence={**self.evidence, evidence.experiment: evidence})

    def with_suspects(self, *suspects: Suspect) -> Case:
        """The case with more suspects; one that is known already is replaced."""
        fresh = {(s.kind, s.name) for s in suspects}
        return replace(self, suspects=(*(s for s in self.suspects if (s.kind, s.name) not in fresh), *suspects))

    def is_bad(self, reading: Reading) -> bool:
        """Whether a step under some condition fails as this one did. NaN counts as bad."""
        finite = math.isfinite(reading.loss) and math.isfinite(reading.grad_norm)
        if self.trigger is not Trigger.OUTLIER or not finite:
            return not finite
        data = self.finding.data
        quantity = "grad_norm" if "grad_norm" in data else "loss"
        limit = data.get("limit", math.inf)
        return not getattr(reading, quantity) <= limit
