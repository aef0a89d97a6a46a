"""InternLM2 becomes a Llama exactly: judged by an independent forward in plain torch."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from finitune.core.errors import UserError
from finitune.models.families.internlm2 import FAMILY, llama_config, to_internlm2, to_llama
from finitune.models.load import load
from finitune.models.save import save_model
from finitune.models.tiny import TinySpec, internlm2_config, internlm2_state, write_internlm2_folder

# --- the reference: InternLM2's forward written from its description, sharing no code with the package ---


def rms_norm(x, weight, eps):
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def rope_tables(config, length):
    size = config["hidden_size"] // config["num_attention_heads"]
    base, positions = config["rope_theta"], torch.arange(length, dtype=torch.float32)
    scaling = config["rope_scaling"]
    if scaling and scaling["type"] == "linear":
        positions = positions / scaling["factor"]
    longest = config["max_position_embeddings"]
    if scaling and scaling["type"] == "dynamic" and length > longest:
        factor = scaling["factor"]
        base = base * ((factor * length / longest) - (factor - 1)) ** (size / (size - 2))
    frequencies = 1.0 / (base ** (torch.arange(0, size, 2, dtype=torch.float32) / size))
    angles = torch.outer(positions, frequencies)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


def attention(x, state, stem, config, cos, sin):
    batch, length, hidden = x.shape
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    group, size = heads // kv_heads, hidden // heads
    fused = torch.nn.functional.linear(x, state[f"{stem}.wqkv.weight"], state.get(f"{stem}.wqkv.bias"))
    fused = fused.view(batch, length, kv_heads, group + 2, size)
    q = fused[..., :group, :].reshape(batch, length, heads, size).transpose(1, 2)
    k = fused[..., -2, :].transpose(1, 2).repeat_interleave(group, dim=1)
    v = fused[..., -1, :].transpose(1, 2).repeat_interleave(group, dim=1)
    scores = rotate(q, cos, sin) @ rotate(k, cos, sin).transpose(-1, -2) / math.sqrt(size)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    weights = scores.masked_fill(~causal, -math.inf).softmax(-1)
    out = (weights @ v).transpose(1, 2).reshape(batch, length, hidden)
    return torch.nn.functional.linear(out, state[f"{stem}.wo.weight"], state.get(f"{stem}.wo.bias"))


def reference_logits(state, config, ids):
    x = state["model.tok_embeddings.weight"][ids]
    cos, sin = rope_tables(config, ids.shape[1])
    eps = config["rms_norm_eps"]
    for i in range(config["num_hidden_layers"]):
        stem = f"model.layers.{i}"
        normed = rms_norm(x, state[f"{stem}.attention_norm.weight"], eps)
        x = x + attention(normed, state, f"{stem}.attention", config, cos, sin)
        normed = rms_norm(x, state[f"{stem}.ffn_norm.weight"], eps)
        gate = torch.nn.functional.silu(normed @ state[f"{stem}.feed_forward.w1.weight"].T)
        x = (
            x
            + (gate * (normed @ state[f"{stem}.feed_forward.w3.weight"].T)) @ state[f"{stem}.feed_forward.w2.weight"].T
        )
    return rms_norm(x, state["model.norm.weight"], eps) @ state["output.weight"].T


# --- helpers ---

CASES = {
    "plain": (TinySpec(), {}),
    "bias": (TinySpec(bias=1), {}),
    "one key/value head": (TinySpec(kv_heads=1), {}),
    "no grouping": (TinySpec(kv_heads=4), {}),
    "dynamic NTK beyond the trained length": (
        TinySpec(positions=64),
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    ),
    "linear RoPE scaling": (TinySpec(), {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "another RoPE base": (TinySpec(), {"rope_theta": 1_000_000.0}),
}


def loud(state):
    """Larger random weights, so that every part of the forward matters to the logits."""
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.rand(t.shape, generator=generator) + 0.5
        if "norm" in name
        else torch.randn(t.shape, generator=generator) * 0.08
        for name, t in state.items()
    }


def loaded_case(tmp_path, spec, extra):
    from safetensors.torch import save_file

    folder = write_internlm2_folder(tmp_path / "m", spec=spec, **extra)
    state = loud(load_file(folder / "model.safetensors"))
    save_file(state, folder / "model.safetensors")
    return folder, state, json.loads((folder / "config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("attention_kind", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CASES)
def test_logits_equal_the_independent_reference(name, attention_kind, tmp_path):
    folder, state, config = loaded_case(tmp_path, *CASES[name])
    model = load(str(folder), attn_implementation=attention_kind).model
    ids = torch.randint(0, config["vocab_size"], (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = model(input_ids=ids).logits, reference_logits(state, config, ids)
    assert theirs.abs().max() > 1
    assert (ours - theirs).abs().max() <= 1e-5


def test_the_comparison_notices_swapped_key_and_value(tmp_path):
    folder, state, config = loaded_case(tmp_path, TinySpec(), {})
    fused = state["model.layers.0.attention.wqkv.weight"].view(2, 4, 16, 64)
    state["model.layers.0.attention.wqkv.weight"] = fused[:, [0, 1, 3, 2]].reshape(128, 64)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        ours = load(str(folder)).model(input_ids=ids).logits
    assert (ours - reference_logits(state, config, ids)).abs().max() > 1e-2


def test_no_code_of_the_checkpoint_is_run(tmp_path):
    folder, _, config = loaded_case(tmp_path, TinySpec(), {})
    trap = f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\nclass InternLM2ForCausalLM: pass\n"
    (folder / "modeling_internlm2.py").write_text(trap, encoding="utf-8")
    (folder / "tokenization_internlm2.py").write_text(trap, encoding="utf-8")
    path = folder / "tokenizer_config.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["auto_map"] = {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]}
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    assert "auto_map" in config
    load(str(folder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", CASES)
def test_saving_in_the_original_layout_gives_every_bit_back(name, tmp_path):
    folder, state, config = loaded_case(tmp_path, *CASES[name])
    loaded = load(str(folder))
    back = save_model(loaded.model, loaded.tokenizer, tmp_path / "back", family=loaded.family, layout="internlm2")
    again = load_file(back / "model.safetensors")
    assert again.keys() == state.keys()
    assert all(torch.equal(again[k], state[k]) and again[k].dtype == state[k].dtype for k in state)
    raw = json.loads((back / "config.json").read_text(encoding="utf-8"))
    for key in ("model_type", "bias", "rope_theta", "num_key_value_heads", "vocab_size", "max_position_embeddings"):
        assert raw[key] == config[key]
    assert (raw["rope_scaling"] or {}).items() >= (config["rope_scaling"] or {}).items()


@settings(deadline=None, max_examples=30)
@given(
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    half=st.integers(1, 3),
    bias=st.booleans(),
    tied=st.booleans(),
)
def test_there_and_back_is_the_identity_for_any_grouping(kv_heads, group, half, bias, tied):
    heads = kv_heads * group
    spec = TinySpec(
        hidden=heads * 2 * half, heads=heads, kv_heads=kv_heads, layers=1, vocab=8, mlp=4, bias=bias, tied=tied
    )
    raw, state = internlm2_config(spec), internlm2_state(spec, 0)
    back, raw_back = to_internlm2(to_llama(state, raw), llama_config(raw))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[k], state[k]) for k in state)
    assert raw_back["bias"] == bool(bias)


def test_a_fused_weight_of_another_size_is_a_clear_error():
    spec = TinySpec()
    raw = internlm2_config(spec, num_key_value_heads=1)
    with pytest.raises(UserError) as caught:
        to_llama(internlm2_state(spec, 0), raw)
    assert caught.value.code.code == "MOD012"
    assert "wqkv" in str(caught.value)
    assert "(128, 64)" in str(caught.value)


def test_fields_that_internlm2_leaves_out_take_its_own_defaults():
    config = llama_config({"model_type": "internlm2", "hidden_size": 64, "num_attention_heads": 4})
    assert config.attention_bias
    assert not config.mlp_bias
    assert not config.tie_word_embeddings
    assert config.num_key_value_heads == 4
    assert FAMILY.convert is to_llama
