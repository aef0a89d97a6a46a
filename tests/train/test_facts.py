"""The facts of a run: the same for the same content wherever it lies, other ones for anything that trains otherwise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from finitune.core.journal import encode
from finitune.train import facts as subject
from finitune.train.facts import cpu_name, device_name, facts_of, machine, resolved
from finitune.train.prepare import Prepared
from support.runs import ready, write_rows

pytestmark = pytest.mark.usefixtures("quick_plan")


def of(prepared: Prepared) -> dict:
    return facts_of(prepared.recipe, prepared)


@pytest.fixture
def plain(tmp_path: Path) -> Prepared:
    return ready(tmp_path)


def test_facts_survive_json_bit_for_bit(plain):
    facts = of(plain)
    assert json.loads(json.dumps(encode(facts), allow_nan=False)) == facts
    assert len(json.dumps(facts)) < 8000, "they lie in every checkpoint"


def test_the_recipe_in_them_is_resolved(plain):
    recipe = of(plain)["recipe"]
    assert (recipe["device"], recipe["precision"], recipe["max_steps"]) == ("cpu", "fp32", 24)
    assert recipe == resolved(plain.recipe, plain).model_dump(mode="json")


def test_a_second_preparation_gives_the_same_facts(tmp_path, plain):
    assert of(ready(tmp_path)) == of(plain)


def test_rows_under_another_path_are_the_same_rows(tmp_path, plain):
    moved = shutil.copy(tmp_path / "rows.jsonl", tmp_path / "moved.jsonl")
    again = of(ready(tmp_path, f"data.train={moved}"))
    assert again["data"] == of(plain)["data"]
    assert again["recipe"]["data"]["train"] != of(plain)["recipe"]["data"]["train"]


def test_other_held_out_rows_are_seen_whatever_their_batches(tmp_path):
    held_out = write_rows(tmp_path / "held.jsonl", 9)
    first = of(ready(tmp_path, f"data.eval={held_out}"))["data"]
    batched = of(ready(tmp_path, f"data.eval={held_out}", "per_device_eval_batch_size=2"))["data"]
    assert batched == first
    write_rows(held_out, 10)
    other = of(ready(tmp_path, f"data.eval={held_out}"))["data"]
    assert other["digest"] == first["digest"]
    assert other["eval_digest"] != first["eval_digest"]
    assert (first["eval_rows"], other["eval_rows"]) == (9, 10)


def test_no_held_out_rows_have_a_digest_too(tmp_path):
    assert of(ready(tmp_path, "data.eval_fraction=0"))["data"]["eval_rows"] == 0


def test_a_full_fine_tune_has_nothing_frozen_and_adapters_have_a_base(tmp_path, plain):
    full, lora = of(plain), of(ready(tmp_path, "lora={r: 2}"))
    assert full["frozen"]["tensors"] == 0
    assert lora["frozen"]["tensors"] == full["trainable"]["tensors"]
    assert lora["trainable"]["parameters"] < full["trainable"]["parameters"]
    assert of(ready(tmp_path, "lora={r: 3}"))["trainable"]["digest"] != lora["trainable"]["digest"]


def test_base_weights_that_moved_are_seen(tmp_path):
    prepared = ready(tmp_path, "lora={r: 2}")
    before = of(prepared)["frozen"]
    name, weight = next((n, p) for n, p in prepared.port.parts.model.named_parameters() if "embed" in n)
    assert not weight.requires_grad, name
    weight.data.mul_(1 + 2**-20)
    after = of(prepared)["frozen"]
    assert after["digest"] != before["digest"]
    assert {**after, "digest": ""} == {**before, "digest": ""}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_bits_are_sampled_not_values(dtype):
    """-0.0 and NaN are bits like others; an empty and a single tensor as well."""
    tensors = [
        ("a", torch.zeros(3, 5, dtype=dtype)),
        ("b", torch.zeros(0, dtype=dtype)),
        ("c", torch.ones((), dtype=dtype)),
    ]
    first = subject._sampled(tensors)
    assert subject._sampled([(n, t.clone()) for n, t in tensors]) == first
    tensors[0][1].view(torch.uint8).view(-1)[-1] = 0x80
    assert subject._sampled(tensors) != first


def test_a_large_tensor_is_sampled_from_end_to_end():
    big = torch.zeros(3 * subject._SAMPLED_ELEMENTS)
    before = subject._sampled([("w", big)])
    big += 1e-7
    assert subject._sampled([("w", big)]) != before


def test_the_machine_is_named(tmp_path):
    found = machine(torch.device("cpu"))
    assert found["device"]["type"] == "cpu"
    assert cpu_name() in found["device"]["name"]
    assert found["threads"] == torch.get_num_threads()
    assert {"finitune", "python", "torch", "transformers", "peft", "tokenizers"} <= set(found["versions"])
    (tmp_path / "cpuinfo").write_text("processor: 0\nmodel name\t: Some CPU @ 3 GHz\nmodel name: other\n")
    assert cpu_name(tmp_path / "cpuinfo") == "Some CPU @ 3 GHz"
    assert cpu_name(tmp_path / "absent")
    assert device_name(torch.device("meta")) == "meta"


def test_a_package_without_a_version_is_no_fault(monkeypatch):
    from importlib.metadata import PackageNotFoundError

    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(subject, "version", absent)
    assert machine(torch.device("cpu"))["versions"]["tokenizers"] == "?"
