"""L: with gradient accumulation, the loss of each micro-batch is not divided, and the gradient is n times too large.

After an upgrade or a restart neither the trainer nor the model divides: the logged loss is n times that of the tokens,
and the gradient with it. Clipping and Adam hide most of the harm: clipping holds every step, SGD would diverge.
Threads: huggingface/transformers#35438, huggingface/transformers#37766.
"""

from __future__ import annotations

from random import Random
from typing import Any

from torch import Tensor

from finitune.bench.runs.accumulated_sft import micro_batches
from finitune.bench.workload import Batch, Expected, Workload

FAULT_CLASS = "L"
CASES = (26,)
RUNS = (("accumulated_sft", "fp32"), ("accumulated_sft", "bf16"))


def plant(load: Workload, random: Random) -> Expected:
    """Rows fall on two to eight micro-batches; from a drawn step on the loss is that many times too large."""
    start, _ = load.place(random)
    micros = random.choice((2, 4, 8))
    for step in range(1, len(load.batches) + 1):
        load.batches[step - 1] = micro_batches(load.row_ids(step), micros)
    healthy = load.loss

    def loss(model: Any, batch: Batch) -> Tensor:
        return healthy(model, batch) * (micros if "num_items" in batch and load.step >= start else 1)

    load.loss = loss
    return Expected(
        says=f"from step {start} on the sum, not the mean, over {micros} micro-batches",
        step=start,
        codes=("OPT403",),
        never=("NUM", "MOD", "SYS", "DAT"),
        reference="",  # Adam and clipping take the factor away again: the final loss tells nothing
        data={"micros": micros, "start": start},
    )
