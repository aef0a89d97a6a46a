"""Families: the file name is the registered name.

A family is a package whose modules all define the same few names. Listing reads file names and
entry points and imports nothing; a member is imported on first use and checked for what it must
define. Third parties add members by entry points in the group ``finitune.<family>``.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.metadata import entry_points
from types import ModuleType


@dataclass(frozen=True, slots=True)
class Family:
    """Where a family lives and what each member must define."""

    package: str
    required: tuple[str, ...]


FAMILIES: Mapping[str, Family] = {
    "causes": Family("finitune.engine.causes", ("weigh", "CAUSE", "CODES", "FAULT_CLASS", "REMEDIES")),
    "clippers": Family("finitune.engine.clippers", ("Clipper",)),
    "contenders": Family("finitune.bench.contenders", ("drive", "missing", "MEANT_FOR")),
    "controls": Family("finitune.bench.controls", ("plant", "RUNS")),
    "detectors": Family("finitune.detectors", ("detect", "Config", "CODES")),
    "experiments": Family("finitune.engine.experiments", ("run", "wanted", "ORDER", "SAYS")),
    "faults": Family("finitune.bench.faults", ("plant", "FAULT_CLASS", "RUNS")),
    "formats": Family("finitune.data.formats", ("sniff", "to_messages")),
    "model_families": Family("finitune.models.families", ("FAMILY",)),
    "objectives": Family("finitune.train.objectives", ("compute",)),
    "remedies": Family("finitune.engine.remedies", ("plans", "SAFETY", "SAYS")),
    "runs": Family("finitune.bench.runs", ("build", "PRECISIONS", "STEPS")),
    "strategies": Family("finitune.train.strategies", ("Strategy",)),
    "trackers": Family("finitune.train.trackers", ("Tracker",)),
}


class UnknownMember(LookupError):
    """No member of that name; ``suggestions`` holds close names."""

    def __init__(self, family: str, name: str, known: tuple[str, ...]) -> None:
        self.family, self.name, self.known = family, name, known
        self.suggestions = tuple(get_close_matches(name, known, n=3))
        hint = f"; did you mean {', '.join(self.suggestions)}?" if self.suggestions else ""
        super().__init__(f"no {family} member {name!r}{hint} (known: {', '.join(known)})")


class BrokenMember(TypeError):
    """A member that lacks a name its family requires."""


def _external(family: str) -> dict[str, str]:
    return {e.name: e.value for e in entry_points(group=f"finitune.{family}")}


@cache
def names(family: str) -> tuple[str, ...]:
    """Names of all members, sorted; imports none of them."""
    spec = importlib.util.find_spec(FAMILIES[family].package)
    paths = list(spec.submodule_search_locations or ()) if spec else []
    own = (m.name for m in pkgutil.iter_modules(paths) if m.name != "codes")
    return tuple(sorted({n for n in own if not n.startswith("_")} | set(_external(family))))


@cache
def load(family: str, name: str) -> ModuleType:
    """Import one member.

    Raises:
        UnknownMember: no such name (with close matches).
        BrokenMember: the module lacks a required name.
    """
    if name not in names(family):
        raise UnknownMember(family, name, names(family))
    target = _external(family).get(name, f"{FAMILIES[family].package}.{name}")
    module = importlib.import_module(target.partition(":")[0])
    missing = [n for n in FAMILIES[family].required if not hasattr(module, n)]
    if missing:
        raise BrokenMember(f"{family} member {name!r} lacks {', '.join(missing)}")
    return module
