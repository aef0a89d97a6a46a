"""Loading as a whole: bad rows are counted or refused, faults come together, digests do not depend on place."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finitune.core.errors import UserError, UserErrors
from finitune.data.dataset import DataConfig, Dataset, Source, load_dataset, split

ROWS = [{"question": f"Hello {i}", "answer": f"Fine {i}"} for i in range(20)]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_for: Callable[..., Any]) -> Any:
    return tokenizer_for("chatml")


def codes_of(error: Any) -> list[str]:
    return [e.code.code for e in error.errors]


def test_rows_come_in_file_order_with_their_ids(write: Callable[..., str], tokenizer: Any) -> None:
    path = write("a.jsonl", ROWS)
    data = load_dataset(path, tokenizer, DataConfig())
    assert [(r.id.source, r.id.row) for r in data.rows] == [(path, i + 1) for i in range(20)]
    assert data.counts == {}
    assert data.num_read == len(data) == 20
    assert data.formats == {path: "prompt_completion"}
    assert data.lengths.tolist() == [len(r.ids) for r in data.rows]
    assert (data.num_supervised > 0).all()


def test_bad_rows_are_left_out_counted_and_located(write: Callable[..., str], tokenizer: Any) -> None:
    path = write(
        "a.jsonl",
        '{"question": "Q", "answer": "A"}\n{"question": "Q", "answer": ""}\n{broken\n{"question": 1, "answer": "A"}\n',
    )
    data = load_dataset(path, tokenizer, DataConfig())
    assert len(data) == 1
    assert data.counts == {"DAT030": 1, "DAT034": 1, "DAT035": 1}
    assert {f.rows[0].row: f.data["field"] for f in data.findings} == {2: "answer", 3: "", 4: "question"}


def test_on_bad_row_stop_refuses_and_shows_the_rows(write: Callable[..., str], tokenizer: Any) -> None:
    path = write("a.jsonl", [*ROWS, {"question": "Q", "answer": " "}, {"question": "", "answer": "A"}])
    with pytest.raises(UserErrors) as caught:
        load_dataset(path, tokenizer, DataConfig(on_bad_row="stop"))
    assert codes_of(caught.value) == ["DAT013", "DAT035", "DAT036"]
    assert f"{path}:21 field 'answer'" in str(caught.value)
    assert len(load_dataset(path, tokenizer, DataConfig(on_bad_row="skip"))) == 20


def test_notes_alone_do_not_stop(write: Callable[..., str], tokenizer: Any) -> None:
    path = write("a.jsonl", [{"question": "Hello <|im_end|>", "answer": "Fine"}])
    data = load_dataset(path, tokenizer, DataConfig(on_bad_row="stop"))
    assert data.counts == {"DAT064": 1}


def test_all_rows_bad_is_an_error_with_counts_and_the_first(write: Callable[..., str], tokenizer: Any) -> None:
    path = write("a.jsonl", [{"question": "Q", "answer": ""}] * 3 + [{"question": "", "answer": "A"}])
    with pytest.raises(UserError) as caught:
        load_dataset(path, tokenizer, DataConfig())
    assert caught.value.code.code == "DAT012"
    assert caught.value.data["counts"] == "DAT035 x 3, DAT036 x 1"
    assert "row 1: 'answer' is empty" in str(caught.value)


def test_a_file_without_one_readable_row_is_all_bad(write: Callable[..., str], tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"(?s)DAT012.*DAT030 x 2"):
        load_dataset(write("a.jsonl", "{broken\nnonsense\n"), tokenizer, DataConfig())


def test_blank_lines_only_is_no_usable_row(write: Callable[..., str], tokenizer: Any) -> None:
    with pytest.raises(UserError, match="DAT012"):
        load_dataset(write("a.jsonl", "\n\n  \n"), tokenizer, DataConfig())


def test_wrong_columns_list_what_is_there_and_what_is_needed(write: Callable[..., str], tokenizer: Any) -> None:
    with pytest.raises(UserError) as caught:
        load_dataset(write("a.jsonl", [{"quesiton": "Q", "anwser": "A"}]), tokenizer, DataConfig())
    shown = str(caught.value)
    assert caught.value.code.code == "DAT006"
    assert "anwser, quesiton" in shown
    for name in ("alpaca: instruction, output", "messages: messages", "prompt_completion: prompt", "text: text"):
        assert name in shown


def test_faults_of_all_files_and_settings_are_raised_together(
    write: Callable[..., str], tokenizer: Any, tmp_path: Path
) -> None:
    files = [write("empty.jsonl", ""), str(tmp_path / "missing.jsonl"), str(tmp_path), write("a.jsonl", ROWS)]
    with pytest.raises(UserErrors) as caught:
        load_dataset(files, tokenizer, DataConfig(max_length=0, on_bad_row="ignore", format="alpca"))  # type: ignore[arg-type]
    assert codes_of(caught.value) == ["DAT017", "DAT017", "DAT015", "DAT003", "DAT001", "DAT002"]
    assert "alpaca" in caught.value.errors[2].data["hint"]


def test_faults_found_while_reading_are_raised_together(write: Callable[..., str], tokenizer: Any) -> None:
    files = [write("a.json", "[{broken"), write("b.jsonl", ROWS), write("c.jsonl", [{"x": 1}])]
    with pytest.raises(UserErrors) as caught:
        load_dataset(files, tokenizer, DataConfig())
    assert codes_of(caught.value) == ["DAT005", "DAT006"]


def test_no_source_at_all(tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"DAT017.*at least one file"):
        load_dataset([], tokenizer, DataConfig())


def test_an_unknown_format_of_one_file_and_unit(write: Callable[..., str], tokenizer: Any) -> None:
    path = write("a.jsonl", ROWS)
    with pytest.raises(UserError, match=r"DAT015.*'mesages'.*Did you mean messages"):
        load_dataset({path: "mesages"}, tokenizer, DataConfig())
    with pytest.raises(UserError, match=r"DAT017.*line | file"):
        load_dataset(Source(path, unit="page"), tokenizer, DataConfig())


def test_conversations_need_a_template_and_text_does_not(
    write: Callable[..., str], tokenizer_for: Callable[..., Any]
) -> None:
    bare = tokenizer_for(None)
    path = write("a.jsonl", ROWS)
    with pytest.raises(UserError, match=r"(?s)DAT010.*prompt_completion"):
        load_dataset([path, write("b.jsonl", ROWS)], bare, DataConfig())
    assert len(load_dataset(path, bare, DataConfig(template="raw"))) == 20
    assert len(load_dataset(write("a.txt", "Hello\nthere\n"), bare, DataConfig())) == 2
    document = [{"messages": [{"role": "pretrain", "content": "Hello there"}]}]
    assert len(load_dataset(write("p.jsonl", document), bare, DataConfig())) == 1


def test_each_file_has_its_own_format(write: Callable[..., str], tokenizer: Any) -> None:
    files = {write("a.jsonl", ROWS): "auto", write("b.json", [{"text": "Hello there"}]): "text"}
    data = load_dataset(files, tokenizer, DataConfig())
    assert sorted(data.formats.values()) == ["prompt_completion", "text"]
    assert len(data) == 21


def test_a_named_format_is_not_second_guessed(write: Callable[..., str], tokenizer: Any) -> None:
    path = write("a.jsonl", [{"question": "Q", "answer": "A", "text": "Hello there"}])
    data = load_dataset(path, tokenizer, DataConfig(format="text"))
    assert tokenizer.decode(data.rows[0].ids) == "Hello there<|im_end|>"


def test_limit_rows_counts_raw_rows_of_each_source(write: Callable[..., str], tokenizer: Any) -> None:
    data = load_dataset([write("a.jsonl", ROWS), write("b.jsonl", ROWS)], tokenizer, DataConfig(limit_rows=3))
    assert [r.id.row for r in data.rows] == [1, 2, 3, 1, 2, 3]


def test_the_digest_is_of_the_content_and_not_of_the_place(
    write: Callable[..., str], tokenizer: Any, tmp_path: Path
) -> None:
    path = write("a.jsonl", ROWS)
    moved = shutil.copy(path, tmp_path / "b.jsonl")
    data = load_dataset(path, tokenizer, DataConfig())
    assert load_dataset(moved, tokenizer, DataConfig()).digest == data.digest
    assert load_dataset(path, tokenizer, DataConfig(template="raw")).digest != data.digest
    assert load_dataset(path, tokenizer, DataConfig(limit_rows=19)).digest != data.digest
    flipped = [*data.rows[:-1], _other_mask(data.rows[-1])]
    assert Dataset(flipped).digest != data.digest


def _other_mask(row: Any) -> Any:
    mask = row.supervised.copy()
    mask[-2] = ~mask[-2]
    return type(row)(row.id, row.ids, mask)


def test_more_rows_than_a_batch_keep_their_order(write: Callable[..., str], tokenizer: Any) -> None:
    rows = [{"prompt": "Hello", "completion": f"Fine {i}"} for i in range(1300)]
    data = load_dataset(write("a.jsonl", rows), tokenizer, DataConfig())
    assert [r.id.row for r in data.rows] == list(range(1, 1301))
    assert tokenizer.decode(data.rows[1111].ids).endswith("Fine 1111<|im_end|>\n")


# What is odd about the whole.


def test_an_answer_without_an_end_token_is_told(write: Callable[..., str], tokenizer_for: Callable[..., Any]) -> None:
    path = write("a.jsonl", ROWS)
    plain = load_dataset(path, tokenizer_for("plain_with_space"), DataConfig())
    (finding,) = plain.findings
    assert (finding.code, finding.data) == ("DAT070", {"num_rows": 20, "total": 20})


@pytest.mark.parametrize("name", ["chatml", "internlm2", "llama2", "llama3", "gemma", "zephyr_generation"])
def test_every_answer_of_a_proper_template_ends_in_a_stop_token(
    name: str, write: Callable[..., str], tokenizer_for: Callable[..., Any]
) -> None:
    tokenizer = tokenizer_for(name)
    data = load_dataset(write("a.jsonl", ROWS), tokenizer, DataConfig())
    assert data.counts == {}
    for row in data.rows:
        last = int(row.ids[np.flatnonzero(row.supervised)[-1]])
        assert tokenizer.added_tokens_decoder[last].special


def test_tools_a_template_cannot_show_are_told(write: Callable[..., str], tokenizer_for: Callable[..., Any]) -> None:
    row = {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}],
        "tools": [{"name": "f"}],
    }
    tokenizer = tokenizer_for("chatml")
    assert load_dataset(write("a.jsonl", [row]), tokenizer, DataConfig()).counts == {"DAT072": 1}
    tokenizer.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + tokenizer.chat_template
    data = load_dataset(write("a.jsonl", [row]), tokenizer, DataConfig())
    assert data.counts == {}
    assert '"name": "f"' in tokenizer.decode(data.rows[0].ids)


def test_documents_without_end_token_placeholders_foreign_markers_and_copies_are_told(
    write: Callable[..., str], tokenizer: Any, tokenizer_for: Callable[..., Any]
) -> None:
    endless = tokenizer_for(None)
    endless.eos_token = None
    assert load_dataset(write("a.txt", "Hello there\n"), endless, DataConfig()).counts == {"DAT073": 1}
    rows = [{"prompt": "Human: Hi Assistant:", "completion": "I am {{name}}."}] * 2
    data = load_dataset(write("a.jsonl", rows), tokenizer, DataConfig())
    assert data.counts == {"DAT074": 1, "DAT075": 1, "DAT076": 1}
    assert {f.code: f.data["num_rows"] for f in data.findings} == {"DAT074": 2, "DAT075": 2, "DAT076": 1}
    raw = load_dataset(write("a.jsonl", rows), tokenizer, DataConfig(template="raw"))
    assert "DAT075" not in raw.counts


# Split.


def test_split_is_a_partition_in_file_order_and_repeatable(write: Callable[..., str], tokenizer: Any) -> None:
    data = load_dataset(write("a.jsonl", ROWS), tokenizer, DataConfig())
    train, held_out = split(data, eval_rows=5, seed=3)
    assert len(held_out) == 5
    assert sorted(r.id.row for r in (*train.rows, *held_out.rows)) == list(range(1, 21))
    assert [r.id.row for r in train.rows] == sorted(r.id.row for r in train.rows)
    again = split(data, eval_rows=5, seed=3)
    assert (again[0].digest, again[1].digest) == (train.digest, held_out.digest)
    assert split(data, eval_rows=5, seed=4)[1].digest != held_out.digest
    assert len(split(data, eval_fraction=0.25)[1]) == 5


def test_split_keeps_copies_and_pieces_on_one_side(write: Callable[..., str], tokenizer: Any) -> None:
    text = write("a.txt", "".join("Hello" + " there" * n + "\n" for n in (30, 30, 40, 50)))
    data = load_dataset(text, tokenizer, DataConfig(max_length=8))
    for seed in range(8):
        train, held_out = split(data, eval_rows=3, seed=seed)
        assert not {r.id.digest for r in train.rows} & {r.id.digest for r in held_out.rows}


@pytest.mark.parametrize("wanted", [{"eval_rows": 20}, {"eval_rows": 0}, {"eval_fraction": 1.0}, {}])
def test_a_split_that_leaves_one_side_empty_is_refused(
    wanted: dict[str, Any], write: Callable[..., str], tokenizer: Any
) -> None:
    data = load_dataset(write("a.jsonl", ROWS), tokenizer, DataConfig())
    with pytest.raises(UserError, match="DAT018"):
        split(data, **wanted)


def test_a_system_prompt_is_put_before_rows_that_have_none(tmp_path: Path) -> None:
    from finitune.core.types import RowId
    from finitune.data.records import Example, Message, with_system

    row = RowId("f", 1, "x")
    bare = Example(row, (Message("user", "a"), Message("assistant", "b")))
    own = Example(row, (Message("system", "mine"), *bare.messages))
    assert with_system(bare, "be brief").messages[0] == Message("system", "be brief")
    assert with_system(own, "be brief") == own
    assert with_system(Example(row, text="plain"), "be brief") == Example(row, text="plain")
    assert with_system(bare, None) == bare
