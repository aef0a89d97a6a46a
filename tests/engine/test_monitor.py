"""The monitor sees NaN and inf, changes nothing, and reads everything in one go."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from finitune.engine.monitor import MAX_NAMED, Monitor, headroom_bits, read
from finitune.engine.port import Trace
from finitune.numerics.norms import tensor_norms


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))


def trace(gradients: dict[str, torch.Tensor], **kw: object) -> Trace:
    fields = {"loss_sum": torch.tensor(6.0), "num_supervised": 3, "num_tokens": 9} | kw
    return Trace(
        step=1, norms_P=tensor_norms(list(gradients.values())), parameter_names=list(gradients), lr=0.1, **fields
    )


def test_a_watched_model_gives_the_same_bits() -> None:
    model, x = net(), torch.randn(3, 4)
    plain = model(x)
    monitor = Monitor([("0", model[0])], [("2", model[2])])
    monitor.start()
    assert torch.equal(model(x), plain)
    names, ranges = monitor.stop()
    assert names == ["0", "2.input"]
    assert torch.equal(ranges[0], torch.stack(torch.aminmax(model[0](x))).detach())
    monitor.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model)


def test_every_hook_returns_none() -> None:
    model = net()
    monitor = Monitor([("0", model[0])], [("2", model[2])])
    monitor.start()
    hooks = [*model[0]._forward_hooks.values(), *model[2]._forward_pre_hooks.values()]
    x = torch.ones(1, 4)
    assert [h(model[0], (x,), x) for h in hooks[:1]] + [h(model[2], (x,)) for h in hooks[1:]] == [None, None]


def test_outside_a_step_nothing_is_kept() -> None:
    model = net()
    monitor = Monitor([("0", model[0])])
    model(torch.ones(1, 4))
    assert monitor.stop() == ([], None)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_poison_survives_the_ranges_over_micro_batches(poison: float) -> None:
    model = nn.Sequential(nn.Identity())
    monitor = Monitor([("0", model[0])])
    monitor.start()
    model(torch.tensor([1.0, poison]))
    model(torch.tensor([5.0, -7.0]))
    names, ranges = monitor.stop()
    reading = read(trace({"w": torch.ones(2)}, ranges_M2=ranges, watch_names=names, half_max=65504.0))
    assert not math.isfinite(reading.amax["0"])
    assert reading.headroom_bits == -math.inf


def test_a_reading_is_mean_loss_and_unscaled_norm() -> None:
    reading = read(trace({"a": torch.full((4,), 8.0), "b": torch.zeros(3)}, loss_scale=4.0))
    assert (reading.loss, reading.grad_norm, reading.num_bad_parameters) == (2.0, 4.0, 0)


def test_without_targets_the_loss_is_zero_and_says_so_by_the_count() -> None:
    reading = read(trace({}, loss_sum=torch.tensor(0.0), num_supervised=0))
    assert (reading.loss, reading.supervised_tokens, reading.grad_norm) == (0.0, 0, 0.0)


def test_bad_gradients_are_counted_and_the_first_named() -> None:
    gradients = {f"p{i}": torch.tensor([1.0, math.nan if i % 2 else 1.0]) for i in range(40)}
    reading = read(trace(gradients))
    assert reading.num_bad_parameters == 20
    assert reading.bad_parameters == tuple(f"p{i}" for i in range(1, 2 * MAX_NAMED, 2))
    assert math.isnan(reading.grad_norm)


def test_one_inf_element_is_seen_among_many_tensors() -> None:
    big = torch.zeros(1000)
    big[999] = math.inf
    reading = read(trace({"a": torch.ones(5), "b": big}))
    assert (reading.bad_parameters, math.isfinite(reading.grad_norm)) == (("b",), False)


@pytest.mark.parametrize(
    ("peaks", "bits"),
    [([65504.0], 0.0), ([16376.0, 1.0], 2.0), ([0.0], math.inf), ([1.0, math.nan], -math.inf), ([], None)],
)
def test_headroom_is_log2_of_limit_over_peak(peaks: list[float], bits: float | None) -> None:
    assert headroom_bits(peaks, 65504.0) == bits
    assert headroom_bits(peaks, None) is None


def test_modules_seen_more_often_than_others_keep_their_own_ranges() -> None:
    """Micro-batches and recomputation call some modules more often."""
    model = nn.ModuleDict({"a": nn.Identity(), "b": nn.Identity()})
    monitor = Monitor(list(model.items()))
    monitor.start()
    for value in (1.0, -5.0, 3.0):
        model["a"](torch.tensor([value]))
    model["b"](torch.tensor([7.0, 8.0]))
    names, ranges = monitor.stop()
    assert dict(zip(names, ranges.tolist(), strict=True)) == {"a": [-5.0, 3.0], "b": [7.0, 8.0]}
