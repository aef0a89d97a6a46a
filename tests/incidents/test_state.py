"""Faults of weights and of the optimizer: bad weights (H), vocabulary (O), router (Q), optimizer (R), corrupt state
(T), model math (W)."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from incidents import planted
from support.incidents import PORTS, bare, named, ours, shows, summary, suspects, tell

RATE = ("OPT401", "OPT406")
NEVER = (*RATE, "DAT", "NUM400", "NUM401")
DOWN = "model.layers.1.mlp.down_proj.weight"
GATE = "model.layers.0.mlp.gate_proj.weight"


@pytest.mark.parametrize(("name", "place"), [(DOWN, 77), ("model.norm.weight", 5)])
def test_a_nan_in_a_loaded_weight_is_named_and_taken_from_the_model_again(
    tmp_path: Path, name: str, place: int
) -> None:
    story = ours(tmp_path, planted.nan_weight(name, place), steps=4)
    found = shows(story, "MOD400", remedies=("repair_tensor",), never=NEVER)
    assert found.step == 1, summary(found)
    spoilt = [s for s in found.suspects if s.kind == "parameter" and s.name == name]
    assert spoilt, summary(found)
    shape = story.rig.model.get_parameter(name).shape
    assert list(spoilt[0].data["index"]) == [int(i) for i in torch.unravel_index(torch.tensor(place), shape)]
    assert not story.stopped
    assert sorted(story.losses) == [1, 2, 3, 4]


def test_a_nan_in_a_frozen_weight_is_named_and_taken_from_the_model_again(tmp_path: Path) -> None:
    name = "model.embed_tokens.weight"
    story = ours(tmp_path, planted.nan_weight(name, 32 * 70 + 3), "freeze=['*embed_tokens*']", steps=4)
    found = story.first
    # In the model's files it is sound: it was changed since.
    assert found.diagnosis.code == "SYS403", summary(found)
    assert name in suspects(found, "parameter"), summary(found)
    assert found.remedy == "repair_tensor", summary(found)
    assert bool(story.rig.model.model.embed_tokens.weight.isfinite().all())


def test_a_nan_in_a_loaded_weight_stops_a_bare_loop_that_has_no_model_to_take_it_from() -> None:
    story = bare(planted.nan_weight(DOWN, 77), steps=4)
    found = story.first
    assert found.diagnosis.code == "MOD400", summary(found)
    assert DOWN in suspects(found, "parameter"), summary(found)
    assert found.remedy is None, summary(found)
    assert story.stopped


@pytest.mark.parametrize("port", PORTS)
@pytest.mark.parametrize("which", ["exp_avg", "exp_avg_sq"])
def test_a_nan_in_a_moment_is_undone_in_the_same_step(tmp_path: Path, port: str, which: str) -> None:
    story = tell(port, tmp_path, planted.nan_moment(5, GATE, 9, which))
    found = story.first
    assert found.step == 6, summary(found)
    assert found.trigger.value == "update", summary(found)
    assert found.diagnosis.code == "SYS403", summary(found)
    # Computed anew from an older snapshot, the state of before has a good moment: then nothing is left to do.
    assert found.remedy in ("retry", "repair_tensor", "reset_moments", "roll_back"), summary(found)
    assert GATE in found.diagnosis.top.where, summary(found)
    # What is spoilt between two steps is seen after the first of them; from the treatment on all is finite.
    assert [s for s, _ in story.poisoned if s > 6] == []
    assert not story.stopped


PLACES = ["model.norm.weight", "model.layers.1.post_attention_layernorm.weight", "lm_head.weight"]


@pytest.mark.parametrize("port", PORTS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_weight_that_fails_the_step_after_a_flipped_bit_is_named_with_its_place(
    tmp_path: Path, port: str, seed: int
) -> None:
    chance = random.Random(seed)
    # Bit 30 makes an fp32 number below 2 at least 2^64 times as large; such a weight fails where no norm hides it.
    name = PLACES[seed]
    story = tell(port, tmp_path, planted.flipped_bit(chance.randint(4, 7), name, chance.randrange(32)))
    found = story.first
    assert found.diagnosis.code == "SYS403", summary(found)
    assert name in found.diagnosis.top.where, summary(found)
    assert found.remedy in ("retry", "repair_tensor", "roll_back"), summary(found)
    assert named(found) == ["SYS403"], summary(found)
    assert float(story.rig.model.get_parameter(name).detach().abs().max()) < 10
    assert not story.stopped


@pytest.mark.parametrize("port", PORTS)
@pytest.mark.parametrize("value", [-1e-4, -3.0])
def test_a_negative_second_moment_is_named_as_corruption(tmp_path: Path, port: str, value: float) -> None:
    story = tell(port, tmp_path, planted.moment(6, GATE, 9, "exp_avg_sq", value))
    found = story.first
    assert found.step == 7, summary(found)
    assert found.diagnosis.code == "SYS403", summary(found)
    assert GATE in found.diagnosis.top.where, summary(found)
    assert named(found) == ["SYS403"], summary(found)
    assert not story.stopped


@pytest.mark.parametrize("port", PORTS)
def test_a_finite_moment_that_was_changed_is_found_by_computing_the_steps_again(tmp_path: Path, port: str) -> None:
    """It spoils its weight in the next update, and the loss leaps in the step after; no value is out of all range."""
    story = tell(port, tmp_path, planted.moment(6, "model.norm.weight", 12, "exp_avg", 3e6), steps=12)
    found = story.first
    assert found.diagnosis.code == "SYS403", summary(found)
    assert found.diagnosis.top.where == "model.norm.weight|exp_avg", summary(found)
    [moment] = [s for s in found.suspects if s.kind == "moment" and s.name == "model.norm.weight|exp_avg"]
    assert moment.data["index"] == [12]
    assert abs(moment.data["was"]) < 1 < moment.data["value"]
    assert named(found) == ["SYS403"], summary(found)
    assert found.remedy == "repair_tensor", summary(found)
    assert not story.stopped
    # Everything since is as in a run in which nothing was changed.
    clean = tell(port, tmp_path / "clean", lambda _rig: None, steps=12)
    assert story.losses == clean.losses


@pytest.mark.parametrize("port", PORTS)
def test_a_weight_that_becomes_nan_is_named_as_corruption(tmp_path: Path, port: str) -> None:
    story = tell(port, tmp_path, planted.nan_weight_later(6, DOWN, 100))
    found = story.first
    assert found.diagnosis.code == "SYS403", summary(found)
    assert found.remedy in ("repair_tensor", "roll_back"), summary(found)
    assert DOWN in suspects(found, "parameter"), summary(found)
    assert not story.stopped


@pytest.mark.parametrize("port", PORTS)
def test_an_optimizer_with_a_wrong_map_is_named(tmp_path: Path, port: str) -> None:
    story = tell(
        port,
        tmp_path,
        planted.wrong_map,
        "optim=adamw_torch",
        optimizer=lambda m: torch.optim.AdamW(m.parameters(), 1e-3),
    )
    found = shows(story, "OPT404", remedies=(None,), never=(*NEVER, "OPT400"))
    assert found.trigger.value == "update", summary(found)
    # Moments that start anew would only put it off: the run stops at once, with the last good state.
    assert len(story.incidents) == 1
    assert story.stopped


@pytest.mark.parametrize("port", PORTS)
@pytest.mark.parametrize("kind", ["uphill", "no_root"])
def test_an_optimizer_that_carries_the_run_away_is_named_and_not_its_rate(tmp_path: Path, port: str, kind: str) -> None:
    story = tell(
        port,
        tmp_path,
        planted.wrong_updates(kind, after=4),
        "optim=adamw_torch",
        "learning_rate=1e-2",
        steps=32,
        optimizer=lambda m: torch.optim.AdamW(m.parameters(), 1e-2),
    )
    found = story.first
    assert found.diagnosis.code == "OPT404", summary(found)
    assert not [c for c in named(found) if c != "OPT404"], summary(found)
    assert found.remedy is None, summary(found)


@pytest.mark.parametrize("port", PORTS)
def test_a_row_without_length_is_named_as_the_math_of_the_model(tmp_path: Path, port: str) -> None:
    story = tell(port, tmp_path, planted.zero_row("model.layers.0.mlp.up_proj", 11), steps=3)
    found = story.first
    assert found.diagnosis.code == "NUM405", summary(found)
    assert found.diagnosis.top.where == "model.layers.0.mlp.up_proj", summary(found)
    assert [s.data["row"] for s in found.suspects if s.name == "model.layers.0.mlp.up_proj.weight"] == [11]
    assert not [c for c in named(found) if c != "NUM405"], summary(found)
    assert not story.poisoned
    # No condition of the engine cures a formula: nothing is done to data or rate, the run stops.
    assert found.remedy is None, summary(found)
    assert story.stopped


@pytest.mark.parametrize("port", PORTS)
def test_rows_of_the_vocabulary_that_are_too_large_are_put_right_before_training(tmp_path: Path, port: str) -> None:
    story = tell(port, tmp_path, planted.loud_rows(), steps=8)
    assert not story.poisoned
    found = story.first
    assert (found.step, found.diagnosis.code, found.remedy) == (1, "MOD402", "repair_tensor"), summary(found)
    assert {s.name for s in found.suspects} <= {"lm_head.weight", "model.embed_tokens.weight"}
    assert not [c for i in story.incidents for c in named(i) if c in RATE]
    # Without the repair the first loss is above five times ln 320; nothing of it is left.
    assert max(story.losses.values()) < 1.1 * math.log(320)


@pytest.mark.parametrize("port", PORTS)
def test_an_infinite_row_of_a_token_that_comes_late_is_named_with_its_row(tmp_path: Path, port: str) -> None:
    [(step, row)] = planted.places(1)
    story = tell(port, tmp_path, planted.inf_token(step, row))
    found = story.first
    assert found.diagnosis.code in ("MOD400", "SYS403"), summary(found)
    [spoilt] = [s for s in found.suspects if s.kind == "parameter" and s.name == "model.embed_tokens.weight"]
    token = planted.rare_token(story.rig, step, row)
    assert spoilt.data["row"] == token
    assert any(token in ids for ids in story.rig.rows(found.step))
    # A bare loop has no model to take the row from: rows of data with the token are left out.
    assert found.remedy == ("repair_tensor" if port == "ours" else "skip_rows"), summary(found)
    assert not [c for c in named(found) if c.startswith(RATE)], summary(found)
    assert {i.remedy for i in story.incidents} == {found.remedy}, [summary(i) for i in story.incidents]
    assert len(story.incidents) == 1 or port == "bare"
    assert not story.stopped


def _mixtral() -> Any:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=64,
    )
    return MixtralForCausalLM(config)


def test_a_nan_in_a_row_of_a_gate_is_named_in_a_mixture_of_experts() -> None:
    model = _mixtral()
    name = next(n for n, p in model.named_parameters() if "gate" in n.split(".")[-2] and p.shape[0] == 4)
    story = bare(planted.nan_weight(name, 33), model=model, steps=4)
    found = story.first
    # That the weight is bad is seen (H); that it is a router's (Q) is told by its name.
    assert found.diagnosis.code in ("MOD400", "MOD403"), summary(found)
    assert name in suspects(found, "parameter"), summary(found)
    assert not [c for c in named(found) if c.startswith(("DAT", "OPT", "NUM"))], summary(found)


def test_a_gate_that_becomes_nan_is_undone_in_a_mixture_of_experts() -> None:
    model = _mixtral()
    name = next(n for n, p in model.named_parameters() if "gate" in n.split(".")[-2] and p.shape[0] == 4)
    story = bare(planted.nan_weight_later(5, name, 33), model=model, steps=8)
    found = story.first
    assert found.diagnosis.code in ("SYS403", "MOD403"), summary(found)
    assert name in suspects(found, "parameter"), summary(found)
    assert found.remedy in ("repair_tensor", "roll_back"), summary(found)
    assert not story.stopped
