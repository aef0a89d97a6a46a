"""Treatment: a proved plan is journalled, then carried out; probation, relapse and giving back come after it.

The guard's memory (``port.state.guard``) holds
    incidents   one short record each: number, step, code, where, remedy, conditions
    given       conditions that may be given back: the step at which that is tried, the wait after a refusal,
                and the values of before, of these fields only: what other cures changed since stays
    quiet       kinds of failure without a cure that are not investigated again before a step
    waits       how many steps that were, by kind: the next wait is twice as long
    watch       the level that a run which ran away has to come back to, the step since when it is watched, and the
                distance of the first look
    accepted    the losses of data that changed: up to them a run does not run away, until a step
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING, Any

from finitune.core.errors import Halted
from finitune.core.incident import Incident, Result, Safety, Trigger
from finitune.core.types import Finding, Reading
from finitune.detectors.runaway import RUNAWAY
from finitune.engine.codes import STATE_NOT_FINITE
from finitune.engine.codes_guard import INCIDENT_HALT
from finitune.engine.conditions import Conditions, NotPossible
from finitune.engine.line import treated
from finitune.engine.look.codes_update import LOSS_RESCALED
from finitune.engine.mend import mend
from finitune.engine.monitor import read
from finitune.engine.plan import BatchFate, Operation, Plan
from finitune.engine.port import ReplayPort
from finitune.engine.snapshot import Snapshot
from finitune.engine.timeline import Timeline, Unreachable
from finitune.numerics.seeds import generators_kept

if TYPE_CHECKING:
    from finitune.engine.guard import Hooks

# Half precision is given back only where a module may still double.
_GIVE_BACK_BITS = 1.0
_LONGEST_WAIT_STEPS = 10_000
# A run that ran away, and what was found is no cure: more batches may be at hand soon. Then later and later.
_QUIET_STEPS, _LONGEST_QUIET_STEPS = 8, 512
# Looks at the level after a run that ran away, in distances of the first look.
_LOOKS = (1, 2, 4, 8)
_LEVEL_LOSSES = 8
MAX_LEVEL = 1.15
"""A level within this factor of that of before counts as come back, where the spread of the losses is not known."""
# After so many steps the statistics know a new level themselves.
_ACCEPTED_STEPS = 256
_AS_HIGH = 0.8
"""Losses at hardly any rate that are so much of those at the run's rate: the rate has nothing to do with them."""
# Incidents that may give up rows: a share of the rows that were trained on; beyond it the data are not the reason.
_ROWS, _ROWS_SHARE, _FEWEST_ROWS = "skip_rows", 0.05, 8
_RUN_ITSELF = (Trigger.RUNAWAY,)
"""Failures of the run rather than of a step: whether they are over, only the level of the losses tells."""


