"""Processes of resume_peers.py: what all runs share, one forked process a run, and what it wrote down."""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import logging
import os
import pkgutil
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import finitune
from finitune.core.errors import UserError, UserErrors
from resume_sides import SIDES, Job, Probe, recipe

HUNG = "hung"
WORDS = "the loss falls and stays finite while every step is judged before it changes a weight"
SIZES = (30, 2400)
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "dropout": {},
    "small": {"hidden": 32, "layers": 1, "heads": 2, "kv_heads": 1, "mlp": 64},
    "wide": {"hidden": 256, "mlp": 704},
}
"""The tiny Llama in several sizes; "dropout" has attention dropout 0.1."""


# --- The common ground -----------------------------------------------------------------------------------------


def make_base(base: Path) -> None:
    """Rows, their tokens as FiniTune makes them, and the models, for both sides. Runs in a process of its own."""
    from finitune.models.tiny import tiny_llama, tiny_tokenizer
    from finitune.train.prepare import prepare

    for name, sizes in MODELS.items():
        model: Any = tiny_llama(42, **sizes)
        model.config.attention_dropout = 0.1 if name == "dropout" else 0.0
        model.save_pretrained(base / name)
        tiny_tokenizer().save_pretrained(base / name)
    words = WORDS.split()
    for size in SIZES:
        with (base / f"rows-{size}.jsonl").open("w") as handle:
            for i in range(size):
                question = f"{i} " + " ".join(words[(i + k) % len(words)] for k in range(2 + i % 5))
                answer = " ".join(words[(3 * i + k) % len(words)] for k in range(3 + i % 7))
                messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                handle.write(json.dumps({"messages": messages}) + "\n")
        rows = prepare(recipe(Job(base, rows=size), base / "unused")).port.parts.loader.dataset.rows
        ordered = sorted(rows, key=lambda row: row.id.row)
        tokens = [
            {
                "input_ids": row.ids.tolist(),
                "labels": [int(i) if s else -100 for i, s in zip(row.ids, row.supervised, strict=True)],
            }
            for row in ordered
        ]
        (base / f"tokens-{size}.json").write_text(json.dumps(tokens))


def import_everything() -> None:
    """What a run imports and builds once on its way, so that forked runs start at once."""
    import accelerate  # noqa: F401
    import peft  # noqa: F401
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments  # noqa: F401

    for module in pkgutil.walk_packages(finitune.__path__, "finitune."):
        with contextlib.suppress(ImportError):  # a tracker whose package is not installed
            importlib.import_module(module.name)
    with contextlib.suppress(ImportError):
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        get_checkpoint_conversion_mapping("llama")
    # Forked runs would otherwise look through all of it at each collection.
    gc.collect()
    gc.freeze()


# --- Processes -------------------------------------------------------------------------------------------------


def apart(record: Path, work: Callable[[], None]) -> int:
    """Start ``work`` in a forked process; its id. What it prints is in ``record``'s neighbour ``.log``."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        log = os.open(record.with_suffix(".log"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        _loud()
        work()
        code = 0
    except (UserError, UserErrors) as error:
        Probe(record).note(event="error", type=_code(error), text=str(error))
    except BaseException as error:  # noqa: BLE001  whatever ends a run is what is measured
        traceback.print_exc()
        Probe(record).note(event="error", type=type(error).__name__, text=str(error))
    finally:
        os._exit(code)


def _code(error: UserError | UserErrors) -> str:
    first = error.errors[0] if isinstance(error, UserErrors) else error
    return str(first.code.code)


def _loud() -> None:
    """Warnings as a user sees them, and no progress bars."""
    from transformers.utils import logging as untyped

    hf_logging: Any = untyped
    torch.set_num_threads(1)
    hf_logging.set_verbosity_warning()
    hf_logging.disable_progress_bar()
    logging.basicConfig(level=logging.WARNING)
    warnings.simplefilter("default")


def wait(pid: int, timeout_s: float = 120.0) -> str:
    """How the process ended: "exit N", "signal N" or "hung" (it is killed then)."""
    until_s = time.perf_counter() + timeout_s
    while not (done := os.waitpid(pid, os.WNOHANG))[0]:
        if time.perf_counter() > until_s:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return HUNG
        time.sleep(0.002)
    status = done[1]
    return f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"


@dataclass(slots=True)
class Story:
    """What a run wrote down."""

    ended: str
    record: Path
    steps: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)

    def of(self, event: str) -> list[dict[str, Any]]:
        """The events of a name."""
        return [e for e in self.events if e["event"] == event]

    @property
    def last(self) -> int:
        """The last step that was done; 0 where none was."""
        return int(self.steps[-1]["step"]) if self.steps else 0

    @property
    def began(self) -> int | None:
        """The step it started from; None where it did no step."""
        return int(self.steps[0]["step"]) - 1 if self.steps else None

    @property
    def finished(self) -> bool:
        """Whether it got to its end."""
        return any(e["status"] == "finished" for e in self.of("end"))

    @property
    def error(self) -> str | None:
        """The first error, as ``Type: text`` without folder names; None where there is none."""
        found = self.of("error")
        if not found:
            halts = [e["halted"] for e in self.of("end") if e.get("halted")]
            return halts[0] if halts else (self.ended if self.ended == HUNG else None)
        return f"{found[0]['type']}: {found[0]['text']}"

    @property
    def warned(self) -> Counter[str]:
        """Warnings: lines of the log, and codes of findings."""
        log = self.record.with_suffix(".log")
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        found = Counter(line.strip() for line in lines if line.strip())
        found.update(e["code"] for e in self.of("finding"))
        return found


def story(record: Path, ended: str) -> Story:
    """Read what the probe wrote."""
    told = Story(ended, record)
    if record.exists():
        for line in record.read_text().splitlines():
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                (told.events if "event" in entry else told.steps).append(entry)
    return told


@dataclass(slots=True)
class Bench:
    """Runs jobs of one side in numbered records under ``folder``."""

    side: str
    folder: Path
    count: int = 0

    def new(self) -> Path:
        """A fresh record."""
        self.count += 1
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"record-{self.count}.jsonl"

    def run(self, job: Job, run_dir: Path, resume: bool | str | None = None, **hurt: Any) -> Story:
        """One run to its end, however that comes."""
        record = self.new()
        pid = self.start(record, job, run_dir, resume, **hurt)
        return story(record, wait(pid))

    def start(self, record: Path, job: Job, run_dir: Path, resume: bool | str | None = None, **hurt: Any) -> int:
        """The same, not waited for."""
        before = hurt.pop("before", lambda _probe: None)

        def work() -> None:
            probe = Probe(record, **hurt)
            before(probe)
            SIDES[self.side](job, run_dir, probe, resume)

        return apart(record, work)
