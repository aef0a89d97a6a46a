"""Encoding: documents, limits of the vocabulary, and what the template needs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finitune.core.errors import UserError
from finitune.core.types import RowId
from finitune.data.config import DataConfig
from finitune.data.encode import Encoder, Outcome
from finitune.data.records import Example, Message

ROW = RowId("doc.txt", 2, "0" * 12)
CHAT = (Message("user", "Hello there"), Message("assistant", "Hi friend"))


def document(tokenizer: Any, text: str, **settings: Any) -> Outcome:
    (outcome,) = Encoder(tokenizer, DataConfig(**settings)).encode([Example(ROW, text=text)])
    return outcome


@pytest.fixture(scope="module")
def tokenizer(tokenizer_for: Callable[..., Any]) -> Any:
    return tokenizer_for(None)


def test_a_document_ends_in_the_end_token_and_all_but_the_first_are_targets(tokenizer: Any) -> None:
    (row,) = document(tokenizer, "Hello there friend").rows
    assert tokenizer.decode(row.ids) == "Hello there friend</s>"
    assert row.supervised.tolist() == [False, True, True, True]
    assert (row.ids.dtype, row.supervised.dtype) == (np.int32, np.bool_)


def test_the_begin_token_is_added_where_the_tokenizer_adds_it(tokenizer_for: Callable[..., Any]) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizer_for("internlm2")
    assert tokenizer.decode(document(tokenizer, "Hello").rows[0].ids) == "Hello</s>"
    start = tokenizer.convert_tokens_to_ids("<s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $0", special_tokens=[("<s>", start)])
    assert tokenizer.decode(document(tokenizer, "Hello").rows[0].ids) == "<s>Hello</s>"


def test_a_long_document_is_cut_into_pieces_and_keeps_its_id(tokenizer: Any) -> None:
    outcome = document(tokenizer, "Hello" + " there" * 20, max_length=8)
    assert outcome.findings == ()
    assert [r.chunk for r in outcome.rows] == [0, 1, 2]
    assert {r.id for r in outcome.rows} == {ROW}
    assert all(len(r) <= 8 for r in outcome.rows)


@settings(deadline=None, max_examples=60)
@given(num_words=st.integers(1, 60), max_length=st.integers(2, 20))
def test_every_token_of_a_document_but_the_first_is_a_target_exactly_once(
    tokenizer: Any, num_words: int, max_length: int
) -> None:
    text = " there" * num_words
    whole = tokenizer(text + "</s>", add_special_tokens=False)["input_ids"]
    rows = document(tokenizer, text, max_length=max_length).rows
    targets = [int(i) for r in rows for i in r.ids[r.supervised]]
    assert targets == whole[1:]
    assert all(len(r) <= max_length and not r.supervised[0] for r in rows)
    for before, after in pairwise(rows):
        assert before.ids[-1] == after.ids[0], "each piece begins with the token that predicts its first target"


def test_a_document_of_one_token_has_no_target(tokenizer_for: Callable[..., Any]) -> None:
    tokenizer = tokenizer_for(None)
    tokenizer.eos_token = None
    (finding,) = document(tokenizer, "Hello").findings
    assert finding.code == "DAT042"


def test_ids_beyond_the_embedding_are_findings_with_the_token(tokenizer: Any) -> None:
    largest = tokenizer.convert_tokens_to_ids("Hello")
    outcome = document(tokenizer, "Hello Hello", vocab_rows=largest)
    (finding,) = outcome.findings
    assert (finding.code, finding.data["vocab_rows"]) == ("DAT045", largest)
    assert finding.data["token_id"] >= largest
    assert document(tokenizer, "Hello Hello", vocab_rows=len(tokenizer)).findings == ()


def test_max_length_below_the_template_is_an_error_with_numbers(tokenizer_for: Callable[..., Any]) -> None:
    tokenizer = tokenizer_for("chatml")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}], tokenize=False
    )
    needed = len(tokenizer(text)["input_ids"])
    Encoder(tokenizer, DataConfig(max_length=needed)).prepare_conversations("messages")
    with pytest.raises(UserError, match="DAT011") as caught:
        Encoder(tokenizer, DataConfig(max_length=needed - 1)).prepare_conversations("messages")
    assert caught.value.data == {"max_length": needed - 1, "overhead": needed - 2, "needed": needed}


def test_a_marker_that_splits_is_found(tokenizer_for: Callable[..., Any]) -> None:
    tokenizer = tokenizer_for("chatml")
    encoder = Encoder(tokenizer, DataConfig())
    encoder.prepare_conversations("messages")
    assert encoder.template_findings() == []
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|no_such_marker|>")
    encoder = Encoder(tokenizer, DataConfig())
    encoder.prepare_conversations("messages")
    (finding,) = encoder.template_findings()
    assert (finding.code, finding.data["marker"]) == ("DAT071", "<|no_such_marker|>")
    assert finding.data["num_tokens"] > 1


def test_one_bad_example_leaves_its_neighbours_alone(tokenizer_for: Callable[..., Any]) -> None:
    encoder = Encoder(tokenizer_for("gemma"), DataConfig())
    encoder.prepare_conversations("messages")
    bad = Example(ROW, (Message("system", "no"), *CHAT))
    good = Example(ROW, CHAT)
    alone = encoder.encode([good])[0].rows[0]
    outcomes = encoder.encode([good, bad, good, Example(ROW, text="Hello there")])
    assert [len(o.rows) for o in outcomes] == [1, 0, 1, 1]
    assert outcomes[2].rows[0].ids.tolist() == alone.ids.tolist()
