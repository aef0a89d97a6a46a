"""The recipe: names, bounds, contradictions, and that it needs no torch."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
from pydantic import ValidationError

from finitune.core.errors import UserError, UserErrors
from finitune.train import codes_conflicts as codes
from finitune.train.recipe import DataSection, GuardSection, LoraSection, Recipe, SampleSection, ScalerSection
from finitune.train.recipe_checks import WARMUP_RATIO_DEFAULT, notes, resolved_precision


@pytest.fixture(autouse=True)
def _english(monkeypatch):
    monkeypatch.setenv("FINITUNE_LANG", "en")


def faults(**fields) -> list[UserError]:
    """The contradictions in a recipe of valid fields."""
    try:
        Recipe(**fields)
    except UserErrors as several:
        return list(several.errors)
    except UserError as one:
        return [one]
    return []


def codes_of(**fields) -> list[str]:
    return [fault.code.code for fault in faults(**fields)]


def test_the_defaults_are_those_of_the_interface():
    recipe = Recipe()
    assert recipe.model.name_or_path == "SmolLM2-135M-Instruct"
    assert recipe.data.train == "finitune:stdlib"
    assert recipe.lora == LoraSection(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="auto")
    assert (recipe.learning_rate, recipe.max_steps, recipe.seed) == (2e-4, -1, 42)
    assert recipe.scaler.min_scale == 2.0**-4
    assert recipe.warmup_ratio == WARMUP_RATIO_DEFAULT


def test_a_recipe_is_frozen():
    with pytest.raises(ValidationError):
        Recipe().learning_rate = 1.0  # type: ignore[misc]


NUMBERS = [
    ("learning_rate", [1e-9, 10], [0, -1e-4, 10.1]),
    ("weight_decay", [0, 1], [-0.1, 1.1]),
    ("adam_beta1", [0, 0.999], [1.0, -0.1]),
    ("adam_epsilon", [1e-12, 1.0], [0.0]),
    ("warmup_ratio", [0, 0.99], [1.0, -0.01]),
    ("num_train_epochs", [0.01, 3], [0, -1]),
    ("max_grad_norm", [1e-3, None], [0, -1.0]),
    ("max_steps", [-1, 1], [0, -2]),
    ("warmup_steps", [0, 10, None], [-1]),
    ("seed", [0, 2**63 - 1], [-1, 2**63]),
    ("per_device_train_batch_size", [1], [0]),
    ("save_total_limit", [1], [0]),
]


@pytest.mark.parametrize(("name", "good", "bad"), NUMBERS)
def test_every_number_has_bounds(name, good, bad):
    for value in good:
        assert getattr(Recipe(**{name: value}), name) == value
    for value in bad:
        with pytest.raises(ValidationError):
            Recipe(**{name: value})


@pytest.mark.parametrize("name", [row[0] for row in NUMBERS])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, False, "x", [1]])
def test_no_number_takes_nan_infinity_truth_or_text(name, value):
    with pytest.raises(ValidationError):
        Recipe(**{name: value})


@pytest.mark.parametrize("value", ["1e-4", "0.0001"])
def test_a_number_in_quotes_is_a_number(value):
    assert Recipe(learning_rate=value).learning_rate == 1e-4


def test_an_unknown_key_is_refused():
    with pytest.raises(ValidationError):
        Recipe(lerning_rate=1)
    with pytest.raises(ValidationError):
        Recipe(data={"trian": "a"})


@pytest.mark.parametrize("path", ["", "a\0b"])
def test_an_empty_path_and_a_nul_are_refused(path):
    with pytest.raises(ValidationError):
        Recipe(data={"train": path})


@pytest.mark.parametrize("device", ["auto", "cpu", "mps", "cuda", "cuda:3", "xpu:0"])
def test_devices(device):
    assert Recipe(device=device).device == device


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:-1", "cpu:0x", "CPU"])
def test_what_is_no_device(device):
    with pytest.raises(ValidationError):
        Recipe(device=device)


def test_hf_spelling_of_trackers():
    assert Recipe(report_to="none").report_to == []


PRECISIONS = [
    ({}, "auto"),
    ({"fp16": True}, "fp16"),
    ({"bf16": True}, "bf16"),
    ({"bf16": False}, "fp32"),
    ({"fp16": False}, "auto"),
    ({"fp16": False, "bf16": False}, "fp32"),
    ({"fp16": True, "bf16": False}, "fp16"),
    ({"fp16": True, "precision": "fp16-emulated"}, "fp16-emulated"),
    ({"bf16": True, "precision": "bf16-pure"}, "bf16-pure"),
    ({"fp16": False, "bf16": False, "precision": "fp32"}, "fp32"),
]


@pytest.mark.parametrize(("fields", "expected"), PRECISIONS)
def test_the_flags_resolve_into_precision(fields, expected):
    assert resolved_precision(Recipe(**fields)) == expected


CONTRADICTIONS = [
    ({"fp16": True, "bf16": True}, codes.BOTH_HALVES),
    ({"fp16": True, "precision": "fp32"}, codes.PRECISION_CONFLICT),
    ({"fp16": True, "precision": "bf16"}, codes.PRECISION_CONFLICT),
    ({"fp16": False, "precision": "fp16"}, codes.PRECISION_CONFLICT),
    ({"bf16": True, "precision": "fp16"}, codes.PRECISION_CONFLICT),
    ({"bf16": False, "precision": "bf16-pure"}, codes.PRECISION_CONFLICT),
    ({"warmup_steps": 10, "max_steps": 10}, codes.SCHEDULE_TOO_LONG),
    (
        {"lr_scheduler_type": "warmup_stable_decay", "warmup_ratio": 0.6, "decay_ratio": 0.5},
        codes.SCHEDULE_TOO_LONG,
    ),
    ({"freeze": ["*embed*"]}, codes.FREEZE_WITH_LORA),
    ({"scaler": ScalerSection(init_scale=0.01)}, codes.SCALER_FLOOR),
]


@pytest.mark.parametrize(("fields", "code"), CONTRADICTIONS)
def test_a_contradiction_is_refused_with_all_its_numbers(fields, code):
    found = faults(**fields)
    assert [f.code for f in found] == [code]
    assert "{" not in str(found[0])
    assert found[0].where


AGREEMENTS = [
    {"warmup_steps": 5, "warmup_ratio": 0.0},
    {"warmup_steps": 0, "lr_scheduler_type": "constant"},
    {"warmup_steps": 9, "max_steps": 10},
    {"freeze": ["*embed*"], "lora": None},
    {"eval_steps": 5, "data": DataSection(eval_fraction=0, eval="held.jsonl")},
    {"lr_scheduler_type": "warmup_stable_decay", "warmup_ratio": 0.5, "decay_ratio": 0.5},
    {"fp16": True, "precision": "fp16"},
]


@pytest.mark.parametrize("fields", AGREEMENTS)
def test_what_does_not_contradict_is_accepted(fields):
    assert faults(**fields) == []


def test_all_contradictions_come_at_once():
    found = codes_of(fp16=True, bf16=True, freeze=["a"], scaler=ScalerSection(init_scale=0.01))
    assert found[:2] == ["CFG011", "CFG016"]
    assert len(found) == 3


NOTES = [
    ({"warmup_steps": 5, "warmup_ratio": 0.1}, "warmup_ratio"),
    ({"warmup_steps": 5, "lr_scheduler_type": "constant"}, "warmup_steps"),
    ({"eval_steps": 5, "data": DataSection(eval_fraction=0)}, "eval_steps"),
    ({"sample": SampleSection(every_steps=5)}, "sample.every_steps"),
    ({"data": DataSection(packing=True)}, "group_by_length"),
    ({"sample": SampleSection(prompts=["a"], top_p=0.9)}, "sample.top_p"),
    ({"precision": "fp32", "scaler": ScalerSection(init_scale=4.0)}, "scaler"),
    ({"lr_scheduler_type": "constant", "min_lr_ratio": 0.1}, "min_lr_ratio"),
    ({"model": {"random_init": True}}, "model.random_init, lora"),
]


@pytest.mark.parametrize(("fields", "where"), NOTES)
def test_a_pointless_setting_is_noted_not_refused(fields, where):
    assert [n.where for n in notes(Recipe(**fields))] == [where]


def test_the_default_recipe_has_nothing_to_note():
    assert notes(Recipe()) == ()


def test_guard_takes_settings_or_a_switch():
    assert GuardSection(detectors={"a": False, "b": {"x": 1}}).detectors == {"a": False, "b": {"x": 1}}
    with pytest.raises(ValidationError):
        GuardSection(detectors={"a": 3})


def test_the_recipe_loads_without_torch():
    program = "import finitune.train.recipe_io, sys; assert 'torch' not in sys.modules, 'torch was imported'"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
