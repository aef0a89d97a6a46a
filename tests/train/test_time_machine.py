"""The state of any step can be had again, bit for bit, whatever happened on the way."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path

from finitune.numerics.digest import digest
from finitune.train.run import open_run
from support.faults import at_step, poison_gradient, poison_output
from support.runs import tiny_recipe


class Truth:
    """An observer that remembers the digest of the whole state after every step."""

    def __init__(self) -> None:
        self.digests: dict[int, str] = {}

    def watch(self, session) -> None:
        port, after = session.prepared.port, session._after_step

        def remember(step: int, step_s: float) -> None:
            self.digests[step] = whole(port)
            after(step, step_s)

        session._after_step = remember


def whole(port) -> str:
    return digest(port.state_tensors(), port.state_record())


def snapshot_digest(snapshot) -> str:
    return digest(snapshot.tensors.items(), snapshot.record)


class At:
    """Runs something after a step was journalled and settled."""

    def __init__(self, step: int, action) -> None:
        self.step, self.action = step, action

    def on_step(self, event) -> None:
        if event.reading.step == self.step:
            self.action()


def test_every_step_of_three_hundred_can_be_reached_again(tmp_path: Path) -> None:
    """fp16 with loss scaling; refused batches, retries, two rollbacks, a stop and a resume on the way."""
    recipe = tiny_recipe(
        tmp_path,
        "max_steps=300",
        "save_steps=12",
        "save_total_limit=40",
        "precision=fp16-emulated",
        "scaler.growth_interval=40",
        "lora={r: 2, lora_dropout: 0.1}",
        "snapshots.max_count=5",
        "snapshots.digest_steps=20",
        "data.eval_fraction=0",
    )
    truth = Truth()
    first = open_run(recipe, observers=[At(200, lambda: os.kill(os.getpid(), signal.SIGINT))])
    truth.watch(first)
    port = first.prepared.port
    poison_output(port.parts.model.get_submodule("base_model.model.model.layers.0.mlp"), at_step(port, 31, 77, 130))
    scaler = port.state.scaler
    poison_gradient(port.parts.parameters[0][1], lambda: port.state.step == 49 and scaler.scale > 2048, math.inf)
    went_back: list[int] = []
    keep = first._after_step

    def go_back_twice(step: int, step_s: float) -> None:
        keep(step, step_s)
        if step in (90, 150) and step not in went_back:
            went_back.append(step)
            first.machine.roll_back(step - 13, "a test")
            first.keeper.abandon_after(step - 13)

    first._after_step = go_back_twice
    assert first.run().status == "interrupted"
    second = open_run(None, resume=str(tmp_path / "run"))
    truth.watch(second)
    assert second.run().status == "finished"
    machine, port = second.machine, second.prepared.port
    present = whole(port)
    for step in range(1, 301):
        assert snapshot_digest(machine.state_at(step)) == truth.digests[step], step
    assert whole(port) == present
