"""A recipe from files to files, trained by FiniTune's own trainer: full fine-tuning with a warm-up and a cosine."""

from __future__ import annotations

from random import Random

from finitune.bench.recipe_load import RecipeLoad

RUNS = (("recipe_sft", "fp32"), ("recipe_sft", "bf16"), ("recipe_sft", "fp16"))
STEPS = 40


def plant(load: RecipeLoad, random: Random) -> str:
    """Another rate, schedule and size of the batch."""
    rate, schedule = 10 ** random.uniform(-3.5, -2.5), random.choice(("cosine", "linear", "constant"))
    rows = random.choice((1, 2, 4))
    load.overrides.update(
        learning_rate=f"{rate:.3g}", lr_scheduler_type=schedule, per_device_train_batch_size=str(rows)
    )
    return f"rate {rate:.2g}, {schedule}, {rows} rows a micro-batch"
