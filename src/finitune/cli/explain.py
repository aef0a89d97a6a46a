"""``finitune explain CODE``: the page of a code; without a code, all of them."""

from __future__ import annotations

import inspect
from difflib import get_close_matches
from types import ModuleType
from typing import Annotated, Any

import typer

from finitune.bench.casebook import command_of, page_of, path_of
from finitune.cli.codes import UNKNOWN_CODE
from finitune.cli.render import Block, Heading, Para, Raw, Table
from finitune.cli.session import Outcome
from finitune.core import codes as codes_module
from finitune.core.codes import PREFIXES, Code, all_codes, lookup
from finitune.core.errors import UserError
from finitune.core.messages.catalogue import language, text


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("explain", help="cli.explain.help")(explain)


def explain(
    code: Annotated[str | None, typer.Argument(metavar="CODE", help="cli.explain.code", show_default=False)] = None,
) -> Outcome:
    """One page, or the list."""
    return _page(*_find(code)) if code else _list()


def _find(name: str) -> tuple[Code, ModuleType]:
    """The code of that name, in any case, and where it is declared. Raises UserError with close names."""
    wanted = name.strip().upper()
    found = lookup(wanted) if wanted.isalnum() else None
    if found is not None:
        return found
    codes = all_codes()
    if wanted in codes:  # declared by a name that is put together
        return codes[wanted], codes_module
    close = get_close_matches(wanted, codes, n=3, cutoff=0.6)
    hint = text("cli.explain.did_you_mean", names=", ".join(close)) if close else ""
    raise UserError(UNKNOWN_CODE, name, name=name, hint=hint)


def _page(code: Code, module: ModuleType) -> Outcome:
    page = code.text(language())
    is_member = "codes" not in module.__name__.rpartition(".")[2]
    notes = inspect.getdoc(module) if is_member else None
    blocks: list[Block] = [
        Heading(f"{code.code} {page.title}"),
        Para(text(f"cli.severity.{code.severity.value}"), text("cli.explain.severity")),
        Para(text(f"cli.prefix.{code.code[:3]}"), text("cli.explain.group")),
        Para(page.what, text("cli.explain.what")),
    ]
    if page.why:
        blocks.append(Para(page.why, text("cli.explain.why")))
    blocks += [Para(cure, text("cli.explain.try")) for cure in page.cures]
    case = _case(code)
    blocks += [Para(words, text(f"cli.explain.case.{part}")) for part, words in (case or {}).items()]
    if notes:
        blocks += [Raw(""), Raw(notes)]
    return Outcome(tuple(blocks), {"code": {**_record(code), "case": case, "notes": notes}})


def _case(code: Code) -> dict[str, str] | None:
    """The page of the casebook about this code, and the command that acts it out."""
    name = page_of(code.code)
    if name is None:
        return None
    command = command_of(name)
    return {"page": path_of(name), **({"command": command} if command else {})}


def _record(code: Code) -> dict[str, Any]:
    page = code.text(language())
    return {
        "code": code.code,
        "severity": code.severity.value,
        "title": page.title,
        "what": page.what,
        "why": page.why,
        "cures": list(page.cures),
    }


def _list() -> Outcome:
    codes = sorted(all_codes().values(), key=lambda c: (list(PREFIXES).index(c.code[:3]), c.code))
    blocks: list[Block] = []
    for prefix in PREFIXES:
        rows = tuple(
            (c.code, text(f"cli.severity.{c.severity.value}"), c.text(language()).title)
            for c in codes
            if c.code.startswith(prefix)
        )
        if rows:
            blocks += [Heading(f"{prefix}: {text(f'cli.prefix.{prefix}')}"), Table(rows), Raw("")]
    return Outcome(tuple(blocks), {"codes": [_record(c) for c in codes]})
