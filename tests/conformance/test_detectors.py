"""What every detector must be: documented, configurable, pure, deaf to nothing and silent on health."""

from __future__ import annotations

import ast
import copy
import importlib.util
import json
import math
import subprocess
import sys
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finitune.core import registry
from finitune.core.codes import Code, fill
from finitune.core.robust import History
from finitune.core.types import Finding, Reading

_spec = importlib.util.spec_from_file_location(
    "finitune_test_traces", Path(__file__).parents[1] / "detectors" / "traces.py"
)
assert _spec is not None
assert _spec.loader is not None
traces = sys.modules.setdefault("finitune_test_traces", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(traces)

NAMES = registry.names("detectors")
SECTIONS = ("What it sees:", "Why it is bad:", "Example:", "What to do:", "Source:")
ODD = (math.nan, math.inf, -math.inf, 0.0, -0.0, 5e-324, -5e-324, 1.7976931348623157e308, -1.0, 1e-30, 1.0)


@pytest.fixture(params=NAMES)
def detector(request: pytest.FixtureRequest) -> ModuleType:
    return registry.load("detectors", request.param)


def short_name(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


def test_the_family_is_not_empty() -> None:
    assert set(traces.FAULTS) == set(NAMES), "every detector has a fault that it must see, in tests/detectors/traces.py"


def test_the_docstring_has_all_sections_in_order(detector: ModuleType) -> None:
    lines = (detector.__doc__ or "").splitlines()
    assert [line for line in lines if line in SECTIONS] == list(SECTIONS)
    for section in SECTIONS:
        assert lines[lines.index(section) + 1].startswith("    "), f"section {section} is empty"


def test_codes_are_a_tuple_of_codes(detector: ModuleType) -> None:
    assert isinstance(detector.CODES, tuple)
    assert detector.CODES
    assert all(isinstance(c, Code) for c in detector.CODES)


def test_settings_survive_json(detector: ModuleType) -> None:
    config = detector.Config()
    assert is_dataclass(config)
    assert detector.Config(**json.loads(json.dumps(asdict(config)))) == config


def test_every_setting_is_documented(detector: ModuleType) -> None:
    """A string right below the field, as everywhere in FiniTune."""
    assert detector.__file__ is not None
    tree = ast.parse(Path(detector.__file__).read_text(encoding="utf-8"))
    body = next(n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Config")
    for node, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign):
            documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            assert documented, f"{ast.unparse(node.target)} has no docstring"


def test_a_bad_setting_is_an_error_that_names_the_field(detector: ModuleType) -> None:
    for field in fields(detector.Config):
        for bad in (math.nan, math.inf, -1.0):
            with pytest.raises(ValueError, match=field.name):
                detector.Config(**{field.name: bad})


def test_settings_are_frozen(detector: ModuleType) -> None:
    config = detector.Config()
    with pytest.raises((AttributeError, TypeError)):
        config.factor = 3.0


@pytest.mark.parametrize("family", traces.STRANGE)
def test_no_error_and_no_alarm_of_the_early_warnings_on_strange_health(family: str) -> None:
    """What is healthy but looks odd; the veto of a step without a loss, or of a rare row, is right there."""
    for name in ("gradient_ramp", "headroom_trend", "runaway", "scale_trajectory", "update_ratio"):
        assert traces.show(traces.strange(family, 11), traces.of(registry.load("detectors", name))) == []


@pytest.mark.parametrize("family", traces.FAMILIES)
def test_silent_on_healthy_traces(detector: ModuleType, family: str) -> None:
    for seed in range(3):
        assert traces.show(traces.healthy(family, seed), traces.of(detector)) == []


def test_speaks_on_its_own_fault(detector: ModuleType) -> None:
    said = traces.show(traces.FAULTS[short_name(detector)](), traces.of(detector))
    assert said
    assert {f.code for _, f in said} <= {c.code for c in detector.CODES}


def test_every_finding_fills_its_template_in_both_languages(detector: ModuleType) -> None:
    by_name = {c.code: c for c in detector.CODES}
    for _, finding in traces.show(traces.FAULTS[short_name(detector)](), traces.of(detector)):
        for language in ("en", "zh"):
            assert "{" not in fill(by_name[finding.code].text(language).what, finding.data)


def test_findings_survive_json_without_loss(detector: ModuleType) -> None:
    for _, finding in traces.show(traces.FAULTS[short_name(detector)](), traces.of(detector)):
        assert json.dumps(finding.to_json()) == json.dumps(Finding.from_json(finding.to_json()).to_json())


def test_the_same_input_gives_the_same_finding(detector: ModuleType) -> None:
    trace = traces.FAULTS[short_name(detector)]()
    assert repr(traces.show(trace, traces.of(detector))) == repr(traces.show(trace, traces.of(detector)))


def test_gaps_in_the_measurements_raise_nothing_and_find_nothing(detector: ModuleType) -> None:
    """A parsed log may hold a loss and a norm only."""
    bare = [Reading(step=r.step, loss=r.loss, grad_norm=r.grad_norm) for r in traces.healthy("fine-tuning", 5)]
    assert traces.show(bare, traces.of(detector)) == []
    every_third = bare[::3]
    assert traces.show(every_third, traces.of(detector)) == []


def test_constant_input_is_healthy(detector: ModuleType) -> None:
    constant = [Reading(step=i, loss=1.0, grad_norm=1.0, lr=1e-5, supervised_tokens=5) for i in range(1, 200)]
    assert traces.show(constant, traces.of(detector)) == []


numbers = st.one_of(st.sampled_from(ODD), st.floats())
maybe = st.one_of(st.none(), numbers)
readings = st.builds(
    Reading,
    step=st.integers(0, 10**9),
    loss=numbers,
    grad_norm=numbers,
    lr=numbers,
    supervised_tokens=st.one_of(st.none(), st.integers(0, 3)),
    tokens=st.one_of(st.none(), st.integers(0, 3)),
    loss_scale=maybe,
    bad_parameters=st.sampled_from([(), ("a.weight",), ("a.weight", "b.weight")]),
    num_bad_parameters=st.integers(0, 3),
    amax=st.dictionaries(st.sampled_from(["a", "b"]), numbers),
    headroom_bits=maybe,
    update_ratio=maybe,
    changed_fraction=maybe,
    time_s=maybe,
)


@settings(deadline=None, max_examples=60)
@given(st.lists(readings, max_size=40), st.integers(0, 20), st.sampled_from(NAMES))
def test_no_number_raises_or_touches_the_history(past: list[Reading], overflows: int, name: str) -> None:
    module = registry.load("detectors", name)
    config, history = module.Config(), History()
    for reading in past:
        before = copy.deepcopy(history.state())
        found = module.detect(history, reading, config)
        assert found is None or isinstance(found, Finding)
        assert history.state() == before
        # Whatever the verdict: the history must hold for a guard that is switched off, too.
        history.commit(reading)
    for _ in range(overflows):
        history.overflowed()
    if past:
        module.detect(history, past[-1], config)


def test_odd_numbers_after_a_long_healthy_past(detector: ModuleType) -> None:
    history = History()
    for reading in traces.healthy("fine-tuning", 2, 40):
        history.commit(replace(reading, changed_fraction=0.9, headroom_bits=3.0, update_ratio=1e-4))
    before = copy.deepcopy(history.state())
    for loss in ODD:
        for other in ODD:
            odd = Reading(
                step=41, loss=loss, grad_norm=other, lr=other, loss_scale=other, headroom_bits=other, update_ratio=other
            )
            detector.detect(history, odd, detector.Config())
    assert history.state() == before


def test_a_step_that_is_not_finite_is_always_refused() -> None:
    """By all detectors together, whatever else is measured."""
    modules = [registry.load("detectors", n) for n in NAMES]
    for loss in ODD:
        for grad_norm in ODD:
            reading = Reading(step=1, loss=loss, grad_norm=grad_norm)
            found = [m.detect(History(), reading, m.Config()) for m in modules]
            bad = not (math.isfinite(loss) and math.isfinite(grad_norm))
            assert any(f is not None and f.veto for f in found) == bad


def test_detectors_load_without_torch_and_numpy() -> None:
    program = (
        "import sys; from finitune.core import registry; "
        "[registry.load('detectors', n) for n in registry.names('detectors')]; "
        "print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
