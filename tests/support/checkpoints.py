"""Checkpoints of a tiny run, and how they are damaged."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finitune.engine.snapshot import Snapshot, as_snapshot
from finitune.numerics.digest import digest
from finitune.train import checkpoint
from finitune.train.checkpoint import Content
from finitune.train.prepare import Prepared
from support.runs import loop_of, ready

SMALL = "tiny-llama:hidden=16,layers=1,heads=2,kv_heads=1,mlp=32"


def content(prepared: Prepared, line: int = 0, **facts: Any) -> Content:
    """The live state of a run."""
    port = prepared.port
    return Content(dict(port.state_tensors()), port.state_record(), line, facts)


def write(prepared: Prepared, run_dir: Path, line: int = 0, **facts: Any) -> Path:
    return checkpoint.write(content(prepared, line, **facts), prepared.port.parts, prepared.tokenizer, run_dir)


def bits(prepared: Prepared) -> str:
    return digest(prepared.port.state_tensors(), prepared.port.state_record())


def train(prepared: Prepared, folder: Path, steps: int = 1) -> None:
    loop = loop_of(prepared, folder)
    for _ in range(steps):
        loop.one()


def entries(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def inodes(folder: Path) -> dict[str, tuple[int, int]]:
    """Which files stand there, and since when."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.iterdir()}


@dataclass
class Story:
    """One model for all tests: what they do to it is undone by going back to step 2."""

    prepared: Prepared
    folder: Path
    """A run folder with checkpoints of steps 2, 4 and 6; copied by those who change it."""
    second: Snapshot

    @classmethod
    def tell(cls, work: Path) -> Story:
        prepared = ready(work, model=SMALL)
        for _ in range(3):
            train(prepared, work, 2)
            if prepared.port.state.step == 2:
                second = as_snapshot(prepared.port)
            write(prepared, work, note=[1, "x"])
        return cls(prepared, work, second)


def flip(path: Path, at: int = -5) -> None:
    spoilt = bytearray(path.read_bytes())
    spoilt[at] ^= 1
    path.write_bytes(bytes(spoilt))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def full_disk(*_args: object, **_kw: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")
