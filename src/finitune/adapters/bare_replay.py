"""The capsule of a guarded script, computed again on the script's own model: public API.

    done = finitune.replay("run/incidents/001", model, optimizer, loss_fn, experiment="fp32")
    print(done)

Weights, moments, running statistics, loss scale, conditions and random states are those of the capsule while the step
is computed; afterwards model and optimizer are bit for bit what they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finitune.adapters import codes_script as words
from finitune.adapters.bare import BarePort
from finitune.adapters.bare_asked import Loop, LossFn
from finitune.adapters.bare_batch import SplitRows, mapped
from finitune.adapters.bare_capsule import generators_of, modes_as_in
from finitune.adapters.bare_checks import check
from finitune.adapters.bare_compute import moving_buffers
from finitune.adapters.bare_held import HeldBatches
from finitune.adapters.bare_monitor import monitor_of
from finitune.adapters.codes import BAD_ARGUMENT
from finitune.core.chain import encode
from finitune.core.errors import UserError
from finitune.core.incident import Evidence
from finitune.core.messages.catalogue import text
from finitune.core.types import Reading, RowId
from finitune.engine import capsule as names
from finitune.engine.capsule_read import Capsule, read_capsule
from finitune.engine.capsule_replay import Replay, Replayed, experiment_of, impossible, replay_on
from finitune.engine.conditions import NotPossible
from finitune.engine.snapshot import as_snapshot
from finitune.numerics.fingerprint import RECORD, checksum, first_difference
from finitune.numerics.seeds import GeneratorStates, generators_kept

PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True, slots=True)
class ScriptReplay:
    """What a replay came to; ``print`` it."""

    done: Replayed

    @property
    def verdict(self) -> Replay:
        """``bits`` or ``same``: reproduced; ``gone``: no longer reproduces; ``impossible``: see :attr:`reason`."""
        return self.done.verdict

    @property
    def reproduced(self) -> bool:
        """The failure is there."""
        return self.done.fails

    @property
    def reason(self) -> str:
        """Why it could not be replayed; empty where it was."""
        return self.done.reason

    @property
    def reading(self) -> Reading | None:
        """All numbers of the step as it was computed now; None where it was not."""
        return self.done.reading

    @property
    def evidence(self) -> Evidence | None:
        """What the experiment, or the step in another precision, has shown."""
        return self.done.evidence

    @property
    def notes(self) -> tuple[str, ...]:
        """What is not as it was then."""
        return self.done.notes

    def to_json(self) -> dict[str, Any]:
        """A JSON-able record."""
        return self.done.to_json()

    def __str__(self) -> str:
        done = self.done
        verdict = text(f"incidents.replay.{done.verdict.value}")
        if done.verdict is Replay.IMPOSSIBLE:
            return f"{verdict}: {done.reason}"
        lines = [
            text("incidents.replay.heading", number=done.number, step=done.step, verdict=verdict),
            text("incidents.replay.recorded", **(done.recorded or {})),
            text("incidents.replay.now", **(done.now or {})),
            *([done.said] if done.said else []),
            *(text("incidents.replay.note", note=note) for note in done.notes),
        ]
        return "\n  ".join(lines)


def replay(
    capsule: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_fn: LossFn,
    *,
    experiment: str | None = None,
    precision: str | None = None,
    as_batch: Callable[[Any], Any] | None = None,
    split_rows: SplitRows | None = None,
    watch: Sequence[str] | None = None,
) -> ScriptReplay:
    """Compute the failing step of a capsule that :func:`finitune.guard` wrote, and compare.

    Args:
        capsule: its folder, that of the incident, or a .tar.
        model: built as the script does; what it holds does not matter, unless the capsule has no weights.
        optimizer: of the same kind, over the same parameters.
        loss_fn: ``loss_fn(model, batch)``, as given to the guard.
        experiment: name of one to make as well, such as "fp32", "rows" or "scan_state".
        precision: "fp32" or "bf16": compute the step in it as well.
        as_batch: makes the script's own kind of batch from the stored one (dicts, lists and tensors, on the model's
            device; a named tuple or dataclass is a dict of its fields).
        split_rows: as given to the guard.
        watch: as given to the guard.

    Returns the verdict, with the numbers of the step. Model and optimizer are afterwards as before, gradients too.

    Raises UserError: SYS410 to SYS414 for what is no sound capsule, SYS416 for an unknown experiment, SYS425 for an
    argument that cannot be. Whatever else is missing is a verdict.
    """
    if experiment is not None:
        experiment_of(experiment)
    if precision is not None and precision not in PRECISIONS:
        problem, cure = f"{precision!r} is not known", f"choose one of {', '.join(PRECISIONS)}"
        raise UserError(BAD_ARGUMENT, "finitune.replay", name="precision", problem=problem, cure=cure)
    check(Loop(model, optimizer, loss_fn), "auto", watch, {}, 0.0)
    read = read_capsule(capsule)
    lacking = _lacking(read)
    if lacking is not None:
        return ScriptReplay(impossible(lacking))
    try:
        port = CapsulePort(read, Loop(model, optimizer, loss_fn), as_batch, split_rows, watch)
    except NotPossible as reason:
        return ScriptReplay(impossible(str(reason)))
    with _unchanged(port) as changed, modes_as_in(read, model):
        done = _on(port, experiment, precision)
    if changed:
        done = replace(done, notes=(*done.notes, words.LEFT_CHANGED.say({"name": changed[0]})))
    return ScriptReplay(done)


def _lacking(capsule: Capsule) -> str | None:
    if capsule.kind != "script":
        return words.OF_A_RECIPE.say({"path": capsule.path})
    return text("incidents.no_rows") if capsule.micros is None else None


def _on(port: CapsulePort, experiment: str | None, precision: str | None) -> Replayed:
    capsule = port.capsule
    try:
        if capsule.weights == "digest":
            port.stand_where_recorded()
        done = replay_on(port, capsule, experiment=experiment, precision=precision)
    except NotPossible as reason:
        return impossible(str(reason))
    return replace(done, notes=(*done.notes, *port.notes())) if done.verdict is not Replay.IMPOSSIBLE else done


class CapsulePort(BarePort):
    """A bare loop whose one batch is a capsule's; scaler and schedule are as recorded, the script's own stay out."""

    def __init__(
        self,
        capsule: Capsule,
        loop: Loop,
        as_batch: Callable[[Any], Any] | None,
        split_rows: SplitRows | None,
        watch: Sequence[str] | None,
    ) -> None:
        """Raises NotPossible for a batch or numbers that cannot be."""
        self.capsule = capsule
        device = next((p.device for g in loop.optimizer.param_groups for p in g["params"]), torch.device("cpu"))
        loop = replace(loop, scaler=_scaler(capsule, device), max_grad_norm=_limit(capsule))
        held = HeldBatches(split_rows, _names(capsule))
        held.go_on_after(capsule.step - 1)
        states = generators_of(capsule)
        with generators_kept():
            put = held.put(tuple(_batch(m, device, as_batch) for m in capsule.micros or ()))
        # With states there, the step counts as computed before, and what loss_fn raises is a reason and no crash.
        put.states.extend(states or [GeneratorStates.now()])
        self._no_generators = not states
        super().__init__(loop, held, monitor_of(loop.model, watch))

    def _looks(self) -> bool:
        """One step is all there is."""
        return True

    def state_record(self) -> dict[str, Any]:
        """As recorded, where the script's own schedule is left out of it."""
        return super().state_record() | {"scheduler": self.capsule.record.get("scheduler")}

    def stand_where_recorded(self) -> None:
        """For a capsule without weights: the given ones must be its own. Raises NotPossible."""
        own = as_snapshot(self)
        different = first_difference(self.capsule.info.get("state"), own.mark)
        if different not in (None, RECORD):
            raise NotPossible(words.NO_STATE_OF_ITS_OWN.say({"name": different, "step": self.capsule.step}))
        try:
            self.restore(own.tensors, self.capsule.record)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            reason = text("incidents.other_model", error=f"{type(error).__name__}: {str(error)[:300]}")
            raise NotPossible(reason) from error

    def notes(self) -> Iterator[str]:
        """What is not as it was then, beyond versions and frozen weights."""
        facts, now = self.capsule.case.facts, self.facts()
        if self._no_generators:
            yield words.NO_GENERATORS.say({})
        for name, sentence in (("adam_eps", words.OTHER_EPS), ("device", words.OTHER_DEVICE)):
            if name in facts and encode(facts[name]) != encode(now[name]):
                yield sentence.say({"now": now[name], "was": str(facts[name])[:60]})


