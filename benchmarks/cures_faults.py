"""The faults of the cure table: functions of the data, the state or the recipe, drawn from a seed.

A data fault belongs to a row or a token and strikes whenever that comes up, in later epochs and on replays as well. A
state fault is put in once, between two steps. A recipe fault is a setting that the clean run does not have.
"""

from __future__ import annotations

import math
import types
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from random import Random
from typing import Any

import torch
from torch import nn

from finitune.core.types import RowId
from finitune.train.prepare import Prepared

ROWS_PER_BATCH = 4
LR = 3e-3
# State faults come when there is something to lose, and early enough to see what becomes of the run.
_EARLIEST, _LATEST = 30, 50
Between = Callable[[int, Any], None]


@dataclass(slots=True)
class Planted:
    """What a fault did to one prepared run."""

    says: str
    where: tuple[str, ...] = ()
    """The right answers to "where": rows, tensors or modules."""
    between: Between = field(default=lambda _step, _optimizer: None)
    """Called with the number of batches used up and the optimizer, after every step."""
    handles: list[Any] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Fault:
    """One row of the table."""

    name: str
    plant: Callable[[Prepared, Random, int], Planted]
    """``plant(prepared, random, steps)``: puts the fault into a prepared run."""
    overrides: Callable[[Random], Sequence[str]] = field(default=lambda _random: ())
    """Settings of the faulty run."""
    clean: Sequence[str] = ()
    """Settings of the run that it is measured against, where they differ."""
    common: Sequence[str] = ()
    """Settings of both."""
    trained: bool = False
    """The run starts from a model that has learnt something: there is something to lose."""
    hf: str = ""
    """Why the HF Trainer cannot have this fault here; empty where it can."""


def _nothing(_prepared: Prepared, _random: Random, _steps: int) -> Planted:
    return Planted("a setting of the recipe")


# -- the data ---------------------------------------------------------------------------------------------------------


def _first_epoch(prepared: Prepared, early: int, late: int) -> list[int]:
    """Row numbers of the steps ``early`` to ``late`` (from 0) of the first epoch."""
    loader = prepared.port.parts.loader
    return [i for step in loader.plan(0)[early:late] for micro in step for sequence in micro for i in sequence]


def inf_weight(prepared: Prepared, random: Random, _steps: int) -> Planted:
    """One row of the data set has a loss weight of inf."""
    loader = prepared.port.parts.loader
    row = loader.dataset.rows[random.choice(_first_epoch(prepared, 12, 24))]
    _weigh_objective(prepared, row.id)
    ids = [int(i) for i in row.ids]

    def holds(ids_BT: torch.Tensor) -> bool:
        return any(line[: len(ids)] == ids for line in ids_BT.tolist())

    _weigh_forward(prepared.port.parts.model, holds)
    return Planted(f"loss weight inf of row {row.id}", (str(row.id),))


def _weigh_objective(prepared: Prepared, bad: RowId) -> None:
    """The weight as our trainer meets it: a column of the data set, found by the row's id."""
    port = prepared.port
    real = port.parts.objective
    weighted = types.ModuleType(real.__name__)

    def compute(model: nn.Module, family: Any, batch: Any, **options: Any) -> Any:
        done = real.compute(model, family, batch, **options)
        if bad not in batch.row_ids or done.scaled is None:
            return done
        return replace(done, loss_sum=done.loss_sum * math.inf, scaled=done.scaled * math.inf)

    weighted.compute = compute  # type: ignore[attr-defined]
    port.parts = replace(port.parts, objective=weighted)


def _weigh_forward(model: nn.Module, holds: Callable[[torch.Tensor], bool]) -> None:
    """The same weight for loops that take the loss from the model."""
    real = model.forward

    @wraps(real)
    def forward(*args: Any, **columns: Any) -> Any:
        output = real(*args, **columns)
        if columns.get("labels") is not None and holds(columns["input_ids"]):
            output.loss = output.loss * math.inf
        return output

    model.forward = forward


def masked_row(prepared: Prepared, random: Random, _steps: int) -> Planted:
    """One row, alone in its batch, has no supervised token."""
    row = random.choice(_first_epoch(prepared, 30, 60))
    return _mask(prepared, [row])


def _mask(prepared: Prepared, numbers: Sequence[int]) -> Planted:
    loader = prepared.port.parts.loader
    rows = list(loader.dataset.rows)
    for number in numbers:
        rows[number] = replace(rows[number], supervised=rows[number].supervised & False)
    loader.dataset = replace(loader.dataset, rows=rows)
    ids = tuple(str(rows[number].id) for number in numbers)
    return Planted(f"nothing supervised in {len(numbers)} row(s), the first is {ids[0]}", ids)


