"""The precision in which products are computed, overridden from outside of the code that chose it.

Somebody's loss function enters ``torch.autocast("cuda", dtype=torch.float16)``. Inside :func:`computed_in` that region
is still entered and left, but as a disabled one ("fp32") or as one of bf16: the same code, another precision. Regions
of our own emulation (``numerics/half.py``) ask here too. ``torch.autocast(enabled=False)`` stays what it is.

How: while any override is active, ``torch.autocast.__enter__`` is replaced by one that first does what the original
does and then corrects the autocast state of the thread. Which override holds is kept where autograd keeps its own
thread-local state, so that a recomputation (activation checkpointing) on one of autograd's device threads sees it too.
Code compiled by ``torch.compile`` enters its own regions without asking (``torch.compiler.set_stance("force_eager")``
makes it ask); regions around it are seen.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

HALF_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16"}
PRECISIONS = ("fp32", "bf16")

_TLS_KEY = "finitune.numerics.compute"
_DEVICES = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla")


class EmulatedRegion(torch.autocast):
    """The autocast region of an emulation: products inside are emulated, not native."""


@dataclass(slots=True)
class Seen:
    """Half-precision regions that were entered: "fp16", "bf16", "fp16-emulated", "bf16-emulated"."""

    names: set[str] = field(default_factory=set)

    @property
    def half(self) -> str | None:
        """The half precision that the code itself asks for: "fp16" (the narrower one wins), "bf16" or None."""
        formats = {name.partition("-")[0] for name in self.names}
        return next((name for name in ("fp16", "bf16") if name in formats), None)

    @property
    def emulated(self) -> bool:
        """All of it was emulated."""
        return bool(self.names) and all(name.endswith("-emulated") for name in self.names)


@dataclass(frozen=True, slots=True)
class _Frame:
    """One active ``computed_in`` of this thread."""

    precision: str | None
    seen: Seen
    outer: _Frame | None

    def note(self, name: str) -> None:
        frame: _Frame | None = self
        while frame is not None:
            frame.seen.names.add(name)
            frame = frame.outer


def _frame() -> _Frame | None:
    """The innermost frame of this thread; on an autograd worker that of the thread that called backward."""
    if not torch._C._is_key_in_tls(_TLS_KEY):
        return None
    found: _Frame | None = torch._C._get_obj_in_tls(_TLS_KEY)
    return found


def replaced(dtype: torch.dtype) -> torch.dtype | None:
    """What a region of this half dtype computes in now: a half dtype, or None for fp32."""
    frame = _frame()
    if frame is None or frame.precision is None:
        return dtype
    return None if frame.precision == "fp32" else torch.bfloat16


def seen_autocast() -> frozenset[str]:
    """Names of the half regions entered since the innermost :func:`computed_in` of this thread began."""
    frame = _frame()
    return frozenset() if frame is None else frozenset(frame.seen.names)


@contextmanager
def computed_in(precision: str | None) -> Iterator[Seen]:
    """Inside, half-precision regions compute in ``precision``; with None they stay as they are. Yields what was seen.

    Regions that this thread is in already are changed as well, and restored afterwards. Only the calling thread is
    concerned (and backward passes that it starts). Nested: the innermost precision holds, None takes over that of
    outside; a region that an outer "fp32" has switched off stays off until it is entered again.

    Raises:
        ValueError: ``precision`` is not "fp32", "bf16" or None.
    """
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"products can be computed in {' or '.join(PRECISIONS)}, not in {precision!r}")
    outer = _frame()
    inherited = outer.precision if outer is not None else None
    frame = _Frame(precision or inherited, Seen(), outer)
    if outer is None:
        frame.seen.names.update(_ambient())
    _patch.take()
    torch._C._stash_obj_in_tls(_TLS_KEY, frame)
    regions = autocast_regions()
    try:
        for device in _half_regions() if frame.precision else ():
            _correct(device, frame.precision)
        if precision == "bf16":  # autocast's cache of cast weights does not look at the dtype it is asked for
            torch.clear_autocast_cache()
        yield frame.seen
    finally:
        if precision == "bf16":
            torch.clear_autocast_cache()
        if frame.precision:
            restore_autocast(regions)
        torch._C._stash_obj_in_tls(_TLS_KEY, outer)
        _patch.give_back()


@cache
def devices() -> tuple[str, ...]:
    """Device types that know autocast in this build of torch."""
    return tuple(d for d in _DEVICES if torch.amp.is_autocast_available(d))


def autocast_regions() -> dict[str, tuple[bool, torch.dtype]]:
    """Whether autocast is on, and in which dtype, for each device type: of this thread, at this moment."""
    return {device: _state(device) for device in devices()}


def restore_autocast(regions: Mapping[str, tuple[bool, torch.dtype]]) -> None:
    """Put this thread into the regions that :func:`autocast_regions` told."""
    for device, (enabled, dtype) in regions.items():
        if _state(device) != (enabled, dtype):
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)


def _state(device: str) -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def _half_regions() -> list[str]:
    """Device types whose autocast is on, in a half dtype, at this moment."""
    return [d for d in devices() if torch.is_autocast_enabled(d) and torch.get_autocast_dtype(d) in HALF_NAMES]


def _ambient() -> set[str]:
    """Names of the half regions that this thread is in."""
    emulated = {"cpu"} if _emulations.active else set()
    return {HALF_NAMES[_state(d)[1]] + ("-emulated" if d in emulated else "") for d in _half_regions()}


def _correct(device: str, precision: str | None) -> None:
    if precision == "fp32":
        torch.set_autocast_enabled(device, False)
    elif precision == "bf16":
        torch.set_autocast_dtype(device, torch.bfloat16)


def _entered(region: torch.autocast) -> None:
    """A region was just entered: note it, and correct the state that it set."""
    frame = _frame()
    enabled, dtype = _state(region.device)
    if frame is None or not enabled or dtype not in HALF_NAMES:
        return
    # A recomputation in backward repeats the state of its forward, which may be corrected already.
    if torch._C._current_graph_task_id() == -1:
        frame.note(HALF_NAMES[dtype] + ("-emulated" if isinstance(region, EmulatedRegion) else ""))
    _correct(region.device, frame.precision)


class _Emulations(threading.local):
    """How many emulated regions this thread is in."""

    active = 0


_emulations = _Emulations()


def emulation_entered(change: int) -> None:
    """Called by the emulation with +1 when it is entered and -1 when it is left."""
    _emulations.active += change


class _Patch:
    """The replaced ``torch.autocast.__enter__``, in place while anybody needs it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._original: Callable[[Any], Any] | None = None
        self._ours: Callable[[Any], Any] | None = None

    def take(self) -> None:
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._install()

    def give_back(self) -> None:
        with self._lock:
            self._users -= 1
            # Had somebody else replaced it in the meantime, ours would stay below theirs: it does nothing then.
            if self._users == 0 and torch.autocast.__enter__ is self._ours:
                torch.autocast.__enter__ = self._original  # type: ignore[method-assign, assignment]

    def _install(self) -> None:
        original = torch.autocast.__enter__
        if original is self._ours:
            return

        def enter(region: torch.autocast) -> Any:
            result = original(region)
            _entered(region)
            return result

        self._original, self._ours = original, enter
        torch.autocast.__enter__ = enter  # type: ignore[method-assign]


_patch = _Patch()
