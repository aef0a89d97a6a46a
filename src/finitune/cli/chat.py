"""``finitune chat PATH``: talk to a run, a checkpoint, an adapter or a model."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from finitune.cli.places import model_of
from finitune.cli.render import Raw
from finitune.cli.session import Outcome, Session
from finitune.core.errors import Exit
from finitune.core.messages.catalogue import text
from finitune.core.types import Finding
from finitune.report.words import finding_text

Messages = list[dict[str, str]]
Speaker = Callable[[Messages], Iterator["str | Finding"]]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("chat", help="cli.chat.help")(chat)


def chat(
    ctx: typer.Context,
    path: Annotated[str, typer.Argument(metavar="PATH", help="cli.chat.path")],
    prompt: Annotated[str | None, typer.Option("--prompt", help="cli.chat.prompt")] = None,
    system: Annotated[str | None, typer.Option("--system", help="cli.chat.system")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=65536, help="cli.chat.max_new_tokens")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, max=100.0, help="cli.chat.temperature")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="cli.chat.top_p")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="cli.chat.seed")] = 0,
    device: Annotated[str, typer.Option(help="cli.chat.device")] = "auto",
) -> Outcome:
    """Load the model once, then answer one prompt or talk."""
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    talk = Talk(_speaker(model_of(path), device, sampling), system)
    if prompt is not None:
        turn = talk.say(prompt, lambda _piece: None)
        return _outcome(talk, (Raw(turn.answer), *_told(turn)))
    session: Session = ctx.obj
    print(text("cli.chat.welcome", path=path))
    converse(talk, _read_line, _write)
    return _outcome(talk, (), findings_matter=session.json)


def _speaker(path: str, device: str, sampling: dict[str, Any]) -> Speaker:
    """Load the model; the function that lets it answer."""
    from finitune.models.chat import stream
    from finitune.models.device import pick_device
    from finitune.models.opening import load_any

    place = pick_device(device)
    loaded = load_any(path, device=str(place))
    return lambda messages: stream(loaded.model, loaded.tokenizer, messages, device=place, **sampling)


@dataclass(frozen=True, slots=True)
class Turn:
    """One question and what came of it; ``finding`` tells why the answer ended early, if it did."""

    prompt: str
    answer: str
    finding: Finding | None
    time_s: float

    def to_json(self) -> dict[str, Any]:
        """A JSON-able record."""
        finding = self.finding.to_json() if self.finding is not None else None
        return {"prompt": self.prompt, "answer": self.answer, "finding": finding, "time_s": self.time_s}


@dataclass
class Talk:
    """A conversation: who answers, what the model remembers, and every turn."""

    speaker: Speaker
    system: str | None = None
    messages: Messages = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget what was said; the turns stay."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def say(self, prompt: str, write: Callable[[str], Any]) -> Turn:
        """One turn; pieces of the answer are written as they come.

        An answer that failed, or that Ctrl-C ended, is not remembered.
        """
        asked = [*self.messages, {"role": "user", "content": prompt}]
        pieces: list[str] = []
        finding, started_s = None, time.perf_counter()
        for item in self.speaker(asked):
            if isinstance(item, Finding):
                finding = item
            else:
                pieces.append(item)
                write(item)
        answer = "".join(pieces)
        turn = Turn(prompt, answer, finding, time.perf_counter() - started_s)
        self.turns.append(turn)
        if finding is None:
            self.messages = [*asked, {"role": "assistant", "content": answer}]
        return turn


def converse(talk: Talk, read: Callable[[], str | None], write: Callable[[str], Any]) -> None:
    """Talk until /exit or the end of input (None). Ctrl-C while the model answers ends only that answer."""
    while (line := read()) is not None:
        prompt = line.strip()
        if prompt in ("/exit", "/quit"):
            return
        if prompt == "/reset":
            talk.reset()
            write(text("cli.chat.forgotten") + "\n")
        elif prompt.startswith("/"):
            write(text("cli.chat.commands") + "\n")
        elif prompt:
            _answer(talk, prompt, write)


def _answer(talk: Talk, prompt: str, write: Callable[[str], Any]) -> None:
    try:
        turn = talk.say(prompt, write)
    except KeyboardInterrupt:
        write(f" {text('cli.chat.stopped')}\n")
        return
    write("".join(f"\n{block.text}" for block in _told(turn)) + "\n")


def _told(turn: Turn) -> tuple[Raw, ...]:
    """Why an answer ended early."""
    return (Raw(finding_text(turn.finding)),) if turn.finding is not None else ()


def _read_line() -> str | None:
    """A line from the user; None at the end of input or Ctrl-C."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        return None


def _write(piece: str) -> None:
    print(piece, end="", flush=True)


def _outcome(talk: Talk, blocks: tuple[Raw, ...], *, findings_matter: bool = True) -> Outcome:
    failed = findings_matter and any(turn.finding for turn in talk.turns)
    return Outcome(blocks, {"turns": [t.to_json() for t in talk.turns]}, Exit.FINDINGS if failed else Exit.GOOD)
