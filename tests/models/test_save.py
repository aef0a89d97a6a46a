"""Saved folders: transformers and peft read them, old readers too; poison and half a folder never get there."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from finitune.core.errors import UserError
from finitune.models.family import family_for
from finitune.models.freeze import trainable_parameters
from finitune.models.layout import bare
from finitune.models.load import load
from finitune.models.lora import LoraSettings, attach
from finitune.models.opening import load_any
from finitune.models.save import layouts, merge, save_model, write_model
from finitune.models.tiny import TinySpec, tiny_llama, tiny_tokenizer, write_internlm2_folder

LLAMA = family_for("llama")
IDS = torch.arange(3, 40)[None]
SAMPLE = "Hello <|im_start|>world\n  12 \u4f60\u597d"


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.fixture
def base(tmp_path):
    return save_model(tiny_llama(), tiny_tokenizer(), tmp_path / "base", family=LLAMA)


def with_adapter(base, **options):
    """An adapter that does something, on the model of a folder."""
    model = attach(load(str(base)).model, LoraSettings(r=2, **options), LLAMA)
    with torch.no_grad():
        for index, (_, p) in enumerate(trainable_parameters(model)):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(index)) * 0.1)
    return model


def test_transformers_reads_the_folder(base):
    model = AutoModelForCausalLM.from_pretrained(base)
    assert torch.equal(logits(model), logits(tiny_llama()))
    tokenizer = AutoTokenizer.from_pretrained(base)
    ours = tiny_tokenizer()
    assert tokenizer(SAMPLE).input_ids == ours(SAMPLE).input_ids
    assert tokenizer.chat_template == ours.chat_template
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token) == ("<|pad|>", "<|im_end|>", "<|endoftext|>")
    assert "<|im_start|>" in tokenizer.all_special_tokens


def test_the_tokenizer_folder_has_the_form_of_transformers_4(base):
    raw = json.loads((base / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert raw["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert raw["chat_template"] == tiny_tokenizer().chat_template
    assert raw["additional_special_tokens"] == ["<|im_start|>"]
    assert not {"extra_special_tokens", "backend", "is_local", "local_files_only"} & raw.keys()
    (base / "chat_template.jinja").unlink()  # transformers 4.42 and older know no such file
    old = PreTrainedTokenizerFast.from_pretrained(base)
    assert old.chat_template == tiny_tokenizer().chat_template


def test_a_half_precision_model_keeps_dtype_and_bits(tmp_path):
    model = tiny_llama().to(torch.bfloat16)
    save_model(model, tiny_tokenizer(), tmp_path / "m", family=LLAMA)
    again = load(str(tmp_path / "m"), dtype=torch.bfloat16)
    assert again.report.stored_dtypes == {"bfloat16": 21}
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize(
    "options", [{}, {"use_dora": True}, {"use_rslora": True, "targets": ("q_proj",)}, {"modules_to_save": ("lm_head",)}]
)
def test_peft_reads_the_adapter_folder(base, tmp_path, options):
    from peft import AutoPeftModelForCausalLM

    model = with_adapter(base, **options)
    folder = save_model(model, tiny_tokenizer(), tmp_path / "adapter", family=LLAMA)
    names = {p.name for p in folder.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= names
    assert not any(name.startswith("model") for name in names)
    raw = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert raw["base_model_name_or_path"] == str(base)
    expected = logits(model)
    # Our lean LoRA layer rounds in another order than PEFT's; the weights are the same to the bit.
    peft_logits = logits(AutoPeftModelForCausalLM.from_pretrained(folder))
    torch.testing.assert_close(peft_logits, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(logits(load_any(str(folder)).model), expected)


def test_a_merged_folder_is_an_ordinary_model(base, tmp_path):
    model = with_adapter(base)
    folder = save_model(model, tiny_tokenizer(), tmp_path / "adapter", family=LLAMA)
    merged = merge(str(folder))
    assert not any("lora" in name for name, _ in merged.named_parameters())
    save_model(merged, tiny_tokenizer(), tmp_path / "merged", family=LLAMA)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(merged))
    assert torch.equal(logits(merge(model)), logits(merged))


def test_a_merged_model_computes_what_base_and_adapter_did(base):
    """In fp64, where the order of the sums does not hide a wrong factor."""
    model = with_adapter(base, use_rslora=True).double()
    expected = logits(model)
    assert (logits(merge(model)) - expected).abs().max() < 1e-10


def test_merge_of_a_whole_model_is_the_model():
    model = tiny_llama()
    assert merge(model) is model


def test_an_adapter_on_a_tiny_model_finds_its_base_by_name(tmp_path):
    loaded = load("tiny-internlm2", seed=4)
    model = attach(loaded.model, LoraSettings(r=2), loaded.family)
    folder = save_model(model, loaded.tokenizer, tmp_path / "a", family=loaded.family)
    again = load_any(str(folder))
    assert torch.equal(logits(again.model), logits(model))
    assert again.family.name == "internlm2"


def test_an_adapter_whose_base_is_gone_says_so(base, tmp_path):
    folder = save_model(with_adapter(base), tiny_tokenizer(), tmp_path / "a", family=LLAMA)
    base.rename(tmp_path / "moved")
    with pytest.raises(UserError) as caught:
        load_any(str(folder))
    assert caught.value.code.code == "MOD025"
    assert str(base) in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_poison_is_refused_and_the_old_folder_stands(base, value):
    model = tiny_llama(seed=1)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3, 4] = value
        model.model.norm.weight[0] = value
    before = {p.name: p.read_bytes() for p in base.iterdir()}
    with pytest.raises(UserError) as caught:
        save_model(model, tiny_tokenizer(), base, family=LLAMA)
    assert caught.value.code.code == "MOD031"
    assert (caught.value.data["num"], caught.value.data["total"]) == (2, 21)
    assert "model.layers.0.mlp.down_proj.weight" in str(caught.value)
    assert {p.name: p.read_bytes() for p in base.iterdir()} == before
    assert [p.name for p in base.parent.iterdir()] == ["base"]


def test_a_poisoned_adapter_is_refused_and_so_is_its_merge(base, tmp_path):
    model = with_adapter(base)
    with torch.no_grad():
        bare(model).model.layers[0].self_attn.q_proj.lora_A["default"].weight[0, 0] = float("inf")
    for attempt in (lambda: save_model(model, tiny_tokenizer(), tmp_path / "a", family=LLAMA), lambda: merge(model)):
        with pytest.raises(UserError) as caught:
            attempt()
        assert caught.value.code.code == "MOD031"
    assert not (tmp_path / "a").exists()


def test_an_adapter_is_saved_although_its_base_is_poisoned(base, tmp_path):
    """Only what is written counts: the base is not part of an adapter folder."""
    model = with_adapter(base)
    with torch.no_grad():
        bare(model).model.norm.weight[0] = float("nan")
    save_model(model, tiny_tokenizer(), tmp_path / "a", family=LLAMA)
    assert (tmp_path / "a" / "adapter_config.json").is_file()


def test_layouts(base, tmp_path):
    assert layouts(LLAMA) == ("hf",)
    internlm2 = load(str(write_internlm2_folder(tmp_path / "i")))
    assert layouts(internlm2.family) == ("hf", "internlm2")
    adapter = attach(internlm2.model, LoraSettings(r=2), internlm2.family)
    for model, family in ((tiny_llama(), LLAMA), (adapter, internlm2.family)):
        with pytest.raises(UserError) as caught:
            save_model(model, tiny_tokenizer(), tmp_path / "x", family=family, layout="internlm2")
        assert caught.value.code.code == "MOD032"


def test_an_internlm2_model_is_saved_as_llama_by_default(tmp_path):
    loaded = load(str(write_internlm2_folder(tmp_path / "i")))
    folder = save_model(loaded.model, loaded.tokenizer, tmp_path / "out", family=loaded.family)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(loaded.model))


def test_the_way_back_to_the_original_layout_stays_open(tmp_path):
    """Train, save for transformers, load that, and still export InternLM2's own layout, bit for bit."""
    original = write_internlm2_folder(tmp_path / "i", spec=TinySpec(bias=1))
    loaded = load(str(original))
    folder = save_model(loaded.model, loaded.tokenizer, tmp_path / "out", family=loaded.family)
    again = load_any(str(folder))
    assert again.model.config.model_type == "llama"
    back = save_model(again.model, again.tokenizer, tmp_path / "back", family=again.family, layout="internlm2")
    ours, theirs = (load_file(f / "model.safetensors") for f in (back, original))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_tied_models_in_the_original_layout_hold_the_embedding_once(tmp_path):
    loaded = load("tiny-internlm2:tied=1")
    folder = save_model(loaded.model, loaded.tokenizer, tmp_path / "t", family=loaded.family, layout="internlm2")
    again = load(str(folder))
    assert torch.equal(logits(again.model), logits(loaded.model))
    assert again.report.tied


