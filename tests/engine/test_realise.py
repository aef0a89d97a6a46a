"""Conditions come into force on a tiny Llama in every half precision, cure what they should, and leave no trace."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from finitune.engine.conditions import AS_CONFIGURED, Conditions, NotPossible
from finitune.engine.realise import Realiser, clip_norm, learning_rate
from finitune.numerics.half import checkpoint_contexts, emulated_half

DOWN = "model.layers.0.mlp.down_proj"
FP32, BF16, MATH = Conditions(precision="fp32"), Conditions(precision="bf16"), Conditions(attention="math")
SDPA = Conditions(attention="sdpa")
IDS = torch.arange(2, 14).reshape(2, 6)
LABELS = IDS.clone()

native = partial(torch.autocast, "cpu", dtype=torch.float16)
emulated = partial(emulated_half, torch.float16)
MIXED = [pytest.param(native, id="native"), pytest.param(emulated, id="emulated")]


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, attn_implementation="sdpa", **changes)).train()


def overflowing() -> LlamaForCausalLM:
    """The output of one down_proj passes 65504; its input and everything else are ordinary."""
    model = llama()
    with torch.no_grad():
        model.get_submodule(DOWN).weight.mul_(3e8)
    return model


def step(model: nn.Module, region: Callable[[], AbstractContextManager[Any]] = nullcontext, **inputs: Any) -> Tensor:
    """Loss of one forward; gradients are left on the parameters."""
    with region():
        logits = model(input_ids=IDS, use_cache=False, **inputs).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), LABELS[:, 1:].flatten())
    loss.backward()
    return loss.detach()


def gradients(model: nn.Module) -> list[Tensor]:
    found = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def is_good(model: nn.Module, loss: Tensor) -> bool:
    found = gradients(model)
    assert found
    return bool(loss.isfinite()) and all(bool(g.isfinite().all()) for g in found)


def everything(model: nn.Module) -> list[Any]:
    """Bits, dtypes and storage of weights, hooks, config: what must be as before."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    tensors = [*model.parameters(), *model.buffers()]
    values = [(id(t), t.dtype, t.data_ptr(), t.detach().view(whole[t.element_size()]).tolist()) for t in tensors]
    hooks = [(list(m._forward_hooks), list(m._forward_pre_hooks)) for m in model.modules()]
    config = getattr(model, "config", None)
    return [
        values,
        hooks,
        copy.deepcopy(vars(config)) if config is not None else None,
        torch.is_autocast_enabled("cpu"),
    ]


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    original = torch.autocast.__enter__
    yield
    assert torch.autocast.__enter__ is original
    assert not torch.is_autocast_enabled("cpu")


# ---- cures ----


@pytest.mark.parametrize("region", MIXED)
@pytest.mark.parametrize("conditions", [FP32, BF16, Conditions(fp32_modules=(DOWN,))], ids=["fp32", "bf16", "island"])
def test_an_overflow_in_mixed_precision_is_cured_and_comes_back(region: Any, conditions: Conditions) -> None:
    model = overflowing()
    before = everything(model)
    realiser = Realiser(model, None)
    assert not is_good(model, step(model, region))
    realiser.adopt(conditions)
    with realiser.forward():
        loss = step(model, region)
    assert is_good(model, loss)
    assert realiser.seen.half == "fp16"
    realiser.adopt(AS_CONFIGURED)
    assert everything(model) == before
    with realiser.forward():
        assert not is_good(model, step(model, region))


@pytest.mark.parametrize("region", MIXED)
def test_an_island_on_another_module_does_not_cure(region: Any) -> None:
    model = overflowing()
    realiser = Realiser(model, None)
    realiser.adopt(Conditions(fp32_modules=(DOWN.replace("0", "1"), DOWN.replace("down_proj", "up_proj"))))
    with realiser.forward():
        assert not is_good(model, step(model, region))
    realiser.close()


@pytest.mark.parametrize("conditions", [FP32, BF16], ids=["fp32", "bf16"])
def test_an_overflow_of_half_weights_is_cured_by_casting_them(conditions: Conditions) -> None:
    model = overflowing_half()
    before = everything(model)
    realiser = Realiser(model, None)
    assert not is_good(model, step(model))
    realiser.adopt(conditions)
    with realiser.forward():
        assert is_good(model, step(model))
    realiser.adopt(AS_CONFIGURED)
    assert everything(model) == before
    assert not is_good(model, step(model))


