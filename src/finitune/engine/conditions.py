"""Conditions: what may be changed about a step, by an experiment for one replay or by a remedy for good.

One vocabulary for both: an experiment computes the failing step under ``replace(now, precision="fp32")``; the remedy
that follows from it adopts the same record. They are part of the training state (journalled, saved, restored), so a
run that was killed goes on under the conditions it had.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class Conditions:
    """Everything as configured, unless a field says otherwise."""

    precision: str | None = None
    """"fp32" or "bf16" instead of the half precision that the run computes in."""
    fp32_modules: tuple[str, ...] = ()
    """Modules (dotted names) that compute in fp32 inside a half-precision run."""
    attention: str | None = None
    """"math": the plain attention (eager in transformers' models, the math kernel of torch's). "sdpa": torch's own in
    transformers' models, whose softmax over nothing is 0."""
    loss_scale: float | None = None
    """A fixed loss scale; for experiments."""
    min_scale: float | None = None
    """Floor of the dynamic loss scale."""
    max_scale: float | None = None
    """Ceiling of the dynamic loss scale."""
    lr_factor: float = 1.0
    """Multiplies the scheduled learning rate."""
    max_lr: float | None = None
    """The scheduled rate of the first parameter group is at most this; those of others are lowered in proportion."""
    warmup_from_update: int | None = None
    """With ``warmup_steps``: the rate rises linearly from 0 over that many updates, beginning at this one."""
    warmup_steps: int = 0
    max_grad_norm: float | None = None
    """Clip to this norm, where it is tighter than the configured one."""
    clipper: str | None = None
    """Adaptive clipping: a name of ``engine/clippers`` (zclip, adagc, autoclip)."""
    adam_eps: float | None = None
    """Instead of the optimizer's eps."""
    quarantine: tuple[str, ...] = ()
    """Content hashes of rows that are left out wherever they come up."""
    extra_padding: int = 0
    """Tokens of padding added to (or, negative, cut from) the right; for experiments."""

    def to_json(self) -> dict[str, Any]:
        """The fields that differ from "as configured"."""
        plain = Conditions()
        changed = {
            f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != getattr(plain, f.name)
        }
        return {k: list(v) if isinstance(v, tuple) else v for k, v in changed.items()}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Conditions:
        """Inverse of :meth:`to_json`. Raises ValueError for a field that does not exist."""
        known = {f.name for f in fields(cls)}
        foreign = sorted(set(record) - known)
        if foreign:
            raise ValueError(f"no such condition: {', '.join(foreign)}")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record.items()}
        return cls(**values)

    def replaced_in(self, was: Conditions) -> dict[str, Any]:
        """The values, JSON-able, that ``was`` had in the fields in which this differs from it."""
        before = was.changes_from(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in before.items()}

    def changes_from(self, other: Conditions) -> dict[str, Any]:
        """Fields in which this differs from ``other``, with this one's values."""
        mine, theirs = asdict(self), asdict(other)
        return {k: v for k, v in mine.items() if v != theirs[k]}


AS_CONFIGURED = Conditions()


class NotPossible(Exception):
    """A port cannot bring about a condition; the text says why."""
