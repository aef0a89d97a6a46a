"""The page of one run."""

from __future__ import annotations

import os
from pathlib import Path

from finitune.cli.codes import CANNOT_WRITE
from finitune.cli.render import Block, Heading, Raw
from finitune.cli.runs_words import (
    ago,
    clean,
    loss_change,
    resume_blocks,
    size_text,
    state_sentence,
    steps_text,
    use_blocks,
)
from finitune.cli.session import Outcome
from finitune.core.codes import all_codes
from finitune.core.errors import Exit, UserError
from finitune.core.messages.catalogue import language, text
from finitune.core.units import duration_text, number_text
from finitune.report.words import aligned
from finitune.train.folder import JOURNAL_FILE
from finitune.train.run_ends import real
from finitune.train.run_page import Page, page_of
from finitune.train.runs import CheckpointInfo, State

_SHOWN_FROM_S = 0.5
"""Less would be shown as 0:00."""
_PARQUET_MAGIC = b"PAR1"

Rows = list[tuple[str, ...]]


def show_run(run_dir: Path, *, verify: bool, parquet: Path | None) -> Outcome:
    """One run in full; exit code 1 where something of it is damaged. Raises UserError."""
    page = page_of(run_dir, verify=verify)
    blocks = page_blocks(page, verified=verify)
    payload = {"run": page.to_json()}
    if parquet is not None:
        _write_parquet(run_dir / JOURNAL_FILE, parquet)
        done = text("runs.parquet", name=clean(run_dir.name), path=clean(str(parquet)))
        blocks, payload = (*blocks, Raw(done)), payload | {"parquet": {"path": str(parquet)}}
    return Outcome(blocks, payload, Exit.GOOD if page.sound else Exit.FINDINGS)


def _write_parquet(journal: Path, target: Path) -> None:
    """Write the table. Only a table is overwritten: a slip must not cost a journal. Raises UserError."""
    from finitune.train.compact import to_parquet

    shown = clean(str(target))
    try:
        if os.path.isfile(target) and not _is_parquet(target):
            raise UserError(CANNOT_WRITE, shown, path=shown, problem=text("runs.no_table"))
        to_parquet(journal, target)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UserError(CANNOT_WRITE, shown, path=shown, problem=clean(str(error))) from error


def _is_parquet(path: Path) -> bool:
    with path.open("rb") as handle:
        return handle.read(len(_PARQUET_MAGIC)) == _PARQUET_MAGIC


def page_blocks(page: Page, *, verified: bool) -> tuple[Block, ...]:
    """A run for a reader; ``verified`` tells that digests were compared."""
    rows: Rows = [(text(f"runs.page.{name}"), value) for name, value in _facts(page)]
    return (
        Heading(clean(str(page.run.path))),
        *_indented(rows),
        *_settings(page),
        *_findings(page),
        *_checkpoints(page, verified=verified),
        *resume_blocks([page.run]),
        *(use_blocks(page.run) if page.has_final and page.run.state is State.FINISHED else []),
    )


def _indented(rows: Rows) -> list[Block]:
    return [Raw(f"  {line}") for line in aligned(rows)]


def _facts(page: Page) -> list[tuple[str, str]]:
    run = page.run
    rows = [
        ("state", state_sentence(run)),
        ("step", steps_text(run)),
        ("loss", number_text(run.loss)),
        ("eval", _evals(page)),
        ("transactions", _transactions(page)),
        ("sessions", _sessions(page)),
        ("time", _times(page)),
        ("changed", ago(run.changed_s)),
        ("size", _size(page)),
        ("journal", _journal(page)),
        ("summary", text("runs.page.summary_bad", reason=clean(page.summary_fault)) if page.summary_fault else ""),
    ]
    return [(name, value) for name, value in rows if value not in ("", "-")]


