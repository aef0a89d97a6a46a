"""A step is a transaction: whatever goes wrong in it, nothing of it stays."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from finitune.core.errors import Halted
from finitune.engine.policy import Action
from finitune.numerics.digest import digest
from finitune.train.prepare import Prepared
from support.faults import at_step, mask_labels, poison_gradient, poison_output
from support.runs import loop_of, ready, steps_of

POISONS = [math.nan, math.inf, -math.inf]


def state_digest(prepared: Prepared) -> str:
    """Weights, moments, scaler, schedule, cursor and statistics: the whole training state."""
    return digest(prepared.port.state_tensors(), prepared.port.state_record())


def finite(prepared: Prepared) -> bool:
    return all(bool(torch.isfinite(t).all()) for _, t in prepared.port.state_tensors())


def down_proj(prepared: Prepared) -> torch.nn.Module:
    return prepared.port.parts.model.get_submodule("model.layers.0.mlp.down_proj")


def warm(prepared: Prepared, folder: Path, steps: int = 5):
    """A loop after a few healthy steps, so that there are moments and statistics to protect."""
    loop = loop_of(prepared, folder)
    for _ in range(steps):
        assert loop.one() is Action.PROCEED
    return loop


@pytest.mark.parametrize("value", POISONS)
@pytest.mark.parametrize("precision", ["fp32", "fp16-emulated", "bf16-emulated"])
def test_abort_is_the_identity(tmp_path: Path, precision: str, value: float) -> None:
    from finitune.engine.step import transact

    prepared = ready(tmp_path, f"precision={precision}", "gradient_accumulation_steps=2")
    loop = warm(prepared, tmp_path)
    poison_output(down_proj(prepared), at_step(prepared.port, 6), value)
    before = state_digest(prepared)
    outcome = transact(prepared.port, loop.guard.judge, prepared.port.state.history)
    assert not outcome.committed
    assert state_digest(prepared) == before
    assert all(p.grad is None for _, p in prepared.port.parts.parameters)


def test_the_digest_can_tell_a_difference(tmp_path: Path) -> None:
    prepared = ready(tmp_path)
    warm(prepared, tmp_path)
    before = state_digest(prepared)
    parameter = prepared.port.parts.parameters[0][1]
    with torch.no_grad():
        parameter.view(-1)[0] = torch.nextafter(parameter.view(-1)[0], torch.tensor(math.inf))
    assert state_digest(prepared) != before


@pytest.mark.parametrize("value", POISONS)
def test_a_bad_gradient_under_a_finite_loss_is_refused_and_named(tmp_path: Path, value: float) -> None:
    prepared = ready(tmp_path)
    name, parameter = next((n, p) for n, p in prepared.port.parts.parameters if "layers.1.self_attn.q_proj" in n)
    poison_gradient(parameter, at_step(prepared.port, 6), value)
    loop = warm(prepared, tmp_path)
    assert loop.one() is Action.SKIP_BATCH
    record = steps_of(tmp_path)[-1]
    assert math.isfinite(record["loss"])
    assert record["verdict"] == "abort"
    assert [f["code"] for f in record["findings"]] == ["NUM002"]
    assert record["bad_parameters"] == [name]
    assert record["rows"]
    assert finite(prepared)


def test_the_run_goes_on_after_a_refused_step_and_the_lr_counts_committed_steps(tmp_path: Path) -> None:
    prepared = ready(tmp_path, "lr_scheduler_type=linear", "warmup_ratio=0")
    poison_output(down_proj(prepared), at_step(prepared.port, 3))
    loop = loop_of(prepared, tmp_path)
    assert loop.run()
    records = steps_of(tmp_path)
    assert [r["step"] for r in records] == list(range(1, 25))
    assert [r["action"] for r in records].count("skip_batch") == 1
    assert records[2]["lr"] == records[3]["lr"]
    assert (prepared.port.state.updates, prepared.port.state.step) == (23, 24)
    assert finite(prepared)


def test_without_any_label_the_weights_stay_untouched_and_no_alarm_is_raised(tmp_path: Path) -> None:
    prepared = ready(tmp_path)
    loop = warm(prepared, tmp_path)
    mask_labels(prepared.port, at_step(prepared.port, 6))
    tensors = digest(prepared.port.state_tensors())
    assert loop.one() is Action.SKIP_BATCH
    assert digest(prepared.port.state_tensors()) == tensors
    findings = steps_of(tmp_path)[-1]["findings"]
    assert [(f["code"], f["severity"]) for f in findings] == [("DAT100", "warning")]
    assert loop.one() is Action.PROCEED


def test_one_masked_micro_batch_among_others_still_trains(tmp_path: Path) -> None:
    """Half of the step's labels are gone: the step counts the tokens that are left."""
    prepared = ready(tmp_path, "gradient_accumulation_steps=2")
    loader, real = prepared.port.parts.loader, prepared.port.parts.loader.at

    def first_masked(cursor):
        import dataclasses

        first, *rest = real(cursor)
        empty = dataclasses.replace(first, labels_BT=torch.full_like(first.labels_BT, -100), num_supervised=0)
        return (empty, *rest)

    loader.at = first_masked
    loop = loop_of(prepared, tmp_path)
    assert loop.one() is Action.PROCEED
    assert steps_of(tmp_path)[0]["supervised_tokens"] == real(type(prepared.port.state.cursor)())[1].num_supervised


