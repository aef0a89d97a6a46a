"""``transformers.Trainer`` with its defaults, on the same batches in the same order.

Meant for: training; NaN losses are left out of its log, no update is refused.
"""

from __future__ import annotations

import tempfile
from typing import Any

from finitune.bench.witness import Witness
from finitune.bench.workload import Workload, sequence

MEANT_FOR = "training; NaN losses are left out of its log"
# The batches of a workload may be of any make: only what is a dict of tensors can go through a data loader.
ABLE = ()


def missing() -> str | None:
    """Accelerate is what the Trainer stands on."""
    from finitune.bench.contenders._installed import missing_package

    return missing_package("accelerate")


def drive(load: Workload, witness: Witness) -> None:
    """Train with the Trainer; fp16 of it needs an accelerator, so there the forward pass is the workload's own."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(load, witness, folder)
        try:
            trainer.train()
        except Exception as error:  # noqa: BLE001 (whatever it raises is a result)
            witness.raised(error)


def _trainer(load: Workload, witness: Witness, folder: str) -> Any:
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainingArguments
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    micros = [micro for batch in load.batches for micro in sequence(batch)]

    class InOrder(Trainer):
        """The rows come in the order given, and the loss is the workload's."""

        def _get_train_sampler(self, _dataset: Any = None) -> Any:
            return SequentialSampler(micros)

        def compute_loss(self, model: Any, inputs: Any, *_given: Any, **_named: Any) -> Any:
            return load.compute(model, inputs)

    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=max(1, len(micros) // len(load.batches)),
        max_steps=len(load.batches),
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        remove_unused_columns=False,
        max_grad_norm=load.max_grad_norm or 0.0,
    )
    return InOrder(
        model=load.model,
        args=arguments,
        train_dataset=micros,
        data_collator=lambda items: items[0],
        optimizers=(load.optimizer, load.scheduler()),  # type: ignore[arg-type]
        callbacks=[_watch(witness)],
    )


def _watch(witness: Witness) -> Any:
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        """Tells the witness; the Trainer itself tells of nothing."""

        def on_step_begin(self, *_given: Any, **_named: Any) -> None:
            witness.begin()

        def on_step_end(self, *_given: Any, **_named: Any) -> None:
            witness.stepped(committed=True, loss=0.0)

    return Watch()
