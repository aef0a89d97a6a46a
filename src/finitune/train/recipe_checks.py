"""What a recipe may not contradict, and what it says for nothing.

Every rule is a plain function from a recipe to its faults; ``where`` of a fault names the fields
involved, separated by ", ". Rules run on valid fields only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from finitune.core.errors import UserError, raise_all
from finitune.core.messages.catalogue import text
from finitune.core.types import Finding
from finitune.train import codes_conflicts as codes
from finitune.train.recipe_members import unknown_members

if TYPE_CHECKING:
    from finitune.train.recipe import Recipe

WARMUP_RATIO_DEFAULT = 0.03
"""A ratio that was not touched needs no note beside ``warmup_steps``."""


def check(recipe: Recipe) -> None:
    """Raise every contradiction at once (UserError, or UserErrors for several)."""
    raise_all([fault for rule in _RULES for fault in rule(recipe)])


def notes(recipe: Recipe) -> tuple[Finding, ...]:
    """Settings that are valid but pointless, for the plan of a run."""
    return tuple(note for rule in _NOTES for note in rule(recipe))


def resolved_precision(recipe: Recipe) -> str:
    """The precision that ``precision``, ``fp16`` and ``bf16`` ask for together.

    "auto" remains where nothing was said; ``bf16: false`` alone rules bf16 out, which leaves fp32.
    """
    if recipe.precision != "auto":
        return recipe.precision
    if recipe.fp16:
        return "fp16"
    if recipe.bf16:
        return "bf16"
    return "fp32" if recipe.bf16 is False else "auto"


def _precision(recipe: Recipe) -> Iterator[UserError]:
    if recipe.fp16 and recipe.bf16:
        yield UserError(codes.BOTH_HALVES, "fp16, bf16")
        return
    if recipe.precision == "auto":
        return
    for flag, value in (("fp16", recipe.fp16), ("bf16", recipe.bf16)):
        if value is not None and value != recipe.precision.startswith(flag):
            shown = "true" if value else "false"
            yield UserError(
                codes.PRECISION_CONFLICT, f"{flag}, precision", precision=recipe.precision, flag=flag, value=shown
            )


def _warmup(recipe: Recipe) -> Iterator[UserError]:
    steps = recipe.warmup_steps
    if steps is None:
        return
    if 0 < recipe.max_steps <= steps:
        yield _too_long("warmup_steps", steps, f"max_steps {recipe.max_steps}", recipe.max_steps - 1)


def _decay(recipe: Recipe) -> Iterator[UserError]:
    if recipe.lr_scheduler_type != "warmup_stable_decay" or recipe.warmup_steps is not None:
        return
    room = 1.0 - recipe.warmup_ratio
    if not recipe.decay_ratio <= room:
        yield _too_long("decay_ratio", recipe.decay_ratio, f"warmup_ratio {recipe.warmup_ratio:g}", room)


def _too_long(part: str, value: float, limit_name: str, limit: float) -> UserError:
    return UserError(codes.SCHEDULE_TOO_LONG, part, part=part, value=value, limit_name=limit_name, limit=limit)


def _freeze(recipe: Recipe) -> Iterator[UserError]:
    if recipe.freeze and recipe.lora is not None:
        yield UserError(codes.FREEZE_WITH_LORA, "freeze, lora", num_patterns=len(recipe.freeze))


def _scaler(recipe: Recipe) -> Iterator[UserError]:
    init, floor = recipe.scaler.init_scale, recipe.scaler.min_scale
    if init < floor:
        yield UserError(codes.SCALER_FLOOR, "scaler.init_scale, scaler.min_scale", init_scale=init, min_scale=floor)


_RULES: tuple[Callable[[Recipe], Iterator[UserError]], ...] = (
    _precision,
    _warmup,
    _decay,
    _freeze,
    _scaler,
    unknown_members,
)


def _unused(key: str, value: object, reason: str) -> Finding:
    return codes.UNUSED_SETTING.find(key, key=key, value=value, reason=text(f"recipe.unused.{reason}"))


def _note_warmup(recipe: Recipe) -> Iterator[Finding]:
    """Steps win over the ratio, as in transformers; a constant rate has no warm-up at all."""
    steps, ratio = recipe.warmup_steps, recipe.warmup_ratio
    if recipe.lr_scheduler_type == "constant":
        if steps:
            yield _unused("warmup_steps", steps, "no_warmup")
        return
    if steps is not None and ratio not in (0.0, WARMUP_RATIO_DEFAULT):
        yield _unused("warmup_ratio", ratio, "warmup_steps")


def _note_evaluation(recipe: Recipe) -> Iterator[Finding]:
    if recipe.eval_steps is not None and recipe.data.eval is None and recipe.data.eval_fraction == 0:
        yield _unused("eval_steps", recipe.eval_steps, "no_held_out")


def _note_samples(recipe: Recipe) -> Iterator[Finding]:
    if recipe.sample.every_steps is not None and not recipe.sample.prompts:
        yield _unused("sample.every_steps", recipe.sample.every_steps, "no_prompts")


def _note_grouping(recipe: Recipe) -> Iterator[Finding]:
    if recipe.data.packing and recipe.group_by_length:
        yield _unused("group_by_length", "true", "packing")


def _note_sampling(recipe: Recipe) -> Iterator[Finding]:
    if recipe.sample.temperature == 0 and recipe.sample.top_p < 1:
        yield _unused("sample.top_p", recipe.sample.top_p, "greedy")


def _note_scaler(recipe: Recipe) -> Iterator[Finding]:
    changed = recipe.scaler != type(recipe.scaler)()
    precision = resolved_precision(recipe)
    if changed and precision != "auto" and not precision.startswith("fp16"):
        yield _unused("scaler", "...", "scaler")


def _note_decay(recipe: Recipe) -> Iterator[Finding]:
    if recipe.min_lr_ratio > 0 and recipe.lr_scheduler_type.startswith("constant"):
        yield _unused("min_lr_ratio", recipe.min_lr_ratio, "constant")


def _note_random(recipe: Recipe) -> Iterator[Finding]:
    if recipe.model.random_init and recipe.lora is not None:
        yield codes.RANDOM_LORA.find("model.random_init, lora")


_NOTES: tuple[Callable[[Recipe], Iterator[Finding]], ...] = (
    _note_warmup,
    _note_evaluation,
    _note_samples,
    _note_grouping,
    _note_sampling,
    _note_scaler,
    _note_decay,
    _note_random,
)
