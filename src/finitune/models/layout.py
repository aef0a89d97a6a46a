"""The layout that today's dense decoder-only models share in transformers.

``model.embed_tokens``, ``model.layers[i].{self_attn,mlp,*norm*}``, ``model.norm``, ``lm_head``. The
functions here read that layout from a bare model or through a PEFT wrapper; families use them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from finitune.models.family import NamedModules

# PEFT puts these in front of the names of the model it wraps, and this between a module and its weights.
_PEFT_PREFIX = "base_model.model."
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_DOWN = ("mlp.down_proj",)


def bare(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    get_base = getattr(model, "get_base_model", None)
    return get_base() if callable(get_base) else model


def group_of(parameter: str) -> str:
    """The group of one parameter name: embed, layers.N.attention|mlp|norm|other, norm, head or other."""
    name = parameter.removeprefix(_PEFT_PREFIX)
    if name.startswith("model.embed_tokens"):
        return "embed"
    if name.startswith("lm_head"):
        return "head"
    if name.startswith("model.norm"):
        return "norm"
    match = _LAYER.match(name)
    if not match:
        return "other"
    index, rest = match.groups()
    if rest.startswith("self_attn."):
        part = "attention"
    elif rest.startswith("mlp."):
        part = "mlp"
    else:
        part = "norm" if "norm" in rest.split(".")[0] else "other"
    return f"layers.{index}.{part}"


def groups(model: nn.Module) -> dict[str, list[str]]:
    """A partition of the parameter names; a tied head is listed once, as the embedding."""
    found: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        found.setdefault(group_of(name), []).append(name)
    return found


def backbone(model: nn.Module) -> nn.Module:
    """The decoder without its head."""
    return bare(model).get_submodule("model")


def head(model: nn.Module) -> nn.Module:
    """The output projection."""
    return bare(model).get_submodule("lm_head")


def layers(model: nn.Module) -> NamedModules:
    """Decoder layers by name, first to last."""
    blocks = bare(model).get_submodule("model.layers")
    return [(f"model.layers.{name}", block) for name, block in blocks.named_children()]


def watch(model: nn.Module) -> NamedModules:
    """The down projections: in every measured run the first fp16 overflow was in one of them."""
    return [(f"{name}.{leaf}", layer.get_submodule(leaf)) for name, layer in layers(model) for leaf in _DOWN]


def native_config(raw: Mapping[str, Any]) -> Any:
    """The transformers config class of ``raw["model_type"]``, filled; ``auto_map`` (remote code) is dropped."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[raw["model_type"]]
    return kind.from_dict({key: value for key, value in raw.items() if key != "auto_map"})
