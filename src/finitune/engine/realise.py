"""How conditions come into force on any model: what both ports share.

A :class:`Realiser` changes how a model computes (precision, islands in fp32, plain attention) and the optimizer's eps;
the functions below it give the numbers that a port uses itself (learning rate, clipping, padding). Everything that is
changed is remembered, and taken back bit for bit when the conditions are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from finitune.core import registry
from finitune.engine.conditions import AS_CONFIGURED, Conditions, NotPossible
from finitune.engine.islands import Island, Visit, abandon, check_island, mapped
from finitune.engine.widen import widen_batch
from finitune.numerics.casting import CastWeights
from finitune.numerics.compute import PRECISIONS, Seen, autocast_regions, computed_in, restore_autocast

__all__ = ["Realiser", "clip_norm", "learning_rate", "widen_batch"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Where transformers' models (5.x) keep the name that each attention layer looks up at every call.
_DISPATCH = "_attn_implementation_internal"
_MASK_DIMENSIONS = 4


class Realiser:
    """Brings conditions into force on one model and its optimizer; final, one for each port."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        self.model, self.optimizer = model, optimizer
        self.conditions = AS_CONFIGURED
        """The conditions in force."""
        self.seen = Seen()
        """Half-precision regions that the run itself has entered so far, whatever the conditions made of them."""
        self._weights = CastWeights(model, optimizer)
        self._islands: dict[str, Island] = {}
        self._visits: list[Visit] = []
        self._eps: list[dict[str, float]] | None = None
        """The configured eps of each parameter group while another one is in force."""

    def adopt(self, conditions: Conditions) -> None:
        """Bring conditions into force from the next :meth:`forward` on; call it between computations only.

        In a model whose weights are half, ``precision`` casts weights and moments for as long as it holds (and drops
        gradients); taken back without an update in between, weights have the very bits and storage of before. Has no
        effect where nothing is half.

        Raises:
            NotPossible: an unknown module, precision or attention, a device without bf16, no eps to change,
                no memory for cast weights. Nothing is changed then.
        """
        self._check(conditions)
        if conditions.precision != self.conditions.precision:
            self._cast(_DTYPES.get(conditions.precision or ""))
        self._set_islands(conditions.fp32_modules)
        self._set_eps(conditions.adam_eps)
        self.conditions = conditions

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Enter it around each forward **and** its backward: recomputation in backward must find the same conditions.

        Yields nothing; what the run entered is in :attr:`seen` afterwards. Leaves nothing behind, also on an exception.
        """
        with ExitStack() as stack:
            regions = autocast_regions()
            now = stack.enter_context(computed_in(self.conditions.precision))
            stack.callback(lambda: self.seen.names.update(now.names))
            stack.callback(self._abandon, regions)
            if self.conditions != AS_CONFIGURED and _is_compiled(self.model):
                # Compiled code would go on with the hooks and regions that it was compiled with.
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            if self.conditions.attention == "math":
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
                stack.enter_context(_eager(self.model))
            if self.conditions.attention == "sdpa":
                stack.enter_context(_dispatching(self.model, "sdpa"))
            yield

    def close(self) -> None:
        """Take all conditions back and remove every hook."""
        self.adopt(AS_CONFIGURED)

    def _abandon(self, regions: Mapping[str, tuple[bool, torch.dtype]]) -> None:
        # What was left too late has restored the state of a region that is gone by now.
        if abandon(self._visits):
            restore_autocast(regions)

    # -- checks: all of them before anything is changed --------------------------------------------------------

    def _check(self, conditions: Conditions) -> None:
        if conditions.precision is not None and conditions.precision not in PRECISIONS:
            raise NotPossible(f"precision {conditions.precision!r} is neither {' nor '.join(PRECISIONS)}")
        if conditions.attention not in (None, "math", "sdpa"):
            raise NotPossible(f'attention {conditions.attention!r} is not known; there are "math" and "sdpa"')
        if conditions.attention == "sdpa" and not _dispatchers(self.model):
            raise NotPossible("the attention of this model is not chosen by its configuration")
        if conditions.precision == "bf16" and conditions.precision != self.conditions.precision:
            for device in {p.device for p in self.model.parameters()}:
                _check_bf16(device)
        if conditions.adam_eps is not None:
            self._check_eps(conditions.adam_eps)
        modules = self._modules()
        for name in conditions.fp32_modules:
            if name not in modules:
                raise NotPossible(f"the model has no module named {name!r}")
            check_island(name, modules[name])

    def _modules(self) -> dict[str, nn.Module]:
        return dict(self.model.named_modules(remove_duplicate=False))

    def _check_eps(self, eps: float) -> None:
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        if not any(isinstance(group.get("eps"), int | float) for group in groups):
            raise NotPossible("the optimizer has no eps")
        if not (math.isfinite(eps) and eps > 0):
            raise NotPossible(f"an eps of {eps} is not a positive number")

    # -- changes ----------------------------------------------------------------------------------------------

    def _cast(self, dtype: torch.dtype | None) -> None:
        try:
            self._weights.to(dtype)
        except torch.OutOfMemoryError as error:
            raise NotPossible(f"no memory for the weights in {dtype}: {error}") from error

    def _set_islands(self, names: tuple[str, ...]) -> None:
        """Islands that stand already stay as they are."""
        modules = self._modules()
        for name in self._islands.keys() - set(names):
            self._islands.pop(name).close()
        for name in names:
            if name not in self._islands:
                self._islands[name] = Island(modules[name], self._visits)

    def _set_eps(self, eps: float | None) -> None:
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        if self._eps is not None:
            for group, configured in zip(groups, self._eps, strict=False):
                group.update(configured)
            self._eps = None
        if eps is not None:
            # A group without an eps, or with a pair of them (Adafactor), has nothing to change and nothing to restore.
            self._eps = [{"eps": group["eps"]} if isinstance(group.get("eps"), int | float) else {} for group in groups]
            for group, configured in zip(groups, self._eps, strict=True):
                group.update(dict.fromkeys(configured, eps))


def _is_compiled(model: nn.Module) -> bool:
    """``torch.compile(model)`` or ``model.compile()`` was called, for all or a part of it."""
    return any(m._compiled_call_impl is not None or type(m).__name__ == "OptimizedModule" for m in model.modules())


def _check_bf16(device: torch.device) -> None:
    """Raise NotPossible where ``device`` cannot multiply in bf16."""
    if device.type == "meta":
        return
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise NotPossible(f"{torch.cuda.get_device_name(device)} has no bf16")
    try:
        one = torch.ones(1, 1, dtype=torch.bfloat16, device=device)
        torch.mm(one, one)
    except (RuntimeError, TypeError) as error:
        raise NotPossible(f"{device} has no bf16: {error}") from error


# -- plain attention -------------------------------------------------------------------------------------------


@contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """Inside, models of transformers use their "eager" attention; nothing happens to other models.

    Each of their attention layers looks the name up in its config at every call, and the mask is made after the name
    at every forward. A ready 4-D boolean mask would be added to the scores as 0 and 1, hence the hooks.
    """
    handles = [m.register_forward_pre_hook(_additive_masks, with_kwargs=True) for m in _dispatchers(model)]
    try:
        with _dispatching(model, "eager"):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _dispatchers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if hasattr(getattr(m, "config", None), _DISPATCH)]


@contextmanager
def _dispatching(model: nn.Module, attention: str) -> Iterator[None]:
    """Inside, models of transformers use the attention of that name; nothing happens to other models."""
    configs = list({id(c): c for m in _dispatchers(model) for c in _with_nested(m.config)}.values())
    names = [getattr(c, _DISPATCH) for c in configs]
    try:
        for config in configs:
            setattr(config, _DISPATCH, attention)
        yield
    finally:
        for config, name in zip(configs, names, strict=True):
            setattr(config, _DISPATCH, name)


def _with_nested(config: Any) -> Iterator[Any]:
    """A config, and those of its parts (``text_config`` and the like)."""
    yield config
    for key in getattr(config, "sub_configs", ()):
        part = getattr(config, key, None)
        if hasattr(part, _DISPATCH):
            yield from _with_nested(part)


def _additive_masks(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    floats = (p.dtype for p in module.parameters() if p.is_floating_point())
    dtype = next(floats, torch.float32)

    def additive(value: Tensor) -> Tensor:
        if value.dtype != torch.bool or value.dim() != _MASK_DIMENSIONS:
            return value
        zero = torch.zeros((), dtype=dtype, device=value.device)
        return torch.where(value, zero, torch.finfo(dtype).min)

    masks = {k: mapped(additive, v) for k, v in kwargs.items() if k.endswith("attention_mask")}
    return tuple(additive(a) if isinstance(a, Tensor) else a for a in args), {**kwargs, **masks}


# -- numbers that ports use themselves -------------------------------------------------------------------------


def learning_rate(scheduled: float, updates: int, conditions: Conditions, first: float | None = None) -> float:
    """The rate of the next update under ``conditions``.

    Args:
        scheduled: what the schedule says, at ``updates`` committed steps.
        updates: committed steps so far.
        first: what it says for the first parameter group, by which ``max_lr`` goes; None: it is that group.
        conditions: ``max_lr``, ``lr_factor``, and a re-warm-up over ``warmup_steps`` updates from
            ``warmup_from_update`` on. It rises like the warm-up of a schedule, (k + 1) / (warmup + 1) at its k-th
            update: the first one trains.
    """
    most, first = conditions.max_lr, scheduled if first is None else first
    if most is not None and not first <= most:  # a schedule that divides by 0 gives NaN
        scheduled = scheduled * (most / first) if math.isfinite(first) and scheduled != first else most
    rate = scheduled * conditions.lr_factor
    if conditions.warmup_from_update is None:
        return rate
    done = updates - conditions.warmup_from_update
    if not 0 <= done < conditions.warmup_steps:
        return rate
    return rate * (done + 1) / (conditions.warmup_steps + 1)


def check_clipper(conditions: Conditions) -> None:
    """Raise NotPossible where the clipper is none."""
    if conditions.clipper is None:
        return
    try:
        registry.load("clippers", conditions.clipper)
    except registry.UnknownMember as error:
        raise NotPossible(str(error)) from error


def clip_norm(configured: float | None, conditions: Conditions) -> float | None:
    """The gradient norm to clip to: the tighter of both; None or 0 stand for no clipping.

    Raises:
        ValueError: a limit that is negative or NaN.
    """
    limits = [limit for limit in (configured, conditions.max_grad_norm) if limit is not None and limit != 0]
    for limit in limits:
        if not limit > 0:
            raise ValueError(f"cannot clip to a gradient norm of {limit}")
    return min(limits, default=None)
