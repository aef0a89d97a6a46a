"""The look at the first step: whom a gradient reached, in which format it was computed, and whether logits differ."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from finitune.core.types import Finding
from finitune.engine.look.first_pass import FirstPass
from finitune.models.tiny import tiny_internlm2, tiny_llama
from finitune.numerics.half import emulated_half

SIZES = {"hidden": 32, "layers": 2, "heads": 2, "kv_heads": 2, "mlp": 64}
IDS = torch.randint(4, 60, (2, 12), generator=torch.Generator().manual_seed(0))


def looked(model: Any, region: Any = None, **options: Any) -> tuple[Finding, ...]:
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    seen = FirstPass(model)
    with seen, region() if region is not None else nullcontext():
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
    return seen.findings(float(loss.detach()), trained, **options)


def codes(found: tuple[Finding, ...]) -> list[tuple[str, str]]:
    return [(f.code, f.data["fault_class"]) for f in found]


@pytest.mark.parametrize("build", [tiny_llama, tiny_internlm2])
@pytest.mark.parametrize("sizes", [{}, {"tied": 1}, {"hidden": 8, "heads": 2, "kv_heads": 1, "layers": 1}])
def test_a_healthy_step_gives_nothing_to_say(build: Any, sizes: dict[str, int]) -> None:
    for seed in range(4):
        assert looked(build(seed, **sizes).train()) == ()


def test_looking_changes_no_bit_and_leaves_nothing_behind() -> None:
    def gradients(look: bool) -> list[Tensor]:
        model = tiny_llama(0, **SIZES).train()
        original = torch.autocast.__init__
        with FirstPass(model) if look else nullcontext():
            model(input_ids=IDS, labels=IDS).loss.backward()
        assert torch.autocast.__init__ is original
        assert not any(m._forward_hooks for m in model.modules())
        return [p.grad for p in model.parameters() if p.grad is not None]

    assert all(torch.equal(a, b) for a, b in zip(gradients(True), gradients(False), strict=True))


def test_it_is_undone_where_the_step_raises() -> None:
    model, original = tiny_llama(0, **SIZES), torch.autocast.__init__
    with pytest.raises(RuntimeError, match="of the user"), FirstPass(model):
        raise RuntimeError("of the user")
    assert torch.autocast.__init__ is original
    assert not any(m._forward_hooks for m in model.modules())


# -- dead logits -----------------------------------------------------------------------------------------------------


def test_a_head_of_zeros_is_told_with_the_loss_of_guessing() -> None:
    model = tiny_llama(0, **SIZES).train()
    model.lm_head.weight.data.zero_()
    found = looked(model)
    assert codes(found) == [("MOD111", "H")]
    data = found[0].data
    assert data["loss"] == pytest.approx(data["guess"], abs=1e-5)
    assert (data["num_zero"], data["num_trained"]) == (20, 21)  # the head alone has a gradient


@pytest.mark.parametrize("build", [tiny_llama, tiny_internlm2])
@pytest.mark.parametrize("factor", [0.0, 1e-20, 1e-4])
@pytest.mark.parametrize("place", ["model.norm.weight", "lm_head.weight"])
def test_the_tensor_that_lets_nothing_through_is_the_place(build: Any, factor: float, place: str) -> None:
    model = build(0, **SIZES).train()
    name = place if place in dict(model.named_parameters()) else "output.weight"
    dict(model.named_parameters())[name].data.mul_(factor)
    assert [(f.code, f.where) for f in looked(model)] == [("MOD111", name)]


def test_the_place_is_the_base_of_a_wrapped_head_and_no_adapter_of_zeros() -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny_llama(0, **SIZES)
    model.lm_head.weight.data.mul_(1e-6)
    made = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=4)).train()
    assert [(f.code, f.where) for f in looked(made)] == [("MOD111", "base_model.model.lm_head.weight")]


def test_a_body_in_the_wrong_scale_is_told() -> None:
    model = tiny_llama(0, **SIZES).train()
    for name, parameter in model.named_parameters():
        if "lm_head" not in name:
            parameter.data.div_(14.0)
    assert codes(looked(model)) == [("MOD111", "H")]


# -- gradients -------------------------------------------------------------------------------------------------------


def lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"])).train()


def test_lora_at_its_start_has_zero_gradients_and_none_is_missing() -> None:
    assert looked(lora(tiny_llama(0, **SIZES))) == ()


def test_a_reentrant_checkpoint_over_a_frozen_input_cuts_the_gradient_of_what_is_in_it() -> None:
    model = lora(tiny_llama(0, **SIZES))
    layer = model.base_model.model.model.layers[0]
    forward = layer.forward
    layer.forward = lambda x, *a, **k: checkpoint(lambda y: forward(y, *a, **k), x, use_reentrant=True)
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad"):
        found = looked(model)
    assert codes(found) == [("MOD114", "M")]
    assert (found[0].data["count"], found[0].data["total"]) == (4, 8)
    assert "layers.0" in found[0].where


def test_a_module_that_was_not_computed_needs_no_gradient() -> None:
    model = tiny_llama(0, **SIZES).train()
    model.unused = nn.Linear(4, 4)
    assert looked(model) == ()


# -- formats ---------------------------------------------------------------------------------------------------------


def half(device: str) -> Any:
    return lambda: torch.autocast(device, dtype=torch.bfloat16)


@pytest.mark.filterwarnings("ignore:.*CUDA is not available.*")
def test_an_autocast_for_another_device_is_told() -> None:
    other = "cuda" if IDS.device.type == "cpu" else "cpu"
    found = looked(tiny_llama(0, **SIZES).train(), half(other))
    assert codes(found) == [("SYS440", "S")]
    assert (found[0].data["wrong"], found[0].data["dtype"]) == (other, "float32")


@pytest.mark.parametrize("region", [None, half("cpu"), lambda: emulated_half(torch.float16)])
def test_autocast_on_the_device_in_use_and_emulations_are_fine(region: Any) -> None:
    assert looked(tiny_llama(0, **SIZES).train(), region) == ()


def test_a_loss_scale_without_any_half_product_is_told() -> None:
    model = tiny_llama(0, **SIZES).train()
    assert codes(looked(model, loss_scale=65536.0)) == [("SYS441", "S")]
    assert looked(model, half("cpu"), loss_scale=65536.0) == ()
    assert looked(model, lambda: emulated_half(torch.float16), loss_scale=65536.0) == ()


@pytest.mark.parametrize(
    "region", [lambda: torch.autocast("cpu", dtype=torch.float16), lambda: emulated_half(torch.float16)]
)
def test_a_weight_that_fp16_cannot_hold_is_told_where_fp16_is_used(region: Any) -> None:
    model = tiny_llama(0, **SIZES).train()
    weight = model.model.layers[1].mlp.up_proj.weight.data
    weight[2, 3] = 70000.0
    found = looked(model, region)
    assert ("MOD116", "B") in codes(found)
    assert {f.code: f.data for f in found}["MOD116"]["index"] == "2, 3"
    assert looked(model, half("cpu")) == ()
