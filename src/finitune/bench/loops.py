"""The plain training loop that most contenders are a variation of."""

from __future__ import annotations

import math

import torch

from finitune.bench.witness import Witness
from finitune.bench.workload import Workload, sequence


class Script:
    """loss / number of micro-batches -> scale -> backward -> unscale -> clip -> step -> schedule."""

    def __init__(self, load: Workload, witness: Witness) -> None:
        self.load, self.witness = load, witness
        self.scaler, self.scheduler = load.scaler(), load.scheduler()
        self.parameters = [p for p in load.model.parameters() if p.requires_grad]

    def run(self) -> None:
        """Train on every batch in order; an error ends the run and is told to the witness."""
        self.load.model.train()
        for batch in self.load.batches:
            self.witness.begin()
            try:
                committed, loss = self.one(batch)
            except Exception as error:  # noqa: BLE001 (whatever it raises is a result)
                self.witness.raised(error)
                return
            self.witness.stepped(committed=committed, loss=loss)

    def one(self, batch: object) -> tuple[bool, float]:
        """One optimizer step; whether the update was made, and the loss."""
        loss = self.backward(sequence(batch))
        optimizer, scaler = self.load.optimizer, self.scaler
        if scaler is not None:
            scaler.unscale_(optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.load.max_grad_norm or math.inf))
        committed = self.wants(loss, norm)
        if committed:
            committed = self.update(norm)
        if scaler is not None:
            scaler.update()
        self.scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        return committed, loss

    def backward(self, micros: object) -> float:
        """Gradients of all micro-batches; their mean loss."""
        parts, total = list(sequence(micros)), 0.0
        for micro in parts:
            loss = self.load.compute(self.load.model, micro) / len(parts)
            (self.scaler.scale(loss) if self.scaler is not None else loss).backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    def wants(self, loss: float, norm: float) -> bool:  # noqa: ARG002
        """Whether the update is made; the plain loop always makes it."""
        return True

    def update(self, norm: float) -> bool:
        """optimizer.step, through the scaler where there is one, which leaves it out for infinite gradients."""
        if self.scaler is None:
            self.load.optimizer.step()
            return True
        self.scaler.step(self.load.optimizer)
        return math.isfinite(norm)
