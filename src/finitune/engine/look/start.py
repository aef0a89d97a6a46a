"""The look at a run before its first step: model, optimizer and schedule as they stand.

    findings = at_start(model, optimizer, scheduler)

Nothing is computed on data and nothing is changed. It costs about three passes over the weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from finitune.core.types import Finding
from finitune.engine.look.buffers import differing
from finitune.engine.look.formats import half_trained, updates_lost
from finitune.engine.look.resume import not_of_one_run
from finitune.engine.look.weights import hot_rows, never_filled, not_finite


@torch.no_grad()
def at_start(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, scheduler: Any = None
) -> tuple[Finding, ...]:
    """Everything that is wrong with the weights, the buffers, the number formats or the state of a resumed run.

    ``optimizer`` and ``scheduler`` None: nothing is said of them.
    """
    found = not_finite(model)
    bad = {f.where for f in found}
    found += never_filled(model, bad) + hot_rows(model) + differing(model)
    if optimizer is not None:
        found += half_trained(model, optimizer) + updates_lost(optimizer, scheduler)
        found += not_of_one_run(optimizer, scheduler)
    return tuple(found)
