"""Going on with a run: which checkpoint, what has changed since, and what of that may be.

    point     the checkpoint to go on from: the newest good one, or exactly the one that was named
    compare   the facts it was written under with the facts of now (changes.py); all differences at once
    refuse    what does not fit, and what was not allowed
    restore   weights came with the model; moments, cursor, statistics and counters follow

Nothing is written before all of that has succeeded; :func:`leave_behind` then puts aside what is no longer part of
the run. Every difference that is gone on with is a finding, and a line of the journal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from finitune.core.errors import UserError, UserErrors, raise_all
from finitune.core.journal import Journal
from finitune.core.messages.catalogue import text
from finitune.core.types import Finding
from finitune.engine.codes import RESUME_IMPOSSIBLE
from finitune.train import checkpoint
from finitune.train.changes import TOLD_BY_A_FACT, Change, Kind, compare
from finitune.train.codes_resume import (
    CHANGED,
    CHANGES_ALLOWED,
    LENGTH_CHANGED,
    MISFIT,
    NO_EFFECT,
    NOT_EXACT,
    OLDER_CHOSEN,
    RATE_JUMPS,
    RESUMED,
)
from finitune.train.facts import facts_of
from finitune.train.folder import JOURNAL_FILE, Place
from finitune.train.journal_state import journal_findings
from finitune.train.keeper import ABANDONED, step_in
from finitune.train.past import Facts, Past, fact, facts_of_checkpoint, read_past, stored_recipe
from finitune.train.prepare import Prepared, prepare
from finitune.train.recipe import Recipe
from finitune.train.restore import FOREIGN, OtherState, rate_under, restore

DAMAGED = "damaged-"


@dataclass(frozen=True, slots=True)
class Point:
    """Where a run goes on."""

    place: Place
    folder: Path | None
    """None is the start of the run."""
    step: int
    damaged: tuple[Path, ...] = ()
    """Newer checkpoints that were passed over."""
    findings: tuple[Finding, ...] = ()

    @property
    def name(self) -> str:
        """For messages."""
        return self.folder.name if self.folder is not None else text("resume.start")


@dataclass(frozen=True, slots=True)
class Resumed:
    """A run that is ready to go on; nothing was written yet."""

    point: Point
    past: Past
    prepared: Prepared
    facts: dict[str, Any]
    """The facts of now, and under "changes" what differs from before."""


class Listing(tuple[str, ...]):
    """Lines that are shown below each other, and stay a list for programs."""

    def __format__(self, _spec: str) -> str:
        return "".join(f"\n    {line}" for line in self)


def choose_point(place: Place, past: Past, known: Mapping[Path, str] = MappingProxyType({})) -> Point:
    """The checkpoint to go on from; ``known`` tells what is wrong with some. Writes nothing.

    Raises UserError SYS005: the named one is damaged, or none of those that were saved is left.
    """
    try:
        if place.chosen is not None:
            return _named(place, place.chosen, past)
        folder, findings = checkpoint.newest_good(place.run_dir, known)
    except FOREIGN as error:
        raise _impossible(place.chosen or place.run_dir, repr(error)) from error
    damaged = tuple(Path(f.where) for f in findings)
    if folder is not None:
        return Point(place, folder, checkpoint.step_of(folder), damaged, tuple(findings))
    saved = past.saved_on_the_line()
    if findings:
        faults = "; ".join(f"{Path(f.where).name}: {f.data['faults']}" for f in findings)
        raise _impossible(place.run_dir, text("resume.no.all_damaged", faults=faults))
    if saved:
        names = ", ".join(f"{checkpoint.PREFIX}{step}" for step in sorted(set(saved)))
        raise _impossible(place.run_dir, text("resume.no.lost", names=names))
    return Point(place, None, 0)


def _named(place: Place, folder: Path, past: Past) -> Point:
    faults = checkpoint.faults_of(folder)
    if faults:
        raise _impossible(folder, text("resume.no.damaged", faults="; ".join(faults)))
    if not checkpoint.on_the_line(folder, past.rollbacks):
        raise _impossible(folder, text("resume.no.left_line", step=min(past.rollbacks)))
    return Point(place, folder, checkpoint.step_of(folder))


def _impossible(path: Path, reason: str) -> UserError:
    return UserError(RESUME_IMPOSSIBLE, "--resume", path=str(path), reason=reason)


def prepare_resumed(place: Place, recipe: Recipe, *, allow_changes: bool) -> Resumed:
    """Everything that is needed to go on, and everything that is to be said about it. Writes nothing.

    Raises UserError, UserErrors: nothing to go on from (SYS005), changes that do not fit (SYS021) or were not
    allowed (SYS020), and whatever preparing the recipe finds.
    """
    past = read_past(place.run_dir)
    known: dict[Path, str] = {}
    while True:
        point = choose_point(place, past, known)
        try:
            return _prepare_at(point, past, recipe, allow_changes)
        except OtherState as other:
            assert point.folder is not None, "the start of a run is of no other state"
            if place.chosen is not None:
                raise _impossible(point.folder, text("resume.no.damaged", faults=str(other))) from other
            known[point.folder] = str(other)


def _prepare_at(point: Point, past: Past, recipe: Recipe, allow_changes: bool) -> Resumed:
    """The run at one checkpoint. Raises OtherState where that does not hold what was written."""
    weigh = _Weighing(point, past, allow_changes, _stored_facts(point, past))
    prepared = _prepare(recipe, weigh)
    now = facts_of(recipe, prepared)
    changes = weigh.changes(now)
    raise_all(weigh.refusals(changes))
    if point.folder is not None:
        restore(prepared, point.folder, point.step, weigh.stored if weigh.permitted(changes) else None)
    prepared.findings[:0] = _told(weigh, changes, prepared)
    kept = [c.to_json() for c in changes if c.effect != TOLD_BY_A_FACT]
    return Resumed(point, past, prepared, now | ({"changes": kept} if kept else {}))


def _stored_facts(point: Point, past: Past) -> Facts | None:
    """The facts the state at ``point`` was reached under; None for a run that never began: nothing could change."""
    if point.folder is None and not past.sessions:
        return None
    facts = facts_of_checkpoint(point.folder) if point.folder is not None else {}
    facts = facts or past.facts_at(point.step)
    if not isinstance(facts.get("recipe"), dict):
        stored = stored_recipe(Place(point.place.run_dir))
        facts = {**facts, "recipe": stored.model_dump(mode="json")}
    return facts


def _prepare(recipe: Recipe, weigh: _Weighing) -> Prepared:
    """The prepared run. What cannot fit by the recipe alone is refused before anything is loaded."""
    early = {"recipe": recipe.model_dump(mode="json")}
    certain = [c for c in weigh.changes(early) if c.certain]
    if any(c.kind is Kind.IMPOSSIBLE for c in certain):
        raise_all(weigh.refusals(certain, text("resume.later")))
    try:
        return prepare(recipe, weigh.point.folder)
    except (UserError, UserErrors) as error:
        own = error.errors if isinstance(error, UserErrors) else (error,)
        likely = [c for c in weigh.changes(early) if c.certain or c.kind is Kind.IMPOSSIBLE]
        raise_all([*weigh.refusals(likely), *own])
        raise


@dataclass(frozen=True, slots=True)
class _Weighing:
    """What the differences mean for this resume."""

    point: Point
    past: Past
    allow: bool
    stored: Facts | None

    def changes(self, now: Facts) -> list[Change]:
        """All differences, by their weight here."""
        return [self._weighed(c) for c in compare(self.stored, now)] if self.stored is not None else []

    def _weighed(self, change: Change) -> Change:
        """At the start of a run every tensor fits; what was allowed once is not asked again."""
        if change.kind is Kind.IMPOSSIBLE and self.point.folder is None:
            change = replace(change, kind=Kind.NEEDS_PERMISSION)
        if change.kind is Kind.NEEDS_PERMISSION and self._agreed(change):
            return replace(change, kind=Kind.HARMLESS, effect="agreed")
        return change

    def _agreed(self, change: Change) -> bool:
        if self.point.place.chosen is not None or not self.past.sessions:
            return False
        known = self.past.sessions[-1][1].get("changes")
        before = [c for c in known if isinstance(c, dict)] if isinstance(known, list) else []
        this = change.to_json()
        return any(all(c.get(k) == this[k] for k in ("what", "was", "now")) for c in before)

    def permitted(self, changes: Sequence[Change]) -> bool:
        """Whether something changed that moves rows or numbers, with permission given now or before."""
        return any(c.kind is Kind.NEEDS_PERMISSION or c.effect == "agreed" for c in changes)

    def refusals(self, changes: Sequence[Change], note: str = "") -> list[UserError]:
        """One error for all that does not fit, one for all that is not allowed; ``note`` is a line below them."""
        below = (note,) if note else ()
        misfits = _lines(changes, Kind.IMPOSSIBLE)
        unallowed = Listing() if self.allow else _lines(changes, Kind.NEEDS_PERMISSION)
        where = {"run": str(self.point.place.run_dir), "point": str(self.point.folder or self.point.name)}
        return [
            UserError(code, "--resume", changes=Listing(lines + below), count=len(lines), step=self.point.step, **where)
            for code, lines in ((MISFIT, misfits), (CHANGED, unallowed))
            if lines
        ]


def _lines(changes: Sequence[Change], kind: Kind) -> Listing:
    return Listing(c.line() for c in changes if c.kind is kind and c.effect != TOLD_BY_A_FACT)


def _told(weigh: _Weighing, changes: Sequence[Change], prepared: Prepared) -> list[Finding]:
    """What is to be said, in order: where it goes on, what is passed over, what differs."""
    point, state, loader = weigh.point, prepared.port.state, prepared.port.parts.loader
    again = max(0, weigh.past.last_step - point.step)
    found = [
        *point.findings,
        *journal_findings(point.place.run_dir / JOURNAL_FILE, point.folder),
        RESUMED.find("", step=point.step, total=prepared.plan.total_steps, point=point.name, again=again),
        *_gone_back(weigh),
    ]
    codes = ((CHANGES_ALLOWED, Kind.NEEDS_PERMISSION), (NOT_EXACT, Kind.EXPLAINED), (NO_EFFECT, Kind.HARMLESS))
    place: dict[str, Any] = {
        "epoch": state.cursor.epoch,
        "batch": state.cursor.step + 1,
        "batches": loader.steps_per_epoch(state.cursor.epoch),
    }
    for code, kind in codes:
        if lines := _lines(changes, kind):
            found.append(code.find("", step=point.step, count=len(lines), changes=lines, **place))
    return [*found, *_length(weigh, prepared)]


def _gone_back(weigh: _Weighing) -> list[Finding]:
    """Said where the named checkpoint is not the newest."""
    point, past = weigh.point, weigh.past
    newer = later_checkpoints(point)
    if point.place.chosen is None or not (newer or past.last_step > point.step):
        return []
    names = ", ".join(p.name for p in newer) or "-"
    run, last = str(point.place.run_dir), max([past.last_step, *map(step_in, newer)])
    return [OLDER_CHOSEN.find("", path=str(point.folder), last=last, step=point.step, newer=names, run=run)]


def _length(weigh: _Weighing, prepared: Prepared) -> list[Finding]:
    """A run that was made longer or shorter, and what that does to the learning rate."""
    stored = weigh.stored or {}
    was, now, step = fact(stored, "total_steps"), prepared.plan.total_steps, weigh.point.step
    if not isinstance(was, int) or was == now:
        return []
    found = [LENGTH_CHANGED.find("", was=was, now=now, step=step, left=max(0, now - step))]
    then = rate_under(stored.get("recipe"), was, prepared.port.state.updates)
    rate = prepared.port.lr
    if step < now and then is not None and abs(then - rate) > 1e-9 * max(then, rate):
        scheduler = prepared.recipe.lr_scheduler_type
        found.append(
            RATE_JUMPS.find("", step=step + 1, was=was, now=now, was_rate=then, now_rate=rate, scheduler=scheduler)
        )
    return found


def later_checkpoints(point: Point) -> list[Path]:
    """Checkpoints of later steps than the one gone on from, newest first: no longer part of the run."""
    return [p for p in checkpoint.listed(point.place.run_dir) if step_in(p) > point.step]


def leave_behind(resumed: Resumed, journal: Journal) -> None:
    """Journal that the run goes back where a checkpoint was named, and put aside what is no longer part of it.

    Damaged ones are put aside too: nothing may count on them, and the keeper must not keep them in place of good
    ones. Raises OSError; what was done until then stands and does no harm.
    """
    point, past = resumed.point, resumed.past
    later, line = later_checkpoints(point), len(past.rollbacks)
    if point.place.chosen is not None and (later or past.last_step > point.step):
        line += 1
        journal.write(
            "rollback",
            from_step=past.last_step,
            to_step=point.step,
            attempt=resumed.prepared.port.state.attempt,
            reason=f"--resume {point.name}",
            base=point.step,
        )
        journal.sync()
    for path in later:
        stem = f"{DAMAGED}{path.name}" if path in point.damaged else f"{ABANDONED}{line}-{path.name}"
        path.rename(_free(path.with_name(stem)))


def _free(path: Path) -> Path:
    """The path, numbered where it is taken."""
    found, number = path, 1
    while found.exists():
        number += 1
        found = path.with_name(f"{path.name}-{number}")
    return found
