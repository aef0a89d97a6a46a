"""A recipe with LoRA, several rows packed into one sequence, and gradient accumulation."""

from __future__ import annotations

from random import Random

from finitune.bench.recipe_load import RecipeLoad

RUNS = (("recipe_sft", "bf16"), ("recipe_sft", "fp32"), ("recipe_sft", "fp16"))
STEPS = 40


def plant(load: RecipeLoad, random: Random) -> str:
    """Rank, dropout, width of the packs and the number of micro-batches are drawn."""
    rank, dropout = random.choice((2, 4, 8)), random.choice((0.0, 0.1))
    width, parts = random.choice((192, 256, 384)), random.choice((2, 3, 4))
    load.overrides |= {
        "lora.r": str(rank),
        "lora.lora_alpha": str(2 * rank),
        "lora.lora_dropout": str(dropout),
        "data.packing": "true",
        "data.max_length": str(width),
        "per_device_train_batch_size": "1",
        "gradient_accumulation_steps": str(parts),
    }
    return f"LoRA of rank {rank}, dropout {dropout}, packs of {width} tokens, {parts} micro-batches"
