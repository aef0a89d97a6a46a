"""Numbers for people: bytes, durations, significant digits."""

from __future__ import annotations

import math

_GIB = 1 << 30


def bytes_text(num_bytes: float) -> str:
    """Bytes as "1.5 GiB" or "12 MiB"."""
    return f"{num_bytes / _GIB:.1f} GiB" if num_bytes >= _GIB else f"{max(1, round(num_bytes / (1 << 20)))} MiB"


def number_text(value: float | None, digits: int = 4) -> str:
    """A number with so many significant digits; "-" for None; NaN and inf are spelled out."""
    if value is None:
        return "-"
    return f"{value:.{digits}g}" if math.isfinite(value) else str(value)


def duration_text(seconds: float) -> str:
    """Seconds as "0:42", "12:05" or "3:07:12"; "-" for what is not finite."""
    if not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
