"""What `finitune.guard` costs on a healthy step: a plain PyTorch loop and a guarded one take turns in one process.

    python benchmarks/guard_overhead.py [--model 20m|smollm2] [--tokens 2x128|4x256] [--threads N] [--steps N]

Same weights, batches and generators; every weight is compared bit for bit at the end. Ratios are taken pair by pair,
in changing order, of the steps without a snapshot; quoted is their median with the quartiles, in wall and in CPU
time. Where other programs are at work these scatter by more than what is measured, so the guard's own time is clocked
as well: what is left of a guarded step without forward, backward, update, and the clipping as the plain loop of the
same pair took it. Snapshots are counted apart, by the time they took: their distance adapts to their cost. Rows of
other cases that were measured before stay in the results.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

import finitune
from common import RESULTS, quiet, report
from finitune.numerics.statecheck import bad_tensors

WARM = 3
NAME = "guard_overhead"
PAIRS = {("20m", "2x128"): 240, ("20m", "4x256"): 60, ("smollm2", "2x128"): 40, ("smollm2", "4x256"): 14}


def model_of(name: str) -> Any:
    """A model in training mode; the same weights at every call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if name == "smollm2":
        from finitune.models.load import load

        return load("SmolLM2-135M-Instruct").model.train()
    config = LlamaConfig(
        vocab_size=8192, hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6
    )
    return LlamaForCausalLM(config).train()


