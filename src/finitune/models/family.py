"""What the toolkit must know of a model family: one record of plain functions.

A member of ``families/`` defines ``FAMILY``; it is found by the ``model_type`` of a checkpoint's
``config.json``. All functions take the bare transformers model or the same model wrapped by PEFT.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from finitune.core import registry
from finitune.core.errors import UserError
from finitune.models.codes import UNKNOWN_MODEL_TYPE

StateDict = dict[str, torch.Tensor]
NamedModules = list[tuple[str, nn.Module]]


@dataclass(frozen=True, slots=True)
class Family:
    """One record of functions. Names of modules are those of the bare model, without PEFT's prefix."""

    name: str
    model_types: tuple[str, ...]
    """Values of ``model_type`` that this family loads."""
    groups: Callable[[nn.Module], dict[str, list[str]]]
    """A partition of ``named_parameters()`` of the model as given: embed, layers.N.attention, ..., head."""
    lora_targets: tuple[str, ...]
    """Last parts of the names of the linear modules that LoRA adapts by default."""
    backbone: Callable[[nn.Module], nn.Module]
    """The module whose output has ``last_hidden_state`` (B,T,D)."""
    head: Callable[[nn.Module], nn.Module]
    """The module that maps hidden states (B,T,D) to logits (B,T,V)."""
    layers: Callable[[nn.Module], NamedModules]
    """The decoder layers, first to last."""
    watch: Callable[[nn.Module], NamedModules]
    """The modules whose input and output overflow first in half precision (``mlp.down_proj``)."""
    config: Callable[[Mapping[str, Any]], Any]
    """The transformers config of a ``config.json``."""
    convert: Callable[[StateDict, Mapping[str, Any]], StateDict] | None = None
    """Checkpoint tensors -> tensors of the transformers model; None where they are the same."""
    export: Callable[[StateDict, Any], tuple[StateDict, dict[str, Any]]] | None = None
    """Inverse of ``convert``: tensors in the checkpoint's own layout, and its ``config.json``."""
    notes: str = ""
    """Advice that a preflight may print, one sentence."""


def known_model_types() -> dict[str, str]:
    """Every ``model_type`` that can be loaded, with the name of its family."""
    return {
        kind: name
        for name in registry.names("model_families")
        for kind in registry.load("model_families", name).FAMILY.model_types
    }


def family_for(model_type: str, where: str = "") -> Family:
    """The family of a ``model_type``. Raises UserError MOD005 with the list of what is known."""
    known = known_model_types()
    if model_type not in known:
        close = get_close_matches(model_type, known, n=3)
        raise UserError(
            UNKNOWN_MODEL_TYPE,
            where,
            model_type=model_type,
            known=", ".join(sorted(known)),
            close=", ".join(close) or "-",
        )
    family: Family = registry.load("model_families", known[model_type]).FAMILY
    return family