def overflowing_half() -> LlamaForCausalLM:
    """gate * up passes 65504 inside one MLP; its output is ordinary."""
    model = llama()
    with torch.no_grad():
        mlp = model.get_submodule(DOWN.removesuffix(".down_proj"))
        mlp.gate_proj.weight.mul_(3e4)
        mlp.up_proj.weight.mul_(3e3)
        mlp.down_proj.weight.mul_(1e-5)
    return model.half()


def test_an_overflow_inside_a_module_of_half_weights_is_cured_by_an_island() -> None:
    model = overflowing_half()
    before = everything(model)
    realiser = Realiser(model, None)
    mlp = DOWN.removesuffix(".down_proj")
    outputs: list[Tensor] = []
    handle = model.get_submodule(mlp).register_forward_hook(lambda m, a, out: outputs.append(out))
    realiser.adopt(Conditions(fp32_modules=(mlp,)))
    with realiser.forward():
        loss = step(model)
    grads = {n: p.grad for n, p in model.named_parameters()}
    assert all(g is not None and g.dtype == torch.float16 and g.isfinite().all() for g in grads.values())
    assert grads[DOWN + ".weight"].abs().sum() > 0
    assert loss.isfinite()
    assert outputs[0].dtype == torch.float16, "the rest of the model computes with half weights"
    realiser.close()
    handle.remove()
    assert everything(model) == before


def test_what_does_not_fit_the_half_dtype_does_not_leave_an_island_of_half_weights() -> None:
    """The rest of such a model could not take fp32: here only the precision of all of it cures."""
    model = overflowing_half()
    with torch.no_grad():
        model.get_submodule(DOWN).weight.mul_(1e6)
    realiser = Realiser(model, None)
    realiser.adopt(Conditions(fp32_modules=(DOWN.removesuffix(".down_proj"),)))
    with realiser.forward():
        assert not is_good(model, step(model))
    realiser.adopt(FP32)
    with realiser.forward():
        assert is_good(model, step(model))
    realiser.close()


# ---- what an island is ----


@pytest.mark.parametrize("region", MIXED)
def test_islands_everywhere_are_fp32(region: Any) -> None:
    """The whole model as one island computes the bits of fp32."""
    model = llama()
    want = [step(model), *gradients(model)]
    realiser = Realiser(model, None)
    realiser.adopt(Conditions(fp32_modules=("model", "model.layers.0", "lm_head")))
    with realiser.forward():
        got = [step(model, region), *gradients(model)]
    realiser.close()
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize("region", MIXED)
def test_an_island_computes_in_fp32_and_the_rest_in_half(region: Any) -> None:
    model = llama()
    seen: dict[str, tuple[torch.dtype, torch.dtype]] = {}

    def look(name: str) -> Any:
        return lambda m, args, out: seen.update({name: (args[0].dtype, out.dtype)})

    for name in ("up_proj", "down_proj"):
        model.get_submodule(DOWN.replace("down_proj", name)).register_forward_hook(look(name))
    realiser = Realiser(model, None)
    realiser.adopt(Conditions(fp32_modules=(DOWN,)))
    with realiser.forward():
        step(model, region)
    realiser.close()
    assert seen["down_proj"] == (torch.float32, torch.float32)
    assert seen["up_proj"][1] == torch.float16


@pytest.mark.parametrize("region", MIXED)
@pytest.mark.parametrize("name", [DOWN, "model.layers.0", "model"])
def test_islands_work_under_gradient_checkpointing(region: Any, name: str) -> None:
    context_fn = {} if region is native else {"context_fn": partial(checkpoint_contexts, torch.float16)}
    model = overflowing()
    realiser = Realiser(model, None)
    realiser.adopt(Conditions(fp32_modules=(name,)))

    def run() -> list[Tensor]:
        with realiser.forward():
            return [step(model, region), *gradients(model)]

    plain = run()
    model.activation_checkpointing_enable({"use_reentrant": False, **context_fn})
    recomputed = run()
    assert all(t.isfinite().all() for t in plain)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))
    assert not realiser._visits
    realiser.close()


