"""The summary of an incident: twelve lines, two languages, everything that matters, and nothing that harms."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finitune.core.chain import encode
from finitune.core.incident import (
    Cause,
    Diagnosis,
    Evidence,
    Incident,
    Phase,
    Result,
    Suspect,
    Trial,
    Trigger,
    Verdict,
)
from finitune.core.messages.catalogue import set_language
from finitune.core.types import Finding, RowId, Severity
from finitune.report.incident import MAX_COLUMNS, MAX_LINES, escaped, summary, table, to_markdown, wrap
from finitune.report.words import width

EVIL = "evil\n\x1b[31m\x9b2J[bold]red[/bold]\u202e{loss} `x` <script>|"
MODULE = "model.layers.11.mlp.down_proj"
ROWS = tuple(RowId.of("rows.jsonl", n, b"%d" % n) for n in range(1, 5))


@pytest.fixture(autouse=True)
def _english():
    set_language("en")
    yield
    set_language(None)


def incident(**changes) -> Incident:
    """An overflow of the forward pass that one module in fp32 cured."""
    fields = {
        "number": 3,
        "step": 159,
        "attempt": 161,
        "trigger": Trigger.LOSS,
        "finding": Finding("NUM001", Severity.ERROR, "", {"loss": float("nan"), "step": 159}, (), True),
        "reading": {"step": 159, "loss": float("nan"), "grad_norm": float("nan")},
        "rows": ROWS,
        "phase": Phase.PROBATION,
        "verdict": Verdict.REPRODUCED,
        "facts": {"precision": "fp16"},
        "suspects": (
            Suspect("module", MODULE, {"dtype": "float16", "amax": 65822.0, "input_amax": 311.5}),
            Suspect("row", str(ROWS[1]), {"micro": 0, "index": 1, "span": [4, 9]}),
        ),
        "evidence": (
            Evidence("fp32", Result.GOOD, {"loss": 2.31, "grad_norm": 1.2}, 1.0),
            Evidence("loss_scales", Result.BAD, {"good_at": [], "bad_at": [1.0, 65536.0]}, 2.0),
        ),
        "diagnosis": Diagnosis(
            (
                Cause("forward_overflow", "NUM400", "B", 0.96, True, ("localised", "fp32"), ("loss_scales",), MODULE),
                Cause("bad_row", "DAT401", "N", 0.2, False, ("trigger",), ("fp32",)),
            )
        ),
        "trials": (
            Trial({"remedy": "bf16"}, False, "step 160: loss 11.2", (2.3, 11.2), 2.0),
            Trial(
                {"remedy": "fp32_modules", "data": {"modules": [MODULE], "count": 1}}, True, "holds", (2.3, 2.2), 2.0
            ),
        ),
        "remedy": "fp32_modules",
        "outcome": "cured",
        "replays": 14.0,
        "time_s": 3.24,
        "capsule": "incidents/003/capsule",
    }
    return Incident(**fields | changes)


def said(made: Incident) -> str:
    return "\n".join(summary(made, "runs/demo"))


def test_it_says_what_where_why_proof_what_was_done_and_how_to_replay() -> None:
    words = said(incident())
    for part in (
        "Incident 3 at step 159: the loss is nan. It repeats on a replay.",
        f"module {MODULE} puts out 65822 (float16 ends at 65504) from inputs up",
        f"{ROWS[1]} tokens 4-9",
        "NUM400 the forward pass overflows in fp16 (confidence 96 %)",
        "n fp32 the same step is good: loss 2.31",
        "fp32_modules held on a replay 1 steps past the failure: losses 2.3, 2.2",
        "14 replays, 3.2 s, no row and no step given up",
        "precision: bf16",
        "finitune replay runs/demo/incidents/003/capsule",
    ):
        assert part in words, words


@pytest.mark.parametrize("language", ["en", "zh"])
def test_it_has_twelve_lines_of_a_hundred_columns_at_most(language) -> None:
    set_language(language)
    many = tuple(Suspect(k, "x." * 200, {"amax": 1.0}) for k in ("op", "module", "parameter", "row", "tokens") * 9)
    data = {"modules": ["m" * 300] * 9, "count": 9}
    long = Trial({"remedy": "fp32_modules", "data": data}, True, "r" * 999, (2.0,) * 99)
    for made in (incident(), incident(suspects=many, trials=(long,) * 9), incident(capsule=None, trials=())):
        lines = summary(made, "runs/" + "d" * 300)
        assert len(lines) <= MAX_LINES
        assert max(map(width, lines)) <= MAX_COLUMNS
        assert all(line.strip() for line in lines)


def test_the_chinese_summary_is_chinese_and_has_the_same_numbers() -> None:
    set_language("zh")
    words = said(incident())
    for part in ("65822", "65504", "NUM400", "原因", "证明", "14 次重放"):
        assert part in words


def test_an_unknown_cause_is_called_unknown() -> None:
    suspected = Cause("bad_row", "DAT401", "N", 0.4, False, ("trigger",), ("fp32",))
    assert "unknown; no experiment" in said(incident(diagnosis=Diagnosis((suspected,)), suspects=()))
    assert "unknown; none of 2 experiments" in said(incident(diagnosis=Diagnosis()))
    assert "not investigated" in said(incident(diagnosis=Diagnosis(), evidence=()))


def test_a_failure_that_does_not_repeat_is_said_so() -> None:
    words = said(incident(verdict=Verdict.NOT_REPRODUCED, diagnosis=Diagnosis(), evidence=(), suspects=()))
    assert "It does not repeat on a replay." in words
    assert "could not be localised; 4 rows in the batch" in words


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"outcome": "halted", "remedy": None, "trials": ()}, "the run was halted here"),
        ({"outcome": "observed", "remedy": None}, "4 rows given up"),
        ({"outcome": "", "remedy": None, "phase": Phase.LOCALISING}, "still open (localising)"),
        ({"outcome": "passed"}, "it is harmless"),
        ({"outcome": "skipped"}, "4 rows given up"),
        ({"steps_lost": 7}, "7 steps undone"),
        ({"time_s": 3725.0}, "1:02:05"),
        ({"capsule": None}, "no capsule was written"),
        ({"trials": (Trial({"remedy": "clip"}, False, "loss 9", ()),), "remedy": None}, "none of 1 plans held"),
        ({"trials": (), "remedy": None}, "no plan was tried"),
    ],
)
def test_every_outcome_and_cost_is_told(changes, part) -> None:
    assert part in said(incident(**changes))


def test_rows_in_quarantine_are_counted_once_and_only_those_of_the_batch() -> None:
    plan = {"remedy": "skip_rows", "conditions": {"quarantine": [ROWS[0].digest, ROWS[0].digest, "0" * 12]}}
    made = incident(trials=(Trial(plan, True, "holds", (2.0,)),), remedy="skip_rows")
    assert "1 rows given up" in said(made)


def test_the_advice_is_whole_when_reasons_can_give_way() -> None:
    words = " ".join(said(incident()).split())
    assert "..." not in words[words.index("change") : words.index("replay runs")]


def test_nothing_in_a_record_reaches_the_terminal_as_a_command() -> None:
    made = incident(
        suspects=(
            Suspect("module", EVIL, {"dtype": EVIL, "amax": EVIL}),
            Suspect(EVIL, EVIL, {}),
            Suspect("row", EVIL),
        ),
        evidence=(Evidence(EVIL, Result.BAD, {EVIL: EVIL}), Evidence("fp32", Result.GOOD, {"loss": EVIL})),
        diagnosis=Diagnosis((Cause(EVIL, EVIL, EVIL, 0.5, True, (EVIL, "fp32"), (EVIL,), EVIL, {EVIL: EVIL}),)),
        trials=(Trial({"remedy": EVIL, "data": {"modules": EVIL}}, True, EVIL, (1.0,)),),
        remedy=EVIL,
        capsule=EVIL,
        facts={EVIL: EVIL},
        reading={"loss": EVIL},
        outcome=EVIL,
    )
    for words in ("\n".join(summary(made)), "\n".join(table([made])), to_markdown(made)):
        assert not [c for c in words.replace("\n", "") if not c.isprintable()]
    assert "{loss}" in "\n".join(summary(made)), "data is not read as a template"
    assert "<script>" not in to_markdown(made)


def test_markdown_tells_the_whole_record() -> None:
    page = to_markdown(incident(), "runs/demo")
    for part in ("# Incident 3", "## Causes", "## Experiments", "## Suspects", "## Plans tried", "DAT401", "65822"):
        assert part in page
    assert "down\\_proj" in page
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert {line.count(" | ") for line in rows[:4]} == {4}


def test_escaped_text_is_one_line_without_markup() -> None:
    assert escaped("a|b\n*c*") == "a\\|b\\\\n\\*c\\*"


def test_a_table_has_one_line_for_each() -> None:
    lines = table([incident(), incident(number=4, diagnosis=Diagnosis(), outcome="halted", remedy=None)])
    assert len(lines) == 3
    assert "NUM400" in lines[1]
    assert "unknown" in lines[2]


def test_a_record_from_a_journal_reads_the_same() -> None:
    made = incident()
    back = Incident.from_json(encode(made.to_json()))
    assert summary(back) == summary(made)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.sampled_from(["dtype", "amax", "input_amax", "value", "index", "since_step", "span"]), VALUES),
    st.dictionaries(st.sampled_from(["loss", "grad_norm", "modules", "reason"]), VALUES),
    VALUES,
)
def test_whatever_a_record_holds_it_can_be_told(numbers, data, any_value) -> None:
    made = replace(
        incident(),
        suspects=(Suspect("module", "m", numbers), Suspect("row", "r", numbers)),
        evidence=(Evidence("fp32", Result.GOOD, data), Evidence("rows", Result.NOT_RUN, data)),
        trials=(Trial({"remedy": "fp32_modules", "data": any_value, "conditions": any_value}, True, "", ()),),
        facts={"x": any_value},
        reading=data,
    )
    assert len(summary(made)) <= MAX_LINES
    assert to_markdown(made)


@given(st.text(max_size=200), st.integers(2, 40))
def test_wrapped_lines_fit_and_lose_nothing(words, columns) -> None:
    lines = wrap(words, columns)
    assert all(width(line) <= columns for line in lines)
    assert "".join("".join(lines).split(" ")) == "".join(words.split(" "))
