"""Findings in words, and rows in columns."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from finitune.core.codes import all_codes, fill
from finitune.core.errors import describe
from finitune.core.messages.catalogue import language
from finitune.core.types import Finding


def finding_line(finding: Finding) -> str:
    """Code, what, where: one line in the current language."""
    code = all_codes().get(finding.code)
    what = fill(code.text(language()).what, finding.data) if code else str(dict(finding.data))
    return f"{finding.code} {what}" + (f" [{finding.where}]" if finding.where else "")


def finding_text(finding: Finding) -> str:
    """The whole message: what, where, why, what to try."""
    code = all_codes().get(finding.code)
    return describe(code, finding.where, finding.data) if code else finding_line(finding)


def width(text: str) -> int:
    """Columns that a text takes on a terminal; Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def aligned(rows: Sequence[Sequence[str]], gap: str = "  ") -> list[str]:
    """Rows of equally many cells as lines, each column as wide as its widest cell."""
    if not rows:
        return []
    widths = [max(map(width, column)) for column in zip(*rows, strict=True)]
    return [
        gap.join(cell + " " * (wide - width(cell)) for cell, wide in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
