"""A run with a planted fault, on our own trainer or in a guarded bare loop, and what became of it.

A fault is a function of a :class:`Rig`: it changes the model, the optimizer, the loss or the batches of either port
through the same few methods, and knows nothing of the engine that has to find it. What it does hangs on content (a
row, a width, a value), never on how often it is called, unless it is meant to be a fault that does not repeat.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import finitune
from finitune.bench.workload import are_among, edit_inputs
from finitune.core.errors import Halted
from finitune.core.incident import Incident
from finitune.engine.policy import Action
from finitune.models.tiny import tiny_llama
from finitune.numerics.half import emulated_half
from finitune.numerics.statecheck import bad_tensors
from support.runs import tiny_recipe

TINY = "tiny-llama:hidden=32,layers=2,mlp=64"
PAD = 0
"""Padding of the bare loop's batches."""
Extra = Callable[[Tensor, Tensor], Tensor]
"""A further loss: ids (B, T), embeddings (B, T, D) -> scalar tensor, added to the mean loss."""


@dataclass
class Rig:
    """What a fault may touch, whichever port it is."""

    port: str
    model: Any
    optimizer: torch.optim.Optimizer
    step: Callable[[], int]
    """The step (from 1) that is being computed."""
    rows: Callable[[int], list[Tensor]]
    """The rows of a step, ids without padding."""
    name: Callable[[int, int], str]
    """A part of the text of the RowId of a row of a step."""
    pad_id: int
    after: dict[int, list[Callable[[], None]]] = field(default_factory=dict)
    extra: list[Extra] = field(default_factory=list)
    unlabelled: list[int] = field(default_factory=list)
    """Steps without any label."""
    rate: Callable[[int], float] = lambda _updates: 1.0
    """What the learning rate is multiplied by, by the number of updates made."""
    expected_bad: frozenset[str] = frozenset()
    """Tensors that the fault itself spoils before the first step."""

    def between(self, step: int, act: Callable[[], None]) -> None:
        """``act`` once, right after a step."""
        self.after.setdefault(step, []).append(act)

    def has(self, ids_BT: Tensor, *rows: Tensor) -> Tensor:
        """Which rows of a batch are one of these, (B,) bool; padding counts for nothing."""
        return are_among(ids_BT, rows, self.pad_id)

    def decoder_inputs(self, change: Callable[[dict[str, Any]], None]) -> None:
        """``change(kwargs)`` edits what the decoder is called with, ``input_ids`` among it."""
        edit_inputs(self.model.model, change)


@dataclass
class Story:
    """What became of a run."""

    rig: Rig
    incidents: list[Incident] = field(default_factory=list)
    poisoned: list[tuple[int, list[str]]] = field(default_factory=list)
    """After which transaction a state tensor was not finite, and which."""
    actions: list[tuple[int, Action]] = field(default_factory=list)
    losses: dict[int, float] = field(default_factory=dict)
    """Of committed steps, the last time they were made."""
    codes: list[str] = field(default_factory=list)
    halted: Halted | None = None
    """Raised by a bare loop."""
    result: Any = None
    """Of our own trainer."""
    run: Path | None = None

    @property
    def stopped(self) -> bool:
        """The run was halted."""
        return self.halted is not None or (self.result is not None and self.result.status == "halted")

    @property
    def one(self) -> Incident:
        """The only incident."""
        assert len(self.incidents) == 1, [(i.step, i.diagnosis.code, i.outcome) for i in self.incidents]
        return self.incidents[0]

    @property
    def first(self) -> Incident:
        """The first incident."""
        assert self.incidents, (self.actions, self.codes, self.halted)
        return self.incidents[0]

    def saw(self, step: int, action: Action, loss: float, codes: list[str], tensors: Iterator[Any]) -> None:
        """Note one transaction, then do what the fault wants done after it."""
        self.actions.append((step, action))
        self.codes += codes
        bad = [n for n in bad_tensors(tensors) if not (n in self.rig.expected_bad and not self.incidents)]
        if bad:
            self.poisoned.append((step, bad))
        if action is Action.PROCEED:
            self.losses[step] = loss
            for act in self.rig.after.pop(step, ()):
                act()


# -- our own trainer ------------------------------------------------------------------------------------------------


