"""One training, done by the HF Trainer or by FiniTune, with a probe that writes down each step and may hurt the run.

Used by resume_peers.py. Each training runs in a process of its own (``apart``), forked from one that has imported
everything and computed nothing. What the probe writes is on the disk before the run may be killed.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from finitune.engine.policy import Action
from finitune.models.load import load
from finitune.train.recipe_io import load_recipe
from finitune.train.run import train_run

SEED = 42
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FINAL = "final"


@dataclass(frozen=True, slots=True)
class Job:
    """A training; the same for both sides."""

    base: Path
    """Folder with rows-N.jsonl, tokens-N.json and the models."""
    rows: int = 30
    model: str = "tiny"
    """Folder of the model in ``base``."""
    epochs: float = 2
    max_steps: int = -1
    accumulation: int = 1
    save_steps: int = 5
    keep: int | None = None
    """save_total_limit; None is each side's default (HF: all, FiniTune: 2)."""
    lora_dropout: float | None = None
    """None trains all weights."""
    grouped: bool = False
    """Rows of similar length together."""
    fp16: bool = False
    streaming: bool = False
    """HF only: the rows come from an IterableDataset."""
    jit: bool = False
    """HF only: enable_jit_checkpoint."""


@dataclass(slots=True)
class Probe:
    """Writes down what a run does; kills it, signals it or fills the disk where asked."""

    record: Path
    kill_at: int | None = None
    """SIGKILL after this step."""
    kill_wait_s: float = 0.0
    """So long after it: a step of a real model takes longer than a save in the background."""
    term_at: int | None = None
    """SIGTERM after this step, then a pause of ``kill_wait_s``."""
    mark_at: int | None = None
    """Tell the parent when this step, after which a save is due, is done."""
    mark_fd: int = -1
    full_at: int | None = None
    """From this step on no file may grow over ``full_bytes``."""
    full_until: int | None = None
    full_bytes: int = 256 << 10
    started_s: float = field(default_factory=time.perf_counter)
    started_cpu_s: float = field(default_factory=time.process_time)
    rows_read: Callable[[], int] = field(default=lambda: -1)

    def note(self, **record: Any) -> None:
        """One line, handed to the system at once."""
        clocks = {
            "at_s": time.perf_counter() - self.started_s,
            "cpu_s": time.process_time() - self.started_cpu_s,
            "clock_s": time.time(),
        }
        line = json.dumps({**record, **clocks}, default=str) + "\n"
        descriptor = os.open(self.record, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(descriptor, line.encode())
        os.close(descriptor)

    def step(self, step: int, loss: float, rows: Sequence[int], scale: float | None = None) -> None:
        """After a step is done and before it is saved."""
        self.note(step=step, loss=float(loss).hex(), rows=list(rows), rows_read=self.rows_read(), scale=scale)
        if step == self.mark_at:
            os.write(self.mark_fd, b"s")
        if step == self.kill_at:
            time.sleep(self.kill_wait_s)
            os.kill(os.getpid(), signal.SIGKILL)
        if step == self.term_at:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(self.kill_wait_s)
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        if step == self.full_at:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.full_bytes, hard))
        if step == self.full_until:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


# --- HF Trainer ------------------------------------------------------------------------------------------------


class _Rows(Dataset):  # type: ignore[type-arg]
    """Token rows that count how often one is fetched."""

    def __init__(self, rows: list[dict[str, list[int]]]) -> None:
        self.rows, self.read = rows, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        self.read += 1
        return self.rows[index]


class _Stream(IterableDataset):  # type: ignore[type-arg]
    """The same rows, in file order, as a stream."""

    def __init__(self, rows: list[dict[str, list[int]]]) -> None:
        self.rows, self.read = rows, 0

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        for row in self.rows:
            self.read += 1
            yield row


def _collate(items: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(i["input_ids"]) for i in items)

    def padded(key: str, value: int) -> torch.Tensor:
        return torch.tensor([i[key] + [value] * (longest - len(i[key])) for i in items])

    mask = torch.tensor([[1] * len(i["input_ids"]) + [0] * (longest - len(i["input_ids"])) for i in items])
    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100), "attention_mask": mask}


def _hf_model(job: Job) -> Any:
    model: Any = load(str(job.base / job.model), dtype=torch.float32, seed=SEED).model
    if job.lora_dropout is None:
        return model
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(SEED)
    config = LoraConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=job.lora_dropout,
        target_modules=list(LORA_TARGETS),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def _watch_rows(model: nn.Module, rows: list[dict[str, list[int]]]) -> list[int]:
    """The numbers of the rows that go through the model in training, appended as they do."""
    numbers = {tuple(row["input_ids"]): number for number, row in enumerate(rows)}
    seen: list[int] = []

    def hook(module: nn.Module, _args: Any, inputs: dict[str, Any]) -> None:
        if module.training:
            lengths = inputs["attention_mask"].sum(1).tolist()
            seen.extend(numbers[tuple(ids[:n])] for ids, n in zip(inputs["input_ids"].tolist(), lengths, strict=True))

    model.register_forward_pre_hook(hook, with_kwargs=True)
    return seen


