"""From a name or a file and overrides to a Recipe, with every fault told at once; and back to YAML."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finitune.core.errors import UserError, UserErrors, raise_all
from finitune.core.messages.catalogue import text
from finitune.train import codes
from finitune.train.recipe import Recipe
from finitune.train.recipe_checks import resolved_precision
from finitune.train.recipe_errors import drop_unknown, from_pydantic
from finitune.train.recipe_fields import FieldDoc, describe_fields, fields
from finitune.train.recipe_words import did_you_mean, kind_of, shown
from finitune.train.recipe_yaml import dump, parse, parse_value

__all__ = [
    "DEFAULT",
    "FieldDoc",
    "describe_fields",
    "load_recipe",
    "parse_recipe",
    "resolved_precision",
    "shipped",
    "shipped_text",
    "to_yaml",
]

DEFAULT = "quickstart"
"""The recipe of ``finitune train`` without a name."""

_FOLDER = Path(__file__).parents[1] / "recipes"
_LIMIT_BYTES = 4 * 2**20
_SUFFIXES = (".yaml", ".yml", ".json")


@dataclass
class _Draft:
    """A recipe being put together: plain values, where each came from, and the faults so far."""

    source: str
    values: dict[str, Any] = field(default_factory=dict)
    lines: Mapping[str, int] = field(default_factory=dict)
    overrides: dict[str, str] = field(default_factory=dict)
    errors: list[UserError] = field(default_factory=list)

    def locate(self, error: UserError) -> UserError:
        """The same error, its place named by override, by file and line, or by file."""
        paths = error.where.split(", ")
        for path in paths:
            if path in self.overrides:
                place = text("recipe.override", override=self.overrides[path])
                return UserError(error.code, text("recipe.place", source=place, path=error.where), **error.data)
        line = self.line_of(error)
        key = "recipe.line" if line else "recipe.place"
        where = text(key, source=self.source, line=line, path=error.where)
        return UserError(error.code, where, **error.data)

    def line_of(self, error: UserError) -> int:
        """Line of the first field an error names; 0 where none stands in the file."""
        return next((self.lines[p] for p in error.where.split(", ") if p in self.lines), 0)


def shipped() -> tuple[str, ...]:
    """Names of the shipped recipes, sorted."""
    return tuple(sorted(p.stem for p in _FOLDER.glob("*.yaml")))


def shipped_text(name: str) -> str:
    """The YAML of a shipped recipe. Raises UserError RECIPE_NOT_FOUND."""
    if name not in shipped():
        raise _not_found(name)
    return (_FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def load_recipe(name_or_path: str | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a shipped name or a file, with ``key=value`` overrides on top.

    Args:
        name_or_path: a shipped name, or a path ending in .yaml, .yml or .json; None is quickstart.
        overrides: dotted keys and YAML values, applied in order; ``lora.r=8`` makes a null section.

    Raises:
        UserError, UserErrors: everything that is wrong, at once.
    """
    draft = _read(name_or_path or DEFAULT)
    for override in overrides:
        try:
            _apply(draft, override)
        except UserError as error:
            draft.errors.append(error)
    return _build(draft)


def parse_recipe(content: str, source: str = "recipe") -> Recipe:
    """The recipe in a YAML text. Raises as :func:`load_recipe`."""
    return _build(_draft(content, source, is_json=False))


def to_yaml(recipe: Recipe) -> str:
    """Every field, resolved, as YAML; :func:`parse_recipe` gives an equal recipe back."""
    return dump(recipe.model_dump(mode="json"))


def _read(name: str) -> _Draft:
    if name in shipped():
        return _draft(shipped_text(name), name, is_json=False)
    path = Path(name)
    content = _content(path, name)
    return _draft(content, name, is_json=path.suffix.lower() == ".json")


