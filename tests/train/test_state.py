"""The record of a training state: everything that is not a tensor, exact, and of its own schema only."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finitune.core.journal import encode
from finitune.core.robust import History
from finitune.data.loader import Cursor
from finitune.engine.conditions import AS_CONFIGURED, Conditions
from finitune.engine.scaler import LossScaler, ScalerSettings
from finitune.train.state import SCHEMA, RunState

REAL = st.floats(allow_nan=False, allow_infinity=False)
COUNT = st.integers(0, 10**9)


def through_file(record: dict[str, Any]) -> dict[str, Any]:
    """As a checkpoint stores and reads it."""
    return json.loads(json.dumps(encode(record), allow_nan=False))


@st.composite
def states(draw: st.DrawFn, scaled: bool = True) -> RunState:
    """A state after an arbitrary past."""
    history = History()
    for loss, norm in draw(st.lists(st.tuples(REAL | st.just(math.nan), REAL | st.just(math.inf)), max_size=6)):
        history.committed(loss, norm, changed_fraction=draw(st.none() | REAL), headroom_bits=draw(st.none() | REAL))
    for _ in range(draw(st.integers(0, 2))):
        history.aborted()
    scaler = LossScaler(ScalerSettings(init_scale=draw(st.floats(0.1, 1e9)))) if scaled else None
    if scaler is not None:
        for _ in range(draw(st.integers(0, 3))):
            scaler.back_off()
    return RunState(
        cursor=Cursor(draw(COUNT), draw(COUNT)),
        step=draw(COUNT),
        updates=draw(COUNT),
        attempt=draw(COUNT),
        clean_steps=draw(COUNT),
        supervised_tokens=draw(COUNT),
        history=history,
        scaler=scaler,
        loss_sum=draw(REAL),
        movement=draw(st.none() | st.tuples(st.floats(), st.floats())),
        conditions=draw(
            st.sampled_from([AS_CONFIGURED, Conditions(lr_factor=0.1, quarantine=("a", "b"), warmup_steps=3)])
        ),
        clipper=draw(st.dictionaries(st.text(max_size=5), st.lists(REAL, max_size=3), max_size=2)),
        guard=draw(st.dictionaries(st.text(max_size=5), st.lists(st.integers() | st.text(max_size=5), max_size=3))),
    )


def fresh(scaled: bool = True) -> RunState:
    return RunState(scaler=LossScaler(ScalerSettings()) if scaled else None)


def text_of(record: dict[str, Any]) -> str:
    return json.dumps(encode(record), sort_keys=True)


@given(states(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_what_was_recorded_comes_back_exactly_also_through_a_file(state: RunState, stored: bool) -> None:
    record = state.record()
    again = fresh()
    again.load(through_file(record) if stored else record)
    assert text_of(again.record()) == text_of(record)


@given(states(scaled=False))
@settings(max_examples=20, deadline=None)
def test_a_run_without_loss_scale_records_none(state: RunState) -> None:
    record = state.record()
    assert record["scaler"] is None
    again = fresh(scaled=False)
    again.load(through_file(record))
    assert text_of(again.record()) == text_of(record)


def test_every_field_is_recorded() -> None:
    """A field that is added to the state and forgotten in its record would be lost by every resume."""
    record = fresh().record()
    assert record.pop("schema") == SCHEMA
    assert set(record) == set(RunState.__dataclass_fields__)


def test_a_record_is_a_copy_both_ways() -> None:
    state = fresh()
    state.guard["rows"] = ["a"]
    state.history.committed(1.0, 1.0)
    record = state.record()
    kept = text_of(record)
    state.guard["rows"].append("b")
    state.history.committed(2.0, 2.0)
    state.history.log_loss.add(0.5)
    assert text_of(record) == kept
    other = fresh()
    other.load(record)
    other.guard["rows"].append("c")
    other.history.committed(3.0, 3.0)
    assert text_of(record) == kept


@pytest.mark.parametrize("schema", [0, 1, SCHEMA + 1, None, "2"])
def test_a_record_of_another_schema_is_refused_with_its_number(schema: Any) -> None:
    record = fresh().record() | {"schema": schema}
    with pytest.raises(ValueError, match=f"schema {schema}, expected {SCHEMA}"):
        fresh().load(record)


def test_a_record_from_before_there_were_conditions_is_read_as_configured() -> None:
    record = fresh().record() | {"schema": 2}
    del record["conditions"], record["clipper"]
    state = fresh()
    state.conditions, state.clipper = Conditions(lr_factor=0.5), {"name": "zclip"}
    state.load(record)
    assert state.conditions is AS_CONFIGURED
    assert state.clipper == {}
    assert state.record()["schema"] == SCHEMA


@pytest.mark.parametrize("wrong", [{"no_such": 1}, None, 3, "lr_factor"])
def test_conditions_that_do_not_exist_are_refused_with_nothing_changed(wrong: Any) -> None:
    state = fresh()
    state.step = 5
    before = text_of(state.record())
    with pytest.raises((ValueError, TypeError)):
        state.check(fresh().record() | {"conditions": wrong})
    assert text_of(state.record()) == before


@pytest.mark.parametrize("missing", sorted(fresh().record()))
def test_a_record_that_lacks_something_is_refused(missing: str) -> None:
    record = fresh().record()
    del record[missing]
    with pytest.raises(KeyError, match=missing):
        fresh().load(record)


@pytest.mark.parametrize(
    "wrong",
    [{"step": "x"}, {"cursor": {"epoch": 0}}, {"history": {}}, {"scaler": {"scale": 1.0}}, {"movement": ["a", "b"]}],
    ids=str,
)
def test_a_record_with_a_wrong_value_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises((KeyError, ValueError)):
        fresh().load(fresh().record() | wrong)


def test_step_and_attempt_are_where_the_time_machine_looks_for_them() -> None:
    """engine/port.py: "step" counts batches used up, "attempt" transactions."""
    state = fresh()
    state.step, state.attempt = 3, 5
    assert (state.record()["step"], state.record()["attempt"]) == (3, 5)
