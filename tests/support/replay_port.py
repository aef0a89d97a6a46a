"""The smallest port that can replay: a model, an optimizer, a loss function and a list of batches, on the CPU.

It has no loader, no scaler and no cast of the model: precision is whatever ``loss_fn`` computes in. Of the conditions
it knows ``lr_factor``, ``max_grad_norm`` and ``adam_eps``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from finitune.core.incident import Trigger
from finitune.core.robust import History
from finitune.core.types import Finding, Reading, RowId, Severity
from finitune.engine.case import Case
from finitune.engine.conditions import AS_CONFIGURED, Conditions, NotPossible
from finitune.engine.lab import Budget, Lab
from finitune.engine.monitor import read
from finitune.engine.policy import Action
from finitune.engine.port import WHOLE, Ask, Capability, Trace, Unit
from finitune.engine.snapshot import Snapshot, as_snapshot
from finitune.numerics.norms import tensor_norms
from finitune.numerics.seeds import seed_generators
from finitune.train.optim import moments, restore_moments

Batch = Any
LossFn = Callable[[nn.Module, Batch], torch.Tensor]
_KNOWN = {"lr_factor", "max_grad_norm", "adam_eps"}
_SEED = 7


@dataclass(slots=True)
class State:
    """Counters and memory."""

    step: int = 0
    attempt: int = 0
    updates: int = 0
    history: History = field(default_factory=History)
    guard: dict[str, Any] = field(default_factory=dict)
    conditions: Conditions = AS_CONFIGURED


class BarePort:
    """A ReplayPort. ``batches``: for each step its micro-batches, dicts (or tuples) of tensors with rows first."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: LossFn,
        batches: Sequence[Sequence[Batch]],
        *,
        causal: bool = True,
        rows_per_unit: int = 1,
    ) -> None:
        self._model, self._optimizer, self.loss_fn, self.batches = model, optimizer, loss_fn, batches
        self.causal, self.rows_per_unit = causal, rows_per_unit
        self.state = State()
        self.clean: list[int] = []
        self.num_computed = 0
        """Forward and backward passes so far."""
        self._lrs = [group["lr"] for group in optimizer.param_groups]

    # -- what it is -----------------------------------------------------------------------------------------

    def capabilities(self) -> frozenset[Capability]:
        return frozenset(Capability)

    @property
    def model(self) -> nn.Module:
        return self._model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer

    @property
    def scale_left(self) -> bool:
        return False

    @property
    def loss_scale(self) -> float | None:
        return None

    @property
    def conditions(self) -> Conditions:
        return self.state.conditions

    def adopt(self, conditions: Conditions) -> None:
        foreign = sorted(set(conditions.to_json()) - _KNOWN)
        if foreign:
            raise NotPossible(f"this port cannot change {', '.join(foreign)}")
        self.state.conditions = conditions
        for group, lr in zip(self._optimizer.param_groups, self._lrs, strict=True):
            group["lr"] = lr * conditions.lr_factor
            if conditions.adam_eps is not None:
                group["eps"] = conditions.adam_eps

    def parameters(self) -> Sequence[tuple[str, nn.Parameter]]:
        return [(n, p) for n, p in self._model.named_parameters() if p.requires_grad]

    def origin(self, name: str) -> torch.Tensor | None:
        return None

    def facts(self) -> Mapping[str, Any]:
        dtypes = sorted({str(p.dtype)[6:] for _, p in self.parameters()})
        return {"precision": "fp32", "weights": dtypes, "device": "cpu", "optimizer": type(self._optimizer).__name__}

    # -- batches --------------------------------------------------------------------------------------------

    def batch(self, step: int | None = None) -> Sequence[Batch]:
        number = self.state.step + 1 if step is None else step
        if not 1 <= number <= len(self.batches):
            raise NotPossible(f"the batch of step {number} cannot be had")
        return self.batches[number - 1]

    def ahead(self) -> int:
        return max(0, len(self.batches) - self.state.step - 1)

    def clean_steps(self) -> tuple[int, ...]:
        return tuple(reversed(self.clean))

    def units(self, step: int | None = None) -> tuple[Unit, ...]:
        number = self.state.step + 1 if step is None else step
        return tuple(
            Unit(micro, index, tuple(row_id(number, micro, index, k) for k in range(self.rows_per_unit)))
            for micro, batch in enumerate(self.batch(step))
            for index in range(num_rows(batch))
        )

    def _asked(self, ask: Ask) -> list[tuple[int, Batch]]:
        numbered = list(enumerate(self.batch(ask.step)))
        if ask.prefix_tokens is not None:
            if not self.causal:
                raise NotPossible("the model is not causal")
            numbered = [(m, prefix(b, ask.prefix_tokens)) for m, b in numbered]
        if ask.units is None:
            return numbered
        units = self.units(ask.step)
        chosen = [units[u] for u in ask.units]
        wanted = {m: [u.index for u in chosen if u.micro == m] for m, _ in numbered}
        return [(m, only(b, wanted[m])) for m, b in numbered if wanted[m]]

    # -- a step ---------------------------------------------------------------------------------------------

    def forward_backward(self, ask: Ask = WHOLE) -> Trace:
        number = self.state.step + 1 if ask.step is None else ask.step
        asked = self._asked(ask)
        self.num_computed += 1
        total, tokens = torch.zeros(()), 0
        for micro, batch in asked:
            seed_generators(_SEED, number, micro)
            loss = self.loss_fn(self._model, batch) / len(asked)
            if loss.requires_grad:
                loss.backward()
            total = total + loss.detach().float()
            tokens += num_rows(batch)
        names, grads = [], []
        for name, parameter in self.parameters():
            names.append(name)
            grads.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        return Trace(number, total, 1, tokens, tensor_norms(grads), names, self._lrs[0])

    def commit(self, reading: Reading) -> None:
        if self.conditions.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_([p for _, p in self.parameters()], self.conditions.max_grad_norm)
        self._optimizer.step()
        self.abort()
        self.state.updates += 1

    def abort(self) -> None:
        for _, parameter in self.parameters():
            parameter.grad = None

    def settle(self, action: Action, reading: Reading, *, clean: bool) -> None:
        self.state.attempt += 1
        if action in (Action.PROCEED, Action.SKIP_BATCH):
            self.state.step += 1
        if action is Action.PROCEED and clean:
            self.clean.append(reading.step)

    # -- state ----------------------------------------------------------------------------------------------

    def state_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.parameters()
        yield from moments(self._optimizer, self.parameters())

    def state_record(self) -> dict[str, Any]:
        state = self.state
        numbers = {"step": state.step, "attempt": state.attempt, "updates": state.updates}
        numbers |= {"guard": copy.deepcopy(state.guard), "conditions": state.conditions.to_json()}
        return {**numbers, "history": state.history.state(), "clean": list(self.clean)}

    def restore(self, tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any]) -> None:
        self.abort()
        with torch.no_grad():
            for name, parameter in self.parameters():
                parameter.copy_(tensors[name])
        held = {n: t for n, t in tensors.items() if "|" in n}
        self._optimizer.state.clear()
        restore_moments(self._optimizer, self.parameters(), held)
        self.state.step, self.state.attempt = record["step"], record["attempt"]
        self.state.updates, self.state.guard = record["updates"], copy.deepcopy(record["guard"])
        self.state.history.load(record["history"])
        self.clean = list(record["clean"])
        self.adopt(Conditions.from_json(record["conditions"]))


