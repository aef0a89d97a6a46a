"""What a run folder tells of its past: what was trained, under which facts, and what is left.

Torch is not needed to read it, and nothing in it is trusted: a value of the wrong kind counts as not recorded.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finitune.core import journal
from finitune.core.files import read_manifest
from finitune.train.folder import JOURNAL_FILE, RECIPE_FILE, Place, unusable, without_recipe
from finitune.train.recipe import Recipe
from finitune.train.recipe_io import load_recipe

Facts = Mapping[str, Any]


@dataclass(slots=True)
class Past:
    """What the journal of a run tells."""

    sessions: list[tuple[int, Facts]] = field(default_factory=list)
    """(step it began at, facts) of every session, oldest first; facts may be empty."""
    last_step: int = 0
    """The last step that was trained on the line that the run stands on."""
    saves: list[tuple[int, int]] = field(default_factory=list)
    """(step, line) of every checkpoint that was written."""
    rollbacks: list[int] = field(default_factory=list)
    """The step that each going back went to."""
    end: Mapping[str, Any] | None = None
    """The last word of the last session; None where it was killed."""

    def take(self, record: Mapping[str, Any]) -> None:
        """Take the next record into account. Raises KeyError, TypeError or ValueError where it is not one."""
        kind = record["kind"]
        if kind in ("start", "resume"):
            self.end, self.last_step = None, int(record["step"])
            facts = record.get("facts")
            self.sessions.append((self.last_step, facts if isinstance(facts, Mapping) else {}))
        elif kind == "rollback":
            self.end, self.last_step = None, int(record["to_step"])
            self.rollbacks.append(self.last_step)
        elif kind == "step" and record["action"] != "retry_smaller_scale":
            self.last_step = int(record["step"])
        elif kind == "save":
            self.saves.append((int(record["step"]), int(record.get("line", 0))))
        elif kind == "end":
            self.end = record

    def facts_at(self, step: int) -> Facts:
        """The facts of the session that reached ``step``; empty where none are recorded."""
        return next((facts for began, facts in reversed(self.sessions) if facts and began <= step), {})

    def saved_on_the_line(self) -> list[int]:
        """Steps of the checkpoints that belong to the line the run stands on."""
        return [step for step, line in self.saves if all(step <= to for to in self.rollbacks[max(0, line) :])]


def read_past(run_dir: Path) -> Past:
    """The past of a run; an empty one where there is no journal. Raises UserError SYS004 where it cannot be read."""
    past = Past()
    path = run_dir / JOURNAL_FILE
    if not path.is_file():
        return past
    try:
        for record in journal.read(path):
            with contextlib.suppress(KeyError, TypeError, ValueError, OverflowError):  # no record of ours
                past.take(record)
    except OSError as error:
        raise unusable(run_dir, error) from error
    return past


def facts_of_checkpoint(folder: Path) -> Facts:
    """What the run was when a checkpoint was written; empty where that is not recorded."""
    try:
        facts = read_manifest(folder).get("facts")
    except (OSError, ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, Mapping) else {}


def fact(facts: Facts, path: str) -> str | int | float | None:
    """The plain value at a dotted path; None where there is none."""
    here: Any = facts
    for part in path.split("."):
        here = here.get(part) if isinstance(here, Mapping) else None
    return here if isinstance(here, (str, int, float)) else None


def stored_recipe(place: Place, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe that a run goes on with: its own, or that of the chosen checkpoint, with ``overrides`` on top.

    Raises UserError, UserErrors: everything that is wrong with recipe.yaml or the overrides.
    """
    if not (place.run_dir / RECIPE_FILE).is_file():
        return _recovered(place, overrides)
    path = str(place.run_dir / RECIPE_FILE)
    given = list(overrides)
    named = {override.partition("=")[0].strip() for override in given}
    if "num_train_epochs" in named and "max_steps" not in named:
        # A stored recipe has its length in steps, which would win over the epochs that were asked for.
        given.insert(0, "max_steps=-1")
    if place.chosen is None:
        return load_recipe(path, given)
    return load_recipe(path, [*_as_overrides(path, facts_of_checkpoint(place.chosen).get("recipe")), *given])


def _recovered(place: Place, overrides: Iterable[str]) -> Recipe:
    """The recipe of a run whose recipe.yaml is lost, from the facts of its newest checkpoint or of its journal."""
    folders = sorted(place.run_dir.glob("checkpoint-*"), key=lambda p: p.stat().st_mtime, reverse=True)
    told = [facts_of_checkpoint(folder) for folder in folders]
    told += [facts for _, facts in reversed(read_past(place.run_dir).sessions)]
    found = next((facts["recipe"] for facts in told if isinstance(facts.get("recipe"), Mapping)), None)
    if found is None:
        raise without_recipe(place.run_dir)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / RECIPE_FILE
        path.write_text(json.dumps(found), encoding="utf-8")  # JSON is YAML
        return stored_recipe(Place(Path(scratch)), overrides)


def _as_overrides(path: str, then: Any) -> Iterator[str]:
    """What turns the recipe in the run's folder into the one that a checkpoint was written under."""
    if isinstance(then, Mapping):
        now = load_recipe(path).model_dump(mode="json")
        for key, _, value in differences(now, filled(then, now)):
            yield f"{key}={json.dumps(value)}"


def differences(was: Any, now: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted path, was, now) of every value that differs between two recipes as plain values.

    Sections are entered where both sides have one; a section against null, and an open mapping, is one value.
    """
    for name in [*was, *(n for n in now if n not in was)]:
        path, a, b = f"{prefix}{name}", was.get(name), now.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping) and path not in OPEN:
            yield from differences(a, b, f"{path}.")
        elif a != b or isinstance(a, bool) != isinstance(b, bool):
            yield path, a, b


def filled(values: Facts, base: Facts) -> dict[str, Any]:
    """``values`` with what they lack taken from ``base``, section by section."""
    both = {name: values.get(name, base.get(name)) for name in [*base, *(n for n in values if n not in base)]}
    return {
        name: filled(value, base[name]) if isinstance(value, Mapping) and isinstance(base.get(name), Mapping) else value
        for name, value in both.items()
    }


OPEN = ("guard.detectors",)
"""Fields that are mappings themselves."""
