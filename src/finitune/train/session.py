"""One run from its first journal line to its summary."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finitune.core.errors import Halted
from finitune.core.files import write_atomic
from finitune.core.journal import Journal
from finitune.core.types import Finding
from finitune.engine.codes import EVAL_NOT_FINITE, FINAL_SAVE_FAILED, INTERRUPTED
from finitune.engine.judge import Judge
from finitune.engine.policy import Policy
from finitune.models.save import save_model
from finitune.train import checkpoint, folder
from finitune.train.evaluate import evaluate
from finitune.train.loop import Due, Loop, record_or_halt
from finitune.train.observer import EvalEvent, Observers, SampleEvent
from finitune.train.prepare import Prepared
from finitune.train.result import RunResult, peak_memory_bytes, versions
from finitune.train.sampling import Sampler
from finitune.train.signals import StopRequest, listening


@dataclass(frozen=True, slots=True)
class Start:
    """Where a session begins."""

    started_s: float
    """``time.perf_counter()`` when the run was asked for."""
    resumed: bool = False
    """The folder held this run before; without ``point`` it begins again at step 0."""
    point: Path | None = None
    """The checkpoint the run goes on from."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What a later resume compares itself with: recipe, data, versions, device. Goes into journal and checkpoints."""
    close: Callable[[], None] = field(default=lambda: None)
    """Called once when the run is over: gives the run's lock back."""


