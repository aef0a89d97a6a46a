"""The precision table: what auto chooses and why, what is refused, and that requested = actual."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from finitune.core.errors import UserError, UserErrors
from finitune.core.messages.catalogue import set_language
from finitune.models import precision as subject
from finitune.models.precision import PRECISIONS, assert_actual, checkpoint_kwargs, choose, compute_context
from finitune.models.tiny import tiny_llama
from finitune.numerics import codes

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _english():
    set_language("en")
    yield
    set_language(None)


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch):
    """A CPU with the given units and the given time of a half product over an fp32 one."""

    def make(*, amx: bool = False, avx512_bf16: bool = False, ratio: float = 16.0) -> None:
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16, raising=False)
        monkeypatch.setattr(subject, "product_time_ratio", lambda _: ratio)

    return make


def test_trainable_weights_are_never_fp16() -> None:
    assert all(p.weights != torch.float16 for p in PRECISIONS.values())


def test_every_fp16_kind_has_a_scaler_and_no_other_has() -> None:
    assert {n for n, p in PRECISIONS.items() if p.uses_scaler} == {"fp16", "fp16-emulated"}


def test_half_max_is_the_largest_number_of_the_products() -> None:
    for precision in PRECISIONS.values():
        expected = None if precision.products == torch.float32 else torch.finfo(precision.products).max
        assert precision.half_max == expected


@pytest.mark.parametrize("name", PRECISIONS)
def test_requested_is_actual_for_the_whole_table(name: str) -> None:
    precision = choose(name, CPU).precision
    record = assert_actual(nn.Linear(2, 2).to(precision.weights), precision, CPU)
    assert record["requested"] == name
    assert record["actual"] == name.partition("-")[0]
    assert record["product"] == {"fp16": "inf", "bf16": "90112", "fp32": "90000"}[record["actual"]]
    assert json.loads(json.dumps(record)) == record


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp16-emulated", "bf16-emulated"])
def test_a_device_that_computes_fp32_in_secret_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF Trainer, TRL and Accelerate do with fp16=True on a CPU."""
    monkeypatch.setattr(subject, "compute_context", lambda *_: nullcontext())
    with pytest.raises(UserError) as caught:
        assert_actual(None, PRECISIONS[name], CPU)
    assert caught.value.code is codes.NOT_AS_REQUESTED
    assert "fp32" in str(caught.value)


def test_another_half_than_requested_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning turns 16-mixed into bf16-mixed on a CPU."""
    monkeypatch.setattr(subject, "compute_context", lambda *_: torch.autocast("cpu", dtype=torch.bfloat16))
    with pytest.raises(UserError, match="computed bf16"):
        assert_actual(None, PRECISIONS["fp16"], CPU)


def test_half_storage_of_an_fp32_product_is_not_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dtype alone proves nothing: a product that did not round where it should is caught by its value."""
    monkeypatch.setattr(subject, "_probe", lambda *_: torch.tensor([[60000.0]], dtype=torch.float16))
    with pytest.raises(UserError) as caught:
        assert_actual(None, PRECISIONS["fp16"], CPU)
    assert caught.value.data["actual"] == "? in fp16"


def test_fp16_trainable_weights_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).half())
    with pytest.raises(UserError) as caught:
        assert_actual(model, PRECISIONS["fp16"], CPU)
    assert caught.value.code is codes.WEIGHTS_NOT_AS_REQUESTED
    assert caught.value.where == "1.weight"
    assert caught.value.data["count"] == 2


def test_frozen_weights_may_have_any_dtype() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).half().requires_grad_(False))
    assert assert_actual(model, PRECISIONS["fp16"], CPU)["weights"] == ["fp32"]


def test_lora_weights_may_be_fp32_beside_a_bf16_base() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).bfloat16())
    assert assert_actual(model, PRECISIONS["bf16-pure"], CPU)["weights"] == ["bf16", "fp32"]


def test_bf16_weights_under_bf16_are_refused() -> None:
    with pytest.raises(UserError) as caught:
        assert_actual(nn.Linear(2, 2).bfloat16(), PRECISIONS["bf16"], CPU)
    assert caught.value.code is codes.WEIGHTS_NOT_AS_REQUESTED


def test_all_faults_are_raised_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "compute_context", lambda *_: nullcontext())
    with pytest.raises(UserErrors) as caught:
        assert_actual(nn.Linear(2, 2).half(), PRECISIONS["fp16"], CPU)
    assert {e.code.code for e in caught.value.errors} == {"MOD102", "MOD103"}


def test_auto_on_a_cpu_without_bf16_units_is_fp32_and_says_why(cpu) -> None:
    cpu(ratio=0.1)
    choice = choose("auto", CPU)
    assert choice.precision.name == "fp32"
    assert "AMX-BF16" in choice.reason


@pytest.mark.parametrize("units", [{"amx": True}, {"avx512_bf16": True}])
def test_auto_on_a_cpu_with_fast_bf16_units_is_bf16(cpu, units: dict[str, bool]) -> None:
    cpu(ratio=0.5, **units)
    choice = choose("auto", CPU)
    assert choice.precision.name == "bf16"
    assert "0.5" in choice.reason


@pytest.mark.parametrize("ratio", [1.01, 3.0, math.inf, math.nan])
def test_auto_does_not_believe_in_units_that_the_clock_does_not_see(cpu, ratio: float) -> None:
    cpu(amx=True, ratio=ratio)
    assert choose("auto", CPU).precision.name == "fp32"


def test_auto_survives_a_torch_without_the_private_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert choose("auto", CPU).precision.name == "fp32"


