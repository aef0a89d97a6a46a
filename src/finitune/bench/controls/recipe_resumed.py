"""A recipe that is stopped half way, as by Ctrl-C, and taken up again; beside it one that was never stopped."""

from __future__ import annotations

from pathlib import Path
from random import Random

from finitune.bench.recipe_load import RecipeLoad

RUNS = (("recipe_sft", "fp32"), ("recipe_sft", "fp16"), ("recipe_sft", "bf16"))
STEPS = 40


def plant(load: RecipeLoad, random: Random) -> str:
    """The step of the stop is drawn, and whether there is a LoRA; nothing in the run folder is touched."""
    step = random.randint(load.steps // 4, 3 * load.steps // 4)
    lora = random.random() < 0.5
    if lora:
        load.overrides["lora.r"] = "4"
    load.stopped(step, _leave)
    return f"stopped after step {step} and resumed, {'LoRA' if lora else 'all weights'}"


def _leave(run_dir: Path) -> None:
    """The run folder stays as it is."""
    assert run_dir.is_dir()
