"""Tiny models and their tokenizer: no files, the same bits for the same seed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finitune.core.errors import UserError
from finitune.models.load import load
from finitune.models.tiny import SPECIALS, TinySpec, parse_name, tiny_internlm2, tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


@pytest.mark.parametrize("make", [tiny_llama, tiny_internlm2])
def test_a_seed_names_the_bits(make):
    before = torch.get_rng_state()
    a, b, c = make(1), make(1), make(2)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)
    assert 100_000 < sum(p.numel() for p in a.parameters()) < 300_000


def test_a_random_model_knows_nothing():
    ids = torch.randint(0, 287, (4, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = tiny_llama()(input_ids=ids, labels=ids).loss
    assert abs(float(loss) - torch.log(torch.tensor(320.0))) < 0.1


def test_sizes_are_overridable_in_the_name():
    model = load("tiny-internlm2:hidden=32,layers=1,vocab=512,bias=1,kv_heads=4").model
    assert model.config.hidden_size == 32
    assert len(model.model.layers) == 1
    assert model.config.vocab_size == 512
    assert model.model.layers[0].self_attn.q_proj.bias is not None


def test_the_source_gives_the_same_model_whatever_the_seed():
    loaded = load("tiny-llama:layers=1", seed=5)
    assert loaded.source == "tiny-llama:layers=1,seed=5"
    again = load(loaded.source, seed=6)
    assert again.source == loaded.source
    assert torch.equal(loaded.model.lm_head.weight, again.model.lm_head.weight)


@pytest.mark.parametrize("option", ["deep=3", "layers", "layers=two", "vocab=10", "hidden=30", "kv_heads=3"])
def test_a_bad_option_is_a_clear_error(option):
    with pytest.raises(UserError) as caught:
        load(f"tiny-llama:{option}")
    assert caught.value.code.code == "MOD036"
    assert "hidden, layers" in str(caught.value)
    assert "kv_heads" in caught.value.data["reason"] or "NAME=NUMBER" in caught.value.data["reason"]


def test_other_names_are_not_tiny():
    assert parse_name("tiny-gpt") is None
    assert parse_name("tiny-llama") == ("tiny-llama", TinySpec())


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=80))
def test_any_text_survives_the_tokenizer(text):
    ids = TOKENIZER(text, add_special_tokens=False).input_ids
    assert all(0 <= i < 287 for i in ids)
    assert TOKENIZER.decode(ids) == text


def test_chat_markers_are_single_tokens_and_distinct():
    assert [TOKENIZER(s).input_ids for s in SPECIALS] == [[0], [1], [2], [3]]
    assert TOKENIZER.pad_token_id != TOKENIZER.eos_token_id
    shown = TOKENIZER.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert shown == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
