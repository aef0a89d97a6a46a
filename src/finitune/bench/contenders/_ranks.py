"""Runs on several ranks: each is a process of its own that builds the case anew and trains its part of it.

What the ranks told is put together for the witness of the case: everything that one of them said, the losses and
incidents of rank 0, the weights they ended with (where the ranks parted: the worse ones). Ranks that wait for each
other until they are ended are an error of the contender.

    python -m finitune.bench.contenders._ranks KEY RANK FOLDER
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

from finitune.bench.cases import Case
from finitune.bench.runs.gloo_sft import NUM_RANKS
from finitune.bench.witness import Said, Witness
from finitune.bench.workload import Workload
from finitune.core.registry import load as member

NEED = "ranks"
_WAIT_S = 60
"""For another rank, within the group; a case that takes longer than twice that hangs."""
Drive = Callable[[Workload, Witness, nn.Module], None]
"""``drive(load, witness, model)``: one rank's part; ``model`` is the one that the loop calls."""


def is_wanted(load: Any) -> bool:
    """Whether a workload is one of several ranks, and this process none of them."""
    return NEED in getattr(member("runs", load.run.partition("@")[0]), "NEEDS", ()) and not dist.is_initialized()


def drive(load: Workload, witness: Witness) -> None:
    """Train on all ranks; ``load`` ends with their weights."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        ranks = [_started(load.key, rank, place) for rank in range(NUM_RANKS)]
        codes = _ended(ranks)
        load.step = len(load.batches)
        told = [_read(place / f"{rank}.json") for rank in range(NUM_RANKS)]
        if None in told:
            witness.error_step = load.step
            witness.error = f"RuntimeError: ranks ended with {codes}: " + _tail(place)
            return
        _take(witness, [t for t in told if t is not None])
        weights = [load_file(place / f"{rank}.safetensors") for rank in range(NUM_RANKS)]
        _end_with_the_worst(load, weights)


def _started(key: str, rank: int, folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", __name__, key, str(rank), str(folder)]
    with (folder / f"{rank}.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)  # noqa: S603 (this very module)


def _ended(ranks: list[subprocess.Popen[bytes]]) -> list[int | None]:
    """Exit codes; whoever hangs is ended."""
    try:
        for process in ranks:
            process.wait(2 * _WAIT_S)
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
                process.wait()
    return [process.returncode for process in ranks]


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _tail(folder: Path) -> str:
    logs = [path.read_text(encoding="utf-8", errors="replace").strip() for path in sorted(folder.glob("*.log"))]
    return " | ".join(log.splitlines()[-1][:200] for log in logs if log)


def _end_with_the_worst(load: Workload, weights: list[dict[str, torch.Tensor]]) -> None:
    """Ranks that parted are no success of the better one; nobody was told of it either."""
    losses = []
    for one in weights:
        load.model.load_state_dict(one, strict=False)
        losses.append(load.held_out_loss())
    worst = max(range(len(losses)), key=lambda r: (not math.isfinite(losses[r]), losses[r]))
    load.model.load_state_dict(weights[worst], strict=False)


def _take(witness: Witness, told: list[dict[str, Any]]) -> None:
    """What was said on any rank was said; poisoned is what is so on one of them."""
    said: dict[Said, None] = {}
    for one in told:
        for step, code, where, text in one["said"]:
            said[Said(step, code, tuple((kind, name) for kind, name in where), text)] = None
    witness.said = sorted(said, key=lambda s: s.step)
    witness.losses = {int(step): loss for step, loss in told[0]["losses"].items()}
    witness.refused, witness.incidents = told[0]["refused"], told[0]["incidents"]
    witness.poisoned = sorted({step for one in told for step in one["poisoned"]})
    witness.poisoned_weights = sorted({step for one in told for step in one["poisoned_weights"]})
    witness.num_checkpoints = told[0]["num_checkpoints"]
    witness.poisoned_checkpoints = sorted({step for one in told for step in one["poisoned_checkpoints"]})
    failed = next((one for one in told if one["error"]), told[0])
    witness.error, witness.error_step = failed["error"], failed["error_step"]
    witness.time_s = max(one["time_s"] for one in told)


# -- one rank --------------------------------------------------------------------------------------------------------


def _one(key: str, rank: int, folder: Path) -> None:
    from finitune.bench.harness import fresh, planted, quiet

    kind, name, seed, contender, *quick = key.split("/")
    case = Case(kind, name, int(seed), contender, bool(quick))
    torch.set_num_threads(1)
    place, wait = f"file://{folder / 'meeting'}", timedelta(seconds=_WAIT_S)
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=NUM_RANKS, timeout=wait)
    if kind == "faults":
        load = planted(case)[0]
    else:
        load = fresh(case)
        member(kind, name).plant(load, case.random())
    of_rank(load, rank)
    witness = Witness(load)
    torch.manual_seed(case.seed)
    with quiet():
        drive_rank: Drive = member("contenders", contender).drive_rank
        drive_rank(load, witness, nn.parallel.DistributedDataParallel(load.model))
    save_file({n: t.contiguous() for n, t in load.model.state_dict().items()}, folder / f"{rank}.safetensors")
    (folder / f"{rank}.json").write_text(json.dumps(_told(witness)), encoding="utf-8")
    dist.destroy_process_group()


def of_rank(load: Workload, rank: int) -> None:
    """Leave a workload the micro-batch of one rank, with the names of its rows."""
    for step, micros in enumerate(load.batches):
        first = sum(len(m["input_ids"]) for m in micros[:rank])
        load.rows[step] = load.rows[step][first : first + len(micros[rank]["input_ids"])]
        load.batches[step] = micros[rank]


def _told(witness: Witness) -> dict[str, Any]:
    fields = ("losses", "refused", "num_checkpoints", "error", "error_step", "incidents", "time_s")
    poisoned = ("poisoned", "poisoned_weights", "poisoned_checkpoints")
    told = {name: getattr(witness, name) for name in (*fields, *poisoned)}
    return told | {"said": [[s.step, s.code, [list(w) for w in s.where], s.text] for s in witness.said]}


if __name__ == "__main__":
    _one(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
