"""Randomness is a function of the counters: whatever happens between two steps, every step keeps its bits.

The models here draw from every generator there is: dropout in attention and before the adapters, and layers that ask
torch's, Python's and numpy's global generators, as some third-party models do.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from finitune.data.loader import Cursor
from finitune.engine.monitor import read
from finitune.engine.policy import Action
from finitune.numerics.determinism import Kernels
from finitune.numerics.digest import digest
from finitune.numerics.fingerprint import checksum
from finitune.numerics.seeds import GeneratorStates, generators_kept
from finitune.train.evaluate import evaluate
from finitune.train.observer import SampleEvent
from finitune.train.prepare import Prepared
from finitune.train.sampling import Sampler
from finitune.train.step import TrainPort
from support.runs import loop_of, ready

MODEL = "tiny-llama:hidden=32,layers=2,heads=2,kv_heads=1,mlp=64"
LORA = "lora={r: 4, lora_dropout: 0.2}"
ACCUMULATED = "gradient_accumulation_steps=2"
RECIPES = {
    "full": ("seed=1", ACCUMULATED),
    "lora": ("seed=2", ACCUMULATED, LORA),
    "packed": ("seed=3", ACCUMULATED, LORA, "data.packing=true", "data.max_length=64"),
    "checkpointed": ("seed=4", ACCUMULATED, LORA, "gradient_checkpointing=true"),
    "half": ("seed=5", ACCUMULATED, LORA, "precision=fp16-emulated"),
}
NUM_STEPS = 6


@pytest.fixture(autouse=True)
def _hosts_generators():
    with generators_kept():
        yield


def random_model(folder: Path, *overrides: str) -> Prepared:
    """A prepared run whose model draws from everything."""
    folder.mkdir(exist_ok=True)
    asked = ("sample.prompts=['the loss']", "sample.max_new_tokens=3", "sample.temperature=1.0", "data.max_eval_rows=2")
    prepared = ready(folder, *asked, *overrides, model=MODEL)
    for part in prepared.port.parts.model.modules():
        if hasattr(part, "attention_dropout"):
            part.attention_dropout = 0.1
    layers = [m for n, m in prepared.port.parts.model.named_modules() if n.endswith("layers.1")]
    assert len(layers) == 1
    layers[0].register_forward_pre_hook(_disturb_input)
    return prepared


def _disturb_input(layer: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[Any, ...] | None:
    """What third-party layers do: they scale, drop or mask by whatever generator is at hand."""
    if not layer.training:
        return None
    factor = 1.0 + 0.1 * torch.rand(()) + 0.1 * random.random() + 0.1 * float(np.random.rand())
    return (args[0] * factor.to(args[0].dtype), *args[1:])


Marks = tuple[int, ...]


def marks(port: TrainPort) -> Marks:
    """The bits of the step at hand: loss, every gradient. The state stays as it is."""
    trace = port.forward_backward()
    found = (checksum(trace.loss_sum), *(checksum(p.grad) for _, p in port.parts.parameters if p.grad is not None))
    port.abort()
    return found


def skip(port: TrainPort) -> None:
    """Give the batch at hand up."""
    reading = read(port.forward_backward())
    port.abort()
    port.settle(Action.SKIP_BATCH, reading, clean=False)


@dataclasses.dataclass
class Scene:
    """A model with the bits of its first steps, all computed on the same weights in their order."""

    prepared: Prepared
    records: list[dict[str, Any]]
    expected: list[Marks]
    sampler: Sampler
    answers: list[str]

    def go_to(self, step: int) -> None:
        port = self.prepared.port
        port.restore({n: t.detach().clone() for n, t in port.state_tensors()}, copy.deepcopy(self.records[step]))


@functools.cache
def scene(name: str, folder: Path) -> Scene:
    prepared = random_model(folder / name, *RECIPES[name])
    port, records, expected = prepared.port, [], []
    for _ in range(NUM_STEPS):
        records.append(copy.deepcopy(port.state_record()))
        expected.append(marks(port))
        skip(port)
    answers: list[str] = []
    return Scene(prepared, records, expected, sampler_of(prepared, answers), answers)


def sampler_of(prepared: Prepared, answers: list[str]) -> Sampler:
    def tell(event: SampleEvent) -> None:
        answers.append(event.answer)

    return Sampler(prepared.port.parts, prepared.tokenizer, prepared.recipe.sample, tell)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("randomness")


EVENTS: Mapping[str, Callable[[Scene], object]] = {
    "torch is drawn from": lambda _: torch.rand(3),
    "torch is seeded": lambda _: torch.manual_seed(1),
    "numpy is drawn from": lambda _: np.random.randn(),
    "numpy is seeded": lambda _: np.random.seed(1),
    "python is drawn from": lambda _: random.random(),
    "python is seeded": lambda _: random.seed(1),
    "a batch is given up": lambda s: skip(s.prepared.port),
    "a step is aborted": lambda s: marks(s.prepared.port),
    "the model is asked": lambda s: s.sampler.ask(s.prepared.port.state.step),
    "the model is evaluated": lambda s: evaluate(s.prepared.port.parts, s.prepared.eval_batches, 1),
    "another epoch is planned": lambda s: s.prepared.port.parts.loader.plan(7),
}
places = st.integers(0, NUM_STEPS - 1)
scripts = st.lists(st.tuples(st.lists(st.sampled_from(sorted(EVENTS)), max_size=3), places), min_size=2, max_size=5)


@pytest.mark.parametrize("name", RECIPES)
@given(script=scripts)
@settings(max_examples=7, deadline=None)
def test_steps_in_any_order_and_among_any_events_keep_their_bits(name: str, home: Path, script) -> None:
    played = scene(name, home)
    for events, step in script:
        for event in events:
            EVENTS[event](played)
        played.go_to(step)
        assert marks(played.prepared.port) == played.expected[step]


@pytest.mark.parametrize("event", EVENTS)
def test_no_single_event_shifts_the_next_step(event: str, home: Path) -> None:
    played = scene("packed", home)
    for step in (0, NUM_STEPS - 1):
        EVENTS[event](played)
        played.go_to(step)
        assert marks(played.prepared.port) == played.expected[step]


def test_the_bits_of_different_steps_differ(home: Path) -> None:
    """Equal marks would make every test above true of anything."""
    for name in RECIPES:
        assert len(set(scene(name, home).expected)) == NUM_STEPS


@pytest.mark.parametrize("name", ["full", "packed"])
def test_a_disturbed_run_ends_in_the_bits_of_an_undisturbed_one(name: str, tmp_path: Path) -> None:
    """With updates: after each step the whole state is compared."""
    histories = []
    for disturbed in (False, True):
        prepared = random_model(tmp_path / str(disturbed), *RECIPES[name])
        loop = loop_of(prepared, tmp_path / str(disturbed))
        played = Scene(prepared, [], [], sampler_of(prepared, []), [])
        history = []
        for _ in range(4):
            for event in (e for e in EVENTS if disturbed and e != "a batch is given up"):
                EVENTS[event](played)
            assert loop.one() is Action.PROCEED
            history.append(digest(prepared.port.state_tensors(), prepared.port.state_record()))
        histories.append(history)
    assert histories[0] == histories[1]


def test_answers_do_not_depend_on_what_was_drawn_before(home: Path) -> None:
    played = scene("full", home)
    played.answers.clear()
    for event in ("torch is seeded", "torch is drawn from", "numpy is seeded", "a step is aborted"):
        EVENTS[event](played)
        played.sampler.ask(3)
    assert len(set(played.answers)) == 1
    for step in range(4, 12):
        played.sampler.ask(step)
    assert len(set(played.answers)) > 1


@pytest.mark.parametrize("event", ["the model is asked", "the model is evaluated", "another epoch is planned"])
def test_what_is_no_step_draws_from_no_global_generator(event: str, home: Path) -> None:
    played = scene("lora", home)
    before = GeneratorStates.now()
    EVENTS[event](played)
    assert same(before, GeneratorStates.now())


def same(a: GeneratorStates, b: GeneratorStates) -> bool:
    arrays = np.array_equal(a.numpy["state"]["key"], b.numpy["state"]["key"])
    places_in_them = a.numpy["state"]["pos"] == b.numpy["state"]["pos"]
    return torch.equal(a.torch_cpu, b.torch_cpu) and a.python == b.python and arrays and places_in_them


@pytest.mark.parametrize("overrides", [(), (LORA,)], ids=["full", "lora"])
def test_a_prepared_model_is_a_function_of_the_recipe_and_disturbs_no_generator(
    tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = GeneratorStates.now()
        prepared = ready(tmp_path, *overrides, model=MODEL)
        assert same(before, GeneratorStates.now())
        made.append((digest(prepared.port.parts.model.state_dict().items()), prepared.port.parts.loader.plan(0)))
    assert made[0] == made[1]


# ---- the randomness is there: other counters, other masks ----


class Watched:
    """A run whose steps all see the same batch, twice; its adapters' dropout masks are watched."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.port = ready(folder, ACCUMULATED, *overrides, model=MODEL).port
        batch = self.port.parts.loader.at(Cursor())[0]
        self.port.parts.loader.at = lambda _cursor: (batch, batch)
        self.masks: list[bytes] = []
        for part in self.port.parts.model.modules():
            if isinstance(part, nn.Dropout):
                part.register_forward_hook(self._look)

    def _look(self, _part: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        self.masks.append((output == 0).numpy().tobytes())

    def at(self, *, seed: int = 42, step: int = 0, rank: int = 0) -> tuple[list[bytes], Marks]:
        """The masks of the two micro-batches, and the bits of the step."""
        parts = self.port.parts
        self.port.parts = dataclasses.replace(
            parts, seed=seed, strategy=dataclasses.replace(parts.strategy, rank=rank), monitor=None
        )
        self.port.state.step = step
        self.masks.clear()
        found = marks(self.port)
        half = len(self.masks) // 2
        return [b"".join(self.masks[:half]), b"".join(self.masks[half:])], found


PLACES = [
    {},
    {"seed": 0},
    {"seed": 43},
    {"seed": 2**63 - 1},
    {"step": 1},
    {"step": 2},
    {"step": 10**6},
    {"rank": 1},
    {"rank": 2},
    {"step": 1, "rank": 1},
]


def test_other_seeds_steps_micro_batches_and_ranks_have_other_masks(tmp_path: Path) -> None:
    watched = Watched(tmp_path, LORA)
    seen = [watched.at(**place) for place in PLACES]
    masks = [mask for both, _ in seen for mask in both]
    assert len(masks) == 2 * len(PLACES)
    assert len(set(masks)) == len(masks)
    assert all(0.1 < np.frombuffer(m, dtype=np.bool_).mean() < 0.3 for m in masks)
    assert len({bits for _, bits in seen}) == len(PLACES)
    assert [watched.at(**place) for place in reversed(PLACES)] == seen[::-1]


def test_without_dropout_the_counters_change_nothing(tmp_path: Path) -> None:
    """The step above differed by its randomness alone."""
    watched = Watched(tmp_path)
    assert len({watched.at(**place)[1] for place in PLACES}) == 1


@pytest.mark.parametrize("seed", [1, 2])
def test_a_recomputed_layer_drops_what_it_dropped(tmp_path: Path, seed: int) -> None:
    """Gradient checkpointing runs a layer again in backward; with another mask its gradients would be wrong."""
    bits = []
    for checkpointing in ("false", "true"):
        layers = (f"seed={seed}", f"gradient_checkpointing={checkpointing}")
        port = ready(tmp_path, LORA, ACCUMULATED, *layers, model=MODEL).port
        for part in port.parts.model.modules():
            if hasattr(part, "attention_dropout"):
                part.attention_dropout = 0.1
        bits.append(marks(port))
    assert bits[0] == bits[1]


def test_a_step_without_deterministic_kernel_is_undone_and_has_the_bits_of_a_plain_one(tmp_path: Path) -> None:
    """The half-made gradients of the first try are dropped, and the same random numbers are drawn again."""
    found = []
    for asked in (False, True):
        prepared = random_model(tmp_path / str(asked), *RECIPES["lora"])
        port = prepared.port
        norm = next(m for n, m in port.parts.model.named_modules() if n.endswith("layers.1.input_layernorm"))
        norm.register_full_backward_hook(lambda *_: put())
        with Kernels(wanted=asked) as kernels:
            trace = kernels.compute(port.forward_backward, port.abort)
            found.append((checksum(trace.loss_sum), [checksum(p.grad) for _, p in port.parts.parameters]))
            assert [f.code for f in kernels.findings()] == ["NUM111"] * asked
            assert kernels.strict is False
    assert found[0] == found[1]


def put() -> None:
    """An operation without a deterministic kernel, on every device."""
    torch.zeros(2).put_(torch.tensor([0]), torch.tensor([1.0]))


@pytest.mark.parametrize("name", RECIPES)
def test_asking_for_deterministic_kernels_finds_them_all_and_changes_no_bit(name: str, home: Path) -> None:
    played = scene(name, home)
    with Kernels() as kernels:
        for step in (0, NUM_STEPS - 1):
            played.go_to(step)
            assert kernels.compute(lambda: marks(played.prepared.port), pytest.fail) == played.expected[step]
        assert kernels.findings() == []
