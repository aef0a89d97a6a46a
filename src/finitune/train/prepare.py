"""From a recipe to everything a run is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finitune.core import registry
from finitune.core.errors import UserError, UserErrors, raise_all
from finitune.core.messages.catalogue import text
from finitune.core.types import Finding
from finitune.data.collate import Batch
from finitune.data.dataset import DataConfig, Dataset, load_dataset, split
from finitune.data.loader import Cursor, Loader, LoaderConfig, efficiency
from finitune.engine.monitor import Monitor
from finitune.engine.scaler import LossScaler, ScalerSettings
from finitune.models import precision as precisions
from finitune.models.device import pick_device
from finitune.models.freeze import enable_checkpointing, freeze, trainable_parameters
from finitune.models.lean import lean
from finitune.models.load import Loaded, load
from finitune.models.lora import LoraSettings, attach, load_adapter
from finitune.models.rescale import rescale_residual
from finitune.numerics.determinism import Kernels, ask_cublas
from finitune.numerics.seeds import generators_kept
from finitune.train import memory, optim, plan
from finitune.train.codes_journal import NO_PARQUET
from finitune.train.compute import Compute
from finitune.train.look import look
from finitune.train.recipe import Recipe
from finitune.train.recipe_checks import notes
from finitune.train.recipe_io import resolved_precision
from finitune.train.schedule import SCHEDULES, Shape
from finitune.train.state import RunState
from finitune.train.step import Parts, TrainPort
from finitune.train.trackers_of import missing_packages

# Where products are not fp16 the ranges are for the record: nothing overflows before the gradient norm tells.
_LOOK_EVERY_STEPS = 8


@dataclass(slots=True)
class Prepared:
    """A run, ready to start."""

    recipe: Recipe
    port: TrainPort
    tokenizer: Any
    plan: plan.Plan
    eval_batches: tuple[Batch, ...]
    findings: list[Finding]
    device: torch.device
    precision: str
    data_digest: str
    snapshots: memory.SnapshotPlan


def prepare(recipe: Recipe, checkpoint: Path | None = None, *, looked_at: bool = True) -> Prepared:
    """Build everything. With ``checkpoint`` the weights come from there (moments and state are loaded later).

    ``looked_at`` False leaves out the look at weights and gradients (train/look.py): for a model that is not trained.

    Raises UserError or UserErrors for whatever the user can mend: model, data, precision, LoRA targets.
    """
    if recipe.guard.deterministic:
        ask_cublas()  # before anything touches the device
    raise_all([*missing_packages(recipe.report_to), *_no_table(recipe)])
    device = pick_device(recipe.device)
    choice = precisions.choose(resolved_precision(recipe), device)
    loaded = load_model(recipe, choice.precision, device, checkpoint)
    compute = Compute(choice.precision, device)
    model = make_trainable(recipe, loaded, compute, checkpoint)
    actual = precisions.assert_actual(model, choice.precision, device)
    train_set, eval_set = _load_data(recipe, loaded)
    loader = _loader(recipe, loaded.tokenizer, train_set)
    total_steps = count_steps(recipe, loader)
    state = RunState(scaler=LossScaler(scaler_settings(recipe)) if choice.precision.uses_scaler else None)
    port = TrainPort(parts_of(recipe, loaded, model, loader, compute, total_steps), state)
    snapshots = memory.plan_snapshots(recipe, port)
    planned = _plan(recipe, port, loaded, train_set, eval_set, choice, actual, total_steps, snapshots)
    findings = [*notes(recipe), *choice.findings, *loaded.report.findings, *train_set.findings]
    findings += [*memory.shortage(recipe, planned), *memory.finding(recipe, snapshots)]
    findings += look(port) if looked_at else ()
    return Prepared(
        recipe,
        port,
        loaded.tokenizer,
        planned,
        _eval_batches(recipe, loaded.tokenizer, eval_set),
        findings,
        device,
        choice.precision.name,
        train_set.digest,
        snapshots,
    )


def _no_table(recipe: Recipe) -> list[UserError]:
    """The package for the journal's table is looked for before training, not after it."""
    if not recipe.journal_parquet or find_spec("pyarrow") is not None:
        return []
    return [UserError(NO_PARQUET, "journal_parquet", path="steps.parquet", package="pyarrow")]


