"""Tiny runs for tests: a recipe, a prepared run, a loop, on a model that trains in milliseconds a step."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from finitune.core.journal import Journal, read
from finitune.engine.guard import Guard, GuardSettings, Hooks
from finitune.engine.judge import Judge
from finitune.engine.policy import Policy
from finitune.train.loop import Loop, record_or_halt
from finitune.train.observer import Observers
from finitune.train.prepare import Prepared, prepare
from finitune.train.recipe import Recipe
from finitune.train.recipe_io import load_recipe

WORDS = "the loss falls and stays finite while every step is judged before it changes a weight".split()

OPEN: list[Journal] = []
"""Journals to be closed after the test (see conftest)."""


def write_rows(path: Path, count: int = 64) -> Path:
    """Chat rows of different lengths, always the same."""
    with path.open("w", encoding="utf-8") as handle:
        for i in range(count):
            question = " ".join(WORDS[(i + k) % len(WORDS)] for k in range(2 + i % 5))
            answer = " ".join(WORDS[(3 * i + k) % len(WORDS)] for k in range(3 + i % 7))
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            handle.write(json.dumps({"messages": messages}) + "\n")
    return path


def tiny_recipe(folder: Path, *overrides: str, model: str = "tiny-llama") -> Recipe:
    """A full fine-tune of a tiny random model on a few rows; ``overrides`` as on the command line."""
    rows = folder / "rows.jsonl"
    if not rows.exists():
        write_rows(rows)
    base = (
        f"model.name_or_path={model}",
        f"data.train={rows}",
        "data.max_length=128",
        "data.eval_fraction=0.1",
        "lora=null",
        "precision=fp32",
        "device=cpu",
        "max_steps=24",
        "learning_rate=1e-3",
        "per_device_train_batch_size=2",
        f"output_dir={folder / 'run'}",
        "sample.prompts=[]",
    )
    return load_recipe("tiny-internlm2", [*base, *overrides])


def ready(folder: Path, *overrides: str, model: str = "tiny-llama") -> Prepared:
    """A prepared tiny run."""
    return prepare(tiny_recipe(folder, *overrides, model=model))


def loop_of(prepared: Prepared, folder: Path, **policy: Any) -> Loop:
    """The main loop of a prepared run, with its journal in ``folder``; failures are refused, not investigated."""
    OPEN.append(Journal(folder / "journal.jsonl"))
    journal = OPEN[-1]
    return Loop(
        port=prepared.port,
        guard=guard_of(prepared, journal, Policy(**policy)),
        journal=journal,
        observers=Observers([]),
        total_steps=prepared.plan.total_steps,
    )


def guard_of(prepared: Prepared, journal: Journal, policy: Policy) -> Guard:
    """A guard that refuses what its detectors refuse, and goes no further."""
    wanted = prepared.recipe.guard
    judge = Judge.of(wanted.detectors) if wanted.enabled else Judge.only("non_finite")
    settings = GuardSettings(max_replays=0, state_check_steps=10**9)
    return Guard(prepared.port, judge, policy, None, Hooks(partial(record_or_halt, journal)), settings)


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """The step records of a journal."""
    return [r for r in read(folder / "journal.jsonl") if r["kind"] == "step"]