class Treatment:
    """Carries plans out on one port, and remembers."""

    def __init__(self, port: ReplayPort, timeline: Timeline, hooks: Hooks, probation_steps: int) -> None:
        self.port, self.timeline, self.hooks, self.probation_steps = port, timeline, hooks, probation_steps

    @property
    def memory(self) -> dict[str, Any]:
        """The guard's memory in the present state."""
        return self.port.state.guard

    def apply(self, incident: Incident, plan: Plan, put: Callable[[], None] | None = None) -> None:
        """Go back, mend, bring the conditions into force. Journalled before it acts; raises Halted.

        ``put``: does what the plan mends, where the good values are neither in an earlier state nor in the original.
        """
        memory = copy.deepcopy(self.memory)
        was = self.port.conditions
        if plan.to_step is not None:
            incident.steps_lost = max(0, self.port.state.step - plan.to_step)
            self._go_back(plan.to_step, incident)
        _remember(memory, incident, plan.conditions)
        for told in ("quiet", "waits"):
            memory.get(told, {}).pop(incident.trigger.value, None)
        if incident.trigger in _RUN_ITSELF or plan.remedy == "lower_lr":
            self._watch(memory, incident, max(1, self.probation_steps // 2))
        if plan.temporary and plan.conditions != was:
            until = self.port.state.step + incident.steps_lost + self.probation_steps
            before = {**plan.conditions.replaced_in(was), **memory.get("given", {}).get("before", {})}
            memory["given"] = {"at": until, "wait": self.probation_steps, "before": before}
        self._change(incident.number, plan, memory, put)

    def note(self, incident: Incident, conditions: Conditions | None) -> None:
        """Remember an incident that changed nothing."""
        memory = copy.deepcopy(self.memory)
        _remember(memory, incident, conditions or self.port.conditions)
        kind = incident.trigger.value
        waited = memory.get("waits", {}).get(kind)
        wait = _QUIET_STEPS if waited is None else min(2 * waited, _LONGEST_QUIET_STEPS)
        memory.setdefault("waits", {})[kind] = wait
        memory.setdefault("quiet", {})[kind] = self.port.state.step + wait
        if incident.finding.code == LOSS_RESCALED.code:
            self._accept(memory, incident)
        elif incident.trigger in _RUN_ITSELF:
            self._accept(memory, incident) if _is_of_the_data(incident) else self._watch(memory, incident, wait)
        self._write(incident.number, self.port.conditions, (), memory, redo=True)
        self.port.state.guard = memory

    def _go_back(self, to_step: int, incident: Incident) -> None:
        was = self.port.state.step
        arrival = self.timeline.go_to(to_step)
        self.hooks.record(
            "rollback",
            from_step=was,
            to_step=to_step,
            attempt=self.port.state.attempt,
            treated=treated(self.port.state_record()),
            reason=f"incident {incident.number}",
            base=arrival.base_step,
        )
        self.timeline.ring.forget_after(self.port.state.attempt)
        self.hooks.went_back(to_step)

    def _change(self, number: int, plan: Plan, memory: dict[str, Any], put: Callable[[], None] | None = None) -> None:
        redo = all(m.what is not Operation.REPAIR for m in plan.mends)
        self._write(number, plan.conditions, plan.mends, memory, redo=redo)
        put() if put is not None else mend(self.port, plan.mends, self.state_at)
        self.port.adopt(plan.conditions)
        self.port.state.guard = memory
        if plan.mends:
            self.timeline.ring.take(self.port, 0.0)

    def _write(self, number: int, conditions: Conditions, mends: Any, memory: dict[str, Any], *, redo: bool) -> None:
        state = self.port.state
        self.hooks.record(
            "treatment",
            step=state.step,
            attempt=state.attempt,
            incident=number,
            conditions=conditions.to_json(),
            mends=[{"what": m.what.value, "names": list(m.names), "from_step": m.from_step} for m in mends],
            guard=memory,
            redo=redo,
        )

    def state_at(self, step: int) -> Snapshot | None:
        """A copy of an earlier state, where it can be had."""
        try:
            return self.timeline.state_at(step)
        except Unreachable:
            return None

    def _watch(self, memory: dict[str, Any], incident: Incident, every: int) -> None:
        """Look at the level of the losses from now on: it has to come back to that of before."""
        told = [e.numbers for e in incident.evidence if e.experiment in ("borne_rate", "lower_lr")]
        found = told[-1] if told else {}
        before = found.get("median_loss", incident.finding.data.get("before"))
        if not isinstance(before, float) or not math.isfinite(before):
            return
        near = found.get("near")
        near = near if isinstance(near, float) and math.isfinite(near) else max(MAX_LEVEL * before, before + 0.1)
        memory["watch"] = {"since": incident.step, "every": every, "before": before, "near": near}

    # -- afterwards -------------------------------------------------------------------------------------------

    def is_known(self, trigger: Trigger) -> bool:
        """A failure of this kind was looked into lately without a cure being needed or found."""
        until = self.memory.get("quiet", {}).get(trigger.value)
        slow = trigger in (Trigger.RUNAWAY, Trigger.FORECAST, Trigger.SILENT)
        return slow and until is not None and self.port.state.step < until

    def _accept(self, memory: dict[str, Any], incident: Incident) -> None:
        """The data changed: losses as they are now are the usual ones."""
        memory.pop("watch", None)
        losses = [*self._recent_losses(), float(incident.finding.data.get("loss", 0.0))]
        memory["accepted"] = {
            "loss": max(x for x in losses if math.isfinite(x)),
            "until": incident.step + _ACCEPTED_STEPS,
        }

    def is_accepted(self, reading: Reading) -> bool:
        """A loss that the data account for, as an incident has shown."""
        accepted = self.memory.get("accepted")
        return accepted is not None and reading.step <= accepted["until"] and reading.loss <= accepted["loss"]

    def _recent_losses(self) -> list[float]:
        """Of the newest committed steps. Of a run that went back, what was lost on the way is not among them."""
        return [math.exp(min(x, 700.0)) for x in self.port.state.history.log_loss.tail(_LEVEL_LOSSES)]

    def not_back(self, reading: Reading) -> Finding | None:
        """After a run that ran away: the level of the losses has not come back where it is looked at, now and then."""
        watch = self.memory.get("watch")
        if watch is None or reading.step - watch["since"] not in [n * watch["every"] for n in _LOOKS]:
            return None
        recent = self._recent_losses()
        level = median(recent) if recent else math.nan
        if not level > watch["near"]:
            return None
        numbers = {"before": watch["before"], "count": len(recent), "lowest": min(recent)}
        return RUNAWAY.find(step=reading.step, loss=reading.loss, **numbers)

    def level_before(self) -> float | None:
        """The usual loss of before a run ran away, while that is being watched."""
        watch = self.memory.get("watch")
        if watch is None or self.port.state.step - watch["since"] > _LOOKS[-1] * watch["every"]:
            return None
        return float(watch["before"])

    def is_spent(self, incident: Incident, plan: Plan, max_relapses: int) -> bool:
        """The same cause at the same place has come back too often. What is harmless may come back for ever."""
        top = incident.diagnosis.top
        if top is None or plan.fate is BatchFate.PASS or (plan.fate is BatchFate.SKIP and plan.safety is Safety.SAFE):
            return False
        told = self.memory.get("incidents", ())
        same = [i for i in told if (i["code"], i["where"]) == (top.code, top.where)]
        if plan.remedy == _ROWS:  # each gave up other rows, which share a place: there may be more of them
            given_up = [i for i in told if i["remedy"] == _ROWS]
            same = [i for i in same if i["remedy"] != _ROWS]
            most = max(_FEWEST_ROWS, int(_ROWS_SHARE * self.port.state.step * max(1, len(incident.rows))))
            return len(same) >= max_relapses or len(given_up) >= most
        return len(same) >= max_relapses

    def relax(self) -> None:
        """Give conditions back that are no longer needed: tried on the batch at hand, which stays untouched."""
        given = self.memory.get("given")
        if given is None or self.port.state.step < given["at"]:
            return
        memory = copy.deepcopy(self.memory)
        back_to = Conditions.from_json({**self.port.conditions.to_json(), **given["before"]})
        if self._fits(back_to):
            del memory["given"]
        else:
            wait = min(2 * given["wait"], _LONGEST_WAIT_STEPS)
            memory["given"] = {**given, "at": self.port.state.step + wait, "wait": wait}
            back_to = self.port.conditions
        self._write(0, back_to, (), memory, redo=True)
        self.port.adopt(back_to)
        self.port.state.guard = memory

    def _fits(self, conditions: Conditions) -> bool:
        """The batch at hand is finite under these conditions, with room to spare."""
        was = self.port.conditions
        with generators_kept():
            try:
                self.port.adopt(conditions)
                reading = read(self.port.forward_backward())
            except NotPossible:
                return False
            finally:
                self.port.abort()
                self.port.adopt(was)
        finite = math.isfinite(reading.loss) and math.isfinite(reading.grad_norm)
        bits = reading.headroom_bits
        return finite and (bits is None or bits >= _GIVE_BACK_BITS)


def _remember(memory: dict[str, Any], incident: Incident, conditions: Conditions) -> None:
    top = incident.diagnosis.top
    memory.setdefault("incidents", []).append(
        {
            "number": incident.number,
            "step": incident.step,
            "code": incident.diagnosis.code,
            "where": top.where if top else "",
            "remedy": incident.remedy,
            "conditions": conditions.to_json(),
        }
    )


def lost_state(finding: Finding, reason: Finding) -> Halted:
    """The update spoilt the state, and the state before it cannot be had."""
    data = finding.data
    why = str(reason.data.get("reason", reason.where))
    return Halted(STATE_NOT_FINITE, why, count=data["count"], step=data["step"], first=data["first"], run="RUN")


def halted_by(incident: Incident) -> Halted:
    """No safe plan is left for an incident."""
    top = incident.diagnosis.top
    return Halted(
        INCIDENT_HALT,
        top.where if top else incident.finding.where,
        number=incident.number,
        folder=f"{incident.number:03d}",
        step=incident.step,
        cause=incident.diagnosis.code,
        trigger=incident.finding.code,
        tried=len(incident.trials),
        replays=incident.replays,
    )


def _is_of_the_data(incident: Incident) -> bool:
    """From before the rise, over the same batches, hardly any rate gives losses as high as the run's rate."""
    found = next((e for e in incident.evidence if e.experiment == "lower_lr"), None)
    if found is None or found.result is not Result.BAD or not found.numbers.get("losses"):
        return False
    still, same = list(found.numbers["losses"]), list(found.numbers["losses_same"])[: len(found.numbers["losses"])]
    return len(same) == len(still) and same[-1] > same[0] and still[-1] >= _AS_HIGH * same[-1]
