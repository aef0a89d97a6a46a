"""Which rows of the batch make the step fail, and which token of a row: group testing by bisection.

A part of the batch is computed with the other places holding copies of it, so that width, batch size and kernels stay.
A part that fails is split until single units are left. Two culprits are both found; where both halves of a failing
part are good, it fails only as a combination. In the end the rest, without the culprits, must be good. Copies may make
a row good that fails for being alone (in its group, say): then the localisation, or leaving it out, tells.

Source: Dorfman 1943, "The detection of defective members of large populations", with splitting in halves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from finitune.engine.case import Case
from finitune.engine.conditions import NotPossible
from finitune.engine.lab import BudgetSpent, Lab
from finitune.engine.localise_forward import layouts_of
from finitune.engine.port import Ask, Unit

MAX_CULPRITS = 4
"""More failing parts than that at one level, in a large batch: it is not a matter of single rows."""
_SMALL_BATCH = 8
_MAX_ROUNDS = 2

Part = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RowsFound:
    """What group testing came to. Units are places in ``ReplayPort.units()``."""

    units: Part
    """Each of them fails on its own."""
    rest_good: bool | None
    """Without them, and without the combinations, the step is good; None: there is no rest, or it was not tried."""
    num_units: int
    num_shots: int
    combinations: tuple[Part, ...] = ()
    """Parts that fail although each of their halves is good."""
    too_many: bool = False
    """The search was given up: nearly all parts fail."""
    complete: bool = True
    """False: the budget ended the search."""

    @property
    def every(self) -> bool:
        """No unit is good."""
        return len(self.units) == self.num_units

    @property
    def isolated(self) -> bool:
        """Some units fail on their own, and the rest together is good."""
        return bool(self.units) and not self.combinations and self.rest_good is True


@dataclass(slots=True)
class _Search:
    lab: Lab
    units: Sequence[Unit]
    known: dict[Part, bool] = field(default_factory=dict)
    shots: int = 0
    culprits: set[int] = field(default_factory=set)
    combinations: list[Part] = field(default_factory=list)
    too_many: bool = False

    @property
    def all(self) -> Part:
        return tuple(range(len(self.units)))

    def bad(self, part: Part) -> bool:
        if part not in self.known:
            shot = self.lab.shoot(ask=Ask(units=part))
            self.shots += 1
            self.known[part] = shot.bad
        return self.known[part]

    def halves(self, part: Part) -> tuple[Part, Part]:
        """Two halves; between micro-batches where the part has several."""
        middle = len(part) // 2
        borders = [k for k in range(1, len(part)) if self.units[part[k]].micro != self.units[part[k - 1]].micro]
        cut = min(borders, key=lambda k: abs(k - middle)) if borders else middle
        return part[:cut], part[cut:]

    def split(self, failing: Part) -> None:
        """Level by level, down to single units."""
        level = [failing]
        while level and not self.too_many:
            self.culprits |= {p[0] for p in level if len(p) == 1}
            level = [half for part in level if len(part) > 1 for half in self._failing_halves(part)]
            self.too_many = len(level) > MAX_CULPRITS and len(self.units) > _SMALL_BATCH

    def _failing_halves(self, part: Part) -> list[Part]:
        failing = [half for half in self.halves(part) if self.bad(half)]
        if not failing:
            self.combinations.append(part)
        return failing

    def leave_out(self) -> None:
        """Every part is good, as copies of a row are company for it: the one row without which the others are good.

        One of the others holds its place; where that is a copy of the culprit, leaving out another row as well tells.
        """
        if len(self.units) > _SMALL_BATCH:
            return
        missed = [u for u in self.all if not self.bad(self.without(u))]
        if len(missed) > 1:
            others = [u for u in self.all if u not in missed][:_MAX_ROUNDS]
            missed = [u for u in missed if others and not any(self.bad(self.without(u, o)) for o in others)]
        if len(missed) == 1:
            self.culprits, self.combinations = set(missed), []

    def without(self, *left_out: int) -> Part:
        """All units but these."""
        return tuple(u for u in self.all if u not in left_out)

    def rest(self) -> Part:
        """The units that are not accused."""
        accused = self.culprits.union(*self.combinations)
        return tuple(u for u in self.all if u not in accused)

    def found(self, *, complete: bool) -> RowsFound:
        rest = self.rest()
        rest_bad = self.known.get(rest) if rest and rest != self.all else None
        return RowsFound(
            tuple(sorted(self.culprits)),
            None if rest_bad is None else not rest_bad,
            len(self.units),
            self.shots,
            tuple(self.combinations),
            self.too_many,
            complete,
        )


def find_rows(lab: Lab, case: Case) -> RowsFound:
    """The units that make the step fail. Suspects of the localisation are tried first.

    The budget may end the search; what was found until then is given back. Raises NotPossible where the port knows no
    units, BudgetSpent where not even one computation was affordable.
    """
    search = _Search(lab, lab.port.units())
    if not search.units:
        raise NotPossible("the batch has no parts that can be computed on their own")
    search.known[search.all] = True
    try:
        _run(search, _hinted(search.units, case))
    except BudgetSpent:
        if search.shots == 0:
            raise
        return search.found(complete=False)
    return search.found(complete=True)


def _run(search: _Search, hint: Part) -> None:
    rest = tuple(u for u in search.all if u not in hint)
    if hint and rest and not search.bad(rest):
        if search.bad(hint):
            search.split(hint)
        else:
            # Copies of a row are company for it (groups, contrasts): it fails among others, and without it they do not.
            search.culprits |= set(hint)
    else:
        search.split(search.all)
    if search.combinations == [search.all]:
        search.leave_out()
    for _ in range(_MAX_ROUNDS):
        rest = search.rest()
        if search.too_many or not rest or not search.bad(rest):
            return
        search.split(rest)
    if search.rest():
        search.bad(search.rest())


def _hinted(units: Sequence[Unit], case: Case) -> Part:
    """Units that the localisation named."""
    named = {(s.data.get("micro"), s.data.get("index")) for s in case.suspects_of("row")}
    return tuple(n for n, u in enumerate(units) if (u.micro, u.index) in named)


def find_span(lab: Lab, case: Case, unit: int) -> tuple[int, int] | None:
    """Half-open span of the tokens that make a unit fail; None where that cannot be told.

    Its end is the shortest prefix of the row that fails, found by bisection. Its start is known where the localisation
    named the tokens and the prefix before them is good; else it is the last token of that prefix. For causal models.
    Raises BudgetSpent.
    """
    one = lab.port.units()[unit]
    layouts = layouts_of(lab.port)
    width = layouts[one.micro].width if one.micro < len(layouts) else 0
    if width < 1:
        return None
    try:
        hinted = _hinted_span(one, case)
        if hinted is not None and _holds(lab, unit, hinted):
            return hinted
        end = _shortest_failing_prefix(lab, unit, width)
    except NotPossible:
        return None
    return (end - 1, end)


def _hinted_span(unit: Unit, case: Case) -> tuple[int, int] | None:
    for suspect in case.suspects_of("tokens"):
        span = suspect.data.get("span")
        if span and (suspect.data.get("micro"), suspect.data.get("index")) == (unit.micro, unit.index):
            return int(span[0]), int(span[1])
    return None


def _holds(lab: Lab, unit: int, span: tuple[int, int]) -> bool:
    """The row fails with these tokens and not before them."""
    start, end = span
    return _prefix_fails(lab, unit, end) and not (start > 0 and _prefix_fails(lab, unit, start))


def _shortest_failing_prefix(lab: Lab, unit: int, width: int) -> int:
    good, bad = 0, width
    while bad - good > 1:
        middle = (good + bad) // 2
        if _prefix_fails(lab, unit, middle):
            bad = middle
        else:
            good = middle
    return bad


def _prefix_fails(lab: Lab, unit: int, tokens: int) -> bool:
    shot = lab.shoot(ask=Ask(units=(unit,), prefix_tokens=tokens))
    # A prefix without any target may give 0/0 as its loss, with gradients of zero: that is another failure.
    return shot.bad and not (math.isnan(shot.reading.loss) and shot.reading.grad_norm == 0)
