"""``finitune recipes``: list, show, copy."""

from __future__ import annotations

import pytest

from finitune.train.recipe_fields import describe_fields
from finitune.train.recipe_io import load_recipe, parse_recipe, shipped, shipped_text


@pytest.mark.parametrize("words", [["recipes"], ["recipes", "list"]])
def test_list_names_every_recipe_and_what_it_does(cli, words):
    ran = cli(*words)
    assert all(name in ran.out for name in shipped())
    assert "standard library" in ran.out
    record = cli(*words, "--json").record
    assert [r["name"] for r in record["recipes"]] == list(shipped())
    assert all(r["about"] for r in record["recipes"])


def test_show_prints_a_recipe_as_it_was_written(cli):
    assert cli("recipes", "show", "quickstart").out == shipped_text("quickstart")
    assert cli("recipes", "show").out == shipped_text("quickstart")


def test_show_resolved_prints_every_field(cli):
    ran = cli("recipes", "show", "quickstart", "--resolved")
    assert parse_recipe(ran.out) == load_recipe("quickstart")
    assert "adam_epsilon" in ran.out
    changed = cli("recipes", "show", "quickstart", "seed=9")
    assert parse_recipe(changed.out) == load_recipe("quickstart", ["seed=9"])


def test_show_json_holds_the_resolved_recipe(cli):
    record = cli("recipes", "show", "tiny-internlm2", "--json").record
    assert record["recipe"] == load_recipe("tiny-internlm2").model_dump(mode="json")


def test_show_fields_lists_every_field(cli):
    ran = cli("recipes", "show", "--fields")
    record = cli("recipes", "show", "--fields", "--json").record
    for doc in describe_fields():
        assert doc.path in ran.out
        assert doc.description in ran.out
    assert [f["key"] for f in record["fields"]] == [d.path for d in describe_fields()]


def test_copy_writes_a_recipe_that_loads(cli, tmp_path):
    ran = cli("recipes", "copy", "quickstart")
    assert ran.code == 0
    assert load_recipe(str(tmp_path / "quickstart.yaml")) == load_recipe("quickstart")
    assert (tmp_path / "quickstart.yaml").read_text() == shipped_text("quickstart")


def test_copy_into_a_folder_and_to_a_new_name(cli, tmp_path):
    (tmp_path / "dir").mkdir()
    assert cli("recipes", "copy", "quickstart", "dir", "--json").record["path"] == "dir/quickstart.yaml"
    cli("recipes", "copy", "quickstart", "new/my.yaml")
    assert (tmp_path / "new" / "my.yaml").is_file()


def test_copy_never_overwrites_unasked(cli, tmp_path):
    mine = tmp_path / "my.yaml"
    mine.write_text("precious")
    ran = cli("recipes", "copy", "quickstart", "my.yaml")
    assert (ran.code, mine.read_text()) == (2, "precious")
    assert "--force" in ran.err
    assert cli("recipes", "copy", "quickstart", "my.yaml", "--force").code == 0
    assert mine.read_text() == shipped_text("quickstart")


def test_copy_to_an_impossible_place(cli, tmp_path):
    (tmp_path / "file").write_text("")
    ran = cli("recipes", "copy", "quickstart", "file/my.yaml")
    assert ran.code == 2
    assert ran.err.startswith("CFG064")
    assert cli("recipes", "copy", "quickstart", "a\0b").code == 2


def test_an_unknown_recipe_is_offered_a_close_one(cli):
    for words in (["show", "quickstrat"], ["copy", "quickstrat"]):
        ran = cli("recipes", *words)
        assert ran.code == 2
        assert "did you mean quickstart?" in ran.err
