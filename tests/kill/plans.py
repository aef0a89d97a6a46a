"""Which trials are done: a slice of every kind by default, the whole matrix with FINITUNE_KILL=all."""

from __future__ import annotations

import itertools
import os
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from kill import damage
from kill.bench import Bench
from kill.client import Server
from kill.configurations import CONFIGURATIONS
from kill.machine import CALLS
from kill.points import STEPS, Place
from kill.trials import Trial

_EXTENT = os.environ.get("FINITUNE_KILL", "")
FULL = bool(_EXTENT)
SHARE = float(_EXTENT) if _EXTENT not in ("", "all") else 1.0
"""Of the whole matrix."""
SEED = int(os.environ.get("FINITUNE_KILL_SEED", "1"))
EVERY_PLACE = "full fp32"
"""Killed at all places in every manner; the others at one place of every kind, in one manner."""
_RANDOM = 50 if FULL else 1
_CHAINS = 30 if FULL else 1
_STOPS = 15
_SIGKILL = 9
KIND_PLACE, KIND_RESUME = "killed at a place", "killed while resuming"
KIND_CHAIN, KIND_RANDOM = "killed three times in a row", "killed at a random moment"
KIND_STOP, KIND_TWICE = "asked to stop", "asked to stop twice"
KIND_DISK, KIND_DISK_RESUME, KIND_LIMIT = "failing disk", "failing disk while resuming", "file size limit"
KIND_UNREADABLE = "unreadable file"
KIND_CALL, KIND_CALL_FAILS, KIND_SMALL = "killed at a system call", "failing system call", "full disk"


def chance_of(bench: Bench, kind: str) -> random.Random:
    """Random choices of one kind for one configuration."""
    return random.Random(f"{SEED} {bench.configuration} {kind}")


def thinned(trials: Iterable[Trial]) -> list[Trial]:
    """The share that is asked for, chosen at random."""
    chance = random.Random(SEED)
    return [trial for trial in trials if chance.random() < SHARE]


def _number_of(bench: Bench) -> int:
    return list(CONFIGURATIONS).index(bench.configuration)


def by_kind(places: Iterable[Place]) -> dict[str, list[Place]]:
    """Places in all their manners, alike ones together."""
    found: dict[str, list[Place]] = defaultdict(list)
    for place in places:
        for way in place.manners():
            found[way.kind].append(way)
    return found


def _chosen(bench: Bench, places: list[Place], kind: str, per_slice: int) -> list[Place]:
    """The places of this extent; the slices of the configurations take their operations in turn."""
    kinds, chance = by_kind(places), chance_of(bench, kind)
    if FULL and bench.configuration == EVERY_PLACE:
        return [way for ways in kinds.values() for way in (ways if kind == KIND_PLACE else [chance.choice(ways)])]
    if FULL:
        alike: dict[str, list[Place]] = defaultdict(list)
        for ways in kinds.values():
            alike[replace(ways[0], manner="").kind].extend(ways)
        return [chance.choice(ways) for ways in alike.values()]
    operations: dict[str, list[Place]] = defaultdict(list)
    for ways in kinds.values():
        operations[f"{ways[0].operation}/{ways[0].manner}"].append(chance.choice(ways))
    turn = itertools.cycle(sorted(operations))
    here = itertools.islice(turn, _number_of(bench) * per_slice, (_number_of(bench) + 1) * per_slice)
    return [chance.choice(operations[name]) for name in here]


def deaths_at_places(bench: Bench) -> list[Trial]:
    """Killed at places of a new run."""
    chosen = _chosen(bench, bench.places, KIND_PLACE, 2)
    return [Trial(bench.configuration, KIND_PLACE, (f"at {place}",)) for place in chosen]


def deaths_while_resuming(bench: Bench) -> list[Trial]:
    """A run that has died is killed again while it resumes."""
    chosen = _chosen(bench, bench.resume_places, KIND_RESUME, 1)
    return [Trial(bench.configuration, KIND_RESUME, (f"at {place}",), "early") for place in chosen]


