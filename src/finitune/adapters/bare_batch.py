"""Nests of tensors whose first dimension is rows: what they hold, parts of them, and the content hash of a row.

A nest is a tensor, or a mapping, list, tuple, named tuple or dataclass of nests; None, numbers and strings may stand in
it. Anything else is passed on to the loss function as it is, but a batch with it cannot be taken apart.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from finitune.engine.conditions import NotPossible

IGNORED = -100
"""Label of a position without loss."""
_DIGEST_CHARS = 12
_WIDE = 2
_PLAIN = (str, bytes, bool, int, float, complex, type(None))
_LABELS = ("labels", "targets")
_IDS = ("input_ids", "ids", "tokens")
_STAY = ("attention_mask", "position_ids", "positions", "token_type_ids")

SplitRows = Callable[[Any, Sequence[int]], Any]
"""``split_rows(batch, indices)``: a batch of those rows in that order; an index may come up more than once."""


def leaves(nest: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in a nest that is no container, with its path, in order."""
    if not is_container(nest):
        yield name, nest
        return
    parts = _parts(nest)
    if parts is None:
        yield name, nest
        return
    for key, part in parts:
        yield from leaves(part, f"{name}.{key}" if name else str(key))


def is_container(nest: Any) -> bool:
    """Whether it may be a batch of its own: neither a tensor nor a plain value."""
    return not isinstance(nest, (Tensor, *_PLAIN))


def _parts(nest: Any) -> list[tuple[Any, Any]] | None:
    """Keys and members of a container; None where it is none that is known."""
    if isinstance(nest, Mapping):
        return list(nest.items())
    if _is_named_tuple(nest):
        return list(nest._asdict().items())
    if isinstance(nest, list | tuple):
        return list(enumerate(nest))
    if dataclasses.is_dataclass(nest) and not isinstance(nest, type):
        return [(f.name, getattr(nest, f.name)) for f in dataclasses.fields(nest) if f.init]
    return None


def _is_named_tuple(nest: Any) -> bool:
    return isinstance(nest, tuple) and hasattr(nest, "_asdict") and hasattr(nest, "_replace")


def mapped(change: Callable[[str, Any], Any], nest: Any, name: str = "") -> Any:
    """A nest of the same kind with ``change(path, leaf)`` in the place of every leaf."""
    parts = members(nest)
    if parts is None:
        return change(name, nest)
    new = {key: mapped(change, part, f"{name}.{key}" if name else str(key)) for key, part in parts}
    return rebuilt(nest, new)


def members(nest: Any) -> list[tuple[Any, Any]] | None:
    """Keys and parts of a container; None for what is none."""
    return _parts(nest) if is_container(nest) else None


def rebuilt(nest: Any, new: dict[Any, Any]) -> Any:
    """A container of the same kind with other parts, by the same keys."""
    if type(nest) is dict:
        return new
    if isinstance(nest, Mapping):
        copied: Any = copy.copy(nest)
        for key, value in new.items():
            copied[key] = value
        return copied
    if _is_named_tuple(nest):
        return nest._replace(**new)
    if isinstance(nest, list | tuple):
        return type(nest)(new.values())
    return dataclasses.replace(nest, **new)


def plain(nest: Any) -> Any:
    """The same with dicts in the place of named tuples, dataclasses and mappings of other kinds; the rest as it is."""
    parts = members(nest)
    if parts is None:
        return nest
    if type(nest) in (list, tuple):
        return type(nest)(plain(part) for _, part in parts)
    return {key: plain(part) for key, part in parts}


def tensors(nest: Any) -> list[Tensor]:
    """All tensors of a nest, in order."""
    return [leaf for _, leaf in leaves(nest) if isinstance(leaf, Tensor)]


def num_bytes(nest: Any) -> int:
    """Memory that the tensors take; sparse and nested ones do not tell and are left out."""
    return sum(t.numel() * t.element_size() for t in tensors(nest) if _is_dense(t))