def _our_rig(prepared: Any) -> Rig:
    port = prepared.port
    loader = port.parts.loader
    cursors = [port.state.cursor]
    for _ in range(80):
        cursors.append(loader.advance(cursors[-1]))
    pad_id = loader.config.pad_id

    def rows(step: int) -> list[Tensor]:
        out = []
        for batch in loader.at(cursors[step - 1]):
            mask = batch.attention_mask
            for b, ids in enumerate(batch.ids_BT):
                out.append(ids if mask is None else ids[mask[b].bool()])
        return out

    def name(step: int, row: int) -> str:
        return str(loader.peek_rows(cursors[step - 1])[row])

    rig = Rig("ours", port.model, port.optimizer, lambda: port.state.step + 1, rows, name, pad_id)
    real_at, steps = loader.at, {str(c): number for number, c in enumerate(cursors, 1)}

    def at(cursor: Any, **options: Any) -> Any:
        batches = real_at(cursor, **options)
        if steps.get(str(cursor)) not in rig.unlabelled:
            return batches
        return tuple(
            dataclasses.replace(b, labels_BT=torch.full_like(b.labels_BT, -100), num_supervised=0) for b in batches
        )

    loader.at = at
    objective, schedule = port.parts.objective, port.parts.schedule

    def compute(model: Any, family: Any, batch: Any, **options: Any) -> Any:
        done = objective.compute(model, family, batch, **options)
        for extra in rig.extra:
            embedded_BTD = model.get_input_embeddings()(batch.ids_BT)
            more = extra(batch.ids_BT, embedded_BTD) * batch.num_supervised
            scaled = more * options["factor"]
            done = dataclasses.replace(
                done,
                loss_sum=done.loss_sum + more.detach(),
                scaled=scaled if done.scaled is None else done.scaled + scaled,
            )
        return done

    port.parts = dataclasses.replace(
        port.parts,
        objective=SimpleNamespace(compute=compute),
        schedule=lambda updates: schedule(updates) * rig.rate(updates),
    )
    return rig


class _Watch:
    """Notes what an observer is told."""

    def __init__(self) -> None:
        self.story: Story = None  # type: ignore[assignment]
        self.port: Any = None

    def on_step(self, event: Any) -> None:
        """After every transaction."""
        codes = [f.code for f in event.judgement.findings]
        self.story.saw(event.reading.step, event.action, event.reading.loss, codes, self.port.state_tensors())

    def on_finding(self, finding: Any) -> None:
        """Outside of a step."""
        self.story.codes.append(finding.code)

    def on_incident(self, incident: Incident, _run: str) -> None:
        """Closed."""
        self.story.incidents.append(incident)


def opened(
    folder: Path,
    fault: Callable[[Rig], Any],
    *overrides: str,
    steps: int = 10,
    resume: bool = False,
    like: Rig | None = None,
) -> tuple[Any, Story]:
    """A session that is ready to run, with the fault in it, and its story.

    ``resume``: the run in the folder goes on. ``like``: the rig of the run from its start, which knows all rows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    watch = _Watch()
    if resume:
        session = finitune.open_run(None, resume=str(folder / "run"), observers=[watch])
    else:
        fixed = (f"max_steps={steps}", "lr_scheduler_type=constant", "warmup_steps=0", "guard.repeat_check=false")
        recipe = tiny_recipe(folder, f"model.name_or_path={TINY}", *fixed, "per_device_train_batch_size=4", *overrides)
        session = finitune.open_run(recipe, observers=[watch])
    watch.port = session.prepared.port
    rig = _our_rig(session.prepared)
    if like is not None:
        rig.rows, rig.name = like.rows, like.name
    watch.story = story = Story(rig, run=Path(session.run_dir))
    fault(rig)
    return session, story


def ours(folder: Path, fault: Callable[[Rig], Any], *overrides: str, steps: int = 10) -> Story:
    """A run of our own trainer with the fault in it."""
    session, story = opened(folder, fault, *overrides, steps=steps)
    story.result = session.run()
    return story


# -- a bare loop ----------------------------------------------------------------------------------------------------


def text(count: int, rows: int = 4, seed: int = 5) -> list[dict[str, Tensor]]:
    """Batches of rows that can be learnt, of different lengths, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for step in range(count):
        width = 12 + (5 * step) % 7
        starts = torch.randint(0, 50, (rows, 1), generator=generator)
        strides = torch.randint(1, 4, (rows, 1), generator=generator)
        ids = 10 + (starts + strides * torch.arange(width)) % 50
        lengths = torch.randint(width - 4, width + 1, (rows, 1), generator=generator)
        lengths[0] = width
        real = torch.arange(width) < lengths
        ids = torch.where(real, ids, PAD)
        labels = torch.where(real, ids, -100)
        out.append({"input_ids": ids, "labels": labels, "attention_mask": real.long()})
    return out


