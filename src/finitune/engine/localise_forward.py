"""Forward: what the origins of a bad loss are called, and which rows and tokens of the batch they touch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from finitune.core.incident import Suspect
from finitune.engine.conditions import NotPossible
from finitune.engine.localise_modules import is_part, owner_of
from finitune.engine.op_numbers import MAX_LISTED
from finitune.engine.op_trace import Origin
from finitune.engine.port import ReplayPort, Unit

MAX_SOURCES = 8
_HAS_POLE = re.compile(r"div|sqrt|log|reciprocal|pow|norm")


@dataclass(frozen=True, slots=True)
class Layout:
    """How a micro-batch lies in its tensors."""

    num_rows: int = 0
    """Length of the first dimension; 0: not known."""
    width: int = 0
    """Length of the second dimension of its token tensors; 0: there are none."""
    units: Mapping[int, Unit] = field(default_factory=dict)
    """By place along the first dimension."""
    ids: frozenset[int] = frozenset()
    """The numbers in its token tensors."""


@dataclass(frozen=True, slots=True)
class Places:
    """Which places of a micro-batch a tensor's bad values belong to."""

    rows: tuple[int, ...]
    tokens: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """Positions by row; empty where the tensor has no token dimension."""

    def to_json(self) -> dict[str, Any]:
        """``bad_rows`` and ``positions`` (of the first of them), at most 16 of each."""
        data: dict[str, Any] = {"bad_rows": list(self.rows[:MAX_LISTED]), "num_bad_rows": len(self.rows)}
        if self.tokens:
            data["positions"] = {str(r): list(t[:MAX_LISTED]) for r, t in list(self.tokens.items())[:MAX_LISTED]}
        return data


def layouts_of(port: ReplayPort) -> list[Layout]:
    """The layouts of the micro-batches at hand; empty ones where the port cannot give batch or units."""
    try:
        batches = list(port.batch())
    except NotPossible:
        return []
    try:
        units = list(port.units())
    except NotPossible:
        units = []
    return [_layout(b, [u for u in units if u.micro == m]) for m, b in enumerate(batches)]


def _layout(batch: Any, units: Sequence[Unit]) -> Layout:
    tensors = [t for t in tree_leaves(batch) if isinstance(t, torch.Tensor) and t.dim() > 0]
    tokens = [t for t in tensors if t.dim() == 2 and not t.is_floating_point()]
    named = {u.index: u for u in units}
    if tokens:
        ids = frozenset(int(i) for t in tokens if t.dtype != torch.bool for i in t.unique().tolist())
        return Layout(tokens[0].shape[0], tokens[0].shape[1], named, ids)
    return Layout(tensors[0].shape[0] if tensors else 0, 0, named)


def places_of(origin: Origin, layout: Layout, model: nn.Module) -> Places | None:
    """The rows and tokens an origin's bad values belong to; None where its shape does not tell."""
    known = _places(origin.mask, tuple(origin.data.get("out_shape", ())), layout, model)
    if known is not None or origin.mask is None or origin.mask.numel() != 1:
        return known
    spread = (_places(mask, shape, layout, model) for shape, mask in origin.spread.items())
    found = next((p for p in spread if p is not None and 0 < len(p.rows) < layout.num_rows), None)
    return Places(found.rows) if found is not None else None


def _places(mask: torch.Tensor | None, shape: tuple[int, ...], layout: Layout, model: nn.Module) -> Places | None:
    num_rows, width = layout.num_rows, layout.width
    if mask is None or not shape or not num_rows or mask.numel() != math.prod(shape[:-1] or shape):
        return None
    bad_BT = _by_token(mask, shape, num_rows, width) if width else None
    if bad_BT is not None:
        tokens = {r: tuple(bad_BT[r].nonzero().flatten().tolist()) for r in range(num_rows) if bool(bad_BT[r].any())}
        return Places(tuple(tokens), tokens)
    if shape[0] != num_rows or any(tuple(p.shape) == shape for p in model.parameters()):
        return None
    return Places(tuple(mask.reshape(num_rows, -1).any(dim=1).nonzero().flatten().tolist()))


def _by_token(mask: torch.Tensor, shape: tuple[int, ...], num_rows: int, width: int) -> torch.Tensor | None:
    """The mask as (rows, tokens); a loss over shifted labels has one token less."""
    if shape[:2] == (num_rows, width) and len(shape) > 2:
        return mask.reshape(num_rows, width, -1).any(dim=2)
    if len(shape) == 4 and shape[0] == num_rows and shape[2] == width:  # (rows, heads, tokens, size)
        return mask.reshape(num_rows, -1, width).any(dim=1)
    for tokens in (width, width - 1):
        if tokens > 1 and shape[0] == num_rows * tokens:
            return mask.reshape(num_rows, tokens, -1).any(dim=2)
    return None


