"""What is odd about a data set as a whole: counted while it is read, told once at its end."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from finitune.core.types import Finding
from finitune.data.encode import Encoder, Outcome
from finitune.data.records import Encoded, Example
from finitune.data.rowcodes import ANSWER_TRUNCATED
from finitune.data.setcodes import (
    DUPLICATES,
    FOREIGN_MARKERS,
    NO_END_TOKEN,
    PLACEHOLDERS,
    STOP_NOT_SUPERVISED,
    TOOLS_IGNORED,
)

_PLACEHOLDER = re.compile(r"\{\{\s*\w+\s*\}\}")
_FOREIGN = re.compile(r"\s*(Human:|USER:|### Instruction:|\[INST\]|<\|im_start\|>|<\|user\|>)")


@dataclass
class Survey:
    """Counts over the usable rows of all sources."""

    num_conversations: int = 0
    num_documents: int = 0
    num_without_stop: int = 0
    num_with_tools: int = 0
    num_copies: int = 0
    placeholders: Counter[str] = field(default_factory=Counter)
    foreign: Counter[str] = field(default_factory=Counter)
    _seen: set[str] = field(default_factory=set)

    def add(self, example: Example, outcome: Outcome, encoder: Encoder) -> None:
        """Take a usable row into account."""
        self.num_copies += example.id.digest in self._seen
        self._seen.add(example.id.digest)
        if example.text is not None:
            self.num_documents += 1
            return
        self.num_conversations += 1
        self.num_with_tools += bool(example.tools)
        cut = any(f.code == ANSWER_TRUNCATED.code for f in outcome.findings)
        if not cut and last_target(outcome.rows[-1]) not in encoder.stop_ids:
            self.num_without_stop += 1
        self._read(example)

    def _read(self, example: Example) -> None:
        answers = (m.content for m in example.messages if m.is_supervised())
        hit = next((h for h in map(_PLACEHOLDER.search, answers) if h), None)
        if hit:
            self.placeholders[hit.group()] += 1
        prompts = (m.content for m in example.messages if m.role == "user")
        wrapped = next((h for h in map(_FOREIGN.match, prompts) if h), None)
        if wrapped:
            self.foreign[wrapped.group(1)] += 1

    def findings(self, encoder: Encoder) -> list[Finding]:
        """What there is to say of the whole."""
        found = encoder.template_findings()
        if self.num_without_stop:
            found.append(STOP_NOT_SUPERVISED.find(num_rows=self.num_without_stop, total=self.num_conversations))
        if self.num_with_tools and not encoder.shows_tools:
            found.append(TOOLS_IGNORED.find(num_rows=self.num_with_tools))
        if self.num_documents and not encoder.has_end:
            found.append(NO_END_TOKEN.find(num_rows=self.num_documents))
        if self.placeholders:
            example = next(iter(self.placeholders))
            found.append(PLACEHOLDERS.find(num_rows=self.placeholders.total(), example=example))
        if encoder.wraps_prompts:
            found += [FOREIGN_MARKERS.find(marker=m, num_rows=n) for m, n in self.foreign.items()]
        if self.num_copies:
            found.append(DUPLICATES.find(num_rows=self.num_copies))
        return found


def last_target(row: Encoded) -> int:
    """Id of the last supervised token."""
    return int(row.ids[row.supervised.nonzero()[0][-1]])
