"""The capsule of a guarded script is computed again on the script's own model, which is afterwards as it was."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import finitune
from finitune.core.errors import Halted, UserError
from finitune.core.files import write_manifest
from finitune.core.incident import Result
from finitune.core.messages.catalogue import set_language
from finitune.engine.capsule_replay import Replay
from finitune.numerics.fingerprint import Fingerprint, fingerprint
from finitune.numerics.half import emulated_half


@dataclass
class Item:
    """A script's own kind of batch."""

    x: Tensor
    y: Tensor
    weight: Tensor


class Poison(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * float("nan")


def net(seed: int, width: int = 16) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Linear(6, width), nn.BatchNorm1d(width), nn.Dropout(0.2), nn.GELU(), nn.Linear(width, 1)]
    return nn.Sequential(*layers)


def loss_in(precision: str) -> Callable[[nn.Module, Any], Tensor]:
    regions = {
        "fp16": lambda: torch.autocast("cpu", torch.float16),
        "fp16-emulated": lambda: emulated_half(torch.float16),
    }

    def loss(model: nn.Module, batch: Item) -> Tensor:
        with regions.get(precision, nullcontext)():
            out = model(batch.x)
        if bool((batch.weight < 0).any()):  # the marked batch: a backward pass that is not finite
            out = Poison.apply(out)
        return (batch.weight * ((out.float() - batch.y) ** 2).squeeze(1)).mean()

    return loss


def items(seed: int, fault: str) -> list[Any]:
    """Twelve batches; the tenth is at fault, and one of two micro-batches."""
    generator, chance = torch.Generator().manual_seed(seed), random.Random(seed)
    made = [
        Item(torch.randn(8, 6, generator=generator), torch.randn(8, 1, generator=generator), torch.ones(8))
        for _ in range(12)
    ]
    if fault == "row":
        made[9].weight[chance.randrange(8)] = float("inf")
    if fault == "backward":
        made[9].weight[0] = -1.0
    if fault == "range":  # beyond 65504 in fp16 only
        made[9].x[chance.randrange(8)] = 3e5
    return [[made[i], made[9]] if i == 9 else [made[i]] for i in range(12)]


def optimizer_of(model: nn.Module, kind: str = "adamw") -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9)
    return torch.optim.AdamW(model.parameters(), 1e-2)


