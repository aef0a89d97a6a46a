"""Token rows to tensors.

Shapes: B rows (or packed sequences), T tokens of the longest of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from finitune.core.types import RowId
from finitune.data.records import Encoded

IGNORED = -100
"""Label of a position without loss (the convention of torch's cross entropy)."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch."""

    ids_BT: torch.Tensor
    """int64."""
    labels_BT: torch.Tensor
    """int64, not shifted: the target id AT position t, predicted from t-1; -100 = no loss."""
    attention_mask: torch.Tensor | None
    """None: no padding. (B, T) int64 with 1 for a token: padded. (B, 1, T, T) bool, True = may attend: packed."""
    position_ids_BT: torch.Tensor | None
    """int64, from 0 in each document; set when packed."""
    row_ids: tuple[RowId, ...]
    num_tokens: int
    """Tokens that are not padding."""
    num_supervised: int
    """Labels other than -100. The first token of a row or packed document never is one."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        mask, positions = self.attention_mask, self.position_ids_BT
        return replace(
            self,
            ids_BT=self.ids_BT.to(device),
            labels_BT=self.labels_BT.to(device),
            attention_mask=None if mask is None else mask.to(device),
            position_ids_BT=None if positions is None else positions.to(device),
        )


def collate(rows: Sequence[Encoded], pad_id: int) -> Batch:
    """Rows padded on the right to the longest of them."""
    ids_BT, labels_BT, lengths_B = _padded([r.ids for r in rows], [_labels(r) for r in rows], pad_id)
    mask_BT = np.arange(ids_BT.shape[1])[None, :] < lengths_B[:, None]
    mask = None if mask_BT.all() else torch.from_numpy(mask_BT.astype(np.int64))
    return _batch(ids_BT, labels_BT, mask, None, rows)


def collate_packed(bins: Sequence[Sequence[Encoded]], pad_id: int) -> Batch:
    """Each bin's rows one after the other in one sequence, blind to each other.

    Positions restart at 0 with each row, and attention is causal inside a row and nowhere else. A padding
    position attends to itself alone: an attention row without any True is a softmax over nothing (NaN).
    """
    ids = [np.concatenate([r.ids for r in rows]) for rows in bins]
    labels = [np.concatenate([_labels(r) for r in rows]) for rows in bins]
    ids_BT, labels_BT, _ = _padded(ids, labels, pad_id)
    width = ids_BT.shape[1]
    documents_BT = np.stack([_documents(rows, width) for rows in bins])
    positions_BT = np.stack([_positions(rows, width) for rows in bins])
    same_BTT = documents_BT[:, :, None] == documents_BT[:, None, :]
    mask_BTT = same_BTT & np.tri(width, dtype=bool)[None]
    flat = [row for rows in bins for row in rows]
    mask = torch.from_numpy(mask_BTT[:, None])
    return _batch(ids_BT, labels_BT, mask, torch.from_numpy(positions_BT), flat)


def additive_mask(mask_B1TT: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A boolean attention mask as numbers to add to attention scores: 0, or the lowest finite number of ``dtype``.

    Transformers hands a 4-D mask to the model as it is. Its "sdpa" attention takes booleans; its "eager"
    attention adds the mask to the scores, where True would count as 1 and False as 0: no mask at all.
    """
    zero = torch.zeros((), dtype=dtype, device=mask_B1TT.device)
    lowest = torch.full_like(zero, torch.finfo(dtype).min)
    return torch.where(mask_B1TT, zero, lowest)


def _labels(row: Encoded) -> np.ndarray:
    """int64 (T,): ids where supervised, else -100; never at the first token, which nothing in the row predicts."""
    labels = np.where(row.supervised, row.ids.astype(np.int64), IGNORED)
    labels[:1] = IGNORED
    return labels


def _padded(
    ids: Sequence[np.ndarray], labels: Sequence[np.ndarray], pad_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    lengths_B = np.array([len(i) for i in ids])
    shape = (len(ids), int(lengths_B.max()))
    ids_BT = np.full(shape, pad_id, dtype=np.int64)
    labels_BT = np.full(shape, IGNORED, dtype=np.int64)
    for b, (row_ids, row_labels) in enumerate(zip(ids, labels, strict=True)):
        ids_BT[b, : len(row_ids)] = row_ids
        labels_BT[b, : len(row_labels)] = row_labels
    return ids_BT, labels_BT, lengths_B


def _documents(rows: Sequence[Encoded], width: int) -> np.ndarray:
    """int64 (T,): number of the row at each position; each padding position is a document of its own."""
    numbers = np.repeat(np.arange(len(rows)), [len(r) for r in rows])
    return np.concatenate([numbers, len(rows) + np.arange(width - len(numbers))])


def _positions(rows: Sequence[Encoded], width: int) -> np.ndarray:
    """int64 (T,): position inside the row; 0 for padding."""
    positions = np.concatenate([np.arange(len(r), dtype=np.int64) for r in rows])
    return np.concatenate([positions, np.zeros(width - len(positions), dtype=np.int64)])


def _batch(
    ids_BT: np.ndarray,
    labels_BT: np.ndarray,
    mask: torch.Tensor | None,
    positions: torch.Tensor | None,
    rows: Sequence[Encoded],
) -> Batch:
    return Batch(
        ids_BT=torch.from_numpy(ids_BT),
        labels_BT=torch.from_numpy(labels_BT),
        attention_mask=mask,
        position_ids_BT=positions,
        row_ids=tuple(r.id for r in rows),
        num_tokens=sum(len(r) for r in rows),
        num_supervised=int((labels_BT != IGNORED).sum()),
    )
