"""From a conversation to text, and which characters of the text the model must produce.

The whole conversation is rendered ONCE with the tokenizer's own chat template, so that later its tokens are
those of the text in context. The supervised characters of an assistant turn are found in one of three ways:

1. ``{% generation %}`` blocks, where the template has them and the answers stand in them: the author's own word.
2. Prefixes. What the model is given to answer turn i is the rendering of the turns before it with the
   generation prompt. Where that is a prefix of the whole text, the turn's characters run from its end to the
   end of the rendering up to and including turn i: exactly what generation would have to produce. It holds the
   end-of-turn token; white space after that token is left out, since generation has stopped by then.
3. A stand-in. Where 2 fails (templates that rewrite history, or ignore ``add_generation_prompt`` and so
   would put the role header into the turn), the turn's content is replaced by a unique word; what stands
   around the word must stand around the content too.

Where none of them holds, an earlier turn becomes context only (a note), and a last turn makes the row bad:
never a silent wrong mask.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from finitune.core.errors import UserError
from finitune.core.types import Finding
from finitune.data.codes import NO_CHAT_TEMPLATE
from finitune.data.records import Example, Message, row_finding
from finitune.data.rowcodes import (
    ANSWER_REWRITTEN,
    MASK_UNCERTAIN,
    RAW_NEEDS_ONE_TURN,
    TEMPLATE_DROPS,
    TEMPLATE_REFUSED,
    TURN_REWRITTEN,
)

Span = tuple[int, int]

# Templates that write today's date (Llama 3) would give other tokens tomorrow, and a resumed run other data.
# They get the date that their own fallback names, whatever form they ask for.
_FIXED_DATE = "{% macro strftime_now(form) %}26 Jul 2024{% endmacro %}"
_STAND_IN = "QfinituneStandInQ"
_GENERATION = re.compile(r"{%-?\s*generation\s*-?%}")


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text."""

    text: str
    spans: tuple[Span, ...]
    """Supervised characters [start, end), in order, not overlapping."""
    notes: tuple[Finding, ...] = ()


class Renderer(Protocol):
    """How conversations become text."""

    def render(self, example: Example) -> Rendered | Finding:
        """The conversation as text with its supervised characters, or why that cannot be."""

    def region(self, example: Example, turn: int) -> Span | None:
        """The characters of one turn's content in the text; None where they cannot be told."""


@dataclass(frozen=True)
class RawRenderer:
    """Prompt, answer and end token joined as they are (no chat template)."""

    begin: str
    """Text of the begin token, "" where the tokenizer adds none."""
    end: str
    """Text of the end token, "" where the tokenizer has none."""

    def render(self, example: Example) -> Rendered | Finding:
        """One user turn and one assistant turn; anything else is a Finding."""
        if [m.role for m in example.messages] != ["user", "assistant"]:
            roles = ", ".join(m.role for m in example.messages)
            return row_finding(RAW_NEEDS_ONE_TURN, example.id, roles=roles)
        prompt, answer = example.messages
        head = self.begin + prompt.content
        text = head + with_calls(answer) + self.end
        return Rendered(text, ((len(head), len(text)),))

    def region(self, example: Example, turn: int) -> Span | None:
        """The prompt's characters."""
        return (len(self.begin), len(self.begin) + len(example.messages[0].content)) if turn == 0 else None


_SHOWN = 40
"""Characters of an answer in a finding."""


