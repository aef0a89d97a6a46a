"""One of two processes of a guarded script: ``ranks_script.py RANK FOLDER SCENE...``; what came of it as JSON."""

from __future__ import annotations

import copy
import json
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import finitune
from finitune.core.errors import FiniTuneError
from finitune.core.journal import read
from finitune.numerics.fingerprint import checksum
from finitune.numerics.half import emulated_half

NUM_RANKS, ROWS, WIDTH = 2, 4, 6
Batch = dict[str, Tensor]


class Net(nn.Module):
    """With dropout, and a buffer that DistributedDataParallel exchanges before every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(WIDTH, 16), nn.Dropout(0.1), nn.Linear(16, 1)
        self.register_buffer("shift", torch.full((1,), 0.25))

    def forward(self, x_BD: Tensor) -> Tensor:
        out: Tensor = self.last(self.drop(torch.tanh(self.first(x_BD) + self.shift)))
        return out


def parts() -> tuple[Any, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(Net())
    return model, torch.optim.AdamW(model.parameters(), 1e-2)


def mse(model: Any, batch: Batch) -> Tensor:
    return ((model(batch["x"]) - batch["y"]) ** 2).mean()


def batches(count: int, rank: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(10 + rank)
    x = torch.randn(count, ROWS, WIDTH, generator=generator)
    return [{"x": x[i], "y": x[i].sum(1, keepdim=True)} for i in range(count)]


def names(rank: int) -> list[str]:
    return [f"rank{rank}.row{i}" for i in range(1000)]


def sums(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[int]:
    slots = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")
    moments = [optimizer.state[p][s] for p in model.parameters() for s in slots if s in optimizer.state[p]]
    return [checksum(t) for t in [*model.parameters(), *moments]]


def told(guard: Any, outcomes: list[Any]) -> dict[str, Any]:
    model, optimizer = guard.port.model, guard.port.optimizer
    return {
        "committed": [o.committed for o in outcomes],
        "losses": [o.loss for o in outcomes],
        "actions": [o.action.value for o in outcomes],
        "findings": [f.code for f in guard.findings],
        "sums": sums(model, optimizer),
        "finite": all(bool(p.isfinite().all()) for p in model.parameters()),
        "incidents": [i.to_json() for i in guard.incidents],
        "cures": guard.conditions.to_json(),
        "step": guard.num_batches,
        "snapshots": [s.step for s in guard.ring.taken],
        "attempt": guard.port.state.attempt,
    }


def trained(rank: int, steps: list[Batch], loss_fn: Any = mse, **options: Any) -> dict[str, Any]:
    model, optimizer = parts()
    options = {"max_grad_norm": 1.0, "row_ids": names(rank), **options}
    between = options.pop("between", lambda _model, _step: None)
    outcomes = []
    torch.manual_seed(rank)
    with finitune.guard(model, optimizer, loss_fn, **options) as guard:
        for number, batch in enumerate(steps, 1):
            outcomes.append(guard.step(batch))
            between(guard.port.model, number)
        return told(guard, outcomes)


# -- scenes ----------------------------------------------------------------------------------------------------------


def refused_alone() -> str:
    model, optimizer = parts()
    try:
        finitune.guard(model, optimizer, mse, ranks=False)
    except FiniTuneError as error:
        return str(error)
    return ""


def healthy(rank: int) -> dict[str, Any]:
    model, optimizer = parts()
    torch.manual_seed(rank)
    for batch in batches(12, rank):
        mse(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    plain, drawn = sums(model, optimizer), torch.rand(1).item()
    found = trained(rank, batches(12, rank))
    return {**found, "plain": plain, "same_draws": torch.rand(1).item() == drawn, "alone": refused_alone()}


def nan_row(rank: int) -> dict[str, Any]:
    steps = batches(10, rank)
    if rank == 1:
        steps[5]["x"][2, 1] = float("nan")
    return trained(rank, steps)


def nan_rows_on_both(rank: int) -> dict[str, Any]:
    steps = batches(10, rank)
    steps[5]["x"][1 + rank, 1] = float("nan")
    return trained(rank, steps)


def lone_row(rank: int) -> dict[str, Any]:
    """One row a micro-batch: without the bad one the rank has a micro-batch less than the other."""
    steps: list[Any] = [[{k: v[i : i + 1] for k, v in b.items()} for i in range(2)] for b in batches(10, rank)]
    if rank == 1:
        steps[5][1]["x"][0, 1] = float("nan")
    return trained(rank, steps)


def nan_weight(rank: int) -> dict[str, Any]:
    def spoil(model: Any, step: int) -> None:
        if rank == 1 and step == 5:
            with torch.no_grad():
                model.first.weight[3, 2] = float("nan")

    return trained(rank, batches(12, rank), between=spoil)


def flipped_low_bit(rank: int) -> dict[str, Any]:
    """Nothing is seen in the loss."""

    def spoil(model: Any, step: int) -> None:
        if rank == 1 and step == 3:
            model.first.weight.data.view(-1).view(torch.int32)[7] ^= 1 << 12

    return trained(rank, batches(40, rank), between=spoil)


def overflow(rank: int) -> dict[str, Any]:
    def half(model: Any, batch: Batch) -> Tensor:
        with emulated_half(torch.float16):
            out = model(batch["x"])
        return ((out.float() - batch["y"]) ** 2).mean()

    steps = batches(10, rank)
    if rank == 1:
        steps[5]["x"][2] *= 1e6
    return trained(rank, steps, half, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10))


def bad_backward(rank: int) -> dict[str, Any]:
    """A gradient that is not finite under a finite loss, made on one rank."""

    def rooted(model: Any, batch: Batch) -> Tensor:
        weight: Tensor = (model.module if hasattr(model, "module") else model).last.weight
        return mse(model, batch) + (weight.sum() * 0.0 + batch["root"]).sqrt().mean()

    steps = batches(10, rank)
    for batch in steps:
        batch["root"] = torch.ones(ROWS)
    if rank == 1:
        steps[5]["root"][2] = 0.0
    return trained(rank, steps, rooted)


def raising(rank: int) -> dict[str, Any]:
    """The loss function raises on one rank: before the forward, in it, and after it."""
    model, optimizer = parts()
    fail = [""]

    def moody(model: Any, batch: Batch) -> Tensor:
        if fail[0] == "before":
            raise KeyError("planted before")
        x = batch["x"][:, :2] if fail[0] == "in" else batch["x"]
        loss = mse(model, {**batch, "x": x})
        if fail[0] == "after":
            raise ZeroDivisionError("planted after")
        return loss

    errors, outcomes = [], []
    with finitune.guard(model, optimizer, moody, row_ids=names(rank)) as guard:
        for number, batch in enumerate(batches(9, rank)):
            place = {2: "before", 4: "in", 6: "after"}.get(number, "")
            fail[0] = place if rank == 1 else ""
            if place:
                try:
                    guard.step(batch)
                except Exception as error:  # noqa: BLE001  (what the loop sees is what is tested)
                    errors.append([type(error).__name__, str(error)])
                    fail[0] = ""
            outcomes.append(guard.step(batch))
        return {**told(guard, outcomes), "errors": errors}


def uneven(rank: int) -> dict[str, Any]:
    """One rank has one micro-batch more."""
    steps: list[Any] = [[b, b] for b in batches(6, rank)]
    if rank == 1:
        steps[4] = steps[4][:1]
    return trained(rank, steps)


def not_wrapped(rank: int) -> dict[str, Any]:
    """Nobody exchanges gradients; one rank's loss is NaN once."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    steps, outcomes = batches(6, rank), []
    if rank == 0:
        steps[3]["x"][2, 1] = float("nan")
    with finitune.guard(model, optimizer, mse, row_ids=names(rank)) as guard:
        for batch in steps:
            outcomes.append(guard.step(batch))
        return told(guard, outcomes)


