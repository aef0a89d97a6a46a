"""What a forked child does: one run in ``home/run``, new or resumed, watched, killed or with a failing disk."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kill.faults import Fault, Refusals
from kill.limits import limit_file_size
from kill.points import Place, Points
from kill.watching import Watch, watch_steps

_PATIENCE_S = 20


def perform(request: Mapping[str, Any]) -> dict[str, Any]:
    """Do what a request asks; what came of it, JSON-able. Never raises."""
    _redirect(request["log"])
    try:
        return TASKS[request["task"]](request)
    except KeyboardInterrupt:
        return {"status": "interrupted at once"}
    except BaseException:  # noqa: BLE001  (whatever it was, it is the reply)
        return {"status": "traceback", "text": traceback.format_exc()}


def _redirect(log: str) -> None:
    """Everything printed goes into a file of its own; SIGUSR1 prints where every thread is."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    faulthandler.enable(file=2)
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)


class _Told:
    """An observer that remembers which findings were told, also those that came after the result was summed up."""

    def __init__(self) -> None:
        self.codes: dict[str, int] = {}

    def on_finding(self, finding: Any) -> None:
        self.codes[finding.code] = self.codes.get(finding.code, 0) + 1


def _train(request: Mapping[str, Any]) -> dict[str, Any]:
    """Start or resume a run; the places it passed are reported where ``watch`` asks for it."""
    from finitune.core.errors import UserError, UserErrors
    from finitune.train.run import train_run
    from kill.configurations import recipe_of

    home = Path(request["home"])
    recipe = None
    if not request.get("resume") or request.get("with_recipe"):
        recipe = recipe_of(request["configuration"], Path(request["data"]), home)
    points, told = _hooked(request, home / "run"), _Told()
    try:
        result = train_run(recipe, resume=str(home / "run") if request.get("resume") else None, observers=[told])
    except (UserError, UserErrors) as error:
        errors = error.errors if isinstance(error, UserErrors) else (error,)
        return {"status": "refused", "codes": [e.code.code for e in errors], "text": str(error), "hits": _hits(points)}
    _join_threads()
    findings = {**told.codes, **result.findings}
    done = {"status": result.status, "findings": findings, "halted": result.halted, "hits": _hits(points)}
    return done | ({"points": points.seen} if points is not None and request.get("watch") else {})


def _hits(points: Points | None) -> int:
    """How many operations were made to fail."""
    return points.refusals.hits if points is not None else 0


def _hooked(request: Mapping[str, Any], run_dir: Path) -> Points | None:
    """Hook the places in where the request needs them; a run without them is as a user's."""
    if request.get("file_limit"):
        limit_file_size(**request["file_limit"])
    death, faults = request.get("death"), [Fault.of(f) for f in request.get("faults", ())]
    if not (request.get("watch") or death or faults):
        return None
    points = Points(run_dir, Place.parse(death) if death else None, Refusals(faults))
    Watch(points).install()
    watch_steps(points)
    return points


def _join_threads() -> None:
    """As an interpreter does before it ends."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(_PATIENCE_S)


def _load(request: Mapping[str, Any]) -> dict[str, Any]:
    """Load checkpoint folders as transformers and PEFT users do, with the ordinary library calls."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from finitune.models.load import load
    from kill.configurations import MODEL

    base = load(MODEL, dtype=torch.float32, device="cpu", seed=42).model
    for folder in request["folders"]:
        if (Path(folder) / "adapter_config.json").exists():
            PeftModel.from_pretrained(base, folder).unload()
        else:
            AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
        AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return {"status": "loaded"}


def _modules(request: Mapping[str, Any]) -> dict[str, Any]:
    """Train once and tell what was imported on the way."""
    done = _train(request)
    resumed = _train({**request, "resume": True})
    return {"status": resumed["status"], "modules": sorted(sys.modules), "first": done, "second": resumed}


TASKS = {"train": _train, "load": _load, "modules": _modules}
