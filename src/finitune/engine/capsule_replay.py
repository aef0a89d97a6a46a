"""The replay of a capsule on a port: put the state in, compute the step once, compare with what was recorded.

bits         the same failure with the same bits
same         the same failure with other bits: another machine, another version
gone         it fails no more: a bug that was fixed, or something that was never in the step
impossible   something is missing here; said openly, and nothing is concluded
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from finitune.core import registry
from finitune.core.errors import UserError
from finitune.core.incident import Evidence, Result, Verdict
from finitune.core.messages.catalogue import text
from finitune.core.types import Reading
from finitune.engine import capsule as names
from finitune.engine.capsule_read import Capsule, decoded, read_capsule
from finitune.engine.capture import frozen_tensors, is_of_one_step, versions_of
from finitune.engine.codes_incident import NO_EXPERIMENT
from finitune.engine.conditions import NotPossible
from finitune.engine.lab import Budget, BudgetSpent, Lab, Shot
from finitune.engine.port import ReplayPort
from finitune.engine.replay import same_bits
from finitune.engine.snapshot import as_snapshot
from finitune.numerics.fingerprint import RECORD, fingerprint, first_difference
from finitune.numerics.seeds import generators_kept

_CLOSE = 0.01
"""A loss within one percent is the same course; machines differ in the last bits, not in this."""
_MAX_REPLAYS = 100.0
_COMPUTING = (
    RuntimeError,
    IndexError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    AssertionError,
    NotImplementedError,
    OverflowError,
    RecursionError,
    MemoryError,
)
"""What a model's code may raise for a state or batch that is not its own."""


class Replay(str, Enum):
    """What a replay came to."""

    BITS = "bits"
    SAME = "same"
    GONE = "gone"
    IMPOSSIBLE = "impossible"


