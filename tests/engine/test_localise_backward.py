"""Backward localisation names the parameter at the frontier and the node that made the first bad gradient."""

from __future__ import annotations

import random
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from finitune.core.incident import Trigger
from finitune.numerics.half import emulated_half
from support.replay_port import row_id
from support.tiny_ports import Context, NanBackward, break_backward, llama_port, names, of_kind, suspects

PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def test_a_hook_on_a_gradient_is_named_by_its_parameter() -> None:
    port = llama_port(micros=2)

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        spoilt = gradient.clone()
        spoilt.view(-1)[3] = float("nan")
        return spoilt

    port.model.model.layers[1].self_attn.q_proj.weight.register_hook(hook)
    found = suspects(port, Trigger.GRADIENT)
    parameter = of_kind(found, "parameter")[0]
    assert parameter.name == "model.layers.1.self_attn.q_proj.weight"
    assert parameter.data["index"] == [0, 3]
    assert parameter.data["num_bad_parameters"] == 1
    assert names(found, "module") == ["model.layers.1.self_attn.q_proj"]
    assert names(found, "op") == ["gradient hook (aten.copy_) in model.layers.1.self_attn.q_proj"]


def test_random_functions_with_a_bad_backward_are_found() -> None:
    draw = random.Random(11)
    for _ in range(6):
        name = f"model.layers.{draw.randrange(3)}.{draw.choice(PARTS)}"
        port = llama_port(layers=3)
        break_backward(port.model.get_submodule(name), NanBackward)
        found = suspects(port, Trigger.GRADIENT)
        assert names(found, "module") == [name]
        assert names(found, "op") == [f"NanBackwardBackward (aten.div) in {name}"]
        assert of_kind(found, "parameter")[0].name == f"{name}.weight"


def test_an_infinite_derivative_names_the_node_and_the_row() -> None:
    port = llama_port()
    port.batches[0][0]["span"] = torch.ones(4, 12)
    port.batches[0][0]["span"][1] = 0

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        out = model(input_ids=batch["input_ids"], labels=batch["labels"], output_hidden_states=True)
        length = (out.hidden_states[-1] * batch["span"][..., None]).pow(2).sum((1, 2)).sqrt()
        loss: torch.Tensor = out.loss + 0.01 * length.mean()
        return loss

    port.loss_fn = loss_fn
    found = suspects(port, Trigger.GRADIENT)
    assert found[0].name == "SqrtBackward0 (aten.div) in (loss)"
    assert found[0].data["num_bad"] == 1
    assert names(found, "row") == [str(row_id(1, 0, 1))]


def half() -> Any:
    return emulated_half(torch.float16)


def test_a_loss_too_large_for_half_gradients_is_named_where_they_are_cast() -> None:
    port = llama_port(half)
    base = port.loss_fn
    port.loss_fn = lambda model, batch: base(model, batch) * 1e10
    found = suspects(port, Trigger.GRADIENT)
    assert names(found, "op") == ["ToCopyBackward0 (aten._to_copy) in (model)"]
    assert of_kind(found, "op")[0].data["dtype"] == "float16"
    assert of_kind(found, "op")[0].data["value"] > 65504
    assert names(found, "parameter") == ["lm_head.weight"]


@pytest.mark.parametrize(
    ("context", "top", "op"),
    [(nullcontext, 3e38, "MmBackward0 (aten.mm)"), (half, 6e4, "_LinearBackward (aten._to_copy)")],
)
def test_an_exploding_chain_names_the_module_that_overflowed(context: Context, top: float, op: str) -> None:
    class Explode(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient.sign() * top

    port = llama_port(context)
    break_backward(port.model.model.layers[1].self_attn.k_proj, Explode)
    found = suspects(port, Trigger.GRADIENT)
    assert names(found, "module")[0] == "model.layers.1.self_attn.k_proj"
    assert names(found, "op")[0].startswith(op)
    assert of_kind(found, "module")[0].data["input_finite"]


def test_the_first_bad_micro_batch_is_named() -> None:
    port = llama_port(micros=3)
    calls = []

    def hook(gradient: torch.Tensor) -> torch.Tensor | None:
        calls.append(1)
        return gradient * float("nan") if len(calls) % 3 == 2 else None

    port.model.lm_head.weight.register_hook(hook)
    found = suspects(port, Trigger.GRADIENT)
    assert of_kind(found, "parameter")[0].data["micro"] == 1


def test_recomputed_activations_do_not_confuse_the_names() -> None:
    for reentrant in (True, False):
        port = llama_port()
        port.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        port.model.enable_input_require_grads()
        name = "model.layers.1.mlp.up_proj"
        break_backward(port.model.get_submodule(name), NanBackward)
        found = suspects(port, Trigger.GRADIENT)
        assert names(found, "module") == [name]


def test_gradients_of_a_plain_module_with_its_own_parameters_are_named() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * self.scale).abs().sqrt()

    from support.replay_port import BarePort

    model = Own()
    x = torch.randn(4, 3)
    x[2, 1] = 0
    port = BarePort(model, torch.optim.SGD(model.parameters(), lr=0.1), lambda m, b: m(b["x"]).sum(), [[{"x": x}]])
    found = suspects(port, Trigger.GRADIENT)
    assert found[0].name == "SqrtBackward0 (aten.div) in (model)"
    assert found[0].data["bad_rows"] == [2]
    assert of_kind(found, "parameter")[0].name == "scale"
