"""``finitune version``: which FiniTune, on which Python, with which libraries; loads none of them."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed

import typer

from finitune import __version__
from finitune.cli.render import Table
from finitune.cli.session import Outcome

LIBRARIES = ("torch", "transformers", "peft", "safetensors", "numpy")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("version", help="cli.version.help")(version)


def version() -> Outcome:
    """Versions, from the metadata of the installed packages."""
    found = versions()
    return Outcome((Table(tuple((k, v or "-") for k, v in found.items())),), {"versions": found})


def versions() -> dict[str, str | None]:
    """Version by name; None for what is not installed."""
    return {"finitune": __version__, "python": platform.python_version(), **{n: _installed(n) for n in LIBRARIES}}


def _installed(name: str) -> str | None:
    try:
        return installed(name)
    except PackageNotFoundError:
        return None