@dataclass(frozen=True)
class ChatRenderer:
    """A tokenizer's chat template. Made by :func:`chat_renderer`."""

    source: str
    """The template (Jinja; rendered in transformers' sandbox)."""
    tool_source: str
    """The template used for conversations with tools; usually the same."""
    variables: Mapping[str, Any]
    """Special tokens by name (``bos_token``, ...)."""
    markers: tuple[str, ...]
    """Texts of the special tokens, longest first."""

    def render(self, example: Example) -> Rendered | Finding:
        """See the module docstring."""
        try:
            text, blocks = self._text(example, example.messages)
        except Exception as error:  # noqa: BLE001  a template may raise anything; it is the row's finding
            return _refused(example, error)
        dropped = self._dropped(example, text)
        if dropped is not None:
            return row_finding(TEMPLATE_DROPS, example.id, turn=dropped, role=example.messages[dropped].role)
        assistants = [i for i, m in enumerate(example.messages) if m.role == "assistant"]
        wanted = [i for i, m in enumerate(example.messages) if m.is_supervised()]
        if len(blocks) == len(assistants) and set(wanted) <= set(assistants):
            by_turn = dict(zip(assistants, blocks, strict=True))
            missed = next((i for i in wanted if not self._holds(example, text, by_turn, i)), None)
            if missed is not None:
                return row_finding(MASK_UNCERTAIN, example.id, turn=missed)
            spans = {i: self._trimmed(text, by_turn[i]) for i in wanted}
            return Rendered(text, tuple(spans.values()), _rewritten(example, text, spans))
        return self._located(example, text, wanted)

    def region(self, example: Example, turn: int) -> Span | None:
        """By the stand-in method."""
        text = self._try(example, example.messages)
        return None if text is None else self._stand_in(example, text, turn)

    @cached_property
    def stop(self) -> str:
        """What the template writes after a last answer, up to the end of the first special token; or ""."""
        text = self._try(None, (Message("user", "a"), Message("assistant", _STAND_IN))) or ""
        end = text.rfind(_STAND_IN) + len(_STAND_IN)
        return text[end : self._after_marker(text, end)] if _STAND_IN in text else ""

    @cached_property
    def has_prompt(self) -> bool:
        """Whether ``add_generation_prompt`` changes anything."""
        question = (Message("user", "a"),)
        return self._try(None, question, prompt=True) != self._try(None, question)

    def _text(
        self, example: Example | None, messages: Sequence[Message], *, prompt: bool = False
    ) -> tuple[str, list[Span]]:
        """(text, generation blocks). Raises whatever the template raises."""
        from transformers.utils.chat_template_utils import render_jinja_template

        tools: list[Any] | None = list(example.tools) if example is not None and example.tools else None
        source = self.tool_source if tools else self.source
        blocks = _GENERATION.search(source) is not None and not prompt
        result: Any = render_jinja_template(
            conversations=[[_as_dict(m, "tool_calls" in source) for m in messages]],
            tools=tools,
            chat_template=source,
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=blocks,
            **self.variables,
        )
        texts, found = result
        return texts[0], [(int(a), int(b)) for a, b in found[0]] if blocks else []

    def _try(self, example: Example | None, messages: Sequence[Message], *, prompt: bool = False) -> str | None:
        """The text; None where the template refuses (one may demand a user turn first, say)."""
        try:
            return self._text(example, messages, prompt=prompt)[0]
        except Exception:  # noqa: BLE001  a template may raise anything
            return None

    def _holds(self, example: Example, text: str, by_turn: Mapping[int, Span], turn: int) -> bool:
        """Whether the block that is to be a turn's holds its answer; also where the template writes it otherwise."""
        if not self.marks_answers:
            return False
        start, end = by_turn[turn]
        if example.messages[turn].content.strip() in text[start:end]:
            return True
        twin = Message("assistant", _STAND_IN, tool_calls=example.messages[turn].tool_calls)
        changed = (*example.messages[:turn], twin, *example.messages[turn + 1 :])
        return self._is_marked(example, changed) is not False

    @cached_property
    def marks_answers(self) -> bool:
        """Whether the generation blocks hold the answer, in the smallest conversation that there is."""
        return self._is_marked(None, (Message("user", "a"), Message("assistant", _STAND_IN))) is not False

    def _is_marked(self, example: Example | None, messages: Sequence[Message]) -> bool | None:
        """Whether the unique word of a conversation stands in a generation block; None where that cannot be told."""
        try:
            text, blocks = self._text(example, messages)
        except Exception:  # noqa: BLE001  a template may raise anything
            return None
        at = text.find(_STAND_IN)
        if at < 0 or not blocks:
            return None
        return any(start <= at and at + len(_STAND_IN) <= end for start, end in blocks)

    def _located(self, example: Example, text: str, wanted: Sequence[int]) -> Rendered | Finding:
        spans: dict[int, Span] = {}
        rewritten: list[int] = []
        for turn in wanted:
            span = self._by_prefix(example, text, turn) or self._by_stand_in(example, text, turn)
            if span is not None and span[0] >= max((end for _, end in spans.values()), default=0):
                spans[turn] = span
            elif turn == wanted[-1]:
                return row_finding(MASK_UNCERTAIN, example.id, turn=turn)
            else:
                rewritten.append(turn)
        shown = ", ".join(map(str, rewritten))
        notes = (row_finding(TURN_REWRITTEN, example.id, turns=shown),) if rewritten else ()
        return Rendered(text, tuple(spans.values()), notes + _rewritten(example, text, spans))

    def _by_prefix(self, example: Example, text: str, turn: int) -> Span | None:
        messages = example.messages
        if messages[turn].role != "assistant":
            return None
        head = self._try(example, messages[:turn], prompt=True)
        last = turn == len(messages) - 1
        upto = text if last else self._try(example, messages[: turn + 1])
        if head is None or upto is None or not (text.startswith(upto) and upto.startswith(head)):
            return None
        if not self.has_prompt:  # then a role header may stand before the content
            at = text.find(messages[turn].content.strip(), len(head), len(upto))
            if at < 0 or text[len(head) : at].strip():
                return None
        return len(head), self._end(text, len(head), len(upto))

    def _end(self, text: str, start: int, end: int) -> int:
        """Where generation stops: after the turn's end token, before anything the template puts behind it."""
        at = text.rfind(self.stop, start, end) if self.stop else -1
        return at + len(self.stop) if at >= 0 else self._trimmed(text, (start, end))[1]

    def _by_stand_in(self, example: Example, text: str, turn: int) -> Span | None:
        span = self._stand_in(example, text, turn)
        if span is None or example.messages[turn].tool_calls:
            return None
        ends = example.messages[turn].role == "assistant" and self.stop and text.startswith(self.stop, span[1])
        return span[0], span[1] + (len(self.stop) if ends else 0)

    def _stand_in(self, example: Example, text: str, turn: int) -> Span | None:
        """The characters of a turn's content, where the template prints them unchanged."""
        message = example.messages[turn]
        twin = Message(message.role, _STAND_IN, message.supervised, message.tool_calls)
        other = self._try(example, (*example.messages[:turn], twin, *example.messages[turn + 1 :]))
        if other is None:
            return None
        before, found, after = other.partition(_STAND_IN)
        start, end = len(before), len(text) - len(after)
        if not found or _STAND_IN in after or start > end or not (text.startswith(before) and text.endswith(after)):
            return None
        return (start, end) if text[start:end].strip() == message.content.strip() else None

    def _dropped(self, example: Example, text: str) -> int | None:
        """The first turn of context that the template does not print."""
        for turn, message in enumerate(example.messages):
            content = message.content.strip()
            if message.role == "assistant" or not content or content in text:
                continue
            twin = Message(message.role, _STAND_IN)  # printed, but escaped or in capitals?
            other = self._try(example, (*example.messages[:turn], twin, *example.messages[turn + 1 :]))
            if other is None or _STAND_IN.lower() not in other.lower():
                return turn
        return None

    def _after_marker(self, text: str, start: int) -> int:
        """The end of a special token at ``start`` (white space before it allowed), else ``start``."""
        at = len(text) - len(text[start:].lstrip())
        found = next((m for m in self.markers if text.startswith(m, at)), None)
        return start if found is None else at + len(found)

    def _trimmed(self, text: str, span: Span) -> Span:
        """Without the white space after a closing special token."""
        kept = text[span[0] : span[1]].rstrip()
        return (span[0], span[0] + len(kept)) if kept.endswith(self.markers) else span


