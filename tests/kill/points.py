"""The places of a run at which it can be killed, and how it is killed there.

A place is named ``<operation> <name>#<n>``: the n-th time that this operation met this name in one process. Names are
paths below the run folder without what is random in them, so that a place found in one run is met again in the next,
whichever thread gets there first. A slash and a manner may follow:

    (none)   the process dies before the operation
    half     half of the bytes are written, then it dies
    most     all but the last byte
    cut      as a power cut: what was not flushed to the disk is lost in part, then it dies
    int      it is asked to stop (SIGINT), and goes on to do so; ``term``: by SIGTERM; ``twice``: by two SIGINT
"""

from __future__ import annotations

import os
import random
import re
import signal
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from kill.faults import Refusals

WRITES = ("write", "rust")
"""Operations that hand bytes to the disk: they can be done in part."""
SIGNALS = {"int": (signal.SIGINT,), "term": (signal.SIGTERM,), "twice": (signal.SIGINT, signal.SIGINT)}
STEPS = "step"
"""Operation of everything that happens in memory."""


@dataclass(frozen=True)
class Place:
    """Where and how a process dies."""

    operation: str
    name: str
    number: int
    manner: str = ""

    @property
    def label(self) -> str:
        return f"{self.operation} {self.name}"

    @property
    def kind(self) -> str:
        """The place without the numbers in it: places of one kind are alike."""
        return re.sub(r"\d+", "N", self.label) + (f"/{self.manner}" if self.manner else "")

    def __str__(self) -> str:
        return f"{self.label}#{self.number}" + (f"/{self.manner}" if self.manner else "")

    @classmethod
    def parse(cls, text: str) -> Place:
        """Inverse of ``str``."""
        found = re.fullmatch(r"(\S+) (.*)#(\d+)(?:/(half|most|cut|int|term|twice))?", text)
        assert found is not None, f"not a place: {text!r}"
        return cls(found[1], found[2], int(found[3]), found[4] or "")

    def manners(self) -> list[Place]:
        """The same place in every manner that makes sense there."""
        ways = ["", "cut"] if self.operation != STEPS else [""]
        if self.operation in WRITES:
            ways += ["half", "most"]
        return [Place(self.operation, self.name, self.number, way) for way in ways]


def plain_name(path: Path, root: Path) -> str:
    """A path below the run folder without process numbers and random tokens."""
    relative = path.relative_to(root).as_posix()
    relative = re.sub(rf"(?<!\d){os.getpid()}(?!\d)", "*", relative)
    return re.sub(r"(?<![0-9a-z])(?=[0-9a-f]*\d)[0-9a-f]{6,}(?![0-9a-z])", "*", relative) or "."


def die() -> NoReturn:
    """As the out-of-memory killer does it."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("SIGKILL was survived")


@dataclass
class Points:
    """Counts the places of one process, and kills it at one of them."""

    root: Path
    death: Place | None = None
    refusals: Refusals = field(default_factory=lambda: Refusals([]))
    """Asked at every place that is passed alive: a failing disk raises OSError here."""
    seen: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    unflushed: Unflushed = field(init=False)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        self.unflushed = Unflushed(self.root)

    def reach(self, operation: str, name: str) -> str:
        """The process has come to a place. Returns the manner in which the caller has to let it die, if any."""
        with self.lock:
            label = f"{operation} {name}"
            self.counts[label] += 1
            here = f"{label}#{self.counts[label]}"
            self.seen.append(here)
            if self.death is not None and f"{self.death.label}#{self.death.number}" == here:
                if self.death.manner == "cut":
                    self.unflushed.lose(random.Random(here))
                if self.death.manner in ("", "cut"):
                    die()
                if self.death.manner not in SIGNALS:
                    return self.death.manner
                for number in SIGNALS[self.death.manner]:
                    os.kill(os.getpid(), number)
        self.refusals(operation, name)
        return ""


class Unflushed:
    """Which bytes of the run folder a power cut would lose.

    Only content counts here; renames are taken to be on the disk, in order, as journalling file systems keep them.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        # What stood there before this process is long on the disk.
        self.safe_bytes = {os.stat(path).st_ino: os.stat(path).st_size for path in files_below(root)}

    def flushed(self, descriptor: int) -> None:
        """A file was flushed to the disk as it is now."""
        facts = os.fstat(descriptor)
        self.safe_bytes[facts.st_ino] = facts.st_size

    def lose(self, chance: random.Random) -> None:
        """Cut every file somewhere behind what is safe."""
        for path in files_below(self.root):
            facts = os.stat(path)
            safe = min(self.safe_bytes.get(facts.st_ino, 0), facts.st_size)
            if safe < facts.st_size:
                os.truncate(path, chance.randint(safe, facts.st_size))


def files_below(root: Path) -> list[Path]:
    """All files of a folder, in the order of their names."""
    return sorted(Path(folder) / name for folder, _, names in os.walk(root) for name in names)