@pytest.mark.parametrize("name", ["model.layers.0.mlp", "model.layers.0", "model"])
def test_islands_of_half_weights_work_under_gradient_checkpointing(name: str) -> None:
    model = overflowing_half()
    realiser = Realiser(model, None)
    realiser.adopt(Conditions(fp32_modules=(name,)))

    def run() -> list[Tensor]:
        with realiser.forward():
            return [step(model), *gradients(model)]

    plain = run()
    model.activation_checkpointing_enable({"use_reentrant": False})
    function = model.model.layers[0]._gradient_checkpointing_func
    recomputed = run()
    assert all(t.isfinite().all() for t in plain)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))
    assert model.model.layers[0]._gradient_checkpointing_func is function
    realiser.close()


@pytest.mark.parametrize("half", [False, True], ids=["mixed", "half"])
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_exception_in_an_island_leaves_nothing_behind(half: bool, error: type[BaseException]) -> None:
    model = llama()
    model = model.half() if half else model
    before = everything(model)

    def fail(*_: Any) -> None:
        raise error

    handle = model.get_submodule(DOWN).register_forward_hook(fail)
    realiser = Realiser(model, None)
    realiser.adopt(Conditions(fp32_modules=("model.layers.0", DOWN)))
    with pytest.raises(error), realiser.forward():
        step(model, nullcontext if half else native)
    handle.remove()
    model.zero_grad()
    with realiser.forward():
        assert is_good(model, step(model, nullcontext if half else native))
    realiser.close()
    assert everything(model) == before


