"""Islands: the smallest set of modules that cures when they, and only they, compute in fp32.

What it changes:
    The precision of some modules; all others stay in half.

What each outcome says:
    GOOD: these modules are where the range or the mantissa is missing; keeping them in fp32 costs little.
    BAD: no set short of everything cures; only another precision for the whole model does.

What it costs:
    One replay where the localised module is enough; else a bisection, at most 12.

Source:
    Measured: where one down_proj passes 65504, fp32 in that block's MLP alone cures. The bisection for a minimal set is
    that of QuickXplain (Junker 2004) for a property that more modules never undo.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import nn

from finitune.core.incident import Result, Suspect, Trigger, Words
from finitune.core.types import Reading
from finitune.engine.case import Case
from finitune.engine.conditions import NotPossible
from finitune.engine.experiments._tools import Findings, evidence, fails_in_step, products_are_half
from finitune.engine.lab import Lab
from finitune.engine.policy import is_scale_overflow
from finitune.engine.scaler import USUAL_SCALE

ORDER = 70
COST = 4.0
SAYS = {
    Result.GOOD: Words(
        "With only {modules} in fp32 the step is good ({num_tried} sets tried).",
        "仅把 {modules} 放在 fp32 中，该步即正常（试过 {num_tried} 组）。",
    ),
    Result.BAD: Words(
        "No part of the model is enough in fp32 to make the step good ({num_tried} sets tried).",
        "没有哪一部分模块单独用 fp32 就能使该步正常（试过 {num_tried} 组）。",
    ),
}
MAX_TRIES = 12
_NUMBERS = re.compile(r"\d+")


def wanted(case: Case) -> bool:
    """fp32 cures a step whose products are half, and neither a loss scale that suits all nor another kernel does."""
    other = (_scale_suits(case) and not _has_fallen(case)) or case.good("math_attention")
    return fails_in_step(case) and products_are_half(case) and case.good("fp32") and not other


def _scale_suits(case: Case) -> bool:
    """At a smaller loss scale the step is good, and no gradient is lost."""
    return case.good("loss_scales") and case.number("loss_scales", "suits", True) is not False


def _has_fallen(case: Case) -> bool:
    """A scale at which steps went well does no more: one part may have become loud, and the rest is fine there."""
    scale, before = case.reading.loss_scale, case.facts.get("scale_before")
    return case.trigger is Trigger.SCALE and scale is not None and before is not None and scale < before


def run(lab: Lab, case: Case) -> Findings:
    """Search. Raises NotPossible where modules cannot be set apart here, BudgetSpent."""
    search = _Search(lab)
    parts = parts_of(lab.port.model)
    # Where a smaller scale suits, only what is loud by itself is better kept apart: not half of the model.
    sets = [s for s in starts(case, lab.port.model, parts) if s != parts or not _scale_suits(case)]
    curing = next((s for s in sets if search.cures(s)), None)
    smallest = search.smallest(curing) if curing is not None else ()
    if not search.num_tried:
        raise search.refused or NotPossible("the model has no modules to set apart")
    good = bool(smallest) and (len(smallest) < len(parts) or curing != parts)
    found = evidence("islands", good, modules=list(smallest) if good else [], num_tried=search.num_tried)
    return found, tuple(_suspect(case, name) for name in smallest) if good else ()


def _suspect(case: Case, name: str) -> Suspect:
    """The module, with what is known of it already."""
    known = next((s.data for s in case.suspects_of("module") if s.name == name), {})
    return Suspect("module", name, {**known, "island": True})


def parts_of(model: nn.Module) -> tuple[str, ...]:
    """The parts of a model that can be islands: attention, MLP and norms of each block, and what is in no block."""
    blocks = [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential) and name]
    inner = [b for b in blocks if not any(b.startswith(f"{a}.") for a in blocks)]
    return tuple(_parts(model, "", inner))


def _parts(module: nn.Module, name: str, blocks: Sequence[str]) -> Iterator[str]:
    """In the order of the modules; a module without parameters is none."""
    for key, child in module.named_children():
        path = f"{name}.{key}" if name else key
        if next(child.parameters(), None) is None:
            continue
        if path in blocks:
            for index, block in child.named_children():
                yield from (list(_direct(block, f"{path}.{index}")) or [f"{path}.{index}"])
        elif any(b.startswith(f"{path}.") for b in blocks):
            yield from _parts(child, path, blocks)
        else:
            yield path


def _direct(block: nn.Module, path: str) -> Iterator[str]:
    return (f"{path}.{key}" for key, child in block.named_children() if next(child.parameters(), None) is not None)


def starts(case: Case, model: nn.Module, parts: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Sets to begin with: the localised module, the part it belongs to, that part of every block, everything."""
    modules = dict(model.named_modules())
    places = [str(s.data.get("module", "")) if s.kind == "op" else s.name for s in case.suspects_of("module", "op")]
    tried: list[tuple[str, ...]] = []
    for place in dict.fromkeys(p for p in places if p and p in modules):
        around = [p for p in parts if place == p or place.startswith(f"{p}.")]
        kin = [p for p in parts if around and _kind(p) == _kind(around[0])]
        tried += [(place,), tuple(around), tuple(dict.fromkeys([*around, *kin]))]
    yield from (s for s in dict.fromkeys([*tried, parts]) if s)


