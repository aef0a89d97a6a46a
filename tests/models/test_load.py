"""Loading: the report, and one clear error for each way a checkpoint can be bad."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from finitune.core.errors import UserError, UserErrors
from finitune.models.load import load, read_config, resolve
from finitune.models.save import save_model
from finitune.models.tiny import TinySpec, tiny_llama, tiny_tokenizer, write_internlm2_folder

WEIGHTS = "model.safetensors"
A_NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine") / "llama"
    loaded = load("tiny-llama")
    return save_model(loaded.model, loaded.tokenizer, folder, family=loaded.family)


@pytest.fixture
def folder(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "llama")


def edit_weights(folder, change):
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def edit_config(folder, **changes):
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    raw.update(changes)
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")


def fault(folder, **options):
    """The one error that loading raises, with its message checked for a cure."""
    with pytest.raises(UserError) as caught:
        load(str(folder), **options)
    assert "try: " in str(caught.value)
    return caught.value


# --- good checkpoints ---


def test_a_folder_gives_model_tokenizer_family_and_report(folder):
    loaded = load(str(folder))
    assert loaded.family.name == "llama"
    assert not loaded.model.training
    assert loaded.source == str(folder)
    assert loaded.model.name_or_path == str(folder)
    report = loaded.report
    assert (report.missing, report.unexpected, report.non_finite, report.tied, report.findings) == ((), (), (), (), ())
    assert report.num_parameters == sum(p.numel() for p in loaded.model.parameters())
    assert report.stored_dtypes == {"float32": 21}
    assert "133,440" in report.summary()
    assert loaded.tokenizer("hi there").input_ids == tiny_tokenizer()("hi there").input_ids


def test_loading_gives_the_saved_bits(folder):
    loaded, original = load(str(folder)).model, tiny_llama()
    ours, theirs = loaded.state_dict(), original.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_weights_come_in_the_dtype_that_is_asked_for(folder):
    for dtype in (torch.bfloat16, torch.float16):
        loaded = load(str(folder), dtype=dtype)
        assert {p.dtype for p in loaded.model.parameters()} == {dtype}
        assert loaded.report.dtype == str(dtype).removeprefix("torch.")


def test_loading_leaves_the_global_random_state_alone(folder):
    for name, options in ((str(folder), {}), (str(folder), {"random_init": True}), ("tiny-internlm2", {})):
        before = torch.get_rng_state()
        load(name, **options)
        assert torch.equal(before, torch.get_rng_state())


def test_loaded_weights_do_not_change_with_the_file(folder):
    loaded = load(str(folder))
    before = loaded.model.lm_head.weight.clone()
    with (folder / WEIGHTS).open("r+b") as handle:
        handle.seek(4096)
        handle.write(b"\xff" * 100_000)
    assert torch.equal(loaded.model.lm_head.weight, before)


def test_tied_weights_are_one_tensor_and_reported(tmp_path):
    loaded = load("tiny-llama:tied=1")
    assert loaded.report.tied == (("model.embed_tokens.weight", "lm_head.weight"),)
    save_model(loaded.model, loaded.tokenizer, tmp_path / "t", family=loaded.family)
    again = load(str(tmp_path / "t"))
    assert again.report.tied == (("model.embed_tokens.weight", "lm_head.weight"),)
    assert again.model.lm_head.weight is again.model.model.embed_tokens.weight


def test_sharded_checkpoints_load(folder):
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(state)
    parts = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, keys in parts.items():
        save_file({k: state[k] for k in keys}, folder / file)
    index = {"weight_map": {k: file for file, keys in parts.items() for k in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert torch.equal(load(str(folder)).model.lm_head.weight, state["lm_head.weight"])
    (folder / "model-00002-of-00002.safetensors").unlink()
    error = fault(folder)
    assert error.code.code == "MOD009"
    assert "model-00002" in str(error)


def test_unexpected_tensors_are_a_warning_but_computed_buffers_are_not(folder):
    computed = load(str(folder)).model.model.rotary_emb.inv_freq
    extra = {"model.draft.weight": torch.zeros(3), "model.layers.0.self_attn.rotary_emb.inv_freq": computed.clone()}
    edit_weights(folder, lambda s: s.update(extra))
    report = load(str(folder)).report
    assert report.unexpected == ("model.draft.weight",)
    assert [f.code for f in report.findings] == ["MOD011"]


def test_stop_tokens_of_the_generation_config_are_taken(folder):
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [3, 1], "do_sample": False, "temperature": 0.6}), encoding="utf-8")
    loaded = load(str(folder))
    assert loaded.model.generation_config.eos_token_id == [3, 1]
    # transformers refuses to save such a contradiction; what was loaded must stay saveable.
    save_model(loaded.model, loaded.tokenizer, folder.parent / "again", family=loaded.family)


def test_chat_template_is_replaced_by_text_or_by_file(folder, tmp_path):
    text = "{{ messages[0]['content'] }}!"
    (tmp_path / "t.jinja").write_text(text, encoding="utf-8")
    for given in (text, str(tmp_path / "t.jinja")):
        assert load(str(folder), chat_template=given).tokenizer.chat_template == text
    assert fault(folder, chat_template="absent.jinja").code.code == "MOD034"


# --- random weights ---


def test_random_init_needs_a_config_only_and_is_a_function_of_the_seed(folder):
    for name in (WEIGHTS, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    a, b, c = (load(str(folder), random_init=True, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True))
    assert not torch.equal(a.model.lm_head.weight, c.model.lm_head.weight)
    assert [f.code for f in a.report.findings] == ["MOD038"]
    assert a.tokenizer.chat_template


def test_random_init_of_an_internlm2_folder(tmp_path):
    folder = write_internlm2_folder(tmp_path / "m")
    (folder / WEIGHTS).unlink()
    loaded = load(str(folder), random_init=True, dtype=torch.bfloat16)
    assert loaded.family.name == "internlm2"
    assert loaded.model.dtype == torch.bfloat16


# --- bad names ---


@pytest.mark.parametrize("name", ["no/such/folder", "./nothing", "smollm2", "some-org/some-model-that-is-not-there"])
def test_a_name_that_is_nothing(name, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    error = fault(name)
    assert error.code.code == "MOD001"
    assert "tiny-llama" in str(error)


def test_a_hub_id_loads_from_the_hubs_cache_without_a_network(pristine, tmp_path, monkeypatch):
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--org--small"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision, encoding="utf-8")
    shutil.copytree(pristine, repository / "snapshots" / revision)
    loaded = load("org/small")
    assert loaded.source == "org/small"
    assert loaded.model.name_or_path.endswith(revision)


def test_a_file_that_is_no_gguf(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"x")
    assert fault(tmp_path / "a.bin").code.code == "MOD001"


def test_resolve_leaves_tiny_names_alone(tmp_path):
    assert resolve("tiny-llama:layers=1") == "tiny-llama:layers=1"
    assert resolve(str(tmp_path)) == tmp_path


# --- bad folders ---


def test_an_empty_folder_names_what_is_wanted(tmp_path):
    error = fault(tmp_path)
    assert error.code.code == "MOD003"


def test_an_adapter_folder_names_its_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}', encoding="utf-8")
    error = fault(tmp_path)
    assert error.code.code == "MOD024"
    assert "org/base" in str(error)


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"hidden_size": 64}', '{"model_type": 7}', "\x00\xff"])
def test_a_broken_config(folder, content):
    (folder / "config.json").write_text(content, encoding="utf-8")
    error = fault(folder)
    assert error.code.code == "MOD004"
    assert "config.json" in error.where


def test_a_config_with_impossible_values(folder):
    edit_config(folder, hidden_size="many")
    assert fault(folder).code.code == "MOD004"


def test_an_unknown_model_type(folder):
    edit_config(folder, model_type="lamma")
    error = fault(folder)
    assert error.code.code == "MOD005"
    assert "llama" in error.data["close"]


def test_a_quantised_checkpoint(folder):
    edit_config(folder, quantization_config={"quant_method": "gptq"})
    error = fault(folder)
    assert error.code.code == "MOD023"
    assert "gptq" in str(error)


def test_no_weights(folder):
    (folder / WEIGHTS).unlink()
    error = fault(folder)
    assert error.code.code == "MOD006"
    assert "tokenizer.json" in str(error)


def test_a_pickle_is_refused_and_not_opened(folder, tmp_path):
    class Trap:
        def __reduce__(self):
            return (type(tmp_path).touch, (tmp_path / "ran",))

    (folder / WEIGHTS).unlink()
    torch.save(Trap(), folder / "pytorch_model.bin")
    error = fault(folder)
    assert error.code.code == "MOD007"
    assert "pytorch_model.bin" in str(error)
    assert "weights_only=True" in str(error)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kept", [0, 4, 100, 20_000, -1])
def test_truncated_weights(folder, kept):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:kept])
    error = fault(folder)
    assert error.code.code == "MOD008"
    assert error.data["num_bytes"] == len(whole[:kept])


def test_a_broken_index(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}', encoding="utf-8")
    assert fault(folder).code.code == "MOD008"


def test_an_index_cannot_lead_out_of_the_folder(folder, tmp_path):
    shutil.copy(folder / WEIGHTS, tmp_path / "outside.safetensors")
    index = {"weight_map": {"lm_head.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert fault(folder).code.code == "MOD009"


def test_optimizer_state_beside_the_model_is_not_read(folder):
    save_file({"exp_avg": torch.full((2,), float("nan"))}, folder / "optimizer.safetensors")
    assert load(str(folder)).report.unexpected == ()


# --- bad tensors ---


def test_missing_keys_are_never_filled_in(folder):
    edit_weights(folder, lambda s: s.pop(A_NAME))
    error = fault(folder)
    assert error.code.code == "MOD010"
    assert A_NAME in str(error)


def test_missing_keys_of_an_internlm2_checkpoint(tmp_path):
    folder = write_internlm2_folder(tmp_path / "m")
    edit_weights(folder, lambda s: s.pop("model.layers.0.attention.wqkv.weight"))
    error = fault(folder)
    assert error.code.code == "MOD010"
    assert error.data["num"] == 3


def test_shapes_that_do_not_fit(folder):
    edit_config(folder, intermediate_size=128)
    error = fault(folder)
    assert error.code.code == "MOD012"
    assert error.data["num"] == 6
    assert "(176, 64) in the file, (128, 64) by config.json" in str(error)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_non_finite_weight_is_named_with_its_place(folder, value, dtype):
    def poison(state):
        state[A_NAME] = state[A_NAME].to(dtype)
        state[A_NAME][7, 3] = value

    edit_weights(folder, poison)
    error = fault(folder)
    assert error.code.code == "MOD013"
    assert f"{A_NAME}[7, 3] = {value:g}" in str(error)


def test_weights_beyond_fp16(folder):
    def enlarge(state):
        state[A_NAME][2, 5] = -70000.0
        state["lm_head.weight"][0, 0] = 65504.0

    edit_weights(folder, enlarge)
    error = fault(folder, dtype=torch.float16)
    assert error.code.code == "MOD014"
    assert f"{A_NAME}[2, 5] = -70000" in str(error)
    findings = load(str(folder), dtype=torch.bfloat16).report.findings
    assert [(f.code, f.data["num"], f.data["dtype"]) for f in findings] == [("MOD015", 1, "bfloat16")]


def test_tied_weights_that_differ(folder):
    edit_config(folder, tie_word_embeddings=True)
    error = fault(folder)
    assert error.code.code == "MOD016"
    assert "lm_head.weight" in str(error)


def test_tied_weights_stored_twice_but_equal_are_fine(folder):
    edit_config(folder, tie_word_embeddings=True)
    edit_weights(folder, lambda s: s.update({"lm_head.weight": s["model.embed_tokens.weight"].clone()}))
    assert load(str(folder)).report.tied == (("model.embed_tokens.weight", "lm_head.weight"),)


def test_all_faults_come_together(folder):
    def spoil(state):
        state["model.norm.weight"][0] = float("nan")
        del state[A_NAME]

    edit_weights(folder, spoil)
    edit_config(folder, vocab_size=321)
    with pytest.raises(UserErrors) as caught:
        load(str(folder))
    assert {e.code.code for e in caught.value.errors} == {"MOD010", "MOD012", "MOD013"}


# --- bad tokenizers ---


def test_no_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert fault(folder).code.code == "MOD019"


def test_a_broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text('{"version": "1.0"', encoding="utf-8")
    assert fault(folder).code.code == "MOD019"


def test_a_tokenizer_with_more_ids_than_rows_is_a_warning(tmp_path):
    folder = write_internlm2_folder(tmp_path / "m", spec=TinySpec(vocab=100))
    findings = load(str(folder)).report.findings
    assert [(f.code, f.data["max_id"], f.data["num_rows"]) for f in findings] == [("MOD022", 286, 100)]


def test_read_config_gives_the_raw_fields(folder):
    assert read_config(folder)["model_type"] == "llama"
