"""``finitune bench``: planted faults and healthy runs, scored."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finitune.cli.render import Block, Heading, Para, Raw, Table
from finitune.cli.session import Outcome
from finitune.core.errors import Exit
from finitune.core.messages.catalogue import text

if TYPE_CHECKING:
    from finitune.bench.cases import Case

_MANY = "all"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("bench", help="cli.bench.help")(bench)


def bench(  # noqa: PLR0913, PLR0917 (the options are the interface)
    only: Annotated[
        list[str] | None, typer.Option("--filter", metavar="PATTERN", help=text("bench.help.filter"))
    ] = None,
    seeds: Annotated[str, typer.Option("--seeds", metavar="N|A:B|A,B", help=text("bench.help.seeds"))] = "5",
    jobs: Annotated[int, typer.Option("--jobs", metavar="N", help=text("bench.help.jobs"))] = 1,
    contender: Annotated[
        list[str] | None, typer.Option("--contender", metavar="NAME", help=text("bench.help.contender"))
    ] = None,
    other_seeds: Annotated[
        str | None, typer.Option("--other-seeds", metavar="N|A:B|A,B", help=text("bench.help.other_seeds"))
    ] = None,
    heavy: Annotated[bool, typer.Option("--heavy", help=text("bench.help.heavy"))] = False,
    quick: Annotated[bool, typer.Option("--quick", help=text("bench.help.quick"))] = False,
    tell: Annotated[bool, typer.Option("--tell", help=text("bench.help.tell"))] = False,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help=text("bench.help.out"))] = Path("faultbench"),
    listed: Annotated[bool, typer.Option("--list", help=text("bench.help.list"))] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help=text("bench.help.fresh"))] = False,
) -> Outcome:
    """Run what is asked for, and tell the score."""
    if listed:
        return _list()
    cases = _cases(only or (), (seeds, other_seeds), contender or (), jobs, heavy=heavy, quick=quick)
    switches = [f"--other-seeds {other_seeds}"] if other_seeds is not None else []
    switches += [name for name, on in (("--heavy", heavy), ("--quick", quick)) if on]
    command = _command(only or (), seeds, contender or (), switches)
    return _run(cases, out, jobs, command, fresh=fresh, tell=tell)


def _cases(
    only: Sequence[str],
    seeds: tuple[str, str | None],
    contenders: Sequence[str],
    jobs: int,
    *,
    heavy: bool,
    quick: bool,
) -> list[Case]:
    """What is to be run. Raises UsageFault-like errors for anything that makes no sense."""
    from finitune.bench.cases import OURS, cases
    from finitune.core.registry import names

    known = names("contenders")
    chosen = known if _MANY in contenders else tuple(contenders) or (OURS,)
    wrong = [text("bench.unknown_contender", given=n, known=", ".join(known)) for n in chosen if n not in known]
    numbers, others = _seeds(seeds[0]), _seeds(seeds[0] if seeds[1] is None else seeds[1])
    wrong += [text("bench.bad_seeds", given=g) for g, n in zip(seeds, (numbers, others), strict=True) if not n]
    wrong += [text("bench.too_few", given=jobs)] if jobs < 1 else []
    if wrong:
        raise _usage("; ".join(wrong))
    found = cases(numbers, only, chosen, heavy=heavy, quick=quick, others=others)
    if not found:
        raise _usage(text("bench.quiet", filters=", ".join(only)))
    return found


def _usage(problem: str) -> Exception:
    from finitune.cli.codes import BAD_USAGE
    from finitune.core.errors import UserError

    return UserError(BAD_USAGE, problem=problem, command="finitune bench")


def _seeds(given: str) -> list[int]:
    """The seeds that are meant; empty where the text makes no sense."""
    low, colon, high = given.partition(":")
    parts = [low, high] if colon else given.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        return []
    numbers = [int(part) for part in parts]
    if colon:
        return list(range(*numbers))
    return list(range(numbers[0])) if len(numbers) == 1 else sorted(set(numbers))


def _command(only: Sequence[str], seeds: str, contenders: Sequence[str], switches: Sequence[str]) -> str:
    words = ["finitune bench", f"--seeds {seeds}"]
    words += [f"--filter '{pattern}'" for pattern in only] + [f"--contender {name}" for name in contenders]
    return " ".join([*words, *switches])


def _run(cases: Sequence[Case], out: Path, jobs: int, command: str, *, fresh: bool, tell: bool) -> Outcome:
    from finitune.bench.bench import bench as run_bench

    try:
        benched = run_bench(cases, out, jobs, command, _told, fresh=fresh)
    except OSError as error:
        raise _usage(text("bench.no_folder", path=out, reason=error.strerror or error)) from error
    score = benched.score
    blocks: list[Block] = [Raw(line) for record in benched.records for line in _incidents(record)] if tell else []
    blocks += [block for name, side in score["contenders"].items() for block in _summary(name, side)]
    blocks += [Para(text("bench.files", files=", ".join(map(str, benched.files))))]
    if score["defects"]:
        blocks.append(Para(text("bench.defects", count=len(score["defects"]), file=benched.files[0])))
    return Outcome(tuple(blocks), score, Exit.GOOD if _is_sound(score) else Exit.FINDINGS)


def _is_sound(score: dict[str, Any]) -> bool:
    """Nothing that may never happen: a defect, a poisoned weight or checkpoint, a touched healthy run.

    A moment that is spoilt from outside is found when moments are looked at next: such steps are told, not judged.
    """
    from finitune.bench.cases import OURS

    ours = score["contenders"].get(OURS, {})
    never = ("poisoned_weight_steps", "poisoned_trusted_checkpoints", "interventions_healthy")
    return not score["defects"] and not any(ours.get(key) for key in never)


def _incidents(record: dict[str, Any]) -> list[str]:
    """What was planted, and the summaries of a case's incidents."""
    lines = [f"{record['key']}: {record.get('says', '')}", ""]
    for incident in record.get("incidents", ()):
        lines += [*incident["summary"], ""]
    return lines


def _told(done: int, count: int, record: dict[str, Any]) -> None:
    """One line a case, on stderr."""
    from finitune.bench.words import line

    print(f"[{done}/{count}] {record['key']}: {line(record)}", file=sys.stderr, flush=True)


def _summary(name: str, side: dict[str, Any]) -> list[Block]:
    from finitune.bench.tables import shown

    steps = side["healthy"]["healthy_steps"]
    heading = text("bench.heading", cases=side["cases"], families=side["families"], steps=steps, contender=name)
    rows = []
    for key in _keys():
        if side[key] is not None:
            interval = side["rates"].get(key, {}).get("interval")
            span = f"{100 * interval[0]:.1f} - {100 * interval[1]:.1f} %" if interval else ""
            rows.append((text(f"bench.key.{key}"), shown(key, side[key]), span))
    head = ("", text("bench.row.measured"), text("bench.row.interval"))
    return [Heading(heading), *([Table(tuple(rows), head)] if rows else []), Raw("")]


def _keys() -> tuple[str, ...]:
    from finitune.bench.score import KEYS

    return KEYS


def _list() -> Outcome:
    """Every member of the bench's families with the first line of its page."""
    from finitune.core.registry import load, names

    blocks: list[Block] = []
    payload: dict[str, Any] = {}
    for family in ("faults", "controls", "runs", "contenders"):
        pages = {name: (load(family, name).__doc__ or "").strip().splitlines()[0] for name in names(family)}
        blocks += [Heading(text(f"bench.list.{family}")), Table(tuple(pages.items())), Raw("")]
        payload[family] = pages
    return Outcome(tuple(blocks), payload)
