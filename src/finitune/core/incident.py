"""The nouns of an incident: plain, JSON-able values that are journalled, shown and put into capsules.

An experiment changes one condition of the failing step and gives an :class:`Evidence`; the evidence gives a
:class:`Diagnosis`; the diagnosis gives plans, of which one is proved and applied. No tensors here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from finitune.core.codes import fill
from finitune.core.messages.catalogue import language
from finitune.core.types import Finding, RowId


class Trigger(str, Enum):
    """What kind of failure froze the step."""

    LOSS = "loss"
    """The loss is not finite."""
    GRADIENT = "gradient"
    """The loss is finite, a gradient is not."""
    SCALE = "scale"
    """No loss scale is left at which the gradients are finite."""
    UPDATE = "update"
    """Loss and gradients were finite; the optimizer made a weight or moment non-finite."""
    OUTLIER = "outlier"
    """Loss or gradient norm are finite and far outside of what came before."""
    RUNAWAY = "runaway"
    """The loss is finite and has been rising, or has stayed far above its start."""
    SILENT = "silent"
    """Nothing fails, but nothing is learnt as it should be."""
    FORECAST = "forecast"
    """Nothing has failed yet."""


class Result(str, Enum):
    """What a step came to under a changed condition."""

    BAD = "bad"
    """It fails as before."""
    GOOD = "good"
    """The failure is gone."""
    NOT_RUN = "not_run"
    """The condition cannot be changed here; the numbers say why."""


class Verdict(str, Enum):
    """Whether the failure repeats."""

    REPRODUCED = "reproduced"
    NOT_REPRODUCED = "not_reproduced"
    NOT_REPLAYABLE = "not_replayable"


class Safety(str, Enum):
    """What a remedy costs."""

    SAFE = "safe"
    """No data and no progress is lost, and the numbers of other steps stay meaningful."""
    LOSSY = "lossy"
    """Some rows, steps or moments are given up."""
    ASK = "ask"
    """Changes what the user asked for; only with consent."""


class Phase(str, Enum):
    """Where an incident stands."""

    FROZEN = "frozen"
    REPLAYING = "replaying"
    LOCALISING = "localising"
    DIAGNOSING = "diagnosing"
    RECOVERING = "recovering"
    PROBATION = "probation"
    CLOSED = "closed"
    HALTED = "halted"


@dataclass(frozen=True, slots=True)
class Words:
    """One sentence in both languages: a template filled from numbers."""

    en: str
    zh: str

    def say(self, data: Mapping[str, Any]) -> str:
        """The sentence in the language in force. Never raises."""
        return fill(self.zh if language() == "zh" else self.en, data)


@dataclass(frozen=True, slots=True)
class Suspect:
    """Where the failure sits. ``kind``: module, op, parameter, moment, buffer, row, tokens, step or rank."""

    kind: str
    name: str
    """Dotted module or parameter name, ``RowId`` text, or number."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Numbers: dtype, shape, amax, headroom_bits, num_bad, index, input_amax, ..."""

    def to_json(self) -> dict[str, Any]:
        """A JSON-able record."""
        return {"kind": self.kind, "name": self.name, "data": dict(self.data)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Suspect:
        """Inverse of :meth:`to_json`."""
        return cls(str(record["kind"]), str(record["name"]), dict(record.get("data", {})))


@dataclass(frozen=True, slots=True)
class Evidence:
    """What one experiment showed."""

    experiment: str
    result: Result
    numbers: Mapping[str, Any] = field(default_factory=dict)
    replays: float = 0.0
    """What it cost, in forward and backward passes of the step."""

    def to_json(self) -> dict[str, Any]:
        """A JSON-able record."""
        return {
            "experiment": self.experiment,
            "result": self.result.value,
            "numbers": dict(self.numbers),
            "replays": self.replays,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Evidence:
        """Inverse of :meth:`to_json`."""
        return cls(
            str(record["experiment"]),
            Result(record["result"]),
            dict(record.get("numbers", {})),
            float(record.get("replays", 0.0)),
        )


@dataclass(frozen=True, slots=True)
class Cause:
    """A possible cause with its reasons: names of experiments or of facts."""

    name: str
    """Registered name of the cause (``engine/causes``)."""
    code: str
    fault_class: str
    """Letter of the taxonomy, A to W."""
    confidence: float
    """0..1; how well the evidence fits, not a probability."""
    named: bool
    """An experiment flipped the outcome; otherwise the cause is only suspected."""
    reasons_for: tuple[str, ...] = ()
    reasons_against: tuple[str, ...] = ()
    where: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Fills the page of ``code``."""

    def to_json(self) -> dict[str, Any]:
        """A JSON-able record."""
        return {
            "name": self.name,
            "code": self.code,
            "fault_class": self.fault_class,
            "confidence": self.confidence,
            "named": self.named,
            "reasons_for": list(self.reasons_for),
            "reasons_against": list(self.reasons_against),
            "where": self.where,
            "data": dict(self.data),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Cause:
        """Inverse of :meth:`to_json`."""
        return cls(
            str(record["name"]),
            str(record["code"]),
            str(record["fault_class"]),
            float(record["confidence"]),
            bool(record["named"]),
            tuple(map(str, record.get("reasons_for", ()))),
            tuple(map(str, record.get("reasons_against", ()))),
            str(record.get("where", "")),
            dict(record.get("data", {})),
        )


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Ranked causes, the most likely first. Empty, or none named: the cause is unknown."""

    causes: tuple[Cause, ...] = ()

    @property
    def top(self) -> Cause | None:
        """The most likely cause."""
        return self.causes[0] if self.causes else None

    @property
    def known(self) -> bool:
        """The top cause is named by an experiment."""
        return bool(self.causes) and self.causes[0].named

    @property
    def code(self) -> str:
        """Code of the top cause; "unknown" where none is named."""
        return self.causes[0].code if self.known else "unknown"

    def to_json(self) -> list[dict[str, Any]]:
        """JSON-able records."""
        return [c.to_json() for c in self.causes]

    @classmethod
    def from_json(cls, records: Any) -> Diagnosis:
        """Inverse of :meth:`to_json`."""
        return cls(tuple(Cause.from_json(r) for r in records))


@dataclass(frozen=True, slots=True)
class Trial:
    """A plan that was tried on a replay, and what came of it."""

    plan: Mapping[str, Any]
    """JSON of the plan."""
    holds: bool
    reason: str
    losses: tuple[float, ...] = ()
    """Of the failing step and the steps after it, under the plan."""
    replays: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """A JSON-able record."""
        return {
            "plan": dict(self.plan),
            "holds": self.holds,
            "reason": self.reason,
            "losses": list(self.losses),
            "replays": self.replays,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Trial:
        """Inverse of :meth:`to_json`."""
        losses = tuple(float(x) for x in record.get("losses", ()))
        return cls(
            dict(record["plan"]), bool(record["holds"]), str(record["reason"]), losses, float(record.get("replays", 0))
        )


@dataclass(slots=True)
class Incident:
    """The life of one failure."""

    number: int
    """From 1, within the run."""
    step: int
    attempt: int
    trigger: Trigger
    finding: Finding
    """What froze the step."""
    reading: Mapping[str, Any] = field(default_factory=dict)
    rows: tuple[RowId, ...] = ()
    phase: Phase = Phase.FROZEN
    verdict: Verdict | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Precision, optimizer, learning rate, kernels, widths, versions, ...: what the step ran under."""
    suspects: tuple[Suspect, ...] = ()
    evidence: tuple[Evidence, ...] = ()
    diagnosis: Diagnosis = field(default_factory=Diagnosis)
    trials: tuple[Trial, ...] = ()
    """Plans in the order in which they were tried; the last one that holds was applied."""
    remedy: str | None = None
    """Registered name of the remedy applied; None: nothing was applied."""
    outcome: str = ""
    """"cured", "passed" (harmless, let through), "skipped", "observed" or "halted"."""
    replays: float = 0.0
    time_s: float = 0.0
    steps_lost: int = 0
    """Steps that were undone by a rollback."""
    capsule: str | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON-able record of everything."""
        return {
            "number": self.number,
            "step": self.step,
            "attempt": self.attempt,
            "trigger": self.trigger.value,
            "finding": self.finding.to_json(),
            "reading": dict(self.reading),
            "rows": [str(r) for r in self.rows],
            "phase": self.phase.value,
            "verdict": self.verdict.value if self.verdict else None,
            "facts": dict(self.facts),
            "suspects": [s.to_json() for s in self.suspects],
            "evidence": [e.to_json() for e in self.evidence],
            "diagnosis": self.diagnosis.to_json(),
            "trials": [t.to_json() for t in self.trials],
            "remedy": self.remedy,
            "outcome": self.outcome,
            "replays": self.replays,
            "time_s": self.time_s,
            "steps_lost": self.steps_lost,
            "capsule": self.capsule,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Incident:
        """Inverse of :meth:`to_json`."""
        return cls(
            number=int(record["number"]),
            step=int(record["step"]),
            attempt=int(record["attempt"]),
            trigger=Trigger(record["trigger"]),
            finding=Finding.from_json(record["finding"]),
            reading=dict(record.get("reading", {})),
            rows=tuple(RowId.parse(r) for r in record.get("rows", ())),
            phase=Phase(record["phase"]),
            verdict=Verdict(record["verdict"]) if record.get("verdict") else None,
            facts=dict(record.get("facts", {})),
            suspects=tuple(Suspect.from_json(s) for s in record.get("suspects", ())),
            evidence=tuple(Evidence.from_json(e) for e in record.get("evidence", ())),
            diagnosis=Diagnosis.from_json(record.get("diagnosis", ())),
            trials=tuple(Trial.from_json(t) for t in record.get("trials", ())),
            remedy=record.get("remedy"),
            outcome=str(record.get("outcome", "")),
            replays=float(record.get("replays", 0.0)),
            time_s=float(record.get("time_s", 0.0)),
            steps_lost=int(record.get("steps_lost", 0)),
            capsule=record.get("capsule"),
        )
