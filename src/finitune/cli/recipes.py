"""``finitune recipes list | show | copy``: the shipped recipes, and what a recipe may hold."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finitune.cli.codes import CANNOT_WRITE, COPY_EXISTS
from finitune.cli.render import Raw, Table
from finitune.cli.session import Answered, Outcome
from finitune.core.errors import Exit, UserError


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(rich_markup_mode=None)
    group.callback(invoke_without_command=True)(_group)
    group.command("list", help="cli.recipes.list")(list_recipes)
    group.command("show", help="cli.recipes.show")(show_recipe)
    group.command("copy", help="cli.recipes.copy")(copy_recipe)
    app.add_typer(group, name="recipes", help="cli.recipes.help")


def _group(ctx: typer.Context) -> None:
    if ctx.invoked_subcommand is None:
        outcome = list_recipes()
        raise Answered(outcome)


def list_recipes() -> Outcome:
    """Names and first comment lines."""
    from finitune.train.recipe_io import shipped, shipped_text

    found = [(name, about(shipped_text(name))) for name in shipped()]
    return Outcome((Table(tuple(found)),), {"recipes": [{"name": n, "about": a} for n, a in found]})


def about(content: str) -> str:
    """The comment that a recipe begins with, as one line."""
    lines = []
    for line in content.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return " ".join(lines)


def show_recipe(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="cli.recipes.name", show_default=False)] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="cli.recipes.overrides", show_default=False)
    ] = None,
    fields: Annotated[bool, typer.Option("--fields", help="cli.recipes.fields")] = False,
    resolved: Annotated[bool, typer.Option("--resolved", help="cli.recipes.resolved")] = False,
) -> Outcome:
    """The text of a recipe, its resolved form, or the table of all fields."""
    if fields:
        return _fields()
    from finitune.train.recipe_io import DEFAULT, load_recipe, shipped, shipped_text, to_yaml

    recipe = load_recipe(name, overrides or ())
    as_written = not (resolved or overrides) and (name or DEFAULT) in shipped()
    content = shipped_text(name or DEFAULT) if as_written else to_yaml(recipe)
    return Outcome((Raw(content.rstrip("\n")),), {"name": name or DEFAULT, "recipe": recipe.model_dump(mode="json")})


def _fields() -> Outcome:
    from finitune.train.recipe_io import describe_fields
    from finitune.train.recipe_words import shown

    docs = describe_fields()
    rows = tuple((doc.path, doc.type, shown(doc.default), doc.description) for doc in docs)
    payload = [{"key": d.path, "type": d.type, "default": d.default, "description": d.description} for d in docs]
    return Outcome((Table(rows),), {"fields": payload})


def copy_recipe(
    name: Annotated[str, typer.Argument(metavar="NAME", help="cli.recipes.name")],
    dest: Annotated[Path | None, typer.Argument(metavar="DEST", help="cli.recipes.dest", show_default=False)] = None,
    force: Annotated[bool, typer.Option("--force", help="cli.recipes.force")] = False,
) -> Outcome:
    """Write a shipped recipe to a file of the user's. Raises UserError rather than overwrite."""
    from finitune.core.files import write_atomic
    from finitune.core.messages.catalogue import text
    from finitune.train.recipe_io import shipped_text

    content = shipped_text(name)
    path = dest or Path(f"{name}.yaml")
    try:
        if path.is_dir():
            path = path / f"{name}.yaml"
        if path.exists() and not force:
            raise UserError(COPY_EXISTS, str(path), path=str(path), name=name)
        write_atomic(path, content.encode())
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UserError(CANNOT_WRITE, str(path), path=str(path), problem=str(error)) from error
    message = text("cli.recipes.copied", path=path)
    return Outcome((Raw(message),), {"name": name, "path": str(path)}, Exit.GOOD)
