"""The look at a prepared run before its first step: its weights, its optimizer, and one short pass through its model.

The pass runs in the run's own precision over the first tokens of the first batch, forward and backward. It says whom a
gradient reaches and whether the output is alive; nothing stays of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from finitune.core.types import Finding
from finitune.engine.conditions import NotPossible
from finitune.engine.look.first_pass import FirstPass
from finitune.engine.look.start import at_start
from finitune.engine.snapshot import is_out_of_memory
from finitune.numerics.seeds import generators_kept
from finitune.train.step import TrainPort

_TOKENS = 64


def look(port: TrainPort) -> tuple[Finding, ...]:
    """What is wrong with a run that has not begun. State, gradients and generators are as before."""
    found = at_start(port.model, port.optimizer)
    if any(f.code == "MOD110" for f in found):
        return found  # nothing finite comes out of such weights
    try:
        return (*found, *_pass(port))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return found  # the first step will meet it as well, and say more of it
    except NotPossible:
        return found
    finally:
        port.abort()


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Train mode, in which checkpointing is in force; every module in its own mode afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    model.train()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _pass(port: TrainPort) -> tuple[Finding, ...]:
    """Loss and gradients of the first tokens of the first row, all of them targets."""
    parts = port.parts
    model: Any = parts.model
    ids_BT = next(iter(port.batch()))["ids_BT"][:1, :_TOKENS]
    if ids_BT.shape[1] < 2:
        return ()
    seen = FirstPass(model)
    with _training(model), generators_kept(), seen, torch.enable_grad(), parts.context():
        logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
        loss = F.cross_entropy(logits_BTV[0, :-1].float(), ids_BT[0, 1:])
        loss.backward()  # type: ignore[no-untyped-call]
    return seen.findings(float(loss.detach()), parts.parameters)
