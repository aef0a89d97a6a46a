"""``finitune export RUN_OR_ADAPTER OUT``: one transformers folder, adapters merged into the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from finitune.cli.codes import OUTPUT_HOLDS_FILES, OUTPUT_UNSUITABLE
from finitune.cli.places import model_of
from finitune.cli.render import Raw
from finitune.cli.session import Outcome
from finitune.core.errors import UserError
from finitune.core.messages.catalogue import text


class Layout(str, Enum):
    """Names of the tensors in the written files."""

    HF = "hf"
    INTERNLM2 = "internlm2"


class Dtype(str, Enum):
    """Number format of the written weights."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("export", help="cli.export.help")(export)


def export(
    source: Annotated[str, typer.Argument(metavar="RUN_OR_ADAPTER", help="cli.export.source")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="cli.export.out")],
    layout: Annotated[Layout, typer.Option(help="cli.export.layout")] = Layout.HF,
    dtype: Annotated[Dtype, typer.Option(help="cli.export.dtype")] = Dtype.FP32,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="cli.export.overwrite")] = False,
) -> Outcome:
    """Merge and write."""
    path = model_of(source)
    check_output(Path(path), out, overwrite=overwrite)
    record = _export(path, out, layout, dtype)
    return Outcome((Raw(text("cli.export.done", path=out)),), record)


def check_output(source: Path, out: Path, *, overwrite: bool) -> None:
    """Refuse what would destroy something. Raises UserError.

    Even with ``overwrite`` the source, what holds it, and a folder that is no model are never replaced.
    """
    with _os_errors(out):
        resolved, origin = out.resolve(), source.resolve()
        if origin == resolved or resolved in origin.parents:
            raise UserError(OUTPUT_UNSUITABLE, str(out), path=str(out), problem=text("cli.export.holds_source"))
        if out.exists() and not out.is_dir():
            raise UserError(OUTPUT_UNSUITABLE, str(out), path=str(out), problem=text("cli.export.is_file"))
        held = sorted(p.name for p in out.iterdir()) if out.exists() else []
    if held and not overwrite:
        raise UserError(OUTPUT_HOLDS_FILES, str(out), path=str(out), count=len(held))
    if held and "config.json" not in held and "adapter_config.json" not in held:
        raise UserError(OUTPUT_UNSUITABLE, str(out), path=str(out), problem=text("cli.export.no_model_there"))


@contextmanager
def _os_errors(out: Path) -> Iterator[None]:
    """A full disk or a read-only folder is the user's to mend."""
    try:
        yield
    except OSError as error:
        raise UserError(OUTPUT_UNSUITABLE, str(out), path=str(out), problem=str(error)) from error


def _export(path: str, out: Path, layout: Layout, dtype: Dtype) -> dict[str, Any]:
    import torch

    from finitune.models.opening import load_any
    from finitune.models.save import merge, save_model

    kinds = {Dtype.FP32: torch.float32, Dtype.BF16: torch.bfloat16, Dtype.FP16: torch.float16}
    loaded = load_any(path)
    model = merge(loaded.model).to(kinds[dtype])
    with _os_errors(out):
        save_model(model, loaded.tokenizer, out, family=loaded.family, layout=layout.value)
    num_parameters = sum(p.numel() for p in model.parameters())
    return {"path": str(out), "layout": layout.value, "dtype": dtype.value, "num_parameters": num_parameters}