def test_two_hundred_overflows_in_a_row_end_in_a_halt_with_a_scale_and_finite_weights(tmp_path: Path) -> None:
    """A bare loss scaler ends at scale 0 and then poisons the weights at the next healthy batch."""
    prepared = ready(tmp_path, "precision=fp16-emulated", "max_steps=300")
    parameter = prepared.port.parts.parameters[0][1]
    poison_gradient(parameter, lambda: True, math.inf)
    before = digest(prepared.port.state_tensors())
    loop = loop_of(prepared, tmp_path, max_aborts_in_a_row=200)
    with pytest.raises(Halted) as halted:
        loop.run()
    assert halted.value.exit_code == 3
    records = steps_of(tmp_path)
    assert len(records) >= 200
    scaler = prepared.port.state.scaler
    assert min(r["loss_scale"] for r in records) >= scaler.settings.min_scale
    assert digest(prepared.port.state_tensors()) == before
    assert any(f["code"] == "NUM020" for r in records for f in r["findings"])


def test_overflow_is_answered_by_a_smaller_scale_on_the_same_batch(tmp_path: Path) -> None:
    prepared = ready(tmp_path, "precision=fp16-emulated")
    scaler = prepared.port.state.scaler
    poison_gradient(prepared.port.parts.parameters[0][1], lambda: scaler.scale > 4096, math.inf)
    loop = loop_of(prepared, tmp_path)
    actions = [loop.one() for _ in range(6)]
    assert actions == [Action.RETRY_SMALLER_SCALE] * 4 + [Action.PROCEED] * 2
    records = steps_of(tmp_path)
    assert [r["step"] for r in records] == [1, 1, 1, 1, 1, 2]
    assert len({tuple(r["rows"]) for r in records[:5]}) == 1
    assert all(f["severity"] == "note" for r in records for f in r["findings"])
    assert prepared.port.state.history.num_aborted == 0


def test_a_batch_that_overflows_at_every_scale_gives_the_scale_back(tmp_path: Path) -> None:
    prepared = ready(tmp_path, "precision=fp16-emulated", "scaler.max_retries=3")
    poison_gradient(prepared.port.parts.parameters[0][1], at_step(prepared.port, 6), math.nan)
    loop = warm(prepared, tmp_path)
    scale = prepared.port.state.scaler.scale
    assert [loop.one() for _ in range(4)] == [Action.RETRY_SMALLER_SCALE] * 3 + [Action.SKIP_BATCH]
    assert prepared.port.state.scaler.scale == scale
    assert loop.one() is Action.PROCEED


