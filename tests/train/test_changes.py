"""What follows from a difference: every field of the recipe has its rule, and nothing that is read can crash it."""

from __future__ import annotations

import copy
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finitune.core.messages.catalogue import set_language
from finitune.core.messages.en.resume import TEXTS
from finitune.train.changes import FACT_RULES, RECIPE_RULES, UNKNOWN, Change, Kind, Rule, compare
from finitune.train.recipe import Recipe
from finitune.train.recipe_fields import fields

HARMLESS_SECTIONS = ("sample.", "snapshots.", "save_", "logging_", "report_")


def facts(**recipe: object) -> dict:
    values = Recipe().model_dump(mode="json")
    for path, value in recipe.items():
        *sections, name = path.split("__")
        here = values
        for section in sections:
            here = here[section]
        here[name] = value
    return {
        "recipe": values,
        "data": {"digest": "d", "eval_digest": "e"},
        "device": {"type": "cpu", "name": "x"},
        "threads": 1,
        "world_size": 1,
        "precision": "fp32",
        "total_steps": 10,
        "trainable": {"digest": "t"},
        "frozen": {"digest": "f", "form": "g", "tensors": 3},
        "versions": {"torch": "2"},
    }


def only(was: dict, now: dict) -> Change:
    (change,) = [c for c in compare(was, now) if c.effect != "fact"]
    return change


def places() -> set[str]:
    """Every field, and every section that may be null."""
    nullable = {p for p, doc in fields().items() if doc.is_section and "anyOf" in doc.schema}
    return {p for p, doc in fields().items() if not doc.is_section} | nullable


def test_every_field_of_the_recipe_has_a_rule_and_every_rule_a_field():
    """A new field of the recipe needs a line in RECIPE_RULES: what follows when it changes between two sessions?"""
    assert places() - set(RECIPE_RULES) == set()
    assert set(RECIPE_RULES) - places() == set()


def test_every_rule_is_told_in_words():
    rules = [*RECIPE_RULES.values(), *FACT_RULES.values()]
    assert {f"resume.effect.{e}" for r in rules for e in (r.effect, r.instead[1])} <= set(TEXTS)
    assert {f"resume.what.{path}" for path in FACT_RULES} == {k for k in TEXTS if k.startswith("resume.what.")}


def test_what_only_shows_or_saves_is_harmless_and_what_trains_is_not():
    for path, rule in RECIPE_RULES.items():
        if path.startswith(HARMLESS_SECTIONS):
            assert rule.kind is Kind.HARMLESS, path
    for path in ("learning_rate", "seed", "max_grad_norm", "gradient_accumulation_steps", "guard.detectors"):
        assert RECIPE_RULES[path] == Rule(Kind.NEEDS_PERMISSION, RECIPE_RULES[path].effect), path


def test_a_field_that_nobody_has_classed_needs_permission():
    now = facts()
    now["recipe"]["brand_new"] = 3
    assert (only(facts(), now).what, only(facts(), now).kind) == ("brand_new", Kind.NEEDS_PERMISSION)


def test_a_field_that_did_not_exist_yet_had_its_default():
    was = facts()
    del was["recipe"]["max_grad_norm"], was["recipe"]["guard"]["trust_steps"], was["recipe"]["snapshots"]
    assert compare(was, facts()) == []
    assert only(was, facts(max_grad_norm=0.5)).was == 1.0


def test_the_gravest_comes_first():
    now = facts(learning_rate=1e-5, logging_steps=9, lora__r=3) | {"threads": 8, "total_steps": 99}
    kinds = [c.kind for c in compare(facts(), now)]
    assert kinds == [Kind.IMPOSSIBLE, Kind.NEEDS_PERMISSION, Kind.EXPLAINED, Kind.NATURAL, Kind.HARMLESS]


EXCUSED = [
    ({"data__limit_rows": 5}, {"data__limit_rows": 7}, Kind.HARMLESS),
    ({"data__max_length": 64}, {"data__max_length": 128}, Kind.HARMLESS),
    (
        {"data__packing": True, "data__max_length": 64},
        {"data__packing": True, "data__max_length": 128},
        Kind.NEEDS_PERMISSION,
    ),
    ({"scaler__init_scale": 2.0}, {"scaler__init_scale": 4.0}, Kind.HARMLESS),
    ({"optim": "adamw_torch"}, {"optim": "adamw_torch_fused"}, Kind.EXPLAINED),
    ({"optim": "adamw_torch"}, {"optim": "sgd"}, Kind.IMPOSSIBLE),
    ({"decay_ratio": 0.1}, {"decay_ratio": 0.2}, Kind.HARMLESS),
    (
        {"lr_scheduler_type": "warmup_stable_decay", "decay_ratio": 0.1},
        {"lr_scheduler_type": "warmup_stable_decay", "decay_ratio": 0.2},
        Kind.NEEDS_PERMISSION,
    ),
    ({"warmup_ratio": 0.1}, {"warmup_ratio": 0.2}, Kind.NEEDS_PERMISSION),
    ({"warmup_steps": 3, "warmup_ratio": 0.1}, {"warmup_steps": 3, "warmup_ratio": 0.2}, Kind.HARMLESS),
    (
        {"lr_scheduler_type": "constant", "warmup_steps": 1},
        {"lr_scheduler_type": "constant", "warmup_steps": 2},
        Kind.HARMLESS,
    ),
    (
        {"data__packing": True, "group_by_length": True},
        {"data__packing": True, "group_by_length": False},
        Kind.HARMLESS,
    ),
    ({"model__name_or_path": "a"}, {"model__name_or_path": "b"}, Kind.HARMLESS),
    ({"lora__target_modules": "auto"}, {"lora__target_modules": ["q_proj"]}, Kind.HARMLESS),
    ({"lora": None, "freeze": []}, {"lora": None, "freeze": ["x"]}, Kind.HARMLESS),
    ({"lora": None, "model__name_or_path": "a"}, {"lora": None, "model__name_or_path": "b"}, Kind.IMPOSSIBLE),
    ({"data__eval": "a"}, {"data__eval": "b"}, Kind.HARMLESS),
    ({"guard__detectors": {}}, {"guard__detectors": {"loss_spike": False}}, Kind.NEEDS_PERMISSION),
]


