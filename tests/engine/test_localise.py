"""Localisation names the origin of a bad loss, and leaves no trace."""

from __future__ import annotations

import random
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as torch_modules

from finitune.core.incident import Trigger
from finitune.core.types import Reading
from finitune.engine.lab import BudgetSpent
from finitune.engine.localise import localise
from finitune.models.tiny import tiny_llama
from finitune.numerics.half import checkpoint_contexts, emulated_half
from finitune.numerics.seeds import GeneratorStates
from support.replay_port import BarePort, lab_of, row_id, train
from support.tiny_ports import Context, llama_port, names, of_kind, overflow, suspects


def native() -> Any:
    return torch.autocast("cpu", torch.float16)


def emulated() -> Any:
    return emulated_half(torch.float16)


@pytest.mark.parametrize(("context", "op"), [(native, "aten.mm"), (emulated, "aten._to_copy")])
def test_an_overflow_in_half_names_module_op_and_the_value_that_did_not_fit(context: Context, op: str) -> None:
    port = llama_port(context)
    overflow(port, "model.layers.1.mlp.up_proj")
    found = suspects(port)
    module = of_kind(found, "module")[0]
    assert module.name == "model.layers.1.mlp.up_proj"
    assert names(found, "op")[0] == f"{op} in model.layers.1.mlp.up_proj"
    data = module.data
    assert data["input_finite"]
    assert data["dtype"] == "float16"
    assert data["half_max"] == 65504.0
    assert 65504 < data["value"] < 1e7
    assert data["amax"] <= 65504
    assert data["headroom_bits"] < 0
    assert 0 < data["num_bad"] < data["num_elements"]
    assert data["phase"] == "forward"


