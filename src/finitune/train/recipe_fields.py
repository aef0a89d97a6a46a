"""Every field of the recipe as a flat table: path, what it takes, default, description."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from finitune.train.recipe import Recipe
from finitune.train.recipe_words import expected


@dataclass(frozen=True, slots=True)
class FieldDoc:
    """One field or section. ``schema`` is its JSON schema; ``default`` is JSON-able."""

    path: str
    schema: Mapping[str, Any]
    default: Any
    description: str
    is_section: bool

    @property
    def type(self) -> str:
        """What the field takes, in words of the current language."""
        return expected(self.schema)


@cache
def fields() -> Mapping[str, FieldDoc]:
    """Sections and fields by dotted path, in the order of the recipe."""
    schema = Recipe.model_json_schema()
    defaults = Recipe().model_dump(mode="json")
    return {doc.path: doc for doc in _walk(schema, schema["$defs"], defaults, "")}


def describe_fields() -> tuple[FieldDoc, ...]:
    """Every field a recipe may set, without the sections themselves."""
    return tuple(doc for doc in fields().values() if not doc.is_section)


def _walk(schema: Mapping[str, Any], defs: Mapping[str, Any], defaults: Any, prefix: str) -> Iterator[FieldDoc]:
    for name, field in schema["properties"].items():
        inner = _section(field, defs)
        default = defaults[name]
        # pydantic leaves a section's description out where it repeats the docstring of the section.
        description = field.get("description") or (inner or {})["description"]
        yield FieldDoc(prefix + name, field, default, description, inner is not None)
        if inner is not None:
            yield from _walk(inner, defs, default, f"{prefix}{name}.")


def _section(field: Mapping[str, Any], defs: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The schema of a section, also of one that may be null; None for a plain field."""
    for option in (field, *field.get("anyOf", ())):
        if "$ref" in option:
            found: Mapping[str, Any] = defs[option["$ref"].rpartition("/")[2]]
            return found
    return None
