"""What the loop writes down of a step."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from finitune.engine.guard import loudest
from support.faults import at_step, poison_output
from support.runs import loop_of, ready, steps_of


def test_the_loudest_modules_are_kept_and_bad_ones_come_first() -> None:
    amax = {"a": 1.0, "b": 5.0, "c": math.nan, "d": 3.0, "e": math.inf}
    assert list(loudest(amax)) == ["c", "e", "b"]
    assert loudest({}) == {}


@pytest.mark.parametrize(("precision", "looks"), [("fp16-emulated", 9), ("fp32", 2)])
def test_the_monitor_looks_at_every_step_in_fp16_and_now_and_then_elsewhere(
    tmp_path: Path, precision: str, looks: int
) -> None:
    prepared = ready(tmp_path, f"precision={precision}", "max_steps=9")
    loop_of(prepared, tmp_path).run()
    records = steps_of(tmp_path)
    assert sum(bool(r["amax"]) for r in records) == looks
    assert all(len(r["amax"]) <= 3 for r in records)


def test_the_module_that_overflowed_is_in_the_journal(tmp_path: Path) -> None:
    prepared = ready(tmp_path, "precision=fp16-emulated", "max_steps=3")
    name = "model.layers.0.mlp.down_proj"
    poison_output(prepared.port.parts.model.get_submodule(name), at_step(prepared.port, 2), math.inf)
    loop_of(prepared, tmp_path).run()
    refused = steps_of(tmp_path)[1]
    assert refused["verdict"] == "abort"
    assert refused["headroom_bits"] == "-Infinity"
    assert all(value in ("NaN", "Infinity") for value in refused["amax"].values())


def test_a_step_costs_less_than_a_kilobyte_of_journal(tmp_path: Path) -> None:
    prepared = ready(tmp_path, "precision=fp16-emulated", "max_steps=20")
    loop = loop_of(prepared, tmp_path)
    loop.run()
    assert loop.journal.path.stat().st_size < 20 * 1024
