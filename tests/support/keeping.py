"""A run folder with a keeper in it, and quick checkpoints without a model."""

from __future__ import annotations

import errno
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from finitune.core.files import write_manifest
from finitune.core.journal import Journal, read
from finitune.core.types import Finding, Reading
from finitune.engine.policy import Action
from finitune.train import checkpoint
from finitune.train.checkpoint import Content
from finitune.train.keeper import ABANDONED, Keeper, KeepSettings, step_in
from finitune.train.step import Parts, TrainPort
from support.small_port import small_port

FULL = OSError(errno.ENOSPC, "No space left on device")


def quick_write(content: Content, parts: Parts, tokenizer: Any, run_dir: Path) -> Path:
    """In place of ``checkpoint.write``: all that a checkpoint must have, and no model."""
    folder = run_dir / f"checkpoint-{content.step}"
    folder.mkdir(exist_ok=True)
    (folder / checkpoint.STATE_FILE).write_text(json.dumps(content.record))
    (folder / checkpoint.OPTIMIZER_FILE).write_text("{}")
    write_manifest(folder, {"step": content.step, "line": content.line, "attempt": 0})
    return folder


class Kept:
    """A run folder with a keeper, and what it told."""

    def __init__(self, folder: Path, port: TrainPort | None = None, *, background: bool = False, **fields: Any) -> None:
        self.folder, self.port = folder, port or small_port((2, 2))
        self.findings: list[Finding] = []
        self.told: list[tuple[str, int]] = []
        self.journal = Journal(folder / "journal.jsonl")
        self.keeper = self.make(background=background, **fields)

    def make(self, last_saved: Path | None = None, **fields: Any) -> Keeper:
        """Another keeper of the same folder: that of a later session."""
        return Keeper(
            run_dir=self.folder,
            port=self.port,
            tokenizer=None,
            journal=self.journal,
            settings=KeepSettings(**fields),
            found=self.findings.append,
            saved=lambda path, step: self.told.append((path.name, step)),
            last_saved=last_saved,
        )

    def step(self, count: int = 1, *, clean: bool = True, save: bool = False, every: int = 0) -> None:
        """What the loop does: a transaction, what is due, and the look after each step."""
        for _ in range(count):
            number = self.port.state.step + 1
            self.port.state.step += 1
            self.port.settle(Action.PROCEED, Reading(number, 1.0, 1.0), clean=clean)
            if save or (every and number % every == 0):
                self.keeper.save(number)
            self.keeper.after_step(number)

    @property
    def standing(self) -> list[int]:
        return sorted(map(step_in, checkpoint.listed(self.folder)))

    @property
    def trusted(self) -> list[int]:
        return sorted(step_in(p) for p in checkpoint.listed(self.folder) if checkpoint.is_trusted(p))

    @property
    def abandoned(self) -> list[str]:
        return sorted(p.name for p in self.folder.glob(f"{ABANDONED}*"))

    @property
    def codes(self) -> list[str]:
        return [f.code for f in self.findings]

    def records(self, kind: str) -> list[dict[str, Any]]:
        return [r for r in read(self.folder / "journal.jsonl") if r["kind"] == kind]


class Gate:
    """Lets ``checkpoint.write`` begin when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.real = threading.Event(), checkpoint.write
        monkeypatch.setattr(checkpoint, "write", self)

    def __call__(self, *args: Any) -> Path:
        assert self.open.wait(20)
        return self.real(*args)


class Disk:
    """``checkpoint.write`` on a disk that is full for a while."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = True
        self.tries: list[int] = []
        monkeypatch.setattr(checkpoint, "write", self)

    def __call__(self, content: Content, *rest: Any) -> Path:
        self.tries.append(content.step)
        if self.full:
            raise FULL
        return quick_write(content, *rest)
