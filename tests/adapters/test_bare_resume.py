"""A guarded script that is killed and goes on ends with the bits of one that never stopped."""

from __future__ import annotations

import copy
import io
import pickle
import random
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import finitune
from finitune.core.errors import Halted, UserError
from finitune.engine.conditions import Conditions
from finitune.engine.snapshot import as_snapshot
from finitune.numerics.fingerprint import fingerprint
from finitune.numerics.half import emulated_half

Batch = dict[str, Tensor]
STEPS = 26
OPTIMIZERS: Mapping[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2),
    "sgd": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p, 1e-2),
}
PRECISIONS = ("fp32", "fp16", "fp16-emulated")


class Script:
    """What somebody's own script is made of."""

    def __init__(self, seed: int, optimizer: str = "adamw", precision: str = "fp32", **options: Any) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.1), nn.GELU(), nn.Linear(16, 1))
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda s: min(1.0, (s + 1) / 5) * 0.99**s)
        half = precision != "fp32"
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=7) if half else None
        self.precision = precision
        self.guard = finitune.guard(
            self.model, self.optimizer, self.loss, self.scheduler, self.scaler, max_grad_norm=1.0, **options
        )

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        named = batch._asdict() if isinstance(batch, tuple) else batch
        regions = {
            "fp16": lambda: torch.autocast("cpu", torch.float16),
            "fp16-emulated": lambda: emulated_half(torch.float16),
        }
        with regions.get(self.precision, nullcontext)():
            out = model(named["x"])
        return (named["weight"] * ((out.float() - named["y"]) ** 2).squeeze(1)).mean()

    def parts(self) -> dict[str, Any]:
        found = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler, "scaler": self.scaler}
        return {name: part for name, part in found.items() if part is not None}

    def saved(self, **options: Any) -> bytes:
        out = io.BytesIO()
        states = {name: part.state_dict() for name, part in self.parts().items()}
        torch.save({**states, "guard": self.guard.state_dict(**options)}, out)
        return out.getvalue()

    def load(self, saved: bytes) -> None:
        states = torch.load(io.BytesIO(saved), weights_only=True)
        for name, part in self.parts().items():
            part.load_state_dict(states[name])
        self.guard.load_state_dict(states["guard"])

    def walk(self, steps: list[Any], to: int | None = None) -> list[str]:
        """Codes of what was found."""
        codes = []
        for batch in steps[self.guard.num_batches : to]:
            codes += [f.code for f in self.guard.step(batch).findings]
        return codes

    def end(self) -> tuple[Any, ...]:
        """Everything that has to be equal."""
        guard = self.guard
        mark = fingerprint(guard.port.state_tensors(), guard.port.state_record())
        told = [(i.number, i.step, i.diagnosis.code, i.remedy, i.outcome) for i in guard.incidents]
        return mark, told, torch.get_rng_state().tolist()


def batches(seed: int, fault: str = "none") -> list[Batch]:
    generator, chance = torch.Generator().manual_seed(seed), random.Random(seed)
    made = [
        {
            "x": torch.randn(8, 6, generator=generator),
            "y": torch.randn(8, 1, generator=generator),
            "weight": torch.ones(8),
        }
        for _ in range(STEPS)
    ]
    first = chance.randrange(8, STEPS - 6)
    if fault == "row":  # the row comes again, and is in quarantine then
        made[first]["weight"][chance.randrange(8)] = float("inf")
        made[first + chance.randrange(1, 5)] = {k: v.clone() for k, v in made[first].items()}
    if fault == "large":
        made[first]["x"][chance.randrange(8)] *= 1e5
    return made


def uninterrupted(seed: int, steps: list[Any], **options: Any) -> Script:
    """To its end, or to where it halts."""
    script = Script(seed, **options)
    torch.manual_seed(seed + 1)
    with suppress(Halted):
        script.walk(steps)
    return script