def suspects_of_origin(origin: Origin, layouts: Sequence[Layout], model: nn.Module) -> list[Suspect]:
    """An origin as suspects: the tensor or the module and operation, then rows and tokens where they are exact."""
    layout = layouts[origin.micro] if origin.micro < len(layouts) else Layout()
    places = places_of(origin, layout, model)
    data = {**origin.data, "micro": origin.micro, "phase": "backward" if origin.backward else "forward"}
    data |= {"module": origin.module, **(places.to_json() if places else {})}
    data.pop("out_shape", None)
    table = is_table(model, owner_of(origin.name) if origin.kind == "parameter" else origin.module)
    data |= {} if table is None else {"table": table}
    if origin.kind == "op":
        found = [*_operation(origin, data), *_empty_rows(origin, model)]
    else:
        found = _source(origin, data, layout, model)
    return [*found, *(_rows(places, layout, origin) if places else ())]


def _operation(origin: Origin, data: Mapping[str, Any]) -> list[Suspect]:
    op = f"{origin.node} ({origin.name})" if origin.node else origin.name
    detail = {**data, "op": origin.name, "node": origin.node}
    module = [Suspect("module", origin.module, detail)] if is_part(origin.module) else []
    return [*module, Suspect("op", f"{op} in {origin.module}", detail)]


def _empty_rows(origin: Origin, model: nn.Module) -> list[Suspect]:
    """Weights of the module with rows of zeros, where an operation with a pole began it: such a row has no length.

    The magnitudes of an adapter (DoRA) belong to the layer that the adapter sits on.
    """
    name = origin.module
    while "lora_" in name:
        name = name.rpartition(".")[0]
    module = _module(model, name)
    if module is None or not name or not _HAS_POLE.search(f"{origin.name} {origin.node}".lower()):
        return []
    found = []
    for own, weight in module.named_parameters(recurse=name != origin.module):
        empty_R = (weight.detach().flatten(1) == 0).all(dim=1) if weight.dim() > 1 else weight.new_zeros(0)
        rows = empty_R.nonzero().flatten().tolist()
        if rows and len(rows) < len(weight):  # one that is all zeros was made so (LoRA's B)
            data = {"what": "weight", "row": rows[0], "row_amax": 0.0, "num_rows": len(rows), "module": name}
            found.append(Suspect("parameter", f"{name}.{own}", data))
    return found


def _source(origin: Origin, data: dict[str, Any], layout: Layout, model: nn.Module) -> list[Suspect]:
    """A tensor that was bad before the step, and the operation that read it first."""
    data["what"] = {"parameter": "weight"}.get(origin.kind, origin.kind)
    owner = owner_of(origin.name)
    if origin.kind == "parameter" and isinstance(_module(model, owner), nn.Embedding):
        used = sorted(set(data.get("rows", ())) & layout.ids)
        data |= {"used_rows": used} if used else {}
    reader = {**data, "input_finite": False, "source": origin.name}
    found = [Suspect(origin.kind, origin.name, data)]
    if is_part(origin.module):
        found.append(Suspect("module", origin.module, reader))
    return [*found, Suspect("op", f"{data.get('op', '?')} in {origin.module}", reader)]


def is_table(model: nn.Module, name: str) -> bool | None:
    """Whether a module has a row for each token id: the embedding of the tokens, or an output head; None: not known.

    What is called an embedding may be another one: of patches, positions, time.
    """
    module = _module(model, name) if is_part(name) else None
    weight = getattr(module, "weight", None)
    if module is None or not isinstance(weight, torch.Tensor):
        return None if module is None else False
    counts = _vocabulary_sizes(model)
    return None if not counts else weight.dim() == 2 and len(weight) in counts


def _vocabulary_sizes(model: nn.Module) -> set[int]:
    """Rows of the embedding of the tokens, where the model tells; else of all its embeddings."""
    try:
        told = getattr(model.get_input_embeddings(), "weight", None)  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):
        told = None
    if isinstance(told, torch.Tensor) and told.dim() == 2:
        return {len(told)}
    return {m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)}


def _module(model: nn.Module, name: str) -> nn.Module | None:
    return dict(model.named_modules()).get(name)


def _rows(places: Places, layout: Layout, origin: Origin) -> list[Suspect]:
    """Row suspects: only where some units are bad and others are not; token spans where there is a token dimension."""
    if not layout.units or not places.rows or len(places.rows) >= layout.num_rows:
        return []
    found = []
    for index in places.rows[:MAX_LISTED]:
        unit = layout.units.get(index)
        if unit is None:
            continue
        tokens = places.tokens.get(index, ())
        span = [tokens[0], tokens[-1] + 1] if tokens else None
        data = {"micro": origin.micro, "index": index, "span": span, "by": "localise", "num_in_unit": len(unit.rows)}
        found += [Suspect("row", str(r), data) for r in unit.rows]
        if span and len(tokens) < layout.width:
            found += [Suspect("tokens", str(r), data) for r in unit.rows]
    return found


def forward_suspects(origins: Sequence[Origin], layouts: Sequence[Layout], model: nn.Module) -> list[Suspect]:
    """Suspects of a bad loss from its origins in order of time: the first, and all tensors that were bad before."""
    if not origins:
        return []
    sources = [o for o in origins if o.kind != "op"][:MAX_SOURCES]
    found = [s for o in [origins[0], *sources] for s in suspects_of_origin(o, layouts, model)]
    return list({(s.kind, s.name): s for s in reversed(found)}.values())[::-1]
