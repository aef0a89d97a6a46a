"""Fitting a conversation to max_length without ever losing an answer in silence.

In this order, until the row fits:

1. the oldest exchanges go (never the system turn, never the last supervised turn);
2. the longest turn of context is cut from its start, down to ``prompt_floor`` tokens, then the next longest;
3. with ``truncate_answer`` the end of the row goes; otherwise the row is a Finding.

``drop_row`` does none of this. After each change the conversation is rendered and tokenised anew, so that the
tokens are always those of a text the template really writes. Whatever is cut is noted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from finitune.core.types import Finding
from finitune.data.config import DataConfig
from finitune.data.records import Example, row_finding
from finitune.data.rowcodes import (
    ANSWER_TOO_LONG,
    ANSWER_TRUNCATED,
    NO_SUPERVISED,
    PROMPT_TRUNCATED,
    ROW_TOO_LONG,
    TURNS_DROPPED,
)
from finitune.data.template import Rendered, Renderer
from finitune.data.tokens import OffsetTokenizer, Tokens, supervised_mask

# Cutting text can change how its new start is tokenised, so a cut may need a second, smaller one.
_MAX_CUTS_PER_TURN = 4


@dataclass(frozen=True, slots=True)
class Fitted:
    """Token ids (int32), targets (bool), and what was cut to get there."""

    ids: np.ndarray
    supervised: np.ndarray
    notes: tuple[Finding, ...] = ()


@dataclass(frozen=True, slots=True)
class _Draft:
    """A conversation on its way to fit."""

    example: Example
    rendered: Rendered
    tokens: Tokens


class Fitter:
    """Applies the length policy of one configuration."""

    def __init__(self, renderer: Renderer | None, tokens: OffsetTokenizer, config: DataConfig) -> None:
        self._renderer = renderer
        self._tokenizer = tokens
        self._config = config

    def fit(self, example: Example, rendered: Rendered, tokens: Tokens) -> Fitted | Finding:
        """The row in at most max_length tokens, or why that cannot be."""
        draft, limit = _Draft(example, rendered, tokens), self._config.max_length
        if len(tokens) <= limit:
            return _fitted(draft, ())
        if self._config.truncation == "drop_row":
            return row_finding(ROW_TOO_LONG, example.id, num_tokens=len(tokens), max_length=limit)
        shorter = self._without_oldest(draft)
        cut = self._cut_context(shorter)
        notes = (*self._dropped_note(draft, shorter), *self._cut_note(shorter, cut))
        if len(cut.tokens) <= limit:
            return _fitted(cut, notes)
        return self._answer_too_long(cut, notes)

    def _redraft(self, example: Example) -> _Draft | None:
        assert self._renderer is not None
        rendered = self._renderer.render(example)
        if isinstance(rendered, Finding):
            return None
        return _Draft(example, rendered, self._tokenizer.encode([rendered.text])[0])

    def _without_oldest(self, draft: _Draft) -> _Draft:
        """Leave out oldest exchanges, one at a time, while something supervised remains."""
        while len(draft.tokens) > self._config.max_length:
            shorter = _drop_exchange(draft.example)
            redrawn = self._redraft(shorter) if shorter is not None else None
            if redrawn is None:
                break
            draft = redrawn
        return draft

    def _cut_context(self, draft: _Draft) -> _Draft:
        """Cut the starts of context turns, the longest turn first."""
        messages = draft.example.messages
        turns = [i for i, m in enumerate(messages) if m.role != "system" and not m.is_supervised()]
        for turn in sorted(turns, key=lambda i: (-len(messages[i].content), i)):
            for _ in range(_MAX_CUTS_PER_TURN):
                if len(draft.tokens) <= self._config.max_length:
                    return draft
                redrawn = self._cut_turn(draft, turn)
                if redrawn is None:
                    break
                draft = redrawn
        return draft

    def _cut_turn(self, draft: _Draft, turn: int) -> _Draft | None:
        """The draft with as many tokens as needed (and allowed) cut from the start of one turn."""
        assert self._renderer is not None
        region = self._renderer.region(draft.example, turn)
        if region is None:
            return None
        starts = draft.tokens.offsets_N2[:, 0]
        inside = np.flatnonzero((starts >= region[0]) & (starts < region[1]))
        surplus = len(draft.tokens) - self._config.max_length
        num_cut = min(surplus, len(inside) - self._config.prompt_floor)
        if num_cut <= 0:
            return None
        keep_from = int(starts[inside[num_cut]]) if num_cut < len(inside) else region[1]
        message = replace(draft.example.messages[turn], content=draft.rendered.text[keep_from : region[1]])
        messages = (*draft.example.messages[:turn], message, *draft.example.messages[turn + 1 :])
        redrawn = self._redraft(replace(draft.example, messages=messages))
        return redrawn if redrawn is not None and len(redrawn.tokens) < len(draft.tokens) else None

    def _answer_too_long(self, draft: _Draft, notes: tuple[Finding, ...]) -> Fitted | Finding:
        limit, needed = self._config.max_length, len(draft.tokens)
        whole = _fitted(draft, notes)
        if self._config.truncation != "truncate_answer":
            data: dict[str, Any] = {"num_supervised": int(whole.supervised.sum()), "floor": self._config.prompt_floor}
            return row_finding(ANSWER_TOO_LONG, draft.example.id, needed=needed, max_length=limit, **data)
        cut = row_finding(ANSWER_TRUNCATED, draft.example.id, num_removed=needed - limit, num_tokens=needed)
        if not whole.supervised[:limit].any():
            return row_finding(NO_SUPERVISED, draft.example.id, num_tokens=limit)
        return Fitted(whole.ids[:limit].copy(), whole.supervised[:limit].copy(), (*notes, cut))

    def _dropped_note(self, before: _Draft, after: _Draft) -> Iterator[Finding]:
        old, new = before.example.messages, after.example.messages
        num_dropped = len(old) - len(new)
        if num_dropped:
            num_answers = sum(m.is_supervised() for m in old) - sum(m.is_supervised() for m in new)
            data: dict[str, Any] = {
                "num_dropped": num_dropped,
                "num_answers": num_answers,
                "max_length": self._config.max_length,
            }
            yield row_finding(TURNS_DROPPED, before.example.id, **data)

    def _cut_note(self, before: _Draft, after: _Draft) -> Iterator[Finding]:
        num_removed = len(before.tokens) - len(after.tokens)
        if num_removed:
            data: dict[str, Any] = {"num_removed": num_removed, "num_tokens": len(before.tokens)}
            yield row_finding(PROMPT_TRUNCATED, before.example.id, max_length=self._config.max_length, **data)


def _fitted(draft: _Draft, notes: tuple[Finding, ...]) -> Fitted:
    mask = supervised_mask(draft.tokens.offsets_N2, draft.rendered.spans)
    return Fitted(draft.tokens.ids, mask, notes)


def _drop_exchange(example: Example) -> Example | None:
    """Without the oldest exchange (up to the next user turn); None if nothing supervised would remain."""
    messages = example.messages
    first = 1 if messages and messages[0].role == "system" else 0
    following = [i for i, m in enumerate(messages) if m.role == "user" and i > first]
    if not following or not any(m.is_supervised() for m in messages[following[0] :]):
        return None
    return replace(example, messages=(*messages[:first], *messages[following[0] :]))
