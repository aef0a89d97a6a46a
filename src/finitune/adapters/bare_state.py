"""The training state of any torch optimizer, scheduler and GradScaler as named tensors and a JSON-able record.

What an optimizer holds is taken apart: tensors are named ``<parameter>|<slot>`` (nested slots with dots), and a record
tells how they were put together, with every plain value between them. So an optimizer that nobody here knows can be
restored too, as long as it keeps its state in dicts, lists, tensors and plain values.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

WHOLE = "(optimizer)"
"""Stands for a parameter where state belongs to the optimizer as a whole."""
GROUP = "(group {})"
"""Stands for a parameter where a group's option is a tensor."""
# The realiser of conditions owns the eps; parameters are not options.
_NOT_OPTIONS = ("params", "eps", "param_names")
_PLAIN = (str, bool, int, float, type(None))
_TAG = "!"


class _NotPlain(TypeError):
    """A value that has no JSON form here."""


# -- plain values ----------------------------------------------------------------------------------------------


def to_plain(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """A JSON-able skeleton of ``value``; its tensors go to ``tensors`` under their paths. Raises _NotPlain."""
    if isinstance(value, Tensor):
        tensors[path] = value
        return {_TAG: "tensor", "device": str(value.device)}
    if type(value) in _PLAIN:
        return value
    if isinstance(value, list | tuple):
        parts = [to_plain(v, f"{path}.{i}", tensors) for i, v in enumerate(value)]
        return parts if type(value) is list else {_TAG: "tuple", "parts": parts}
    if type(value) in (dict, Counter, OrderedDict, defaultdict):
        pairs = [[to_plain(k, f"{path}.key", {}), to_plain(v, f"{path}.{k}", tensors)] for k, v in value.items()]
        return {_TAG: "dict", "pairs": pairs, "kind": type(value).__name__}
    if isinstance(value, float | int | str):  # numpy's numbers and enums of these
        return value.item() if hasattr(value, "item") else type(value).__mro__[1](value)
    raise _NotPlain(f"{path} is a {type(value).__name__}")


def from_plain(skeleton: Any, path: str, tensors: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> Any:
    """Inverse of :func:`to_plain`. A tensor that ``held`` has in the same form is overwritten in place.

    Raises KeyError for a tensor that is missing.
    """
    if isinstance(skeleton, list):
        return [from_plain(v, f"{path}.{i}", tensors, held) for i, v in enumerate(skeleton)]
    if not isinstance(skeleton, Mapping):
        return skeleton
    if skeleton[_TAG] == "tensor":
        return _placed(tensors[path], held.get(path), str(skeleton["device"]))
    if skeleton[_TAG] == "tuple":
        return tuple(from_plain(v, f"{path}.{i}", tensors, held) for i, v in enumerate(skeleton["parts"]))
    pairs = [(from_plain(k, path, {}, {}), v) for k, v in skeleton["pairs"]]
    filled = {k: from_plain(v, f"{path}.{k}", tensors, held) for k, v in pairs}
    return {"Counter": Counter, "OrderedDict": OrderedDict}.get(str(skeleton["kind"]), dict)(filled)


@torch.no_grad()
def _placed(source: Tensor, held: Tensor | None, device: str) -> Tensor:
    if held is not None and held.shape == source.shape and held.dtype == source.dtype:
        held.copy_(source)
        return held
    return source.to(device, copy=True)


def _check_tensors(skeleton: Any, path: str, tensors: Mapping[str, Tensor], found: set[str]) -> None:
    """Collect the tensors that a skeleton needs. Raises KeyError for one that is missing."""
    if isinstance(skeleton, list):
        for i, part in enumerate(skeleton):
            _check_tensors(part, f"{path}.{i}", tensors, found)
    elif isinstance(skeleton, Mapping):
        if skeleton[_TAG] == "tensor":
            if path not in tensors:
                raise KeyError(f"missing: {path}")
            found.add(path)
        for i, part in enumerate(skeleton.get("parts", ())):
            _check_tensors(part, f"{path}.{i}", tensors, found)
        for key, part in skeleton.get("pairs", ()):
            _check_tensors(part, f"{path}.{from_plain(key, path, {}, {})}", tensors, found)


# -- the optimizer ----------------------------------------------------------------------------------------------


class OptimizerState:
    """What one optimizer holds, by the names of the model's parameters."""

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Sequence[tuple[str, nn.Parameter]]) -> None:
        """``parameters``: all of the model that the optimizer holds, by name."""
        self.optimizer = optimizer
        self.by_name = dict(parameters)
        self.names = {id(p): n for n, p in parameters}

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor, as ``<parameter>|<slot>``."""
        return self._taken_apart()[1]

    def record(self) -> dict[str, Any]:
        """The rest: how the tensors are put together, plain values, and the options of the groups."""
        slots, _ = self._taken_apart()
        return {"slots": slots, "groups": self._options()[0]}

    def _taken_apart(self) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
        slots: dict[str, dict[str, Any]] = {}
        tensors: dict[str, Tensor] = self._options()[1]
        for owner, values in self._owners():
            slots[owner] = {}
            for slot in sorted(values, key=str):
                try:
                    slots[owner][str(slot)] = to_plain(values[slot], f"{owner}|{slot}", tensors)
                except _NotPlain:
                    continue  # a callable or a handle: it is the same before and after
        return slots, tensors

    def _owners(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """State by parameter in the model's order; what belongs to no parameter comes last."""
        state = self.optimizer.state
        for name, parameter in self.by_name.items():
            if state.get(parameter):
                yield name, state[parameter]
        rest = {str(k): v for k, v in state.items() if not isinstance(k, Tensor)}
        if rest:
            yield WHOLE, rest

    def _options(self) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        groups, tensors = [], dict[str, Tensor]()
        for number, group in enumerate(self.optimizer.param_groups):
            options = {}
            for key in sorted(k for k in group if k not in _NOT_OPTIONS):
                try:
                    options[key] = to_plain(group[key], f"{GROUP.format(number)}|{key}", tensors)
                except _NotPlain:
                    continue
            groups.append(options)
        return groups, tensors

    def check(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Raise KeyError or ValueError where :meth:`restore` would not come out right; nothing is changed."""
        slots, groups, found = record["slots"], record["groups"], set[str]()
        strangers = sorted(set(slots) - self.by_name.keys() - {WHOLE})
        if strangers:
            raise KeyError(f"foreign: {strangers[:3]}")
        if len(groups) != len(self.optimizer.param_groups):
            raise ValueError(f"{len(groups)} parameter groups, expected {len(self.optimizer.param_groups)}")
        for owner, values in slots.items():
            for slot, skeleton in values.items():
                _check_tensors(skeleton, f"{owner}|{slot}", tensors, found)
        for number, (options, present) in enumerate(zip(groups, self._options()[0], strict=True)):
            # A scheduler may add options of its own at any time; those that the optimizer was made with are there.
            missing = sorted((self.optimizer.defaults.keys() & present.keys()) - options.keys())
            if missing:
                raise ValueError(f"group {number} is of another optimizer: it lacks {', '.join(missing[:3])}")
            for key, skeleton in options.items():
                _check_tensors(skeleton, f"{GROUP.format(number)}|{key}", tensors, found)
        unused = sorted(tensors.keys() - found)
        if unused:
            raise KeyError(f"foreign: {unused[:3]}")
        held = self.tensors()
        for name in found & held.keys():
            # A moment has the shape of its parameter for life; what grows or shrinks is not one.
            if held[name].dtype != tensors[name].dtype:
                raise ValueError(f"{name}: {tensors[name].dtype}, expected {held[name].dtype}")

    def restore(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Afterwards the optimizer holds exactly this; see :meth:`check` for what is raised, with nothing changed."""
        self.check(tensors, record)
        held, slots, state = self.tensors(), record["slots"], self.optimizer.state
        for name, parameter in self.by_name.items():
            values = slots.get(name)
            if values is None:
                state.pop(parameter, None)
                continue
            # Not setdefault: a defaultdict must not make an entry of its own kind in the place of what was there.
            target = state[parameter] if parameter in state else state.setdefault(parameter, {})
            self._refill(target, name, values, tensors, held)
        whole = slots.get(WHOLE, {})
        for key in [k for k in state if not isinstance(k, Tensor) and str(k) not in whole]:
            del state[key]
        for key in whole:
            state[key] = from_plain(whole[key], f"{WHOLE}|{key}", tensors, held)
        for number, (group, options) in enumerate(zip(self.optimizer.param_groups, record["groups"], strict=True)):
            for key, skeleton in options.items():
                group[key] = from_plain(skeleton, f"{GROUP.format(number)}|{key}", tensors, held)

    def _refill(
        self,
        target: Any,
        name: str,
        values: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        held: Mapping[str, Tensor],
    ) -> None:
        for slot in [s for s in target if str(s) not in values and _is_state(target[s])]:
            del target[slot]
        for slot, skeleton in values.items():
            target[slot] = from_plain(skeleton, f"{name}|{slot}", tensors, held)


def _is_state(value: Any) -> bool:
    """Whether a slot's value would have been taken into a record."""
    try:
        to_plain(value, "", {})
    except _NotPlain:
        return False
    return True


# -- the scheduler ----------------------------------------------------------------------------------------------


def scheduler_record(scheduler: Any) -> dict[str, Any] | None:
    """The plain part of ``scheduler.state_dict()``; None for no scheduler. Lambdas are not state and are left out."""
    if scheduler is None:
        return None
    out = {}
    for key, value in scheduler.state_dict().items():
        tensors: dict[str, Tensor] = {}
        try:
            out[str(key)] = to_plain(_lean(value), str(key), tensors)
        except _NotPlain:
            continue
        if tensors:  # a learning rate that is a tensor: its value
            out[str(key)] = to_plain(_as_numbers(value), str(key), {})
    return out


def _lean(value: Any) -> Any:
    """Without what cannot be stored, in the state of a scheduler that is made of schedulers."""
    if isinstance(value, list):
        return [_lean(v) for v in value]
    if type(value) is dict:
        return {k: _lean(v) for k, v in value.items() if _is_state(v) or isinstance(v, dict | list)}
    return value


def _as_numbers(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, list | tuple):
        return type(value)(_as_numbers(v) for v in value)
    return value


def restore_scheduler(scheduler: Any, record: Mapping[str, Any] | None) -> None:
    """Inverse of :func:`scheduler_record`. Raises KeyError or ValueError for another scheduler's."""
    if scheduler is None:
        return
    now = scheduler.state_dict()
    stored = {k: from_plain(v, str(k), {}, {}) for k, v in (record or {}).items()}
    foreign = sorted(set(stored) - {str(k) for k in now})
    if foreign:
        raise KeyError(f"foreign in the scheduler's state: {foreign[:3]}")
    scheduler.load_state_dict({**now, **{k: _merged(now.get(k), v) for k, v in stored.items()}})


def _merged(now: Any, stored: Any) -> Any:
    """What was left out of the record is as it is now."""
    if isinstance(stored, dict) and isinstance(now, dict):
        return {**now, **{k: _merged(now.get(k), v) for k, v in stored.items()}}
    if isinstance(stored, list) and isinstance(now, list) and len(stored) == len(now):
        return [_merged(a, b) for a, b in zip(now, stored, strict=True)]
    return stored


def trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[str, nn.Parameter]]:
    """What the optimizer holds, by its name in the model and in the model's order; others as "param_group0.3"."""
    names = {id(p): n for n, p in model.named_parameters()}
    held: dict[int, tuple[str, nn.Parameter]] = {}
    for g, group in enumerate(optimizer.param_groups):
        for i, parameter in enumerate(group["params"]):
            held.setdefault(id(parameter), (names.get(id(parameter), f"param_group{g}.{i}"), parameter))
    return [*(held[key] for key in names if key in held), *(pair for key, pair in held.items() if key not in names)]
