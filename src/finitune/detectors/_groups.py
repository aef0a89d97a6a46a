"""Module names as people say them: "mlp.down_proj of layers 11-27" instead of seventeen dotted names."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_NUMBERED = re.compile(r"^(?P<before>.*?\.)(?P<layer>\d+)(?:\.(?P<part>.+))?$")


@dataclass(frozen=True, slots=True)
class Group:
    """Modules of one kind in several layers."""

    modules: tuple[str, ...]
    """Full names, the worst first."""
    part: str
    """What they have in common: "mlp.down_proj"; "output" of whole layers; the name of a module without a layer."""
    layers: str
    """Their layers, "11-27"; "-" for a module without one."""


def loudest_group(amax: Mapping[str, float], within: float = 2.0) -> Group | None:
    """The module with the largest magnitude, and those of its kind that are not smaller by more than ``within``.

    A NaN is larger than anything. None where nothing was measured.
    """
    if not amax:
        return None
    size = {name: math.inf if math.isnan(value) else value for name, value in amax.items()}
    worst = max(size, key=size.__getitem__)
    kind, _ = _kind(worst)
    near = [n for n, v in size.items() if v * within >= size[worst] and _kind(n)[0] == kind]
    return _named(sorted(near or [worst], key=lambda n: (n != worst, -size[n])))


def _kind(name: str) -> tuple[tuple[str, str], int]:
    """(what comes before the layer number, what comes after), and that number; -1 for a name without one."""
    found = _NUMBERED.match(name)
    if found is None:
        return (name, ""), -1
    return (found["before"], found["part"] or ""), int(found["layer"])


def _named(modules: list[str]) -> Group:
    (before, part), layer = _kind(modules[0])
    if layer < 0:
        return Group(tuple(modules), before, "-")
    return Group(tuple(modules), part or "output", ranges(_kind(n)[1] for n in modules))


def ranges(numbers: Iterable[int]) -> str:
    """Whole numbers in order, runs joined: 3, 5, 6, 7 -> "3, 5-7"."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
