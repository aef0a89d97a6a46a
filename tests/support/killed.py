"""Runs as a kill leaves them, made once and copied for every test."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from finitune.core.errors import UserError, UserErrors
from finitune.core.files import MANIFEST, read_manifest, write_manifest
from finitune.core.journal import read
from finitune.train import lock
from finitune.train.folder import find_place
from finitune.train.past import stored_recipe
from finitune.train.run import train_run
from support.runs import tiny_recipe


@dataclass(frozen=True)
class Killed:
    """A run of 8 steps with checkpoints 2 and 4, killed after step 5, and what it comes to without the kill."""

    killed: Path
    whole: Path
    rows: Path

    def again(self, folder: Path) -> Path:
        """A copy of the killed run."""
        return Path(shutil.copytree(self.killed, folder / "run"))

    def finished(self, folder: Path) -> Path:
        """A copy of the run that nobody killed."""
        return Path(shutil.copytree(self.whole, folder / "run"))


def killed_run(home: Path, *overrides: str, model: str = "tiny-llama", step: int = 5) -> Killed:
    """Train once; what lies in the folder after ``step`` is what a kill at that moment would leave."""
    run, killed = home / "run", home / "killed"
    home.mkdir(parents=True, exist_ok=True)

    class Copy:
        def on_step(self, event: Any) -> None:
            if event.reading.step == step:
                shutil.copytree(run, killed, ignore=shutil.ignore_patterns(".lock"))

    fixed = ("max_steps=8", "save_steps=2", "save_in_background=false", "snapshots.memory_share=0")
    recipe = tiny_recipe(home, *fixed, *overrides, model=model)
    assert train_run(recipe, observers=[Copy()]).status == "finished"
    return Killed(killed, run, home / "rows.jsonl")


def content(folder: Path) -> dict[str, str]:
    """Digest of every file below a folder."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def weights(run: Path) -> str:
    """Digest of a run's result."""
    (path,) = (run / "final").glob("*model.safetensors")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def losses(run: Path) -> list[float]:
    """Losses of the line that a run stands on."""
    found: dict[int, float] = {}
    for record in read(run / "journal.jsonl"):
        if record["kind"] == "step":
            found[record["step"]] = record["loss"]
    return [found[step] for step in sorted(found)]


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    """Journal records of one kind."""
    return [r for r in read(run / "journal.jsonl") if r["kind"] == kind]


def said(run: Path, code: str) -> dict[str, Any]:
    """Data of the last finding of a code."""
    return [r["data"] for r in records(run, "finding") if r["code"] == code][-1]


def sign(checkpoint: Path, **facts: Any) -> None:
    """Give a checkpoint a manifest that agrees with its files, whatever they hold now, and tells no state."""
    left_out = ("schema", "files", "self", "state")
    old = {k: v for k, v in read_manifest(checkpoint).items() if k not in left_out}
    (checkpoint / MANIFEST).unlink()
    write_manifest(checkpoint, {**old, **facts})


def edit_state(checkpoint: Path, **values: Any) -> None:
    """Change values of state.json, and the manifest with it."""
    path = checkpoint / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    sign(checkpoint)


def flip(path: Path) -> None:
    """One bit of a file, near its end."""
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def resume(run: Path | str, *overrides: str, allow: bool = False):
    """As on the command line."""
    recipe = stored_recipe(find_place(str(run)), overrides)
    return train_run(recipe, resume=str(run), allow_changes=allow)


def refused(run: Path, *overrides: str, allow: bool = False, name: Path | None = None) -> str:
    """The message of a refusal; nothing in the folder was changed and nobody holds it."""
    before = content(run)
    with pytest.raises((UserError, UserErrors)) as caught:
        resume(name or run, *overrides, allow=allow)
    assert content(run) == before
    assert not lock.in_use(run)
    return str(caught.value)


def kill(session) -> None:
    """A session that came as far as its first line."""
    session._journal_start()
    session.journal.abandon()
    session.start.close()
