"""The trainable weights come out of a checkpoint's files by parameter name, bit for bit, whatever kind of run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finitune.engine.snapshot import Buffers
from finitune.numerics.digest import digest
from finitune.train import checkpoint
from finitune.train.checkpoint import Content
from finitune.train.prepare import Prepared
from finitune.train.stored import stored_weights
from support.runs import loop_of, ready

SMALL = "tiny-llama:hidden=16,layers=1,heads=2,kv_heads=1,mlp=32"
TIED = f"{SMALL},tied=1"
LORA = "lora={r: 2, lora_dropout: 0.1}"

KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "full": (SMALL, ()),
    "full, tied embeddings": (TIED, ()),
    "full in InternLM2's layout": ("tiny-internlm2:hidden=16,layers=1,heads=2,kv_heads=1,mlp=32,bias=1", ()),
    "full in bf16": (SMALL, ("precision=bf16-pure",)),
    "frozen embeddings": (SMALL, ("freeze=['*embed_tokens*', '*norm*']",)),
    "frozen tied embeddings": (TIED, ("freeze=['*embed_tokens*']",)),
    "LoRA": (SMALL, (LORA,)),
    "LoRA and a whole head": (SMALL, ("lora={r: 2, modules_to_save: [lm_head]}",)),
    "LoRA and whole embeddings and head": (SMALL, ("lora={r: 2, modules_to_save: [lm_head, embed_tokens]}",)),
    "DoRA": (SMALL, ("lora={r: 2, use_dora: true}",)),
    "rank-stabilised LoRA with a whole norm": (SMALL, ("lora={r: 2, use_rslora: true, modules_to_save: [norm]}",)),
}


def trained(folder: Path, kind: str, steps: int = 1) -> Prepared:
    model, overrides = KINDS[kind]
    prepared = ready(folder, *overrides, "data.eval_fraction=0", model=model)
    loop = loop_of(prepared, folder)
    for _ in range(steps):
        loop.one()
    return prepared


def write_copy(prepared: Prepared, run_dir: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint from a copy, written after the live weights were spoilt; and the weights it should hold."""
    port = prepared.port
    tensors, record = Buffers().copy(port)
    truth = {name: parameter.detach().clone() for name, parameter in port.parts.parameters}
    with torch.no_grad():
        for _, parameter in port.parts.parameters:
            parameter.add_(1.0)
    folder = checkpoint.write(Content(tensors, record), port.parts, prepared.tokenizer, run_dir)
    return folder, truth


@pytest.mark.parametrize("kind", KINDS)
def test_every_trainable_weight_comes_back_bit_for_bit(tmp_path: Path, kind: str) -> None:
    prepared = trained(tmp_path, kind)
    folder, truth = write_copy(prepared, tmp_path)
    found = stored_weights(prepared.port.parts, folder)
    assert list(found) == [name for name, _ in prepared.port.parts.parameters]
    assert digest(sorted(found.items())) == digest(sorted(truth.items()))


@pytest.mark.parametrize("kind", ["full, tied embeddings", "LoRA and a whole head", "DoRA", "frozen embeddings"])
def test_the_whole_state_comes_back_into_another_run_of_the_recipe(tmp_path: Path, kind: str) -> None:
    """Names are told by memory: a model at other addresses must find the same ones."""
    prepared = trained(tmp_path, kind)
    port = prepared.port
    there = digest(port.state_tensors(), port.state_record())
    folder = checkpoint.write(
        Content(dict(port.state_tensors()), port.state_record()), port.parts, prepared.tokenizer, tmp_path
    )
    model, overrides = KINDS[kind]
    other = ready(tmp_path, *overrides, "data.eval_fraction=0", model=model).port
    checkpoint.StoredBase(folder, 1, 1, other.parts).restore(other)
    assert digest(other.state_tensors(), other.state_record()) == there


def test_reading_changes_nothing_in_the_model(tmp_path: Path) -> None:
    prepared = trained(tmp_path, "LoRA and a whole head")
    folder, _ = write_copy(prepared, tmp_path)
    port = prepared.port
    before = digest(port.state_tensors(), port.state_record())
    found = stored_weights(port.parts, folder)
    for tensor in found.values():
        tensor.fill_(7.0)
    assert digest(port.state_tensors(), port.state_record()) == before
    assert all(p.requires_grad for _, p in port.parts.parameters)


def test_weights_in_several_files_are_put_together(tmp_path: Path) -> None:
    """As transformers writes large models."""
    prepared = trained(tmp_path, "full")
    folder, truth = write_copy(prepared, tmp_path)
    whole = load_file(str(folder / "model.safetensors"))
    names = sorted(whole)
    for number, part in enumerate((names[::2], names[1::2]), 1):
        save_file({n: whole[n] for n in part}, str(folder / f"model-0000{number}-of-00002.safetensors"))
    (folder / "model.safetensors").unlink()
    found = stored_weights(prepared.port.parts, folder)
    assert digest(sorted(found.items())) == digest(sorted(truth.items()))


def test_a_missing_weight_is_an_error_that_names_it(tmp_path: Path) -> None:
    prepared = trained(tmp_path, "full")
    folder, _ = write_copy(prepared, tmp_path)
    path = folder / "model.safetensors"
    whole = load_file(str(path))
    gone = "model.layers.0.mlp.down_proj.weight"
    save_file({n: t for n, t in whole.items() if n != gone}, str(path))
    with pytest.raises(KeyError, match="down_proj"):
        stored_weights(prepared.port.parts, folder)
    path.unlink()
    with pytest.raises(KeyError, match="embed_tokens"):
        stored_weights(prepared.port.parts, folder)


def test_unreadable_files_are_an_error_of_a_promised_kind(tmp_path: Path) -> None:
    """The docstring promises OSError or ValueError; safetensors has an exception of its own."""
    prepared = trained(tmp_path, "full")
    folder, _ = write_copy(prepared, tmp_path)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"x" * 100):
        path.write_bytes(damaged)
        with pytest.raises((OSError, ValueError)):
            stored_weights(prepared.port.parts, folder)


def test_an_adapter_of_fewer_modules_does_not_fit(tmp_path: Path) -> None:
    few = ready(tmp_path, "lora={r: 2, target_modules: [q_proj]}", "data.eval_fraction=0", model=SMALL)
    folder, _ = write_copy(few, tmp_path)
    more = ready(tmp_path, "lora={r: 2, target_modules: [q_proj, v_proj]}", "data.eval_fraction=0", model=SMALL)
    with pytest.raises(KeyError):
        stored_weights(more.port.parts, folder)
