"""``lightning.Trainer`` with its defaults: automatic optimization, norm clipping.

Meant for: training; no update is refused unless a callback does it.
"""

from __future__ import annotations

import logging
from typing import Any

from finitune.bench.contenders._installed import missing_package
from finitune.bench.witness import Witness
from finitune.bench.workload import Workload, sequence

MEANT_FOR = "training; no update is refused unless a callback does it"


def missing() -> str | None:
    """Whether lightning is installed."""
    return missing_package("lightning")


def drive(load: Workload, witness: Witness) -> None:
    """Train with automatic optimization; micro-batches are accumulated."""
    import lightning

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    micros = [micro for batch in load.batches for micro in sequence(batch)]
    per_step = max(1, len(micros) // len(load.batches))
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=len(load.batches),
        accumulate_grad_batches=per_step,
        gradient_clip_val=load.max_grad_norm,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    try:
        trainer.fit(_module(load, witness, per_step), _loader(micros))
    except Exception as error:  # noqa: BLE001 (whatever it raises is a result)
        witness.raised(error)


def _loader(micros: list[Any]) -> Any:
    from torch.utils.data import DataLoader

    return DataLoader(micros, batch_size=None, shuffle=False)  # type: ignore[arg-type]


def _module(load: Workload, witness: Witness, per_step: int) -> Any:
    import lightning

    class Module(lightning.LightningModule):
        """The workload as a LightningModule."""

        def __init__(self) -> None:
            super().__init__()
            self.model, self.loss = load.model, 0.0

        def on_train_batch_start(self, _batch: Any, number: int) -> None:
            if number % per_step == 0:
                witness.begin()

        def training_step(self, batch: Any, _number: int) -> Any:
            loss = load.compute(self.model, batch)
            self.loss = float(loss.detach())
            return loss

        def on_train_batch_end(self, _outputs: Any, _batch: Any, number: int) -> None:
            if (number + 1) % per_step == 0:
                witness.stepped(committed=True, loss=self.loss)

        def configure_optimizers(self) -> Any:
            return {"optimizer": load.optimizer, "lr_scheduler": {"scheduler": load.scheduler(), "interval": "step"}}

    return Module().train()