def _kind(name: str) -> str:
    """``layers.3.mlp`` and ``layers.7.mlp`` are of one kind."""
    return _NUMBERS.sub("*", name)


@dataclass(slots=True)
class _Search:
    """Tries sets of modules, and remembers."""

    lab: Lab
    num_tried: int = 0
    refused: NotPossible | None = None

    def cures(self, names: Sequence[str]) -> bool:
        """Whether the step is good with these modules in fp32."""
        together = tuple(dict.fromkeys((*self.lab.now.fp32_modules, *names)))
        conditions = replace(self.lab.now, fp32_modules=together, loss_scale=self._usual_scale())
        try:
            shot = self.lab.shoot(conditions)
            if shot.bad and self._is_left_to_the_scaler(shot.reading):
                shot = self.lab.shoot(replace(conditions, loss_scale=1.0))
        except NotPossible as reason:
            self.refused = reason
            return False
        self.num_tried += 1
        return not shot.bad

    def _usual_scale(self) -> float | None:
        """A scaler that came down for the sake of one part: the rest is to be as before, at the scale of then."""
        case, now = self.lab.case, self.lab.now.loss_scale
        scale, num = case.reading.loss_scale, case.facts.get("num_skipped")
        if now is not None or case.trigger is not Trigger.SCALE or scale is None:
            return now
        if _has_fallen(case):
            return float(case.facts["scale_before"])
        return min(scale * 2.0**num, USUAL_SCALE) if num else None

    def _is_left_to_the_scaler(self, reading: Reading) -> bool:
        """The forward pass is cured, and the gradients only overflow at this scale: a run takes a smaller one then."""
        return self.lab.case.trigger is Trigger.LOSS and self.lab.now.loss_scale is None and is_scale_overflow(reading)

    def smallest(self, curing: tuple[str, ...]) -> tuple[str, ...]:
        """A set within ``curing`` from which none can be left out; after MAX_TRIES the smallest so far that cures.

        Of the shortest prefix that cures, the last module is necessary; then the same with it kept and the rest before
        it, until those kept are enough: about log2(n) tries for each module of the result.
        """
        kept: tuple[str, ...] = ()
        rest = curing
        while rest and len(kept) + len(rest) > 1 and self.num_tried < MAX_TRIES:
            if kept and self.cures(kept):
                return kept
            length = self._shortest_prefix(kept, rest)
            if length is None:
                break
            kept, rest = (*kept, rest[length - 1]), rest[: length - 1]
        return (*kept, *rest)

    def _shortest_prefix(self, kept: tuple[str, ...], rest: tuple[str, ...]) -> int | None:
        """Length of the shortest prefix of ``rest`` that cures together with ``kept``; None: no tries are left."""
        too_short, enough = 0, len(rest)
        while enough - too_short > 1:
            if self.num_tried >= MAX_TRIES:
                return None
            middle = (too_short + enough) // 2
            if self.cures((*kept, *rest[:middle])):
                enough = middle
            else:
                too_short = middle
        return enough
