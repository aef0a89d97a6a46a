"""Capsules read without trust: everything is checked before it is used, and nothing in them is run.

folder or .tar -> files agree with the manifest, and none could hold code -> JSON of bounded size and depth
-> typed values -> tensors that fill their file exactly
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from finitune.core.chain import number
from finitune.core.contents import shown
from finitune.core.errors import UserError
from finitune.core.files import read_manifest, verify_manifest
from finitune.core.incident import Incident, Trigger
from finitune.core.messages.catalogue import text
from finitune.core.types import Finding, Reading, RowId
from finitune.engine import capsule
from finitune.engine.capsule_nest import MAX_DEPTH, BadNest, unpack
from finitune.engine.capsule_tar import unpacked
from finitune.engine.capsule_tensors import BadTensors, read_tensors
from finitune.engine.case import Case
from finitune.engine.codes_incident import CAPSULE_DAMAGED, CAPSULE_FOREIGN, CAPSULE_TENSORS, NO_CAPSULE
from finitune.engine.port import Unit

MAX_JSON_BYTES = 16 << 20
MAX_JSON_DEPTH = 4 * MAX_DEPTH
_MAX_FILE_BYTES = 64 << 30
_MAX_FILES = 16
_MANY_FAULTS = 6
_FOREIGN = (KeyError, ValueError, TypeError, AttributeError, IndexError, OverflowError, RecursionError)
_FLOATS = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Capsule:
    """A capsule in memory, checked."""

    path: str
    """Where it came from, for messages."""
    step: int
    kind: str
    """"recipe" or "script"."""
    rows: str
    weights: str
    case: Case
    expected: Reading
    units: tuple[Unit, ...]
    record: Mapping[str, Any]
    micros: tuple[Any, ...] | None
    """Micro-batches; None where the rows were left out."""
    tensors: Mapping[str, torch.Tensor]
    """"state/NAME", "frozen/NAME", "places/NAME"."""
    delta: Mapping[str, tuple[int, ...]]
    """Shapes of the state tensors of which only some rows are here."""
    incident: Incident
    recipe: str | None
    info: Mapping[str, Any]
    """capsule.json as it is: fingerprints, kernels, versions."""


def read_capsule(path: str | Path) -> Capsule:
    """The capsule at ``path``: its folder, the folder of its incident, or a .tar of either.

    Raises UserError SYS410 to SYS414; never anything else for what lies there.
    """
    name, there = shown(str(path)), Path(os.path.expanduser(path))
    try:
        if os.path.isdir(there):
            return _read(_folder_in(there, name), name)
        if not os.path.isfile(there):
            raise UserError(NO_CAPSULE, name, path=name, reason=text("incidents.nothing_there"))
        with tempfile.TemporaryDirectory(prefix="finitune-capsule-") as scratch:
            unpacked(there, Path(scratch), name)
            return _read(_folder_in(Path(scratch), name), name)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UserError(NO_CAPSULE, name, path=name, reason=shown(str(error))) from error


def _folder_in(there: Path, name: str) -> Path:
    """The folder that holds capsule.json: this one, or one at most two below. Raises UserError SYS410."""
    for pattern in (".", capsule.FOLDER, "*", f"*/{capsule.FOLDER}"):
        found = [f for f in ([there] if pattern == "." else sorted(there.glob(pattern))) if _is_capsule(f)]
        if len(found) == 1:
            return found[0]
        if found:
            reason = text("incidents.several", count=len(found), first=shown(found[0].name))
            raise UserError(NO_CAPSULE, name, path=name, reason=reason)
    raise UserError(NO_CAPSULE, name, path=name, reason=text("incidents.no_capsule_in"))


def _is_capsule(folder: Path) -> bool:
    return folder.is_dir() and any(os.path.lexists(folder / n) for n in (capsule.CAPSULE_FILE, capsule.TENSORS_FILE))


def _read(folder: Path, name: str) -> Capsule:
    _verify(folder, name)
    info = _json(folder / capsule.CAPSULE_FILE, name)
    try:
        tensors = read_tensors(folder / capsule.TENSORS_FILE)
    except (BadTensors, MemoryError) as error:
        problem = f"{capsule.TENSORS_FILE}: {error}"
        raise UserError(CAPSULE_TENSORS, name, path=name, problem=problem) from error
    recipe = folder / capsule.RECIPE_FILE
    return _typed(info, tensors, recipe.read_text("utf-8", "replace") if recipe.is_file() else None, name)


def _verify(folder: Path, name: str) -> None:
    """Raise UserError SYS411 unless the folder is what was written. Sizes first: digests of huge files take hours."""
    with os.scandir(folder) as entries:
        listed = sorted(entries, key=lambda e: e.name)
    faults = [text("incidents.link", name=shown(e.name)) for e in listed if e.is_symlink()]
    limits = {capsule.TENSORS_FILE: _MAX_FILE_BYTES}
    for entry in listed[:_MAX_FILES] if not faults else ():
        size, limit = entry.stat(follow_symlinks=False).st_size, limits.get(entry.name, MAX_JSON_BYTES)
        if size > limit:
            faults.append(text("incidents.too_large", name=shown(entry.name), actual=size, limit=limit))
    if len(listed) > _MAX_FILES:
        faults.append(text("incidents.too_many", count=len(listed), limit=_MAX_FILES))
    faults = faults or verify_manifest(folder)
    files = {} if faults else read_manifest(folder)["files"]
    wanted = (capsule.CAPSULE_FILE, capsule.TENSORS_FILE)
    faults = faults or [text("files.missing", name=n) for n in wanted if n not in files]
    if faults:
        several = faults[:_MANY_FAULTS] + ["..."] * (len(faults) > _MANY_FAULTS)
        raise UserError(CAPSULE_DAMAGED, name, path=name, faults="; ".join(several))


def _json(path: Path, name: str) -> dict[str, Any]:
    """The content of capsule.json. Raises UserError SYS412."""
    try:
        found = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _foreign(name, path.name, error) from error
    if not isinstance(found, dict) or found.get("schema") != capsule.SCHEMA:
        schema = found.get("schema") if isinstance(found, dict) else None
        problem = text("incidents.schema", found=shown(repr(schema)[:40]), known=capsule.SCHEMA)
        raise UserError(CAPSULE_FOREIGN, name, path=name, field="schema", problem=problem)
    if _depth_above(found, MAX_JSON_DEPTH):
        problem = text("incidents.too_deep", limit=MAX_JSON_DEPTH)
        raise UserError(CAPSULE_FOREIGN, name, path=name, field=path.name, problem=problem)
    return found


def _depth_above(value: Any, limit: int) -> bool:
    """Whether a JSON value is nested more than ``limit`` deep; looks level by level, so that no nesting is too deep."""
    level = [value]
    for _ in range(limit):
        parts = [list(v.values()) if isinstance(v, dict) else v for v in level if isinstance(v, (dict, list))]
        level = [inner for part in parts for inner in part]
        if not level:
            return False
    return True


def _foreign(name: str, field: str, error: BaseException) -> UserError:
    problem = f"{type(error).__name__}: {shown(str(error))[:200]}"
    return UserError(CAPSULE_FOREIGN, name, path=name, field=field, problem=problem)


# -- typed values ---------------------------------------------------------------------------------------------------


def _typed(info: dict[str, Any], tensors: dict[str, torch.Tensor], recipe: str | None, name: str) -> Capsule:
    """The capsule with every value of the type that it has to be. Raises UserError SYS412."""

    def take(field: str, made: Callable[[Any], T]) -> T:
        try:
            return made(info[field])
        except _FOREIGN as error:
            raise _foreign(name, field, error) from error

    rows = take("rows", _one_of(*capsule.ROWS))
    units = take("units", _units)
    return Capsule(
        path=name,
        step=take("step", _count),
        kind=take("kind", _one_of("recipe", "script")),
        rows=rows,
        weights=take("weights", _one_of(*capsule.WEIGHTS)),
        case=Case(
            trigger=take("trigger", Trigger),
            finding=take("finding", _finding),
            reading=take("reading", reading_of),
            facts=take("facts", decoded),
            past=take("past", decoded),
        ),
        expected=take("expected", reading_of),
        units=units,
        record=take("record", _mapping),
        micros=take("batch", lambda packed: _micros(packed, tensors, rows)),
        tensors=tensors,
        delta=take("delta", lambda found: _shapes(found, tensors)),
        incident=take("incident", lambda found: Incident.from_json(_mapping(found))),
        recipe=recipe,
        info=info,
    )


def _one_of(*known: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if value not in known or not isinstance(value, str):
            raise ValueError(f"{str(value)[:40]!a} is none of {', '.join(known)}")
        return value

    return check


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 53:
        raise ValueError(f"{str(value)[:40]!a} is not a count")
    return value


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"a table is expected, not {type(value).__name__}")
    return value


def _number(value: Any) -> float:
    """A number; NaN and infinities as they are spelt in JSON here."""
    if type(value) not in (int, float) and value not in _FLOATS:
        raise ValueError(f"{str(value)[:40]!a} is not a number")
    return number(value)


def decoded(value: Any) -> Any:
    """A JSON value with "NaN", "Infinity" and "-Infinity" as numbers again."""
    if isinstance(value, dict):
        return {k: decoded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [decoded(v) for v in value]
    return _FLOATS.get(value, value) if isinstance(value, str) else value


def reading_of(record: Any) -> Reading:
    """Inverse of ``Reading.to_json`` after JSON. Raises KeyError, ValueError or TypeError."""
    given = _mapping(record)
    wholes = {k: _count(given[k]) for k in ("supervised_tokens", "tokens", "num_bad_parameters") if k in given}
    reals = ("loss_scale", "headroom_bits", "update_ratio", "changed_fraction", "time_s")
    return Reading(
        step=_count(given["step"]),
        loss=_number(given["loss"]),
        grad_norm=_number(given["grad_norm"]),
        lr=_number(given.get("lr", "NaN")),
        bad_parameters=tuple(map(str, given.get("bad_parameters", ()))),
        amax={str(k): _number(v) for k, v in _mapping(given.get("amax", {})).items()},
        **wholes,
        **{k: _number(given[k]) for k in reals if k in given},  # type: ignore[arg-type]
    )


def _finding(record: Any) -> Finding:
    found = Finding.from_json(_mapping(record))
    return Finding(str(found.code), found.severity, str(found.where), decoded(dict(found.data)), found.rows, found.veto)


def _units(found: Any) -> tuple[Unit, ...]:
    return tuple(Unit(_count(m), _count(i), tuple(RowId.parse(r) for r in rows)) for m, i, rows in found)


def _micros(packed: Any, tensors: Mapping[str, torch.Tensor], rows: str) -> tuple[Any, ...] | None:
    if not isinstance(packed, list):
        raise BadNest("a list of micro-batches is expected")
    return None if rows == "ids" else tuple(unpack(part, tensors) for part in packed)


def _shapes(found: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes of tensors of which some rows are here; that rows and places fit them is checked."""
    shapes = {}
    for name, shape in _mapping(found).items():
        shapes[name] = size = tuple(_count(n) for n in shape)
        part, places = tensors[capsule.STATE + name], tensors[capsule.PLACES + name]
        if places.dtype is not torch.int64 or places.dim() != 1 or part.shape != (len(places), *size[1:]):
            raise ValueError(f"{name[:60]!a}: rows of shape {tuple(part.shape)} at {tuple(places.shape)} places")
        if len(places) and not (int(places.min()) >= 0 and int(places.max()) < size[0]):
            raise ValueError(f"{name[:60]!a}: a row lies outside of {size[0]}")
    return shapes
