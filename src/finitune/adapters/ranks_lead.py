"""The guard on several ranks: healthy steps in step, incidents led by one rank.

healthy   every rank computes, judges and commits; all decide the same, because they read the same numbers
failure   the rank at which it began leads: its loss is the bad one, or its own gradients are, or its state. It alone
          investigates, with the whole engine; before each computation the others take its state over (weights,
          moments, counters, conditions) and compute their part. In the end they take over what became of it:
          state, journal, decision, halt.

So no decision of an investigation is ever made twice, and clocks, memory and chance of the other ranks play no part.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from finitune.adapters.bare_loop import LoopGuard
from finitune.adapters.codes_ranks import OTHER_RANK_FAILED
from finitune.adapters.ranks import largest, same_bits
from finitune.adapters.ranks_mirror import Mirror
from finitune.adapters.ranks_port import RanksPort
from finitune.adapters.ranks_replicas import Replicas
from finitune.core.codes import lookup
from finitune.core.errors import Halted
from finitune.core.incident import Incident, Suspect, Trigger
from finitune.core.types import Finding, Judgement, Reading, Verdict
from finitune.engine.guard import Guard, Turn
from finitune.engine.investigate import Found
from finitune.engine.lab import Budget
from finitune.engine.policy import Action
from finitune.engine.port import Ask
from finitune.engine.step import Outcome
from finitune.engine.treatment import Treatment
from finitune.numerics.seeds import generators_kept

_LOG = logging.getLogger("finitune")
_BY_GRADIENT = (Trigger.GRADIENT, Trigger.SCALE, Trigger.OUTLIER)


class RanksGuard(LoopGuard):
    """One rank's part of the guard."""

    port: RanksPort

    def __init__(self, *args: Any) -> None:
        """As :class:`finitune.engine.guard.Guard`."""
        super().__init__(*args)
        self.ranks = self.port.ranks
        self.mirror, self.replicas = Mirror(self.port), Replicas(self.port)
        bad = self.ranks.gather_json(sorted(self.check.bad_from_start))
        self.check.bad_from_start = frozenset(n for names in bad for n in names)
        self._spoilt_by_rank: list[list[str]] = []
        self._suspect: Suspect | None = None
        self._written: list[tuple[str, dict[str, Any]]] = []
        self._record = self.hooks.record
        self.hooks.record = self._recorded

    def _recorded(self, kind: str, **fields: Any) -> None:
        if self.port.announce is not None:
            self._written.append((kind, fields))
        self._record(kind, **fields)

    # -- a healthy step ---------------------------------------------------------------------------------------

    def _spoilt(self, outcome: Outcome) -> list[str]:
        """Bad on any rank is bad on all."""
        own = super()._spoilt(outcome)
        self._spoilt_by_rank = []
        if not outcome.committed:
            return []
        rows = self.ranks.gather([float(len(own)), self.replicas.part(self.port.state.updates)])
        if not any(row[0] for row in rows):
            if not self.port.apart and not same_bits([row[1] for row in rows]):
                self._differ(outcome.reading.step + 1)
            return []
        self._spoilt_by_rank = self.ranks.gather_json(own)
        return sorted({n for names in self._spoilt_by_rank for n in names})

    def _differ(self, step: int) -> None:
        """The replicas are made the same again, but for "observe"; what was copied before is of one rank only."""
        found = self.replicas.compared(self.mirror, step)
        if found is None:
            return
        finding, right = found
        self.port.findings.append(finding)
        self.hooks.record("replicas", step=step, taken_from=right, finding=finding.to_json())
        if self.settings.policy == "observe":
            self.port.apart = True
            return
        self.mirror.send({}, right)
        if self.timeline is not None:
            for snapshot in list(self.timeline.ring.taken):
                self.timeline.ring.forget(snapshot)

    # -- a failure --------------------------------------------------------------------------------------------

    def _update_failed(self, turn: Turn, spoilt: list[str]) -> Turn:
        if self.port.apart:
            return super()._update_failed(turn, spoilt)
        return self._led(turn, Trigger.UPDATE, lambda: Guard._update_failed(self, turn, spoilt))

    def _incident(self, turn: Turn, trigger: Trigger, treatment: Treatment) -> Turn:
        if self.port.announce is not None:
            return super()._incident(turn, trigger, treatment)
        if self._as_plain(turn) or self.port.apart:
            # Ranks that do not hold the same weights cannot stand for each other: the step is refused, no more.
            self._close(turn)
            return turn
        return self._led(turn, trigger, lambda: super(RanksGuard, self)._incident(turn, trigger, treatment))

    def _led(self, turn: Turn, trigger: Trigger, work: Callable[[], Turn]) -> Turn:
        """``work`` on the rank that leads; the others do what it says."""
        leader = self._leader(turn, trigger)
        found = (
            self.replicas.compared(self.mirror, turn.outcome.reading.step) if trigger is not Trigger.UPDATE else None
        )
        self.port.findings += [found[0]] if found is not None else []
        self.mirror.forget()
        try:
            return self._lead(work) if leader == self.ranks.rank else self._follow(leader, turn)
        finally:
            self.port.stand_in_at = self.port.announce = None
            self._suspect = None

    def _leader(self, turn: Turn, trigger: Trigger) -> int:
        """The rank at which the failure began, and which others fail by themselves."""
        numbers: Mapping[str, list[float]] = {"loss": list(self.port.local_losses)}
        values = numbers["loss"] if trigger is Trigger.LOSS else [0.0] * self.ranks.size
        if trigger is Trigger.UPDATE:
            values = [math.inf if names else 0.0 for names in self._spoilt_by_rank]
        elif trigger in _BY_GRADIENT:
            with generators_kept():
                values = self.port.own_norms()
            numbers = {**numbers, "grad_norm": values}
        leader = largest(values) if trigger in (Trigger.LOSS, Trigger.UPDATE, *_BY_GRADIENT) else 0
        bad = [r for r, v in enumerate(values) if not math.isfinite(v)]
        if bad and len(bad) < self.ranks.size:
            told = {name: each[leader] for name, each in numbers.items() if each}
            self._suspect = Suspect("rank", str(leader), {**told, "num_bad": len(bad), "num_ranks": self.ranks.size})
        if trigger is not Trigger.UPDATE and self.ranks.rank in bad and self.ranks.rank != leader:
            self.port.stand_in_at = turn.outcome.reading.step
        return leader

    # -- leading ----------------------------------------------------------------------------------------------

    def _lead(self, work: Callable[[], Turn]) -> Turn:
        self._written = []
        self.port.announce = self._announce
        ring = self.timeline.ring.taken if self.timeline is not None else []
        newest = ring[-1] if ring else None
        try:
            turn = work()
        except BaseException as error:
            self.ranks.share({"do": "raise", "error": f"{type(error).__name__}: {error}"}, self.ranks.rank)
            raise
        taken = self.timeline is not None and bool(self.timeline.ring.taken)
        took = taken and self.timeline is not None and self.timeline.ring.taken[-1] is not newest
        attempts = [s.attempt for s in self.timeline.ring.taken] if self.timeline is not None else []
        ended = {"do": "end", "turn": _turn_record(turn), "records": self._written, "attempts": attempts}
        self.ranks.share({"do": "end"}, self.ranks.rank)
        self.mirror.send(ended | {"took": took and attempts[-1] == self.port.state.attempt}, self.ranks.rank)
        return turn

    def _announce(self, ask: Ask) -> None:
        """The others take this rank's state over, and compute the same step."""
        self.ranks.share({"do": "compute"}, self.ranks.rank)
        step = self.port.state.step + 1 if ask.step is None else ask.step
        self.mirror.send({"step": step}, self.ranks.rank)

    def _found(self, incident: Incident, reading: Reading, budget: Budget, treatment: Treatment) -> Found:
        suspect, keep = self._suspect, self.hooks.keep

        def kept(incident: Incident, *rest: Any) -> str | None:
            if suspect is not None:
                incident.suspects = (*incident.suspects, suspect)
            return keep(incident, *rest)

        self.hooks.keep = kept
        try:
            return super()._found(incident, reading, budget, treatment)
        finally:
            self.hooks.keep = keep

    # -- following --------------------------------------------------------------------------------------------

    def _follow(self, leader: int, turn: Turn) -> Turn:
        """Do what the leader says until it is over."""
        while True:
            said: dict[str, Any] = self.ranks.share(None, leader)
            if said["do"] == "raise":
                raise Halted(OTHER_RANK_FAILED, f"rank {leader}", rank=leader, error=said["error"])
            told = self.mirror.send({}, leader)
            if said["do"] == "end":
                return self._ended(turn, told)
            with generators_kept():
                try:
                    self.port.together(Ask(step=int(told["step"])))
                except Exception as error:  # noqa: BLE001  (all ranks were told: the leader decides what it means)
                    _LOG.debug("rank %d: %r", self.ranks.rank, error)
                finally:
                    self.port.abort()

    def _ended(self, turn: Turn, told: dict[str, Any]) -> Turn:
        """What became of it is journalled and carried out here as well."""
        for kind, fields in told["records"]:
            self._record(kind, **fields)
        if self.timeline is not None:
            ring = self.timeline.ring
            for gone in [s for s in ring.taken if s.attempt not in told["attempts"]]:
                ring.forget(gone)
            if told["took"] and ring.num_slots:
                ring.take(self.port, 0.0)
        _take_turn(turn, told["turn"])
        if turn.incident is not None:
            turn.incident.capsule = None  # it lies with the rank that led
            self.hooks.told(turn.incident)
        return turn


def _turn_record(turn: Turn) -> dict[str, Any]:
    halt = turn.halt
    return {
        "verdict": turn.outcome.judgement.verdict.value,
        "findings": [f.to_json() for f in turn.outcome.judgement.findings],
        "action": turn.action.value,
        "incident": turn.incident.to_json() if turn.incident is not None else None,
        "halt": None if halt is None else {"code": halt.code.code, "where": halt.where, "data": halt.data},
    }


def _take_turn(turn: Turn, record: Mapping[str, Any]) -> None:
    findings = tuple(Finding.from_json(f) for f in record["findings"])
    turn.outcome = replace(turn.outcome, judgement=Judgement(Verdict(record["verdict"]), findings))
    turn.action = Action(record["action"])
    turn.incident = Incident.from_json(record["incident"]) if record["incident"] is not None else None
    halt = record["halt"]
    found = lookup(halt["code"]) if halt is not None else None
    if halt is not None and found is not None:
        turn.halt = Halted(found[0], halt["where"], **halt["data"])
