"""Treatment: a proved plan is journalled, then carried out; probation, relapse and giving back come after it.

The guard's memory (``port.state.guard``) holds
    incidents   one short record each: number, step, code, where, remedy, conditions
    given       conditions that may be given back: the step at which that is tried, the wait after a refusal,
                and the values of before, of these fields only: what other cures changed since stays
    quiet       kinds of failure without a cure that are not investigated again before a step
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

from finitune.core.errors import Halted
from finitune.core.incident import Incident, Safety, Trigger
from finitune.core.types import Finding
from finitune.engine.codes import STATE_NOT_FINITE
from finitune.engine.codes_guard import INCIDENT_HALT
from finitune.engine.conditions import Conditions, NotPossible
from finitune.engine.line import treated
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
_QUIET_STEPS = 64


class Treatment:
    """Carries plans out on one port, and remembers."""

    def __init__(self, port: ReplayPort, timeline: Timeline, hooks: Hooks, probation_steps: int) -> None:
        self.port, self.timeline, self.hooks, self.probation_steps = port, timeline, hooks, probation_steps

    @property
    def memory(self) -> dict[str, Any]:
        """The guard's memory in the present state."""
        return self.port.state.guard

    def apply(self, incident: Incident, plan: Plan) -> None:
        """Go back, mend, bring the conditions into force. Journalled before it acts; raises Halted."""
        memory = copy.deepcopy(self.memory)
        was = self.port.conditions
        if plan.to_step is not None:
            incident.steps_lost = max(0, self.port.state.step - plan.to_step)
            self._go_back(plan.to_step, incident)
        _remember(memory, incident, plan.conditions)
        if plan.temporary and plan.conditions != was:
            until = self.port.state.step + incident.steps_lost + self.probation_steps
            before = {**plan.conditions.replaced_in(was), **memory.get("given", {}).get("before", {})}
            memory["given"] = {"at": until, "wait": self.probation_steps, "before": before}
        self._change(incident.number, plan, memory)

    def note(self, incident: Incident, conditions: Conditions | None) -> None:
        """Remember an incident that changed nothing."""
        memory = copy.deepcopy(self.memory)
        _remember(memory, incident, conditions or self.port.conditions)
        memory.setdefault("quiet", {})[incident.trigger.value] = self.port.state.step + _QUIET_STEPS
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

    def _change(self, number: int, plan: Plan, memory: dict[str, Any]) -> None:
        redo = all(m.what is not Operation.REPAIR for m in plan.mends)
        self._write(number, plan.conditions, plan.mends, memory, redo=redo)
        mend(self.port, plan.mends, self.state_at)
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

    # -- afterwards -------------------------------------------------------------------------------------------

    def is_known(self, trigger: Trigger) -> bool:
        """A failure of this kind was looked into lately without a cure being needed or found."""
        until = self.memory.get("quiet", {}).get(trigger.value)
        slow = trigger in (Trigger.RUNAWAY, Trigger.FORECAST, Trigger.SILENT)
        return slow and until is not None and self.port.state.step < until

    def is_spent(self, incident: Incident, plan: Plan, max_relapses: int) -> bool:
        """The same cause at the same place has come back too often. What is harmless may come back for ever."""
        top = incident.diagnosis.top
        if top is None or plan.fate is BatchFate.PASS or (plan.fate is BatchFate.SKIP and plan.safety is Safety.SAFE):
            return False
        same = [i for i in self.memory.get("incidents", ()) if (i["code"], i["where"]) == (top.code, top.where)]
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
