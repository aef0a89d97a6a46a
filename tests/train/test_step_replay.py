"""Our own port as a ReplayPort: any part of any recent batch again, and what else is asked of one."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from finitune.engine.conditions import AS_CONFIGURED, Conditions, NotPossible
from finitune.engine.policy import Action
from finitune.engine.port import Ask
from finitune.engine.snapshot import as_snapshot
from finitune.models.precision import PRECISIONS
from finitune.train.prepare import Prepared, original_tensor
from finitune.train.step import TrainPort
from support.ports import at_start, bits, look, prepared_runs, step
from support.runs import tiny_recipe
from support.timelines import SMALL


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Prepared]:
    return prepared_runs(tmp_path_factory.mktemp("ports"))


@pytest.fixture(params=["padded", "packed"])
def port(made: dict[str, Prepared], request: pytest.FixtureRequest) -> Iterator[TrainPort]:
    yield from at_start(made[request.param].port)


@pytest.fixture
def half(made: dict[str, Prepared]) -> Iterator[TrainPort]:
    yield from at_start(made["half"].port)


@pytest.fixture
def padded(made: dict[str, Prepared]) -> Iterator[TrainPort]:
    yield from at_start(made["padded"].port)


# ---------------------------------------------------------------- which batch


def test_the_whole_batch_is_what_is_computed_without_asking(port: TrainPort) -> None:
    every = tuple(range(len(port.units())))
    plain = look(port)
    assert look(port, Ask()) == plain
    assert look(port, Ask(step=1)) == plain
    assert look(port, Ask(units=every)) == plain
    assert look(port, Ask(prefix_tokens=10_000)) == plain


def test_earlier_batches_are_computed_under_the_present_weights(port: TrainPort) -> None:
    rows = []
    for _ in range(3):
        rows.append(port.rows())
        step(port)
    assert port.clean_steps() == (3, 2, 1)
    for number in (1, 2, 3):
        trace = port.forward_backward(Ask(step=number))
        port.abort()
        assert trace.rows == rows[number - 1]
        assert trace.step == 4
    first = as_snapshot(port)
    losses = [look(port, Ask(step=n)).loss for n in (1, 2, 3)]
    step(port)
    first.restore(port)
    assert [look(port, Ask(step=n)).loss for n in (1, 2, 3)] == losses
    assert port.clean_steps() == (3, 2, 1), "step 4 is not there any more"


def test_the_randomness_of_an_earlier_batch_is_its_own(made: dict[str, Prepared]) -> None:
    for port in at_start(made["dropout"].port):
        before = as_snapshot(port)
        truth = look(port)
        step(port)
        after = as_snapshot(port)
        record = {**after.record, "step": 1}
        port.restore(before.tensors, record | {"cursor": after.record["cursor"], "attempt": 1})
        again = look(port, Ask(step=1))
        assert (again.loss, again.grad_norm) == (truth.loss, truth.grad_norm)


def test_only_steps_without_a_warning_count_as_clean(padded: TrainPort) -> None:
    step(padded)
    step(padded, clean=False)
    reading = look(padded)
    padded.settle(Action.SKIP_BATCH, reading, clean=False)
    step(padded)
    assert padded.clean_steps() == (4, 1)
    assert look(padded, Ask(step=3)).loss > 0, "a batch that was given up can be computed all the same"


@pytest.mark.parametrize("asked", [Ask(step=-3), Ask(step=900), Ask(units=()), Ask(units=(0, 99)), Ask(units=(-1,))])
def test_what_is_not_there_is_not_possible(padded: TrainPort, asked: Ask) -> None:
    before = bits(padded)
    with pytest.raises(NotPossible):
        padded.forward_backward(asked)
    assert bits(padded) == before


def test_only_the_last_steps_are_remembered(padded: TrainPort) -> None:
    for number in range(1, 400):
        padded.seen.used(number, padded.state.cursor)
        padded.seen.judged(number, clean=True)
    assert len(padded.seen.clean_up_to(399)) == 64
    with pytest.raises(NotPossible):
        padded.seen.cursor_of(200)
    assert padded.seen.cursor_of(399) == padded.state.cursor


# ---------------------------------------------------------------- parts of it


def test_the_units_are_all_rows_in_order(port: TrainPort) -> None:
    units = port.units()
    assert [r for u in units for r in u.rows] == list(port.rows())
    assert {u.micro for u in units} == {0, 1}
    batches = port.batch()
    assert max(u.index for u in units) < max(len(b["ids_BT"]) for b in batches)


def test_copies_keep_the_shapes_and_the_loss_is_that_of_the_unit_alone(port: TrainPort) -> None:
    shapes = [{k: v.shape for k, v in b.items()} for b in port.batch()]
    whole = []
    for number, unit in enumerate(port.units()):
        _, batches = port._asked(Ask(units=(number,)))
        ((micro, batch),) = batches
        assert micro == unit.micro
        assert {k: v.shape for k, v in batch.tensors().items()} == shapes[micro]
        assert batch.row_ids == unit.rows
        assert all(torch.equal(row, batch.ids_BT[0]) for row in batch.ids_BT)
        whole.append(look(port, Ask(units=(number,))))
    assert all(math.isfinite(r.loss) and r.supervised_tokens for r in whole)
    # The loss of the batch is that of its units, each weighed by its targets (copies counted off).
    copies = [len(port.batch()[u.micro]["ids_BT"]) for u in port.units()]
    targets = [(r.supervised_tokens or 0) / c for r, c in zip(whole, copies, strict=True)]
    mean = sum(r.loss * t for r, t in zip(whole, targets, strict=True)) / sum(targets)
    assert mean == pytest.approx(look(port).loss, rel=1e-5)


def test_rows_of_one_micro_batch_take_turns_in_the_other_places(padded: TrainPort) -> None:
    ids = padded.batch()[0]["ids_BT"]
    _, ((_, batch),) = padded._asked(Ask(units=(1,)))
    assert torch.equal(batch.ids_BT[0], ids[1])
    assert torch.equal(batch.ids_BT[1], ids[1])
    assert padded.forward_backward(Ask(units=(1,))).rows == padded.units()[1].rows
    padded.abort()


def test_a_prefix_has_the_loss_of_its_own_targets_and_the_width_stays(port: TrainPort) -> None:
    full = port.batch()
    cut = [b.tensors() for _, b in port._asked(Ask(prefix_tokens=9))[1]]
    for whole, part in zip(full, cut, strict=True):
        assert part["ids_BT"].shape == whole["ids_BT"].shape
        at = whole.get("position_ids_BT", torch.arange(whole["ids_BT"].shape[1]).expand_as(whole["ids_BT"]))
        assert torch.equal(part["ids_BT"][at < 9], whole["ids_BT"][at < 9])
        assert (part["labels_BT"][at >= 9] == -100).all()
        assert torch.equal(part["labels_BT"][at < 9], whole["labels_BT"][at < 9])
    assert (look(port, Ask(prefix_tokens=9)).supervised_tokens or 0) < (look(port).supervised_tokens or 0)
    assert look(port, Ask(prefix_tokens=1)).supervised_tokens == 0


@pytest.mark.parametrize("extra", [1, 8])
def test_more_padding_changes_nothing_but_the_width(port: TrainPort, extra: int) -> None:
    plain, widths = look(port), [b["ids_BT"].shape[1] for b in port.batch()]
    port.adopt(Conditions(extra_padding=extra))
    assert [b["ids_BT"].shape[1] for b in port.batch()] == [w + extra for w in widths]
    wide = look(port)
    assert (wide.supervised_tokens, wide.tokens) == (plain.supervised_tokens, plain.tokens)
    assert wide.loss == pytest.approx(plain.loss, rel=1e-5)
    assert wide.grad_norm == pytest.approx(plain.grad_norm, rel=1e-4)


def test_less_padding_cuts_the_last_column_and_no_more_than_there_is(port: TrainPort) -> None:
    widths = [b["ids_BT"].shape[1] for b in port.batch()]
    port.adopt(Conditions(extra_padding=-1))
    assert [b["ids_BT"].shape[1] for b in port.batch()] == [w - 1 for w in widths]
    assert math.isfinite(look(port).loss)
    port.adopt(Conditions(extra_padding=-500))
    with pytest.raises(NotPossible):
        port.forward_backward()


# ---------------------------------------------------------------- what else is asked of a port


def test_the_original_value_of_a_weight_a_frozen_weight_and_a_buffer_is_had_again(
    made: dict[str, Prepared], padded: TrainPort
) -> None:
    original = {n: p.detach().clone() for n, p in padded.parameters()}
    step(padded)
    for name in list(original)[:2]:
        value = padded.origin(name)
        assert value is not None
        assert torch.equal(value, original[name])
    buffer, held = next(iter(padded.model.named_buffers()))
    assert torch.equal(padded.origin(buffer), held)  # type: ignore[arg-type]
    assert padded.origin("no.such.tensor") is None
    lora = made["dropout"].port
    frozen = next(n for n, p in lora.model.named_parameters() if not p.requires_grad)
    assert torch.equal(lora.origin(frozen), dict(lora.model.named_parameters())[frozen])  # type: ignore[arg-type]


def test_the_origin_is_none_where_the_files_are_gone(padded: TrainPort, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, model=SMALL)
    gone = recipe.model_copy(update={"model": recipe.model.model_copy(update={"name_or_path": str(tmp_path / "gone")})})
    assert original_tensor(gone, PRECISIONS["fp32"], padded.parameters()[0][0]) is None


def test_facts_say_what_the_step_runs_under(half: TrainPort) -> None:
    facts = half.facts()
    assert json.loads(json.dumps(facts)) == facts
    assert (facts["precision"], facts["half_max"], facts["weights"]) == ("fp16-emulated", 65504.0, ["float32"])
    assert (facts["loss_scale"], facts["optimizer"], facts["adam_eps"]) == (65536.0, "adamw_torch_fused", 1e-8)
    assert facts["num_units"] == len(half.units()) == 4
    assert facts["width_tokens"] == max(b["ids_BT"].shape[1] for b in half.batch())
    assert facts["attention"] == "sdpa"
    half.adopt(replace(AS_CONFIGURED, attention="math"))
    assert half.facts()["attention"] == "math"


def test_math_attention_gives_the_same_loss_also_for_packed_rows(port: TrainPort) -> None:
    plain = look(port)
    port.adopt(Conditions(attention="math"))
    assert look(port).loss == pytest.approx(plain.loss, rel=1e-5)
    port.adopt(AS_CONFIGURED)
    assert look(port) == plain
