"""Limits that the system itself sets on a child, and a clock that does not make tests wait."""

from __future__ import annotations

import threading
import time
from typing import Any

_REAL_SLEEP_S = 0.0005


def limit_file_size(num_bytes: int, until_step: int | None = None) -> None:
    """No file may grow beyond ``num_bytes`` (EFBIG, also for writers in Rust) until that many steps were committed."""
    import resource

    from finitune.train.step import TrainPort

    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    if until_step is None:
        return
    real = TrainPort.commit

    def commit(self: Any, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        if self.state.step >= until_step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    TrainPort.commit = commit  # type: ignore[method-assign]


def shorten_waiting() -> None:
    """Sleeping takes no time, but the clocks go on as if it had."""
    clock = _Clock()
    time.sleep = clock.sleep
    for name in ("monotonic", "time", "perf_counter"):
        setattr(time, name, clock.ahead(getattr(time, name)))


class _Clock:
    """Clocks that run ahead by what was slept."""

    def __init__(self) -> None:
        self.ahead_s = 0.0
        self.lock = threading.Lock()
        self.real_sleep = time.sleep

    def sleep(self, seconds: float) -> None:
        with self.lock:
            self.ahead_s += seconds
        self.real_sleep(min(seconds, _REAL_SLEEP_S))

    def ahead(self, real: Any) -> Any:
        return lambda: real() + self.ahead_s
