"""The look at how the first step is computed: which modules ran, in which format, and whom a gradient reached.

    seen = FirstPass(model)
    with seen:
        loss = loss_fn(model, batch)
        loss.backward()
    findings = seen.findings(float(loss), named_parameters)

Only hooks on modules, and a look at the arguments of ``torch.autocast``; what is computed keeps its bits. Code that
is compiled must not be looked at: hooks would break its graph apart.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from finitune.core.types import Finding
from finitune.engine.look.body import Bodies
from finitune.engine.look.codes import DEAD_LOGITS, NO_GRADIENT
from finitune.engine.look.codes_step import AUTOCAST_ELSEWHERE, NOT_IN_HALF
from finitune.engine.look.weights import beyond_half
from finitune.numerics.compute import HALF_NAMES, EmulatedRegion, autocast_regions
from finitune.numerics.norms import tensor_norms

# Logits that differ by a standard deviation of s lower the loss by s^2 / 2: below this nobody can tell it from ln V.
_DEAD_SPREAD = 0.02
_DEAD_LOSS = 1e-2
# What a module lets through of its input, largest against largest: of a norm it is about 1, of a product about the
# root mean square of its weight times the root of its width, 0.1 and more. Where logits are dead one of them is not.
_BLOCKED = 0.02
_SHOWN = 4
Parameters = Sequence[tuple[str, nn.Parameter]]


class FirstPass:
    """A context manager around the forward and backward passes of one step."""

    def __init__(self, model: nn.Module) -> None:
        """``model``: what the loss is computed with; nothing is touched before the context is entered."""
        self._model = model
        self._handles: list[Any] = []
        self._ran: set[int] = set()
        self._formats: Counter[tuple[str, torch.dtype]] = Counter()
        self._asked: set[tuple[str, torch.dtype]] = set()
        self._emulated: set[torch.dtype] = set()
        self._spread = math.nan
        self._head = _head_of(model)
        self._peaks: dict[int, tuple[nn.Module, Tensor, Tensor]] = {}
        """Of modules with weights of their own, in the order in which they ran first: largest input and output."""
        self._bodies = Bodies(model)
        self._original: Any = None

    def __enter__(self) -> FirstPass:
        for device, (enabled, dtype) in autocast_regions().items():
            if enabled:
                self._asked.add((device, dtype))
        for module in self._model.modules():
            if next(module.parameters(recurse=False), None) is not None:
                self._handles.append(module.register_forward_hook(self._saw))
        self._handles += self._bodies.hooks()
        if self._head is not None:
            self._handles.append(self._head.register_forward_hook(self._saw_logits))
        self._listen()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._original is not None:
            torch.autocast.__init__ = self._original  # type: ignore[method-assign]
            self._original = None

    # -- what is seen -----------------------------------------------------------------------------------------

    def _listen(self) -> None:
        """Hear what every ``torch.autocast(...)`` asks for: one for a device that is missing forgets it."""
        original = self._original = torch.autocast.__init__
        asked, emulated = self._asked, self._emulated

        def init(
            region: Any, device_type: str, dtype: Any = None, enabled: bool = True, cache_enabled: Any = None
        ) -> None:
            original(region, device_type, dtype, enabled, cache_enabled)
            if not enabled:
                return
            if isinstance(region, EmulatedRegion):
                emulated.add(region.fast_dtype)
            else:
                asked.add((device_type, region.fast_dtype))

        torch.autocast.__init__ = init  # type: ignore[method-assign, assignment]

    def _saw(self, module: nn.Module, args: Any, output: Any) -> None:
        if id(module) not in self._ran:
            self._saw_peaks(module, args, output)
        self._ran.add(id(module))
        weight = getattr(module, "weight", None)
        # Norms and embeddings give out what they are fed; products are what a format is asked for.
        product = isinstance(weight, Tensor) and weight.dim() > 1 and not isinstance(module, nn.Embedding)
        if product and isinstance(output, Tensor) and output.is_floating_point():
            self._formats[output.device.type, output.dtype] += 1

    @torch.no_grad()
    def _saw_peaks(self, module: nn.Module, args: Any, output: Any) -> None:
        given: Any = args[0] if args else None
        if _has_peak(given) and _has_peak(output):
            self._peaks[id(module)] = (module, given.abs().amax(), output.abs().amax())

    @torch.no_grad()
    def _saw_logits(self, _module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() > 1 and output.shape[-1] > 1 and output.numel():
            rows = output.detach().reshape(-1, output.shape[-1])
            spread = float(rows[:: max(1, rows.shape[0] // 64)].float().std(-1).amax())
            self._spread = spread if math.isnan(self._spread) else max(self._spread, spread)

    # -- what it means ----------------------------------------------------------------------------------------

    def findings(
        self, loss: float, parameters: Parameters, *, loss_scale: float | None = None, vocabulary: int | None = None
    ) -> tuple[Finding, ...]:
        """Call it while the gradients are there.

        Args:
            loss: mean loss of the step.
            parameters: the trained parameters by name.
            loss_scale: what a GradScaler multiplies the loss by; None without one.
            vocabulary: tokens of the head; None: read off the model.
        """
        found = [*self._without_gradient(parameters), *self._elsewhere(), *self._scaled_for_nothing(loss_scale)]
        found += self._dead(loss, parameters, vocabulary) or self._bodies.findings()
        halves = {dtype for _, dtype in self._formats} | self._emulated
        return (*found, *(beyond_half(self._model) if torch.float16 in halves else ()))

    def _without_gradient(self, parameters: Parameters) -> list[Finding]:
        """Trained tensors of modules that ran, and whom no gradient reached at all."""
        holders = {id(p): m for m in self._model.modules() for p in m.parameters(recurse=False)}
        none = [n for n, p in parameters if p.grad is None and id(holders.get(id(p))) in self._ran]
        if not none:
            return []
        more = f", ... ({len(none)})" if len(none) > _SHOWN else ""
        names = ", ".join(none[:_SHOWN]) + more
        numbers: dict[str, Any] = {"count": len(none), "total": len(parameters)}
        return [NO_GRADIENT.find(none[0], names=names, first=none[0], fault_class="M", **numbers)]

    def _elsewhere(self) -> list[Finding]:
        """Autocast was asked for on devices on which nothing was computed, and on none of those in use."""
        used = {device for device, _ in self._formats}
        asked = {(device, dtype) for device, dtype in self._asked if dtype in HALF_NAMES}
        if not used or not asked or self._is_half or any(device in used for device, _ in asked):
            return []
        device, dtype = next(iter(sorted(asked, key=str)))
        return [
            AUTOCAST_ELSEWHERE.find(
                "autocast",
                asked=HALF_NAMES[dtype],
                wrong=device,
                count=sum(self._formats.values()),
                device=", ".join(sorted(used)),
                dtype=self._dtypes(),
                fault_class="S",
            )
        ]

    def _scaled_for_nothing(self, loss_scale: float | None) -> list[Finding]:
        if loss_scale is None or not self._formats or self._is_half or self._elsewhere():
            return []
        count = sum(self._formats.values())
        return [NOT_IN_HALF.find("scaler", scale=loss_scale, count=count, dtype=self._dtypes(), fault_class="S")]

    @property
    def _is_half(self) -> bool:
        """Some product was in half precision, or an emulation of it was in force."""
        return bool(self._emulated) or any(dtype in HALF_NAMES for _, dtype in self._formats)

    def _dtypes(self) -> str:
        return ", ".join(sorted({str(d).removeprefix("torch.") for _, d in self._formats}))

    def _dead(self, loss: float, parameters: Parameters, vocabulary: int | None) -> list[Finding]:
        """The loss is that of guessing, and the logits do not differ: no other reading of it is left."""
        weight = getattr(self._head, "weight", None)
        size = vocabulary or (int(weight.shape[0]) if isinstance(weight, Tensor) and weight.dim() > 1 else 0)
        if size < 2 or not abs(loss - math.log(size)) <= _DEAD_LOSS or not self._spread <= _DEAD_SPREAD:
            return []
        there = [p.grad for _, p in parameters if p.grad is not None]
        zero = sum(norm == 0.0 for norm in tensor_norms(there).tolist()) if there else 0
        place = self._blocked_by()
        name, holder = _tensor_name(self._model, place), getattr(place, "weight", None)
        rms = float(holder.detach().float().square().mean().sqrt()) if isinstance(holder, Tensor) else math.nan
        numbers: dict[str, Any] = {"num_zero": zero + len(parameters) - len(there), "num_trained": len(parameters)}
        numbers |= {"vocabulary": size}
        values: dict[str, Any] = {"loss": loss, "guess": math.log(size), "spread": self._spread, "rms": rms}
        return [DEAD_LOGITS.find(name, head=name, fault_class="H", **numbers, **values)]

    def _blocked_by(self) -> nn.Module | None:
        """The last module that lets nothing through of what reaches it: the head, or a norm before it."""
        for module, given, made in reversed(self._peaks.values()):
            reached, through = float(given), float(made)
            if reached > 0 and through <= _BLOCKED * reached:
                return module
        return self._head


def _head_of(model: nn.Module) -> nn.Module | None:
    """The module that gives out logits, where the model names one."""
    try:
        found = model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):
        return None
    return found if isinstance(found, nn.Module) else None


def _has_peak(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 0


def _tensor_name(model: nn.Module, part: nn.Module | None) -> str:
    """The name of the weight of a part, or of the part where it has none."""
    weight = getattr(part, "weight", None)
    names = (n for n, p in model.named_parameters() if p is weight)
    return next(names, next((n for n, m in model.named_modules() if m is part), "head"))


def merged(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """One finding of each code and place: micro-batches repeat what they show."""
    return tuple({(f.code, f.where): f for f in findings}.values())
