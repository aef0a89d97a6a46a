"""Text to tokens with the characters each token stands for.

Works on a private copy of the fast tokenizer: no padding, no truncation, no added special tokens, and offsets
that are NOT trimmed. Byte-level tokenizers usually trim the leading space from a token's offsets; the token
" Paris" of "Answer: Paris" would then seem to begin inside the answer although the prompt owns its space.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from finitune.core.errors import UserError
from finitune.data.codes import SLOW_TOKENIZER
from finitune.data.template import Span


@dataclass(frozen=True, slots=True)
class Tokens:
    """One tokenised text."""

    ids: np.ndarray
    """int32 (N,)."""
    offsets_N2: np.ndarray
    """int32 (N, 2): characters [start, end) of each token."""

    def __len__(self) -> int:
        return len(self.ids)


class OffsetTokenizer:
    """A fast tokenizer's private copy; see the module docstring."""

    def __init__(self, tokenizer: Any) -> None:
        """Raises UserError for a tokenizer without character offsets."""
        from tokenizers import Tokenizer

        if not getattr(tokenizer, "is_fast", False):
            raise UserError(SLOW_TOKENIZER, type(tokenizer).__name__, tokenizer=type(tokenizer).__name__)
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        _untrim(state.get("post_processor"))
        self._copy = Tokenizer.from_str(json.dumps(state))
        self._copy.no_padding()
        self._copy.no_truncation()

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        """Tokens of each text; special tokens only where the text spells them out."""
        return [_tokens(e) for e in self._copy.encode_batch(list(texts), add_special_tokens=False)]

    def adds_at_start(self, token_id: int | None) -> bool:
        """Whether the tokenizer, asked for special tokens, puts this one first."""
        ids = self._copy.encode("a", add_special_tokens=True).ids
        return token_id is not None and ids[:1] == [token_id]

    def text_of(self, token_id: int) -> str:
        """The token as the vocabulary spells it."""
        return str(self._copy.id_to_token(token_id))


def _untrim(processor: dict[str, Any] | None) -> None:
    for part in (processor or {}).get("processors", [processor or {}]):
        if "trim_offsets" in part:
            part["trim_offsets"] = False


def _tokens(encoding: Any) -> Tokens:
    offsets = np.array(encoding.offsets, dtype=np.int32).reshape(-1, 2)
    return Tokens(np.array(encoding.ids, dtype=np.int32), offsets)


def supervised_mask(offsets_N2: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """Bool (N,): the tokens that lie wholly inside one of the spans [start, end).

    A token that straddles the start holds characters of the prompt; after the prompt alone the model could
    not have produced it. One that straddles the end says something the turn does not. Neither is a target.
    A token without characters (a word-start mark at ``start``) is one, as it follows the whole prompt.
    Position 0 never is a target: nothing predicts it.
    """
    starts, ends = offsets_N2[:, 0], offsets_N2[:, 1]
    mask = np.zeros(len(offsets_N2), dtype=bool)
    for start, end in spans:
        mask |= (starts >= start) & (ends <= end) & (starts < end)
    mask[:1] = False
    return mask
