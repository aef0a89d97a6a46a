"""LoRA: checked targets, deterministic start, fp32 adapters, nothing changed before training."""

import re

import pytest
import torch
from torch import nn

from finitune.core.errors import UserError, UserErrors
from finitune.models.family import family_for
from finitune.models.freeze import trainable_parameters
from finitune.models.layout import bare
from finitune.models.lora import LoraSettings, attach, is_adapter, load_adapter
from finitune.models.save import save_model
from finitune.models.tiny import tiny_llama, tiny_tokenizer

FAMILY = family_for("llama")
IDS = torch.arange(3, 40)[None]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def adapted(model: nn.Module) -> set[str]:
    """Ends of the names of the modules that carry an adapter."""
    found = (re.search(r"(\w+)\.lora_A", name) for name, _ in trainable_parameters(model))
    return {match[1] for match in found if match}


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}, {"dropout": 0.3}])
def test_a_fresh_adapter_changes_nothing(options):
    plain = logits(tiny_llama())
    model = attach(tiny_llama(), LoraSettings(r=4, **options), FAMILY).eval()
    assert torch.allclose(logits(model), plain, atol=1e-6 if options.get("use_dora") else 0, rtol=0)


def test_the_start_is_a_function_of_the_seed_and_leaves_the_global_state():
    torch.manual_seed(123)
    before = torch.get_rng_state()
    a, b, c = (attach(tiny_llama(), LoraSettings(r=4, init_seed=s), FAMILY) for s in (7, 7, 8))
    assert torch.equal(before, torch.get_rng_state())
    ours, theirs, others = (dict(trainable_parameters(m)) for m in (a, b, c))
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert any(not torch.equal(ours[n], others[n]) for n in ours)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("auto", set(FAMILY.lora_targets)),
        ("all-linear", set(FAMILY.lora_targets)),
        (("q_proj", "v_proj"), {"q_proj", "v_proj"}),
        (("mlp.down_proj",), {"down_proj"}),
        ("o_proj", {"o_proj"}),
    ],
)
def test_targets(targets, expected):
    assert adapted(attach(tiny_llama(), LoraSettings(r=2, targets=targets), FAMILY)) == expected


def test_rank_alpha_and_dropout_reach_peft():
    model = attach(tiny_llama(), LoraSettings(r=3, alpha=12, dropout=0.25), FAMILY)
    layer = bare(model).model.layers[0].self_attn.q_proj
    assert layer.r["default"] == 3
    assert layer.scaling["default"] == 4
    assert layer.lora_dropout["default"].p == 0.25
    rs = attach(tiny_llama(), LoraSettings(r=4, alpha=12, use_rslora=True), FAMILY)
    assert bare(rs).model.layers[0].self_attn.q_proj.scaling["default"] == 6  # alpha / sqrt(r)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_and_whole_modules_are_fp32_on_a_half_base(dtype):
    base = tiny_llama().to(dtype)
    model = attach(base, LoraSettings(r=2, modules_to_save=("lm_head", "embed_tokens", "norm")), FAMILY)
    assert {p.dtype for _, p in trainable_parameters(model)} == {torch.float32}
    assert any("lm_head" in name for name, _ in trainable_parameters(model))
    assert bare(model).model.layers[0].self_attn.q_proj.base_layer.weight.dtype == dtype
    output = model(input_ids=IDS, labels=IDS)
    output.loss.backward()
    assert output.logits.dtype == dtype
    assert all(torch.isfinite(p.grad).all() for _, p in trainable_parameters(model))


def test_a_tied_head_that_is_trained_whole_stays_one_tensor():
    model = attach(tiny_llama(tied=1), LoraSettings(r=2, modules_to_save=("embed_tokens",)), FAMILY)
    core = bare(model)
    assert core.lm_head.weight is core.model.embed_tokens.weight


def test_each_target_that_matches_nothing_is_named_with_what_exists():
    settings = LoraSettings(targets=("q_proj", "query_proj", "W_pack"), modules_to_save=("lm_heed",))
    with pytest.raises(UserErrors) as caught:
        attach(tiny_llama(), settings, FAMILY)
    errors = {e.data["target"]: e for e in caught.value.errors}
    assert errors.keys() == {"query_proj", "W_pack", "lm_heed"}
    assert {e.code.code for e in errors.values()} == {"MOD026"}
    assert "q_proj" in errors["query_proj"].data["close"]
    assert "lm_head" in errors["lm_heed"].data["close"]
    assert "down_proj" in str(errors["W_pack"])