@pytest.mark.parametrize("seed", range(12))
def test_killed_anywhere_it_ends_with_the_same_bits(seed: int) -> None:
    chance = random.Random(seed)
    kind = {"optimizer": chance.choice(list(OPTIMIZERS)), "precision": PRECISIONS[seed % 3], "probation_steps": 3}
    steps = batches(seed, ("row", "large", "none")[seed // 3 % 3])
    whole = uninterrupted(seed, steps, **kind)
    expected, last = whole.end(), whole.guard.num_batches
    killed = Script(seed, **kind)
    torch.manual_seed(seed + 1)
    for cut in sorted(chance.sample(range(1, last), 2)):  # killed twice
        killed.walk(steps, cut)
        saved = killed.saved()
        killed = Script(seed + 100, **kind)
        torch.manual_seed(7)
        killed.load(saved)
        torch.rand(chance.randrange(9))  # a loader that is begun anew draws
        assert killed.guard.num_batches == cut
    with suppress(Halted):
        assert "SYS431" not in killed.walk(steps)
    assert killed.end() == expected


@pytest.mark.parametrize(
    "cure",
    [
        Conditions(precision="fp32"),
        Conditions(adam_eps=1e-4),
        Conditions(fp32_modules=("0",)),
        Conditions(lr_factor=0.5, warmup_from_update=6, warmup_steps=8),
        Conditions(clipper="zclip", max_grad_norm=0.5),
        Conditions(precision="fp32", adam_eps=1e-4, lr_factor=0.1),
    ],
    ids=lambda c: "+".join(c.to_json()),
)
@pytest.mark.parametrize("cut", [5, 6, 9])
def test_a_cure_in_force_is_in_force_again_in_a_model_of_half_weights(cure: Conditions, cut: int) -> None:
    steps = [torch.randn(8, 6, generator=torch.Generator().manual_seed(n)) for n in range(14)]

    def made(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, finitune.BareGuard]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.1), nn.GELU(), nn.Linear(8, 1)).half()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2, eps=1e-5)
        loss = lambda m, x: m(x.to(next(m.parameters()).dtype)).float().square().mean()  # noqa: E731
        return model, optimizer, finitune.guard(model, optimizer, loss)

    def walk(guard: finitune.BareGuard, to: int) -> None:
        for number in range(guard.num_batches, to):
            if number in (5, 11):
                now = cure if number == 5 else Conditions()
                record = {"conditions": now.to_json(), "mends": [], "guard": {}, "redo": True, "incident": 0}
                guard.keep.record("treatment", step=number, attempt=guard.port.state.attempt, **record)
                guard.port.adopt(now)
            guard.step(steps[number])

    model, optimizer, guard = made(1)
    torch.manual_seed(3)
    walk(guard, 14)
    whole = as_snapshot(guard.port).mark
    model, optimizer, guard = made(1)
    torch.manual_seed(3)
    walk(guard, cut)
    out = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict(), guard.state_dict()), out)
    model, optimizer, guard = made(2)
    for part, state in zip(
        (model, optimizer, guard), torch.load(io.BytesIO(out.getvalue()), weights_only=True), strict=True
    ):
        part.load_state_dict(state)
    walk(guard, 14)
    assert as_snapshot(guard.port).mark == whole
    assert [g["eps"] for g in optimizer.param_groups] == [1e-5]