def test_too_many_refused_steps_halt_with_the_last_good_state(tmp_path: Path) -> None:
    prepared = ready(tmp_path)
    loop = warm(prepared, tmp_path)
    good = digest(prepared.port.state_tensors())
    poison_output(down_proj(prepared), lambda: True)
    with pytest.raises(Halted) as halted:
        loop.run()
    assert halted.value.data["count"] == 8
    assert halted.value.data["reason"] == "NUM001"
    assert prepared.port.state.history.num_aborted == 8
    assert digest(prepared.port.state_tensors()) == good


@pytest.mark.parametrize("precision", ["fp32", "fp16-emulated"])
def test_a_healthy_guarded_run_equals_the_unguarded_one_bit_for_bit(tmp_path: Path, precision: str) -> None:
    digests, losses = [], []
    for enabled in ("true", "false"):
        folder = tmp_path / enabled
        folder.mkdir()
        prepared = ready(folder, f"precision={precision}", f"guard.enabled={enabled}", "guard.state_check_steps=3")
        assert loop_of(prepared, folder).run()
        digests.append(digest(prepared.port.state_tensors()))
        losses.append([r["loss"] for r in steps_of(folder)])
    assert losses[0] == losses[1]
    assert digests[0] == digests[1]


def test_the_same_recipe_gives_the_same_bits(tmp_path: Path) -> None:
    digests = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        torch.rand(7)  # whatever the global generators did before
        prepared = ready(tmp_path, "lora={r: 4, lora_dropout: 0.1}", "max_steps=8")
        loop_of(prepared, folder).run()
        digests.append(state_digest(prepared))
    assert digests[0] == digests[1]


def test_accumulation_is_the_same_step_in_smaller_pieces(tmp_path: Path) -> None:
    """Batch 4 x 1 and 1 x 4 give one gradient: cosine > 0.9999, ratio 1 within 1e-4."""
    vectors = []
    for batch, accumulation in ((4, 1), (1, 4)):
        prepared = ready(
            tmp_path,
            f"per_device_train_batch_size={batch}",
            f"gradient_accumulation_steps={accumulation}",
            "group_by_length=false",
        )
        trace = prepared.port.forward_backward()
        vectors.append((trace.rows, torch.cat([p.grad.flatten() for _, p in prepared.port.parts.parameters])))
    (rows_a, a), (rows_b, b) = vectors
    assert sorted(rows_a) == sorted(rows_b)
    assert torch.cosine_similarity(a, b, dim=0) > 0.9999
    assert a.norm() / b.norm() == pytest.approx(1.0, abs=1e-4)


def test_weights_that_never_move_stop_the_run(tmp_path: Path) -> None:
    prepared = ready(tmp_path, "guard.state_check_steps=1", "guard.detectors={stalled_update: false}")
    for _, parameter in prepared.port.parts.parameters:
        poison_gradient(parameter, lambda: False)
        parameter.register_hook(torch.zeros_like)
    with pytest.raises(Halted) as halted:
        loop_of(prepared, tmp_path).run()
    assert halted.value.code.code == "OPT100"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_train_as_they_do_alone(tmp_path: Path, attention: str) -> None:
    """One packed step has the loss sum and the gradients of the same rows unpacked."""
    losses, gradients = [], []
    for packing in ("true", "false"):
        prepared = ready(
            tmp_path,
            f"data.packing={packing}",
            f"model.attn_implementation={attention}",
            "group_by_length=false",
            "per_device_train_batch_size=64",
        )
        trace = prepared.port.forward_backward()
        losses.append((sorted(trace.rows), trace.num_supervised, float(trace.loss_sum)))
        gradients.append(torch.cat([p.grad.flatten() for _, p in prepared.port.parts.parameters]))
    assert losses[0][:2] == losses[1][:2]
    assert losses[0][2] == pytest.approx(losses[1][2], rel=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)
