"""Examples to token ids with an exact target mask: render, tokenise once in context, fit to max_length."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from finitune.core.errors import UserError
from finitune.core.types import Finding, RowId
from finitune.data.codes import MAX_LENGTH_TOO_SMALL
from finitune.data.config import DataConfig
from finitune.data.fit import Fitter
from finitune.data.records import Encoded, Example, Message, row_finding
from finitune.data.rowcodes import CONTROL_TEXT, ID_BEYOND_EMBEDDING, NO_SUPERVISED
from finitune.data.setcodes import MARKER_SPLITS
from finitune.data.template import ChatRenderer, RawRenderer, Rendered, Renderer, chat_renderer, special_texts
from finitune.data.tokens import OffsetTokenizer, Tokens, supervised_mask

# Control markers as templates spell them: <|im_end|>, <|eot_id|>, <start_of_turn>, <end_of_turn>.
_MARKER = re.compile(r"<\|[^|<>{}\s]+\|>|<(?:start|end)_of_turn>")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one example: its token rows (none if it is bad) and what there is to say about it."""

    rows: tuple[Encoded, ...]
    findings: tuple[Finding, ...] = ()


class Encoder:
    """Encodes examples with one tokenizer. Holds the tokenizer's copy; encoding changes nothing in it."""

    def __init__(self, tokenizer: Any, config: DataConfig) -> None:
        """Raises UserError for a tokenizer without character offsets."""
        self._tokenizer, self._config = tokenizer, config
        self._tokens = OffsetTokenizer(tokenizer)
        bos = tokenizer.bos_token if self._tokens.adds_at_start(tokenizer.bos_token_id) else None
        self._begin, self._end = bos or "", tokenizer.eos_token or ""
        special = special_texts(tokenizer)
        self._control = re.compile("|".join(map(re.escape, special))) if special else None
        self.stop_ids = frozenset(tokenizer.convert_tokens_to_ids(list(special)))
        """Ids that may end an answer: those of all special tokens."""
        self._renderer: Renderer | None = None
        self._fitter: Fitter | None = None

    def prepare_conversations(self, format_name: str) -> None:
        """Get ready for conversations (plain text needs no template).

        Raises:
            UserError: no chat template; max_length smaller than the template.
        """
        if self._renderer is None:
            raw = self._config.template == "raw"
            renderer = RawRenderer(self._begin, self._end) if raw else chat_renderer(self._tokenizer, format_name)
            self._check_overhead(renderer)
            self._renderer, self._fitter = renderer, Fitter(renderer, self._tokens, self._config)

    def _check_overhead(self, renderer: Renderer) -> None:
        """The smallest conversation (one token each) must fit."""
        probe = Example(RowId("probe", 1, ""), (Message("user", "a"), Message("assistant", "a")))
        rendered = renderer.render(probe)
        needed = len(self._tokens.encode([rendered.text])[0]) if isinstance(rendered, Rendered) else 0
        if self._config.max_length < needed:
            numbers = {"max_length": self._config.max_length, "overhead": needed - 2, "needed": needed}
            raise UserError(MAX_LENGTH_TOO_SMALL, "data.max_length", **numbers)

    @property
    def has_end(self) -> bool:
        """Whether plain text gets an end token."""
        return bool(self._end)

    @property
    def shows_tools(self) -> bool:
        """Whether the template has a place for tool descriptions."""
        return isinstance(self._renderer, ChatRenderer) and "tools" in self._renderer.tool_source

    @property
    def wraps_prompts(self) -> bool:
        """Whether a chat template is put around prompts."""
        return isinstance(self._renderer, ChatRenderer)

    def template_findings(self) -> list[Finding]:
        """Control markers that the template writes and this tokenizer splits."""
        if not isinstance(self._renderer, ChatRenderer):
            return []
        markers = sorted(set(_MARKER.findall(self._renderer.source)))
        sizes = [len(t) for t in self._tokens.encode(markers)] if markers else []
        pairs = zip(markers, sizes, strict=True)
        return [MARKER_SPLITS.find("chat template", marker=m, num_tokens=n) for m, n in pairs if n != 1]

    def encode(self, examples: Sequence[Example]) -> list[Outcome]:
        """One outcome per example, in order. Conversations need :meth:`prepare_conversations` first."""
        rendered = [self._render(example) for example in examples]
        texts = [r.text for r in rendered if isinstance(r, Rendered)]
        tokens = iter(self._tokens.encode(texts))
        return [
            Outcome((), (r,)) if isinstance(r, Finding) else self._finish(e, r, next(tokens))
            for e, r in zip(examples, rendered, strict=True)
        ]

    def _render(self, example: Example) -> Rendered | Finding:
        if example.text is not None:
            text = f"{self._begin}{example.text}{self._end}"
            return Rendered(text, ((0, len(text)),))
        assert self._renderer is not None, "prepare_conversations was not called"
        return self._renderer.render(example)

    def _finish(self, example: Example, rendered: Rendered, tokens: Tokens) -> Outcome:
        notes = (*rendered.notes, *self._control_notes(example))
        if example.text is not None:
            mask = supervised_mask(tokens.offsets_N2, rendered.spans)
            return self._checked(list(self._chunks(example.id, tokens.ids, mask)), notes)
        assert self._fitter is not None, "prepare_conversations was not called"
        fitted = self._fitter.fit(example, rendered, tokens)
        if isinstance(fitted, Finding):
            return Outcome((), (fitted,))
        return self._checked([Encoded(example.id, fitted.ids, fitted.supervised)], (*notes, *fitted.notes))

    def _chunks(self, row: RowId, ids: np.ndarray, mask: np.ndarray) -> Iterator[Encoded]:
        """Pieces of at most max_length that overlap by one token, so that each token but the first is a target once."""
        stride = max(self._config.max_length - 1, 1)
        for number, start in enumerate(range(0, max(len(ids) - 1, 1), stride)):
            stop = start + stride + 1
            piece = mask[start:stop].copy()
            piece[:1] = False
            yield Encoded(row, ids[start:stop].copy(), piece, number)

    def _checked(self, rows: list[Encoded], notes: tuple[Finding, ...]) -> Outcome:
        """Refuse a row that trains nothing, or whose ids the model does not have."""
        limit = self._config.vocab_rows
        for row in rows:
            if not row.supervised.any():
                return Outcome((), (row_finding(NO_SUPERVISED, row.id, num_tokens=len(row)),))
            largest = int(row.ids.max())
            if limit is not None and largest >= limit:
                token = self._tokens.text_of(largest)
                data: dict[str, Any] = {"token": token, "token_id": largest, "vocab_rows": limit}
                return Outcome((), (row_finding(ID_BEYOND_EMBEDDING, row.id, **data),))
        return Outcome(tuple(rows), notes)

    def _control_notes(self, example: Example) -> Iterator[Finding]:
        """At most one note per example: a special token spelled out inside its texts."""
        texts = [(f"messages[{i}]", m.content) for i, m in enumerate(example.messages)]
        for field, content in [*texts, ("text", example.text or "")]:
            found = self._control.search(content) if self._control is not None else None
            if found:
                yield row_finding(CONTROL_TEXT, example.id, field, marker=found.group())
                return