def test_it_is_a_dict_of_tensors_that_any_format_takes(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    steps = batches(0)
    script = Script(0)
    script.walk(steps, 9)
    state = script.guard.state_dict()
    assert all(isinstance(t, Tensor) for t in state.values())
    save_file({n: t.contiguous() for n, t in state.items()}, tmp_path / "guard.safetensors")
    other = Script(0)
    other.guard.load_state_dict(load_file(tmp_path / "guard.safetensors"))
    assert other.guard.num_batches == 9


@pytest.mark.parametrize("history", ["full", "batches", "none"])
def test_histories_hold_what_they_say(history: str) -> None:
    script = Script(0)
    script.walk(batches(0), 9)
    state = script.guard.state_dict(history=history)
    assert any(n.startswith("batch/") for n in state) == (history != "none")
    assert any(n.startswith("past/") for n in state) == (history == "full")
    other = Script(0)
    other.load(script.saved(history=history))
    other.walk(batches(0), 10)
    assert len(other.guard.port.clean_steps()) == (1 if history == "none" else 10)
    assert (other.guard.ring.taken[0].step < 9) == (history == "full")


class Named(NamedTuple):
    x: Tensor
    y: Tensor
    weight: Tensor


def test_batches_of_before_are_again_of_the_scripts_own_kind() -> None:
    steps = [Named(**b) for b in batches(2)]
    script = Script(2)
    script.walk(steps, 8)
    other = Script(3)
    other.load(script.saved())
    other.walk(steps, 9)
    [micro] = other.guard.port.batch(5)
    assert isinstance(micro, Named)
    assert torch.equal(micro.x, steps[4].x)


def test_row_names_in_the_runs_order_go_on(tmp_path: Path) -> None:
    names = [f"row-{n}" for n in range(8 * STEPS)]
    steps = batches(4)
    steps[12]["weight"][3] = float("inf")
    script = Script(4, row_ids=names)
    script.walk(steps, 10)
    other = Script(4, row_ids=names, run_dir=tmp_path)
    other.load(script.saved())
    other.walk(steps, 13)
    [incident] = other.guard.incidents
    assert any(f"row-{12 * 8 + 3}" in s.name for s in incident.suspects)


@pytest.mark.parametrize("forgotten", ["model", "optimizer", "scheduler", "scaler"])
def test_what_was_not_loaded_is_said_at_the_first_step(forgotten: str) -> None:
    steps = batches(5)
    script = Script(5, precision="fp16-emulated")
    script.walk(steps, 9)
    states = torch.load(io.BytesIO(script.saved()), weights_only=True)
    other = Script(6, precision="fp16-emulated")
    for name, part in other.parts().items():
        if name != forgotten:
            part.load_state_dict(states[name])
    other.guard.load_state_dict(states["guard"])
    found = [f for f in other.guard.step(steps[9]).findings if f.code == "SYS431"]
    assert found
    assert forgotten in ("model", "optimizer") or any(f.where == forgotten for f in found)


def _edited(state: dict[str, Tensor], change: Callable[[str], str]) -> dict[str, Tensor]:
    text = change(bytes(state["guard"].tolist()).decode())
    return {**state, "guard": torch.tensor(list(text.encode()), dtype=torch.uint8)}


DAMAGES: Mapping[str, Callable[[dict[str, Tensor]], Any]] = {
    "a list": lambda s: list(s.values()),
    "nothing": lambda _s: {},
    "no tensor": lambda s: {**s, "guard": "text"},
    "other bytes": lambda s: {**s, "guard": s["guard"].flip(0)},
    "floats": lambda s: {**s, "guard": s["guard"].float()},
    "cut": lambda s: {**s, "guard": s["guard"][:-9]},
    "foreign": lambda s: {**s, "weights": torch.zeros(2)},
    "other schema": lambda s: _edited(s, lambda t: t.replace('"schema": 1', '"schema": 99', 1)),
    "negative step": lambda s: _edited(s, lambda t: t.replace('"step": 9', '"step": -9', 1)),
    "a condition that is not one": lambda s: _edited(
        s, lambda t: t.replace('"conditions": {', '"conditions": {"a": 1')
    ),
    "a module that is not there": lambda s: _edited(
        s, lambda t: t.replace('"conditions": {}', '"conditions": {"fp32_modules": ["no.such"]}')
    ),
    "a field is gone": lambda s: _edited(s, lambda t: t.replace('"eps"', '"epsilon"')),
    "a strange weight": lambda s: {**s, "state/0.weight": torch.zeros(3)},
    "a batch is gone": lambda s: {n: t for n, t in s.items() if not n.startswith("batch/")},
    "generators of another size": lambda s: _edited(s, lambda t: t.replace('"words": "', '"words": "x')),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_refused_and_nothing_has_changed(damage: str) -> None:
    steps = batches(5)
    script, other = Script(5), Script(6)
    script.walk(steps, 9)
    other.walk(steps, 4)
    before = as_snapshot(other.guard.port).mark
    with pytest.raises(UserError) as caught:
        other.guard.load_state_dict(DAMAGES[damage](script.guard.state_dict()))
    assert caught.value.code.code == "SYS430"
    assert "{" not in str(caught.value).partition("\n")[0]
    assert as_snapshot(other.guard.port).mark == before
    other.walk(steps, 6)


def test_a_used_guard_goes_back_to_a_saved_state() -> None:
    steps = batches(9)
    expected = uninterrupted(9, steps).end()
    script = Script(9)
    torch.manual_seed(10)
    script.walk(steps, 7)
    saved = script.saved()
    script.walk(steps, 20)
    script.load(saved)
    script.walk(steps)
    assert script.end() == expected


def test_what_pytorch_users_expect_of_such_an_object() -> None:
    with Script(1).guard as guard:
        guard.step(batches(1)[0])
        assert "1 batches, 1 updates" in repr(guard)
        for copied in (copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="state_dict"):
                copied(guard)
        with pytest.raises(UserError) as caught:
            guard.state_dict(history="some")
        assert caught.value.code.code == "SYS425"
        state = guard.state_dict()
        with pytest.raises(UserError):
            guard.load_state_dict(state, generators="later")
    guard.close()
    assert "closed" in repr(guard)
    for late in (guard.state_dict, lambda: guard.load_state_dict(state), lambda: guard.step(batches(1)[1])):
        with pytest.raises(UserError) as caught:
            late()
        assert caught.value.code.code == "SYS429"


def test_generators_can_be_put_back_at_once_or_left_alone() -> None:
    script = Script(1)
    torch.manual_seed(5)
    script.walk(batches(1), 3)
    state, then = script.guard.state_dict(), torch.get_rng_state()
    for generators in ("now", "keep"):
        torch.manual_seed(6)
        Script(1).guard.load_state_dict(state, generators=generators)
        assert torch.equal(torch.get_rng_state(), then) == (generators == "now")
