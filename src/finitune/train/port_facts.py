"""What a step of our own trainer runs under, for an incident: plain values."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from torch import nn

from finitune.models.layout import bare

if TYPE_CHECKING:
    from finitune.engine.conditions import Conditions
    from finitune.train.step import Parts


def facts_of(parts: Parts, conditions: Conditions) -> dict[str, Any]:
    """Everything but what changes with the batch; see ``ReplayPort.facts``."""
    settings, precision = parts.optim_settings, parts.context.precision
    adam = settings.name != "sgd"
    return {
        "precision": precision.name,
        "half_max": precision.half_max,
        "weights": sorted({_short(p.dtype) for _, p in parts.parameters}),
        "optimizer": settings.name,
        "adam_eps": (conditions.adam_eps or settings.eps) if adam else None,
        "betas": list(settings.betas) if adam else None,
        "weight_decay": settings.weight_decay,
        "attention": "math" if conditions.attention == "math" else _attention(parts.model),
        "device": str(parts.strategy.device),
        "dropout": _dropout(parts.model),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }


def _short(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _attention(model: nn.Module) -> str | None:
    config = getattr(bare(model), "config", None)
    found = getattr(config, "_attn_implementation", None)
    return None if found is None else str(found)


def _dropout(model: nn.Module) -> float:
    """The largest share that any layer drops."""
    layers = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    shares = [getattr(m, "attention_dropout", 0.0) for m in model.modules()]
    return max([0.0, *layers, *(float(s) for s in shares if isinstance(s, int | float))])
