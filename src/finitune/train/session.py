"""One run from its first journal line to its summary."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from finitune.core.errors import Halted
from finitune.core.files import atomic_folder, write_atomic, write_manifest
from finitune.core.journal import Journal
from finitune.core.types import Finding
from finitune.core.units import bytes_text
from finitune.engine.codes import EVAL_NOT_FINITE, FINAL_SAVE_FAILED, INTERRUPTED
from finitune.engine.codes_time import STOPPED_UNSAVED
from finitune.engine.guard import Guard, GuardSettings, Hooks
from finitune.engine.judge import Judge
from finitune.engine.line import treated
from finitune.engine.policy import Policy
from finitune.engine.repeat import repeats
from finitune.models.save import write_model
from finitune.numerics.seeds import generators_kept
from finitune.train import checkpoint, folder
from finitune.train.codes_journal import JOURNAL_WAITS
from finitune.train.compact import to_parquet
from finitune.train.evaluate import evaluate
from finitune.train.keep_capsule import CapsuleKeeper
from finitune.train.keeper import Keeper, KeepSettings
from finitune.train.loop import Due, Loop, record_or_halt
from finitune.train.observer import EvalEvent, Observers, SampleEvent
from finitune.train.prepare import Prepared
from finitune.train.result import RunResult, peak_memory_bytes, versions
from finitune.train.sampling import Sampler
from finitune.train.signals import StopRequest, listening
from finitune.train.time_machine import TimeMachine

TABLE_FILE = "steps.parquet"


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

    def __init__(self, run_dir: Path, prepared: Prepared, journal: Journal, observers: Observers, start: Start) -> None:
        self.run_dir, self.prepared, self.journal, self.observers = run_dir, prepared, journal, observers
        self.start, self.point, self.started_s = start, start.point, start.started_s
        self.counts: Counter[str] = Counter()
        self.evals: list[EvalEvent] = []
        self.samples: list[SampleEvent] = []
        self.train_time_s = 0.0
        self.journal_waits = False
        self.recipe_bytes = (run_dir / folder.RECIPE_FILE).read_bytes()
        port = prepared.port
        self.sampler = Sampler(port.parts, prepared.tokenizer, prepared.recipe.sample, self._sampled)
        self.keeper = self._keeper()
        self.machine = TimeMachine(prepared, journal, run_dir)
        self.capsules = CapsuleKeeper(run_dir, port, self.recipe_bytes.decode(), self._found)
        observers.tell("plan", prepared.plan)

    def run(self) -> RunResult:
        """Train; every way out that can be foreseen ends in a summary."""
        try:
            return self._run()
        finally:
            self.start.close()

    def _run(self) -> RunResult:
        port = self.prepared.port
        status, halted = "finished", None
        with (
            listening(lambda: self.observers.tell("stop_requested")) as stop,
            generators_kept(),
            port.parts.kernels,
        ):
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
        self._close()
        if self.prepared.recipe.journal_parquet:
            self._compact()
        return result

    def _compact(self) -> None:
        """The steps as a table beside the journal."""
        target = self.run_dir / TABLE_FILE
        try:
            to_parquet(self.journal.path, target)
        except OSError as error:
            self.observers.tell("finding", checkpoint.save_failure(target, error, self.journal.path.stat().st_size))

    def _close(self) -> None:
        """The journal last; what the disk does not take even now is said, and lost."""
        try:
            self.journal.close()
        except OSError as error:
            self.observers.tell("finding", checkpoint.save_failure(self.journal.path, error, self.journal.abandon()))

    def _train(self, stop: StopRequest) -> bool:
        recipe, port = self.prepared.recipe, self.prepared.port
        loop = Loop(
            port=port,
            guard=self._guard(),
            journal=self.journal,
            observers=self.observers,
            total_steps=self.prepared.plan.total_steps,
            dues=(
                Due(recipe.eval_steps, self._evaluate),
                Due(recipe.sample.every_steps, self._sample),
                Due(recipe.save_steps, self.keeper.save),
            ),
            after_step=lambda step: self._after_step(step, loop.mean_step_s),
            stop_requested=stop,
            counts=self.counts,
        )
        try:
            if loop.total_steps > port.state.step:
                self._try_twice()
                for finding in self.machine.after_step(0.0):
                    self._found(finding)
            return loop.run()
        finally:
            self.train_time_s = loop.step_time_s
            for finding in self.observers.failures:
                self._found(finding)

    def _guard(self) -> Guard:
        """The guard as the recipe wants it; switched off, it refuses what is not finite and investigates nothing."""
        wanted = self.prepared.recipe.guard
        settings = GuardSettings(
            policy=wanted.policy,
            max_replays=wanted.max_replays if wanted.enabled else 0,
            proof_steps=wanted.proof_steps,
            probation_steps=wanted.probation_steps,
            act_on_forecast=wanted.act_on_forecast,
            state_check_steps=wanted.state_check_steps,
            max_relapses=wanted.max_relapses,
        )
        hooks = Hooks(
            record=partial(record_or_halt, self.journal),
            told=self.capsules.tell,
            keep=self.capsules.keep,
            went_back=self.keeper.abandon_after,
        )
        judge = Judge.of(self._detectors()) if wanted.enabled else Judge.only("non_finite")
        return Guard(
            self.prepared.port, judge, Policy(wanted.max_aborts_in_a_row), self.machine.timeline, hooks, settings
        )

    def _detectors(self) -> dict[str, dict[str, Any] | bool]:
        """Settings of the detectors: the loss of guessing follows from the vocabulary, unless the recipe says it."""
        given = dict(self.prepared.recipe.guard.detectors)
        runaway = given.get("runaway", {})
        if isinstance(runaway, dict):
            given["runaway"] = {"guess_loss": math.log(max(2, len(self.prepared.tokenizer))), **runaway}
        return given

    def _after(self, status: str) -> None:
        """Evaluate, sample and save what was reached."""
        step = self.prepared.port.state.step
        if status == "interrupted":
            self._stopped(step)
            return
        if not self.evals or self.evals[-1].step != step:
            self._evaluate(step)
        if not self.samples or self.samples[-1].step != step:
            self._sample(step)
        self.keeper.finish(step)
        self._save_final()

    def _stopped(self, step: int) -> None:
        """Save, and say how to go on."""
        stands, saved = self.keeper.finish(step), self.keeper.last_saved
        total, run = self.prepared.plan.total_steps, str(self.run_dir)
        if stands:
            self._found(INTERRUPTED.find("", step=step, total=total, path=str(saved), run=run))
        else:
            last = checkpoint.step_of(saved) if saved is not None else 0
            self._found(STOPPED_UNSAVED.find("", step=step, total=total, last=last, run=run))

    def _after_halt(self, halt: Halted) -> None:
        """Journal why, and keep the last good state where it is good and the disk takes it."""
        try:
            self._found(halt.code.find(halt.where, **halt.data))
            self.keeper.finish(self.prepared.port.state.step)
        except Halted as second:  # the state is not finite, or the journal cannot be written: nothing more to keep
            self.counts[second.code.code] += 1

    def _look(self) -> None:
        self._evaluate(0)
        self._sample(0)

    def _refuse_non_finite(self) -> None:
        port = self.prepared.port
        checkpoint.refuse_non_finite(port.state_tensors(), str(self.run_dir), port.state.step)

    def _after_step(self, step: int, step_s: float) -> None:
        """Look after checkpoints, snapshots and the journal."""
        self._watch_journal(step)
        self.keeper.after_step(step)
        for finding in [*self.machine.after_step(step_s), *self.prepared.port.parts.kernels.findings()]:
            self._found(finding)

    def _try_twice(self) -> None:
        """Compute the first step twice and say where it does not repeat: redo and resume rest on that."""
        port = self.prepared.port
        if self.prepared.recipe.guard.repeat_check:
            finding = repeats(port)
            record_or_halt(self.journal, "repeat_check", step=port.state.step + 1, repeats=finding is None)
            if finding is not None:
                self._found(finding)

    def _watch_journal(self, step: int) -> None:
        """Say once that the disk does not take the journal; it is tried again at every record."""
        fault, told = self.journal.fault, self.journal_waits
        self.journal_waits = fault is not None
        if fault is not None and not told:
            self._found(
                JOURNAL_WAITS.find(
                    str(self.journal.path),
                    path=str(self.journal.path),
                    error=str(fault),
                    pending=bytes_text(self.journal.pending_bytes),
                    step=step,
                    limit=bytes_text(self.journal.max_pending_bytes),
                    free=checkpoint.free_text(self.journal.path),
                )
            )

    def _mend(self) -> None:
        """The recipe stands in the folder again."""
        path = self.run_dir / folder.RECIPE_FILE
        if not path.exists():
            write_atomic(path, self.recipe_bytes)

    def _evaluate(self, step: int) -> None:
        if not self.prepared.eval_batches:
            return
        event = evaluate(self.prepared.port.parts, self.prepared.eval_batches, step)
        self.evals.append(event)
        self.keeper.evaluated(step, event.loss)
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

    def _keeper(self) -> Keeper:
        recipe = self.prepared.recipe
        keeper = Keeper(
            run_dir=self.run_dir,
            port=self.prepared.port,
            tokenizer=self.prepared.tokenizer,
            journal=self.journal,
            settings=KeepSettings(
                limit=recipe.save_total_limit,
                every_steps=recipe.save_keep_every_steps,
                best=recipe.save_keep_best,
                minutes=recipe.save_minutes,
                trust_steps=recipe.guard.trust_steps,
                background=self.prepared.snapshots.background,
            ),
            found=self._found,
            saved=lambda path, step: self.observers.tell("save", str(path), step),
            mend=self._mend,
            facts=self.start.facts,
            last_saved=self.start.point,
        )
        keeper.recall()
        return keeper

    def _save_final(self) -> None:
        parts, target = self.prepared.port.parts, self.run_dir / folder.FINAL
        self._refuse_non_finite()
        state = self.prepared.port.state
        try:
            with atomic_folder(target) as aside:
                write_model(parts.model, self.prepared.tokenizer, aside, family=parts.family)
                write_manifest(aside, {"step": state.step, "updates": state.updates})
        except OSError as error:
            raise Halted(
                FINAL_SAVE_FAILED,
                str(target),
                path=str(target),
                error=str(error),
                last=str(self.keeper.last_saved or "none"),
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
            attempt=self.prepared.port.state.attempt,
            treated=treated(self.prepared.port.state_record()),
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
