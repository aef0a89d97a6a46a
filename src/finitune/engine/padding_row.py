"""The row of an embedding that belongs to the padding token: what it holds is never read on purpose.

Masks give padding the weight 0, but 0 x NaN is NaN: a bad row there spoils every batch with padding, and any finite
value in its place is as good as another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from finitune.engine.conditions import NotPossible
from finitune.engine.port import ReplayPort

_WIDE = 2


def padding_row(port: ReplayPort, tensor: torch.Tensor, rows: Any, num_rows: Any) -> int | None:
    """The padding token, where its row is the only bad one of an embedding (or of a head tied to it); else None."""
    if num_rows != 1 or not isinstance(rows, list):
        return None
    tables = [m for m in port.model.modules() if isinstance(m, nn.Embedding) and _is_same(m.weight, tensor)]
    row = int(rows[0])
    return row if tables and row in _paddings(port, tables) and not _is_read(port, row) else None


def _is_same(weight: torch.Tensor, tensor: torch.Tensor) -> bool:
    return weight.untyped_storage()._cdata == tensor.untyped_storage()._cdata and weight.shape == tensor.shape


def _paddings(port: ReplayPort, tables: list[nn.Embedding]) -> set[int]:
    """Ids of padding tokens: as table and config say; where neither does, what stands at every masked place."""
    config = getattr(port.model, "config", None)
    told = {m.padding_idx for m in tables} | {getattr(config, "pad_token_id", None)}
    known = {i for i in told if isinstance(i, int)}
    if known:
        return known
    masked = {int(i) for ids, mask in _masked_ids(port) for i in ids[~mask].unique().tolist()}
    return masked if len(masked) == 1 else set()


def _is_read(port: ReplayPort, token: int) -> bool:
    """The token stands at a place of the batch that is no padding: a model may pad with a token that it uses."""
    return any(bool((ids[mask] == token).any()) for ids, mask in _masked_ids(port))


def _masked_ids(port: ReplayPort) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(token ids, which of them are no padding), both (rows, tokens), of each micro-batch that has a mask."""
    try:
        batch = port.batch()
    except NotPossible:
        return
    for micro in batch:
        tensors = [t for t in micro.values() if isinstance(t, torch.Tensor)] if isinstance(micro, Mapping) else []
        named = {k: v for k, v in micro.items() if isinstance(v, torch.Tensor)} if tensors else {}
        ids, mask = _first(named, ("input_ids", "ids")), _first(named, ("attention_mask",))
        if ids is not None and mask is not None and ids.shape == mask.shape and ids.dim() == _WIDE:
            yield ids, mask.bool()


def _first(named: Mapping[Any, torch.Tensor], stems: tuple[str, ...]) -> torch.Tensor | None:
    """The tensor of that name, with or without a suffix for its shape (``ids_BT``)."""
    return next((t for k, t in named.items() if any(str(k) == s or str(k).startswith(f"{s}_") for s in stems)), None)