def _evals(page: Page) -> str:
    if len(page.evals) < 2:
        return loss_change(page.run.eval_first, None)
    first, last = (number_text(page.evals[step]) for step in (min(page.evals), max(page.evals)))
    return text("runs.page.eval_value", first=first, last=last, count=len(page.evals))


def _transactions(page: Page) -> str:
    if not page.actions:
        return ""
    done = page.actions
    return text(
        "runs.page.transactions_value",
        committed=done["proceed"],
        refused=done["skip_batch"] + done["halt"],
        retried=done["retry_smaller_scale"],
    )


def _sessions(page: Page) -> str:
    if not page.sessions:
        return ""
    began_s = real(page.sessions[0], "time")
    started = ago(began_s) if began_s is not None else "?"
    name = "sessions_back" if page.num_rollbacks else "sessions_value"
    return text(f"runs.page.{name}", count=len(page.sessions), started=started, rollbacks=page.num_rollbacks)


def _times(page: Page) -> str:
    total_s = sum(page.times_s.values())
    if not total_s:
        return ""
    training = duration_text(page.train_time_s)
    parts = [text("runs.page.time_value", total=duration_text(total_s), training=training)]
    for name in ("evaluation", "samples", "saving"):
        if page.times_s.get(name, 0.0) >= _SHOWN_FROM_S:
            parts.append(text(f"runs.page.time.{name}", time=duration_text(page.times_s[name])))
    return ", ".join(parts)


def _size(page: Page) -> str:
    size = size_text(page.run.num_bytes)
    if not page.num_aside:
        return size
    gone = size_text(page.aside_bytes)
    return text("runs.page.aside", size=size, gone=gone, count=page.num_aside)


def _journal(page: Page) -> str:
    if not page.num_records and not page.damage:
        return ""
    if not page.damage:
        return text("runs.page.journal_value", records=page.num_records)
    damaged, first = len(page.damage), str(page.damage[0])
    return text("runs.page.journal_damaged", records=page.num_records, damaged=damaged, first=first)


def _settings(page: Page) -> list[Block]:
    """What the newest session derived from the recipe."""
    rows: Rows = [(_label(name), clean(value)) for name, value in page.derived.items()]
    return [Raw(""), Heading(text("runs.page.settings")), *_indented(rows)] if rows else []


def _label(name: str) -> str:
    try:
        return text(f"train.derived.{name}")
    except KeyError:  # of another version
        return clean(name)


def _findings(page: Page) -> list[Block]:
    if not page.findings:
        return [Raw(""), Raw(text("runs.page.no_findings"))]
    codes = all_codes()
    rows: Rows = [tuple(text(f"runs.head.{name}") for name in ("code", "count", "meaning"))]
    for name, count in sorted(page.findings.items()):
        code = codes.get(name)
        meaning = code.text(language()).title if code else text("runs.unknown_code")
        rows.append((clean(name), str(count), meaning))
    return [Raw(""), Heading(text("runs.page.findings")), *_indented(rows)]


def _checkpoints(page: Page, *, verified: bool) -> list[Block]:
    if not page.run.checkpoints:
        name = "lost_checkpoints" if page.run.has_lost_checkpoints else "no_checkpoints"
        return [Raw(""), Raw(text(f"runs.page.{name}"))]
    rows: Rows = [tuple(text(f"runs.head.{name}") for name in ("step", "trust", "size", "eval", "intact"))]
    rows += [_checkpoint(c, page.evals.get(c.step), verified=verified) for c in page.run.checkpoints]
    return [Raw(""), Heading(text("runs.page.checkpoints")), *_indented(rows)]


def _checkpoint(info: CheckpointInfo, loss: float | None, *, verified: bool) -> tuple[str, ...]:
    intact = text("runs.intact.digests" if verified else "runs.intact.sizes")
    return (
        str(info.step),
        text("runs.trusted" if info.trusted else "runs.candidate"),
        size_text(info.num_bytes),
        number_text(loss),
        clean("; ".join(info.faults)) if info.faults else intact,
    )
