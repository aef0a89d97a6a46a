"""Deterministic kernels where the device has them; what has none is collected and said.

torch knows two ways to ask. Under "error" an operation without a deterministic kernel raises; under "warn" it runs
and warns. They differ in more than that: flash and memory-efficient attention take their deterministic backward under
"error" only, and only then is cuDNN's, which has none, passed over (``aten/src/ATen/native/transformers/cuda``:
``attention_backward.cu``, ``sdp_utils.cpp``). A run that asks by "warn" repeats on no GPU with such attention. Hence a
step is computed under "error", forward and backward (:meth:`Kernels.compute`). Where that raises for want of a kernel,
the step is undone, the operation is named in a finding, and from there on "warn" serves.

On a CPU the request costs nothing measurable and matters as well: without it ``index_put_`` with ``accumulate`` (the
gradient of ``x[index]``) adds in whatever order its threads come.

Everything here is global to the process; it is put back as it was when the run is over. ``torch.compile`` is not
spoken to: its own switch takes seconds to import.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any, TypeVar

import torch

from finitune.core.messages.catalogue import text
from finitune.core.types import Finding
from finitune.numerics.codes_determinism import NO_DETERMINISTIC_KERNEL, NO_WORKSPACE_SETTING, THREADS_CHANGED

T = TypeVar("T")

WORKSPACE_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
# The larger of the two settings that Nvidia calls deterministic; 24 MiB of device memory
# (docs.nvidia.com/cuda/cublas, "Results reproducibility").
_WORKSPACE = ":4096:8"

# Besides the mode. Filling fresh memory guards against reading it before it is written, and costs a pass over it.
_SETTINGS: tuple[tuple[Any, str, bool], ...] = (
    (torch.backends.cudnn, "deterministic", True),
    (torch.backends.cudnn, "benchmark", False),
    (torch.utils.deterministic, "fill_uninitialized_memory", False),
)

# torch's words, ATen/Context.cpp and attention_backward.cu; in one expression for the filter of warnings.
_NAMED = r"(?P<op>.+?) (does not have a deterministic implementation|defaults to a non-deterministic algorithm)"
_NAMED_IN = re.compile(_NAMED, re.DOTALL)
_ABOUT_KERNELS = re.compile(rf"{_NAMED}|.*{WORKSPACE_VARIABLE}|.*non-?deterministic", re.DOTALL | re.IGNORECASE)
_LONGEST_NAME = 80


def ask_cublas() -> None:
    """Ask cuBLAS for deterministic products, if torch has CUDA and has not begun to use it.

    cuBLAS reads its setting once, from the environment, so this must come before the first tensor on a GPU. A setting
    of the user's is left alone. The variable stays: nothing else reads it.
    """
    if torch.version.cuda is not None and not torch.cuda.is_initialized():
        os.environ.setdefault(WORKSPACE_VARIABLE, _WORKSPACE)


def missing_kernel(message: str) -> str | None:
    """The operation that torch says has no deterministic kernel; None where ``message`` is about something else."""
    if not _ABOUT_KERNELS.match(message):
        return None
    if WORKSPACE_VARIABLE in message:
        return WORKSPACE_VARIABLE
    named = _NAMED_IN.match(message)
    return named["op"] if named else message.split("\n")[0][:_LONGEST_NAME]


class Kernels:
    """The kernels of a run: ``with Kernels() as kernels`` asks for deterministic ones for as long as it lasts.

    With ``wanted=False``, and outside of the ``with``, nothing is asked for and :meth:`compute` is a plain call.
    """

    def __init__(self, *, wanted: bool = True) -> None:
        self.wanted = wanted
        self.strict = wanted
        """Whether steps are computed under "error"; False once an operation had no deterministic kernel."""
        self._listener = _Listener(self._found)
        self._undo = ExitStack()
        self._active = False
        self._known: set[str] = set()
        self._new: list[Finding] = []
        self._threads = torch.get_num_threads()

    def __enter__(self) -> Kernels:
        self._threads = torch.get_num_threads()
        if self.wanted and not self._active:
            self._active = True
            self._undo.callback(torch.set_deterministic_debug_mode, torch.get_deterministic_debug_mode())
            for place, name, value in _SETTINGS:
                self._undo.callback(setattr, place, name, getattr(place, name))
                setattr(place, name, value)
            torch.set_deterministic_debug_mode("warn")
            self._undo.callback(self._listener.stop)
            self._listener.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._active = False
        self._undo.close()

    def compute(self, function: Callable[[], T], undo: Callable[[], object]) -> T:
        """The result of ``function``, from deterministic kernels alone where all its operations have one.

        Where one has none, ``undo`` is called (it must leave everything as it was) and then ``function`` once more.
        """
        if not (self._active and self.strict):
            return function()
        torch.set_deterministic_debug_mode("error")
        try:
            return function()
        except RuntimeError as error:
            operation = missing_kernel(str(error))
            if operation is None:
                raise
        finally:
            torch.set_deterministic_debug_mode("warn")
        self.strict = False
        self._found(operation)
        undo()
        return function()

    def findings(self) -> list[Finding]:
        """What was found since the last call: operations without a kernel, another number of threads."""
        threads = torch.get_num_threads()
        if threads != self._threads:
            self._new.append(THREADS_CHANGED.find(was=self._threads, now=threads))
            self._threads = threads
        new, self._new = self._new, []
        return new

    def promise(self, device: torch.device) -> tuple[str, str]:
        """What is promised on ``device``, and the reason, for the plan."""
        threads = torch.get_num_threads()
        if not self.wanted:
            return text("determinism.as_they_come"), text("determinism.why_off", threads=threads)
        if device.type == "cpu":
            return text("determinism.exact"), text("determinism.why_cpu", threads=threads)
        return text("determinism.exact"), text("determinism.why_device", device=str(device))

    def _found(self, operation: str) -> None:
        """Note an operation, once a run."""
        if operation in self._known:
            return
        self._known.add(operation)
        if operation == WORKSPACE_VARIABLE:
            setting = os.environ.get(WORKSPACE_VARIABLE) or "-"
            self._new.append(NO_WORKSPACE_SETTING.find(variable=operation, setting=setting, wanted=_WORKSPACE))
        else:
            self._new.append(NO_DETERMINISTIC_KERNEL.find(operation, operation=operation))


class _Listener:
    """Takes torch's warnings about kernels, whatever the host's filters are, and leaves all others on their way."""

    def __init__(self, found: Callable[[str], None]) -> None:
        self._found = found
        self._active = False
        self._filters: list[tuple[Any, ...]] = []
        self._show_was: Any = None

    def start(self) -> None:
        self._active = True
        self._show_was, warnings.showwarning = warnings.showwarning, self._show
        # The host's filters may hide warnings, or turn them into errors in the middle of a step.
        self._filter("always", _ABOUT_KERNELS.pattern)

    def stop(self) -> None:
        self._active = False
        for entry in self._filters:
            if entry in warnings.filters:
                warnings.filters.remove(entry)  # type: ignore[attr-defined]
        self._filters.clear()
        # Where somebody put another function in place since, that one calls ours, which passes everything on now.
        if warnings.showwarning == self._show:
            warnings.showwarning = self._show_was

    def _filter(self, action: Any, pattern: str) -> None:
        warnings.filterwarnings(action, message=f"(?s:{pattern})", category=UserWarning)
        self._filters.append((action, re.compile(f"(?s:{pattern})", re.IGNORECASE), UserWarning, None, 0))

    def _show(self, message: Any, category: Any, *place: Any, **more: Any) -> None:
        operation = missing_kernel(str(message)) if self._active and issubclass(category, UserWarning) else None
        if operation is None:
            self._show_was(message, category, *place, **more)
            return
        self._found(operation)
        # Known now: a warning that is ignored costs a microsecond, one that is shown twenty.
        self._filter("ignore", re.escape(str(message)[:_LONGEST_NAME]))