@dataclass(frozen=True, slots=True)
class Replayed:
    """A replay, for people and programs."""

    verdict: Replay
    reason: str = ""
    """Why it is impossible."""
    number: int = 0
    """Of the incident, within its run."""
    step: int = 0
    recorded: Mapping[str, float] | None = None
    """Loss and gradient norm then."""
    now: Mapping[str, float] | None = None
    notes: tuple[str, ...] = ()
    """What is not as it was: versions, weights that are not trained."""
    evidence: Evidence | None = None
    said: str = ""
    """The sentence of the experiment, or of the other precision."""
    reading: Reading | None = None
    """All numbers of the step as it was computed now."""

    @property
    def fails(self) -> bool:
        """The failure is there."""
        return self.verdict in (Replay.BITS, Replay.SAME)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able record."""
        return {
            "verdict": self.verdict.value,
            "reason": self.reason,
            "number": self.number,
            "step": self.step,
            "recorded": dict(self.recorded) if self.recorded else None,
            "now": dict(self.now) if self.now else None,
            "notes": list(self.notes),
            "evidence": self.evidence.to_json() if self.evidence else None,
            "said": self.said,
        }


def impossible(reason: str) -> Replayed:
    """A replay that cannot be made."""
    return Replayed(Replay.IMPOSSIBLE, reason)


def missing_in(capsule: Capsule) -> str | None:
    """What a replay needs and the capsule does not hold, as a sentence."""
    if capsule.micros is None:
        return text("incidents.no_rows")
    return text("incidents.no_weights") if capsule.weights == "digest" else None


def experiment_of(name: str) -> ModuleType:
    """A registered experiment. Raises UserError SYS416."""
    try:
        return registry.load("experiments", name)
    except (registry.UnknownMember, registry.BrokenMember) as error:
        known = registry.names("experiments")
        close = getattr(error, "suggestions", ())
        hint = text("incidents.did_you_mean", names=", ".join(close)) if close else ""
        raise UserError(NO_EXPERIMENT, "--experiment", name=name, hint=hint, known=", ".join(known)) from error


def replay_with(
    path: str | Path,
    port_of: Callable[[Capsule], ReplayPort],
    *,
    experiment: str | None = None,
    precision: str | None = None,
) -> Replayed:
    """Replay a capsule on the port that ``port_of`` makes for it: one around the user's own model and loss.

    The port's ``batch()`` is to be ``capsule.micros``, and its step the one the record says.

    Raises UserError: SYS410 to SYS414 for what is no sound capsule, SYS416 for an unknown experiment.
    """
    if experiment is not None:
        experiment_of(experiment)
    capsule = read_capsule(path)
    lacking = missing_in(capsule)
    if lacking is not None:
        return impossible(lacking)
    try:
        port = port_of(capsule)
    except NotPossible as reason:
        return impossible(str(reason))
    return replay_on(port, capsule, experiment=experiment, precision=precision)


def replay_on(
    port: ReplayPort, capsule: Capsule, *, experiment: str | None = None, precision: str | None = None
) -> Replayed:
    """Replay on a port that computes the capsule's batch; its model and optimizer then hold the capsule's state.

    ``experiment``: name of one to make as well; ``precision``: "fp32" or "bf16", the step in another precision.

    Raises UserError SYS416 for an unknown experiment.
    """
    module = experiment_of(experiment) if experiment is not None else None
    with generators_kept():
        try:
            if capsule.weights != "digest":
                put_state(port, capsule)
            different = first_difference(capsule.info.get("state"), _mark(port))
            if different not in (None, RECORD):
                return impossible(text("incidents.other_state", name=different))
            return _replayed(port, capsule, module, precision, _notes(port, capsule, different))
        except NotPossible as reason:
            return impossible(str(reason))
        except _COMPUTING as error:
            return impossible(text("incidents.raised", error=f"{type(error).__name__}: {str(error)[:300]}"))


def _mark(port: ReplayPort) -> Any:
    return fingerprint(port.state_tensors(), port.state_record())


def _replayed(
    port: ReplayPort, capsule: Capsule, module: ModuleType | None, precision: str | None, notes: tuple[str, ...]
) -> Replayed:
    known = {e.experiment: replace(e, numbers=decoded(dict(e.numbers))) for e in capsule.incident.evidence}
    suspects = capsule.incident.suspects
    case = replace(capsule.case, verdict=Verdict.REPRODUCED, suspects=suspects, evidence=known)
    lab = Lab(port, case, as_snapshot(port), Budget(_MAX_REPLAYS, math.inf), lambda _step: None)
    shot = lab.shoot()
    done = Replayed(
        verdict_of(capsule, shot),
        number=capsule.incident.number,
        step=capsule.step,
        recorded=_numbers(capsule.expected),
        now=_numbers(shot.reading),
        notes=notes,
        reading=shot.reading,
    )
    if module is not None:
        return _with_experiment(done, lab, module)
    return _with_precision(done, lab, precision) if precision is not None else done


def verdict_of(capsule: Capsule, shot: Shot) -> Replay:
    """Whether the failure is there, and whether its bits are."""
    equal = same_bits(capsule.expected, shot.reading)
    if not is_of_one_step(capsule.case.trigger):
        was, now = capsule.expected.loss, shot.reading.loss
        near = math.isclose(was, now, rel_tol=_CLOSE) or (math.isnan(was) and math.isnan(now))
        return Replay.BITS if equal else Replay.SAME if near else Replay.GONE
    if not shot.bad:
        return Replay.GONE
    return Replay.BITS if equal else Replay.SAME


def _with_experiment(done: Replayed, lab: Lab, module: ModuleType) -> Replayed:
    name = module.__name__.rpartition(".")[2]
    try:
        evidence, _ = module.run(lab, lab.case)
        evidence = replace(evidence, replays=lab.budget.replays - 1.0)
    except NotPossible as reason:
        evidence = Evidence(name, Result.NOT_RUN, {"reason": str(reason)})
    except BudgetSpent:
        evidence = Evidence(name, Result.NOT_RUN, {"reason": text("incidents.budget", replays=_MAX_REPLAYS)})
    words = module.SAYS.get(evidence.result)
    why = evidence.numbers.get("reason", "")
    said = words.say(evidence.numbers) if words else text("incidents.not_run", name=name, reason=why)
    return replace(done, evidence=evidence, said=said)


def _with_precision(done: Replayed, lab: Lab, precision: str) -> Replayed:
    try:
        shot = lab.shoot(replace(lab.now, precision=precision))
    except NotPossible as reason:
        return replace(done, said=text("incidents.not_run", name=precision, reason=str(reason)))
    key = "incidents.precision_bad" if shot.bad else "incidents.precision_good"
    numbers = _numbers(shot.reading)
    evidence = Evidence(precision, Result.BAD if shot.bad else Result.GOOD, numbers, 1.0)
    return replace(done, evidence=evidence, said=text(key, precision=precision, **numbers))


def _numbers(reading: Reading) -> dict[str, float]:
    return {"loss": reading.loss, "grad_norm": reading.grad_norm}


def _notes(port: ReplayPort, capsule: Capsule, different: str | None) -> tuple[str, ...]:
    """What is not as it was when the capsule was written."""
    notes = [text("incidents.other_record")] if different == RECORD else []
    was = capsule.info.get("frozen")
    other = first_difference(was, fingerprint(sorted(frozen_tensors(port).items()), {}))
    if other is not None:
        notes.append(text("incidents.other_frozen", name=other))
    then = capsule.info.get("versions")
    now = versions_of(port.facts())
    changed = [f"{k} {v} -> {now[k]}" for k, v in then.items() if now.get(k, v) != v] if isinstance(then, dict) else []
    return (*notes, text("incidents.other_versions", changes=", ".join(changed))) if changed else tuple(notes)


# -- the state ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def put_state(port: ReplayPort, capsule: Capsule) -> None:
    """Weights, moments and record of the capsule become the port's. Raises NotPossible where they are not its own."""
    here = {**dict(port.model.named_parameters()), **dict(port.model.named_buffers())}
    tensors = state_of(capsule, here)
    try:
        for name, tensor in capsule.tensors.items():
            if name.startswith(names.FROZEN):
                _copy(here, name.removeprefix(names.FROZEN), tensor)
        port.restore(tensors, capsule.record)
    except _COMPUTING as error:
        problem = f"{type(error).__name__}: {str(error)[:300]}"
        raise NotPossible(text("incidents.other_model", error=problem)) from error


