"""Names of detectors, formats, objectives and trackers; settings of detectors."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from types import SimpleNamespace

import pytest

from finitune.core import registry
from finitune.core.errors import UserError, UserErrors
from finitune.train import codes
from finitune.train.recipe_io import load_recipe


@dataclass(frozen=True)
class Config:
    sigma: float = 6.0
    window: int = 32
    loud: bool = False


REAL_NAMES, REAL_LOAD = registry.names, registry.load


@pytest.fixture(autouse=True)
def _family(monkeypatch):
    names = {"detectors": ("loss_spike", "non_finite"), "formats": ("alpaca", "messages"), "trackers": ("tensorboard",)}
    monkeypatch.setenv("FINITUNE_LANG", "en")
    monkeypatch.setattr(registry, "names", lambda family: names.get(family, ()))
    monkeypatch.setattr(registry, "load", lambda family, name: SimpleNamespace(Config=Config))


def errors_of(*overrides: str) -> list[UserError]:
    try:
        load_recipe("quickstart", overrides)
    except UserErrors as several:
        return list(several.errors)
    except UserError as one:
        return [one]
    return []


@pytest.mark.parametrize(
    "override",
    [
        "guard.detectors.loss_spike=false",
        "guard.detectors.loss_spike={sigma: 4, window: 16}",
        "guard.detectors.loss_spike.sigma=1e1",
        "data.format=alpaca",
        "data.format=auto",
        "loss.objective=causal_lm",
        "report_to=[tensorboard]",
        "report_to=tensorboard",
    ],
)
def test_known_names_and_settings(override):
    assert errors_of(override) == []


WRONG = [
    ("guard.detectors.loss_spik=false", codes.UNKNOWN_KEY, "did you mean loss_spike?"),
    ("guard.detectors.loss_spike.sigm=3", codes.UNKNOWN_KEY, "did you mean sigma?"),
    ("guard.detectors.loss_spike.sigma=x", codes.WRONG_TYPE, "a finite number"),
    ("guard.detectors.loss_spike.sigma=true", codes.WRONG_TYPE, "the default is 6.0"),
    ("guard.detectors.loss_spike.window=1.5", codes.WRONG_TYPE, "a whole number"),
    ("guard.detectors.loss_spike.loud=3", codes.WRONG_TYPE, "true or false"),
    ("guard.detectors.loss_spike.sigma=.nan", codes.OUT_OF_BOUNDS, "nan"),
    ("guard.detectors.loss_spike.sigma=.inf", codes.OUT_OF_BOUNDS, "inf"),
    ("data.format=alpacca", codes.UNKNOWN_CHOICE, "did you mean alpaca?"),
    ("report_to=wandb", codes.UNKNOWN_CHOICE, "tensorboard"),
    ("loss.objective=dpo", codes.UNKNOWN_CHOICE, "causal_lm"),
]


@pytest.mark.parametrize(("override", "code", "words"), WRONG)
def test_a_wrong_name_or_setting_is_told_with_its_cure(override, code, words):
    errors = errors_of(override)
    assert [e.code for e in errors] == [code]
    assert words in str(errors[0])


def test_a_switched_off_detector_can_be_configured_again():
    overrides = ["guard.detectors.loss_spike=false", "guard.detectors.loss_spike.sigma=3"]
    assert load_recipe("quickstart", overrides).guard.detectors == {"loss_spike": {"sigma": 3}}


def test_all_settings_are_judged_at_once():
    found = errors_of("guard.detectors={loss_spike: {sigma: x, windo: 1}, nothing: true}")
    assert len(found) == 3
    assert not any(isinstance(v, float) and math.isnan(v) for e in found for v in e.data.values())


def test_an_override_through_an_alias_changes_one_place_only(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("guard: {detectors: {loss_spike: &same {sigma: 3}, non_finite: *same}}\n")
    detectors = load_recipe(str(path), ["guard.detectors.loss_spike.sigma=9"]).guard.detectors
    assert detectors == {"loss_spike": {"sigma": 9}, "non_finite": {"sigma": 3}}


def test_the_defaults_of_every_real_detector_are_valid_settings(monkeypatch):
    monkeypatch.setattr(registry, "names", REAL_NAMES)
    monkeypatch.setattr(registry, "load", REAL_LOAD)
    names = registry.names("detectors")
    defaults = {name: asdict(registry.load("detectors", name).Config()) for name in names}
    assert names
    assert errors_of(f"guard.detectors={defaults!r}".replace("True", "true").replace("False", "false")) == []
