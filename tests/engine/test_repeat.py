"""A step that repeats is silent; one that does not is named, whatever makes it differ; nothing is left behind."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from finitune.core.codes import fill
from finitune.core.types import Finding
from finitune.engine.port import Capability, Trace
from finitune.engine.repeat import repeats
from finitune.numerics.codes_determinism import NOT_REPEATED
from finitune.numerics.digest import digest
from finitune.numerics.norms import tensor_norms
from finitune.numerics.seeds import GeneratorStates
from finitune.train.step import TrainPort
from support.faults import at_step, poison_gradient, poison_output
from support.runs import loop_of, ready

LORA = "lora={r: 4, lora_dropout: 0.2}"


def module(port: TrainPort, name: str) -> nn.Module:
    return port.parts.model.get_submodule(name)


def add_attention_dropout(port: TrainPort, share: float = 0.2) -> None:
    for part in port.parts.model.modules():
        if hasattr(part, "attention_dropout"):
            part.attention_dropout = share


def whole(port: TrainPort) -> str:
    return digest(port.state_tensors(), port.state_record())


def after_some_steps(port: TrainPort, prepared, folder: Path) -> None:
    loop = loop_of(prepared, folder)
    for _ in range(3):
        loop.one()


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        (LORA,),
        (LORA, "gradient_checkpointing=true"),
        ("gradient_accumulation_steps=2", "data.packing=true"),
        ("precision=fp16-emulated",),
        ("precision=bf16-emulated", LORA),
        ("model.attn_implementation=eager", "loss.chunk_tokens=4"),
    ],
    ids=lambda o: ",".join(x.split("=")[0] + "=" + x.split("=")[1][:8] for x in o) or "plain",
)
def test_a_healthy_step_repeats_and_leaves_no_trace(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    prepared = ready(tmp_path, *overrides)
    port = prepared.port
    add_attention_dropout(port)
    assert repeats(port) is None
    after_some_steps(port, prepared, tmp_path)
    before, states = whole(port), GeneratorStates.now()
    assert repeats(port) is None
    assert whole(port) == before
    assert all(p.grad is None for p in port.parts.model.parameters())
    now = GeneratorStates.now()
    assert torch.equal(now.torch_cpu, states.torch_cpu)
    assert now.python == states.python
    np.testing.assert_equal(now.numpy, states.numpy)


def test_the_check_itself_changes_no_later_step(tmp_path: Path) -> None:
    digests = []
    for name in ("with", "without"):
        folder = tmp_path / name
        folder.mkdir()
        prepared = ready(tmp_path, LORA)
        loop = loop_of(prepared, folder)
        for _ in range(4):
            if name == "with":
                assert repeats(prepared.port) is None
            loop.one()
        digests.append(whole(prepared.port))
    assert digests[0] == digests[1]


Noise = Callable[[], float]


def private_generator() -> Noise:
    generator = torch.Generator().manual_seed(0)
    return lambda: torch.rand((), generator=generator).item()


def private_python_generator() -> Noise:
    return random.Random(1).random


def clock() -> Noise:
    return lambda: time.perf_counter_ns() % 1_000_003 / 1e6


def counter() -> Noise:
    count = itertools.count()
    return lambda: next(count) * 1e-3


def bits_of_the_counter() -> Noise:
    """What a lost update of a race looks like: now and then the last bit differs."""
    count = itertools.count()
    return lambda: 2.0**-23 if next(count) % 2 else 0.0


@pytest.mark.parametrize(
    "noise",
    [private_generator, private_python_generator, clock, counter, bits_of_the_counter],
    ids=lambda n: n.__name__,
)
def test_whatever_differs_in_the_forward_pass_is_found_with_its_module(tmp_path: Path, noise) -> None:
    prepared = ready(tmp_path)
    port, drawn = prepared.port, noise()
    module(port, "model.layers.1.mlp").register_forward_hook(lambda _m, _a, out: out * (1.0 + drawn()))
    after_some_steps(port, prepared, tmp_path)
    before = whole(port)
    found = repeats(port)
    assert found is not None
    assert found.code == "NUM110"
    # Of the last bit of one module the loss may know nothing; the gradients do.
    assert found.data["was"] != found.data["now"] or noise is bits_of_the_counter
    assert found.data["num"] > 0
    assert found.data["total"] == len(port.parts.parameters)
    assert whole(port) == before


def test_the_first_module_that_differs_is_named(tmp_path: Path) -> None:
    """At step 1 the monitor looks: layer 0 is the same twice, what follows the noise is not."""
    port, drawn = ready(tmp_path).port, private_generator()
    module(port, "model.layers.1.mlp").register_forward_hook(lambda _m, _a, out: out + drawn())
    found = repeats(port)
    assert found is not None
    assert found.data["module"].endswith("layers.1")


def test_what_differs_in_the_backward_pass_alone_is_found_with_its_place(tmp_path: Path) -> None:
    """The losses agree; the gradients behind the noise differ, those before it do not."""
    port, drawn = ready(tmp_path).port, counter()
    name = "model.layers.0.mlp.up_proj.weight"
    dict(port.parts.parameters)[name].register_hook(lambda gradient: gradient * (1.0 + drawn()))
    found = repeats(port)
    assert found is not None
    assert found.data["was"] == found.data["now"]
    assert (found.data["num"], found.data["first"], found.data["last"]) == (1, name, name)
    assert found.data["module"] == "-"
    assert found.where == f"step 1: {name}"


def test_the_span_of_the_differing_gradients_is_named_in_model_order(tmp_path: Path) -> None:
    port, drawn = ready(tmp_path).port, counter()
    mlp = module(port, "model.layers.0.mlp")
    mlp.register_full_backward_hook(lambda _m, grads, _o: (grads[0] * (1.0 + drawn()),))
    found = repeats(port)
    assert found is not None
    names = [n for n, _ in port.parts.parameters]
    assert found.data["first"] == names[0]
    assert found.data["last"] == "model.layers.0.post_attention_layernorm.weight"


def test_a_gradient_that_is_there_only_sometimes_is_found(tmp_path: Path) -> None:
    """Layer drop by a generator of the model's own: a dropped layer has no gradient at all."""
    port, count = ready(tmp_path).port, itertools.count()
    layer = module(port, "model.layers.1.mlp")
    layer.register_forward_hook(lambda _m, _a, out: out.detach() * 0 if next(count) % 2 else out)
    found = repeats(port)
    assert found is not None
    assert found.data["total"] == len(port.parts.parameters)
    assert found.data["num"] >= 3


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["output", "gradient"])
def test_a_step_that_is_not_finite_repeats_all_the_same(tmp_path: Path, value: float, place: str) -> None:
    """A NaN is unequal to itself; its bits are not."""
    port = ready(tmp_path).port
    if place == "output":
        poison_output(module(port, "model.layers.0.mlp.down_proj"), at_step(port, 1), value)
    else:
        poison_gradient(port.parts.parameters[0][1], at_step(port, 1), value)
    assert repeats(port) is None


