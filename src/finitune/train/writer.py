"""Writing in the background: one thread, one piece of work at a time.

The training thread hands over what is to be written (copies, never live tensors) and asks now and then what came of
it. The thread is a daemon: a second Ctrl-C ends the program at once, and what was half-written aside is swept later.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Written:
    """What came of one piece of work."""

    step: int
    path: Path | None
    error: BaseException | None = None
    task: str = ""


class Writer:
    """Runs pieces of work one after the other in a thread of its own; without ``background`` at once."""

    def __init__(self, *, background: bool) -> None:
        self.background = background
        self._todo: queue.SimpleQueue[tuple[int, Callable[[], Path], str]] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Written] = queue.SimpleQueue()
        self._open = 0
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """Whether something handed over has not been reported by :meth:`finished` yet."""
        return self._open > 0

    def submit(self, step: int, work: Callable[[], Path], *, task: str = "") -> None:
        """Hand ``work`` over; it returns the path it was about or raises. ``task`` and ``step`` come back with it."""
        self._open += 1
        if not self.background:
            self._done.put(_run(step, work, task))
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="finitune-writer", daemon=True)
            self._thread.start()
        self._todo.put((step, work, task))

    def finished(self, *, wait: bool = False) -> list[Written]:
        """What was finished since the last call; with ``wait``, everything that was handed over."""
        found = []
        while self._open and (wait or not self._done.empty()):
            # With a timeout, so that a signal is answered while waiting.
            try:
                found.append(self._done.get(timeout=0.2))
            except queue.Empty:
                continue
            self._open -= 1
        return found

    def _serve(self) -> None:
        while True:
            self._done.put(_run(*self._todo.get()))


def _run(step: int, work: Callable[[], Path], task: str) -> Written:
    try:
        return Written(step, work(), task=task)
    except BaseException as error:  # noqa: BLE001  (told to the training thread, which decides)
        return Written(step, None, error, task)
