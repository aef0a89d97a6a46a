"""``finitune.guard`` with its defaults: every step a transaction, the cause by experiment, the cure proved.

Meant for: training that goes on, with the cause named.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from finitune.adapters.bare_guard import BareGuard, guard
from finitune.bench.contenders import _ranks
from finitune.bench.recipe_load import RecipeLoad
from finitune.bench.witness import Witness
from finitune.bench.workload import Workload
from finitune.core.errors import FiniTuneError, Halted, UserError
from finitune.core.incident import Incident
from finitune.core.types import Finding, RowId, Severity
from finitune.report.incident import summary

MEANT_FOR = "training that goes on after a fault, with the cause named"
ABLE = ("recipe", _ranks.NEED)


def missing() -> str | None:
    """Always there."""
    return None


def drive(load: Workload | RecipeLoad, witness: Witness) -> None:
    """Train under the guard, or where the run begins with files, with the trainer it is part of."""
    if isinstance(load, RecipeLoad):
        from finitune.bench.contenders import _recipe

        _recipe.drive(load, witness)
        return
    if _ranks.is_wanted(load):
        _ranks.drive(load, witness)
        return
    drive_rank(load, witness, load.model)


def drive_rank(load: Workload, witness: Witness, model: nn.Module) -> None:
    """Train under the guard; ``model`` is what the loop calls, on several ranks load.model in its wrapper."""
    load.model.train()
    names = [row_id(name) for step in load.rows for name in step]
    options: dict[str, Any] = {"row_ids": names, **load.guard_options}
    try:
        guarded = guard(
            model,
            load.optimizer,
            load.compute,
            load.scheduler(),
            load.scaler(),
            max_grad_norm=load.max_grad_norm,
            **options,
        )
    except (FiniTuneError, RuntimeError) as error:
        _tell_error(error, [], witness)
        return
    with guarded:
        _train(load, witness, guarded)
    witness.incidents = [short(i) for i in guarded.incidents]


def _train(load: Workload, witness: Witness, guarded: BareGuard) -> None:
    for batch in load.batches:
        witness.begin()
        try:
            outcome = guarded.step(batch)
        except (FiniTuneError, RuntimeError, ValueError, IndexError) as error:
            _tell_findings(guarded.untold, witness)
            _tell_error(error, guarded.incidents, witness)
            return
        _tell_findings(outcome.findings, witness)
        witness.stepped(committed=outcome.committed, loss=outcome.loss)


def _tell_findings(findings: Sequence[Finding], witness: Witness) -> None:
    for finding in findings:
        if finding.severity is not Severity.NOTE:
            witness.find(finding.code, tuple(places_of(finding)))


def places_of(finding: Finding) -> Iterator[tuple[str, str]]:
    """What a finding points at: its place, its rows, and the parameters that it names."""
    if finding.where:
        yield "finding", finding.where
    yield from (("row", str(row)) for row in finding.rows)
    yield from (("parameter", str(name)) for name in finding.data.get("parameters", ()))


def row_id(name: str) -> RowId:
    """``rows.jsonl:12`` as a RowId; the name stands for the content."""
    source, _, number = name.rpartition(":")
    return RowId.of(source, int(number), name.encode())


def _tell_error(error: Exception, incidents: Sequence[Incident], witness: Witness) -> None:
    if isinstance(error, Halted):
        witness.find("halted", text=str(error).splitlines()[0])
    elif not incidents:
        code = getattr(getattr(error, "code", None), "code", "")
        where = tuple(places_of(error.finding())) if isinstance(error, UserError) else ()
        witness.find(code, where, text=str(error).splitlines()[0] if str(error) else "")
    witness.raised(error)


def short(incident: Incident) -> dict[str, Any]:
    """What the score needs to know of an incident."""
    top = incident.diagnosis.top
    return {
        "step": incident.step,
        "trigger": incident.trigger.value,
        "code": incident.diagnosis.code,
        "suspected": top.code if top is not None else "",
        "named": [c.code for c in incident.diagnosis.causes if c.named],
        "where": top.where if top is not None else "",
        "suspects": [[s.kind, s.name] for s in incident.suspects],
        "verdict": incident.verdict.value if incident.verdict is not None else None,
        "remedy": incident.remedy,
        "outcome": incident.outcome,
        "tried": [t.plan.get("remedy") for t in incident.trials],
        "replays": incident.replays,
        "time_s": incident.time_s,
        "steps_lost": incident.steps_lost,
        "summary": list(summary(incident)),
    }