class Clock:
    """Seconds that a loop's own work takes inside a step: forward, backward, update."""

    def __init__(self) -> None:
        self.work_s = self.clip_s = self._since_s = 0.0

    def enter(self, *_: Any) -> None:
        """Work begins."""
        self._since_s = time.perf_counter()

    def leave(self, *_: Any) -> None:
        """Work ends."""
        self.work_s += time.perf_counter() - self._since_s

    def loss_fn(self, model: Any, batch: dict[str, torch.Tensor]) -> Any:
        """The model's own loss."""
        self.enter()
        loss = model(**batch).loss
        self.leave()
        return loss

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count from zero; backward passes are counted as well."""
        real = torch.Tensor.backward
        self.work_s = 0.0

        def backward(tensor: torch.Tensor, *args: Any, **options: Any) -> None:
            self.enter()
            real(tensor, *args, **options)
            self.leave()

        torch.Tensor.backward = backward
        try:
            yield
        finally:
            torch.Tensor.backward = real


def batches_of(vocabulary: int, shape: str, steps: int) -> list[dict[str, torch.Tensor]]:
    """Random tokens; ``shape``: rows x tokens."""
    generator = torch.Generator().manual_seed(1)
    rows, tokens = map(int, shape.split("x"))
    found = []
    for _ in range(steps):
        ids_BT = torch.randint(0, vocabulary, (rows, tokens), generator=generator)
        found.append({"input_ids": ids_BT, "labels": ids_BT.clone()})
    return found


class Pair:
    """A plain loop and a guarded one over the same model."""

    def __init__(self, name: str) -> None:
        self.clock = Clock()
        self.plain, self.watched = model_of(name), model_of(name)
        self.optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-4, fused=True) for m in (self.plain, self.watched)]
        for optimizer in self.optimizers:
            optimizer.register_step_pre_hook(self.clock.enter)
            optimizer.register_step_post_hook(self.clock.leave)
        self.guard = finitune.guard(self.watched, self.optimizers[1], self.clock.loss_fn, max_grad_norm=1.0)

    def step(self, kind: str, batch: dict[str, torch.Tensor]) -> Times:
        """One step of one of the two."""
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        with self.clock.running():
            if kind == "plain":
                self._plain_step(batch)
            else:
                self.guard.step(batch)
        return Times(time.perf_counter() - wall_s, time.process_time() - cpu_s, self.clock.work_s)

    def _plain_step(self, batch: dict[str, torch.Tensor]) -> None:
        self.clock.loss_fn(self.plain, batch).backward()
        since_s = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(self.plain.parameters(), 1.0)
        self.clock.clip_s = time.perf_counter() - since_s
        self.optimizers[0].step()
        self.optimizers[0].zero_grad(set_to_none=True)

    def equal(self) -> bool:
        """All weights, bit for bit."""
        both = zip(self.plain.parameters(), self.watched.parameters(), strict=True)
        return all(torch.equal(a, b) for a, b in both)

    def check_s(self) -> float:
        """Seconds of one check of the weights."""
        since_s = time.perf_counter()
        bad_tensors(self.guard.port.parameters())
        return time.perf_counter() - since_s


@dataclass(frozen=True)
class Times:
    """Of one step, in seconds."""

    wall_s: float
    cpu_s: float
    work_s: float
    """Forward, backward and update."""


@dataclass
class Taken:
    """What was measured, pair by pair; shares are of the plain step."""

    plain_s: list[float] = field(default_factory=list)
    walls: list[float] = field(default_factory=list)
    cpus: list[float] = field(default_factory=list)
    owns: list[float] = field(default_factory=list)
    checks: list[float] = field(default_factory=list)
    snapshots_s: list[float] = field(default_factory=list)

    def add(self, plain: Times, guarded: Times, clip_s: float, check_s: float, snapshot_s: float) -> None:
        """One pair; a step with a snapshot counts for the snapshots only."""
        self.plain_s.append(plain.wall_s)
        if snapshot_s > 0:
            self.snapshots_s.append(snapshot_s)
            return
        ordinary_s = guarded.work_s + clip_s
        self.walls.append(guarded.wall_s / plain.wall_s - 1)
        self.cpus.append(guarded.cpu_s / plain.cpu_s - 1)
        self.owns.append((guarded.wall_s - ordinary_s) / ordinary_s)
        self.checks.append(check_s / ordinary_s)


def quartiles(shares: list[float]) -> str:
    """Median and quartiles in per cent."""
    low, middle, high = statistics.quantiles(shares, n=4)
    return f"{100 * middle:.2f} % ({100 * low:.2f} .. {100 * high:.2f})"


def measure(name: str, shape: str, steps: int) -> dict[str, Any]:
    """What a guarded step costs beyond a plain one."""
    pair, taken = Pair(name), Taken()
    for step, batch in enumerate(batches_of(pair.plain.config.vocab_size, shape, steps + WARM)):
        before_s = pair.guard.ring.cost_s
        order = ("plain", "guarded") if step % 2 else ("guarded", "plain")
        times = {kind: pair.step(kind, batch) for kind in order}
        snapshot_s = pair.guard.ring.cost_s - before_s
        if step >= WARM:
            taken.add(times["plain"], times["guarded"], pair.clock.clip_s, pair.check_s(), snapshot_s)
    pair.guard.close()
    return {
        "case": name,
        "tokens": shape,
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in pair.plain.parameters()),
        "plain step (s)": statistics.median(taken.plain_s),
        "guarded - plain, wall": quartiles(taken.walls),
        "guarded - plain, CPU": quartiles(taken.cpus),
        "own time": quartiles(taken.owns),
        "of it weight check": quartiles(taken.checks),
        "snapshots": f"{100 * sum(taken.snapshots_s) / sum(taken.plain_s):.2f} %",
        "snapshots (s)": [round(s, 3) for s in taken.snapshots_s],
        "bit-equal": pair.equal(),
        "steps": steps,
    }


def kept(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The new rows, and those of other cases that were measured before."""
    path = RESULTS / f"{NAME}.json"
    old = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    key = ("case", "tokens", "threads")
    new = {tuple(r.get(k) for k in key) for r in rows}
    both = [*rows, *(r for r in old if "tokens" in r and tuple(r.get(k) for k in key) not in new)]
    return sorted(both, key=lambda r: [str(r[k]) for k in key])


def main() -> None:
    """Measure, print, keep."""
    asked = argparse.ArgumentParser()
    asked.add_argument("--steps", type=int)
    asked.add_argument("--model", choices=("20m", "smollm2"))
    asked.add_argument("--tokens", choices=("2x128", "4x256"))
    asked.add_argument("--threads", type=int)
    given = asked.parse_args()
    quiet()
    if given.threads:
        torch.set_num_threads(given.threads)
    cases = [(m, t) for m, t in PAIRS if given.model in (None, m) and given.tokens in (None, t)]
    rows = [measure(m, t, given.steps or PAIRS[m, t]) for m, t in cases]
    notes = [
        "Rows x tokens a step, fused AdamW, clipping at 1.0 (and clipped: random tokens).",
        "Shares of the plain step: median (quartiles) over interleaved pairs; steps with a snapshot are counted apart.",
    ]
    report(NAME, kept(rows), notes)


if __name__ == "__main__":
    main()
