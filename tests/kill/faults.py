"""A disk that fails: refusals, short writes, for one call, for some, for ever."""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SHORT = "SHORT"
"""Not a refusal: the system takes only a part of the bytes, as it may."""


@dataclass
class Fault:
    """Which operations fail, how, and for how long."""

    operations: tuple[str, ...]
    error: str
    """Name of an errno, or :data:`SHORT`."""
    match: str = ""
    """Regular expression found in the names of the paths that fail; "" is all."""
    first: int = 1
    """The first matching call that fails, from 1."""
    count: int | None = 1
    """So many calls fail; None: all from then on."""
    calls: int = field(default=0, init=False)
    hits: int = field(default=0, init=False)
    lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Fault:
        """From a request."""
        return cls(**{**record, "operations": tuple(record["operations"])})

    def strikes(self, operation: str, name: str) -> bool:
        """Whether this call is one of those that fail."""
        if operation not in self.operations or not re.search(self.match, name):
            return False
        with self.lock:
            self.calls += 1
            struck = self.calls >= self.first and (self.count is None or self.calls < self.first + self.count)
            self.hits += struck
            return struck

    def refusal(self, name: str) -> OSError:
        """The system's refusal."""
        number = getattr(errno, self.error)
        return OSError(number, os.strerror(number), name)


class Refusals:
    """All faults of one process; called at every place."""

    def __init__(self, faults: list[Fault]) -> None:
        self.faults = [f for f in faults if f.error != SHORT]
        self.short = [f for f in faults if f.error == SHORT]

    @property
    def hits(self) -> int:
        """How many calls have failed."""
        return sum(f.hits for f in (*self.faults, *self.short))

    def __call__(self, operation: str, name: str) -> None:
        """Raise OSError where the call is to fail."""
        for fault in self.faults:
            if fault.strikes(operation, name):
                raise fault.refusal(name)

    def shortened(self, name: str, num_bytes: int) -> int:
        """How many of so many bytes the system takes."""
        short = any(fault.strikes("write", name) for fault in self.short)
        return max(1, num_bytes // 2) if short else num_bytes
