"""Nests of tensors as JSON with references, and back: mappings, lists, tuples, plain values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from finitune.core.chain import encode, number
from finitune.engine.conditions import NotPossible

MAX_DEPTH = 16
_PLAIN = (str, int, float, bool, type(None))
_NON_FINITE = ("NaN", "Infinity", "-Infinity")


class BadNest(ValueError):
    """The JSON is not that of a nest; the text says why."""


def pack(nest: Any, prefix: str, tensors: dict[str, torch.Tensor], *, keep: bool = True, depth: int = 0) -> Any:
    """JSON of a nest; its tensors go into ``tensors`` under names that begin with ``prefix``.

    ``keep`` false leaves the tensors out: only their shapes and dtypes remain, and no plain value, which may be text.

    Raises NotPossible for what is no nest.
    """
    if depth > MAX_DEPTH:
        raise NotPossible(f"the batch is nested more than {MAX_DEPTH} deep")
    if isinstance(nest, torch.Tensor):
        return _pack_tensor(nest, prefix, tensors, keep=keep)
    if isinstance(nest, Mapping):
        items = [
            [key, pack(part, f"{prefix}/{key}", tensors, keep=keep, depth=depth + 1)] for key, part in nest.items()
        ]
        if not all(isinstance(key, (str, int)) for key, _ in items):
            raise NotPossible("the batch has keys that are neither text nor whole numbers")
        return {"map": items}
    if isinstance(nest, (list, tuple)):
        parts = [pack(p, f"{prefix}/{i}", tensors, keep=keep, depth=depth + 1) for i, p in enumerate(nest)]
        return {"tuple" if isinstance(nest, tuple) else "list": parts}
    if isinstance(nest, _PLAIN):
        return {"float": encode(nest)} if isinstance(nest, float) else {"value": nest if keep else None}
    raise NotPossible(f"the batch holds a {type(nest).__name__}, which a capsule cannot hold")


def _pack_tensor(tensor: torch.Tensor, name: str, tensors: dict[str, torch.Tensor], *, keep: bool) -> Any:
    shown = {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
    if not keep:
        return {"left_out": shown}
    while name in tensors:  # {1: ..., "1": ...}
        name += "'"
    tensors[name] = tensor
    return {"tensor": name, **shown}


def unpack(record: Any, tensors: Mapping[str, torch.Tensor], depth: int = 0) -> Any:
    """Inverse of :func:`pack`. Raises BadNest."""
    if depth > MAX_DEPTH or not isinstance(record, Mapping) or not record:
        raise BadNest("not a nest of tensors")
    if "tensor" in record:
        return _unpack_tensor(record, tensors)
    kind, content = next(iter(record.items()))
    if kind in ("list", "tuple") and isinstance(content, list):
        parts = [unpack(part, tensors, depth + 1) for part in content]
        return tuple(parts) if kind == "tuple" else parts
    if kind == "map" and isinstance(content, list):
        return dict(_item(item, tensors, depth) for item in content)
    if kind == "float" and (type(content) in (int, float) or content in _NON_FINITE):
        return number(content)
    if kind == "value" and isinstance(content, _PLAIN):
        return content
    raise BadNest(f"not a part of a nest: {str(kind)[:20]!a}")


def _item(item: Any, tensors: Mapping[str, torch.Tensor], depth: int) -> tuple[Any, Any]:
    if not isinstance(item, list) or len(item) != 2 or type(item[0]) not in (str, int):
        raise BadNest("an entry of a mapping is not a key and a value")
    return item[0], unpack(item[1], tensors, depth + 1)


def _unpack_tensor(record: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    name = record["tensor"]
    tensor = tensors.get(name) if isinstance(name, str) else None
    if tensor is None:
        raise BadNest(f"the tensor {str(name)[:60]!a} is missing")
    if list(tensor.shape) != record.get("shape"):
        raise BadNest(f"{str(name)[:60]!a} has shape {list(tensor.shape)}, not {record.get('shape')!a}")
    return tensor
