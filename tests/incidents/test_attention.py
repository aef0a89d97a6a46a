"""Faults of attention: masked rows (E), kernels whose backward fails (F)."""

from __future__ import annotations

from pathlib import Path

import pytest

from incidents import planted
from support.incidents import PORTS, named, shows, summary, suspects, tell

NEVER = ("OPT401", "OPT406", "NUM400", "NUM401", "SYS")


@pytest.mark.parametrize("port", PORTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_row_that_attends_to_nothing_is_named(tmp_path: Path, port: str, seed: int) -> None:
    [(step, row)] = planted.places(seed)
    story = tell(port, tmp_path, planted.blind_row(step, row), "model.attn_implementation=eager", attention="eager")
    found = shows(story, "NUM402", remedies=("safe_softmax",), never=NEVER)
    assert found.step == step, summary(found)
    assert any(story.rig.name(step, row) in r for r in suspects(found, "row")), summary(found)
    assert "self_attn" in found.diagnosis.top.where, summary(found)


@pytest.mark.parametrize("port", PORTS)
def test_a_padding_row_of_nan_is_named_as_a_weight(tmp_path: Path, port: str) -> None:
    story = tell(port, tmp_path, planted.nan_pad_row, steps=6)
    found = story.first
    assert found.diagnosis.code == "MOD400", summary(found)
    rows = [s.data.get("row") for s in found.suspects if s.kind == "parameter" and "embed" in s.name]
    assert story.rig.pad_id in rows, summary(found)
    assert not [c for c in named(found) if c.startswith(("DAT", "OPT", "NUM"))], summary(found)
    assert found.remedy != "lower_lr"
    if port == "ours":
        assert found.remedy == "repair_tensor", summary(found)
        assert bool(story.rig.model.model.embed_tokens.weight.isfinite().all())


@pytest.mark.parametrize("port", PORTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_kernel_that_fails_at_a_length_is_named_and_replaced(tmp_path: Path, port: str, seed: int) -> None:
    fault = planted.bad_kernel(5 + seed)
    story = tell(port, tmp_path, fault)
    found = shows(story, "NUM403", remedies=("math_attention",), never=(*NEVER, "DAT"))
    assert "self_attn" in " ".join([*suspects(found, "module"), found.diagnosis.top.where]), summary(found)
    assert not story.stopped


@pytest.mark.parametrize("port", PORTS)
def test_a_backward_that_fails_for_one_row_is_no_overflow_of_the_forward(tmp_path: Path, port: str) -> None:
    [(step, row)] = planted.places(3)
    story = tell(port, tmp_path, planted.nan_backward(step, row, "model.layers.1.self_attn.q_proj"))
    found = shows(
        story, "NUM403", "NUM405", remedies=("skip_rows", "drop_batch", "math_attention"), never=(*NEVER, "NUM404")
    )
    assert found.trigger.value == "gradient"
    assert "layers.1.self_attn" in summary(found), summary(found)