def observed(rank: int) -> dict[str, Any]:
    steps = batches(8, rank)
    if rank == 1:
        steps[5]["x"][2, 1] = float("nan")
    return trained(rank, steps, policy="observe")


def halting(rank: int) -> dict[str, Any]:
    """Weights that are bad from the start on one rank: no step can go well."""
    model, optimizer = parts()
    with torch.no_grad():
        model.module.first.weight.fill_(float("nan"))
    with finitune.guard(model, optimizer, mse) as guard:
        try:
            for batch in batches(12, rank):
                guard.step(batch)
        except FiniTuneError as error:
            return {"error": [type(error).__name__, str(error).splitlines()[0]]}
    return {"error": None}


def journalled(rank: int) -> dict[str, Any]:
    steps = batches(8, rank)
    if rank == 1:
        steps[5]["x"][2, 1] = float("nan")
    folder = Path(sys.argv[2]) / "run"
    found = trained(rank, steps, run_dir=folder)
    dist.barrier()
    own = folder / "journal.jsonl" if rank == 0 else folder / f"rank_{rank}" / "journal.jsonl"
    kinds = [r["kind"] for r in read(own)]
    return {**found, "kinds": kinds, "folders": sorted(p.name for p in folder.iterdir() if p.name[0] != ".")}


