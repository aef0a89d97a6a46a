"""What the measurements share: the same batches for the HF Trainer and for FiniTune, and tables."""

from __future__ import annotations

import json
import math
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finitune.core.journal import encode
from finitune.data.collate import Batch

RESULTS = Path(__file__).with_name("results")


def hf_columns(batch: Batch) -> dict[str, torch.Tensor]:
    """A Batch as the keyword arguments of a transformers model."""
    columns = {"input_ids": batch.ids_BT, "labels": batch.labels_BT}
    if batch.attention_mask is not None:
        columns["attention_mask"] = batch.attention_mask.long()
    else:
        columns["attention_mask"] = torch.ones_like(batch.ids_BT)
    return columns


def hf_trainer(
    model: nn.Module, batches: Sequence[Batch], folder: Path, callbacks: Sequence[Any] = (), **arguments: Any
) -> Any:
    """A plain ``transformers.Trainer`` that sees ``batches`` in this order, one a micro-step."""
    from torch.utils.data import SequentialSampler
    from transformers import PrinterCallback, Trainer, TrainingArguments
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    columns = [hf_columns(b) for b in batches]

    class InOrder(Trainer):
        """The only change: rows come in the order given, so that both sides train on the same batches."""

        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(dataset if dataset is not None else self.train_dataset)

    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=42,
        **arguments,
    )
    trainer = InOrder(
        model=model,
        args=args,
        train_dataset=columns,
        data_collator=lambda items: items[0],
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def bad_tensors(model: nn.Module) -> tuple[int, int]:
    """(tensors with a non-finite element, all tensors)."""
    tensors = list(model.parameters())
    return sum(not bool(torch.isfinite(t).all()) for t in tensors), len(tensors)


def median_ratio(pairs: Iterable[tuple[float, float]]) -> tuple[float, float, float]:
    """Least, median and greatest of a/b over interleaved pairs."""
    ratios = sorted(a / b for a, b in pairs)
    return ratios[0], statistics.median(ratios), ratios[-1]


def timed(work: Callable[[], Any]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def report(name: str, rows: Sequence[dict[str, Any]], notes: Sequence[str] = ()) -> None:
    """Print a table and keep it, with what it was measured on, under ``results/``."""
    print(f"\n## {name}\n")
    keys = list(dict.fromkeys(k for row in rows for k in row))
    print("| " + " | ".join(keys) + " |")
    print("|" + "---|" * len(keys))
    for row in rows:
        print("| " + " | ".join(_cell(row.get(k, "")) for k in keys) + " |")
    for note in notes:
        print(f"\n{note}")
    sys.stdout.flush()
    RESULTS.mkdir(exist_ok=True)
    record = {"name": name, "date": time.strftime("%Y-%m-%d"), "machine": machine(), "rows": rows, "notes": notes}
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(encode(record), indent=1) + "\n", encoding="utf-8")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else str(value)
    return str(value)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    from importlib.metadata import version

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "peft": version("peft"),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "processor": platform.machine(),
    }


def quiet() -> None:
    """Keep the tables readable: peers warn a lot."""
    warnings.filterwarnings("ignore")
