"""Ctrl-C and SIGTERM: the first asks for a clean stop after the step at hand, the second stops at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


class StopRequest:
    """Whether somebody asked the run to stop."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> bool:
        """True once a stop was asked for."""
        return self.count > 0


@contextlib.contextmanager
def listening(on_first: Callable[[], None] = lambda: None) -> Iterator[StopRequest]:
    """Listen for SIGINT and SIGTERM while the body runs; the old handlers come back afterwards.

    The second signal raises KeyboardInterrupt where it arrives: what is committed to the disk stands.
    Outside the main thread signals cannot be caught, and nothing is listened for.
    """
    request = StopRequest()

    def handle(_number: int, _frame: FrameType | None) -> None:
        request.count += 1
        if request.count > 1:
            raise KeyboardInterrupt
        on_first()

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
