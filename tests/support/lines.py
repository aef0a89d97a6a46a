"""Journal records made by hand."""

from __future__ import annotations

from typing import Any

from finitune.engine.line import Line

WARNING = {"code": "NUM010", "severity": "warning"}
NOTE = {"code": "NUM030", "severity": "note"}
ERROR = {"code": "NUM001", "severity": "error"}


def step(attempt: int, number: int | None = None, action: str = "proceed", **more: Any) -> dict[str, Any]:
    """A journalled transaction; without ``number`` every transaction is a step of its own."""
    numbers = {"loss": 2.5, "grad_norm": 1.0, "lr": 1e-3}
    return {
        "kind": "step",
        "attempt": attempt,
        "step": attempt if number is None else number,
        "action": action,
        "findings": [],
        **numbers,
        **more,
    }


def mark(attempt: int, digest: str = "d") -> dict[str, Any]:
    return {"kind": "state", "step": attempt, "attempt": attempt, "mark": {"digest": digest}}


def rollback(attempt: int, to_step: int) -> dict[str, Any]:
    return {"kind": "rollback", "attempt": attempt, "to_step": to_step, "from_step": 99}


def treatment(attempt: int, *, redo: bool = True, incidents: int = 1, **conditions: Any) -> dict[str, Any]:
    """``conditions``: what is not as configured afterwards; ``incidents``: how many the guard remembers."""
    guard = {"incidents": list(range(incidents))}
    record = {"kind": "treatment", "attempt": attempt, "step": attempt, "incident": incidents, "mends": []}
    return {**record, "conditions": conditions, "guard": guard, "redo": redo}


def resume(attempt: int, *changed: str) -> dict[str, Any]:
    """``changed``: the kinds of what differs from before."""
    changes = [{"name": "learning_rate", "kind": kind} for kind in changed]
    return {"kind": "resume", "attempt": attempt, "step": attempt, "facts": {"changes": changes}}


def attempts(line: Line, after: int, to: int) -> list[int] | None:
    path = line.path(after, to)
    return None if path is None else [e.attempt for e in path]
