"""What is planted in a recipe does what it says: the model is worse, or the same; rows are bad where they are named."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from finitune.bench.cases import Case
from finitune.bench.contenders import finitune
from finitune.bench.faults import _recipe, recipe_edited_checkpoint, recipe_wrong_rope
from finitune.bench.faults._measure import FP16_MAX
from finitune.bench.harness import fresh, planted, quiet
from finitune.bench.recipe_load import RecipeLoad
from finitune.bench.runs.recipe_sft import ids_of
from finitune.bench.witness import Witness
from finitune.numerics.half import emulated_half

SEEDS = range(6)


def loss_of(load: RecipeLoad, *, half: bool = False) -> float:
    """Of the base model on the held-out rows."""
    from transformers import LlamaForCausalLM

    untyped: Any = LlamaForCausalLM
    model = untyped.from_pretrained(load.base).eval()
    ids_BT, mask_BT = ids_of(load.held_out)
    labels_BT = ids_BT.masked_fill(mask_BT == 0, -100)
    with torch.no_grad(), quiet():
        if not half:
            return float(model(input_ids=ids_BT, attention_mask=mask_BT, labels=labels_BT).loss)
        with emulated_half(torch.float16):
            return float(model(input_ids=ids_BT, attention_mask=mask_BT, labels=labels_BT).loss)


def both(name: str, seed: int) -> tuple[RecipeLoad, RecipeLoad, Any]:
    case = Case("faults", name, seed)
    load, expected = planted(case)
    return fresh(case), load, expected


@pytest.mark.parametrize("seed", SEEDS)
def test_a_dead_head_knows_nothing(seed: int) -> None:
    clean, load, _ = both("recipe_dead_head", seed)
    assert loss_of(load) == pytest.approx(math.log(320), abs=1e-3)
    assert loss_of(clean) < 3


@pytest.mark.parametrize("seed", SEEDS)
def test_a_wrong_base_of_the_rotary_embedding_makes_the_model_worse(seed: int) -> None:
    clean, load, _ = both("recipe_wrong_rope", seed)
    assert loss_of(load) > loss_of(clean) + 0.01


def test_the_stored_frequencies_are_those_of_the_healthy_model() -> None:
    from transformers import LlamaForCausalLM

    clean, load, _ = both("recipe_wrong_rope", 0)
    untyped: Any = LlamaForCausalLM
    right = untyped.from_pretrained(clean.base).model.rotary_emb.inv_freq
    stored = _recipe.stored(load)["model.layers.0.self_attn.rotary_emb.inv_freq"]
    torch.testing.assert_close(stored, right)
    assert recipe_wrong_rope.CASES == (20,)


@pytest.mark.parametrize("name", ["recipe_huge_weight", "recipe_grown_mlp"])
def test_what_leaves_the_range_of_fp16_is_sound_in_fp32(name: str) -> None:
    for seed in SEEDS:
        clean, load, expected = both(name, seed)
        assert math.isfinite(loss_of(load))
        assert not math.isfinite(loss_of(load, half=True)), expected.says
        if name == "recipe_huge_weight":
            assert loss_of(load) == pytest.approx(loss_of(clean), rel=1e-4)
            wide = [_recipe.stored(load)[f"{m}.weight"] for m in expected.data["modules"]]
            assert all(float(w.abs().max()) > FP16_MAX for w in wide)


@pytest.mark.parametrize("name", ["recipe_untargeted_rows", "recipe_broken_rows", "recipe_long_rows"])
def test_every_bad_row_is_in_the_list_that_a_user_gets(name: str) -> None:
    for seed in range(2):
        _, load, expected = both(name, seed)
        load.steps, load.overrides["warmup_steps"] = 1, "0"
        witness = Witness(load)  # type: ignore[arg-type]
        with quiet():
            finitune.drive(load, witness)
        told = {row.rpartition("/")[2] for said in witness.said for kind, row in said.where if kind == "row"}
        assert told == {row for _, row in expected.places}


def test_every_edit_of_a_checkpoint_changes_its_files() -> None:
    _, load, _ = both("recipe_edited_checkpoint", 1)
    assert load.precision == "fp16"
    load.after.clear()
    load.steps, load.stop_after, load.on_disk = 4, None, []
    load.overrides["save_steps"] = "2"
    load.run_plain()
    folder = _recipe.newest(load.run_dir)
    files = ("optimizer.safetensors", "state.json")
    kinds = (
        "moments scaled",
        "moments zero",
        "moments of another step",
        "schedule anew",
        "scale altered",
        "no moments",
    )
    for kind in kinds:
        before = [(folder / name).read_bytes() for name in files]
        recipe_edited_checkpoint._edit(load.run_dir, kind, "as it is", 3.0)
        assert [(folder / name).read_bytes() for name in files] != before, kind
