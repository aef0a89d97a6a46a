"""Emulated half: what fp16 or bf16 mixed precision computes, at about the price of fp32.

A CPU without half-precision matrix units multiplies half matrices 16-20 times slower than fp32. What
makes half *half* is not the multiplier, though: tensor cores and every CPU kernel multiply half numbers
exactly and accumulate in fp32. So the same result comes from rounding the inputs to half, running the
fp32 operation, and rounding its output to half. Overflow (to inf at 65520 and above in fp16), NaN, -0
and subnormals come from the rounding, hence at the same operations as in native half.

What is the same, and what is not:

- Where fp32 accumulation is exact, outputs and gradients equal native half bit for bit. Elsewhere the
  order of the fp32 additions differs, as it does between any two GPUs: at most 1 ulp plus the fp32
  rounding error of the sum, and rarely. (In an outer product the sign of a zero may differ.)
- bf16 has the range of fp32: a sum that overflows in fp32 already may do so at another of its terms.
- Attention keeps its inside (scores, softmax, probabilities) in fp32, like flash attention does for the
  scores; flash attention also rounds the probabilities (0..1) to half. No range is lost either way.
- A weight used twice inside one forward has its two gradients added in fp32; autocast's weight cache
  adds them in half.

Semantics are those of ``torch.autocast``: weights stay fp32 and are rounded per use, outputs are real half
tensors, gradients pass through the same rounding, ``torch.autocast(enabled=False)`` regions (RoPE in
transformers) stay fp32, and an operation without an emulation here runs in native half: slow but true. Under
``finitune.numerics.compute.computed_in`` an emulation computes in plain fp32 or in emulated bf16 instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from finitune.numerics import compute

HALF_DTYPES = (torch.float16, torch.bfloat16)

_ELIGIBLE = (torch.float32, *HALF_DTYPES)


class _Plain:
    """Run the body as plain fp32 PyTorch: no function mode, no CPU autocast."""

    __slots__ = ("_autocast", "_disabled")

    def __enter__(self) -> None:
        self._autocast = torch.is_autocast_enabled("cpu")
        torch.set_autocast_enabled("cpu", False)
        self._disabled = torch._C.DisableTorchFunction()
        self._disabled.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._disabled.__exit__(kind, error, trace)
        torch.set_autocast_enabled("cpu", self._autocast)


class _Linear(torch.autograd.Function):
    """``x @ weight.T + bias`` in emulated half.

    The rounded input and weight come from outside, because they are shared: the weight by forward and
    backward, the input by the projections that read it (q, k, v; gate, up). Rounding twice would double
    the overhead.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, x32: Tensor, weight32: Tensor, dtype: torch.dtype
    ) -> Tensor:
        need_x, need_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x32 if need_weight else None, weight32 if need_x else None)
        ctx.dtypes = (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        bias32 = None if bias is None else _round(bias, dtype)
        return F.linear(x32, weight32, bias32).to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients from half operands, each rounded to half, then widened to its input's dtype."""
        x32, weight32 = ctx.saved_tensors
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        grad_x = grad_weight = grad_bias = None
        with _Plain():
            grad32 = grad.float()
            rows32 = grad32.reshape(-1, grad32.shape[-1])
            if ctx.needs_input_grad[0]:
                grad_x = torch.matmul(grad32, weight32).to(grad.dtype).to(x_dtype)
            if ctx.needs_input_grad[1]:
                columns32 = x32.reshape(-1, x32.shape[-1])
                grad_weight = torch.mm(rows32.t(), columns32).to(grad.dtype).to(weight_dtype)
            if ctx.needs_input_grad[2]:
                grad_bias = rows32.sum(0).to(grad.dtype).to(bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None, None


def _round(value: Tensor, dtype: torch.dtype) -> Tensor:
    """``value`` rounded to half, as fp32."""
    return value.to(dtype).float()


def _eligible(values: Any) -> bool:
    """True if every tensor in ``values`` is a CPU tensor that autocast would cast."""
    return all(v.is_cpu and v.dtype in _ELIGIBLE for v in values if isinstance(v, Tensor))


@dataclass(frozen=True, slots=True)
class _Rounded:
    """A tensor, the version it had, and its rounded value. It holds the tensor, so an id is not reused."""

    source: Tensor
    version: int
    value32: Tensor

    @classmethod
    def of(cls, source: Tensor, dtype: torch.dtype) -> _Rounded:
        if not torch.is_inference_mode_enabled():
            return cls(source, source._version, _round(source.detach(), dtype))
        with torch.inference_mode(False):  # what is made in inference mode could not be saved for a backward
            return cls(source, source._version, _round(source.detach(), dtype))

    def is_of(self, other: Tensor) -> bool:
        """True if ``other`` is that tensor, unchanged since (its version counter says so)."""
        return self.source is other and self.version == other._version


class EmulatedHalf(TorchFunctionMode):
    """The function mode behind :func:`emulated_half`; enter it anew for every forward."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        if dtype not in HALF_DTYPES:
            raise ValueError(f"{dtype} is not a half dtype (torch.float16 or torch.bfloat16)")
        self.dtype = dtype
        self.half = dtype
        """What is computed in at this moment: another one than ``dtype`` under ``compute.computed_in``."""
        self._autocast = compute.EmulatedRegion("cpu", dtype=dtype)
        self._weights: dict[int, _Rounded] = {}
        self._input: _Rounded | None = None

    def __enter__(self) -> EmulatedHalf:
        self._autocast.__enter__()
        super().__enter__()
        compute.emulation_entered(+1)
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        compute.emulation_entered(-1)
        super().__exit__(kind, error, trace)
        self._autocast.__exit__(kind, error, trace)
        self._forget()

    def _forget(self) -> None:
        self._weights.clear()
        self._input = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Emulate the operations of the tables below; hand everything else on."""
        kwargs = kwargs or {}
        emulate = _EMULATED.get(func)
        if emulate is None or not self._in_force():
            return func(*args, **kwargs)
        return emulate(self, func, args, kwargs)

    def _in_force(self) -> bool:
        # False inside autocast(enabled=False), and inside an autocast to another dtype.
        half = compute.replaced(self.dtype)
        if half is None or not torch.is_autocast_enabled("cpu") or torch.get_autocast_dtype("cpu") != half:
            return False
        if half != self.half:
            self._forget()
            self.half = half
        return True

    def rounded_weight(self, weight: Tensor) -> Tensor:
        """``weight`` rounded to half, as fp32, outside the graph; a parameter is rounded once per context."""
        if not isinstance(weight, torch.nn.Parameter) or weight.is_inference():
            return _round(weight.detach(), self.half)
        held = self._weights.get(id(weight))
        if held is None or not held.is_of(weight):
            held = self._weights[id(weight)] = _Rounded.of(weight, self.half)
        return held.value32

    def rounded_input(self, x: Tensor) -> Tensor:
        """``x`` rounded to half, as fp32, outside the graph; the last one is kept for its next reader."""
        if x.is_inference():
            return _round(x.detach(), self.half)
        if self._input is None or not self._input.is_of(x):
            self._input = _Rounded.of(x, self.half)
        return self._input.value32


def _linear(mode: EmulatedHalf, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    x, weight, bias = _linear_arguments(*args, **kwargs)
    if not _eligible((x, weight, bias)) or weight.dim() != 2:
        return func(*args, **kwargs)
    with _Plain():
        x32, weight32 = mode.rounded_input(x), mode.rounded_weight(weight)
        return _Linear.apply(x, weight, bias, x32, weight32, mode.half)


def _linear_arguments(
    input: Tensor,  # noqa: A002 (the names are those of F.linear, for calls by keyword)
    weight: Tensor,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias


def _composed(mode: EmulatedHalf, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Any operation, through casts that autograd sees: the gradients are rounded by the casts' backward."""
    # A boolean mask (attention) is passed on as it is.
    floats = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dtype != torch.bool]
    if not _eligible(floats) or kwargs.get("out") is not None:
        return func(*args, **kwargs)

    def half(value: Any) -> Any:
        cast = isinstance(value, Tensor) and value.dtype != torch.bool
        return _round(value, mode.half) if cast else value

    with _Plain():
        return func(*map(half, args), **{k: half(v) for k, v in kwargs.items()}).to(mode.half)


def _einsum(mode: EmulatedHalf, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    # More than two operands would need rounding between the products: left to native half.
    operands = args[1] if len(args) == 2 and isinstance(args[1], list | tuple) else args[1:]
    if len(operands) != 2:
        return func(*args, **kwargs)
    return _composed(mode, func, (args[0], *operands), kwargs)


def _widened(_: EmulatedHalf, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """An operation that GPU autocast runs in fp32; CPU autocast would leave it in half."""

    def wide(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.dtype in HALF_DTYPES else value

    return func(*map(wide, args), **{k: wide(v) for k, v in kwargs.items()})


_Emulation = Callable[[EmulatedHalf, Callable[..., Any], tuple[Any, ...], Mapping[str, Any]], Any]

# The GEMM-like part of autocast's half list (pytorch: docs/source/amp.md, "Ops that can autocast to float16").
_HALF: Mapping[Any, _Emulation] = {
    F.linear: _linear,
    torch.einsum: _einsum,
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__), _composed),
    **dict.fromkeys((torch.mm, Tensor.mm, torch.bmm, Tensor.bmm), _composed),
    **dict.fromkeys((torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm), _composed),
    F.scaled_dot_product_attention: _composed,
}
# What a language model meets of its fp32 list (same page, "Ops that can autocast to float32").
_FLOAT: Mapping[Any, _Emulation] = dict.fromkeys(
    (
        *(F.softmax, torch.softmax, Tensor.softmax, F.log_softmax, torch.log_softmax, Tensor.log_softmax),
        *(F.layer_norm, F.group_norm, F.cross_entropy, F.nll_loss, torch.logsumexp, Tensor.logsumexp),
    ),
    _widened,
)
_EMULATED: Mapping[Any, _Emulation] = {**_HALF, **_FLOAT}


def emulated_half(dtype: torch.dtype) -> EmulatedHalf:
    """A context manager for one forward in emulated half ``dtype`` (float16 or bfloat16), on the CPU.

    Backward may run inside or outside of it, except under activation checkpointing: the recomputation
    must be emulated too, so give :func:`checkpoint_contexts` to the checkpoint as its ``context_fn`` (or
    run backward inside). Extra memory: one fp32 copy of the weights from forward to backward.

    Raises:
        ValueError: ``dtype`` is not a half dtype.
    """
    return EmulatedHalf(dtype)


def checkpoint_contexts(dtype: torch.dtype) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """``context_fn`` for ``torch.utils.checkpoint`` (non-reentrant): recompute in emulated half as well."""
    return nullcontext(), emulated_half(dtype)
