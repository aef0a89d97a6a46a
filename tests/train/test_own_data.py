"""The normal use: `finitune train my.yaml` on the user's own file, in every format and container."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finitune.cli.main import main
from finitune.core.journal import read

SHARED = Path(__file__).parents[2].parent / "shared" / "data"

REAL_FILES = (
    "hiyouga__LLaMA-Factory/alpaca_en_demo.json",
    "hiyouga__LLaMA-Factory/alpaca_zh_demo.json",
    "hiyouga__LLaMA-Factory/glaive_toolcall_en_demo.json",
    "InternLM__xtuner/openai_sft.jsonl",
    "InternLM__xtuner/mllm_sft_text_example_data.jsonl",
    "openai__grade-school-math/data/train.jsonl",
    "01-ai__Yi/data/train.jsonl",
    "lm-sys__FastChat/dummy_conversation.json",
    "karpathy__char-rnn/tinyshakespeare/input.txt",
)


def recipe_for(folder: Path, data: Path) -> Path:
    path = folder / "my.yaml"
    path.write_text(
        f"""
model: {{name_or_path: tiny-llama}}
data: {{train: "{data}", max_length: 1024, limit_rows: 120}}
lora: {{r: 4}}
max_steps: 4
per_device_train_batch_size: 2
learning_rate: 1e-3
output_dir: "{folder / "run"}"
""",
        encoding="utf-8",
    )
    return path


@pytest.mark.parametrize("name", REAL_FILES)
def test_a_real_file_trains(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = SHARED / name
    if not data.is_file():
        pytest.skip(f"{name} is not beside the project (shared/data)")
    assert main(["train", str(recipe_for(tmp_path, data)), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)["result"]
    assert (answer["status"], answer["updates"], answer["skipped"]) == ("finished", 4, 0)
    first = next(r for r in read(tmp_path / "run" / "journal.jsonl") if r["kind"] == "step")
    assert all(data.name in row for row in first["rows"])


def test_parquet_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed (extra: parquet)")
    import pyarrow as pa

    rows = [{"instruction": f"Say {i}", "input": "", "output": f"{i} it is"} for i in range(40)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert main(["train", str(recipe_for(tmp_path, tmp_path / "rows.parquet")), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["result"]["updates"] == 4
