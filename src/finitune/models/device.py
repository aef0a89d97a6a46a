"""Which device the model lives on."""

from __future__ import annotations

import torch

from finitune.core.errors import UserError
from finitune.numerics.codes import DEVICE_UNUSABLE


def pick_device(name: str) -> torch.device:
    """``auto``: the first accelerator torch can use, else the CPU; any other name is tried.

    Raises UserError MOD104 where torch knows no such device, or it does not work here.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator if accelerator is not None else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # the forms in which backends decline
        problem = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(DEVICE_UNUSABLE, "device", device=name, problem=problem) from error
    return device
