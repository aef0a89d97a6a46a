"""Which cases there are: a fault or a control, in a run, at a precision, under a seed, with a contender."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from random import Random

from finitune.core.registry import load, names

BESIDE_REAL = ("plain", "clip_and_skip")
MODELS = ("llama_19m_256_tokens", "llama_19m_1024_tokens", "lora_19m_512_tokens")
"""What overhead is measured on (see overhead.py)."""

OURS = "finitune"


@dataclass(frozen=True, slots=True, order=True)
class Case:
    """One cell of the benchmark."""

    kind: str
    """"faults", "controls" or "overhead"."""
    name: str
    """Registered name of the fault or the control."""
    seed: int
    contender: str = OURS
    quick: bool = False
    """Healthy runs are cut short."""

    @property
    def key(self) -> str:
        """Stable text that names the case in files and filters."""
        return f"{self.kind}/{self.name}/{self.seed}/{self.contender}" + ("/quick" if self.quick else "")

    def where(self) -> tuple[str, str]:
        """(run, precision): the member's own list, one after the other by seed."""
        runs: Sequence[tuple[str, str]] = load(self.kind, self.name).RUNS
        return runs[self.seed % len(runs)]

    def random(self) -> Random:
        """What the fault draws from: the same for every contender."""
        return Random(f"{self.name}/{self.seed}")


def cases(
    seeds: Sequence[int],
    patterns: Sequence[str] = (),
    contenders: Sequence[str] = (OURS,),
    *,
    heavy: bool = False,
    quick: bool = False,
    others: Sequence[int] | None = None,
) -> list[Case]:
    """All cases whose name or key matches one of the patterns (shell wildcards, or a part of it); all without patterns.

    ``heavy``: also the members that say HEAVY (a real model), which are left out otherwise. ``quick``: short
    healthy runs, and no overhead. ``others``: seeds of the contenders that are not ours; None: the same.
    """
    found = []
    for kind, name in _members(heavy=heavy):
        for contender in contenders:
            asked = seeds if contender == OURS or others is None else others
            if _is_due(kind, name, contender) and not (quick and kind == "overhead"):
                found += [Case(kind, name, seed, contender, quick) for seed in _seeds(kind, name, asked)]
    return [c for c in found if _matches(c, patterns)]


def _is_heavy(kind: str, name: str) -> bool:
    return kind != "overhead" and bool(getattr(load(kind, name), "HEAVY", False))


def _is_due(kind: str, name: str, contender: str) -> bool:
    """Healthy runs and the real model's are for the guard alone; the latter also for what it is measured against."""
    if kind != "faults":
        return contender == OURS
    return contender in (OURS, *BESIDE_REAL) or not _is_heavy(kind, name)


def _seeds(kind: str, name: str, seeds: Sequence[int]) -> Sequence[int]:
    """A case of the real model takes minutes: it is run under the first seed only, as overhead is."""
    return seeds[:1] if kind == "overhead" or _is_heavy(kind, name) else seeds


def _members(*, heavy: bool) -> Iterator[tuple[str, str]]:
    yield from (("overhead", name) for name in MODELS)
    for kind in ("faults", "controls"):
        for name in names(kind):
            if heavy or not _is_heavy(kind, name):
                yield kind, name


def _matches(case: Case, patterns: Sequence[str]) -> bool:
    return not patterns or any(p in case.key or fnmatch(case.key, p) or fnmatch(case.name, p) for p in patterns)
