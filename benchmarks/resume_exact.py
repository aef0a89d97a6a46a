"""Is a run that was killed between two checkpoints the same run after the resume? Used by resume_peers.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from resume_faults import SETTLE_S, Reference, done_again, is_exact, plain, reference, same_weights
from resume_runs import Bench, Story
from resume_sides import Job


def cases(base: Path) -> list[tuple[str, Job, int]]:
    """(name, job, killed after this step)."""
    plain_job = Job(base)
    return [
        ("fp32, middle of the 2nd epoch", plain_job, 22),
        ("fp32, between two epochs", plain_job, 17),
        ("attention dropout 0.1", replace(plain_job, model="dropout"), 22),
        ("LoRA, dropout 0.1", replace(plain_job, lora_dropout=0.1), 22),
        ("2 micro-batches a step", replace(plain_job, accumulation=2), 12),
        ("grouped by length, 1st epoch", replace(plain_job, grouped=True), 12),
        ("grouped by length, 2nd epoch", replace(plain_job, grouped=True), 22),
        ("fp16 asked for", replace(plain_job, fp16=True), 22),
    ]


def exact(base: Path, scratch: Path, sides: Sequence[str]) -> list[dict[str, Any]]:
    """Killed with SIGKILL between two checkpoints, then resumed from the newest."""
    rows = []
    for side in sides:
        for index, (name, job, kill_at) in enumerate(cases(base)):
            bench = Bench(side, scratch / side / str(index))
            truth = reference(bench, job, bench.folder / "truth")
            run_dir = bench.folder / "killed"
            killed = bench.run(job, run_dir, kill_at=kill_at, kill_wait_s=SETTLE_S)
            resumed = bench.run(job, run_dir, resume=True)
            row = {"trainer": side, "case": name, "killed after step": kill_at, "resumed at": resumed.began}
            if resumed.error is not None:
                rows.append(row | {"losses equal": f"fails: {plain(resumed.error, run_dir)}"})
            else:
                rows.append(row | compared(truth, killed, resumed, run_dir) | {"loss scaler": scaler(side, resumed)})
    return rows


def compared(truth: Reference, killed: Story, resumed: Story, run_dir: Path) -> dict[str, Any]:
    """The steps after the resume, the final weights and the rows of the whole line, against the undisturbed run."""
    pairs = [(s["step"], s["loss"], truth.losses.get(s["step"])) for s in resumed.steps]
    differing = [step for step, loss, true in pairs if loss != true]
    again, never = visits(killed, resumed, Counter(r for s in truth.told.steps for r in s["rows"]))
    return {
        "losses equal": f"{len(pairs) - len(differing)} of {truth.told.last - (resumed.began or 0)}",
        "first differing step": differing[0] if differing else "-",
        "largest difference": max((abs(float.fromhex(a) - float.fromhex(b)) for _, a, b in pairs if b), default=0.0),
        "final weights equal": same_weights(run_dir, truth.run_dir),
        "rows once too often": again,
        "rows left out": never,
    }


def visits(killed: Story, resumed: Story, expected: Counter[int]) -> tuple[int, int]:
    """(visits of rows beyond those of the undisturbed run, visits that are missing), on the line that counts."""
    start = resumed.began or 0
    line = [s for s in killed.steps if s["step"] <= start] + resumed.steps
    seen = Counter(row for s in line for row in s["rows"])
    return sum((seen - expected).values()), sum((expected - seen).values())


def scaler(side: str, told: Story) -> str:
    """Whether the run scaled its loss, from what it said itself."""
    if side == "HF Trainer":
        state = told.of("scaler")[-1]
        return f"{'yes' if state['scaler'] else 'no'} (autocast: {'yes' if state['amp'] else 'no'})"
    return "yes" if any(s["scale"] is not None for s in told.steps) else "no"


def between(base: Path, scratch: Path, sides: Sequence[str]) -> list[dict[str, Any]]:
    """SIGKILL right after a step, without any wait, and SIGTERM."""
    job = Job(base, model="dropout")
    rows = []
    for side in sides:
        bench = Bench(side, scratch / side)
        truth = reference(bench, job, bench.folder / "truth")
        for number, (name, jit, hurt) in enumerate(_hurts(side)):
            run_dir = bench.folder / f"run-{number}"
            killed = bench.run(replace(job, jit=jit), run_dir, **hurt)
            resumed = bench.run(job, run_dir, resume=True)
            failed = resumed.error is not None
            rows.append(
                {
                    "trainer": side,
                    "what": name,
                    "process ends": killed.ended,
                    "last step": killed.last,
                    "resumed at": plain(resumed.error or "", run_dir) if failed else resumed.began,
                    "steps done again": done_again(killed, resumed),
                    "exact": "-" if failed else is_exact(resumed, truth, run_dir),
                }
            )
    return rows


def _hurts(side: str) -> list[tuple[str, bool, dict[str, Any]]]:
    """(name, with HF's enable_jit_checkpoint, what the probe does)."""
    hurts: list[tuple[str, bool, dict[str, Any]]] = [
        (f"SIGKILL after step {step}", False, {"kill_at": step}) for step in (3, 8, 13, 19, 24, 28)
    ]
    hurts.append(("SIGTERM after step 13", False, {"term_at": 13, "kill_wait_s": 0.1}))
    if side == "HF Trainer":
        # It acts 3 s after the signal; the step is made to last longer, as a large model's may.
        name = "SIGTERM after step 13, enable_jit_checkpoint=True"
        hurts.append((name, True, {"term_at": 13, "kill_wait_s": 3.5}))
    return hurts
