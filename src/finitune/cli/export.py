"""``finitune export RUN_OR_ADAPTER OUT``: one transformers folder, adapters merged into the weights."""

from __future__ import annotations

import tempfile
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
    step: Annotated[int | None, typer.Option("--step", min=0, metavar="N", help="cli.export.step")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="cli.export.overwrite")] = False,
) -> Outcome:
    """Merge and write."""
    path = source if step is not None else model_of(source)
    check_output(Path(path), out, overwrite=overwrite)
    record = _export(path, out, layout, dtype, step)
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


def _export(path: str, out: Path, layout: Layout, dtype: Dtype, step: int | None) -> dict[str, Any]:
    if step is None:
        return _merged(path, out, layout, dtype)
    with tempfile.TemporaryDirectory() as scratch:
        reached = _save_step(path, step, Path(scratch) / "model")
        return _merged(str(Path(scratch) / "model"), out, layout, dtype) | reached


def _merged(path: str, out: Path, layout: Layout, dtype: Dtype) -> dict[str, Any]:
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


def _save_step(run: str, step: int, folder: Path) -> dict[str, Any]:
    """Write a run's model as it was after ``step`` batches; how that state was reached."""
    from finitune.models.save import save_model
    from finitune.train.model_at import model_at

    found = model_at(run, step)
    parts, arrival = found.prepared.port.parts, found.arrival
    save_model(parts.model, found.prepared.tokenizer, folder, family=parts.family)
    return {"step": step, "base_step": arrival.base_step, "num_redone": arrival.num_redone}
