"""Answers: equal to transformers' where it works, a Finding where it would die, and no trace left behind."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finitune.core.errors import UserError, UserErrors
from finitune.core.types import Finding
from finitune.models.chat import Sampling, default_stop_ids, draw, encode_prompt, generate, stream
from finitune.models.family import family_for
from finitune.models.freeze import enable_checkpointing
from finitune.models.lora import LoraSettings, attach
from finitune.models.tiny import tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
ASK = [{"role": "user", "content": "hello the world"}]


def confident_model(seed=0):
    """A random model with spread-out logits, so that choices are not near ties."""
    model = tiny_llama(seed)
    with torch.no_grad():
        model.lm_head.weight.mul_(40)
    return model


def poisoned(value=float("nan")):
    model = confident_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = value
    return model


def test_greedy_equals_transformers_generate():
    model = confident_model()
    ids = encode_prompt(TOKENIZER, ASK)
    reference = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False, eos_token_id=3, pad_token_id=0)
    expected = [t for t in reference[0, len(ids) :].tolist() if t != 3]
    answer = generate(model, TOKENIZER, ASK, max_new_tokens=24)
    assert answer.num_tokens == len(expected) > 4
    assert answer.text == TOKENIZER.decode(expected, skip_special_tokens=True)
    assert answer.finding is None
    assert answer.time_s > 0


def test_the_seed_names_the_answer():
    model = confident_model()
    a, b, c = (generate(model, TOKENIZER, ASK, temperature=1.0, max_new_tokens=20, seed=s).text for s in (1, 1, 2))
    assert a == b != c


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_logits_are_a_finding(value, temperature):
    answer = generate(poisoned(value), TOKENIZER, ASK, temperature=temperature)
    assert answer.finding is not None
    assert answer.finding.code == "MOD033"
    assert answer.finding.data == {"position": len(encode_prompt(TOKENIZER, ASK)), "num_tokens": 0}
    assert (answer.text, answer.num_tokens) == ("", 0)


def test_transformers_dies_where_we_report():
    ids = torch.tensor([encode_prompt(TOKENIZER, ASK)])
    with pytest.raises(RuntimeError, match="probability tensor contains either"):
        poisoned().generate(ids, do_sample=True, max_new_tokens=2, pad_token_id=0)


def test_text_up_to_the_failure_is_kept():
    model = confident_model()
    first = generate(model, TOKENIZER, ASK, max_new_tokens=1)
    ids = encode_prompt(TOKENIZER, ASK)
    second = int(model(torch.tensor([ids])).logits[0, -1].argmax())
    with torch.no_grad():
        assert second not in ids
        model.model.embed_tokens.weight[second] = float("nan")
    answer = generate(model, TOKENIZER, ASK, max_new_tokens=10)
    assert answer.text == first.text
    assert answer.num_tokens == 1
    assert answer.finding is not None
    assert answer.finding.data["position"] == len(ids) + 1


def test_nothing_is_left_behind():
    model = attach(tiny_llama(), LoraSettings(r=2, dropout=0.5), family_for("llama"))
    enable_checkpointing(model)
    model.train()
    model.get_base_model().model.layers[0].eval()  # a part that was in eval mode stays in it
    modes = [m.training for m in model.modules()]
    flags = [getattr(m, "gradient_checkpointing", None) for m in model.modules()]
    weights = [p.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    for spoil in (False, True):
        if spoil:
            model.get_base_model().model.norm.weight.data[0] = float("nan")
        generate(model, TOKENIZER, ASK, temperature=1.0, max_new_tokens=3)
        assert [m.training for m in model.modules()] == modes
        assert [getattr(m, "gradient_checkpointing", None) for m in model.modules()] == flags
        assert torch.equal(torch.get_rng_state(), state)
        assert all(p.grad is None for p in model.parameters())
    assert sum(not torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True)) == 1
    assert torch.is_grad_enabled()


def test_the_cache_is_used_although_checkpointing_is_on():
    model = tiny_llama()
    enable_checkpointing(model)
    model.train()
    lengths = []
    model.model.embed_tokens.register_forward_hook(lambda _m, args, _o: lengths.append(args[0].shape[1]))
    generate(model, TOKENIZER, ASK, max_new_tokens=4, temperature=1.0, stop_ids=())
    assert lengths == [len(encode_prompt(TOKENIZER, ASK)), 1, 1, 1]


def test_an_outer_autocast_applies():
    model = confident_model()
    seen = []
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda _m, _a, out: seen.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in stream(model, TOKENIZER, ASK, max_new_tokens=2, stop_ids=()):
            pass
    assert set(seen) == {torch.bfloat16}


def test_a_value_beyond_fp16_is_a_finding_in_fp16_only():
    model = confident_model()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1e7)
        model.model.layers[0].mlp.up_proj.weight.mul_(30)
    assert generate(model, TOKENIZER, ASK, max_new_tokens=2).finding is None
    assert generate(model.half(), TOKENIZER, ASK, max_new_tokens=2).finding is not None


def test_stream_gives_the_same_text_in_pieces_of_whole_characters():
    model = confident_model(seed=3)
    options = {"max_new_tokens": 40, "temperature": 1.0, "stop_ids": ()}
    pieces = list(stream(model, TOKENIZER, ASK, **options))
    assert len(pieces) > 3
    assert all(isinstance(p, str) and p for p in pieces)
    assert "".join(pieces) == generate(model, TOKENIZER, ASK, **options).text


def test_a_stream_that_fails_ends_with_the_finding():
    *_, last = stream(poisoned(), TOKENIZER, ASK)
    assert isinstance(last, Finding)


def test_training_may_go_on_between_the_pieces():
    model = tiny_llama().train()
    for _ in stream(model, TOKENIZER, ASK, max_new_tokens=3, stop_ids=()):
        assert model.training
        assert torch.is_grad_enabled()


def test_answers_end_at_a_stop_token():
    model = confident_model()
    ids = encode_prompt(TOKENIZER, ASK)
    first = int(model(torch.tensor([ids])).logits[0, -1].argmax())
    assert generate(model, TOKENIZER, ASK, stop_ids=(first,)).num_tokens == 0
    model.generation_config.eos_token_id = [first, 200]
    assert set(default_stop_ids(model, TOKENIZER)) == {3, first, 200}
    assert generate(model, TOKENIZER, ASK).num_tokens == 0


def test_a_plain_prompt_needs_no_template():
    assert encode_prompt(TOKENIZER, "hi") == TOKENIZER("hi").input_ids
    assert generate(confident_model(), TOKENIZER, "hi", max_new_tokens=2).num_tokens <= 2


def test_messages_that_cannot_be_rendered():
    bare = tiny_tokenizer()
    bare.chat_template = None
    strict = tiny_tokenizer()
    strict.chat_template = "{{ raise_exception('no system role') }}"
    for tokenizer, messages in ((bare, ASK), (strict, ASK), (TOKENIZER, ""), (TOKENIZER, [{"content": "x"}])):
        with pytest.raises(UserError) as caught:
            generate(tiny_llama(), tokenizer, messages)
        assert caught.value.code.code == "MOD034"


def test_settings_out_of_range_are_named_together():
    with pytest.raises(UserErrors) as caught:
        Sampling(max_new_tokens=0, temperature=float("nan"), top_p=0.0)
    assert [e.data["field"] for e in caught.value.errors] == ["max_new_tokens", "temperature", "top_p"]


@settings(deadline=None, max_examples=100)
@given(
    logits=st.lists(st.floats(-60, 60, width=32), min_size=1, max_size=12),
    temperature=st.one_of(st.just(0.0), st.floats(1e-30, 100)),
    top_p=st.floats(1e-6, 1),
    seed=st.integers(0, 2**40),
)
def test_draw_always_gives_a_likely_token(logits, temperature, top_p, seed):
    tensor = torch.tensor(logits)
    token = draw(tensor, temperature, top_p, torch.Generator().manual_seed(seed))
    probs = (tensor.double() / max(temperature, 1e-12)).softmax(0)
    better = probs[probs > probs[token]].sum()
    assert 0 <= token < len(logits)
    assert better < top_p + 1e-5
    if temperature == 0:
        assert logits[token] == max(logits)


def test_draws_follow_the_probabilities():
    logits = torch.tensor([math.log(0.5), math.log(0.3), math.log(0.2)])
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(torch.tensor([draw(logits, 1.0, 1.0, generator) for _ in range(4000)]), minlength=3) / 4000
    assert (counts - torch.tensor([0.5, 0.3, 0.2])).abs().max() < 0.03
    cut = {draw(logits, 1.0, 0.6, generator) for _ in range(200)}
    assert cut == {0, 1}
