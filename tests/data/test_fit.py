"""The length policy: nothing of an answer is lost in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finitune.core.types import RowId
from finitune.data.config import DataConfig
from finitune.data.encode import Encoder, Outcome
from finitune.data.records import Example, Message
from finitune.data.rowcodes import (
    ANSWER_TOO_LONG,
    ANSWER_TRUNCATED,
    PROMPT_TRUNCATED,
    ROW_TOO_LONG,
    TURNS_DROPPED,
)

ROW = RowId("test.jsonl", 7, "0" * 12)
SYSTEM = Message("system", "Be kind")
LONG = Message("user", "Hello" + " there" * 40 + " friend")
ANSWER = Message("assistant", "Fine thanks")


def fit(tokenizer: Any, *messages: Message, **settings: Any) -> Outcome:
    encoder = Encoder(tokenizer, DataConfig(**settings))
    encoder.prepare_conversations("messages")
    (outcome,) = encoder.encode([Example(ROW, messages)])
    return outcome


def codes(outcome: Outcome) -> list[str]:
    return [f.code for f in outcome.findings]


def trained(tokenizer: Any, outcome: Outcome) -> str:
    (row,) = outcome.rows
    return str(tokenizer.decode(row.ids[row.supervised]))


@pytest.fixture(scope="module")
def tokenizer(tokenizer_for: Callable[..., Any]) -> Any:
    return tokenizer_for("chatml")


def test_a_row_of_exactly_max_length_is_left_alone(tokenizer: Any) -> None:
    length = len(fit(tokenizer, LONG, ANSWER).rows[0])
    assert codes(fit(tokenizer, LONG, ANSWER, max_length=length)) == []
    assert codes(fit(tokenizer, LONG, ANSWER, max_length=length - 1)) == [PROMPT_TRUNCATED.code]


def test_the_prompt_gives_way_from_its_start_and_the_rest_stays_whole(tokenizer: Any) -> None:
    outcome = fit(tokenizer, SYSTEM, LONG, ANSWER, max_length=40)
    (row,) = outcome.rows
    text = tokenizer.decode(row.ids)
    assert len(row) == 40
    assert text.startswith("<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\n there there")
    assert " there friend<|im_end|>\n" in text
    assert trained(tokenizer, outcome) == "Fine thanks<|im_end|>"
    assert codes(outcome) == [PROMPT_TRUNCATED.code]
    assert outcome.findings[0].data["num_removed"] == outcome.findings[0].data["num_tokens"] - 40


def test_oldest_turns_go_before_the_last_prompt_is_touched(tokenizer: Any) -> None:
    earlier = (Message("user", "How are you"), Message("assistant", "Hi friend"))
    last = (Message("user", "Hello there"), ANSWER)
    outcome = fit(tokenizer, SYSTEM, *earlier, *last, max_length=24)
    text = tokenizer.decode(outcome.rows[0].ids)
    assert "Be kind" in text
    assert "How are you" not in text
    assert "Hello there" in text
    (note,) = outcome.findings
    assert (note.code, note.data["num_dropped"], note.data["num_answers"]) == (TURNS_DROPPED.code, 2, 1)


def test_turns_stay_where_only_they_are_trained(tokenizer: Any) -> None:
    tail = (Message("user", "Hello there"), Message("assistant", "Hi", supervised=False))
    outcome = fit(tokenizer, LONG, ANSWER, *tail, max_length=45)
    assert trained(tokenizer, outcome) == "Fine thanks<|im_end|>"
    assert codes(outcome) == [PROMPT_TRUNCATED.code]


def test_the_prompt_is_never_cut_below_the_floor(tokenizer: Any) -> None:
    whole = len(fit(tokenizer, LONG, ANSWER).rows[0])
    least = whole - 42 + 16  # the prompt has 42 tokens
    assert len(fit(tokenizer, LONG, ANSWER, max_length=least).rows) == 1
    outcome = fit(tokenizer, LONG, ANSWER, max_length=least - 1)
    assert outcome.rows == ()
    (finding,) = outcome.findings
    assert (finding.code, finding.data["needed"]) == (ANSWER_TOO_LONG.code, least)
    assert len(fit(tokenizer, LONG, ANSWER, max_length=least - 1, prompt_floor=15).rows) == 1


def test_an_answer_that_does_not_fit_is_a_finding_with_its_numbers(tokenizer: Any) -> None:
    answer = Message("assistant", "Fine" + " thanks" * 30)
    (finding,) = fit(tokenizer, Message("user", "Hello"), answer, max_length=30).findings
    assert finding.code == ANSWER_TOO_LONG.code
    assert finding.data["num_supervised"] == 32  # 31 words and the end token
    assert finding.data["max_length"] == 30
    assert finding.rows == (ROW,)


def test_answers_are_cut_only_on_request_counted_and_without_a_false_end(tokenizer: Any) -> None:
    answer = Message("assistant", "Fine" + " thanks" * 30)
    outcome = fit(tokenizer, Message("user", "Hello"), answer, max_length=30, truncation="truncate_answer")
    assert len(outcome.rows[0]) == 30
    assert codes(outcome) == [ANSWER_TRUNCATED.code]
    assert trained(tokenizer, outcome).startswith("Fine thanks thanks")
    assert "<|im_end|>" not in trained(tokenizer, outcome)


def test_drop_row_drops_and_says_so(tokenizer: Any) -> None:
    outcome = fit(tokenizer, LONG, ANSWER, max_length=40, truncation="drop_row")
    assert (outcome.rows, codes(outcome)) == ((), [ROW_TOO_LONG.code])


def test_raw_prompts_are_cut_from_their_start_too(tokenizer_for: Callable[..., Any]) -> None:
    tokenizer = tokenizer_for(None)
    outcome = fit(tokenizer, LONG, ANSWER, max_length=25, template="raw")
    text = tokenizer.decode(outcome.rows[0].ids)
    assert len(outcome.rows[0]) == 25
    assert text.endswith(" there friendFine thanks</s>")
    assert trained(tokenizer, outcome) == "Fine thanks</s>"


word = st.sampled_from(["Hello", " there", " friend", "\n", " x", "é", "你好", " 🙂"])
contents = st.lists(word, min_size=1, max_size=25).map("".join).filter(str.strip)


@settings(deadline=None, max_examples=80)
@given(prompts=st.lists(contents, min_size=1, max_size=3), answer=contents, max_length=st.integers(20, 60))
def test_a_row_fits_with_its_whole_last_answer_or_is_a_finding(
    tokenizer: Any, prompts: list[str], answer: str, max_length: int
) -> None:
    turns = [m for p in prompts for m in (Message("user", p), Message("assistant", answer))]
    outcome = fit(tokenizer, *turns, max_length=max_length, prompt_floor=2)
    if outcome.rows:
        (row,) = outcome.rows
        assert len(row) <= max_length
        assert trained(tokenizer, outcome).endswith(answer + "<|im_end|>")
    else:
        assert codes(outcome) == [ANSWER_TOO_LONG.code]
