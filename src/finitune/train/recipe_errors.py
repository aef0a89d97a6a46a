"""Faults of a recipe's values: unknown keys and pydantic's verdicts, as errors that teach."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

from finitune.core.errors import UserError
from finitune.core.messages.catalogue import text
from finitune.train import codes, codes_conflicts
from finitune.train.recipe_fields import FieldDoc, fields
from finitune.train.recipe_names import REFUSED, RENAMED
from finitune.train.recipe_words import did_you_mean, expected, shown

_BOUNDS = {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number"}
_PURE_FP16 = ("fp16-pure", "pure-fp16", "pure_fp16", "float16", "half")


def drop_unknown(values: Mapping[Any, Any], prefix: str = "") -> tuple[dict[str, Any], list[UserError]]:
    """The known part of a mapping, and one error for each key a recipe does not have."""
    known = fields()
    kept: dict[str, Any] = {}
    errors: list[UserError] = []
    for key, value in values.items():
        name = key if isinstance(key, str) else shown(key)
        path = prefix + name
        doc = known.get(path) if isinstance(key, str) and "." not in key else None
        if doc is None:
            hint = _hint(name, prefix) if isinstance(key, str) else text("recipe.hint.quote")
            errors.append(UserError(codes.UNKNOWN_KEY, path, key=path, hint=hint))
        elif doc.is_section and isinstance(value, Mapping):
            kept[key], inner = drop_unknown(value, f"{path}.")
            errors += inner
        else:
            kept[key] = value
    return kept, errors


def _hint(key: str, prefix: str) -> str:
    """Where the key's meaning lives here: a foreign name, a field of another section, or a close name."""
    path = prefix + key
    if key in REFUSED:
        return text("recipe.not_offered", reason=text(f"recipe.refused.{REFUSED[key]}"))
    if key in RENAMED and RENAMED[key] != path:
        return text("recipe.called_here", name=RENAMED[key])
    same_leaf = [p for p in fields() if p.rpartition(".")[2] == key.rpartition(".")[2]]
    if same_leaf:
        return text("recipe.called_here", name=same_leaf[0])
    siblings = [p for p in fields() if p.startswith(prefix) and "." not in p[len(prefix) :]]
    close = get_close_matches(path, siblings, n=2, cutoff=0.7) or get_close_matches(path, fields(), n=2, cutoff=0.7)
    leaves = {p.rpartition(".")[2]: p for p in fields()}
    return did_you_mean(close or [leaves[m] for m in get_close_matches(key, leaves, n=2, cutoff=0.7)])


def from_pydantic(error: ValidationError) -> dict[str, UserError]:
    """One error for each faulty field, by dotted path; a union's alternatives are told together."""
    grouped: dict[str, list[Any]] = {}
    for fault in error.errors(include_url=False, include_context=False):
        grouped.setdefault(_field_path(fault["loc"]), []).append(fault)
    return {path: _explain(fields()[path], faults) for path, faults in grouped.items()}


def _field_path(loc: tuple[int | str, ...]) -> str:
    """The longest prefix of pydantic's location that is a field of the recipe."""
    parts = list(_field_parts(loc))
    return ".".join(parts)


def _field_parts(loc: tuple[int | str, ...]) -> Iterator[str]:
    path = ""
    for part in loc:
        path = f"{path}.{part}" if path else str(part)
        if path not in fields():
            return
        yield str(part)


def _explain(doc: FieldDoc, faults: list[Any]) -> UserError:
    value = faults[-1]["input"]
    data: dict[str, Any] = {"key": doc.path, "value": shown(value), "default": shown(doc.default)}
    if doc.path == "precision" and str(value).lower() in _PURE_FP16:
        return UserError(codes_conflicts.PURE_FP16, doc.path, **data)
    if _BOUNDS & {f["type"] for f in faults}:
        return UserError(codes.OUT_OF_BOUNDS, doc.path, expected=doc.type, **data)
    choices = _choices(doc.schema)
    if choices and isinstance(value, str):
        close = get_close_matches(value.lower(), choices, n=1)
        return UserError(codes.UNKNOWN_CHOICE, doc.path, choices=expected(doc.schema), hint=did_you_mean(close), **data)
    return UserError(codes.WRONG_TYPE, doc.path, expected=doc.type, hint=_type_hint(doc, value), **data)


def _choices(schema: Mapping[str, Any]) -> list[str]:
    """Named choices of a field, also inside alternatives."""
    options = (schema, *schema.get("anyOf", ()))
    return [str(c) for option in options for c in option.get("enum", ())]


def _type_hint(doc: FieldDoc, value: Any) -> str:
    takes_text = any(o.get("type") == "string" for o in (doc.schema, *doc.schema.get("anyOf", ())))
    if takes_text and not isinstance(value, (str, list, dict)) and value is not None:
        return text("recipe.hint.quote")
    if doc.path in ("fp16", "bf16") and value == "auto":
        return text("recipe.hint.bool")
    if doc.path == "device" and isinstance(value, str):
        return did_you_mean(["cuda"] if value.lower() in ("gpu", "nvidia") else [])
    return ""
