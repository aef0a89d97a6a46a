"""Runs of the cure table: the recipe, FiniTune's own run with a fault planted, and the held-out loss of any weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch

from cures_faults import LR, ROWS_PER_BATCH, Fault, Planted
from finitune.core.journal import read
from finitune.train.evaluate import evaluate
from finitune.train.prepare import Prepared, prepare
from finitune.train.recipe import Recipe
from finitune.train.recipe_io import load_recipe
from finitune.train.run import open_run, train_run

STEPS = 130
NUM_ROWS = 272
# Each in a row or two: what hangs on a token hangs on few rows.
_RARE = "#;|<>[]{}*"
_WORDS = {
    "who": "a red fox|the old king|my neighbour|a small bird|Zoë|the captain|nobody|a quick cat|Jürgen|the @author",
    "does": "sees|carries|paints|forgets|counts|looks for|has lost|buys|sells|~holds",
    "what": "six apples|a wooden box|the last train|two letters|a song|the answer|100 % of it|its shadow|an idea|x=y",
    "where": "in the garden|by the sea|at home|under a bridge|near Kraków|on a hill|at noon|in the rain|for ever|here",
}
MODEL = "tiny-internlm2:hidden=32,layers=2,heads=2,kv_heads=2,mlp=96"


def write_rows(path: Path, count: int = NUM_ROWS) -> Path:
    """Short questions and answers of a small grammar: learnt quickly, never by heart; always the same."""
    random, choices = Random(0), {k: v.split("|") for k, v in _WORDS.items()}
    with path.open("w", encoding="utf-8") as handle:
        for _ in range(count):
            part = {k: random.choice(v) for k, v in choices.items()}
            mark = _RARE[random.randrange(len(_RARE))] if random.random() < 0.15 else ""
            question = f"Who {part['does']} {part['what']}?"
            answer = f"{part['who']} {part['does']} {part['what']} {part['where']}."[: random.randint(20, 80)] + mark
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            handle.write(json.dumps({"messages": turns}) + "\n")
    return path


@dataclass(frozen=True, slots=True)
class Setting:
    """One fault under one seed, in a folder of its own."""

    fault: Fault
    seed: int
    home: Path
    extra: tuple[str, ...] = ()

    def random(self, purpose: str = "plant") -> Random:
        """Whatever is drawn for this fault: the same for every contender."""
        return Random(f"{self.fault.name}/{self.seed}/{purpose}")

    def recipe(self, name: str, *overrides: str, faulty: bool = True) -> Recipe:
        """The recipe of a contender; ``faulty`` False: that of the clean run."""
        fault = self.fault
        own = tuple(fault.overrides(self.random("recipe"))) if faulty else tuple(fault.clean)
        rows = self.home / "rows.jsonl"
        if not rows.exists():
            write_rows(rows)
        base = (
            f"data.train={rows}",
            f"model.name_or_path={self.model()}",
            "data.max_length=128",
            "data.eval_fraction=0.12",
            "data.max_eval_rows=32",
            "precision=fp32",
            f"max_steps={STEPS}",
            f"per_device_train_batch_size={ROWS_PER_BATCH}",
            f"learning_rate={LR}",
            "lr_scheduler_type=constant",
            "warmup_ratio=0",
            "sample.prompts=[]",
            f"seed={self.seed}",
            f"output_dir={self.home / name}",
        )
        return load_recipe("tiny-internlm2", [*base, *fault.common, *own, *self.extra, *overrides])

    def model(self) -> str:
        """A random tiny model, or that model after some training on the same kind of rows."""
        if not self.fault.trained:
            return MODEL
        base = self.home / "base"
        if not (base / "final").is_dir():
            plain = replace(self, fault=Fault("base", self.fault.plant))
            train_run(plain.recipe("base", "max_steps=100", "guard.enabled=false", "seed=99"))
        return str(base / "final")

    def prepared(self, name: str) -> tuple[Prepared, Planted]:
        """A run for a contender that is not ours, with the fault in it."""
        ready = prepare(self.recipe(name))
        return ready, self.fault.plant(ready, self.random(), ready.plan.total_steps)


class Between:
    """An observer that looks at the weights after every step, and puts a state fault in before the next."""

    def __init__(self) -> None:
        self.prepared: Prepared | None = None
        self.planted = Planted("nothing")
        self.bad_after: list[int] = []

    def on_step(self, _event: Any) -> None:
        """After every transaction, whatever became of it."""
        assert self.prepared is not None, "the run was opened"
        port = self.prepared.port
        if bad_tensors(self.prepared):
            self.bad_after.append(port.state.step)
        self.planted.between(port.state.step, port.parts.optimizer)


@dataclass(frozen=True, slots=True)
class Ran:
    """What a run of ours came to."""

    loss: float
    bad: int
    status: str
    incidents: tuple[dict[str, Any], ...]
    weights: dict[str, torch.Tensor]
    bad_after: tuple[int, ...]
    """Steps after which a weight was not finite, the planted ones not counted."""
    planted: Planted

    @property
    def story(self) -> list[dict[str, Any]]:
        """Of each incident what the table shows."""
        return [_short(i) for i in self.incidents]


def _short(incident: dict[str, Any]) -> dict[str, Any]:
    top = incident["diagnosis"][0] if incident["diagnosis"] else {"code": "unknown", "where": ""}
    return {
        "step": incident["step"],
        "trigger": incident["trigger"],
        "code": top["code"],
        "where": top["where"],
        "remedy": incident["remedy"] or incident["outcome"],
        "replays": incident["replays"],
        "steps lost": incident["steps_lost"],
    }


def ours(setting: Setting, name: str = "ours", *overrides: str, faulty: bool = True, planting: bool = True) -> Ran:
    """FiniTune's trainer with its guard."""
    between = Between()
    session = open_run(setting.recipe(name, *overrides, faulty=faulty), observers=[between])
    prepared = between.prepared = session.prepared
    if planting:
        between.planted = setting.fault.plant(prepared, setting.random(), prepared.plan.total_steps)
    planted = between.planted
    result = session.run()
    for handle in planted.handles:
        handle.remove()
    incidents = [r["incident"] for r in read(Path(result.run_dir) / "journal.jsonl") if r["kind"] == "incident"]
    return Ran(
        held_out(prepared),
        bad_tensors(prepared),
        result.status,
        tuple(incidents),
        {n: p.detach().clone() for n, p in prepared.port.parts.parameters},
        tuple(between.bad_after),
        planted,
    )


def clean(setting: Setting) -> Ran:
    """The same run without the fault and without a guard."""
    return ours(setting, "clean", "guard.enabled=false", faulty=False, planting=False)


def held_out(prepared: Prepared) -> float:
    """Held-out loss of the weights as they are, computed in fp32 whatever the run computed in."""
    parts = replace(prepared.port.parts, context=nullcontext)  # type: ignore[arg-type]
    return evaluate(parts, prepared.eval_batches, 0).loss


def bad_tensors(prepared: Prepared) -> int:
    """Trainable tensors with a non-finite element."""
    return sum(not bool(torch.isfinite(p).all()) for _, p in prepared.port.parts.parameters)


@contextmanager
def removed(handles: Sequence[Any]) -> Iterator[None]:
    """Hooks are gone afterwards."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
