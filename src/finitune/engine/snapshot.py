"""Snapshots: whole training states in memory, under a byte budget.

The buffers live on the host, are allocated when a slot is first filled and are used again for ever after; one
``_foreach_copy_`` fills them. Only what trains is copied. Each snapshot carries a seal, so that a state that was
changed in memory is found out before anybody returns to it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from finitune.engine.port import Port
from finitune.numerics.fingerprint import Fingerprint, fingerprint
from finitune.numerics.seal import Seal, seal

_COST_SHARE = 0.005
"""Of the steps' time. A copy and its seal are cheap enough to come often all the same."""
# torch's CPU allocator on Linux and on Windows, and pinned host memory.
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


class Buffers:
    """Memory for one snapshot at a time."""

    def __init__(self) -> None:
        self._held: dict[str, torch.Tensor] = {}

    def reserve(self, port: Port) -> None:
        """Get the memory for the present state, if it is not there yet; what is held stays as it is."""
        for name, tensor in port.state_tensors():
            self._buffer(name, tensor)

    @torch.no_grad()
    def copy(self, port: Port) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The port's present tensors, copied, and its record. A later call overwrites the tensors."""
        named = dict(port.state_tensors())
        targets = {name: self._buffer(name, tensor) for name, tensor in named.items()}
        if named:
            torch._foreach_copy_(list(targets.values()), [t.detach() for t in named.values()])
        return targets, port.state_record()

    def take(self, port: Port, *, marked: bool = False) -> Snapshot:
        """A snapshot of the port's present state; ``marked``: fingerprinted at once."""
        tensors, record = self.copy(port)
        mark = fingerprint(tensors.items(), record) if marked else None
        return Snapshot(tensors, record, seal(tensors.items(), record), self, mark)

    def _buffer(self, name: str, like: torch.Tensor) -> torch.Tensor:
        held = self._held.get(name)
        if held is None or held.shape != like.shape or held.dtype != like.dtype:
            pinned = like.device.type == "cuda"
            held = torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=pinned)
            self._held[name] = held
        return held


@dataclass(slots=True)
class Snapshot:
    """One training state; its tensors are copies on the host."""

    tensors: dict[str, torch.Tensor]
    record: dict[str, Any]
    seal: Seal
    """Tells whether its bits are still those that were copied."""
    home: Buffers
    """The memory its tensors live in; overwritten when the ring uses it again."""
    _mark: Fingerprint | None = None

    @property
    def mark(self) -> Fingerprint:
        """Its fingerprint, made when it is first asked for: most snapshots are never compared with a journal."""
        if self._mark is None:
            self._mark = fingerprint(self.tensors.items(), self.record)
        return self._mark

    @property
    def step(self) -> int:
        """Batches used up when it was taken."""
        return int(self.record["step"])

    @property
    def attempt(self) -> int:
        """Transactions made when it was taken."""
        return int(self.record["attempt"])

    @property
    def num_bytes(self) -> int:
        """Memory its tensors take."""
        return sum(t.nbytes for t in self.tensors.values())

    def intact(self) -> bool:
        """Whether its bits are still those that were copied."""
        return self.seal.holds(self.tensors.items(), self.record)

    def restore(self, port: Port) -> None:
        """Make it the training state. Raises KeyError or ValueError where it is another model's."""
        port.restore(self.tensors, self.record)


def state_bytes(port: Port) -> int:
    """Bytes of one snapshot of the present state (before the first update the moments are not there yet)."""
    return sum(t.nbytes for _, t in port.state_tensors())


@dataclass(slots=True)
class Distance:
    """How many steps lie between snapshots: each is paid for by the steps that follow it.

    So the cost stays under ``cost_share`` of the steps' time however it varies.
    """

    cost_share: float
    steps: int = 1
    _unpaid_s: float = 0.0

    def measured(self, cost_s: float, step_s: float) -> None:
        """Take the cost of a snapshot and the time of a step (0: not known yet) into account."""
        self._unpaid_s += cost_s
        if step_s > 0:
            self.steps = max(1, math.ceil(self._unpaid_s / (self.cost_share * step_s)))
            self._unpaid_s = 0.0


