"""One non-finite forward at step 10 of 24: what the HF Trainer and FiniTune are left with.

    python benchmarks/one_nan.py

The same tiny Llama, batches, learning rate, seed and fault on both sides. HF's ``fp16=True`` computes in
fp32 on a CPU, so its half-precision row is a model with fp16 weights, as users of old recipes have it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from common import bad_tensors, hf_trainer, quiet, report
from finitune.core.journal import read
from finitune.data.collate import Batch
from finitune.models.load import load
from finitune.train.prepare import prepare
from finitune.train.recipe import Recipe
from finitune.train.recipe_io import load_recipe
from finitune.train.run import open_run

STEPS, BAD_STEP, LR = 24, 10, 1e-3


def recipe(folder: Path, precision: str) -> Recipe:
    """A full fine-tune of the tiny Llama on rows made from the standard library's docstrings."""
    return load_recipe(
        "tiny-internlm2",
        [
            "model.name_or_path=tiny-llama",
            "data.limit_rows=300",
            "data.max_length=128",
            f"precision={precision}",
            f"max_steps={STEPS}",
            f"learning_rate={LR}",
            "lr_scheduler_type=constant",
            "warmup_ratio=0",
            "save_steps=8",
            "sample.prompts=[]",
            "overwrite_output_dir=true",
            f"output_dir={folder}",
        ],
    )


def batches_of(folder: Path) -> list[Batch]:
    """The batches that FiniTune trains on, for the other side."""
    prepared = prepare(recipe(folder, "fp32"))
    loader, cursor, batches = prepared.port.parts.loader, prepared.port.state.cursor, []
    for _ in range(STEPS):
        batches += loader.at(cursor)
        cursor = loader.advance(cursor)
    return batches


def poison(module: nn.Module, due: Any) -> Any:
    """One NaN in the output of ``module`` while ``due()`` is true."""

    def hook(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor | None:
        if not (due() and torch.is_grad_enabled()):
            return None
        spoilt = output.clone()
        spoilt.view(-1)[0] = float("nan")
        return spoilt

    return module.register_forward_hook(hook)


def down_proj(model: nn.Module) -> nn.Module:
    """Where half precision overflows first."""
    return model.get_submodule("model.layers.0.mlp.down_proj")


def hf(folder: Path, batches: Any, weights: torch.dtype, fault: bool, **arguments: Any) -> dict[str, Any]:
    """The HF Trainer with its defaults."""
    model = load("tiny-llama", dtype=weights, seed=42).model
    trainer = hf_trainer(
        model,
        batches,
        folder,
        max_steps=STEPS,
        learning_rate=LR,
        lr_scheduler_type="constant",
        save_steps=8,
        save_total_limit=2,
        logging_steps=1,
        **arguments,
    )
    if fault:
        poison(down_proj(model), lambda: trainer.state.global_step + 1 == BAD_STEP)
    trainer.train()
    bad, total = bad_tensors(model)
    saved = sorted(folder.glob("checkpoint-*"))
    poisoned = sum(
        any(not bool(torch.isfinite(t).all()) for t in load_file(str(p / "model.safetensors")).values()) for p in saved
    )
    losses = [float(h["loss"]) for h in trainer.state.log_history if "loss" in h]
    return {
        "bad tensors": f"{bad} of {total}",
        "poisoned checkpoints": f"{poisoned} of {len(saved)}",
        "last logged loss": losses[-1],
    }


def ours(folder: Path, precision: str, fault: bool) -> dict[str, Any]:
    """FiniTune with its defaults."""
    session = open_run(recipe(folder, precision))
    port = session.prepared.port
    if fault:
        poison(down_proj(port.parts.model), lambda: port.state.step + 1 == BAD_STEP)
    result = session.run()
    bad, total = bad_tensors(port.parts.model)
    saved = sorted(folder.glob("checkpoint-*"))
    poisoned = sum(
        any(not bool(torch.isfinite(t).all()) for t in load_file(str(p / "model.safetensors")).values()) for p in saved
    )
    steps = [r for r in read(folder / "journal.jsonl") if r["kind"] == "step"]
    aborted = [r for r in steps if r["verdict"] == "abort"]
    return {
        "bad tensors": f"{bad} of {total}",
        "poisoned checkpoints": f"{poisoned} of {len(saved)}",
        "last logged loss": steps[-1]["loss"],
        "refused": ", ".join(f"step {r['step']} ({len(r['rows'])} rows)" for r in aborted) or "-",
        "exit": result.exit_code,
    }


def main() -> None:
    """The table."""
    quiet()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        batches = batches_of(base / "plan")
        peers = (
            ("fp32", torch.float32, {}),
            ("bf16", torch.float32, {"bf16": True}),
            ("fp16 weights", torch.float16, {}),
        )
        for label, weights, arguments in peers:
            for fault in (False, True):
                folder = base / f"hf-{label}-{fault}"
                rows.append(
                    {"trainer": "HF Trainer", "precision": label, "NaN": fault}
                    | hf(folder, batches, weights, fault, **arguments)
                )
        for precision in ("fp32", "bf16", "fp16-emulated"):
            clean = ours(base / f"clean-{precision}", precision, False)
            hurt = ours(base / f"hurt-{precision}", precision, True)
            change = hurt["last logged loss"] / clean["last logged loss"] - 1
            rows.append({"trainer": "FiniTune", "precision": precision, "NaN": False} | clean)
            rows.append(
                {"trainer": "FiniTune", "precision": precision, "NaN": True}
                | hurt
                | {"loss vs clean": f"{100 * change:+.2f} %"}
            )
    report("one_nan", rows, [f"{STEPS} steps, one NaN in the output of layer 0's down_proj at step {BAD_STEP}."])


if __name__ == "__main__":
    main()
