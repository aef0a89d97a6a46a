"""What a user sees of a run: the plan, progress, refusals with their rows, the summary; in both languages."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from finitune.core.messages.catalogue import set_language
from finitune.report.live import Live
from finitune.report.words import aligned, width
from finitune.train.run import open_run
from support.faults import at_step, poison_output
from support.runs import tiny_recipe


def watch(tmp_path: Path, *overrides: str, terminal: bool = False, bad_step: int | None = None) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=200, force_terminal=terminal)
    recipe = tiny_recipe(tmp_path, "max_steps=5", *overrides)
    session = open_run(recipe, observers=[Live(console, logging_steps=2)])
    if bad_step is not None:
        port = session.prepared.port
        poison_output(port.parts.model.get_submodule("model.layers.0.mlp.down_proj"), at_step(port, bad_step))
    session.run()
    return stream.getvalue()


def test_plain_lines_tell_plan_progress_and_summary(tmp_path: Path) -> None:
    out = watch(tmp_path, "sample.prompts=[hello]", "sample.max_new_tokens=3")
    assert "What this run will do" in out
    assert re.search(r"device +cpu", out)
    assert re.findall(r"^step (\d)/5", out, re.M) == ["2", "4", "5"]
    assert out.count("held-out loss") >= 2
    assert out.count("asked after") == 2
    assert re.search(r"steps +5: 5 committed, 0 refused", out)
    assert "finitune chat" in out
    assert "\x1b" not in out


def test_a_refused_step_names_its_code_and_rows(tmp_path: Path) -> None:
    out = watch(tmp_path, bad_step=3)
    assert re.search(r"step 3 refused: NUM001", out)
    assert "rows.jsonl:" in out
    assert "4 committed, 1 refused" in out


def test_a_terminal_gets_a_moving_bar(tmp_path: Path) -> None:
    out = watch(tmp_path, terminal=True)
    assert "\x1b[" in out
    assert "step 5/5" in out


def test_chinese(tmp_path: Path) -> None:
    set_language("zh")
    try:
        out = watch(tmp_path, bad_step=2)
    finally:
        set_language(None)
    assert "本次运行的安排" in out
    assert "被拒绝" in out
    assert "总结" in out


def test_bad_rows_do_not_flood_the_screen(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    good = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    rows.write_text(
        good * 20 + '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}\n' * 50
    )
    out = watch(tmp_path, "data.eval_fraction=0")
    codes = re.findall(r"^(DAT\d+) ", out, re.M)
    assert 3 <= len(codes) <= 8
    assert re.search(r"findings +.*DAT\d+ x 50", out)


@pytest.mark.parametrize(("text", "columns"), [("abc", 3), ("损失", 4), ("", 0)])
def test_width_counts_terminal_columns(text: str, columns: int) -> None:
    assert width(text) == columns


def test_columns_line_up_in_both_scripts() -> None:
    lines = aligned([("loss", "1"), ("损失函数", "2")])
    assert len({width(line) for line in lines}) == 1
    assert aligned([]) == []
