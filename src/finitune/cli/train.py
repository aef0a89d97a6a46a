"""``finitune train [RECIPE] [KEY=VALUE]...``: train, or say what would be trained."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finitune.cli.codes import BAD_USAGE, TWO_RECIPES
from finitune.cli.render import Block, Heading, Raw, Table
from finitune.cli.session import Outcome, Session
from finitune.core.errors import UserError
from finitune.core.messages.catalogue import text
from finitune.core.types import Finding
from finitune.core.units import bytes_text
from finitune.report.words import finding_line

if TYPE_CHECKING:
    from finitune.train.recipe import Recipe

_SHOWN_FINDINGS = 4


def register(app: typer.Typer) -> None:
    """Add the command."""
    # Unknown options become arguments, so that `--learning_rate=1e-4` meets a helpful error.
    app.command("train", help="cli.train.help", context_settings={"ignore_unknown_options": True})(train)


@dataclass(frozen=True, slots=True)
class Request:
    """The arguments of ``train``, sorted."""

    recipe: str | None
    overrides: tuple[str, ...]


def train(
    ctx: typer.Context,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="RECIPE|KEY=VALUE", help="cli.train.arguments", show_default=False),
    ] = None,
    resume: Annotated[str | None, typer.Option("--resume", metavar="RUN|latest", help="cli.train.resume")] = None,
    allow_changes: Annotated[bool, typer.Option("--allow-changes", help="cli.train.allow_changes")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="cli.train.dry_run")] = False,
) -> Outcome:
    """Train a recipe."""
    request = sort_arguments(arguments or ())
    if allow_changes and resume is None:
        problem = text("resume.allow_needs_resume")
        raise UserError(BAD_USAGE, "--allow-changes", problem=problem, command="finitune train")
    recipe = _recipe(request, resume)
    asked = {"resume": resume, "allow_changes": allow_changes}
    return _plan(recipe, asked) if dry_run else _run(recipe, asked, request, ctx.obj)


def sort_arguments(arguments: Sequence[str]) -> Request:
    """The recipe and the overrides. Raises UserError for a second recipe or an unknown option."""
    # os.path, not pathlib: an override may be longer than any file name may be.
    overrides = tuple(a for a in arguments if "=" in a and not os.path.isfile(a))
    names = [a for a in arguments if a not in overrides]
    for name in names:
        if name.startswith("-"):
            raise UserError(BAD_USAGE, name, problem=text("cli.no_such_option", name=name), command="finitune train")
    if len(names) > 1:
        raise UserError(TWO_RECIPES, names[1], first=names[0], second=names[1])
    return Request(names[0] if names else None, overrides)


def _recipe(request: Request, resume: str | None) -> Recipe:
    """The recipe asked for; with ``--resume`` alone, the one stored with the run."""
    if resume is None or request.recipe is not None:
        from finitune.train.recipe_io import load_recipe

        return load_recipe(request.recipe, request.overrides)
    from finitune.train.folder import find_place
    from finitune.train.past import stored_recipe

    return stored_recipe(find_place(resume), request.overrides)


def _run(recipe: Recipe, asked: Mapping[str, Any], request: Request, session: Session) -> Outcome:
    from rich.console import Console

    from finitune.report.live import Live
    from finitune.train.recipe_io import DEFAULT
    from finitune.train.run import train_run

    stem = Path(request.recipe or DEFAULT).stem
    observers = () if session.json else (Live(Console(), logging_steps=recipe.logging_steps),)
    result = train_run(recipe, **asked, observers=observers, name=stem)
    return Outcome((), {"result": result.to_json()}, result.exit_code, _halts(result.halted, result.run_dir))


def _halts(message: str | None, run_dir: str) -> tuple[dict[str, str], ...]:
    """The halt, as the JSON object tells errors; its message begins with its code."""
    return ({"code": message.split()[0], "where": run_dir, "message": message},) if message else ()


def _plan(recipe: Recipe, asked: Mapping[str, Any]) -> Outcome:
    """What is derived from the recipe, and what was found, without training."""
    from finitune.train.run import plan_run

    plan, findings = plan_run(recipe, **asked)
    payload = {"plan": plan_record(plan) if plan else None, "findings": [f.to_json() for f in findings]}
    return Outcome((*(plan_blocks(plan) if plan else ()), *finding_blocks(findings)), payload)


def finding_blocks(findings: Sequence[Finding]) -> tuple[Raw, ...]:
    """One line for each finding; of many with the same code the first few, and how many more there are."""
    by_code: dict[str, list[Finding]] = {}
    for finding in findings:
        by_code.setdefault(finding.code, []).append(finding)
    blocks: list[Raw] = []
    for code, found in by_code.items():
        blocks += [Raw(finding_line(f)) for f in found[:_SHOWN_FINDINGS]]
        if len(found) > _SHOWN_FINDINGS:
            blocks.append(Raw(text("cli.train.more", count=len(found) - _SHOWN_FINDINGS, code=code)))
    return tuple(blocks)


def plan_record(plan: Any) -> dict[str, Any]:
    """A :class:`~finitune.train.plan.Plan` as JSON-able values."""
    return {
        "derived": [{"name": d.name, "value": d.value, "why": d.why} for d in plan.derived],
        "total_steps": plan.total_steps,
        "step_s": plan.step_s,
        "memory_bytes": plan.memory_bytes,
        "available_bytes": plan.available_bytes,
        "facts": dict(plan.facts),
    }


def plan_blocks(plan: Any) -> tuple[Block, ...]:
    """A plan for a reader: each derived setting with its reason, and what the run will cost."""
    rows = tuple((text(f"train.derived.{d.name}"), d.value, d.why) for d in plan.derived)
    estimate = text(
        "train.estimate",
        minutes=f"{plan.step_s * plan.total_steps / 60:.1f}",
        memory=bytes_text(plan.memory_bytes),
        available=bytes_text(plan.available_bytes),
    )
    return (Heading(text("train.plan")), Table(rows), Raw(estimate))
