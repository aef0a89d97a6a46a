"""Steps of a bare loop are computed again, left and walked over once more: the same bits each time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import finitune
from finitune.engine.conditions import AS_CONFIGURED, Conditions, NotPossible
from finitune.engine.monitor import read
from finitune.engine.policy import Action
from finitune.engine.port import Ask, Capability
from finitune.engine.snapshot import as_snapshot
from finitune.numerics.fingerprint import fingerprint

ROWS, WIDTH, VOCABULARY = 4, 6, 11


class Net(nn.Module):
    """Embedding, two layers with dropout, a head tied to the embedding, and batch norm's running statistics."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, size)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(size, 2 * size), nn.GELU(), nn.Dropout(0.2), nn.Linear(2 * size, size))
            for _ in range(2)
        )
        self.norm = nn.BatchNorm1d(size)
        self.head = nn.Linear(size, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids_BT: Tensor) -> Tensor:
        x_BTC = self.embedding(ids_BT)
        for layer in self.layers:
            x_BTC = x_BTC + layer(x_BTC)
        x_BTC = self.norm(x_BTC.transpose(1, 2)).transpose(1, 2)
        out: Tensor = self.head(x_BTC)
        return out


def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())


def batches(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    ids = [torch.randint(0, VOCABULARY, (ROWS, WIDTH), generator=generator) for _ in range(count)]
    return [{"input_ids": i, "labels": (i * 3 + 1) % VOCABULARY} for i in ids]


OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "tensor rate": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2), foreach=False),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "plain sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-3),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
    "asgd": lambda p: torch.optim.ASGD(p, lr=1e-2),
}


def loop(name: str = "adamw", **options: Any) -> Any:
    torch.manual_seed(0)
    model = Net()
    optimizer = OPTIMIZERS[name](model.parameters())
    options.setdefault("scheduler", torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.7))
    return finitune.guard(model, optimizer, loss_fn, max_grad_norm=1.0, **options)


def digest(port: Any) -> str:
    return fingerprint(port.state_tensors(), port.state_record()).digest


def walk(port: Any, steps: int) -> list[float]:
    """Commit the next held batches; their losses."""
    losses = []
    for _ in range(steps):
        reading = read(port.forward_backward())
        port.commit(reading)
        port.settle(Action.PROCEED, reading, clean=True)
        losses.append(reading.loss)
    return losses


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_from_an_earlier_state_the_same_batches_lead_to_the_same_bits(name: str) -> None:
    guard = loop(name)
    data, port = batches(9), guard.port
    for batch in data[:4]:
        guard.step(batch)
    early = as_snapshot(port)
    losses = [guard.step(batch).loss for batch in data[4:]]
    late = digest(port)
    early.restore(port)
    assert port.state.step == 4
    assert port.newest_step == 9
    again = walk(port, 5)
    assert again == pytest.approx(losses, rel=1e-6)
    assert digest(port) == late


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor", "tensor rate"])
def test_the_state_before_the_first_update_can_be_had_again(name: str) -> None:
    guard = loop(name)
    start, before = as_snapshot(guard.port), digest(guard.port)
    for batch in batches(3):
        guard.step(batch)
    assert digest(guard.port) != before
    start.restore(guard.port)
    assert digest(guard.port) == before
    assert not guard.port.optimizer.state


def test_a_replay_with_dropout_has_the_bits_of_the_step_and_leaves_no_trace() -> None:
    guard = loop()
    for batch in batches(3):
        guard.step(batch)
    port, state = guard.port, torch.get_rng_state()
    before = digest(port)
    port.push(batches(4)[3])
    first = read(port.forward_backward())
    port.abort()
    moved = torch.get_rng_state()
    for _ in range(2):
        again = read(port.forward_backward())
        port.abort()
        assert (again.loss, again.grad_norm) == (first.loss, first.grad_norm)
    assert torch.equal(torch.get_rng_state(), moved)
    assert not torch.equal(state, moved)
    assert digest(port) == before
    assert all(p.grad is None for p in port.model.parameters())


def test_an_aborted_step_leaves_running_statistics_as_they_were() -> None:
    guard = loop()
    guard.step(batches(1)[0])
    buffers = {n: b.clone() for n, b in guard.port.model.named_buffers()}
    guard.port.push(batches(2)[1])
    guard.port.forward_backward()
    assert any(not torch.equal(b, buffers[n]) for n, b in guard.port.model.named_buffers())
    guard.port.abort()
    assert all(torch.equal(b, buffers[n]) for n, b in guard.port.model.named_buffers())
    assert Capability.REPLAY in guard.port.capabilities()


