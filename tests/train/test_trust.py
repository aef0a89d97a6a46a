"""Trust comes later than any detector: what is trusted was looked at for longer than a bad state stays unseen.

The delay of a detector is the number of steps after the last good one at which it speaks, measured on healthy traces
whose readings turn bad from one step on. Measured: non_finite 1, loss_spike 1, gradient_explosion 1, scaler_collapse 1,
headroom 1, divergence 33.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from finitune.core import registry
from finitune.core.journal import read
from finitune.core.robust import History
from finitune.core.types import Reading, Verdict
from finitune.engine.judge import Judge
from finitune.engine.line import is_clean
from finitune.engine.policy import Action
from finitune.train import checkpoint
from finitune.train.keeper import KeepSettings, step_in
from finitune.train.recipe import Recipe
from finitune.train.run import open_run
from support.runs import tiny_recipe

_spec = importlib.util.spec_from_file_location(
    "finitune_test_traces", Path(__file__).parents[1] / "detectors" / "traces.py"
)
assert _spec is not None
assert _spec.loader is not None
traces = sys.modules.setdefault("finitune_test_traces", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(traces)

TRUST_STEPS = Recipe().guard.trust_steps

BAD_STATES: dict[str, dict[str, Any]] = {
    "non_finite": {"loss": math.nan, "grad_norm": math.nan},
    "loss_spike": {"loss": 60.0},
    "gradient_explosion": {"grad_norm": 1000.0},
    "scaler_collapse": {"loss_scale": 0.5},
    "headroom": {"headroom_bits": 0.2},
    "divergence": {"loss": 60.0},
    "runaway": {"loss": 60.0},
}
"""What the readings look like from the step on at which the state has gone bad, by the detector that tells."""

NOT_OF_THE_STATE = {
    "nothing_to_train": "it judges the batch",
    "replaced_loss": "it judges the loss function; the state is as good as it was",
    "gradient_ramp": "it tells what may come",
    "headroom_trend": "it tells what may come; headroom tells when it has",
    "scale_trajectory": "it judges the scale; the weights are finite",
    "update_ratio": "it judges the rate, and speaks before a state has gone bad",
    "stalled_update": "weights that do not move are as good as they were; it needs up to 9 measurements, "
    "one every guard.state_check_steps",
}
ONSETS = (1, 19, 20, 32, 60, 129)


healthy = functools.cache(traces.healthy)


def gone_bad(family: str, after: int, seed: int = 1, **changes: Any) -> list[Reading]:
    """A healthy trace whose steps after ``after`` are bad."""
    trace = healthy(family, seed, after + TRUST_STEPS + 20)
    return [replace(r, **changes) if r.step > after else r for r in trace]


def delay(detector: str, trace: Sequence[Reading], after: int) -> int | None:
    said = [step - after for step, _ in traces.show(trace, traces.of(registry.load("detectors", detector)))]
    return next((d for d in said if d > 0), None)


def test_every_detector_was_thought_of() -> None:
    """A new one must say whether it tells that the state has gone bad, and be measured if it does."""
    assert set(BAD_STATES) | set(NOT_OF_THE_STATE) == set(registry.names("detectors"))
    assert not set(BAD_STATES) & set(NOT_OF_THE_STATE)


def test_the_default_delay_is_the_same_wherever_it_stands() -> None:
    assert KeepSettings().trust_steps == TRUST_STEPS


@pytest.mark.parametrize("detector", BAD_STATES)
def test_trust_takes_longer_than_the_detector(detector: str) -> None:
    delays = [
        found
        for family in traces.FAMILIES
        for after in ONSETS
        if (found := delay(detector, gone_bad(family, after, **BAD_STATES[detector]), after)) is not None
    ]
    assert delays, "it must speak at all"
    assert max(delays) < TRUST_STEPS


def test_the_slowest_one_was_found() -> None:
    """Divergence looks at 32 committed losses and the one at hand. Its window is what the default must exceed."""
    trace = gone_bad("fine-tuning", 60, loss=60.0)
    assert delay("divergence", trace, 60) == registry.load("detectors", "divergence").Config().window_steps + 1


def clean_runs(trace: Sequence[Reading], judge: Judge) -> list[int]:
    """Clean steps in a row after each step, as the trainer counts them."""
    history, in_a_row, found = History(), 0, [0]
    for reading in trace:
        judgement = judge.judge(history, reading)
        committed = judgement.verdict is Verdict.COMMIT
        action = Action.PROCEED if committed else Action.SKIP_BATCH
        in_a_row = in_a_row + 1 if is_clean(action, [f.severity.value for f in judgement.findings]) else 0
        if committed:
            history.committed(reading.loss, reading.grad_norm, headroom_bits=reading.headroom_bits)
        else:
            history.aborted()
        found.append(in_a_row)
    return found


def trusted_at(clean: Sequence[int], saved: int, trust_steps: int) -> int | None:
    """The step at which a checkpoint of step ``saved`` becomes trusted (train/keeper.py)."""
    return next((s for s in range(saved + trust_steps, len(clean)) if clean[s] >= trust_steps), None)


SICK = {
    "a loss far above": {"loss": 60.0},
    "NaN": {"loss": math.nan, "grad_norm": math.nan},
    "gradients far above, and the loss": {"loss": 60.0, "grad_norm": 1000.0},
    "a collapsed scale": {"loss_scale": 0.5},
}


@pytest.mark.parametrize(("sickness", "only"), [*((name, None) for name in SICK), ("a loss far above", "divergence")])
def test_a_checkpoint_of_a_state_gone_bad_is_never_trusted(sickness: str, only: str | None) -> None:
    """All detectors together: a refusal, a warning, silence, and the next warning come before the count is full."""
    judge = Judge.of({}) if only is None else Judge.only(only)
    for family in traces.FAMILIES:
        for after in ONSETS:
            clean = clean_runs(gone_bad(family, after, **SICK[sickness]), judge)
            assert trusted_at(clean, after, TRUST_STEPS) is None, (family, after)


def test_healthy_checkpoints_are_trusted() -> None:
    """The other side: on health, a warning now and then at most delays trust."""
    judge = Judge.of({})
    late = 0
    for family in traces.FAMILIES:
        clean = clean_runs(healthy(family, 1, 150), judge)
        for saved in (1, 50, 100):
            late += trusted_at(clean, saved, TRUST_STEPS) != saved + TRUST_STEPS
    assert late <= 4


def diverging_run(folder: Path, trust_steps: int) -> dict[int, bool]:
    """A run whose weights are ruined just before step 8 is saved: by step, whether that checkpoint was trusted.

    Only the slowest detector looks, and the learning rate is too small to mend anything.
    """
    off = "{loss_spike: false, gradient_explosion: false, stalled_update: false, runaway: false, update_ratio: false}"
    recipe = tiny_recipe(
        folder,
        "max_steps=60",
        "save_steps=8",
        "save_total_limit=50",
        "learning_rate=1e-7",
        "data.eval_fraction=0",
        f"guard.trust_steps={trust_steps}",
        f"guard.detectors={off}",
        model="tiny-llama:hidden=16,layers=1,heads=2,kv_heads=1,mlp=32",
    )
    session = open_run(recipe)
    head = dict(session.prepared.port.parts.parameters)["lm_head.weight"]

    class Ruin:
        def on_step(self, event: Any) -> None:
            if event.reading.step == 8:
                with torch.no_grad():
                    head.mul_(2000.0)

    session.observers._members.append(Ruin())
    result = session.run()
    assert (result.status, result.findings["OPT002"] > 10) == ("finished", True)
    losses = [r["loss"] for r in read(folder / "run" / "journal.jsonl") if r["kind"] == "step"]
    assert max(losses[:8]) < 8 < 12 < min(losses[8:])
    return {step_in(p): checkpoint.is_trusted(p) for p in checkpoint.listed(folder / "run")}


def test_a_checkpoint_written_as_a_divergence_begins_is_never_trusted(tmp_path: Path) -> None:
    found = diverging_run(tmp_path, TRUST_STEPS)
    assert set(found) == {8, 16, 24, 32, 40, 48, 56, 60}
    assert not any(found.values())


def test_with_a_shorter_delay_it_would_be_trusted(tmp_path: Path) -> None:
    """The same run with fewer steps than the detector needs: the test above can fail."""
    assert diverging_run(tmp_path, 30)[8]
