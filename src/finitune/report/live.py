"""A run on a terminal: the plan, a progress line, findings as they come, the summary.

On a terminal the last line is a moving bar; elsewhere plain lines are printed every ``logging_steps``.
Both say the same things.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from finitune.core.incident import Incident
from finitune.core.messages.catalogue import text
from finitune.core.types import Finding, Severity
from finitune.core.units import bytes_text, duration_text, number_text
from finitune.report.incident import summary
from finitune.report.words import aligned, finding_line, finding_text

_STYLES = {Severity.NOTE: "dim", Severity.WARNING: "yellow", Severity.ERROR: "bold red"}
_SPEED_WINDOW_STEPS = 20
_SHOWN_ROWS = 4
_SHOWN_FINDINGS = 3


class Live:
    """An observer that prints. ``moving`` shows a bar; the rest is the same."""

    def __init__(self, console: Console, *, logging_steps: int = 1) -> None:
        self.console = console
        self.moving = console.is_terminal
        self.logging_steps = logging_steps
        self._bar: Progress | None = None
        self._task: Any = None
        self._speed: deque[tuple[int, float]] = deque(maxlen=_SPEED_WINDOW_STEPS)
        self._shown_findings: dict[str, int] = {}

    def on_plan(self, plan: Any) -> None:
        """Everything that was derived, and why."""
        self._say(text("train.plan"), "bold")
        for line in aligned([(text(f"train.derived.{d.name}"), d.value, d.why) for d in plan.derived]):
            self._say("  " + line)
        minutes = plan.step_s * plan.total_steps / 60
        self._say(
            text(
                "train.estimate",
                minutes=f"{minutes:.1f}",
                memory=bytes_text(plan.memory_bytes),
                available=bytes_text(plan.available_bytes),
            )
        )

    def on_step(self, event: Any) -> None:
        """The progress line, and what was wrong with a refused step."""
        reading = event.reading
        self._speed.append((reading.tokens or 0, event.time_s))
        self._explain(event)
        if event.action.value in ("proceed", "skip_batch"):
            self._progress(event)

    def _explain(self, event: Any) -> None:
        reading, action = event.reading, event.action.value
        for finding in event.judgement.findings:
            if action == "retry_smaller_scale":
                scale = number_text(reading.loss_scale, 8)
                self._say(text("train.retried", step=reading.step, code=finding.code, scale=scale), "dim")
            elif finding.veto:
                message = finding_line(finding)
                self._say(text("train.refused", step=reading.step, message=message), _STYLES[Severity.ERROR])
            else:
                self._note(reading.step, finding)
        if action in ("skip_batch", "halt"):
            rows = [str(r) for r in event.rows]
            more = f", ... (+{len(rows) - _SHOWN_ROWS})" if len(rows) > _SHOWN_ROWS else ""
            self._say(text("train.rows_kept", rows=", ".join(rows[:_SHOWN_ROWS]) + more))

    def _note(self, step: int, finding: Finding) -> None:
        """A standing condition is said once, then counted."""
        self._shown_findings[finding.code] = self._shown_findings.get(finding.code, 0) + 1
        if self._shown_findings[finding.code] == 1:
            self._say(text("train.note", step=step, message=finding_line(finding)), _STYLES[finding.severity])

    def _progress(self, event: Any) -> None:
        reading = event.reading
        tokens, seconds = (sum(column) for column in zip(*self._speed, strict=True))
        line = text(
            "train.step_line",
            step=reading.step,
            total=event.total_steps,
            loss=number_text(reading.loss),
            norm=number_text(reading.grad_norm, 3),
            lr=number_text(reading.lr, 3),
            speed=round(tokens / seconds) if seconds > 0 else "-",
            eta=duration_text((event.total_steps - reading.step) * seconds / len(self._speed)),
        )
        if self.moving:
            self._move(line, reading.step, event.total_steps)
        elif reading.step % self.logging_steps == 0 or reading.step == event.total_steps:
            self._say(line)

    def _move(self, line: str, step: int, total: int) -> None:
        if self._bar is None:
            columns = (BarColumn(bar_width=24), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._task = self._bar.add_task(line, total=total)
            self._bar.start()
        self._bar.update(self._task, description=line, completed=step)

    def on_eval(self, event: Any) -> None:
        """Held-out loss."""
        self._say(
            text(
                "train.eval",
                loss=number_text(event.loss),
                step=event.step,
                rows=event.rows,
                tokens=event.supervised_tokens,
                time=f"{event.time_s:.1f}",
            ),
            "bold",
        )

    def on_sample(self, event: Any) -> None:
        """An answer of the model in training."""
        self._say(text("train.sample", step=event.step, prompt=event.prompt), "cyan")
        if event.finding is not None:
            self._say(text("train.no_answer", message=finding_line(event.finding)), "yellow")
        else:
            self._say(text("train.answer", answer=event.answer.strip().replace("\n", "\n  ")))

    def on_finding(self, finding: Finding) -> None:
        """A finding outside a step: the first of a code with what to try, a few more as lines, the rest counted."""
        count = self._shown_findings[finding.code] = self._shown_findings.get(finding.code, 0) + 1
        style = _STYLES[finding.severity]
        if count == 1 and finding.severity is not Severity.NOTE:
            self._say(finding_text(finding), style)
        elif count <= _SHOWN_FINDINGS:
            self._say(finding_line(finding), style)
        elif count == _SHOWN_FINDINGS + 1:
            self._say(text("train.more_findings", code=finding.code), style)

    def on_incident(self, incident: Incident, run_dir: str) -> None:
        """What failed, why, and what was done about it."""
        style = "bold red" if incident.outcome == "halted" else "yellow"
        for line in summary(incident, run_dir):
            self._say(line, style)

    def on_save(self, path: str, _step: int) -> None:
        """A checkpoint stands."""
        self._say(text("train.saved", path=path), "dim")

    def on_stop_requested(self) -> None:
        """Ctrl-C was heard."""
        self._say(text("train.stopping"), "yellow")

    def on_end(self, result: Any) -> None:
        """The summary, and what to do next."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self._say(text("train.summary"), "bold")
        for line in aligned(summary_rows(result)):
            self._say("  " + line)
        for line in next_lines(result):
            self._say(line, "green")

    def _say(self, line: str, style: str = "") -> None:
        """Print above the bar; no markup is read from data."""
        self.console.print(Text(line, style=style), soft_wrap=True)


