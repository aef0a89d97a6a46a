"""Codes of run folders: in use, unreadable."""

from __future__ import annotations

from finitune.core.codes import Code

CODES: tuple[Code, ...] = ()
