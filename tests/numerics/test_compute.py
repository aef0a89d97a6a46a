"""The precision of products is overridden inside the context, in this thread, and nowhere else."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from finitune.numerics.compute import computed_in, replaced, seen_autocast
from finitune.numerics.half import checkpoint_contexts, emulated_half

A = torch.full((2, 2), 300.0)
# 2 * 300 * 300: inf in fp16, 180224 in bf16, 180000 in fp32
PRODUCTS = {
    "fp16": (torch.float16, float("inf")),
    "bf16": (torch.bfloat16, 180224.0),
    "fp32": (torch.float32, 180000.0),
}


def precision_of(out: Tensor) -> str:
    return next(name for name, (dtype, value) in PRODUCTS.items() if out.dtype == dtype and out[0, 0].item() == value)


def regions() -> list[object]:
    return [torch.autocast("cpu", dtype=torch.float16), emulated_half(torch.float16)]


@pytest.mark.parametrize("kind", [0, 1], ids=["native", "emulated"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", None])
def test_a_region_computes_in_the_precision_asked_for(kind: int, precision: str | None) -> None:
    with computed_in(precision), regions()[kind]:  # type: ignore[attr-defined]
        assert precision_of(A @ A) == (precision or "fp16")
    with regions()[kind]:  # type: ignore[attr-defined]
        assert precision_of(A @ A) == "fp16"


@pytest.mark.parametrize("kind", [0, 1], ids=["native", "emulated"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_region_entered_before_is_changed_and_restored(kind: int, precision: str) -> None:
    with regions()[kind]:  # type: ignore[attr-defined]
        with computed_in(precision):
            assert precision_of(A @ A) == precision
        assert precision_of(A @ A) == "fp16"
    assert not torch.is_autocast_enabled("cpu")


def test_a_region_object_made_before_and_used_again_is_itself_again() -> None:
    region = torch.autocast("cpu", dtype=torch.float16)
    decorated = region(lambda: A @ A)
    for precision in ("fp32", "bf16"):
        with computed_in(precision):
            assert precision_of(decorated()) == precision
        assert precision_of(decorated()) == "fp16"


def test_every_device_type_is_overridden() -> None:
    for device in ("cuda", "mps", "xpu"):
        was = torch.is_autocast_enabled(device)
        torch.set_autocast_enabled(device, True)
        torch.set_autocast_dtype(device, torch.float16)
        try:
            with computed_in("fp32"):
                assert not torch.is_autocast_enabled(device)
            with computed_in("bf16"):
                assert torch.get_autocast_dtype(device) == torch.bfloat16
            assert (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) == (True, torch.float16)
        finally:
            torch.set_autocast_enabled(device, was)


def test_disabled_regions_stay_disabled() -> None:
    with computed_in("bf16"), torch.autocast("cpu", dtype=torch.float16):
        with torch.autocast("cpu", enabled=False):
            assert precision_of(A @ A) == "fp32"
        assert precision_of(A @ A) == "bf16"


def test_the_innermost_precision_holds_and_none_takes_over() -> None:
    with computed_in("bf16"):
        with computed_in("fp32"), torch.autocast("cpu", dtype=torch.float16):
            assert precision_of(A @ A) == "fp32"
        with computed_in(None), emulated_half(torch.float16):
            assert precision_of(A @ A) == "bf16"
        with torch.autocast("cpu", dtype=torch.float16):
            assert precision_of(A @ A) == "bf16"


def test_a_weight_cast_before_is_not_taken_from_the_cache() -> None:
    """Autocast's cache of cast weights does not look at the dtype it is asked for."""
    layer = nn.Linear(2, 2)
    with torch.autocast("cpu", dtype=torch.float16):
        layer(A)
        with computed_in("bf16"):
            assert layer(A).dtype == torch.bfloat16
        assert layer(A).dtype == torch.float16


def test_everything_is_restored_after_an_exception() -> None:
    original = torch.autocast.__enter__
    with pytest.raises(ZeroDivisionError), computed_in("fp32"), torch.autocast("cpu", dtype=torch.float16):
        raise ZeroDivisionError
    assert torch.autocast.__enter__ is original
    assert replaced(torch.float16) == torch.float16
    assert not torch.is_autocast_enabled("cpu")


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="fp32 or bf16, not in 'fp8'"), computed_in("fp8"):
        pass


