"""A loss function that raised because of ids that no table has: told by name, row and size of the table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from finitune.adapters import bare_batch
from finitune.adapters.bare_held import Held, HeldBatches
from finitune.adapters.bare_rows import units_at
from finitune.core.errors import UserError
from finitune.engine.named_rows import with_rows
from finitune.engine.tables.beyond import beyond_table
from finitune.engine.tables.codes import BEYOND_TABLE


def ids_beyond(error: BaseException, batch: Held | None, held: HeldBatches, model: nn.Module) -> UserError | None:
    """DAT115 where that is why ``error`` came about; None for any other error. Never raises.

    Only what lies on the host is read: after a failed assertion of a device nothing there can be read any more.
    ``batch`` may have been withdrawn from ``held``, which still knows what its rows are called.
    """
    if not isinstance(error, IndexError | RuntimeError) or isinstance(error, torch.OutOfMemoryError):
        return None
    micros: Sequence[Any] = batch.micros if batch is not None else ()
    try:
        named = [
            [(n, t) for n, t in bare_batch.leaves(m) if isinstance(t, Tensor) and t.device.type == "cpu"]
            for m in micros
        ]
        found = beyond_table(named, model)
    except Exception:  # noqa: BLE001 (an explanation that fails is none)
        return None
    if found is None or batch is None:
        return None
    told = with_rows(found, units_at(held, batch, found))
    return UserError(BEYOND_TABLE, told.where, rows=told.rows, **told.data)
