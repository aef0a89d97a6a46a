"""Tokens a second against the HF Trainer, and what monitor, grouping and packing cost or bring.

    python benchmarks/speed.py [lora] [full] [guard] [data] [--steps N]

Both trainers run in one process and take turns step by step, so that a drift of the machine's speed hits
both; the ratio is taken pair by pair and its median is quoted. Same model, weights, batches in the same
order, precision fp32, learning rate and clipping; losses are compared to prove it.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, TrainerCallback

from common import hf_trainer, median_ratio, quiet, report
from finitune.core.journal import Journal
from finitune.engine.guard import Guard, Hooks
from finitune.engine.judge import Judge
from finitune.engine.monitor import Monitor
from finitune.engine.policy import Policy
from finitune.models.load import load, resolve
from finitune.train.loop import Loop, record_or_halt
from finitune.train.observer import Observers
from finitune.train.prepare import Prepared, prepare
from finitune.train.recipe_io import load_recipe

MODEL = "SmolLM2-135M-Instruct"
WARM = 2


def small_model(folder: Path) -> Path:
    """A randomly initialised 19M Llama with SmolLM2's vocabulary and tokenizer, as an HF folder."""
    source = Path(resolve(MODEL))
    config = AutoConfig.from_pretrained(source)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 256, 704, 8
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 8, 4, 32
    config.save_pretrained(folder)
    for path in source.iterdir():
        if path.name.startswith("tokenizer") or path.suffix == ".jinja":
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def recipe_for(kind: str, scratch: Path, *overrides: str) -> Any:
    """LoRA on the real model, or a full fine-tune of the small one; rows of the standard library."""
    base = [
        "data.max_length=256",
        "data.limit_rows=1200",
        "per_device_train_batch_size=4",
        "precision=fp32",
        "lr_scheduler_type=constant",
        "warmup_ratio=0",
        "learning_rate=1e-4",
        "max_steps=1000",
        "sample.prompts=[]",
    ]
    if kind == "full":
        small = scratch / "small"
        if not small.exists():
            small.mkdir()
            small_model(small)
        base += [f"model.name_or_path={small}", "model.random_init=true", "lora=null"]
    return load_recipe("quickstart", [*base, *overrides])


def loop_of(prepared: Prepared, scratch: Path, name: str) -> Loop:
    """A loop as ``finitune train`` has it, without a display."""
    wanted, journal = prepared.recipe.guard, Journal(scratch / f"{name}.jsonl")
    judge = Judge.of(wanted.detectors) if wanted.enabled else Judge.only("non_finite")
    guard = Guard(
        prepared.port, judge, Policy(wanted.max_aborts_in_a_row), None, Hooks(partial(record_or_halt, journal))
    )
    return Loop(
        port=prepared.port,
        guard=guard,
        journal=journal,
        observers=Observers([]),
        total_steps=10**9,
    )


class TakeTurns(TrainerCallback):
    """After every HF step one of ours; the time of each, and both losses."""

    def __init__(self, ours: Loop) -> None:
        self.ours = ours
        self.pairs: list[tuple[float, float]] = []
        self.mark = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_kw: Any) -> None:
        """The first step has no end before it."""
        if not self.mark:
            self.mark = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_kw: Any) -> None:
        """HF's time runs from the end of our step to here, so fetching and logging count."""
        now = time.perf_counter()
        theirs_s = now - self.mark
        self.ours.one()
        after = time.perf_counter()
        self.pairs.append((theirs_s, after - now))
        self.mark = after


def against_hf(kind: str, steps: int, scratch: Path) -> dict[str, Any]:
    """The ratio of speeds, ours to theirs."""
    prepared = prepare(recipe_for(kind, scratch))
    loader, cursor, batches = prepared.port.parts.loader, prepared.port.state.cursor, []
    for _ in range(steps):
        batches += loader.at(cursor)
        cursor = loader.advance(cursor)
    theirs = peer_model(kind, scratch, prepared)
    turns = TakeTurns(loop_of(prepared, scratch, kind))
    trainer = hf_trainer(
        theirs,
        batches,
        scratch / "hf",
        [turns],
        max_steps=steps,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
    )
    trainer.train()
    hf_losses = [float(h["loss"]) for h in trainer.state.log_history if "loss" in h]
    lines = [json.loads(line) for line in turns.ours.journal.path.read_text().splitlines()]
    gap = max(abs(a - b["loss"]) / b["loss"] for a, b in zip(hf_losses, lines, strict=True))
    low, middle, high = median_ratio(turns.pairs[WARM:])
    supervised = sum(b.num_supervised for b in batches) / sum(b.num_tokens for b in batches)
    tokens = statistics.median(b.num_tokens for b in batches)
    return {
        "case": "SmolLM2-135M LoRA" if kind == "lora" else "19M full fine-tune",
        "supervised": f"{100 * supervised:.0f} %",
        "HF tokens/s": tokens / statistics.median(a for a, _ in turns.pairs[WARM:]),
        "ours tokens/s": tokens / statistics.median(b for _, b in turns.pairs[WARM:]),
        "ratio (median)": middle,
        "least": low,
        "greatest": high,
        "steps": steps - WARM,
        "largest loss difference": f"{100 * gap:.2g} %",
    }


