"""Which rows make which step: a pure function of (data set, settings, seed, epoch), with an exact cursor.

The loader holds no position. ``at(cursor)`` gives the same batches whenever and however often it is asked, so a
step can be replayed by its number, and a resumed run goes on exactly where it was.

An epoch is laid out as
    order      a permutation of all rows, PCG64 seeded by (seed, epoch)
    sequences  single rows, or (packing) bins of rows
    micros     ``batch_size`` sequences each; with ``group_by_length`` of similar length
    steps      ``accumulation`` micros each; the last step may hold fewer
and every row is in exactly one micro-batch of it (with ``drop_last``, in at most one).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from finitune.core.errors import UserError, raise_all
from finitune.core.types import RowId
from finitune.data.codes import BAD_SETTING, NO_STEP
from finitune.data.collate import Batch, collate, collate_packed
from finitune.data.dataset import Dataset
from finitune.data.pack import pack

# Rows are sorted by length inside chunks of this many micro-batches: long enough to even out lengths, short
# enough to keep the order random (Hugging Face's LengthGroupedSampler uses 50 as well).
_CHUNK_MICROS = 50

Rows = tuple[int, ...]
Micro = tuple[Rows, ...]
Step = tuple[Micro, ...]


@dataclass(frozen=True, slots=True, order=True)
class Cursor:
    """A place in the data: the step to be taken next."""

    epoch: int = 0
    step: int = 0
    """Step within the epoch, from 0."""

    def to_json(self) -> dict[str, int]:
        """A JSON-able record."""
        return {"epoch": self.epoch, "step": self.step}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Cursor:
        """Inverse of :meth:`to_json`."""
        return cls(int(record["epoch"]), int(record["step"]))


@dataclass(frozen=True)
class LoaderConfig:
    """How rows become steps."""

    batch_size: int = 1
    """Sequences per micro-batch."""
    accumulation: int = 1
    """Micro-batches per step."""
    seed: int = 0
    group_by_length: bool = True
    """Put rows of similar length together, so that less is padding. Without effect when packing."""
    packing: bool = False
    """Put several rows into one sequence of at most ``max_length`` tokens."""
    max_length: int = 1024
    """Longest packed sequence in tokens."""
    pad_id: int = 0
    drop_last: bool = False
    """Leave out the micro-batch and the step at the end of an epoch that are not full."""

    def faults(self) -> list[UserError]:
        """All settings that cannot be."""
        values = {"batch_size": self.batch_size, "accumulation": self.accumulation, "max_length": self.max_length}
        return [
            UserError(BAD_SETTING, name, name=name, value=value, expected=">= 1")
            for name, value in values.items()
            if not value >= 1
        ]


class Loader:
    """Steps of batches by cursor; see the module docstring."""

    def __init__(self, dataset: Dataset, config: LoaderConfig) -> None:
        """Raises UserError: impossible settings; an epoch without a step."""
        raise_all(config.faults())
        self.dataset, self.config = dataset, config
        # Only a memory of the last plans: they are recomputed, equal, when they have been forgotten.
        self._plan = lru_cache(maxsize=2)(self._make_plan)
        if not self._plan(0):
            sizes = {"batch_size": config.batch_size, "accumulation": config.accumulation}
            raise UserError(NO_STEP, "drop_last", num_rows=len(dataset), **sizes)

    def steps_per_epoch(self, epoch: int) -> int:
        """Number of steps of an epoch (with packing it varies by epoch)."""
        return len(self._plan(epoch))

    def plan(self, epoch: int) -> tuple[Step, ...]:
        """Row numbers of every step: steps of micro-batches of sequences of rows."""
        return self._plan(epoch)

    def at(self, cursor: Cursor, *, without: Collection[str] = ()) -> tuple[Batch, ...]:
        """The micro-batches of a step.

        Rows whose content hash is in ``without`` are left out; a micro-batch that has no other rows vanishes, and so
        may all of them. All other rows stay where they were: the plan of an epoch does not know of it.

        Raises:
            IndexError: the epoch has no such step.
        """
        return tuple(self._collate(micro) for micro in self._step(cursor, without))

    def layout(self, cursor: Cursor, *, without: Collection[str] = ()) -> tuple[tuple[tuple[RowId, ...], ...], ...]:
        """The row ids of each sequence of each micro-batch of a step; builds no tensors."""
        rows = self.dataset.rows
        return tuple(tuple(tuple(rows[i].id for i in s) for s in micro) for micro in self._step(cursor, without))

    def advance(self, cursor: Cursor) -> Cursor:
        """The place after this step: the next step, or the start of the next epoch."""
        if cursor.step + 1 < self.steps_per_epoch(cursor.epoch):
            return Cursor(cursor.epoch, cursor.step + 1)
        return Cursor(cursor.epoch + 1, 0)

    def peek_rows(self, cursor: Cursor, *, without: Collection[str] = ()) -> tuple[RowId, ...]:
        """Ids of a step's rows, in the order of its batches; builds no tensors."""
        return tuple(self.dataset.rows[i].id for micro in self._step(cursor, without) for rows in micro for i in rows)

    def _step(self, cursor: Cursor, without: Collection[str] = ()) -> Step:
        steps = self._plan(cursor.epoch)
        if not 0 <= cursor.step < len(steps):
            raise IndexError(f"epoch {cursor.epoch} has {len(steps)} steps; there is no step {cursor.step}")
        return self._sifted(steps[cursor.step], frozenset(without)) if without else steps[cursor.step]

    def _sifted(self, step: Step, without: frozenset[str]) -> Step:
        """The step without the rows of these content hashes, and without what that leaves empty."""
        rows = self.dataset.rows
        micros = [[tuple(i for i in s if rows[i].id.digest not in without) for s in micro] for micro in step]
        kept = [tuple(sequence for sequence in micro if sequence) for micro in micros]
        return tuple(micro for micro in kept if micro)

    def _collate(self, micro: Micro) -> Batch:
        rows = self.dataset.rows
        if self.config.packing:
            return collate_packed([[rows[i] for i in sequence] for sequence in micro], self.config.pad_id)
        return collate([rows[i] for (i,) in micro], self.config.pad_id)

    def _make_plan(self, epoch: int) -> tuple[Step, ...]:
        return make_plan(self.dataset.lengths, self.config, epoch)