def _scaler(capsule: Capsule, device: torch.device) -> torch.amp.GradScaler | None:
    if capsule.record.get("scaler") is None:
        return None
    return torch.amp.GradScaler(device.type)


def _limit(capsule: Capsule) -> float | None:
    """What gradients were clipped to."""
    found = capsule.case.facts.get("max_grad_norm")
    return found if isinstance(found, float | int) and math.isfinite(found) and found > 0 else None


def _names(capsule: Capsule) -> list[RowId] | None:
    rows = [row for unit in capsule.units for row in unit.rows]
    return rows or None


def _batch(micro: Any, device: torch.device, as_batch: Callable[[Any], Any] | None) -> Any:
    """A micro-batch as the script gets it. Raises NotPossible."""
    try:
        placed = mapped(lambda _, leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, micro)
        return placed if as_batch is None else as_batch(placed)
    except Exception as error:  # whatever the script's own code raises
        raise NotPossible(words.NO_BATCH.say({"error": f"{type(error).__name__}: {str(error)[:300]}"})) from error


# -- the script's model stays as it is --------------------------------------------------------------------------------


@contextmanager
def _unchanged(port: CapsulePort) -> Iterator[list[str]]:
    """Afterwards weights, buffers, optimizer, gradients and hooks are as before.

    Yields a list that then names what the loss function itself has changed beyond that.
    """
    groups = port.optimizer.param_groups
    keys, grads = [set(g) for g in groups], [(p, p.grad) for p in _parameters(port)]
    fixed = _fixed(port)
    buffers = {n for n, _ in port.model.named_buffers()}
    copies = {n: t.detach().clone() for n, t in fixed.items() if n in buffers or _comes(port, n)}
    sums = {n: checksum(t) for n, t in fixed.items() if n not in copies}
    before, changed = as_snapshot(port), list[str]()
    try:
        yield changed
    finally:
        try:
            before.restore(port)
        finally:
            port.close()
        with torch.no_grad():
            for name, copied in copies.items():
                fixed[name].copy_(copied)
        for group, known in zip(groups, keys, strict=True):
            for foreign in [k for k in group if k not in known]:
                del group[foreign]
        for parameter, grad in grads:
            parameter.grad = grad
        changed += [n for n, was in sums.items() if checksum(fixed[n]) != was]


def _parameters(port: CapsulePort) -> list[nn.Parameter]:
    held = [p for g in port.optimizer.param_groups for p in g["params"]]
    return list({id(p): p for p in [*port.model.parameters(), *held]}.values())


def _fixed(port: CapsulePort) -> Mapping[str, Tensor]:
    """Weights and buffers that are no part of the training state."""
    state = {id(p) for _, p in port.parameters()} | {id(b) for _, b in moving_buffers(port.model)}
    named = {**dict(port.model.named_parameters()), **dict(port.model.named_buffers())}
    return {name: tensor for name, tensor in named.items() if id(tensor) not in state}


def _comes(port: CapsulePort, name: str) -> bool:
    """The capsule holds it."""
    return names.FROZEN + name in port.capsule.tensors