@pytest.mark.parametrize(("native", "name"), [(True, "bf16"), (False, "fp16")])
def test_auto_on_cuda_asks_for_native_bf16(native: bool, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A V100 emulates bf16: with emulation counted in, every GPU says yes."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    choice = choose("auto", CUDA)
    assert choice.precision.name == name
    assert "cuda" in choice.reason


@pytest.mark.parametrize(("says", "name"), [(True, "bf16"), (False, "fp16"), (None, "fp32")])
def test_auto_on_another_accelerator_believes_what_it_says(
    says: bool | None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = SimpleNamespace() if says is None else SimpleNamespace(is_bf16_supported=lambda: says)
    monkeypatch.setattr(torch, "xpu", module)
    assert choose("auto", torch.device("xpu")).precision.name == name


def test_auto_on_mps_is_fp32() -> None:
    choice = choose("auto", torch.device("mps"))
    assert choice.precision.name == "fp32"
    assert "mps" in choice.reason


@pytest.mark.parametrize("name", ["fp16", "bf16", "bf16-pure"])
def test_slow_native_half_is_allowed_with_a_warning_that_names_the_emulation(cpu, name: str) -> None:
    cpu(ratio=16.0)
    found = {f.code: f for f in choose(name, CPU).findings}
    assert found["MOD100"].data["emulated"] == f"{name[:4]}-emulated"
    assert found["MOD100"].data["ratio"] == 16.0


@pytest.mark.parametrize("name", ["fp16", "bf16", "fp16-emulated", "bf16-emulated", "fp32"])
def test_fast_or_emulated_half_needs_no_warning(cpu, name: str) -> None:
    cpu(ratio=1.9)
    assert choose(name, CPU).findings == ()


def test_pure_bf16_warns_of_lost_updates(cpu) -> None:
    cpu(ratio=0.5)
    assert [f.code for f in choose("bf16-pure", CPU).findings] == ["MOD101"]


def test_the_warning_of_lost_updates_is_true() -> None:
    weight = torch.ones(1, dtype=torch.bfloat16)
    assert (weight + 2.0**-9).item() == 1.0
    assert (weight - 2.0**-10).item() == 1.0
    assert (weight + 2.0**-7).item() > 1.0


def test_pure_fp16_is_refused_with_reason_and_cure() -> None:
    with pytest.raises(UserError, match="eps 1e-8 is 0 in fp16") as caught:
        choose("fp16-pure", CPU)
    assert caught.value.code is codes.PURE_FP16
    assert torch.tensor(1e-8, dtype=torch.float16).item() == 0.0


@pytest.mark.parametrize(
    ("typed", "meant"), [("fp23", "fp32"), ("bf16_pure", "bf16-pure"), ("", "auto"), ("FP16", "fp16")]
)
def test_an_unknown_name_is_refused_with_the_nearest_known(typed: str, meant: str) -> None:
    with pytest.raises(UserError) as caught:
        choose(typed, CPU)
    assert caught.value.code is codes.UNKNOWN_PRECISION
    assert caught.value.data["suggestion"] == meant


def test_emulation_off_the_cpu_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        choose("fp16-emulated", CUDA)
    assert caught.value.code is codes.EMULATION_NEEDS_CPU
    assert caught.value.data["native"] == "fp16"


def test_a_device_that_cannot_multiply_the_dtype_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(UserError) as caught:
        choose("bf16", CUDA)
    assert caught.value.code is codes.DEVICE_CANNOT
    assert caught.value.data["problem"]


def test_reasons_exist_in_chinese() -> None:
    set_language("zh")
    assert choose("fp32", CPU).reason == "fp32：按要求"


def test_the_time_ratio_is_a_positive_number() -> None:
    assert subject.product_time_ratio(torch.float16) > 0


@pytest.mark.parametrize("name", PRECISIONS)
def test_checkpointing_under_each_precision_gives_the_gradients_of_no_checkpointing(name: str) -> None:
    precision = PRECISIONS[name]

    def gradient(checkpointed: bool) -> torch.Tensor:
        torch.manual_seed(0)
        layer = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)).to(precision.weights)
        x = torch.randn(3, 4, dtype=precision.weights, requires_grad=True)
        with compute_context(precision, CPU):
            if checkpointed:
                out = torch.utils.checkpoint.checkpoint(layer, x, **checkpoint_kwargs(precision))
            else:
                out = layer(x)
        out.float().square().sum().backward()
        assert x.grad is not None
        return x.grad

    assert torch.equal(gradient(True), gradient(False))


def first_overflow(name: str, amplify: float) -> tuple[str, int]:
    """The first module of a small Llama whose output is not finite, and how many elements are not."""
    model = tiny_llama(0)
    with torch.no_grad():
        for part in ("up_proj", "down_proj"):
            model.get_parameter(f"model.layers.1.mlp.{part}.weight").mul_(amplify)
    bad: list[tuple[str, int]] = []
    for path, module in model.named_modules():

        def look(_module: nn.Module, _inputs: object, out: object, path: str = path) -> None:
            if isinstance(out, torch.Tensor) and not out.isfinite().all():
                bad.append((path, int((~out.isfinite()).sum())))

        module.register_forward_hook(look)
    ids_BT = torch.arange(32).reshape(2, 16)
    with torch.no_grad(), compute_context(PRECISIONS[name], CPU):
        model(input_ids=ids_BT)
    return bad[0] if bad else ("", 0)


@pytest.mark.parametrize("amplify", [1.0, 4096.0])
def test_a_llama_overflows_at_the_same_place_in_emulated_and_native_fp16(amplify: float) -> None:
    emulated = first_overflow("fp16-emulated", amplify)
    assert emulated == first_overflow("fp16", amplify)
    assert emulated[0] == ("" if amplify == 1.0 else "model.layers.1.mlp.down_proj")
    assert first_overflow("fp32", amplify) == first_overflow("bf16-emulated", amplify) == ("", 0)
