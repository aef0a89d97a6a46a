"""What differs between a run as it was and as it would go on, and what follows from each difference.

    HARMLESS          training is not touched: display, saving, reports, another path of the same rows
    NATURAL           the length of the run
    EXPLAINED         it goes on; the bits may differ from those of an undisturbed run: versions, threads
    NEEDS_PERMISSION  it would be another run from here on: refused without --allow-changes
    IMPOSSIBLE        the tensors of the checkpoint do not fit

Every field of the recipe has its rule in :data:`RECIPE_RULES`. A field without one needs permission.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from finitune.core.messages.catalogue import text
from finitune.train.past import Facts, differences, fact, filled
from finitune.train.recipe import Recipe
from finitune.train.recipe_words import shown


class Kind(str, Enum):
    """What follows from a difference, from the mildest to the gravest."""

    HARMLESS = "harmless"
    NATURAL = "natural"
    EXPLAINED = "explained"
    NEEDS_PERMISSION = "needs_permission"
    IMPOSSIBLE = "impossible"


@dataclass(frozen=True, slots=True)
class Change:
    """One difference."""

    what: str
    """Path of a recipe's field, or of a fact."""
    was: Any
    now: Any
    kind: Kind
    effect: str
    """Key of a text below ``resume.effect``."""
    certain: bool = True
    """Known from the recipe alone; else the loaded model and data have a say."""

    def line(self) -> str:
        """The difference and what follows from it, in the current language."""
        effect = text(f"resume.effect.{self.effect}")
        what = text(f"resume.what.{self.what}") if self.what in FACT_RULES else self.what
        return text("resume.change", what=what, was=_short(self.was), now=_short(self.now), effect=effect)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able record."""
        return {"what": self.what, "was": self.was, "now": self.now, "kind": self.kind.value}


_DIGEST_CHARS, _DIGESTS_CHARS = 12, (32, 64)
_LONGEST_CHARS = 100


def _short(value: Any) -> str:
    """A value on one line; of a digest the beginning, and nothing for what is not recorded."""
    if value is UNKNOWN:
        return text("resume.unknown")
    if isinstance(value, list) and len(value) == 1:
        return f"[{_short(value[0])}]"
    if not isinstance(value, str):
        return shown(value)
    if len(value) in _DIGESTS_CHARS and set(value) <= set("0123456789abcdef"):
        return f"{value[:_DIGEST_CHARS]}..."
    # Of a path the end tells most.
    cut = value if len(value) <= _LONGEST_CHARS else f"{value[: _LONGEST_CHARS // 3]}...{value[-_LONGEST_CHARS // 2 :]}"
    return json.dumps(cut, ensure_ascii=False)


UNKNOWN = "(not recorded)"
"""Stands for a value that nobody wrote down."""

TOLD_BY_A_FACT = "fact"
"""Effect of a field whose consequence is a fact of its own."""

Excuse = Callable[[Facts, Facts], bool]


@dataclass(frozen=True, slots=True)
class Rule:
    """What follows from a difference, ``unless`` the facts before and after show that it has no consequence."""

    kind: Kind
    effect: str = "none"
    unless: Excuse | None = None
    loaded: bool = False
    """The excuse looks at what only the loaded model and data tell."""
    instead: tuple[Kind, str] = (Kind.HARMLESS, "none")
    """Kind and effect where it is excused."""


def same(*paths: str) -> Excuse:
    """Both sides have the same recorded value at each path."""
    return lambda was, now: all(fact(was, p) is not None and fact(was, p) == fact(now, p) for p in paths)


def both(path: str, *values: Any) -> Excuse:
    """Both sides have one of ``values`` at a path of the recipe."""
    return lambda was, now: all(_recipe_value(facts, path) in values for facts in (was, now))


def _recipe_value(facts: Facts, path: str) -> Any:
    here: Any = facts.get("recipe")
    for part in path.split("."):
        here = here.get(part) if isinstance(here, Mapping) else None
    return here


def _same_rows_one_by_one(was: Facts, now: Facts) -> bool:
    """The same rows, and no packing for which their longest length matters."""
    return same("data.digest")(was, now) and both("data.packing", False)(was, now)


def _no_scaler(was: Facts, now: Facts) -> bool:
    return not any(str(fact(facts, "precision") or "fp16").startswith("fp16") for facts in (was, now))


def _same_base(was: Facts, now: Facts) -> bool:
    """Adapters stand on weights that are known and the same. A model that trains whole is in its checkpoint."""
    return _recipe_value(now, "lora") is not None and same("frozen.digest")(was, now)


def _warmup_in_steps(was: Facts, now: Facts) -> bool:
    in_steps = all(_recipe_value(facts, "warmup_steps") is not None for facts in (was, now))
    return in_steps or _constant(was, now)


def _no_base_to_compare(was: Facts, now: Facts) -> bool:
    """Another number format of the frozen weights is a change of precision, or other parameters altogether."""
    return not same("frozen.form")(was, now)


_constant = both("lr_scheduler_type", "constant")
_no_decay = both("lr_scheduler_type", "constant", "constant_with_warmup")
_not_wsd = both("lr_scheduler_type", "cosine", "linear", "constant", "constant_with_warmup")

_HARMLESS = Rule(Kind.HARMLESS)
_DECIDED_BY_A_FACT = Rule(Kind.HARMLESS, TOLD_BY_A_FACT)
_ROWS = Rule(Kind.NEEDS_PERMISSION, "data", same("data.digest"), loaded=True)
_HELD_OUT = Rule(Kind.HARMLESS, "held_out")
_RATE = Rule(Kind.NEEDS_PERMISSION, "rate")
_MOMENTS = Rule(Kind.NEEDS_PERMISSION, "moments")
_BATCH = Rule(Kind.NEEDS_PERMISSION, "batch")
_NUMBERS = Rule(Kind.NEEDS_PERMISSION, "numbers")
_ROUNDING = Rule(Kind.EXPLAINED, "rounding")
_GUARD = Rule(Kind.NEEDS_PERMISSION, "guard")
_SCALER = Rule(Kind.NEEDS_PERMISSION, "scaler", _no_scaler, loaded=True)
_ADAPTER = Rule(Kind.NEEDS_PERMISSION, "adapter")
_MODEL = Rule(Kind.IMPOSSIBLE, "model", _same_base, loaded=True)
_SHAPES = Rule(Kind.IMPOSSIBLE, "shapes")
_PARAMETERS = Rule(Kind.IMPOSSIBLE, "parameters", same("trainable.digest"), loaded=True)
_ADAM = both("optim", "adamw_torch", "adamw_torch_fused")

RECIPE_RULES: Mapping[str, Rule] = {
    "model.name_or_path": _MODEL,
    "model.random_init": _MODEL,
    "model.residual_scale": _MODEL,
    "model.attn_implementation": _NUMBERS,
    "model.chat_template": _ROWS,
    "data.train": _ROWS,
    "data.eval": _HELD_OUT,
    "data.format": _ROWS,
    "data.max_length": Rule(Kind.NEEDS_PERMISSION, "data", _same_rows_one_by_one, loaded=True),
    "data.packing": Rule(Kind.NEEDS_PERMISSION, "order"),
    "data.truncation": _ROWS,
    "data.on_bad_row": _ROWS,
    "data.eval_fraction": _ROWS,
    "data.max_eval_rows": _ROWS,
    "data.limit_rows": _ROWS,
    "data.system_prompt": _ROWS,
    "lora": Rule(Kind.IMPOSSIBLE, "full_or_lora"),
    "lora.r": _SHAPES,
    "lora.lora_alpha": _ADAPTER,
    "lora.lora_dropout": _ADAPTER,
    "lora.target_modules": _PARAMETERS,
    "lora.use_dora": _SHAPES,
    "lora.use_rslora": _ADAPTER,
    "lora.modules_to_save": _PARAMETERS,
    "freeze": _PARAMETERS,
    # The resolved name is the fact "precision"; these are ways to ask for it.
    "precision": _DECIDED_BY_A_FACT,
    "fp16": _DECIDED_BY_A_FACT,
    "bf16": _DECIDED_BY_A_FACT,
    "device": _DECIDED_BY_A_FACT,
    "seed": Rule(Kind.NEEDS_PERMISSION, "seed"),
    "output_dir": _HARMLESS,
    "overwrite_output_dir": _HARMLESS,
    # Their outcome is the fact "total_steps".
    "num_train_epochs": _DECIDED_BY_A_FACT,
    "max_steps": _DECIDED_BY_A_FACT,
    "per_device_train_batch_size": _BATCH,
    "per_device_eval_batch_size": _HARMLESS,
    "gradient_accumulation_steps": _BATCH,
    "learning_rate": _RATE,
    "weight_decay": _MOMENTS,
    "adam_beta1": _MOMENTS,
    "adam_beta2": _MOMENTS,
    "adam_epsilon": _MOMENTS,
    "optim": Rule(Kind.IMPOSSIBLE, "optimizer", _ADAM, instead=(Kind.EXPLAINED, "rounding")),
    "lr_scheduler_type": _RATE,
    "warmup_ratio": Rule(Kind.NEEDS_PERMISSION, "rate", _warmup_in_steps),
    "warmup_steps": Rule(Kind.NEEDS_PERMISSION, "rate", _constant),
    "min_lr_ratio": Rule(Kind.NEEDS_PERMISSION, "rate", _no_decay),
    "decay_ratio": Rule(Kind.NEEDS_PERMISSION, "rate", _not_wsd),
    "max_grad_norm": Rule(Kind.NEEDS_PERMISSION, "clip"),
    "gradient_checkpointing": _ROUNDING,
    "group_by_length": Rule(Kind.NEEDS_PERMISSION, "order", both("data.packing", True)),
    "logging_steps": _HARMLESS,
    "eval_steps": _HARMLESS,
    "save_steps": _HARMLESS,
    "save_minutes": _HARMLESS,
    "save_total_limit": _HARMLESS,
    "save_keep_every_steps": _HARMLESS,
    "save_keep_best": _HARMLESS,
    "save_in_background": _HARMLESS,
    "journal_parquet": _HARMLESS,
    "report_to": _HARMLESS,
    "sample.prompts": _HARMLESS,
    "sample.every_steps": _HARMLESS,
    "sample.max_new_tokens": _HARMLESS,
    "sample.temperature": _HARMLESS,
    "sample.top_p": _HARMLESS,
    "guard.enabled": _GUARD,
    "guard.max_aborts_in_a_row": _GUARD,
    "guard.policy": _GUARD,
    "guard.max_replays": _GUARD,
    "guard.proof_steps": _GUARD,
    "guard.probation_steps": _GUARD,
    "guard.max_relapses": _GUARD,
    "guard.act_on_forecast": _GUARD,
    "guard.monitor": _GUARD,
    # Also when the movement of the weights is measured, by which a run that learns nothing is halted.
    "guard.state_check_steps": _GUARD,
    "guard.detectors": _GUARD,
    "guard.trust_steps": _HARMLESS,
    "guard.deterministic": _ROUNDING,
    "guard.repeat_check": _HARMLESS,
    "snapshots.memory_share": _HARMLESS,
    "snapshots.max_count": _HARMLESS,
    "snapshots.cost_share": _HARMLESS,
    "snapshots.shadow": _HARMLESS,
    "snapshots.digest_steps": _HARMLESS,
    "scaler.init_scale": _SCALER,
    "scaler.growth_factor": _SCALER,
    "scaler.backoff_factor": _SCALER,
    "scaler.growth_interval": _SCALER,
    "scaler.min_scale": _SCALER,
    "scaler.max_retries": _SCALER,
    "loss.objective": Rule(Kind.NEEDS_PERMISSION, "objective"),
    "loss.chunk_tokens": _ROUNDING,
}

FACT_RULES: Mapping[str, Rule] = {
    "data.digest": Rule(Kind.NEEDS_PERMISSION, "data"),
    "data.eval_digest": _HELD_OUT,
    "device.type": Rule(Kind.NEEDS_PERMISSION, "device"),
    "device.name": Rule(Kind.EXPLAINED, "hardware"),
    "threads": Rule(Kind.EXPLAINED, "threads"),
    "world_size": Rule(Kind.NEEDS_PERMISSION, "world"),
    "precision": _NUMBERS,
    "total_steps": Rule(Kind.NATURAL, "length"),
    "trainable.digest": Rule(Kind.IMPOSSIBLE, "parameters"),
    "frozen.digest": Rule(Kind.IMPOSSIBLE, "base", _no_base_to_compare),
}
"""Facts beside the recipe; the versions follow :data:`_VERSION`."""

_VERSION = Rule(Kind.EXPLAINED, "versions")
_UNCLASSED = Rule(Kind.NEEDS_PERMISSION, "unclassed")
# A fact that was not recorded matters where a difference would.
_WEIGHTY = (Kind.EXPLAINED, Kind.NEEDS_PERMISSION, Kind.IMPOSSIBLE)


def compare(stored: Facts, now: Facts) -> list[Change]:
    """Every difference between the facts that a state was reached under and the facts of now.

    Where ``now`` lacks a fact (nothing is loaded yet) it is not compared; a fact that ``stored`` lacks, or has of the
    wrong kind, is one EXPLAINED change named "(not recorded)".
    """
    changes = [*_recipe_changes(stored, now), *_fact_changes(stored, now)]
    return sorted(changes, key=lambda c: -list(Kind).index(c.kind))


def _recipe_changes(stored: Facts, now: Facts) -> Iterator[Change]:
    was, is_now = stored.get("recipe"), now.get("recipe")
    if not isinstance(was, Mapping) or not isinstance(is_now, Mapping):
        if is_now is not None:
            yield Change("recipe", UNKNOWN, UNKNOWN, Kind.EXPLAINED, "unknown")
        return
    # A field that an older version did not have behaved as its default.
    whole = filled(was, Recipe().model_dump(mode="json"))
    for path, a, b in differences(whole, is_now):
        rule = RECIPE_RULES.get(path, _UNCLASSED)
        excused = rule.unless is not None and rule.unless(stored, now)
        kind, effect = rule.instead if excused else (rule.kind, rule.effect)
        yield Change(path, a, b, kind, effect, certain=not rule.loaded)


def _fact_changes(stored: Facts, now: Facts) -> Iterator[Change]:
    versions = now.get("versions")
    names = [f"versions.{n}" for n in versions] if isinstance(versions, Mapping) else []
    unknown = []
    for path in [*FACT_RULES, *names]:
        rule, was, is_now = FACT_RULES.get(path, _VERSION), fact(stored, path), fact(now, path)
        if is_now is None or was == is_now:
            continue
        if was is None:
            unknown += [path] if rule.kind in _WEIGHTY else []
        elif rule.unless is None or not rule.unless(stored, now):
            yield Change(path, was, is_now, rule.kind, rule.effect)
    if unknown:
        yield Change(", ".join(unknown), UNKNOWN, UNKNOWN, Kind.EXPLAINED, "unknown")