def test_random_places_of_an_overflow_are_all_found() -> None:
    draw = random.Random(5)
    parts = (
        "self_attn.q_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
    for _ in range(6):
        layer, part = draw.randrange(3), draw.choice(parts)
        port = llama_port(emulated, layers=3)
        with torch.no_grad():  # so that every part has inputs large enough
            for name, weight in port.model.named_parameters():
                if "layers" in name and weight.dim() == 2 and not name.endswith("down_proj.weight"):
                    weight.mul_(20)
        overflow(port, f"model.layers.{layer}.{part}", 6e4)
        found = suspects(port)
        assert names(found, "module")[0] == f"model.layers.{layer}.{part}"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masks_of_minus_infinity_are_never_blamed(attention: str) -> None:
    port = llama_port(emulated)
    port.model.config._attn_implementation = attention
    port.batches[0][0]["attention_mask"] = torch.ones(4, 12, dtype=torch.long)
    port.batches[0][0]["attention_mask"][:, 8:] = 0

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        with emulated():
            loss: torch.Tensor = model(**batch, use_cache=False).loss
        return loss

    port.loss_fn = loss_fn
    assert suspects(port, Trigger.OUTLIER)  # healthy: only the shares of the gradient norm
    overflow(port, "model.layers.1.mlp.up_proj")
    assert names(suspects(port), "module") == ["model.layers.1.mlp.up_proj"]


def test_a_bad_row_of_the_embedding_is_named_with_the_row_of_the_batch_and_the_token() -> None:
    port = llama_port()
    used = int(port.batches[0][0]["input_ids"][2, 5])
    with torch.no_grad():
        port.model.model.embed_tokens.weight[[used, 5]] = float("inf")
    found = suspects(port)
    weight = found[0]
    assert (weight.kind, weight.name) == ("parameter", "model.embed_tokens.weight")
    assert weight.data["rows"] == sorted([used, 5])
    assert weight.data["used_rows"] == [used]
    assert weight.data["value"] == float("inf")
    assert names(found, "op") == ["aten.embedding in model.embed_tokens"]
    assert not of_kind(found, "op")[0].data["input_finite"]
    tokens = (port.batches[0][0]["input_ids"] == used).nonzero().tolist()
    assert names(found, "row") == [str(row_id(1, 0, r)) for r in sorted({r for r, _ in tokens})]
    assert of_kind(found, "tokens")[0].data["span"][0] == min(t for r, t in tokens if r == 2 or r == tokens[0][0])


def test_nothing_supervised_names_the_loss() -> None:
    port = llama_port()
    port.batches[0][0]["labels"][:] = -100
    assert names(suspects(port), "op") == ["aten.nll_loss_forward in (model)"]


def test_weights_that_the_last_update_spoilt_are_named_as_such() -> None:
    port = llama_port()
    with torch.no_grad():
        for weight in port.model.parameters():
            weight.fill_(float("nan"))
    found = suspects(port)
    assert names(found, "parameter")[0] == "model.embed_tokens.weight"
    assert len(names(found, "parameter")) == 8
    assert all(s.data["what"] == "weight" for s in of_kind(found, "parameter"))


class Small(nn.Module):
    """Two layers over (B, T, 6) with a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 1)
        self.register_buffer("shift", torch.zeros(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(torch.tanh(self.first(x) + self.shift))
        return out


def small_port(loss_fn: Any, **more: Any) -> BarePort:
    torch.manual_seed(0)
    model = Small()
    micros = [{"x": torch.randn(4, 3, 6), "weight": torch.ones(4), **more} for _ in range(3)]
    return BarePort(model, torch.optim.AdamW(model.parameters(), lr=1e-2), loss_fn, [micros])


def weighted(model: nn.Module, batch: Any) -> torch.Tensor:
    return (model(batch["x"]).pow(2).mean((1, 2)) * batch["weight"]).mean()


def test_a_bad_number_of_the_batch_is_named_with_its_row_and_micro_batch() -> None:
    port = small_port(weighted)
    port.batches[0][1]["weight"][3] = float("inf")
    found = suspects(port)
    assert (found[0].kind, found[0].name) == ("input", "weight")
    assert found[0].data["micro"] == 1
    assert found[0].data["bad_rows"] == [3]
    assert names(found, "row") == [str(row_id(1, 1, 3))]


def test_a_bad_buffer_is_named() -> None:
    port = small_port(weighted)
    port.model.shift[2] = float("nan")
    found = suspects(port)
    assert (found[0].kind, found[0].name, found[0].data["index"]) == ("buffer", "shift", [2])


def test_what_is_masked_away_is_not_blamed() -> None:
    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        out = model(batch["x"])
        spread = torch.log(torch.zeros(4))  # -inf of finite input, replaced below
        dead = torch.where(torch.isfinite(spread), spread, torch.zeros(()))
        fatal = (out.sum() - out.sum()) / torch.zeros(())
        return out.mean() + dead.sum() + fatal

    found = suspects(small_port(loss_fn))
    assert names(found, "op") == ["aten.div in (loss)"]


def test_a_finite_loss_blames_nothing_in_forward() -> None:
    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        out = model(batch["x"])
        torch.log(torch.zeros(3))
        return out.masked_fill(out > 100, float("inf")).pow(2).mean()

    assert suspects(small_port(loss_fn), Trigger.GRADIENT) == ()


def test_lawful_infinities_become_a_fault_where_they_turn_into_nan() -> None:
    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        scores = model(batch["x"]).squeeze(-1)
        scores = scores.masked_fill(torch.tensor([[False], [False], [True], [False]]), float("-inf"))
        return torch.softmax(scores, -1).pow(2).sum()

    found = suspects(small_port(loss_fn))
    assert names(found, "op") == ["aten._softmax in (loss)"]
    assert of_kind(found, "op")[0].data["bad_rows"] == [2]


def test_a_vocabulary_mask_is_lawful_until_it_hits_a_target() -> None:
    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        logits = model.first(batch["x"]) + torch.tensor([0, 0, float("-inf"), 0, 0, 0])
        return F.cross_entropy(logits.flatten(0, 1), batch["target"])

    healthy = small_port(loss_fn, target=torch.zeros(12, dtype=torch.long))
    assert suspects(healthy, Trigger.OUTLIER)[0].kind == "parameter"
    hit = small_port(loss_fn, target=torch.full((12,), 2))
    assert names(suspects(hit), "op") == ["aten.nll_loss_forward in (loss)"]


def test_what_a_hook_does_to_an_output_belongs_to_its_module() -> None:
    port = llama_port()

    def hook(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        spoilt = output.clone()
        spoilt[1, 4, 0] = float("nan")
        return spoilt

    port.model.model.layers[1].mlp.gate_proj.register_forward_hook(hook)
    found = suspects(port)
    assert names(found, "module")[0] == "model.layers.1.mlp.gate_proj"


def test_division_in_place_is_found() -> None:
    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        out = model(batch["x"]).clone()
        out[2].div_(torch.zeros(()))
        return out.mean()

    assert names(suspects(small_port(loss_fn)), "op") == ["aten.div_ in (loss)"]


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(reentrant: bool) -> None:
    port = llama_port(emulated)
    options: dict[str, Any] = {"use_reentrant": reentrant}
    if not reentrant:
        options["context_fn"] = lambda: checkpoint_contexts(torch.float16)
    port.model.gradient_checkpointing_enable(options)
    overflow(port, "model.layers.1.mlp.up_proj")
    assert names(suspects(port), "module")[0] == "model.layers.1.mlp.up_proj"


def test_a_model_wrapped_by_peft_is_named_by_its_own_names() -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["down_proj", "q_proj"])
    port = llama_port(emulated, model=get_peft_model(tiny_llama(0, hidden=32, mlp=64), config))
    overflow(port, "base_model.model.model.layers.1.mlp.down_proj.base_layer", 6e4)
    with torch.no_grad():
        port.model.base_model.model.model.layers[1].mlp.up_proj.weight.mul_(1e3)
        port.model.base_model.model.model.layers[1].mlp.gate_proj.weight.mul_(20)
    assert names(suspects(port), "module")[0] == "base_model.model.model.layers.1.mlp.down_proj.base_layer"


def test_the_micro_batch_is_named() -> None:
    port = llama_port(micros=3)
    port.batches[0][2]["labels"][:] = -100
    assert of_kind(suspects(port), "op")[0].data["micro"] == 2


def test_an_update_that_spoils_the_state_is_told_with_the_numbers_at_that_place_and_undone() -> None:
    port = llama_port(model=tiny_llama(0, hidden=32, mlp=64).half())
    port.optimizer.defaults["eps"] = port.optimizer.param_groups[0]["eps"] = 1e-8
    for group in port.optimizer.param_groups:
        group["foreach"] = True
    lab = lab_of(port, Trigger.UPDATE)
    before = lab.before.mark.digest
    found = localise(lab, lab.case)
    assert found
    data = found[0].data
    assert found[0].kind == "parameter"
    assert data["what"] == "update"
    assert {"gradient", "weight_before", "moments"} <= set(data)
    assert data["moments"]["exp_avg_sq"] == 0.0  # its square is beyond fp16
    assert lab_of(port).before.mark.digest == before


def test_an_outlier_names_the_parameters_with_most_of_the_gradient() -> None:
    port = small_port(weighted)
    port.model.second.register_full_backward_pre_hook(lambda _m, g: None)
    with torch.no_grad():
        port.model.second.weight.mul_(1e4)
    found = suspects(port, Trigger.OUTLIER)
    shares = [s.data["share"] for s in found]
    assert shares == sorted(shares, reverse=True)
    assert found[0].name.startswith("first.")


def test_no_hook_stays_and_no_generator_moves_even_when_the_step_raises() -> None:
    port = llama_port()
    lab = lab_of(port)
    state = GeneratorStates.now().torch_cpu

    def raising(model: Any, batch: Any) -> torch.Tensor:
        model(input_ids=batch["input_ids"])
        torch.rand(3)
        raise RuntimeError("the closure fails")

    for loss_fn, outcome in ((port.loss_fn, nullcontext()), (raising, pytest.raises(RuntimeError, match="closure"))):
        port.loss_fn = loss_fn
        with outcome:
            localise(lab, lab.case)
        for module in port.model.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
            assert not module._forward_hooks_always_called
        assert not torch_modules._global_forward_hooks
        assert not torch_modules._global_forward_pre_hooks
        assert not torch_modules._global_forward_hooks_always_called
        assert all(p.grad is None for p in port.model.parameters())
        assert not any(p._post_accumulate_grad_hooks for p in port.model.parameters())
        assert torch.equal(GeneratorStates.now().torch_cpu, state)
        assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_the_traced_step_has_the_bits_of_the_step() -> None:
    port = llama_port()
    train(port, 1)
    plain = lab_of(port)
    from finitune.engine.localise_modules import Modules
    from finitune.engine.monitor import read
    from finitune.engine.op_trace import OpTrace, Sources

    modules = Modules(port.model)
    with modules.watched(), OpTrace(modules, Sources(port.model, port.batch())):
        traced = read(port.forward_backward())
    port.abort()
    assert (traced.loss, traced.grad_norm) == (plain.case.reading.loss, plain.case.reading.grad_norm)


def test_the_budget_is_charged_and_respected() -> None:
    port = llama_port()
    lab = lab_of(port, max_replays=1.0)
    with pytest.raises(BudgetSpent):
        localise(lab, lab.case)
    assert lab.budget.replays == 0


def test_a_head_that_the_loss_applies_itself_is_named_by_its_weight() -> None:
    port = llama_port()

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        with emulated():
            hidden = model.model(input_ids=batch["input_ids"], use_cache=False)[0]
            logits = F.linear(hidden, model.lm_head.weight)
            return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())

    port.loss_fn = loss_fn
    overflow(port, "lm_head")
    found = suspects(port)
    assert names(found, "module") == ["lm_head"]


@pytest.mark.parametrize("part", [False, True])
def test_micro_batches_are_counted_whether_the_model_or_a_part_of_it_is_called(part: bool) -> None:
    port = llama_port(micros=3)

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        body = model.model if part else model.model.forward
        hidden = body(input_ids=batch["input_ids"], use_cache=False)[0]
        return hidden.mean() / (batch["labels"] > 0).sum()

    port.loss_fn = loss_fn
    port.batches[0][1]["labels"][:] = -100
    assert of_kind(suspects(port), "op")[0].data["micro"] == 1


def test_squares_that_do_not_fit_name_the_largest_gradients() -> None:
    port = small_port(lambda model, batch: model(batch["x"]).sum() * 1e30)
    found = suspects(port, Trigger.GRADIENT)
    assert found
    assert found[0].data["what"] == "gradient"
    assert 0 < found[0].data["share"] <= 1
    assert found[0].data["norm"] < float("inf")


def test_a_forecast_costs_nothing_and_names_the_module_nearest_to_the_limit() -> None:
    reading = Reading(3, 2.0, 1.0, amax={"a.down_proj.input": 100.0, "b": 32752.0, "c": 1.0}, headroom_bits=1.0)
    lab = lab_of(llama_port(), Trigger.FORECAST)
    found = localise(lab, replace(lab.case, reading=reading))
    assert [s.name for s in found] == ["b", "a.down_proj", "c"]
    assert found[0].data["half_max"] == 65504.0
    assert found[0].data["headroom_bits"] == pytest.approx(1.0)
    assert lab.budget.replays == 0


def test_adamw_in_pure_half_is_followed_from_the_update_to_the_next_loss() -> None:
    port = llama_port(model=tiny_llama(0, hidden=32, mlp=64).half(), steps=3)
    train(port, 1)
    found = suspects(port)
    assert (found[0].kind, found[0].name) == ("parameter", "model.embed_tokens.weight")
    assert found[0].data["what"] == "weight"
    assert names(found, "op")[0] == "aten.embedding in model.embed_tokens"


def test_code_that_looks_at_hooks_computes_as_ever_while_the_step_is_traced() -> None:
    seen: list[bool] = []

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        seen.append(any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()))
        return weighted(model, batch) / 0

    port = small_port(loss_fn)
    assert names(suspects(port), "op") == ["aten.div in (loss)"]
    assert not any(seen)