def _is_dense(leaf: Any) -> bool:
    """Whether it is a tensor with a shape and one stride for each dimension."""
    return isinstance(leaf, Tensor) and not leaf.is_nested and leaf.layout is torch.strided


def foreign(nest: Any) -> list[str]:
    """Places in a nest with something in it that is neither tensor nor plain value."""
    return [f"{n or 'batch'} ({type(x).__name__})" for n, x in leaves(nest) if is_container(x)]


# -- rows ----------------------------------------------------------------------------------------------------------


def num_rows(nest: Any) -> int:
    """Rows of a batch: the first dimension of its ids or labels; without these, the most common first dimension.

    Raises NotPossible where no tensor has a dimension.
    """
    sized = [(n, t) for n, t in leaves(nest) if _is_dense(t) and t.dim() > 0]
    if not sized:
        raise NotPossible("no tensor of the batch has a first dimension")
    named = [t for n, t in sized if _stem(n) in (*_IDS, *_LABELS)]
    if named:
        return int(named[0].shape[0])
    return Counter(int(t.shape[0]) for _, t in sized).most_common(1)[0][0]


def _stem(path: str) -> str:
    """The last name of a path, in lower case, without a suffix like ``_BT``."""
    last = path.rpartition(".")[2]
    head, _, suffix = last.rpartition("_")
    return (head if head and suffix.isupper() else last).lower()


