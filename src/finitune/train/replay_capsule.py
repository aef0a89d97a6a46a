"""A capsule of our own trainer, computed again: model by the recipe in it, batch and state from it, no data set.

A capsule that lies in its run's folder and holds no weights or rows is replayed all the same: the run itself is brought
to the step, by checkpoint and journal.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

import torch

from finitune.core.errors import FiniTuneError, UserError
from finitune.core.messages.catalogue import text
from finitune.core.types import RowId
from finitune.data.collate import IGNORED, Batch
from finitune.data.loader import Cursor, Loader, LoaderConfig
from finitune.engine.capsule import INCIDENTS
from finitune.engine.capsule_read import Capsule, read_capsule
from finitune.engine.capsule_replay import Replayed, experiment_of, impossible, missing_in, replay_on
from finitune.engine.conditions import NotPossible
from finitune.engine.scaler import LossScaler
from finitune.models import precision as precisions
from finitune.models.device import pick_device
from finitune.numerics.determinism import ask_cublas
from finitune.numerics.seeds import generators_kept
from finitune.train import prepare as preparing
from finitune.train.compute import Compute
from finitune.train.folder import JOURNAL_FILE
from finitune.train.model_at import model_at
from finitune.train.recipe import Recipe
from finitune.train.recipe_io import parse_recipe, resolved_precision
from finitune.train.state import RunState
from finitune.train.step import TrainPort

_WIDE_MASK_DIMENSIONS = 4


def replay_capsule(path: str, *, experiment: str | None = None, precision: str | None = None) -> Replayed:
    """Replay the capsule of a recipe's run.

    Args:
        path: its folder, that of the incident, or a .tar.
        experiment: name of an experiment to make as well.
        precision: "fp32" or "bf16": compute the step in it as well.

    Raises UserError: SYS410 to SYS414 for what is no sound capsule, SYS416 for an unknown experiment. Whatever else is
    missing (model, device, rows) is a verdict.
    """
    if experiment is not None:
        experiment_of(experiment)
    capsule = read_capsule(path)
    try:
        port = port_of(capsule)
    except NotPossible as reason:
        return impossible(str(reason))
    try:
        with port.parts.kernels:
            return replay_on(port, capsule, experiment=experiment, precision=precision)
    finally:
        if port.parts.monitor is not None:
            port.parts.monitor.close()


def port_of(capsule: Capsule) -> TrainPort:
    """A port that computes the capsule's batch. Raises NotPossible, with what is missing here."""
    lacking = missing_in(capsule)
    if capsule.recipe is None:
        raise NotPossible(text("incidents.no_recipe"))
    try:
        if lacking is not None:
            return _port_of_run(capsule, lacking)
        with generators_kept():
            return _build(capsule, parse_recipe(capsule.recipe, "recipe.yaml"))
    except FiniTuneError as error:
        raise NotPossible(text("incidents.no_model", reason=" ".join(str(error).split())[:400])) from error
    except (OSError, RuntimeError, MemoryError) as error:
        raise NotPossible(text("incidents.no_model", reason=f"{type(error).__name__}: {str(error)[:300]}")) from error


def _port_of_run(capsule: Capsule, lacking: str) -> TrainPort:
    """The run that the capsule lies in, brought to the step. Raises NotPossible where it lies in none."""
    folder = Path(capsule.path).expanduser().resolve()
    homes = [p.parent for p in folder.parents if p.name == INCIDENTS and (p.parent / JOURNAL_FILE).is_file()]
    if not homes:
        raise NotPossible(lacking)
    return model_at(str(homes[0]), capsule.step - 1).prepared.port


def _build(capsule: Capsule, recipe: Recipe) -> TrainPort:
    """Model, optimizer and state of the recipe, on this machine. Raises UserError, UserErrors, NotPossible."""
    if recipe.guard.deterministic:
        ask_cublas()
    device = _device(recipe)
    choice = precisions.choose(resolved_precision(recipe), device)
    loaded = preparing.load_model(recipe, choice.precision, device, None)
    compute = Compute(choice.precision, device)
    model = preparing.make_trainable(recipe, loaded, compute, None)
    loader = cast("Loader", CapsuleLoader(capsule, preparing.pad_id_of(loaded.tokenizer)))
    state = RunState(scaler=LossScaler(preparing.scaler_settings(recipe)) if choice.precision.uses_scaler else None)
    parts = preparing.parts_of(recipe, loaded, model, loader, compute, max(1, recipe.max_steps))
    return TrainPort(parts, state)


