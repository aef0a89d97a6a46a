"""Routers: found by the experts beside them, told when one expert takes nearly everything, and silent otherwise."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finitune.core.codes import all_codes, fill
from finitune.core.types import Finding
from finitune.engine.routing import LOOK_EVERY_STEPS, LOOKS, Routing, gates_of

EXPERTS, WIDTH = 4, 16


class Experts(nn.Module):
    """All experts in one tensor, as transformers 5 holds them."""

    def __init__(self, count: int = EXPERTS) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(count, WIDTH, WIDTH) * 0.1)


class Block(nn.Module):
    """Sends every token to the experts of its router; what the router puts out has one of the usual forms."""

    def __init__(self, form: str = "logits", count: int = EXPERTS, name: str = "gate") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form, self.name = form, name
        self.add_module(name, Router(form, count))
        self.experts = Experts(count)

    @property
    def router(self) -> Any:
        return self.get_submodule(self.name)

    def forward(self, x_BTD: Tensor) -> Any:
        return self.router(x_BTD.reshape(-1, WIDTH))


class Router(nn.Module):
    def __init__(self, form: str, count: int) -> None:
        super().__init__()
        self.form = form
        self.weight = nn.Parameter(torch.randn(count, WIDTH) * 0.02)
        self.bias = nn.Parameter(torch.zeros(count))

    def forward(self, x_ND: Tensor) -> Any:
        logits_NE = nn.functional.linear(x_ND, self.weight, self.bias)
        shares_NE = logits_NE.softmax(-1)
        scores, chosen = shares_NE.topk(2, -1)
        spread = torch.zeros_like(shares_NE).scatter(-1, chosen, scores)
        return {
            "logits": logits_NE,
            "softmax": shares_NE,
            "triple": (logits_NE, scores, chosen),
            "scores first": (spread, logits_NE),
        }[self.form]


def steps(block: nn.Module, masks: Any = None, first: int = 0, count: int = 24, rows: int = 2) -> list[Finding]:
    """What is said while ``count`` steps are computed."""
    watch = Routing(block)
    return said(watch, block, masks, first, count, rows)


def said(watch: Routing, block: nn.Module, masks: Any, first: int, count: int, rows: int = 2) -> list[Finding]:
    found = []
    for step in range(first, first + count):
        x_BTD = torch.randn(rows, 12, WIDTH, generator=torch.Generator().manual_seed(step))
        micro = {"x": x_BTD} if masks is None else {"x": x_BTD, "attention_mask": masks(rows)}
        watch.begin(SimpleNamespace(state=SimpleNamespace(step=step), batch=lambda micro=micro: [micro]))  # type: ignore[arg-type]
        block(x_BTD)
        found += watch.end(step + 1)
    return found


# -- which modules ----------------------------------------------------------------------------------------------------


def test_a_router_may_have_any_name_beside_experts_and_a_gate_of_a_plain_mlp_is_none() -> None:
    plain = nn.ModuleDict({"gate": nn.Linear(WIDTH, EXPERTS), "up": nn.Linear(WIDTH, EXPERTS)})
    classifier = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(8, 8) for _ in range(3)), "score": nn.Linear(8, 3)})
    experts = nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(8, 8) for _ in range(3)), "pick": nn.Linear(8, 3)})
    assert [g.name for g in gates_of(nn.ModuleDict({"a": plain, "b": classifier, "c": experts}))] == ["c.pick"]


def test_the_gate_of_a_shared_expert_is_no_router() -> None:
    block = Block()
    block.shared_expert_gate = nn.Linear(WIDTH, 1)
    assert [(g.name, g.num_experts) for g in gates_of(block)] == [("gate", EXPERTS)]


@pytest.mark.parametrize(
    ("config", "options", "names"),
    [
        ("MixtralConfig", {"num_local_experts": 4}, ["mlp.gate"]),
        ("Qwen2MoeConfig", {"num_experts": 4, "moe_intermediate_size": 16}, ["mlp.gate"]),
        ("GptOssConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}, ["mlp.router"]),
        ("LlamaConfig", {}, []),
    ],
)
def test_routers_of_real_model_families_are_found(config: str, options: dict[str, Any], names: list[str]) -> None:
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    made = getattr(transformers, config)(vocab_size=64, num_key_value_heads=2, pad_token_id=0, **sizes, **options)
    model = transformers.AutoModelForCausalLM.from_config(made)
    assert [g.name for g in gates_of(model)] == [f"model.layers.0.{n}" for n in names]


# -- what is told -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["logits", "softmax", "triple", "scores first"])
def test_a_router_that_collapses_is_told_once_with_the_expert_and_soon(form: str) -> None:
    block = Block(form, name="picker")
    watch = Routing(block)
    assert said(watch, block, None, 0, 11) == []
    block.router.bias.data[2] = 8.0
    found = said(watch, block, None, 11, 40)
    assert [(f.code, f.where, f.data["expert"], f.data["since"]) for f in found] == [("MOD117", "picker", 2, 17)]
    assert float(found[0].data["before"]) < 40 < 95 < found[0].data["percent"]
    assert "{" not in fill(all_codes()["MOD117"].en.what, found[0].data)


def test_one_that_had_collapsed_before_the_first_step_is_told_after_a_few_batches() -> None:
    block = Block()
    block.router.bias.data[0] = 30.0
    found = steps(block, count=LOOKS)
    assert [(f.where, f.data["before"]) for f in found] == [("gate", "-")]


@pytest.mark.parametrize("count", [2, 4, 64])
def test_fresh_routers_are_silent_whatever_their_top_choice(count: int) -> None:
    block = Block(count=count)
    block.router.weight.data[1] += 1e-3  # one expert is always first, by next to nothing
    assert steps(block) == []


@pytest.mark.parametrize("rows", [1, 2])
def test_a_confident_router_that_uses_its_experts_is_silent(rows: int) -> None:
    block = Block()
    block.router.weight.data *= 200.0
    assert steps(block, rows=rows) == []


def test_an_expert_that_is_favoured_by_far_is_no_collapse() -> None:
    block = Block()
    block.router.bias.data[0] = 3.0  # about 87 %: a fifth of its fair share is left to each of the others
    assert steps(block) == []


def test_few_tokens_prove_nothing() -> None:
    block = Block()
    block.router.bias.data[0] = 30.0
    assert steps(block, lambda rows: torch.eye(12)[:rows].long(), count=LOOKS + 2) == []


def test_padding_does_not_count() -> None:
    block = Block()

    def batch_of_padding(x: Tensor) -> Tensor:
        x[:, 2:] = 50.0 * block.router.weight.data[1] / block.router.weight.data[1].pow(2).sum()
        return x

    block.register_forward_pre_hook(lambda _m, args: (batch_of_padding(args[0].clone()),))
    padded = torch.zeros(2, 12, dtype=torch.long)
    padded[:, :2] = 1
    assert [f.where for f in steps(block)] == []  # a sixth of the tokens still goes elsewhere
    block.router.bias.data[1] = 2.0
    assert steps(block, lambda _rows: padded, count=60) == []


def test_numbers_that_are_not_finite_are_for_others_to_tell() -> None:
    block = Block()
    block.router.weight.data[0] = torch.nan
    assert steps(block) == []


def test_micro_batches_count_together() -> None:
    block = Block()
    block.router.bias.data[0] = 30.0
    watch = Routing(block)
    for step in range(LOOKS):
        micros = [torch.randn(1, 6, WIDTH) for _ in range(3)]
        watch.begin(SimpleNamespace(state=SimpleNamespace(step=step), batch=lambda m=micros: m))  # type: ignore[arg-type]
        for micro in micros:
            block(micro)
        found = watch.end(step + 1)
    assert [f.data["tokens"] for f in found] == [LOOKS * 18]


# -- what it costs ----------------------------------------------------------------------------------------------------


def test_hooks_stand_only_in_the_steps_that_are_looked_at_and_never_after_them() -> None:
    block, seen = Block(), []
    watch = Routing(block)
    for step in range(2 * LOOK_EVERY_STEPS):
        watch.begin(SimpleNamespace(state=SimpleNamespace(step=step), batch=list))  # type: ignore[arg-type]
        seen.append(bool(block.router._forward_hooks))
        watch.end(step + 1)
        assert not block.router._forward_hooks
    assert [s for s, hooked in enumerate(seen) if hooked] == [0, LOOK_EVERY_STEPS]


def test_a_step_that_raised_leaves_no_hook_behind_for_long() -> None:
    block = Block()
    watch = Routing(block)
    port: Any = SimpleNamespace(state=SimpleNamespace(step=0), batch=list)
    watch.begin(port)
    port.state.step = 1
    watch.begin(port)
    assert not block.router._forward_hooks


def test_looking_keeps_every_bit_of_the_gradient() -> None:
    def gradient(looked: bool) -> Tensor:
        block = Block("triple")
        watch = Routing(block)
        if looked:
            watch.begin(SimpleNamespace(state=SimpleNamespace(step=0), batch=list))  # type: ignore[arg-type]
        block(torch.ones(1, 3, WIDTH))[0].square().sum().backward()
        watch.end(1)
        found: Tensor = block.router.weight.grad
        return found

    assert torch.equal(gradient(True), gradient(False))