def load_model(recipe: Recipe, precision: Any, device: torch.device, checkpoint: Path | None) -> Loaded:
    """The model that training begins from: the recipe's, or for full fine-tuning the checkpoint's."""
    full = recipe.lora is None and checkpoint is not None
    return load(
        str(checkpoint) if full else recipe.model.name_or_path,
        dtype=precision.weights,
        device=str(device),
        attn_implementation=recipe.model.attn_implementation,
        random_init=recipe.model.random_init and not full,
        seed=recipe.seed,
        chat_template=recipe.model.chat_template,
    )


def make_trainable(recipe: Recipe, loaded: Loaded, compute: Compute, checkpoint: Path | None) -> nn.Module:
    """Attach adapters or freeze by pattern, take the leaner layers, and switch checkpointing on."""
    model: nn.Module = loaded.model
    if recipe.model.residual_scale != 1.0 and (checkpoint is None or recipe.lora is not None):
        rescale_residual(model, loaded.family, recipe.model.residual_scale)
    if recipe.lora is not None:
        given = recipe.lora
        settings = LoraSettings(
            r=given.r,
            alpha=given.lora_alpha,
            dropout=given.lora_dropout,
            targets=given.target_modules if isinstance(given.target_modules, str) else tuple(given.target_modules),
            use_dora=given.use_dora,
            use_rslora=given.use_rslora,
            modules_to_save=tuple(given.modules_to_save),
            init_seed=recipe.seed,
        )
        model = attach(model, settings, loaded.family)
        if checkpoint is not None:
            load_adapter(model, checkpoint)
    else:
        freeze(model, recipe.freeze)
    lean(model)
    if recipe.gradient_checkpointing:
        enable_checkpointing(model, compute.checkpoint_kwargs())
    return model


def _data_config(recipe: Recipe, loaded: Loaded, limit_rows: int | None) -> DataConfig:
    data = recipe.data
    return DataConfig(
        format=data.format,
        max_length=data.max_length,
        truncation=data.truncation,
        on_bad_row=data.on_bad_row,
        system_prompt=data.system_prompt,
        limit_rows=limit_rows,
        vocab_rows=loaded.model.get_input_embeddings().weight.shape[0],
    )


def _load_data(recipe: Recipe, loaded: Loaded) -> tuple[Dataset, Dataset]:
    """Training and held-out rows; the held-out ones come from the same files where none are named."""
    data = recipe.data
    whole = load_dataset(_as_list(data.train), loaded.tokenizer, _data_config(recipe, loaded, data.limit_rows))
    if data.eval is not None:
        config = _data_config(recipe, loaded, data.max_eval_rows)
        return whole, load_dataset(_as_list(data.eval), loaded.tokenizer, config)
    wanted = min(data.max_eval_rows, math.ceil(len(whole) * data.eval_fraction), len(whole) - 1)
    # Copies of one row stay on one side; where all rows are copies there is nothing to hold out.
    divisible = len({row.id.digest for row in whole.rows}) > 1
    return split(whole, eval_rows=wanted, seed=recipe.seed) if wanted > 0 and divisible else (whole, Dataset(()))


def _as_list(paths: str | list[str]) -> list[str]:
    return [paths] if isinstance(paths, str) else list(paths)


