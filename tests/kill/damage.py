"""Files of a run folder that are torn, flipped, swapped, forged: one damage each, named so that it can be done again.

``KIND FILE SEED``; FILE is one of the newest checkpoint, or ``journal.jsonl``, or ``recipe.yaml``, or ``folders``.
"""

from __future__ import annotations

import json
import os
import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finitune.core.files import write_manifest
from kill.oracle import checkpoints

IN_FILES = ("truncate", "flip", "grow", "empty", "delete", "swap", "folder", "pickled", "link")
"""For every file of a checkpoint."""
IN_JSON = ("shape", "forge")
"""``shape``: valid JSON of another shape; ``forge``: the same, and the manifest agrees with it."""
IN_TENSORS = ("forge-swap", "forge-truncate", "forge-pickled")
"""What an attacker or a careless script does: the manifest agrees."""
ADDED = ("pytorch_model.bin", "optimizer.pt", "data.pkl", "evil.py", "deep/training_args.bin")
IN_JOURNAL = ("flip", "drop", "repeat", "exchange", "garbage", "zeros", "truncate", "empty", "delete", "folder")
SEEN_IN_JOURNAL = ("flip", "drop", "exchange", "garbage", "zeros")
"""Damages of the journal that have to be said; the others look like an early death or like a resume."""
IN_RECIPE = ("truncate", "flip", "empty", "delete", "grow")
MARK = "trusted.json"
"""Not part of a checkpoint's content: without it the checkpoint is a candidate again."""
_SHAPES: tuple[bytes, ...] = (
    b"[]",
    b"{}",
    b"null",
    b"3",
    b'"text"',
    b"",
    b"[" * 100_000,
    b'{"files": []}',
    b'{"files": {"state.json": 3}, "step": 6}',
    b'{"files": {"state.json": {}}, "step": 6}',
    b'{"files": {"../../rows.jsonl": {"bytes": 1, "sha256": "0"}}, "step": 6}',
    b'{"schema": 1, "files": {}, "step": 6}',
    b'{"schema": 2, "cursor": [], "step": "six"}',
    b'{"schema": 2, "cursor": {"epoch": -1, "step": 1e99}, "step": NaN}',
    b'{"schema": 99}',
    b"\xff\xfe\x00{",
)


@dataclass(frozen=True)
class Damage:
    """One damage."""

    kind: str
    file: str
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.kind} {self.file} {self.seed}"

    @classmethod
    def parse(cls, text: str) -> Damage:
        """Inverse of ``str``."""
        kind, file, seed = text.split(" ")
        return cls(kind, file, int(seed))

    @property
    def in_journal(self) -> bool:
        return self.file == "journal.jsonl"

    @property
    def in_recipe(self) -> bool:
        return self.file == "recipe.yaml"

    @property
    def in_checkpoint(self) -> bool:
        """A damage that makes the newest checkpoint one that must be passed over."""
        return not (self.in_journal or self.in_recipe) and self.file != MARK


def all_damages(run_dir: Path, seeds: range) -> list[Damage]:
    """Every damage of every file that is there."""
    newest = checkpoints(run_dir)[-1]
    names = sorted(p.relative_to(newest).as_posix() for p in newest.rglob("*") if p.is_file())
    found = [Damage(kind, name, seed) for name in names for kind in IN_FILES for seed in _seeds(kind, seeds)]
    for name in ("manifest.json", "state.json"):
        found += [Damage("shape", name, seed) for seed in range(len(_SHAPES))]
    found += [Damage("forge", "state.json", seed) for seed in range(len(_SHAPES))]
    tensors = [name for name in names if name.endswith(".safetensors")]
    found += [Damage(kind, name) for name in tensors for kind in IN_TENSORS]
    found += [Damage(kind, name) for name in ADDED for kind in ("add", "forge-add")]
    found += [Damage("swap", "folders"), Damage("forge-swap", "state.json")]
    found += [Damage(kind, "journal.jsonl", seed) for kind in IN_JOURNAL for seed in _seeds(kind, seeds)]
    return found + [Damage(kind, "recipe.yaml", seed) for kind in IN_RECIPE for seed in _seeds(kind, seeds)]


def _seeds(kind: str, seeds: range) -> range:
    """Damages that are always the same are done once."""
    return seeds if kind in ("truncate", "flip", "drop", "exchange", "garbage", "zeros") else range(1)


def changes(damage: Damage, run_dir: Path) -> bool:
    """Whether it changes anything: two equal files can be swapped unseen."""
    *_, other, newest = checkpoints(run_dir)
    swapped = damage.kind in ("swap", "forge-swap") and damage.file != "folders"
    return not swapped or (newest / damage.file).read_bytes() != (other / damage.file).read_bytes()


