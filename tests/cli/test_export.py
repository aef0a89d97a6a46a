"""``finitune export``: what it refuses to destroy, and that what it writes loads."""

from __future__ import annotations

import json

import pytest

from finitune.cli.export import check_output
from finitune.core.errors import UserError


def refusal(source, out, *, overwrite=False) -> str | None:
    try:
        check_output(source, out, overwrite=overwrite)
    except UserError as error:
        return error.code.code
    return None


def test_a_new_or_empty_folder_is_fine(tmp_path):
    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path / "a", tmp_path / "new" / "deep") is None
    assert refusal(tmp_path / "a", tmp_path / "empty") is None


def test_a_full_folder_needs_overwrite(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    assert refusal(tmp_path / "a", out) == "CFG066"
    assert refusal(tmp_path / "a", out, overwrite=True) is None


def test_overwrite_replaces_models_only(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    assert refusal(tmp_path / "a", out, overwrite=True) == "CFG067"


def test_the_source_and_what_holds_it_are_never_replaced(tmp_path):
    run = tmp_path / "run"
    (run / "final").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    assert refusal(run / "final", run / "final", overwrite=True) == "CFG067"
    assert refusal(run / "final", run, overwrite=True) == "CFG067"
    (tmp_path / "link").symlink_to(run)
    assert refusal(run / "final", tmp_path / "link", overwrite=True) == "CFG067"


def test_a_file_is_no_output(tmp_path):
    (tmp_path / "file").write_text("")
    assert refusal(tmp_path / "a", tmp_path / "file", overwrite=True) == "CFG067"
    assert refusal(tmp_path / "a", tmp_path / ("x" * 5000)) == "CFG067"


@pytest.mark.parametrize(("dtype", "stored"), [("fp32", "float32"), ("bf16", "bfloat16")])
def test_what_is_written_loads_with_the_dtype_asked_for(cli, tmp_path, dtype, stored):
    ran = cli("export", "tiny-internlm2", "out", "--dtype", dtype, "--json")
    assert ran.code == 0
    assert ran.record["num_parameters"] > 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == stored
    assert cli("chat", "out", "--prompt", "hi", "--max-new-tokens", "2", "--device", "cpu").code == 0


def test_internlm2_layout(cli, tmp_path):
    assert cli("export", "tiny-internlm2", "out", "--layout", "internlm2").code == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "internlm2"


def test_a_missing_source_is_a_user_error(cli, tmp_path):
    assert cli("export", "nowhere", "out").code == 2
    assert not (tmp_path / "out").exists()