def pad_id_of(tokenizer: Any) -> int:
    """Padding never carries loss or attention, so any valid id serves where the tokenizer names none."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)


def _loader(recipe: Recipe, tokenizer: Any, dataset: Dataset) -> Loader:
    return Loader(
        dataset,
        LoaderConfig(
            batch_size=recipe.per_device_train_batch_size,
            accumulation=recipe.gradient_accumulation_steps,
            seed=recipe.seed,
            group_by_length=recipe.group_by_length,
            packing=recipe.data.packing,
            max_length=recipe.data.max_length,
            pad_id=pad_id_of(tokenizer),
        ),
    )


def _eval_batches(recipe: Recipe, tokenizer: Any, dataset: Dataset) -> tuple[Batch, ...]:
    if not len(dataset):
        return ()
    config = LoaderConfig(
        batch_size=recipe.per_device_eval_batch_size,
        accumulation=1,
        seed=0,
        group_by_length=True,
        packing=False,
        max_length=recipe.data.max_length,
        pad_id=pad_id_of(tokenizer),
    )
    loader = Loader(dataset, config)
    return tuple(b for step in range(loader.steps_per_epoch(0)) for b in loader.at(Cursor(0, step)))


def count_steps(recipe: Recipe, loader: Loader) -> int:
    """Steps of the whole run: ``max_steps``, or the epochs (a last fraction of one is rounded up)."""
    if recipe.max_steps > 0:
        return recipe.max_steps
    whole, part = divmod(recipe.num_train_epochs, 1.0)
    steps = sum(loader.steps_per_epoch(epoch) for epoch in range(int(whole)))
    return max(1, steps + math.ceil(part * loader.steps_per_epoch(int(whole)))) if part else max(1, steps)


def warmup_steps(recipe: Recipe, total_steps: int) -> int:
    """``warmup_steps`` where given, else ``warmup_ratio`` of the run, rounded up as transformers does."""
    given = recipe.warmup_steps
    return given if given is not None else math.ceil(recipe.warmup_ratio * total_steps)


def shape_of(recipe: Recipe, total_steps: int) -> Shape:
    """The recipe's course of the learning rate over a run of this length."""
    return Shape(
        total_steps=total_steps,
        warmup_steps=warmup_steps(recipe, total_steps),
        decay_steps=math.ceil(recipe.decay_ratio * total_steps),
        min_ratio=recipe.min_lr_ratio,
    )


def scaler_settings(recipe: Recipe) -> ScalerSettings:
    """The recipe's scaler section."""
    return ScalerSettings(**recipe.scaler.model_dump())


def optim_settings(recipe: Recipe) -> optim.OptimSettings:
    """The recipe's optimizer fields."""
    return optim.OptimSettings(
        name=recipe.optim,
        lr=recipe.learning_rate,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        eps=recipe.adam_epsilon,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
    )


def parts_of(
    recipe: Recipe,
    loaded: Loaded,
    model: nn.Module,
    loader: Loader,
    compute: Compute,
    total_steps: int,
) -> Parts:
    """What a step is made of."""
    precision, device = compute.configured, compute.device
    parameters = tuple(trainable_parameters(model))
    settings = optim_settings(recipe)
    watch = loaded.family.watch(model)
    watched = recipe.guard.enabled and recipe.guard.monitor
    strategy = registry.load("strategies", "single").Strategy(device)
    return Parts(
        model=strategy.prepare(model),
        family=loaded.family,
        objective=registry.load("objectives", recipe.loss.objective),
        parameters=parameters,
        optimizer=optim.build(parameters, settings),
        optim_settings=settings,
        schedule=SCHEDULES[recipe.lr_scheduler_type](shape_of(recipe, total_steps)),
        loader=loader,
        strategy=strategy,
        context=compute,
        monitor=Monitor([*loaded.family.layers(model), *watch], watch) if watched else None,
        look_every_steps=1 if precision.products == torch.float16 else _LOOK_EVERY_STEPS,
        additive_mask=recipe.model.attn_implementation == "eager",
        seed=recipe.seed,
        chunk_tokens=recipe.loss.chunk_tokens,
        probe_every_steps=recipe.guard.state_check_steps if recipe.guard.enabled else 0,
        kernels=Kernels(wanted=recipe.guard.deterministic),
        origin=lambda name: original_tensor(recipe, precision, name),
    )


