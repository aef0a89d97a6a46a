"""Codes: the stable name of everything FiniTune can find or refuse, with its page in every language.

A code is declared once, in the file that raises it: a member of a family carries its own
(``CODES`` of the module), everything else sits in the ``codes.py`` of its package. Codes are
never reused. ``finitune explain CODE`` prints the page; this module finds it without torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from finitune.core.types import Finding, Severity

PREFIXES: Mapping[str, str] = {
    "NUM": "numbers",
    "DAT": "data",
    "CFG": "configuration",
    "MOD": "model and weights",
    "OPT": "optimizer and schedule",
    "DST": "distributed",
    "SYS": "machine",
}

# Packages whose members carry codes; all of them import without torch.
_MEMBER_PACKAGES = ("detectors", "data/formats", "engine/causes")


@dataclass(frozen=True, slots=True)
class Text:
    """One language of a code: ``what`` is a template filled from the finding's numbers."""

    title: str
    what: str
    why: str
    cures: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Code:
    """A stable code, its default severity, and its page in each language."""

    code: str
    severity: Severity
    en: Text
    zh: Text

    def __post_init__(self) -> None:
        if self.code[:3] not in PREFIXES or not self.code[3:].isdigit() or len(self.code) != 6:
            raise ValueError(f"code {self.code!r} is not one of {', '.join(PREFIXES)} + 3 digits")

    def text(self, language: str) -> Text:
        """The page in ``language`` ("en" or "zh"); English for any other."""
        return self.zh if language == "zh" else self.en

    def find(self, where: str = "", *, veto: bool = False, rows: tuple[Any, ...] = (), **data: Any) -> Finding:
        """A Finding of this code with its default severity."""
        return Finding(self.code, self.severity, where, data, rows, veto)


class _Gaps(dict[str, Any]):
    """Template data that leaves an unknown name visible instead of raising."""

    def __missing__(self, key: str) -> str:
        return "{" + key + "}"


def fill(template: str, data: Mapping[str, Any]) -> str:
    """Fill ``{name}`` fields; floats are shown with 4 significant digits. Never raises."""
    shown = {k: _shown(v) for k, v in data.items()}
    try:
        return template.format_map(_Gaps(shown))
    except (ValueError, IndexError, AttributeError, KeyError, TypeError):
        return template


_LONGEST_CHARS = 600


def shorten(text: str) -> str:
    """``text``, or its two ends where it is longer than a message should quote."""
    half = _LONGEST_CHARS // 2
    return text if len(text) <= _LONGEST_CHARS else f"{text[:half]} ... {text[-half:]}"


def _shown(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.4g}"
    return shorten(value) if isinstance(value, str) else value


def _provider_names(root: Path) -> Iterator[str]:
    for path in sorted(root.rglob("codes.py")):
        if path.parent != root / "core":
            yield ".".join(path.relative_to(root.parent).with_suffix("").parts)
    for package in _MEMBER_PACKAGES:
        for path in sorted((root / package).glob("[a-z]*.py")):
            yield ".".join(path.relative_to(root.parent).with_suffix("").parts)


def _codes_of(module: ModuleType) -> Iterator[Code]:
    for value in getattr(module, "CODES", ()):
        if isinstance(value, Code):
            yield value


@lru_cache(maxsize=1)
def all_codes() -> Mapping[str, Code]:
    """Every declared code by name. Raises ValueError where a code is declared twice."""
    found: dict[str, Code] = {}
    for name in _provider_names(Path(__file__).parents[1]):
        for code in _codes_of(importlib.import_module(name)):
            if code.code in found:
                raise ValueError(f"code {code.code} is declared twice (again in {name})")
            found[code.code] = code
    return found


def lookup(code: str) -> tuple[Code, ModuleType] | None:
    """One code with the module that declares it, importing no more than that; None where there is no such code.

    Files are searched for the name first: importing all that declare codes takes longer than reading them.
    """
    root = Path(__file__).parents[1]
    own = [p for p in sorted(root.rglob("codes*.py")) if p.parent != root / "core"]
    members = [p for package in _MEMBER_PACKAGES for p in sorted((root / package).glob("[a-z]*.py"))]
    for path in [*own, *members]:
        if f'"{code}"' not in path.read_text(encoding="utf-8"):
            continue
        module = importlib.import_module(".".join(path.relative_to(root.parent).with_suffix("").parts))
        declared = [v for v in vars(module).values() if isinstance(v, Code) and v.code == code]
        if declared:
            return declared[0], module
    return None


def page_of(code: str) -> ModuleType | None:
    """The family member that declares ``code`` (its docstring is part of the page), if any."""
    for name in _provider_names(Path(__file__).parents[1]):
        module = importlib.import_module(name)
        if not name.endswith(".codes") and any(c.code == code for c in _codes_of(module)):
            return module
    return None
