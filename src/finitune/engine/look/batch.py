"""The look at the first batch: what its tensors hold, before anything is computed from them.

A batch is seen as named tensors, whatever nest they came in: ``[("input_ids", ids_BT), ("labels", labels_BT), ...]``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from finitune.core.types import Finding
from finitune.engine.look.codes_step import BLIND_ROW, EMPTY_ROWS, INPUT_NOT_FINITE, REWARD_MISSING, STOP_MASKED

IGNORED = -100
"""Label of a token that does not count in the loss (torch.nn.CrossEntropyLoss)."""
_SHOWN = 8
_REWARDS = ("reward", "advantage", "score")
_MASKS = ("mask", "bias")
_MASK_DIMS = 4
"""Rows, heads, queries, keys."""
_EMPTY_ROWS = 12
"""Fewer tell nothing of the data, however soon they come up."""
_USUAL_SHARE = 0.05
"""Up to one row in twenty is empty in good data."""
_DOUBT = 0.01
"""Of runs whose rows are empty with the usual share, at most so many are ever told of it."""
_ROWS = 2
"""Rows in which the stop token must be masked before it is said to be so: one may be cut off."""
Named = Sequence[tuple[str, Tensor]]


@torch.no_grad()
def of_batch(micros: Sequence[Named], model: nn.Module) -> tuple[Finding, ...]:
    """Everything that is wrong with the tensors of one step, given as one list of named tensors per micro-batch."""
    found: list[Finding] = []
    for micro, named in enumerate(micros):
        dense = [(n, t) for n, t in named if t.layout is torch.strided and not t.is_nested and t.numel()]
        found += [f for n, t in dense if t.is_floating_point() for f in _floating(n, t, micro)]
    found += _stop_masked(micros, stop_ids(model))
    return tuple(found)


def stop_ids(model: nn.Module) -> frozenset[int]:
    """Tokens that end an answer, of the generation config and of the config: they need not agree."""
    found = set[int]()
    for holder in ("generation_config", "config"):
        given: Any = getattr(getattr(model, holder, None), "eos_token_id", None)
        ids = given if isinstance(given, list | tuple) else [given]
        found |= {i for i in ids if isinstance(i, int) and not isinstance(i, bool)}
    return frozenset(found)


# -- numbers ---------------------------------------------------------------------------------------------------------


def _floating(name: str, tensor: Tensor, micro: int) -> Iterator[Finding]:
    low = name.lower()
    if any(m in low for m in _MASKS):
        yield from _blind(name, tensor, micro)
        return
    bad = ~torch.isfinite(tensor)
    num_bad = int(bad.sum())
    if not num_bad:
        return
    index = _first(bad)
    rows = _rows_with(bad)
    is_reward = any(r in low for r in _REWARDS)
    yield (REWARD_MISSING if is_reward else INPUT_NOT_FINITE).find(
        name,
        name=name,
        index=", ".join(map(str, index)),
        value=str(float(tensor[index])),
        bad=num_bad,
        total=tensor.numel(),
        row_numbers=", ".join(str(r + 1) for r in rows[:_SHOWN]) or "-",
        micro=micro,
        row_indices=rows[:_SHOWN],
        fault_class="K" if is_reward else "N",
    )


def _rows_with(bad: Tensor) -> list[int]:
    """Numbers (from 0) of the rows in which anything is set."""
    return bad.reshape(bad.shape[0], -1).any(1).nonzero().flatten().tolist() if bad.dim() else []


def _blind(name: str, mask: Tensor, micro: int) -> Iterator[Finding]:
    """Rows of an additive mask (..., queries, keys) without any key; a finite minimum is none."""
    if mask.dim() < 3:
        return
    blind = (mask == -math.inf).all(-1)
    if bool(blind.any()):
        index = ", ".join(map(str, _first(blind)))
        # A mask of one row is that of all rows of its micro-batch.
        rows = _rows_with(blind)[:_SHOWN] if mask.dim() == _MASK_DIMS and mask.shape[0] > 1 else []
        place: dict[str, Any] = {"micro": micro, "row_indices": rows}
        yield BLIND_ROW.find(name, name=name, count=int(blind.sum()), index=index, fault_class="E", **place)


def _first(mask: Tensor) -> tuple[int, ...]:
    flat = torch.tensor(int(mask.reshape(-1).to(torch.uint8).argmax()))
    return tuple(int(i) for i in torch.unravel_index(flat, mask.shape))


# -- rows without a target -------------------------------------------------------------------------------------------


class Targets:
    """Counts rows without any supervised token over the steps of a run, and says so once.

    A few are harmless, and a single batch tells nothing. The share is told once it is certain that it is larger than
    in good data: by the sequential test of Robbins (1970, "Statistical methods related to the law of the iterated
    logarithm", with a uniform prior), which may be looked at after every row: Ville's inequality bounds its error.
    """

    def __init__(self) -> None:
        self.num_rows = self.num_empty = 0
        self._told = False

    @torch.no_grad()
    def add(self, micros: Sequence[Named]) -> tuple[Finding, ...]:
        """Take one step into account; DAT114 the first time that too many rows were empty, else nothing."""
        if self._told:
            return ()
        for named in micros:
            empty_B = rows_without_target(named)
            if empty_B is not None:
                self.num_rows += len(empty_B)
                self.num_empty += int(empty_B.sum())
        if not self._are_many():
            return ()
        self._told = True
        share = 100.0 * self.num_empty / self.num_rows
        return (
            EMPTY_ROWS.find("labels", num_empty=self.num_empty, num_rows=self.num_rows, percent=share, fault_class="A"),
        )

    def _are_many(self) -> bool:
        empty, rows, usual = self.num_empty, self.num_rows, _USUAL_SHARE
        if empty < _EMPTY_ROWS or empty <= usual * rows:
            return False
        # log of the integral over p of p^empty (1 - p)^full, over the same at the usual share.
        log_any = math.lgamma(empty + 1) + math.lgamma(rows - empty + 1) - math.lgamma(rows + 2)
        return log_any - empty * math.log(usual) - (rows - empty) * math.log1p(-usual) >= -math.log(_DOUBT)


def rows_without_target(named: Named) -> Tensor | None:
    """Which rows of a micro-batch have no supervised token, (B,) bool; None where it has no labels by token."""
    labels_BT = _last_named(named, "labels")
    if labels_BT is None or labels_BT.dim() != 2 or labels_BT.is_floating_point():
        return None
    return (labels_BT == IGNORED).all(1)


# -- the stop token --------------------------------------------------------------------------------------------------


def _stop_masked(micros: Sequence[Named], stops: frozenset[int]) -> list[Finding]:
    """DAT112 where stop tokens follow what is supervised, and not one of them is supervised itself."""
    if not stops:
        return []
    rows = followed = 0
    for named in micros:
        ids_BT, labels_BT = _last_named(named, "input_ids"), _last_named(named, "labels")
        if ids_BT is None or labels_BT is None or ids_BT.shape != labels_BT.shape or ids_BT.dim() != 2:
            continue
        stop_BT = torch.isin(ids_BT, torch.tensor(sorted(stops), device=ids_BT.device))
        taught_BT = labels_BT != IGNORED
        if bool((stop_BT & taught_BT).any()):
            return []
        rows += int(taught_BT.any(1).sum())
        followed += _followed(stop_BT, taught_BT)
    if followed < _ROWS or 2 * followed < rows:
        return []
    told = ", ".join(map(str, sorted(stops)))
    return [STOP_MASKED.find("labels", num_rows=rows, followed=followed, stop=told, fault_class="P")]


def _followed(stop_BT: Tensor, taught_BT: Tensor) -> int:
    """Rows whose last supervised token is followed by a stop token."""
    width = taught_BT.shape[1]
    last_B = width - 1 - taught_BT.flip(1).to(torch.uint8).argmax(1)
    inside_B = taught_BT.any(1) & (last_B + 1 < width)
    next_B = stop_BT.gather(1, (last_B + 1).clamp(max=width - 1).unsqueeze(1)).squeeze(1)
    return int((inside_B & next_B).sum())


def _last_named(named: Named, name: str) -> Tensor | None:
    """The tensor of this name, wherever in the nest it was."""
    return next((t for n, t in named if n.rpartition(".")[2] == name), None)
