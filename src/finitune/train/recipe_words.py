"""How values and types are spoken of in messages about a recipe."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from finitune.core.messages.catalogue import text

_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2
_SHORT.maxlong = 40


def shown(value: Any) -> str:
    """A value as YAML spells it, cut to a line; bounded for any value, however nested."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value if len(value) <= 60 else value[:57] + "...", ensure_ascii=False)
    return _SHORT.repr(value)


def kind_of(value: Any) -> str:
    """The kind of a parsed value, in words."""
    kinds = ((type(None), "null"), (bool, "bool"), (str, "string"), (int, "integer"), (float, "number"), (list, "list"))
    name = next((word for kind, word in kinds if isinstance(value, kind)), "mapping")
    return text(f"recipe.kind.{name}")


def did_you_mean(names: Sequence[str]) -> str:
    """The tail of a sentence that offers close names; empty without any."""
    return text("recipe.did_you_mean", names=", ".join(names)) if names else ""


def type_name(hint: Any) -> str:
    """A Python type in words."""
    plain: Mapping[Any, str] = {int: "integer", float: "number", bool: "bool", str: "string"}
    if get_args(hint):
        return str(hint)
    return text(f"recipe.kind.{plain[hint]}") if hint in plain else str(hint)


def expected(schema: Mapping[str, Any]) -> str:
    """What a field takes, in words, from its JSON schema.

    Bounds are named ("a whole number >= 1 and <= 4096"), choices are listed, alternatives joined.
    """
    if "anyOf" in schema:
        return text("recipe.or").join(dict.fromkeys(expected(s) for s in schema["anyOf"]))
    if "const" in schema:
        return shown(schema["const"])
    if "enum" in schema:
        return text("recipe.or").join(str(c) for c in schema["enum"])
    if "examples" in schema:
        return text("recipe.such_as", names=", ".join(map(str, schema["examples"])))
    if schema.get("type") == "array":
        return text("recipe.list_of", item=expected(schema["items"]))
    return text(f"recipe.kind.{_kind(schema)}") + bounds(schema)


def _kind(schema: Mapping[str, Any]) -> str:
    kinds = {"integer": "integer", "number": "number", "boolean": "bool", "string": "string", "null": "null"}
    return kinds.get(schema.get("type", "object"), "mapping")


# pydantic writes "ge" and its like, not JSON schema's words, for a bound behind a before-validator.
_SIGNS = (
    *(("exclusiveMinimum", ">"), ("gt", ">"), ("minimum", ">="), ("ge", ">=")),
    *(("exclusiveMaximum", "<"), ("lt", "<"), ("maximum", "<="), ("le", "<=")),
)


def bounds(schema: Mapping[str, Any]) -> str:
    """The bounds of a number, such as "> 0 and <= 10" after a space; empty without any."""
    parts = [f"{sign} {_digits(schema[name])}" for name, sign in _SIGNS if name in schema]
    return " " + text("recipe.and").join(parts) if parts else ""


def _digits(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.16g}"
