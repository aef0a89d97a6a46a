"""The supervised-only chunked head gives the loss and gradients of the plain one, without its logits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from finitune.train.objectives import causal_lm


def plain(hidden_BTD: torch.Tensor, head: nn.Linear, labels_BT: torch.Tensor) -> torch.Tensor:
    """What the chunked form must equal: full logits, shifted cross entropy, summed."""
    logits = head(hidden_BTD).float()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten(), reduction="sum")


def case(seed: int, *, bias: bool = False, vocabulary: int = 97) -> tuple[torch.Tensor, nn.Linear, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(3, 17, 16, generator=generator, requires_grad=True)
    head = nn.Linear(16, vocabulary, bias=bias)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    labels = torch.randint(0, vocabulary, (3, 17), generator=generator)
    labels[torch.rand(3, 17, generator=generator) < 0.6] = causal_lm.IGNORED
    return hidden, head, labels


def run(
    hidden: torch.Tensor, head: nn.Module, labels: torch.Tensor, *, factor: float, chunk: int
) -> causal_lm.Computed:
    family = SimpleNamespace(backbone=lambda _m: lambda **_k: (hidden,), head=lambda _m: head)
    batch = SimpleNamespace(ids_BT=labels, attention_mask=None, position_ids_BT=None, labels_BT=labels)
    return causal_lm.compute(nn.Identity(), family, batch, factor=factor, chunk_tokens=chunk)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_loss_and_every_gradient_equal_the_plain_head(bias: bool, chunk: int) -> None:
    hidden, head, labels = case(1, bias=bias)
    expected = plain(hidden, head, labels)
    wanted = torch.autograd.grad(expected * 0.37, [hidden, *head.parameters()])
    done = run(hidden, head, labels, factor=0.37, chunk=chunk)
    got = torch.autograd.grad(done.scaled, [hidden, *head.parameters()])
    torch.testing.assert_close(done.loss_sum, expected.detach(), rtol=1e-6, atol=0)
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_the_same_one() -> None:
    hidden, head, labels = case(2)
    wanted = torch.autograd.grad(plain(hidden, head, labels), hidden)[0]
    head.requires_grad_(False)
    run(hidden, head, labels, factor=1.0, chunk=7).scaled.backward()
    assert head.weight.grad is None
    torch.testing.assert_close(hidden.grad, wanted, rtol=1e-5, atol=1e-5)


class Wrapped(nn.Module):
    """A head that is not a plain linear layer, as an adapter makes it."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * 1.0


def test_any_other_head_takes_the_general_road_with_the_same_numbers() -> None:
    hidden, head, labels = case(3)
    wanted = torch.autograd.grad(plain(hidden, head, labels) * 2.0, [hidden, head.weight])
    done = run(hidden, Wrapped(head), labels, factor=2.0, chunk=4)
    got = torch.autograd.grad(done.scaled, [hidden, head.weight])
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)


def test_without_any_target_there_is_nothing_to_run_backward_through() -> None:
    hidden, head, labels = case(4)
    done = run(hidden, head, torch.full_like(labels, causal_lm.IGNORED), factor=1.0, chunk=4)
    assert done.scaled is None
    assert done.num_targets == 0
    assert float(done.loss_sum) == 0.0


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_poison_in_a_supervised_position_reaches_the_loss(poison: float) -> None:
    hidden, head, labels = case(5)
    spoilt = hidden.detach().clone()
    row, position = (labels[:, 1:] != causal_lm.IGNORED).nonzero()[0].tolist()
    spoilt[row, position, 0] = poison
    done = run(spoilt, head, labels, factor=1.0, chunk=4)
    assert not torch.isfinite(done.loss_sum)


def test_no_tensor_of_full_logits_is_made() -> None:
    """The largest tensor that lives is one chunk of logits (and its slope), not N x V."""
    rows, vocabulary, chunk = 512, 4096, 32
    hidden = torch.randn(1, rows + 1, 8, requires_grad=True)
    labels = torch.randint(0, vocabulary, (1, rows + 1))
    head = nn.Linear(8, vocabulary, bias=False)
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        run(hidden, head, labels, factor=1.0, chunk=chunk).scaled.backward()
    assert largest <= max(chunk * vocabulary, head.weight.numel())


def test_half_products_overflow_where_the_plain_head_would() -> None:
    """Under autocast the logits are half numbers: 300 x 300 is beyond 65504."""
    hidden = torch.full((1, 3, 1), 300.0, requires_grad=True)
    head = nn.Linear(1, 4, bias=False)
    nn.init.constant_(head.weight, 300.0)
    labels = torch.tensor([[0, 1, 2]])
    with torch.autocast("cpu", dtype=torch.float16):
        half = run(hidden, head, labels, factor=1.0, chunk=4)
    full = run(hidden, head, labels, factor=1.0, chunk=4)
    assert not torch.isfinite(half.loss_sum)
    assert torch.isfinite(full.loss_sum)
