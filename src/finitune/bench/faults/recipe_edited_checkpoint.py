"""U: the run is stopped, its newest checkpoint is changed by hand, and it goes on.

What happens in the field: an optimizer file left out of an upload, a scheduler that starts anew, a scale reset by a
script, files of two checkpoints mixed. The loss after the resume shows little of it: what was saved has to be compared
with what is loaded. Threads: NVIDIA-NeMo/Automodel#763, NVIDIA-NeMo/Automodel#2511, D-X-Y/NAS-Bench-201#19.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from random import Random
from typing import Any

from safetensors.torch import save_file

from finitune.bench.faults import _draw, _recipe
from finitune.bench.recipe_load import RecipeLoad
from finitune.bench.workload import Expected

FAULT_CLASS = "U"
CASES = (31,)
RUNS = (("recipe_sft", "fp32"), ("recipe_sft", "fp16"))
_MOMENTS, _STATE = "optimizer.safetensors", "state.json"
_DEPTHS = ("as it is", "made to agree", "without what it says of the state")
"""What becomes of the manifest: untouched, written anew, or written anew and without the state's fingerprint."""


def plant(load: RecipeLoad, random: Random) -> Expected:
    """What is dropped or altered, how far, and whether the manifest is made to agree is drawn."""
    step = random.randint(int(load.overrides["save_steps"]) + 1, load.steps - 4)
    kinds = ["no moments", "moments zero", "moments scaled", "moments of another step", "schedule anew"]
    kind = random.choice(kinds + ["scale altered", "scale dropped"] * (load.precision == "fp16"))
    depth, factor = random.choice(_DEPTHS), _draw.log_uniform(random, 2.0, 1e4) ** random.choice((-1, 1))
    load.stopped(step, lambda run_dir: _edit(run_dir, kind, depth, factor))
    detail = f" by {_draw.spelled(factor)}" if kind in ("moments scaled", "scale altered") else ""
    return Expected(
        says=f"stopped after step {step}: {kind}{detail}, the manifest {depth}",
        step=step + 1,
        codes=("SYS005", "SYS006", "SYS020", "SYS021", "OPT113", "OPT405"),
        never=("DAT", "NUM4", "MOD"),
        data={"step": step, "kind": kind, "depth": depth, "factor": factor},
    )


def _edit(run_dir: Path, kind: str, depth: str, factor: float) -> None:
    folder = _recipe.newest(run_dir)
    if kind == "moments of another step":
        others = sorted(p for p in run_dir.glob("checkpoint-*") if p != folder)
        shutil.copy(others[-1] / _MOMENTS, folder / _MOMENTS)
    elif kind.startswith(("no moments", "moments")):
        _rewrite_moments(folder / _MOMENTS, kind, factor)
    else:
        _recipe.edit_json(folder / _STATE, lambda state: _alter(state, kind, factor))
    if depth != _DEPTHS[0]:
        _recipe.seal(folder, *(("state",) if depth == _DEPTHS[2] else ()))


def _rewrite_moments(path: Path, kind: str, factor: float) -> None:
    moments = _recipe.read_tensors(path)
    if kind == "no moments":
        moments = {}
    scale = 0.0 if kind == "moments zero" else factor
    for name, tensor in moments.items():
        if not name.endswith("|step"):
            tensor.mul_(scale)
    save_file(moments, str(path))


def _alter(state: dict[str, Any], kind: str, factor: float) -> None:
    if kind == "schedule anew":
        state["updates"] = 0
    elif kind == "scale dropped":
        state["scaler"] = None
    else:
        state["scaler"]["scale"] *= factor