def _bare_rig(model: Any, optimizer: Any, batches: list[dict[str, Tensor]], guard: list[Any]) -> Rig:
    def rows(step: int) -> list[Tensor]:
        batch = batches[step - 1]
        return [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]

    return Rig(
        "bare",
        model,
        optimizer,
        lambda: guard[0].port.state.step + 1 if guard else 1,
        rows,
        lambda _step, row: f":{row + 1}#",
        PAD,
    )


def bare(
    fault: Callable[[Rig], Any],
    *,
    steps: int = 10,
    half: bool = False,
    model: Any = None,
    optimizer: Callable[[Any], Any] | None = None,
    lr: float = 1e-3,
    attention: str | None = None,
    **options: Any,
) -> Story:
    """A guarded bare loop with the fault in it."""
    if model is None:
        model = tiny_llama(0, hidden=32, layers=2, heads=2, kv_heads=2, mlp=64)
    model.train()
    if attention is not None:
        model.set_attn_implementation(attention)
    made = optimizer(model) if optimizer is not None else torch.optim.AdamW(model.parameters(), lr)
    batches, held = text(steps), list[Any]()
    rig = _bare_rig(model, made, batches, held)

    def loss_fn(of: Any, batch: dict[str, Tensor]) -> Tensor:
        with emulated_half(torch.float16) if half else nullcontext():
            loss: Tensor = of(**batch, use_cache=False).loss
            for extra in rig.extra:
                loss = loss + extra(batch["input_ids"], of.get_input_embeddings()(batch["input_ids"]))
        return loss

    fault(rig)
    for step in rig.unlabelled:
        batches[step - 1]["labels"].fill_(-100)
    scheduler = torch.optim.lr_scheduler.LambdaLR(made, lambda updates: rig.rate(updates))
    story = Story(rig)
    options = {"max_grad_norm": 1.0, **options}
    with finitune.guard(model, made, loss_fn, scheduler, **options) as guard:
        held.append(guard)
        story.incidents = guard.incidents
        try:
            for batch in batches:
                outcome = guard.step(batch)
                codes = [f.code for f in outcome.findings]
                story.saw(guard.port.state.step, outcome.action, outcome.loss, codes, guard.port.state_tensors())
        except Halted as halt:
            story.halted = halt
            bad = bad_tensors(guard.port.state_tensors())
            story.poisoned += [(guard.port.state.step, bad)] if bad else []
    return story


PORTS = ("ours", "bare")


def tell(
    port: str, folder: Path, fault: Callable[[Rig], Any], *overrides: str, steps: int = 10, **options: Any
) -> Story:
    """The same fault on either port; ``overrides`` are for our trainer's recipe, ``options`` for the bare loop."""
    if port == "ours":
        return ours(folder, fault, *overrides, steps=steps)
    return bare(fault, steps=steps, **options)


# -- what is asserted -----------------------------------------------------------------------------------------------


def named(incident: Incident) -> list[str]:
    """Codes of the causes that an experiment names."""
    return [c.code for c in incident.diagnosis.causes if c.named]


def suspects(incident: Incident, kind: str) -> list[str]:
    """Names of the suspects of a kind."""
    return [s.name for s in incident.suspects if s.kind == kind]


def summary(incident: Incident) -> str:
    """For the message of a failed assertion."""
    causes = [(c.code, round(c.confidence, 2), c.named, c.where) for c in incident.diagnosis.causes]
    evidence = [f"{e.experiment}={e.result.value}" for e in incident.evidence]
    trials = [(t.plan.get("remedy"), t.holds, t.reason) for t in incident.trials]
    who = [(s.kind, s.name) for s in incident.suspects]
    return (
        f"step {incident.step} {incident.trigger.value} {incident.finding.code} {incident.verdict}"
        f" -> {incident.outcome} by {incident.remedy}\n causes {causes}\n evidence {evidence}\n trials {trials}"
        f"\n suspects {who}"
    )


def shows(
    story: Story,
    *codes: str,
    remedies: tuple[str | None, ...],
    never: tuple[str, ...] = (),
    never_cure: tuple[str, ...] = ("lower_lr",),
) -> Incident:
    """The first incident: its code, its remedy, what it must not say; and that no state was ever spoilt."""
    incident = story.first
    told = summary(incident)
    assert incident.diagnosis.code in codes, told
    assert incident.remedy in remedies, told
    wrong = [c for c in named(incident) if c.startswith(never)] if never else []
    assert not wrong, told
    tried = {i.remedy for i in story.incidents} | {t.plan.get("remedy") for i in story.incidents for t in i.trials}
    assert not tried & set(never_cure), told
    assert not story.poisoned, (story.poisoned, told)
    return incident
