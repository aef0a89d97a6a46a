"""Freezing by pattern, and checkpointing that changes memory but no gradient."""

import pytest
import torch
from torch import nn

from finitune.core.errors import UserError, UserErrors
from finitune.models.family import family_for
from finitune.models.freeze import disable_checkpointing, enable_checkpointing, freeze, trainable_parameters
from finitune.models.lora import LoraSettings, attach
from finitune.models.precision import PRECISIONS, checkpoint_kwargs, compute_context
from finitune.models.tiny import tiny_llama


def names(model: nn.Module) -> set[str]:
    return {name for name, _ in trainable_parameters(model)}


def test_without_patterns_everything_trains():
    model = tiny_llama()
    assert freeze(model, []) == ()
    assert names(model) == {name for name, _ in model.named_parameters()}


def test_a_module_a_parameter_and_a_glob():
    model = tiny_llama()
    everything = names(model)
    frozen = freeze(model, ["model.layers.0", "lm_head.weight", "*norm*"])
    assert names(model) == everything - set(frozen)
    assert "model.layers.0.mlp.up_proj.weight" in frozen
    assert "model.layers.1.input_layernorm.weight" in frozen
    assert "model.layers.1.mlp.up_proj.weight" not in frozen
    assert frozen == tuple(n for n, _ in model.named_parameters() if n in frozen)


def test_a_prefix_ends_at_a_dot():
    model = tiny_llama(layers=11)
    frozen = freeze(model, ["model.layers.1"])
    assert all(name.startswith("model.layers.1.") for name in frozen)


def test_patterns_that_match_nothing_are_all_named_and_nothing_is_frozen():
    model = tiny_llama()
    with pytest.raises(UserErrors) as caught:
        freeze(model, ["model.layers.0", "model.layers.9", "lm_heat"])
    assert [e.code.code for e in caught.value.errors] == ["MOD029", "MOD029"]
    assert "lm_head" in str(caught.value)
    assert len(names(model)) == len(list(model.parameters()))


def test_freezing_everything_is_refused():
    model = tiny_llama()
    with pytest.raises(UserError) as caught:
        freeze(model, ["*"])
    assert caught.value.code.code == "MOD030"
    assert names(model)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 287, (2, 24), generator=torch.Generator().manual_seed(3))
    model.train()
    torch.manual_seed(0)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    found = {name: p.grad.clone() for name, p in trainable_parameters(model)}
    model.zero_grad()
    return found


@pytest.mark.parametrize("kind", ["full", "lora", "lora with dropout"])
def test_checkpointing_keeps_every_gradient(kind):
    model: nn.Module = tiny_llama()
    if kind != "full":
        settings = LoraSettings(r=4, dropout=0.1 if "dropout" in kind else 0.0)
        model = attach(model, settings, family_for("llama"))
        with torch.no_grad():  # B starts at zero, which would leave A without gradient
            for name, p in trainable_parameters(model):
                if "lora_B" in name:
                    p.fill_(0.01)
    plain = gradients(model)
    enable_checkpointing(model)
    recomputed = gradients(model)
    assert all(g.abs().max() > 0 for g in recomputed.values())
    assert recomputed.keys() == plain.keys()
    assert all(torch.equal(recomputed[n], plain[n]) for n in plain)


@pytest.mark.parametrize("name", ["fp16-emulated", "bf16-emulated", "bf16"])
def test_checkpointing_recomputes_in_the_precision_of_the_forward(name):
    precision, device = PRECISIONS[name], torch.device("cpu")
    model = tiny_llama()
    ids = torch.randint(0, 287, (2, 24), generator=torch.Generator().manual_seed(3))
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            enable_checkpointing(model, checkpoint_kwargs(precision))
        model.train()
        with compute_context(precision, device):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        found.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_checkpointing_really_recomputes():
    model = tiny_llama()
    calls = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    gradients(model)
    assert len(calls) == 1
    enable_checkpointing(model)
    gradients(model)
    assert len(calls) == 3
    disable_checkpointing(model)
    gradients(model)
    assert len(calls) == 4
