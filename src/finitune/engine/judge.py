"""The judge: every detector looks at the reading; one veto aborts the step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from finitune.core import registry
from finitune.core.robust import History
from finitune.core.types import Finding, Judgement, Reading, Verdict

Detect = Callable[[History, Reading, Any], Finding | None]


@dataclass(frozen=True, slots=True)
class Judge:
    """The detectors in force with their settings, in the order of their names."""

    detectors: tuple[tuple[str, Detect, Any], ...]

    @classmethod
    def of(cls, settings: Mapping[str, Mapping[str, Any] | bool]) -> Judge:
        """All registered detectors; ``settings[name]`` is False (off) or fields of its Config.

        Raises:
            UnknownMember: a name that is no detector.
            TypeError, ValueError: a field the detector's Config does not take.
        """
        for name in settings:
            registry.load("detectors", name)
        chosen = []
        for name in registry.names("detectors"):
            given = settings.get(name, {})
            if given is False:
                continue
            module = registry.load("detectors", name)
            fields = given if isinstance(given, Mapping) else {}
            chosen.append((name, module.detect, module.Config(**fields)))
        return cls(tuple(chosen))

    @classmethod
    def only(cls, *names: str) -> Judge:
        """Just these detectors with their defaults. A run without guard keeps ``non_finite``: it is never off."""
        modules = [(name, registry.load("detectors", name)) for name in names]
        return cls(tuple((name, module.detect, module.Config()) for name, module in modules))

    def judge(self, history: History, reading: Reading) -> Judgement:
        """Ask every detector; any veto means ABORT."""
        found = [detect(history, reading, config) for _, detect, config in self.detectors]
        findings = tuple(f for f in found if f is not None)
        veto = any(f.veto for f in findings)
        return Judgement(Verdict.ABORT if veto else Verdict.COMMIT, findings)
