"""The experiments on one failure: those that can still tell something, cheap ones first, and no trace is left.

After each of them the training state is compared with that of before, by fingerprint. One that leaves a trace is
undone, not believed, and not run again in this process: an investigation must not change the run.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

from finitune.core import registry
from finitune.core.incident import Evidence, Result, Suspect, Trigger
from finitune.engine.case import Case
from finitune.engine.conditions import NotPossible
from finitune.engine.diagnose import REDONE
from finitune.engine.lab import BudgetSpent, Lab
from finitune.engine.snapshot import is_out_of_memory
from finitune.numerics.fingerprint import fingerprint, first_difference
from finitune.numerics.seeds import generators_kept

NO_REPLAY_LEFT = "no replay is left in the budget"
# Of the budget, the share that is kept for the proof of a cure.
_FOR_PROOF = 0.2
_leave_traces: dict[str, str] = {}
"""Experiments that are not run any more, and what they left changed."""


def in_order() -> list[tuple[str, ModuleType]]:
    """All registered experiments, the cheap ones first. One that cannot be loaded is left out with a warning."""
    members = []
    for name in registry.names("experiments"):
        try:
            members.append((name, registry.load("experiments", name)))
        except Exception as error:  # noqa: BLE001 - code of third parties
            warnings.warn(f"the experiment {name} cannot be loaded: {error!r}", RuntimeWarning, stacklevel=2)
    return sorted(members, key=lambda member: (float(member[1].ORDER), member[0]))


def experiment(lab: Lab, case: Case, *, journal: Callable[[Evidence], None] | None = None) -> Case:
    """The case with the evidence and the suspects of all experiments that it called for.

    Ends where nothing is wanted any more or the budget is spent; then the last evidence says so. ``journal`` is told of
    each evidence. The port is afterwards as it was before.
    """
    mark = _Mark(lab)
    if mark.trace() is not None:  # left by somebody before: it is not to be put down to the first experiment
        mark.put_back()
    members = in_order()
    while (following := _following(members, case)) is not None:
        name, module = following
        found, suspects = perform(lab, case, name, module)
        case = lab.case = case.with_evidence(found).with_suspects(*suspects)
        if journal is not None:
            journal(found)
        if found.numbers.get("budget_spent"):
            break
    return case


def _following(members: Sequence[tuple[str, ModuleType]], case: Case) -> tuple[str, ModuleType] | None:
    """The first one that is wanted now and was not made: what an experiment shows may call for a cheaper one.

    None once what was found says that the step itself is not to be looked into.
    """
    if _is_settled(case):
        return None
    return next(((n, m) for n, m in members if n not in case.evidence and _wanted(n, m, case)), None)


def _is_settled(case: Case) -> bool:
    """The state was changed from outside, or the updates before the failing step are wrong, or the loss of a step that
    was committed is that of rows of the vocabulary that are out of scale, or nothing but a raised rate is different, or
    the loss of old steps comes out as many times larger as there are micro-batches.
    """
    by_micros = case.bad("past_loss") and bool(case.number("past_loss", "by_micros"))
    if case.good("borne_rate") or by_micros:
        return True
    wrong_updates = case.good("reference_optimizer") and case.trigger is not Trigger.UPDATE
    return case.good(REDONE) or wrong_updates or (case.good("vocabulary_rows") and case.trigger is Trigger.RUNAWAY)


def perform(lab: Lab, case: Case, name: str, module: ModuleType) -> tuple[Evidence, tuple[Suspect, ...]]:
    """One experiment, whether wanted or not; NOT_RUN with the reason where it could not be made. Raises nothing."""
    if name in _leave_traces:
        return _not_run(name, f"left a trace before: {_leave_traces[name]}"), ()
    cost = float(getattr(module, "COST", 1.0))
    if not lab.budget.left(min(cost, 1.0)):
        return _not_run(name, NO_REPLAY_LEFT, budget_spent=True), ()
    if not lab.budget.left(cost + _reserve(lab)):
        return _not_run(name, f"it costs about {cost:g} replays, too many for what is left of the budget"), ()
    spent = lab.budget.replays
    mark = _Mark(lab)
    found, suspects = _ran(lab, case, name, module)
    found = replace(found, replays=round(lab.budget.replays - spent, 3))
    trace = mark.trace()
    if trace is None:
        return found, suspects
    mark.put_back()
    _leave_traces[name] = trace
    return _not_run(name, f"left a trace: {trace}", replays=found.replays), ()


def _reserve(lab: Lab) -> float:
    """Replays that are kept for the proof."""
    return _FOR_PROOF * lab.budget.max_replays if math.isfinite(lab.budget.max_replays) else 0.0


def _wanted(name: str, module: ModuleType, case: Case) -> bool:
    try:
        return bool(module.wanted(case))
    except Exception as error:  # noqa: BLE001 - code of third parties
        warnings.warn(f"the experiment {name} could not judge the case: {error!r}", RuntimeWarning, stacklevel=2)
        return False


def _ran(lab: Lab, case: Case, name: str, module: ModuleType) -> tuple[Evidence, tuple[Suspect, ...]]:
    try:
        with generators_kept():
            found, suspects = module.run(lab, case)
        return replace(found, experiment=name), tuple(suspects)
    except NotPossible as reason:
        return _not_run(name, str(reason)), ()
    except BudgetSpent:
        return _not_run(name, NO_REPLAY_LEFT, budget_spent=True), ()
    except Exception as error:  # noqa: BLE001 - an incident must not end in an error of an experiment
        if is_out_of_memory(error):
            return _not_run(name, "there is not enough memory for it"), ()
        return _not_run(name, f"it failed with {type(error).__name__}: {error}"), ()


def _not_run(name: str, reason: str, *, replays: float = 0.0, **more: Any) -> Evidence:
    return Evidence(name, Result.NOT_RUN, {"reason": reason, **more}, replays)


class _Mark:
    """How the port stands before an experiment: at the state before the failing step."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self._conditions = lab.port.conditions
        self._with_gradient = self._gradients()
        self._training = [m.training for m in lab.port.model.modules()]

    def _gradients(self) -> set[str]:
        return {name for name, p in self.lab.port.parameters() if p.grad is not None}

    def trace(self) -> str | None:
        """What is not as before; None where nothing is."""
        port = self.lab.port
        now = fingerprint(port.state_tensors(), port.state_record())
        changed = first_difference(self.lab.before.mark.to_json(), now)
        if changed is not None:
            return changed
        if self.lab.port.conditions != self._conditions:
            return "the conditions"
        if [m.training for m in self.lab.port.model.modules()] != self._training:
            return "the modules' training mode"
        more = sorted(self._gradients() - self._with_gradient)
        return f"the gradient of {more[0]}" if more else None

    def put_back(self) -> None:
        """Make the state of before the failing step the port's again."""
        self.lab.port.abort()
        self.lab.restore(self.lab.before)
        if self.lab.port.conditions != self._conditions:
            self.lab.port.adopt(self._conditions)
        for module, training in zip(self.lab.port.model.modules(), self._training, strict=True):
            module.training = training