def capsule_in(folder: Path, seed: int, fault: str, precision: str, kind: str = "adamw", **options: Any) -> Path:
    """The first capsule of a guarded run."""
    model = net(seed)
    optimizer = optimizer_of(model, kind)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8) if precision.startswith("fp16") else None
    made = finitune.guard(
        model, optimizer, loss_in(precision), scheduler, scaler, run_dir=folder, max_grad_norm=1.0, **options
    )
    torch.manual_seed(seed + 1)
    with suppress(Halted), made as guard:
        for step in items(seed, fault):
            guard.step(step)
    assert made.incidents[0].step == 10
    return folder / "incidents" / "001" / "capsule"


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> Fingerprint:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    tensors |= {f"grad {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    for number, slots in enumerate(optimizer.state.values()):
        tensors |= {f"{number} {k}": v for k, v in slots.items() if isinstance(v, Tensor)}
    record = {
        "groups": [{k: repr(v) for k, v in g.items() if k != "params"} for g in optimizer.param_groups],
        "modes": [m.training for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "generator": torch.get_rng_state().tolist(),
    }
    return fingerprint(tensors.items(), record)


def as_item(stored: dict[str, Tensor]) -> Item:
    return Item(**stored)


@pytest.fixture(scope="module")
def row(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return capsule_in(tmp_path_factory.mktemp("row"), 1, "row", "fp32")


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize(
    ("fault", "precision"), [("row", "fp32"), ("row", "fp16"), ("range", "fp16"), ("range", "fp16-emulated")]
)
@pytest.mark.parametrize("weights", ["lora", "full"])
def test_it_reproduces_to_the_bit_and_leaves_no_trace(
    tmp_path: Path, fault: str, precision: str, kind: str, weights: str
) -> None:
    seed = len(fault + precision + kind + weights)
    capsule = capsule_in(tmp_path, seed, fault, precision, kind, capsule_weights=weights)
    model = net(seed + 50)
    optimizer = optimizer_of(model, kind)
    if seed % 2:  # one that was used, with gradients, in evaluation mode
        items_in = items(3, "none")
        loss_in("fp32")(model, items_in[0][0]).backward()
        optimizer.step()
        loss_in("fp32")(model, items_in[1][0]).backward()
        model.eval()
    before = everything(model, optimizer)
    for again in (
        {},
        {"precision": "fp32"},
        {"experiment": "fp32"},
        {"experiment": "rows"},
        {"experiment": "lower_lr"},
        {"experiment": "scan_state"},
    ):
        done = finitune.replay(capsule, model, optimizer, loss_in(precision), as_batch=as_item, **again)
        assert done.verdict is Replay.BITS, done
        assert done.reproduced
        assert done.reading is not None
        assert done.reading.step == 10
        assert everything(model, optimizer) == before
        if again.get("precision") or again.get("experiment") == "fp32":
            assert done.evidence is not None
            expected = {"row": (Result.BAD, Result.NOT_RUN), "range": (Result.GOOD,)}[fault]
            assert done.evidence.result in expected


def test_dropout_is_that_of_then(tmp_path: Path) -> None:
    """A finite loss of a step with dropout has the recorded bits only with the recorded random states."""
    capsule = capsule_in(tmp_path, 3, "backward", "fp32")
    model = net(9)
    done = finitune.replay(capsule, model, optimizer_of(model), loss_in("fp32"), as_batch=as_item)
    assert done.verdict is Replay.BITS
    assert not done.notes
    _rewritten(lambda info: info["generators"].pop("states"))(capsule)
    done = finitune.replay(capsule, model, optimizer_of(model), loss_in("fp32"), as_batch=as_item)
    assert done.verdict is Replay.SAME
    assert "random generators" in done.notes[0]


def test_a_bug_that_was_fixed_no_longer_reproduces(row: Path) -> None:
    model = net(9)

    def fixed(model: nn.Module, batch: Item) -> Tensor:
        return loss_in("fp32")(model, Item(batch.x, batch.y, batch.weight.clamp(max=1.0)))

    done = finitune.replay(row, model, optimizer_of(model), fixed, as_batch=as_item)
    assert done.verdict is Replay.GONE
    assert not done.reproduced
    assert "no longer reproduces" in str(done)


def test_a_capsule_of_digests_wants_the_state_itself(tmp_path: Path) -> None:
    capsule = capsule_in(tmp_path, 2, "row", "fp32", capsule_weights="digest")
    model, steps = net(2), items(2, "row")
    optimizer = optimizer_of(model)
    done = finitune.replay(capsule, model, optimizer, loss_in("fp32"), as_batch=as_item)
    assert done.verdict is Replay.IMPOSSIBLE
    assert "digest" in done.reason
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.9)
    torch.manual_seed(3)
    with finitune.guard(model, optimizer, loss_in("fp32"), scheduler, max_grad_norm=1.0) as guard:
        for step in steps[:9]:
            guard.step(step)
    before = everything(model, optimizer)
    done = finitune.replay(capsule, model, optimizer, loss_in("fp32"), as_batch=as_item)
    assert done.verdict is Replay.BITS, done
    assert everything(model, optimizer) == before


def test_without_rows_there_is_nothing_to_compute(tmp_path: Path) -> None:
    capsule = capsule_in(tmp_path, 2, "row", "fp32", capsule_rows="ids")
    model = net(1)
    done = finitune.replay(capsule, model, optimizer_of(model), loss_in("fp32"), as_batch=as_item)
    assert done.verdict is Replay.IMPOSSIBLE
    assert "rows=ids" in str(done)


STRANGERS: Mapping[str, Callable[[], tuple[nn.Module, Any, Any]]] = {
    "another width": lambda: (net(1, 24), None, None),
    "another model": lambda: (nn.Linear(6, 1), None, None),
    "another optimizer": lambda: (net(1), lambda m: torch.optim.SGD(m.parameters(), 0.1), None),
    "another dtype": lambda: (net(1).double(), None, None),
    "half of the weights": lambda: (net(1), lambda m: torch.optim.AdamW(m[0].parameters()), None),
    "a loss that raises": lambda: (net(1), None, lambda _m, _b: [][1]),
    "a loss that divides by zero": lambda: (net(1), None, lambda _m, _b: 1 / 0),
    "no loss": lambda: (net(1), None, lambda _m, _b: None),
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_what_does_not_fit_is_a_reason_and_changes_nothing(row: Path, stranger: str) -> None:
    model, optimizer_for, loss = STRANGERS[stranger]()
    optimizer = (optimizer_for or optimizer_of)(model)
    before = everything(model, optimizer)
    done = finitune.replay(row, model, optimizer, loss or loss_in("fp32"), as_batch=as_item)
    assert done.verdict is Replay.IMPOSSIBLE
    assert done.reason
    assert done.reading is None
    assert everything(model, optimizer) == before


def test_a_batch_of_another_kind_is_said(row: Path) -> None:
    model = net(1)
    done = finitune.replay(row, model, optimizer_of(model), loss_in("fp32"))
    assert done.verdict is Replay.IMPOSSIBLE
    assert "AttributeError" in done.reason
    done = finitune.replay(row, model, optimizer_of(model), loss_in("fp32"), as_batch=lambda b: Item(**b, other=1))
    assert done.verdict is Replay.IMPOSSIBLE
    assert "as_batch" in done.reason


def test_what_the_loss_function_does_to_frozen_weights_is_said(row: Path) -> None:
    model = net(1)
    model.register_parameter("frozen", nn.Parameter(torch.zeros(2), requires_grad=False))
    model.register_buffer("counted", torch.zeros(()))

    def counting(model: nn.Module, batch: Item) -> Tensor:
        model.counted.add_(1)
        model.frozen.data.add_(1)
        return loss_in("fp32")(model, batch)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    done = finitune.replay(row, model, optimizer, counting, as_batch=as_item)
    assert model.counted == 0
    assert any("frozen" in note for note in done.notes)


@pytest.mark.parametrize(
    "wrong", [{"precision": "fp8"}, {"experiment": "no_such"}, {"watch": ["no.such"]}, {"loss_fn": 3}]
)
def test_arguments_that_cannot_be_are_refused(row: Path, wrong: dict[str, Any]) -> None:
    model = net(1)
    given = {"loss_fn": loss_in("fp32"), **wrong}
    with pytest.raises(UserError) as caught:
        finitune.replay(row, model, optimizer_of(model), **given)
    assert caught.value.code.code in ("SYS425", "SYS416")


def _rewritten(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        info = json.loads((folder / "capsule.json").read_text())
        change(info)
        (folder / "capsule.json").write_text(json.dumps(info))
        write_manifest(folder, {"capsule": 1})

    return edit


def _generators(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(info: dict[str, Any]) -> None:
        states = json.loads(info["generators"]["states"])
        change(states)
        info["generators"]["states"] = json.dumps(states)

    return _rewritten(edit)


def _truncated(folder: Path) -> None:
    path = folder / "tensors.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def _unsealed(folder: Path) -> None:
    path = folder / "capsule.json"
    path.write_text(path.read_text().replace('"step": 10', '"step": 11', 1))


REFUSED = {"truncated": _truncated, "edited": _unsealed, "of another schema": _rewritten(lambda i: i.update(schema=9))}
HOSTILE = {
    "a huge place in numpy's state": _generators(lambda s: s["states"][0]["numpy"].update(pos=1 << 40)),
    "a huge place in python's state": _generators(lambda s: s["states"][0]["python"].update(words="no")),
    "a short torch state": _generators(lambda s: s["blobs"].update({s["states"][0]["torch"]: "AAAA"})),
    "many states": _generators(lambda s: s.update(states=s["states"] * 9999)),
    "states that are none": _rewritten(lambda i: i["generators"].update(states="[" * 5000)),
    "modes that are none": _rewritten(lambda i: i["kernels"].update(modes={"training": "yes", "others": 7})),
    "another step": _rewritten(lambda i: i["record"].update(step=1 << 60)),
    "no optimizer": _rewritten(lambda i: i["record"].update(optimizer={})),
    "strange slots": _rewritten(lambda i: i["record"]["optimizer"]["slots"].update({"evil": {"x": {"!": "tensor"}}})),
    "a group's lr of text": _rewritten(lambda i: i["record"]["optimizer"]["groups"][0].update(lr="much")),
    "a new option": _rewritten(lambda i: i["record"]["optimizer"]["groups"][0].update(maximize=True, evil=1)),
    "a scale of text": _rewritten(lambda i: i["record"].update(scaler={"scale": "x", "tracker": []})),
    "padding without end": _rewritten(lambda i: i["record"].update(conditions={"extra_padding": 1 << 50})),
    "modules of another kind": _rewritten(lambda i: i["record"].update(conditions={"fp32_modules": "0"})),
    "a clipper with a path": _rewritten(lambda i: i["record"].update(conditions={"clipper": "../../evil"})),
    "history of another kind": _rewritten(lambda i: i["record"].update(history={"log_loss": 1})),
    "a clip of text": _rewritten(lambda i: i["facts"].update(max_grad_norm="x")),
}


@pytest.mark.parametrize("damage", [*REFUSED, *HOSTILE])
def test_a_capsule_that_was_tampered_with_does_no_harm(row: Path, tmp_path: Path, damage: str) -> None:
    folder = Path(shutil.copytree(row, tmp_path / "capsule"))
    {**REFUSED, **HOSTILE}[damage](folder)
    model = net(4)
    optimizer = optimizer_of(model)
    before = everything(model, optimizer)
    if damage in REFUSED:
        with pytest.raises(UserError) as caught:
            finitune.replay(folder, model, optimizer, loss_in("fp32"), as_batch=as_item)
        assert caught.value.code.code in ("SYS411", "SYS412")
    else:
        done = finitune.replay(folder, model, optimizer, loss_in("fp32"), as_batch=as_item)
        assert done.reason or done.notes or damage in ("modes that are none", "a clip of text")
    assert everything(model, optimizer) == before


def test_the_command_line_tells_how(row: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from finitune.cli.main import main

    for language, words in (
        ("en", "the model and the loss function are your script"),
        ("zh", "模型和损失函数属于你的脚本"),
    ):
        code = main(["replay", str(row), "--experiment", "fp32", "--lang", language])
        said = capsys.readouterr()
        assert code == 2
        assert "SYS424" in said.err
        assert "model, optimizer, loss_fn, experiment='fp32')" in said.err
        assert words in said.err
    set_language(None)
