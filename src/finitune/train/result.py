"""What came out of a run, as a value."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from finitune import __version__
from finitune.core.errors import Exit
from finitune.core.journal import encode
from finitune.train.observer import SampleEvent


@dataclass(frozen=True, slots=True)
class RunResult:
    """What came out of a run."""

    status: str
    """"finished", "interrupted" or "halted"."""
    run_dir: str
    final_dir: str | None
    """The transformers or peft folder; None where none was written."""
    steps: int
    updates: int
    skipped: int
    overflows: int
    train_loss: float | None
    """Mean over committed steps."""
    eval_before: float | None
    eval_after: float | None
    supervised_tokens: int
    time_s: float
    train_time_s: float
    peak_memory_bytes: int | None
    findings: Mapping[str, int] = field(default_factory=dict)
    """How often each code was found."""
    halted: str | None = None
    """The message of a halt."""
    samples: tuple[SampleEvent, ...] = ()

    @property
    def exit_code(self) -> int:
        """0 for a run that ended well or on request, 3 for one the guard stopped."""
        return int(Exit.HALTED if self.status == "halted" else Exit.GOOD)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able record."""
        record = {name: getattr(self, name) for name in self.__slots__ if name != "samples"}
        record["samples"] = [{"step": s.step, "prompt": s.prompt, "answer": s.answer} for s in self.samples]
        encoded: dict[str, Any] = encode(record)
        return encoded


def versions() -> dict[str, str]:
    """Versions that a run depends on."""
    return {
        "finitune": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft", "safetensors")},
    }


def peak_memory_bytes() -> int | None:
    """Largest resident set of this process so far; None where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024
