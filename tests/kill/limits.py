"""Limits that the system itself sets on a child."""

from __future__ import annotations

from typing import Any


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