def _device(recipe: Recipe) -> torch.device:
    """The recipe's device, or the best of this machine."""
    try:
        return pick_device(recipe.device)
    except UserError:
        return pick_device("auto")


class CapsuleLoader:
    """The one step that a capsule holds, in the place of a loader."""

    def __init__(self, capsule: Capsule, pad_id: int) -> None:
        """Raises NotPossible where the batch is not one of this trainer."""
        self.config = LoaderConfig(pad_id=pad_id)
        try:
            self._cursor = Cursor.from_json(capsule.record["cursor"])
            self._layout = _layout(capsule)
            self._batches = tuple(_batch(m, rows) for m, rows in zip(capsule.micros or (), self._layout, strict=True))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            problem = f"{type(error).__name__}: {str(error)[:200]}"
            raise NotPossible(text("incidents.other_batch", problem=problem)) from error

    def at(self, cursor: Cursor, *, without: Collection[str] = ()) -> tuple[Batch, ...]:
        """The micro-batches; rows in quarantine then are not among them. Raises NotPossible."""
        self._check(cursor, without)
        return self._batches

    def layout(self, cursor: Cursor, *, without: Collection[str] = ()) -> tuple[tuple[tuple[RowId, ...], ...], ...]:
        """Row ids by micro-batch and sequence. Raises NotPossible."""
        self._check(cursor, without)
        return self._layout

    def peek_rows(self, cursor: Cursor, *, without: Collection[str] = ()) -> tuple[RowId, ...]:
        """Row ids in order. Raises NotPossible."""
        return tuple(r for micro in self.layout(cursor, without=without) for rows in micro for r in rows)

    def advance(self, cursor: Cursor) -> Cursor:
        """The place after this step; there is no batch at it."""
        return Cursor(cursor.epoch, cursor.step + 1)

    def _check(self, cursor: Cursor, without: Collection[str]) -> None:
        here = {r.digest for micro in self._layout for rows in micro for r in rows}
        if cursor != self._cursor or here & set(without):
            raise NotPossible(text("incidents.one_batch"))


def _layout(capsule: Capsule) -> tuple[tuple[tuple[RowId, ...], ...], ...]:
    """Rows by micro-batch and place. Raises ValueError where a place is missing or stands twice."""
    micros: dict[int, dict[int, tuple[RowId, ...]]] = {}
    for unit in capsule.units:
        micros.setdefault(unit.micro, {})[unit.index] = unit.rows
    counts = [len(micros[m]) for m in sorted(micros)]
    complete = all(sorted(places) == list(range(len(places))) for places in micros.values())
    if sorted(micros) != list(range(len(micros))) or not complete or sum(counts) != len(capsule.units):
        raise ValueError("the places of its rows are not in order")
    return tuple(tuple(micros[m][b] for b in range(len(micros[m]))) for m in range(len(micros)))


def _batch(micro: Mapping[str, Any], sequences: tuple[tuple[RowId, ...], ...]) -> Batch:
    """A micro-batch as the loader would have made it."""
    ids_BT, labels_BT = micro["ids_BT"], micro["labels_BT"]
    mask, positions = micro.get("attention_mask"), micro.get("position_ids_BT")
    if set(micro) - {"ids_BT", "labels_BT", "attention_mask", "position_ids_BT"}:
        raise ValueError(f"unknown tensors: {sorted(map(str, micro))[:8]}")
    if ids_BT.dim() != 2 or len(ids_BT) != len(sequences) or labels_BT.shape != ids_BT.shape:
        raise ValueError(f"ids {tuple(ids_BT.shape)}, labels {tuple(labels_BT.shape)}, {len(sequences)} rows")
    if mask is not None and mask.dim() == _WIDE_MASK_DIMENSIONS and mask.is_floating_point():
        mask = mask == 0  # eager attention got it as numbers to add: 0 may attend
    rows = tuple(r for row_ids in sequences for r in row_ids)
    num_tokens = ids_BT.numel() if mask is None else int((labels_BT != IGNORED).sum())
    if mask is not None and mask.dim() == 2:
        num_tokens = int(mask.sum())
    elif positions is not None:
        num_tokens = int((positions > 0).sum()) + len(rows)
    return Batch(ids_BT, labels_BT, mask, positions, rows, num_tokens, int((labels_BT != IGNORED).sum()))