def test_write_model_adds_to_a_folder_that_exists(tmp_path):
    (tmp_path / "state.json").write_text("{}", encoding="utf-8")
    write_model(tiny_llama(), tiny_tokenizer(), tmp_path, family=LLAMA)
    assert {"state.json", "config.json", "model.safetensors"} <= {p.name for p in tmp_path.iterdir()}


# --- opening the folder of a run ---


def test_a_run_folder_stands_for_its_final_model_else_its_latest_checkpoint(tmp_path):
    run = tmp_path / "run"
    for name, seed in (("checkpoint-9", 1), ("checkpoint-10", 2)):
        save_model(tiny_llama(seed), tiny_tokenizer(), run / name, family=LLAMA)
    (run / "checkpoint-11").mkdir()
    assert torch.equal(logits(load_any(str(run)).model), logits(tiny_llama(2)))
    save_model(tiny_llama(3), tiny_tokenizer(), run / "final", family=LLAMA)
    loaded = load_any(str(run))
    assert torch.equal(logits(loaded.model), logits(tiny_llama(3)))
    assert loaded.source == str(run / "final")


def test_a_folder_with_nothing_in_it(tmp_path):
    with pytest.raises(UserError) as caught:
        load_any(str(tmp_path))
    assert caught.value.code.code == "MOD003"


def test_names_are_opened_as_load_does():
    assert load_any("tiny-llama").family.name == "llama"
