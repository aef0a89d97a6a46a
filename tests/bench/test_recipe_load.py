"""A run from files: silent when healthy, resumed to the same bits, its checkpoints read as they are written."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file, save_file

from finitune.bench.cases import Case
from finitune.bench.contenders import _recipe, finitune
from finitune.bench.harness import final_loss, quiet, run_case
from finitune.bench.recipe_load import RecipeLoad, bad_in_files
from finitune.bench.runs import recipe_sft
from finitune.bench.witness import Witness

STEPS = 12


def build(precision: str = "fp32", steps: int = STEPS) -> RecipeLoad:
    return recipe_sft.build(3, precision, steps)


def driven(load: RecipeLoad) -> Witness:
    witness = Witness(load)  # type: ignore[arg-type]
    with quiet():
        finitune.drive(load, witness)
    return witness


@pytest.mark.parametrize("precision", recipe_sft.PRECISIONS)
def test_of_a_healthy_run_nothing_is_said_and_it_is_the_run_without_a_guard(precision: str) -> None:
    guarded, plain = build(precision), build(precision)
    witness = driven(guarded)
    plain.run_plain()
    assert (witness.said, witness.incidents, witness.refused, witness.error) == ([], [], [], "")
    assert list(witness.losses) == list(range(1, STEPS + 1))
    assert witness.num_checkpoints == 3, "steps 10 and 12, and the model at the end"
    pairs = zip(guarded.state_tensors(), plain.state_tensors(), strict=True)
    assert all(torch.equal(a, b) for (_, a), (_, b) in pairs)


def test_the_run_learns() -> None:
    short, whole = build(steps=4), build(steps=recipe_sft.STEPS)
    short.run_plain()
    whole.run_plain()
    assert whole.held_out_loss() < short.held_out_loss() - 0.05


def test_a_run_that_is_stopped_and_taken_up_again_ends_as_if_it_had_not_been() -> None:
    whole, halves = build("fp16"), build("fp16")
    seen: list[Path] = []
    halves.stopped(7, seen.append)
    driven(whole)
    witness = driven(halves)
    assert witness.said == []
    assert seen == [halves.run_dir]
    assert list(witness.losses) == list(range(1, STEPS + 1))
    assert halves.held_out_loss() == whole.held_out_loss()


def test_inserted_rows_are_where_their_names_say_and_the_others_keep_their_order() -> None:
    load = build()
    before, lines = list(load.rows), [f"line {i}".encode() for i in range(9)]
    names = load.insert(Random(1), lines)
    assert [load.rows[int(name.rpartition(":")[2]) - 1] for name in names] == lines
    assert [row for row in load.rows if row not in lines] == before


def test_an_act_comes_once_right_after_its_step() -> None:
    load = build(steps=4)
    seen: list[int] = []
    load.between(2, lambda: seen.append(load.prepared.port.state.step))
    driven(load)
    assert seen == [2]


def test_a_poisoned_file_is_counted_as_a_poisoned_checkpoint(tmp_path: Path) -> None:
    save_file({"a.weight": torch.tensor([1.0, float("nan")]), "n": torch.tensor([1])}, str(tmp_path / "m.safetensors"))
    assert bad_in_files(tmp_path) == ["a.weight"]
    load = build()
    witness = Witness(load)  # type: ignore[arg-type]
    _recipe._Watch(load, witness).on_save(str(tmp_path), 5)
    assert (witness.num_checkpoints, witness.poisoned_checkpoints) == (1, [5])


def test_what_is_refused_before_it_begins_is_an_error_with_its_code() -> None:
    load = build()
    path = load.base / "model.safetensors"
    held = load_file(str(path))
    del held["lm_head.weight"]
    save_file(held, str(path), metadata={"format": "pt"})
    witness = driven(load)
    assert [s.code for s in witness.said] == ["MOD010"]
    assert ("finding", "lm_head.weight") in witness.said[0].where
    assert witness.error.startswith("UserError")
    assert final_loss(load) != final_loss(load), "there is no loss"


def test_the_folder_goes_with_the_load() -> None:
    load = build()
    folder = load.folder
    assert (folder / "base" / "config.json").is_file()
    del load
    assert not folder.exists()


def test_rows_are_different_conversations() -> None:
    load = build()
    assert len({*load.rows, *load.held_out}) == recipe_sft.NUM_ROWS + recipe_sft.NUM_HELD_OUT
    roles = [[turn["role"] for turn in json.loads(row)["messages"]] for row in load.rows]
    assert roles == [["user", "assistant"]] * recipe_sft.NUM_ROWS


def test_a_loop_cannot_drive_it() -> None:
    record = run_case(Case("faults", "recipe_nan_weight", 0, "plain"))
    assert record["skipped"] == "cannot drive recipe_sft: recipe"
