"""Loading: names, files, overrides, every fault at once with its place, and back to YAML."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finitune.core.errors import UserError, UserErrors
from finitune.core.messages.catalogue import set_language
from finitune.train import codes
from finitune.train.recipe import DataSection, LoraSection, ModelSection, Recipe, SampleSection
from finitune.train.recipe_io import load_recipe, parse_recipe, shipped, shipped_text, to_yaml

WRONG = """\
learning_rate: true
learning_rat: 3
lora_rank: 8
max_length: 5
fp16: true
bf16: true
data:
  train: no
  cutoff_len: 4
  packing: 3
  max_length: 4
load_in_4bit: true
optim: adamw
device: gpu
on: 3
5: 3
max_steps: 0
lora: {rr: 4, target_modules: q_proj}
seed: 1
seed: 2
freeze: [a]
"""


@pytest.fixture(autouse=True)
def _english(monkeypatch):
    monkeypatch.setenv("FINITUNE_LANG", "en")


def errors_of(load, *args) -> list[UserError]:
    with pytest.raises((UserError, UserErrors)) as caught:
        load(*args)
    return list(caught.value.errors) if isinstance(caught.value, UserErrors) else [caught.value]


def outcome(content: str) -> str:
    """A recipe or a message; any other exception fails the test."""
    try:
        return to_yaml(parse_recipe(content))
    except (UserError, UserErrors) as error:
        return str(error)


def the_error(load, *args) -> UserError:
    errors = errors_of(load, *args)
    assert len(errors) == 1, errors
    return errors[0]


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_parses_and_says_what_it_does(name):
    recipe = load_recipe(name)
    assert parse_recipe(to_yaml(recipe)) == recipe
    comment = [line for line in shipped_text(name).splitlines() if line.startswith("#")]
    assert len(comment) >= 2
    assert "Takes" in "\n".join(comment)


def test_both_promised_recipes_are_shipped():
    assert {"quickstart", "tiny-internlm2"} <= set(shipped())
    assert load_recipe(None) == load_recipe("quickstart")
    assert load_recipe("tiny-internlm2").lora is None


def test_all_faults_are_told_at_once_with_line_value_and_cure():
    errors = errors_of(parse_recipe, WRONG, "my.yaml")
    told = {(e.code.code, e.where) for e in errors}
    assert ("CFG009", "my.yaml, line 20: seed") in told
    assert ("CFG006", "my.yaml, line 1: learning_rate") in told
    assert ("CFG005", "my.yaml, line 2: learning_rat") in told
    assert ("CFG007", "my.yaml, line 11: data.max_length") in told
    assert ("CFG006", "my.yaml, line 10: data.packing") in told
    assert ("CFG007", "my.yaml, line 17: max_steps") in told
    assert ("CFG008", "my.yaml, line 13: optim") in told
    assert ("CFG011", "my.yaml, line 5: fp16, bf16") in told
    assert ("CFG016", "my.yaml, line 21: freeze, lora") in told
    assert len(errors) == 19


@pytest.mark.parametrize("language", ["en", "zh"])
def test_no_message_keeps_a_hole_in_either_language(language):
    set_language(language)
    try:
        message = str(UserErrors(errors_of(parse_recipe, WRONG, "my.yaml")))
    finally:
        set_language(None)
    assert "{" not in message
    assert "CFG005" in message


HINTS = [
    ("learning_rat: 1", "did you mean learning_rate?"),
    ("data: {trian: a}", "did you mean data.train?"),
    ("lora_rank: 8", "called lora.r here"),
    ("max_length: 8", "called data.max_length here"),
    ("data: {cutoff_len: 8}", "called data.max_length here"),
    ("data: {learning_rate: 8}", "called learning_rate here"),
    ("model_name_or_path: a", "called model.name_or_path here"),
    ("micro_batch_size: 1", "called per_device_train_batch_size here"),
    ("gradient_clipping: 1", "called max_grad_norm here"),
    ("load_in_4bit: true", "no quantised weights"),
    ("trust_remote_code: true", "never runs code"),
    ("lora: {rank: 4}", "called lora.r here"),
    ("optim: adamw", "did you mean adamw_torch?"),
    ("device: gpu", "did you mean cuda?"),
    ("bf16: auto", "precision: auto"),
    ("output_dir: 2024-01-01", "put quotes around it"),
    ("data: {train: no}", "put quotes around it"),
]


@pytest.mark.parametrize(("content", "hint"), HINTS)
def test_an_error_helps_to_the_right_name(content, hint):
    assert hint in str(the_error(parse_recipe, content))


@pytest.mark.parametrize("value", ["fp16-pure", "float16", "pure_fp16"])
def test_pure_fp16_is_refused_with_its_reason(value):
    error = the_error(parse_recipe, f"precision: {value}")
    assert error.code.code == "CFG013"
    assert "precision: fp16" in str(error)


def test_an_error_about_a_bound_tells_bound_value_and_default():
    message = str(the_error(parse_recipe, "learning_rate: 20"))
    assert "learning_rate is 20" in message
    assert "> 0 and <= 10" in message
    assert "the default is 0.0002" in message


def test_a_contradiction_with_a_faulty_field_is_not_told_of_its_default():
    """warmup_steps is wrong itself; that its default would fit says nothing."""
    errors = errors_of(parse_recipe, "warmup_steps: x\nwarmup_ratio: 0.5\nlora: 3\nfreeze: [a]")
    assert [e.code.code for e in errors] == ["CFG006", "CFG006"]


SPELLINGS = [("1e-4", 1e-4), ("1E-4", 1e-4), ("1.0e-4", 1e-4), ("1", 1.0), ("'1e-4'", 1e-4), (".5", 0.5)]


@pytest.mark.parametrize(("written", "value"), SPELLINGS)
def test_numbers_as_people_write_them(written, value):
    assert parse_recipe(f"learning_rate: {written}").learning_rate == value
    assert load_recipe(None, [f"learning_rate={written}"]).learning_rate == value


def test_whole_numbers_in_exponent_form():
    assert parse_recipe("max_steps: 1e3").max_steps == 1000


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "1e999"])
def test_nan_and_infinity_are_refused(value):
    assert the_error(parse_recipe, f"learning_rate: {value}").code is codes.OUT_OF_BOUNDS


OVERRIDES = [
    (["learning_rate=1e-4"], lambda r: r.learning_rate == 1e-4),
    (["data.max_length=64"], lambda r: r.data.max_length == 64),
    (["data.train=[a.jsonl,b.jsonl]"], lambda r: r.data.train == ["a.jsonl", "b.jsonl"]),
    (["lora=null"], lambda r: r.lora is None),
    (["lora=null", "lora.r=8"], lambda r: r.lora == LoraSection(r=8)),
    (["lora.r=8", "lora=null"], lambda r: r.lora is None),
    (["output_dir=a=b"], lambda r: r.output_dir == "a=b"),
    (["sample.prompts=['What is 1=1?']"], lambda r: r.sample.prompts == ["What is 1=1?"]),
    (["data.limit_rows="], lambda r: r.data.limit_rows is None),
    (["seed=1", "seed=2"], lambda r: r.seed == 2),
]


@pytest.mark.parametrize(("overrides", "holds"), OVERRIDES)
def test_overrides(overrides, holds):
    assert holds(load_recipe("quickstart", overrides))


BAD_OVERRIDES = ["learning_rate", "--learning_rate=1", "=1", "data.=1", ".a=1", "data..x=1", "seed.x=1", "lora=[1"]


@pytest.mark.parametrize("override", BAD_OVERRIDES)
def test_an_override_that_cannot_be_used_is_named(override):
    error = the_error(load_recipe, "quickstart", [override])
    assert error.code is codes.BAD_OVERRIDE
    assert override in str(error)


def test_faults_of_overrides_and_of_the_file_come_together(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("seed: -1\n")
    errors = errors_of(load_recipe, str(path), ["nonsense", "lora.rr=1", "learning_rate=0"])
    assert sorted(e.code.code for e in errors) == ["CFG005", "CFG007", "CFG007", "CFG010"]
    assert "override learning_rate=0: learning_rate" in {e.where for e in errors}


BROKEN = [
    ("data:\n  train: [a\nseed: 1\n", 3),
    ("a: 'x\n", 2),
    ("seed: 1\n\tlora: null\n", 2),
    ("seed: 1\n  x: 2\n", 2),
    ("a: b: c\n", 1),
    ("x: !!python/object/apply:os.system ['true']\n", 1),
    ("x: *nowhere\n", 1),
    ("seed: 1\n---\nseed: 2\n", 2),
    ("ok: 1\nbad: \x07\n", 2),
    ("[" * 5000, 1),
    ("x: 2024-99-99\n", 1),
]


@pytest.mark.parametrize(("content", "line"), BROKEN)
def test_broken_yaml_is_one_error_with_line_and_column(content, line, tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(content)
    error = the_error(load_recipe, str(path))
    assert error.code is codes.BROKEN_SYNTAX
    assert error.data["line"] == line
    assert error.data["column"] >= 1
    assert "{" not in str(error).partition("why")[0]


@pytest.mark.parametrize("content", ["", "\n\n", "# only a comment\n", "[]", "{}", "- a\n", "just text", "3", "null"])
def test_a_recipe_without_settings(content):
    assert the_error(parse_recipe, content).code is codes.NOT_A_MAPPING


def test_json_recipes(tmp_path):
    path = tmp_path / "my.json"
    path.write_text(json.dumps({"learning_rate": 1e-4, "lora": None}))
    assert load_recipe(str(path)).lora is None
    path.write_text('{"seed": 1,\n "seed": 2}')
    assert the_error(load_recipe, str(path)).code is codes.DUPLICATE_KEY
    path.write_text('{"seed": 1,\n}')
    assert the_error(load_recipe, str(path)).data["line"] in (1, 2)
    path.write_text('{"learning_rate": NaN}')
    assert the_error(load_recipe, str(path)).code is codes.OUT_OF_BOUNDS


def test_a_byte_order_mark_is_no_fault(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_bytes(b"\xef\xbb\xbfseed: 7\n")
    assert load_recipe(str(path)).seed == 7


def test_a_missing_recipe_offers_what_is_near(tmp_path):
    (tmp_path / "mine.yaml").write_text("seed: 1\n")
    assert "did you mean quickstart?" in str(the_error(load_recipe, "quickstar"))
    assert "mine.yaml?" in str(the_error(load_recipe, str(tmp_path / "mime.yaml")))
    assert the_error(load_recipe, str(tmp_path / "mine.yaml" / "x.yaml")).code is codes.RECIPE_NOT_FOUND


def test_unreadable_recipes(tmp_path):
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x01")
    run = tmp_path / "run"
    run.mkdir()
    assert the_error(load_recipe, str(binary)).code is codes.RECIPE_UNREADABLE
    assert the_error(load_recipe, str(run)).code is codes.RECIPE_UNREADABLE
    (run / "recipe.yaml").write_text("seed: 1\n")
    assert str(run / "recipe.yaml") in str(the_error(load_recipe, str(run)))
    assert the_error(load_recipe, "a\0b.yaml").code is codes.RECIPE_UNREADABLE
    assert the_error(load_recipe, "x" * 5000 + ".yaml").code is codes.RECIPE_UNREADABLE


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_a_recipe_without_permission(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("seed: 1\n")
    path.chmod(0)
    assert the_error(load_recipe, str(path)).code is codes.RECIPE_UNREADABLE


def test_a_yaml_bomb_is_refused_quickly():
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    content = "\n".join(lines) + "\ndata: {train: *a29}\n"
    errors = errors_of(parse_recipe, content)
    assert all(len(str(e)) < 2000 for e in errors)


def test_a_mapping_that_holds_itself_is_refused():
    assert errors_of(parse_recipe, "data: &d {train: a, packing: *d}")[0].code is codes.WRONG_TYPE


texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=30)
tricky = st.sampled_from(
    [
        "1e3",
        "no",
        "~",
        "null",
        "0x1",
        "1_0",
        "12:30",
        "2024-01-01",
        "- a",
        "a: b",
        "=",
        "<<",
        " ",
        "a\x85b",
        "\u2028",
        "\r\n",
        "\ufeff",
    ]
)
names = texts | tricky
reals = st.floats(1e-300, 10, exclude_min=True)
recipes = st.builds(
    Recipe,
    model=st.builds(ModelSection, name_or_path=names, chat_template=st.none() | names),
    data=st.builds(DataSection, train=names | st.lists(names, min_size=1, max_size=3), system_prompt=st.none() | names),
    lora=st.none() | st.builds(LoraSection, r=st.integers(1, 4096), target_modules=st.lists(names, min_size=1)),
    sample=st.builds(SampleSection, prompts=st.lists(names, max_size=3), top_p=st.floats(1e-9, 1)),
    output_dir=names,
    seed=st.integers(0, 2**63 - 1),
    learning_rate=reals,
    adam_epsilon=st.floats(1e-320, 1, allow_subnormal=True),
    max_grad_norm=st.none() | reals,
    fp16=st.none() | st.just(False),
)


@settings(deadline=None, max_examples=60)
@given(recipes)
def test_the_stored_recipe_is_the_recipe(recipe):
    assert parse_recipe(to_yaml(recipe)) == recipe


@settings(deadline=None, max_examples=150)
@given(st.text(max_size=60) | st.text("abcdeflnrtu:_-[]{}&*!'\"# \n0123456789.", max_size=60))
def test_any_text_gives_a_recipe_or_user_errors(content):
    assert outcome(content)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(sorted(Recipe.model_fields)), values)
def test_any_value_of_any_field_gives_a_recipe_or_user_errors(name, value):
    assert outcome(json.dumps({name: value}))
