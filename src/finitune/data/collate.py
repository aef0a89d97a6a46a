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
# A padding mask is (B, T); a packed batch carries (B, 1, T, T).
_PADDING_DIMENSIONS = 2
# One token to predict, and one to predict it from.
_LEAST_WIDTH = 2


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

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that are there, by name."""
        named = {
            "ids_BT": self.ids_BT,
            "labels_BT": self.labels_BT,
            "attention_mask": self.attention_mask,
            "position_ids_BT": self.position_ids_BT,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

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


def chosen(batch: Batch, places: Sequence[int], rows: Sequence[RowId]) -> Batch:
    """Only the sequences at ``places`` (along the first dimension), of which ``rows`` are the rows.

    The other places hold copies of them in turn, with their targets: shapes, padding width and mask stay.
    """
    kept = sorted(set(places))
    missing = iter(range(len(batch.ids_BT)))
    index_B = torch.tensor([b if b in kept else kept[next(missing) % len(kept)] for b in range(len(batch.ids_BT))])
    mask, positions = batch.attention_mask, batch.position_ids_BT
    return _recounted(
        replace(
            batch,
            ids_BT=batch.ids_BT[index_B],
            labels_BT=batch.labels_BT[index_B],
            attention_mask=None if mask is None else mask[index_B],
            position_ids_BT=None if positions is None else positions[index_B],
            row_ids=tuple(rows),
        )
    )


def beginning(batch: Batch, num_tokens: int, pad_id: int) -> Batch:
    """Only the first tokens of each row carry content: after them come padding tokens without a target.

    Width and mask stay: in a causal model no position sees what comes after it.
    """
    positions = batch.position_ids_BT
    if positions is None:
        positions = torch.arange(batch.ids_BT.shape[1]).expand_as(batch.ids_BT)
    late_BT = positions >= num_tokens
    ids_BT = torch.where(late_BT, pad_id, batch.ids_BT)
    return _recounted(replace(batch, ids_BT=ids_BT, labels_BT=torch.where(late_BT, IGNORED, batch.labels_BT)))


def widened(batch: Batch, extra_tokens: int, pad_id: int) -> Batch:
    """The batch with so many more columns of padding on the right; negative: with columns cut off there.

    Raises ValueError where fewer than two columns would be left.
    """
    width = batch.ids_BT.shape[1] + extra_tokens
    if width < _LEAST_WIDTH:
        raise ValueError(f"a width of {batch.ids_BT.shape[1]} tokens cannot be cut by {-extra_tokens}")
    pad = torch.nn.functional.pad
    mask, positions = batch.attention_mask, batch.position_ids_BT
    if mask is None and extra_tokens > 0:
        mask = torch.ones_like(batch.ids_BT)
    if mask is not None and mask.dim() == _PADDING_DIMENSIONS:
        mask = pad(mask, (0, extra_tokens))
    elif mask is not None:
        # A padding position attends to itself alone, as in collate_packed.
        itself_TT = torch.eye(width, dtype=torch.bool)
        itself_TT[: batch.ids_BT.shape[1]] = False
        mask = pad(mask, (0, extra_tokens, 0, extra_tokens)) | itself_TT
    return _recounted(
        replace(
            batch,
            ids_BT=pad(batch.ids_BT, (0, extra_tokens), value=pad_id),
            labels_BT=pad(batch.labels_BT, (0, extra_tokens), value=IGNORED),
            attention_mask=mask,
            position_ids_BT=None if positions is None else pad(positions, (0, extra_tokens)),
        )
    )


def _recounted(batch: Batch) -> Batch:
    """With the counts of what is there now.

    In a packed batch each row has one position 0, and so has each position of padding.
    """
    mask, positions = batch.attention_mask, batch.position_ids_BT
    if positions is not None:
        num_tokens = int((positions > 0).sum()) + len(batch.row_ids)
    else:
        num_tokens = batch.ids_BT.numel() if mask is None else int(mask.sum())
    return replace(batch, num_tokens=num_tokens, num_supervised=int((batch.labels_BT[:, 1:] != IGNORED).sum()))


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
