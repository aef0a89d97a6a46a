"""Rotary frequencies that a checkpoint still holds, against what its config.json makes of them.

The weights were trained with the frequencies in the file. transformers no longer reads them: it computes them from the
configuration, and where that names another base or scaling, the model is another one, without a word. Checkpoints
written since 2023 hold no frequencies; there the contradiction cannot be seen in the folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from finitune.core.types import Finding
from finitune.models.codes import ROPE_DIFFERS

STORED = "rotary_emb.inv_freq"
_BASE = "rope_theta"
_CLOSE = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
"""Relative; one unit in the last place of the format that the file is in."""
_CLOSE_FP32 = 1e-4
"""A base that was rounded, a power that another device computed."""
_FEWEST = 2
_FP16_STEP = 2.0**-24
"""Between neighbouring fp16 numbers near 0: frequencies of large bases are subnormal there."""


def contradictions(stored: Mapping[str, Tensor], model: nn.Module, where: str) -> list[Finding]:
    """MOD042, once, where frequencies in the file are none that the configuration gives.

    Scaled as well as unscaled frequencies are right: releases before 4.45 scaled the positions and stored the base's.

    Args:
        stored: all tensors of the checkpoint, by the names in its files.
        model: built from config.json.
        where: the folder, for the message.
    """
    config: Any = model.config
    bases = sorted(set(_bases(config.to_dict())))
    own = [b.detach().cpu().float() for n, b in model.named_buffers() if n.endswith("inv_freq")]
    if not own:
        return []  # no rotary embedding is computed from frequencies here: nothing to hold against the file
    wrong = [name for name, tensor in sorted(stored.items()) if name.endswith(STORED) and _differs(tensor, own, bases)]
    if not wrong:
        return []
    base, found = base_of(stored[wrong[0]].reshape(-1)), stored[wrong[0]].float().reshape(-1)
    expected = next((f for f in own if f.numel() == found.numel()), own[0]).reshape(-1)
    place = int((found / expected - 1).abs().argmax()) if found.numel() == expected.numel() else found.numel() - 1
    numbers: dict[str, Any] = {
        "index": place,
        "found": float(found[place]),
        "expected": float(expected[min(place, expected.numel() - 1)]),
        "stored_base": _shown(base),
        "base": ", ".join(f"{b:.6g}" for b in bases) or "-",
        "count": len(wrong),
    }
    return [ROPE_DIFFERS.find(wrong[0], name=wrong[0], folder=where, fault_class="H", **numbers)]


def _bases(config: Any) -> Iterator[float]:
    """Every rope_theta in a configuration, of whatever part of the model or kind of layer."""
    if isinstance(config, Mapping):
        value = config.get(_BASE)
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            yield float(value)
        for part in config.values():
            yield from _bases(part)


def _differs(stored: Tensor, own: list[Tensor], bases: list[float]) -> bool:
    """None of the frequencies that are right is what the file holds."""
    if not stored.is_floating_point() or stored.numel() == 0:
        return False
    found = stored.reshape(-1)
    right = [f.reshape(-1) for f in own]
    if any(f.numel() == found.numel() for f in right):  # else the head or its rotary part is of another size
        right += [_powers(base, found.numel()) for base in bases]
    return not any(_close(found, expected) for expected in right)


def _powers(base: float, count: int) -> Tensor:
    """Frequencies without any scaling: base^(-2k / dim), k = 0 .. dim / 2 - 1 (Su et al. 2021, arXiv:2104.09864)."""
    return torch.pow(torch.tensor(base, dtype=torch.float64), -torch.arange(count, dtype=torch.float64) / count).float()


def _close(found: Tensor, expected: Tensor, units: float = 1.0) -> bool:
    """Equal up to so many units of the format's rounding. NaN is never close."""
    if found.shape != expected.shape:
        return False
    relative, step = _rounding(found.dtype)
    return bool(((found.float() - expected).abs() <= units * (relative * expected.abs() + step)).all())


def _rounding(dtype: torch.dtype) -> tuple[float, float]:
    """(relative, absolute) rounding of a format."""
    return _CLOSE.get(dtype, _CLOSE_FP32), _FP16_STEP if dtype == torch.float16 else 0.0


def base_of(frequencies: Tensor) -> float | None:
    """The base of unscaled frequencies, (dim / 2,), in any format; None where they are no powers of one base."""
    count, values = frequencies.numel(), frequencies.double()
    if count < _FEWEST or not bool((values > 0).all()):  # NaN is not > 0
        return None
    relative, step = _rounding(frequencies.dtype)
    powers = torch.arange(1, count, dtype=torch.float64)
    # log(base) = -log(f_k) count / k: the best k is the one at which rounding moves that least.
    best = int(((relative + step / values[1:]) / powers).argmin()) + 1
    base = float(values[best] ** (-count / best))
    return base if _close(frequencies, _powers(base, count), 2.0) else None


def _shown(base: float | None) -> str:
    return "-" if base is None else f"{base:.6g}"
