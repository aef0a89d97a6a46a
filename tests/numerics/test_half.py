"""Emulated half against native half: the same bits where fp32 sums are exact, 1 ulp at most elsewhere.

The reference is ``torch.autocast("cpu")``, that is PyTorch's own half kernels.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import CheckpointError, checkpoint

from finitune.numerics.half import checkpoint_contexts, emulated_half

HALVES = [pytest.param(torch.float16, id="fp16"), pytest.param(torch.bfloat16, id="bf16")]
Operation = Callable[..., Tensor]

# name -> (operation, shapes of its operands); every operand gets a gradient
OPERATIONS: dict[str, tuple[Operation, tuple[tuple[int, ...], ...]]] = {
    "linear": (F.linear, ((2, 5, 7), (6, 7))),
    "linear with bias": (F.linear, ((2, 5, 7), (6, 7), (6,))),
    "linear of a vector": (F.linear, ((7,), (6, 7))),
    "matmul": (torch.matmul, ((2, 3, 5, 7), (2, 3, 7, 4))),
    "matmul broadcast": (torch.matmul, ((2, 3, 5, 7), (7, 4))),
    "method": (lambda a, b: a.matmul(b), ((5, 7), (7, 4))),
    "@": (lambda a, b: a @ b, ((5, 7), (7, 4))),
    "mm": (torch.mm, ((5, 7), (7, 4))),
    "bmm": (torch.bmm, ((3, 5, 7), (3, 7, 4))),
    "addmm": (torch.addmm, ((5, 4), (5, 7), (7, 4))),
    "baddbmm": (torch.baddbmm, ((3, 5, 4), (3, 5, 7), (3, 7, 4))),
    "einsum": (partial(torch.einsum, "bij,bjk->bik"), ((3, 5, 7), (3, 7, 4))),
}


def bits(value: Tensor) -> Tensor:
    """The raw bits; every NaN counts as the same one (payloads are not specified)."""
    raw = value.view({2: torch.int16, 4: torch.int32}[value.element_size()]).clone()
    return raw.masked_fill_(value.isnan(), 0x7FFF)


def rank(value: Tensor) -> Tensor:
    """Half numbers as consecutive integers, so that a difference counts ulps (-0 and 0 are both 0)."""
    raw = value.view(torch.int16).int()
    return torch.where(raw < 0, -(raw & 0x7FFF), raw)


def run(operation: Operation, operands: list[Tensor], context: object, grad: Tensor | None = None) -> list[Tensor]:
    """The output and the gradient of every operand."""
    leaves = [v.clone().requires_grad_() for v in operands]
    with context:  # type: ignore[attr-defined]
        out = operation(*leaves)
    out.backward(torch.ones_like(out) if grad is None else grad.to(out.dtype))
    return [out.detach(), *(v.grad for v in leaves if v.grad is not None)]


def both(
    operation: Operation, operands: list[Tensor], dtype: torch.dtype, grad: Tensor | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    emulated = run(operation, operands, emulated_half(dtype), grad)
    native = run(operation, operands, torch.autocast("cpu", dtype=dtype), grad)
    return emulated, native


def integers(shape: tuple[int, ...], generator: torch.Generator, exponent: int, largest: int = 15) -> Tensor:
    """Small integers times a power of two: sums of their products are exact in fp32."""
    return torch.randint(-largest, largest + 1, shape, generator=generator).float() * 2.0**exponent


def assert_same_bits(emulated: list[Tensor], native: list[Tensor]) -> None:
    assert [v.dtype for v in emulated] == [v.dtype for v in native]
    for ours, theirs in zip(emulated, native, strict=True):
        assert torch.equal(bits(ours), bits(theirs)), (ours, theirs)


def operands_of(name: str, exponent: int, dtype: torch.dtype) -> tuple[Operation, list[Tensor], Tensor]:
    """An operation with exact operands and an exact output gradient."""
    operation, shapes = OPERATIONS[name]
    generator = torch.Generator().manual_seed(exponent & 31)
    operands = [integers(s, generator, exponent) for s in shapes]
    with torch.autocast("cpu", dtype=dtype):
        grad = integers(operation(*operands).shape, generator, 0)
    return operation, operands, grad


# exponent of the operands: ordinary; some and most fp16 products overflow; products are subnormal.
# (bf16 overflows where fp32 does, and there the order of the additions decides.)
RANGES = [*((torch.float16, e) for e in (0, 6, 7, -12)), *((torch.bfloat16, e) for e in (0, 6, -65))]


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(("dtype", "exponent"), RANGES)
def test_outputs_and_gradients_equal_native_half_bit_for_bit(name: str, dtype: torch.dtype, exponent: int) -> None:
    operation, operands, grad = operands_of(name, exponent, dtype)
    emulated, native = both(operation, operands, dtype, grad)
    if name == "linear of a vector":
        # Its weight gradient is an outer product: fp32 kernels keep the sign of the one term, native
        # ones add it to +0.
        emulated, native = [v + 0.0 for v in emulated], [v + 0.0 for v in native]
    assert emulated[0].dtype == dtype
    assert all(v.dtype == torch.float32 for v in emulated[1:]), "gradients of fp32 leaves are fp32"
    assert_same_bits(emulated, native)


def test_the_ranges_above_do_overflow_and_underflow() -> None:
    """Otherwise the test before this one would prove nothing at the edges of the range."""
    operation, operands, grad = operands_of("mm", 7, torch.float16)
    assert run(operation, operands, emulated_half(torch.float16), grad)[0].isinf().any()
    operation, operands, grad = operands_of("mm", -12, torch.float16)
    out = run(operation, operands, emulated_half(torch.float16), grad)[0]
    assert ((out != 0) & (out.abs() < torch.finfo(torch.float16).tiny)).any()


@pytest.mark.parametrize("name", sorted(OPERATIONS.keys() - {"linear of a vector"}))
def test_gradients_overflow_where_native_gradients_do(name: str) -> None:
    """As under a loss scale that is too large: the output is fine, the gradients are not."""
    operation, operands, grad = operands_of(name, 0, torch.float16)
    emulated, native = both(operation, operands, torch.float16, grad * 2.0**11)
    assert emulated[0].isfinite().all()
    assert not all(v.isfinite().all() for v in emulated[1:])
    assert_same_bits(emulated, native)


def test_bf16_overflows_by_rounding_up() -> None:
    """The largest fp32 number is finite in fp32 and inf in bf16."""
    largest = torch.tensor([[torch.finfo(torch.bfloat16).max]])
    step = torch.tensor([[1.0 + 2.0**-7]])
    assert_same_bits(*both(torch.mm, [largest / 2, step * 2], torch.bfloat16))
    assert run(torch.mm, [largest, torch.ones(1, 1)], emulated_half(torch.bfloat16))[0].isfinite().all()
    assert run(torch.mm, [largest, step], emulated_half(torch.bfloat16))[0].isinf().all()


SPECIAL = st.sampled_from(
    [0.0, -0.0, 1.0, -3.0, 65504.0, -65504.0, 2.0**-24, -(2.0**-24), math.inf, -math.inf, math.nan]
)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(SPECIAL, min_size=6, max_size=6),
    st.lists(SPECIAL, min_size=6, max_size=6),
    st.sampled_from([torch.float16, torch.bfloat16]),
)
def test_special_values_give_the_same_bits(left: list[float], right: list[float], dtype: torch.dtype) -> None:
    a, b = torch.tensor(left).reshape(2, 3), torch.tensor(right).reshape(2, 3)
    assert_same_bits(*both(F.linear, [a, b], dtype))
    assert_same_bits(*both(torch.matmul, [a, b.t().contiguous()], dtype))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_random_operands_differ_by_the_order_of_fp32_additions_only(name: str, dtype: torch.dtype) -> None:
    """At least 98 % of the bits are equal; the rest is 1 ulp, or less than the fp32 error of the two sums.

    That error is at most 2 K * 2^-24 * sum |a b| (Higham 2002, section 3.1); K, the number of terms, is
    at most 180 here.
    """
    operation, shapes = OPERATIONS[name]
    generator = torch.Generator().manual_seed(7)
    operands = [torch.randn([*s[:-2], *(6 * n for n in s[-2:])], generator=generator) for s in shapes]
    grad = torch.randn(operation(*operands).shape, generator=generator)
    emulated, native = both(operation, operands, dtype, grad)
    magnitude = run(operation, [v.double().abs() for v in operands], nullcontext(), grad.double().abs())
    for ours, theirs, size in zip(emulated, native, magnitude, strict=True):
        ours_half, theirs_half = ours.to(dtype), theirs.to(dtype)
        one_ulp = (rank(ours_half) - rank(theirs_half)).abs() <= 1
        fp32_error = (ours.double() - theirs.double()).abs() <= 2 * 180 * 2.0**-24 * size
        assert (one_ulp | fp32_error).all()
        assert (bits(ours_half) == bits(theirs_half)).float().mean() >= 0.98


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_native_attention_but_for_the_rounding_of_probabilities(dtype: torch.dtype, causal: bool) -> None:
    """Native rounds probabilities (0..1) to half before they meet V: one more relative error of 1/2 ulp a term."""
    generator = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(2, 3, 16, 8, generator=generator) for _ in range(3))
    attend = partial(F.scaled_dot_product_attention, is_causal=causal)
    emulated, native = both(attend, [query, key, value], dtype)
    assert emulated[0].dtype == native[0].dtype == dtype
    for ours, theirs in zip(emulated, native, strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32])
def test_attention_masks_work_in_both_forms(mask_dtype: torch.dtype) -> None:
    query = torch.eye(4).reshape(1, 1, 4, 4)
    allowed = torch.ones(4, 4).tril().bool().reshape(1, 1, 4, 4)
    mask = allowed if mask_dtype == torch.bool else torch.zeros(1, 1, 4, 4).masked_fill(~allowed, -3.4e38)
    with emulated_half(torch.float16):
        masked = F.scaled_dot_product_attention(query, query, query, attn_mask=mask)
        causal = F.scaled_dot_product_attention(query, query, query, is_causal=True)
    torch.testing.assert_close(masked, causal, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", HALVES)
def test_emulation_is_not_plain_fp32(dtype: torch.dtype) -> None:
    """The tests above would pass an emulation of nothing, were native half itself not different from fp32."""
    x, weight = torch.tensor([[1.0 + 2.0**-20]]), torch.tensor([[1.0]])
    with emulated_half(dtype):
        assert F.linear(x, weight).item() == 1.0
    assert F.linear(x, weight).item() != 1.0


def test_half_of_another_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="not a half dtype"):
        emulated_half(torch.float32)


def test_autocast_disabled_regions_stay_in_fp32() -> None:
    """Transformers computes RoPE angles so: position 2049 does not exist in fp16."""
    positions, frequency = torch.tensor([[2049.0]]), torch.tensor([[1.0]])
    with emulated_half(torch.float16):
        with torch.autocast("cpu", enabled=False):
            inside = positions @ frequency
        outside = positions @ frequency
    assert inside.dtype == torch.float32
    assert inside.item() == 2049.0
    assert outside.item() == 2048.0


def test_a_nested_autocast_of_another_dtype_has_its_way() -> None:
    a = torch.full((2, 2), 300.0)
    with emulated_half(torch.float16), torch.autocast("cpu", dtype=torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16


def test_the_inner_of_two_emulations_wins_and_both_are_left() -> None:
    a = torch.full((1, 1), 300.0)
    with emulated_half(torch.bfloat16):
        with emulated_half(torch.float16):
            assert (a @ a).isinf().all()
        assert (a @ a).dtype == torch.bfloat16
    assert (a @ a).item() == 90000.0
    assert not torch.is_autocast_enabled("cpu")


def test_an_exception_leaves_no_emulation_behind() -> None:
    with pytest.raises(RuntimeError), emulated_half(torch.float16):
        torch.mm(torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(RuntimeError), emulated_half(torch.float16):
        torch.matmul(torch.ones(2, 3, requires_grad=True), torch.ones(2, 3)).sum()
    assert torch.mm(torch.ones(1, 1), torch.ones(1, 1)).dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")


def test_other_threads_are_left_alone() -> None:
    seen: list[torch.dtype] = []
    a = torch.ones(1, 1)
    with emulated_half(torch.float16):
        thread = threading.Thread(target=lambda: seen.append((a @ a).dtype))
        thread.start()
        thread.join()
    assert seen == [torch.float32]


def test_dtypes_that_autocast_leaves_alone_are_left_alone() -> None:
    with emulated_half(torch.float16):
        assert torch.mm(torch.ones(1, 1).double(), torch.ones(1, 1).double()).dtype == torch.float64
        assert torch.mm(torch.ones(1, 1).long(), torch.ones(1, 1).long()).dtype == torch.int64
        assert F.linear(torch.ones(1, 1).double(), torch.ones(1, 1).double()).dtype == torch.float64


def test_what_has_no_emulation_runs_in_native_half() -> None:
    """Three operands would need rounding between the products; multi-head attention multiplies inside."""
    a = torch.full((2, 2), 300.0)
    attention = torch.nn.MultiheadAttention(4, 2)
    x = torch.ones(3, 1, 4)
    with emulated_half(torch.float16):
        assert torch.einsum("ij,jk,kl->il", a, a, a).isinf().all()
        assert attention(x, x, x)[0].dtype == torch.float16


def test_gpu_autocast_fp32_operations_are_widened() -> None:
    half = torch.ones(2, 4, dtype=torch.float16)
    with emulated_half(torch.float16):
        assert F.softmax(half, dim=-1).dtype == torch.float32
        assert F.layer_norm(half, (4,)).dtype == torch.float32
        assert F.cross_entropy(half, torch.tensor([0, 1])).dtype == torch.float32


def test_a_changed_weight_is_rounded_anew_within_one_context() -> None:
    """An optimizer step between two forwards must be seen; so must a restored snapshot."""
    layer = torch.nn.Linear(2, 1, bias=False)
    x = torch.ones(1, 2)
    with emulated_half(torch.float16):
        torch.nn.init.constant_(layer.weight, 1.0)
        assert layer(x).item() == 2.0
        with torch.no_grad():
            torch._foreach_copy_([layer.weight], [torch.full((1, 2), 3.0)])
        assert layer(x).item() == 6.0
        x.mul_(2.0)
        assert layer(x).item() == 12.0


def test_micro_batches_in_one_context_accumulate_as_in_two() -> None:
    def gradient(contexts: int) -> Tensor:
        torch.manual_seed(0)
        layer = torch.nn.Linear(5, 3)
        for _ in range(contexts):
            with emulated_half(torch.float16):
                for _ in range(2 // contexts):
                    layer(torch.randn(4, 5)).float().square().mean().backward()
        assert layer.weight.grad is not None
        return layer.weight.grad

    assert torch.equal(gradient(1), gradient(2))


def test_backward_gives_the_same_bits_inside_and_outside_of_the_context() -> None:
    def gradient(inside: bool) -> Tensor:
        weight = torch.linspace(-1, 1, 12).reshape(3, 4).requires_grad_()
        with emulated_half(torch.float16):
            out = (F.linear(torch.ones(2, 4), weight) @ torch.ones(3, 2)).sum()
            if inside:
                out.backward()
        if not inside:
            out.backward()
        assert weight.grad is not None
        return weight.grad

    assert torch.equal(gradient(True), gradient(False))


def test_a_frozen_weight_passes_gradients_on_and_gets_none() -> None:
    layer = torch.nn.Linear(4, 3).requires_grad_(False)
    x = torch.ones(2, 4, requires_grad=True)
    with emulated_half(torch.float16):
        layer(x).float().sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is None


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_generation_then_training_in_one_context(context: Callable[[], object]) -> None:
    """A weight rounded while generating is good for a later backward."""
    layer = torch.nn.Linear(4, 3)
    x = torch.ones(2, 4)
    with emulated_half(torch.float16):
        with context():  # type: ignore[attr-defined]
            layer(x)
        layer(x).float().sum().backward()
    assert layer.weight.grad is not None


def checkpointed(context_fn: Callable[[], object] | None) -> list[Tensor]:
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
    x = torch.randn(3, 4, requires_grad=True)
    with emulated_half(torch.float16):
        if context_fn is None:
            out = checkpoint(layer, x, use_reentrant=False)
        else:
            out = checkpoint(layer, x, use_reentrant=False, context_fn=context_fn)
    out.float().square().sum().backward()
    return [out.detach(), *(p.grad for p in layer.parameters() if p.grad is not None)]


def test_checkpointing_recomputes_in_emulated_half() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
    x = torch.randn(3, 4, requires_grad=True)
    with emulated_half(torch.float16):
        out = layer(x)
    out.float().square().sum().backward()
    plain = [out.detach(), *(p.grad for p in layer.parameters() if p.grad is not None)]
    recomputed = checkpointed(partial(checkpoint_contexts, torch.float16))
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


def test_a_forgotten_checkpoint_context_is_an_error_not_a_silent_difference() -> None:
    with pytest.raises(CheckpointError):
        checkpointed(None)


def test_a_loss_scaler_skips_the_step_that_overflows() -> None:
    layer = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(layer.weight, 1.0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**17)
    with emulated_half(torch.float16):
        loss = layer(torch.ones(1, 1)).float().sum()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert layer.weight.item() == 1.0
    assert scaler.get_scale() == 2.0**16