def test_other_hooks_still_run_and_see_their_values() -> None:
    model = llama()
    calls: list[str] = []
    down = model.get_submodule(DOWN)
    handles = [
        down.register_forward_pre_hook(lambda m, args: calls.append(f"in {args[0].dtype}")),
        down.register_forward_hook(lambda m, args, out: out * 0.5),
        down.register_full_backward_hook(lambda m, gi, go: calls.append("backward")),
    ]
    realiser = Realiser(model, None)
    realiser.adopt(Conditions(fp32_modules=(DOWN,)))
    with realiser.forward():
        step(model, native)
    assert calls == ["in torch.float16", "backward"]
    realiser.close()
    assert len(down._forward_hooks) == len(down._forward_pre_hooks) == 1
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("in_place", [False, True])
def test_conditions_hold_in_compiled_code_too(in_place: bool) -> None:
    """It goes on with the hooks that it was compiled with, unless it is told to run as it is written."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.float16):
                return self.one(x)

    model = Model()
    if in_place:
        model.compile(backend="eager")
    compiled: Any = model if in_place else torch.compile(model, backend="eager")
    x = torch.ones(1, 2)
    assert compiled(x).dtype == torch.float16
    realiser = Realiser(compiled, None)
    name = next(n for n, m in compiled.named_modules() if m is model.one)
    for conditions in (FP32, Conditions(fp32_modules=(name,))):
        realiser.adopt(conditions)
        with realiser.forward():
            assert compiled(x).dtype == torch.float32
    realiser.close()
    assert compiled(x).dtype == torch.float16


def test_a_running_statistic_in_a_half_buffer_is_kept() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3).half(), nn.Linear(3, 3).half())
    realiser = Realiser(model, None)
    realiser.adopt(Conditions(fp32_modules=("0",)))
    buffer = model[0].running_mean
    with realiser.forward():
        out = model(torch.full((4, 3), 2.0).half())
    realiser.close()
    assert out.dtype == torch.float16
    assert model[0].running_mean is buffer
    assert buffer.dtype == torch.float16
    torch.testing.assert_close(buffer, torch.full((3,), 0.2).half())


# ---- what is not possible changes nothing ----


@pytest.mark.parametrize(
    ("impossible", "why"),
    [
        (Conditions(precision="fp32", fp32_modules=(DOWN, "model.layers.9")), "no module named 'model.layers.9'"),
        (Conditions(precision="fp8"), "'fp8' is neither"),
        (Conditions(attention="flash", fp32_modules=(DOWN,)), "'flash' is not known"),
        (Conditions(precision="fp32", adam_eps=float("nan")), "not a positive number"),
        (Conditions(precision="fp32", fp32_modules=("codes",)), "quantised"),
    ],
)
def test_what_is_not_possible_changes_nothing(impossible: Conditions, why: str) -> None:
    model = llama().half()
    model.codes = nn.Module()
    model.codes.weight = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    optimizer = torch.optim.AdamW(model.lm_head.parameters())
    realiser = Realiser(model, optimizer)
    now = Conditions(fp32_modules=("lm_head",), adam_eps=1e-3)
    realiser.adopt(now)
    before = everything(model)
    with pytest.raises(NotPossible, match=why):
        realiser.adopt(impossible)
    assert everything(model) == before
    assert realiser.conditions == now
    assert optimizer.param_groups[0]["eps"] == 1e-3


def test_no_memory_for_cast_weights_is_not_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama().half()
    realiser = Realiser(model, None)
    before = everything(model)
    calls = iter(range(100))
    original = Tensor.to

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if next(calls) == 5:
            raise torch.OutOfMemoryError("3 GiB wanted")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "to", to)
    with pytest.raises(NotPossible, match="3 GiB wanted"):
        realiser.adopt(FP32)
    monkeypatch.undo()
    assert everything(model) == before
    assert realiser.conditions == AS_CONFIGURED


def test_bf16_where_the_device_has_none_is_not_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(torch, "mm", refuse)
    with pytest.raises(NotPossible, match="cpu has no bf16: no kernel"):
        Realiser(llama(), None).adopt(BF16)


# ---- attention ----


def test_math_attention_is_eager_inside_and_what_it_was_outside() -> None:
    model = llama()
    before = everything(model)
    names: list[Any] = []
    weights: list[Any] = []
    attention = model.model.layers[0].self_attn
    handle = attention.register_forward_hook(
        lambda m, a, out: (names.append(m.config._attn_implementation), weights.append(out[1]))[:0] or None
    )
    realiser = Realiser(model, None)
    realiser.adopt(MATH)
    with realiser.forward():
        math = [step(model), *gradients(model)]
    plain = [step(model), *gradients(model)]
    handle.remove()
    assert names == ["eager", "sdpa"]
    assert weights[0] is not None, "only eager attention gives its probabilities"
    assert weights[1] is None
    for a, b in zip(math, plain, strict=True):
        torch.testing.assert_close(a, b)
    assert everything(model) == before


def test_torchs_own_attention_takes_the_math_kernel() -> None:
    enabled: list[bool] = []

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            enabled.append(torch.backends.cuda.flash_sdp_enabled())
            return nn.functional.scaled_dot_product_attention(x, x, x)

    realiser = Realiser(Model(), None)
    realiser.adopt(MATH)
    with realiser.forward():
        realiser.model(torch.ones(1, 1, 2, 2))
    realiser.model(torch.ones(1, 1, 2, 2))
    assert enabled == [False, True]


def test_a_softmax_over_nothing_is_0_under_torchs_attention_and_everything_else_as_before() -> None:
    model = llama()
    model.config._attn_implementation = "eager"
    before = everything(model)
    sound = torch.zeros(2, 1, 6, 6).masked_fill(~torch.ones(6, 6).tril().bool(), -math.inf)
    blind = sound.clone()
    blind[0, 0, :2] = -math.inf
    realiser = Realiser(model, None)
    plain = [step(model, attention_mask=sound), *gradients(model)]
    assert not step(model, attention_mask=blind).isfinite()
    gradients(model)
    realiser.adopt(SDPA)
    with realiser.forward():
        same = [step(model, attention_mask=sound), *gradients(model)]
    with realiser.forward():
        safe = [step(model, attention_mask=blind), *gradients(model)]
    assert all(t.isfinite().all() for t in safe)
    for a, b in zip(plain, same, strict=True):
        torch.testing.assert_close(a, b)
    assert everything(model) == before


def test_a_model_that_does_not_choose_its_attention_by_a_name_is_refused() -> None:
    with pytest.raises(NotPossible, match="not chosen by its configuration"):
        Realiser(nn.Linear(2, 2), None).adopt(SDPA)


@pytest.mark.parametrize("kind", ["none", "2-D", "4-D boolean"])
def test_masks_mean_the_same_under_math_attention(kind: str) -> None:
    """A 4-D boolean mask, added to the scores as it is, would be no mask at all."""
    model = llama()
    causal = torch.ones(6, 6).tril().bool().expand(2, 1, 6, 6).clone()
    causal[0, 0, 3:, :3] = False  # two documents in one sequence
    padded = torch.ones(2, 6, dtype=torch.int64)
    padded[0, 4:] = 0
    inputs = {"none": {}, "2-D": {"attention_mask": padded}, "4-D boolean": {"attention_mask": causal}}[kind]
    realiser = Realiser(model, None)
    realiser.adopt(MATH)
    with realiser.forward():
        math = [step(model, **inputs), *gradients(model)]
    plain = [step(model, **inputs), *gradients(model)]
    for a, b in zip(math, plain, strict=True):
        torch.testing.assert_close(a, b)


def test_nested_configs_are_set_and_restored() -> None:
    class Config:
        sub_configs = ()

        def __init__(self, name: str) -> None:
            self._attn_implementation_internal = name

    outer, inner = Config("sdpa"), Config("flash_attention_2")
    outer.sub_configs, outer.text_config = ("text_config",), inner  # type: ignore[attr-defined]
    model = nn.Linear(1, 1)
    model.config = outer  # type: ignore[assignment]
    realiser = Realiser(model, None)
    realiser.adopt(MATH)
    with pytest.raises(ZeroDivisionError), realiser.forward():  # noqa: PT012
        assert {c._attn_implementation_internal for c in (outer, inner)} == {"eager"}
        raise ZeroDivisionError
    assert (outer._attn_implementation_internal, inner._attn_implementation_internal) == ("sdpa", "flash_attention_2")


# ---- optimizer ----


def test_eps_is_set_and_given_back() -> None:
    model = nn.Linear(2, 2)
    groups = [{"params": [model.weight], "eps": 1e-7}, {"params": [model.bias]}]
    optimizer = torch.optim.AdamW(groups, eps=1e-8)
    realiser = Realiser(model, optimizer)
    for eps, want in ((1e-4, [1e-4, 1e-4]), (1e-3, [1e-3, 1e-3]), (None, [1e-7, 1e-8])):
        realiser.adopt(Conditions(adam_eps=eps))
        assert [g["eps"] for g in optimizer.param_groups] == want


def test_eps_of_an_optimizer_without_one_is_not_possible() -> None:
    model = nn.Linear(2, 2)
    for optimizer in (None, torch.optim.SGD(model.parameters(), lr=0.1)):
        with pytest.raises(NotPossible, match="no eps"):
            Realiser(model, optimizer).adopt(Conditions(adam_eps=1e-4))


def test_half_weights_train_on_in_fp32_as_a_remedy() -> None:
    """AdamW with eps 1e-8 on fp16 weights makes NaN in its first update: 1e-8 is 0 there."""
    model = llama().half()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)
    realiser = Realiser(model, optimizer)
    realiser.adopt(FP32)
    for _ in range(3):
        with realiser.forward():
            step(model)
        optimizer.step()
        optimizer.zero_grad()
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())
    realiser.adopt(AS_CONFIGURED)
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert {s["exp_avg"].dtype for s in optimizer.state.values()} == {torch.float16}


# ---- numbers ----


def test_the_rate_is_multiplied_and_warmed_up_again() -> None:
    conditions = Conditions(lr_factor=0.5, warmup_from_update=10, warmup_steps=3)
    rates = [learning_rate(8.0, updates, conditions) for updates in range(9, 15)]
    assert rates == [4.0, 1.0, 2.0, 3.0, 4.0, 4.0]
    assert learning_rate(8.0, 0, AS_CONFIGURED) == 8.0
    assert learning_rate(8.0, 0, replace(conditions, warmup_steps=0)) == 4.0


def test_a_rate_above_the_limit_is_the_limit_and_other_groups_keep_their_share_of_the_first() -> None:
    limited = Conditions(max_lr=1e-3)
    rates = [learning_rate(rate, 0, limited) for rate in (0.1, 1e-3, 3e-4, math.inf, math.nan)]
    assert rates == [1e-3, 1e-3, 3e-4, 1e-3, 1e-3], "below it the schedule holds; a schedule that divides by 0 too"
    assert learning_rate(0.2, 0, limited, 0.1) == pytest.approx(2e-3)
    assert learning_rate(0.2, 0, limited, 1e-3) == 0.2, "the first group is not above it"
    assert learning_rate(0.1, 0, replace(limited, lr_factor=0.5)) == 5e-4, "a share is one of what is left"


@pytest.mark.parametrize(
    ("configured", "asked", "want"),
    [(None, None, None), (1.0, None, 1.0), (1.0, 0.5, 0.5), (0.5, 1.0, 0.5), (None, 2.0, 2.0), (0.0, 2.0, 2.0)],
)
def test_the_tighter_norm_holds(configured: float | None, asked: float | None, want: float | None) -> None:
    assert clip_norm(configured, Conditions(max_grad_norm=asked)) == want


@pytest.mark.parametrize("bad", [float("nan"), -1.0])
def test_a_norm_that_is_no_limit_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="cannot clip"):
        clip_norm(1.0, Conditions(max_grad_norm=bad))
