"""Diagnosis: total, monotone, ranked; the learning rate only after its experiment; unknown where nothing flipped."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.causes.scenes import FP16, OF_CAUSES, case
from finitune.core import registry
from finitune.core.codes import all_codes, fill
from finitune.core.incident import Diagnosis, Evidence, Result, Suspect, Trigger, Verdict
from finitune.core.types import Finding, Reading, Severity
from finitune.engine import diagnose as subject
from finitune.engine.case import Case
from finitune.engine.diagnose import diagnose
from finitune.engine.weight import Reasons, Weight

EXPERIMENTS = (
    *("scan_state", "supervised_tokens", "fp32", "bf16", "loss_scales", "known_good_batch", "rows", "older_weights"),
    *("math_attention", "padding", "islands", "fresh_moments", "adam_eps", "lower_lr", "tighter_clip", "let_pass"),
    *("update_share", "reference_optimizer", "borne_rate"),
)
NUMBERS = (
    *("rows", "modules", "good_at", "bad_at", "losses_half", "losses_tenth", "losses", "start_step", "median_loss"),
    *(
        "max_grad_norm",
        "before",
        "after",
        "good",
        "newest_good",
        "num_bad",
        "num_units",
        "widths_good",
        "num_good",
        "only",
    ),
)
CAUSES = {name: registry.load("causes", name) for name in registry.names("causes")}

odd = st.one_of(
    st.none(),
    st.booleans(),
    st.floats(),
    st.integers(-5, 300),
    st.just(10**400),
    st.sampled_from(["", "x", "w|exp_avg"]),
)
junk = st.one_of(odd, st.lists(odd, max_size=3))
values = st.dictionaries(st.sampled_from(NUMBERS), junk, max_size=4)
results = st.sampled_from(Result)
places = ("(loss)", "(model)", "model.layers.0.self_attn", "model.layers.1.mlp.gate", "model.embed_tokens", "")
ops = ("aten._softmax.default", "SqrtBackward0", "aten.mm.default", "aten.div.Tensor", "", "?")
suspects = st.builds(
    Suspect,
    st.sampled_from(["module", "op", "parameter", "moment", "buffer", "row", "tokens", "input", "step"]),
    st.sampled_from([*places, *ops, "w|exp_avg", "lm_head.weight"]),
    st.fixed_dictionaries(
        {},
        optional={
            "phase": st.sampled_from(["forward", "backward", None, 3]),
            "module": st.one_of(odd, st.sampled_from(places)),
            "op": st.one_of(odd, st.sampled_from(ops)),
            "node": st.one_of(odd, st.sampled_from(ops)),
            "since_step": odd,
            **dict.fromkeys(
                ("amax", "since_exact", "frozen", "what", "row", "row_amax", "dtype", "span", "value"), odd
            ),
            **dict.fromkeys(("num_bad", "input_finite", "index"), junk),
        },
    ),
)
readings = st.builds(
    Reading,
    step=st.integers(0, 300),
    loss=st.floats(),
    grad_norm=st.floats(),
    lr=st.floats(),
    supervised_tokens=st.one_of(st.none(), st.integers(0, 2)),
    loss_scale=st.one_of(st.none(), st.floats()),
    amax=st.dictionaries(st.sampled_from(["a.down_proj", "a.down_proj.input", ""]), st.floats(), max_size=2),
    changed_fraction=st.one_of(st.none(), st.floats()),
)
facts = st.fixed_dictionaries(
    {},
    optional={
        "precision": st.one_of(odd, st.sampled_from(["fp16", "fp32", "bf16", "fp16-emulated", "bf16-pure"])),
        "weights": st.sampled_from([(), ["float16"], ["bfloat16", "float32"], [3]]),
        **dict.fromkeys(("half_max", "adam_eps", "resumed_step", "num_units", "attention", "max_grad_norm"), odd),
    },
)
past = st.fixed_dictionaries(
    {},
    optional={
        "incidents": st.lists(st.one_of(odd, st.dictionaries(st.sampled_from(["code", "remedy"]), odd)), max_size=2),
        **dict.fromkeys(("median_loss", "median_grad_norm", "updates"), odd),
    },
)
cases = st.builds(
    Case,
    st.sampled_from(Trigger),
    st.builds(
        Finding,
        st.sampled_from(["NUM001", "OPT403", "OPT405", "DAT402", "MOD401", "SYS402"]),
        st.sampled_from(Severity),
        st.sampled_from(["", "here"]),
        st.dictionaries(st.sampled_from(["limit", "grad_norm", "ratio", "share"]), odd, max_size=2),
    ),
    readings,
    facts,
    past,
    st.one_of(st.none(), st.sampled_from(Verdict)),
    st.lists(suspects, max_size=3).map(tuple),
    st.dictionaries(st.sampled_from(EXPERIMENTS), st.tuples(results, values), max_size=7).map(
        lambda made: {name: Evidence(name, result, numbers) for name, (result, numbers) in made.items()}
    ),
)


@settings(deadline=None, max_examples=300)
@given(cases)
def test_never_raises_and_every_cause_is_sound(of: Case) -> None:
    """pytest turns the warning of a cause that failed into an error."""
    found = diagnose(of)
    assert Diagnosis.from_json(found.to_json()) == found or "nan" in repr(found)
    assert list(found.causes) == sorted(found.causes, key=lambda c: (not c.named, -c.confidence, c.name))
    for cause in found.causes:
        assert 0.1 <= cause.confidence <= 1.0
        assert cause.named or cause.confidence <= 0.5
        assert cause.reasons_for
        assert set(cause.reasons_for) <= {*EXPERIMENTS, "verdict", "trigger", "localised", "facts"}
        for language in ("en", "zh"):
            page = all_codes()[cause.code].text(language)
            assert not [t for t in (page.what, page.why, *page.cures) if "{" in fill(t, cause.data)]


@settings(deadline=None, max_examples=200)
@given(cases)
def test_the_rate_is_never_blamed_without_its_experiment(of: Case) -> None:
    if not (of.good("lower_lr") or of.good("borne_rate")):
        assert "learning_rate" not in [c.name for c in diagnose(of).causes]


@settings(deadline=None, max_examples=200)
@given(cases)
def test_nothing_is_named_where_no_experiment_flips_and_nothing_was_seen(of: Case) -> None:
    """Left over are what is not an experiment on the step: the verdict, a count, a scan, a check's own finding."""
    bad = {n: replace(e, result=Result.BAD) for n, e in of.evidence.items()}
    seen = {*bad, "verdict", "trigger", "facts", "localised"}
    for cause in diagnose(replace(of, evidence=bad)).causes:
        if cause.named:
            assert {"scan_state", "supervised_tokens", "verdict", "trigger", "facts", "localised"} & set(
                cause.reasons_for
            )
            assert cause.reasons_for[0] in seen


