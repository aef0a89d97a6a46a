"""Precision in one table: what weights are stored in, what products are computed in, and at what risk.

==============  ========  ==========  ======  =====================================================
name            weights   products    scaler  for
==============  ========  ==========  ======  =====================================================
fp32            fp32      fp32        no      any device
bf16            fp32      bf16        no      GPUs since 2020, NPUs, CPUs with AMX-BF16 or AVX512-BF16
fp16            fp32      fp16        yes     older GPUs (V100, T4); the scale is supervised
bf16-pure       bf16      bf16        no      memory; small updates are lost (warning)
fp16-emulated   fp32      fp16        yes     any CPU: what a V100 would compute (numerics/half.py)
bf16-emulated   fp32      bf16        no      any CPU: what an A100 would compute
==============  ========  ==========  ======  =====================================================

Trainable weights and Adam's state are never fp16. What was requested is what is computed: a probe checks
it (:func:`assert_actual`), since some trainers run ``fp16=True`` silently in fp32 where fp16 is missing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F

from finitune.core.codes import Code
from finitune.core.errors import UserError, raise_all
from finitune.core.messages.catalogue import text
from finitune.core.types import Finding
from finitune.numerics import codes
from finitune.numerics.half import checkpoint_contexts, emulated_half


@dataclass(frozen=True, slots=True)
class Precision:
    """One row of the table."""

    name: str
    weights: torch.dtype
    """Dtype of trainable weights; optimizer state follows it."""
    compute: torch.dtype | None = None
    """Dtype of matrix products where it is not the weights'."""
    uses_scaler: bool = False
    emulated: bool = False
    half_max: float | None = None
    """Largest finite number of the products; None for fp32."""
    warning: Code | None = None

    @property
    def products(self) -> torch.dtype:
        """Dtype of matrix products."""
        return self.compute or self.weights


_FP16_MAX = torch.finfo(torch.float16).max
_BF16_MAX = torch.finfo(torch.bfloat16).max
_WITH_FP32_WEIGHTS = partial(Precision, weights=torch.float32)
_FP16 = partial(_WITH_FP32_WEIGHTS, compute=torch.float16, uses_scaler=True, half_max=_FP16_MAX)
_BF16 = partial(_WITH_FP32_WEIGHTS, compute=torch.bfloat16, half_max=_BF16_MAX)

PRECISIONS: Mapping[str, Precision] = {
    p.name: p
    for p in (
        _WITH_FP32_WEIGHTS("fp32"),
        _BF16("bf16"),
        _FP16("fp16"),
        Precision("bf16-pure", torch.bfloat16, half_max=_BF16_MAX, warning=codes.LOST_UPDATES),
        _FP16("fp16-emulated", emulated=True),
        _BF16("bf16-emulated", emulated=True),
    )
}


@dataclass(frozen=True, slots=True)
class Choice:
    """A precision, why it was chosen (in the language in force), and what to warn of."""

    precision: Precision
    reason: str
    findings: tuple[Finding, ...] = ()


def choose(requested: str, device: torch.device) -> Choice:
    """The precision for ``requested`` ("auto" or a name of the table) on ``device``.

    Raises:
        UserError: the name is unknown (CFG200), asks for fp16 weights (CFG201), or the device cannot
            compute it (CFG202, CFG203).
    """
    if requested == "auto":
        name, reason = _automatic(device)
        return Choice(PRECISIONS[name], reason)
    precision = _named(requested)
    if precision.emulated and device.type != "cpu":
        native = precision.name.partition("-")[0]
        raise UserError(codes.EMULATION_NEEDS_CPU, "precision", requested=requested, device=str(device), native=native)
    _require_products(precision, device)
    return Choice(precision, text("precision.requested", name=requested), tuple(_warnings(precision, device)))


def _named(requested: str) -> Precision:
    if requested == "fp16-pure":
        raise UserError(codes.PURE_FP16, "precision", requested=requested)
    if requested not in PRECISIONS:
        close = get_close_matches(requested.lower(), PRECISIONS, n=1) or ["auto"]
        raise UserError(
            codes.UNKNOWN_PRECISION,
            "precision",
            requested=requested,
            known=", ".join(("auto", *PRECISIONS)),
            suggestion=close[0],
        )
    return PRECISIONS[requested]


def _require_products(precision: Precision, device: torch.device) -> None:
    if precision.emulated or precision.products == torch.float32:
        return
    try:
        torch.ones(2, 2, dtype=precision.products, device=device).matmul(
            torch.ones(2, 2, dtype=precision.products, device=device)
        )
    except (RuntimeError, TypeError, AssertionError) as error:  # the forms in which backends decline a dtype
        dtype = _short(precision.products)
        raise UserError(
            codes.DEVICE_CANNOT,
            "precision",
            requested=precision.name,
            device=str(device),
            dtype=dtype,
            problem=str(error).splitlines()[0] if str(error) else type(error).__name__,
        ) from error


# A product this many times slower than fp32 is worth a warning; timing noise is not.
_SLOW_RATIO = 2.0


def _warnings(precision: Precision, device: torch.device) -> list[Finding]:
    found = []
    if precision.warning is not None:
        found.append(precision.warning.find("precision", requested=precision.name))
    native_half = precision.products != torch.float32 and not precision.emulated
    if native_half and device.type == "cpu" and not (product_time_ratio(precision.products) <= _SLOW_RATIO):
        dtype, ratio = _short(precision.products), product_time_ratio(precision.products)
        found.append(
            codes.SLOW_HALF.find(
                "precision", dtype=dtype, ratio=ratio, device=str(device), emulated=f"{dtype}-emulated"
            )
        )
    return found


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}.get(dtype, str(dtype))


