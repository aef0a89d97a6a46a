"""Codes of the journal: waiting for the disk, damaged lines."""

from __future__ import annotations

from finitune.core.codes import Code

CODES: tuple[Code, ...] = ()
