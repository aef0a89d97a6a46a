"""fp16 trouble on a real model: SmolLM2-135M, full fine-tune, the HF Trainer and FiniTune side by side.

    python benchmarks/real_fp16.py [--steps N]

SmolLM2 carries activations of 25,800 in its residual stream, 1.3 bits below fp16's limit of 65,504; other
checkpoints carry larger ones. The model is rescaled by 2.4 in a way that leaves its function as it is (RMSNorm
does not see a scale: embedding, o_proj and down_proj times 2.4, head untied), which puts it next to the limit.
Both sides then train the same batches in fp16 mixed precision, emulated on a CPU (same roundings, same
overflows). The HF Trainer computes ``fp16=True`` in fp32 on a CPU, so its forward is put under the same
emulation here, without a loss scaler; a scaler cannot heal an overflow in the forward pass.
"""

from __future__ import annotations

import functools
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from common import bad_tensors, hf_trainer, quiet, report
from finitune.core.journal import read
from finitune.models.load import load
from finitune.models.save import save_model
from finitune.numerics.half import emulated_half
from finitune.train.prepare import prepare
from finitune.train.recipe_io import load_recipe
from finitune.train.run import open_run

FACTOR, LR = 2.4, 5e-4


def rescaled(folder: Path) -> Path:
    """SmolLM2 with a residual stream 2.4 times as large and the same function."""
    loaded = load("SmolLM2-135M-Instruct")
    model = loaded.model
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("embed_tokens.weight", "o_proj.weight", "down_proj.weight")):
                parameter.mul_(FACTOR)
    return save_model(model, loaded.tokenizer, folder, family=loaded.family)


def recipe(model: Path, folder: Path, steps: int) -> Any:
    """A full fine-tune without warm-up, as many first attempts look."""
    return load_recipe(
        "quickstart",
        [
            f"model.name_or_path={model}",
            "lora=null",
            "precision=fp16-emulated",
            "scaler.init_scale=1",
            "data.max_length=96",
            "data.limit_rows=600",
            "data.eval_fraction=0",
            "sample.prompts=[]",
            "per_device_train_batch_size=1",
            f"max_steps={steps}",
            f"learning_rate={LR}",
            "lr_scheduler_type=constant",
            f"output_dir={folder}",
        ],
    )


def hf(model_dir: Path, batches: list[Any], folder: Path, steps: int) -> dict[str, Any]:
    """The HF Trainer with its defaults, forward and backward in emulated fp16."""
    model = load(str(model_dir)).model
    forward = model.forward

    @functools.wraps(forward)  # the Trainer reads the signature to know which columns to pass
    def in_half(*args: Any, **kwargs: Any) -> Any:
        with emulated_half(torch.float16):
            return forward(*args, **kwargs)

    model.forward = in_half
    trainer = hf_trainer(
        model,
        batches,
        folder,
        max_steps=steps,
        learning_rate=LR,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
    )
    trainer.train()
    history = [h for h in trainer.state.log_history if "loss" in h]
    dead = next((h["step"] for h in history if not float(h["grad_norm"]) < float("inf")), None)
    bad, total = bad_tensors(model)
    return {"trainer": "HF Trainer", "ends": "normally", "first bad step": dead, "bad tensors": f"{bad} of {total}"}


def ours(model_dir: Path, folder: Path, steps: int) -> dict[str, Any]:
    """FiniTune with its defaults."""
    session = open_run(recipe(model_dir, folder, steps))
    model = session.prepared.port.parts.model
    result = session.run()
    refused = [r for r in read(folder / "journal.jsonl") if r["kind"] == "step" and r["verdict"] == "abort"]
    bad, total = bad_tensors(model)
    saved = sorted(folder.glob("checkpoint-*/model.safetensors"))
    good = all(bool(torch.isfinite(t).all()) for path in saved for t in load_file(str(path)).values())
    return {
        "trainer": "FiniTune",
        "ends": f"{result.status}, exit {result.exit_code}",
        "first bad step": refused[0]["step"] if refused else None,
        "bad tensors": f"{bad} of {total}",
        "refused steps": len(refused),
        "code": next((f["code"] for r in refused for f in r["findings"] if f["veto"]), "-"),
        "checkpoints finite": f"{good} ({len(saved)})",
    }


def main() -> None:
    """The table."""
    quiet()
    steps = int(sys.argv[sys.argv.index("--steps") + 1]) if "--steps" in sys.argv else 40
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        model_dir = rescaled(scratch / "rescaled")
        prepared = prepare(recipe(model_dir, scratch / "plan", steps))
        loader, cursor, batches = prepared.port.parts.loader, prepared.port.state.cursor, []
        for _ in range(steps):
            batches += loader.at(cursor)
            cursor = loader.advance(cursor)
        del prepared
        rows = [hf(model_dir, batches, scratch / "hf", steps), ours(model_dir, scratch / "ours", steps)]
    report("real_fp16", rows, [f"SmolLM2-135M rescaled by {FACTOR}, lr {LR}, {steps} steps of 1 row, fp16 emulated."])


if __name__ == "__main__":
    main()
