"""Whether a run's journal is whole, and says as much as its checkpoints saw of it."""

from __future__ import annotations

from pathlib import Path

from finitune.core import journal
from finitune.core.files import read_manifest
from finitune.core.messages.catalogue import text
from finitune.core.types import Finding
from finitune.train.codes_journal import JOURNAL_DAMAGED

_SHOWN = 5
_NOTHING = "00000000"


def journal_findings(path: Path, checkpoint: Path | None) -> list[Finding]:
    """SYS041 with every damaged place; an end that is missing is known by what ``checkpoint`` saw of the journal.

    Raises OSError where the journal cannot be read.
    """
    if not path.is_file():
        return []
    places = [str(damage) for damage in journal.check(path)]
    if checkpoint is not None and not _seen_by(checkpoint, path):
        places.append(text("journal.cut", name=checkpoint.name))
    if not places:
        return []
    shown = "; ".join(places[:_SHOWN]) + ("; ..." if len(places) > _SHOWN else "")
    return [JOURNAL_DAMAGED.find(str(path), path=str(path), count=len(places), places=shown)]


def _seen_by(checkpoint: Path, path: Path) -> bool:
    """Whether the journal still has the line that was its last when the (intact) checkpoint was begun."""
    link = read_manifest(checkpoint).get("journal")
    return not isinstance(link, str) or link == _NOTHING or journal.holds(path, link)
