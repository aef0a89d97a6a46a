"""Codes of a resume: what differs, and what is then not exact."""

from __future__ import annotations

from finitune.core.codes import Code

CODES: tuple[Code, ...] = ()