def apply(damage: Damage, run_dir: Path) -> None:
    """Do it."""
    *_, other, newest = checkpoints(run_dir)
    chance = random.Random(str(damage))
    if damage.file == "folders":
        _exchange(newest, other)
        return
    path = (run_dir if damage.in_journal or damage.in_recipe else newest) / damage.file
    if damage.kind in ("add", "forge-add"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(_harmful(path))
    elif damage.kind in ("swap", "forge-swap"):
        _exchange(path, other / damage.file)
        if damage.kind == "forge-swap":
            _agree(other)
    else:
        _CHANGES[damage.kind](path, chance, damage.seed)
    if damage.kind.startswith("forge"):
        _agree(newest)


def _agree(folder: Path) -> None:
    """Make the manifest agree with what is there."""
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    mark = folder / MARK
    content = mark.read_bytes() if mark.exists() else None
    mark.unlink(missing_ok=True)  # it is none of the manifest's files
    write_manifest(folder, {k: v for k, v in manifest.items() if k not in ("schema", "files", "self")})
    if content is not None:
        mark.write_bytes(content)


def _exchange(one: Path, other: Path) -> None:
    aside = one.with_name("exchanged")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


class _Executed:
    """Touches a file when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.witness,)


def _harmful(path: Path) -> bytes:
    """A pickle for a file of a run folder; once executed, it leaves a witness beside the folder."""
    run_dir = next(folder for folder in path.parents if folder.name == "run")
    return pickle.dumps(_Executed(_witness(run_dir)))


def _witness(run_dir: Path) -> Path:
    return run_dir.absolute().with_name("was-unpickled")


def was_unpickled(run_dir: Path) -> bool:
    """Whether a harmful file of this run has been executed."""
    return _witness(run_dir).exists()


def _truncate(path: Path, chance: random.Random, seed: int) -> None:
    os.truncate(path, chance.randrange(path.stat().st_size))


def _flip(path: Path, chance: random.Random, seed: int) -> None:
    content = bytearray(path.read_bytes())
    # The last line of a journal may be torn: that is no damage. A bit of any other is.
    end = content.rfind(b"\n", 0, len(content) - 1) if path.suffix == ".jsonl" else len(content)
    content[chance.randrange(end)] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def _shape(path: Path, chance: random.Random, seed: int) -> None:
    path.write_bytes(_SHAPES[seed])


def _grow(path: Path, chance: random.Random, seed: int) -> None:
    with path.open("ab") as handle:
        handle.write(b"\0" * 17)


def _folder(path: Path, chance: random.Random, seed: int) -> None:
    path.unlink()
    path.mkdir()


def _link(path: Path, chance: random.Random, seed: int) -> None:
    """A link to nowhere."""
    path.unlink()
    path.symlink_to("nowhere")


_CHANGES: dict[str, Callable[[Path, random.Random, int], object]] = {
    "truncate": _truncate,
    "forge-truncate": _truncate,
    "flip": _flip,
    "shape": _shape,
    "forge": _shape,
    "grow": _grow,
    "folder": _folder,
    "link": _link,
    "empty": lambda path, chance, seed: path.write_bytes(b""),
    "delete": lambda path, chance, seed: path.unlink(),
    "pickled": lambda path, chance, seed: path.write_bytes(_harmful(path)),
    "forge-pickled": lambda path, chance, seed: path.write_bytes(_harmful(path)),
}


def _drop(lines: list[bytes], place: int) -> list[bytes]:
    return lines[:place] + lines[place + 1 :]


def _repeat(lines: list[bytes], place: int) -> list[bytes]:
    return [*lines[: place + 1], *lines[place:]]


def _exchange_lines(lines: list[bytes], place: int) -> list[bytes]:
    return [*lines[:place], lines[place + 1], lines[place], *lines[place + 2 :]]


def _garbage(lines: list[bytes], place: int) -> list[bytes]:
    return [*lines[:place], b"\xff\x00 no record\n", *lines[place + 1 :]]


def _zeros(lines: list[bytes], place: int) -> list[bytes]:
    """What a file system leaves where a block never reached the disk."""
    return [*lines[:place], b"\0" * len(lines[place]), *lines[place + 1 :]]


def _in_lines(change: Callable[[list[bytes], int], list[bytes]]) -> Callable[[Path, random.Random, int], None]:
    def changed(path: Path, chance: random.Random, seed: int) -> None:
        lines = path.read_bytes().splitlines(keepends=True)
        # Not the first, which names the run, nor the last two: what is missing at the end looks like an early death.
        path.write_bytes(b"".join(change(lines, chance.randrange(1, len(lines) - 2))))

    return changed


_CHANGES |= {
    "drop": _in_lines(_drop),
    "repeat": _in_lines(_repeat),
    "exchange": _in_lines(_exchange_lines),
    "garbage": _in_lines(_garbage),
    "zeros": _in_lines(_zeros),
}
