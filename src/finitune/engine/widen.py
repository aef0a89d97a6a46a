"""A batch with more or less padding on the right: the same rows at another width.

What a tensor is for is told by its name, as transformers' models name their inputs; what is not understood is refused,
for a padding that takes part in the loss would change what is asked.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finitune.engine.conditions import NotPossible

IGNORED = -100
"""Label of a position without loss."""

_IDS, _LABELS, _MASK, _POSITIONS, _ZEROS = "ids", "labels", "mask", "positions", "zeros"
_ROLES = {
    **dict.fromkeys(("input_ids", "ids", "tokens"), _IDS),
    **dict.fromkeys(("labels", "targets"), _LABELS),
    "attention_mask": _MASK,
    **dict.fromkeys(("position_ids", "positions"), _POSITIONS),
    **dict.fromkeys(("token_type_ids", "special_tokens_mask", "loss_mask", "loss_weights"), _ZEROS),
}
_ROWS_BY_TOKENS = 2
_ROWS_HEADS_QUERIES_KEYS = 4


def widen_batch(nest: Any, extra_padding: int, width: int | None = None, *, pad_id: int = 0) -> Any:
    """The nest with ``extra_padding`` more tokens of padding on the right of each row; negative: so many fewer.

    Args:
        nest: a dict, other mapping or dataclass of tensors by name (``input_ids``, ``labels``, ``attention_mask``,
            ``position_ids``, ...; a suffix like ``_BT`` is overlooked), or a list or tuple of such. Unchanged.
        extra_padding: tokens.
        width: tokens of a row now (dimension 1); by default that of the ids. Other tensors of two or more
            dimensions without that width, and those of one dimension, stay as they are.
        pad_id: id of a padding token.

    Shapes: (B, T) becomes (B, T + n), a mask (B, 1, T, T) becomes (B, 1, T + n, T + n). Ids get ``pad_id``, labels
    -100, masks 0, positions go on. In a 4-D mask nobody sees the new columns, and each new row sees itself alone (a row
    that sees nothing is a softmax over nothing).

    Raises:
        NotPossible: a tensor of that width with an unknown name, no ids or labels, a mask of an unknown form, or
            columns to be cut that are not padding.
    """
    if extra_padding == 0:
        return nest
    if isinstance(nest, list | tuple) and not hasattr(nest, "_fields"):
        return type(nest)(widen_batch(part, extra_padding, width, pad_id=pad_id) for part in nest)
    named = dict(_named(nest))
    roles = {key: _role(key) for key in named}
    width = width if width is not None else _width(named, roles)
    if not any(roles[k] == _LABELS and _is_wide(t, width) for k, t in named.items()):
        raise NotPossible("no labels of the width of the batch: padding might take part in the loss")
    concerned = {k: t for k, t in named.items() if _is_wide(t, width) or _is_square(t, width)}
    if extra_padding > 0:
        return _rebuilt(nest, {k: _padded(k, t, roles[k], extra_padding, pad_id) for k, t in concerned.items()})
    _check_padding(concerned, roles, width + extra_padding)
    return _rebuilt(nest, {k: _cut(t, roles[k], width + extra_padding) for k, t in concerned.items()})


def _named(nest: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(nest, Mapping):
        items = [(str(k), v) for k, v in nest.items()]
    elif dataclasses.is_dataclass(nest) and not isinstance(nest, type):
        items = [(f.name, getattr(nest, f.name)) for f in dataclasses.fields(nest)]
    elif hasattr(nest, "_asdict"):
        items = list(nest._asdict().items())
    else:
        raise NotPossible(f"a batch of {type(nest).__name__} has no names that say what its tensors are for")
    for name, value in items:
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, Mapping | list | tuple) and _holds_tensor(value):
            raise NotPossible(f"{name} is a nest of tensors; only tensors can be padded")


def _holds_tensor(nest: Any) -> bool:
    if isinstance(nest, Mapping):
        return any(_holds_tensor(v) for v in nest.values())
    if isinstance(nest, list | tuple):
        return any(_holds_tensor(v) for v in nest)
    return isinstance(nest, Tensor)


def _role(name: str) -> str | None:
    stem, _, suffix = name.rpartition("_")
    return _ROLES.get(stem if stem and suffix.isupper() else name)


def _width(named: Mapping[str, Tensor], roles: Mapping[str, str | None]) -> int:
    widths = {int(t.shape[1]) for k, t in named.items() if roles[k] == _IDS and t.dim() == _ROWS_BY_TOKENS}
    if len(widths) != 1:
        raise NotPossible(
            "no token ids of shape (rows, tokens) in the batch" if not widths else "ids of several widths"
        )
    return widths.pop()


def _is_wide(tensor: Tensor, width: int) -> bool:
    return tensor.dim() >= _ROWS_BY_TOKENS and tensor.shape[1] == width


def _is_square(tensor: Tensor, width: int) -> bool:
    return tensor.dim() >= _ROWS_BY_TOKENS and tuple(tensor.shape[-2:]) == (width, width)


def _padded(name: str, tensor: Tensor, role: str | None, extra: int, pad_id: int) -> Tensor:
    if role == _MASK and tensor.dim() == _ROWS_HEADS_QUERIES_KEYS:
        return _wider_square(name, tensor, extra)
    if role is None or tensor.dim() != _ROWS_BY_TOKENS:
        raise NotPossible(f"it is not known how to pad {name} of shape {tuple(tensor.shape)}")
    if role == _POSITIONS:
        further = torch.arange(1, extra + 1, dtype=tensor.dtype, device=tensor.device)
        return torch.cat([tensor, tensor[:, -1:] + further], dim=1)
    fill = {_IDS: pad_id, _LABELS: IGNORED}.get(role, 0)
    return F.pad(tensor, (0, extra), value=fill)


def _wider_square(name: str, mask_BHTT: Tensor, extra: int) -> Tensor:
    """New columns blocked, new rows open to themselves alone: True/False, or 0 and the lowest number."""
    if mask_BHTT.dtype == torch.bool:
        open_, blocked = 1.0, 0.0
    elif mask_BHTT.is_floating_point():
        open_, blocked = 0.0, torch.finfo(mask_BHTT.dtype).min
    else:
        raise NotPossible(f"{name} is 4-D and neither boolean nor floating")
    wider = F.pad(mask_BHTT, (0, extra, 0, extra), value=blocked)
    wider.diagonal(dim1=-2, dim2=-1)[..., -extra:] = open_
    return wider


def _check_padding(named: Mapping[str, Tensor], roles: Mapping[str, str | None], width: int) -> None:
    """Raise NotPossible unless a mask says that everything from column ``width`` on is padding without a label."""
    if width < 1:
        raise NotPossible("nothing would be left of the batch")
    masks = [t for k, t in named.items() if roles[k] == _MASK]
    if not masks:
        raise NotPossible("no attention mask says what is padding")
    if not all(_ends_in_padding(m, width) for m in masks):
        raise NotPossible(f"tokens from column {width} on are not all padding")
    labels = [t[:, width:] for k, t in named.items() if roles[k] == _LABELS]
    if any(bool((t != IGNORED).any()) for t in labels):
        raise NotPossible(f"there are labels from column {width} on")
    unknown = [k for k in named if roles[k] is None]
    if unknown:
        raise NotPossible(f"it is not known how to cut {', '.join(unknown)}")


def _ends_in_padding(mask: Tensor, width: int) -> bool:
    if mask.dim() == _ROWS_BY_TOKENS:
        return not bool(mask[:, width:].any())
    if mask.dim() != _ROWS_HEADS_QUERIES_KEYS:
        return False
    seen = mask[..., :width, width:]
    blocked = ~seen if mask.dtype == torch.bool else seen <= torch.finfo(mask.dtype).min
    return bool(blocked.all())


def _cut(tensor: Tensor, role: str | None, width: int) -> Tensor:
    if role == _MASK and tensor.dim() == _ROWS_HEADS_QUERIES_KEYS:
        return tensor[..., :width, :width].contiguous()
    return tensor[:, :width].contiguous()


def _rebuilt(nest: Any, changed: Mapping[str, Tensor]) -> Any:
    if type(nest) is dict:
        return {k: changed.get(str(k), v) for k, v in nest.items()}
    if isinstance(nest, MutableMapping):
        copied = copy.copy(nest)
        for key in list(nest):
            copied[key] = changed.get(str(key), nest[key])
        return copied
    if hasattr(nest, "_replace"):
        return nest._replace(**changed)
    if dataclasses.is_dataclass(nest) and not isinstance(nest, type):
        return dataclasses.replace(nest, **changed)
    raise NotPossible(f"a {type(nest).__name__} cannot be built anew")
