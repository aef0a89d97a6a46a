"""How data is read, tokenised and fitted; checked as a whole before anything is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from finitune.core.errors import UserError
from finitune.core.messages.catalogue import text
from finitune.core.registry import names
from finitune.data.codes import BAD_SETTING, UNKNOWN_FORMAT

Truncation = Literal["truncate_prompt", "truncate_answer", "drop_row"]
OnBadRow = Literal["skip", "stop"]
Template = Literal["auto", "raw"]


@dataclass(frozen=True)
class DataConfig:
    """Settings of :func:`finitune.data.dataset.load_dataset`."""

    format: str = "auto"
    """Name of a data format for all sources, or "auto": each file is recognised by its columns."""
    max_length: int = 1024
    """Longest row in tokens, template included."""
    on_bad_row: OnBadRow = "skip"
    """"skip": train without bad rows and count them; "stop": refuse a data set with any."""
    truncation: Truncation = "truncate_prompt"
    """What gives way in a row that is too long: oldest turns and the start of the prompt; also the end of the
    answer; or the whole row."""
    template: Template = "auto"
    """"auto": the tokenizer's chat template; "raw": prompt + answer + end token, for single-turn data."""
    prompt_floor: int = 16
    """Tokens of a prompt that truncation never touches."""
    system_prompt: str | None = None
    """System turn of every conversation that has none of its own; None leaves it to the template."""
    limit_rows: int | None = None
    """Read at most this many rows of each source; None reads all."""
    vocab_rows: int | None = None
    """Rows of the model's embedding; a token id beyond them makes its row bad. None: not checked."""

    def faults(self) -> list[UserError]:
        """All settings that cannot be, with what they must be."""
        whole = [("max_length", 2), ("prompt_floor", 0), ("limit_rows", 1), ("vocab_rows", 1)]
        found = [_below(name, getattr(self, name), least) for name, least in whole]
        found.append(_choice("on_bad_row", self.on_bad_row, ("skip", "stop")))
        found.append(_choice("truncation", self.truncation, ("truncate_prompt", "truncate_answer", "drop_row")))
        found.append(_choice("template", self.template, ("auto", "raw")))
        found.append(unknown_format(self.format))
        return [f for f in found if f is not None]


def unknown_format(name: str) -> UserError | None:
    """The fault of a format name that no member has."""
    known = names("formats")
    if name == "auto" or name in known:
        return None
    near = get_close_matches(name, known, n=2, cutoff=0.4)
    hint = text("data.did_you_mean", names=", ".join(near)) if near else ""
    return UserError(UNKNOWN_FORMAT, "data.format", format=name, known=", ".join(known), hint=hint)


def _below(name: str, value: int | None, least: int) -> UserError | None:
    if value is None or (isinstance(value, int) and value >= least):
        return None
    return UserError(BAD_SETTING, f"data.{name}", name=name, value=value, expected=f">= {least}")


def _choice(name: str, value: str, known: Sequence[str]) -> UserError | None:
    if value in known:
        return None
    return UserError(BAD_SETTING, f"data.{name}", name=name, value=value, expected=" | ".join(known))