@settings(deadline=None, max_examples=300)
@given(cases, st.sampled_from(EXPERIMENTS), st.sampled_from([Result.GOOD, Result.BAD]))
def test_one_more_reason_against_never_raises_a_confidence(of: Case, experiment: str, result: Result) -> None:
    without = replace(of, evidence={n: e for n, e in of.evidence.items() if n != experiment})
    more = without.with_evidence(Evidence(experiment, result))
    for module in CAUSES.values():
        before, after = module.weigh(without), module.weigh(more)
        if before is None or after is None or experiment not in after.reasons_against:
            continue
        if experiment in after.reasons_for:
            continue
        assert after.confidence <= before.confidence
        assert before.named or not after.named


@settings(deadline=None, max_examples=100)
@given(cases)
def test_the_same_case_gives_the_same_diagnosis(of: Case) -> None:
    assert repr(diagnose(of)) == repr(diagnose(of))


@settings(deadline=None, max_examples=100)
@given(cases)
def test_what_does_not_repeat_is_never_blamed_on_data_or_rate(of: Case) -> None:
    causes = diagnose(replace(of, verdict=Verdict.NOT_REPRODUCED)).causes
    # An update that is sound the second time shows a state that was changed from outside.
    assert {c.name for c in causes} <= {"not_reproducible", "corrupt_state"}
    assert [c.name for c in causes if c.name == "corrupt_state"] == ["corrupt_state"] * (of.trigger is Trigger.UPDATE)


