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
_EMPTY_ROWS = 12
_EMPTY_SHARE = 0.18
"""Of runs over data with one row in twenty empty, fewer than one in a thousand reaches both (simulated)."""
_ROWS = 2
"""Rows in which the stop token must be masked before it is said to be so: one may be cut off."""
Named = Sequence[tuple[str, Tensor]]


@torch.no_grad()
def of_batch(micros: Sequence[Named], model: nn.Module) -> tuple[Finding, ...]:
    """Everything that is wrong with the tensors of one step, given as one list of named tensors per micro-batch."""
    found: list[Finding] = []
    for named in micros:
        dense = [(n, t) for n, t in named if t.layout is torch.strided and not t.is_nested and t.numel()]
        found += [f for n, t in dense if t.is_floating_point() for f in _floating(n, t)]
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


def _floating(name: str, tensor: Tensor) -> Iterator[Finding]:
    low = name.lower()
    if any(m in low for m in _MASKS):
        yield from _blind(name, tensor)
        return
    bad = ~torch.isfinite(tensor)
    num_bad = int(bad.sum())
    if not num_bad:
        return
    index = _first(bad)
    rows = bad.reshape(bad.shape[0], -1).any(1).nonzero().flatten().tolist() if bad.dim() else []
    is_reward = any(r in low for r in _REWARDS)
    yield (REWARD_MISSING if is_reward else INPUT_NOT_FINITE).find(
        name,
        name=name,
        index=", ".join(map(str, index)),
        value=str(float(tensor[index])),
        bad=num_bad,
        total=tensor.numel(),
        row_numbers=", ".join(str(r + 1) for r in rows[:_SHOWN]) or "-",
        fault_class="K" if is_reward else "N",
    )


def _blind(name: str, mask: Tensor) -> Iterator[Finding]:
    """Rows of an additive mask (..., queries, keys) without any key; a finite minimum is none."""
    if mask.dim() < 3:
        return
    blind = (mask == -math.inf).all(-1)
    if bool(blind.any()):
        index = ", ".join(map(str, _first(blind)))
        yield BLIND_ROW.find(name, name=name, count=int(blind.sum()), index=index, fault_class="E")


def _first(mask: Tensor) -> tuple[int, ...]:
    flat = torch.tensor(int(mask.reshape(-1).to(torch.uint8).argmax()))
    return tuple(int(i) for i in torch.unravel_index(flat, mask.shape))


# -- rows without a target -------------------------------------------------------------------------------------------


class Targets:
    """Counts rows without any supervised token over the steps of a run, and says so once.

    A few are harmless, and a single batch tells nothing: up to one row in twenty may be empty in good data.
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
            labels_BT = _last_named(named, "labels")
            if labels_BT is not None and labels_BT.dim() == 2 and not labels_BT.is_floating_point():
                self.num_rows += int(labels_BT.shape[0])
                self.num_empty += int((labels_BT == IGNORED).all(1).sum())
        if self.num_empty < _EMPTY_ROWS or self.num_empty < _EMPTY_SHARE * self.num_rows:
            return ()
        self._told = True
        share = 100.0 * self.num_empty / self.num_rows
        return (
            EMPTY_ROWS.find("labels", num_empty=self.num_empty, num_rows=self.num_rows, percent=share, fault_class="A"),
        )


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
