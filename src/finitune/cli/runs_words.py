"""Runs in words: what both the list and the page of one run say."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from finitune.cli.render import Block, Raw
from finitune.core.messages.catalogue import text
from finitune.core.units import bytes_text, number_text
from finitune.train.folder import FINAL
from finitune.train.runs import Run, State

_NO_LIMIT = 1 << 30


def clean(words: str) -> str:
    r"""``words`` on one line of a terminal: a character that is not printable is shown as an escape such as ``\x1b``.

    Names of folders and what stands in a journal may hold anything; nothing of it reaches the terminal as a command.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in words)


def shell_word(path: Path) -> str:
    """A path as one word of a command line that can be copied."""
    word = str(path)
    if os.name == "nt":  # pragma: no cover
        return subprocess.list2cmdline([clean(word)])
    if word.isprintable():
        return shlex.quote(word)
    escaped = "".join(_in_shell(byte) for byte in os.fsencode(word))
    return f"$'{escaped}'"


def _in_shell(byte: int) -> str:
    r"""A byte inside of ``$'...'``; three octal digits, because more hexadecimal ones would be read on."""
    character = chr(byte)
    return character if 32 <= byte < 127 and character not in "'\\" else f"\\{byte:03o}"


def terminal_columns() -> int:
    """Columns of the terminal; without one, no limit."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else _NO_LIMIT


def ago(then_s: float, now_s: float | None = None) -> str:
    """How long ago a moment (seconds since 1970) was, in the largest unit that tells at least two of it."""
    seconds = (time.time() if now_s is None else now_s) - then_s
    for unit, length_s in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= 2 * length_s:
            return text(f"runs.ago.{unit}", count=int(seconds // length_s))
    return text("runs.ago.now")


def size_text(num_bytes: int) -> str:
    """Bytes in words; below 1 MiB in KiB."""
    return bytes_text(num_bytes) if num_bytes >= 1 << 20 else f"{-(-num_bytes // 1024)} KiB"


def state_word(run: Run) -> str:
    """The state in a word or two."""
    word = text(f"runs.state.{run.state.value}")
    return f"{word} {run.code}" if run.code else word


def state_sentence(run: Run) -> str:
    """The state and what it means."""
    name = run.state.value
    if run.state is State.HALTED and not run.code:
        name = "halted_unknown"
    facts = {"pid": run.holder.get("pid", "?"), "host": run.holder.get("host", "?")}
    return text(f"runs.about.{name}", code=run.code, reason=clean(run.reason), **facts)


def steps_text(run: Run) -> str:
    """Steps done of steps in all."""
    if run.step is None and run.total_steps is None:
        return "-"
    return "/".join("?" if n is None else str(n) for n in (run.step, run.total_steps))


def loss_change(first: float | None, last: float | None) -> str:
    """A held-out loss from the first to the last; one of them alone where the other is unknown or the same."""
    if first is None or last is None:
        return number_text(last if first is None else first)
    return f"{number_text(first)} -> {number_text(last)}"


def resume_blocks(runs: Sequence[Run]) -> list[Block]:
    """The commands that go on with runs, and apart from them those that would begin again."""
    blocks: list[Block] = []
    for title, with_checkpoint in (("runs.go_on", True), ("runs.begin", False)):
        chosen = [run for run in runs if run.can_go_on and bool(run.checkpoints) == with_checkpoint]
        commands = [Raw(f"  finitune train --resume {shell_word(run.path)}") for run in chosen]
        blocks += [Raw(""), Raw(text(title)), *commands] if commands else []
    return blocks


def use_blocks(run: Run) -> list[Block]:
    """The commands that use the model of a finished run."""
    chat = f"  finitune chat {shell_word(run.path)}"
    export = f"  finitune export {shell_word(run.path / FINAL)} my-model"
    return [Raw(""), Raw(text("runs.use")), Raw(chat), Raw(export)]