@pytest.mark.parametrize("name", OF_CAUSES)
def test_a_diagnosis_survives_json(name: str) -> None:
    found = diagnose(OF_CAUSES[name])
    again = Diagnosis.from_json(json.loads(json.dumps(found.to_json())))
    assert [(c.name, c.confidence, c.named) for c in again.causes] == [
        (c.name, c.confidence, c.named) for c in found.causes
    ]


# ---- third parties ----


def third_party(monkeypatch: pytest.MonkeyPatch, weigh) -> None:
    module = SimpleNamespace(weigh=weigh, CAUSE=SimpleNamespace(code="DAT900"), FAULT_CLASS="N", REMEDIES=())
    monkeypatch.setattr(subject.registry, "names", lambda _: ("theirs",))
    monkeypatch.setattr(subject.registry, "load", lambda _family, _name: module)


def test_a_cause_of_a_third_party_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    third_party(monkeypatch, lambda _: Weight(0.7, True, ("fp32",)))
    assert [(c.name, c.code) for c in diagnose(case(facts=FP16)).causes] == [("theirs", "DAT900")]


@pytest.mark.parametrize("confidence", [0.09, 0.0, -1.0, math.nan, math.inf, -math.inf])
def test_a_confidence_that_is_too_small_or_no_number_is_left_out(monkeypatch, confidence: float) -> None:
    third_party(monkeypatch, lambda _: Weight(confidence, True, ("fp32",)))
    assert diagnose(case()).causes == ()


def test_a_cause_that_fails_is_left_out_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_case: Case) -> Weight:
        raise ZeroDivisionError("theirs")

    third_party(monkeypatch, broken)
    with pytest.warns(RuntimeWarning, match="the cause theirs could not weigh"):
        assert diagnose(case()).causes == ()


def test_a_third_party_cannot_blame_data_for_what_does_not_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    third_party(monkeypatch, lambda _: Weight(0.7, True, ("verdict",)))
    assert diagnose(case(verdict=Verdict.NOT_REPRODUCED)).causes == ()
    assert len(diagnose(case(verdict=Verdict.REPRODUCED)).causes) == 1


# ---- weights ----


def test_hints_never_add_up_to_a_name() -> None:
    reasons = Reasons()
    for number in range(20):
        reasons.hint(True, f"hint {number}", 0.9)
    weight = reasons.weight()
    assert weight is not None
    assert (weight.named, weight.confidence) == (False, 0.5)


def test_nothing_for_it_is_no_weight() -> None:
    reasons = Reasons()
    reasons.proof(False, "fp32", 0.9)
    reasons.against(True, "bf16", 0.5)
    assert reasons.weight() is None


def test_a_refuted_proof_is_no_name() -> None:
    reasons = Reasons()
    reasons.proof(True, "rows", 0.9)
    reasons.against(True, "fp32", 0.25)
    weight = reasons.weight("here", x=1)
    assert weight is not None
    assert (weight.named, weight.where, weight.data) == (False, "here", {"where": "here", "x": 1})
    assert weight.confidence == pytest.approx(0.225)


def test_diagnosing_loads_no_torch() -> None:
    code = (
        "import sys; from finitune.engine.diagnose import diagnose; from finitune.engine.remedying import candidates; "
        "from finitune.core import registry; "
        "[registry.load(f, n) for f in ('causes', 'remedies') for n in registry.names(f)]; "
        "print('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"