def _rewritten(example: Example, text: str, spans: Mapping[int, Span]) -> tuple[Finding, ...]:
    """DAT065 for the first answer that does not stand in its own span. White space is the template's own affair, and so
    is the form of tool calls.
    """
    for turn, (start, end) in spans.items():
        message = example.messages[turn]
        meant, shown = "".join(message.content.split()), "".join(text[start:end].split())
        if meant not in shown and not message.tool_calls:
            at = next((i for i, (a, b) in enumerate(zip(meant, shown, strict=False)) if a != b), 0)
            words = {"meant": meant[at : at + _SHOWN], "shown": shown[at : at + _SHOWN]}
            return (row_finding(ANSWER_REWRITTEN, example.id, turn=turn, **words),)
    return ()


def chat_renderer(tokenizer: Any, format_name: str) -> ChatRenderer:
    """The renderer of a Hugging Face tokenizer's chat template.

    Raises:
        UserError: it has none.
    """
    if not tokenizer.chat_template:
        raise UserError(NO_CHAT_TEMPLATE, type(tokenizer).__name__, format=format_name)
    return ChatRenderer(
        source=_dated(tokenizer.get_chat_template()),
        tool_source=_dated(tokenizer.get_chat_template(tools=[{}])),
        variables=dict(tokenizer.special_tokens_map),
        markers=special_texts(tokenizer),
    )


def _dated(source: str) -> str:
    return _FIXED_DATE + source if "strftime_now" in source else source


def special_texts(tokenizer: Any) -> tuple[str, ...]:
    """Texts of the special tokens, longest first."""
    added = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    return tuple(sorted({*added, *tokenizer.all_special_tokens} - {""}, key=lambda t: (-len(t), t)))


def with_calls(message: Message) -> str:
    """Content followed by the JSON of the tool calls: how a template without tool calls shows them."""
    if not message.tool_calls:
        return message.content
    calls = [dict(c) for c in message.tool_calls]
    shown = json.dumps(calls[0] if len(calls) == 1 else calls, ensure_ascii=False)
    return f"{message.content}\n{shown}" if message.content.strip() else shown


def _as_dict(message: Message, structured: bool) -> dict[str, Any]:
    """A message as chat templates want it."""
    if not message.tool_calls or not structured:
        return {"role": message.role, "content": with_calls(message)}
    calls = [{"type": "function", "function": dict(call)} for call in message.tool_calls]
    return {"role": message.role, "content": message.content, "tool_calls": calls}


def _refused(example: Example, error: Exception) -> Finding:
    roles = ", ".join(m.role for m in example.messages)
    reason = (str(error) or type(error).__name__).splitlines()[0][:200]
    return row_finding(TEMPLATE_REFUSED, example.id, roles=roles, reason=reason)