def chains(bench: Bench) -> Iterator[Trial]:
    """Three deaths in a row, each in the process that was to mend the one before."""
    chance = chance_of(bench, KIND_CHAIN)
    # What comes late in one resume may not come at all in the next.
    new, resumed = by_kind(bench.places), by_kind(bench.resume_places[: len(bench.resume_places) // 2])
    for _ in range(_CHAINS):
        deaths = [chance.choice(new[chance.choice(list(new))])]
        deaths += [chance.choice(resumed[chance.choice(list(resumed))]) for _ in range(2)]
        yield Trial(bench.configuration, KIND_CHAIN, tuple(f"at {place}" for place in deaths))


def random_deaths(bench: Bench) -> Iterator[Trial]:
    """Killed from outside, at any time of the run; sometimes the resume as well."""
    chance = chance_of(bench, KIND_RANDOM)
    for number in range(_RANDOM):
        times = 1 + number % 3
        deaths = tuple(f"signal {_SIGKILL} after {chance.uniform(0, bench.length_s):.4f}" for _ in range(times))
        yield Trial(bench.configuration, KIND_RANDOM, deaths)


def stops(bench: Bench) -> Iterator[Trial]:
    """SIGINT and SIGTERM at any place of training, once and twice."""
    chance, manners = chance_of(bench, KIND_STOP), itertools.cycle(("int", "term", "twice"))
    began = next(n for n, place in enumerate(bench.places) if place.operation == STEPS)
    for manner in itertools.islice(manners, _STOPS) if FULL else ("int", "term", "twice")[_number_of(bench) :][:1]:
        place = replace(chance.choice(bench.places[began:]), manner=manner)
        yield Trial(bench.configuration, KIND_TWICE if manner == "twice" else KIND_STOP, (f"at {place}",))


# What of a run fails, and by which operations.
_TARGETS: dict[str, tuple[str, ...]] = {
    r"^\.checkpoint-": ("open", "write", "fsync", "rename", "mkdir", "rust"),
    r"checkpoint-\d+($|/)": ("remove", "rmdir", "rename", "fsync"),
    r"trusted": ("open", "write", "fsync", "rename"),
    r"^\.final": ("open", "write", "fsync", "rename", "mkdir", "rust"),
    r"^journal": ("open", "write", "fsync"),
    r"recipe": ("open", "write", "fsync", "rename"),
    r"summary": ("open", "write", "fsync", "rename"),
    r"": ("open", "write", "fsync", "rename", "mkdir", "rust", "remove"),
}
_SELDOM = (r"trusted", r"^\.final", r"recipe", r"summary")
"""Met a few times only in a run."""
_ERRORS: dict[str, tuple[str, ...]] = {
    "open": ("ENOSPC", "EROFS", "EACCES"),
    "write": ("ENOSPC", "EIO", "EDQUOT", "SHORT"),
    "fsync": ("EIO", "ENOSPC"),
    "rename": ("EIO", "EROFS"),
    "mkdir": ("ENOSPC", "EROFS"),
    "rust": ("ENOSPC", "EIO"),
    "remove": ("EIO", "EROFS"),
    "rmdir": ("EIO",),
}


def _faults() -> list[dict[str, Any]]:
    """Every kind of fault, without its place in time."""
    return [
        {"operations": (operation,), "error": error, "match": match}
        for match, operations in _TARGETS.items()
        for operation in operations
        for error in _ERRORS[operation]
    ]


def disk_faults(bench: Bench) -> Iterator[Trial]:
    """Refusals and short writes: once, for a while, for ever; in a new run and in a resumed one."""
    chance, faults = chance_of(bench, KIND_DISK), _faults()
    if not FULL:
        faults = chance.sample(faults, 1)
    for number, fault in enumerate(faults):
        counts = (1, 6, None) if FULL and bench.configuration == EVERY_PLACE else (chance.choice((1, 6, None)),)
        for count in counts:
            seldom = count is None or fault["match"] in _SELDOM
            first = 1 if seldom else chance.choice((1, 1, 2, 3, 8, 20))
            whole = {**fault, "first": first, "count": count}
            resumed = number % 3 == 2
            kind = KIND_DISK_RESUME if resumed else KIND_DISK
            yield Trial(bench.configuration, kind, template="early" if resumed else "", faults=(whole,))


def size_limits(bench: Bench) -> Iterator[Trial]:
    """No file may grow: EFBIG from the system itself, also where Rust writes. For a while, and to the end."""
    limits = [(n, until) for n in (1_000, 6_000, 20_000, 60_000, 150_000) for until in (7, None)]
    for num_bytes, until in limits if FULL else limits[_number_of(bench) * 2 + 1 :][:1]:
        limit = {"num_bytes": num_bytes, "until_step": until}
        yield Trial(bench.configuration, KIND_LIMIT, file_limit=limit)


def unreadable_files(bench: Bench) -> Iterator[Trial]:
    """Files of the newest checkpoint that cannot be opened while resuming."""
    names = ("manifest.json", "state.json", "tokenizer.json", "optimizer.safetensors")
    if "save_total_limit=1" in CONFIGURATIONS[bench.configuration]:
        return  # there is nothing to fall back on
    for name in names if FULL else names[_number_of(bench) :][:1]:
        fault = {"operations": ("read",), "error": "EIO", "match": f"checkpoint-9/{name}", "count": None}
        yield Trial(bench.configuration, KIND_UNREADABLE, template="late", faults=(fault,))


def system_calls(bench: Bench, counts: dict[str, int]) -> Iterator[Trial]:
    """Killed by the tracer at the n-th call of one kind of the process, also inside writers in Rust; or it fails."""
    chance = chance_of(bench, KIND_CALL)
    possible = [name for name in CALLS if counts.get(name)]
    for name in possible * 3 if FULL else chance.sample(possible, 1):
        when = chance.randint(1, counts[name])
        yield Trial(bench.configuration, KIND_CALL, trace=f"inject={name}:signal=SIGKILL:when={when}")
    for name in ("fsync", "rename", "mkdir") * 3 if FULL else ("fsync",):
        error, when = chance.choice(_ERRORS[name]), chance.randint(1, counts[name])
        yield Trial(bench.configuration, KIND_CALL_FAILS, trace=f"inject={name}:error={error}:when={when}..{when + 4}")


def small_disks(bench: Bench) -> Iterator[Trial]:
    """A disk that is full in earnest."""
    sizes = ("100k", "200k", "400k", "600k", "800k", "1200k")
    for size in sizes if FULL else (chance_of(bench, KIND_SMALL).choice(sizes),):
        yield Trial(bench.configuration, KIND_SMALL, disk=size)


DAMAGED = ("full fp32", "LoRA fp16 scaled packed, 3 micro-batches")
"""The others keep too few checkpoints to have one to fall back on after two are damaged."""


def damages(bench: Bench, server: Server) -> list[Trial]:
    """Every damage to every file of the newest checkpoint, to the journal and to the recipe."""
    template = bench.template(server, "late") / "run"
    found = [d for d in damage.all_damages(template, range(4 if FULL else 2)) if damage.changes(d, template)]
    if not FULL:
        chance, kinds = chance_of(bench, "damage"), defaultdict(list)
        for what in found:
            kinds[what.kind, what.in_journal, what.in_recipe].append(what)
        half = list(kinds)[DAMAGED.index(bench.configuration) :: 3]
        found = [chance.choice(kinds[kind]) for kind in half]
    return [Trial(bench.configuration, _damage_kind(what), template="late", damage=str(what)) for what in found]


def _damage_kind(what: damage.Damage) -> str:
    where = "journal" if what.in_journal else "recipe" if what.in_recipe else "checkpoint"
    return f"damaged {where}: {what.kind}"