def _automatic(device: torch.device) -> tuple[str, str]:
    """(name, reason): bf16 only where the device really computes it, and fast."""
    shown = str(device)
    if device.type == "cpu":
        return _automatic_on_cpu()
    if device.type == "cuda":
        # Without the flag torch says yes to any GPU, and computes in fp32 behind the scenes.
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", text("precision.bf16.cuda", device=shown)) if native else _scaled_fp16(shown)
    says = getattr(getattr(torch, device.type, None), "is_bf16_supported", None)
    if says is None:
        return "fp32", text("precision.fp32.unproved", device=shown)
    return ("bf16", text("precision.bf16.device", device=shown)) if says() else _scaled_fp16(shown)


def _scaled_fp16(device: str) -> tuple[str, str]:
    return "fp16", text("precision.fp16.device", device=device)


def _automatic_on_cpu() -> tuple[str, str]:
    if not (_cpu_says("_is_amx_tile_supported") or _cpu_says("_is_avx512_bf16_supported")):
        return "fp32", text("precision.fp32.no_units")
    ratio = product_time_ratio(torch.bfloat16)
    if ratio <= 1.0:
        return "bf16", text("precision.bf16.cpu", ratio=ratio)
    return "fp32", text("precision.fp32.slow_units", ratio=ratio)


def _cpu_says(name: str) -> bool:
    # Private names of torch.cpu; a version without one is taken to say no.
    says: Callable[[], bool] | None = getattr(torch.cpu, name, None)
    return bool(says is not None and says())


@cache
def product_time_ratio(dtype: torch.dtype) -> float:
    """Time of a (64, 512) @ (512, 512) product in ``dtype`` over that in fp32, on the CPU; best of 5."""
    return _best_time_s(dtype) / _best_time_s(torch.float32)


def _best_time_s(dtype: torch.dtype, num_tries: int = 5) -> float:
    a, b = torch.ones(64, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    torch.mm(a, b)
    times_s = []
    for _ in range(num_tries):
        start_s = time.perf_counter()
        torch.mm(a, b)
        times_s.append(time.perf_counter() - start_s)
    return min(times_s)


def compute_context(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """The context a forward runs under; make a new one for every forward.

    Backward may run outside of it, but see :func:`checkpoint_kwargs`.
    """
    if precision.compute is None:
        return nullcontext()
    if precision.emulated:
        return emulated_half(precision.compute)
    return torch.autocast(device.type, dtype=precision.compute)


def checkpoint_kwargs(precision: Precision) -> dict[str, Any]:
    """Arguments for ``gradient_checkpointing_enable(gradient_checkpointing_kwargs=...)``.

    PyTorch restores autocast when it recomputes; an emulation must be restored by us.
    """
    if not precision.emulated or precision.compute is None:
        return {"use_reentrant": False}
    return {"use_reentrant": False, "context_fn": partial(checkpoint_contexts, precision.compute)}


# 300 * 300 tells the formats apart: inf in fp16 (> 65504), 90112 in bf16 (8 significant bits), 90000 in fp32.
_FACTOR = 300.0
_PRODUCTS: Mapping[float, str] = {float("inf"): "fp16", 90112.0: "bf16", 90000.0: "fp32"}


def assert_actual(model: torch.nn.Module | None, precision: Precision, device: torch.device) -> dict[str, Any]:
    """Check by a probe that ``precision`` is what is computed, and that trainable weights have its dtype.

    Returns a JSON-able record: requested, actual ("fp32", "fp16" or "bf16"), product (300 * 300 as
    computed, shown as text), weights (dtypes of the trainable tensors), device, emulated.

    Raises:
        UserError, UserErrors: the probe computed something else (MOD102), or a trainable tensor has
            another dtype (MOD103). Under bf16-pure fp32 is allowed too: LoRA's own weights are fp32.
    """
    product_11 = _probe(precision, device)
    product = float(product_11)
    by_value, by_dtype = _PRODUCTS.get(product, "?"), _short(product_11.dtype)
    actual = by_value if by_value == by_dtype else f"{by_value} in {by_dtype}"
    record = {
        "requested": precision.name,
        "actual": actual,
        "product": f"{product:g}",
        "weights": sorted({_short(p.dtype) for _, p in _trainable(model)}),
        "device": str(device),
        "emulated": precision.emulated,
    }
    faults = list(_wrong_weights(model, precision))
    if actual != _short(precision.products):
        shown = {k: record[k] for k in ("requested", "actual", "product", "device")}
        faults.append(UserError(codes.NOT_AS_REQUESTED, "precision", dtype=by_dtype, torch=torch.__version__, **shown))
    raise_all(faults)
    return record


def _probe(precision: Precision, device: torch.device) -> torch.Tensor:
    """[[300 * 300]] as a linear layer with this precision's weights computes it."""
    factor_11 = torch.full((1, 1), _FACTOR, dtype=precision.weights, device=device)
    with torch.no_grad(), compute_context(precision, device):
        return F.linear(factor_11, factor_11)


def _trainable(model: torch.nn.Module | None) -> list[tuple[str, torch.nn.Parameter]]:
    if model is None:
        return []
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad and p.is_floating_point()]


def _wrong_weights(model: torch.nn.Module | None, precision: Precision) -> list[UserError]:
    allowed = {precision.weights, torch.float32}
    wrong: dict[torch.dtype, list[str]] = {}
    for name, parameter in _trainable(model):
        if parameter.dtype not in allowed:
            wrong.setdefault(parameter.dtype, []).append(name)
    return [
        UserError(
            codes.WEIGHTS_NOT_AS_REQUESTED,
            names[0],
            requested=precision.name,
            dtype=_short(dtype),
            count=len(names),
            first=names[0],
            expected=_short(precision.weights),
        )
        for dtype, names in wrong.items()
    ]
