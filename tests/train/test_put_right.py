"""Our own trainer: what the look before the first step finds and the model tells how to repair is repaired first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from finitune.core.journal import read
from finitune.models.tiny import write_internlm2_folder
from finitune.train.run import open_run
from finitune.train.session import Session
from support.runs import tiny_recipe

pytestmark = [pytest.mark.filterwarnings("ignore")]
FREQUENCIES = "model.rotary_emb.inv_freq"
STEPS = 8


def loud_rows(state: dict[str, Tensor]) -> None:
    noise = torch.randn(6, state["output.weight"].shape[1], generator=torch.Generator().manual_seed(0))
    state["output.weight"][-6:] = 5.0 * noise


def ran(folder: Path, *overrides: str, files: Any = None, built: Callable[[Any], None] | None = None) -> Session:
    """A run whose files or whose model in memory were spoilt before it began."""
    place = write_internlm2_folder(folder / "model")
    if files is not None:
        path = place / "model.safetensors"
        state = {name: tensor.clone() for name, tensor in load_file(str(path)).items()}
        files(state)
        save_file(state, str(path), metadata={"format": "pt"})
    opened = open_run(tiny_recipe(folder, f"max_steps={STEPS}", *overrides, model=str(place)))
    assert isinstance(opened, Session)
    if built is not None:
        built(opened.prepared.port.model)
    assert opened.run().status == "finished"
    return opened


def incidents(session: Session) -> list[dict[str, Any]]:
    return [r["incident"] for r in read(session.journal.path) if r["kind"] == "incident"]


def weights(session: Session) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in session.prepared.port.parts.parameters}


def lose_the_buffer(model: Any) -> None:
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq"):
            buffer.zero_()


def test_a_lost_buffer_is_computed_anew_and_the_run_has_the_bits_of_one_that_had_it(tmp_path: Path) -> None:
    for name in ("sound", "lost"):
        (tmp_path / name).mkdir()
    sound = ran(tmp_path / "sound")
    lost = ran(tmp_path / "lost", built=lose_the_buffer)
    assert [(i["diagnosis"][0]["code"], i["remedy"], i["outcome"]) for i in incidents(lost)] == [
        ("MOD400", "repair_tensor", "cured")
    ]
    assert incidents(sound) == []
    assert all(torch.equal(t, weights(sound)[n]) for n, t in weights(lost).items())


@pytest.mark.parametrize("precision", ["fp32", "fp16-emulated", "bf16-emulated"])
def test_loud_rows_of_a_checkpoint_become_the_mean_before_anything_is_trained(tmp_path: Path, precision: str) -> None:
    session = ran(tmp_path, f"precision={precision}", files=loud_rows)
    (found,) = incidents(session)
    assert (found["step"], found["diagnosis"][0]["code"], found["remedy"]) == (1, "MOD402", "repair_tensor")
    head = next(t for n, t in weights(session).items() if n.endswith(("lm_head.weight", "output.weight")))
    lengths = head.norm(dim=1)
    assert float(lengths[-6:].max()) < 5 * float(lengths.median())


def test_observing_changes_no_bit(tmp_path: Path) -> None:
    for name in ("observed", "unguarded"):
        (tmp_path / name).mkdir()
    observed = ran(tmp_path / "observed", "guard.policy=observe", files=loud_rows)
    unguarded = ran(tmp_path / "unguarded", "guard.enabled=false", files=loud_rows)
    assert [(i["remedy"], i["outcome"]) for i in incidents(observed)] == [(None, "observed")]
    assert incidents(unguarded) == []
    assert all(torch.equal(t, weights(unguarded)[n]) for n, t in weights(observed).items())


def test_a_frozen_table_that_no_checkpoint_of_the_run_holds_is_only_told(tmp_path: Path) -> None:
    session = ran(tmp_path, "lora.r=4", files=loud_rows)
    assert incidents(session) == []
    assert "MOD113" in {r["code"] for r in read(session.journal.path) if r["kind"] == "finding"}