def _hf_watcher(probe: Probe, seen: list[int]) -> Any:
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):
        """Tells the probe; ``on_log`` comes after a step and before its save."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_kw: Any) -> None:
            if "loss" in logs:
                rows, seen[:] = list(seen), []
                probe.step(state.global_step, logs["loss"], rows)

        def on_save(self, args: Any, state: Any, control: Any, **_kw: Any) -> None:
            probe.note(event="saved", of=state.global_step)

    return Watcher()


def hf(job: Job, folder: Path, probe: Probe, resume: bool | str | None = None) -> None:
    """Train with the HF Trainer; everything not named by the job is its default."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    rows = json.loads((job.base / f"tokens-{job.rows}.json").read_text())
    data = _Stream(rows) if job.streaming else _Rows(rows)
    model = _hf_model(job)
    seen = _watch_rows(model, rows)
    options: dict[str, Any] = {"train_sampling_strategy": "group_by_length"} if job.grouped else {}
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=job.accumulation,
        num_train_epochs=job.epochs,
        max_steps=job.max_steps,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        save_steps=job.save_steps,
        save_total_limit=job.keep,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=SEED,
        fp16=job.fp16,
        enable_jit_checkpoint=job.jit,
        **options,
    )
    trainer = Trainer(
        model=model, args=args, train_dataset=data, data_collator=_collate, callbacks=[_hf_watcher(probe, seen)]
    )
    trainer.remove_callback(PrinterCallback)
    probe.rows_read = lambda: data.read
    probe.note(event="scaler", scaler=trainer.accelerator.scaler is not None, amp=trainer.accelerator.native_amp)
    trainer.train(resume_from_checkpoint=resume)
    done = trainer.state.global_step >= trainer.state.max_steps
    if done:
        trainer.save_model(str(folder / FINAL))
    probe.note(event="end", status="finished" if done else "stopped early", exit=0)


# --- FiniTune --------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Observer:
    """Tells the probe of committed steps, saves and findings."""

    probe: Probe

    def on_step(self, event: Any) -> None:
        if event.action is Action.PROCEED:
            reading, rows = event.reading, [row.row - 1 for row in event.rows]
            self.probe.step(reading.step, reading.loss, rows, reading.loss_scale)

    def on_save(self, _path: str, step: int) -> None:
        self.probe.note(event="saved", of=step)

    def on_finding(self, finding: Any) -> None:
        self.probe.note(event="finding", code=finding.code, severity=finding.severity.value)


def recipe(job: Job, folder: Path) -> Any:
    """The job as a recipe; everything not named by the job is FiniTune's default."""
    lora = ["lora=null"] if job.lora_dropout is None else ["lora.r=16", f"lora.lora_dropout={job.lora_dropout}"]
    return load_recipe(
        "tiny-internlm2",
        [
            f"model.name_or_path={job.base / job.model}",
            f"data.train={job.base / f'rows-{job.rows}.jsonl'}",
            "data.max_length=128",
            "data.limit_rows=null",
            "data.eval_fraction=0",
            "sample.prompts=[]",
            *lora,
            f"num_train_epochs={job.epochs}",
            f"max_steps={job.max_steps}",
            "per_device_train_batch_size=2",
            f"gradient_accumulation_steps={job.accumulation}",
            "learning_rate=1e-3",
            "warmup_ratio=0",
            f"save_steps={job.save_steps}",
            *([] if job.keep is None else [f"save_total_limit={job.keep}"]),
            f"group_by_length={str(job.grouped).lower()}",
            f"precision={'fp16-emulated' if job.fp16 else 'fp32'}",
            "device=cpu",
            f"seed={SEED}",
            f"output_dir={folder}",
        ],
    )


def ours(job: Job, folder: Path, probe: Probe, resume: bool | str | None = None) -> None:
    """Train with FiniTune, or go on as ``finitune train --resume FOLDER`` does."""
    target = None if not resume else str(folder) if resume is True else resume
    given = recipe(job, folder) if target is None else None
    result = train_run(given, resume=target, observers=[_Observer(probe)])
    probe.note(event="end", status=result.status, exit=result.exit_code, halted=result.halted)


SIDES: dict[str, Callable[[Job, Path, Probe, bool | str | None], None]] = {"HF Trainer": hf, "FiniTune": ours}