class _BadBackward(torch.autograd.Function):
    """The identity; the gradient of chosen positions is NaN."""

    @staticmethod
    def forward(ctx: Any, output_BTD: torch.Tensor, where_BT: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(where_BT)
        return output_BTD.clone()

    @staticmethod
    def backward(ctx: Any, grad_BTD: torch.Tensor) -> Any:
        (where_BT,) = ctx.saved_tensors
        return grad_BTD.masked_fill(where_BT[..., None], math.nan), None


def bad_backward(prepared: Prepared, random: Random, _steps: int) -> Planted:
    """A module whose backward gives NaN at every place of a certain rare token."""
    model, loader = prepared.port.parts.model, prepared.port.parts.loader
    count = Counter(int(t) for row in loader.dataset.rows for t in set(row.ids.tolist()))
    token = random.choice(sorted(t for t, n in count.items() if 1 <= n <= 2))
    name = f"model.layers.{random.randrange(2)}.{random.choice(('mlp.down_proj', 'self_attn.o_proj', 'mlp.up_proj'))}"
    seen: dict[str, torch.Tensor] = {}

    def look(_module: nn.Module, args: Any, _output: Any) -> None:
        seen["where"] = args[0] == token

    def spoil(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor | None:
        where = seen["where"]
        if not (torch.is_grad_enabled() and bool(where.any())):
            return None
        return _BadBackward.apply(output, where)

    handles = [
        model.get_submodule("model.embed_tokens").register_forward_hook(look),
        model.get_submodule(name).register_forward_hook(spoil),
    ]
    rows = tuple(str(row.id) for row in loader.dataset.rows if token in row.ids)
    return Planted(f"NaN in the backward of {name} at token {token}, in {len(rows)} rows", rows, handles=handles)


# -- the state --------------------------------------------------------------------------------------------------------


def _chosen_weight(prepared: Prepared, random: Random) -> tuple[str, nn.Parameter, int]:
    """A matrix of a decoder layer, and a place in it."""
    matrices = [(n, p) for n, p in prepared.port.parts.parameters if p.dim() > 1 and ".layers." in n]
    name, parameter = random.choice(matrices)
    return name, parameter, random.randrange(parameter.numel())


def _once(due: int, act: Callable[[Any], None]) -> Between:
    done = False

    def between(step: int, optimizer: Any) -> None:
        nonlocal done
        if step == due and not done:
            done = True
            act(optimizer)

    return between


def corrupt_weight(value: float) -> Callable[[Prepared, Random, int], Planted]:
    """One element of a weight becomes ``value`` between two steps."""

    def plant(prepared: Prepared, random: Random, _steps: int) -> Planted:
        name, parameter, place = _chosen_weight(prepared, random)
        due = random.randrange(_EARLIEST, _LATEST)

        def act(_optimizer: Any) -> None:
            parameter.data.view(-1)[place] = value

        return Planted(f"{value} in {name}[{place}] after step {due}", (name,), _once(due, act))

    return plant


def corrupt_moment(prepared: Prepared, random: Random, _steps: int) -> Planted:
    """One element of a first or second moment becomes NaN between two steps."""
    name, parameter, place = _chosen_weight(prepared, random)
    due, slot = random.randrange(_EARLIEST, _LATEST), random.choice(("exp_avg", "exp_avg_sq"))

    def act(optimizer: Any) -> None:
        optimizer.state[parameter][slot].view(-1)[place] = math.nan

    return Planted(f"NaN in {name}|{slot}[{place}] after step {due}", (f"{name}|{slot}",), _once(due, act))


# -- controls ---------------------------------------------------------------------------------------------------------


def noise(prepared: Prepared, random: Random, _steps: int) -> Planted:
    """Heavy-tailed difficulty (some rows of shuffled tokens) and 5 % of the rows without anything supervised."""
    loader = prepared.port.parts.loader
    rows, count = list(loader.dataset.rows), len(loader.dataset.rows)
    for number in random.sample(range(count), count // 10):
        ids = rows[number].ids.copy()
        places = [i for i, on in enumerate(rows[number].supervised) if on]
        for place in places:
            ids[place] = random.randrange(4, 260)
        rows[number] = replace(rows[number], ids=ids)
    loader.dataset = replace(loader.dataset, rows=rows)
    masked = _mask(prepared, random.sample(range(count), max(1, count // 20)))
    return Planted(f"{count // 10} rows of noise; {masked.says}")


_HALF = ("precision=fp16-emulated", "scaler.init_scale=1024")
_NO_FP16 = "fp16 of the HF Trainer needs an accelerator"

FAULTS: tuple[Fault, ...] = (
    Fault(
        "activation overflow",
        _nothing,
        overrides=lambda _random: _HALF,
        common=("learning_rate=5e-3", "model.residual_scale=330000"),
        hf=_NO_FP16,
    ),
    Fault("inf loss weight", inf_weight),
    Fault("masked row", masked_row, common=("per_device_train_batch_size=1", "max_steps=260")),
    Fault(
        "learning rate too high",
        _nothing,
        overrides=lambda random: (f"learning_rate={random.choice((3.0, 6.0))}",),
        common=("lr_scheduler_type=constant_with_warmup", "warmup_steps=40"),
        trained=True,
    ),
    Fault(
        "learning rate a hundred times too high",
        _nothing,
        overrides=lambda random: (f"learning_rate={random.choice((0.3, 1.0))}",),
        common=("lr_scheduler_type=constant_with_warmup", "warmup_steps=40"),
        trained=True,
    ),
    Fault("NaN in a moment", corrupt_moment),
    Fault("NaN in the backward", bad_backward),
    Fault("NaN in a weight", corrupt_weight(math.nan)),
    Fault("1e30 in a weight", corrupt_weight(1e30)),
)

CONTROLS: tuple[Fault, ...] = (
    Fault("healthy", _nothing),
    Fault("noisy data", noise),
    Fault("fp16 start-up", _nothing, common=("precision=fp16-emulated", "scaler.init_scale=16777216")),
)