def test_the_batch_of_an_earlier_step_is_computed_under_the_present_state() -> None:
    guard = loop()
    data = batches(3)
    for batch in data:
        guard.step(batch)
    before = digest(guard.port)
    reading = read(guard.port.forward_backward(Ask(step=2)))
    guard.port.abort()
    assert reading.step == 4
    assert reading.loss > 0
    assert digest(guard.port) == before
    assert torch.equal(guard.port.batch(2)[0]["input_ids"], data[1]["input_ids"])


def test_units_are_rows_and_a_selection_keeps_every_shape() -> None:
    seen: list[tuple[int, ...]] = []

    def look(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        seen.append(tuple(batch["input_ids"].shape))
        return loss_fn(model, batch)

    torch.manual_seed(0)
    model = Net()
    guard = finitune.guard(model, torch.optim.SGD(model.parameters(), lr=0.1), look)
    data = batches(3)
    guard.step(data[0])
    guard.port.push([data[1], data[2]])
    units = guard.port.units()
    assert [(u.micro, u.index) for u in units] == [(m, i) for m in range(2) for i in range(ROWS)]
    assert len({str(u.rows[0].digest) for u in units}) == 2 * ROWS
    seen.clear()
    for asked, micros in (((1,), 1), ((0, 2), 1), ((3, 4), 2)):
        guard.port.forward_backward(Ask(units=asked))
        guard.port.abort()
        assert len(seen) == micros
        assert set(seen) == {(ROWS, WIDTH)}
        seen.clear()


def test_a_row_in_quarantine_is_left_out_and_a_batch_of_such_rows_trains_nothing() -> None:
    guard = loop()
    data = batches(2)
    guard.step(data[0])
    guard.port.push(data[1])
    digests = [u.rows[0].digest for u in guard.port.units()]
    guard.port.adopt(Conditions(quarantine=(digests[2],)))
    (left,) = guard.port.batch()
    assert torch.equal(left["input_ids"], data[1]["input_ids"][[0, 1, 3]])
    assert [u.rows[0].digest for u in guard.port.units()] == [digests[i] for i in (0, 1, 3)]
    guard.port.adopt(Conditions(quarantine=tuple(digests)))
    reading = read(guard.port.forward_backward())
    assert reading.supervised_tokens == 0
    assert guard.port.findings
    guard.port.abort()
    guard.port.adopt(AS_CONFIGURED)


def test_conditions_on_the_rate_leave_the_schedule_alone() -> None:
    plain, scaled = loop("plain sgd"), loop("plain sgd")
    data = batches(8)
    scaled.port.adopt(Conditions(lr_factor=0.5))
    for batch in data:
        plain.step(batch)
        scaled.step(batch)
    assert scaled.port.optimizer.param_groups[0]["lr"] == plain.port.optimizer.param_groups[0]["lr"]
    assert scaled.port.lr == 0.5 * plain.port.lr
    assert digest(scaled.port) != digest(plain.port)


def test_a_batch_that_was_changed_in_place_is_not_replayed() -> None:
    guard = loop()
    data = batches(2)
    for batch in data:
        guard.step(batch)
    data[0]["input_ids"].fill_(1)
    with pytest.raises(NotPossible, match="in place"):
        guard.port.forward_backward(Ask(step=1))
    guard.port.forward_backward(Ask(step=2))
    guard.port.abort()


def test_old_batches_give_way() -> None:
    guard = loop()
    for batch in batches(70):
        guard.step(batch)
    with pytest.raises(NotPossible, match="not held"):
        guard.port.forward_backward(Ask(step=1))
    assert len(guard.port.clean_steps()) <= 64


def test_a_foreign_state_is_refused_with_nothing_changed() -> None:
    guard, other = loop(), loop("sgd")
    for batch in batches(2):
        guard.step(batch)
        other.step(batch)
    before, theirs = digest(guard.port), as_snapshot(other.port)
    with pytest.raises((KeyError, ValueError)):
        theirs.restore(guard.port)
    assert digest(guard.port) == before
    own = as_snapshot(guard.port)
    del own.tensors["embedding.weight"]
    with pytest.raises((KeyError, ValueError)):
        own.restore(guard.port)
    assert digest(guard.port) == before