def _copy(here: Mapping[str, torch.Tensor], name: str, tensor: torch.Tensor) -> None:
    target = here[name]
    if target.shape != tensor.shape or target.dtype != tensor.dtype:
        raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)}, expected {target.dtype} {tuple(target.shape)}")
    target.copy_(tensor)


def state_of(capsule: Capsule, base: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights and moments of the capsule by name; what it holds in part is completed from ``base``, or zeros.

    Raises NotPossible where the base is another model.
    """
    largest = max((t.numel() for t in base.values()), default=0)
    found = {}
    for name, tensor in capsule.tensors.items():
        plain = name.removeprefix(names.STATE)
        if plain == name:
            continue
        shape = capsule.delta.get(plain)
        if shape is None:
            found[plain] = tensor
            continue
        was = base.get(plain)
        # No moment is larger than the largest weight: a stranger's shape takes no memory.
        if math.prod(shape) > largest or (was is not None and (tuple(was.shape), was.dtype) != (shape, tensor.dtype)):
            raise NotPossible(text("incidents.other_base", name=plain))
        whole = torch.zeros(shape, dtype=tensor.dtype) if was is None else was.detach().to("cpu", copy=True)
        whole[capsule.tensors[names.PLACES + plain]] = tensor
        found[plain] = whole
    return found