def order(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    """The permutation of an epoch, int64 (num_rows,)."""
    return _generator(seed, epoch, 0).permutation(num_rows)


def _generator(seed: int, epoch: int, purpose: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([seed & (2**64 - 1), epoch, purpose]))


def make_plan(lengths: np.ndarray, config: LoaderConfig, epoch: int) -> tuple[Step, ...]:
    """All steps of an epoch; ``lengths`` int (num rows,) in tokens."""
    rows = order(config.seed, epoch, len(lengths))
    if config.packing:
        sequences = pack(rows, lengths, config.max_length)
        # Shuffled again, for packing puts the bins of long rows first.
        shuffled = _generator(config.seed, epoch, 1).permutation(len(sequences))
        micros = _cut([sequences[i] for i in shuffled], config.batch_size)
    elif config.group_by_length:
        micros = _grouped(rows, lengths, config, epoch)
    else:
        micros = _cut([(int(i),) for i in rows], config.batch_size)
    if config.drop_last:
        micros = [m for m in micros if len(m) == config.batch_size]
    steps = [tuple(micros[i : i + config.accumulation]) for i in range(0, len(micros), config.accumulation)]
    return tuple(s for s in steps if not config.drop_last or len(s) == config.accumulation)


def _cut(sequences: Sequence[Rows], size: int) -> list[Micro]:
    return [tuple(sequences[i : i + size]) for i in range(0, len(sequences), size)]


def _grouped(rows: np.ndarray, lengths: np.ndarray, config: LoaderConfig, epoch: int) -> list[Micro]:
    """Micro-batches of similar length in random order; one that is not full comes last.

    Micro-batches are shuffled rather than steps: padding is the same, and a step mixes lengths.
    """
    chunk = config.batch_size * _CHUNK_MICROS
    by_length: list[Rows] = []
    for start in range(0, len(rows), chunk):
        part = rows[start : start + chunk]
        by_length += [(int(i),) for i in part[np.argsort(-lengths[part], kind="stable")]]
    micros = _cut(by_length, config.batch_size)
    full = [m for m in micros if len(m) == config.batch_size]
    shuffled = _generator(config.seed, epoch, 1).permutation(len(full))
    return [full[i] for i in shuffled] + micros[len(full) :]


@dataclass(frozen=True, slots=True)
class Efficiency:
    """What an epoch computes, and what of it counts. All in tokens."""

    num_supervised: int
    num_tokens: int
    """Without padding."""
    num_computed: int
    """With padding: B x T summed over micro-batches."""

    @property
    def filled(self) -> float:
        """Share of computed positions that hold a token."""
        return self.num_tokens / self.num_computed

    @property
    def supervised(self) -> float:
        """Share of computed positions that are targets."""
        return self.num_supervised / self.num_computed


def efficiency(loader: Loader, epoch: int = 0) -> Efficiency:
    """How much of an epoch is padding; computed from lengths alone."""
    lengths, targets = loader.dataset.lengths, loader.dataset.num_supervised
    num_tokens = num_supervised = num_computed = 0
    for micro in (m for step in loader.plan(epoch) for m in step):
        sizes = [int(lengths[list(sequence)].sum()) for sequence in micro]
        num_tokens += sum(sizes)
        num_computed += len(sizes) * max(sizes)
        num_supervised += sum(int(targets[list(sequence)].sum()) for sequence in micro)
    return Efficiency(num_supervised, num_tokens, num_computed)
