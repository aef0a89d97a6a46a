"""TensorBoard event files under ``tensorboard/`` of the run (extra: ``finitune[tensorboard]``)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

REQUIRES = "tensorboard"


class Tracker:
    """Writes scalars through torch's own writer."""

    def __init__(self, run_dir: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the scalars of one step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()
