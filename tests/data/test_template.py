"""The target mask is exact: every token of hand-written conversations, for several families of templates.

Notation: tokens as the vocabulary spells them (a leading space is shown as G-dot), supervised ones in brackets.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from finitune.core.errors import UserError
from finitune.core.types import Finding, RowId
from finitune.data.config import DataConfig
from finitune.data.encode import Encoder, Outcome
from finitune.data.records import Example, Message
from finitune.data.rowcodes import (
    ANSWER_REWRITTEN,
    CONTROL_TEXT,
    MASK_UNCERTAIN,
    RAW_NEEDS_ONE_TURN,
    TEMPLATE_DROPS,
    TEMPLATE_REFUSED,
    TURN_REWRITTEN,
)
from finitune.data.template import Rendered, chat_renderer

ROW = RowId("test.jsonl", 1, "0" * 12)
ONE = (Message("user", "Hello there"), Message("assistant", "Hi friend"))
TWO = (*ONE, Message("user", "How are you"), Message("assistant", "Fine thanks"))

MASKS = {
    "chatml": """
        <|im_start|> user Ċ Hello Ġthere <|im_end|> Ċ <|im_start|> assistant Ċ [Hi] [Ġfriend] [<|im_end|>] Ċ
        <|im_start|> user Ċ How Ġare Ġyou <|im_end|> Ċ <|im_start|> assistant Ċ [Fine] [Ġthanks] [<|im_end|>] Ċ""",
    "internlm2": """<s>
        <|im_start|> user Ċ Hello Ġthere <|im_end|> Ċ <|im_start|> assistant Ċ [Hi] [Ġfriend] [<|im_end|>] Ċ
        <|im_start|> user Ċ How Ġare Ġyou <|im_end|> Ċ <|im_start|> assistant Ċ [Fine] [Ġthanks] [<|im_end|>] Ċ""",
    "llama2": """
        <s> [ INST ] ĠHello Ġthere Ġ [ / INST ] [ĠHi] [Ġfriend] [Ġ] [</s>]
        <s> [ INST ] ĠHow Ġare Ġyou Ġ [ / INST ] [ĠFine] [Ġthanks] [Ġ] [</s>]""",
    "llama3": """<|begin_of_text|>
        <|start_header_id|> user <|end_header_id|> Ċ Ċ Hello Ġthere <|eot_id|>
        <|start_header_id|> assistant <|end_header_id|> Ċ Ċ [Hi] [Ġfriend] [<|eot_id|>]
        <|start_header_id|> user <|end_header_id|> Ċ Ċ How Ġare Ġyou <|eot_id|>
        <|start_header_id|> assistant <|end_header_id|> Ċ Ċ [Fine] [Ġthanks] [<|eot_id|>]""",
    "gemma": """<bos>
        <start_of_turn> user Ċ Hello Ġthere <end_of_turn> Ċ <start_of_turn> model Ċ [Hi] [Ġfriend] [<end_of_turn>] Ċ
        <start_of_turn> user Ċ How Ġare Ġyou <end_of_turn> Ċ
        <start_of_turn> model Ċ [Fine] [Ġthanks] [<end_of_turn>] Ċ""",
    "zephyr_generation": """
        <|user|> Ċ Hello Ġthere </s> Ċ <|assistant|> Ċ [Hi] [Ġfriend] [</s>] Ċ
        <|user|> Ċ How Ġare Ġyou </s> Ċ <|assistant|> Ċ [Fine] [Ġthanks] [</s>] Ċ""",
    # The role header is not the model's to say even where the template has no generation prompt.
    "chatml_without_prompt": """
        <|im_start|> user Ċ Hello Ġthere <|im_end|> Ċ <|im_start|> assistant Ċ [Hi] [Ġfriend] [<|im_end|>] Ċ
        <|im_start|> user Ċ How Ġare Ġyou <|im_end|> Ċ <|im_start|> assistant Ċ [Fine] [Ġthanks] [<|im_end|>] Ċ""",
    # The prompt "assistant: " ends in a space that " Hi" swallows: that token straddles, so it is no target.
    "plain_with_space": """
        user : ĠHello Ġthere Ċ assistant : ĠHi [Ġfriend] [Ċ]
        user : ĠHow Ġare Ġyou Ċ assistant : ĠFine [Ġthanks] [Ċ]""",
}


def encoder_of(tokenizer: Any, **settings: Any) -> Encoder:
    encoder = Encoder(tokenizer, DataConfig(**settings))
    encoder.prepare_conversations("messages")
    return encoder


def encode(tokenizer: Any, messages: tuple[Message, ...], **settings: Any) -> Outcome:
    (outcome,) = encoder_of(tokenizer, **settings).encode([Example(ROW, messages)])
    return outcome


def shown(tokenizer: Any, outcome: Outcome) -> list[str]:
    (row,) = outcome.rows
    tokens = tokenizer.convert_ids_to_tokens(row.ids.tolist())
    return [f"[{t}]" if s else t for t, s in zip(tokens, row.supervised, strict=True)]


@pytest.mark.parametrize("name", MASKS)
def test_mask_equals_the_hand_written_one(name: str, tokenizer_for: Callable[..., Any]) -> None:
    tokenizer = tokenizer_for(name)
    assert shown(tokenizer, encode(tokenizer, TWO)) == MASKS[name].split()


@pytest.mark.parametrize("name", MASKS)
def test_tokens_are_those_of_the_whole_text_in_context(name: str, tokenizer_for: Callable[..., Any]) -> None:
    tokenizer = tokenizer_for(name)
    messages = [{"role": m.role, "content": m.content} for m in TWO]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert encode(tokenizer, TWO).rows[0].ids.tolist() == tokenizer(whole, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", sorted(set(MASKS) - {"plain_with_space", "chatml_without_prompt"}))
def test_what_stands_before_an_answer_is_what_generation_is_given(name: str, tokenizer_for: Callable[..., Any]) -> None:
    tokenizer = tokenizer_for(name)
    row = encode(tokenizer, ONE).rows[0]
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hello there"}], add_generation_prompt=True)
    first = row.supervised.argmax()
    assert row.ids[:first].tolist() == prompt["input_ids"]


def test_generation_blocks_are_taken_at_their_word(tokenizer_for: Callable[..., Any]) -> None:
    tokenizer = tokenizer_for("zephyr_generation")
    block = "{% generation %}{{ m.content + eos_token + '\n' }}{% endgeneration %}"
    assert block in tokenizer.chat_template
    narrow = "{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token + '\n' }}"
    tokenizer.chat_template = tokenizer.chat_template.replace(block, narrow)
    line = "<|user|> Ċ Hello Ġthere </s> Ċ <|assistant|> Ċ [Hi] [Ġfriend] </s> Ċ"
    assert shown(tokenizer, encode(tokenizer, ONE)) == line.split()


ELSEWHERE = {
    "around the question": "{{ content if m.role == 'assistant' else '' }}{% if m.role == 'user' %}"
    "{% generation %}{{ content }}{% endgeneration %}{% endif %}",
    "around nothing": "{{ content }}{% if m.role == 'assistant' %}{% generation %}{% endgeneration %}{% endif %}",
}


@pytest.mark.parametrize("where", sorted(ELSEWHERE))
@pytest.mark.parametrize("turns", [ONE, TWO, (Message("user", "yes or no"), Message("assistant", "yes"))])
def test_a_generation_block_that_does_not_hold_the_answer_makes_no_mask(
    where: str, turns: tuple[Message, ...], tokenizer_for: Callable[..., Any]
) -> None:
    tokenizer = tokenizer_for("zephyr_generation")
    body = ELSEWHERE[where].replace("content", "m.content")
    tokenizer.chat_template = "{% for m in messages %}<|{{ m.role }}|>\n" + body + "{{ eos_token }}\n{% endfor %}"
    outcome = encode(tokenizer, turns)
    assert outcome.rows == ()
    assert [f.code for f in outcome.findings] == [MASK_UNCERTAIN.code]


def test_a_generation_block_may_write_the_answer_in_its_own_way(tokenizer_for: Callable[..., Any]) -> None:
    tokenizer = tokenizer_for("zephyr_generation")
    written = "{{ m.content | replace('Hi', 'Hello') + eos_token }}"
    body = (
        "{% if m.role == 'user' %}{{ m.content }}{% else %}{% generation %}"
        + written
        + "{% endgeneration %}{% endif %}"
    )
    tokenizer.chat_template = "{% for m in messages %}<|{{ m.role }}|>\n" + body + "\n{% endfor %}"
    assert encode(tokenizer, ONE).rows


def test_generation_blocks_and_the_general_method_agree(tokenizer_for: Callable[..., Any]) -> None:
    tagged, untagged = tokenizer_for("zephyr_generation"), tokenizer_for("zephyr_generation")
    untagged.chat_template = re.sub(r"{% (end)?generation %}", "", untagged.chat_template)
    assert untagged.chat_template != tagged.chat_template
    assert shown(tagged, encode(tagged, TWO)) == shown(untagged, encode(untagged, TWO))


@pytest.mark.parametrize("name", ["chatml", "zephyr_generation", "llama2"])
def test_a_turn_marked_as_context_is_not_trained(name: str, tokenizer_for: Callable[..., Any]) -> None:
    tokenizer = tokenizer_for(name)
    messages = (ONE[0], Message("assistant", "Hi friend", supervised=False), *TWO[2:])
    tokens = shown(tokenizer, encode(tokenizer, messages))
    assert "Hi" in tokens or "ĠHi" in tokens
    assert "[Ġthanks]" in tokens
    assert "[Ġfriend]" not in tokens


def test_a_user_turn_can_be_trained_on_request(tokenizer_for: Callable[..., Any]) -> None:
    tokenizer = tokenizer_for("chatml")
    messages = (Message("user", "Hello there", supervised=True), ONE[1])
    tokens = shown(tokenizer, encode(tokenizer, messages))
    assert tokens[:6] == ["<|im_start|>", "user", "Ċ", "[Hello]", "[Ġthere]", "<|im_end|>"]


def test_rewritten_history_is_context_and_says_so(tokenizer_for: Callable[..., Any]) -> None:
    tokenizer = tokenizer_for("rewrites_history")
    thinking = tuple(Message(m.role, f"<think>think</think>\n{m.content}") if m.role == "assistant" else m for m in TWO)
    outcome = encode(tokenizer, thinking)
    text = " ".join(shown(tokenizer, outcome))
    assert "assistant Ċ Hi Ġfriend <|im_end|>" in text
    assert text.endswith("assistant Ċ [<] [think] [>] [think] [<] [/] [think] [>] [Ċ] [Fine] [Ġthanks] [<|im_end|>] Ċ")
    (note,) = outcome.findings
    assert (note.code, note.data["turns"]) == (TURN_REWRITTEN.code, "1")


def test_history_that_is_not_rewritten_is_trained_whole(tokenizer_for: Callable[..., Any]) -> None:
    tokenizer = tokenizer_for("rewrites_history")
    assert shown(tokenizer, encode(tokenizer, TWO)) == MASKS["chatml"].split()


def test_an_answer_that_cannot_be_found_is_a_finding_not_a_guess(tokenizer_for: Callable[..., Any]) -> None:
    tokenizer = tokenizer_for("chatml_without_prompt")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "m.content", "(m.content | upper if m.role == 'assistant' else m.content)"
    )
    outcome = encode(tokenizer, ONE)
    assert outcome.rows == ()
    assert [f.code for f in outcome.findings] == [MASK_UNCERTAIN.code]


def test_short_answers_that_occur_in_markers_are_found_in_their_place(tokenizer_for: Callable[..., Any]) -> None:
    for name in ("chatml", "chatml_without_prompt", "llama3"):
        tokenizer = tokenizer_for(name)
        outcome = encode(tokenizer, (Message("user", "assistant"), Message("assistant", "a")))
        supervised = [t for t in shown(tokenizer, outcome) if t.startswith("[")]
        assert supervised == ["[a]", f"[{tokenizer.eos_token}]"], name


def test_what_a_template_puts_behind_the_end_token_is_not_trained(tokenizer_for: Callable[..., Any]) -> None:
    tokenizer = tokenizer_for("internlm2")
    tokenizer.chat_template += "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    tokens = shown(tokenizer, encode(tokenizer, ONE))
    assert tokens[-4:] == ["[Ġfriend]", "[<|im_end|>]", "Ċ", "</s>"]


def test_a_refusing_template_is_a_finding_with_its_reason(tokenizer_for: Callable[..., Any]) -> None:
    outcome = encode(tokenizer_for("gemma"), (Message("system", "Be kind"), *ONE))
    (finding,) = outcome.findings
    assert finding.code == TEMPLATE_REFUSED.code
    assert finding.data["reason"] == "no system role"
    assert finding.rows == (ROW,)


def test_a_turn_the_template_leaves_out_is_a_finding(tokenizer_for: Callable[..., Any]) -> None:
    messages = (*ONE, Message("tool", "Fine"), Message("assistant", "thanks"))
    (finding,) = encode(tokenizer_for("silent_about_tools"), messages).findings
    assert finding.code == TEMPLATE_DROPS.code
    assert (finding.data["turn"], finding.data["role"]) == (2, "tool")


def test_a_turn_printed_with_escapes_is_not_left_out(tokenizer_for: Callable[..., Any]) -> None:
    tokenizer = tokenizer_for("chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "m.content", "(m.content | tojson if m.role == 'tool' else m.content)"
    )
    messages = (*ONE, Message("tool", 'say "Hello"'), Message("assistant", "thanks"))
    assert len(encode(tokenizer, messages).rows) == 1


def test_tool_calls_are_text_unless_the_template_knows_them(tokenizer_for: Callable[..., Any]) -> None:
    tokenizer = tokenizer_for("chatml")
    call = Message("assistant", "", tool_calls=({"name": "f", "arguments": {"x": 1}},))
    row = encode(tokenizer, (ONE[0], call)).rows[0]
    trained = tokenizer.decode(row.ids[row.supervised])
    assert trained == '{"name": "f", "arguments": {"x": 1}}<|im_end|>'
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "m.content", "m.content + (('<call>' + m.tool_calls[0].function.name + '</call>') if m.tool_calls else '')"
    )
    row = encode(tokenizer, (ONE[0], call)).rows[0]
    assert tokenizer.decode(row.ids[row.supervised]) == "<call>f</call><|im_end|>"


def test_a_control_token_inside_a_text_is_noted_and_the_mask_stays_right(tokenizer_for: Callable[..., Any]) -> None:
    tokenizer = tokenizer_for("chatml")
    outcome = encode(tokenizer, (Message("user", "Hello <|im_end|>"), ONE[1]))
    assert [f.code for f in outcome.findings] == [CONTROL_TEXT.code]
    row = outcome.rows[0]
    assert tokenizer.decode(row.ids[row.supervised]) == "Hi friend<|im_end|>"


def test_a_template_that_writes_the_date_gives_the_same_tokens_every_day(tokenizer_for: Callable[..., Any]) -> None:
    tokenizer = tokenizer_for("chatml")
    tokenizer.chat_template = (
        "{% set day = strftime_now('%d %b %Y') if strftime_now is defined %}{{ day }}" + tokenizer.chat_template
    )
    row = encode(tokenizer, ONE).rows[0]
    assert tokenizer.decode(row.ids).startswith("26 Jul 2024<|im_start|>")


def test_raw_joins_prompt_answer_and_end_token(tokenizer_for: Callable[..., Any]) -> None:
    tokenizer = tokenizer_for(None)
    tokens = shown(tokenizer, encode(tokenizer, ONE, template="raw"))
    assert tokens == ["Hello", "Ġthere", "[Hi]", "[Ġfriend]", "[</s>]"]
    (finding,) = encode(tokenizer, TWO, template="raw").findings
    assert finding.code == RAW_NEEDS_ONE_TURN.code


def test_no_chat_template_is_one_clear_error(tokenizer_for: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=r"(?s)DAT010.*alpaca.*no chat template.*template: raw"):
        chat_renderer(tokenizer_for(None), "alpaca")


def test_spans_lie_in_the_text_and_in_order(tokenizer_for: Callable[..., Any]) -> None:
    for name in MASKS:
        rendered = chat_renderer(tokenizer_for(name), "messages").render(Example(ROW, TWO))
        assert isinstance(rendered, Rendered)
        assert not isinstance(rendered, Finding)
        flat = [edge for span in rendered.spans for edge in span]
        assert flat == sorted(flat)
        assert len(rendered.spans) == 2
        assert flat[-1] <= len(rendered.text)


@pytest.mark.parametrize("change", ["replace(' ', '_')", "upper", "tojson"])
def test_answers_in_the_words_of_the_template_are_told(tokenizer_for: Callable[..., Any], change: str) -> None:
    tokenizer = tokenizer_for("chatml")
    assert "m.content" in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace("m.content", f"(m.content | {change})")
    messages = (Message("user", "Say it"), Message("assistant", 'two "words" here'))
    told = [f for f in encode(tokenizer, messages).findings if f.code == ANSWER_REWRITTEN.code]
    assert [f.data["turn"] for f in told] == [1]


def test_white_space_around_and_within_an_answer_is_the_templates_own_affair(tokenizer_for: Callable[..., Any]) -> None:
    tokenizer = tokenizer_for("chatml")
    messages = (Message("user", "Say it"), Message("assistant", "  two\n\nwords  "))
    assert all(f.code != ANSWER_REWRITTEN.code for f in encode(tokenizer, messages).findings)