def _content(path: Path, name: str) -> str:
    """The text of a recipe file; every way it cannot be read is a UserError."""
    try:
        if path.is_dir():
            raise _unreadable(name, _directory_reason(path))
        size = path.stat().st_size
        if size > _LIMIT_BYTES:
            raise _unreadable(name, text("recipe.reason.too_large", size_bytes=size, limit_bytes=_LIMIT_BYTES))
        return path.read_bytes().decode("utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        raise _not_found(name) from None
    except UnicodeDecodeError as error:
        raise _unreadable(name, text("recipe.reason.not_text", position=error.start)) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        problem = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise _unreadable(name, text("recipe.reason.os", problem=problem)) from error


def _directory_reason(path: Path) -> str:
    inside = path / "recipe.yaml"
    if inside.is_file():
        return text("recipe.reason.directory_with_recipe", path=inside)
    return text("recipe.reason.directory")


def _unreadable(name: str, reason: str) -> UserError:
    return UserError(codes.RECIPE_UNREADABLE, name, name=name, reason=reason)


def _not_found(name: str) -> UserError:
    close = get_close_matches(Path(name).stem, shipped(), n=1) + _similar_files(Path(name))
    return UserError(
        codes.RECIPE_NOT_FOUND, name, name=shown(name), hint=did_you_mean(close), shipped=", ".join(shipped())
    )


def _similar_files(path: Path) -> list[str]:
    try:
        names = [p.name for p in path.parent.iterdir() if p.suffix in _SUFFIXES]
    except (OSError, ValueError):
        return []
    return [str(path.parent / n) for n in get_close_matches(path.name, names, n=1)]


def _draft(content: str, source: str, *, is_json: bool) -> _Draft:
    parsed = parse(content, source, is_json=is_json)
    if not isinstance(parsed.values, dict) or not parsed.values:
        found = kind_of(parsed.values) if parsed.values else text("recipe.empty")
        raise UserError(codes.NOT_A_MAPPING, source, name=source, found=found)
    return _Draft(source, parsed.values, parsed.lines, errors=list(parsed.duplicates))


def _apply(draft: _Draft, override: str) -> None:
    """Set one dotted key. Raises UserError BAD_OVERRIDE."""
    key, equals, content = override.partition("=")
    path = key.strip().split(".")
    if key.startswith("-"):
        raise _bad_override(override, text("recipe.reason.dashes"))
    if not equals:
        raise _bad_override(override, text("recipe.reason.no_equals"))
    if not all(path):
        raise _bad_override(override, text("recipe.reason.empty_key"))
    try:
        value = parse_value(content)
    except ValueError as error:
        raise _bad_override(override, text("recipe.reason.syntax", problem=error)) from error
    _section_of(draft.values, path, override)[path[-1]] = value
    draft.overrides[".".join(path)] = override


def _section_of(values: dict[str, Any], path: Sequence[str], override: str) -> dict[str, Any]:
    """The mapping that holds the last part of ``path``; null sections and switched detectors become one."""
    here = values
    for depth, part in enumerate(path[:-1], 1):
        inner, name = here.get(part), ".".join(path[:depth])
        doc = fields().get(name)
        open_mapping = path[:2] == ["guard", "detectors"]
        if inner is None or (isinstance(inner, bool) and open_mapping):
            inner = {}
        if not isinstance(inner, dict) or (doc is not None and not doc.is_section and not open_mapping):
            raise _bad_override(override, text("recipe.reason.not_a_section", name=name))
        # A copy: YAML aliases may share one mapping between two sections.
        here[part] = here = dict(inner)
    return here


def _bad_override(override: str, reason: str) -> UserError:
    return UserError(codes.BAD_OVERRIDE, override, override=override, reason=reason)


def _build(draft: _Draft) -> Recipe:
    known, unknown = drop_unknown(draft.values)
    faults = [*unknown]
    recipe = _validate(known, faults)
    faults.sort(key=draft.line_of)
    errors = draft.errors + [draft.locate(fault) for fault in faults]
    raise_all(errors)
    assert recipe is not None, "no recipe and no error"
    return recipe


def _validate(values: dict[str, Any], faults: list[UserError]) -> Recipe | None:
    """The recipe, or None with its faults appended.

    Where fields are faulty, the contradictions between the others are still looked for: the faulty
    fields are set aside (their defaults stand in) and what names one of them is not reported.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        by_path = from_pydantic(error)
        faults += by_path.values()
        rest = copy.deepcopy(values)
        for path in by_path:
            _remove(rest, path.split("."))
        faults += [f for f in _contradictions(rest) if not set(f.where.split(", ")) & set(by_path)]
    except UserErrors as several:
        faults += several.errors
    except UserError as one:
        faults.append(one)
    return None


def _contradictions(values: Mapping[str, Any]) -> Sequence[UserError]:
    try:
        Recipe.model_validate(values)
    except UserErrors as several:
        return several.errors
    except UserError as one:
        return (one,)
    return ()


def _remove(values: dict[str, Any], path: Sequence[str]) -> None:
    for part in path[:-1]:
        values = values[part]
    del values[path[-1]]