class SnapshotRing:
    """The snapshots of a run: the newest, and older ones ever further apart, within a byte budget."""

    def __init__(self, num_slots: int, *, cost_share: float = _COST_SHARE) -> None:
        self.num_slots = num_slots
        self.distance = Distance(cost_share)
        self.taken: list[Snapshot] = []
        """Oldest first."""
        self.cost_s = 0.0
        """Seconds spent taking snapshots."""
        self._idle: list[Buffers] = []

    @classmethod
    def within(
        cls, budget_bytes: int, snapshot_bytes: int, *, max_count: int, cost_share: float = _COST_SHARE
    ) -> SnapshotRing:
        """As many slots as fit ``budget_bytes``, at most ``max_count``; none where not even one fits."""
        fitting = budget_bytes // max(1, snapshot_bytes)
        return cls(int(min(max_count, fitting)), cost_share=cost_share)

    def due(self, step: int) -> bool:
        """Whether a snapshot should be taken at ``step``."""
        if self.num_slots == 0:
            return False
        return not self.taken or step - self.taken[-1].step >= self.distance.steps

    def take(self, port: Port, step_s: float) -> Snapshot | None:
        """Take one; where all slots are full the most dispensable older one gives way.

        None where the memory for another slot is not there any more; the ring then stays as small as it is.
        """
        started_s = time.perf_counter()
        home, victim = self._place()
        try:
            home.reserve(port)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self.num_slots = len(self.taken)
            return None
        if victim is not None:
            self.forget(victim)
        self._idle = [h for h in self._idle if h is not home]
        snapshot = home.take(port)
        self.taken.append(snapshot)
        cost_s = time.perf_counter() - started_s
        self.cost_s += cost_s
        self.distance.measured(cost_s, step_s)
        return snapshot

    def _place(self) -> tuple[Buffers, Snapshot | None]:
        """Memory for the next one, and the snapshot that has to give it up."""
        if self._idle:
            return self._idle[0], None
        if len(self.taken) < self.num_slots or not self.taken:
            return Buffers(), None
        victim = self.taken[dispensable([s.step for s in self.taken])]
        return victim.home, victim

    def forget_after(self, attempt: int) -> None:
        """Drop the snapshots of a line that was left by going back to ``attempt``."""
        for snapshot in [s for s in self.taken if s.attempt > attempt]:
            self.forget(snapshot)

    def forget(self, snapshot: Snapshot) -> None:
        """Drop one snapshot; its memory is used again."""
        self.taken = [s for s in self.taken if s is not snapshot]
        self._idle.append(snapshot.home)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python could not get memory. torch's CPU allocator raises a plain RuntimeError."""
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or any(words in str(error) for words in _OUT_OF_MEMORY)


def dispensable(steps: list[int]) -> int:
    """Index of the snapshot to give up: where the hole it leaves is smallest for its age.

    The oldest and the newest stay (of two, the older goes; of one, it). So the distances grow with age, roughly
    geometrically, and a few snapshots reach far back.
    """
    if len(steps) < 3:
        return 0
    newest = steps[-1]
    holes = [(steps[i + 1] - steps[i - 1]) / (newest - steps[i] + 1) for i in range(1, len(steps) - 1)]
    return 1 + holes.index(min(holes))


def as_snapshot(port: Port) -> Snapshot:
    """A copy of the present state in memory of its own; fingerprinted at once, before anybody works with it."""
    return Buffers().take(port, marked=True)


def copy_over(tensors: Mapping[str, torch.Tensor], held: Mapping[str, torch.Tensor]) -> None:
    """Copy ``tensors`` over the tensors of the same name in ``held``, in place.

    Raises KeyError where a name is missing on either side, ValueError where shape or dtype differ; nothing is
    changed then.
    """
    missing, foreign = held.keys() - tensors.keys(), tensors.keys() - held.keys()
    if missing or foreign:
        raise KeyError(f"missing: {sorted(missing)[:3]}, foreign: {sorted(foreign)[:3]}")
    for name, target in held.items():
        source = tensors[name]
        if source.shape != target.shape or source.dtype != target.dtype:
            raise ValueError(f"{name}: {source.dtype} {tuple(source.shape)}, expected {target.dtype} {target.shape}")
    with torch.no_grad():
        torch._foreach_copy_(list(held.values()), [tensors[n] for n in held])
