"""A run of FiniTune's own trainer in parts, healthy until a fault is planted in it.

What a Workload is to a loop, a RecipeLoad is to a recipe: rows in a file, a base model in a folder, a run folder with
checkpoints, and a place where the run is stopped and taken up again. A fault changes the files or the settings before
the run is opened, lets something happen between two steps, or edits the run folder between stop and resume.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from finitune.train.evaluate import evaluate
from finitune.train.finished import Finished
from finitune.train.recipe_io import load_recipe
from finitune.train.run import open_run
from finitune.train.session import Session

RECIPE = "tiny-internlm2"
"""The shipped recipe that all settings are overrides of."""
_PRECISIONS = {"fp32": "fp32", "bf16": "bf16-emulated", "fp16": "fp16-emulated"}
"""What a recipe calls the bench's precisions on a CPU: the roundings and ranges of an accelerator's."""
ROWS, HELD_OUT, BASE = "rows.jsonl", "held_out.jsonl", "base"


@dataclass
class RecipeLoad:
    """Everything that a user hands over to ``finitune run``, and what happens to it on the way."""

    run: str
    """Registered name of the run."""
    precision: str
    seed: int
    steps: int
    rows: list[bytes]
    """Lines of the file of training rows."""
    held_out: list[bytes]
    """Lines that are never trained on."""
    overrides: dict[str, str]
    """Settings of the recipe by path, as on the command line."""
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="faultbench-")))
    """Of its own; removed with the load. Holds the base model and all that the run writes."""
    after: dict[int, list[Callable[[], None]]] = field(default_factory=dict)
    stop_after: int | None = None
    """The step (from 1) after which the run is stopped as by Ctrl-C, to be taken up again."""
    on_disk: list[Callable[[Path], None]] = field(default_factory=list)
    """Acts on the run folder between the stop and the resume."""
    spoilt: frozenset[str] = frozenset()
    step: int = 0
    """The step at hand, from 1. Kept by whoever drives the run."""
    key: str = ""
    """Of the case that it was built for."""
    prepared: Any = None
    """The run as it was opened last."""

    def __post_init__(self) -> None:
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    # -- what a fault may do -----------------------------------------------------------------------------------

    @property
    def base(self) -> Path:
        """The folder of the model that the run starts from, as transformers writes it."""
        return self.folder / BASE

    def between(self, step: int, act: Callable[[], None]) -> None:
        """``act`` once, right after a step (from 1)."""
        self.after.setdefault(step, []).append(act)

    def insert(self, random: Random, lines: Sequence[bytes]) -> list[str]:
        """Put lines among the rows, which keep their order; the names of the new rows."""
        places = sorted(random.sample(range(len(self.rows) + len(lines)), len(lines)))
        for place, line in zip(places, lines, strict=True):
            self.rows.insert(place, line)
        return [f"{ROWS}:{place + 1}" for place in places]

    def stopped(self, step: int, act: Callable[[Path], None]) -> None:
        """Stop the run after a step (from 1), let ``act`` edit the run folder, and go on."""
        self.stop_after = step
        self.on_disk.append(act)

    def parameter(self, name: str) -> Tensor:
        """A parameter of the run at hand by its dotted name."""
        found: Tensor = dict(self.prepared.port.parts.parameters)[name]
        return found

    # -- what whoever drives it needs --------------------------------------------------------------------------

    @property
    def run_dir(self) -> Path:
        """Where the run writes."""
        return self.folder / "run"

    def open(self, observers: Sequence[Any] = (), *, resume: bool = False, guarded: bool = True) -> Session | Finished:
        """The run, ready to start, or to go on from its newest checkpoint. Raises what the trainer raises."""
        if resume:
            opened = open_run(None, resume=str(self.run_dir), observers=observers)
        else:
            (self.folder / ROWS).write_bytes(b"\n".join(self.rows) + b"\n")
            (self.folder / HELD_OUT).write_bytes(b"\n".join(self.held_out) + b"\n")
            given = {**self._fixed(), **self.overrides, "guard.enabled": str(guarded).lower()}
            recipe = load_recipe(RECIPE, [f"{path}={value}" for path, value in given.items()])
            opened = open_run(recipe, observers=observers)
        if isinstance(opened, Session):
            self.prepared = opened.prepared
        return opened

    def _fixed(self) -> dict[str, str]:
        return {
            "model.name_or_path": str(self.base),
            "data.train": str(self.folder / ROWS),
            "data.eval": str(self.folder / HELD_OUT),
            "output_dir": str(self.run_dir),
            "precision": _PRECISIONS[self.precision],
            "device": "cpu",
            "seed": str(self.seed),
            "max_steps": str(self.steps),
            "sample.prompts": "[]",
        }

    def run_plain(self) -> float:
        """Train to the end, unguarded and without a stop; seconds of its steps. Raises what the trainer raises."""
        acts = _Acts(self)
        self.open((acts,), guarded=False).run()
        return acts.time_s

    def acted(self, step: int) -> None:
        """Let the fault act after a step, once."""
        for act in self.after.pop(step, ()):
            act()

    def state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Trained weights and moments, and the buffers, by name; nothing before the run is opened."""
        if self.prepared is not None:
            yield from self.prepared.port.state_tensors()
            yield from self.prepared.port.model.named_buffers()

    def held_out_loss(self) -> float:
        """Mean loss of the held-out rows in fp32, with the weights as they are. Raises RuntimeError without a run."""
        if self.prepared is None:
            raise RuntimeError("the run was refused before it began")
        parts = replace(self.prepared.port.parts, context=nullcontext)
        return evaluate(parts, self.prepared.eval_batches, 0).loss


@dataclass
class _Acts:
    """Lets the fault act between the steps of a run that nobody watches."""

    load: RecipeLoad
    time_s: float = 0.0

    def on_step(self, event: Any) -> None:
        """After every transaction."""
        self.time_s += event.time_s
        self.load.step = event.reading.step
        self.load.acted(event.reading.step)


def bad_in_files(folder: Path) -> list[str]:
    """Names of the tensors in a folder's safetensors files that hold NaN or inf."""
    from safetensors.torch import load_file

    held = {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(str(path)).items()}
    return [n for n, t in held.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
