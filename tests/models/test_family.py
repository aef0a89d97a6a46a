"""Every known model type: groups are a partition, targets exist, the watched modules are there."""

import json

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

from finitune.core import registry
from finitune.core.errors import UserError
from finitune.models.chat import generate
from finitune.models.family import family_for, known_model_types
from finitune.models.layout import group_of
from finitune.models.load import load
from finitune.models.lora import LoraSettings, attach
from finitune.models.save import save_model
from finitune.models.tiny import tiny_llama

NATIVE = sorted(kind for kind in known_model_types() if kind != "internlm2")
SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def small_model(model_type: str) -> nn.Module:
    """A two-layer model of the type, without memory behind its weights."""
    raw = {"model_type": model_type, **SMALL}
    config = family_for(model_type).config(raw)
    with torch.device("meta"):
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)


def test_internlm2_and_the_families_of_the_day_are_known():
    assert {"llama", "internlm2", "internlm3", "qwen2", "qwen3", "gemma", "mistral"} <= set(known_model_types())
    assert set(NATIVE) <= set(CONFIG_MAPPING.keys())


@pytest.mark.parametrize("model_type", NATIVE)
def test_groups_are_a_partition_and_functions_find_their_modules(model_type):
    model, family = small_model(model_type), family_for(model_type)
    groups = family.groups(model)
    listed = [name for names in groups.values() for name in names]
    assert sorted(listed) == sorted(name for name, _ in model.named_parameters())
    assert len(listed) == len(set(listed))
    assert {"embed", "layers.0.attention", "layers.1.mlp"} <= groups.keys()
    assert "other" not in groups
    modules = dict(model.named_modules())
    assert [name for name, _ in family.layers(model)] == ["model.layers.0", "model.layers.1"]
    assert [name for name, _ in family.watch(model)] == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert all(modules[name] is module for name, module in [*family.layers(model), *family.watch(model)])
    linears = {name.rpartition(".")[2] for name, m in modules.items() if isinstance(m, nn.Linear)}
    assert set(family.lora_targets) <= linears
    assert family.head(model) is model.get_output_embeddings()
    assert family.backbone(model) is model.model


@pytest.mark.parametrize("model_type", NATIVE)
def test_each_type_is_saved_loaded_and_asked(model_type, tmp_path):
    raw = {"model_type": model_type, **SMALL, "vocab_size": 320}
    (tmp_path / "random").mkdir()
    (tmp_path / "random" / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    first = load(str(tmp_path / "random"), random_init=True, seed=1)
    folder = save_model(first.model, first.tokenizer, tmp_path / "saved", family=first.family)
    again = load(str(folder))
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(again.model(input_ids=ids).logits, first.model(input_ids=ids).logits)
    assert again.report.unexpected == ()
    assert generate(again.model, again.tokenizer, "hello", max_new_tokens=3, stop_ids=()).num_tokens == 3


def test_a_type_without_fused_attention_gets_eager_and_says_so(tmp_path):
    raw = {"model_type": "gemma2", **SMALL, "vocab_size": 320}
    (tmp_path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    loaded = load(str(tmp_path), random_init=True)
    assert loaded.model.config._attn_implementation == "eager"
    assert "MOD040" in [f.code for f in loaded.report.findings]


def test_backbone_and_head_together_are_the_model():
    model, family = tiny_llama(), family_for("llama")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        hidden = family.backbone(model)(input_ids=ids).last_hidden_state
        assert torch.equal(family.head(model)(hidden), model(input_ids=ids).logits)


def test_functions_see_through_a_peft_wrapper():
    family = family_for("llama")
    model = tiny_llama()
    wrapped = attach(model, LoraSettings(r=2), family)
    names = [name for group in family.groups(wrapped).values() for name in group]
    assert sorted(names) == sorted(name for name, _ in wrapped.named_parameters())
    assert "other" not in family.groups(wrapped)
    assert any("lora_A" in name for name in family.groups(wrapped)["layers.0.mlp"])
    assert [n for n, _ in family.layers(wrapped)] == ["model.layers.0", "model.layers.1"]
    assert family.backbone(wrapped) is model.model
    assert family.head(wrapped) is model.lm_head
    # The watched module is the adapted one, so a hook sees the sum of base and adapter.
    assert all("lora" in type(m).__module__ for _, m in family.watch(wrapped))


def test_an_unknown_type_lists_what_is_known_and_what_is_close():
    with pytest.raises(UserError) as caught:
        family_for("qwen33", "config.json")
    message = str(caught.value)
    assert caught.value.code.code == "MOD005"
    assert "internlm2" in message
    assert "qwen3" in caught.value.data["close"]


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.embed_tokens.weight", "embed"),
        ("model.layers.11.self_attn.q_norm.weight", "layers.11.attention"),
        ("base_model.model.model.layers.3.mlp.up_proj.lora_A.default.weight", "layers.3.mlp"),
        ("model.layers.0.pre_feedforward_layernorm.weight", "layers.0.norm"),
        ("model.layers.0.router.weight", "layers.0.other"),
        ("model.norm.weight", "norm"),
        ("lm_head.weight", "head"),
        ("visual.patch.weight", "other"),
    ],
)
def test_group_of_a_name(name, group):
    assert group_of(name) == group


def test_every_family_documents_itself():
    for name in registry.names("model_families"):
        module = registry.load("model_families", name)
        assert module.FAMILY.name == name
        assert "Why" in module.__doc__
