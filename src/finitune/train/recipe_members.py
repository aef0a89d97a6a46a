"""Names in a recipe that stand for members of a family: detectors, formats, objectives, trackers.

Names are checked by file name, without importing anything; a detector that is configured is
imported (detectors hold no torch) and its settings are checked against its ``Config``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from finitune.core import registry
from finitune.core.errors import UserError
from finitune.core.messages.catalogue import text
from finitune.train import codes
from finitune.train.recipe_words import did_you_mean, shown, type_name

if TYPE_CHECKING:
    from finitune.train.recipe import Recipe


def unknown_members(recipe: Recipe) -> Iterator[UserError]:
    """Every name that no member answers to, and every wrong setting of a detector."""
    if recipe.data.format != "auto":
        yield from _known("formats", "data.format", recipe.data.format, "auto")
    yield from _known("objectives", "loss.objective", recipe.loss.objective, "causal_lm")
    for name in recipe.report_to:
        yield from _known("trackers", "report_to", name, "[]")
    for name, settings in recipe.guard.detectors.items():
        yield from _detector(name, settings)


def _known(family: str, key: str, name: str, default: str) -> Iterator[UserError]:
    names = registry.names(family)
    # The default needs no member to be named: a family may be served by its caller.
    if name in names or name == default:
        return
    hint = did_you_mean(get_close_matches(name, names, n=1))
    choices = ", ".join((("auto",) if default == "auto" else ()) + names) or text("recipe.no_member")
    yield UserError(codes.UNKNOWN_CHOICE, key, key=key, value=shown(name), choices=choices, hint=hint, default=default)


def _detector(name: str, settings: Mapping[str, Any] | bool) -> Iterator[UserError]:
    names = registry.names("detectors")
    if name not in names:
        hint = did_you_mean(get_close_matches(name, names, n=1))
        yield UserError(codes.UNKNOWN_KEY, f"guard.detectors.{name}", key=f"guard.detectors.{name}", hint=hint)
    elif not isinstance(settings, bool):
        yield from _settings(f"guard.detectors.{name}", registry.load("detectors", name).Config, settings)


def _settings(path: str, config: Any, settings: Mapping[str, Any]) -> Iterator[UserError]:
    """Faults of one detector's settings; ``config`` is its frozen dataclass."""
    fields = {f.name: f for f in dataclasses.fields(config)}
    hints = get_type_hints(config)
    for key, value in settings.items():
        where = f"{path}.{key}"
        if key not in fields:
            close = get_close_matches(str(key), fields, n=1) or list(fields)
            yield UserError(codes.UNKNOWN_KEY, where, key=where, hint=did_you_mean(close))
            continue
        default = shown(fields[key].default)
        expected = type_name(hints[key])
        if isinstance(value, float) and not math.isfinite(value):
            yield UserError(
                codes.OUT_OF_BOUNDS, where, key=where, value=shown(value), expected=expected, default=default
            )
        elif not _fits(hints[key], value):
            yield UserError(
                codes.WRONG_TYPE, where, key=where, value=shown(value), expected=expected, default=default, hint=""
            )


def _fits(hint: Any, value: Any) -> bool:
    if isinstance(value, bool) and hint is not bool:
        return False
    try:
        TypeAdapter(hint).validate_python(value)
    except ValidationError:
        return False
    return True