def resumed(rank: int) -> dict[str, Any]:
    """Stopped after six steps, gone on in new objects; a bad row comes after that."""
    steps = batches(12, rank)
    if rank == 1:
        steps[8]["x"][2, 1] = float("nan")
    whole = trained(rank, steps)["sums"]
    model, optimizer = parts()
    torch.manual_seed(rank)
    with finitune.guard(model, optimizer, mse, max_grad_norm=1.0, row_ids=names(rank)) as guard:
        for batch in steps[:6]:
            guard.step(batch)
        saved = [copy.deepcopy(x.state_dict()) for x in (model, optimizer)] + [guard.state_dict()]
    model, optimizer = parts()
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    with finitune.guard(model, optimizer, mse, max_grad_norm=1.0, row_ids=names(rank)) as guard:
        guard.load_state_dict(saved[2])
        outcomes = [guard.step(batch) for batch in steps[6:]]
        return {**told(guard, outcomes), "whole": whole}


def nan_moment(rank: int) -> dict[str, Any]:
    """On one rank the update makes weights NaN, of gradients that are fine."""
    model, optimizer = parts()
    outcomes = []
    torch.manual_seed(rank)
    with finitune.guard(model, optimizer, mse, max_grad_norm=1.0, row_ids=names(rank)) as guard:
        for number, batch in enumerate(batches(12, rank), 1):
            outcomes.append(guard.step(batch))
            if number == 6 and rank == 1:
                optimizer.state[model.module.first.weight]["exp_avg"][3, 2] = float("nan")
        return told(guard, outcomes)


def rate_jump(rank: int) -> dict[str, Any]:
    """The loop itself raises the rate of all ranks by far: the run goes back."""
    model = nn.parallel.DistributedDataParallel(Net())
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1.0 if k < 25 else 30.0)
    outcomes, steps = [], batches(60, rank)
    torch.manual_seed(rank)
    with finitune.guard(model, optimizer, mse, schedule, row_ids=names(rank)) as guard:
        for batch in steps:
            outcomes.append(guard.step(batch))
        return told(guard, outcomes)


SCENES: dict[str, Callable[[int], dict[str, Any]]] = {
    f.__name__: f
    for f in (
        healthy,
        nan_row,
        nan_rows_on_both,
        lone_row,
        nan_weight,
        flipped_low_bit,
        overflow,
        bad_backward,
        raising,
        uneven,
        not_wrapped,
        observed,
        halting,
        journalled,
        resumed,
        nan_moment,
        rate_jump,
    )
}


def main(rank: int, folder: Path, scenes: list[str]) -> None:
    torch.set_num_threads(1)
    place = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=NUM_RANKS, timeout=timedelta(seconds=20))
    for scene in scenes:
        try:
            found = SCENES[scene](rank)
        except Exception as error:  # noqa: BLE001  (the test shows it)
            found = {"broken": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        (folder / f"{scene}.{rank}.json").write_text(json.dumps(found, default=str))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:] or list(SCENES))
