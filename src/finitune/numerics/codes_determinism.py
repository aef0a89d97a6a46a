"""Codes of determinism: what does not repeat bit for bit, and why."""

from __future__ import annotations

from finitune.core.codes import Code

CODES: tuple[Code, ...] = ()