class Session:
    """One run from its first journal line to its summary."""

    def __init__(
        self, run_dir: Path, prepared: Prepared, journal: Journal, observers: Observers, start: Start
    ) -> None:
        self.run_dir, self.prepared, self.journal, self.observers = run_dir, prepared, journal, observers
        self.start, self.point, self.started_s = start, start.point, start.started_s
        self.counts: Counter[str] = Counter()
        self.evals: list[EvalEvent] = []
        self.samples: list[SampleEvent] = []
        self.train_time_s = 0.0
        self.last_saved: Path | None = start.point
        port = prepared.port
        self.sampler = Sampler(port.parts, prepared.tokenizer, prepared.recipe.sample, self._sampled)
        observers.tell("plan", prepared.plan)

    def run(self) -> RunResult:
        """Train; every way out ends in a summary."""
        port = self.prepared.port
        status, halted = "finished", None
        with listening(lambda: self.observers.tell("stop_requested")) as stop:
            try:
                self._journal_start()
                for finding in self.prepared.findings:
                    self._found(finding)
                if self.point is None:
                    self._look()
                status = "finished" if self._train(stop) else "interrupted"
                self._after(status)
            except Halted as halt:
                status, halted = "halted", str(halt)
                self._after_halt(halt)
        monitor = port.parts.monitor
        if monitor is not None:
            monitor.close()
        result = self._sum_up(status, halted)
        self.journal.close()
        self.start.close()
        return result

    def _train(self, stop: StopRequest) -> bool:
        recipe, port = self.prepared.recipe, self.prepared.port
        guard = recipe.guard
        loop = Loop(
            port=port,
            judge=Judge.of(guard.detectors) if guard.enabled else Judge.only("non_finite"),
            policy=Policy(guard.max_aborts_in_a_row),
            journal=self.journal,
            observers=self.observers,
            total_steps=self.prepared.plan.total_steps,
            dues=(
                Due(guard.state_check_steps, self._check_state),
                Due(recipe.eval_steps, self._evaluate),
                Due(recipe.sample.every_steps, self._sample),
                Due(recipe.save_steps, self._save),
            ),
            stop_requested=stop,
            counts=self.counts,
        )
        try:
            return loop.run()
        finally:
            self.train_time_s = loop.step_time_s
            for finding in self.observers.failures:
                self._found(finding)

    def _after(self, status: str) -> None:
        """Evaluate, sample and save what was reached."""
        step = self.prepared.port.state.step
        if status == "interrupted":
            self._save_here()
            total = self.prepared.plan.total_steps
            self._found(INTERRUPTED.find("", step=step, total=total, path=str(self.last_saved), run=str(self.run_dir)))
            return
        if not self.evals or self.evals[-1].step != step:
            self._evaluate(step)
        if not self.samples or self.samples[-1].step != step:
            self._sample(step)
        self._save_here()
        self._save_final()

    def _after_halt(self, halt: Halted) -> None:
        """Journal why, and keep the last good state where it is good and the disk takes it."""
        try:
            self._found(halt.code.find(halt.where, **halt.data))
            self._save_here()
        except Halted as second:  # the state is not finite, or the journal cannot be written: nothing more to keep
            self.counts[second.code.code] += 1

    def _look(self) -> None:
        self._evaluate(0)
        self._sample(0)

    def _check_state(self, _step: int) -> None:
        checkpoint.refuse_non_finite(self.prepared.port, str(self.run_dir))

    def _evaluate(self, step: int) -> None:
        if not self.prepared.eval_batches:
            return
        event = evaluate(self.prepared.port.parts, self.prepared.eval_batches, step)
        self.evals.append(event)
        record_or_halt(
            self.journal, "eval", step=step, loss=event.loss, supervised_tokens=event.supervised_tokens, rows=event.rows
        )
        self.observers.tell("eval", event)
        if not math.isfinite(event.loss):
            self._found(EVAL_NOT_FINITE.find("", loss=event.loss, step=step, num_rows=event.rows))

    def _sample(self, step: int) -> None:
        self.sampler.ask(step)

    def _sampled(self, event: SampleEvent) -> None:
        self.samples.append(event)
        record_or_halt(self.journal, "sample", step=event.step, prompt=event.prompt, answer=event.answer)
        if event.finding is not None:
            self._found(event.finding)
        self.observers.tell("sample", event)

    def _save_here(self) -> None:
        """A checkpoint of this very step, unless it stands already."""
        step = self.prepared.port.state.step
        if self.last_saved is None or checkpoint.step_of(self.last_saved) != step:
            self._save(step)

    def _save(self, step: int) -> None:
        """A checkpoint; a disk that refuses is a finding, and the next save tries again."""
        saved = checkpoint.save(self.prepared.port, self.prepared.tokenizer, self.run_dir)
        if isinstance(saved, Finding):
            self._found(saved)
            return
        self.last_saved = saved
        checkpoint.rotate(self.run_dir, self.prepared.recipe.save_total_limit)
        record_or_halt(self.journal, "save", step=step, path=saved.name)
        self.journal.sync()
        self.observers.tell("save", str(saved), step)

    def _save_final(self) -> None:
        parts, target = self.prepared.port.parts, self.run_dir / folder.FINAL
        checkpoint.refuse_non_finite(self.prepared.port, str(self.run_dir))
        try:
            save_model(parts.model, self.prepared.tokenizer, target, family=parts.family)
        except OSError as error:
            raise Halted(
                FINAL_SAVE_FAILED,
                str(target),
                path=str(target),
                error=str(error),
                last=str(self.last_saved or "none"),
                run=str(self.run_dir),
            ) from error

    def _found(self, finding: Finding) -> None:
        self.counts[finding.code] += 1
        record_or_halt(self.journal, "finding", **finding.to_json())
        self.observers.tell("finding", finding)

    def _journal_start(self) -> None:
        plan = self.prepared.plan
        record_or_halt(
            self.journal,
            "resume" if self.start.resumed else "start",
            step=self.prepared.port.state.step,
            checkpoint=self.point.name if self.point else None,
            total_steps=plan.total_steps,
            data_digest=self.prepared.data_digest,
            versions=versions(),
            device=str(self.prepared.device),
            derived={d.name: d.value for d in plan.derived},
            facts={**plan.facts, **self.start.facts},
        )

    def _sum_up(self, status: str, halted: str | None) -> RunResult:
        state = self.prepared.port.state
        final = self.run_dir / folder.FINAL
        result = RunResult(
            status=status,
            run_dir=str(self.run_dir),
            final_dir=str(final) if final.is_dir() and status == "finished" else None,
            steps=state.step,
            updates=state.updates,
            skipped=state.history.num_aborted,
            overflows=state.history.num_overflows,
            train_loss=state.loss_sum / state.updates if state.updates else None,
            eval_before=self.evals[0].loss if self.evals and self.point is None else None,
            eval_after=self.evals[-1].loss if len(self.evals) > 1 or (self.evals and self.point) else None,
            supervised_tokens=state.supervised_tokens,
            time_s=time.perf_counter() - self.started_s,
            train_time_s=self.train_time_s,
            peak_memory_bytes=peak_memory_bytes(),
            findings=dict(self.counts),
            halted=halted,
            samples=tuple(self.samples),
        )
        self._write_summary(result)
        self.observers.tell("end", result)
        return result

    def _write_summary(self, result: RunResult) -> None:
        record = result.to_json()
        try:
            self.journal.write("end", **{k: v for k, v in record.items() if k != "samples"})
            write_atomic(self.run_dir / folder.SUMMARY_FILE, json.dumps(record, indent=1, ensure_ascii=False).encode())
        except OSError as error:
            failure = checkpoint.save_failure(self.run_dir / folder.SUMMARY_FILE, error, len(json.dumps(record)))
            self.observers.tell("finding", failure)