def test_a_value_that_is_not_finite_in_one_of_the_two_alone_is_found(tmp_path: Path) -> None:
    port, count = ready(tmp_path).port, itertools.count()
    poison_gradient(port.parts.parameters[0][1], lambda: next(count) % 2 == 1, math.nan)
    found = repeats(port)
    assert found is not None
    assert found.data["first"] == port.parts.parameters[0][0]


class Toy:
    """A port of one parameter whose gradients and loss are told in advance; ``shown``: its tensors are live."""

    def __init__(self, gradients: list[list[float]], losses: list[float], *, shown: bool = True) -> None:
        self.weight = nn.Parameter(torch.zeros(len(gradients[0])))
        self.gradients, self.losses, self.shown = iter(gradients), iter(losses), shown
        self.able = frozenset(Capability)
        self.aborts = 0

    def capabilities(self) -> frozenset[Capability]:
        return self.able

    def forward_backward(self) -> Trace:
        self.weight.grad = torch.tensor(next(self.gradients))
        norms_P = tensor_norms([self.weight.grad])
        return Trace(7, torch.tensor(next(self.losses)), 1, 1, norms_P, ["w"], lr=0.1)

    def abort(self) -> None:
        self.aborts += 1
        self.weight.grad = None

    def state_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield "w", self.weight if self.shown else self.weight.detach().clone()


def toy(*gradients: list[float], losses: tuple[float, float] = (1.0, 1.0), **more) -> Toy:
    return Toy(list(gradients), list(losses), **more)


@pytest.mark.parametrize(
    ("one", "two", "losses"),
    [
        ([1.0, 2.0], [2.0, 1.0], (1.0, 1.0)),  # the norms are the same
        ([0.0, 1.0], [-0.0, 1.0], (1.0, 1.0)),
        ([1.0, 2.0], [1.0, 2.0], (0.0, -0.0)),
        ([1.0, 2.0], [1.0, 2.0], (1.0, 1.0 + 2.0**-23)),
        ([1e-45, 1.0], [0.0, 1.0], (1.0, 1.0)),
        ([math.nan, 1.0], [math.inf, 1.0], (1.0, 1.0)),
        ([1.0, 2.0], [1.0, 2.0], (1.0, math.nan)),
    ],
)
def test_every_bit_counts(one: list[float], two: list[float], losses: tuple[float, float]) -> None:
    found = repeats(toy(one, two, losses=losses))
    assert found is not None
    assert found.data["step"] == 7
    assert found.data["num"] == (one != two or math.copysign(1, one[0]) != math.copysign(1, two[0]))


@pytest.mark.parametrize("value", [0.0, -0.0, math.nan, math.inf, 1e-45])
def test_equal_bits_repeat(value: float) -> None:
    port = toy([value, 1.0], [value, 1.0], losses=(value, value))
    assert repeats(port) is None
    assert port.aborts == 2


def test_of_a_port_that_shows_no_gradients_the_norms_are_compared() -> None:
    assert repeats(toy([1.0, 2.0], [2.0, 1.0], shown=False)) is None
    found = repeats(toy([1.0, 2.0], [1.0, 3.0], shown=False))
    assert found is not None
    assert found.data["first"] == "w"


def test_a_step_that_fails_is_aborted_and_the_error_passed_on() -> None:
    port = toy([1.0, 2.0], losses=(1.0, 1.0))
    with pytest.raises(StopIteration):
        repeats(port)
    assert port.aborts == 2
    assert port.weight.grad is None


def test_a_port_that_cannot_replay_is_refused() -> None:
    port = toy([1.0], [1.0])
    port.able = frozenset(Capability) - {Capability.REPLAY}
    with pytest.raises(ValueError, match="REPLAY"):
        repeats(port)
    assert port.aborts == 0


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_message_has_all_its_numbers(language: str) -> None:
    found = repeats(toy([1.0, 2.0], [1.0, 3.0], losses=(1.25, 1.25 + 2.0**-23)))
    assert isinstance(found, Finding)
    shown = fill(NOT_REPEATED.text(language).what, found.data)
    assert "{" not in shown
    assert "1.25 " in shown or "1.25，" in shown
    assert "1.2500001192092896" in shown
