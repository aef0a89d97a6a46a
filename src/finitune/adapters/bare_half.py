"""Trainable fp16 weights under a loss scaler, as old adapters are: raised to fp32 before the first step.

    raised -> first step computes and commits    proved: an incident, closed
           -> it cannot be computed              undone, bit for bit, and refused as without the guard (SYS425)

A plain loop ends here with "Attempting to unscale FP16 gradients". Only ``.data`` is swapped: optimizer, hooks and tied
weights keep their references. Replicas of several ranks exchange buffers that were made for fp16: these are refused.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from finitune.adapters.bare_asked import Loop
from finitune.adapters.bare_state import trained
from finitune.adapters.codes import BAD_ARGUMENT
from finitune.core.errors import UserError
from finitune.core.incident import Incident, Phase, Suspect, Trial, Trigger
from finitune.core.types import Finding, Reading
from finitune.engine.case import Case
from finitune.engine.codes_half import HALF_UNDER_SCALER
from finitune.engine.conditions import AS_CONFIGURED
from finitune.engine.diagnose import diagnose
from finitune.engine.guard import Turn
from finitune.engine.remedies import fp32_weights
from finitune.engine.snapshot import is_out_of_memory
from finitune.numerics.casting import CastWeights, cast_weights

if TYPE_CHECKING:
    from finitune.adapters.bare_guard import BareGuard

_MIXED = ("Half", "loat")
"""In whatever torch says of operands that do not fit: "got Half and Float", "c10::Half and ... float"."""


def half_under_scaler(loop: Loop) -> list[tuple[str, nn.Parameter]]:
    """Trainable fp16 weights whose gradients the loop's scaler would refuse."""
    scaler = loop.scaler
    if not isinstance(scaler, torch.amp.GradScaler) or not scaler.is_enabled():
        return []
    if not isinstance(loop.model, nn.Module) or not isinstance(loop.optimizer, torch.optim.Optimizer):
        return []
    return [(n, p) for n, p in trained(loop.model, loop.optimizer) if p.requires_grad and p.dtype == torch.float16]


def refusal(names: list[str]) -> UserError:
    """SYS425, naming the weights."""
    problem = f"GradScaler cannot unscale fp16 gradients, and {len(names)} trainable weights are fp16 ({names[0]})"
    cure = "keep trainable weights in fp32 and compute under torch.autocast"
    return UserError(BAD_ARGUMENT, "finitune.guard", name="scaler", problem=problem, cure=cure, parameters=names)


@dataclass(slots=True)
class RaisedWeights:
    """What was raised, until the first update proves it."""

    cast: CastWeights
    names: list[str]
    finding: Finding

    @classmethod
    def of(cls, loop: Loop, *, alone: bool = True) -> RaisedWeights | None:
        """Raise what has to be; None where there is nothing.

        Raises UserError SYS425 where memory does not suffice, or where other ranks hold replicas (not ``alone``).
        """
        half = half_under_scaler(loop)
        if not half:
            return None
        if not alone:
            raise refusal([n for n, _ in half])
        names, total = [n for n, _ in half], sum(p.requires_grad for _, p in trained(loop.model, loop.optimizer))
        try:
            cast = cast_weights(nn.ParameterList([p for _, p in half]), loop.optimizer, torch.float32)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise refusal(names) from error
        found = HALF_UNDER_SCALER.find(
            names[0], count=len(names), total=total, first=names[0], parameters=names, fault_class="D"
        )
        return cls(cast, names, found)

    def refused(self, error: BaseException) -> UserError | None:
        """What to raise where the step cannot be computed with fp32 weights; they are as before then."""
        if not isinstance(error, RuntimeError) or not all(word in str(error) for word in _MIXED):
            return None
        self.cast.to(None)
        return refusal(self.names)

    def told(self, guard: BareGuard, turn: Turn) -> Incident:
        """The first update was made: the incident is remembered, journalled and told."""
        port, treatment = guard.port, guard.engine.treatment
        number = len(port.state.guard.get("incidents", ())) + 1
        incident = self.proved(number, port.state.attempt, turn.outcome.reading, port.facts())
        if treatment is not None:
            treatment.note(incident, None)
        guard.keep.record("incident", step=incident.step, incident=incident.to_json())
        guard.tell(incident)
        return incident

    def proved(self, number: int, attempt: int, reading: Reading, facts: Mapping[str, Any]) -> Incident:
        """The incident, closed by the first update; ``facts`` of the run as it is now."""
        started_s = time.perf_counter()
        weights = sorted({"float16", *map(str, facts.get("weights", ()))})
        told = {**facts, "weights": weights}
        suspects = tuple(Suspect("parameter", name, {"dtype": "float16"}) for name in self.names)
        case = Case(Trigger.UPDATE, self.finding, reading, told, suspects=suspects)
        diagnosis = diagnose(case)
        plans = [p for cause in diagnosis.causes[:1] for p in fp32_weights.plans(case, cause, AS_CONFIGURED)]
        trials = tuple(Trial(plan.to_json(), True, "", (reading.loss,)) for plan in plans)
        return Incident(
            number=number,
            step=reading.step,
            attempt=attempt,
            trigger=Trigger.UPDATE,
            finding=self.finding,
            reading=reading.to_json(),
            phase=Phase.CLOSED,
            facts=told,
            suspects=suspects,
            diagnosis=diagnosis,
            trials=trials,
            remedy="fp32_weights",
            outcome="cured",
            time_s=time.perf_counter() - started_s,
        )