def row_id(step: int, micro: int, index: int, part: int = 0) -> RowId:
    return RowId.of("rows.jsonl", 1 + step * 1000 + micro * 100 + index * 10 + part, f"{step},{micro},{index}".encode())


def num_rows(batch: Batch) -> int:
    return len(next(t for t in torch.utils._pytree.tree_leaves(batch) if isinstance(t, torch.Tensor)))


def only(batch: Batch, indices: Sequence[int]) -> Batch:
    """The other places hold copies of the chosen ones: shapes stay."""
    places = [i if i in indices else indices[i % len(indices)] for i in range(num_rows(batch))]
    return tree_map(lambda t: t[places] if isinstance(t, torch.Tensor) else t, batch)


def prefix(batch: Batch, tokens: int) -> Batch:
    """After the first ``tokens`` positions ids are 0 and labels -100."""

    def cut(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() < 2:
            return tensor
        cut_BT = tensor.clone()
        cut_BT[:, tokens:] = -100 if name == "labels" else 0
        return cut_BT

    return {name: cut(name, t) for name, t in batch.items()}


# -- runs and labs --------------------------------------------------------------------------------------------


def train(port: BarePort, steps: int, states: dict[int, Snapshot] | None = None) -> None:
    """Steps without a guard. ``states``: takes a copy of the state after every step, and of the present one."""
    if states is not None:
        states.setdefault(port.state.step, as_snapshot(port))
    for _ in range(steps):
        reading = read(port.forward_backward())
        port.commit(reading)
        port.settle(Action.PROCEED, reading, clean=True)
        if states is not None:
            states[port.state.step] = as_snapshot(port)


def lab_of(
    port: BarePort,
    trigger: Trigger = Trigger.LOSS,
    *,
    max_replays: float = 200.0,
    states: Mapping[int, Snapshot] | None = None,
    **data: Any,
) -> Lab:
    """A lab for the step at hand, whose failure is read from one computation of it."""
    reading = read(port.forward_backward())
    port.abort()
    finding = Finding("NUM001", Severity.ERROR, data=data)
    case = Case(trigger, finding, reading, port.facts())
    known = states or {}
    return Lab(port, case, as_snapshot(port), Budget(max_replays, 1e9), known.get)


def with_case(lab: Lab, **changes: Any) -> Case:
    """The lab's case with changes; the lab has it too."""
    lab.case = replace(lab.case, **changes)
    return lab.case