def summary_rows(result: Any) -> list[tuple[str, str]]:
    """The summary as (name, value) rows."""
    rows = [(text("train.status"), text(f"train.status.{result.status}"))]
    counts = {name: getattr(result, name) for name in ("steps", "updates", "skipped", "overflows")}
    rows.append((text("train.sum.steps"), text("train.sum.steps_value", **counts)))
    if result.eval_after is not None:
        rows.append((text("train.sum.eval"), _eval_text(result)))
    rows.append((text("train.sum.train_loss"), number_text(result.train_loss)))
    speed = result.supervised_tokens / result.train_time_s if result.train_time_s > 0 else 0.0
    times = {"train": f"{result.train_time_s:.1f}", "total": f"{result.time_s:.1f}", "speed": round(speed)}
    rows.append((text("train.sum.time"), text("train.sum.time_value", **times)))
    if result.peak_memory_bytes is not None:
        rows.append((text("train.sum.memory"), bytes_text(result.peak_memory_bytes)))
    found = ", ".join(f"{code} x {count}" for code, count in sorted(result.findings.items()))
    rows.append((text("train.sum.findings"), found or text("train.sum.no_findings")))
    rows.append((text("train.sum.run"), result.run_dir))
    if result.final_dir:
        rows.append((text("train.sum.result"), result.final_dir))
    return rows


def _eval_text(result: Any) -> str:
    before, after = result.eval_before, result.eval_after
    if before is None:
        return text("train.sum.eval_one", after=number_text(after))
    change = 100 * (after - before) / before if before else float("nan")
    return text("train.sum.eval_value", before=number_text(before), after=number_text(after), change=f"{change:+.1f}")


def next_lines(result: Any) -> list[str]:
    """What one can do now."""
    if result.final_dir:
        return [text("train.next.chat", path=result.run_dir), text("train.next.export", path=result.final_dir)]
    return [text("train.next.resume", path=result.run_dir)]
