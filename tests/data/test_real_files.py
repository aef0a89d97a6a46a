"""Real files that people train on: they just work, and what is wrong with them is found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finitune.core.errors import UserError
from finitune.data.dataset import DataConfig, Source, load_dataset

# (file, format, rows read, rows bad) of the first 900 rows, with a generous max_length.
FILES = [
    ("hiyouga__LLaMA-Factory/alpaca_en_demo.json", "alpaca", 900, {}),
    ("hiyouga__LLaMA-Factory/alpaca_zh_demo.json", "alpaca", 900, {}),
    ("hiyouga__LLaMA-Factory/identity.json", "alpaca", 91, {}),
    ("hiyouga__LLaMA-Factory/glaive_toolcall_en_demo.json", "messages", 300, {}),
    ("hiyouga__LLaMA-Factory/dpo_zh_demo.json", "messages", 300, {}),
    ("hiyouga__LLaMA-Factory/reason_tool_use_demo_50.jsonl", "messages", 50, {}),
    ("hiyouga__LLaMA-Factory/wiki_demo.txt", "text", 30, {}),
    ("InternLM__xtuner/openai_sft.jsonl", "messages", 128, {}),
    ("InternLM__xtuner/mllm_sft_text_example_data.jsonl", "messages", 200, {}),
    ("InternLM__xtuner/pretrain_example_data.jsonl", "messages", 3, {}),
    ("openai__grade-school-math/data/train.jsonl", "prompt_completion", 900, {}),
    ("01-ai__Yi/data/train.jsonl", "prompt_completion", 900, {"DAT035": 1}),
    ("lm-sys__FastChat/dummy_conversation.json", "messages", 500, {}),
    ("yizhongw__self-instruct/seed_tasks.jsonl", "alpaca", 175, {}),
    ("LianjiaTech__BELLE/zh_seed_tasks.json", "alpaca", 175, {}),
    ("modelscope__data-juicer/demo-dataset-chatml.jsonl", "messages", 4, {}),
    ("karpathy__char-rnn/tinyshakespeare/input.txt", "text", 900, {}),
]


@pytest.mark.parametrize(("name", "kind", "num_read", "bad"), FILES, ids=[f[0].split("/")[-1] for f in FILES])
def test_file(
    name: str, kind: str, num_read: int, bad: dict[str, int], shared: Path, tokenizer_for: Callable[..., Any]
) -> None:
    path = str(shared / name)
    data = load_dataset(path, tokenizer_for("chatml"), DataConfig(max_length=40_000, limit_rows=900))
    assert data.formats == {path: kind}
    assert data.num_read == num_read
    assert {c: n for c, n in data.counts.items() if c < "DAT060"} == bad
    assert len({r.id for r in data.rows}) == num_read - sum(bad.values())
    assert all(r.supervised.any() for r in data.rows)


def test_the_two_empty_answers_of_yi_are_named(shared: Path, tokenizer_for: Callable[..., Any]) -> None:
    data = load_dataset(
        str(shared / "01-ai__Yi/data/train.jsonl"),
        tokenizer_for("chatml"),
        DataConfig(max_length=40_000, limit_rows=1800),
    )
    empty = [f.rows[0].row for f in data.findings if f.code == "DAT035"]
    assert empty == [847, 1716]  # numbered from 1
    assert "DAT075" in data.counts, "its prompts carry Human: ... Assistant:"


def test_unfilled_placeholders_of_identity_are_counted(shared: Path, tokenizer_for: Callable[..., Any]) -> None:
    path = str(shared / "hiyouga__LLaMA-Factory/identity.json")
    data = load_dataset(path, tokenizer_for("chatml"), DataConfig())
    (finding,) = data.findings
    assert (finding.code, finding.data["num_rows"]) == ("DAT074", 85)


def test_long_tool_prompts_keep_every_answer_or_say_so(shared: Path, tokenizer_for: Callable[..., Any]) -> None:
    """Cut at the right at 512 tokens of a real tokenizer, half of these rows lose every target."""
    path = str(shared / "hiyouga__LLaMA-Factory/reason_tool_use_demo_50.jsonl")
    data = load_dataset(path, tokenizer_for("chatml"), DataConfig(max_length=2048))
    assert data.counts["DAT060"] > 5
    kept = {r.id.row for r in data.rows}
    refused = {f.rows[0].row for f in data.findings if f.code == "DAT044"}
    assert kept | refused == set(range(1, 51))
    assert not kept & refused


def test_a_whole_novel_is_one_document_in_pieces(shared: Path, tokenizer_for: Callable[..., Any]) -> None:
    path = str(shared / "google__sentencepiece/botchan.txt")
    data = load_dataset(Source(path, unit="file"), tokenizer_for(None), DataConfig(max_length=4096))
    assert data.num_read == 1
    assert [r.chunk for r in data.rows] == list(range(len(data)))
    assert len(data) > 30


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("hiyouga__LLaMA-Factory/mllm_demo.json", "DAT012"),
        ("InternLM__xtuner/mllm_sft_single_image_example_data.jsonl", "DAT012"),
        ("InternLM__xtuner/gsm8k_train_example_data.jsonl", "DAT006"),
        ("lm-sys__FastChat/question.jsonl", "DAT006"),
        ("hiyouga__LLaMA-Factory/dataset_info.json", "DAT016"),
        ("meta-pytorch__torchtune/m.model", "DAT004"),
        ("JaidedAI__EasyOCR/chinese.jpg", "DAT004"),
        ("hiyouga__LLaMA-Factory", "DAT002"),
    ],
)
def test_what_cannot_be_trained_is_one_clear_error(
    name: str, code: str, shared: Path, tokenizer_for: Callable[..., Any]
) -> None:
    with pytest.raises(UserError) as caught:
        load_dataset(str(shared / name), tokenizer_for("chatml"), DataConfig())
    assert caught.value.code.code == code
    assert "{" not in str(caught.value).split("\n")[0]


def test_the_built_in_source_has_no_bad_row(tokenizer_for: Callable[..., Any]) -> None:
    data = load_dataset("finitune:stdlib", tokenizer_for("chatml"), DataConfig(max_length=4096, limit_rows=300))
    assert data.formats == {"finitune:stdlib": "docstrings"}
    assert len(data) == 300
    assert data.rows[0].id.source == "finitune:stdlib"
