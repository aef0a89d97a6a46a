"""The looks at a script that accumulates: beside the first step, later ones whose micro-batches are uneven."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finitune.adapters.bare_asked import Loop
from finitune.adapters.bare_look import Looks, Parameters
from finitune.core.types import Finding
from finitune.engine.look.cutting import Further


class CutLooks(Looks):
    """The looks of one guard."""

    def __init__(self, loop: Loop, *, check_accumulation: bool = False) -> None:
        """See :class:`Looks`."""
        super().__init__(loop, check_accumulation=check_accumulation)
        self._further = Further()

    def batch(self, micros: Sequence[Any], parameters: Parameters) -> list[Finding]:
        """A batch that is handed over. How it is cut is looked at in the first step, and in a few uneven ones."""
        first = self._is_first
        found = super().batch(micros, parameters)
        if first or not self.check_accumulation or len(micros) < 2 or not self._further.wants(micros):
            return found
        return found + self._new(lambda: self._cut(micros, parameters), "accumulation")
