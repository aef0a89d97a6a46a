"""The recipe: everything a run is asked to do, as one typed and frozen value.

Names are those of Hugging Face's ``TrainingArguments`` and ``LoraConfig`` wherever these have one.
An unknown key is an error, every number has bounds, NaN and infinity are refused. Field faults are
pydantic's; contradictions between fields come as :class:`~finitune.core.errors.UserErrors`
(``recipe_checks.py``). ``recipe_io.load_recipe`` turns both into one report.

This module and its companions import without torch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from finitune.train.recipe_checks import check


def _not_bool(value: Any) -> Any:
    """Python counts True as 1; a recipe does not."""
    if isinstance(value, bool):
        raise PydanticCustomError("number_expected", "a number is expected, not a truth value")
    return value


def _as_list(value: Any) -> Any:
    """HF spelling: ``report_to: none`` or one bare name."""
    if isinstance(value, str):
        return [] if value == "none" else [value]
    return value


_BIG = 10**9

Text = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]+$")]
Whole = Annotated[int, BeforeValidator(_not_bool)]
Count = Annotated[Whole, Field(ge=1, le=_BIG)]
Real = Annotated[float, BeforeValidator(_not_bool), Field(allow_inf_nan=False)]
Share = Annotated[Real, Field(ge=0.0, le=1.0)]
OpenShare = Annotated[Real, Field(ge=0.0, lt=1.0)]
Paths = Text | Annotated[list[Text], Field(min_length=1)]

Precision = Literal["auto", "fp32", "bf16", "fp16", "fp16-emulated", "bf16-emulated", "bf16-pure"]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ModelSection(_Section):
    """Which model, and how it is loaded."""

    name_or_path: Text = Field(
        default="SmolLM2-135M-Instruct",
        description="Model to start from: a local HF folder, a Hugging Face id, a GGUF file, "
        "or a name FiniTune knows (SmolLM2-135M-Instruct, tiny-internlm2).",
    )
    random_init: bool = Field(
        default=False, description="Start from random weights of the same shape instead of the trained ones."
    )
    residual_scale: Annotated[Real, Field(gt=0.0, le=1e6)] = Field(
        default=1.0,
        description="Multiply what writes into the residual stream; the model's answers stay, its distance to fp16's "
        "limit changes. For demonstrations and tests.",
    )
    attn_implementation: Literal["sdpa", "eager"] = Field(
        default="sdpa", description="Attention kernel: torch's fused one, or plain operations."
    )
    chat_template: Text | None = Field(
        default=None, description="Jinja chat template, or the path of a file with one; null uses the tokenizer's own."
    )


class DataSection(_Section):
    """Which rows, and how they become tokens."""

    train: Paths = Field(
        default="finitune:stdlib",
        description="Training rows: one or more .json, .jsonl, .parquet or .txt files, "
        "or finitune:stdlib (made from the docstrings of the installed Python).",
    )
    eval: Paths | None = Field(
        default=None, description="Evaluation rows, as in train; null holds out a share of the training rows."
    )
    format: Text = Field(
        default="auto", description="Row format (alpaca, messages, ...); auto recognises it from the first rows."
    )
    max_length: Annotated[Whole, Field(ge=8, le=1_048_576)] = Field(
        default=512, description="Longest row, in tokens; longer rows follow truncation."
    )
    packing: bool = Field(
        default=False,
        description="Put several rows into one sequence of max_length tokens; rows do not see each other.",
    )
    truncation: Literal["truncate_prompt", "drop_row", "truncate_answer"] = Field(
        default="truncate_prompt",
        description="What gives way in a row longer than max_length: its prompt, the whole row, or its answer.",
    )
    on_bad_row: Literal["skip", "stop"] = Field(
        default="skip", description="A bad row is skipped and reported, or stops the run before it starts."
    )
    eval_fraction: OpenShare = Field(
        default=0.02, description="Share of the training rows held out when eval is null; 0 holds out none."
    )
    max_eval_rows: Count = Field(default=64, description="Evaluate on at most this many rows.")
    limit_rows: Count | None = Field(
        default=None, description="Use only so many training rows, the first; null is all."
    )
    system_prompt: Text | None = Field(default=None, description="System message put before rows that have none.")


class LoraSection(_Section):
    """Low-rank adapters (Hu et al. 2021), as in PEFT."""

    r: Annotated[Whole, Field(ge=1, le=4096)] = Field(default=16, description="Rank of the adapters.")
    lora_alpha: Annotated[Real, Field(gt=0.0, le=65536.0)] = Field(
        default=32, description="Adapters are scaled by lora_alpha / r."
    )
    lora_dropout: OpenShare = Field(default=0.0, description="Dropout before the adapters, as a share.")
    target_modules: Literal["auto", "all-linear"] | Annotated[list[Text], Field(min_length=1)] = Field(
        default="auto",
        description="Modules that get adapters: auto (advice of the model family), all-linear, or a list of names.",
    )
    use_dora: bool = Field(default=False, description="Weight-decomposed adapters (DoRA).")
    use_rslora: bool = Field(default=False, description="Scale by lora_alpha / sqrt(r) instead (rank-stabilised LoRA).")
    modules_to_save: list[Text] = Field(
        default_factory=list, description="Modules trained whole beside the adapters, such as lm_head."
    )


class SampleSection(_Section):
    """Answers of the model during training."""

    prompts: list[Text] = Field(default_factory=list, description="Prompts that the model answers during training.")
    every_steps: Count | None = Field(default=None, description="Answer every so many steps; null: only at the end.")
    max_new_tokens: Annotated[Whole, Field(ge=1, le=65536)] = Field(default=64, description="Longest answer, tokens.")
    temperature: Annotated[Real, Field(ge=0.0, le=100.0)] = Field(
        default=0.0, description="Sampling temperature; 0 takes the likeliest token."
    )
    top_p: Annotated[Real, Field(gt=0.0, le=1.0)] = Field(
        default=1.0, description="Sample from the likeliest tokens that hold this share of probability."
    )


class GuardSection(_Section):
    """How the run is kept finite."""

    enabled: bool = Field(default=True, description="Judge every step before it changes anything.")
    max_aborts_in_a_row: Count = Field(default=8, description="Halt after so many refused steps in a row.")
    policy: Literal["observe", "safe", "auto"] = Field(
        default="auto",
        description="What may be done about a failure: observe (find the cause, skip the batch), safe (cures that lose "
        "nothing), auto (also those that give up rows, steps or moments).",
    )
    max_replays: Annotated[Whole, Field(ge=0, le=10_000)] = Field(
        default=60, description="Forward and backward passes that one failure may cost; 0 investigates nothing."
    )
    proof_steps: Annotated[Whole, Field(ge=0, le=64)] = Field(
        default=2, description="Steps past the failing one in the proof of a cure."
    )
    probation_steps: Count = Field(default=20, description="Steps before it is tried whether a cure is still needed.")
    max_relapses: Count = Field(default=3, description="Halt when one cause came back so often at one place.")
    act_on_forecast: bool = Field(default=False, description="Treat a clear forecast of an overflow before it happens.")
    monitor: bool = Field(default=True, description="Watch the largest activation of every decoder layer.")
    state_check_steps: Count = Field(
        default=50,
        description="Check moments for non-finite values every so many steps at the latest, and sooner where steps are "
        "large (weights: after every step).",
    )
    detectors: dict[str, dict[str, Any] | bool] = Field(
        default_factory=dict, description="Settings by detector name; false switches a detector off."
    )
    trust_steps: Count = Field(
        default=40,
        description="A checkpoint is trusted after so many clean steps; more than any detector of a bad state needs.",
    )
    deterministic: bool = Field(
        default=True, description="Ask for deterministic kernels where the device has them; what is not is reported."
    )
    repeat_check: bool = Field(
        default=True, description="Compute the first step twice and say if it does not repeat bit for bit."
    )


class SnapshotSection(_Section):
    """States kept in memory, to return to any step."""

    memory_share: OpenShare = Field(
        default=0.25, description="Share of the memory free at the start that snapshots may take; 0 keeps none."
    )
    max_count: Annotated[Whole, Field(ge=1, le=1024)] = Field(
        default=8, description="Snapshots kept at most; older ones stand further and further apart."
    )
    cost_share: Annotated[Real, Field(gt=0.0, lt=1.0)] = Field(
        default=0.01, description="Share of the training time that taking snapshots may cost; sets their distance."
    )
    shadow: bool = Field(
        default=False, description="Keep the state before the last step as well, copied before every step."
    )
    digest_steps: Count = Field(
        default=50, description="Write the state's digest into the journal every so many steps."
    )


class ScalerSection(_Section):
    """Dynamic loss scaling, used with fp16 only."""

    init_scale: Annotated[Real, Field(gt=0.0, le=2.0**40)] = Field(default=65536.0, description="Loss scale at first.")
    growth_factor: Annotated[Real, Field(gt=1.0, le=1024.0)] = Field(
        default=2.0, description="Factor by which the scale grows."
    )
    backoff_factor: Annotated[Real, Field(gt=0.0, lt=1.0)] = Field(
        default=0.5, description="Factor by which the scale shrinks at an overflow."
    )
    growth_interval: Count = Field(default=2000, description="Steps without overflow before the scale grows.")
    min_scale: Annotated[Real, Field(gt=0.0, le=2.0**40)] = Field(
        default=0.0625, description="The scale never falls below this."
    )
    max_retries: Annotated[Whole, Field(ge=0, le=64)] = Field(
        default=8, description="Times one step is tried again with a smaller scale."
    )


class LossSection(_Section):
    """What is minimised."""

    objective: Text = Field(
        default="causal_lm", description="Objective: causal_lm is the mean cross-entropy over supervised tokens."
    )
    chunk_tokens: Count = Field(
        default=1024, description="Positions sent through the output head at once; smaller saves memory."
    )


class Recipe(_Section):
    """A run, fully described. The recipe stored with a run reruns it."""

    model: ModelSection = Field(default_factory=ModelSection, description="Which model, and how it is loaded.")
    data: DataSection = Field(default_factory=DataSection, description="Which rows, and how they become tokens.")
    lora: LoraSection | None = Field(
        default_factory=LoraSection, description="Low-rank adapters; null trains all weights."
    )
    freeze: list[Text] = Field(
        default_factory=list,
        description="Name patterns (such as *embed_tokens*) of weights that a full fine-tune leaves alone.",
    )
    precision: Precision = Field(
        default="auto",
        description="Number format of the arithmetic; auto takes bf16 where the device computes it fast, else fp32.",
    )
    fp16: bool | None = Field(default=None, description="HF spelling of precision: fp16.")
    bf16: bool | None = Field(default=None, description="HF spelling of precision: bf16.")
    device: Annotated[
        str, Field(pattern=r"^(auto|cpu|mps|(cuda|xpu|npu)(:[0-9]{1,3})?)$", examples=["auto", "cpu", "cuda", "cuda:1"])
    ] = Field(default="auto", description="Device to train on; auto takes an accelerator if there is one.")
    seed: Annotated[Whole, Field(ge=0, le=2**63 - 1)] = Field(
        default=42, description="Seed of everything random: order, dropout, new weights."
    )
    output_dir: Text = Field(default="auto", description="Folder of the run; auto makes a new one under runs/.")
    overwrite_output_dir: bool = Field(
        default=False, description="Allow an output_dir that already holds a run, and replace it."
    )
    num_train_epochs: Annotated[Real, Field(gt=0.0, le=1e6)] = Field(
        default=1.0, description="Passes over the training rows; may be a fraction."
    )
    max_steps: Literal[-1] | Count = Field(default=-1, description="Optimiser steps; -1 follows num_train_epochs.")
    per_device_train_batch_size: Annotated[Whole, Field(ge=1, le=65536)] = Field(
        default=4, description="Rows in one micro-batch."
    )
    per_device_eval_batch_size: Annotated[Whole, Field(ge=1, le=65536)] = Field(
        default=8, description="Rows in one evaluation batch."
    )
    gradient_accumulation_steps: Annotated[Whole, Field(ge=1, le=65536)] = Field(
        default=1, description="Micro-batches in one step."
    )
    learning_rate: Annotated[Real, Field(gt=0.0, le=10.0)] = Field(
        default=2e-4, description="Peak learning rate (LoRA about 2e-4, all weights about 1e-5)."
    )
    weight_decay: Share = Field(default=0.0, description="Decoupled weight decay.")
    adam_beta1: OpenShare = Field(default=0.9, description="Decay of Adam's first moment.")
    adam_beta2: OpenShare = Field(default=0.999, description="Decay of Adam's second moment.")
    adam_epsilon: Annotated[Real, Field(gt=0.0, le=1.0)] = Field(
        default=1e-8, description="Term that keeps Adam's division finite."
    )
    optim: Literal["adamw_torch_fused", "adamw_torch", "sgd"] = Field(
        default="adamw_torch_fused", description="Optimiser."
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup", "warmup_stable_decay"] = Field(
        default="cosine", description="Course of the learning rate."
    )
    warmup_ratio: OpenShare = Field(
        default=0.03, description="Share of the steps spent warming up; used when warmup_steps is null."
    )
    warmup_steps: Annotated[Whole, Field(ge=0, le=_BIG)] | None = Field(
        default=None, description="Steps spent warming up; null follows warmup_ratio."
    )
    min_lr_ratio: Share = Field(default=0.0, description="Learning rate at the end, as a share of the peak.")
    decay_ratio: Share = Field(default=0.2, description="Share of the steps spent decaying, for warmup_stable_decay.")
    max_grad_norm: Annotated[Real, Field(gt=0.0, le=1e9)] | None = Field(
        default=1.0, description="Clip the gradient to this L2 norm; null does not clip."
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations in the backward pass: less memory, more time."
    )
    group_by_length: bool = Field(default=True, description="Put rows of similar length together: less padding.")
    logging_steps: Count = Field(default=1, description="Print a line every so many steps when not on a terminal.")
    eval_steps: Count | None = Field(
        default=None, description="Evaluate every so many steps; null evaluates at the start and the end only."
    )
    save_steps: Count | None = Field(
        default=None, description="Write a checkpoint every so many steps; null writes one at the end only."
    )
    save_minutes: Annotated[Real, Field(gt=0.0, le=1e6)] | None = Field(
        default=15.0, description="Write a checkpoint, too, when the newest is so many minutes old; null does not."
    )
    save_total_limit: Annotated[Whole, Field(ge=1, le=10000)] = Field(
        default=2, description="Checkpoints kept; the last trusted one is never removed."
    )
    save_keep_every_steps: Count | None = Field(
        default=None, description="Keep the checkpoints of every so many steps for good, beyond save_total_limit."
    )
    save_keep_best: bool = Field(
        default=False, description="Keep the checkpoint with the lowest held-out loss, beyond save_total_limit."
    )
    save_in_background: bool = Field(
        default=True, description="Training goes on while a checkpoint is written; it needs memory for a copy."
    )
    journal_parquet: bool = Field(
        default=False, description="Write the journal's steps as a parquet table too when the run is over."
    )
    report_to: Annotated[list[Text], BeforeValidator(_as_list)] = Field(
        default_factory=list, description="Trackers that get the numbers."
    )
    sample: SampleSection = Field(default_factory=SampleSection, description="Answers of the model during training.")
    guard: GuardSection = Field(default_factory=GuardSection, description="How the run is kept finite.")
    snapshots: SnapshotSection = Field(
        default_factory=SnapshotSection, description="States kept in memory, to return to any step."
    )
    scaler: ScalerSection = Field(
        default_factory=ScalerSection, description="Dynamic loss scaling, used with fp16 only."
    )
    loss: LossSection = Field(default_factory=LossSection, description="What is minimised.")

    @model_validator(mode="after")
    def _no_contradiction(self) -> Recipe:
        check(self)
        return self
