"""The runs of the matrix: tiny models, a few rows, an epoch's end in the middle, checkpoints every third step."""

from __future__ import annotations

from pathlib import Path

from finitune.train.recipe import Recipe
from support.runs import tiny_recipe, write_rows

STEPS = 12
SAVE_STEPS = 3
_ROWS = 24
MODEL = "tiny-llama:hidden=32,layers=1,mlp=48"
_EVERY = (
    f"max_steps={STEPS}",
    f"save_steps={SAVE_STEPS}",
    "eval_steps=5",
    "guard.trust_steps=2",
    "save_total_limit=3",
    "guard.state_check_steps=4",
    "snapshots.digest_steps=2",
)
_PACKED = ("data.packing=true", "data.max_length=96")
_FP16 = ("precision=fp16-emulated", "scaler.init_scale=524288", "scaler.growth_interval=3")
_LORA = ("lora.r=4", "lora.lora_dropout=0.2")

CONFIGURATIONS: dict[str, tuple[str, ...]] = {
    "full fp32": (),
    "full bf16 packed, 2 micro-batches": (
        "precision=bf16",
        "gradient_accumulation_steps=2",
        "save_total_limit=2",
        *_PACKED,
    ),
    "full fp16 scaled": _FP16,
    "LoRA fp32, 2 micro-batches": (*_LORA, "gradient_accumulation_steps=2"),
    "LoRA bf16 packed": (*_LORA, "precision=bf16", *_PACKED),
    "LoRA fp16 scaled packed, 3 micro-batches": (*_LORA, *_FP16, "gradient_accumulation_steps=3", *_PACKED),
    "full fp16 with batches given up": (
        "precision=fp16-emulated",
        "scaler.init_scale=4194304",
        "scaler.growth_interval=2",
        "scaler.max_retries=1",
        "save_in_background=false",
        "save_total_limit=1",
    ),
}
"""Recipe overrides by the name of the run."""


def recipe_of(name: str, data: Path, home: Path) -> Recipe:
    """The recipe of a configuration: its rows are in ``data`` (the same for all, row ids hold the path), its run in
    ``home/run``; what is there already steps aside.
    """
    rows = data / "rows.jsonl"
    if not rows.exists():
        write_rows(rows, _ROWS)
    where = (f"output_dir={home / 'run'}", "overwrite_output_dir=true")
    return tiny_recipe(data, *_EVERY, *CONFIGURATIONS[name], *where, model=MODEL)