@pytest.mark.parametrize(
    "options",
    [{"r": 0}, {"alpha": 0}, {"alpha": float("nan")}, {"dropout": 1.0}, {"dropout": -0.1}, {"dropout": float("nan")}],
)
def test_settings_out_of_range(options):
    with pytest.raises(UserError) as caught:
        attach(tiny_llama(), LoraSettings(**options), FAMILY)
    assert caught.value.code.code == "MOD027"


def test_dora_on_a_zero_row_is_refused_and_plain_lora_is_not():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[5] = 0
    with pytest.raises(UserError) as caught:
        attach(model, LoraSettings(r=2, use_dora=True), FAMILY)
    assert caught.value.code.code == "MOD028"
    assert "model.layers.1.mlp.up_proj row 5" in str(caught.value)
    attach(model, LoraSettings(r=2), FAMILY)


def test_the_zero_row_would_have_been_nan():
    from peft import LoraConfig, get_peft_model

    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[5] = 0
    dora = get_peft_model(model, LoraConfig(r=2, use_dora=True, target_modules=["up_proj"]))
    assert logits(dora).isnan().any()


def test_without_dropout_the_adapter_adds_only_its_two_matrix_products():
    """However the layer is computed, it multiplies no more than base + A + B."""
    from torch.utils.flop_counter import FlopCounterMode

    def flops(model: nn.Module) -> int:
        # The counter knows addmm but not its in-place form.
        in_place = {torch.ops.aten.addmm_: lambda _out, a, b, **_: 2 * a[0] * a[1] * b[1]}
        with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
            logits(model)
        return counter.get_total_flops()

    r, tokens = 4, IDS.shape[1]
    plain, model = tiny_llama(), attach(tiny_llama(), LoraSettings(r=r), FAMILY).eval()
    linears = [m for n, m in plain.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    expected = sum(2 * tokens * r * (m.in_features + m.out_features) for m in linears)
    assert flops(model) - flops(plain) == expected


# --- adapter folders ---


@pytest.fixture
def trained(tmp_path):
    model = attach(tiny_llama(), LoraSettings(r=2), FAMILY)
    with torch.no_grad():
        for index, (_, p) in enumerate(trainable_parameters(model)):
            p.normal_(std=0.1, generator=torch.Generator().manual_seed(index))
    save_model(model, tiny_tokenizer(), tmp_path / "a", family=FAMILY)
    return model.eval(), tmp_path / "a"


def test_load_adapter_restores_the_bits(trained):
    model, folder = trained
    fresh = attach(tiny_llama(), LoraSettings(r=2), FAMILY).eval()
    assert is_adapter(fresh)
    assert not torch.equal(logits(fresh), logits(model))
    load_adapter(fresh, folder)
    assert torch.equal(logits(fresh), logits(model))
    assert [n for n, _ in trainable_parameters(fresh)] == [n for n, _ in trainable_parameters(model)]


def test_an_adapter_of_another_rank_or_target_does_not_fit(trained):
    _, folder = trained
    for settings in (LoraSettings(r=3), LoraSettings(r=2, targets=("q_proj",))):
        with pytest.raises(UserError) as caught:
            load_adapter(attach(tiny_llama(), settings, FAMILY), folder)
        assert caught.value.code.code == "MOD025"


def test_a_cut_or_poisoned_or_absent_adapter(trained, tmp_path):
    from safetensors.torch import load_file, save_file

    _, folder = trained
    path = folder / "adapter_model.safetensors"
    fresh = attach(tiny_llama(), LoraSettings(r=2), FAMILY)
    state = load_file(path)
    next(iter(state.values()))[0, 0] = float("nan")
    codes = []
    for spoil in (lambda: save_file(state, path), lambda: path.write_bytes(path.read_bytes()[:500]), path.unlink):
        spoil()
        with pytest.raises(UserError) as caught:
            load_adapter(fresh, folder)
        codes.append(caught.value.code.code)
    assert codes == ["MOD013", "MOD008", "MOD006"]