def test_other_threads_are_left_alone() -> None:
    found: list[str] = []

    def work() -> None:
        with torch.autocast("cpu", dtype=torch.float16):
            found.append(precision_of(A @ A))
        with computed_in("bf16"), torch.autocast("cpu", dtype=torch.float16):
            found.append(precision_of(A @ A))

    with computed_in("fp32"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        with torch.autocast("cpu", dtype=torch.float16):
            found.append(precision_of(A @ A))
    assert found == ["fp16", "bf16", "fp32"]


def test_what_was_seen_is_told_by_name() -> None:
    with computed_in(None) as nothing:
        A @ A
    with computed_in("fp32") as native, torch.autocast("cpu", dtype=torch.float16):
        pass
    with computed_in(None) as emulated, emulated_half(torch.bfloat16):
        assert seen_autocast() == {"bf16-emulated"}
    with computed_in(None) as off, torch.autocast("cpu", enabled=False):
        pass
    assert (nothing.half, nothing.emulated) == (None, False)
    assert (native.names, native.half, native.emulated) == ({"fp16"}, "fp16", False)
    assert (emulated.half, emulated.emulated) == ("bf16", True)
    assert off.half is None
    assert seen_autocast() == frozenset()


@pytest.mark.parametrize("kind", [0, 1], ids=["native", "emulated"])
def test_a_region_around_is_seen_and_inner_contexts_tell_outer_ones(kind: int) -> None:
    with regions()[kind], computed_in("bf16") as seen:  # type: ignore[attr-defined]
        pass
    assert seen.names == {["fp16", "fp16-emulated"][kind]}
    with computed_in("bf16") as outer, computed_in("fp32"), regions()[kind]:  # type: ignore[attr-defined]
        pass
    assert outer.names == seen.names


class _Deep(torch.autograd.Function):
    """Its backward runs a backward inside, so deep that autograd goes on in a thread of its own."""

    @staticmethod
    def forward(ctx, x: Tensor, depth: int, found: list) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.depth, ctx.found = depth, found
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        with torch.autocast("cpu", dtype=torch.float16):
            ctx.found.append((threading.get_ident(), precision_of(A @ A)))
        if ctx.depth:
            with torch.enable_grad():
                _Deep.apply(torch.ones(1, requires_grad=True), ctx.depth - 1, ctx.found).backward()
        return grad, None, None


def test_threads_of_autograd_compute_as_the_thread_that_called_backward() -> None:
    found: list[tuple[int, str]] = []
    with computed_in("bf16"):
        _Deep.apply(torch.ones(1, requires_grad=True), 70, found).backward()
    assert len({ident for ident, _ in found}) > 1
    assert {precision for _, precision in found} == {"bf16"}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", [0, 1], ids=["native", "emulated"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpointing_recomputes_in_the_same_precision(kind: int, precision: str, reentrant: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
    x = torch.randn(3, 4, requires_grad=True)

    def gradients(checkpointed: bool) -> list[Tensor]:
        layer.zero_grad()
        with computed_in(precision) as seen:
            with regions()[kind]:  # type: ignore[attr-defined]
                out = run(layer, x) if checkpointed else layer(x)
            out.float().square().sum().backward()
        assert seen.half == "fp16"
        assert len(seen.names) == 1
        return [p.grad.clone() for p in layer.parameters() if p.grad is not None]

    def run(layer: nn.Module, x: Tensor) -> Tensor:
        if reentrant:
            return checkpoint(layer, x, use_reentrant=True)
        if kind:
            return checkpoint(layer, x, use_reentrant=False, context_fn=lambda: checkpoint_contexts(torch.float16))
        return checkpoint(layer, x, use_reentrant=False)

    if reentrant and kind:
        pytest.skip("emulation has no reentrant form")
    plain, recomputed = gradients(False), gradients(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


def test_emulated_bf16_in_place_of_fp16_is_emulated_bf16() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(16, 16)
    x = torch.randn(8, 16)
    with computed_in("bf16"), emulated_half(torch.float16):
        ours = layer(x)
        assert ours.grad_fn is not None
        assert "_Linear" in type(ours.grad_fn).__name__  # not the slow native kernel
    with emulated_half(torch.bfloat16):
        assert torch.equal(ours, layer(x))
