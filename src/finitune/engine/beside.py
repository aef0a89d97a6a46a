"""What the guard looks at beside the numbers of a step: repairable faults before the first one, routers now and then.

A healthy run pays for one look at its vocabulary and its buffers, and for routers in every eighth step. A look that a
strange model breaks is given up: it may not cost the run. (What was found before the start is told by other looks.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from finitune.core.types import Finding, Judgement
from finitune.engine.look.repair import Repair, repairs
from finitune.engine.put_right import put_right
from finitune.engine.routing import Routing
from finitune.engine.step import Outcome

if TYPE_CHECKING:
    from finitune.engine.guard import Guard, Turn
    from finitune.engine.port import ReplayPort

_T = TypeVar("_T")


class Beside:
    """The looks of one guard."""

    def __init__(self, port: ReplayPort) -> None:
        self.routing = _tried(lambda: Routing(port.model), None)
        """None: nothing is watched."""
        self._is_open = True
        self._repairs: list[Repair] | None = None
        """What is still to be put right; None: nobody has looked yet."""
        self._step = 0
        """Batches that were used up when the last step began."""

    def begin(self, guard: Guard, turn_of: type[Turn]) -> Turn | None:
        """A step is about to be computed. The turn of a repair, where there is one: the step comes after it."""
        step = guard.port.state.step
        # Of a run that went back to its very start, weights are again as they came.
        if self._repairs is None or (step == 0 and self._step > 0 and self._is_open):
            nothing: list[Repair] = []
            trained = guard.port.state.updates > 0
            found = _tried(lambda: repairs(guard.port.model, is_trained=trained), nothing)
            self._repairs = found if guard.able else nothing
        self._step = step
        while self._repairs and guard.treatment is not None:
            turn = put_right(guard, turn_of, self._repairs.pop(0), guard.treatment)
            if turn is not None:
                return turn
        if not _tried(lambda: self._begun(guard.port), False):
            self._give_up()
        return None

    def _begun(self, port: ReplayPort) -> bool:
        """True where routers are watched, or there are none."""
        if self.routing is not None:
            self.routing.begin(port)
        return True

    def end(self, outcome: Outcome) -> Outcome:
        """The step was computed and judged: what was seen on the way is told with it."""
        found = _tried(lambda: self._ended(outcome.reading.step), None)
        if found is None:
            self._give_up()
        if not found:
            return outcome
        judgement = outcome.judgement
        return replace(outcome, judgement=Judgement(judgement.verdict, (*judgement.findings, *found)))

    def _ended(self, step: int) -> list[Finding] | None:
        return self.routing.end(step) if self.routing is not None else []

    def _give_up(self) -> None:
        if self.routing is not None:
            self.routing.close()
        self.routing = None

    def close(self) -> None:
        """Look at nothing any more: what several processes decide together must not hang on what one of them sees."""
        self._give_up()
        self._is_open, self._repairs = False, []


def _tried(look: Callable[[], _T], otherwise: _T) -> _T:
    """What a look finds, or something else where it fails on a model of whatever kind."""
    try:
        return look()
    except Exception:  # noqa: BLE001  (models and batches of any kind: a look may not cost the run)
        return otherwise
