"""A tiny run whose snapshots and checkpoints stand where a test wants them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from finitune.core.journal import read
from finitune.engine.line import line_of
from finitune.engine.snapshot import Snapshot, as_snapshot
from finitune.engine.timeline import Arrival, Unreachable
from finitune.numerics.digest import digest
from finitune.train import checkpoint
from finitune.train.checkpoint import Content
from finitune.train.loop import Loop
from finitune.train.prepare import Prepared
from finitune.train.time_machine import TimeMachine
from support.runs import loop_of, ready

SMALL = "tiny-llama:hidden=16,layers=1,heads=2,kv_heads=1,mlp=32"
EMBEDDING = "model.embed_tokens.weight"


def bits(prepared: Prepared) -> str:
    return digest(prepared.port.state_tensors(), prepared.port.state_record())


def bits_of(snapshot: Snapshot) -> str:
    return digest(snapshot.tensors.items(), snapshot.record)


@dataclass
class Run:
    """A tiny run whose snapshots and checkpoints stand where a test wants them."""

    prepared: Prepared
    folder: Path
    loop: Loop = field(init=False)
    machine: TimeMachine = field(init=False)
    truth: dict[int, str] = field(default_factory=dict)
    """The bits after each step."""
    before_digest: dict[int, Callable[[], None]] = field(default_factory=dict)
    """What happens behind the run's back after a step, before its digest is journalled."""

    def __post_init__(self) -> None:
        self.loop = loop_of(self.prepared, self.folder)
        self.machine = TimeMachine(self.prepared, self.loop.journal, self.folder)
        self._note()

    @property
    def step(self) -> int:
        return self.prepared.port.state.step

    def _note(self) -> None:
        state = self.prepared.port.state
        self.before_digest.pop(state.step, lambda: None)()
        self.truth[state.step] = bits(self.prepared)
        if state.step % self.prepared.recipe.snapshots.digest_steps == 0:
            self.machine._journal_digest(None)

    def to(self, step: int, *, snapshots: tuple[int, ...] = (), checkpoints: tuple[int, ...] = ()) -> Run:
        while self.step < step:
            before = self.step
            self.loop.one()
            if self.step == before:
                continue
            self._note()
            if self.step in snapshots:
                assert self.machine.ring.take(self.prepared.port, 0.0) is not None
            if self.step in checkpoints:
                self.save()
        return self

    def save(self) -> Path:
        port = self.prepared.port
        line = len(line_of(self.records()).rollbacks)
        now = Content(dict(port.state_tensors()), port.state_record(), line)
        return checkpoint.write(now, port.parts, self.prepared.tokenizer, self.folder)

    def records(self) -> list[dict[str, Any]]:
        return list(read(self.folder / "journal.jsonl"))

    def go(self, step: int) -> Arrival:
        return self.machine.timeline.go_to(step)

    def refused(self, step: int) -> Unreachable:
        """Going there fails, both ways, with nothing changed."""
        before = bits(self.prepared)
        with pytest.raises(Unreachable) as found:
            self.machine.state_at(step)
        assert bits(self.prepared) == before
        with pytest.raises(Unreachable) as found:
            self.go(step)
        assert bits(self.prepared) == before
        assert all(p.grad is None for _, p in self.prepared.port.parts.parameters)
        assert found.value.finding.data["step"] is not None
        return found.value


def run_of(folder: Path, *overrides: str) -> Run:
    folder.mkdir(exist_ok=True)
    return Run(ready(folder, "data.eval_fraction=0", "snapshots.digest_steps=4", *overrides, model=SMALL), folder)


def spoil(tensors: dict[str, torch.Tensor], name: str = EMBEDDING) -> None:
    tensors[name].detach().view(torch.uint8).view(-1)[0] ^= 1


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Journal lines are held back in memory; the run goes on, and must be able to go back."""

    def full(*_args: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        yield


@dataclass
class Shared:
    """One model for most tests: what they do to it is undone by going back to its start."""

    prepared: Prepared = field(repr=False)
    start: Snapshot = field(repr=False)

    @classmethod
    def of(cls, prepared: Prepared) -> Shared:
        return cls(prepared, as_snapshot(prepared.port))

    def run(self, folder: Path) -> Run:
        self.start.restore(self.prepared.port)
        return Run(self.prepared, folder)