def peer_model(kind: str, scratch: Path, prepared: Prepared) -> Any:
    """The same starting weights in a model of its own."""
    recipe = prepared.recipe
    if kind == "full":
        model = load(str(scratch / "small"), random_init=True, seed=recipe.seed).model
    else:
        from peft import LoraConfig, get_peft_model

        lora = recipe.lora
        config = LoraConfig(
            r=lora.r,
            lora_alpha=lora.lora_alpha,
            target_modules=list(prepared.port.parts.family.lora_targets),
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(load(MODEL).model, config)
    model.load_state_dict(prepared.port.parts.model.state_dict())
    return model


class Stopwatch:
    """Seconds spent inside some methods of a class."""

    def __init__(self, *places: tuple[type, str]) -> None:
        self.spent_s = 0.0
        self._places = places
        self._real = [getattr(owner, name) for owner, name in places]

    def __enter__(self) -> Stopwatch:
        for (owner, name), real in zip(self._places, self._real, strict=True):
            setattr(owner, name, self._timed(real))
        return self

    def _timed(self, real: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return real(*args, **kwargs)
            finally:
                self.spent_s += time.perf_counter() - started

        return timed

    def __exit__(self, *_error: object) -> None:
        for (owner, name), real in zip(self._places, self._real, strict=True):
            setattr(owner, name, real)


def own_share(loop: Loop, steps: int) -> float:
    """Share of step time spent inside the monitor's hooks, its summary, and the detectors."""
    whole = 0.0
    with Stopwatch((Monitor, "_look"), (Monitor, "stop"), (Judge, "judge")) as watch:
        for _ in range(steps):
            started = time.perf_counter()
            loop.one()
            whole += time.perf_counter() - started
    return watch.spent_s / whole


def guard_cost(steps: int, scratch: Path) -> list[dict[str, Any]]:
    """What monitor and detectors cost: their own time, and step time with them over step time without."""
    rows = []
    for kind in ("lora", "full"):
        loops = []
        for enabled in ("true", "false"):
            prepared = prepare(recipe_for(kind, scratch, f"guard.enabled={enabled}"))
            loops.append(loop_of(prepared, scratch, f"guard-{kind}-{enabled}"))
        pairs = []
        for step in range(steps):
            order = (0, 1) if step % 2 else (1, 0)
            times = {}
            for index in order:
                started = time.perf_counter()
                loops[index].one()
                times[index] = time.perf_counter() - started
            pairs.append((times[0], times[1]))
        low, middle, high = median_ratio(pairs[WARM:])
        rows.append(
            {
                "case": kind,
                "own time": f"{100 * own_share(loops[0], steps):.2f} %",
                "with guard / without (median)": middle,
                "least": low,
                "greatest": high,
                "steps": steps - WARM,
            }
        )
    return rows


LAYOUTS = {
    "random order": ("group_by_length=false",),
    "grouped by length": ("group_by_length=true",),
    "packed to 512": ("data.packing=true", "data.max_length=512", "per_device_train_batch_size=1"),
}


def data_gain(steps: int, scratch: Path) -> list[dict[str, Any]]:
    """Supervised tokens a second of three ways to make batches, on the same rows."""
    data = Path(__file__).parents[1].parent / "shared" / "data" / "hiyouga__LLaMA-Factory" / "alpaca_en_demo.json"
    source = [f"data.train={data}"] if data.is_file() else []
    loops = {
        name: loop_of(
            prepare(recipe_for("full", scratch, "data.max_length=512", *source, *overrides)), scratch, name[:6]
        )
        for name, overrides in LAYOUTS.items()
    }
    spent = dict.fromkeys(loops, 0.0)
    for step in range(steps):
        for name, loop in loops.items():
            started = time.perf_counter()
            loop.one()
            if step >= WARM:
                spent[name] += time.perf_counter() - started
    rows = []
    for name, loop in loops.items():
        lines = [json.loads(line) for line in loop.journal.path.read_text().splitlines()][WARM:]
        rows.append({"batches": name, "supervised tokens/s": sum(r["supervised_tokens"] for r in lines) / spent[name]})
    first = rows[0]["supervised tokens/s"]
    return [row | {"gain": row["supervised tokens/s"] / first} for row in rows]


def main() -> None:
    """Run what was asked for, or all of it."""
    quiet()
    names = [a for a in sys.argv[1:] if not a.startswith("-") and not a.isdigit()] or ["lora", "full", "guard", "data"]
    steps = int(sys.argv[sys.argv.index("--steps") + 1]) if "--steps" in sys.argv else 40
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        peers = [against_hf(kind, steps, scratch) for kind in ("lora", "full") if kind in names]
        if peers:
            report("speed", peers, ["Ratio: ours to HF Trainer's, higher is faster; fp32, batch 4."])
        if "guard" in names:
            report("guard_cost", guard_cost(steps, scratch))
        if "data" in names:
            report("data_gain", data_gain(3 * steps, scratch))


if __name__ == "__main__":
    main()
