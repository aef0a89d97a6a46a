"""The nouns that cross module borders: plain, frozen, JSON-able values.

Tensors never appear here; a record of tensors is a ``Trace`` (``engine/port.py``).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

Scalar = float | int | str | bool | None


class Severity(str, Enum):
    """How much a finding matters to the person who reads it."""

    NOTE = "note"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True, order=True)
class RowId:
    """The stable name of a data row: source file, row number (1-based) and content hash."""

    source: str
    row: int
    digest: str

    @classmethod
    def of(cls, source: str, row: int, content: bytes) -> RowId:
        """Name a row by its raw content; the digest is the first 12 hex digits of SHA-256."""
        return cls(source, row, hashlib.sha256(content).hexdigest()[:12])

    @classmethod
    def parse(cls, text: str) -> RowId:
        """Inverse of ``str``. Raises ValueError for anything else."""
        head, _, digest = text.rpartition("#")
        source, _, row = head.rpartition(":")
        if not source or not digest:
            raise ValueError(f"not a row id: {text!r} (expected SOURCE:ROW#DIGEST)")
        return cls(source, int(row), digest)

    def __str__(self) -> str:
        return f"{self.source}:{self.row}#{self.digest}"


@dataclass(frozen=True, slots=True)
class Finding:
    """What a detector or a check found: a stable code, where, and the numbers.

    ``veto`` asks the judge to abort the step. ``data`` feeds the message template of the code.
    """

    code: str
    severity: Severity
    where: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)
    rows: tuple[RowId, ...] = ()
    veto: bool = False

    def to_json(self) -> dict[str, Any]:
        """A JSON-able record (non-finite numbers are encoded by the journal)."""
        return {
            "code": self.code,
            "severity": self.severity.value,
            "where": self.where,
            "data": dict(self.data),
            "rows": [str(r) for r in self.rows],
            "veto": self.veto,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Finding:
        """Inverse of :meth:`to_json`."""
        return cls(
            record["code"],
            Severity(record["severity"]),
            record.get("where", ""),
            dict(record.get("data", {})),
            tuple(RowId.parse(r) for r in record.get("rows", ())),
            bool(record.get("veto", False)),
        )


@dataclass(frozen=True, slots=True)
class Reading:
    """The plain numbers of one step, as a detector sees them.

    A live run and a parsed log give the same record; ``None`` means "not measured".
    """

    step: int
    """1-based number of the step being judged; a skipped batch counts."""
    loss: float
    """Mean loss over the step's supervised tokens, fp32; may be non-finite."""
    grad_norm: float
    """L2 norm of all gradients before clipping, with the loss scale divided out."""
    lr: float = math.nan
    supervised_tokens: int | None = None
    tokens: int | None = None
    """Tokens that are not padding."""
    loss_scale: float | None = None
    """Current loss scale; None where no scaler is used."""
    bad_parameters: tuple[str, ...] = ()
    """Names (at most 8) of parameters whose gradient is not finite."""
    num_bad_parameters: int = 0
    amax: Mapping[str, float] = field(default_factory=dict)
    """Largest magnitude seen by the monitor, by module name; NaN and inf are kept."""
    headroom_bits: float | None = None
    """log2(largest half number / amax) of the worst monitored module; None outside fp16."""
    update_ratio: float | None = None
    """||change|| / ||weights|| of the previous committed step, on a sample of the elements."""
    changed_fraction: float | None = None
    """Share of sampled weight elements that the previous committed step changed."""
    time_s: float | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON-able record without the fields that were not measured."""
        raw = {name: getattr(self, name) for name in self.__slots__}
        raw["amax"] = dict(self.amax)
        raw["bad_parameters"] = list(self.bad_parameters)
        return {k: v for k, v in raw.items() if v is not None and v != {} and v != []}


class Verdict(str, Enum):
    """What the judge says of a step."""

    COMMIT = "commit"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class Judgement:
    """The verdict of all detectors on one reading."""

    verdict: Verdict
    findings: tuple[Finding, ...] = ()
