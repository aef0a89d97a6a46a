"""``finitune runs [DIR|RUN]``: every run with its state, or one run in full."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finitune.cli.session import Outcome


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("runs", help="cli.runs.help")(runs)


def runs(
    path: Annotated[
        str | None, typer.Argument(metavar="DIR|RUN|latest", help="cli.runs.path", show_default=False)
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="cli.runs.verify")] = False,
    parquet: Annotated[
        Path | None, typer.Option("--parquet", metavar="FILE", help="cli.runs.parquet", show_default=False)
    ] = None,
) -> Outcome:
    """The list, or one run."""
    from finitune.cli.runs_list import list_runs, run_meant
    from finitune.cli.runs_page import show_run

    run_dir = run_meant(path)
    if run_dir is not None:
        return show_run(run_dir, verify=verify, parquet=parquet)
    options = {"--verify": verify, "--parquet": parquet is not None}
    return list_runs(path, refused=[name for name, given in options.items() if given])