def original_tensor(recipe: Recipe, precision: Any, name: str) -> torch.Tensor | None:
    """A weight or buffer as it was before training, on the CPU: the model is built again, which gives the same bits.

    None where it has no such tensor, or its files are gone, or there is no memory for a second model.
    """
    cpu = torch.device("cpu")
    compute = Compute(precision, cpu)
    try:
        with generators_kept():
            model = make_trainable(recipe, load_model(recipe, precision, cpu, None), compute, None)
    except (UserError, UserErrors, OSError, MemoryError, RuntimeError):
        return None
    named = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    return named[name].detach().clone() if name in named else None


def workload(recipe: Recipe, port: TrainPort, loaded: Loaded) -> plan.Workload:
    """Sizes of the model and of an average micro-batch, for the estimates."""
    model, config = loaded.model, loaded.model.config
    loader = port.parts.loader
    epoch = efficiency(loader)
    num_micros = sum(len(step) for step in loader.plan(0))
    body = sum(p.numel() for _, layer in loaded.family.layers(model) for p in layer.parameters())
    return plan.Workload(
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_trainable=sum(p.numel() for _, p in port.parts.parameters),
        num_body=body,
        num_head=sum(p.numel() for p in loaded.family.head(model).parameters()),
        hidden=config.hidden_size,
        mlp=getattr(config, "intermediate_size", 4 * config.hidden_size),
        layers=config.num_hidden_layers,
        vocabulary=config.vocab_size,
        micro_tokens=epoch.num_computed / num_micros,
        micro_supervised=epoch.num_supervised / num_micros,
        accumulation=recipe.gradient_accumulation_steps,
        chunk_tokens=recipe.loss.chunk_tokens,
        weight_bytes=next(model.parameters()).element_size(),
        checkpointing=recipe.gradient_checkpointing,
    )


def _plan(
    recipe: Recipe,
    port: TrainPort,
    loaded: Loaded,
    train_set: Dataset,
    eval_set: Dataset,
    choice: Any,
    actual: dict[str, Any],
    total_steps: int,
    snapshots: memory.SnapshotPlan,
) -> plan.Plan:
    work = workload(recipe, port, loaded)
    device = port.parts.strategy.device
    derived = [
        plan.Derived("model", f"{loaded.source}", text("train.why_model", report=loaded.report.summary())),
        plan.Derived("device", str(device), text("train.why_device", threads=torch.get_num_threads())),
        plan.Derived("precision", choice.precision.name, choice.reason),
        plan.Derived(
            "trainable",
            f"{work.num_trainable:,}",
            text("train.why_trainable", share=100 * work.num_trainable / work.num_parameters),
        ),
        plan.Derived(
            "data",
            text("train.rows", rows=len(train_set), held=len(eval_set)),
            text("train.why_data", tokens=int(train_set.lengths.sum()), bad=sum(train_set.counts.values())),
        ),
        plan.Derived(
            "batch",
            f"{recipe.per_device_train_batch_size} x {recipe.gradient_accumulation_steps}",
            text("train.why_batch", tokens=round(work.micro_tokens), supervised=round(work.micro_supervised)),
        ),
        plan.Derived("steps", str(total_steps), _why_steps(recipe)),
        plan.Derived(
            "schedule",
            recipe.lr_scheduler_type,
            text("train.why_schedule", lr=recipe.learning_rate, warmup=warmup_steps(recipe, total_steps)),
        ),
        plan.Derived("repeatable", *port.parts.kernels.promise(device)),
        memory.derived(snapshots),
    ]
    step_s = plan.estimate_step_s(device, work)
    return plan.Plan(
        tuple(derived), total_steps, step_s, plan.memory_bytes(work), plan.available_bytes(device), {"actual": actual}
    )


def _why_steps(recipe: Recipe) -> str:
    if recipe.max_steps > 0:
        return text("train.why_max_steps")
    return text("train.why_epochs", epochs=recipe.num_train_epochs)
