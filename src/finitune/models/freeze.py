"""Which parameters train, and gradient checkpointing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from finitune.core.errors import UserError, raise_all
from finitune.models.codes import FREEZE_NO_MATCH, NOTHING_TRAINABLE
from finitune.models.layout import bare


def freeze(model: nn.Module, patterns: Iterable[str]) -> tuple[str, ...]:
    """Freeze every parameter that a pattern names; the frozen names in model order.

    A pattern is the name of a parameter, the name of a module (all of it is frozen), or a glob over parameter
    names in which ``*`` also spans dots. Nothing is frozen where a pattern is at fault.

    Raises:
        UserError, UserErrors: a pattern that matches nothing (MOD029, with close names), or nothing left to
            train (MOD030).
    """
    parameters = dict(model.named_parameters())
    frozen: set[str] = set()
    errors: list[UserError] = []
    for pattern in patterns:
        hits = {name for name in parameters if _matches(pattern, name)}
        if not hits:
            errors.append(_no_match(pattern, parameters))
        frozen |= hits
    raise_all(errors)
    if frozen and not any(p.requires_grad for name, p in parameters.items() if name not in frozen):
        raise UserError(NOTHING_TRAINABLE, num=len(parameters))
    for name in frozen:
        parameters[name].requires_grad_(False)
    return tuple(name for name in parameters if name in frozen)


def _matches(pattern: str, name: str) -> bool:
    return name == pattern or name.startswith(pattern + ".") or fnmatchcase(name, pattern)


def _no_match(pattern: str, parameters: Iterable[str]) -> UserError:
    known = list(parameters)
    modules = {name.rsplit(".", depth)[0] for name in known for depth in (1, 2, 3)}
    close = get_close_matches(pattern, sorted({*known, *modules}), n=3, cutoff=0.5)
    return UserError(FREEZE_NO_MATCH, "freeze", pattern=pattern, close=", ".join(close) or "-", example=known[0])


def trainable_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """(name, parameter) of everything that trains, in model order; a shared parameter once."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def enable_checkpointing(model: nn.Module, options: Mapping[str, Any] | None = None) -> None:
    """Keep only the layers' inputs and compute the rest again in backward; trades time for memory.

    Non-reentrant: gradients reach adapters although the embedding is frozen (the reentrant form needs an input
    that requires a gradient, and without one trains nothing in silence). Acts in train mode only. ``options`` go to
    ``torch.utils.checkpoint``; an emulated precision needs its ``context_fn`` (``precision.checkpoint_kwargs``).
    """
    given = {**(options or {}), "use_reentrant": False}
    bare(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs=given)  # type: ignore[operator]


def disable_checkpointing(model: nn.Module) -> None:
    """Undo :func:`enable_checkpointing`."""
    bare(model).gradient_checkpointing_disable()  # type: ignore[operator]