@pytest.mark.parametrize(("was", "now", "kind"), EXCUSED)
def test_a_difference_without_consequence_is_harmless(was, now, kind):
    """Rows, parameters and base weights are the same by their digests here."""
    assert only(facts(**was), facts(**now)).kind is kind


def test_without_the_digests_nothing_is_excused_and_nothing_is_certain():
    was, now = facts(data__limit_rows=5), {"recipe": facts(data__limit_rows=7)["recipe"]}
    change = only(was, now)
    assert (change.kind, change.certain) == (Kind.NEEDS_PERMISSION, False)
    assert only(was, {"recipe": facts(data__limit_rows=5, seed=1)["recipe"]}).certain


def test_loss_scaling_matters_in_fp16_only():
    was, now = facts(scaler__init_scale=2.0), facts(scaler__init_scale=4.0)
    for one in (was, now):
        one["precision"] = "fp16-emulated"
    assert only(was, now).kind is Kind.NEEDS_PERMISSION


def test_another_number_format_of_the_base_weights_is_a_change_of_precision_not_of_the_model():
    now = facts() | {"frozen": {"digest": "h", "form": "i", "tensors": 3}, "precision": "bf16-pure"}
    assert (only(facts(), now).what, only(facts(), now).kind) == ("precision", Kind.NEEDS_PERMISSION)
    now["frozen"]["form"] = "g"
    assert {c.what for c in compare(facts(), now)} == {"precision", "frozen.digest"}


def test_what_was_not_recorded_is_one_difference_that_says_so():
    was = facts()
    del was["data"], was["threads"]
    was["versions"] = None
    change = only(was, facts())
    assert (change.kind, change.was) == (Kind.EXPLAINED, UNKNOWN)
    assert change.what == "data.digest, threads, versions.torch"
    assert "not recorded" in change.line()
    assert only({}, {"recipe": Recipe().model_dump(mode="json")}).what == "recipe"


def test_values_are_shown_on_one_line_with_their_telling_ends():
    def line(was, now):
        return Change("x", was, now, Kind.HARMLESS, "none").line()

    assert line(1e-3, None) == "x: was 0.001, now null (no effect on the training)"
    assert line("ab" * 32, [f"/long{'/x' * 200}/rows.jsonl"]).startswith("x: was abababababab..., now [")
    assert 'rows.jsonl"]' in line("", [f"/long{'/x' * 200}/rows.jsonl"])
    assert len(line({"a": ["b" * 900] * 90}, "c" * 9000)) < 600
    set_language("zh")
    try:
        assert line(True, False) == "x：原为 true，现为 false（不影响训练）"
    finally:
        set_language(None)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
PATHS = sorted({*RECIPE_RULES, *FACT_RULES, "recipe", "data", "lora", "versions", "frozen", "device"})


def put(tree: dict, path: str, value: object) -> None:
    *sections, name = path.split(".")
    for section in sections:
        inner = tree.get(section)
        tree[section] = inner = inner if isinstance(inner, dict) else {}
        tree = inner
    tree[name] = value


@given(st.lists(st.tuples(st.sampled_from(PATHS), JSON, st.booleans()), max_size=6))
def test_facts_of_any_kind_are_compared_without_a_crash(damages):
    """In the facts themselves, or in the recipe that is among them."""
    was = facts()
    for path, value, inside in damages:
        put(was["recipe"] if inside and isinstance(was.get("recipe"), dict) else was, path, value)
    for change in compare(was, facts()):
        assert change.line()
        assert change.kind in Kind


@given(st.sampled_from(sorted(RECIPE_RULES)), st.integers() | st.text(min_size=1, max_size=5))
def test_every_difference_in_the_recipe_is_seen_and_none_is_made_up(path, value):
    assert compare(facts(), facts()) == []
    now = copy.deepcopy(facts())
    put(now["recipe"], path, value)
    seen = {c.what for c in compare(facts(), now)}
    assert seen <= {path}
    was = facts()["recipe"]
    for part in path.split("."):
        was = was[part]
    assert bool(seen) == (was != value or isinstance(was, bool))


def test_numbers_that_are_no_numbers_differ_from_everything():
    now = facts(learning_rate=math.nan)
    assert only(facts(), now).kind is Kind.NEEDS_PERMISSION
    assert only(now, copy.deepcopy(now)).kind is Kind.NEEDS_PERMISSION
