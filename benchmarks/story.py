"""The story of an fp16 run that turns NaN, acted out three times on the same batches.

    python benchmarks/story.py [--model internlm2|smollm2] [--steps N]

plain     a loop as many scripts have it: fp16 mixed precision, AdamW, clipping, no guard; then a sampled answer
guarded   the shipped recipe (overflow-internlm2, overflow-smollm2): FiniTune's trainer with its guard
fp32      the same recipe with precision=fp32: what the guarded run is measured against

What was done to the model is said in the recipe: its residual stream was rescaled, which leaves its answers as they
are and puts its down_proj outputs next to 65504. fp16 is emulated on a CPU: same roundings, same overflows.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import torch

from common import quiet, report
from finitune.core.journal import read
from finitune.numerics.seeds import seed_generators
from finitune.train.prepare import prepare
from finitune.train.recipe_io import load_recipe
from finitune.train.run import open_run
from finitune.train.step import on_device

SCALE = 1024.0
"""A fixed loss scale in the plain loop: the one that the recipes begin with."""


def recipe_of(model: str, folder: Path, *overrides: str) -> Any:
    """The shipped recipe with the run in ``folder``."""
    return load_recipe(f"overflow-{model}", [f"output_dir={folder}", *overrides])


def plain(recipe: Any) -> dict[str, Any]:
    """The plain loop, and an answer at its end."""
    prepared = prepare(recipe)
    parts, state = prepared.port.parts, prepared.port.state
    optimizer, weights = parts.optimizer, [p for _, p in parts.parameters]
    losses: list[float] = []
    for step in range(recipe.max_steps):
        total, batches = 0.0, parts.loader.at(state.cursor)
        count = sum(b.num_supervised for b in batches)
        for micro, batch in enumerate(batches):
            seed_generators(parts.seed, step, micro)
            with parts.context():
                done = parts.objective.compute(
                    parts.model, parts.family, on_device(parts, batch), factor=SCALE / count, chunk_tokens=2048
                )
                done.scaled.backward()
            total += float(done.loss_sum) / count
        torch._foreach_mul_([p.grad for p in weights if p.grad is not None], 1 / SCALE)
        torch.nn.utils.clip_grad_norm_(weights, recipe.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * parts.schedule(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        state.cursor = parts.loader.advance(state.cursor)
    first_nan = next((i + 1 for i, loss in enumerate(losses) if not math.isfinite(loss)), None)
    bad = sum(not bool(torch.isfinite(p).all()) for p in weights)
    row = {"run": "plain", "good steps": (first_nan or len(losses) + 1) - 1, "bad tensors": f"{bad} of {len(weights)}"}
    return row | {"held-out loss": math.nan if bad else None, "at the end": answer(prepared, parts)}


def answer(prepared: Any, parts: Any) -> str:
    """What sampling an answer comes to."""
    ids = prepared.tokenizer("What does os.path.join do?", return_tensors="pt").to(parts.strategy.device)
    try:
        with torch.no_grad(), parts.context():
            parts.model.eval()
            parts.model.generate(**ids, do_sample=True, max_new_tokens=8)
    except RuntimeError as error:
        return f"RuntimeError: {error}"
    return "an answer"


def ours(name: str, recipe: Any) -> dict[str, Any]:
    """FiniTune's trainer."""
    session = open_run(recipe)
    result = session.run()
    records = [r["incident"] for r in read(Path(result.run_dir) / "journal.jsonl") if r["kind"] == "incident"]
    weights = [p for _, p in session.prepared.port.parts.parameters]
    bad = sum(not bool(torch.isfinite(p).all()) for p in weights)
    story = [
        f"step {i['step']}: {i['diagnosis'][0]['code'] if i['diagnosis'] else 'unknown'} "
        f"{i['diagnosis'][0]['where'] if i['diagnosis'] else ''} -> {i['remedy']} ({i['replays']:.0f} replays)"
        for i in records
    ]
    good = records[0]["step"] - 1 if records else result.steps
    return {
        "run": name,
        "good steps": good,
        "bad tensors": f"{bad} of {len(weights)}",
        "held-out loss": result.eval_after,
        "at the end": "; ".join([result.status, *story]),
    }


def main() -> None:
    """Act it out, and print the table."""
    asked = argparse.ArgumentParser()
    asked.add_argument("--model", default="internlm2", choices=("internlm2", "smollm2"))
    asked.add_argument("--steps", type=int)
    given = asked.parse_args()
    quiet()
    steps = [f"max_steps={given.steps}"] if given.steps else []
    with tempfile.TemporaryDirectory() as home:
        place = Path(home)
        rows = [plain(recipe_of(given.model, place / "plain", *steps))]
        rows.append(ours("guarded", recipe_of(given.model, place / "guarded", *steps)))
        rows.append(ours("fp32", recipe_of(given.model, place / "fp32", "precision=fp32", *steps)))
    truth = rows[-1]["held-out loss"]
    for row in rows:
        loss = row["held-out loss"]
        row["against fp32"] = f"{100 * (loss / truth - 1):+.2f} %" if loss is not None and math.isfinite(loss) else "-"
    report(f"story_{given.model}", rows, [f"The shipped recipe overflow-{given.model}."])


if __name__ == "__main__":
    main()
