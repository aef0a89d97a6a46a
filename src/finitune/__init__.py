"""FiniTune: LLM fine-tuning that stays finite.

    from finitune import load_recipe, train_run
    result = train_run(load_recipe("my.yaml", ["learning_rate=1e-4"]))

Names are imported on first use: ``import finitune`` alone loads neither torch nor anything else.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "guard": "finitune.adapters.bare_guard",
    "load_recipe": "finitune.train.recipe_io",
    "open_run": "finitune.train.run",
    "plan_run": "finitune.train.run",
    "replay": "finitune.adapters.bare_replay",
    "train_run": "finitune.train.run",
    "BareGuard": "finitune.adapters.bare_guard",
    "Halted": "finitune.core.errors",
    "RunResult": "finitune.train.result",
    "ScriptReplay": "finitune.adapters.bare_replay",
    "StepOutcome": "finitune.adapters.bare_guard",
    "UserError": "finitune.core.errors",
    "UserErrors": "finitune.core.errors",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    """A public name, imported when it is asked for (PEP 562)."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'finitune' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
