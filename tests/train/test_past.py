"""What a journal and a folder tell of a run's past."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finitune.core.errors import UserError
from finitune.core.files import write_manifest
from finitune.core.journal import Journal
from finitune.train import past as subject
from finitune.train.folder import Place
from finitune.train.past import Past, differences, fact, facts_of_checkpoint, filled, read_past, stored_recipe
from finitune.train.recipe import Recipe
from finitune.train.recipe_io import to_yaml


def step(number: int, action: str = "proceed") -> dict:
    return {"kind": "step", "step": number, "action": action}


def past_of(*records: dict) -> Past:
    past = Past()
    for record in records:
        past.take(record)
    return past


START = {"kind": "start", "step": 0, "facts": {"seed": 1}}


def test_sessions_steps_and_the_end():
    past = past_of(START, step(1), step(2), step(3, "retry_smaller_scale"), {"kind": "end", "status": "halted"})
    assert (past.last_step, past.end["status"]) == (2, "halted")
    past.take({"kind": "resume", "step": 1, "facts": {"seed": 2}})
    assert (past.last_step, past.end) == (1, None)
    assert (past.facts_at(0), past.facts_at(1), past.facts_at(9)) == ({"seed": 1}, {"seed": 2}, {"seed": 2})


def test_facts_of_the_wrong_kind_are_passed_over():
    past = past_of(START, {"kind": "resume", "step": 3, "facts": "?"}, {"kind": "resume", "step": 4})
    assert past.facts_at(9) == {"seed": 1}
    assert Past().facts_at(3) == {}


def test_going_back_takes_saved_checkpoints_off_the_line():
    saves = [{"kind": "save", "step": n, "line": 0} for n in (2, 4, 6)]
    past = past_of(START, *saves, step(7), {"kind": "rollback", "from_step": 7, "to_step": 4})
    assert (past.last_step, past.saved_on_the_line()) == (4, [2, 4])
    past.take({"kind": "save", "step": 6, "line": 1})
    assert past.saved_on_the_line() == [2, 4, 6]


@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(["kind", "step", "facts", "action", "line", "to_step"]),
            st.sampled_from(["start", "resume", "step", "save", "rollback", "end", "proceed", None, 3, 2.5, [], {}])
            | st.floats(),
        ),
        max_size=6,
    )
)
def test_any_record_is_taken_or_passed_over(records):
    past = Past()
    for record in records:
        try:
            past.take(record)
        except (KeyError, TypeError, ValueError, OverflowError):
            continue
    past.saved_on_the_line()
    past.facts_at(5)


def test_a_journal_that_is_absent_is_an_empty_past_and_one_that_cannot_be_read_an_error(tmp_path, monkeypatch):
    assert read_past(tmp_path).sessions == []
    journal = Journal(tmp_path / "journal.jsonl")
    journal.write("start", step=0, facts={"a": 1})
    journal.write("start", step="x")
    journal.close()
    assert read_past(tmp_path).sessions == [(0, {"a": 1})]

    def refuse(_path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(subject.journal, "read", refuse)
    with pytest.raises(UserError, match=r"SYS004.*Permission denied"):
        read_past(tmp_path)


def test_facts_of_a_checkpoint(tmp_path):
    assert facts_of_checkpoint(tmp_path) == {}
    write_manifest(tmp_path, {"facts": {"a": 1}})
    assert facts_of_checkpoint(tmp_path) == {"a": 1}
    for content in ("[" * 100_000, "{", "3", json.dumps({"facts": 3, "files": {}, "schema": 1})):
        (tmp_path / "manifest.json").write_text(content)
        assert facts_of_checkpoint(tmp_path) == {}


def test_one_fact():
    facts = {"a": {"b": 3, "c": [1], "d": None, "e": False}}
    assert [fact(facts, p) for p in ("a.b", "a.c", "a.d", "a.x", "a.b.c", "x.y", "a", "a.e")] == [
        3, None, None, None, None, None, None, False,
    ]  # fmt: skip


def test_differences_enter_sections_but_not_open_mappings():
    was = {"a": {"x": 1, "y": 2}, "lora": None, "guard": {"detectors": {"s": 1}}, "b": 1}
    now = {"a": {"x": 1, "y": 3}, "lora": {"r": 2}, "guard": {"detectors": {"s": 2}}, "b": True, "c": 5}
    assert list(differences(was, now)) == [
        ("a.y", 2, 3),
        ("lora", None, {"r": 2}),
        ("guard.detectors", {"s": 1}, {"s": 2}),
        ("b", 1, True),
        ("c", None, 5),
    ]


def test_filling_keeps_what_is_there_and_null_sections():
    base = {"a": {"x": 1, "y": 2}, "lora": {"r": 1}, "b": 1}
    assert filled({"a": {"x": 5}, "lora": None, "z": 1}, base) == {"a": {"x": 5, "y": 2}, "lora": None, "b": 1, "z": 1}


def run_with(tmp_path: Path, recipe: Recipe, then: object = None) -> Place:
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    write_manifest(checkpoint, {"step": 3, "facts": {"recipe": then}})
    return Place(tmp_path, checkpoint)


def test_a_named_checkpoint_brings_the_recipe_it_was_written_under(tmp_path):
    then = Recipe(seed=5, lora=None, sample={"prompts": ["a: b, 'c'", "日本"]}, learning_rate=1e-5)
    place = run_with(tmp_path, Recipe(seed=7, max_steps=9), then.model_dump(mode="json"))
    assert stored_recipe(place) == then
    assert stored_recipe(Place(tmp_path)) == Recipe(seed=7, max_steps=9)
    assert stored_recipe(place, ["seed=8"]).seed == 8


def test_a_checkpoint_that_records_no_recipe_has_that_of_the_run(tmp_path):
    assert stored_recipe(run_with(tmp_path, Recipe(seed=7), "?")).seed == 7


def test_a_recipe_in_part_is_completed(tmp_path):
    assert stored_recipe(run_with(tmp_path, Recipe(seed=7, max_steps=3), {"seed": 1})) == Recipe(seed=1, max_steps=3)


def test_a_number_of_epochs_wins_over_the_stored_number_of_steps(tmp_path):
    place = Place(run_with(tmp_path, Recipe(max_steps=9)).run_dir)
    assert stored_recipe(place, ["num_train_epochs=2"]).max_steps == -1
    assert stored_recipe(place, ["num_train_epochs=2", "max_steps=4"]).max_steps == 4
