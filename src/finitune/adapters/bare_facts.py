"""What a step of a bare loop runs under: read off the model, the optimizer and what its computation was seen to do."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from finitune.engine.conditions import Conditions
from finitune.engine.realise import Realiser
from finitune.numerics.compute import HALF_NAMES

Named = Sequence[tuple[str, nn.Parameter]]


def facts_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, realiser: Realiser, parameters: Named, conditions: Conditions
) -> dict[str, Any]:
    """Everything but what changes with the batch; see ``ReplayPort.facts``."""
    group = optimizer.param_groups[0]
    devices = sorted({str(p.device) for p in model.parameters()})
    return {
        "precision": precision_of(realiser, parameters, conditions),
        "half_max": half_max_of(realiser, parameters, conditions),
        "weights": sorted({str(p.dtype).removeprefix("torch.") for _, p in parameters}),
        "optimizer": type(optimizer).__name__.lower(),
        "adam_eps": group.get("eps"),
        "betas": [float(b) for b in group["betas"]] if "betas" in group else None,
        "weight_decay": group.get("weight_decay"),
        "attention": "math" if conditions.attention == "math" else _attention(model),
        "device": devices[0] if len(devices) == 1 else ", ".join(devices),
        "dropout": _dropout(model),
        "versions": dict(_versions()),
    }


def precision_of(realiser: Realiser, parameters: Named, conditions: Conditions) -> str:
    """What products are computed in: "fp32", "fp16", "bf16", or one of these emulated."""
    seen = realiser.seen
    stored = {HALF_NAMES[p.dtype] for _, p in parameters if p.dtype in HALF_NAMES}
    configured = seen.half or next((name for name in ("fp16", "bf16") if name in stored), None)
    if configured is None:
        return "fp32"
    if conditions.precision is not None:
        return conditions.precision
    return f"{configured}-emulated" if seen.emulated else configured


def half_max_of(realiser: Realiser, parameters: Named, conditions: Conditions) -> float | None:
    """Largest finite number of the compute format; None outside half precision."""
    name = precision_of(realiser, parameters, conditions).partition("-")[0]
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(name)
    return None if dtype is None else float(torch.finfo(dtype).max)


def pad_id_of(model: nn.Module) -> int:
    """The model's padding token; 0 where its config names none."""
    found = getattr(getattr(model, "config", None), "pad_token_id", None)
    return found if isinstance(found, int) else 0


def _attention(model: nn.Module) -> str | None:
    for module in model.modules():
        found = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if found is not None:
            return str(found)
    return None


def _dropout(model: nn.Module) -> float:
    """The largest share that any layer drops."""
    layers = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    shares = [getattr(m, "attention_dropout", 0.0) for m in model.modules()]
    return max([0.0, *layers, *(float(s) for s in shares if isinstance(s, int | float))])


def _versions() -> list[tuple[str, str]]:
    found = []
    for name in ("torch", "transformers", "peft"):
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:
            continue
    return found