def picked(nest: Any, rows: Sequence[int], split_rows: SplitRows | None = None) -> Any:
    """The batch of these rows in this order. Tensors of another first dimension stay as they are.

    Raises NotPossible for a batch that holds things nobody knows how to split.
    """
    if split_rows is not None:
        return split_rows(nest, list(rows))
    strange = foreign(nest)
    if strange:
        raise NotPossible(f"the batch holds {', '.join(strange[:3])}: say how to split it with split_rows=")
    count = num_rows(nest)

    def chosen(_: str, leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and not _is_dense(leaf):
            raise NotPossible("a sparse or nested tensor has no rows to choose from: say how with split_rows=")
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != count:
            return leaf
        return leaf[torch.as_tensor(list(rows), dtype=torch.long, device=leaf.device)]

    return mapped(chosen, _lists_picked(nest, rows, count))


def _lists_picked(nest: Any, rows: Sequence[int], count: int) -> Any:
    """Lists of plain values, one for each row (names, texts), go with their rows."""
    if isinstance(nest, Mapping):
        return rebuilt(nest, {k: _lists_picked(v, rows, count) for k, v in nest.items()})
    if isinstance(nest, list) and len(nest) == count and all(isinstance(x, _PLAIN) for x in nest):
        return [nest[i] for i in rows]
    return nest


def filled(kept: Sequence[int], count: int) -> list[int]:
    """``count`` row numbers: each kept one at its own place, copies of them in turn everywhere else."""
    places = set(kept)
    order, missing = sorted(places), iter(range(count))
    return [i if i in places else order[next(missing) % len(order)] for i in range(count)]


# -- tokens --------------------------------------------------------------------------------------------------------


def num_supervised(nest: Any) -> int | None:
    """Labels that count in the loss (not -100); None where the batch has no labels."""
    found = [t for n, t in leaves(nest) if _is_labels(n, t)]
    return int(sum((t != IGNORED).sum() for t in found)) if found else None


def _is_labels(name: str, leaf: Any) -> bool:
    return _is_dense(leaf) and not leaf.is_floating_point() and _stem(name) == "labels"


def num_tokens(nest: Any) -> int:
    """Tokens that are not padding; 0 where the batch has no ids."""
    masks = [t for n, t in leaves(nest) if _is_dense(t) and _stem(n) == "attention_mask" and t.dim() == _WIDE]
    if masks:
        return int(sum((t != 0).sum() for t in masks))
    return sum(t.numel() for n, t in leaves(nest) if _is_dense(t) and _stem(n) in _IDS)


def width(nest: Any) -> int:
    """Tokens of a row: the longest second dimension of ids and labels, or of all tensors; 0 where none has one."""
    wide = [(n, t) for n, t in leaves(nest) if _is_dense(t) and t.dim() >= _WIDE]
    named = [t for n, t in wide if _stem(n) in (*_IDS, *_LABELS)]
    return max((int(t.shape[1]) for t in named or [t for _, t in wide]), default=0)


def beginning(nest: Any, num_first: int) -> Any:
    """The batch in which only the first tokens of a row carry content; shapes, masks and positions stay.

    Labels after them are -100; other tensors of that width repeat what stands at the last of them. Raises NotPossible
    without labels: the rest would still be in the loss.
    """
    if not any(_stem(n) in _LABELS and _is_dense(t) and t.dim() >= _WIDE for n, t in leaves(nest)):
        raise NotPossible("no labels by token in the batch: the loss of the other tokens cannot be left out")
    if num_first < 1:
        raise NotPossible(f"a row of {num_first} tokens")
    tokens = width(nest)

    def cut(name: str, leaf: Any) -> Any:
        if not _is_dense(leaf) or leaf.dim() < _WIDE or leaf.shape[1] != tokens or _stem(name) in _STAY:
            return leaf
        late_T = torch.arange(tokens, device=leaf.device) >= num_first
        late = late_T.view(1, -1, *[1] * (leaf.dim() - _WIDE))
        if _stem(name) in _LABELS:
            return torch.where(late, torch.full((), IGNORED, dtype=leaf.dtype, device=leaf.device), leaf)
        return torch.where(late, leaf[:, num_first - 1 : num_first], leaf) if num_first < tokens else leaf

    return mapped(cut, nest)


# -- names of rows -------------------------------------------------------------------------------------------------


def row_digests(nest: Any) -> list[str]:
    """12 hex digits of SHA-256 for each row: names, dtypes and contents. Padding does not count where a mask shows it.

    Raises NotPossible where the batch holds things that have no content to hash.
    """
    strange = foreign(nest)
    if strange:
        raise NotPossible(f"the batch holds {', '.join(strange[:3])}: rows have no content hash; give row_ids=")
    count = num_rows(nest)
    hosted = [(n, _host(t)) for n, t in leaves(nest) if isinstance(t, Tensor)]
    columns = [(n, t) for n, t in hosted if t.dim() > 0 and t.shape[0] == count]
    masks = [t for n, t in columns if _stem(n) == "attention_mask" and t.dim() == _WIDE]
    mask_BT = masks[0] != 0 if masks else None
    lists = [(n, part) for n, part in _plain_lists(nest) if len(part) == count]
    return [_row_digest(row, columns, mask_BT, lists) for row in range(count)]


def _host(tensor: Tensor) -> Tensor:
    if not _is_dense(tensor):
        raise NotPossible("a sparse or nested tensor has no rows to hash; give row_ids=")
    return tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous()


def _plain_lists(nest: Any) -> list[tuple[str, list[Any]]]:
    if not isinstance(nest, Mapping):
        return []
    return [(str(k), v) for k, v in nest.items() if isinstance(v, list) and all(isinstance(x, _PLAIN) for x in v)]


def _row_digest(
    row: int,
    columns: Sequence[tuple[str, Tensor]],
    mask_BT: Tensor | None,
    lists: Sequence[tuple[str, Sequence[Any]]],
) -> str:
    content = hashlib.sha256()
    for name, tensor in columns:
        value = tensor[row]
        if mask_BT is not None and tensor.dim() >= _WIDE and tensor.shape[:2] == mask_BT.shape:
            value = value[mask_BT[row]]
        content.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        content.update(value.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    for name, values in lists:
        content.update(f"{name}|{values[row]!r}|".encode())
    return content.hexdigest()[:_DIGEST_CHARS]
